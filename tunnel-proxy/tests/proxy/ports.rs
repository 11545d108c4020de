//! The tunnels' own ports on the loopback address.

use std::time::Duration;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use sandgate_api::tunnel::{Access, TunnelProtocol};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::world::{
    OK, TOKEN, World, header, in_time, private, program, public, read_all, read_until, recorder, status,
};

/// Echoes until its client has ended, then says goodbye.
async fn echo() -> std::net::SocketAddr {
    program(|mut stream: TcpStream| async move {
        let mut chunk = [0; 4096];
        loop {
            match stream.read(&mut chunk).await {
                Ok(0) => break,
                Ok(length) => drop(stream.write_all(&chunk[..length]).await),
                Err(_gone) => return,
            }
        }
        drop(stream.write_all(b"goodbye").await);
    })
    .await
}

async fn tcp(world: &World, access: Access) -> TcpStream {
    world
        .open_as(5432, Ok(echo().await), TunnelProtocol::Tcp, access)
        .await;
    let mut ports = world.own_ports().await;
    ports.follow(true).await;
    TcpStream::connect(World::own_address(&ports, 5432))
        .await
        .expect("connected")
}

#[tokio::test]
async fn the_host_says_nothing_on_a_port_of_its_own() {
    let world = World::start().await;
    let (program, heard) = recorder(OK).await;
    world
        .open_as(3000, Ok(program), TunnelProtocol::Http, private())
        .await;
    let (other, _) = recorder("HTTP/1.1 418 I'm a teapot\r\nContent-Length: 0\r\n\r\n").await;
    let other = world.open(3001, other).await;
    let mut ports = world.own_ports().await;
    ports.follow(true).await;
    let address = World::own_address(&ports, 3000);
    for (host, token, expected) in [
        (address.to_string(), "", 401),
        (address.to_string(), TOKEN, 200),
        (other.clone(), "", 401),
        (other, TOKEN, 200),
        ("anything.test".to_owned(), TOKEN, 200),
    ] {
        let mut client = TcpStream::connect(address).await.expect("connected");
        let token = if token.is_empty() {
            String::new()
        } else {
            format!("X-Tunnel-Token: {token}\r\n")
        };
        let request = format!("GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{token}\r\n");
        client.write_all(request.as_bytes()).await.expect("written");
        assert_eq!(status(&read_all(&mut client).await), expected, "{host}");
    }
    assert_eq!(heard.lock().expect("a lock").len(), 3);
}

#[tokio::test]
async fn a_public_tunnel_of_bytes_carries_them_and_half_closes() {
    let world = World::start().await;
    let mut client = tcp(&world, public()).await;
    // Whatever it looks like, it is bytes.
    let bytes = "CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n\0\u{1}";
    client.write_all(bytes.as_bytes()).await.expect("written");
    assert_eq!(read_until(&mut client, "\u{1}").await, bytes);
    client.shutdown().await.expect("half closed");
    assert_eq!(read_all(&mut client).await, "goodbye");
}

#[tokio::test]
async fn a_private_tunnel_of_bytes_wants_connect_with_its_token() {
    let world = World::start().await;
    world
        .open_as(5432, Ok(echo().await), TunnelProtocol::Tcp, private())
        .await;
    let mut ports = world.own_ports().await;
    ports.follow(true).await;
    let address = World::own_address(&ports, 5432);
    let basic = STANDARD.encode(format!("any:{TOKEN}"));
    for fields in [
        format!("X-Tunnel-Token: {TOKEN}\r\n"),
        format!("Proxy-Authorization: Basic {basic}\r\n"),
        format!("Proxy-Authorization: Bearer {TOKEN}\r\n"),
    ] {
        let mut client = TcpStream::connect(address).await.expect("connected");
        let connect = format!("CONNECT db:5432 HTTP/1.1\r\nHost: db:5432\r\n{fields}\r\nearly");
        client.write_all(connect.as_bytes()).await.expect("written");
        let answer = read_until(&mut client, "early").await;
        assert_eq!(status(&answer), 200, "{fields}");
        assert!(answer.ends_with("\r\n\r\nearly"), "{answer}");
        client.shutdown().await.expect("half closed");
        assert_eq!(read_all(&mut client).await, "goodbye");
    }
    for (said, expected) in [
        (
            "CONNECT db:5432 HTTP/1.1\r\nHost: db:5432\r\n\r\n".to_owned(),
            407,
        ),
        (
            "CONNECT db:5432 HTTP/1.1\r\nHost: db:5432\r\nX-Tunnel-Token: x\r\n\r\n".to_owned(),
            403,
        ),
        (
            format!("GET / HTTP/1.1\r\nHost: db\r\nX-Tunnel-Token: {TOKEN}\r\n\r\n"),
            400,
        ),
        ("\u{16}\u{3}\u{1}bytes at once".to_owned(), 400),
    ] {
        let mut client = TcpStream::connect(address).await.expect("connected");
        client.write_all(said.as_bytes()).await.expect("written");
        let answer = read_all(&mut client).await;
        assert_eq!(status(&answer), expected, "{said}");
        assert_eq!(header(&answer, "proxy-authenticate").is_some(), expected == 407);
        assert!(!answer.contains("goodbye"));
    }
    assert_eq!(
        world.programs.dials.load(std::sync::atomic::Ordering::Relaxed),
        3,
        "who was refused was connected"
    );
}

