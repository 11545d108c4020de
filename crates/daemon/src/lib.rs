//! The edges of a long-running process, the same in every program: logs, signals, drain, readiness,
//! supervised tasks, metrics, inherited and kept descriptors. Knows no word of the product.

pub mod handover;
pub mod keep;
#[cfg(feature = "metrics")]
pub mod metrics;
pub mod readiness;
pub mod signal;
pub mod tasks;
pub mod telemetry;
