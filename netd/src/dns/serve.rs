//! The loops that take questions from sandboxes, over UDP and TCP, and their limits per sandbox. An answer
//! leaves from the address that was asked, whichever that was.

use std::{
    io::{self, IoSlice, IoSliceMut},
    net::{IpAddr, SocketAddr, SocketAddrV4, SocketAddrV6},
    os::fd::AsRawFd as _,
    sync::Arc,
    time::Duration,
};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrIn, SockaddrIn6, SockaddrStorage, recvmsg, sendmsg,
};
use tokio::{
    io::{AsyncWriteExt as _, Interest},
    net::{TcpListener, TcpStream, UdpSocket},
};
use tokio_util::codec::LengthDelimitedCodec;

use super::{Reply, Resolver, Step, message::QUERY_MAX};
use crate::sandbox::Sandbox;

/// How long a DNS connection may say nothing, or not take what it is told (RFC 7766, 6.2.3).
const STREAM_IDLE: Duration = Duration::from_secs(10);
/// Questions of one connection.
const STREAM_QUESTIONS: usize = 1000;
/// Questions of one connection that are being answered at once; more are read when some are answered.
const STREAM_OPEN: usize = 16;
const PAUSE: Duration = Duration::from_millis(20);
/// Packets taken before other tasks get their turn.
const BURST: usize = 64;

/// Who asked, and what address it was that they asked.
#[derive(Debug, Clone, Copy)]
struct Way {
    from: SocketAddr,
    asked: IpAddr,
    /// The sandbox's interface: a link-local address is asked by way of it, and means nothing without it.
    interface: u32,
}

impl Resolver {
    /// Answers questions over UDP until the program ends. `answers` is bound to port 53, of the same family, and may
    /// send from any address.
    ///
    /// # Errors
    /// When a socket cannot be watched.
    pub async fn serve_udp(self: Arc<Self>, questions: UdpSocket, answers: UdpSocket) -> io::Result<()> {
        let answers = Arc::new(answers);
        let end = self.tasks.shutdown();
        let mut buffer = [0; QUERY_MAX + 1];
        loop {
            tokio::select! {
                ready = questions.readable() => ready?,
                () = end.cancelled() => return Ok(()),
            }
            for _ in 0..BURST {
                match questions.try_io(Interest::READABLE, || receive(&questions, &mut buffer)) {
                    Ok((length, Some(way))) => self.take(&buffer[..length], way, &answers),
                    Ok((_, None)) => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => {
                        tracing::warn!(%error, "cannot receive a DNS question");
                        tokio::time::sleep(PAUSE).await;
                        break;
                    }
                }
            }
            tokio::task::yield_now().await;
        }
    }

    fn take(self: &Arc<Self>, packet: &[u8], way: Way, answers: &Arc<UdpSocket>) {
        // The kernel has checked the source against the interface: it names the sandbox.
        let Some(sandbox) = self.sandbox_at(way.from.ip()) else {
            return;
        };
        let way = Way {
            interface: sandbox.endpoint.ifindex,
            ..way
        };
        let Ok(permit) = Arc::clone(&sandbox.limits.queries).try_acquire_owned() else {
            return try_answer(answers, self.over_limit(&sandbox, packet), way);
        };
        let waiting = match self.begin(&sandbox, packet) {
            Step::Done(reply) => return try_answer(answers, reply, way),
            Step::Wait(waiting) => waiting,
        };
        let (resolver, answers) = (Arc::clone(self), Arc::clone(answers));
        self.tasks
            .spawn_within("dns question", &sandbox.span(), async move {
                let _permit = permit;
                let reply = resolver.finish(&sandbox, waiting).await;
                let Some(bytes) = reply.into_bytes(None) else {
                    return;
                };
                let sent = answers
                    .async_io(Interest::WRITABLE, || send(&answers, &bytes, way))
                    .await;
                if let Err(error) = sent {
                    tracing::debug!(%error, "cannot send a DNS answer");
                }
            });
    }

