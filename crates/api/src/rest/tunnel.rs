//! Tunnels.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{
    id::{SandboxId, TunnelId},
    tunnel::TunnelProtocol,
};

/// Element of `GET /sandbox/:id/tunnels`; the answer to `POST /sandbox/:id/tunnels`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tunnel {
    /// Its id.
    pub tunnel_id: TunnelId,
    /// Where it leads.
    pub sandbox_id: SandboxId,
    /// The TCP port inside.
    pub port: u16,
    /// What is spoken on it.
    pub protocol: TunnelProtocol,
    /// Where clients reach it, as it is.
    pub url: String,
    /// The same by host name, where `url` is a loopback port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_url: Option<String>,
    /// Whoever reaches it may use it.
    pub public: bool,
    /// Opens it. In the answer to its creation only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
    /// When it was made.
    pub created_at: Timestamp,
    /// When it ends by itself; it ends with its sandbox in any case.
    pub expires_at: Timestamp,
}

/// `GET /sandbox/:id/tunnels`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelList {
    /// Those that are open, oldest first.
    pub tunnels: Vec<Tunnel>,
}
