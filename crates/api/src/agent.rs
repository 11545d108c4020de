//! The agent protocol between the controller and `sandboxd`, PID 1 of a sandbox.
//!
//! One TCP connection (made by netd) carries one operation. Each side sends frames: a header of five bytes
//! ([`FrameHeader`]: payload length as a big-endian `u32`, then the [`FrameKind`]) and the payload. The
//! controller sends a JSON [`Hello`] and a JSON [`Request`] back to back, then, for
//! [`Request::WriteFile`] and [`FileRequest::Upload`], [`FrameKind::Data`] frames, and for [`FileRequest::Open`], when it was
//! answered, a JSON [`FilePart`]. The agent answers JSON [`Reply`] frames and raw data
//! frames. Closing the connection cancels the operation and kills what it started, but for processes that were
//! started to outlive it ([`Request::Start`]).
//!
//! The agent shares its uid with the code it runs, so the controller treats every byte as hostile: sizes,
//! counts and times are bounded on the reading side.

mod process;

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};

pub use files::{FileAction, FileChange, FilePart, FileReply, FileRequest, OpenedFile};
pub use process::{ProcessEnd, ProcessStatus, Start, TerminalSize};

mod files;

/// Version of this protocol. A running sandbox keeps its agent for life, so the host adapts, never it.
pub const PROTOCOL_VERSION: u32 = 1;

/// Port on which the agent listens inside the sandbox.
pub const AGENT_PORT: u16 = 9111;

/// Largest payload of one frame, in bytes.
pub const MAX_FRAME: usize = 256 * 1024;

/// Length of an encoded [`FrameHeader`], in bytes.
pub const HEADER_LENGTH: usize = 5;

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameKind {
    /// A JSON [`Hello`], [`Request`], [`Reply`] or [`TerminalSize`].
    Json,
    /// Bytes of a command's standard output.
    Stdout,
    /// Bytes of a command's standard error.
    Stderr,
    /// Bytes of a file, or for a process's standard input.
    Data,
}

/// The first five bytes of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHeader {
    /// What the payload is.
    pub kind: FrameKind,
    /// Length of the payload in bytes, at most [`MAX_FRAME`].
    pub length: usize,
}

/// The peer does not speak this protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The kind byte is none of ours.
    #[error("unknown frame kind {0}")]
    UnknownKind(u8),
    /// The payload would be larger than [`MAX_FRAME`].
    #[error("a frame of {0} bytes is over the limit")]
    TooLong(u32),
}

impl FrameHeader {
    /// Writes the header. `length` must be at most [`MAX_FRAME`].
    pub fn encode(self) -> [u8; HEADER_LENGTH] {
        debug_assert!(self.length <= MAX_FRAME, "a frame of {} bytes", self.length);
        let length = u32::try_from(self.length).unwrap_or(u32::MAX).to_be_bytes();
        let kind = match self.kind {
            FrameKind::Json => 1,
            FrameKind::Stdout => 2,
            FrameKind::Stderr => 3,
            FrameKind::Data => 4,
        };
        [length[0], length[1], length[2], length[3], kind]
    }

    /// Reads a header.
    ///
    /// # Errors
    /// When the kind is unknown or the length over the limit; the connection is then useless.
    pub fn decode(bytes: [u8; HEADER_LENGTH]) -> Result<Self, FrameError> {
        let length = u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        let kind = match bytes[4] {
            1 => FrameKind::Json,
            2 => FrameKind::Stdout,
            3 => FrameKind::Stderr,
            4 => FrameKind::Data,
            other => return Err(FrameError::UnknownKind(other)),
        };
        match usize::try_from(length) {
            Ok(length) if length <= MAX_FRAME => Ok(Self { kind, length }),
            Ok(_) | Err(_) => Err(FrameError::TooLong(length)),
        }
    }
}

/// The controller's first frame.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`PROTOCOL_VERSION`] of the sender.
    pub protocol: u32,
    /// The sandbox's key: 64 hexadecimal digits. Compared in constant time.
    pub key: String,
}

