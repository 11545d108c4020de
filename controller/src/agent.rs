//! The host side of the agent protocol: one operation on one connection to a sandbox's `sandboxd`.
//!
//! The agent shares its uid with the code it runs, so whatever arrives here is treated as written by an
//! attacker: frame sizes, totals, counts and silences are bounded, texts are cut and cleaned before they can
//! reach a log, and a peer that breaks a rule is cut off. Nothing here retries or decides what a failure means.

use std::{convert::Infallible, io, time::Duration};

use bytes::Bytes;
use futures_util::stream;
use sandgate_api::agent::{
    AgentErrorCode, Changes as CommandChanges, Claim, Entry, Exec, FrameKind, Hello, MAX_FRAME,
    PROTOCOL_VERSION, Reply, Request,
};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};

pub use files::{Changes, Opened, Upload, Watch};

use frames::Frames;

pub use processes::{Follow, ProcessOutput};

mod files;
mod frames;
mod processes;
#[cfg(test)]
mod tests;

/// How long is waited for what.
#[derive(Debug, Clone, Copy)]
struct Patience {
    /// For the first word of an answer that needs no work.
    first_word: Duration,
    /// For a transfer that stands still.
    stall: Duration,
    /// For a listing in all.
    listing: Duration,
    /// For other work on files in all: copying may take a while.
    work: Duration,
    /// For the end of a command beyond its own timeout: the agent must notice it and answer.
    grace: Duration,
}

const PATIENCE: Patience = Patience {
    first_word: Duration::from_secs(10),
    stall: Duration::from_secs(30),
    listing: Duration::from_secs(60),
    work: Duration::from_secs(600),
    grace: Duration::from_secs(15),
};

/// Largest number of entries a listing may hold, whatever was asked for.
const MAX_ENTRIES: usize = 100_000;
/// Largest sum of the name and path lengths of a listing, in bytes.
const MAX_LISTING_BYTES: usize = 32 * 1024 * 1024;
/// Longest text taken over from the agent, in characters.
const MAX_MESSAGE: usize = 512;

/// Why an operation in a sandbox failed.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The connection broke.
    #[error("the connection to the sandbox failed: {0}")]
    Io(#[from] io::Error),
    /// The agent closed the connection before it had answered.
    #[error("the sandbox closed the connection before it had answered")]
    Closed,
    /// The agent did not answer in time.
    #[error("the sandbox did not answer in time")]
    Timeout,
    /// What the agent sent is not this protocol, or goes over a limit.
    #[error("the sandbox broke the agent protocol: {0}")]
    Protocol(String),
    /// The request is larger than [`MAX_FRAME`] when encoded.
    #[error("the request of {0} bytes is over the limit of {MAX_FRAME} bytes")]
    RequestTooLarge(usize),
    /// The agent answered, and the answer is no.
    #[error("{message}")]
    Refused {
        /// Comparable.
        code: AgentErrorCode,
        /// Written by the sandbox: for people, cut and stripped of control characters, never trusted.
        message: String,
    },
}

/// What a running command sends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExecEvent {
    /// Bytes of its standard output.
    Stdout(Bytes),
    /// Bytes of its standard error.
    Stderr(Bytes),
    /// It ended. The last event.
    Exited {
        /// See [`Reply::Exited`].
        exit_code: i32,
        /// Its time was up.
        timed_out: bool,
        /// Milliseconds, by the agent's clock.
        duration_ms: u64,
        /// What it changed, if that was asked for.
        changes: Option<CommandChanges>,
    },
}

/// A listing as far as it was sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing {
    /// In no particular order.
    pub entries: Vec<Entry>,
    /// The limit was reached, so something is missing.
    pub truncated: bool,
}

/// A connection to an agent on which nothing was asked yet.
#[derive(Debug)]
pub struct Agent {
    frames: Frames,
    key: String,
    patience: Patience,
}

impl Agent {
    /// Takes over a fresh connection. `key` is the sandbox's 64 hexadecimal digits.
    pub fn new(stream: TcpStream, key: &str) -> Self {
        Self {
            frames: Frames::new(stream),
            key: key.to_owned(),
            patience: PATIENCE,
        }
    }

    /// Asks whether the agent is up and speaks a version this side knows.
    ///
    /// # Errors
    /// When it does not answer within ten seconds, or with anything but a pong.
    pub async fn ping(self) -> Result<(), AgentError> {
        self.pong(&Request::Ping).await
    }

    /// Takes a sandbox that was made in advance.
    ///
    /// # Errors
    /// As [`Agent::ping`]; when it was taken or used before.
    pub async fn claim(self, claim: Claim) -> Result<(), AgentError> {
        self.pong(&Request::Claim(claim)).await
    }