    /// Answers questions over TCP until the program ends.
    pub async fn serve_tcp(self: Arc<Self>, listener: TcpListener) {
        let end = self.tasks.shutdown();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = end.cancelled() => return,
            };
            let (stream, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a DNS connection");
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            };
            let Some(sandbox) = self.sandbox_at(peer.ip()) else {
                continue;
            };
            let Ok(permit) = Arc::clone(&sandbox.limits.dns_streams).try_acquire_owned() else {
                continue;
            };
            let (resolver, end) = (Arc::clone(&self), end.clone());
            self.tasks
                .spawn_within("dns connection", &sandbox.span(), async move {
                    let _permit = permit;
                    tokio::select! {
                        served = resolver.converse(&sandbox, stream) => {
                            if let Err(error) = served {
                                tracing::debug!(sandbox_id = %sandbox.id, %error, "a DNS connection ended");
                            }
                        }
                        () = end.cancelled() => {}
                    }
                });
        }
    }

    /// Answers the questions of one connection as they can be answered, which need not be the order in which they came
    /// (RFC 7766, 7).
    async fn converse(&self, sandbox: &Sandbox, stream: TcpStream) -> io::Result<()> {
        let (reader, mut writer) = stream.into_split();
        let mut questions = LengthDelimitedCodec::builder()
            .length_field_length(2)
            .max_frame_length(QUERY_MAX)
            .new_read(reader);
        let mut open = FuturesUnordered::new();
        let mut left = STREAM_QUESTIONS;
        loop {
            if left == 0 && open.is_empty() {
                return Ok(());
            }
            tokio::select! {
                Some(reply) = open.next(), if !open.is_empty() => {
                    let reply: Reply = reply;
                    let Some(bytes) = reply.into_bytes(Some(usize::from(u16::MAX))) else {
                        return Ok(());
                    };
                    let length = u16::try_from(bytes.len()).map_err(io::Error::other)?;
                    let framed = [&length.to_be_bytes()[..], &bytes].concat();
                    tokio::time::timeout(STREAM_IDLE, writer.write_all(&framed)).await??;
                }
                question = tokio::time::timeout(STREAM_IDLE, questions.next()),
                        if left > 0 && open.len() < STREAM_OPEN => {
                    // What was asked is answered, also when nothing more comes.
                    let Ok(Some(question)) = question else {
                        left = 0;
                        continue;
                    };
                    let question = question?;
                    left -= 1;
                    open.push(async move {
                        let Ok(_permit) = Arc::clone(&sandbox.limits.queries).try_acquire_owned() else {
                            return self.over_limit(sandbox, &question);
                        };
                        match self.begin(sandbox, &question) {
                            Step::Done(reply) => reply,
                            Step::Wait(waiting) => self.finish(sandbox, waiting.apart()).await,
                        }
                    });
                }
            }
        }
    }

    fn sandbox_at(&self, address: IpAddr) -> Option<Arc<Sandbox>> {
        self.sandboxes.by_address(address)
    }
}

impl Reply {
    /// The bytes to send; `limit` is what the transport carries, else what the client said it takes.
    fn into_bytes(self, limit: Option<usize>) -> Option<Vec<u8>> {
        match self {
            Self::Answer { answer, payload } => answer.encode(limit.unwrap_or_else(|| usize::from(payload))),
            Self::Plain(bytes) => Some(bytes),
            Self::Silence => None,
        }
    }
}

/// Sends what can be sent at once: a sandbox whose answers find no room asks again.
fn try_answer(socket: &UdpSocket, reply: Reply, way: Way) {
    if let Some(bytes) = reply.into_bytes(None)
        && let Err(error) = socket.try_io(Interest::WRITABLE, || send(socket, &bytes, way))
    {
        tracing::debug!(%error, "cannot send a DNS answer");
    }
}

/// Takes one datagram, with the address it was sent to. No way when it came without one.
fn receive(socket: &UdpSocket, buffer: &mut [u8]) -> io::Result<(usize, Option<Way>)> {
    let mut control = nix::cmsg_space!(libc::sockaddr_in6);
    let mut parts = [IoSliceMut::new(buffer)];
    let received = recvmsg::<SockaddrStorage>(
        socket.as_raw_fd(),
        &mut parts,
        Some(&mut control),
        MsgFlags::MSG_DONTWAIT,
    )?;
    let asked = received.cmsgs()?.find_map(|message| match message {
        ControlMessageOwned::Ipv4OrigDstAddr(address) => Some(IpAddr::V4(SockaddrIn::from(address).ip())),
        ControlMessageOwned::Ipv6OrigDstAddr(address) => Some(IpAddr::V6(SockaddrIn6::from(address).ip())),
        _ => None,
    });
    let from = received.address.and_then(|address| {
        let v4 = address
            .as_sockaddr_in()
            .map(|v4| SocketAddr::V4(SocketAddrV4::from(*v4)));
        v4.or_else(|| {
            address
                .as_sockaddr_in6()
                .map(|v6| SocketAddr::V6(SocketAddrV6::from(*v6)))
        })
    });
    let way = from.zip(asked).map(|(from, asked)| Way {
        from,
        asked,
        interface: 0,
    });
    Ok((received.bytes, way))
}

/// Sends an answer from the address that was asked.
fn send(socket: &UdpSocket, bytes: &[u8], way: Way) -> io::Result<()> {
    let parts = [IoSlice::new(bytes)];
    let to = SockaddrStorage::from(way.from);
    let from4;
    let from6;
    let control = match way.asked {
        IpAddr::V4(asked) => {
            from4 = libc::in_pktinfo {
                ipi_ifindex: 0,
                ipi_spec_dst: libc::in_addr {
                    s_addr: u32::from(asked).to_be(),
                },
                ipi_addr: libc::in_addr { s_addr: 0 },
            };
            ControlMessage::Ipv4PacketInfo(&from4)
        }
        IpAddr::V6(asked) => {
            from6 = libc::in6_pktinfo {
                ipi6_ifindex: way.interface,
                ipi6_addr: libc::in6_addr {
                    s6_addr: asked.octets(),
                },
            };
            ControlMessage::Ipv6PacketInfo(&from6)
        }
    };
    sendmsg(
        socket.as_raw_fd(),
        &parts,
        &[control],
        MsgFlags::MSG_DONTWAIT,
        Some(&to),
    )?;
    Ok(())
}
