//! Connections to servers that serve one flow after another.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::Full;
use rustls::RootCertStore;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};

use super::{
    super::{Channel, End},
    bearer, echo, get, read,
    world::{NAME, Place, Plan, binding, clear_world, open_world},
};

/// Waits until so many connections wait for a flow: a flow gives its own back behind its last answer.
async fn waiting(place: &Place, wanted: usize) {
    let found = async {
        while place.world.pool.waiting() != wanted {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let found = tokio::time::timeout(Duration::from_secs(20), found).await;
    assert!(
        found.is_ok(),
        "{} wait, {wanted} should",
        place.world.pool.waiting()
    );
}

#[tokio::test]
async fn a_connection_serves_one_flow_after_another_until_other_rules_hold() {
    for server_alpn in [&["http/1.1"][..], &["h2", "http/1.1"]] {
        let plan = Plan {
            server_alpn,
            ..open_world(vec![binding(bearer(), 1)])
        };
        let place = Place::make(plan, echo).await;
        for _ in 0..3 {
            let mut client = place.http1().await;
            let (status, text) = read(client.send_request(get("/")).await.expect("an answer")).await;
            assert_eq!(status, StatusCode::OK, "{text}");
            drop(client);
            waiting(&place, 1).await;
        }
        let mut client = place.http2().await;
        let request = get(&format!("https://{NAME}/"));
        let (status, text) = read(client.send_request(request).await.expect("an answer")).await;
        assert_eq!(status, StatusCode::OK, "{text}");
        drop(client);
        waiting(&place, 1).await;
        assert_eq!(place.dialled(), 1, "{server_alpn:?}");
        place.replace(&json!({ "mode": "allow_all" }), &[binding(bearer(), 1)]);
        assert_eq!(place.world.pool.waiting(), 0);
        let mut client = place.http1().await;
        read(client.send_request(get("/")).await.expect("an answer")).await;
        assert_eq!(place.dialled(), 2, "{server_alpn:?}");
        place.world.pool.end();
        drop(client);
    }
}

#[tokio::test]
async fn two_flows_at_once_share_no_connection() {
    let plan = Plan {
        server_alpn: &["h2"],
        ..open_world(Vec::new())
    };
    let place = Place::make(plan, echo).await;
    let mut clients = [place.http2().await, place.http2().await];
    let request = || get(&format!("https://{NAME}/"));
    for client in [0, 1, 0] {
        let client = &mut clients[client];
        read(client.send_request(request()).await.expect("an answer")).await;
    }
    assert_eq!(place.dialled(), 2);
}

#[tokio::test]
async fn a_request_meets_a_closing_connection_once_and_is_repeated_only_where_that_is_safe() {
    let policy = json!({ "mode": "allow_all", "allowed_ports": [80] });
    let place = Place::make(clear_world(Channel::Clear, policy), echo).await;
    let server = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    *place.world.server.lock().expect("whole") = server.local_addr().expect("bound");
    let heard = Arc::new(AtomicUsize::new(0));
    let (requests, tasks) = (Arc::clone(&heard), place.tasks.clone());
    // Answers the first request of each connection, and closes on the second one unanswered.
    place.tasks.spawn("server", async move {
        while let Ok((mut stream, _)) = server.accept().await {
            let requests = Arc::clone(&requests);
            tasks.spawn("connection", async move {
                for ordinal in 0..2 {
                    let mut head = Vec::new();
                    while !head.ends_with(b"\r\n\r\n") {
                        let Ok(byte) = stream.read_u8().await else { return };
                        head.push(byte);
                    }
                    requests.fetch_add(1, Ordering::Relaxed);
                    if ordinal == 0 {
                        let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi";
                        stream.write_all(answer).await.expect("written");
                    }
                }
            });
        }
    });
    let mut client = place.http1_over::<_, Full<Bytes>>(place.plain().await).await;
    let mut ask = async |method: &str| {
        client.ready().await.expect("kept open");
        let request = Request::builder().method(method).uri("/").header("host", NAME);
        let request = request.body(Full::default()).expect("a request");
        let status = read(client.send_request(request).await.expect("an answer"))
            .await
            .0;
        (status, heard.load(Ordering::Relaxed))
    };
    assert_eq!(ask("GET").await, (StatusCode::OK, 1));
    // Sent again on another connection, once.
    assert_eq!(ask("GET").await, (StatusCode::OK, 3));
    // It may have changed something: not sent again. On a connection that may be closing it would not go at all.
    let (status, times) = ask("POST").await;
    assert_eq!(times, 4, "{status}");
}

#[tokio::test]
async fn a_flow_in_clear_leaves_no_connection_behind() {
    let policy = json!({ "mode": "allow_all", "allowed_ports": [80] });
    let place = Place::make(clear_world(Channel::Clear, policy), echo).await;
    let mut client = place.http1_over::<_, Full<Bytes>>(place.plain().await).await;
    for _ in 0..2 {
        client.ready().await.expect("kept open");
        let answer = client.send_request(get("/")).await.expect("an answer");
        assert_eq!(read(answer).await.0, StatusCode::OK);
    }
    assert_eq!((place.dialled(), place.world.pool.waiting()), (1, 0));
}

#[tokio::test]
async fn a_client_that_pins_another_certificate_is_told_of_in_words() {
    let place = Place::make(open_world(vec![binding(bearer(), 1)]), echo).await;
    let refused = place.connect_trusting(RootCertStore::empty(), "h2").await;
    assert!(refused.is_err(), "a client without roots took the certificate");
    let ended = async {
        loop {
            if let Some(end) = place.ends.lock().expect("whole").first() {
                return end.clone();
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let end = tokio::time::timeout(Duration::from_secs(20), ended)
        .await
        .expect("an end");
    let End::Client(why) = end else { panic!("{end:?}") };
    assert!(
        why.contains("does not trust the certificate of this sandbox"),
        "{why}"
    );
    assert!(place.seen.lock().expect("whole").is_empty());
}
