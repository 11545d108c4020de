//! Proxy mechanics that two programs need. Knows no policy beyond the platform's forbidden ranges and no
//! audit: it moves bytes and opens connections, its callers decide and record.
//!
//! | module | owns |
//! |---|---|
//! | [`allowance`] | how many bytes may go, over all streams that share it |
//! | [`copy`] | the two-way streaming copy: half-close, idle limit, byte counts, being cut |
//! | [`dial`] | the guarded dialer: it never connects to an address the platform forbids |
//! | [`encoded`] | decoding compressed bodies piece by piece, without unbounded output |
//! | [`headers`] | what is taken out of headers and queries on their way through |
//! | [`http1`] | strict framing of HTTP/1.x requests |
//! | [`inward`] | connections into sandboxes: netd makes them and passes them back |
//! | [`redact`] | masking secrets in streams, in every spelling, across chunk borders |
//! | [`splice`] | the two-way copy between TCP connections whose bulk stays in the kernel |
//! | [`websocket`] | the same inside the frames of a WebSocket |

pub mod allowance;
pub mod copy;
pub mod dial;
pub mod encoded;
pub mod headers;
pub mod http1;
pub mod inward;
pub mod redact;
pub mod splice;
pub mod websocket;
