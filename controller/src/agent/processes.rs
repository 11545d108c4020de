//! Operations on processes that outlive their connection.

use std::{convert::Infallible, time::Duration};

use bytes::Bytes;
use futures_util::stream;
use sandgate_api::agent::{FrameKind, ProcessStatus, Reply, Request, Start, TerminalSize};
use tokio::time::{Instant, timeout};

use super::{Agent, AgentError, Upload, clean, frames, frames::Frames, unexpected};

/// Most processes of a sandbox that are believed.
const MAX_PROCESSES: usize = 256;
/// Longest id of a process.
const MAX_ID: usize = 32;

/// What a process that is followed sends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProcessOutput {
    /// Bytes that it wrote.
    Part {
        /// To its standard error.
        to_stderr: bool,
        /// Position of the byte after these.
        next: u64,
        /// What it wrote.
        bytes: Bytes,
    },
    /// So many bytes are not kept any more.
    Lost(u64),
    /// It has ended, and everything was sent. The last event.
    Exited {
        /// See [`Reply::Exited`].
        exit_code: i32,
        /// Milliseconds, by the agent's clock.
        duration_ms: u64,
    },
    /// Nothing more at the moment, and nobody waits. The last event.
    CaughtUp,
}

/// A process that is followed.
#[derive(Debug)]
pub struct Follow {
    frames: Frames,
    position: u64,
    /// Still to be told.
    lost: u64,
    stall: Duration,
    ended: bool,
}

impl Agent {
    /// Starts a process. Answers its id and its number inside the sandbox.
    ///
    /// # Errors
    /// When it cannot be started.
    pub async fn start_process(mut self, start: Start) -> Result<(String, i32), AgentError> {
        let deadline = Instant::now() + self.patience.first_word;
        self.request(&Request::Start(start), deadline).await?;
        match self.frames.reply(deadline).await? {
            Reply::Started { process_id, pid } if is_id(&process_id) => Ok((process_id, pid)),
            Reply::Started { .. } => Err(AgentError::Protocol("an id that is none".to_owned())),
            other => Err(unexpected(other)),
        }
    }

    /// The sandbox's processes, in the order in which they were started.
    ///
    /// # Errors
    /// When the agent does not answer.
    pub async fn processes(mut self) -> Result<Vec<ProcessStatus>, AgentError> {
        let deadline = Instant::now() + self.patience.first_word;
        self.request(&Request::Processes, deadline).await?;
        match self.frames.reply(deadline).await? {
            Reply::Processes { mut processes } => {
                if processes.len() > MAX_PROCESSES
                    || processes.iter().any(|process| !is_id(&process.process_id))
                {
                    return Err(AgentError::Protocol("a list over the limit".to_owned()));
                }
                for process in &mut processes {
                    process.command = clean(&process.command);
                }
                Ok(processes)
            }
            other => Err(unexpected(other)),
        }
    }

    /// Follows a process from a position of its output on. With `wait` until it ends, with `input` also writing to it.
    ///
    /// # Errors
    /// When there is no such process, or it has not written so much.
    pub async fn follow(
        mut self,
        process: &str,
        since: u64,
        wait: bool,
        input: bool,
    ) -> Result<Follow, AgentError> {
        let deadline = Instant::now() + self.patience.first_word;
        let request = Request::Follow {
            process: process.to_owned(),
            since,
            wait,
            input,
        };
        self.request(&request, deadline).await?;
        match self.frames.reply(deadline).await? {
            Reply::Output { from } if from >= since => Ok(Follow {
                frames: self.frames,
                position: from,
                lost: from - since,
                stall: self.patience.stall,
                ended: false,
            }),
            Reply::Output { .. } => Err(AgentError::Protocol("output from before".to_owned())),
            other => Err(unexpected(other)),
        }
    }

    /// Writes to a process. Answers how many bytes it took.
    ///
    /// # Errors
    /// When there is no such process, or it reads nothing any more.
    pub async fn write_process(
        mut self,
        process: &str,
        bytes: Bytes,
        close: bool,
    ) -> Result<u64, AgentError> {
        let size = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        let request = Request::Input {
            process: process.to_owned(),
            size,
            close,
        };
        self.request(&request, Instant::now() + self.patience.first_word)
            .await?;
        let whole = stream::iter((!bytes.is_empty()).then_some(Ok::<_, Infallible>(bytes)));
        let replied = self.frames.upload(whole, false, self.patience.stall).await;
        let reply = replied.map_err(|failed| match failed {
            Upload::Agent(error) => error,
            Upload::Source(never) => match never {},
        })?;
        match reply {
            Reply::Written { size: written } if written <= size => Ok(written),
            Reply::Written { .. } => Err(AgentError::Protocol("more was written than was sent".to_owned())),
            other => Err(unexpected(other)),
        }
    }

