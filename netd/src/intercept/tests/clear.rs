//! Requests in clear, by either version of HTTP: the same code as by TLS, without secrets.

use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode, header::HeaderValue};
use http_body_util::Full;
use sandgate_policy::Reason;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

use super::{
    super::Channel,
    all_sent, echo, get, read,
    world::{CANARY, NAME, PLACEHOLDER, Place, Seen, clear_world},
};

fn open() -> Value {
    json!({ "mode": "allow_all", "allowed_ports": [80, 443] })
}

fn listed(paths: &[&str]) -> Value {
    json!({ "mode": "allowlist", "rules": [{
        "name": "read", "action": "allow", "domains": [NAME], "ports": ["80"],
        "http": [{ "methods": ["GET"], "paths": paths }] }] })
}

/// What comes back for these bytes, whose end the client tells by closing its half.
async fn raw(place: &Place, sent: &str) -> String {
    let mut stream = place.plain().await;
    stream.write_all(sent.as_bytes()).await.expect("written");
    stream.shutdown().await.expect("closed");
    rest(&mut stream).await
}

async fn rest(stream: &mut TcpStream) -> String {
    let mut answer = Vec::new();
    let reading = tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut answer)).await;
    // A reset ends it as well.
    let _reset = reading.expect("an end in time");
    String::from_utf8_lossy(&answer).into_owned()
}

fn targets(place: &Place) -> Vec<String> {
    let seen = place.seen.lock().expect("whole");
    seen.iter().map(|seen| seen.target.clone()).collect()
}

#[tokio::test]
async fn a_connection_is_kept_and_each_request_on_it_is_judged() {
    let place = Place::make(clear_world(Channel::Clear, listed(&["/a/**"])), echo).await;
    let mut client = place.http1_over::<_, Full<Bytes>>(place.plain().await).await;
    for (target, host, status, reason) in [
        ("/a/1", NAME, StatusCode::OK, ""),
        ("/b", NAME, StatusCode::FORBIDDEN, "path_denied"),
        (
            "/a/2",
            "evil.test",
            StatusCode::MISDIRECTED_REQUEST,
            "host_mismatch",
        ),
        ("/a/3", NAME, StatusCode::OK, ""),
    ] {
        client.ready().await.expect("kept open");
        let mut request = get(target);
        request
            .headers_mut()
            .insert("host", HeaderValue::from_static(host));
        let (found, text) = read(client.send_request(request).await.expect("an answer")).await;
        assert_eq!(found, status, "{target} of {host}: {text}");
        assert!(text.contains(reason), "{target} of {host}: {text}");
    }
    assert_eq!(targets(&place), ["/a/1", "/a/3"]);
    assert_eq!(place.dialled(), 1);
    let records = place.world.records.lock().expect("whole");
    let reasons: Vec<Reason> = records.iter().map(|(decision, _)| decision.reason).collect();
    let expected = [
        Reason::Allowed,
        Reason::PathDenied,
        Reason::HostMismatch,
        Reason::Allowed,
    ];
    assert_eq!(reasons, expected);
    assert_eq!(records[0].1.path.as_deref(), Some("/a/1"));
}

#[tokio::test]
async fn requests_in_one_piece_are_answered_in_their_order_each_by_its_own_host() {
    let place = Place::make(clear_world(Channel::Clear, open()), echo).await;
    let one = |target: &str, host: &str| format!("GET {target} HTTP/1.1\r\nHost: {host}\r\n\r\n");
    let sent = [
        one("/1", NAME),
        one("/2", "evil.test"),
        one("/3", NAME),
        one("/3", NAME),
    ]
    .concat();
    let answers = raw(&place, &sent).await;
    let statuses: Vec<&str> = answers
        .match_indices("HTTP/1.1 ")
        .map(|(at, _)| &answers[at + 9..at + 12])
        .collect();
    assert_eq!(statuses, ["200", "421", "200", "200"], "{answers}");
    assert_eq!(targets(&place), ["/1", "/3", "/3"]);
}

