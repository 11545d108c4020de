//! A record in a sentence.

use sandgate_api::{
    audit::{AuditEvent, AuditVerdict},
    feed::TierName,
};
use sandgate_policy::{Quota, Reason};

/// What was tried, how it ended and why.
pub(super) fn sentence(event: &AuditEvent) -> String {
    let what = what(event);
    let times = match event.repeated {
        0 | 1 => String::new(),
        times => format!(" ({times} times)"),
    };
    let how = match event.verdict {
        AuditVerdict::Allow => "went through",
        AuditVerdict::Deny => "was refused",
        AuditVerdict::Audit => "went through, although a tier in audit mode denies it",
    };
    let by = match (&event.tier, &event.rule) {
        (Some(tier), Some(rule)) => format!(" (`{rule}` of the policy of the {})", tier_word(*tier)),
        (Some(tier), None) => format!(" (the policy of the {})", tier_word(*tier)),
        (None, Some(rule)) => format!(" (`{rule}`)"),
        (None, None) => String::new(),
    };
    let detail = event
        .detail
        .as_ref()
        .map(|detail| format!(": {detail}"))
        .unwrap_or_default();
    format!("{what}{times} {how}: {}{by}{detail}.", why(event.reason))
}

/// A tier, as people call it.
pub(super) fn tier_word(tier: TierName) -> &'static str {
    match tier {
        TierName::Platform => "platform",
        TierName::Organization => "organization",
        TierName::Template => "template",
        TierName::Sandbox => "sandbox",
    }
}

/// What would let more of what a quota counts go through: how much is used, only the node knows.
pub(super) fn quota(tier: TierName, quota: Quota, limit: Option<u64>) -> String {
    let tier = tier_word(tier);
    match limit {
        Some(limit) => format!(
            "The policy of the {tier} says {limit} in `{}` now; a higher one, or none, lets more through.",
            quota.path()
        ),
        None => format!("The policy of the {tier} has no such quota any more."),
    }
}

fn what(event: &AuditEvent) -> String {
    let host = event.host.as_deref();
    let address = event.ip.map(|ip| ip.to_string());
    let place = match (host, &address, event.port) {
        (Some(host), Some(ip), Some(port)) => format!("`{host}` ({ip}) on port {port}"),
        (Some(host), _, Some(port)) => format!("`{host}` on port {port}"),
        (Some(host), _, None) => format!("`{host}`"),
        (None, Some(ip), Some(port)) => format!("{ip} on port {port}"),
        (None, Some(ip), None) => ip.clone(),
        (None, None, _) => "an unknown place".to_owned(),
    };
    match (event.protocol.as_str(), &event.method, &event.path) {
        (_, Some(method), Some(path)) => format!("The request `{method} {path}` to {place}"),
        ("dns", _, _) => format!("The DNS question for {place}"),
        ("udp", _, _) => format!("A datagram to {place}"),
        ("icmp" | "ip", _, _) => format!("A packet to {place}"),
        (protocol, _, _) => format!("A connection ({protocol}) to {place}"),
    }
}

/// Why, as the second half of a sentence.
fn why(reason: Reason) -> &'static str {
    match reason {
        Reason::Allowed => "every tier allows it",
        Reason::DefaultDeny => "nothing in the policy allows it",
        Reason::DeniedByRule => "a rule or a deny list names it",
        Reason::PlatformDenied => "nobody may reach this destination, whatever policies say",
        Reason::SpoofedSource => "the packet's source was not the sandbox's address",
        Reason::UnknownSandbox => "it came from an interface of no sandbox",
        Reason::Fragment => "it was a fragment",
        Reason::ProtocolDenied => "no rule mentions this protocol",
        Reason::PortDenied => "the port is not open to it",
        Reason::NameDenied => "the policy allows no such name",
        Reason::NoName => "it must show a name (SNI or Host) and showed none",
        Reason::AddressNotBound => "the sandbox did not get this address by asking DNS for the name",
        Reason::HostMismatch => "the names that it showed disagree",
        Reason::Malformed => "it was neither well-formed TLS nor well-formed HTTP",
        Reason::Ech => "its ClientHello hides the name",
        Reason::MethodDenied => "the rule does not list the method",
        Reason::PathDenied => "the rule does not list the path",
        Reason::PlaceholderMisuse => "it carried a placeholder to where the secret is not bound",
        Reason::CredentialUnavailable => "the secret that it needs could not be had",
        Reason::UpstreamTls => "the server's certificate is not valid",
        Reason::UpstreamUnreachable => "the server could not be reached",
        Reason::DnsRefused => "the policy can allow nothing under this name",
        Reason::DnsType => "questions of this type are not answered",
        Reason::DnsRebinding => "every answer was an address that nobody may reach",
        Reason::DnsBudget => "it was beyond what may be asked of DNS",
        Reason::Quota => "a limit of the sandbox was reached",
        Reason::PolicyTightened => "the policy stopped allowing it while it was open",
    }
}
