//! What a client may make netd do over one connection of HTTP/2, written frame by frame (RFC 9113).

use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use super::{
    super::{Channel, HEADER_LIST_MAX, HEADERS_MAX, STREAMS_MAX},
    bearer, echo,
    world::{NAME, Place, binding, clear_world, open_world},
};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GO_AWAY: u8 = 7;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const REFUSED_STREAM: u32 = 7;

#[derive(Debug, Clone, PartialEq, Eq)]
struct Frame {
    kind: u8,
    flags: u8,
    stream: u32,
    payload: Vec<u8>,
}

impl Frame {
    fn encode(&self, out: &mut Vec<u8>) {
        let length = u32::try_from(self.payload.len()).expect("short").to_be_bytes();
        out.extend_from_slice(&length[1..]);
        out.extend_from_slice(&[self.kind, self.flags]);
        out.extend_from_slice(&self.stream.to_be_bytes());
        out.extend_from_slice(&self.payload);
    }
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Frame {
    let payload = payload.to_vec();
    Frame {
        kind,
        flags,
        stream,
        payload,
    }
}

/// A field as a literal that no table keeps (RFC 7541 6.2.2).
fn field(out: &mut Vec<u8>, name: &str, value: &str) {
    out.push(0);
    for text in [name, value] {
        out.push(
            u8::try_from(text.len())
                .ok()
                .filter(|length| *length < 127)
                .expect("short"),
        );
        out.extend_from_slice(text.as_bytes());
    }
}

/// The head of a request, packed.
fn head(method: &str, path: &str) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, value) in [
        (":method", method),
        (":scheme", "https"),
        (":authority", NAME),
        (":path", path),
    ] {
        field(&mut out, name, value);
    }
    out
}

/// Sends the frames behind a preface, and reads frames until the connection ends or `enough` says so.
async fn exchange<S>(stream: S, frames: &[Frame], enough: impl Fn(&[Frame]) -> bool) -> Vec<Frame>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (mut read, mut write) = tokio::io::split(stream);
    let mut sent = PREFACE.to_vec();
    frame(SETTINGS, 0, 0, &[]).encode(&mut sent);
    frames.iter().for_each(|frame| frame.encode(&mut sent));
    let writing = async {
        // A connection that ends takes no more; what was said on it is read all the same.
        let _unwritten = write.write_all(&sent).await;
        let _unflushed = write.flush().await;
        std::future::pending::<()>().await;
    };
    let mut heard = Vec::new();
    let reading = async {
        while !enough(&heard) {
            let mut start = [0; 9];
            if read.read_exact(&mut start).await.is_err() {
                return;
            }
            let length = u32::from_be_bytes([0, start[0], start[1], start[2]]);
            let mut payload = vec![0; usize::try_from(length).expect("short")];
            if read.read_exact(&mut payload).await.is_err() {
                return;
            }
            let stream = u32::from_be_bytes([start[5], start[6], start[7], start[8]]);
            heard.push(frame(start[3], start[4], stream, &payload));
        }
    };
    let both = async {
        tokio::select! {
            () = writing => {}
            () = reading => {}
        }
    };
    let ended = tokio::time::timeout(Duration::from_secs(30), both).await;
    assert!(ended.is_ok(), "the connection goes on: {:?}", heard.last());
    heard
}

fn never(_: &[Frame]) -> bool {
    false
}

fn is_left(frames: &[Frame]) -> bool {
    frames.iter().any(|frame| frame.kind == GO_AWAY)
}

async fn place() -> Place {
    Place::make(open_world(vec![binding(bearer(), 1)]), echo).await
}

fn seen(place: &Place) -> usize {
    place.seen.lock().expect("whole").len()
}

#[tokio::test]
async fn streams_that_are_begun_and_reset_end_the_connection() {
    let place = place().await;
    let mut frames = Vec::new();
    for stream in (1..20_000).step_by(2) {
        frames.push(frame(
            HEADERS,
            END_HEADERS | END_STREAM,
            stream,
            &head("GET", "/reset"),
        ));
        frames.push(frame(RST_STREAM, 0, stream, &8_u32.to_be_bytes()));
    }
    let heard = exchange(place.connect("h2").await, &frames, never).await;
    assert!(is_left(&heard) || heard.len() < 100, "{} frames", heard.len());
    let requests = seen(&place);
    assert!(
        requests < 1_000,
        "{requests} of 10,000 requests that were taken back reached the server"
    );
}

