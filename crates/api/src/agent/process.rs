//! Processes that outlive the connection that started them.
//!
//! Their output is kept in a ring of bytes, each with a position of its own, counted from 0. A follower gives the
//! position that it has got to; where the ring has lost what followed, the answer says at which position it goes on.

use serde::{Deserialize, Serialize};

use super::Exec;

/// A command that runs until it ends or is ended, whoever is connected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// What to run. Neither `timeout_ms` nor `track` is looked at.
    pub exec: Exec,
    /// A terminal of this size instead of pipes.
    #[serde(default)]
    pub terminal: Option<TerminalSize>,
    /// Killed when the last of those who followed its output is gone.
    #[serde(default)]
    pub attended: bool,
}

/// How much a terminal shows, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    /// Height.
    pub rows: u16,
    /// Width.
    pub columns: u16,
}

/// A process that was started, and its output as far as it is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessStatus {
    /// Unique as long as the sandbox lives.
    pub process_id: String,
    /// Its number inside the sandbox.
    pub pid: i32,
    /// What runs, for people: cut.
    pub command: String,
    /// It has a terminal.
    pub terminal: bool,
    /// As in [`Start::attended`].
    pub attended: bool,
    /// Milliseconds since the epoch.
    pub started_ms: i64,
    /// How it ended; none while it runs.
    #[serde(default)]
    pub ended: Option<ProcessEnd>,
    /// Position of the first byte of output that is kept.
    pub first: u64,
    /// Position of the next byte that it will write.
    pub next: u64,
}

/// The end of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessEnd {
    /// As of a command.
    pub exit_code: i32,
    /// Milliseconds since the epoch.
    pub at_ms: i64,
}
