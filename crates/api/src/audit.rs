//! The egress audit: one record per flow, DNS denial or aggregate of refused packets.

use std::net::IpAddr;

use jiff::Timestamp;
use sandgate_policy::Reason;
use serde::{Deserialize, Serialize};

use crate::{
    feed::TierName,
    id::{OrgId, SandboxId},
};

/// What was decided.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AuditVerdict {
    /// The flow went through.
    Allow,
    /// It was refused.
    Deny,
    /// It went through although a tier denies it, because that tier is in audit mode.
    Audit,
}

impl AuditVerdict {
    /// As it is spelled.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
            Self::Audit => "audit",
        }
    }
}

macro_rules! alerts {
    ($($(#[doc = $doc:literal])+ $name:ident = $text:literal,)+) => {
        /// Why somebody should look at a record: the kinds of `security.alert`.
        #[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        pub enum AlertKind {
            $($(#[doc = $doc])+ #[serde(rename = $text)] $name,)+
        }

        impl AlertKind {
            /// Every kind.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];

            /// As it is spelled.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)+
                }
            }
        }
    };
}

alerts! {
    /// A quota of the policy is used up.
    QuotaExceeded = "quota_exceeded",
    /// A placeholder was sent to where its secret is not bound.
    PlaceholderMisuse = "placeholder_misuse",
    /// A host sent a secret's value back; it was masked.
    SecretEchoed = "secret_echoed",
    /// A secret could not be had, and what needs it was refused.
    CredentialUnavailable = "credential_unavailable",
    /// More was asked of DNS than the policy's budget allows, as whoever carries data out by names does.
    DnsTunnelling = "dns_tunnelling",
    /// A name was answered with addresses that nobody may reach.
    DnsRebinding = "dns_rebinding",
    /// Packets bore an address that is not the sandbox's.
    SpoofedSource = "spoofed_source",
    /// Many different destinations were refused within a minute.
    Scanning = "scanning",
    /// Many attempts were refused within a minute.
    RepeatedDenials = "repeated_denials",
    /// The audit has no room: flows are refused, or go on without a record.
    AuditFull = "audit_full",
}

/// One decision. Never holds a query string, a body or a secret's value.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AuditEvent {
    /// Unique (UUIDv7 as text): delivery may repeat, the store keeps one.
    pub id: String,
    /// When the flow began, or the first of the aggregated attempts was seen.
    pub time: Timestamp,
    /// Whose sandbox.
    pub org_id: OrgId,
    /// Which sandbox.
    pub sandbox_id: SandboxId,
    /// Allowed, denied, or denied and let through.
    pub verdict: AuditVerdict,
    /// Why.
    #[cfg_attr(feature = "openapi", schema(value_type = crate::openapi::Reason))]
    pub reason: Reason,
    /// The tier that decided.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tier: Option<TierName>,
    /// The rule that decided, in its tier.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
    /// `tls`, `https` (one request inside a flow that is read), `http`, `tcp`, `udp`, `dns`, `icmp` or `ip`.
    pub protocol: String,
    /// The name the flow was for: SNI, Host or queried name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// The destination's address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>))]
    pub ip: Option<IpAddr>,
    /// The destination's port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// The method of a request that was read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub method: Option<String>,
    /// Its canonical path, without the query.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// The name of the secret that went into it; several are separated by commas.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credential: Option<String>,
    /// Bytes from the sandbox.
    #[serde(default)]
    pub bytes_up: u64,
    /// Bytes to the sandbox.
    #[serde(default)]
    pub bytes_down: u64,
    /// How long the flow lasted, in milliseconds.
    #[serde(default)]
    pub duration_ms: u64,
    /// How many attempts this record stands for; at least 1.
    #[serde(default = "one")]
    pub repeated: u64,
    /// What netd adds for people, for example the error of an upstream connect.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// Only in a record that stands for others which found no room.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gap: Option<AuditGap>,
    /// Somebody should look at it: of each kind the first of a sandbox within a minute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alert: Option<AlertKind>,
}

/// What the organisation's chain of records ended with when a gap was stored: the last that is known before it. netd
/// leaves it empty.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditGap {
    /// Position of the record before it; 0: there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub position: Option<i64>,
    /// The hash of the chain there, in hexadecimal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
}

fn one() -> u64 {
    1
}
