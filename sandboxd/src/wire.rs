//! Frames of the agent protocol on a connection, read and written within limits of size and time.

use std::{io, time::Duration};

use sandgate_api::agent::{AgentErrorCode, FrameHeader, FrameKind, HEADER_LENGTH, Reply};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    time::timeout,
};

/// How long a transfer may stand still.
pub(crate) const STALL: Duration = Duration::from_secs(60);

/// An answer that ends the operation.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) code: AgentErrorCode,
    pub(crate) message: String,
}

impl Refusal {
    pub(crate) fn new(code: AgentErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }
}

/// Reads one frame of at most `most` payload bytes, however long it takes to begin. None when the peer closes first.
///
/// # Errors
/// When the peer closes or stalls inside a frame, or sends something else.
pub(crate) async fn await_frame<R: AsyncRead + Unpin>(
    reader: &mut R,
    most: usize,
) -> io::Result<Option<(FrameKind, Vec<u8>)>> {
    let mut header = [0; HEADER_LENGTH];
    if reader.read(&mut header[..1]).await? == 0 {
        return Ok(None);
    }
    timeout(STALL, reader.read_exact(&mut header[1..])).await??;
    payload(reader, header, most).await.map(Some)
}

/// Reads one frame of at most `most` payload bytes.
///
/// # Errors
/// When the peer closes, stalls, or sends something else.
pub(crate) async fn receive<R: AsyncRead + Unpin>(
    reader: &mut R,
    most: usize,
) -> io::Result<(FrameKind, Vec<u8>)> {
    let mut header = [0; HEADER_LENGTH];
    timeout(STALL, reader.read_exact(&mut header)).await??;
    payload(reader, header, most).await
}

async fn payload<R: AsyncRead + Unpin>(
    reader: &mut R,
    header: [u8; HEADER_LENGTH],
    most: usize,
) -> io::Result<(FrameKind, Vec<u8>)> {
    let header = FrameHeader::decode(header).map_err(io::Error::other)?;
    if header.length > most {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "a frame over the limit",
        ));
    }
    let mut payload = vec![0; header.length];
    timeout(STALL, reader.read_exact(&mut payload)).await??;
    Ok((header.kind, payload))
}

/// Writes one frame, however long the peer takes: bound it from outside.
///
/// # Errors
/// When the peer is gone.
pub(crate) async fn send<W: AsyncWrite + Unpin>(
    writer: &mut W,
    kind: FrameKind,
    payload: &[u8],
) -> io::Result<()> {
    let header = FrameHeader {
        kind,
        length: payload.len(),
    }
    .encode();
    writer.write_all(&header).await?;
    writer.write_all(payload).await
}

/// Writes a reply within [`STALL`].
///
/// # Errors
/// When the peer is gone or does not read.
pub(crate) async fn reply<W: AsyncWrite + Unpin>(writer: &mut W, reply: &Reply) -> io::Result<()> {
    let payload = serde_json::to_vec(reply)?;
    timeout(STALL, send(writer, FrameKind::Json, &payload)).await?
}

/// Writes file bytes within [`STALL`].
///
/// # Errors
/// When the peer is gone or does not read.
pub(crate) async fn data<W: AsyncWrite + Unpin>(writer: &mut W, bytes: &[u8]) -> io::Result<()> {
    timeout(STALL, send(writer, FrameKind::Data, bytes)).await?
}
