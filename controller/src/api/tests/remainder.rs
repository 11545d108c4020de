//! Requests that are answered before their body was read.

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

use super::*;

/// A connection to the API as it is served.
async fn connected(world: &World) -> TcpStream {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let address = listener.local_addr().expect("an address");
    let tasks = Tasks::new(CancellationToken::new());
    tasks.spawn("api", serve(listener, world.router.clone(), tasks.clone()));
    TcpStream::connect(address).await.expect("connected")
}

/// The head of an answer, whose body is read too.
async fn answer(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.expect("an answer"));
    }
    let head = String::from_utf8(head).expect("text").to_ascii_lowercase();
    let (_, length) = head.split_once("content-length: ").expect("a length");
    let length = length.lines().next().and_then(|length| length.parse().ok());
    let mut body = vec![0; length.expect("a length")];
    stream.read_exact(&mut body).await.expect("a body");
    head
}

#[tokio::test]
async fn a_connection_goes_on_after_a_refusal_however_the_body_comes() {
    let world = world().await;
    let mut stream = connected(&world).await;
    for path in ["/api/v1/no/such/path", "/api/v1/sandbox/create"] {
        // As published clients do: the head by itself.
        let head = format!("POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n");
        stream.write_all(head.as_bytes()).await.expect("written");
        stream.flush().await.expect("written");
        tokio::task::yield_now().await;
        stream.write_all(b"{}").await.expect("written");
        let refused = answer(&mut stream).await;
        assert!(
            refused.starts_with("http/1.1 40") && !refused.contains("connection: close"),
            "{refused}"
        );
    }
    stream
        .write_all(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        .await
        .expect("written");
    let healthy = answer(&mut stream).await;
    assert!(healthy.starts_with("http/1.1 200"), "{healthy}");
}

#[tokio::test]
async fn a_connection_that_ends_says_so() {
    let world = world().await;
    for (more, sent) in [("", 1 << 20), ("Expect: 100-continue\r\n", 0)] {
        let mut stream = connected(&world).await;
        let head =
            format!("POST /api/v1/no/such HTTP/1.1\r\nHost: x\r\n{more}Content-Length: 99999999\r\n\r\n");
        stream.write_all(head.as_bytes()).await.expect("written");
        stream.write_all(&vec![b' '; sent]).await.expect("written");
        let refused = answer(&mut stream).await;
        assert!(
            refused.starts_with("http/1.1 404") && refused.contains("connection: close"),
            "{refused}"
        );
    }
}
