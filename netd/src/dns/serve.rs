//! The loops that take questions from sandboxes, over UDP and TCP, and their limits per sandbox.

use std::{io, net::IpAddr, sync::Arc, time::Duration};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use tokio::{
    io::{AsyncWriteExt as _, Interest},
    net::{TcpListener, TcpStream, UdpSocket},
};
use tokio_util::codec::LengthDelimitedCodec;

use super::{
    Reply, Resolver, Step,
    datagrams::{self, Buffers, Way},
    message::QUERY_MAX,
};
use crate::sandbox::Sandbox;

/// How long a DNS connection may say nothing, or not take what it is told (RFC 7766, 6.2.3).
const STREAM_IDLE: Duration = Duration::from_secs(10);
/// Questions of one connection.
const STREAM_QUESTIONS: usize = 1000;
/// Questions of one connection that are being answered at once; more are read when some are answered.
const STREAM_OPEN: usize = 16;
const PAUSE: Duration = Duration::from_millis(20);
/// Calls that take packets before other tasks get their turn.
const BURST: usize = 8;

impl Resolver {
    /// Answers questions over UDP until the program ends. `answers` is bound to port 53, of the same family, and may
    /// send from any address.
    ///
    /// # Errors
    /// When a socket cannot be watched.
    pub async fn serve_udp(
        self: Arc<Self>,
        questions: Arc<UdpSocket>,
        answers: Arc<UdpSocket>,
    ) -> io::Result<()> {
        let end = self.tasks.shutdown();
        let mut buffers = Buffers::new();
        loop {
            tokio::select! {
                ready = questions.readable() => ready?,
                () = end.cancelled() => return Ok(()),
            }
            for _ in 0..BURST {
                let received = questions.try_io(Interest::READABLE, || {
                    datagrams::receive(&questions, &mut buffers)
                });
                match received {
                    Ok(received) => {
                        let all = received.into_iter().enumerate();
                        let replies = all.filter_map(|(index, (length, way))| {
                            self.take(buffers.get(index, length), way?, &answers)
                        });
                        try_answer(&answers, &replies.collect::<Vec<_>>());
                    }
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

    /// Works on a packet. Gives the answer that can be sent at once.
    fn take(self: &Arc<Self>, packet: &[u8], way: Way, answers: &Arc<UdpSocket>) -> Option<(Vec<u8>, Way)> {
        // The kernel has checked the source against the interface: it names the sandbox.
        let sandbox = self.sandbox_at(way.from.ip())?;
        let way = Way {
            interface: sandbox.endpoint.ifindex,
            ..way
        };
        let Ok(permit) = Arc::clone(&sandbox.limits.queries).try_acquire_owned() else {
            let reply = self.over_limit(&sandbox, packet);
            return reply.into_bytes(None).map(|bytes| (bytes, way));
        };
        let waiting = match self.begin(&sandbox, packet) {
            Step::Done(reply) => return reply.into_bytes(None).map(|bytes| (bytes, way)),
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
                    .async_io(Interest::WRITABLE, || datagrams::send(&answers, &bytes, way))
                    .await;
                if let Err(error) = sent {
                    tracing::debug!(%error, "cannot send a DNS answer");
                }
            });
        None
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
fn try_answer(socket: &UdpSocket, mut answers: &[(Vec<u8>, Way)]) {
    while !answers.is_empty() {
        let sent = socket.try_io(Interest::WRITABLE, || datagrams::send_some(socket, answers));
        let done = sent.unwrap_or_else(|error| {
            tracing::debug!(%error, "cannot send a DNS answer");
            1
        });
        answers = answers.get(done.max(1)..).unwrap_or_default();
    }
}
