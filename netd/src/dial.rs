//! Connections into sandboxes, on behalf of the controller and of tunnel-proxy. Owns: which port each may reach, the
//! kernel's admission of exactly the connection that is made, by exactly the socket that makes it, and its end.
//!
//! The connected socket is handed over, so netd cannot see it close: a duplicate kept here would keep the
//! connection open. The admission is therefore ended by looking, every few seconds, which admitted
//! connections the router namespace's TCP table still lists. In between an admission without a connection
//! admits nothing: opening one is for the admitted socket alone, and packets of others are told apart by all
//! four numbers.

use std::{
    collections::HashMap,
    io,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4},
    os::fd::{AsFd as _, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use sandgate_api::{
    control::{DialError, DialReply, DialRequest, MAX_PACKET},
    id::SandboxId,
};
use sandgate_daemon::{handover::Channel, tasks::Tasks};
use tokio::{
    net::{TcpSocket, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
};

use crate::{
    kernel::{Datapath, EndpointHandle},
    router,
    sandbox::Sandboxes,
    sockets,
};

/// Time for a program in a sandbox to take the connection: both are on this machine.
const CONNECT_TIME: Duration = Duration::from_secs(2);
/// How often ended connections are looked for.
pub const SWEEP: Duration = Duration::from_secs(5);
/// An admission is not ended before this, so that a connection being made is not mistaken for an ended one.
const YOUNG: Duration = Duration::from_secs(4);
/// Requests of one socket that are not answered yet, also those that wait for a sandbox. Many times what one sandbox
/// may have of them ([`crate::sandbox::Limits`]): each holds a descriptor.
const UNANSWERED_MAX: usize = 2048;
/// Of them, those whose socket is being made and admitted. Each takes a thread for that; no sandbox can prolong it.
const MAKING_MAX: usize = 32;
/// Connections at once that tunnel-proxy may have. Each holds a port of the router namespace until it is gone: half of
/// them stay free, so that whatever strangers do, the controller reaches its agents.
const TUNNELED_MAX: usize = 16_384;
const _: () =
    assert!(TUNNELED_MAX <= router::EPHEMERAL_PORTS / 2 && TUNNELED_MAX <= netd_common::limit::INBOUND / 2);

/// Who asks, by the channel that its dial socket came over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Caller {
    /// Reaches the agent alone.
    Controller,
    /// Reaches the ports that tunnels lead to, never the agent.
    TunnelProxy,
}

/// Opens connections into sandboxes.
pub struct Inward {
    sandboxes: Arc<Sandboxes>,
    datapath: Arc<Datapath>,
    admitted: Mutex<HashMap<Pair, Admission>>,
}

/// Local and sandbox end of a connection.
type Pair = (SocketAddrV4, SocketAddrV4);

#[derive(Clone, Copy, PartialEq, Eq)]
struct Admission {
    endpoint: EndpointHandle,
    since: Instant,
    /// Of the admitted socket; unknown when an earlier netd made it. Tells it from a later one with the same ends.
    cookie: Option<u64>,
}

impl Inward {
    /// Opens nothing yet. Takes on the connections that an earlier netd opened: they go on, and their admissions end
    /// with them.
    pub fn new(sandboxes: Arc<Sandboxes>, datapath: Arc<Datapath>) -> Self {
        let since = Instant::now();
        let admissions = datapath.admissions().into_iter();
        let admitted = admissions
            .map(|(endpoint, local, remote)| {
                let admission = Admission {
                    endpoint,
                    since,
                    cookie: None,
                };
                ((local, remote), admission)
            })
            .collect();
        Self {
            sandboxes,
            datapath,
            admitted: Mutex::new(admitted),
        }
    }

    /// Answers requests on one dial socket until the other side closes it.
    pub async fn serve(self: Arc<Self>, socket: OwnedFd, caller: Caller, tasks: Tasks) {
        let channel = match Channel::from_fd(socket) {
            Ok(channel) => Arc::new(channel),
            Err(error) => {
                tracing::warn!(%error, "not a usable dial socket");
                return;
            }
        };
        let unanswered = Arc::new(Semaphore::new(UNANSWERED_MAX));
        let making = Arc::new(Semaphore::new(MAKING_MAX));
        let mut buffer = vec![0; MAX_PACKET];
        let end = tasks.shutdown();
        loop {
            // Waits here when too much is open: the caller's requests then wait in the socket.
            let Ok(place) = Arc::clone(&unanswered).acquire_owned().await else {
                return;
            };
            let Ok(turn) = Arc::clone(&making).acquire_owned().await else {
                return;
            };
            let received = tokio::select! {
                received = channel.recv(&mut buffer) => received,
                () = end.cancelled() => return,
            };
            let length = match received {
                Ok((0, _)) => return,
                Ok((length, _unwanted)) => length,
                Err(error) => {
                    tracing::warn!(%error, "a dial socket broke");
                    return;
                }
            };
            let request: DialRequest = match serde_json::from_slice(&buffer[..length]) {
                Ok(request) => request,
                Err(error) => {
                    tracing::warn!(%error, "an unreadable dial request");
                    return;
                }
            };
            let (inward, channel) = (Arc::clone(&self), Arc::clone(&channel));
            let span = tracing::info_span!(parent: None, "sandbox", sandbox_id = %request.sandbox_id);
            tasks.spawn_within("dial", &span, async move {
                let _place = place;
                let to = (&request.sandbox_id, request.port);
                let stream = inward.open(caller, to, turn).await;
                let (error, stream) = match stream {
                    Ok(stream) => (None, Some(stream)),
                    Err(error) => (Some(error), None),
                };
                let reply = DialReply {
                    request_id: request.request_id,
                    error,
                };
                let descriptor = stream.as_ref().map(|stream| stream.as_fd());
                let sent = match serde_json::to_vec(&reply) {
                    Ok(packet) => channel.send(&packet, descriptor).await,
                    Err(error) => Err(error.into()),
                };
                if let Err(error) = sent {
                    tracing::warn!(%error, "cannot answer a dial request");
                }
            });
        }
    }

    /// Connects. Gives the turn back before anything that the sandbox can prolong.
    async fn open(
        &self,
        caller: Caller,
        (id, port): (&SandboxId, u16),
        turn: OwnedSemaphorePermit,
    ) -> Result<TcpStream, DialError> {
        let sandbox = self.sandboxes.get(id).ok_or(DialError::UnknownSandbox)?;
        // Asked again when it is admitted; this spares a socket.
        let (reachable, dials) = match caller {
            Caller::Controller => (port == sandbox.endpoint.agent_port, &sandbox.limits.agent_dials),
            Caller::TunnelProxy => (sandbox.has_tunnel(port), &sandbox.limits.tunnel_dials),
        };
        if !reachable {
            return Err(DialError::PortNotAllowed);
        }
        // A listener that accepts takes no time, however many ask: what hangs here is one that does not, and one more
        // would hang as well. Held to the end also when the caller has long given up.
        let Ok(_dial) = dials.try_acquire() else {
            tracing::debug!(sandbox_id = %id, port, "too many connections into the sandbox are being made");
            return Err(DialError::TimedOut);
        };
        if caller == Caller::TunnelProxy && self.lock().len() >= TUNNELED_MAX {
            tracing::warn!(sandbox_id = %id, "too many connections through tunnels");
            return Err(DialError::Failed);
        }
        let failed = |error: &dyn std::error::Error| {
            tracing::warn!(sandbox_id = %id, %error, "cannot connect into a sandbox");
            DialError::Failed
        };
        let datapath = Arc::clone(&self.datapath);
        let made = tokio::task::spawn_blocking(move || sockets::inward(datapath.router())).await;
        let (socket, local) = made
            .map_err(|error| failed(&error))?
            .map_err(|error| failed(&error))?;
        let remote = SocketAddrV4::new(sandbox.endpoint.address, port);

        let cookie = socket.cookie().map_err(|error| failed(&error))?;

        let admission = Admission {
            endpoint: sandbox.handle,
            since: Instant::now(),
            cookie: Some(cookie),
        };
        {
            // Kernel and books in one step: an earlier connection with the same ends may just be taken out of both.
            let mut books = self.lock();
            let admitted = match caller {
                Caller::Controller => self
                    .datapath
                    .admit_inbound(sandbox.handle, port, local, cookie)
                    .map(|()| true),
                Caller::TunnelProxy => sandbox.admit_tunnel(port, local, cookie),
            };
            if !admitted.map_err(|error| failed(&error))? {
                return Err(DialError::PortNotAllowed);
            }
            books.insert((local, remote), admission);
        }
        drop(turn);

        let socket = TcpSocket::from_std_stream(socket.into());
        let outcome = match tokio::time::timeout(CONNECT_TIME, socket.connect(SocketAddr::V4(remote))).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => DialError::Refused,
            Ok(Err(error)) if error.kind() == io::ErrorKind::TimedOut => DialError::TimedOut,
            Ok(Err(error)) => failed(&error),
            Err(_elapsed) => DialError::TimedOut,
        };
        self.revoke((local, remote), admission);
        Err(outcome)
    }

    /// Ends the admissions of connections that are no more. Blocking.
    pub fn sweep(&self) {
        let old: Vec<(Pair, Admission)> = {
            let admitted = self.lock();
            admitted
                .iter()
                .filter(|(_, admission)| admission.since.elapsed() >= YOUNG)
                .map(|(pair, admission)| (*pair, *admission))
                .collect()
        };
        if old.is_empty() {
            return;
        }
        let table = match self
            .datapath
            .router()
            .run(|| std::fs::read_to_string("/proc/thread-self/net/tcp"))
        {
            Ok(Ok(table)) => table,
            Ok(Err(error)) => {
                tracing::warn!(%error, "cannot read the router namespace's connections");
                return;
            }
            Err(error) => {
                tracing::warn!(%error, "cannot read the router namespace's connections");
                return;
            }
        };
        let open: std::collections::HashSet<Pair> = table.lines().filter_map(read_line).collect();
        for (pair, admission) in old {
            if !open.contains(&pair) {
                self.revoke(pair, admission);
            }
        }
    }

    /// Ends an admission, unless its ends have been admitted anew.
    fn revoke(&self, pair: Pair, admission: Admission) {
        let (local, remote) = pair;
        let mut books = self.lock();
        if books.get(&pair) != Some(&admission) {
            return;
        }
        if let Err(error) = self
            .datapath
            .revoke_inbound(admission.endpoint, remote.port(), local)
        {
            tracing::debug!(%error, "cannot end an admission; it may have ended with its sandbox");
        }
        books.remove(&pair);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Pair, Admission>> {
        self.admitted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Both ends of a line of `/proc/net/tcp`: addresses as native words in hexadecimal (proc_net_tcp.txt).
fn read_line(line: &str) -> Option<Pair> {
    let mut words = line.split_whitespace();
    words.next().filter(|number| number.ends_with(':'))?;
    Some((end(words.next()?)?, end(words.next()?)?))
}

fn end(text: &str) -> Option<SocketAddrV4> {
    let (address, port) = text.split_once(':')?;
    let address = u32::from_str_radix(address, 16).ok()?;
    let port = u16::from_str_radix(port, 16).ok()?;
    Some(SocketAddrV4::new(Ipv4Addr::from(address.to_ne_bytes()), port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_real_connection_is_found_in_the_table() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bound");
        let SocketAddr::V4(to) = listener.local_addr().expect("bound") else {
            panic!("not IPv4")
        };
        let stream = std::net::TcpStream::connect(to).expect("connected");
        let SocketAddr::V4(from) = stream.local_addr().expect("connected") else {
            panic!("not IPv4")
        };
        let listed = |pair| {
            let table = std::fs::read_to_string("/proc/thread-self/net/tcp").expect("read");
            table.lines().filter_map(read_line).any(|line| line == pair)
        };
        assert!(listed((from, to)));
        assert!(!listed((from, SocketAddrV4::new(*to.ip(), to.port() ^ 1))));
    }
}
