//! The loops that take questions from sandboxes, over UDP and TCP, and their limits per sandbox. An answer
//! leaves from the address that was asked, whichever that was.

use std::{
    io::{self, IoSlice, IoSliceMut},
    net::{Ipv4Addr, SocketAddrV4},
    os::fd::AsRawFd as _,
    sync::Arc,
    time::Duration,
};

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, SockaddrIn, recvmsg, sendmsg};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, Interest},
    net::{TcpListener, TcpStream, UdpSocket},
};

use super::{Reply, Resolver, message::QUERY_MAX};
use crate::sandbox::Sandbox;

/// How long a DNS connection may say nothing.
const STREAM_IDLE: Duration = Duration::from_secs(10);
/// Questions of one connection.
const STREAM_QUESTIONS: usize = 100;
const PAUSE: Duration = Duration::from_millis(20);
/// Packets taken before other tasks get their turn.
const BURST: usize = 64;

/// One question over UDP.
struct Datagram {
    packet: Vec<u8>,
    from: SocketAddrV4,
    /// The address the sandbox asked.
    asked: Ipv4Addr,
}

impl Resolver {
    /// Answers questions over UDP until the program ends. `answers` is bound to port 53 and may send from any
    /// address.
    ///
    /// # Errors
    /// When a socket cannot be watched.
    pub async fn serve_udp(self: Arc<Self>, questions: UdpSocket, answers: UdpSocket) -> io::Result<()> {
        let answers = Arc::new(answers);
        let end = self.tasks.shutdown();
        loop {
            tokio::select! {
                ready = questions.readable() => ready?,
                () = end.cancelled() => return Ok(()),
            }
            for _ in 0..BURST {
                match questions.try_io(Interest::READABLE, || receive(&questions)) {
                    Ok(Some(datagram)) => self.take(datagram, &answers),
                    Ok(None) => {}
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

    fn take(self: &Arc<Self>, datagram: Datagram, answers: &Arc<UdpSocket>) {
        // The kernel has checked the source against the interface: it names the sandbox.
        let Some(sandbox) = self.sandboxes.by_address(*datagram.from.ip()) else {
            return;
        };
        let Ok(permit) = Arc::clone(&sandbox.limits.queries).try_acquire_owned() else {
            let reply = self.over_limit(&sandbox, &datagram.packet);
            if let Some(bytes) = reply.into_bytes(None)
                && let Err(error) = answers.try_io(Interest::WRITABLE, || send(answers, &bytes, &datagram))
            {
                tracing::debug!(%error, "cannot send a DNS answer");
            }
            return;
        };
        let (resolver, answers) = (Arc::clone(self), Arc::clone(answers));
        self.tasks
            .spawn_within("dns question", &sandbox.span(), async move {
                let _permit = permit;
                let reply = resolver.reply(&sandbox, &datagram.packet).await;
                let Some(bytes) = reply.into_bytes(None) else {
                    return;
                };
                let sent = answers
                    .async_io(Interest::WRITABLE, || send(&answers, &bytes, &datagram))
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
            let std::net::IpAddr::V4(from) = peer.ip() else {
                continue;
            };
            let Some(sandbox) = self.sandboxes.by_address(from) else {
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

    async fn converse(&self, sandbox: &Sandbox, mut stream: TcpStream) -> io::Result<()> {
        for _ in 0..STREAM_QUESTIONS {
            let reading = async {
                let length = usize::from(stream.read_u16().await?);
                if length > QUERY_MAX {
                    return Err(io::ErrorKind::InvalidData.into());
                }
                let mut packet = vec![0; length];
                stream.read_exact(&mut packet).await?;
                io::Result::Ok(packet)
            };
            let packet = tokio::time::timeout(STREAM_IDLE, reading).await??;
            let reply = match Arc::clone(&sandbox.limits.queries).try_acquire_owned() {
                Ok(_permit) => self.reply(sandbox, &packet).await,
                Err(_) => self.over_limit(sandbox, &packet),
            };
            let Some(bytes) = reply.into_bytes(Some(usize::from(u16::MAX))) else {
                return Ok(());
            };
            let length = u16::try_from(bytes.len()).map_err(io::Error::other)?;
            let framed = [&length.to_be_bytes()[..], &bytes].concat();
            tokio::time::timeout(STREAM_IDLE, stream.write_all(&framed)).await??;
        }
        Ok(())
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

/// Takes one datagram, with the address it was sent to. Nothing when it came without one.
fn receive(socket: &UdpSocket) -> io::Result<Option<Datagram>> {
    let mut packet = vec![0; QUERY_MAX + 1];
    let mut control = nix::cmsg_space!(libc::sockaddr_in);
    let (length, from, asked) = {
        let mut parts = [IoSliceMut::new(&mut packet)];
        let received = recvmsg::<SockaddrIn>(
            socket.as_raw_fd(),
            &mut parts,
            Some(&mut control),
            MsgFlags::MSG_DONTWAIT,
        )?;
        let asked = received.cmsgs()?.find_map(|message| match message {
            ControlMessageOwned::Ipv4OrigDstAddr(address) => Some(SockaddrIn::from(address).ip()),
            _ => None,
        });
        (received.bytes, received.address, asked)
    };
    packet.truncate(length);
    Ok(from.zip(asked).map(|(from, asked)| Datagram {
        packet,
        from: SocketAddrV4::from(from),
        asked,
    }))
}

/// Sends an answer from the address that was asked.
fn send(socket: &UdpSocket, bytes: &[u8], to: &Datagram) -> io::Result<()> {
    let from = libc::in_pktinfo {
        ipi_ifindex: 0,
        ipi_spec_dst: libc::in_addr {
            s_addr: u32::from(to.asked).to_be(),
        },
        ipi_addr: libc::in_addr { s_addr: 0 },
    };
    let parts = [IoSlice::new(bytes)];
    let control = [ControlMessage::Ipv4PacketInfo(&from)];
    let address = SockaddrIn::from(to.from);
    sendmsg(
        socket.as_raw_fd(),
        &parts,
        &control,
        MsgFlags::MSG_DONTWAIT,
        Some(&address),
    )?;
    Ok(())
}
