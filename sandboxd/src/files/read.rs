//! Files read, whole or in part.

use std::{
    fs::File,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io::{self, Read as _, Seek as _, SeekFrom},
    os::unix::fs::MetadataExt as _,
};

use sandgate_api::agent::{AgentErrorCode, FilePart, FileReply, FrameKind, OpenedFile, Reply};
use tokio::net::TcpStream;

use super::{Answer, Tree, refusal, tree::checked};
use crate::wire::{self, Refusal};

/// Largest frame that asks for a part of a file.
const MAX_PART_REQUEST: usize = 256;
/// Bytes of a file in one frame.
const PART: usize = 64 * 1024;
/// Most that is read of a file that says it is empty: those that the kernel makes up do.
const MAX_UNSIZED: u64 = 4 * 1024 * 1024;

/// A file to be sent, at the length it had when it was opened.
struct Content {
    file: File,
    /// What a file holds that says it is empty.
    made_up: Vec<u8>,
    opened: OpenedFile,
}

impl Content {
    fn open(tree: &Tree, path: &str) -> Result<Self, Refusal> {
        let clean = checked(path)?;
        let fail = |error: io::Error| refusal(&clean, &error);
        let mut file = File::from(tree.file(&clean)?);
        let found = file.metadata().map_err(fail)?;
        let mut size = found.len();
        let mut made_up = Vec::new();
        if size == 0 {
            (&mut file)
                .take(MAX_UNSIZED + 1)
                .read_to_end(&mut made_up)
                .map_err(fail)?;
            size = length(&made_up);
            if size > MAX_UNSIZED {
                let message = format!("{path}: larger than the {MAX_UNSIZED} bytes of a file without a size");
                return Err(Refusal::new(AgentErrorCode::TooLarge, message));
            }
        }
        let mut hasher = DefaultHasher::new();
        (found.dev(), found.ino(), size, &made_up).hash(&mut hasher);
        (
            found.mtime(),
            found.mtime_nsec(),
            found.ctime(),
            found.ctime_nsec(),
        )
            .hash(&mut hasher);
        let opened = OpenedFile {
            size,
            modified: found.mtime(),
            version: hasher.finish(),
        };
        Ok(Self {
            file,
            made_up,
            opened,
        })
    }

    /// Sends a part, which it has.
    async fn send(&mut self, stream: &mut TcpStream, part: FilePart) -> io::Result<()> {
        let mut left = part.length;
        if !self.made_up.is_empty() {
            let end = usize::try_from(part.offset.saturating_add(left));
            let range = usize::try_from(part.offset).ok().zip(end.ok());
            let bytes = range.and_then(|(start, end)| self.made_up.get(start..end));
            for part in bytes.ok_or(io::ErrorKind::InvalidInput)?.chunks(PART) {
                wire::data(stream, part).await?;
            }
            return Ok(());
        }
        self.file.seek(SeekFrom::Start(part.offset))?;
        let mut buffer = vec![0; PART];
        while left > 0 {
            let most = usize::try_from(left).unwrap_or(PART).min(PART);
            // A file that shrinks meanwhile cannot be told in this protocol; the connection breaks off.
            let read = self.file.read(&mut buffer[..most])?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            wire::data(stream, &buffer[..read]).await?;
            left -= length(&buffer[..read]).min(left);
        }
        Ok(())
    }
}

fn length(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}

/// Sends a whole file.
pub(crate) async fn read(stream: &mut TcpStream, tree: &Tree, path: &str, max_size: u64) -> Answer {
    let mut content = match Content::open(tree, path) {
        Ok(content) => content,
        Err(refusal) => return Ok(Err(refusal)),
    };
    let size = content.opened.size;
    if size > max_size {
        let message = format!("{path}: larger than {max_size} bytes");
        return Ok(Err(Refusal::new(AgentErrorCode::TooLarge, message)));
    }
    wire::reply(stream, &Reply::File { size }).await?;
    let whole = FilePart {
        offset: 0,
        length: size,
    };
    content.send(stream, whole).await?;
    Ok(Ok(()))
}

/// Opens a file, and sends the part of it that the caller asks for then.
pub(super) async fn open(stream: &mut TcpStream, tree: &Tree, path: &str) -> Answer {
    let mut content = match Content::open(tree, path) {
        Ok(content) => content,
        Err(refusal) => return Ok(Err(refusal)),
    };
    wire::reply(stream, &Reply::Files(FileReply::Opened(content.opened))).await?;
    let (kind, payload) = match wire::receive(stream, MAX_PART_REQUEST).await {
        Ok(received) => received,
        // It was enough to know what the file is.
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(Ok(())),
        Err(error) => return Err(error),
    };
    let refuse = |message: &str| {
        Ok(Err(Refusal::new(
            AgentErrorCode::Invalid,
            format!("{path}: {message}"),
        )))
    };
    let part = match (kind, serde_json::from_slice::<FilePart>(&payload)) {
        (FrameKind::Json, Ok(part)) => part,
        (_, _) => return refuse("something else where a part of it is asked for"),
    };
    let end = part.offset.checked_add(part.length);
    if end.is_none_or(|end| end > content.opened.size) {
        return refuse("it has no such part");
    }
    content.send(stream, part).await?;
    Ok(Ok(()))
}
