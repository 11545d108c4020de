//! Masks secrets in what a server sends over a WebSocket (RFC 6455).
//!
//! Owns the frames' borders: a secret is found also where a message is cut into frames in the middle of it. Frames keep
//! their number and their lengths. Never decompresses: extensions must not have been negotiated
//! ([`crate::headers::prepare_redacted_request`] sees to that).

use std::{collections::VecDeque, fmt, sync::Arc};

use bytes::{Buf as _, Bytes, BytesMut};

use crate::redact::{Needles, Redactor};

/// Longest payload of a control frame (RFC 6455, 5.5).
const MAX_CONTROL: u64 = 125;
/// Pieces that may wait for a payload which is held back: a server could send empty frames without end.
const MAX_WAITING: usize = 1024;

/// The server does not speak WebSocket as it must.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WebSocketError {
    /// Only clients mask.
    #[error("the server masks its frames")]
    Masked,
    /// A reserved bit is set: an extension that was not asked for.
    #[error("the server uses an extension that was not negotiated")]
    Extension,
    /// A frame that is not one.
    #[error("the server sends malformed frames")]
    Malformed,
    /// Too many frames while one message is undecided.
    #[error("the server sends too many empty frames")]
    TooMany,
}

/// The frames from a server to its client. Its `Debug` shows none of them.
pub struct ServerFrames {
    needles: Arc<Needles>,
    /// Of the data message at hand.
    redactor: Redactor,
    state: State,
    /// What goes out next, in order.
    waiting: VecDeque<Piece>,
    /// Payload of data frames that may go out.
    payload: BytesMut,
    hits: Vec<String>,
}

enum State {
    /// Inside a frame's header, of which this much came in.
    Head(Vec<u8>),
    /// Inside a data frame, with this much to come.
    Data { left: u64, last: bool },
    /// Inside a control frame with this header, with this much to come.
    Control {
        frame: Vec<u8>,
        head: usize,
        left: usize,
    },
}

enum Piece {
    Verbatim(Vec<u8>),
    Payload(u64),
}

struct Head {
    last: bool,
    control: bool,
    length: u64,
}

impl fmt::Debug for ServerFrames {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("ServerFrames")
            .field("needles", &self.needles)
            .field("waiting", &self.waiting.len())
            .finish_non_exhaustive()
    }
}

impl ServerFrames {
    /// For a connection from its first frame.
    pub fn new(needles: Arc<Needles>) -> Self {
        Self {
            redactor: Redactor::new(Arc::clone(&needles)),
            needles,
            state: State::Head(Vec::new()),
            waiting: VecDeque::new(),
            payload: BytesMut::new(),
            hits: Vec::new(),
        }
    }

    /// Takes the next bytes of the connection; returns what can be given out, which may be nothing.
    ///
    /// # Errors
    ///
    /// [`WebSocketError`]: the connection must be closed.
    pub fn push(&mut self, mut chunk: Bytes) -> Result<Bytes, WebSocketError> {
        let mut out = BytesMut::with_capacity(chunk.len());
        while !chunk.is_empty() {
            self.read(&mut chunk)?;
            self.drain(&mut out);
            if self.waiting.len() > MAX_WAITING {
                return Err(WebSocketError::TooMany);
            }
        }
        Ok(out.freeze())
    }

    /// Returns what was held back: the server has closed the connection.
    pub fn finish(&mut self) -> Bytes {
        self.payload.extend_from_slice(&self.redactor.finish());
        let mut out = BytesMut::new();
        self.drain(&mut out);
        // The connection ended inside a frame.
        out.extend_from_slice(&std::mem::take(&mut self.payload));
        match std::mem::replace(&mut self.state, State::Head(Vec::new())) {
            State::Head(head) => out.extend_from_slice(&head),
            State::Control { frame, head, left: _ } => out.extend_from_slice(&self.control(frame, head)),
            State::Data { .. } => {}
        }
        out.freeze()
    }

    /// The names of the secrets found so far, each once.
    pub fn hits(&self) -> impl Iterator<Item = &str> {
        let data = self.redactor.hits().map(|(name, _)| name);
        let control = self.hits.iter().map(String::as_str);
        let control = control.filter(|name| self.redactor.hits().all(|(known, _)| known != *name));
        data.chain(control)
    }

