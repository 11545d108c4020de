//! Strict HTTP/1.x (RFC 9112), for proxies: a proxy and a server that read the same bytes in two ways are a
//! hole. Owns: where each request begins and ends, and what is malformed. Decides nothing about a request.

pub mod body;
pub mod head;
pub mod strict;
