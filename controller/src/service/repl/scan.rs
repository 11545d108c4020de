//! Finding the output of one piece of code between its marks.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::{Buf as _, Bytes, BytesMut};
use serde::Deserialize;

/// Longest mark: it holds why the code failed.
const MAX_MARK: usize = 1024 * 1024;
/// Ends a mark.
const END: u8 = 0x1f;

/// What was found.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Piece {
    /// What the code wrote.
    Output(Bytes),
    /// The code has ended.
    End { error: String, count: u64 },
    /// No mark of ours.
    Nonsense,
}

/// What a mark at the end says.
#[derive(Deserialize)]
struct Said {
    error: String,
    count: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Before,
    Inside,
    Mark,
}

/// Output in parts, as it comes.
#[derive(Debug)]
pub(super) struct Scan {
    received: BytesMut,
    begin: Vec<u8>,
    end: Vec<u8>,
    state: State,
}

impl Scan {
    /// Looks for the marks of the code with this name.
    pub(super) fn new(name: &str) -> Self {
        Self {
            received: BytesMut::new(),
            begin: format!("\x1e{name} begin\x1f").into(),
            end: format!("\x1e{name} end ").into(),
            state: State::Before,
        }
    }

    /// Output was lost. So much comes from the code itself, so the beginning was in it.
    pub(super) fn skip(&mut self) {
        if self.state == State::Before {
            self.received.clear();
            self.state = State::Inside;
        }
    }

    /// The code has begun.
    pub(super) fn has_begun(&self) -> bool {
        self.state != State::Before
    }

    /// Takes what has come.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.received.extend_from_slice(bytes);
    }

    /// The next piece; none until more comes.
    pub(super) fn next(&mut self) -> Option<Piece> {
        loop {
            let mark = match self.state {
                State::Before => &self.begin,
                State::Inside => &self.end,
                State::Mark => return self.mark(),
            };
            match position(&self.received, mark) {
                Some(at) => {
                    let before = self.received.split_to(at).freeze();
                    self.received.advance(mark.len());
                    if self.state == State::Before {
                        self.state = State::Inside;
                        continue;
                    }
                    self.state = State::Mark;
                    if !before.is_empty() {
                        return Some(Piece::Output(before));
                    }
                }
                None => {
                    // The last bytes may be the first of a mark.
                    let certain = self.received.len().saturating_sub(mark.len() - 1);
                    let certain = self.received.split_to(certain).freeze();
                    let told = self.state == State::Inside && !certain.is_empty();
                    return told.then_some(Piece::Output(certain));
                }
            }
        }
    }

    fn mark(&self) -> Option<Piece> {
        let Some(length) = self.received.iter().position(|byte| *byte == END) else {
            return (self.received.len() > MAX_MARK).then_some(Piece::Nonsense);
        };
        let said = STANDARD.decode(&self.received[..length]).ok();
        let said = said.and_then(|said| serde_json::from_slice::<Said>(&said).ok());
        Some(said.map_or(Piece::Nonsense, |Said { error, count }| Piece::End {
            error,
            count,
        }))
    }
}

fn position(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    bytes.windows(wanted.len()).position(|window| window == wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn marked(output: &str) -> Vec<u8> {
        let said = STANDARD.encode(r#"{"error":"no","count":3}"#);
        format!("stray\x1eother begin\x1fx\x1en begin\x1f{output}\x1en end {said}\x1fafter").into()
    }

    /// What is found when so many bytes come at once.
    fn found(bytes: &[u8], at_once: usize) -> (String, Option<Piece>) {
        let mut scan = Scan::new("n");
        let mut output = Vec::new();
        for part in bytes.chunks(at_once) {
            scan.push(part);
            while let Some(piece) = scan.next() {
                match piece {
                    Piece::Output(bytes) => output.extend_from_slice(&bytes),
                    end => return (String::from_utf8(output).expect("text"), Some(end)),
                }
            }
        }
        (String::from_utf8(output).expect("text"), None)
    }

    #[test]
    fn output_is_found_between_its_marks_however_it_comes() {
        let end = || Piece::End {
            error: "no".to_owned(),
            count: 3,
        };
        for output in ["", "x", "a\x1eb\x1f\x1en\x1en end", "\x1en begin\x1f"] {
            for at_once in [1, 2, 3, 7, 1000] {
                assert_eq!(
                    found(&marked(output), at_once),
                    (output.to_owned(), Some(end())),
                    "{at_once}"
                );
            }
        }
    }

    #[test]
    fn what_is_lost_may_hold_the_beginning() {
        let mut scan = Scan::new("n");
        scan.push(b"from before");
        assert_eq!(scan.next(), None);
        scan.skip();
        scan.push(b"the end of much output\x1en end ");
        assert_eq!(
            scan.next(),
            Some(Piece::Output(Bytes::from_static(b"the end of much output")))
        );
        assert_eq!(scan.next(), None);
    }

    #[test]
    fn a_mark_that_says_nothing_is_none() {
        for said in ["", "%%%", "e30="] {
            let bytes = format!("\x1en begin\x1f\x1en end {said}\x1f");
            assert_eq!(found(bytes.as_bytes(), 1000).1, Some(Piece::Nonsense), "{said}");
        }
        let endless = [b"\x1en begin\x1f\x1en end ".to_vec(), vec![b'A'; MAX_MARK + 1]].concat();
        assert_eq!(found(&endless, 4096).1, Some(Piece::Nonsense));
        assert_eq!(found(b"\x1en begin\x1fhalf", 1000), (String::new(), None));
    }
}
