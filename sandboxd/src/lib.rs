//! What runs as PID 1 in every sandbox: commands and files for the controller, and nothing else.
//!
//! It shares its uid with the code it serves. What it must keep from that code is its key, and nothing more:
//! the host believes no frame from here beyond what concerns this one sandbox. It forwards no connections.

mod changes;
pub mod children;
mod claim;
mod exec;
mod files;
pub mod init;
pub mod key;
mod mark;
mod output;
mod processes;
pub mod server;
mod wire;
