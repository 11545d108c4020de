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
use tokio::net::{TcpSocket, TcpStream};

use crate::{
    kernel::{Datapath, EndpointHandle},
    sandbox::Sandboxes,
    sockets,
};

/// Time for a program in a sandbox to take the connection: both are on this machine.
const CONNECT_TIME: Duration = Duration::from_secs(2);
/// How often ended connections are looked for.
pub const SWEEP: Duration = Duration::from_secs(5);
/// An admission is not ended before this, so that a connection being made is not mistaken for an ended one.
const YOUNG: Duration = Duration::from_secs(4);
/// Requests of one socket that are worked on at once.
const REQUESTS_MAX: usize = 64;
/// Connections at once that tunnel-proxy may have: three quarters of what the kernel's table holds, so that whatever
/// strangers do, the controller reaches its agents.
const TUNNELED_MAX: usize = netd_common::limit::INBOUND / 4 * 3;

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

#[derive(Clone, Copy)]
struct Admission {
    endpoint: EndpointHandle,
    since: Instant,
}

impl Inward {
    /// Opens nothing yet. Takes on the connections that an earlier netd opened: they go on, and their admissions end
    /// with them.
    pub fn new(sandboxes: Arc<Sandboxes>, datapath: Arc<Datapath>) -> Self {
        let since = Instant::now();
        let admissions = datapath.admissions().into_iter();
        let admitted = admissions
            .map(|(endpoint, local, remote)| ((local, remote), Admission { endpoint, since }))
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
        let slots = Arc::new(tokio::sync::Semaphore::new(REQUESTS_MAX));
        let mut buffer = vec![0; MAX_PACKET];
        let end = tasks.shutdown();
        loop {
            // Waits here when too much is open: the caller's requests then wait in the socket.
            let Ok(slot) = Arc::clone(&slots).acquire_owned().await else {
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
                let _slot = slot;
                let stream = inward.open(caller, &request.sandbox_id, request.port).await;
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

    async fn open(&self, caller: Caller, id: &SandboxId, port: u16) -> Result<TcpStream, DialError> {
        let sandbox = self.sandboxes.get(id).ok_or(DialError::UnknownSandbox)?;
        // Asked again when it is admitted; this spares a socket.
        let reachable = match caller {
            Caller::Controller => port == sandbox.endpoint.agent_port,
            Caller::TunnelProxy => sandbox.has_tunnel(port),
        };
        if !reachable {
            return Err(DialError::PortNotAllowed);
        }
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
        let admission = Admission {
            endpoint: sandbox.handle,
            since: Instant::now(),
        };
        self.lock().insert((local, remote), admission);

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

    fn revoke(&self, pair: Pair, admission: Admission) {
        let (local, remote) = pair;
        if let Err(error) = self
            .datapath
            .revoke_inbound(admission.endpoint, remote.port(), local)
        {
            tracing::debug!(%error, "cannot end an admission; it may have ended with its sandbox");
        }
        self.lock().remove(&pair);
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
