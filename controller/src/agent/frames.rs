//! Frames on the wire: reading them within bounds, and writing them.

use std::{pin::pin, time::Duration};

use bytes::{Buf, Bytes, BytesMut};
use sandgate_api::agent::{FrameHeader, FrameKind, HEADER_LENGTH, Hello, MAX_FRAME, Reply, Request};
use serde::Serialize;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{Instant, timeout, timeout_at},
};

use super::AgentError;

/// How many bytes of a file go into one frame.
const UPLOAD_PART: usize = 64 * 1024;

/// A connection and what was received on it but not yet handed out.
#[derive(Debug)]
pub(super) struct Frames {
    stream: TcpStream,
    received: BytesMut,
}

impl Frames {
    pub(super) fn new(stream: TcpStream) -> Self {
        // A missing TCP_NODELAY costs latency, nothing else.
        drop(stream.set_nodelay(true));
        Self {
            stream,
            received: BytesMut::new(),
        }
    }

    /// How many bytes are set aside for what arrives.
    #[cfg(test)]
    pub(super) fn capacity(&self) -> usize {
        self.received.capacity()
    }

    /// The next frame. The first byte may take for ever (bound it from outside); once it is there, the rest
    /// must not stand still for longer than `stall`. Can be dropped and called again.
    pub(super) async fn next(&mut self, stall: Duration) -> Result<(FrameKind, Bytes), AgentError> {
        next_frame(&mut self.stream, &mut self.received, stall).await
    }

    /// The next frame, which must be a reply.
    pub(super) async fn reply(&mut self, deadline: Instant) -> Result<Reply, AgentError> {
        let stall = deadline.saturating_duration_since(Instant::now());
        let received = timeout_at(deadline, self.next(stall)).await;
        let (kind, payload) = received.map_err(|_elapsed| AgentError::Timeout)??;
        match kind {
            FrameKind::Json => parse_reply(&payload),
            FrameKind::Stdout | FrameKind::Stderr | FrameKind::Data => {
                Err(AgentError::Protocol("bytes where a reply belongs".to_owned()))
            }
        }
    }

    /// Sends the greeting and the request in one go.
    pub(super) async fn send_pair(
        &mut self,
        hello: &Hello,
        request: &Request,
        deadline: Instant,
    ) -> Result<(), AgentError> {
        let mut bytes = Vec::with_capacity(512);
        append_json(&mut bytes, hello)?;
        append_json(&mut bytes, request)?;
        timeout_at(deadline, self.stream.write_all(&bytes))
            .await
            .map_err(|_elapsed| AgentError::Timeout)??;
        Ok(())
    }

    /// Sends `bytes` as data frames and returns the reply, also one that comes before everything was sent.
    /// Neither direction may stand still for longer than `stall`.
    pub(super) async fn upload(&mut self, bytes: &Bytes, stall: Duration) -> Result<Reply, AgentError> {
        let (mut reader, mut writer) = self.stream.split();
        let received = &mut self.received;
        let mut answer = pin!(next_frame(&mut reader, received, stall));
        let mut early = None;
        for part in bytes.chunks(UPLOAD_PART) {
            let header = FrameHeader {
                kind: FrameKind::Data,
                length: part.len(),
            }
            .encode();
            let send = async {
                writer.write_all(&header).await?;
                writer.write_all(part).await
            };
            tokio::select! {
                biased;
                frame = &mut answer => { early = Some(frame?); break }
                sent = timeout(stall, send) => match sent {
                    Ok(Ok(())) => {}
                    // The agent has refused and closed; its reason is on the way.
                    Ok(Err(_broken)) => break,
                    Err(_elapsed) => return Err(AgentError::Timeout),
                },
            }
        }
        let (kind, payload) = match early {
            Some(frame) => frame,
            None => timeout(stall, answer)
                .await
                .map_err(|_elapsed| AgentError::Timeout)??,
        };
        match kind {
            FrameKind::Json => parse_reply(&payload),
            FrameKind::Stdout | FrameKind::Stderr | FrameKind::Data => {
                Err(AgentError::Protocol("bytes where a reply belongs".to_owned()))
            }
        }
    }
}

/// Reads a reply. What serde says about hostile input is not repeated: it may quote it.
pub(super) fn parse_reply(payload: &[u8]) -> Result<Reply, AgentError> {
    serde_json::from_slice(payload)
        .map_err(|error| AgentError::Protocol(format!("not a reply ({:?})", error.classify())))
}

/// Reads one frame. Everything read is in `received` until a frame is whole, so dropping the future loses
/// nothing.
async fn next_frame<R: AsyncRead + Unpin>(
    stream: &mut R,
    received: &mut BytesMut,
    stall: Duration,
) -> Result<(FrameKind, Bytes), AgentError> {
    loop {
        let mut wanted = HEADER_LENGTH;
        if let Some(header) = received.first_chunk::<HEADER_LENGTH>() {
            let header =
                FrameHeader::decode(*header).map_err(|error| AgentError::Protocol(error.to_string()))?;
            wanted += header.length;
            if received.len() >= wanted {
                let mut frame = received.split_to(wanted).freeze();
                frame.advance(HEADER_LENGTH);
                return Ok((header.kind, frame));
            }
        }
        // Grows with what really arrives, not with what a header promises.
        received.reserve((wanted - received.len()).min(UPLOAD_PART));
        let read = if received.is_empty() {
            stream.read_buf(received).await?
        } else {
            timeout(stall, stream.read_buf(received))
                .await
                .map_err(|_elapsed| AgentError::Timeout)??
        };
        if read == 0 {
            return Err(AgentError::Closed);
        }
    }
}

fn append_json<T: Serialize>(bytes: &mut Vec<u8>, value: &T) -> Result<(), AgentError> {
    let payload = serde_json::to_vec(value).map_err(|error| AgentError::Protocol(error.to_string()))?;
    if payload.len() > MAX_FRAME {
        return Err(AgentError::RequestTooLarge(payload.len()));
    }
    bytes.extend_from_slice(
        &FrameHeader {
            kind: FrameKind::Json,
            length: payload.len(),
        }
        .encode(),
    );
    bytes.extend_from_slice(&payload);
    Ok(())
}
