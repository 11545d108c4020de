//! A client, netd's interception and a server in one process.

mod clear;
mod limits;
mod quotas;
mod reuse;
mod streams;
mod world;

use std::{sync::atomic::Ordering, time::Duration};

use bytes::Bytes;
use http::{Request, Response, StatusCode, header::HeaderValue};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use sandgate_api::credential::{Inject, PlaceholderPlace};
use sandgate_policy::Reason;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use self::world::{CANARY, NAME, PLACEHOLDER, Place, Plan, Seen, binding, open_world};

fn get(target: &str) -> Request<Full<Bytes>> {
    Request::get(target)
        .header("host", NAME)
        .body(Full::default())
        .expect("a request")
}

/// What the client reads of an answer, in one text.
async fn read(response: Response<Incoming>) -> (StatusCode, String) {
    let (parts, body) = response.into_parts();
    let body = body.collect().await.expect("a whole answer");
    let trailers = body.trailers().cloned();
    let text = String::from_utf8_lossy(&body.to_bytes()).into_owned();
    (parts.status, format!("{:?}\n{trailers:?}\n{text}", parts.headers))
}

/// Tells the client all that the server was told.
fn echo(seen: &Seen) -> Response<Full<Bytes>> {
    let text = format!("{:?}\n{}\n{:?}", seen.headers, seen.target, seen.body);
    let mut response = Response::new(Full::from(text));
    if let Some(sent) = seen.headers.get("authorization") {
        response.headers_mut().insert("x-echo", sent.clone());
    }
    response
}

fn bearer() -> Vec<Inject> {
    vec![Inject::Bearer]
}

fn all_sent(seen: &Seen, name: &str) -> Vec<String> {
    let text = |value: &HeaderValue| value.to_str().expect("text").to_owned();
    seen.headers.get_all(name).iter().map(text).collect()
}

#[tokio::test]
async fn a_value_goes_to_the_server_once_and_never_comes_back() {
    for server_alpn in [&["http/1.1"][..], &["h2", "http/1.1"]] {
        let plan = Plan {
            server_alpn,
            ..open_world(vec![binding(bearer(), 1)])
        };
        let place = Place::make(plan, echo).await;
        let mut client = place.http1().await;
        let mut request = get("/v1/../v1/models?q=1&api_key=mine");
        let headers = request.headers_mut();
        headers.append(
            "authorization",
            format!("Bearer {PLACEHOLDER}").parse().expect("a value"),
        );
        headers.append("authorization", "Bearer attacker".parse().expect("a value"));
        headers.append("cookie", "session=attacker".parse().expect("a value"));
        headers.append("connection", "authorization".parse().expect("a value"));
        headers.append("x-http-method-override", "DELETE".parse().expect("a value"));
        let (status, text) = read(client.send_request(request).await.expect("an answer")).await;
        assert_eq!(status, StatusCode::OK);
        assert!(
            !text.contains(CANARY) && text.contains("[redacted:KEY]"),
            "{text}"
        );
        let seen = place.last_seen();
        assert_eq!(all_sent(&seen, "authorization"), [format!("Bearer {CANARY}")]);
        assert_eq!(seen.target, "/v1/models?q=1");
        assert!(all_sent(&seen, "cookie").is_empty());
        assert!(all_sent(&seen, "x-http-method-override").is_empty());

        let mut client = place.http2().await;
        let request = get(&format!("https://{NAME}/h2"));
        let (status, text) = read(client.send_request(request).await.expect("an answer")).await;
        assert_eq!(status, StatusCode::OK);
        assert!(
            !text.contains(CANARY) && text.contains("[redacted:KEY]"),
            "{text}"
        );
        assert_eq!(
            all_sent(&place.last_seen(), "authorization"),
            [format!("Bearer {CANARY}")]
        );

        let records = place.world.records.lock().expect("whole").clone();
        assert_eq!(records.len(), 2);
        for (decision, exchange) in &records {
            assert!(decision.is_allowed());
            assert_eq!(exchange.credential.as_deref(), Some("KEY"));
            assert!(!format!("{exchange:?}").contains("canary"), "{exchange:?}");
        }
        assert_eq!(records[0].1.path.as_deref(), Some("/v1/models"));
    }
}

