//! What servers send back, as streams and as WebSocket frames: whatever the pieces in which it arrives, secrets are
//! masked in the same places, nothing else is changed, and nothing is lost.

use std::{
    collections::VecDeque,
    sync::{Arc, LazyLock},
};

use bytes::Bytes;
use sandgate_relay::{
    redact::{Needles, Redactor, SecretNeedle},
    websocket::{ServerFrames, WebSocketError},
};

use crate::bytes::Sizes;

/// Among them what has other spellings in URLs and JSON, and the beginning of another one.
const VALUES: [&str; 3] = ["s3cret-0123456789", "p&q/\"x+ y", "s3cret-01"];

static NEEDLES: LazyLock<Arc<Needles>> = LazyLock::new(|| {
    let needles = VALUES.iter().map(|value| SecretNeedle::new("KEY", *value));
    Arc::new(Needles::new(needles.collect()))
});

pub(crate) fn check(data: &[u8]) {
    let [options, data @ ..] = data else { return };
    let pieces = [
        vec![data],
        data.chunks(1).collect(),
        Sizes::new(u64::from(*options)).cut(data),
    ];
    if options & 1 == 0 {
        let expected = match NEEDLES.redact(data) {
            Some((masked, _)) => masked,
            None => data.to_vec(),
        };
        assert_eq!(expected.len(), data.len());
        hides(&expected);
        for pieces in pieces {
            assert_eq!(streamed(&pieces), expected, "it depends on the pieces");
        }
        return;
    }
    let [whole, single, cut] = pieces.map(|pieces| framed(&pieces));
    assert_eq!((&whole, &whole), (&single, &cut), "it depends on the pieces");
    if let Ok(out) = whole {
        assert_eq!(out.len(), data.len());
        messages(&out).iter().for_each(|message| hides(message));
    }
}

fn hides(text: &[u8]) {
    for value in VALUES {
        let seen = text.windows(value.len()).any(|part| part == value.as_bytes());
        assert!(!seen, "{} shows {value}", text.escape_ascii());
    }
}

fn streamed(pieces: &[&[u8]]) -> Vec<u8> {
    let mut redactor = Redactor::new(Arc::clone(&NEEDLES));
    let (mut out, mut arrived) = (Vec::new(), 0);
    for piece in pieces {
        arrived += piece.len();
        out.extend_from_slice(&redactor.push(Bytes::copy_from_slice(piece)));
        assert!(
            arrived - out.len() <= NEEDLES.longest(),
            "more is held back than a secret"
        );
    }
    out.extend_from_slice(&redactor.finish());
    out
}

fn framed(pieces: &[&[u8]]) -> Result<Vec<u8>, WebSocketError> {
    let mut frames = ServerFrames::new(Arc::clone(&NEEDLES));
    let mut out = Vec::new();
    for piece in pieces {
        out.extend_from_slice(&frames.push(Bytes::copy_from_slice(piece))?);
    }
    out.extend_from_slice(&frames.finish());
    Ok(out)
}

/// The messages in frames of a server (RFC 6455, 5.2), the last of which may be cut off.
fn messages(bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut rest: VecDeque<u8> = bytes.iter().copied().collect();
    let (mut messages, mut message) = (Vec::new(), Vec::new());
    while let (Some(first), Some(second)) = (rest.pop_front(), rest.pop_front()) {
        let width = match second {
            126 => 2,
            127 => 8,
            _ => 0,
        };
        if rest.len() < width {
            break;
        }
        let written = rest
            .drain(..width)
            .fold(0, |length, byte| length << 8 | u64::from(byte));
        let length = if width == 0 { u64::from(second) } else { written };
        let there = usize::try_from(length).unwrap_or(usize::MAX).min(rest.len());
        let payload: Vec<u8> = rest.drain(..there).collect();
        if first & 8 != 0 {
            messages.push(payload);
            continue;
        }
        message.extend(payload);
        if first & 0x80 != 0 {
            messages.push(std::mem::take(&mut message));
        }
    }
    messages.push(message);
    messages
}
