//! What people ask of the egress audit afterwards: why, what would allow it, and what another policy would have said.

use std::net::IpAddr;

use sandgate_policy::{Policy, Reason};
use serde::Serialize;
use serde_json::Value;

use super::AuditDecision;
use crate::{feed::TierName, id::SandboxId};

/// A call of this API.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ApiCall {
    /// The method.
    pub method: String,
    /// The path, from the root.
    pub path: String,
    /// The JSON body.
    #[cfg_attr(feature = "openapi", schema(value_type = Object))]
    pub body: Value,
}

/// `GET /egress/audit/:event/explain` and `POST /egress/audit/:event/allow`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Explanation {
    /// Which record.
    pub event_id: String,
    /// Why, in words for people.
    pub sentence: String,
    /// What the policies as they are now say of the same attempt; `allow` when `allow` has made the calls. Absent where
    /// no policy decides such an attempt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decision_now: Option<AuditDecision>,
    /// What to call so that it is allowed, or what `allow` has called: one for each tier that denies it. Empty where
    /// nothing need be changed, and where no change of a policy could help.
    pub calls: Vec<ApiCall>,
    /// The node enforces what `allow` has changed. Absent when nothing was changed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub applied: Option<bool>,
}

/// Attempts that are alike.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ReplayedAttempt {
    /// As in the audit.
    pub protocol: String,
    /// The name it was for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// The address it was for, where it showed no name.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>))]
    pub ip: Option<IpAddr>,
    /// The port.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// The method of a request that was read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub method: Option<String>,
    /// Its path.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// What the candidate says of it.
    pub decision: AuditDecision,
    /// Why.
    #[cfg_attr(feature = "openapi", schema(value_type = crate::openapi::Reason))]
    pub reason: Reason,
    /// The tier that decides; the platform where there is none.
    pub tier: TierName,
    /// What decides in it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
    /// How many attempts.
    pub count: u64,
}

/// `POST /sandbox/:id/network/simulate`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Simulation {
    /// Whose records were replayed.
    pub sandbox_id: SandboxId,
    /// How many attempts the records tell of.
    pub attempts: u64,
    /// Of these, how many end as they did.
    pub unchanged: u64,
    /// How many no policy decides, such as flows that were malformed: they end as they did too.
    pub not_judged: u64,
    /// What was refused and would pass; the most frequent first.
    pub newly_allowed: Vec<ReplayedAttempt>,
    /// What went through and would be refused; the most frequent first.
    pub newly_denied: Vec<ReplayedAttempt>,
    /// There were more records than are replayed at once: these are the newest.
    pub truncated: bool,
}

/// `POST /sandbox/:id/network/suggest`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Suggestion {
    /// Whose records it is made of.
    pub sandbox_id: SandboxId,
    /// The policy that allows what went through, and nothing else.
    #[cfg_attr(feature = "openapi", schema(value_type = crate::openapi::PolicyDocument))]
    pub policy: Policy,
    /// How many attempts that went through it allows.
    pub attempts: u64,
    /// What went through and would not under it, and names that were only asked for.
    pub left_out: Vec<ReplayedAttempt>,
    /// There were more records than are looked at: these are the newest.
    pub truncated: bool,
}
