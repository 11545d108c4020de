//! The warm pool.

use serde::{Deserialize, Serialize};

/// `GET /pool/stats`. Published clients need the first three.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct PoolStats {
    /// Sandboxes that nobody has asked for yet, ready or on their way.
    pub total: u32,
    /// Those of them that a creation could take now.
    pub ready: u32,
    /// Those of them that are being made.
    pub creating: u32,
    /// Whether this installation keeps a pool at all.
    pub enabled: bool,
    /// Most sandboxes it keeps.
    pub size: u32,
    /// Creations of the caller's organisation that took a sandbox from the pool, since the controller's start.
    pub hits: u64,
    /// Its creations that had to be made from nothing.
    pub misses: u64,
    /// `hits` of all its creations, 0 to 1; 0 while there was none.
    pub hit_rate: f64,
}