#[tokio::test]
async fn connections_are_kept_on_both_sides() {
    let place = Place::make(open_world(vec![binding(bearer(), 1)]), echo).await;
    let mut client = place.http1().await;
    for _ in 0..5 {
        client.ready().await.expect("kept open");
        let response = client.send_request(get("/")).await.expect("an answer");
        assert_eq!(read(response).await.0, StatusCode::OK);
    }
    assert_eq!(*place.world.dialled.lock().expect("whole"), 1);
}

#[tokio::test]
async fn a_rotation_or_revocation_counts_for_the_next_request_on_a_live_connection() {
    let place = Place::make(open_world(vec![binding(bearer(), 1)]), echo).await;
    let open = json!({ "mode": "allow_all" });
    let mut client = place.http1().await;
    read(client.send_request(get("/")).await.expect("an answer")).await;
    assert_eq!(
        all_sent(&place.last_seen(), "authorization"),
        [format!("Bearer {CANARY}")]
    );

    *place.world.vault.lease.lock().expect("whole") = ("canary-second".to_owned(), 2);
    place.replace(&open, &[binding(bearer(), 2)]);
    client.ready().await.expect("kept open");
    let (_, text) = read(client.send_request(get("/")).await.expect("an answer")).await;
    assert_eq!(
        all_sent(&place.last_seen(), "authorization"),
        ["Bearer canary-second"]
    );
    assert!(!text.contains("canary-second"), "{text}");

    place.replace(&open, &[]);
    client.ready().await.expect("kept open");
    let mut request = get("/");
    request.headers_mut().append(
        "authorization",
        format!("Bearer {PLACEHOLDER}").parse().expect("a value"),
    );
    let before = place.seen.lock().expect("whole").len();
    let (status, text) = read(client.send_request(request).await.expect("an answer")).await;
    assert_eq!(status, StatusCode::FORBIDDEN, "{text}");
    assert!(text.contains("placeholder_misuse"), "{text}");
    client.ready().await.expect("kept open");
    read(client.send_request(get("/")).await.expect("an answer")).await;
    assert_eq!(
        place.seen.lock().expect("whole").len(),
        before + 1,
        "the refused request went out"
    );
    assert!(all_sent(&place.last_seen(), "authorization").is_empty());
}

#[tokio::test]
async fn each_request_is_judged_and_each_stream_by_its_own_authority() {
    let plan = Plan {
        policy: json!({ "mode": "allowlist", "rules": [{
            "name": "read", "action": "allow", "domains": [NAME], "ports": ["443"],
            "http": [{ "methods": ["GET"], "paths": ["/repos/**"] }] }] }),
        ..open_world(Vec::new())
    };
    let place = Place::make(plan, echo).await;
    let mut client = place.http2().await;
    for (target, status, reason) in [
        ("/repos/a", StatusCode::OK, ""),
        ("/repos/../admin", StatusCode::FORBIDDEN, "path_denied"),
        ("/repos/%2e%2e/admin", StatusCode::BAD_REQUEST, "malformed"),
        ("/repos/a%2fb", StatusCode::BAD_REQUEST, "malformed"),
    ] {
        let request = get(&format!("https://{NAME}{target}"));
        let (found, text) = read(client.send_request(request).await.expect("an answer")).await;
        assert_eq!(found, status, "{target}: {text}");
        assert!(text.contains(reason), "{target}: {text}");
    }
    let mut post = get(&format!("https://{NAME}/repos/a"));
    *post.method_mut() = http::Method::POST;
    let (status, text) = read(client.send_request(post).await.expect("an answer")).await;
    assert_eq!(status, StatusCode::FORBIDDEN);
    for part in ["method_denied", "\"read\"", "event-", "/network"] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    let mut other = get("https://evil.test/repos/a");
    other.headers_mut().remove("host");
    let (status, text) = read(client.send_request(other).await.expect("an answer")).await;
    assert_eq!(status, StatusCode::MISDIRECTED_REQUEST, "{text}");
    assert_eq!(place.seen.lock().expect("whole").len(), 1);

    place.replace(&json!({ "mode": "deny_all" }), &[]);
    let request = get(&format!("https://{NAME}/repos/a"));
    let (status, _) = read(client.send_request(request).await.expect("an answer")).await;
    assert_eq!(
        status,
        StatusCode::FORBIDDEN,
        "judged by rules that are no longer in force"
    );
}

