//! What one tunnel or one stranger can take is bounded.

use std::time::Duration;

use tokio::{io::AsyncWriteExt as _, net::TcpStream};
use tunnel_proxy::config::Limits;

use crate::world::{LIMITS, OK, World, header, program, read_all, recorder, status};

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
    tokio::time::timeout(Duration::from_secs(5), async {
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
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(status(&world.get(&host, "").await), 200);
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
    assert_eq!(read_all(&mut client).await, "");
    assert!(
        (400..4000).contains(&began.elapsed().as_millis()),
        "{:?}",
        began.elapsed()
    );
}
