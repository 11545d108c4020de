//! The control channels between the programs of one machine: controller and netd, each of them and tunnel-proxy.
//!
//! `controller up` gives both sides one end of a `SOCK_SEQPACKET` socket pair. Its only use is to pass
//! fresh connected sockets (`SCM_RIGHTS`): whoever wants a conversation makes a socket pair, keeps one end
//! and sends the other with an [`Open`] message. A restarted program thus never meets half a message of
//! its predecessor. Every message is one JSON packet of at most [`MAX_PACKET`] bytes.

use serde::{Deserialize, Serialize};

use crate::id::SandboxId;

/// The environment variable that names the inherited descriptor of the control channel: between controller and
/// netd for these two, between controller and tunnel-proxy for tunnel-proxy.
pub const CONTROL_FD_VARIABLE: &str = "SANDGATE_CONTROL_FD";

/// The controller's end of the channel that it shares with tunnel-proxy, which opens feeds on it
/// ([`crate::tunnel`]).
pub const TUNNEL_CONTROL_FD_VARIABLE: &str = "SANDGATE_TUNNEL_CONTROL_FD";

/// Both ends of the channel between tunnel-proxy and netd, on which tunnel-proxy opens dial sockets. It is a
/// channel of its own because other ports may be reached by it: the declared ones, never the agent's.
pub const TUNNEL_DIAL_FD_VARIABLE: &str = "SANDGATE_TUNNEL_DIAL_FD";

/// The listening socket of tunnel-proxy that the supervisor holds.
pub const TUNNEL_LISTENER_FD_VARIABLE: &str = "SANDGATE_TUNNEL_LISTENER_FD";

/// tunnel-proxy's end of the channel to the supervisor, which keeps its further listening sockets while it is
/// away.
pub const TUNNEL_KEEP_FD_VARIABLE: &str = "SANDGATE_TUNNEL_KEEP_FD";

/// Largest packet on the control channel and on a dial socket, in bytes.
pub const MAX_PACKET: usize = 4096;

/// What the attached socket is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "open", rename_all = "snake_case")]
pub enum Open {
    /// netd to controller: a stream socket; netd speaks HTTP/1.1 to [`crate::feed`] on it. One socket
    /// carries the feed itself, another the acknowledgements and audit batches.
    Feed,
    /// Controller to netd: a `SOCK_SEQPACKET` socket that carries [`DialRequest`]s, answered in any order
    /// by [`DialReply`]s with the connected TCP socket attached.
    Dial,
}

/// Asks netd to connect to a port inside a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DialRequest {
    /// Chosen by the caller, repeated in the reply.
    pub request_id: u64,
    /// Whose port.
    pub sandbox_id: SandboxId,
    /// The TCP port inside the sandbox. The controller may ask for the agent port only.
    pub port: u16,
}

/// netd's answer. On success exactly one descriptor is attached: the connected, non-blocking TCP socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DialReply {
    /// Which request.
    pub request_id: u64,
    /// Why there is no descriptor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<DialError>,
}

/// Why netd did not connect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub enum DialError {
    /// netd does not know the sandbox (any more).
    #[error("the node does not know the sandbox")]
    UnknownSandbox,
    /// The port is not one the caller may reach.
    #[error("the port is not open to this caller")]
    PortNotAllowed,
    /// Nothing listens on the port.
    #[error("nothing listens on the port")]
    Refused,
    /// No answer in time.
    #[error("the sandbox did not answer in time")]
    TimedOut,
    /// Anything else; netd's log has it.
    #[error("the node could not connect")]
    Failed,
}