#[tokio::test]
async fn a_question_to_a_name_server_goes_nowhere_whatever_the_rules_allow() {
    let place = Place::make(open_world(vec![binding(bearer(), 1)]), echo).await;
    let mut client = place.http2().await;
    let question = |target: &str, header: Option<(&'static str, &'static str)>| {
        let mut request = get(&format!("https://{NAME}{target}"));
        if let Some((name, value)) = header {
            request
                .headers_mut()
                .insert(name, HeaderValue::from_static(value));
        }
        request
    };
    for request in [
        question("/dns-query?dns=AAABAAABAAAAAAAAA3d3dw", None),
        question("/resolve?name=evil.test&type=TXT", None),
        question("/x", Some(("accept", "application/dns-message"))),
        question("/x", Some(("content-type", "application/oblivious-dns-message"))),
    ] {
        let shown = format!("{request:?}");
        let (status, text) = read(client.send_request(request).await.expect("an answer")).await;
        assert_eq!(status, StatusCode::FORBIDDEN, "{shown}: {text}");
        assert!(text.contains("dns_refused"), "{shown}: {text}");
    }
    assert!(
        place.seen.lock().expect("whole").is_empty(),
        "a question went out"
    );
    let request = question("/x?dns=AAAB", Some(("accept", "application/json")));
    let (status, text) = read(client.send_request(request).await.expect("an answer")).await;
    assert_eq!(status, StatusCode::OK, "{text}");
    let records = place.world.records.lock().expect("whole");
    assert_eq!(records[0].0.reason, Reason::DnsRefused);
}

#[tokio::test]
async fn a_server_that_cannot_be_verified_gets_nothing() {
    let plan = Plan {
        bad_certificate: true,
        ..open_world(vec![binding(bearer(), 1)])
    };
    let place = Place::make(plan, echo).await;
    let mut client = place.http1().await;
    let (status, text) = read(client.send_request(get("/")).await.expect("an answer")).await;
    assert_eq!(status, StatusCode::BAD_GATEWAY);
    assert!(text.contains("upstream_tls") && !text.contains(CANARY), "{text}");
    assert!(place.seen.lock().expect("whole").is_empty());
    let records = place.world.records.lock().expect("whole");
    assert_eq!(records[0].0.reason, Reason::UpstreamTls);
}

#[tokio::test]
async fn without_the_broker_a_request_fails_closed_or_goes_without() {
    let place = Place::make(open_world(vec![binding(bearer(), 1)]), echo).await;
    place.world.vault.away.store(true, Ordering::Relaxed);
    let mut client = place.http1().await;
    let request = || {
        let mut request = get("/");
        request.headers_mut().append(
            "authorization",
            format!("Bearer {PLACEHOLDER}").parse().expect("a value"),
        );
        request
    };
    let (status, text) = read(client.send_request(request()).await.expect("an answer")).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(text.contains("credential_unavailable"), "{text}");

    place.world.fails_open.store(true, Ordering::Relaxed);
    client.ready().await.expect("kept open");
    let (status, _) = read(client.send_request(request()).await.expect("an answer")).await;
    assert_eq!(status, StatusCode::OK);
    let seen = place.last_seen();
    assert!(!format!("{seen:?}").contains(PLACEHOLDER), "{seen:?}");
}

