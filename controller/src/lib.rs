//! API and control plane of Sandgate.

pub mod agent;
pub mod backend;
