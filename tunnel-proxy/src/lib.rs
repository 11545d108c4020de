//! Public URLs of sandboxes' ports: a client's connection in, a request or bytes to the port of one sandbox out.
//!
//! A connection comes in by a listener ([`listeners`]), is served until it ends ([`connection`]); each request finds its
//! tunnel by host ([`mod@host`], [`routes`]), shows that it may use it ([`access`]), and goes on ([`forward`]) over a
//! connection that netd made ([`upstream`]).
//!
//! | module | owns |
//! |---|---|
//! | [`config`], [`privileges`] | what it runs with, and that it may nothing |
//! | [`app`] | the order in which the parts begin and end |
//! | [`feed`] | following the controller, and the state across restarts |
//! | [`routes`], [`tunnel`] | what is served, and the end of it |
//! | [`listeners`], [`connection`] | clients' connections and their limits |
//! | [`mod@host`], [`access`] | whose a request is, and whether it may |
//! | [`forward`], [`raw`] | requests and bytes on their way |
//! | [`upstream`] | connections into sandboxes |
//! | [`answer`], [`account`], [`metrics`] | what is answered in a program's place, what is recorded and counted |

pub mod access;
pub mod account;
pub mod answer;
pub mod app;
pub mod config;
pub mod connection;
pub mod feed;
pub mod forward;
pub mod host;
pub mod listeners;
pub mod metrics;
pub mod privileges;
pub mod raw;
pub mod routes;
pub mod tunnel;
pub mod upstream;
