//! Bodies that go both ways for long: calls of gRPC, events, WebSockets, uploads that no memory holds.

use std::{convert::Infallible, env, fs, process::Command, time::Duration};

use bytes::Bytes;
use futures_util::stream;
use http::{Request, StatusCode, header::HeaderValue};
use http_body_util::{BodyExt as _, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::Frame;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::mpsc,
};

use super::{
    super::Channel,
    bearer, echo, get,
    world::{CANARY, NAME, Place, Plan, binding, clear_world, open_world},
};

type Pieces = UnsyncBoxBody<Bytes, Infallible>;

/// A body of what the test sends.
fn pieces(from: mpsc::Receiver<Bytes>) -> Pieces {
    let pieces = stream::unfold(from, |mut from| async move {
        let piece = from.recv().await?;
        Some((Ok(Frame::data(piece)), from))
    });
    StreamBody::new(pieces).boxed_unsync()
}

async fn within<T>(what: &str, waiting: impl Future<Output = T>) -> T {
    let done = tokio::time::timeout(Duration::from_secs(20), waiting).await;
    done.unwrap_or_else(|_elapsed| panic!("{what} does not come"))
}

#[tokio::test]
async fn a_call_of_grpc_streams_both_ways_at_once_and_ends_with_its_status() {
    for channel in [Channel::Tls, Channel::ClearHttp2] {
        let plan = Plan {
            server_alpn: &["h2"],
            channel,
            policy: json!({ "mode": "allow_all", "allowed_ports": [80, 443] }),
            ..open_world(vec![binding(bearer(), 1)])
        };
        let place = Place::make(plan, echo).await;
        let mut client = match channel {
            Channel::Tls => place.http2_over::<_, Pieces>(place.connect("h2").await).await,
            Channel::Clear | Channel::ClearHttp2 => place.http2_over(place.plain().await).await,
        };
        let (say, said) = mpsc::channel(1);
        let scheme = if channel == Channel::Tls { "https" } else { "http" };
        let call = Request::post(format!("{scheme}://{NAME}/echo"))
            .header("te", "trailers")
            .header("content-type", "application/grpc")
            .body(pieces(said))
            .expect("a request");
        // The answer begins before the request has ended.
        let mut answer = within("the answer's head", client.send_request(call))
            .await
            .expect("an answer");
        assert_eq!(answer.status(), StatusCode::OK);
        for word in ["one", "two", "three"] {
            say.send(Bytes::from(word)).await.expect("taken");
            let mut heard = Vec::new();
            while heard.len() < word.len() {
                let frame = within(word, answer.frame())
                    .await
                    .expect("a frame")
                    .expect("whole");
                heard.extend_from_slice(frame.data_ref().expect("data"));
            }
            assert_eq!(heard, word.as_bytes());
        }
        drop(say);
        let rest = within("the end", answer.collect()).await.expect("whole");
        assert_eq!(rest.trailers().expect("trailers")["grpc-status"], "0");
    }
}

#[tokio::test]
async fn events_come_one_by_one_over_http1_however_long_the_pause() {
    let place = Place::make(open_world(vec![binding(bearer(), 1)]), echo).await;
    let mut client = place.http1().await;
    let mut answer = client.send_request(get("/stream")).await.expect("an answer");
    let first = within("the first event", answer.frame())
        .await
        .expect("a frame")
        .expect("whole");
    assert_eq!(first.data_ref().expect("data").as_ref(), b"data: begin\n\n");
    place.go.add_permits(1);
    // The second half of the value is not there yet: nothing that may be one has passed.
    place.go.add_permits(1);
    let rest = within("the end", answer.collect())
        .await
        .expect("whole")
        .to_bytes();
    let text = String::from_utf8_lossy(&rest).into_owned();
    assert!(
        text.contains("[redacted:KEY]") && !text.contains(CANARY),
        "{text}"
    );
}

