//! Where clients come in. Owns: accepting within bounds, and the tunnels' own ports on the loopback address: each is
//! kept by the supervisor under its tunnel's id, so that connections wait in its queue while this program restarts.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    io,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4},
    os::fd::{AsFd as _, OwnedFd},
    sync::Arc,
    time::Duration,
};

use sandgate_api::{
    id::TunnelId,
    tunnel::{Listening, TunnelError},
};
use sandgate_daemon::keep::StoreClient;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use tokio::{
    net::TcpListener,
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tokio_util::sync::CancellationToken;

use crate::{
    answer::Problem,
    app::Proxy,
    connection::{Connection, Entrance},
};

/// Connections beyond the bound that are told so; further ones wait in the queue.
const TOLD: usize = 32;
/// Tunnels with ports of their own: as many as the supervisor keeps.
const PORTS_MAX: usize = 1024;
/// Connections that wait to be accepted.
const BACKLOG: i32 = 1024;
/// After a failed accept (no descriptors left): the reason does not go away at once.
const PAUSE: Duration = Duration::from_millis(100);

/// Room for a number of connections, and for telling some more that there is none.
#[derive(Debug, Clone)]
pub struct Room {
    places: Arc<Semaphore>,
    told: Arc<Semaphore>,
}

/// A place in the room.
pub struct Place {
    _permit: OwnedSemaphorePermit,
    is_told: bool,
}

impl Room {
    /// For so many.
    pub fn new(places: usize) -> Self {
        Self {
            places: Arc::new(Semaphore::new(places)),
            told: Arc::new(Semaphore::new(TOLD)),
        }
    }

    /// A place, or one among those that are told that there is none; waits when those are taken too.
    pub async fn enter(&self) -> Place {
        loop {
            for (seats, is_told) in [(&self.places, false), (&self.told, true)] {
                if let Ok(permit) = Arc::clone(seats).try_acquire_owned() {
                    return Place {
                        _permit: permit,
                        is_told,
                    };
                }
            }
            tokio::select! {
                place = self.places.acquire() => drop(place),
                told = self.told.acquire() => drop(told),
            }
        }
    }
}

/// Accepts on the listener of all tunnels until the program ends.
pub async fn serve_shared(proxy: Arc<Proxy>, listener: TcpListener, room: Room) {
    let end = proxy.tasks.shutdown();
    accept(&proxy, &listener, &end, |stream, peer| {
        let room = room.clone();
        async move {
            let place = room.enter().await;
            let refusal = place.is_told.then_some(Problem::ProxyFull);
            (stream, peer, Entrance::Shared, refusal, Box::new(place) as Held)
        }
    })
    .await;
}

type Held = Box<dyn Send + Sync>;
type Entered = (tokio::net::TcpStream, SocketAddr, Entrance, Option<Problem>, Held);

/// Accepts until `end`; what waits in the queue then stays there for the successor.
async fn accept<F, E>(proxy: &Arc<Proxy>, listener: &TcpListener, end: &CancellationToken, enter: F)
where
    F: Fn(tokio::net::TcpStream, SocketAddr) -> E,
    E: Future<Output = Entered>,
{
    loop {
        let accepted = tokio::select! {
            biased;
            () = end.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        // One accepted connection at most waits here.
        let (stream, peer, entrance, refusal, held) = enter(stream, peer).await;
        let connection = Connection::new(Arc::clone(proxy), entrance, peer.ip(), refusal, held);
        proxy.tasks.spawn("client connection", connection.serve(stream));
    }
}

/// The tunnels' own ports.
pub struct OwnPorts {
    proxy: Arc<Proxy>,
    store: StoreClient,
    room: Room,
    /// What the supervisor gave back and no tunnel has claimed yet.
    kept: BTreeMap<String, OwnedFd>,
    open: HashMap<TunnelId, OwnPort>,
    errors: HashMap<TunnelId, String>,
}

struct OwnPort {
    port: u16,
    end: CancellationToken,
}

impl OwnPorts {
    /// Begins with what was kept.
    pub fn new(proxy: Arc<Proxy>, store: StoreClient, kept: BTreeMap<String, OwnedFd>, room: Room) -> Self {
        Self {
            proxy,
            store,
            room,
            kept,
            open: HashMap::new(),
            errors: HashMap::new(),
        }
    }

    /// Opens and closes ports, so that each tunnel has one. What was kept and is of no tunnel is given up only when
    /// the routes are `whole`: before the controller has spoken, its tunnel may only not be known yet.
    pub async fn follow(&mut self, is_whole: bool) {
        self.errors.clear();
        let routes = self.proxy.table.routes();
        let wanted: HashSet<&TunnelId> = routes.iter().map(|route| &route.tunnel_id).collect();
        let unwanted: Vec<TunnelId> = self
            .open
            .keys()
            .filter(|id| !wanted.contains(id))
            .cloned()
            .collect();
        for id in unwanted {
            if let Some(port) = self.open.remove(&id) {
                port.end.cancel();
            }
            self.forget(id.as_str()).await;
        }
        for route in &routes {
            if self.open.contains_key(&route.tunnel_id) {
                continue;
            }
            let id = route.tunnel_id.clone();
            match self.open(&id, route.local_port).await {
                Ok(port) => {
                    self.open.insert(id, port);
                }
                Err(error) => {
                    tracing::warn!(tunnel_id = %id, %error, "a tunnel gets no port of its own");
                    self.errors.insert(id, format!("no loopback port: {error}"));
                }
            }
        }
        if is_whole {
            for name in std::mem::take(&mut self.kept).into_keys() {
                self.forget(&name).await;
            }
        }
    }

    /// What is listened on.
    pub fn listening(&self) -> Vec<Listening> {
        let open = self.open.iter().map(|(id, own)| Listening {
            tunnel_id: id.clone(),
            local_port: own.port,
        });
        open.collect()
    }

    /// Tunnels without a port.
    pub fn errors(&self) -> Vec<TunnelError> {
        let errors = self.errors.iter().map(|(id, message)| TunnelError {
            tunnel_id: id.clone(),
            message: message.clone(),
        });
        errors.collect()
    }

    async fn open(&mut self, id: &TunnelId, before: Option<u16>) -> io::Result<OwnPort> {
        if self.open.len() >= PORTS_MAX {
            return Err(io::Error::other("too many tunnels are open"));
        }
        let listener = match self.kept.remove(id.as_str()) {
            Some(kept) => std::net::TcpListener::from(kept),
            None => {
                let listener = bind(before)?;
                self.store.keep(id.as_str(), listener.as_fd()).await?;
                listener
            }
        };
        let SocketAddr::V4(address) = listener.local_addr()? else {
            return Err(io::Error::other("a kept socket is of another family"));
        };
        if !address.ip().is_loopback() {
            return Err(io::Error::other("a kept socket listens elsewhere"));
        }
        listener.set_nonblocking(true)?;
        let listener = TcpListener::from_std(listener)?;
        let end = self.proxy.tasks.shutdown().child_token();
        let proxy = Arc::clone(&self.proxy);
        let (id, whole, ended) = (id.clone(), self.room.clone(), end.clone());
        let own = Room::new(proxy.limits.connections_each);
        self.proxy.tasks.spawn("own port", async move {
            serve_own(&proxy, &listener, &id, &ended, (whole, own)).await;
        });
        Ok(OwnPort {
            port: address.port(),
            end,
        })
    }

    async fn forget(&self, name: &str) {
        if let Err(error) = self.store.forget(name).await {
            tracing::warn!(name, %error, "a port cannot be given up");
        }
    }
}

async fn serve_own(
    proxy: &Arc<Proxy>,
    listener: &TcpListener,
    id: &TunnelId,
    end: &CancellationToken,
    (whole, own): (Room, Room),
) {
    accept(proxy, listener, end, |stream, peer| {
        let (whole, own) = (whole.clone(), own.clone());
        async move {
            let mine = own.enter().await;
            let all = whole.enter().await;
            let refusal = match (all.is_told, mine.is_told) {
                (true, _) => Some(Problem::ProxyFull),
                (false, true) => Some(Problem::TunnelFull),
                (false, false) => None,
            };
            let held = Box::new((mine, all)) as Held;
            match proxy.table.by_id(id) {
                Some(tunnel) => (stream, peer, Entrance::Own(tunnel), refusal, held),
                // It was closed this moment.
                None => (stream, peer, Entrance::Shared, Some(Problem::Closed), held),
            }
        }
    })
    .await;
}

/// On the loopback address only: on the port that was had before, if it is free, else on any.
fn bind(before: Option<u16>) -> io::Result<std::net::TcpListener> {
    match before.filter(|port| *port != 0).map(bind_to) {
        Some(Ok(listener)) => Ok(listener),
        Some(Err(_)) | None => bind_to(0),
    }
}

fn bind_to(port: u16) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM.cloexec(), Some(Protocol::TCP))?;
    // Connections of before that wait for their end do not keep the port.
    socket.set_reuse_address(true)?;
    socket.bind(&SockAddr::from(SocketAddrV4::new(Ipv4Addr::LOCALHOST, port)))?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_full_room_tells_some_and_lets_the_others_wait() {
        let room = Room::new(2);
        let first = room.enter().await;
        let _second = room.enter().await;
        assert!(!first.is_told);
        let mut told = Vec::new();
        for _ in 0..TOLD {
            told.push(room.enter().await);
        }
        assert!(told.iter().all(|place| place.is_told));
        let waiting = tokio::time::timeout(Duration::from_millis(50), room.enter()).await;
        assert!(waiting.is_err());
        drop(first);
        assert!(!room.enter().await.is_told);
    }

    #[test]
    fn a_port_that_is_taken_is_replaced_by_another() {
        let first = bind(None).expect("bound");
        let port = first.local_addr().expect("an address").port();
        let second = bind(Some(port)).expect("bound");
        assert_ne!(second.local_addr().expect("an address").port(), port);
        drop(first);
        let third = bind(Some(port)).expect("bound");
        assert_eq!(
            third.local_addr().expect("an address"),
            SocketAddr::from((Ipv4Addr::LOCALHOST, port))
        );
    }
}
