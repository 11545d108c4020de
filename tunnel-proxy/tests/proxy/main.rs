//! The proxy with real sockets on both sides. The one thing that is not the real one is who makes connections to the
//! programs behind the tunnels: here they run on this machine, and are dialled.

mod access;
mod ends;
mod framing;
mod limits;
mod ports;
mod requests;
mod world;
