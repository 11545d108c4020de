//! Lets exactly one request body through. Owns: finding the body's end by its framing, and writing chunks
//! anew. Never passes a byte of what follows the body, so that no second request rides along unjudged.

use super::head::Framing;

/// The body ended otherwise than its framing allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a broken chunk in the request body")]
pub struct BrokenBody;

/// A filter for one body: bytes go in as they arrive, in pieces of any size.
#[derive(Debug)]
pub struct Body {
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Done,
    Plain { left: u64 },
    Size { size: u64, digits: u8, end: SizeEnd },
    Data { left: u64 },
    DataEnd { cr: bool },
    Trailer { line: u16, cr: bool, total: u16 },
}

/// How far the line with a chunk's size has been read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SizeEnd {
    Digits,
    Extension { length: u16 },
    Cr,
}

const EXTENSION_MAX: u16 = 256;
const TRAILERS_MAX: u16 = 8192;

impl Body {
    /// A filter for a body of this framing.
    pub fn new(framing: Framing) -> Self {
        let state = match framing {
            Framing::Nothing | Framing::Length(0) => State::Done,
            Framing::Length(left) => State::Plain { left },
            Framing::Chunked => SIZE,
        };
        Self { state }
    }

    /// Whether the body is through.
    pub fn is_done(&self) -> bool {
        self.state == State::Done
    }

    /// Takes what arrived and appends what goes on to `out`. Stops at the body's end: the rest of `input`
    /// does not belong to it. Chunk extensions and trailer fields are dropped. Returns how many bytes of
    /// `input` it took.
    ///
    /// # Errors
    /// When the chunks are broken; nothing more may be sent then.
    pub fn push(&mut self, input: &[u8], out: &mut Vec<u8>) -> Result<usize, BrokenBody> {
        let mut rest = input;
        while let [first, ..] = rest {
            let first = *first;
            match self.state {
                State::Done => break,
                State::Plain { left } => {
                    let (taken, left) = take(&mut rest, left);
                    out.extend_from_slice(taken);
                    self.state = if left == 0 {
                        State::Done
                    } else {
                        State::Plain { left }
                    };
                    continue;
                }
                State::Data { left } => {
                    let (taken, left) = take(&mut rest, left);
                    out.extend_from_slice(format!("{:x}\r\n", taken.len()).as_bytes());
                    out.extend_from_slice(taken);
                    out.extend_from_slice(b"\r\n");
                    self.state = if left == 0 {
                        State::DataEnd { cr: false }
                    } else {
                        State::Data { left }
                    };
                    continue;
                }
                State::Size { size, digits, end } => self.state = in_size(size, digits, end, first)?,
                State::DataEnd { cr } => {
                    self.state = match (cr, first) {
                        (false, b'\r') => State::DataEnd { cr: true },
                        (true, b'\n') => SIZE,
                        _ => return Err(BrokenBody),
                    }
                }
                State::Trailer { line, cr, total } => {
                    self.state = in_trailer(line, cr, total, first)?;
                    if self.state == State::Done {
                        out.extend_from_slice(b"0\r\n\r\n");
                    }
                }
            }
            rest = &rest[1..];
        }
        Ok(input.len() - rest.len())
    }
}

const SIZE: State = State::Size {
    size: 0,
    digits: 0,
    end: SizeEnd::Digits,
};

fn in_size(size: u64, digits: u8, end: SizeEnd, byte: u8) -> Result<State, BrokenBody> {
    match (end, byte) {
        (SizeEnd::Digits, b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F') if digits < 15 => {
            let digit = char::from(byte).to_digit(16).ok_or(BrokenBody)?;
            Ok(State::Size {
                size: size << 4 | u64::from(digit),
                digits: digits + 1,
                end,
            })
        }
        (SizeEnd::Digits, b';') if digits > 0 => Ok(State::Size {
            size,
            digits,
            end: SizeEnd::Extension { length: 0 },
        }),
        (SizeEnd::Digits | SizeEnd::Extension { .. }, b'\r') if digits > 0 => Ok(State::Size {
            size,
            digits,
            end: SizeEnd::Cr,
        }),
        (SizeEnd::Extension { length }, b'\t' | b' '..=b'~') if length < EXTENSION_MAX => Ok(State::Size {
            size,
            digits,
            end: SizeEnd::Extension { length: length + 1 },
        }),
        (SizeEnd::Cr, b'\n') if size == 0 => Ok(State::Trailer {
            line: 0,
            cr: false,
            total: 0,
        }),
        (SizeEnd::Cr, b'\n') => Ok(State::Data { left: size }),
        (SizeEnd::Digits | SizeEnd::Extension { .. } | SizeEnd::Cr, _) => Err(BrokenBody),
    }
}

