//! What a sandbox may do on the network: the policy document, its compiled form, and the decision.
//!
//! This crate is the only place that decides. The controller uses it to validate and explain, the node to enforce, so
//! that the two can never disagree. It owns the document's syntax ([`Policy`]), the canonical form of names
//! ([`DomainName`]), the ranges that nobody may reach ([`Platform`]) and the decision over all tiers
//! ([`SandboxPolicy`]), both for one flow and as the table that the kernel looks up ([`KernelTable`]).
//!
//! It never does I/O, never resolves a name, never looks at a clock, and never accepts a document that it cannot
//! decide by: whatever is not understood is refused with the path of the field ([`PolicyError`]).
//!
//! The invariant: a flow passes only if the platform and every tier allow it, and the kernel's answer for an address
//! and a port is one that [`SandboxPolicy::decide`] can give for some name.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod address;
mod decide;
mod dns;
mod document;
mod error;
mod kernel;
mod names;
mod path;
mod platform;
mod ports;
mod quota;
#[cfg(test)]
mod random;
mod range6;
mod reason;
mod request;
mod tier;

pub use address::faces;
pub use decide::{BoundHost, Flow, Protocol, SandboxPolicy, Verdict};
pub use dns::{DnsBudget, DnsType, DnsTypes};
pub use document::{Action, Ech, Enforcement, FailureMode, Mode, Policy, Rule, RuleProtocol, Tls};
pub use error::PolicyError;
pub use kernel::{KernelAction, KernelTable, MAX_PREFIXES, MAX_RANGES, PortRange, PrefixEntry};
pub use names::{DomainName, DomainPattern, NameError};
pub use path::{NormalPath, PathError, PathPattern, PathPatternError};
pub use platform::{
    DeniedRangeError, DeniedRanges, ExceptionError, Platform, PrivateException, always_denied4,
    always_denied6,
};
pub use quota::{Quota, Quotas};
pub use range6::{InvalidRange6, Range6};
pub use reason::Reason;
pub use request::{RequestHead, RequestPattern};
