//! Decodes compressed bodies piece by piece.
//!
//! Owns the content codings `gzip` (RFC 1952, several members too) and `deflate` (RFC 1950, and the bare RFC 1951 that
//! some servers send). Never puts out more than [`PIECE`] bytes at once, whatever went in, so that a body of zeros costs
//! its reader time and nobody memory. `br` and `zstd` are not read:
//! [`crate::headers::limit_accept_encoding`] keeps servers from sending them.

mod gzip;

use bytes::{Buf as _, Bytes};
use flate2::{Crc, Decompress, FlushDecompress, Status};
use http::{HeaderMap, header::CONTENT_ENCODING};

/// The most that one call gives out, in bytes.
pub const PIECE: usize = 32 * 1024;

/// A body cannot be decoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EncodedError {
    /// A coding that is not read here, or several on top of each other.
    #[error("the content coding {0:?} cannot be decoded here")]
    Unsupported(String),
    /// The bytes are not what the coding says.
    #[error("the encoded body is corrupt")]
    Corrupt,
    /// The body ended too early.
    #[error("the encoded body is cut off")]
    Truncated,
}

/// How a body is encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Coding {
    /// Not at all.
    Identity,
    /// RFC 1952.
    Gzip,
    /// RFC 1950, or RFC 1951 without the frame.
    Deflate,
}

impl Coding {
    /// What `Content-Encoding` says.
    ///
    /// # Errors
    ///
    /// [`EncodedError::Unsupported`].
    pub fn of(headers: &HeaderMap) -> Result<Self, EncodedError> {
        let mut coding = Self::Identity;
        for line in headers.get_all(CONTENT_ENCODING) {
            let unreadable =
                || EncodedError::Unsupported(String::from_utf8_lossy(line.as_bytes()).into_owned());
            for token in line.to_str().map_err(|_not_text| unreadable())?.split(',') {
                let next = match token.trim().to_ascii_lowercase().as_str() {
                    "" | "identity" => continue,
                    "gzip" | "x-gzip" => Self::Gzip,
                    "deflate" => Self::Deflate,
                    _ => return Err(unreadable()),
                };
                if coding != Self::Identity {
                    return Err(unreadable());
                }
                coding = next;
            }
        }
        Ok(coding)
    }
}

/// Decodes one body.
pub struct Decoder {
    state: State,
    input: Bytes,
}

enum State {
    Identity,
    /// Before or inside the header of a gzip member, of which this much came in.
    Head(Vec<u8>),
    Member {
        inflate: Decompress,
        sum: Crc,
    },
    /// Inside the eight bytes behind a member.
    Foot {
        sum: Crc,
        foot: Vec<u8>,
    },
    /// Behind a member: another, or padding with zeros.
    Between,
    /// Before the first byte of `deflate`.
    Undecided,
    Deflate(Decompress),
    Ended,
    Failed(EncodedError),
}

impl Decoder {
    /// For a body from its beginning.
    pub fn new(coding: Coding) -> Self {
        Self {
            state: match coding {
                Coding::Identity => State::Identity,
                Coding::Gzip => State::Head(Vec::new()),
                Coding::Deflate => State::Undecided,
            },
            input: Bytes::new(),
        }
    }

    /// Takes the next chunk of the encoded body. [`Decoder::piece`] should have asked for it, else chunks pile up.
    pub fn feed(&mut self, chunk: Bytes) {
        if self.input.is_empty() {
            self.input = chunk;
        } else {
            self.input = [self.input.as_ref(), &chunk].concat().into();
        }
    }

    /// The next piece of the decoded body, at most [`PIECE`] bytes of it where it was encoded. `None`: more input is
    /// needed.
    ///
    /// # Errors
    ///
    /// [`EncodedError::Corrupt`], and again at every further call.
    pub fn piece(&mut self) -> Result<Option<Bytes>, EncodedError> {
        let piece = self.advance();
        if let Err(error) = &piece {
            self.state = State::Failed(error.clone());
        }
        piece
    }

