//! A descriptor store: a supervisor keeps a child's listening sockets while the child restarts, so that
//! connections wait in the queue instead of being refused (as `FDSTORE=1` of `sd_notify(3)` does).
//!
//! Both sides talk over one [`handover::pair`](crate::handover::pair) per start of the child. The supervisor
//! first sends every socket that it holds (`keep <name>` with the socket), then `end`. From then on the child
//! sends `keep <name>` with a socket, or `drop <name>`. A packet that the child has sent counts even when the
//! child dies right after. The supervisor takes nothing on trust: only listening sockets, at most
//! [`MAX_SOCKETS`] of them, under names of at most [`MAX_NAME`] bytes.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    sync::{Mutex, PoisonError},
};

use crate::handover::Channel;

/// Most sockets that are held for one child.
pub const MAX_SOCKETS: usize = 1024;

/// Longest name, in bytes. Names are made of ASCII letters, digits, `-` and `_`.
pub const MAX_NAME: usize = 64;

/// Longest packet: the longest word, a space, the longest name.
const MAX_PACKET: usize = 5 + MAX_NAME;

const KEEP: &str = "keep";
const DROP: &str = "drop";
const END: &str = "end";

/// The supervisor's side. Outlives every start of the child.
#[derive(Debug, Default)]
pub struct DescriptorStore {
    held: Mutex<BTreeMap<String, OwnedFd>>,
}

impl DescriptorStore {
    /// Gives one start of the child everything that is held, then does what it says until it has closed its
    /// end and everything it has sent is read.
    pub async fn serve(&self, channel: &Channel) {
        if let Err(error) = self.replay(channel).await {
            tracing::warn!(%error, "kept sockets could not be given back");
            return;
        }
        let mut buffer = [0; MAX_PACKET];
        loop {
            match channel.recv(&mut buffer).await {
                Ok((0, _)) => return,
                Ok((length, descriptor)) => self.apply(&buffer[..length], descriptor),
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    tracing::warn!("a packet to the descriptor store was too long");
                }
                Err(error) => {
                    tracing::warn!(%error, "the descriptor store's socket failed");
                    return;
                }
            }
        }
    }

    /// How many sockets are held.
    pub fn len(&self) -> usize {
        self.held().len()
    }

    /// Whether none is held.
    pub fn is_empty(&self) -> bool {
        self.held().is_empty()
    }

    async fn replay(&self, channel: &Channel) -> io::Result<()> {
        let names: Vec<String> = self.held().keys().cloned().collect();
        for name in names {
            // One copy at a time: a full store is half of what a process may have open by default.
            let Some(socket) = self.held().get(&name).map(OwnedFd::try_clone).transpose()? else {
                continue;
            };
            let packet = format!("{KEEP} {name}");
            channel.send(packet.as_bytes(), Some(socket.as_fd())).await?;
        }
        channel.send(END.as_bytes(), None).await
    }

    fn apply(&self, packet: &[u8], descriptor: Option<OwnedFd>) {
        let Some((word, name)) = read(packet) else {
            tracing::warn!("a packet to the descriptor store is not understood");
            return;
        };
        match (word, descriptor) {
            (KEEP, Some(socket)) => {
                if !listens(&socket) {
                    tracing::warn!(name, "only listening sockets are kept");
                    return;
                }
                let mut held = self.held();
                if held.len() >= MAX_SOCKETS && !held.contains_key(name) {
                    tracing::warn!(name, "no further socket can be kept");
                    return;
                }
                held.insert(name.to_owned(), socket);
            }
            (DROP, None) => drop(self.held().remove(name)),
            _ => tracing::warn!(name, "a packet to the descriptor store is not understood"),
        }
    }

    fn held(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, OwnedFd>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The child's side.
#[derive(Debug)]
pub struct StoreClient {
    channel: Channel,
}

impl StoreClient {
    /// Takes back everything that was kept, by name, and is then ready to keep more. Waits for the
    /// supervisor, which sends at once.
    ///
    /// # Errors
    /// When the supervisor is gone, or sends what is not understood.
    pub async fn open(channel: Channel) -> io::Result<(Self, BTreeMap<String, OwnedFd>)> {
        let mut kept = BTreeMap::new();
        let mut buffer = [0; MAX_PACKET];
        loop {
            let (length, descriptor) = channel.recv(&mut buffer).await?;
            let packet = &buffer[..length];
            if packet.is_empty() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if packet == END.as_bytes() {
                return Ok((Self { channel }, kept));
            }
            match (read(packet), descriptor) {
                (Some((KEEP, name)), Some(socket)) if kept.len() < MAX_SOCKETS => {
                    kept.insert(name.to_owned(), socket);
                }
                _ => return Err(io::ErrorKind::InvalidData.into()),
            }
        }
    }

    /// Has a listening socket kept, in place of an earlier one of that name.
    ///
    /// # Errors
    /// `InvalidInput` for a name that cannot be used, else what the socket says.
    pub async fn keep(&self, name: &str, socket: BorrowedFd<'_>) -> io::Result<()> {
        self.send(KEEP, name, Some(socket)).await
    }

    /// Has a kept socket closed. A name that is not held is no error.
    ///
    /// # Errors
    /// As [`StoreClient::keep`].
    pub async fn forget(&self, name: &str) -> io::Result<()> {
        self.send(DROP, name, None).await
    }

    async fn send(&self, word: &str, name: &str, socket: Option<BorrowedFd<'_>>) -> io::Result<()> {
        if !is_name(name) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.channel
            .send(format!("{word} {name}").as_bytes(), socket)
            .await
    }
}

fn read(packet: &[u8]) -> Option<(&str, &str)> {
    let (word, name) = std::str::from_utf8(packet).ok()?.split_once(' ')?;
    is_name(name).then_some((word, name))
}

fn is_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(plain)
}

