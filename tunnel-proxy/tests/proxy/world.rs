//! A proxy, programs behind it, and clients in front of it.

use std::{
    collections::HashMap,
    net::SocketAddr,
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::future::BoxFuture;
use jiff::{Timestamp, ToSpan as _};
use sandgate_api::{
    control::DialError,
    id::{SandboxId, TunnelId},
    tunnel::{Access, Route, TunnelFrame, TunnelProtocol},
};
use sandgate_daemon::{
    handover::{self, Channel},
    keep::{DescriptorStore, StoreClient},
    tasks::Tasks,
};
use sandgate_relay::inward::DialFailure;
use sha2::{Digest as _, Sha256};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};
use tokio_util::sync::CancellationToken;
use tunnel_proxy::{
    app::{self, Proxy},
    config::{Limits, Scheme},
    feed::close,
    listeners::{OwnPorts, Room, serve_shared},
    metrics::Metrics,
    routes::Table,
    upstream::{Dial, Upstream},
};

pub(crate) const SANDBOX: &str = "sandbox-0a1b";
pub(crate) const TOKEN: &str = "the-token-of-this-tunnel";

/// Reaches programs by what port they would have in a sandbox.
#[derive(Default)]
pub(crate) struct Programs {
    at: Mutex<HashMap<u16, Result<SocketAddr, DialFailureKind>>>,
    pub(crate) dials: AtomicUsize,
}

#[derive(Clone, Copy)]
pub(crate) enum DialFailureKind {
    Refused(DialError),
    Away,
}

impl Dial for Programs {
    fn dial<'a>(&'a self, id: &'a SandboxId, port: u16) -> BoxFuture<'a, Result<TcpStream, DialFailure>> {
        assert_eq!(id.as_str(), SANDBOX);
        let at = self.at.lock().expect("a lock").get(&port).copied();
        Box::pin(async move {
            self.dials.fetch_add(1, Ordering::Relaxed);
            match at {
                Some(Ok(address)) => Ok(TcpStream::connect(address).await?),
                Some(Err(DialFailureKind::Refused(error))) => Err(error.into()),
                Some(Err(DialFailureKind::Away)) => Err(DialFailure::Away),
                None => Err(DialError::PortNotAllowed.into()),
            }
        })
    }
}

pub(crate) struct World {
    pub(crate) proxy: Arc<Proxy>,
    pub(crate) programs: Arc<Programs>,
    pub(crate) address: SocketAddr,
    pub(crate) tasks: Tasks,
    late: Tasks,
    room: Room,
    store: Arc<DescriptorStore>,
    revision: AtomicUsize,
}

pub(crate) const LIMITS: Limits = Limits {
    connections: 100,
    connections_each: 20,
    header_timeout: Duration::from_secs(10),
    idle_timeout: Duration::from_secs(3600),
};

const INWARD: usize = 1000;

impl World {
    pub(crate) async fn start() -> Self {
        Self::start_with(LIMITS).await
    }

    /// The program once more, over the same descriptor store and the same programs, without a listener of all tunnels.
    pub(crate) fn restarted(&self) -> Self {
        let tasks = Tasks::new(CancellationToken::new());
        let late = Tasks::new(CancellationToken::new());
        let limits = self.proxy.limits;
        let dial = Arc::clone(&self.programs) as Arc<dyn Dial>;
        let metrics = Arc::new(Metrics::default());
        let proxy = Arc::new(Proxy {
            table: Table::new(limits.connections_each),
            domain: "localhost".to_owned(),
            scheme: Scheme::Http,
            limits,
            upstream: Upstream::new(dial, INWARD, late.clone(), Arc::clone(&metrics)),
            tasks: tasks.clone(),
            metrics,
        });
        Self {
            proxy,
            programs: Arc::clone(&self.programs),
            address: self.address,
            tasks,
            late,
            room: Room::new(limits.connections),
            store: Arc::clone(&self.store),
            revision: AtomicUsize::new(1),
        }
    }

    pub(crate) async fn start_with(limits: Limits) -> Self {
        Self::start_bounded(limits, INWARD).await
    }

