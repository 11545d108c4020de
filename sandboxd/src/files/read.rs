//! Files read whole.

use std::{
    fs::File,
    io::{self, Read as _},
};

use sandgate_api::agent::{AgentErrorCode, Reply};
use tokio::net::TcpStream;

use super::{Answer, Tree, refusal, tree::checked};
use crate::wire::{self, Refusal};

/// Bytes of a file in one frame.
const PART: usize = 64 * 1024;
/// Most that is read of a file that says it is empty: those that the kernel makes up do.
const MAX_UNSIZED: u64 = 4 * 1024 * 1024;

/// Sends a file.
pub(crate) async fn read(stream: &mut TcpStream, tree: &Tree, path: &str, max_size: u64) -> Answer {
    let opened = checked(path).and_then(|clean| {
        let file = File::from(tree.file(&clean)?);
        let size = file.metadata().map_err(|error| refusal(&clean, &error))?.len();
        Ok((clean, file, size))
    });
    let (clean, mut file, size) = match opened {
        Ok(opened) => opened,
        Err(refusal) => return Ok(Err(refusal)),
    };
    let too_large = || {
        let message = format!("{path}: larger than {max_size} bytes");
        Ok(Err(Refusal::new(AgentErrorCode::TooLarge, message)))
    };
    if size > max_size {
        return too_large();
    }
    let mut buffer = Vec::new();
    if size == 0 {
        let most = max_size.min(MAX_UNSIZED);
        if let Err(error) = (&mut file).take(most + 1).read_to_end(&mut buffer) {
            return Ok(Err(refusal(&clean, &error)));
        }
        let size = u64::try_from(buffer.len()).unwrap_or(u64::MAX);
        if size > most {
            return too_large();
        }
        wire::reply(stream, &Reply::File { size }).await?;
        for part in buffer.chunks(PART) {
            wire::data(stream, part).await?;
        }
        return Ok(Ok(()));
    }
    wire::reply(stream, &Reply::File { size }).await?;
    buffer.resize(PART, 0);
    let mut left = size;
    while left > 0 {
        let most = usize::try_from(left).unwrap_or(PART).min(PART);
        // A file that shrinks meanwhile cannot be told in this protocol; the connection breaks off.
        let read = file.read(&mut buffer[..most])?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        wire::data(stream, &buffer[..read]).await?;
        left -= u64::try_from(read).unwrap_or(u64::MAX).min(left);
    }
    Ok(Ok(()))
}
