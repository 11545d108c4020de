//! Bodies in chunks: whatever the pieces in which they arrive, what goes on is the same body and ends where it ends.

use sandgate_relay::http1::{body::Body, head::Framing};

use crate::bytes::Sizes;

pub(crate) fn check(data: &[u8]) {
    let [kind, data @ ..] = data else { return };
    let framing = if kind & 3 == 0 {
        Framing::Length(u64::from(*kind))
    } else {
        Framing::Chunked
    };
    let whole = through(framing, &[data]);
    assert_eq!(whole, through(framing, &data.chunks(1).collect::<Vec<_>>()));
    assert_eq!(whole, through(framing, &Sizes::new(data.len() as u64).cut(data)));
    match (framing, &whole) {
        (Framing::Chunked, Some(whole)) => {
            let (taken, content, ended) = decoded(data);
            assert_eq!((&whole.content, whole.is_done), (&content, ended));
            if ended {
                assert_eq!(whole.taken, taken, "the body ends elsewhere");
            }
        }
        (Framing::Chunked, None) => {}
        (Framing::Nothing | Framing::Length(_), whole) => {
            let length = data.len().min(usize::from(*kind));
            let whole = whole.as_ref().expect("nothing can be wrong with it");
            assert_eq!((whole.taken, &whole.content[..]), (length, &data[..length]));
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Through {
    taken: usize,
    content: Vec<u8>,
    is_done: bool,
}

/// What goes on of a body, or nothing where it is broken.
fn through(framing: Framing, pieces: &[&[u8]]) -> Option<Through> {
    let (mut body, mut out, mut taken) = (Body::new(framing), Vec::new(), 0);
    for piece in pieces {
        let length = body.push(piece, &mut out).ok()?;
        assert!(
            length == piece.len() || body.is_done(),
            "bytes are left and it goes on"
        );
        taken += length;
    }
    let content = match framing {
        Framing::Chunked => {
            let (end, content, ended) = decoded(&out);
            assert_eq!(ended, body.is_done(), "the receiver sees another end");
            assert!(end == out.len(), "the receiver sees something after the end");
            content
        }
        Framing::Nothing | Framing::Length(_) => out,
    };
    Some(Through {
        taken,
        content,
        is_done: body.is_done(),
    })
}

/// What a simple reader makes of well-formed chunks: how far it got, the content, whether it met the end.
pub(crate) fn decoded(bytes: &[u8]) -> (usize, Vec<u8>, bool) {
    let (mut rest, mut content) = (bytes, Vec::new());
    let line = |rest: &mut &[u8]| -> Option<Vec<u8>> {
        let end = rest.windows(2).position(|pair| pair == b"\r\n")?;
        let line = rest[..end].to_vec();
        *rest = &rest[end + 2..];
        Some(line)
    };
    loop {
        let Some(size) = line(&mut rest) else {
            return (bytes.len(), content, false);
        };
        let digits = size
            .split(|byte| *byte == b';')
            .next()
            .expect("at least one part");
        let size = std::str::from_utf8(digits).expect("digits");
        let size = usize::from_str_radix(size, 16).expect("a size");
        if size == 0 {
            break;
        }
        let length = size.min(rest.len());
        content.extend_from_slice(&rest[..length]);
        rest = &rest[length..];
        let Some(behind) = rest.get(..2) else {
            return (bytes.len(), content, false);
        };
        assert_eq!(behind, b"\r\n", "a chunk longer than it says");
        rest = &rest[2..];
    }
    loop {
        match line(&mut rest) {
            Some(trailer) if trailer.is_empty() => return (bytes.len() - rest.len(), content, true),
            Some(_) => {}
            None => return (bytes.len(), content, false),
        }
    }
}