    /// With so many connections to programs at once.
    pub(crate) async fn start_bounded(limits: Limits, inward: usize) -> Self {
        let tasks = Tasks::new(CancellationToken::new());
        let late = Tasks::new(CancellationToken::new());
        let programs = Arc::new(Programs::default());
        let metrics = Arc::new(Metrics::default());
        let proxy = Arc::new(Proxy {
            table: Table::new(limits.connections_each),
            domain: "localhost".to_owned(),
            scheme: Scheme::Http,
            limits,
            upstream: Upstream::new(
                Arc::clone(&programs) as Arc<dyn Dial>,
                inward,
                late.clone(),
                Arc::clone(&metrics),
            ),
            tasks: tasks.clone(),
            metrics,
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let address = listener.local_addr().expect("an address");
        let room = Room::new(limits.connections);
        tasks.spawn(
            "listener",
            serve_shared(Arc::clone(&proxy), listener, room.clone()),
        );
        app::keep_tidy(&proxy, &late);
        Self {
            proxy,
            programs,
            address,
            tasks,
            late,
            room,
            store: Arc::default(),
            revision: AtomicUsize::new(1),
        }
    }

    /// Opens a tunnel to the program at `at`; its host name.
    pub(crate) async fn open(&self, port: u16, at: SocketAddr) -> String {
        self.open_as(port, Ok(at), TunnelProtocol::Http, public()).await
    }

    pub(crate) async fn open_as(
        &self,
        port: u16,
        at: Result<SocketAddr, DialFailureKind>,
        protocol: TunnelProtocol,
        access: Access,
    ) -> String {
        self.programs.at.lock().expect("a lock").insert(port, at);
        self.upsert(route(port, protocol, access)).await;
        format!("{port}-{SANDBOX}.localhost")
    }

    pub(crate) async fn upsert(&self, route: Route) {
        self.apply(vec![route], Vec::new()).await;
    }

    pub(crate) async fn close(&self, port: u16) {
        self.apply(Vec::new(), vec![id(port)]).await;
    }

    async fn apply(&self, upserts: Vec<Route>, removed: Vec<TunnelId>) {
        let revision = self.revision.fetch_add(1, Ordering::Relaxed) as u64;
        let frame = TunnelFrame::Delta {
            revision,
            upserts,
            removed,
        };
        close(&self.proxy.table.apply(frame)).await;
    }

    /// The own ports as one start of the program has them; they are kept in this world's store.
    pub(crate) async fn own_ports(&self) -> OwnPorts {
        let (ours, theirs) = handover::pair().expect("a pair");
        let (store, ours) = (Arc::clone(&self.store), channel(ours));
        self.late
            .spawn("descriptor store", async move { store.serve(&ours).await });
        let (client, kept) = StoreClient::open(channel(theirs)).await.expect("opened");
        OwnPorts::new(Arc::clone(&self.proxy), client, kept, self.room.clone())
    }

    /// Waits until the supervisor holds so many sockets: it hears out one start of the program before the next.
    pub(crate) async fn holds(&self, count: usize) {
        in_time("the descriptor store", async {
            while self.store.len() != count {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
    }

    /// The address of the port of its own that a tunnel has.
    pub(crate) fn own_address(ports: &OwnPorts, port: u16) -> SocketAddr {
        let listening = ports.listening();
        let own = listening.iter().find(|own| own.tunnel_id == id(port));
        let own = own.expect("a port of its own").local_port;
        SocketAddr::from(([127, 0, 0, 1], own))
    }

    pub(crate) async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.expect("connected")
    }

    /// Sends bytes on a connection of their own and reads until the other side closes it, for at most twice [`SOON`].
    pub(crate) async fn say(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect().await;
        // The answer may come before everything is said.
        let _refused = stream.write_all(bytes).await;
        read_all(&mut stream).await
    }

    /// One request of HTTP/1.1 without a body, and its answer.
    pub(crate) async fn get(&self, host: &str, headers: &str) -> String {
        let request = format!("GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{headers}\r\n");
        self.say(request.as_bytes()).await
    }
}

fn channel(descriptor: OwnedFd) -> Channel {
    Channel::from_fd(descriptor).expect("a channel")
}

pub(crate) fn id(port: u16) -> TunnelId {
    format!("tunnel-{port}").parse().expect("an id")
}

pub(crate) fn route(port: u16, protocol: TunnelProtocol, access: Access) -> Route {
    Route {
        tunnel_id: id(port),
        sandbox_id: SANDBOX.parse().expect("an id"),
        port,
        protocol,
        access,
        expires_at: Timestamp::now() + 1.hour(),
        local_port: None,
    }
}

pub(crate) fn public() -> Access {
    Access::Public
}

pub(crate) fn private() -> Access {
    Access::Token {
        sha256: hex::encode(Sha256::digest(TOKEN)),
    }
}

pub(crate) async fn read_all(stream: &mut TcpStream) -> String {
    let mut all = Vec::new();
    let reading = async { while matches!(stream.read_buf(&mut all).await, Ok(1..)) {} };
    let _elapsed = tokio::time::timeout(2 * SOON, reading).await;
    String::from_utf8_lossy(&all).into_owned()
}

/// Reads until `end` was read.
pub(crate) async fn read_until(stream: &mut TcpStream, end: &str) -> String {
    let mut all = Vec::new();
    let reading = async {
        while !String::from_utf8_lossy(&all).contains(end) {
            match stream.read_buf(&mut all).await {
                Ok(1..) => {}
                Ok(0) | Err(_) => break,
            }
        }
    };
    let _elapsed = tokio::time::timeout(SOON, reading).await;
    let text = String::from_utf8_lossy(&all).into_owned();
    assert!(text.contains(end), "{end:?} did not come, but {text:?}");
    text
}

/// A program of plain bytes: `serve` has each connection.
pub(crate) async fn program<F, E>(serve: F) -> SocketAddr
where
    F: Fn(TcpStream) -> E + Send + Sync + 'static,
    E: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let address = listener.local_addr().expect("an address");
    spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            spawn(serve(stream));
        }
    });
    address
}

