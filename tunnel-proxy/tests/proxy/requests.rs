//! Requests and their answers, as they stream.

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, Version};
use http_body_util::{BodyExt as _, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    body::{Frame, Incoming},
    client::conn::http2::SendRequest,
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use sandgate_api::tunnel::TunnelProtocol;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::world::{OK, TOKEN, World, header, private, program, public, read_until, recorder, spawn, status};

type Outgoing = UnsyncBoxBody<Bytes, Infallible>;

pub(crate) async fn http2(world: &World) -> SendRequest<Outgoing> {
    let stream = world.connect().await;
    let (sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .expect("HTTP/2");
    spawn(async move { drop(connection.await) });
    sender
}

pub(crate) fn request(host: &str, body: Outgoing) -> Request<Outgoing> {
    Request::post(format!("http://{host}/path?query"))
        .version(Version::HTTP_2)
        .body(body)
        .expect("a request")
}

pub(crate) fn body(text: &'static str) -> Outgoing {
    Full::new(Bytes::from(text)).boxed_unsync()
}

#[tokio::test]
async fn http2_comes_in_and_http1_goes_on() {
    let world = World::start().await;
    let (program, heard) = recorder(OK).await;
    let host = world
        .open_as(3000, Ok(program), TunnelProtocol::Http, private())
        .await;
    let mut sender = http2(&world).await;
    let mut with_token = request(&host, body("hello"));
    let headers = with_token.headers_mut();
    headers.insert("x-tunnel-token", HeaderValue::from_static(TOKEN));
    headers.append("cookie", HeaderValue::from_static("a=1"));
    headers.append("cookie", HeaderValue::from_static("b=2"));
    let answer = sender.send_request(with_token).await.expect("an answer");
    assert_eq!(answer.status(), 200);
    assert!(answer.headers().contains_key("x-request-id"));
    let text = answer.into_body().collect().await.expect("a body").to_bytes();
    assert_eq!(text, "ok");
    let refused = sender
        .send_request(request(&host, body("hello")))
        .await
        .expect("an answer");
    assert_eq!(refused.status(), 401);
    let other = sender
        .send_request(request("nobody.localhost", body("")))
        .await
        .expect("an answer");
    assert_eq!(other.status(), 404);

    let heard = heard.lock().expect("a lock");
    assert_eq!(heard.len(), 1);
    assert!(heard[0].starts_with("POST /path?query HTTP/1.1\r\n") && heard[0].ends_with("hello"));
    assert_eq!(header(&heard[0], "host"), Some(host.as_str()));
    assert_eq!(header(&heard[0], "cookie"), Some("a=1; b=2"));
    assert!(!heard[0].contains(TOKEN));
}

/// A program that speaks HTTP/2 in clear only, as servers of gRPC do: it echoes and adds trailers.
async fn grpc() -> std::net::SocketAddr {
    program(|stream| async move {
        let service = service_fn(|request: Request<Incoming>| async move {
            assert_eq!(request.version(), Version::HTTP_2);
            let te = request.headers().get("te").cloned();
            let authority = request.uri().authority().expect("an authority").to_string();
            let collected = request.into_body().collect().await.expect("a body");
            let sent = collected
                .trailers()
                .and_then(|trailers| trailers.get("x-sent"))
                .cloned();
            let mut trailers = HeaderMap::new();
            trailers.insert("grpc-status", HeaderValue::from_static("0"));
            if let Some(sent) = sent {
                trailers.insert("x-sent", sent);
            }
            let frames = [
                Ok::<_, Infallible>(Frame::data(collected.to_bytes())),
                Ok(Frame::trailers(trailers)),
            ];
            let mut answer = Response::new(StreamBody::new(futures_util::stream::iter(frames)));
            answer.headers_mut().insert(
                "x-authority",
                HeaderValue::from_str(&authority).expect("an authority"),
            );
            if let Some(te) = te {
                answer.headers_mut().insert("x-te", te);
            }
            Ok::<_, Infallible>(answer)
        });
        let serving = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
            .serve_connection(TokioIo::new(stream), service);
        drop(serving.await);
    })
    .await
}

#[tokio::test]
async fn grpc_goes_end_to_end_with_its_trailers_over_one_connection() {
    let world = World::start().await;
    let host = world
        .open_as(50051, Ok(grpc().await), TunnelProtocol::H2c, public())
        .await;
    let sender = http2(&world).await;
    let calls = (0..20).map(|_| {
        let (mut sender, host) = (sender.clone(), host.clone());
        async move {
            let mut trailers = HeaderMap::new();
            trailers.insert("x-sent", HeaderValue::from_static("by the client"));
            let frames = [
                Ok(Frame::data(Bytes::from("message"))),
                Ok(Frame::trailers(trailers)),
            ];
            let body = StreamBody::new(futures_util::stream::iter(frames)).boxed_unsync();
            let mut call = request(&host, body);
            call.headers_mut()
                .insert("te", HeaderValue::from_static("trailers"));
            let answer = sender.send_request(call).await.expect("an answer");
            assert_eq!(answer.headers()["x-authority"], host.as_str());
            assert_eq!(answer.headers()["x-te"], "trailers");
            let collected = answer.into_body().collect().await.expect("a body");
            let trailers = collected.trailers().expect("trailers").clone();
            assert_eq!(trailers["grpc-status"], "0");
            assert_eq!(trailers["x-sent"], "by the client");
            assert_eq!(collected.to_bytes(), "message");
        }
    });
    futures_util::future::join_all(calls).await;
    assert_eq!(world.programs.dials.load(Ordering::Relaxed), 1);
    // HTTP/1.1 reaches the same program.
    let answer = world.get(&host, "").await;
    assert_eq!(status(&answer), 200, "{answer}");
}

#[tokio::test]
async fn a_program_that_does_not_speak_the_tunnels_protocol_is_a_bad_gateway() {
    let world = World::start().await;
    let (h1, _) = recorder(OK).await;
    let host = world.open_as(50051, Ok(h1), TunnelProtocol::H2c, public()).await;
    assert_eq!(status(&world.get(&host, "").await), 502);
    for answer in [
        "nonsense\r\n\r\n",
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok",
        "",
    ] {
        let broken = program(move |mut stream: TcpStream| async move {
            let mut request = [0; 4096];
            drop(stream.read(&mut request).await);
            drop(stream.write_all(answer.as_bytes()).await);
        })
        .await;
        let host = world.open(3000, broken).await;
        assert_eq!(status(&world.get(&host, "").await), 502, "{answer:?}");
    }
}

#[tokio::test]
async fn events_come_when_they_are_sent() {
    let world = World::start().await;
    let (next, gate) = tokio::sync::watch::channel(0);
    let events = program(move |mut stream: TcpStream| {
        let mut gate = gate.clone();
        async move {
            let mut request = [0; 4096];
            drop(stream.read(&mut request).await);
            let head =
                "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
            stream.write_all(head.as_bytes()).await.expect("written");
            for number in 1..=3 {
                gate.wait_for(|allowed| *allowed >= number)
                    .await
                    .expect("allowed");
                let event = format!("data: {number}\n\n");
                let chunk = format!("{:x}\r\n{event}\r\n", event.len());
                stream.write_all(chunk.as_bytes()).await.expect("written");
            }
            stream.write_all(b"0\r\n\r\n").await.expect("written");
        }
    })
    .await;
    let host = world.open(3000, events).await;
    let mut client = world.connect().await;
    client
        .write_all(format!("GET /events HTTP/1.1\r\nHost: {host}\r\n\r\n").as_bytes())
        .await
        .expect("written");
    read_until(&mut client, "text/event-stream").await;
    for number in 1..=3 {
        next.send_replace(number);
        let end = if number == 3 { "0\r\n\r\n" } else { "\n\n\r\n" };
        let event = read_until(&mut client, end).await;
        assert!(event.contains(&format!("data: {number}\n\n")), "{event}");
    }
}

#[tokio::test]
async fn a_client_that_does_not_read_stops_the_program_and_the_other_way_round() {
    let world = World::start().await;
    let written = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&written);
    let endless = program(move |mut stream: TcpStream| {
        let counted = Arc::clone(&counted);
        async move {
            let mut request = [0; 4096];
            drop(stream.read(&mut request).await);
            let head = "HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n";
            stream.write_all(head.as_bytes()).await.expect("written");
            while stream.write_all(&[7; 16384]).await.is_ok() {
                counted.fetch_add(16384, Ordering::Relaxed);
            }
        }
    })
    .await;
    let host = world.open(3000, endless).await;
    let mut client = world.connect().await;
    client
        .write_all(format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n").as_bytes())
        .await
        .expect("written");
    let stalled = stalls(&written).await;
    assert!(
        stalled < 64 << 20,
        "{stalled} bytes went to a client that reads nothing"
    );
    let mut some = vec![0; 1 << 20];
    client.read_exact(&mut some).await.expect("read");
    drop(client);

    let deaf = program(|stream: TcpStream| async move {
        tokio::time::sleep(Duration::from_secs(60)).await;
        drop(stream);
    })
    .await;
    let host = world.open(3001, deaf).await;
    let mut client = world.connect().await;
    let head = format!("POST / HTTP/1.1\r\nHost: {host}\r\nContent-Length: 1000000000\r\n\r\n");
    client.write_all(head.as_bytes()).await.expect("written");
    let mut sent = 0_u64;
    loop {
        let chunk = [7; 65536];
        let writing = tokio::time::timeout(Duration::from_millis(700), client.write(&chunk));
        match writing.await {
            Ok(length) => sent += length.expect("still open") as u64,
            Err(_elapsed) => break,
        }
        assert!(
            sent < 64 << 20,
            "{sent} bytes were taken from a client for a program that reads nothing"
        );
    }
}

/// Where a counter stays.
async fn stalls(counter: &AtomicU64) -> u64 {
    let mut before = u64::MAX;
    for _ in 0..40 {
        tokio::time::sleep(Duration::from_millis(250)).await;
        let now = counter.load(Ordering::Relaxed);
        if now == before {
            return now;
        }
        before = now;
    }
    before
}

#[tokio::test]
async fn a_large_body_streams_both_ways_at_once() {
    let world = World::start().await;
    // Echoes while it reads.
    let echo = program(|stream| async move {
        let service = service_fn(|request: Request<Incoming>| async move {
            Ok::<_, Infallible>(Response::new(request.into_body()))
        });
        let serving =
            hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
        drop(serving.await);
    })
    .await;
    let host = world.open(3000, echo).await;
    let stream = world.connect().await;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .expect("HTTP/1.1");
    spawn(async move { drop(connection.await) });
    let chunks = (0..512_u32).map(|number| {
        let byte = u8::try_from(number % 251).expect("a byte");
        Ok::<_, Infallible>(Frame::data(Bytes::from(vec![byte; 65536])))
    });
    let body = StreamBody::new(futures_util::stream::iter(chunks));
    let request = Request::post("/")
        .header("host", host)
        .body(body)
        .expect("a request");
    let mut answer = sender.send_request(request).await.expect("an answer").into_body();
    let mut at = 0_usize;
    while let Some(frame) = answer.frame().await {
        let data = frame.expect("a frame").into_data().expect("data");
        for byte in data {
            assert_eq!(usize::from(byte), at / 65536 % 251);
            at += 1;
        }
    }
    assert_eq!(at, 512 * 65536);
}

/// A program that agrees to any protocol and then echoes, in lines, until its client has ended; then says goodbye.
pub(crate) async fn echo_after_upgrade() -> std::net::SocketAddr {
    program(|mut stream: TcpStream| async move {
        let mut received = Vec::new();
        while !received.ends_with(b"\r\n\r\n") {
            if !matches!(stream.read_buf(&mut received).await, Ok(1..)) {
                return;
            }
        }
        let request = String::from_utf8_lossy(&received).to_ascii_lowercase();
        if !request.contains("\r\nupgrade: ") || !request.contains("\r\nconnection: upgrade\r\n") {
            drop(stream.write_all(OK.as_bytes()).await);
            return;
        }
        let agreed = "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\nX-Mine: 1\r\n\r\n";
        drop(stream.write_all(agreed.as_bytes()).await);
        let mut chunk = [0; 4096];
        loop {
            match stream.read(&mut chunk).await {
                Ok(0) => break,
                Ok(length) => {
                    if stream.write_all(&chunk[..length]).await.is_err() {
                        return;
                    }
                }
                Err(_gone) => return,
            }
        }
        drop(stream.write_all(b"goodbye").await);
    })
    .await
}

pub(crate) fn upgrade(host: &str, protocol: &str) -> String {
    format!(
        "GET /ws HTTP/1.1\r\nHost: {host}\r\nConnection: keep-alive, Upgrade\r\nUpgrade: {protocol}\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
}

#[tokio::test]
async fn a_websocket_passes_with_what_was_sent_early_and_half_closes() {
    let world = World::start().await;
    let host = world.open(3000, echo_after_upgrade().await).await;
    let mut client = world.connect().await;
    // The first frame rides in one packet with the request.
    let early = format!("{}early", upgrade(&host, "websocket"));
    client.write_all(early.as_bytes()).await.expect("written");
    let head = read_until(&mut client, "early").await;
    assert_eq!(status(&head), 101);
    assert_eq!(header(&head, "upgrade"), Some("websocket"));
    assert_eq!(header(&head, "x-mine"), Some("1"));
    client.write_all(&[0, 255, 13, 10]).await.expect("written");
    let mut echoed = [0; 4];
    client.read_exact(&mut echoed).await.expect("read");
    assert_eq!(echoed, [0, 255, 13, 10]);
    client.shutdown().await.expect("half closed");
    let mut rest = String::new();
    client.read_to_string(&mut rest).await.expect("read");
    assert_eq!(rest, "goodbye");
}

#[tokio::test]
async fn other_protocols_pass_but_for_http2() {
    let world = World::start().await;
    let host = world.open(3000, echo_after_upgrade().await).await;
    let mut client = world.connect().await;
    client
        .write_all(upgrade(&host, "my-protocol/1").as_bytes())
        .await
        .expect("written");
    assert_eq!(status(&read_until(&mut client, "\r\n\r\n").await), 101);
    for protocol in ["h2c", "websocket, h2c", "HTTP/2.0"] {
        let mut client = world.connect().await;
        client
            .write_all(upgrade(&host, protocol).as_bytes())
            .await
            .expect("written");
        assert_eq!(status(&read_until(&mut client, "ok").await), 200, "{protocol}");
    }
}

#[tokio::test]
async fn a_refused_upgrade_is_an_ordinary_answer_and_the_connection_goes_on() {
    let world = World::start().await;
    let (program, heard) = recorder("HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno").await;
    let host = world.open(3000, program).await;
    let mut client = world.connect().await;
    for _ in 0..2 {
        client
            .write_all(upgrade(&host, "websocket").as_bytes())
            .await
            .expect("written");
        assert_eq!(status(&read_until(&mut client, "no").await), 403);
    }
    assert_eq!(heard.lock().expect("a lock").len(), 2);
}

#[tokio::test]
async fn connections_are_used_again_within_a_tunnel_only() {
    let world = World::start().await;
    let (program, _) = recorder(OK).await;
    let first = world.open(3000, program).await;
    let second = world.open(3001, program).await;
    for _ in 0..5 {
        assert_eq!(status(&world.get(&first, "").await), 200);
    }
    assert_eq!(world.programs.dials.load(Ordering::Relaxed), 1);
    assert_eq!(status(&world.get(&second, "").await), 200);
    assert_eq!(world.programs.dials.load(Ordering::Relaxed), 2);
}

#[tokio::test]
async fn a_program_that_closes_between_requests_costs_no_request() {
    let world = World::start().await;
    let served = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&served);
    // Says that it keeps the connection and closes it when the second request comes.
    let fickle = program(move |mut stream: TcpStream| {
        let counted = Arc::clone(&counted);
        async move {
            let mut request = [0; 4096];
            drop(stream.read(&mut request).await);
            counted.fetch_add(1, Ordering::Relaxed);
            drop(stream.write_all(OK.as_bytes()).await);
            drop(stream.read(&mut request).await);
        }
    })
    .await;
    let host = world.open(3000, fickle).await;
    for number in 1..=4 {
        let answer = world.get(&host, "").await;
        assert_eq!(status(&answer), 200, "request {number}: {answer}");
    }
    assert_eq!(served.load(Ordering::Relaxed), 4);
    // What would do twice what was asked once is not repeated.
    let post = format!("POST / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: 1\r\n\r\nx");
    let answer = world.say(post.as_bytes()).await;
    assert_eq!(status(&answer), 502, "{answer}");
    assert_eq!(served.load(Ordering::Relaxed), 4);
}

#[tokio::test]
async fn a_client_that_has_closed_its_half_still_gets_its_answer() {
    let world = World::start().await;
    let slow = program(|mut stream: TcpStream| async move {
        let mut request = [0; 4096];
        drop(stream.read(&mut request).await);
        tokio::time::sleep(Duration::from_millis(300)).await;
        drop(stream.write_all(OK.as_bytes()).await);
    })
    .await;
    let host = world.open(3000, slow).await;
    let mut client = world.connect().await;
    client
        .write_all(format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n").as_bytes())
        .await
        .expect("written");
    client.shutdown().await.expect("half closed");
    let mut answer = String::new();
    client.read_to_string(&mut answer).await.expect("read");
    assert!(answer.ends_with("\r\n\r\nok"), "{answer}");
}

#[tokio::test]
async fn answers_without_bodies_keep_what_they_say_about_them() {
    let world = World::start().await;
    let (program, _) = recorder("HTTP/1.1 200 OK\r\nContent-Length: 5000\r\nETag: \"x\"\r\n\r\n").await;
    let host = world.open(3000, program).await;
    let head = format!("HEAD / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    let answer = world.say(head.as_bytes()).await;
    assert_eq!(
        (status(&answer), header(&answer, "content-length")),
        (200, Some("5000"))
    );
    assert!(answer.ends_with("\r\n\r\n"), "{answer}");
}

/// A program that says in a header how many bytes it got.
async fn measuring() -> std::net::SocketAddr {
    program(|stream| async move {
        let service = service_fn(|request: Request<Incoming>| async move {
            let body = request.into_body().collect().await.expect("a body").to_bytes();
            let mut answer = Response::new(Full::new(Bytes::new()));
            answer
                .headers_mut()
                .insert("x-got", HeaderValue::from(body.len()));
            Ok::<_, Infallible>(answer)
        });
        let serving =
            hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
        drop(serving.await);
    })
    .await
}

#[tokio::test]
async fn a_body_of_unknown_length_arrives_whatever_the_method() {
    let world = World::start().await;
    let host = world.open(3000, measuring().await).await;
    let mut sender = http2(&world).await;
    for method in ["GET", "HEAD", "DELETE", "POST"] {
        let frames = [
            Ok(Frame::data(Bytes::from("hel"))),
            Ok(Frame::data(Bytes::from("lo"))),
        ];
        let body = StreamBody::new(futures_util::stream::iter(frames)).boxed_unsync();
        let mut streamed = request(&host, body);
        *streamed.method_mut() = method.parse().expect("a method");
        let answer = sender.send_request(streamed).await.expect("an answer");
        assert_eq!(
            (answer.status().as_u16(), &answer.headers()["x-got"]),
            (200, &HeaderValue::from(5)),
            "{method}"
        );

        let chunked = format!(
            "{method} / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n\
             3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n"
        );
        let answer = world.say(chunked.as_bytes()).await;
        assert_eq!(header(&answer, "x-got"), Some("5"), "{method}: {answer}");
    }
}

/// A program of HTTP/2 that tells the names of the trailers it got, and has some of its own.
async fn trailing() -> std::net::SocketAddr {
    program(|stream| async move {
        let service = service_fn(|request: Request<Incoming>| async move {
            let collected = request.into_body().collect().await.expect("a body");
            let got = collected.trailers().expect("trailers");
            let mut names: Vec<String> = got
                .iter()
                .map(|(name, value)| format!("{name}={}", value.to_str().expect("text")))
                .collect();
            names.sort();
            let mut trailers = HeaderMap::new();
            for name in ["grpc-status", "x-sandgate-error", "x-forwarded-for", "alt-svc"] {
                trailers.insert(name, HeaderValue::from_static("0"));
            }
            let frames = [
                Ok::<_, Infallible>(Frame::data(Bytes::from(names.join(" ")))),
                Ok(Frame::trailers(trailers)),
            ];
            Ok::<_, Infallible>(Response::new(StreamBody::new(futures_util::stream::iter(frames))))
        });
        let serving = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
            .serve_connection(TokioIo::new(stream), service);
        drop(serving.await);
    })
    .await
}

#[tokio::test]
async fn trailers_say_no_more_than_headers_may() {
    let world = World::start().await;
    let host = world
        .open_as(50051, Ok(trailing().await), TunnelProtocol::H2c, private())
        .await;
    let mut trailers = HeaderMap::new();
    for (name, value) in [
        ("x-sent", "by the client"),
        ("x-tunnel-token", TOKEN),
        ("x-forwarded-for", "198.51.100.7"),
        ("x-sandgate-user", "root"),
        ("x-real-ip", "198.51.100.7"),
        ("forwarded", "for=198.51.100.7"),
        ("x-request-id", "another"),
    ] {
        trailers.insert(name, HeaderValue::from_static(value));
    }
    let bearer = HeaderValue::from_str(&format!("Bearer {TOKEN}")).expect("a value");
    trailers.append("authorization", bearer);
    trailers.append("authorization", HeaderValue::from_static("Bearer mine"));
    let frames = [
        Ok(Frame::data(Bytes::from("message"))),
        Ok(Frame::trailers(trailers)),
    ];
    let body = StreamBody::new(futures_util::stream::iter(frames)).boxed_unsync();
    let mut call = request(&host, body);
    call.headers_mut()
        .insert("x-tunnel-token", HeaderValue::from_static(TOKEN));
    let answer = http2(&world).await.send_request(call).await.expect("an answer");
    let collected = answer.into_body().collect().await.expect("a body");
    let got: Vec<String> = collected
        .trailers()
        .expect("trailers")
        .keys()
        .map(ToString::to_string)
        .collect();
    assert_eq!(got, ["grpc-status"]);
    assert_eq!(
        collected.to_bytes(),
        "authorization=Bearer mine x-sent=by the client"
    );
}
