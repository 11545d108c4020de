//! Fuzz targets: a function for each thing that reads bytes of strangers, which panics when a law is broken.
//!
//! A law is more than "no panic": that an answer does not depend on how the bytes were cut, that another parser of the
//! same format agrees, that what is written is read as what was meant. `make fuzz` gives each target inputs for some
//! minutes (`src/main.rs`, libFuzzer); the inputs that taught it something are kept in `corpora` and replayed by an
//! ordinary test.

mod bytes;
mod chunks;
mod dns;
mod found;
mod frames;
mod head;
mod hello;
mod host;
mod masked;
mod packet;
mod path;
mod policy;
mod requests;

/// One thing that is fuzzed.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Also the name of its folder of inputs.
    pub name: &'static str,
    /// Longest input worth trying, in bytes.
    pub longest: usize,
    /// Panics when a law is broken.
    pub check: fn(&[u8]),
}

/// All of them.
pub const TARGETS: [Target; 12] = [
    target("hello", 4096, hello::check),
    target("head", 2048, head::check),
    target("requests", 2048, requests::check),
    target("chunks", 1024, chunks::check),
    target("dns", 1200, dns::check),
    target("found", 1232, found::check),
    target("host", 300, host::check),
    target("path", 300, path::check),
    target("policy", 2048, policy::check),
    target("packet", 256, packet::check),
    target("frames", 4096, frames::check),
    target("masked", 512, masked::check),
];

const fn target(name: &'static str, longest: usize, check: fn(&[u8])) -> Target {
    Target { name, longest, check }
}

/// The target of a name.
pub fn target_of(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}
