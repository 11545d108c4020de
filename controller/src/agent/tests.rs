//! The client against hostile and broken peers.

use std::{collections::BTreeMap, future::Future};

use futures_util::StreamExt as _;
use sandgate_api::agent::{
    Command, EntryKind, FilePart, FileReply, FileRequest, FrameHeader, HEADER_LENGTH, OpenedFile, Start,
    TerminalSize,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

use super::*;

mod processes;

const KEY: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

/// A client, connected to a peer that reads the greeting and the request and then does as it likes.
async fn against<F>(peer: impl FnOnce(TcpStream, Request) -> F + Send + 'static) -> Agent
where
    F: Future<Output = ()> + Send,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    #[expect(clippy::disallowed_methods, reason = "a test's peer takes part in no drain")]
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let hello: Hello = serde_json::from_slice(&read(&mut stream).await.1).unwrap();
        assert_eq!((hello.protocol, hello.key.as_str()), (PROTOCOL_VERSION, KEY));
        let request = serde_json::from_slice(&read(&mut stream).await.1).unwrap();
        peer(stream, request).await;
    });
    Agent::new(TcpStream::connect(address).await.unwrap(), KEY)
}

async fn read(stream: &mut TcpStream) -> (FrameKind, Vec<u8>) {
    let mut header = [0; HEADER_LENGTH];
    stream.read_exact(&mut header).await.unwrap();
    let header = FrameHeader::decode(header).unwrap();
    let mut payload = vec![0; header.length];
    stream.read_exact(&mut payload).await.unwrap();
    (header.kind, payload)
}

/// Sends a frame. The client may have hung up already.
async fn send(stream: &mut TcpStream, kind: FrameKind, payload: &[u8]) -> bool {
    let header = FrameHeader {
        kind,
        length: payload.len(),
    }
    .encode();
    stream.write_all(&header).await.is_ok() && stream.write_all(payload).await.is_ok()
}

async fn answer(stream: &mut TcpStream, reply: &Reply) -> bool {
    send(stream, FrameKind::Json, &serde_json::to_vec(reply).unwrap()).await
}

/// Keeps the connection open until the client closes it.
async fn hold(mut stream: TcpStream) {
    let _end = stream.read_u8().await;
}

fn exec(timeout_ms: Option<u64>) -> Exec {
    Exec {
        command: Command::Shell("x".to_owned()),
        env: BTreeMap::new(),
        working_dir: None,
        timeout_ms,
        track: None,
    }
}

fn entry(name: &str) -> Entry {
    Entry {
        name: name.to_owned(),
        path: format!("/{name}"),
        kind: EntryKind::File,
        size: 0,
        modified: 0,
        mode: 0,
        target: None,
    }
}

fn broke_the_protocol<T>(result: &Result<T, AgentError>) -> bool {
    matches!(result, Err(AgentError::Protocol(_)))
}

#[tokio::test]
async fn a_command_is_followed_to_its_end_and_no_further() {
    let agent = against(|mut stream, _| async move {
        send(&mut stream, FrameKind::Stdout, b"out").await;
        send(&mut stream, FrameKind::Stderr, b"err").await;
        answer(
            &mut stream,
            &Reply::Exited {
                exit_code: 3,
                timed_out: false,
                duration_ms: 9,
                changes: None,
            },
        )
        .await;
        send(&mut stream, FrameKind::Stdout, b"more").await;
    });
    let mut events = agent.await.exec(exec(None)).await.unwrap();
    assert_eq!(
        events.next().await.unwrap().unwrap(),
        ExecEvent::Stdout(Bytes::from_static(b"out"))
    );
    assert_eq!(
        events.next().await.unwrap().unwrap(),
        ExecEvent::Stderr(Bytes::from_static(b"err"))
    );
    let exited = ExecEvent::Exited {
        exit_code: 3,
        timed_out: false,
        duration_ms: 9,
        changes: None,
    };
    assert_eq!(events.next().await.unwrap().unwrap(), exited);
    assert!(events.next().await.is_none());
}

#[tokio::test]
async fn headers_that_promise_too_much_end_the_connection() {
    for header in [[0xff, 0xff, 0xff, 0xff, 2], [0, 4, 0, 1, 2], [0, 0, 0, 1, 77]] {
        let agent = against(move |mut stream, _| async move {
            let _gone = stream.write_all(&header).await;
            hold(stream).await;
        });
        let mut events = agent.await.exec(exec(None)).await.unwrap();
        let event = events.next().await.unwrap();
        assert!(broke_the_protocol(&event), "{header:?}: {event:?}");
        assert!(events.next().await.is_none());
    }
}

