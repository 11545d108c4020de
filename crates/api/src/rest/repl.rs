//! Sessions of an interpreter.

use serde::{Deserialize, Serialize};

/// `POST /sandbox/:id/repl/sessions`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplSession {
    /// Names it in paths, as long as the sandbox lives.
    pub session_id: String,
    /// `python`, `node` or `bash`.
    pub language: String,
}

/// `POST /sandbox/:id/repl/sessions/:sid/execute`. Code that fails is a 200, too.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplOutput {
    /// What the code wrote to both outputs, and the value of its last expression.
    pub output: String,
    /// Something of the output is missing.
    pub output_truncated: bool,
    /// Why it failed; empty when it did not.
    pub error: String,
    /// Pieces of code that the session has run; 0 when that is not known.
    pub execution_count: u64,
    /// The code was interrupted because its `timeout_ms` was over.
    pub timed_out: bool,
    /// How long it took, in milliseconds.
    pub duration_ms: u64,
}

/// `POST /sandbox/:id/repl/sessions/:sid/interrupt`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplInterrupted {
    /// Always true.
    pub success: bool,
    /// Always `idle`: what ran was told to end.
    pub status: String,
}
