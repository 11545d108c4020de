//! Proxy mechanics that two programs need. Knows no policy beyond the platform's forbidden ranges and no
//! audit: it moves bytes and opens connections, its callers decide and record.
//!
//! | module | owns |
//! |---|---|
//! | [`copy`] | the two-way streaming copy: half-close, idle limit, byte counts, being cut |
//! | [`dial`] | the guarded dialer: it never connects to an address the platform forbids |

pub mod copy;
pub mod dial;
