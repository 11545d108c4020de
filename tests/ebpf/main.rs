//! The wall itself, with a real kernel: crafted packets through the programs, and real traffic between namespaces.
//!
//! Needs root. Without it the tests are skipped, loudly; with `REQUIRE_ROOT=1` that is a failure. Nothing here has a
//! way out: the namespaces have no uplink.

mod adoption;
mod cases;
mod classifier;
mod control;
mod dials;
mod first;
mod fuzz;
mod inbound;
mod ipv6;
mod lab;
mod packet;
mod packet6;
mod pass;
mod passed;
mod pinned;
mod policies;
mod proof;
mod refusal;
mod sockets;
mod steering;
mod to_sandbox;
mod wall6;
mod world;
