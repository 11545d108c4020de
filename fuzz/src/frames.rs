//! Frames of the agent protocol. The agent's: it shares its uid with the code of the sandbox, so the controller must take
//! whatever comes for one of its answers or an error, within its limits. The controller's: what was read means what
//! was written.

use std::{
    convert::Infallible,
    io::Write as _,
    net::{Shutdown, TcpStream},
    os::{fd::OwnedFd, unix::net::UnixStream},
};

use bytes::Bytes;
use controller::agent::{Agent, AgentError, ExecEvent, Upload};
use futures_util::stream;
use sandgate_api::agent::{
    Command, Exec, FilePart, FileRequest, FrameHeader, FrameKind, HEADER_LENGTH, Hello, MAX_FRAME, Reply,
    Request,
};
use serde::{Serialize, de::DeserializeOwned};

use crate::bytes::run;

/// Longest text of an agent that is taken over, in characters.
const MESSAGE_MAX: usize = 512;
/// What a caller takes of a file and of a listing.
const FILE_MAX: u64 = 1000;
const LIST_MAX: u32 = 5;
/// Length of the part that it wants of an opened file.
const PART: u64 = 10;

pub(crate) fn check(data: &[u8]) {
    let [operation, data @ ..] = data else { return };
    survives::<Reply>(data);
    survives::<Request>(data);
    survives::<Hello>(data);
    survives::<FilePart>(data);
    let outcome = run(async {
        let agent = Agent::new(hostile(data), &"0".repeat(64));
        match operation % 11 {
            0 => agent.ping().await,
            1 => agent.claim(Default::default()).await,
            2 => agent
                .write_file("/f", None, Bytes::from_static(b"content"))
                .await
                .map(drop),
            3 => read_file(agent).await,
            4 => list(agent).await,
            6 => glob(agent).await,
            7 => open(agent).await,
            8 => upload(agent).await,
            9 => watch(agent).await,
            10 => {
                let path = "/f".to_owned();
                agent
                    .work(FileRequest::Remove {
                        path,
                        recursive: true,
                    })
                    .await
            }
            _ => exec(agent, data).await,
        }
    });
    if let Err(AgentError::Refused { message, .. } | AgentError::Protocol(message)) = &outcome {
        assert!(message.chars().count() <= MESSAGE_MAX, "{message}");
        assert!(!message.chars().any(char::is_control), "{message:?}");
    }
}

/// Written again it is the same.
fn survives<T: DeserializeOwned + Serialize + PartialEq>(data: &[u8]) {
    let Some((header, payload)) = data.split_first_chunk::<HEADER_LENGTH>() else {
        return;
    };
    if let Ok(header) = FrameHeader::decode(*header) {
        assert!(header.length <= MAX_FRAME);
        assert_eq!(FrameHeader::decode(header.encode()), Ok(header));
    }
    if let Ok(value) = serde_json::from_slice::<T>(payload) {
        let written = serde_json::to_vec(&value).expect("it can be written");
        let again: T = serde_json::from_slice(&written).expect("it can be read");
        assert!(again == value, "{}", String::from_utf8_lossy(&written));
    }
}

/// A connection to an agent that says this and hangs up.
fn hostile(data: &[u8]) -> tokio::net::TcpStream {
    let (near, mut far) = UnixStream::pair().expect("a pair of sockets");
    far.write_all(data).expect("it fits into the socket's buffer");
    far.shutdown(Shutdown::Write).expect("shut down");
    // What was asked is read by nobody, and kept from being an error by the socket that stays open until the process has
    // many of them: a closed one would take what it said with it.
    let near = TcpStream::from(OwnedFd::from(near));
    near.set_nonblocking(true).expect("a socket");
    KEPT.with_borrow_mut(|kept| *kept = Some(far));
    tokio::net::TcpStream::from_std(near).expect("a socket")
}

thread_local! {
    static KEPT: std::cell::RefCell<Option<UnixStream>> = const { std::cell::RefCell::new(None) };
}

