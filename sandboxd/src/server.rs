//! Accepting connections, checking the key, and handing each request to what serves it.

use std::{io, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use anyhow::Context as _;
use sandgate_api::agent::{AgentErrorCode, FrameKind, Hello, MAX_FRAME, PROTOCOL_VERSION, Reply, Request};
use sandgate_daemon::tasks::Tasks;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::timeout,
};

use crate::{
    children::Children,
    claim::Owner,
    exec,
    files::{self, Tree},
    key::{Key, wipe},
    processes::{self, Processes, Wish},
    wire::{self, Refusal},
};

/// Connections served at once. More are closed at once.
const MAX_CONNECTIONS: usize = 256;
/// How long a caller may take to say who it is and what it wants.
const GREETING: Duration = Duration::from_secs(10);
/// Largest greeting: nobody has shown a key yet.
const MAX_HELLO: usize = 512;
/// How much of what a refused caller still sends is read, so that it sees the answer and not a reset.
const MAX_LEFTOVER: u64 = 64 * 1024 * 1024;
/// How long a refused caller may take to hang up.
const LEFTOVER: Duration = Duration::from_secs(5);

/// The listener and what it needs to serve.
pub struct Server {
    listener: TcpListener,
    shared: Arc<Shared>,
}

struct Shared {
    key: Key,
    owner: Owner,
    children: Children,
    tree: Tree,
    processes: Processes,
    connections: Arc<Semaphore>,
}

impl Server {
    /// Listens.
    ///
    /// # Errors
    /// When the address is taken, or `/` cannot be opened.
    pub async fn bind(address: SocketAddr, key: Key, children: Children) -> anyhow::Result<Self> {
        let tree = Tree::at(Path::new("/")).context("opening the root")?;
        let listener = TcpListener::bind(address)
            .await
            .with_context(|| format!("listening on {address}"))?;
        let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        Ok(Self {
            listener,
            shared: Arc::new(Shared {
                key,
                owner: Owner::default(),
                children,
                tree,
                processes: Processes::default(),
                connections,
            }),
        })
    }

    /// Serves until the tasks are asked to end.
    pub async fn serve(self, tasks: &Tasks) {
        let shutdown = tasks.shutdown();
        loop {
            let accepted = tokio::select! {
                () = shutdown.cancelled() => return,
                accepted = self.listener.accept() => accepted,
            };
            let Ok((stream, _from)) = accepted else {
                // Out of descriptors or memory: code inside can bring that about. It passes.
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            };
            let Ok(permit) = Arc::clone(&self.shared.connections).try_acquire_owned() else {
                continue;
            };
            let shared = Arc::clone(&self.shared);
            let drains = tasks.clone();
            tasks.spawn("connection", async move {
                let _permit = permit;
                if let Err(error) = serve_one(stream, &shared, &drains).await {
                    tracing::debug!(%error, "a connection broke");
                }
            });
        }
    }
}