    fn read(&mut self, chunk: &mut Bytes) -> Result<(), WebSocketError> {
        match &mut self.state {
            State::Head(bytes) => {
                bytes.push(chunk.get_u8());
                let Some(head) = head(bytes)? else {
                    return Ok(());
                };
                let bytes = std::mem::take(bytes);
                if head.control {
                    let length = bytes.len();
                    let left = usize::try_from(head.length).map_err(|_long| WebSocketError::Malformed)?;
                    self.state = State::Control {
                        frame: bytes,
                        head: length,
                        left,
                    };
                } else {
                    self.waiting.push_back(Piece::Verbatim(bytes));
                    self.waiting.push_back(Piece::Payload(head.length));
                    self.state = State::Data {
                        left: head.length,
                        last: head.last,
                    };
                }
            }
            State::Data { left, .. } => {
                let taken = usize::try_from(*left).unwrap_or(usize::MAX).min(chunk.len());
                *left -= taken as u64;
                let given = self.redactor.push(chunk.split_to(taken));
                self.payload.extend_from_slice(&given);
            }
            State::Control { frame, left, .. } => {
                let taken = chunk.split_to(chunk.len().min(*left));
                *left -= taken.len();
                frame.extend_from_slice(&taken);
            }
        }
        self.end_frame();
        Ok(())
    }

    /// Goes on to the next header where the frame is complete, which an empty one is at once.
    fn end_frame(&mut self) {
        match &mut self.state {
            State::Data { left: 0, last } => {
                if *last {
                    let rest = self.redactor.finish();
                    self.payload.extend_from_slice(&rest);
                }
            }
            State::Control { frame, head, left: 0 } => {
                let (frame, head) = (std::mem::take(frame), *head);
                let frame = self.control(frame, head);
                self.waiting.push_back(Piece::Verbatim(frame));
            }
            State::Head(_) | State::Data { .. } | State::Control { .. } => return,
        }
        self.state = State::Head(Vec::new());
    }

    fn control(&mut self, mut frame: Vec<u8>, head: usize) -> Vec<u8> {
        if let Some((masked, names)) = self.needles.redact(&frame[head..]) {
            frame.truncate(head);
            frame.extend_from_slice(&masked);
            for name in names {
                if !self.hits.iter().any(|known| known == name) {
                    self.hits.push(name.to_owned());
                }
            }
        }
        frame
    }

    fn drain(&mut self, out: &mut BytesMut) {
        while let Some(piece) = self.waiting.front_mut() {
            match piece {
                Piece::Verbatim(bytes) => out.extend_from_slice(bytes),
                Piece::Payload(left) => {
                    let ready = usize::try_from(*left)
                        .unwrap_or(usize::MAX)
                        .min(self.payload.len());
                    out.extend_from_slice(&self.payload.split_to(ready));
                    *left -= ready as u64;
                    if *left > 0 {
                        return;
                    }
                }
            }
            self.waiting.pop_front();
        }
    }
}

/// Reads a frame's header (RFC 6455, 5.2), or `None` where it is not complete.
fn head(bytes: &[u8]) -> Result<Option<Head>, WebSocketError> {
    let [first, second, rest @ ..] = bytes else {
        return Ok(None);
    };
    if first & 0x70 != 0 {
        return Err(WebSocketError::Extension);
    }
    if second & 0x80 != 0 {
        return Err(WebSocketError::Masked);
    }
    let opcode = first & 0x0F;
    if !matches!(opcode, 0..=2 | 8..=10) {
        return Err(WebSocketError::Malformed);
    }
    let width = match second {
        126 => 2,
        127 => 8,
        _ => 0,
    };
    let Some(written) = rest.get(..width) else {
        return Ok(None);
    };
    let length = match width {
        0 => u64::from(*second),
        _ => written
            .iter()
            .fold(0, |length, byte| length << 8 | u64::from(*byte)),
    };
    let head = Head {
        last: first & 0x80 != 0,
        control: opcode >= 8,
        length,
    };
    if length >> 63 != 0 || (head.control && (!head.last || length > MAX_CONTROL)) {
        return Err(WebSocketError::Malformed);
    }
    Ok(Some(head))
}

#[cfg(test)]
mod tests;