async fn read_file(agent: Agent) -> Result<(), AgentError> {
    let mut file = agent.read_file("/f", FILE_MAX).await?;
    assert!(file.size() <= FILE_MAX);
    let (size, mut read) = (file.size(), 0);
    while let Some(part) = file.next().await {
        read += part?.len() as u64;
        assert!(read <= size, "more than was announced");
    }
    assert_eq!(read, size, "it ended early and said nothing");
    Ok(())
}

async fn list(agent: Agent) -> Result<(), AgentError> {
    let listing = agent.list("/", true, LIST_MAX).await?;
    assert!(listing.entries.len() <= LIST_MAX as usize);
    Ok(())
}

async fn glob(agent: Agent) -> Result<(), AgentError> {
    let listing = agent.glob("/", "**", LIST_MAX).await?;
    assert!(listing.entries.len() <= LIST_MAX as usize);
    Ok(())
}

async fn open(agent: Agent) -> Result<(), AgentError> {
    let opened = agent.open("/f", FILE_MAX).await?;
    assert!(opened.file().size <= FILE_MAX);
    let (mut part, mut read) = (opened.part(1, PART).await?, 0);
    while let Some(bytes) = part.next().await {
        read += bytes?.len() as u64;
        assert!(read <= PART, "more than was asked for");
    }
    assert_eq!(read, PART, "it ended early and said nothing");
    Ok(())
}

async fn upload(agent: Agent) -> Result<(), AgentError> {
    let parts = stream::iter([Ok::<_, Infallible>(Bytes::from_static(b"content"))]);
    match agent.upload("/f", Some(7), None, parts).await {
        Ok(written) => {
            assert_eq!(written, 7);
            Ok(())
        }
        Err(Upload::Agent(error)) => Err(error),
        Err(Upload::Source(never)) => match never {},
    }
}

/// It ends, as what is told is finite.
async fn watch(agent: Agent) -> Result<(), AgentError> {
    let mut watch = agent.watch("/", true).await?;
    while let Some(changes) = watch.next().await {
        changes?;
    }
    assert!(watch.next().await.is_none(), "something follows the end");
    Ok(())
}

/// The events are the frames in their order, up to the first that cannot be one.
async fn exec(agent: Agent, data: &[u8]) -> Result<(), AgentError> {
    let exec = Exec {
        command: Command::Shell("true".to_owned()),
        env: Default::default(),
        working_dir: None,
        timeout_ms: None,
        track: None,
    };
    let mut events = agent.exec(exec).await?;
    let (mut rest, mut outcome, mut ended) = (data, Ok(()), false);
    while let Some(event) = events.next().await {
        assert!(!ended, "something follows the end");
        match (event, frame(&mut rest)) {
            (Ok(ExecEvent::Stdout(bytes)), Some((FrameKind::Stdout, payload)))
            | (Ok(ExecEvent::Stderr(bytes)), Some((FrameKind::Stderr, payload))) => {
                assert_eq!(bytes, payload)
            }
            (Ok(ExecEvent::Exited { exit_code, .. }), Some((FrameKind::Json, payload))) => {
                let reply: Reply = serde_json::from_slice(payload).expect("it was read");
                assert!(matches!(reply, Reply::Exited { exit_code: code, .. } if code == exit_code));
                ended = true;
            }
            (Err(error), None | Some((FrameKind::Json | FrameKind::Data, _))) => {
                ended = true;
                outcome = Err(error);
            }
            (event, frame) => panic!("{event:?} is {frame:?}"),
        }
    }
    assert!(ended, "no end");
    outcome
}

/// The next whole frame.
fn frame<'a>(rest: &mut &'a [u8]) -> Option<(FrameKind, &'a [u8])> {
    let (header, behind) = rest.split_first_chunk::<HEADER_LENGTH>()?;
    let header = FrameHeader::decode(*header).ok()?;
    let (payload, behind) = behind.split_at_checked(header.length)?;
    *rest = behind;
    Some((header.kind, payload))
}
