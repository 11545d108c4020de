//! Sandboxes.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::id::{OrgId, SandboxId};

/// Where a sandbox stands. Published clients reject any other word.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SandboxStatus {
    /// Not usable yet.
    Creating,
    /// Usable.
    Running,
    /// Being taken down.
    Terminating,
    /// Gone: stopped, expired, or its first process ended.
    Terminated,
    /// Gone: it could not be made, or was lost.
    Error,
}

impl SandboxStatus {
    /// Every status, in the order of a sandbox's life.
    pub const ALL: &'static [Self] = &[
        Self::Creating,
        Self::Running,
        Self::Terminating,
        Self::Terminated,
        Self::Error,
    ];

    /// The word on the wire and in the store.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Running => "running",
            Self::Terminating => "terminating",
            Self::Terminated => "terminated",
            Self::Error => "error",
        }
    }

    /// The sandbox holds resources of the node.
    pub fn is_live(self) -> bool {
        match self {
            Self::Creating | Self::Running | Self::Terminating => true,
            Self::Terminated | Self::Error => false,
        }
    }
}

/// How strongly a sandbox is isolated.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Isolation {
    /// Linux namespaces, a user namespace of its own, seccomp, no capabilities.
    Container,
}

impl Isolation {
    /// The word on the wire and in the store.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Container => "container",
        }
    }
}

/// `POST /sandbox/create`, `GET /sandbox/:id` and each element of `GET /sandboxes`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sandbox {
    /// Its id.
    pub sandbox_id: SandboxId,
    /// Its owner.
    pub org_id: OrgId,
    /// Required by published clients.
    pub session_id: String,
    /// Where it stands.
    pub status: SandboxStatus,
    /// Why it ended, when that is worth saying.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status_reason: Option<String>,
    /// Always `null`: no identity rests on an address, and nothing but netd can reach it.
    pub pod_ip: Option<String>,
    /// When it was asked for.
    pub created_at: Timestamp,
    /// When it is taken down by itself.
    pub expires_at: Timestamp,
    /// As asked for, for example `2` or `500m`.
    pub cpus: String,
    /// As asked for, for example `2Gi`.
    pub memory: String,
    /// Size of the writable layer, as asked for.
    pub disk: String,
    /// Most processes and threads at once.
    pub pids: u64,
    /// How strongly it is isolated.
    pub isolation: Isolation,
    /// Its lifetime in seconds, as asked for.
    pub timeout_seconds: u64,
    /// Its processes are frozen: nothing can be run in it before it is resumed.
    #[serde(default)]
    pub paused: bool,
    /// In the answer to a creation: it was there already, for the same `session_key`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub reused: bool,
    /// Creations with this key give this sandbox for as long as it lives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session_key: Option<String>,
    /// It ends when nothing has happened in it for so long.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_timeout_seconds: Option<u64>,
    /// What it was made from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template_id: Option<String>,
    /// Its owner's notes.
    #[serde(default)]
    pub metadata: BTreeMap<String, String>,
    /// How long its start took; in the answer to its creation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub startup_metrics: Option<StartupMetrics>,
}

/// How long a start took, in milliseconds.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartupMetrics {
    /// From the request to a sandbox that answers.
    pub total_ms: u64,
    /// Until its first process ran.
    pub pod_creation_ms: u64,
    /// From there until the agent answered.
    pub pod_ready_ms: u64,
    /// It was taken from the warm pool: what was made before it was asked for is not counted.
    #[serde(default)]
    pub warm: bool,
    /// Where the time went.
    pub breakdown: StartupBreakdown,
}

/// Parts of [`StartupMetrics`], in milliseconds.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartupBreakdown {
    /// Writable layer, address, network namespace.
    pub prepare_ms: u64,
    /// Until the node acknowledged the policy.
    pub enforce_ms: u64,
    /// Container.
    pub launch_ms: u64,
    /// First answer of the agent.
    pub agent_ms: u64,
}

/// `GET /sandboxes`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SandboxList {
    /// Newest first.
    pub sandboxes: Vec<Sandbox>,
    /// Give it back as `cursor` for the next page; absent on the last one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_cursor: Option<String>,
}

/// `GET /sandbox/:id/status`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SandboxLifetime {
    /// Its id.
    pub sandbox_id: SandboxId,
    /// Where it stands.
    pub status: SandboxStatus,
    /// Why it ended, when that is worth saying.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status_reason: Option<String>,
    /// Its processes are frozen. Its lifetime goes on.
    #[serde(default)]
    pub paused: bool,
    /// When it is taken down by itself.
    pub expires_at: Timestamp,
    /// The latest time to which its life could be extended.
    pub max_expires_at: Timestamp,
    /// From its creation to `max_expires_at`, in seconds.
    pub max_lifetime_seconds: u64,
    /// From `expires_at` to `max_expires_at`, in seconds.
    pub remaining_extend_seconds: u64,
    /// Since its creation, in seconds.
    pub lifetime_used_seconds: u64,
    /// Of its present lifetime, 0 to 100.
    pub lifetime_used_percent: f64,
}