#[tokio::test]
async fn an_upload_waits_for_a_server_that_does_not_read() {
    let policy = json!({ "mode": "allow_all", "allowed_ports": [80] });
    let place = Place::make(clear_world(Channel::Clear, policy), echo).await;
    let server = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bound");
    *place.world.server.lock().expect("whole") = server.local_addr().expect("bound");
    let mut stream = place.plain().await;
    let head = format!("POST / HTTP/1.1\r\nHost: {NAME}\r\nContent-Length: 1000000000\r\n\r\n");
    stream.write_all(head.as_bytes()).await.expect("written");
    let (mut far, _) = server.accept().await.expect("accepted");
    let piece = vec![b'u'; 1 << 20];
    let mut sent = 0;
    // What the kernel's buffers and netd's take is bounded, so that the writer stops.
    while let Ok(written) = tokio::time::timeout(Duration::from_millis(500), stream.write_all(&piece)).await {
        written.expect("written");
        sent += piece.len();
        assert!(sent < 128 << 20, "netd takes what nobody reads");
    }
    // It goes on as soon as somebody does.
    let mut heard = vec![0; 4 << 20];
    within("the body", far.read_exact(&mut heard))
        .await
        .expect("read");
}

/// The variable by which the process knows that it is the one in which memory is counted.
const ALONE: &str = "SANDGATE_TEST_ALONE";

/// In a process of its own: other tests take memory too.
#[test]
fn a_gigabyte_goes_up_in_constant_memory() {
    let name = "intercept::tests::streams::a_gigabyte_goes_up_in_constant_memory";
    if env::var_os(ALONE).is_none() {
        let output = Command::new(env::current_exe().expect("this program"))
            .args(["--exact", name, "--nocapture"])
            .env(ALONE, "1")
            .output()
            .expect("started");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success() && text.contains("1 passed"),
            "{text}{:?}",
            output.stderr
        );
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        // In clear the whole gigabyte; by TLS, where every byte is encrypted four times here, a part of it.
        upload(Channel::Clear, 1 << 30).await;
        upload(Channel::Tls, 128 << 20).await;
    });
}

async fn upload(channel: Channel, length: usize) {
    const PIECE: usize = 64 * 1024;
    const GROWTH: usize = 32 << 20;
    let plan = Plan {
        server_alpn: &["h2"],
        channel,
        policy: json!({ "mode": "allow_all", "allowed_ports": [80, 443] }),
        ..open_world(vec![binding(bearer(), 1)])
    };
    let place = Place::make(plan, echo).await;
    let piece = Bytes::from(vec![b'u'; PIECE]);
    let body = stream::iter(std::iter::repeat_n(piece, length / PIECE));
    let body = futures_util::StreamExt::map(body, |piece| Ok(Frame::data(piece)));
    let body: Pieces = StreamBody::new(body).boxed_unsync();
    let request = Request::post(match channel {
        Channel::Tls => format!("https://{NAME}/swallow"),
        Channel::Clear | Channel::ClearHttp2 => "/swallow".to_owned(),
    });
    let mut request = request.body(body).expect("a request");
    let before = memory("VmRSS");
    let answer = match channel {
        Channel::Tls => {
            let mut client = place.http2_over(place.connect("h2").await).await;
            client.send_request(request).await
        }
        Channel::Clear | Channel::ClearHttp2 => {
            request
                .headers_mut()
                .insert("host", HeaderValue::from_static(NAME));
            let mut client = place.http1_over(place.plain().await).await;
            client.send_request(request).await
        }
    };
    let text = answer
        .expect("an answer")
        .collect()
        .await
        .expect("whole")
        .to_bytes();
    assert_eq!(text, length.to_string());
    // The most it ever was: no sample can miss it.
    let grown = memory("VmHWM").saturating_sub(before);
    assert!(
        grown < GROWTH,
        "{channel:?}: {length} bytes took {grown} of memory"
    );
}

/// Bytes, by the name of the line (proc(5)).
fn memory(line: &str) -> usize {
    let status = fs::read_to_string("/proc/self/status").expect("readable");
    let line = status
        .lines()
        .find_map(|found| found.strip_prefix(line))
        .expect("a line");
    let kib: usize = line
        .trim_matches(|byte: char| !byte.is_ascii_digit())
        .parse()
        .expect("a number");
    kib * 1024
}
