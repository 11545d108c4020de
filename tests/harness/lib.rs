//! The test world: a machine ("node") and an internet of its own in namespaces without uplink.
//!
//! | module | holds |
//! |---|---|
//! | [`world`] | the builder: node, internet, the link between them |
//! | [`namespace`] | a namespace and the thread that lives in it |
//! | [`dns`], [`ca`], [`web`], [`collector`] | the internet's servers; each records what reaches it |
//! | [`mirror`] | servers that keep every request whole and answer as they are told |
//! | [`capture`] | every packet on the link: the judge of what got out |
//! | [`node`] | the built programs running on the node |
//! | [`client`], [`sandbox`] | the API as tests use it |
//! | [`tunnel`] | a tunnel's URL as a client uses it |
//! | [`probe`] | network attempts made from inside a sandbox, and how they ended |
//! | [`snapshot`], [`bpf`] | everything that exists because of an instance, to compare two moments |
//! | [`pressure`] | file systems without room, and memory that runs out |
//! | [`search`] | where a secret could be found, in any usual form |
//! | [`suite`] | a test runner whose groups share a world |
//! | [`wait`] | waiting for a condition |
//!
//! Nothing here can reach a real network: [`world::Builder::build`] makes sure of it.

pub mod bpf;
pub mod ca;
pub mod capture;
pub mod client;
pub mod collector;
pub mod dns;
pub mod mirror;
pub mod namespace;
pub mod node;
pub mod openmetrics;
pub mod pressure;
pub mod probe;
pub mod sandbox;
pub mod search;
pub mod snapshot;
pub mod suite;
pub mod tunnel;
pub mod wait;
pub mod web;
pub mod world;

/// What the mutex holds, also after a panic of another test's thread: what it says then is told, not trusted.
fn lock<T>(value: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    value.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