    /// Sends a signal to a process and its group.
    ///
    /// # Errors
    /// When there is no such process, or it has ended.
    pub async fn signal_process(self, process: &str, signal: i32) -> Result<(), AgentError> {
        let process = process.to_owned();
        self.done(&Request::Signal { process, signal }).await
    }

    /// Gives a process's terminal another size.
    ///
    /// # Errors
    /// When there is no such process, or it has no terminal.
    pub async fn resize_process(self, process: &str, size: TerminalSize) -> Result<(), AgentError> {
        let process = process.to_owned();
        self.done(&Request::Resize { process, size }).await
    }

    /// Ends a process with everything it started, and forgets it.
    ///
    /// # Errors
    /// When there is no such process.
    pub async fn remove_process(self, process: &str) -> Result<(), AgentError> {
        let process = process.to_owned();
        self.done(&Request::Remove { process }).await
    }

    async fn done(mut self, request: &Request) -> Result<(), AgentError> {
        let deadline = Instant::now() + self.patience.first_word;
        self.request(request, deadline).await?;
        match self.frames.reply(deadline).await? {
            Reply::Done => Ok(()),
            other => Err(unexpected(other)),
        }
    }
}

impl Follow {
    /// Position of the first byte that has not been handed out.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// The next event; none after the last. Can be dropped and called again without losing anything.
    pub async fn next(&mut self) -> Option<Result<ProcessOutput, AgentError>> {
        if self.ended {
            return None;
        }
        let event = self.event().await;
        self.ended = matches!(
            event,
            Err(_) | Ok(ProcessOutput::Exited { .. } | ProcessOutput::CaughtUp)
        );
        Some(event)
    }

    /// Types. The process must be followed with `input`.
    ///
    /// # Errors
    /// When the sandbox takes nothing for a while, or is gone.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<(), AgentError> {
        timeout(self.stall, self.frames.send_data(bytes))
            .await
            .map_err(|_elapsed| AgentError::Timeout)?
    }

    /// Gives the terminal another size. The process must be followed with `input`.
    ///
    /// # Errors
    /// When the sandbox takes nothing for a while, or is gone.
    pub async fn resize(&mut self, size: TerminalSize) -> Result<(), AgentError> {
        timeout(self.stall, self.frames.send_json(&size))
            .await
            .map_err(|_elapsed| AgentError::Timeout)?
    }

    async fn event(&mut self) -> Result<ProcessOutput, AgentError> {
        if self.lost > 0 {
            return Ok(ProcessOutput::Lost(std::mem::take(&mut self.lost)));
        }
        loop {
            let (kind, bytes) = self.frames.next(self.stall).await?;
            let to_stderr = match kind {
                FrameKind::Stdout => false,
                FrameKind::Stderr => true,
                FrameKind::Data => return Err(AgentError::Protocol("file bytes from a process".to_owned())),
                FrameKind::Json => match frames::parse_reply(&bytes)? {
                    Reply::Output { from } if from == self.position => continue,
                    Reply::Output { from } => {
                        let lost = from.checked_sub(self.position);
                        let lost =
                            lost.ok_or_else(|| AgentError::Protocol("output from before".to_owned()))?;
                        self.position = from;
                        return Ok(ProcessOutput::Lost(lost));
                    }
                    Reply::Exited {
                        exit_code,
                        duration_ms,
                        ..
                    } => {
                        return Ok(ProcessOutput::Exited {
                            exit_code,
                            duration_ms,
                        });
                    }
                    Reply::Done => return Ok(ProcessOutput::CaughtUp),
                    other => return Err(unexpected(other)),
                },
            };
            self.position = self
                .position
                .saturating_add(u64::try_from(bytes.len()).unwrap_or(u64::MAX));
            return Ok(ProcessOutput::Part {
                to_stderr,
                next: self.position,
                bytes,
            });
        }
    }
}

/// Ids are shown, and come back in paths.
fn is_id(id: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    (1..=MAX_ID).contains(&id.len()) && id.bytes().all(plain)
}