#[tokio::test]
async fn a_promise_of_a_large_frame_costs_no_memory() {
    let agent = against(|mut stream, _| async move {
        let header = FrameHeader {
            kind: FrameKind::Stdout,
            length: MAX_FRAME,
        }
        .encode();
        let _gone = stream.write_all(&header).await;
        hold(stream).await;
    });
    let mut events = agent.await.exec(exec(None)).await.unwrap();
    let waiting = tokio::time::timeout(Duration::from_millis(100), events.next()).await;
    assert!(waiting.is_err(), "{waiting:?}");
    assert!(
        events.frames.capacity() <= 128 * 1024,
        "{}",
        events.frames.capacity()
    );
}

#[tokio::test]
async fn next_can_be_dropped_in_the_middle_of_a_frame() {
    let agent = against(|mut stream, _| async move {
        let header = FrameHeader {
            kind: FrameKind::Stdout,
            length: 6,
        }
        .encode();
        for part in [&header[..2], &header[2..], b"abc", b"def"] {
            stream.write_all(part).await.unwrap();
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
        hold(stream).await;
    });
    let mut events = agent.await.exec(exec(None)).await.unwrap();
    let event = loop {
        if let Ok(event) = tokio::time::timeout(Duration::from_millis(7), events.next()).await {
            break event;
        }
    };
    assert_eq!(
        event.unwrap().unwrap(),
        ExecEvent::Stdout(Bytes::from_static(b"abcdef"))
    );
}

#[tokio::test]
async fn silence_ends_in_time() {
    let moment = Duration::from_millis(50);
    let silent = async || {
        let deaf = |stream, _| async move {
            let _open: TcpStream = stream;
            std::future::pending().await
        };
        let mut agent = against(deaf).await;
        agent.patience = Patience {
            first_word: moment,
            stall: moment,
            listing: moment,
            work: moment,
            grace: moment,
        };
        agent
    };
    assert!(matches!(silent().await.ping().await, Err(AgentError::Timeout)));
    assert!(matches!(
        silent().await.read_file("/x", 1).await,
        Err(AgentError::Timeout)
    ));
    assert!(matches!(
        silent().await.list("/x", true, 1).await,
        Err(AgentError::Timeout)
    ));
    assert!(matches!(
        silent().await.glob("/x", "*", 1).await,
        Err(AgentError::Timeout)
    ));
    let removal = FileRequest::Remove {
        path: "/x".to_owned(),
        recursive: true,
    };
    assert!(matches!(
        silent().await.work(removal).await,
        Err(AgentError::Timeout)
    ));
    let written = silent()
        .await
        .write_file("/x", None, vec![0; 32 * 1024 * 1024].into())
        .await;
    assert!(matches!(written, Err(AgentError::Timeout)), "{written:?}");
    let mut events = silent().await.exec(exec(Some(10))).await.unwrap();
    assert!(matches!(events.next().await, Some(Err(AgentError::Timeout))));
    assert!(events.next().await.is_none());
}

#[tokio::test]
async fn a_command_that_chatters_on_after_its_time_is_cut_off() {
    let agent = against(|mut stream, _| async move {
        while send(&mut stream, FrameKind::Stdout, b"x").await {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
    let mut events = agent.await.exec(exec(Some(0))).await.unwrap();
    events.deadline = Some(Instant::now() + Duration::from_millis(100));
    let last = loop {
        match events.next().await.unwrap() {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert!(matches!(last, AgentError::Timeout), "{last:?}");
}

#[tokio::test]
async fn a_listing_is_bounded_whatever_the_agent_sends() {
    let endless = against(|mut stream, _| async move {
        let part = Reply::Entries {
            entries: vec![entry("a"); 100],
            last: false,
            truncated: false,
        };
        while answer(&mut stream, &part).await {}
    });
    let listed = endless.await.list("/", true, 1000).await;
    assert!(broke_the_protocol(&listed), "{listed:?}");
    let long_names = against(|mut stream, _| async move {
        let name = "n".repeat(100_000);
        let part = Reply::Entries {
            entries: vec![entry(&name)],
            last: false,
            truncated: false,
        };
        while answer(&mut stream, &part).await {}
    });
    let listed = long_names.await.list("/", true, u32::MAX).await;
    assert!(broke_the_protocol(&listed), "{listed:?}");
    let honest = against(|mut stream, _| async move {
        let first = Reply::Entries {
            entries: vec![entry("a")],
            last: false,
            truncated: false,
        };
        let last = Reply::Entries {
            entries: vec![entry("b")],
            last: true,
            truncated: true,
        };
        assert!(answer(&mut stream, &first).await && answer(&mut stream, &last).await);
    });
    let listing = honest.await.list("/", true, 2).await.unwrap();
    assert_eq!(
        listing,
        Listing {
            entries: vec![entry("a"), entry("b")],
            truncated: true
        }
    );
}

#[tokio::test]
async fn a_file_is_exactly_as_long_as_announced() {
    for (announced, sent) in [(10, vec![0_u8; 20]), (10, Vec::new())] {
        let agent = against(move |mut stream, _| async move {
            answer(&mut stream, &Reply::File { size: announced }).await;
            send(&mut stream, FrameKind::Data, &sent).await;
            hold(stream).await;
        });
        let mut file = agent.await.read_file("/x", 100).await.unwrap();
        assert_eq!(file.size(), announced);
        assert!(broke_the_protocol(&file.next().await.unwrap()));
        assert!(file.next().await.is_none());
    }
    let larger = against(|mut stream, _| async move {
        answer(&mut stream, &Reply::File { size: 101 }).await;
    });
    assert!(broke_the_protocol(&larger.await.read_file("/x", 100).await));
    let cut_short = against(|mut stream, _| async move {
        answer(&mut stream, &Reply::File { size: 10 }).await;
        send(&mut stream, FrameKind::Data, b"12345").await;
    });
    let mut file = cut_short.await.read_file("/x", 100).await.unwrap();
    assert_eq!(file.next().await.unwrap().unwrap(), Bytes::from_static(b"12345"));
    assert!(matches!(file.next().await, Some(Err(AgentError::Closed))));
}

#[tokio::test]
async fn a_refusal_in_the_middle_of_an_upload_is_heard() {
    let agent = against(|mut stream, _| async move {
        read(&mut stream).await;
        let message = "\u{1b}[31mfull\n".repeat(1000);
        answer(
            &mut stream,
            &Reply::Error {
                code: AgentErrorCode::NoSpace,
                message,
            },
        )
        .await;
        tokio::io::copy(&mut stream, &mut tokio::io::sink())
            .await
            .unwrap();
    });
    let written = agent
        .await
        .write_file("/x", Some(0o600), vec![0; 8 * 1024 * 1024].into())
        .await;
    let Err(AgentError::Refused { code, message }) = written else {
        panic!("{written:?}")
    };
    assert_eq!(code, AgentErrorCode::NoSpace);
    assert!(
        message.chars().count() <= MAX_MESSAGE && !message.contains(char::is_control),
        "{message:?}"
    );
}

#[tokio::test]
async fn replies_to_another_question_are_no_answer() {
    let pong = || {
        against(|mut stream, _| async move {
            answer(
                &mut stream,
                &Reply::Pong {
                    protocol: PROTOCOL_VERSION + 1,
                },
            )
            .await;
            hold(stream).await;
        })
    };
    assert!(broke_the_protocol(&pong().await.ping().await));
    assert!(broke_the_protocol(&pong().await.list("/", false, 1).await));
    assert!(broke_the_protocol(&pong().await.glob("/", "*", 1).await));
    let making = FileRequest::MakeDirectory {
        path: "/x".to_owned(),
        parents: true,
    };
    assert!(broke_the_protocol(&pong().await.work(making).await));
    assert!(broke_the_protocol(
        &pong()
            .await
            .write_file("/x", None, Bytes::from_static(b"y"))
            .await
    ));
    assert!(broke_the_protocol(
        &pong().await.exec(exec(None)).await.unwrap().next().await.unwrap()
    ));
    let nonsense = against(|mut stream, _| async move {
        send(&mut stream, FrameKind::Json, b"{\"reply\": \"\x1b[2J\"}").await;
        hold(stream).await;
    });
    let Err(AgentError::Protocol(message)) = nonsense.await.ping().await else {
        panic!("no error")
    };
    assert!(!message.contains('\u{1b}'), "{message:?}");
}

#[tokio::test]
async fn a_request_over_the_limit_is_not_sent() {
    let agent = against(|stream, _| hold(stream));
    let long = Exec {
        command: Command::Shell("x".repeat(MAX_FRAME)),
        ..exec(None)
    };
    assert!(matches!(
        agent.await.exec(long).await,
        Err(AgentError::RequestTooLarge(_))
    ));
}

/// What comes in parts, and then nothing more or an error.
fn parts(
    count: usize,
    failure: Option<&'static str>,
) -> impl futures_util::Stream<Item = Result<Bytes, &'static str>> {
    let parts = (0..count).map(|_| Ok(Bytes::from(vec![7; 100_000])));
    stream::iter(parts.chain(failure.map(Err)))
}

/// The bytes of data frames up to the empty one; none when the client hangs up before that.
async fn receive_file(stream: &mut TcpStream) -> Option<u64> {
    let mut size = 0;
    loop {
        let mut header = [0; HEADER_LENGTH];
        stream.read_exact(&mut header).await.ok()?;
        let header = FrameHeader::decode(header).unwrap();
        assert_eq!(header.kind, FrameKind::Data);
        if header.length == 0 {
            return Some(size);
        }
        let mut payload = vec![0; header.length];
        stream.read_exact(&mut payload).await.ok()?;
        size += header.length as u64;
    }
}

#[tokio::test]
async fn a_file_is_sent_as_it_comes_and_ended_only_when_all_of_it_came() {
    let (told, heard) = tokio::sync::oneshot::channel();
    let agent = against(|mut stream, request| async move {
        assert!(matches!(
            request,
            Request::Files(FileRequest::Upload { size: None, .. })
        ));
        let size = receive_file(&mut stream).await.unwrap();
        answer(&mut stream, &Reply::Written { size }).await;
        told.send(size).unwrap();
    });
    let written = agent.await.upload("/x", None, None, parts(11, None)).await;
    assert_eq!(written.unwrap(), 1_100_000);
    assert_eq!(heard.await.unwrap(), 1_100_000);

    let (told, heard) = tokio::sync::oneshot::channel();
    let agent = against(|mut stream, _| async move {
        told.send(receive_file(&mut stream).await).unwrap();
    });
    let written = agent.await.upload("/x", None, None, parts(3, Some("gone"))).await;
    assert!(matches!(written, Err(Upload::Source("gone"))), "{written:?}");
    assert_eq!(
        heard.await.unwrap(),
        None,
        "the agent was told that the file is whole"
    );

    let agent = against(|mut stream, _| async move {
        receive_file(&mut stream).await.unwrap();
        answer(&mut stream, &Reply::Written { size: 5 }).await;
    });
    let written = agent
        .await
        .upload("/x", Some(100_000), None, parts(1, None))
        .await;
    assert!(
        matches!(written, Err(Upload::Agent(AgentError::Protocol(_)))),
        "{written:?}"
    );
}

#[tokio::test]
async fn a_refusal_ends_an_upload_whose_source_never_ends() {
    let agent = against(|mut stream, _| async move {
        read(&mut stream).await;
        let (code, message) = (AgentErrorCode::NoSpace, "full".to_owned());
        answer(&mut stream, &Reply::Error { code, message }).await;
        hold(stream).await;
    });
    let endless = stream::iter([Ok::<_, Infallible>(Bytes::from_static(b"x"))]).chain(stream::pending());
    let written = agent.await.upload("/x", None, None, endless).await;
    let Err(Upload::Agent(AgentError::Refused { code, .. })) = written else {
        panic!("{written:?}")
    };
    assert_eq!(code, AgentErrorCode::NoSpace);
}

#[tokio::test]
async fn an_opened_file_gives_exactly_the_part_that_was_asked_for() {
    let file = |size| OpenedFile {
        size,
        modified: 1,
        version: 2,
    };
    let opens = move |size: u64, sent: usize| {
        against(move |mut stream, request| async move {
            assert!(matches!(request, Request::Files(FileRequest::Open { .. })));
            answer(&mut stream, &Reply::Files(FileReply::Opened(file(size)))).await;
            let part: FilePart = serde_json::from_slice(&read(&mut stream).await.1).unwrap();
            assert_eq!(
                part,
                FilePart {
                    offset: 5,
                    length: 10
                }
            );
            send(&mut stream, FrameKind::Data, &vec![1; sent]).await;
            hold(stream).await;
        })
    };
    let opened = opens(100, 10).await.open("/x", 100).await.unwrap();
    assert_eq!(opened.file(), file(100));
    let mut part = opened.part(5, 10).await.unwrap();
    assert_eq!(part.next().await.unwrap().unwrap().len(), 10);
    assert!(part.next().await.is_none());
    let opened = opens(100, 11).await.open("/x", 100).await.unwrap();
    let mut part = opened.part(5, 10).await.unwrap();
    assert!(broke_the_protocol(&part.next().await.unwrap()));
    let larger = against(move |mut stream, _| async move {
        answer(&mut stream, &Reply::Files(FileReply::Opened(file(101)))).await;
    });
    assert!(broke_the_protocol(&larger.await.open("/x", 100).await));
}
