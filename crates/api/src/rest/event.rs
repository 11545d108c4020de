//! What happens to sandboxes.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::id::{OrgId, SandboxId};

/// What happened.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum EventKind {
    /// It is being made.
    #[serde(rename = "sandbox.created")]
    SandboxCreated,
    /// It can be used.
    #[serde(rename = "sandbox.ready")]
    SandboxReady,
    /// It has ended, because somebody wanted it or because of what ran inside.
    #[serde(rename = "sandbox.stopped")]
    SandboxStopped,
    /// It has ended: it could not be made.
    #[serde(rename = "sandbox.error")]
    SandboxError,
    /// It has ended, because its lifetime was over or nothing happened in it.
    #[serde(rename = "sandbox.timeout")]
    SandboxTimeout,
    /// A command began.
    #[serde(rename = "command.started")]
    CommandStarted,
    /// A command ended with 0.
    #[serde(rename = "command.completed")]
    CommandCompleted,
    /// A command ended otherwise, was ended, or was lost.
    #[serde(rename = "command.failed")]
    CommandFailed,
}

impl EventKind {
    /// Every kind.
    pub const ALL: &'static [Self] = &[
        Self::SandboxCreated,
        Self::SandboxReady,
        Self::SandboxStopped,
        Self::SandboxError,
        Self::SandboxTimeout,
        Self::CommandStarted,
        Self::CommandCompleted,
        Self::CommandFailed,
    ];

    /// The word on the wire and in the store.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::SandboxCreated => "sandbox.created",
            Self::SandboxReady => "sandbox.ready",
            Self::SandboxStopped => "sandbox.stopped",
            Self::SandboxError => "sandbox.error",
            Self::SandboxTimeout => "sandbox.timeout",
            Self::CommandStarted => "command.started",
            Self::CommandCompleted => "command.completed",
            Self::CommandFailed => "command.failed",
        }
    }
}

/// What else there is to say of an event.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventDetails {
    /// Of the end of a sandbox: why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Of a command: the same in all of its events.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command_id: Option<String>,
    /// Of the end of a command: its exit status; left out when it has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// Of the end of a command: its time was up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timed_out: Option<bool>,
    /// Of the end of a command: how long it ran.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duration_ms: Option<u64>,
}

/// One event of `GET /events/stream`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxEvent {
    /// Its position, as in the event's `id`.
    pub id: String,
    /// What happened, as in the event's `event`.
    #[serde(rename = "type")]
    pub kind: EventKind,
    /// When.
    pub timestamp: Timestamp,
    /// Whose sandbox.
    pub org_id: OrgId,
    /// Which one.
    pub sandbox_id: SandboxId,
    /// What else there is to say.
    pub data: EventDetails,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_is_written_as_it_is_called() {
        for kind in EventKind::ALL {
            let written = serde_json::to_value(kind).expect("a word");
            assert_eq!(written, kind.as_str());
        }
    }
}