#[tokio::test]
async fn a_placeholder_in_a_body_ends_the_request_wherever_it_is_cut() {
    let place = Place::make(open_world(vec![binding(bearer(), 1)]), echo).await;
    let text = format!("{}{PLACEHOLDER} and more", "x".repeat(20_000));
    let mut client = place.http1().await;
    let mut request = Request::post("/")
        .header("host", NAME)
        .body(Full::from(text))
        .expect("a request");
    request
        .headers_mut()
        .insert("content-type", HeaderValue::from_static("text/plain"));
    let (status, text) = read(client.send_request(request).await.expect("an answer")).await;
    assert_eq!(status, StatusCode::FORBIDDEN, "{text}");
    assert!(place.seen.lock().expect("whole").is_empty());
}

#[tokio::test]
async fn compressed_answers_are_searched_and_unreadable_ones_refused() {
    let answer = |seen: &Seen| {
        let (coding, body) = if seen.target == "/gzip" {
            ("gzip", gzip(format!("hello {CANARY} again").as_bytes()))
        } else {
            ("br", b"whatever".to_vec())
        };
        Response::builder()
            .header("content-encoding", coding)
            .header("etag", "\"1\"")
            .header("alt-svc", "h3=\":443\"")
            .body(Full::from(body))
            .expect("an answer")
    };
    let place = Place::make(open_world(vec![binding(bearer(), 1)]), answer).await;
    let mut client = place.http1().await;
    let mut request = get("/gzip");
    let headers = request.headers_mut();
    headers.insert(
        "accept-encoding",
        HeaderValue::from_static("br, gzip;q=0.5, zstd"),
    );
    headers.insert("range", HeaderValue::from_static("bytes=0-3"));
    let (status, text) = read(client.send_request(request).await.expect("an answer")).await;
    assert_eq!(status, StatusCode::OK);
    assert!(
        text.contains("hello [redacted:KEY]") && text.ends_with(" again"),
        "{text}"
    );
    for gone in [CANARY, "etag", "alt-svc", "content-encoding"] {
        assert!(!text.contains(gone), "{gone} is in {text}");
    }
    let seen = place.last_seen();
    assert!(!format!("{:?}", seen.headers["accept-encoding"]).contains("br"));
    assert!(!seen.headers.contains_key("range"));

    client.ready().await.expect("kept open");
    let (status, _) = read(client.send_request(get("/br")).await.expect("an answer")).await;
    assert_eq!(status, StatusCode::BAD_GATEWAY);
}

/// A gzip member of one stored block.
fn gzip(body: &[u8]) -> Vec<u8> {
    let length = u16::try_from(body.len()).expect("short");
    let mut out = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255, 1];
    out.extend(length.to_le_bytes());
    out.extend((!length).to_le_bytes());
    out.extend(body);
    let mut sum = u32::MAX;
    for byte in body {
        sum ^= u32::from(*byte);
        for _ in 0..8 {
            sum = if sum & 1 == 1 {
                sum >> 1 ^ 0xedb8_8320
            } else {
                sum >> 1
            };
        }
    }
    out.extend((!sum).to_le_bytes());
    out.extend(u32::from(length).to_le_bytes());
    out
}

#[tokio::test]
async fn placeholders_are_replaced_in_headers_and_queries() {
    let kind = vec![Inject::Placeholder {
        places: vec![PlaceholderPlace::Header, PlaceholderPlace::Query],
    }];
    let place = Place::make(open_world(vec![binding(kind, 1)]), echo).await;
    let mut client = place.http1().await;
    let mut request = get(&format!("/?token={PLACEHOLDER}&q=1"));
    request
        .headers_mut()
        .append("x-any", format!("a {PLACEHOLDER} b").parse().expect("a value"));
    let (status, text) = read(client.send_request(request).await.expect("an answer")).await;
    assert_eq!(status, StatusCode::OK);
    assert!(
        !text.contains(CANARY) && !text.contains("canary%2Bvalue"),
        "{text}"
    );
    let seen = place.last_seen();
    assert_eq!(seen.target, "/?q=1&token=canary%2Bvalue%2F4711-deadbeef");
    assert_eq!(all_sent(&seen, "x-any"), [format!("a {CANARY} b")]);
}