#[tokio::test]
async fn closing_cuts_bytes_and_gives_the_port_up() {
    let world = World::start().await;
    world
        .open_as(5432, Ok(echo().await), TunnelProtocol::Tcp, public())
        .await;
    let mut ports = world.own_ports().await;
    ports.follow(true).await;
    let address = World::own_address(&ports, 5432);
    let mut client = TcpStream::connect(address).await.expect("connected");
    client.write_all(b"ping").await.expect("written");
    read_until(&mut client, "ping").await;
    in_time("closing", world.close(5432)).await;
    assert_eq!(in_time("the end", read_all(&mut client)).await, "");
    ports.follow(true).await;
    assert!(ports.listening().is_empty());
    in_time("giving up the port", async {
        while TcpStream::connect(address).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn an_idle_connection_on_a_port_of_its_own_ends_with_the_tunnel() {
    let world = World::start().await;
    let (program, _) = recorder(OK).await;
    world.open(3000, program).await;
    let mut ports = world.own_ports().await;
    ports.follow(true).await;
    let address = World::own_address(&ports, 3000);
    let mut used = TcpStream::connect(address).await.expect("connected");
    used.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        .await
        .expect("written");
    read_until(&mut used, "ok").await;
    let mut fresh = TcpStream::connect(address).await.expect("connected");
    tokio::time::sleep(Duration::from_millis(100)).await;
    in_time("closing", world.close(3000)).await;
    in_time("the end", read_all(&mut used)).await;
    in_time("the end", read_all(&mut fresh)).await;
}

#[tokio::test]
async fn connections_wait_for_the_next_start_and_are_served() {
    let world = World::start().await;
    let (program, _) = recorder(OK).await;
    world.open(3000, program).await;
    let mut ports = world.own_ports().await;
    ports.follow(true).await;
    let address = World::own_address(&ports, 3000);
    world.holds(1).await;
    // The program ends; its supervisor holds the listener.
    world.tasks.drain(Duration::from_secs(1)).await.expect("drained");
    drop(ports);
    let mut waiting = Vec::new();
    for _ in 0..20 {
        let mut client = TcpStream::connect(address).await.expect("the queue takes it");
        client
            .write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            .await
            .expect("written");
        waiting.push(client);
    }
    let next = world.restarted();
    next.upsert(crate::world::route(3000, TunnelProtocol::Http, public()))
        .await;
    let mut ports = next.own_ports().await;
    ports.follow(false).await;
    assert_eq!(World::own_address(&ports, 3000), address);
    for mut client in waiting {
        assert_eq!(status(&read_all(&mut client).await), 200);
    }
}

#[tokio::test]
async fn what_is_kept_for_a_tunnel_that_is_gone_is_given_up_once_that_is_known() {
    let world = World::start().await;
    let (program, _) = recorder(OK).await;
    world.open(3000, program).await;
    let mut ports = world.own_ports().await;
    ports.follow(true).await;
    let address = World::own_address(&ports, 3000);
    world.holds(1).await;
    drop(ports);
    let next = world.restarted();
    let mut ports = next.own_ports().await;
    ports.follow(false).await;
    TcpStream::connect(address)
        .await
        .expect("it may only not be known yet");
    ports.follow(true).await;
    let _forced = world.tasks.drain(Duration::ZERO).await;
    in_time("giving up the port", async {
        while TcpStream::connect(address).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
}
