//! The local backend with a real runtime, real images, real limits. Needs root, runc and the default image
//! (`make setup`). No namespace made here has an uplink; no netd runs, so nothing filters the veths.

#![expect(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test fails by panicking and says why"
)]

mod ipv6;
mod isolation;
mod lifecycle;
mod limits;
mod running;
mod trust;
mod world;
