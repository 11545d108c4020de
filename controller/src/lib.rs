//! API and control plane of Sandgate.
//!
//! | module | what it owns |
//! |---|---|
//! | [`api`] | HTTP: routes, documents, statuses |
//! | [`service`] | use cases |
//! | [`lifecycle`] | the life of a sandbox, pure |
//! | [`pool`] | how many sandboxes are made in advance, and when, pure |
//! | [`store`] | what must survive |
//! | [`backend`] | where sandboxes run |
//! | [`node`] | the feed to netd, and the way into sandboxes |
//! | [`ingress`] | the feed to tunnel-proxy |
//! | [`agent`] | the host side of the agent protocol |
//! | [`spec`] | what a sandbox may use |
//! | [`binding`], [`presets`], [`placeholder`] | what secrets and their bindings look like, pure |
//! | [`vault`], [`authority`], [`installation`] | keys: sealing secrets, sandboxes' certificate authorities |
//! | [`chain`], [`ledger`] | what makes the audit tamper-evident |
//! | [`places`] | what organisations may have at once, so that none takes it all |
//! | [`alerts`] | which audit records somebody should look at, pure |
//! | [`broker`] | what a node gets on demand |
//! | [`up`], [`down`], [`app`], [`verify`] | the commands |
//!
//! A request goes down this list and never up: `api` knows no SQL, `service` no HTTP, `store` and `backend`
//! not each other.

pub mod agent;
pub mod alerts;
pub mod api;
pub mod app;
pub mod authority;
pub mod backend;
pub mod binding;
pub mod broker;
pub mod chain;
pub mod config;
pub mod down;
mod feedsocket;
pub mod ingress;
pub mod installation;
pub mod invite;
pub mod jwt;
pub mod keyfile;
pub mod ledger;
pub mod lifecycle;
pub mod limiter;
pub mod metrics;
pub mod node;
pub mod placeholder;
pub mod places;
pub mod pool;
pub mod presets;
pub mod service;
pub mod spec;
pub mod store;
pub mod template;
pub mod terms;
pub mod up;
pub mod vault;
pub mod verify;
