//! Why a flow was allowed or denied: the words of the audit, part of the published contract.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $name:ident = $text:literal,)+) => {
        /// Why a flow, a query or a packet was allowed or denied.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        pub enum Reason {
            $($(#[doc = $doc])+ #[serde(rename = $text)] $name,)+
        }

        impl Reason {
            /// Every reason, in the order of the contract.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];

            /// The reason as the contract spells it.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)+
                }
            }

            /// The reason that the contract spells so.
            pub fn from_code(code: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|reason| reason.as_str() == code)
            }
        }
    };
}

reasons! {
    /// Every tier allows it.
    Allowed = "allowed",
    /// No rule allows it, and the mode denies what no rule mentions.
    DefaultDeny = "default_deny",
    /// A rule or a deny list names it.
    DeniedByRule = "denied_by_rule",
    /// The destination is one that nobody may reach: private ranges, metadata services, the node itself.
    PlatformDenied = "platform_denied",
    /// The packet's source is not the sandbox's address.
    SpoofedSource = "spoofed_source",
    /// The packet came from an interface that belongs to no sandbox.
    UnknownSandbox = "unknown_sandbox",
    /// The packet is a fragment.
    Fragment = "fragment",
    /// The protocol is not one that can be allowed.
    ProtocolDenied = "protocol_denied",
    /// The mode would allow the destination, but not on this port.
    PortDenied = "port_denied",
    /// The name is not one that any rule allows.
    NameDenied = "name_denied",
    /// The flow must show a name (SNI or Host) and shows none.
    NoName = "no_name",
    /// The name may be allowed, but this sandbox did not get the address by asking for it.
    AddressNotBound = "address_not_bound",
    /// The names that one flow shows disagree.
    HostMismatch = "host_mismatch",
    /// The flow is neither well-formed TLS nor well-formed HTTP where it must be.
    Malformed = "malformed",
    /// The ClientHello hides its name.
    Ech = "ech",
    /// The HTTP method is not allowed.
    MethodDenied = "method_denied",
    /// The HTTP path is not allowed.
    PathDenied = "path_denied",
    /// A placeholder was sent to where its secret is not bound.
    PlaceholderMisuse = "placeholder_misuse",
    /// The secret for the flow could not be had.
    CredentialUnavailable = "credential_unavailable",
    /// The server's certificate is not valid.
    UpstreamTls = "upstream_tls",
    /// The server could not be reached.
    UpstreamUnreachable = "upstream_unreachable",
    /// The policy can allow nothing under the queried name.
    DnsRefused = "dns_refused",
    /// The query is of a type that is not answered.
    DnsType = "dns_type",
    /// Every answer was a private or otherwise denied address.
    DnsRebinding = "dns_rebinding",
    /// Too many queries, or too much in them.
    DnsBudget = "dns_budget",
    /// A limit of the sandbox is reached.
    Quota = "quota",
    /// The flow was open when the policy stopped allowing it.
    PolicyTightened = "policy_tightened",
}

impl fmt::Display for Reason {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_on_the_wire_is_the_code_in_text() {
        for reason in Reason::ALL {
            let wire = serde_json::to_value(reason).unwrap();
            assert_eq!(wire, serde_json::Value::from(reason.as_str()));
            assert_eq!(serde_json::from_value::<Reason>(wire).unwrap(), *reason);
            assert_eq!(Reason::from_code(reason.as_str()), Some(*reason));
        }
        assert_eq!(Reason::from_code("Allowed"), None);
    }
}
