//! Connections of HTTP/1.1: what comes out of the strict filter is the same requests to every parser behind it, however
//! the bytes arrived, and nothing of what no parser should see.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use sandgate_relay::http1::{
    head::{Framing, Reading, read, read_for},
    strict::{Notes, Strict, Upgrades},
};
use tokio::io::{AsyncRead as _, ReadBuf};

use crate::{
    bytes::{Arriving, Sizes},
    chunks::decoded,
    head::same_to_httparse,
};

/// More than any input becomes.
const OUT_MAX: usize = 64 * 1024;

pub(crate) fn check(data: &[u8]) {
    let [options, data @ ..] = data else { return };
    let upgrades = if options & 1 == 0 {
        Upgrades::WebSocket
    } else {
        Upgrades::Any
    };
    let accepts = options & 2 == 0;
    let absolute = options & 4 != 0;
    // So that every line ends: of a head that never does it is all one whether it was wrong already.
    let data = [data, b"\r\n\r\n"].concat();
    let cut = |seed| filtered(&data, Sizes::new(seed), (upgrades, absolute), accepts);
    let (one, other) = (cut(u64::from(*options)), cut(!u64::from(*options)));
    assert_eq!(one, other, "it depends on how the bytes arrive");
}

/// What is behind the filter.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    requests: Vec<(String, String, Vec<u8>, bool)>,
    raw: Vec<u8>,
    /// The ordinal of the first request that is none; what is wrong with it may have several names.
    broken: Option<u64>,
    failed: bool,
}

fn filtered(data: &[u8], sizes: Sizes, (upgrades, absolute): (Upgrades, bool), accepts: bool) -> Seen {
    let notes = Arc::new(Notes::default());
    let strict = Strict::new(Arriving::new(data, sizes), Arc::clone(&notes)).with_upgrades(upgrades);
    let mut strict = if absolute {
        strict.with_absolute("http")
    } else {
        strict
    };
    let mut cx = Context::from_waker(Waker::noop());
    let (mut out, mut failed) = (Vec::new(), false);
    loop {
        // Whoever asks to change the protocol is answered at once.
        notes.settle_upgrade(accepts);
        let mut chunk = [0; 512];
        let mut buf = ReadBuf::new(&mut chunk);
        match Pin::new(&mut strict).poll_read(&mut cx, &mut buf) {
            Poll::Ready(Ok(())) if buf.filled().is_empty() => break,
            Poll::Ready(Ok(())) => out.extend_from_slice(buf.filled()),
            Poll::Ready(Err(_)) => {
                failed = true;
                break;
            }
            // What is broken is waited at for ever.
            Poll::Pending => break,
        }
        assert!(out.len() < OUT_MAX, "more comes out than went in");
    }
    let broken = (0..64).find_map(|ordinal| notes.broken(ordinal).map(|_why| ordinal));
    let (mut requests, raw) = parsed(&out, (upgrades, absolute), accepts, broken.is_some());
    if let Some((_, _, content, _)) = requests.last_mut().filter(|_| failed) {
        // Of a body that breaks as much goes on as came before.
        content.clear();
    }
    Seen {
        requests,
        raw,
        broken,
        failed,
    }
}

type Parsed = (Vec<(String, String, Vec<u8>, bool)>, Vec<u8>);

/// The requests, and what follows an agreement to go on as something else.
fn parsed(mut bytes: &[u8], (upgrades, absolute): (Upgrades, bool), accepts: bool, broken: bool) -> Parsed {
    let mut requests = Vec::new();
    while !bytes.is_empty() {
        let reading = if absolute {
            read_for(bytes, "http")
        } else {
            read(bytes)
        };
        let Reading::Complete(head) = reading else {
            panic!("half a head came out: {:?}", bytes.escape_ascii().to_string())
        };
        same_to_httparse(bytes, &head, head.length);
        bytes = &bytes[head.length..];
        let (content, ended) = match head.framing {
            Framing::Nothing => (Vec::new(), true),
            Framing::Length(length) => {
                let length = usize::try_from(length).unwrap_or(usize::MAX);
                let there = length.min(bytes.len());
                let (content, rest) = bytes.split_at(there);
                bytes = rest;
                (content.to_vec(), there == length)
            }
            Framing::Chunked => {
                let (end, content, ended) = decoded(bytes);
                bytes = &bytes[end..];
                (content, ended)
            }
        };
        assert!(ended || bytes.is_empty());
        let changes = match upgrades {
            Upgrades::WebSocket => head.asks_for_websocket(),
            Upgrades::Any => head.asks_for_upgrade(),
        };
        requests.push((head.method().to_owned(), head.target().to_owned(), content, ended));
        if changes && accepts {
            assert!(!broken, "after the agreement nothing is read as a request");
            return (requests, bytes.to_vec());
        }
    }
    (requests, Vec::new())
}