/// What the controller wants done. One per connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Request {
    /// Answered by [`Reply::Pong`]: the agent is up.
    Ping,
    /// Gives an agent that was started before anybody had asked for its sandbox what it could not know then.
    /// Answered by [`Reply::Pong`]. Once, and before anything else was asked of it; else
    /// [`AgentErrorCode::Invalid`].
    Claim(Claim),
    /// Runs a command. Answers: [`FrameKind::Stdout`] and [`FrameKind::Stderr`] frames as they come, then
    /// [`Reply::Exited`].
    Exec(Exec),
    /// Writes a file, replacing it, making its parents. [`FrameKind::Data`] frames of together `size`
    /// bytes follow. Answered by [`Reply::Written`].
    WriteFile {
        /// Absolute path.
        path: String,
        /// Length in bytes.
        size: u64,
        /// Permission bits; 0644 when absent.
        #[serde(default)]
        mode: Option<u32>,
    },
    /// Reads a file: [`Reply::File`], then [`FrameKind::Data`] frames of together `size` bytes.
    ReadFile {
        /// Absolute path.
        path: String,
        /// Larger files are [`AgentErrorCode::TooLarge`].
        max_size: u64,
    },
    /// Lists a directory. Answered by [`Reply::Entries`] frames, the last one with `last: true`.
    List {
        /// Absolute path.
        path: String,
        /// Also what is below its directories (symbolic links are not followed).
        recursive: bool,
        /// At most so many entries.
        limit: u32,
    },
    /// Other work on files.
    Files(FileRequest),
    /// Starts a process that outlives this connection. Answered by [`Reply::Started`].
    Start(Start),
    /// Lists the processes that were started so. Answered by [`Reply::Processes`].
    Processes,
    /// Sends a process's output from a position on: [`Reply::Output`], again wherever something is left out, each
    /// followed by [`FrameKind::Stdout`] and [`FrameKind::Stderr`] frames; then [`Reply::Exited`], or
    /// [`Reply::Done`] when nothing is waited for. With `input` the controller may send [`FrameKind::Data`] frames
    /// and JSON [`TerminalSize`] frames meanwhile. Closing the connection leaves the process alone.
    Follow {
        /// Its id, or its number inside the sandbox.
        process: String,
        /// The position.
        since: u64,
        /// Until the process ends, and not only what is there.
        wait: bool,
        /// The controller types.
        input: bool,
    },
    /// Writes to a process's standard input: [`FrameKind::Data`] frames of together `size` bytes follow. Answered by
    /// [`Reply::Written`] with what the process took.
    Input {
        /// As in [`Request::Follow`].
        process: String,
        /// Length in bytes.
        size: u64,
        /// The input ends with them.
        close: bool,
    },
    /// Sends a signal to a process's group. Answered by [`Reply::Done`].
    Signal {
        /// As in [`Request::Follow`].
        process: String,
        /// Its number.
        signal: i32,
    },
    /// Gives a process's terminal another size. Answered by [`Reply::Done`].
    Resize {
        /// As in [`Request::Follow`].
        process: String,
        /// The size.
        size: TerminalSize,
    },
    /// Kills a process with everything it started, and forgets it. Answered by [`Reply::Done`].
    Remove {
        /// As in [`Request::Follow`].
        process: String,
    },
}

/// What a sandbox gets when somebody takes it.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// Added to (and overriding) the image's environment in every command from then on.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
}

/// Leaves the environment's values out: users put secrets there.
impl fmt::Debug for Claim {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Claim")
            .field("env", &self.env.keys().collect::<Vec<_>>())
            .finish()
    }
}

/// A command to run.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    /// What to run.
    pub command: Command,
    /// Added to (and overriding) the sandbox's own environment.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Absolute path; `/workspace` when absent.
    #[serde(default)]
    pub working_dir: Option<String>,
    /// Milliseconds until the command's whole process group is killed; none when absent.
    #[serde(default)]
    pub timeout_ms: Option<u64>,
    /// Absolute path of a directory: what the command changes below it is in [`Reply::Exited`].
    #[serde(default)]
    pub track: Option<String>,
}

/// Leaves the environment's values out: there are secrets among them.
impl fmt::Debug for Exec {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Exec")
            .field("command", &self.command)
            .field("env", &self.env.keys().collect::<Vec<_>>())
            .field("working_dir", &self.working_dir)
            .field("timeout_ms", &self.timeout_ms)
            .field("track", &self.track)
            .finish()
    }
}

/// A shell line or an argument vector.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Command {
    /// Given to `/bin/sh -c`.
    Shell(String),
    /// Program and arguments, no shell.
    Argv(Vec<String>),
}