/// Serves one connection, which carries one operation.
async fn serve_one(mut stream: TcpStream, shared: &Shared, tasks: &Tasks) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let greeting = timeout(GREETING, greet(&mut stream, &shared.key)).await?;
    let refusal = match greeting? {
        Err(refusal) => Some(refusal),
        Ok(Request::Ping) => {
            pong(&mut stream).await?;
            None
        }
        Ok(Request::Claim(claim)) => match shared.owner.claim(claim) {
            Ok(()) => {
                pong(&mut stream).await?;
                None
            }
            Err(refusal) => Some(refusal),
        },
        Ok(Request::Exec(command)) => {
            let environment = shared.owner.environment();
            return exec::serve(stream, command, environment, &shared.children, tasks).await;
        }
        Ok(Request::WriteFile { path, size, mode }) => {
            shared.owner.used();
            files::write(&mut stream, &shared.tree, &path, size, mode)
                .await?
                .err()
        }
        Ok(Request::ReadFile { path, max_size }) => {
            shared.owner.used();
            files::read(&mut stream, &shared.tree, &path, max_size)
                .await?
                .err()
        }
        Ok(Request::List {
            path,
            recursive,
            limit,
        }) => {
            shared.owner.used();
            let tree = &shared.tree;
            files::list(&mut stream, tree, &path, recursive, limit)
                .await?
                .err()
        }
        Ok(Request::Files(request)) => {
            shared.owner.used();
            files::serve(&mut stream, &shared.tree, request).await?.err()
        }
        Ok(Request::Follow {
            process,
            since,
            wait,
            input,
        }) => match shared.processes.find(&process) {
            Ok(process) if since <= process.next_position() => {
                let wish = Wish { since, wait, input };
                return processes::follow(stream, process, wish).await;
            }
            Ok(_) => {
                let message = "the process has not written so much";
                Some(Refusal::new(AgentErrorCode::Invalid, message))
            }
            Err(refusal) => Some(refusal),
        },
        Ok(Request::Input { process, size, close }) => match shared.processes.find(&process) {
            Ok(process) => processes::input(&mut stream, &process, size, close).await?.err(),
            Err(refusal) => Some(refusal),
        },
        Ok(Request::Start(start)) => {
            let processes = &shared.processes;
            let started = processes.start(&start, &shared.owner, &shared.children, tasks);
            tell(&mut stream, started).await?
        }
        Ok(Request::Processes) => tell(&mut stream, Ok(shared.processes.list())).await?,
        Ok(Request::Signal { process, signal }) => {
            let process = shared.processes.find(&process);
            tell(&mut stream, process.and_then(|process| process.signal(signal))).await?
        }
        Ok(Request::Resize { process, size }) => {
            let process = shared.processes.find(&process);
            tell(&mut stream, process.and_then(|process| process.give_size(size))).await?
        }
        Ok(Request::Remove { process }) => tell(&mut stream, shared.processes.remove(&process)).await?,
    };
    if let Some(Refusal { code, message }) = refusal {
        wire::reply(&mut stream, &Reply::Error { code, message }).await?;
        stream.shutdown().await?;
        let mut leftover = stream.take(MAX_LEFTOVER);
        let mut nowhere = tokio::io::sink();
        let swallow = tokio::io::copy(&mut leftover, &mut nowhere);
        // Either way the connection ends here.
        let _unread = timeout(LEFTOVER, swallow).await;
    }
    Ok(())
}

/// Says what there is to say. What is refused is said by the caller.
async fn tell(stream: &mut TcpStream, answer: Result<Reply, Refusal>) -> io::Result<Option<Refusal>> {
    match answer {
        Ok(reply) => wire::reply(stream, &reply).await.map(|()| None),
        Err(refusal) => Ok(Some(refusal)),
    }
}

async fn pong(stream: &mut TcpStream) -> io::Result<()> {
    let protocol = PROTOCOL_VERSION;
    wire::reply(stream, &Reply::Pong { protocol }).await
}

/// Reads the greeting and the request.
async fn greet(stream: &mut TcpStream, key: &Key) -> io::Result<Result<Request, Refusal>> {
    let (kind, mut payload) = wire::receive(stream, MAX_HELLO).await?;
    let hello = serde_json::from_slice::<Hello>(&payload);
    wipe(&mut payload);
    let known = match (kind, hello) {
        (FrameKind::Json, Ok(hello)) => {
            let same_version = hello.protocol == PROTOCOL_VERSION;
            key.matches(hello.key) && same_version
        }
        (_, _) => false,
    };
    if !known {
        let message = "the key or the protocol version is wrong";
        return Ok(Err(Refusal::new(AgentErrorCode::Unauthorized, message)));
    }
    let (kind, payload) = wire::receive(stream, MAX_FRAME).await?;
    Ok(match (kind, serde_json::from_slice(&payload)) {
        (FrameKind::Json, Ok(request)) => Ok(request),
        (FrameKind::Json, Err(error)) => Err(Refusal::new(
            AgentErrorCode::Invalid,
            format!("the request is not understood: {error}"),
        )),
        (FrameKind::Stdout | FrameKind::Stderr | FrameKind::Data, _) => Err(Refusal::new(
            AgentErrorCode::Invalid,
            "bytes where a request belongs",
        )),
    })
}
