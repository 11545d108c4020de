//! The node daemon: enforces every sandbox's egress on this node and records every decision.
//!
//! A packet's journey: the kernel programs ([`kernel`]) check its source, deny, or steer it to a socket of
//! ours in the router namespace ([`router`], [`sockets`]). DNS queries are answered by [`dns`], whose answers
//! alone open addresses under a name ([`pins`]). TCP connections are read ([`egress::sniff`]), judged by the
//! sandbox's rules ([`sandbox`]), dialled ([`egress::dial`]) and copied, or their requests are read and judged
//! one by one ([`intercept`]); every one ends in [`audit`].
//! What is in force comes from the controller ([`control`], [`feed`], [`node`]).

pub mod app;
pub mod audit;
pub mod canary;
pub mod command;
pub mod config;
pub mod control;
pub mod dial;
pub mod dns;
pub mod egress;
pub mod feed;
pub mod guard;
pub mod intercept;
pub mod kernel;
pub mod memory;
pub mod metrics;
pub mod node;
pub mod nodeaddr;
pub mod pins;
pub mod privileges;
pub mod router;
pub mod sandbox;
pub mod sockets;
pub mod uplink;