    async fn pong(mut self, request: &Request) -> Result<(), AgentError> {
        let deadline = Instant::now() + self.patience.first_word;
        self.request(request, deadline).await?;
        match self.frames.reply(deadline).await? {
            Reply::Pong {
                protocol: PROTOCOL_VERSION,
            } => Ok(()),
            Reply::Pong { protocol } => Err(AgentError::Protocol(format!(
                "the agent speaks version {protocol} of the protocol"
            ))),
            other => Err(unexpected(other)),
        }
    }

    /// Starts a command. Dropping the stream closes the connection, and with it kills the command.
    ///
    /// # Errors
    /// When the request is too large or cannot be sent.
    pub async fn exec(mut self, exec: Exec) -> Result<ExecStream, AgentError> {
        let deadline = exec
            .timeout_ms
            .and_then(|limit| Instant::now().checked_add(Duration::from_millis(limit) + self.patience.grace));
        self.request(&Request::Exec(exec), Instant::now() + self.patience.first_word)
            .await?;
        Ok(ExecStream {
            frames: self.frames,
            deadline,
            stall: self.patience.stall,
            ended: false,
        })
    }

    /// Writes a file, replacing it, making its parents. Answers its length.
    ///
    /// # Errors
    /// [`AgentError::Refused`] when the sandbox's file system says no; the old file is then untouched.
    pub async fn write_file(
        mut self,
        path: &str,
        mode: Option<u32>,
        bytes: Bytes,
    ) -> Result<u64, AgentError> {
        let size = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        let request = Request::WriteFile {
            path: path.to_owned(),
            size,
            mode,
        };
        self.request(&request, Instant::now() + self.patience.first_word)
            .await?;
        let whole = stream::once(std::future::ready(Ok::<_, Infallible>(bytes)));
        let replied = self.frames.upload(whole, false, self.patience.stall).await;
        let reply = replied.map_err(|failed| match failed {
            Upload::Agent(error) => error,
            Upload::Source(never) => match never {},
        })?;
        match reply {
            Reply::Written { size: written } if written == size => Ok(size),
            Reply::Written { size: written } => {
                Err(AgentError::Protocol(format!("{written} bytes written of {size}")))
            }
            other => Err(unexpected(other)),
        }
    }

    /// Opens a file for reading. Files over `max_size` bytes are refused.
    ///
    /// # Errors
    /// [`AgentError::Refused`] when it is not there, too large, or not a file.
    pub async fn read_file(mut self, path: &str, max_size: u64) -> Result<FileStream, AgentError> {
        let deadline = Instant::now() + self.patience.first_word;
        self.request(
            &Request::ReadFile {
                path: path.to_owned(),
                max_size,
            },
            deadline,
        )
        .await?;
        match self.frames.reply(deadline).await? {
            Reply::File { size } if size <= max_size => Ok(FileStream {
                frames: self.frames,
                size,
                left: size,
                stall: self.patience.stall,
            }),
            Reply::File { size } => Err(AgentError::Protocol(format!(
                "a file of {size} bytes where {max_size} are the limit"
            ))),
            other => Err(unexpected(other)),
        }
    }

    /// Lists a directory, at most `limit` entries.
    ///
    /// # Errors
    /// [`AgentError::Refused`] when it is not there or not a directory.
    pub async fn list(self, path: &str, recursive: bool, limit: u32) -> Result<Listing, AgentError> {
        let request = Request::List {
            path: path.to_owned(),
            recursive,
            limit,
        };
        self.listing(&request, limit).await
    }

    async fn listing(mut self, request: &Request, limit: u32) -> Result<Listing, AgentError> {
        let deadline = Instant::now() + self.patience.listing;
        self.request(request, deadline).await?;
        let most = usize::try_from(limit).unwrap_or(MAX_ENTRIES).min(MAX_ENTRIES);
        let mut listing = Listing {
            entries: Vec::new(),
            truncated: false,
        };
        let mut bytes = 0usize;
        loop {
            let (entries, last, truncated) = match self.frames.reply(deadline).await? {
                Reply::Entries {
                    entries,
                    last,
                    truncated,
                } => (entries, last, truncated),
                other => return Err(unexpected(other)),
            };
            // An endless row of empty parts ends at the deadline and costs nothing until then.
            bytes += entries
                .iter()
                .map(|entry| {
                    entry.name.len() + entry.path.len() + entry.target.as_ref().map_or(0, String::len)
                })
                .sum::<usize>();
            if listing.entries.len() + entries.len() > most || bytes > MAX_LISTING_BYTES {
                return Err(AgentError::Protocol("a listing over the limit".to_owned()));
            }
            listing.entries.extend(entries);
            listing.truncated |= truncated;
            if last {
                return Ok(listing);
            }
        }
    }

