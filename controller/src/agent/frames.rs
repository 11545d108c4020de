//! Frames on the wire: reading them within bounds, and writing them.

use std::{pin::pin, time::Duration};

use bytes::{Buf, Bytes, BytesMut};
use futures_util::{Stream, StreamExt as _};
use sandgate_api::agent::{FrameHeader, FrameKind, HEADER_LENGTH, Hello, MAX_FRAME, Reply, Request};
use serde::Serialize;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
    time::{Instant, timeout, timeout_at},
};

use super::{AgentError, Upload};

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

    /// Sends JSON.
    pub(super) async fn send_json<T: Serialize>(&mut self, value: &T) -> Result<(), AgentError> {
        let mut bytes = Vec::new();
        append_json(&mut bytes, value)?;
        Ok(self.stream.write_all(&bytes).await?)
    }

    /// Sends `bytes` as data frames.
    pub(super) async fn send_data(&mut self, bytes: &[u8]) -> Result<(), AgentError> {
        for part in bytes.chunks(UPLOAD_PART) {
            let header = FrameHeader {
                kind: FrameKind::Data,
                length: part.len(),
            };
            self.stream.write_all(&header.encode()).await?;
            self.stream.write_all(part).await?;
        }
        Ok(())
    }

    /// Sends what comes as data frames, the last one empty when `ends` says so, and returns the reply, also one that comes
    /// before everything was sent. Neither direction may stand still for longer than `stall`; how long the bytes
    /// themselves may take is up to whoever they come from. No more is taken from there than has been sent.
    pub(super) async fn upload<E>(
        &mut self,
        parts: impl Stream<Item = Result<Bytes, E>>,
        ends: bool,
        stall: Duration,
    ) -> Result<Reply, Upload<E>> {
        let (mut reader, mut writer) = self.stream.split();
        let received = &mut self.received;
        let mut answer = pin!(next_frame(&mut reader, received, stall));
        let mut parts = pin!(parts);
        let mut early = None;
        'parts: loop {
            let part = tokio::select! {
                biased;
                frame = &mut answer => { early = Some(frame?); break }
                part = parts.next() => part,
            };
            let mut part = match part {
                Some(part) => part.map_err(Upload::Source)?,
                None => break,
            };
            while !part.is_empty() {
                let piece = part.split_to(part.len().min(UPLOAD_PART));
                tokio::select! {
                    biased;
                    frame = &mut answer => { early = Some(frame?); break 'parts }
                    sent = timeout(stall, send_data(&mut writer, &piece)) => match sent {
                        Ok(Ok(())) => {}
                        // The agent has refused and closed; its reason is on the way.
                        Ok(Err(_broken)) => break 'parts,
                        Err(_elapsed) => return Err(AgentError::Timeout.into()),
                    },
                }
            }
        }
        if ends && early.is_none() {
            match timeout(stall, send_data(&mut writer, &[])).await {
                // As above.
                Ok(Ok(()) | Err(_)) => {}
                Err(_elapsed) => return Err(AgentError::Timeout.into()),
            }
        }
        let (kind, payload) = match early {
            Some(frame) => frame,
            None => timeout(stall, answer)
                .await
                .map_err(|_elapsed| AgentError::Timeout)??,
        };
        match kind {
            FrameKind::Json => Ok(parse_reply(&payload)?),
            FrameKind::Stdout | FrameKind::Stderr | FrameKind::Data => {
                Err(AgentError::Protocol("bytes where a reply belongs".to_owned()).into())
            }
        }
    }

    /// Sends one more word about what was asked for.
    pub(super) async fn send<T: Serialize>(
        &mut self,
        value: &T,
        deadline: Instant,
    ) -> Result<(), AgentError> {
        let mut bytes = Vec::new();
        append_json(&mut bytes, value)?;
        timeout_at(deadline, self.stream.write_all(&bytes))
            .await
            .map_err(|_elapsed| AgentError::Timeout)??;
        Ok(())
    }
}

async fn send_data<W: AsyncWrite + Unpin>(writer: &mut W, bytes: &[u8]) -> std::io::Result<()> {
    let header = FrameHeader {
        kind: FrameKind::Data,
        length: bytes.len(),
    };
    writer.write_all(&header.encode()).await?;
    writer.write_all(bytes).await
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
