//! What one tunnel or one stranger can take is bounded.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty};
use hyper_util::rt::{TokioExecutor, TokioIo};
use sandgate_api::tunnel::TunnelProtocol;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tunnel_proxy::config::Limits;

use crate::{
    requests::{echo_after_upgrade, upgrade},
    world::{
        LIMITS, OK, SOON, TOKEN, World, header, in_time, private, program, read_all, read_until, recorder,
        spawn, status,
    },
};

/// A program that takes requests and never answers.
async fn silent() -> std::net::SocketAddr {
    program(|stream: TcpStream| async move {
        tokio::time::sleep(Duration::from_secs(60)).await;
        drop(stream);
    })
    .await
}

#[tokio::test]
async fn one_tunnel_takes_no_more_than_its_share() {
    let world = World::start_with(Limits {
        connections_each: 3,
        ..LIMITS
    })
    .await;
    let full = world.open(3000, silent().await).await;
    let (program, _) = recorder(OK).await;
    let other = world.open(3001, program).await;
    let mut waiting = Vec::new();
    for _ in 0..3 {
        let mut client = world.connect().await;
        client
            .write_all(format!("GET / HTTP/1.1\r\nHost: {full}\r\n\r\n").as_bytes())
            .await
            .expect("written");
        waiting.push(client);
    }
    let tunnel = world.proxy.table.by_id(&crate::world::id(3000)).expect("open");
    while tunnel.under_way() < 3 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let answer = world.get(&full, "").await;
    assert_eq!(
        (status(&answer), header(&answer, "retry-after")),
        (429, Some("1"))
    );
    assert_eq!(status(&world.get(&other, "").await), 200);
    // A client that goes away leaves its place.
    let last = waiting.pop().expect("a client");
    socket2::SockRef::from(&last)
        .set_linger(Some(Duration::ZERO))
        .expect("set");
    drop(last);
    tokio::time::timeout(SOON, async {
        while tunnel.under_way() > 2 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .expect("the place is free again");
}

#[tokio::test]
async fn who_comes_when_all_places_are_taken_is_told() {
    let world = World::start_with(Limits {
        connections: 4,
        ..LIMITS
    })
    .await;
    let (program, _) = recorder(OK).await;
    let host = world.open(3000, program).await;
    let mut taken = Vec::new();
    for _ in 0..4 {
        taken.push(world.connect().await);
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    let answer = world.get(&host, "").await;
    assert_eq!(
        (status(&answer), header(&answer, "retry-after")),
        (503, Some("1")),
        "{answer}"
    );
    drop(taken);
    in_time("a place", async {
        while status(&world.get(&host, "").await) != 200 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_request_on_which_nothing_moves_is_given_up() {
    let world = World::start_with(Limits {
        idle_timeout: Duration::from_millis(500),
        ..LIMITS
    })
    .await;
    let host = world.open(3000, silent().await).await;
    let mut client = world.connect().await;
    client
        .write_all(format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n").as_bytes())
        .await
        .expect("written");
    let began = std::time::Instant::now();
    assert_eq!(in_time("the end", read_all(&mut client)).await, "");
    assert!(
        began.elapsed() >= Duration::from_millis(400),
        "{:?}",
        began.elapsed()
    );
}

#[tokio::test]
async fn connections_to_all_sandboxes_together_are_bounded() {
    let world = World::start_bounded(LIMITS, 1).await;
    let first = world.open(3000, echo_after_upgrade().await).await;
    let (program, _) = recorder(OK).await;
    let other = world.open(3001, program).await;
    let mut client = world.connect().await;
    client
        .write_all(upgrade(&first, "websocket").as_bytes())
        .await
        .expect("written");
    assert_eq!(status(&read_until(&mut client, "\r\n\r\n").await), 101);
    let answer = world.get(&other, "").await;
    assert_eq!(
        (status(&answer), header(&answer, "retry-after")),
        (503, Some("1")),
        "{answer}"
    );
    assert_eq!(world.programs.dials.load(std::sync::atomic::Ordering::Relaxed), 1);
    drop(client);
    tokio::time::timeout(SOON, async {
        while status(&world.get(&other, "").await) != 200 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .expect("the place is free again");
}

/// Reads until the other side ends, which it does in an orderly way within a second.
async fn until_the_end(client: &mut TcpStream) -> String {
    let mut text = String::new();
    in_time("the end", client.read_to_string(&mut text))
        .await
        .expect("an orderly end");
    text
}

#[tokio::test]
async fn who_is_let_in_nowhere_does_not_keep_its_place() {
    let world = World::start().await;
    let (program, _) = recorder(OK).await;
    let host = world
        .open_as(3000, Ok(program), TunnelProtocol::Http, private())
        .await;
    for (host, fields, expected) in [
        ("nobody.localhost", "", 404),
        (&*host, "", 401),
        (&*host, "X-Tunnel-Token: wrong\r\n", 403),
    ] {
        let mut client = world.connect().await;
        client
            .write_all(format!("GET / HTTP/1.1\r\nHost: {host}\r\n{fields}\r\n").as_bytes())
            .await
            .expect("written");
        let answer = until_the_end(&mut client).await;
        assert_eq!(
            (status(&answer), header(&answer, "connection")),
            (expected, Some("close")),
            "{answer}"
        );

        let stream = world.connect().await;
        let (mut sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
                .await
                .expect("HTTP/2");
        let (over, mut is_over) = tokio::sync::mpsc::channel(1);
        spawn(async move {
            let _unheard = over.send(connection.await.is_ok()).await;
        });
        let mut request = http::Request::get(format!("http://{host}/"));
        if let Some((name, value)) = fields.trim().split_once(": ") {
            request = request.header(name, value);
        }
        let request = request.body(Empty::<Bytes>::new()).expect("a request");
        let answer = sender.send_request(request).await.expect("an answer");
        assert_eq!(answer.status(), expected);
        assert!(
            !answer
                .into_body()
                .collect()
                .await
                .expect("a body")
                .to_bytes()
                .is_empty()
        );
        assert_eq!(in_time("the end", is_over.recv()).await, Some(true));
    }
    // Whoever was let in once goes on.
    let mut client = world.connect().await;
    for (fields, expected, end) in [
        (format!("X-Tunnel-Token: {TOKEN}\r\n"), 200, "ok"),
        (String::new(), 401, "}}"),
        (format!("X-Tunnel-Token: {TOKEN}\r\n"), 200, "ok"),
    ] {
        client
            .write_all(format!("GET / HTTP/1.1\r\nHost: {host}\r\n{fields}\r\n").as_bytes())
            .await
            .expect("written");
        assert_eq!(status(&read_until(&mut client, end).await), expected);
    }
}

#[tokio::test]
async fn who_has_asked_for_nothing_waits_a_short_time_only() {
    let world = World::start_with(Limits {
        header_timeout: Duration::from_millis(300),
        ..LIMITS
    })
    .await;
    let (program, _) = recorder(OK).await;
    let host = world.open(3000, program).await;
    // One that says it speaks HTTP/2, and no more.
    let mut idle = world.connect().await;
    idle.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
        .await
        .expect("written");
    let mut served = world.connect().await;
    let request = format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n");
    served.write_all(request.as_bytes()).await.expect("written");
    assert_eq!(status(&read_until(&mut served, "ok").await), 200);
    let mut said = Vec::new();
    let ended = tokio::time::timeout(SOON, idle.read_to_end(&mut said)).await;
    assert!(ended.is_ok(), "it still holds its place");
    tokio::time::sleep(Duration::from_millis(700)).await;
    served.write_all(request.as_bytes()).await.expect("written");
    assert_eq!(status(&read_until(&mut served, "ok").await), 200);
}

/// A frame of HTTP/2 (RFC 9113 4.1).
fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
    let length = u8::try_from(payload.len()).expect("a short one");
    let mut frame = vec![0, 0, length, kind, flags, 0, 0, 0, stream];
    frame.extend_from_slice(payload);
    frame
}

#[tokio::test]
async fn who_was_told_to_go_cannot_stay_by_asking_again() {
    let world = World::start_with(Limits {
        header_timeout: Duration::from_millis(300),
        ..LIMITS
    })
    .await;
    let (mut heard, mut client) = world.connect().await.into_split();
    let mut hello = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    hello.extend(frame(4, 0, 0, b""));
    client.write_all(&hello).await.expect("written");
    // GET, http, / and the authority `a` (RFC 7541); what the proxy says is never answered.
    let fields = [0x82, 0x86, 0x84, 0x41, 1, b'a'];
    spawn(async move {
        for stream in (1..=127).step_by(2) {
            if client.write_all(&frame(1, 5, stream, &fields)).await.is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    });
    let mut said = Vec::new();
    let ended = tokio::time::timeout(Duration::from_secs(6), heard.read_to_end(&mut said)).await;
    assert!(ended.is_ok(), "it still holds its place");
    assert!(!said.is_empty(), "it was not answered");
}
