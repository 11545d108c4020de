//! Processes that outlive the request that started them.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// `POST /sandbox/:id/processes`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessStarted {
    /// Names it in paths, as long as the sandbox lives.
    pub process_id: String,
    /// Its number inside the sandbox.
    pub pid: i32,
}

/// A process that was started.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// As in [`ProcessStarted::process_id`].
    pub process_id: String,
    /// As in [`ProcessStarted::pid`].
    pub pid: i32,
    /// What runs; long ones are cut.
    pub command: String,
    /// It has a terminal.
    pub pty: bool,
    /// False: it ends with the last of those who follow its output.
    pub background: bool,
    /// It has not ended.
    pub running: bool,
    /// As of a command; absent while it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// When it was started.
    #[cfg_attr(feature = "openapi", schema(value_type = String, format = DateTime))]
    pub started_at: Timestamp,
    /// When it ended; absent while it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>, format = DateTime))]
    pub ended_at: Option<Timestamp>,
    /// Position of the first byte of its output that is kept.
    pub first_seq: u64,
    /// Position of the next byte that it will write.
    pub next_seq: u64,
}

/// `GET /sandbox/:id/processes`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessList {
    /// In the order in which they were started; ended ones until they are deleted or make room for others.
    pub processes: Vec<Process>,
}

/// `GET /sandbox/:id/processes/:pid/output` as JSON.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessOutput {
    /// What it wrote since, in order; with `exit` at the end when it has ended and everything is here.
    pub events: Vec<ProcessEvent>,
    /// Given back as `since`, the next answer goes on here.
    pub next_seq: u64,
    /// There is more already.
    pub truncated: bool,
}

/// What a process did, and the position in its output up to which all is told.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ProcessEvent {
    /// It wrote to standard output, or to its terminal.
    Stdout {
        /// What it wrote; bytes that are not UTF-8 are replaced.
        data: String,
        /// Position behind it.
        seq: u64,
    },
    /// It wrote to standard error.
    Stderr {
        /// What it wrote; bytes that are not UTF-8 are replaced.
        data: String,
        /// Position behind it.
        seq: u64,
    },
    /// Output that is not kept any more was left out.
    Dropped {
        /// So many.
        bytes: u64,
        /// Position behind them.
        seq: u64,
    },
    /// It ended.
    Exit {
        /// As of a command.
        code: i32,
        /// How long it ran, in milliseconds.
        duration_ms: u64,
    },
    /// What becomes of it is not known.
    Error {
        /// Why.
        error: String,
    },
    /// A stream's last event.
    Done,
}

/// `POST /sandbox/:id/processes/:pid/stdin`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InputWritten {
    /// Always true.
    pub success: bool,
    /// Bytes that the process took; fewer than were sent when it read nothing for a while.
    pub written: u64,
}