fn listens(socket: &OwnedFd) -> bool {
    // `ENOTSOCK` for what is no socket at all.
    rustix::net::sockopt::socket_acceptconn(socket).unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use std::{
        net::{TcpListener, TcpStream},
        time::Duration,
    };

    use super::*;
    use crate::handover;

    fn channels() -> (Channel, Channel) {
        let (left, right) = handover::pair().expect("a socket pair");
        (
            Channel::from_fd(left).expect("left"),
            Channel::from_fd(right).expect("right"),
        )
    }

    fn listener() -> TcpListener {
        TcpListener::bind("127.0.0.1:0").expect("a listener")
    }

    /// One start of the child: what it was given back, and what the store held when it was gone.
    async fn start<F: Future<Output = ()>>(
        store: &DescriptorStore,
        child: impl FnOnce(StoreClient, BTreeMap<String, OwnedFd>) -> F,
    ) {
        let (ours, theirs) = channels();
        tokio::join!(store.serve(&ours), async {
            let (client, kept) = StoreClient::open(theirs).await.expect("opened");
            child(client, kept).await;
        });
    }

    #[tokio::test]
    async fn connections_wait_in_the_queue_while_the_child_is_away() {
        let store = DescriptorStore::default();
        let listener = listener();
        let address = listener.local_addr().expect("an address");
        start(&store, async |client, kept| {
            assert!(kept.is_empty());
            client.keep("tunnel-1", listener.as_fd()).await.expect("kept");
        })
        .await;
        drop(listener);
        assert_eq!(store.len(), 1);

        let mut waiting = TcpStream::connect(address).expect("the queue takes it");
        io::Write::write_all(&mut waiting, b"hello").expect("written");
        drop(waiting);
        start(&store, async |client, mut kept| {
            let socket = kept.remove("tunnel-1").expect("given back");
            let (mut accepted, _) = TcpListener::from(socket).accept().expect("accepted");
            let mut text = String::new();
            io::Read::read_to_string(&mut accepted, &mut text).expect("read");
            assert_eq!(text, "hello");
            client.forget("tunnel-1").await.expect("forgotten");
            client.forget("tunnel-1").await.expect("twice is no error");
        })
        .await;
        assert!(store.is_empty());
        TcpStream::connect(address).expect_err("nobody holds it any more");
    }

    #[tokio::test]
    async fn only_listening_sockets_under_plain_names_are_kept() {
        let store = DescriptorStore::default();
        let long = "x".repeat(MAX_NAME + 1);
        start(&store, async |client, _| {
            let (stream, _other) = std::os::unix::net::UnixStream::pair().expect("a pair");
            client.keep("stream", stream.as_fd()).await.expect("sent");
            let file = std::fs::File::open("/dev/null").expect("a file");
            client.keep("file", file.as_fd()).await.expect("sent");
            let listener = listener();
            for name in ["", "a b", "a/b", "é", long.as_str()] {
                let error = client.keep(name, listener.as_fd()).await.expect_err("refused");
                assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{name}");
                // What a client without this check would send.
                let packet = format!("{KEEP} {name}");
                client
                    .channel
                    .send(packet.as_bytes(), Some(listener.as_fd()))
                    .await
                    .expect("sent");
            }
            for packet in [
                b"keep".as_slice(),
                b"keep two",
                b"end",
                b"\xff\xff",
                &[b'x'; 4000],
            ] {
                client.channel.send(packet, None).await.expect("sent");
            }
            client.keep("good", listener.as_fd()).await.expect("sent");
        })
        .await;
        assert_eq!(store.held().keys().collect::<Vec<_>>(), ["good"]);
    }

    #[tokio::test]
    async fn there_is_a_most_and_a_full_store_still_replaces_and_gives_everything_back() {
        let store = DescriptorStore::default();
        let listener = listener();
        start(&store, async |client, _| {
            for number in 0..MAX_SOCKETS + 5 {
                client
                    .keep(&format!("tunnel-{number}"), listener.as_fd())
                    .await
                    .expect("sent");
            }
            client.keep("tunnel-0", listener.as_fd()).await.expect("sent");
        })
        .await;
        assert_eq!(store.len(), MAX_SOCKETS);
        assert!(!store.held().contains_key("tunnel-1024"));
        start(&store, async |_client, kept| assert_eq!(kept.len(), MAX_SOCKETS)).await;
    }

    #[tokio::test]
    async fn a_child_that_never_reads_is_no_end_of_the_supervisor() {
        let store = DescriptorStore::default();
        start(&store, async |client, _| {
            client.keep("one", listener().as_fd()).await.expect("sent");
        })
        .await;
        let (ours, theirs) = channels();
        drop(theirs);
        tokio::time::timeout(Duration::from_secs(5), store.serve(&ours))
            .await
            .expect("it comes back");
        assert_eq!(store.len(), 1);
    }
}
