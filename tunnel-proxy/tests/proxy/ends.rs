//! A tunnel that ends takes everything under way on it with it, and nothing else.

use std::time::Duration;

use http_body_util::BodyExt as _;
use jiff::{Timestamp, ToSpan as _};
use sandgate_api::tunnel::TunnelProtocol;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::{
    requests::{body, echo_after_upgrade, http2, request, upgrade},
    world::{
        OK, SOON, World, id, in_time, program, public, read_all, read_until, recorder, route, status, until,
    },
};

/// A program that begins an answer and never ends it.
async fn endless(is_fast: bool) -> std::net::SocketAddr {
    program(move |mut stream: TcpStream| async move {
        let mut request = [0; 4096];
        drop(stream.read(&mut request).await);
        let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
        drop(stream.write_all(head.as_bytes()).await);
        let text = if is_fast {
            "hello".repeat(10_000)
        } else {
            "hello".to_owned()
        };
        let chunk = format!("{:x}\r\n{text}\r\n", text.len());
        loop {
            if stream.write_all(chunk.as_bytes()).await.is_err() {
                return;
            }
            if !is_fast {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    })
    .await
}

async fn begin(world: &World, host: &str) -> TcpStream {
    let mut client = world.connect().await;
    client
        .write_all(format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n").as_bytes())
        .await
        .expect("written");
    client
}

#[tokio::test]
async fn closing_cuts_answers_under_way() {
    let world = World::start().await;
    let host = world.open(3000, endless(false).await).await;
    let mut client = begin(&world, &host).await;
    read_until(&mut client, "hello").await;
    in_time("closing", world.close(3000)).await;
    let rest = in_time("the end", async {
        let mut rest = Vec::new();
        let ended = client.read_to_end(&mut rest).await;
        (ended, rest)
    })
    .await;
    assert!(rest.0.is_err(), "a cut answer looks like a whole one");
    assert!(!rest.1.ends_with(b"0\r\n\r\n"));
    assert_eq!(status(&world.get(&host, "").await), 404);
}

#[tokio::test]
async fn closing_cuts_a_client_that_does_not_read() {
    let world = World::start().await;
    let host = world.open(3000, endless(true).await).await;
    let mut client = begin(&world, &host).await;
    let tunnel = world.proxy.table.by_id(&id(3000)).expect("open");
    until("it is under way", || tunnel.under_way() == 1).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    in_time("closing", world.close(3000)).await;
    assert_eq!(tunnel.under_way(), 0, "it is still under way");
    let mut rest = Vec::new();
    let ended = in_time("the end", client.read_to_end(&mut rest)).await;
    assert!(ended.is_err(), "a cut answer looks like a whole one");
}

#[tokio::test]
async fn closing_cuts_a_stream_of_http2_that_nobody_reads() {
    let world = World::start().await;
    let host = world.open(3000, endless(true).await).await;
    let mut sender = http2(&world).await;
    let answer = sender
        .send_request(request(&host, body("")))
        .await
        .expect("an answer");
    // The stream's window is full: nobody asks for more of the answer.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let tunnel = world.proxy.table.by_id(&id(3000)).expect("open");
    assert_eq!(tunnel.under_way(), 1);
    in_time("closing", world.close(3000)).await;
    assert_eq!(tunnel.under_way(), 0, "it is still under way");
    let mut rest = answer.into_body();
    in_time("the end", async {
        while let Some(frame) = rest.frame().await {
            if frame.is_err() {
                return;
            }
        }
        panic!("a cut answer looks like a whole one");
    })
    .await;
}

#[tokio::test]
async fn closing_answers_those_who_wait_for_an_answer() {
    let world = World::start().await;
    let silent = program(|stream: TcpStream| async move {
        tokio::time::sleep(Duration::from_secs(60)).await;
        drop(stream);
    })
    .await;
    let host = world.open(3000, silent).await;
    let mut client = begin(&world, &host).await;
    let tunnel = world.proxy.table.by_id(&id(3000)).expect("open");
    until("it is under way", || tunnel.under_way() == 1).await;
    in_time("closing", world.close(3000)).await;
    assert_eq!(
        status(&in_time("the answer", read_until(&mut client, "}}")).await),
        404
    );
    // The connection is not the tunnel's: it goes on for others.
    let (program, _) = recorder(OK).await;
    let other = world.open(3001, program).await;
    client
        .write_all(format!("GET / HTTP/1.1\r\nHost: {other}\r\n\r\n").as_bytes())
        .await
        .expect("written");
    assert_eq!(status(&read_until(&mut client, "ok").await), 200);
}

#[tokio::test]
async fn closing_cuts_streams_of_http2_and_leaves_those_of_others() {
    let world = World::start().await;
    let closed = world.open(3000, endless(false).await).await;
    let other = world.open(3001, endless(false).await).await;
    let mut sender = http2(&world).await;
    let mut cut = sender
        .send_request(request(&closed, body("")))
        .await
        .expect("an answer")
        .into_body();
    let mut kept = sender
        .send_request(request(&other, body("")))
        .await
        .expect("an answer")
        .into_body();
    cut.frame().await.expect("a frame").expect("data");
    in_time("closing", world.close(3000)).await;
    in_time("the end", async {
        loop {
            match cut.frame().await {
                Some(Ok(_)) => {}
                Some(Err(_)) => return,
                None => panic!("a cut answer looks like a whole one"),
            }
        }
    })
    .await;
    for _ in 0..5 {
        kept.frame().await.expect("a frame").expect("data");
    }
}

#[tokio::test]
async fn closing_cuts_upgraded_connections() {
    let world = World::start().await;
    let host = world.open(3000, echo_after_upgrade().await).await;
    let mut client = world.connect().await;
    client
        .write_all(upgrade(&host, "websocket").as_bytes())
        .await
        .expect("written");
    read_until(&mut client, "\r\n\r\n").await;
    client.write_all(b"ping").await.expect("written");
    read_until(&mut client, "ping").await;
    in_time("closing", world.close(3000)).await;
    let rest = in_time("the end", read_all(&mut client)).await;
    assert_eq!(rest, "");
}

#[tokio::test]
async fn expiry_cuts_too() {
    let world = World::start().await;
    let host = world.open(3000, echo_after_upgrade().await).await;
    let mut client = world.connect().await;
    client
        .write_all(upgrade(&host, "websocket").as_bytes())
        .await
        .expect("written");
    read_until(&mut client, "\r\n\r\n").await;
    let mut short = route(3000, TunnelProtocol::Http, public());
    short.expires_at = Timestamp::now() + 3.seconds();
    world.upsert(short).await;
    client.write_all(b"ping").await.expect("written");
    read_until(&mut client, "ping").await;
    assert_eq!(in_time("the end", read_all(&mut client)).await, "");
    assert_eq!(status(&world.get(&host, "").await), 410);
}

#[tokio::test]
async fn connections_to_the_program_end_with_the_tunnel() {
    let world = World::start().await;
    let (seen, mut ended) = tokio::sync::mpsc::unbounded_channel();
    let watched = program(move |mut stream: TcpStream| {
        let seen = seen.clone();
        async move {
            let mut chunk = [0; 4096];
            drop(stream.read(&mut chunk).await);
            drop(stream.write_all(OK.as_bytes()).await);
            while matches!(stream.read(&mut chunk).await, Ok(1..)) {}
            let _unheard = seen.send(());
        }
    })
    .await;
    let host = world.open(3000, watched).await;
    assert_eq!(status(&world.get(&host, "").await), 200);
    in_time("closing", world.close(3000)).await;
    in_time("the end", ended.recv()).await.expect("it ended");
}

#[tokio::test]
async fn the_end_of_the_program_finishes_what_is_under_way() {
    let world = World::start().await;
    let slow = program(|mut stream: TcpStream| async move {
        let mut request = [0; 4096];
        drop(stream.read(&mut request).await);
        tokio::time::sleep(Duration::from_millis(400)).await;
        drop(stream.write_all(OK.as_bytes()).await);
    })
    .await;
    let host = world.open(3000, slow).await;
    let mut client = begin(&world, &host).await;
    let tunnel = world.proxy.table.by_id(&id(3000)).expect("open");
    until("it is under way", || tunnel.under_way() == 1).await;
    let (drained, answer) = tokio::join!(world.tasks.drain(SOON), read_until(&mut client, "\r\n\r\nok"));
    assert_eq!(drained, Ok(()));
    assert_eq!(status(&answer), 200);
}
