//! The feed: how the controller tells a node which sandboxes live there and what they may do.
//!
//! `GET /feed?node=<name>&since=<revision>` answers an endless NDJSON body of [`FeedFrame`]s: a
//! [`FeedFrame::Snapshot`] when `since` is absent or unknown, then deltas, and a heartbeat every
//! [`HEARTBEAT_SECONDS`]. After applying a frame the node sends `POST /feed/ack` with a [`FeedAck`].
//! `POST /feed/audit` delivers [`AuditBatch`]es; for leases see [`crate::credential`]. Acknowledged
//! means: kernel maps written, DNS and proxy tables swapped, forbidden flows cut.
//!
//! A policy that several sandboxes of a frame share is written once: a frame has a list of documents, and each tier of a
//! sandbox says by its index which one it means.

use std::{
    net::{Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use sandgate_policy::Policy;
use serde::{Deserialize, Serialize};

use crate::{
    audit::AuditEvent,
    credential::Binding,
    id::{OrgId, SandboxId},
};

mod written;

/// Seconds between two heartbeats, and between two acknowledgements at most. A node that has heard nothing for three of
/// them reconnects; one from which nothing was heard for three of them is not ready.
pub const HEARTBEAT_SECONDS: u64 = 5;

/// A position in the feed. Assigned inside the committing transaction; grows by any step.
pub type Revision = u64;

/// One line of the feed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(into = "written::Frame", try_from = "written::Frame")]
pub enum FeedFrame {
    /// Everything on this node. What is not listed does not exist any more.
    Snapshot {
        /// The state's revision.
        revision: Revision,
        /// Every sandbox of this node.
        sandboxes: Vec<FeedSandbox>,
    },
    /// What changed since the frame before.
    Delta {
        /// The revision that it follows. It means nothing to a node at another one, which must begin anew.
        since: Option<Revision>,
        /// The state's revision after this frame.
        revision: Revision,
        /// New and changed sandboxes, whole.
        upserts: Vec<FeedSandbox>,
        /// Sandboxes that are gone.
        removed: Vec<SandboxId>,
    },
    /// Nothing new; the line is alive.
    Heartbeat {
        /// The state's revision.
        revision: Revision,
    },
}

/// One sandbox as its node must enforce it.
#[derive(Debug, Clone, PartialEq)]
pub struct FeedSandbox {
    /// Which one.
    pub sandbox_id: SandboxId,
    /// Its owner.
    pub org_id: OrgId,
    /// Where its packets come from.
    pub endpoint: Endpoint,
    /// The tenants' policies, organisation first. A flow passes only if every tier allows it.
    /// Empty means: the default policy, see [`Policy::default`].
    pub tiers: Vec<PolicyTier>,
    /// Secrets that are injected into its requests. Their hosts' ports are intercepted.
    pub bindings: Vec<Binding>,
    /// Of its certificate authority. Another one means that a lease on the authority is void.
    pub ca_generation: u32,
    /// TCP ports inside that tunnel-proxy may reach: those of its open tunnels. Never the agent's, even if it
    /// were listed.
    pub tunnel_ports: Vec<u16>,
}

/// A sandbox's point of attachment to its node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// Index of the host end of the veth, in the router namespace.
    pub ifindex: u32,
    /// Name of the host end of the veth, for logs and checks.
    pub interface: String,
    /// The only source address this interface may use.
    pub address: Ipv4Addr,
    /// The only IPv6 source address it may use: a unique local one (RFC 4193). `None`: every IPv6 frame is dropped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address6: Option<Ipv6Addr>,
    /// Ethernet address of the sandbox's end, six bytes.
    pub mac: [u8; 6],
    /// TCP port on which `sandboxd` listens inside.
    pub agent_port: u16,
}

/// Who wrote a policy. The order is the order of precedence.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TierName {
    /// The operator: ranges nobody may reach, and the operator's exceptions.
    Platform,
    /// `/settings/egress`.
    Organization,
    /// The template the sandbox was made from.
    Template,
    /// `/sandbox/:id/network`.
    Sandbox,
}

/// One tenant tier.
#[derive(Debug, Clone, PartialEq)]
pub struct PolicyTier {
    /// Who wrote it.
    pub tier: TierName,
    /// What they wrote. Shared with other sandboxes where the sender knew that it is the same.
    pub policy: Arc<Policy>,
}

/// `POST /feed/ack`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FeedAck {
    /// Everything up to and including this revision is enforced, but for `errors`.
    pub revision: Revision,
    /// The node's canaries are green and new sandboxes may be sent to it.
    pub ready: bool,
    /// Why not, when `ready` is false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_ready_reason: Option<String>,
    /// Whether packets of IPv4 may leave this node without passing through netd, which rules for UDP need.
    #[serde(default)]
    pub kernel_pass: bool,
    /// Why not, when `kernel_pass` is false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub no_kernel_pass_reason: Option<String>,
    /// The same of IPv6, never without IPv4.
    #[serde(default)]
    pub kernel_pass6: bool,
    /// Why not, when `kernel_pass6` is false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub no_kernel_pass6_reason: Option<String>,
    /// Sandboxes that could not be enforced as asked; they are denied everything.
    #[serde(default)]
    pub errors: Vec<FeedError>,
}

/// A sandbox that the node could not enforce as asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FeedError {
    /// Which one.
    pub sandbox_id: SandboxId,
    /// Why, for the log and the API answer.
    pub message: String,
}

/// `POST /feed/audit`: records in the order they were made. Ids make delivery idempotent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AuditBatch {
    /// The records.
    pub events: Vec<AuditEvent>,
}
