use proptest::{collection::vec, prelude::*, sample::select};

use super::*;
use crate::redact::SecretNeedle;

const KEY: &str = "sk-secret-value-0123456789";

fn frames() -> ServerFrames {
    ServerFrames::new(Arc::new(Needles::new(vec![SecretNeedle::new("API_KEY", KEY)])))
}

fn frame(last: bool, opcode: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![u8::from(last) << 7 | opcode];
    match u16::try_from(payload.len()) {
        Ok(length @ 0..126) => frame.push(u8::try_from(length).unwrap()),
        Ok(length) => {
            frame.push(126);
            frame.extend_from_slice(&length.to_be_bytes());
        }
        Err(_) => {
            frame.push(127);
            frame.extend_from_slice(&(payload.len() as u64).to_be_bytes());
        }
    }
    frame.extend_from_slice(payload);
    frame
}

fn through(bytes: &[u8], chunk: usize) -> Result<Vec<u8>, WebSocketError> {
    let mut frames = frames();
    let mut out = Vec::new();
    for chunk in bytes.chunks(chunk) {
        out.extend_from_slice(&frames.push(Bytes::copy_from_slice(chunk))?);
    }
    out.extend_from_slice(&frames.finish());
    Ok(out)
}

/// The frames of `bytes`: first byte and payload.
fn parse(mut bytes: &[u8]) -> Vec<(u8, Vec<u8>)> {
    let mut frames = Vec::new();
    while let [first, length, rest @ ..] = bytes {
        let (length, rest) = match length {
            126 => (usize::from(u16::from_be_bytes([rest[0], rest[1]])), &rest[2..]),
            127 => {
                let length = u64::from_be_bytes(rest[..8].try_into().unwrap());
                (usize::try_from(length).unwrap(), &rest[8..])
            }
            length => (usize::from(*length), rest),
        };
        frames.push((*first, rest[..length].to_vec()));
        bytes = &rest[length..];
    }
    frames
}

#[test]
fn a_secret_is_found_across_frames_with_a_ping_between() {
    let bytes = [
        frame(false, 1, b"{\"key\": \"sk-sec"),
        frame(true, 9, KEY.as_bytes()),
        frame(false, 0, b""),
        frame(false, 0, b"ret-va"),
        frame(true, 0, b"lue-0123456789\"}"),
        frame(true, 2, &[7; 70_000]),
    ]
    .concat();
    for chunk in [1, 2, 5, 31, bytes.len()] {
        let out = through(&bytes, chunk).expect("well-formed");
        assert_eq!(out.len(), bytes.len());
        let payloads = parse(&out);
        assert_eq!(
            payloads[0],
            (1, b"{\"key\": \"[redac".to_vec()),
            "chunks of {chunk}"
        );
        assert_eq!(payloads[1], (0x89, b"[redacted:API_KEY]********".to_vec()));
        assert_eq!(payloads[3].1, b"ted:AP");
        assert_eq!(payloads[4].1, b"I_KEY]********\"}");
        assert_eq!(payloads[5].1, [7; 70_000]);
    }
}

#[test]
fn a_message_goes_out_when_it_is_complete() {
    let mut frames = frames();
    // It ends like the beginning of the key, and yet nothing of this message follows.
    let message = frame(true, 1, b"abc sk-sec");
    assert_eq!(frames.push(message.clone().into()), Ok(message.into()));
    let next = frame(true, 1, b"ret-value-0123456789");
    assert_eq!(frames.push(next.clone().into()), Ok(next.into()));
    assert_eq!(frames.hits().count(), 0);
    frames
        .push(frame(true, 10, KEY.as_bytes()).into())
        .expect("a pong");
    frames
        .push(frame(true, 1, KEY.as_bytes()).into())
        .expect("a text");
    assert_eq!(frames.hits().collect::<Vec<_>>(), ["API_KEY"]);
}

#[test]
fn what_is_no_frame_of_a_server_ends_the_connection() {
    for (bytes, error) in [
        (&[0x81, 0x81, 1, 2, 3, 4, 5][..], WebSocketError::Masked),
        (&[0xC1, 0x01, 1], WebSocketError::Extension),
        (&[0x83, 0x01, 1], WebSocketError::Malformed),
        (&[0x09, 0x00], WebSocketError::Malformed),
        (&[0x89, 126, 0, 200], WebSocketError::Malformed),
        (&[0x82, 127, 0x80, 0, 0, 0, 0, 0, 0, 0], WebSocketError::Malformed),
    ] {
        assert_eq!(through(bytes, 1), Err(error), "{bytes:?}");
    }
    let mut endless = frame(false, 1, b"sk-sec");
    endless.extend(std::iter::repeat_n(frame(false, 0, b""), 2000).flatten());
    assert_eq!(through(&endless, 4000), Err(WebSocketError::TooMany));
}

proptest! {
    #[test]
    fn no_fragmentation_lets_the_key_through(
        cuts in vec(0..12usize, 1..30), chunk in 1..40usize, before in "[a-z \"]{0,9}", pings in vec(any::<bool>(), 1..5),
        opcode in select(vec![1u8, 2]),
    ) {
        let message = format!("{before}{KEY};{KEY}");
        let mut rest = message.as_bytes();
        let mut bytes = Vec::new();
        for (index, (cut, ping)) in cuts.iter().zip(pings.iter().cycle()).enumerate() {
            let (piece, after) = rest.split_at((*cut).min(rest.len()));
            bytes.extend(frame(false, if index == 0 { opcode } else { 0 }, piece));
            if *ping {
                bytes.extend(frame(true, 9, b"ping"));
            }
            rest = after;
        }
        bytes.extend(frame(true, 0, rest));
        let out = through(&bytes, chunk).unwrap();
        let (given, sent) = (parse(&out), parse(&bytes));
        let shape = |frames: &[(u8, Vec<u8>)]| {
            frames.iter().map(|(first, payload)| (*first, payload.len())).collect::<Vec<_>>()
        };
        prop_assert_eq!(shape(&given), shape(&sent));
        let data = given.iter().filter(|(first, _)| first & 8 == 0);
        let text: Vec<u8> = data.flat_map(|(_, payload)| payload.clone()).collect();
        let mask = "[redacted:API_KEY]********";
        prop_assert_eq!(String::from_utf8(text).unwrap(), format!("{before}{mask};{mask}"));
    }

    #[test]
    fn no_bytes_make_it_panic(bytes in vec(any::<u8>(), 0..300), chunk in 1..20usize) {
        let _outcome = through(&bytes, chunk);
    }
}
