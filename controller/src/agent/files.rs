//! Work on files beyond writing, reading and listing: everything that takes a while, or has no end that is known before.

use std::time::Duration;

use bytes::Bytes;
use futures_util::Stream;
use sandgate_api::agent::{
    FileChange, FilePart, FileReply, FileRequest, FrameKind, OpenedFile, Reply, Request,
};
use tokio::time::Instant;

use super::{Agent, AgentError, FileStream, Frames, Listing, Patience, frames::parse_reply, unexpected};

/// Why a file that comes as it comes is not written.
#[derive(Debug)]
pub enum Upload<E> {
    /// Its source gave up; nothing shows in the sandbox.
    Source(E),
    /// The sandbox did.
    Agent(AgentError),
}

impl<E> From<AgentError> for Upload<E> {
    fn from(error: AgentError) -> Self {
        Self::Agent(error)
    }
}

/// A file that is open, of which one part can be read.
#[derive(Debug)]
pub struct Opened {
    frames: Frames,
    file: OpenedFile,
    patience: Patience,
}

impl Opened {
    /// What it is; the sandbox's word.
    pub fn file(&self) -> OpenedFile {
        self.file
    }

    /// Asks for a part, which must be within the file.
    ///
    /// # Errors
    /// When that cannot be sent.
    pub async fn part(mut self, offset: u64, length: u64) -> Result<FileStream, AgentError> {
        let deadline = Instant::now() + self.patience.first_word;
        if length > 0 {
            self.frames.send(&FilePart { offset, length }, deadline).await?;
        }
        Ok(FileStream {
            frames: self.frames,
            size: length,
            left: length,
            stall: self.patience.stall,
        })
    }
}

impl Agent {
    /// Has something done that is answered by [`FileReply::Done`]. Dropping the future stops it, and undoes what is half done.
    ///
    /// # Errors
    /// [`AgentError::Refused`] when the sandbox's file system says no.
    pub async fn work(mut self, request: FileRequest) -> Result<(), AgentError> {
        let deadline = Instant::now() + self.patience.work;
        self.request(&Request::Files(request), deadline).await?;
        match self.frames.reply(deadline).await? {
            Reply::Files(FileReply::Done) => Ok(()),
            other => Err(unexpected(other)),
        }
    }

    /// Finds what is below a directory by a pattern, at most `limit` entries.
    ///
    /// # Errors
    /// [`AgentError::Refused`] when the directory is not there, or the pattern is none.
    pub async fn glob(self, base: &str, pattern: &str, limit: u32) -> Result<Listing, AgentError> {
        let request = Request::Files(FileRequest::Glob {
            base: base.to_owned(),
            pattern: pattern.to_owned(),
            limit,
        });
        self.listing(&request, limit).await
    }

    /// Writes a file whose bytes come as they come, replacing it, making its parents. Answers its length. Nothing shows at
    /// the path unless everything came.
    ///
    /// # Errors
    /// [`Upload::Source`] with the first error among `parts`; [`AgentError::Refused`] when the sandbox's file system says no.
    pub async fn upload<E>(
        mut self,
        path: &str,
        size: Option<u64>,
        mode: Option<u32>,
        parts: impl Stream<Item = Result<Bytes, E>>,
    ) -> Result<u64, Upload<E>> {
        let request = Request::Files(FileRequest::Upload {
            path: path.to_owned(),
            size,
            mode,
        });
        self.request(&request, Instant::now() + self.patience.first_word)
            .await?;
        match self.frames.upload(parts, true, self.patience.stall).await? {
            Reply::Written { size: written } if size.is_none_or(|size| size == written) => Ok(written),
            Reply::Written { size: written } => {
                Err(AgentError::Protocol(format!("{written} bytes written of {size:?}")).into())
            }
            other => Err(unexpected(other).into()),
        }
    }

    /// Opens a file of at most `max_size` bytes.
    ///
    /// # Errors
    /// [`AgentError::Refused`] when it is not there, or not a file.
    pub async fn open(mut self, path: &str, max_size: u64) -> Result<Opened, AgentError> {
        let deadline = Instant::now() + self.patience.first_word;
        let path = path.to_owned();
        self.request(&Request::Files(FileRequest::Open { path }), deadline)
            .await?;
        match self.frames.reply(deadline).await? {
            Reply::Files(FileReply::Opened(file)) if file.size <= max_size => Ok(Opened {
                frames: self.frames,
                file,
                patience: self.patience,
            }),
            Reply::Files(FileReply::Opened(file)) => Err(AgentError::Protocol(format!(
                "a file of {} bytes where {max_size} are the limit",
                file.size
            ))),
            other => Err(unexpected(other)),
        }
    }

    /// Follows a directory, and with `recursive` those below it. Dropping the stream ends it.
    ///
    /// # Errors
    /// [`AgentError::Refused`] when it is not there, or too many are followed.
    pub async fn watch(mut self, path: &str, recursive: bool) -> Result<Watch, AgentError> {
        let deadline = Instant::now() + self.patience.first_word;
        let request = Request::Files(FileRequest::Watch {
            path: path.to_owned(),
            recursive,
        });
        self.request(&request, deadline).await?;
        match self.frames.reply(deadline).await? {
            Reply::Files(FileReply::Watching { partly }) => Ok(Watch {
                frames: self.frames,
                stall: self.patience.stall,
                partly,
                ended: false,
            }),
            other => Err(unexpected(other)),
        }
    }
}

/// What happens below a directory.
#[derive(Debug)]
pub struct Watch {
    frames: Frames,
    stall: Duration,
    partly: bool,
    ended: bool,
}

/// Some of it.
#[derive(Debug, PartialEq, Eq)]
pub struct Changes {
    /// In their order.
    pub changes: Vec<FileChange>,
    /// More happened than is told.
    pub lost: bool,
}

impl Watch {
    /// There are more directories than can be followed.
    pub fn partly(&self) -> bool {
        self.partly
    }

    /// The next changes; none when the directory is gone, or after an error. Can be dropped and called again without losing
    /// anything.
    pub async fn next(&mut self) -> Option<Result<Changes, AgentError>> {
        if self.ended {
            return None;
        }
        let changes = self.changes().await.transpose();
        self.ended = !matches!(changes, Some(Ok(_)));
        changes
    }

    async fn changes(&mut self) -> Result<Option<Changes>, AgentError> {
        let (kind, payload) = self.frames.next(self.stall).await?;
        if kind != FrameKind::Json {
            return Err(AgentError::Protocol("bytes where changes belong".to_owned()));
        }
        match parse_reply(&payload)? {
            Reply::Files(FileReply::Changes { changes, lost }) => Ok(Some(Changes { changes, lost })),
            Reply::Files(FileReply::Done) => Ok(None),
            other => Err(unexpected(other)),
        }
    }
}
