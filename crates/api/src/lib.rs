//! Every type that crosses a process boundary, and nothing else.
//!
//! | module | spoken between |
//! |---|---|
//! | [`rest`] | published clients and the controller |
//! | [`feed`] | controller and netd: which sandboxes live on a node and what they may do |
//! | [`credential`] | controller and netd: what is injected where, leases on values |
//! | [`control`] | controller and netd: descriptor passing, connections into a sandbox |
//! | [`tunnel`] | controller and tunnel-proxy: which URLs lead where |
//! | [`agent`] | controller and `sandboxd` inside a sandbox |
//! | [`audit`] | netd, the controller and clients: one record per egress decision |
//!
//! Types that travel between our own programs tolerate unknown fields, so that a frame a year old still
//! parses; documents written by users do not, so that a misspelt field is an error and not a hole.

pub mod agent;
pub mod audit;
pub mod control;
pub mod credential;
pub mod error;
pub mod feed;
pub mod id;
#[cfg(feature = "openapi")]
pub mod openapi;
pub mod rest;
pub mod tunnel;
