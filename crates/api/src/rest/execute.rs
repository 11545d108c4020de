//! Commands.

use serde::{Deserialize, Serialize};

/// `POST /sandbox/:id/execute` without `stream`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecuteResponse {
    /// The exit status; 128 + signal for a killed command, 124 for one that ran out of time.
    pub exit_code: i32,
    /// Standard output; bytes that are not UTF-8 are replaced.
    pub stdout: String,
    /// Standard error; bytes that are not UTF-8 are replaced.
    pub stderr: String,
    /// `stdout` or `stderr` was longer than what is returned.
    pub output_truncated: bool,
    /// The command was killed because its `timeout` was over.
    pub timed_out: bool,
    /// How long it ran, in milliseconds.
    pub duration_ms: u64,
}

/// One `data: ` line of `POST /sandbox/:id/execute` with `stream: true`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum StreamEvent {
    /// The command wrote to standard output.
    Stdout {
        /// What it wrote.
        data: String,
    },
    /// The command wrote to standard error.
    Stderr {
        /// What it wrote.
        data: String,
    },
    /// The command ended.
    Exit {
        /// As [`ExecuteResponse::exit_code`].
        code: i32,
        /// As [`ExecuteResponse::timed_out`].
        timed_out: bool,
        /// As [`ExecuteResponse::duration_ms`].
        duration_ms: u64,
    },
    /// How the command ended is not known.
    Error {
        /// Why.
        error: String,
    },
    /// The stream's last event.
    Done,
}
