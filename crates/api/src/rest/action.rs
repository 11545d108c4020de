//! Who did what by the API.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::id::{OrgId, UserId};

/// How an action went.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ActionOutcome {
    /// It was done, or, of what streams, begun.
    Success,
    /// It was not.
    Failure,
    /// The caller may not do it.
    Denied,
    /// The caller went away before it was answered.
    Cancelled,
}

impl ActionOutcome {
    /// All of them.
    pub const EVERY: [Self; 4] = [Self::Success, Self::Failure, Self::Denied, Self::Cancelled];

    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Success => "success",
            Self::Failure => "failure",
            Self::Denied => "denied",
            Self::Cancelled => "cancelled",
        }
    }
}

impl std::str::FromStr for ActionOutcome {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::EVERY
            .into_iter()
            .find(|outcome| outcome.as_str() == text)
            .ok_or_else(|| "expected one of success, failure, denied, cancelled".to_owned())
    }
}

/// Something that was done, or tried, by the API.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Action {
    /// Unique.
    pub id: String,
    /// When it began.
    pub timestamp: Timestamp,
    /// What it was about; empty when that is no sandbox.
    pub sandbox_id: String,
    /// Where it was done.
    pub org_id: OrgId,
    /// By whom; absent when a token named nobody of the organisation's users.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user_id: Option<UserId>,
    /// The sandbox's session; empty when it is about no sandbox.
    pub session_id: String,
    /// What, for example `sandbox.create`.
    pub action: String,
    /// What it was done to: a path inside the sandbox, or else the request's own.
    pub resource: String,
    /// How it was asked for: `method`, `path`, `status`, `request_id`, `key_id`, `paths`.
    #[cfg_attr(feature = "openapi", schema(value_type = Object))]
    pub details: serde_json::Map<String, serde_json::Value>,
    /// How it went.
    pub outcome: ActionOutcome,
    /// Why it was not done.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error_message: Option<String>,
    /// How long it took until it was answered, in milliseconds.
    pub duration: u64,
}

/// `GET /audit`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ActionList {
    /// Newest first.
    pub events: Vec<Action>,
    /// On all pages.
    pub total: u64,
}

/// `GET /sandbox/{id}/audit/summary`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ActionSummary {
    /// All that is on record.
    pub total_events: u64,
    /// Commands.
    pub commands_executed: u64,
    /// Requests that wrote files.
    pub files_written: u64,
    /// Requests that read files.
    pub files_read: u64,
    /// Requests for secrets.
    pub secrets_accessed: u64,
    /// What was not done.
    pub errors: u64,
    /// How long everything took together, in milliseconds.
    pub duration: u64,
}
