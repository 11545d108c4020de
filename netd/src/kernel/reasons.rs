//! The kernel's codes and the policy's words: reasons, both ways, and protocols.

use netd_common::reason as code;
use sandgate_policy::{Protocol, Reason};

/// IP protocol number.
pub(super) fn protocol_number(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => 6,
        Protocol::Udp => 17,
    }
}

/// The code of a reason that a kernel table may hold; `None` for reasons that need more than an address and a port.
pub(super) fn to_code(reason: Reason) -> Option<u8> {
    match reason {
        Reason::DefaultDeny => Some(code::DEFAULT_DENY),
        Reason::DeniedByRule => Some(code::DENIED_BY_RULE),
        Reason::PlatformDenied => Some(code::PLATFORM_DENIED),
        Reason::SpoofedSource => Some(code::SPOOFED_SOURCE),
        Reason::UnknownSandbox => Some(code::UNKNOWN_SANDBOX),
        Reason::Fragment => Some(code::FRAGMENT),
        Reason::ProtocolDenied => Some(code::PROTOCOL_DENIED),
        Reason::PortDenied => Some(code::PORT_DENIED),
        Reason::NameDenied => Some(code::NAME_DENIED),
        Reason::NoName => Some(code::NO_NAME),
        Reason::AddressNotBound => Some(code::ADDRESS_NOT_BOUND),
        Reason::Malformed => Some(code::MALFORMED),
        Reason::Quota => Some(code::QUOTA),
        Reason::UpstreamUnreachable => Some(code::NO_LISTENER),
        Reason::Allowed
        | Reason::HostMismatch
        | Reason::Ech
        | Reason::MethodDenied
        | Reason::PathDenied
        | Reason::PlaceholderMisuse
        | Reason::CredentialUnavailable
        | Reason::UpstreamTls
        | Reason::DnsRefused
        | Reason::DnsType
        | Reason::DnsRebinding
        | Reason::DnsBudget
        | Reason::PolicyTightened => None,
    }
}

/// The reason of a code. A code that we never gave the kernel reads as a malformed packet.
pub(super) fn from_code(value: u8) -> Reason {
    match value {
        code::DEFAULT_DENY => Reason::DefaultDeny,
        code::DENIED_BY_RULE => Reason::DeniedByRule,
        code::PLATFORM_DENIED => Reason::PlatformDenied,
        code::SPOOFED_SOURCE => Reason::SpoofedSource,
        code::UNKNOWN_SANDBOX => Reason::UnknownSandbox,
        code::FRAGMENT => Reason::Fragment,
        code::PROTOCOL_DENIED => Reason::ProtocolDenied,
        code::PORT_DENIED => Reason::PortDenied,
        code::NAME_DENIED => Reason::NameDenied,
        code::NO_NAME => Reason::NoName,
        code::ADDRESS_NOT_BOUND => Reason::AddressNotBound,
        code::QUOTA => Reason::Quota,
        code::NO_LISTENER => Reason::UpstreamUnreachable,
        _ => Reason::Malformed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_and_reasons_agree_both_ways() {
        for reason in Reason::ALL {
            if let Some(code) = to_code(*reason) {
                assert!(usize::from(code) < code::COUNT);
                assert_eq!(from_code(code), *reason);
            }
        }
        for code in 1..=code::NO_LISTENER {
            assert_eq!(to_code(from_code(code)), Some(code));
        }
    }
}