    /// Says whether the body was complete, after the last piece.
    ///
    /// # Errors
    ///
    /// [`EncodedError::Truncated`], or the error that [`Decoder::piece`] met.
    pub fn finish(&self) -> Result<(), EncodedError> {
        match &self.state {
            State::Identity | State::Between | State::Undecided | State::Ended => Ok(()),
            // Answers to HEAD and 304 name a coding and have no body.
            State::Head(head) if head.is_empty() => Ok(()),
            State::Head(_) | State::Member { .. } | State::Foot { .. } | State::Deflate(_) => {
                Err(EncodedError::Truncated)
            }
            State::Failed(error) => Err(error.clone()),
        }
    }

    fn advance(&mut self) -> Result<Option<Bytes>, EncodedError> {
        loop {
            match &mut self.state {
                State::Failed(error) => return Err(error.clone()),
                State::Identity => {
                    let piece = std::mem::take(&mut self.input);
                    return Ok((!piece.is_empty()).then_some(piece));
                }
                State::Member { inflate, sum } => {
                    let (piece, ended) = inflate_piece(inflate, &mut self.input)?;
                    sum.update(&piece);
                    if ended {
                        self.state = State::Foot {
                            sum: std::mem::take(sum),
                            foot: Vec::with_capacity(gzip::FOOT),
                        };
                    }
                    if !piece.is_empty() {
                        return Ok(Some(piece.into()));
                    }
                    if !ended {
                        return Ok(None);
                    }
                }
                State::Deflate(inflate) => {
                    let (piece, ended) = inflate_piece(inflate, &mut self.input)?;
                    if ended {
                        self.state = State::Ended;
                    }
                    if !piece.is_empty() {
                        return Ok(Some(piece.into()));
                    }
                    if !ended {
                        return Ok(None);
                    }
                }
                State::Head(_) | State::Foot { .. } | State::Between | State::Undecided | State::Ended
                    if self.input.is_empty() =>
                {
                    return Ok(None);
                }
                State::Head(head) => {
                    let before = head.len();
                    let taken = self.input.len().min(gzip::LONGEST_HEAD - before);
                    head.extend_from_slice(&self.input[..taken]);
                    match gzip::head(head)? {
                        Some(length) => {
                            // The header was not complete without the new bytes.
                            self.input.advance(length - before);
                            self.state = State::Member {
                                inflate: Decompress::new(false),
                                sum: Crc::new(),
                            };
                        }
                        None if head.len() == gzip::LONGEST_HEAD => return Err(EncodedError::Corrupt),
                        None => self.input.advance(taken),
                    }
                }
                State::Foot { sum, foot } => {
                    let taken = self.input.len().min(gzip::FOOT - foot.len());
                    foot.extend_from_slice(&self.input[..taken]);
                    self.input.advance(taken);
                    if foot.len() == gzip::FOOT {
                        gzip::check(foot, sum)?;
                        self.state = State::Between;
                    }
                }
                State::Between => match self.input[0] {
                    0 => self.input.advance(1),
                    _ => self.state = State::Head(Vec::new()),
                },
                State::Undecided => {
                    // The low half of the first byte of RFC 1950 is its method, 8; without the frame this would be an
                    // uncompressed block with padding that is not zero.
                    let framed = self.input[0] & 0x0F == 8;
                    self.state = State::Deflate(Decompress::new(framed));
                }
                State::Ended => return Err(EncodedError::Corrupt),
            }
        }
    }
}

/// Takes from `input` what makes the next piece, which is empty where that is not enough; and whether it was the last.
fn inflate_piece(inflate: &mut Decompress, input: &mut Bytes) -> Result<(Vec<u8>, bool), EncodedError> {
    let mut piece = Vec::with_capacity(PIECE);
    loop {
        let before = inflate.total_in();
        let status = inflate
            .decompress_vec(input, &mut piece, FlushDecompress::None)
            .map_err(|_corrupt| EncodedError::Corrupt)?;
        let taken =
            usize::try_from(inflate.total_in() - before).map_err(|_too_long| EncodedError::Corrupt)?;
        input.advance(taken);
        let ended = status == Status::StreamEnd;
        if ended || !piece.is_empty() || input.is_empty() {
            return Ok((piece, ended));
        }
        if taken == 0 {
            return Err(EncodedError::Corrupt);
        }
    }
}

#[cfg(test)]
mod tests;
