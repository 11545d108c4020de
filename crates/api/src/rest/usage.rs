//! What sandboxes use: at present, lately, and in all.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::id::SandboxId;

/// How much of something limited is used.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Share {
    /// Processors (1.5: one and a half), or bytes.
    pub usage: f64,
    /// As many as it may use.
    pub limit: f64,
    /// Of the limit, 0 to 100.
    pub percentage: f64,
}

/// What crossed a sandbox's interface since it was made, in bytes.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// By it.
    pub sent: u64,
    /// By others.
    pub received: u64,
}

/// What a sandbox uses at a time.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ResourceMetrics {
    /// When.
    pub timestamp: Timestamp,
    /// Processors, on average since the measurement before.
    pub cpu: Share,
    /// Memory in bytes, without pages of files that nobody has used for a while.
    pub memory: Share,
    /// The writable layer in bytes.
    pub storage: Share,
    /// Processes and threads.
    pub processes: Share,
    /// What crossed its interface, what the controller asks and is answered included.
    pub network: Traffic,
}

/// `GET /sandbox/:id/metrics`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SandboxMetrics {
    /// `null` when the sandbox does not run.
    pub metrics: Option<ResourceMetrics>,
}

/// `GET /sandbox/:id/metrics/history`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MetricsHistory {
    /// Oldest first, every ten seconds, of the last half hour at most; empty when the sandbox does not run.
    pub history: Vec<ResourceMetrics>,
}

/// What a sandbox used lately.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MetricsSummary {
    /// Of `cpu`, `cpu_percentage`, `memory`, `memory_percentage`, `storage`, `processes`.
    pub avg: BTreeMap<String, f64>,
    /// The same.
    pub max: BTreeMap<String, f64>,
    /// The same.
    pub min: BTreeMap<String, f64>,
    /// From the first measurement to the last, in seconds.
    pub duration: u64,
}

/// `GET /sandbox/:id/metrics/summary`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SandboxSummary {
    /// `null` when the sandbox does not run.
    pub summary: Option<MetricsSummary>,
}

/// What an organisation used in a time. A GB is 10^9 bytes.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct UsagePoint {
    /// From.
    pub period_start: Timestamp,
    /// Until.
    pub period_end: Timestamp,
    /// Processor time.
    pub cpu_hours: f64,
    /// Memory in use, times time.
    pub memory_gb_hours: f64,
    /// Sent and received.
    pub network_gb: f64,
    /// Sandboxes made.
    pub sandbox_creations: u64,
}

/// `GET /usage/current`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct UsageSummary {
    /// This month's amounts so far.
    #[serde(flatten)]
    pub used: UsagePoint,
    /// Always 0: nobody is charged here.
    pub estimated_cost_cents: u64,
    /// The same by kind: `cpu`, `memory`, `network`.
    pub breakdown: BTreeMap<String, u64>,
}

/// `GET /usage/history`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct UsageHistory {
    /// `hourly`, `daily` or `monthly`.
    pub granularity: String,
    /// Where it begins.
    pub start_date: Timestamp,
    /// Where it ends.
    pub end_date: Timestamp,
    /// Every period, also those in which nothing was used; oldest first.
    pub data: Vec<UsagePoint>,
}

/// What one sandbox used in a time.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SandboxUsage {
    /// Which one.
    pub sandbox_id: SandboxId,
    /// Processor time.
    pub cpu_hours: f64,
    /// Memory in use, times time.
    pub memory_gb_hours: f64,
    /// Sent and received.
    pub network_gb: f64,
}

/// `GET /usage/sandboxes`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SandboxUsageList {
    /// Where it begins.
    pub start_date: Timestamp,
    /// Where it ends.
    pub end_date: Timestamp,
    /// The one with the most processor time first; at most 1000.
    pub sandboxes: Vec<SandboxUsage>,
}
