//! The tunnel feed: how the controller tells tunnel-proxy which URLs lead where.
//!
//! `GET /tunnels/feed?since=<revision>` answers an endless NDJSON body of [`TunnelFrame`]s, as
//! [`crate::feed`] does for a node: a snapshot when `since` is absent or unknown, then deltas, and a
//! heartbeat every [`crate::feed::HEARTBEAT_SECONDS`]. After applying a frame tunnel-proxy sends
//! `POST /tunnels/ack` with a [`TunnelAck`]. tunnel-proxy faces strangers, so nothing here is a secret: of a
//! token it learns the digest.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{
    feed::Revision,
    id::{SandboxId, TunnelId},
};

/// One line of the tunnel feed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum TunnelFrame {
    /// Every route. What is not listed does not exist any more.
    Snapshot {
        /// The state's revision.
        revision: Revision,
        /// The routes.
        routes: Vec<Route>,
    },
    /// What changed since the frame before.
    Delta {
        /// The state's revision after this frame.
        revision: Revision,
        /// New and changed routes, whole.
        #[serde(default)]
        upserts: Vec<Route>,
        /// Routes that are gone: their connections are cut.
        #[serde(default)]
        removed: Vec<TunnelId>,
    },
    /// Nothing new; the line is alive.
    Heartbeat {
        /// The state's revision.
        revision: Revision,
    },
}

/// One tunnel, as it is served.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Which one.
    pub tunnel_id: TunnelId,
    /// Where it leads.
    pub sandbox_id: SandboxId,
    /// The TCP port inside the sandbox.
    pub port: u16,
    /// What is spoken on it.
    pub protocol: TunnelProtocol,
    /// Who may use it.
    pub access: Access,
    /// From then on it answers 410 and lets nothing through. It stays on the feed for a while, so that it can
    /// say so.
    pub expires_at: Timestamp,
    /// The loopback port that it was given before and should have again; none yet when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local_port: Option<u16>,
}

/// What is spoken on a tunnel's port.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TunnelProtocol {
    /// HTTP/1.1, with WebSocket and server-sent events. By host name and on the loopback port.
    Http,
    /// HTTP/2 with prior knowledge inside (gRPC). By host name and on the loopback port.
    H2c,
    /// Bytes. On the loopback port only.
    Tcp,
}

impl TunnelProtocol {
    /// The word on the wire and in the store.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::H2c => "h2c",
            Self::Tcp => "tcp",
        }
    }
}

/// Who may use a tunnel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "access", rename_all = "snake_case")]
pub enum Access {
    /// Anybody who reaches it.
    Public,
    /// Whoever shows the token, in `Authorization: Bearer` or `X-Tunnel-Token`.
    Token {
        /// SHA-256 of the token's text, in lower-case hexadecimal. A token holds 256 random bits, so a plain
        /// digest is enough.
        sha256: String,
    },
}

/// `POST /tunnels/ack`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelAck {
    /// Everything up to and including this revision is served, but for `errors`; what was removed is cut.
    pub revision: Revision,
    /// Every loopback port that is listened on for a tunnel.
    #[serde(default)]
    pub listening: Vec<Listening>,
    /// Tunnels that cannot be served as asked.
    #[serde(default)]
    pub errors: Vec<TunnelError>,
}

/// A tunnel's own port on the loopback address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listening {
    /// Which tunnel.
    pub tunnel_id: TunnelId,
    /// The port on 127.0.0.1.
    pub local_port: u16,
}

/// A tunnel that cannot be served.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelError {
    /// Which one.
    pub tunnel_id: TunnelId,
    /// Why, for the log and the API answer.
    pub message: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_reads_as_documented() {
        let text = r#"{"type":"delta","revision":7,"upserts":[{"tunnel_id":"tunnel-1","sandbox_id":"sandbox-1",
            "port":3000,"protocol":"http","access":{"access":"token","sha256":"00"},
            "expires_at":"2026-01-01T00:00:00Z","unknown":1}]}"#;
        let frame: TunnelFrame = serde_json::from_str(text).expect("a frame");
        let TunnelFrame::Delta {
            revision,
            upserts,
            removed,
        } = frame
        else {
            panic!("a delta: {frame:?}")
        };
        assert_eq!((revision, removed.len()), (7, 0));
        assert_eq!(upserts[0].port, 3000);
        assert_eq!(upserts[0].local_port, None);
        assert_eq!(
            upserts[0].access,
            Access::Token {
                sha256: "00".to_owned()
            }
        );
    }
}