#[tokio::test]
async fn an_absolute_target_counts_where_it_names_the_host_and_a_tunnel_never() {
    let place = Place::make(clear_world(Channel::Clear, open()), echo).await;
    for (line, status) in [
        (format!("GET http://{NAME}/x?y"), "200"),
        ("GET http://evil.test/x".to_owned(), "400"),
        (format!("GET http://{NAME}@evil.test/x"), "400"),
        (format!("GET https://{NAME}/x"), "400"),
        (format!("CONNECT {NAME}:443"), "400"),
        ("CONNECT evil.test:443".to_owned(), "400"),
    ] {
        let answer = raw(&place, &format!("{line} HTTP/1.1\r\nHost: {NAME}\r\n\r\n")).await;
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status}")),
            "{line}: {answer}"
        );
    }
    assert_eq!(targets(&place), ["/x?y"]);
    assert_eq!(all_sent(&place.last_seen(), "host"), [NAME]);
}

#[tokio::test]
async fn what_two_parsers_read_in_two_ways_ends_the_connection() {
    let place = Place::make(clear_world(Channel::Clear, open()), echo).await;
    for broken in [
        "POST / HTTP/1.1\r\nHost: api.test\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: api.test\r\nHost: evil.test\r\n\r\n",
        "GET / HTTP/1.1\nHost: api.test\n\n",
        "GET / HTTP/1.1\r\nHost: api.test\r\n folded\r\n\r\n",
    ] {
        let answers = raw(
            &place,
            &format!("GET /well HTTP/1.1\r\nHost: {NAME}\r\n\r\n{broken}"),
        )
        .await;
        assert!(
            answers.contains("HTTP/1.1 200") && answers.contains("HTTP/1.1 400"),
            "{answers}"
        );
    }
    assert_eq!(targets(&place), ["/well"; 4]);
}

#[tokio::test]
async fn a_path_goes_on_as_it_came_unless_a_rule_looks_at_it() {
    let place = Place::make(clear_world(Channel::Clear, open()), echo).await;
    let request = |target: &str| format!("GET {target} HTTP/1.1\r\nHost: {NAME}\r\n\r\n");
    for target in ["/@scope%2fname", "/a/../b", "/%61?q=%2e"] {
        let answer = raw(&place, &request(target)).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{target}: {answer}");
        assert_eq!(place.last_seen().target, target);
    }
    place.replace(&listed(&["/**"]), &[]);
    let answer = raw(&place, &request("/@scope%2fname")).await;
    assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
    let answer = raw(&place, &request("/a/../b")).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert_eq!(place.last_seen().target, "/b");
}

#[tokio::test]
async fn no_secret_goes_out_in_clear_and_no_placeholder() {
    for channel in [Channel::Clear, Channel::ClearHttp2] {
        let place = Place::make(clear_world(channel, open()), echo).await;
        let send = |header: Option<String>, body: String| {
            let target = format!("http://{NAME}/");
            let mut request = Request::post(target).body(Full::from(body)).expect("a request");
            let headers = request.headers_mut();
            if channel == Channel::Clear {
                headers.insert("host", HeaderValue::from_static(NAME));
            }
            if let Some(header) = header {
                headers.insert("authorization", header.parse().expect("a value"));
            }
            let place = &place;
            async move {
                let stream = place.plain().await;
                let answer = match channel {
                    Channel::ClearHttp2 => place.http2_over(stream).await.send_request(request).await,
                    Channel::Tls | Channel::Clear => {
                        place.http1_over(stream).await.send_request(request).await
                    }
                };
                read(answer.expect("an answer")).await
            }
        };
        let (status, text) = send(None, String::new()).await;
        assert_eq!(status, StatusCode::OK, "{text}");
        assert!(!format!("{:?}", place.last_seen()).contains(CANARY));
        let before = place.seen.lock().expect("whole").len();
        for (header, body) in [
            (Some(format!("Bearer {PLACEHOLDER}")), String::new()),
            (None, format!("key={PLACEHOLDER}")),
        ] {
            let (status, text) = send(header, body).await;
            assert_eq!(status, StatusCode::FORBIDDEN, "{text}");
            assert!(text.contains("placeholder_misuse"), "{text}");
        }
        let wanting = json!({ "mode": "allowlist", "rules": [{
            "name": "with key", "action": "allow", "domains": [NAME], "ports": ["80"], "credential": "KEY" }] });
        place.replace(&wanting, &[]);
        let (status, text) = send(None, String::new()).await;
        assert_eq!(status, StatusCode::FORBIDDEN, "{text}");
        assert!(text.contains("credential_unavailable"), "{text}");
        assert_eq!(place.seen.lock().expect("whole").len(), before);
    }
}

