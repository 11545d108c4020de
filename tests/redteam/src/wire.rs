//! Messages as no well-behaved program writes them, and as the well-behaved do, byte by byte.

pub mod dns;
pub mod http2;
pub mod packet;
pub mod tls;