#[tokio::test]
async fn broken_framing_is_answered_and_ends_the_connection() {
    let place = Place::make(open_world(vec![binding(bearer(), 1)]), echo).await;
    for broken in [
        "GET / HTTP/1.1\r\nHost: api.test\r\nHost: evil.test\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: api.test\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "GET / HTTP/1.1\nHost: api.test\n\n",
    ] {
        let mut stream = place.connect("http/1.1").await;
        stream
            .write_all(format!("GET /well HTTP/1.1\r\nHost: api.test\r\n\r\n{broken}").as_bytes())
            .await
            .expect("written");
        let mut answers = Vec::new();
        let reading = stream.read_to_end(&mut answers);
        let ended = tokio::time::timeout(Duration::from_secs(5), reading).await;
        assert!(ended.is_ok(), "the connection stays open after {broken:?}");
        let answers = String::from_utf8_lossy(&answers).into_owned();
        assert!(
            answers.starts_with("HTTP/1.1 200") && answers.contains("HTTP/1.1 400"),
            "{answers}"
        );
        assert!(!answers.contains(CANARY));
        assert_eq!(place.last_seen().target, "/well");
    }
}

#[tokio::test]
async fn large_bodies_stream_both_ways() {
    let answer = |seen: &Seen| Response::new(Full::new(seen.body.clone()));
    let place = Place::make(open_world(vec![binding(bearer(), 1)]), answer).await;
    let body = Bytes::from(vec![b'z'; 3 << 20]);
    let mut http1 = place.http1().await;
    let request = |target: &str| {
        Request::post(target)
            .header("host", NAME)
            .body(Full::new(body.clone()))
            .expect("a request")
    };
    let response = http1.send_request(request("/")).await.expect("an answer");
    assert_eq!(response.headers()["content-length"], "3145728");
    assert_eq!(response.collect().await.expect("whole").to_bytes(), body);
    let mut http2 = place.http2().await;
    let response = http2
        .send_request(request(&format!("https://{NAME}/")))
        .await
        .expect("an answer");
    assert_eq!(response.collect().await.expect("whole").to_bytes(), body);
}

#[tokio::test]
async fn a_rule_that_wants_a_secret_is_not_served_without_it() {
    let wanting = json!({ "mode": "allowlist", "rules": [{
        "name": "with key", "action": "allow", "domains": [NAME], "ports": ["443"], "credential": "KEY" }] });
    let plan = Plan {
        policy: wanting,
        ..open_world(Vec::new())
    };
    let place = Place::make(plan, echo).await;
    let mut client = place.http1().await;
    let (status, text) = read(client.send_request(get("/")).await.expect("an answer")).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{text}");
    assert!(place.seen.lock().expect("whole").is_empty());
}

#[tokio::test]
async fn an_answer_streams_piece_by_piece_with_masked_trailers() {
    let plan = Plan {
        server_alpn: &["h2"],
        ..open_world(vec![binding(bearer(), 1)])
    };
    let place = Place::make(plan, echo).await;
    let mut client = place.http2().await;
    let mut request = get(&format!("https://{NAME}/stream"));
    request
        .headers_mut()
        .insert("te", HeaderValue::from_static("trailers"));
    let mut response = client.send_request(request).await.expect("an answer");
    let first = tokio::time::timeout(Duration::from_secs(5), response.frame()).await;
    let first = first
        .expect("the answer waits for its end")
        .expect("a frame")
        .expect("well");
    assert_eq!(first.data_ref().expect("data").as_ref(), b"data: begin\n\n");
    place.go.add_permits(1);
    tokio::time::sleep(Duration::from_millis(50)).await;
    place.go.add_permits(1);
    let rest = response.collect().await.expect("whole");
    let trailers = rest.trailers().cloned().expect("trailers");
    let text = String::from_utf8_lossy(&rest.to_bytes()).into_owned();
    assert!(text.starts_with("Bearer [redacted:KEY]"), "{text}");
    assert!(!text.contains("deadbeef"), "{text}");
    assert!(
        format!("{:?}", trailers["x-trailer"]).contains("[redacted:KEY]"),
        "{trailers:?}"
    );
}

