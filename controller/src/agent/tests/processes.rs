//! Processes of hostile and broken peers.

use sandgate_api::agent::ProcessStatus;

use super::*;

fn status(process_id: &str) -> ProcessStatus {
    ProcessStatus {
        process_id: process_id.to_owned(),
        pid: 2,
        command: "a\u{1b}[31mb\n".to_owned(),
        terminal: false,
        attended: false,
        started_ms: 0,
        ended: None,
        first: 0,
        next: 0,
    }
}

/// What a client hears of a peer that answers a follower with these frames.
async fn heard(frames: Vec<(FrameKind, Vec<u8>)>, since: u64) -> Vec<Result<ProcessOutput, AgentError>> {
    let agent = against(|mut stream, _| async move {
        for (kind, payload) in frames {
            send(&mut stream, kind, &payload).await;
        }
        hold(stream).await;
    });
    let mut follow = match agent.await.follow("proc-1", since, true, false).await {
        Ok(follow) => follow,
        Err(error) => return vec![Err(error)],
    };
    let mut events = Vec::new();
    while let Some(event) = follow.next().await {
        events.push(event);
    }
    events
}

fn json(reply: &Reply) -> (FrameKind, Vec<u8>) {
    (FrameKind::Json, serde_json::to_vec(reply).unwrap())
}

const EXITED: Reply = Reply::Exited {
    exit_code: 3,
    timed_out: false,
    duration_ms: 9,
    changes: None,
};

#[tokio::test]
async fn positions_are_counted_and_what_is_left_out_is_told() {
    let frames = vec![
        json(&Reply::Output { from: 12 }),
        (FrameKind::Stdout, b"abc".to_vec()),
        (FrameKind::Stderr, b"de".to_vec()),
        json(&Reply::Output { from: 17 }),
        json(&Reply::Output { from: 20 }),
        (FrameKind::Stdout, b"f".to_vec()),
        json(&EXITED),
        (FrameKind::Stdout, b"more".to_vec()),
    ];
    let events = heard(frames, 10).await.into_iter().map(Result::unwrap);
    let part = |to_stderr, next, bytes: &'static str| ProcessOutput::Part {
        to_stderr,
        next,
        bytes: Bytes::from_static(bytes.as_bytes()),
    };
    let expected = [
        ProcessOutput::Lost(2),
        part(false, 15, "abc"),
        part(true, 17, "de"),
        ProcessOutput::Lost(3),
        part(false, 21, "f"),
        ProcessOutput::Exited {
            exit_code: 3,
            duration_ms: 9,
        },
    ];
    assert_eq!(events.collect::<Vec<_>>(), expected);
}

#[tokio::test]
async fn a_peer_that_breaks_the_rules_is_cut_off() {
    let begun = || json(&Reply::Output { from: 5 });
    for frames in [
        vec![json(&Reply::Output { from: 4 })],
        vec![json(&Reply::Done)],
        vec![(FrameKind::Stdout, b"x".to_vec())],
        vec![begun(), json(&Reply::Output { from: 4 })],
        vec![begun(), (FrameKind::Data, b"x".to_vec())],
        vec![begun(), json(&Reply::Pong { protocol: 1 })],
        vec![begun(), (FrameKind::Json, b"{}".to_vec())],
    ] {
        let events = heard(frames.clone(), 5).await;
        assert!(
            broke_the_protocol(events.last().unwrap()),
            "{frames:?}: {events:?}"
        );
    }
}

#[tokio::test]
async fn lists_are_bounded_and_texts_cleaned() {
    let list = |processes: Vec<ProcessStatus>| async {
        let agent = against(|mut stream, _| async move {
            answer(&mut stream, &Reply::Processes { processes }).await;
            hold(stream).await;
        });
        agent.await.processes().await
    };
    let one = list(vec![status("proc-1")]).await.unwrap();
    assert_eq!(one[0].command, "a[31mb");
    for bad in [vec![status("a/b")], vec![status("")], vec![status("proc-1"); 300]] {
        assert!(broke_the_protocol(&list(bad).await));
    }
    let agent = against(|mut stream, _| async move {
        let process_id = "<b>".to_owned();
        answer(&mut stream, &Reply::Started { process_id, pid: 2 }).await;
        hold(stream).await;
    });
    let start = Start {
        exec: exec(None),
        terminal: None,
        attended: false,
    };
    assert!(broke_the_protocol(&agent.await.start_process(start).await));
    let agent = against(|mut stream, _| async move {
        let _data = read(&mut stream).await;
        answer(&mut stream, &Reply::Written { size: 2 }).await;
        hold(stream).await;
    });
    let wrote = agent
        .await
        .write_process("proc-1", Bytes::from_static(b"x"), false)
        .await;
    assert!(broke_the_protocol(&wrote));
}

#[tokio::test]
async fn what_is_typed_arrives_in_order() {
    let agent = against(|mut stream, request| async move {
        assert!(matches!(request, Request::Follow { input: true, .. }));
        answer(&mut stream, &Reply::Output { from: 0 }).await;
        assert_eq!(read(&mut stream).await, (FrameKind::Data, b"ab".to_vec()));
        let (kind, size) = read(&mut stream).await;
        let size: TerminalSize = serde_json::from_slice(&size).unwrap();
        assert_eq!((kind, size.rows, size.columns), (FrameKind::Json, 3, 4));
        assert_eq!(read(&mut stream).await, (FrameKind::Data, b"c".to_vec()));
        answer(&mut stream, &EXITED).await;
    });
    let mut follow = agent.await.follow("proc-1", 0, true, true).await.unwrap();
    follow.write(b"ab").await.unwrap();
    follow.resize(TerminalSize { rows: 3, columns: 4 }).await.unwrap();
    follow.write(b"c").await.unwrap();
    let end = follow.next().await.unwrap().unwrap();
    assert!(
        matches!(end, ProcessOutput::Exited { exit_code: 3, .. }),
        "{end:?}"
    );
}