fn in_trailer(line: u16, cr: bool, total: u16, byte: u8) -> Result<State, BrokenBody> {
    if total == TRAILERS_MAX {
        return Err(BrokenBody);
    }
    let total = total + 1;
    match (cr, byte) {
        (true, b'\n') if line == 0 => Ok(State::Done),
        (true, b'\n') => Ok(State::Trailer {
            line: 0,
            cr: false,
            total,
        }),
        (false, b'\r') => Ok(State::Trailer {
            line,
            cr: true,
            total,
        }),
        (false, b'\t' | b' '..=b'~' | 0x80..) => Ok(State::Trailer {
            line: line + 1,
            cr: false,
            total,
        }),
        (true | false, _) => Err(BrokenBody),
    }
}

fn take<'a>(rest: &mut &'a [u8], left: u64) -> (&'a [u8], u64) {
    let length = usize::try_from(left).unwrap_or(usize::MAX).min(rest.len());
    let (taken, after) = rest.split_at(length);
    *rest = after;
    (taken, left - length as u64)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn through(framing: Framing, pieces: &[&[u8]]) -> Result<(Vec<u8>, bool), BrokenBody> {
        let mut body = Body::new(framing);
        let mut out = Vec::new();
        for piece in pieces {
            body.push(piece, &mut out)?;
        }
        Ok((out, body.is_done()))
    }

    /// What a plain reader makes of chunks that this module wrote.
    fn decode(mut chunks: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        loop {
            let end = chunks
                .windows(2)
                .position(|pair| pair == b"\r\n")
                .expect("a size line");
            let size = std::str::from_utf8(&chunks[..end]).expect("text");
            let size = usize::from_str_radix(size, 16).expect("a size");
            chunks = &chunks[end + 2..];
            out.extend_from_slice(&chunks[..size]);
            assert_eq!(&chunks[size..size + 2], b"\r\n");
            chunks = &chunks[size + 2..];
            if size == 0 {
                assert!(chunks.is_empty(), "something follows the last chunk");
                return out;
            }
        }
    }

    #[test]
    fn nothing_after_the_body_goes_through() {
        let second = b"GET /denied HTTP/1.1\r\nHost: evil.test\r\n\r\n";
        let both = [b"abc", &second[..]].concat();
        assert_eq!(through(Framing::Length(3), &[&both]), Ok((b"abc".to_vec(), true)));
        assert_eq!(through(Framing::Nothing, &[second]), Ok((Vec::new(), true)));
        let both = [b"3\r\nabc\r\n0\r\n\r\n", &second[..]].concat();
        let (out, done) = through(Framing::Chunked, &[&both]).expect("well-formed");
        assert!(done);
        assert_eq!(decode(&out), b"abc");
    }

    #[test]
    fn a_body_that_has_not_ended_is_not_done() {
        assert_eq!(through(Framing::Length(3), &[b"ab"]), Ok((b"ab".to_vec(), false)));
        assert!(
            !through(Framing::Chunked, &[b"3\r\nabc\r\n0\r\n"])
                .expect("well-formed")
                .1
        );
    }

    #[test]
    fn broken_chunks_end_the_request() {
        for chunks in [
            &b"\r\n"[..],
            b"x\r\n",
            b"-1\r\n",
            b"3\nabc\r\n",
            b"3\r\nabcd\r\n",
            b"3\r\nabc\n",
            b" 3\r\nabc\r\n",
            b"1000000000000000\r\n",
            b"0\r\nX: y\n\r\n",
            b"0\r\n\r\r",
        ] {
            assert_eq!(
                through(Framing::Chunked, &[chunks]),
                Err(BrokenBody),
                "{:?}",
                chunks.escape_ascii()
            );
        }
    }

    proptest! {
        #[test]
        fn chunks_mean_the_same_after_the_filter_however_they_arrive(
            chunks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..50), 0..6),
            extension in "(;[a-z]{1,5}=[a-z]{1,5})?",
            trailer in "(X-[a-z]{1,5}: [a-z]{1,5}\r\n)?",
            piece in 1usize..40,
        ) {
            let mut sent = Vec::new();
            for chunk in &chunks {
                sent.extend(format!("{:X}{extension}\r\n", chunk.len()).into_bytes());
                sent.extend(chunk);
                sent.extend(b"\r\n");
            }
            sent.extend(format!("0\r\n{trailer}\r\n").into_bytes());
            let pieces: Vec<&[u8]> = sent.chunks(piece).collect();
            let (out, done) = through(Framing::Chunked, &pieces).expect("well-formed");
            prop_assert!(done);
            prop_assert_eq!(decode(&out), chunks.concat());
        }

        #[test]
        fn no_bytes_can_panic_the_filter(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            through(Framing::Chunked, &[&bytes]).ok();
        }
    }
}