#[tokio::test]
async fn a_websocket_goes_through_with_the_value_masked_in_it() {
    for server_alpn in [&["http/1.1"][..], &["h2", "http/1.1"]] {
        let plan = Plan {
            server_alpn,
            ..open_world(vec![binding(bearer(), 1)])
        };
        let place = Place::make(plan, echo).await;
        let mut stream = place.connect("http/1.1").await;
        let asked = "GET /ws HTTP/1.1\r\nHost: api.test\r\nConnection: keep-alive, Upgrade\r\nUpgrade: WebSocket\r\n\
                     Sec-WebSocket-Extensions: permessage-deflate\r\n\r\n";
        stream.write_all(asked.as_bytes()).await.expect("written");
        let mut seen = Vec::new();
        while !seen.ends_with(b"\r\n\r\n") {
            seen.push(stream.read_u8().await.expect("an answer"));
        }
        let head = String::from_utf8_lossy(&seen).into_owned();
        assert!(head.starts_with("HTTP/1.1 101"), "{head}");
        stream.write_all(b"ping").await.expect("written");
        let mut frames = Vec::new();
        let reading = stream.read_to_end(&mut frames);
        let read = tokio::time::timeout(Duration::from_secs(5), reading).await;
        read.expect("the end is passed on").expect("read");
        let text = String::from_utf8_lossy(&frames).into_owned();
        assert!(frames.ends_with(b"\x82\x04ping"), "{text:?}");
        assert!(!text.contains("canary") && !text.contains("deadbeef"), "{text:?}");
        assert!(text.contains("[re"), "{text:?}");
    }
}

#[tokio::test]
async fn a_client_is_told_to_go_on_only_when_its_request_is_allowed() {
    let plan = Plan {
        policy: json!({ "mode": "allowlist", "rules": [{
            "name": "write", "action": "allow", "domains": [NAME], "ports": ["443"],
            "http": [{ "methods": ["POST"], "paths": ["/a"] }] }] }),
        ..open_world(Vec::new())
    };
    let place = Place::make(plan, echo).await;
    for (path, wanted) in [("/a", "HTTP/1.1 100 Continue"), ("/b", "HTTP/1.1 403")] {
        let mut stream = place.connect("http/1.1").await;
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: api.test\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).await.expect("written");
        let mut seen = Vec::new();
        while !seen.ends_with(b"\r\n\r\n") {
            let byte = tokio::time::timeout(Duration::from_secs(5), stream.read_u8()).await;
            seen.push(byte.expect("an answer in time").expect("an answer"));
        }
        let text = String::from_utf8_lossy(&seen).into_owned();
        assert!(text.starts_with(wanted), "{path}: {text}");
    }
}

#[tokio::test]
async fn a_refusal_reaches_a_client_that_is_still_sending() {
    let plan = Plan {
        policy: json!({ "mode": "allowlist", "rules": [{
            "name": "read", "action": "allow", "domains": [NAME], "ports": ["443"],
            "http": [{ "methods": ["GET"], "paths": ["/**"] }] }] }),
        ..open_world(Vec::new())
    };
    let place = Place::make(plan, echo).await;
    let large = || Full::from(vec![b'x'; 4 << 20]);
    for _ in 0..3 {
        let mut http1 = place.http1().await;
        let request = Request::post("/")
            .header("host", NAME)
            .body(large())
            .expect("a request");
        let (status, text) = read(http1.send_request(request).await.expect("an answer")).await;
        assert_eq!(status, StatusCode::FORBIDDEN, "{text}");
    }
    let mut http2 = place.http2().await;
    for _ in 0..3 {
        let request = Request::post(format!("https://{NAME}/"))
            .body(large())
            .expect("a request");
        let (status, text) = read(http2.send_request(request).await.expect("an answer")).await;
        assert_eq!(status, StatusCode::FORBIDDEN, "{text}");
    }
    assert!(place.seen.lock().expect("whole").is_empty());
}
