//! Bodies of the REST API, as published clients send and need them.
//!
//! Only answers have types here: a request is a document written by a user, and the controller reads it
//! field by field, so that a refusal can name the field. Every 2xx answer is a JSON object in snake_case
//! with RFC 3339 times. Published clients are strict about strings (no numbers for text) and reject a
//! `null` where they expect a value, so an absent value is left out, except where a field's comment says
//! otherwise.

mod account;
mod action;
mod billing;
mod doctor;
mod egress;
mod event;
mod execute;
mod file;
mod pool;
mod process;
mod repl;
mod review;
mod sandbox;
mod secret;
mod template;
mod tunnel;
mod usage;

pub use account::{
    ApiKey, ApiKeyCreated, ApiKeyList, FirstKey, Invitation, InvitationCreated, InvitationList, Organization,
    RegisterResponse, Role, TokenCreated, User, UserAdded, UserList,
};
pub use action::{Action, ActionList, ActionOutcome, ActionSummary};
pub use billing::{Invoices, Subscription};
pub use doctor::{DOCTOR, DOCTOR_HOST, DoctorClient, DoctorFinding, NetworkDoctor, SelfTest};
pub use egress::{
    AuditDecision, AuditPage, AuditProblem, AuditProblemKind, AuditRecord, AuditVerification,
    OrganizationEgress, SandboxNetwork, TierPolicy,
};
pub use event::{EventDetails, EventKind, SandboxEvent};
pub use execute::{ExecuteResponse, FileAction, FileChange, StreamEvent};
pub use file::{FileEntry, FileKind, FileList, FileRead, FileStored, FilesWritten, WatchEvent, WrittenFile};
pub use pool::PoolStats;
pub use process::{InputWritten, Process, ProcessEvent, ProcessList, ProcessOutput, ProcessStarted};
pub use repl::{ReplInterrupted, ReplOutput, ReplSession};
pub use review::{ApiCall, Explanation, ReplayedAttempt, Simulation, Suggestion};
pub use sandbox::{
    Isolation, Sandbox, SandboxLifetime, SandboxList, SandboxStatus, StartupBreakdown, StartupMetrics,
};
pub use secret::{EgressBinding, Secret, SecretList, SecretsInjected};
pub use template::{Template, TemplateConfig, TemplateFile, TemplateList};
pub use tunnel::{Tunnel, TunnelList};
pub use usage::{
    MetricsHistory, MetricsSummary, ResourceMetrics, SandboxMetrics, SandboxSummary, SandboxUsage,
    SandboxUsageList, Share, Traffic, UsageHistory, UsagePoint, UsageSummary,
};

use serde::{Deserialize, Serialize};

/// The answer of calls that have nothing else to say. `success` is always the boolean `true`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Success {
    /// Always true: failures have another status and the error envelope.
    pub success: bool,
}

impl Success {
    /// It worked.
    pub const OK: Self = Self { success: true };
}

/// `GET /health` and `GET /ready`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// `ok`, or `degraded` when something below is not.
    pub status: String,
    /// The controller's version.
    pub version: String,
    /// `ok` or `failed`.
    pub database: String,
    /// `ready`, `starting`, or `failed`.
    pub backend: String,
    /// Why the backend is not ready.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backend_error: Option<String>,
    /// `connected` or `away`. Sandboxes can be created without it; tunnels cannot.
    #[serde(default)]
    pub tunnel_proxy: String,
    /// The nodes that enforce.
    pub nodes: Vec<NodeHealth>,
}

/// One node in [`Health`].
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeHealth {
    /// Its name.
    pub name: String,
    /// It follows the feed.
    pub connected: bool,
    /// Its canaries are green and it takes new sandboxes.
    pub ready: bool,
    /// Why not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Whether packets of IPv4 that need no look inside leave the node without passing through netd. Rules for `udp` need
    /// it.
    #[serde(default)]
    pub kernel_pass: bool,
    /// Why they do not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel_pass_reason: Option<String>,
    /// The same of IPv6. Rules for `udp` with ranges of IPv6 need both.
    #[serde(default)]
    pub kernel_pass6: bool,
    /// Why they do not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel_pass6_reason: Option<String>,
}