/// A program that keeps each request's head (and the body by Content-Length) and answers every one the same.
pub(crate) async fn recorder(answer: &'static str) -> (SocketAddr, Arc<Mutex<Vec<String>>>) {
    let heard = Arc::new(Mutex::new(Vec::new()));
    let kept = Arc::clone(&heard);
    let address = program(move |mut stream| {
        let kept = Arc::clone(&kept);
        async move {
            let mut received = Vec::new();
            loop {
                while let Some(request) = take_request(&mut received) {
                    kept.lock().expect("a lock").push(request);
                    if stream.write_all(answer.as_bytes()).await.is_err() {
                        return;
                    }
                }
                if !matches!(stream.read_buf(&mut received).await, Ok(1..)) {
                    return;
                }
            }
        }
    })
    .await;
    (address, heard)
}

fn take_request(received: &mut Vec<u8>) -> Option<String> {
    let text = String::from_utf8_lossy(received).to_ascii_lowercase();
    let head = text.find("\r\n\r\n")? + 4;
    let length = text[..head]
        .lines()
        .find_map(|line| line.strip_prefix("content-length: "))
        .map_or(0, |length| length.trim().parse().expect("a length"));
    if received.len() < head + length {
        return None;
    }
    let request: Vec<u8> = received.drain(..head + length).collect();
    Some(String::from_utf8_lossy(&request).into_owned())
}

pub(crate) const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Type: text/plain\r\n\r\nok";

pub(crate) fn status(answer: &str) -> u16 {
    let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok());
    status.unwrap_or_else(|| panic!("no answer: {answer:?}"))
}

/// The value of a header of an answer or a request.
pub(crate) fn header<'a>(message: &'a str, name: &str) -> Option<&'a str> {
    let head = message.split("\r\n\r\n").next()?;
    head.lines().skip(1).find_map(|line| {
        let (found, value) = line.split_once(':')?;
        found.eq_ignore_ascii_case(name).then(|| value.trim())
    })
}

#[expect(clippy::disallowed_methods, reason = "a test's programs end with its runtime")]
pub(crate) fn spawn(task: impl Future<Output = ()> + Send + 'static) {
    tokio::spawn(task);
}

/// Longest wait for what happens within a second on a machine that has nothing else to do, and without its cause not in an
/// hour ([`LIMITS`]).
pub(crate) const SOON: Duration = Duration::from_secs(30);

/// Fails when it takes longer than that.
pub(crate) async fn in_time<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(SOON, future).await {
        Ok(output) => output,
        Err(_elapsed) => panic!("{what} took longer than {SOON:?}"),
    }
}

/// Waits until it is so.
pub(crate) async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    in_time(what, async {
        while !is_so() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}
