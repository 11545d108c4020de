//! Egress policies and the egress audit.

use jiff::Timestamp;
use sandgate_policy::Policy;
use serde::{Deserialize, Serialize};

use crate::{
    audit::AuditEvent,
    feed::{Revision, TierName},
    id::{OrgId, SandboxId},
};

/// `GET` and `PUT /settings/egress`: the policy's own fields at the top level, and these beside them.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct OrganizationEgress {
    /// The document.
    #[serde(flatten)]
    #[cfg_attr(feature = "openapi", schema(value_type = crate::openapi::PolicyDocument))]
    pub policy: Policy,
    /// Whose policy this is.
    pub org_id: OrgId,
    /// Absent while the organisation never set a policy and the default is in force.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub updated_at: Option<Timestamp>,
    /// The feed revision of the last change; 0 before the first.
    pub revision: Revision,
    /// Every sandbox of the organisation is governed by this revision. False: committed, and the node
    /// has not acknowledged it yet.
    pub applied: bool,
}

/// `GET`, `PUT` and `PATCH /sandbox/:id/network`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SandboxNetwork {
    /// Which sandbox.
    pub sandbox_id: SandboxId,
    /// The sandbox's own policy; the default document while it has none.
    #[cfg_attr(feature = "openapi", schema(value_type = crate::openapi::PolicyDocument))]
    pub policy: Policy,
    /// The feed revision of the last change of `policy`; 0 before the first.
    pub revision: Revision,
    /// The node enforces `policy` as of `revision`.
    pub applied: bool,
    /// Every tier that has a policy. A flow passes only if each of them allows it.
    pub effective: Vec<TierPolicy>,
}

/// One tier of [`SandboxNetwork::effective`].
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TierPolicy {
    /// Who wrote it.
    pub tier: TierName,
    /// What they wrote.
    #[cfg_attr(feature = "openapi", schema(value_type = crate::openapi::PolicyDocument))]
    pub policy: Policy,
}

/// The decision in the word of published clients.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AuditDecision {
    /// The flow went through.
    Allow,
    /// It was refused, or a tier in audit mode would have refused it.
    Deny,
}

/// `GET /egress/audit`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AuditPage {
    /// Newest first.
    pub events: Vec<AuditRecord>,
    /// Give it back as `cursor` for the next page; absent on the last one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_cursor: Option<String>,
}

/// An [`AuditEvent`] with the names published clients expect beside ours.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AuditRecord {
    /// The record as netd made it.
    #[serde(flatten)]
    pub event: AuditEvent,
    /// The same as `time`.
    pub timestamp: Timestamp,
    /// The same as `verdict`, but for `audit`, which is `deny` here, and not `enforced`.
    pub decision: AuditDecision,
    /// The decision was carried out. False: a tier in audit mode denies it, and it went through.
    pub enforced: bool,
    /// Bytes in both directions.
    pub bytes: u64,
}

/// `GET /egress/audit/verify`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditVerification {
    /// Every record since the retention anchor is there as it was recorded, in its place.
    pub verified: bool,
    /// Records that were found right, up to the first that is not.
    pub records: u64,
    /// Records from before the chain began, of which nothing can be said.
    pub unchained: u64,
    /// Which chain: another one begins when the installation's key is another one. Absent before the first record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epoch: Option<i64>,
    /// The position behind which the records begin that are still kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub anchor: Option<i64>,
    /// The last position that is right.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub position: Option<i64>,
    /// The link of the record there, hexadecimal. Keep it, and you can tell later that nothing before it was changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// When the end of the chain was last signed and kept apart from the database; what was recorded since then could
    /// be cut off unnoticed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signed_at: Option<Timestamp>,
    /// The first that is wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<AuditProblem>,
}

/// The first thing that is wrong with the audit.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditProblem {
    /// What happened to it.
    pub kind: AuditProblemKind,
    /// The position in the chain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub position: Option<i64>,
    /// The record that was found there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub event_id: Option<String>,
    /// In words.
    pub message: String,
}

/// What happened to the audit.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AuditProblemKind {
    /// A record says something else.
    Edited,
    /// A record is missing.
    Removed,
    /// A record was never recorded.
    Inserted,
    /// Records are in another order.
    Reordered,
    /// The newest records are missing.
    Cut,
    /// What is said about the beginning or the end of the chain is wrong.
    Anchor,
    /// The signed head does not fit.
    Head,
}
