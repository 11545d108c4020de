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
