//! What two parsers could read in two ways goes no further.

use std::time::Duration;

use tokio::io::AsyncWriteExt as _;
use tunnel_proxy::config::Limits;

use crate::world::{LIMITS, OK, World, read_all, read_until, recorder, status};

#[tokio::test]
async fn ambiguous_requests_are_refused_and_never_reach_the_program() {
    let world = World::start().await;
    let (program, heard) = recorder(OK).await;
    let host = world.open(3000, program).await;
    for fields in [
        "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "Content-Length: 2\r\nContent-Length: 2\r\n\r\nab",
        "Content-Length: 2, 2\r\n\r\nab",
        "Content-Length: +2\r\n\r\nab",
        "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        "Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "X: a\r\n continued\r\n\r\n",
        "X: a\0b\r\n\r\n",
        "X: a\rY: b\r\n\r\n",
        "Host: other.localhost\r\n\r\n",
        "Connection: Content-Length\r\n\r\n",
    ] {
        let request = format!(
            "POST / HTTP/1.1\r\nHost: {host}\r\n{fields}GET /smuggled HTTP/1.1\r\nHost: {host}\r\n\r\n"
        );
        let answer = world.say(request.as_bytes()).await;
        assert_eq!(status(&answer), 400, "{fields:?}: {answer}");
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{fields:?}: {answer}");
    }
    for request in [
        format!("GET / HTTP/1.1\nHost: {host}\n\n"),
        "GET / HTTP/1.1\r\n\r\n".to_owned(),
        format!("GET http://{host}/ HTTP/1.1\r\nHost: {host}\r\n\r\n"),
        format!("CONNECT {host}:80 HTTP/1.1\r\nHost: {host}\r\n\r\n"),
        format!("GET / HTTP/9.9\r\nHost: {host}\r\n\r\n"),
        "\u{16}\u{3}\u{1}\u{2}\u{0}\u{1}".to_owned(),
    ] {
        let answer = world.say(request.as_bytes()).await;
        assert_eq!(status(&answer), 400, "{request:?}: {answer}");
    }
    assert!(heard.lock().expect("a lock").is_empty(), "{heard:?}");
}

#[tokio::test]
async fn a_broken_body_never_ends_well() {
    let world = World::start().await;
    let (program, heard) = recorder(OK).await;
    let host = world.open(3000, program).await;
    for chunks in ["zz\r\n", "2\r\nabc\r\n0\r\n\r\n", "-1\r\n", "2\nab\r\n0\r\n\r\n"] {
        let request =
            format!("POST / HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: chunked\r\n\r\n{chunks}");
        let answer = world.say(request.as_bytes()).await;
        assert!(
            answer.is_empty() || status(&answer) == 400,
            "{chunks:?}: {answer}"
        );
    }
    // The program may have seen a head, but never a whole request.
    for request in heard.lock().expect("a lock").iter() {
        assert!(!request.ends_with("0\r\n\r\n"), "{request}");
    }
}

#[tokio::test]
async fn requests_of_one_connection_are_answered_in_order() {
    let world = World::start().await;
    let (program, heard) = recorder(OK).await;
    let host = world.open(3000, program).await;
    let requests = format!(
        "POST /a HTTP/1.1\r\nHost: {host}\r\nContent-Length: 3\r\n\r\nabcGET /b HTTP/1.1\r\nHost: {host}\r\n\r\n\
         GET /c HTTP/1.1\r\nHost: nobody.localhost\r\n\r\nGET /d HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    );
    let answers = world.say(requests.as_bytes()).await;
    let statuses: Vec<&str> = answers
        .split("HTTP/1.1 ")
        .skip(1)
        .map(|answer| &answer[..3])
        .collect();
    assert_eq!(statuses, ["200", "200", "404", "200"], "{answers}");
    assert_eq!(heard.lock().expect("a lock").len(), 3);
}

#[tokio::test]
async fn a_head_that_is_too_long_or_too_slow_is_refused() {
    let world = World::start_with(Limits {
        header_timeout: Duration::from_millis(300),
        ..LIMITS
    })
    .await;
    let (program, heard) = recorder(OK).await;
    let host = world.open(3000, program).await;
    let long = format!(
        "GET / HTTP/1.1\r\nHost: {host}\r\nX: {}\r\n\r\n",
        "y".repeat(40_000)
    );
    assert_eq!(status(&world.say(long.as_bytes()).await), 431);

    let mut slow = world.connect().await;
    slow.write_all(format!("GET / HTTP/1.1\r\nHost: {host}\r\nX: ").as_bytes())
        .await
        .expect("written");
    assert_eq!(status(&read_all(&mut slow).await), 408);

    // One that says nothing at all is closed without a word.
    let mut silent = world.connect().await;
    assert_eq!(read_all(&mut silent).await, "");
    assert!(heard.lock().expect("a lock").is_empty());

    // The time is the head's, not the body's.
    let mut patient = world.connect().await;
    patient
        .write_all(format!("POST / HTTP/1.1\r\nHost: {host}\r\nContent-Length: 2\r\n\r\na").as_bytes())
        .await
        .expect("written");
    tokio::time::sleep(Duration::from_millis(600)).await;
    patient.write_all(b"b").await.expect("written");
    read_until(&mut patient, "200 OK").await;
}
