//! Connections into sandboxes, made by netd and passed back as descriptors ([`sandgate_api::control`]).
//!
//! netd alone decides which ports its caller may have: the agent's on the controller's channel, those of open
//! tunnels on tunnel-proxy's.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd as _, OwnedFd},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use sandgate_api::{
    control::{DialError, DialReply, DialRequest, MAX_PACKET, Open},
    id::SandboxId,
};
use sandgate_daemon::{
    handover::{self, Channel},
    tasks::Tasks,
};
use tokio::{
    net::TcpStream,
    sync::{Mutex as AsyncMutex, oneshot},
};

/// How long a dial may take in all, also while netd restarts.
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum DialFailure {
    /// netd answered.
    #[error(transparent)]
    Refused(#[from] DialError),
    /// netd did not answer in time.
    #[error("the node did not answer in time")]
    Silent,
    /// netd is away.
    #[error("the node is away")]
    Away,
    /// A descriptor could not be made, sent or used.
    #[error("the connection to the node failed: {0}")]
    Io(#[from] io::Error),
}

/// Asks netd for connections, on a socket that is replaced whenever netd closes it.
#[derive(Debug)]
pub struct Dialer {
    control: Arc<Channel>,
    tasks: Tasks,
    conversation: AsyncMutex<Option<Arc<Conversation>>>,
}

/// One dial socket.
#[derive(Debug)]
struct Conversation {
    channel: Channel,
    next_id: AtomicU64,
    /// `None` once netd has closed the socket: nobody will answer any more.
    waiting: Mutex<Option<HashMap<u64, oneshot::Sender<Answer>>>>,
}

type Answer = Result<OwnedFd, DialError>;

impl Dialer {
    /// Asks over the channel; what it opens there takes part in the tasks' drain.
    pub fn new(control: Arc<Channel>, tasks: Tasks) -> Self {
        Self {
            control,
            tasks,
            conversation: AsyncMutex::new(None),
        }
    }

    /// Has netd connect to a port inside a sandbox. Takes at most 10 s, also while netd restarts.
    ///
    /// # Errors
    /// When netd is away, or what it says.
    pub async fn dial(&self, id: &SandboxId, port: u16) -> Result<TcpStream, DialFailure> {
        let dialling = async {
            // A second attempt when netd ended the conversation before it answered the first.
            match self.attempt(id, port).await {
                Err(DialFailure::Away) => self.attempt(id, port).await,
                other => other,
            }
        };
        match tokio::time::timeout(DIAL_TIMEOUT, dialling).await {
            Ok(dialled) => dialled,
            Err(_elapsed) => Err(DialFailure::Silent),
        }
    }

    async fn attempt(&self, id: &SandboxId, port: u16) -> Result<TcpStream, DialFailure> {
        let conversation = self.conversation().await?;
        let (ticket, answer) = conversation.register()?;
        let request = DialRequest {
            request_id: ticket.id,
            sandbox_id: id.clone(),
            port,
        };
        let packet = serde_json::to_vec(&request).map_err(io::Error::other)?;
        match conversation.channel.send(&packet, None).await {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                conversation.close();
                return Err(DialFailure::Away);
            }
            Err(error) => return Err(error.into()),
        }
        let descriptor = answer.await.map_err(|_closed| DialFailure::Away)??;
        let stream = std::net::TcpStream::from(descriptor);
        stream.set_nonblocking(true)?;
        Ok(TcpStream::from_std(stream)?)
    }

    async fn conversation(&self) -> Result<Arc<Conversation>, DialFailure> {
        let mut present = self.conversation.lock().await;
        if let Some(conversation) = present.as_ref().filter(|conversation| conversation.is_open()) {
            return Ok(Arc::clone(conversation));
        }
        let (ours, theirs) = handover::pair()?;
        let packet = serde_json::to_vec(&Open::Dial).map_err(io::Error::other)?;
        self.control.send(&packet, Some(theirs.as_fd())).await?;
        drop(theirs);
        let conversation = Arc::new(Conversation {
            channel: Channel::from_fd(ours)?,
            next_id: AtomicU64::new(1),
            waiting: Mutex::new(Some(HashMap::new())),
        });
        let shutdown = self.tasks.shutdown();
        let reader = Arc::clone(&conversation);
        self.tasks.spawn("dial answers", async move {
            tokio::select! {
                () = shutdown.cancelled() => {}
                () = reader.read() => {}
            }
        });
        *present = Some(Arc::clone(&conversation));
        Ok(conversation)
    }
}

impl Conversation {
    fn is_open(&self) -> bool {
        self.waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .is_some()
    }

    /// Everybody who waits learns that nobody will answer.
    fn close(&self) {
        drop(self.waiting.lock().unwrap_or_else(PoisonError::into_inner).take());
    }

    fn register(&self) -> Result<(Ticket<'_>, oneshot::Receiver<Answer>), DialFailure> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = oneshot::channel();
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.as_mut().ok_or(DialFailure::Away)?.insert(id, sender);
        Ok((
            Ticket {
                conversation: self,
                id,
            },
            receiver,
        ))
    }

    fn take(&self, id: u64) -> Option<oneshot::Sender<Answer>> {
        self.waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .as_mut()?
            .remove(&id)
    }

    async fn read(&self) {
        let mut buffer = [0; MAX_PACKET];
        loop {
            let (length, descriptor) = match self.channel.recv(&mut buffer).await {
                Ok((0, _)) => break,
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::InvalidData => continue,
                Err(error) => {
                    tracing::warn!(%error, "the dial socket failed");
                    break;
                }
            };
            let reply: DialReply = match serde_json::from_slice(&buffer[..length]) {
                Ok(reply) => reply,
                Err(error) => {
                    tracing::warn!(%error, "an unknown packet on the dial socket");
                    continue;
                }
            };
            let answer = match (reply.error, descriptor) {
                (None, Some(descriptor)) => Ok(descriptor),
                (None, None) => Err(DialError::Failed),
                (Some(error), _) => Err(error),
            };
            if let Some(waiting) = self.take(reply.request_id) {
                // Whoever gave up waiting closes the connection by dropping it.
                drop(waiting.send(answer));
            }
        }
        self.close();
    }
}

/// Removes the entry of somebody who gives up waiting.
struct Ticket<'a> {
    conversation: &'a Conversation,
    id: u64,
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        drop(self.conversation.take(self.id));
    }
}