#[tokio::test]
async fn a_head_without_end_ends_the_connection() {
    for piece in [vec![0; 0], vec![0x40; 16]] {
        let place = place().await;
        let mut frames = vec![frame(HEADERS, END_STREAM, 1, &head("GET", "/flood"))];
        let mut block = Vec::new();
        if !piece.is_empty() {
            field(&mut block, "x-flood", &"f".repeat(100));
        }
        frames.extend((0..20_000).map(|_| frame(CONTINUATION, 0, 1, &block)));
        exchange(place.connect("h2").await, &frames, never).await;
        assert_eq!(seen(&place), 0);
    }
}

#[tokio::test]
async fn a_head_of_too_many_bytes_or_fields_is_refused_and_the_next_one_is_not() {
    let place = place().await;
    let list = usize::try_from(HEADER_LIST_MAX).expect("small");
    for (stream, count, value) in [
        (1, list / 100 + 1, "v".repeat(100)),
        (3, HEADERS_MAX + 1, "v".to_owned()),
    ] {
        let mut block = head("GET", "/large");
        for _ in 0..count {
            field(&mut block, "x-many", &value);
        }
        let mut pieces = block.chunks(16_000).peekable();
        let mut frames = Vec::new();
        while let Some(piece) = pieces.next() {
            let kind = if frames.is_empty() { HEADERS } else { CONTINUATION };
            let ends = if pieces.peek().is_none() { END_HEADERS } else { 0 };
            let closes = if kind == HEADERS { END_STREAM } else { 0 };
            frames.push(frame(kind, ends | closes, stream, piece));
        }
        frames.push(frame(
            HEADERS,
            END_HEADERS | END_STREAM,
            stream + 2,
            &head("GET", "/next"),
        ));
        let answered = move |heard: &[Frame]| {
            let of_next = |frame: &&Frame| frame.stream == stream + 2 && frame.flags & END_STREAM != 0;
            is_left(heard) || heard.iter().any(|frame| of_next(&frame))
        };
        let heard = exchange(place.connect("h2").await, &frames, answered).await;
        assert!(!is_left(&heard), "{heard:?}");
        assert_eq!(place.last_seen().target, "/next");
    }
    assert_eq!(seen(&place), 2);
}

#[tokio::test]
async fn streams_above_the_limit_are_refused() {
    let place = place().await;
    let streams = STREAMS_MAX + 40;
    let mut frames: Vec<Frame> = (0..streams)
        .map(|number| frame(HEADERS, END_HEADERS, 2 * number + 1, &head("POST", "/open")))
        .collect();
    frames.push(frame(PING, 0, 0, &[7; 8]));
    let refused = |heard: &[Frame]| {
        let is_refusal =
            |frame: &&Frame| frame.kind == RST_STREAM && frame.payload == REFUSED_STREAM.to_be_bytes();
        heard.iter().filter(is_refusal).count()
    };
    let enough = |heard: &[Frame]| is_left(heard) || refused(heard) >= 40;
    let heard = exchange(place.connect("h2").await, &frames, enough).await;
    // More than it resets for faults ends the connection.
    assert!(is_left(&heard) || refused(&heard) >= 40, "{heard:?}");
    assert_eq!(seen(&place), 0);
}

#[tokio::test]
async fn frames_that_break_the_protocol_end_the_connection() {
    let get = |stream| frame(HEADERS, END_HEADERS | END_STREAM, stream, &head("GET", "/broken"));
    for (what, frames) in [
        ("data of no stream", vec![frame(DATA, 0, 0, b"x")]),
        ("a stream of the server's", vec![get(2)]),
        ("streams backwards", vec![get(5), get(3)]),
        (
            "a frame in a head",
            vec![
                frame(HEADERS, END_STREAM, 1, &head("GET", "/broken")),
                frame(PING, 0, 0, &[0; 8]),
            ],
        ),
        (
            "a continuation of nothing",
            vec![frame(CONTINUATION, END_HEADERS, 1, &head("GET", "/broken"))],
        ),
        (
            "a head that is not packed",
            vec![frame(HEADERS, END_HEADERS | END_STREAM, 1, &[0x80])],
        ),
        ("settings of five bytes", vec![frame(SETTINGS, 0, 0, &[0; 5])]),
    ] {
        let place = place().await;
        let heard = exchange(place.connect("h2").await, &frames, is_left).await;
        assert!(is_left(&heard) || heard.len() < 10, "{what}: {heard:?}");
    }
}

#[tokio::test]
async fn the_same_limits_hold_in_clear() {
    let policy = json!({ "mode": "allow_all", "allowed_ports": [80] });
    let place = Place::make(clear_world(Channel::ClearHttp2, policy), echo).await;
    let mut frames = vec![frame(HEADERS, END_STREAM, 1, &head("GET", "/flood"))];
    frames.extend((0..20_000).map(|_| frame(CONTINUATION, 0, 1, &[])));
    exchange(place.plain().await, &frames, never).await;
    assert_eq!(place.dialled(), 0);
}