    async fn request(&mut self, request: &Request, deadline: Instant) -> Result<(), AgentError> {
        let hello = Hello {
            protocol: PROTOCOL_VERSION,
            key: std::mem::take(&mut self.key),
        };
        self.frames.send_pair(&hello, request, deadline).await
    }
}

/// The events of a running command.
#[derive(Debug)]
pub struct ExecStream {
    frames: Frames,
    /// When the agent must have answered; none for a command without a timeout.
    deadline: Option<Instant>,
    stall: Duration,
    ended: bool,
}

impl ExecStream {
    /// The next event; none after the last. Can be dropped and called again without losing anything.
    pub async fn next(&mut self) -> Option<Result<ExecEvent, AgentError>> {
        if self.ended {
            return None;
        }
        let event = match self.deadline {
            Some(deadline) => match timeout_at(deadline, self.event()).await {
                Ok(event) => event,
                Err(_elapsed) => Err(AgentError::Timeout),
            },
            None => self.event().await,
        };
        self.ended = matches!(event, Err(_) | Ok(ExecEvent::Exited { .. }));
        Some(event)
    }

    async fn event(&mut self) -> Result<ExecEvent, AgentError> {
        let (kind, payload) = self.frames.next(self.stall).await?;
        match kind {
            FrameKind::Stdout => Ok(ExecEvent::Stdout(payload)),
            FrameKind::Stderr => Ok(ExecEvent::Stderr(payload)),
            FrameKind::Data => Err(AgentError::Protocol("file bytes from a command".to_owned())),
            FrameKind::Json => match frames::parse_reply(&payload)? {
                Reply::Exited {
                    exit_code,
                    timed_out,
                    duration_ms,
                    changes,
                } => Ok(ExecEvent::Exited {
                    exit_code,
                    timed_out,
                    duration_ms,
                    changes,
                }),
                other => Err(unexpected(other)),
            },
        }
    }
}

/// The bytes of a file.
#[derive(Debug)]
pub struct FileStream {
    frames: Frames,
    size: u64,
    left: u64,
    stall: Duration,
}

impl FileStream {
    /// How many bytes there are in all.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The next bytes; none after the last. Together they are exactly [`FileStream::size`] bytes, or an
    /// error comes.
    pub async fn next(&mut self) -> Option<Result<Bytes, AgentError>> {
        if self.left == 0 {
            return None;
        }
        let part = self.part().await;
        if part.is_err() {
            self.left = 0;
        }
        Some(part)
    }

    async fn part(&mut self) -> Result<Bytes, AgentError> {
        let received = tokio::time::timeout(self.stall, self.frames.next(self.stall));
        let (kind, payload) = received.await.map_err(|_elapsed| AgentError::Timeout)??;
        match kind {
            FrameKind::Data => {
                let length = u64::try_from(payload.len()).unwrap_or(u64::MAX);
                if payload.is_empty() || length > self.left {
                    return Err(AgentError::Protocol(
                        "more or less file than announced".to_owned(),
                    ));
                }
                self.left -= length;
                Ok(payload)
            }
            FrameKind::Json => Err(unexpected(frames::parse_reply(&payload)?)),
            FrameKind::Stdout | FrameKind::Stderr => {
                Err(AgentError::Protocol("output where file bytes belong".to_owned()))
            }
        }
    }
}

/// Turns a reply that was not hoped for into an error.
fn unexpected(reply: Reply) -> AgentError {
    match reply {
        Reply::Error { code, message } => AgentError::Refused {
            code,
            message: clean(&message),
        },
        Reply::Pong { .. } => AgentError::Protocol("an unexpected pong".to_owned()),
        Reply::Exited { .. } => AgentError::Protocol("an unexpected exit".to_owned()),
        Reply::Written { .. } => AgentError::Protocol("an unexpected write".to_owned()),
        Reply::File { .. } => AgentError::Protocol("an unexpected file".to_owned()),
        Reply::Entries { .. } => AgentError::Protocol("an unexpected listing".to_owned()),
        Reply::Files(_) => AgentError::Protocol("an unexpected word about files".to_owned()),
        Reply::Started { .. } => AgentError::Protocol("an unexpected start".to_owned()),
        Reply::Processes { .. } => AgentError::Protocol("an unexpected list of processes".to_owned()),
        Reply::Output { .. } => AgentError::Protocol("unexpected output".to_owned()),
        Reply::Done => AgentError::Protocol("an unexpected end".to_owned()),
    }
}

/// Cuts a text of the sandbox and takes out what could forge log lines or terminal sequences.
fn clean(text: &str) -> String {
    text.chars()
        .filter(|character| !character.is_control())
        .take(MAX_MESSAGE)
        .collect()
}