#[tokio::test]
async fn http2_in_clear_is_for_whom_its_first_request_says_and_each_stream_is_judged() {
    let place = Place::make(clear_world(Channel::ClearHttp2, listed(&["/a"])), echo).await;
    let mut client = place.http2_over::<_, Full<Bytes>>(place.plain().await).await;
    for (uri, status) in [
        (format!("http://{NAME}/a"), StatusCode::OK),
        ("http://evil.test/a".to_owned(), StatusCode::MISDIRECTED_REQUEST),
        (format!("http://{NAME}/b"), StatusCode::FORBIDDEN),
    ] {
        let mut request = get(&uri);
        request.headers_mut().remove("host");
        let (found, text) = read(client.send_request(request).await.expect("an answer")).await;
        assert_eq!(found, status, "{uri}: {text}");
    }
    let mut tunnel = get(&format!("{NAME}:443"));
    tunnel.headers_mut().remove("host");
    *tunnel.method_mut() = http::Method::CONNECT;
    // By an answer or by the end of the stream.
    let answered = client.send_request(tunnel).await.map(|answer| answer.status());
    assert!(
        answered
            .as_ref()
            .map_or(true, |status| *status == StatusCode::BAD_REQUEST),
        "{answered:?}"
    );
    assert_eq!(targets(&place), ["/a"]);

    let mut client = place.http2_over::<_, Full<Bytes>>(place.plain().await).await;
    let mut request = get("http://evil.test/a");
    request.headers_mut().remove("host");
    let waiting = tokio::time::timeout(Duration::from_millis(300), client.send_request(request));
    assert!(
        !matches!(waiting.await, Ok(Ok(_))),
        "a flow that was not opened was answered"
    );
    assert_eq!(place.dialled(), 1);
}

#[tokio::test]
async fn an_answer_comes_whole_to_a_client_that_has_closed_its_half() {
    let large = |_: &Seen| Response::new(Full::from(vec![b'z'; 1 << 20]));
    let place = Place::make(clear_world(Channel::Clear, open()), large).await;
    let sent = format!("POST / HTTP/1.1\r\nHost: {NAME}\r\nContent-Length: 3\r\n\r\nabc");
    let answer = raw(&place, &sent).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{:.100}", answer);
    assert!(answer.ends_with(&"z".repeat(1 << 20)), "{} bytes", answer.len());
    assert_eq!(place.last_seen().body.as_ref(), b"abc");
    // One whose request breaks off gets nothing of the sort, and neither does the server.
    let answer = raw(&place, &sent[..sent.len() - 1]).await;
    assert!(!answer.contains("HTTP/1.1 200"), "{:.100}", answer);
    assert_eq!(place.seen.lock().expect("whole").len(), 1);
}

#[tokio::test]
async fn interim_answers_are_not_taken_for_the_answer() {
    let place = Place::make(clear_world(Channel::Clear, open()), echo).await;
    let server = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    *place.world.server.lock().expect("whole") = server.local_addr().expect("bound");
    place.tasks.spawn("server", async move {
        let (mut stream, _) = server.accept().await.expect("accepted");
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.expect("a request"));
        }
        let answers = "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n\
                       HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nwell";
        stream.write_all(answers.as_bytes()).await.expect("written");
        // Until the other end is done with it.
        let _end = stream.read_u8().await;
    });
    let answer = raw(&place, &format!("GET / HTTP/1.1\r\nHost: {NAME}\r\n\r\n")).await;
    let last = answer
        .rfind("HTTP/1.1 ")
        .map(|at| &answer[at..])
        .unwrap_or_default();
    assert!(
        last.starts_with("HTTP/1.1 200") && last.ends_with("well"),
        "{answer}"
    );
}

#[tokio::test]
async fn a_websocket_in_clear_goes_through() {
    let place = Place::make(clear_world(Channel::Clear, open()), echo).await;
    let mut stream = place.plain().await;
    let asked = format!(
        "GET /ws HTTP/1.1\r\nHost: {NAME}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nAuthorization: none\r\n\r\n"
    );
    stream.write_all(asked.as_bytes()).await.expect("written");
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.expect("an answer"));
    }
    assert!(
        head.starts_with(b"HTTP/1.1 101"),
        "{}",
        String::from_utf8_lossy(&head)
    );
    stream.write_all(b"ping").await.expect("written");
    let frames = rest(&mut stream).await;
    assert!(frames.ends_with("\u{4}ping"), "{frames:?}");
}