/// What the agent answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    /// The agent is up.
    Pong {
        /// [`PROTOCOL_VERSION`] of the agent.
        protocol: u32,
    },
    /// The command ended; everything it wrote has been sent.
    Exited {
        /// The exit status; 128 + signal for a killed command, 124 for one that ran out of time, 127 when
        /// the program does not exist and 126 when it cannot be run.
        exit_code: i32,
        /// The command was killed because its time was up.
        timed_out: bool,
        /// How long it ran, in milliseconds.
        duration_ms: u64,
        /// What it changed; with [`Exec::track`] only.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        changes: Option<Changes>,
    },
    /// The file is on disk.
    Written {
        /// Its length in bytes.
        size: u64,
    },
    /// [`FrameKind::Data`] frames of together `size` bytes follow.
    File {
        /// Its length in bytes.
        size: u64,
    },
    /// A part of a listing.
    Entries {
        /// In no particular order.
        entries: Vec<Entry>,
        /// No more parts follow.
        last: bool,
        /// The limit was reached, so something is missing.
        truncated: bool,
    },
    /// An answer to [`Request::Files`].
    Files(FileReply),
    /// The process runs.
    Started {
        /// Unique as long as the sandbox lives.
        process_id: String,
        /// Its number inside the sandbox.
        pid: i32,
    },
    /// All processes, in the order in which they were started.
    Processes {
        /// Running ones, and ended ones that are remembered.
        processes: Vec<ProcessStatus>,
    },
    /// The output that follows begins at this position.
    Output {
        /// In bytes.
        from: u64,
    },
    /// It is done, and there is nothing else to say.
    Done,
    /// The operation failed. Nothing follows.
    Error {
        /// Comparable.
        code: AgentErrorCode,
        /// For people; names the path.
        message: String,
    },
}

/// What differs below a directory after a command.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changes {
    /// By path.
    pub files: Vec<Change>,
    /// There were more files, or more changes, than are looked at: something may be missing.
    pub truncated: bool,
}

/// A file or symbolic link that differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// Absolute path.
    pub path: String,
    /// In which way.
    pub action: ChangeAction,
    /// Length in bytes; 0 for what is deleted.
    pub size: u64,
}

/// How a file differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ChangeAction {
    /// It was not there before.
    Created,
    /// It was there, and something of it is different.
    Modified,
    /// It is not there any more.
    Deleted,
}

/// One file or directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Last component.
    pub name: String,
    /// Absolute path.
    pub path: String,
    /// What it is.
    pub kind: EntryKind,
    /// Length in bytes; 0 for what is not a file.
    pub size: u64,
    /// Seconds since the epoch.
    pub modified: i64,
    /// Permission bits.
    pub mode: u32,
    /// Where a symbolic link leads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
}

/// Kind of a directory entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EntryKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A socket, FIFO or device.
    Other,
}

/// Why an operation failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AgentErrorCode {
    /// The key or the protocol version is wrong.
    Unauthorized,
    /// The request is not one the agent understands.
    Invalid,
    /// The path does not exist.
    NotFound,
    /// A file was wanted and the path is a directory.
    IsDirectory,
    /// A directory was wanted and the path is something else.
    NotDirectory,
    /// The file system says no (permissions, read-only root).
    PermissionDenied,
    /// The sandbox's disk is full.
    NoSpace,
    /// The file is larger than the caller accepts.
    TooLarge,
    /// Something has the path already.
    Exists,
    /// The directory is not empty.
    NotEmpty,
    /// Anything else.
    Internal,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_the_wire() {
        for kind in [
            FrameKind::Json,
            FrameKind::Stdout,
            FrameKind::Stderr,
            FrameKind::Data,
        ] {
            let header = FrameHeader { kind, length: 70_000 };
            assert_eq!(FrameHeader::decode(header.encode()), Ok(header));
        }
    }

    #[test]
    fn a_hostile_header_is_refused() {
        assert_eq!(
            FrameHeader::decode([0, 0, 0, 1, 9]),
            Err(FrameError::UnknownKind(9))
        );
        assert_eq!(
            FrameHeader::decode([0xff, 0xff, 0xff, 0xff, 1]),
            Err(FrameError::TooLong(u32::MAX))
        );
    }
}
