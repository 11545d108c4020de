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
    /// Files that are different after it; with `track_files` only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub files_changed: Option<Vec<FileChange>>,
    /// There were more files or changes than are looked at, so `files_changed` may lack some; with `track_files` only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub files_changed_truncated: Option<bool>,
}

/// A file or symbolic link that a command left different.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileChange {
    /// Absolute path.
    pub path: String,
    /// In which way.
    pub action: FileAction,
    /// Length in bytes; 0 for what is deleted.
    pub size_bytes: u64,
}

/// How a file differs.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileAction {
    /// It was not there before.
    Created,
    /// It was there, and something of it is different.
    Modified,
    /// It is not there any more.
    Deleted,
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
        /// As [`ExecuteResponse::files_changed`].
        #[serde(default, skip_serializing_if = "Option::is_none")]
        files_changed: Option<Vec<FileChange>>,
        /// As [`ExecuteResponse::files_changed_truncated`].
        #[serde(default, skip_serializing_if = "Option::is_none")]
        files_changed_truncated: Option<bool>,
    },
    /// How the command ended is not known.
    Error {
        /// Why.
        error: String,
    },
    /// The stream's last event.
    Done,
}
