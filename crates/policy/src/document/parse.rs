//! From JSON to [`Policy`]: refuses whatever it does not understand.

mod dns;
mod inside;
mod quotas;

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde_json::Value;

use super::{
    Action, Ech, Enforcement, FailureMode, Mode, Policy, Rule, RuleProtocol,
    fields::{Fields, expected, quote},
    table::{self, MAX_CIDRS, MAX_DOMAINS, MAX_PORTS, MAX_RULE_NAME, MAX_RULES},
};
use crate::{
    error::PolicyError,
    kernel,
    names::{DomainPattern, NameError},
    ports::{PortSet, PortSpan},
    quota,
    tier::Tier,
};

/// The port that always leads to the resolver.
const DNS_PORT: u16 = 53;

/// Entries of all rules together, which bound the work of a decision and of compiling.
const MAX_ALL_DOMAINS: usize = 20_000;
const MAX_ALL_CIDRS: usize = 16_384;
const MAX_ALL_PORTS: usize = 20_000;
const MAX_ALL_REQUESTS: usize = 20_000;
/// Different lists of ports among all rules: the work of compiling grows with them.
const MAX_PORT_LISTS: usize = 256;

pub(super) fn policy(value: &Value) -> Result<Policy, PolicyError> {
    let fields = Fields::of(value, String::new(), table::DOCUMENT)?;
    let Some(mode) = fields.word("mode", Mode::ALL)? else {
        let words: Vec<&str> = Mode::ALL.iter().map(|(word, _)| *word).collect();
        return fields.refuse("mode", format!("is required: one of {}", words.join(", ")));
    };
    let policy = Policy {
        mode,
        allowed_domains: domains(&fields, "allowed_domains")?,
        denied_domains: domains(&fields, "denied_domains")?,
        allowed_cidrs: cidrs(&fields, "allowed_cidrs")?,
        denied_cidrs: cidrs(&fields, "denied_cidrs")?,
        allowed_ports: fields
            .list("allowed_ports", MAX_PORTS, port)?
            .unwrap_or_else(|| vec![443]),
        rules: rules(&fields)?,
        dns: dns::dns(&fields)?,
        quotas: quotas::quotas(&fields)?,
        ech: fields.word("ech", Ech::ALL)?.unwrap_or(Ech::Deny),
        enforcement: fields
            .word("enforcement", Enforcement::ALL)?
            .unwrap_or(Enforcement::Enforce),
        failure_mode: fields
            .word("failure_mode", FailureMode::ALL)?
            .unwrap_or(FailureMode::FailClosed),
    };
    if mode == Mode::DenyAll {
        let lists = [
            ("allowed_domains", policy.allowed_domains.is_empty()),
            ("allowed_cidrs", policy.allowed_cidrs.is_empty()),
        ];
        if let Some((list, _)) = lists.iter().find(|(_, empty)| !empty) {
            return fields.refuse(
                list,
                "must be empty when mode is \"deny_all\", which allows none of it; use mode \"allowlist\"",
            );
        }
    }
    rule_names(&policy.rules)?;
    totals(&policy)?;
    quota::check(&[&policy])?;
    // A document that the kernel cannot hold is refused while its author is there to read why.
    kernel::table(&[Tier::compile(&policy)], &PortSet::default()).map_err(|excess| excess.of(&policy))?;
    Ok(policy)
}

/// Rules that have the same ports share one list of them: there are few different ones.
fn rules(fields: &Fields<'_>) -> Result<Vec<Arc<Rule>>, PolicyError> {
    let mut rules = fields.list("rules", MAX_RULES, rule)?.unwrap_or_default();
    let mut lists: HashSet<Arc<[PortSpan]>> = HashSet::new();
    for ports in rules.iter_mut().filter_map(|rule| rule.ports.as_mut()) {
        match lists.get(ports) {
            Some(known) => *ports = Arc::clone(known),
            None => {
                lists.insert(Arc::clone(ports));
            }
        }
    }
    // Not collected, which would keep the room of the whole rules for their places.
    let mut shared = Vec::with_capacity(rules.len());
    shared.extend(rules.into_iter().map(Arc::new));
    Ok(shared)
}

fn rule(path: String, value: &Value) -> Result<Rule, PolicyError> {
    let fields = Fields::of(value, path, table::RULE)?;
    let Some(action) = fields.word("action", Action::ALL)? else {
        return fields.refuse("action", "is required: \"allow\" or \"deny\"");
    };
    let rule = Rule {
        name: rule_name(&fields)?,
        action,
        protocol: fields
            .word("protocol", RuleProtocol::ALL)?
            .unwrap_or(RuleProtocol::Http),
        domains: domains(&fields, "domains")?,
        cidrs: cidrs(&fields, "cidrs")?.into(),
        ports: fields.list("ports", MAX_PORTS, span)?.map(Arc::from),
        inside: inside::inside(&fields)?.shared(),
    };
    if rule.protocol == RuleProtocol::Udp {
        udp(&fields, &rule)?;
    }
    if rule.domains.is_empty() && rule.cidrs.is_empty() {
        return fields.refuse(
            "domains",
            "a rule needs at least one entry in `domains` or `cidrs`",
        );
    }
    if rule.ports.as_ref().is_some_and(|ports| ports.is_empty()) {
        return fields.refuse("ports", "must not be empty: a rule without ports matches nothing");
    }
    inside::check(&fields, &rule)?;
    Ok(rule)
}

/// UDP shows no name: such a rule goes by address and port, and by nothing else.
fn udp(fields: &Fields<'_>, rule: &Rule) -> Result<(), PolicyError> {
    if !rule.domains.is_empty() {
        return fields.refuse(
            "domains",
            "must be empty with protocol \"udp\", which shows no name: list the destinations in `cidrs`",
        );
    }
    if rule.action == Action::Allow && rule.ports.is_none() {
        return fields.refuse(
            "ports",
            "is required where protocol \"udp\" is allowed: `allowed_ports` are those of TCP",
        );
    }
    if rule.ports.as_deref() == Some(&[PortSpan::one(DNS_PORT)]) {
        return fields.refuse(
            "ports",
            "port 53 is the resolver's, wherever it is sent to: no rule concerns it",
        );
    }
    Ok(())
}

fn rule_name(fields: &Fields<'_>) -> Result<Option<Box<str>>, PolicyError> {
    let Some(value) = fields.get("name") else {
        return Ok(None);
    };
    let plain = |name: &str| {
        !name.is_empty()
            && name.len() <= MAX_RULE_NAME
            && name
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"-_. ".contains(&byte))
            && name.trim() == name
    };
    match value.as_str() {
        Some(name) if plain(name) => Ok(Some(name.into())),
        Some(_) | None => {
            let expectation = "1 to 64 letters, digits, spaces and `-`, `_`, `.`";
            Err(expected(fields.path("name"), expectation, value))
        }
    }
}

/// The audit names rules: two of the same name could not be told apart.
fn rule_names(rules: &[Arc<Rule>]) -> Result<(), PolicyError> {
    let mut seen = HashMap::new();
    for (index, rule) in rules.iter().enumerate() {
        let Some(name) = &rule.name else { continue };
        if let Some(first) = seen.insert(name, index) {
            let message = format!("\"{name}\" is the name of rules[{first}] already");
            return Err(PolicyError::new(format!("rules[{index}].name"), message));
        }
    }
    Ok(())
}

fn totals(policy: &Policy) -> Result<(), PolicyError> {
    let rules = policy.rules.iter();
    let counts = [
        (
            "domains",
            MAX_ALL_DOMAINS,
            rules.clone().map(|rule| rule.domains.len()).sum::<usize>(),
        ),
        (
            "cidrs",
            MAX_ALL_CIDRS,
            rules.clone().map(|rule| rule.cidrs.len()).sum(),
        ),
        (
            "ports",
            MAX_ALL_PORTS,
            rules
                .clone()
                .map(|rule| rule.ports.as_ref().map_or(0, |ports| ports.len()))
                .sum(),
        ),
        (
            "http",
            MAX_ALL_REQUESTS,
            rules
                .flat_map(|rule| &rule.inside.http)
                .map(|entry| 1 + entry.methods().len() + entry.paths().len())
                .sum(),
        ),
    ];
    match counts.iter().find(|(_, limit, count)| count > limit) {
        Some((list, limit, count)) => {
            let message =
                format!("all rules together have {count} entries in `{list}`; the limit is {limit}");
            Err(PolicyError::new("rules", message))
        }
        None => port_lists(&policy.rules),
    }
}

fn port_lists(rules: &[Arc<Rule>]) -> Result<(), PolicyError> {
    let lists: HashSet<&[PortSpan]> = rules.iter().filter_map(|rule| rule.ports.as_deref()).collect();
    if lists.len() > MAX_PORT_LISTS {
        let message = format!(
            "all rules together have {} different lists in `ports`; the limit is {MAX_PORT_LISTS}",
            lists.len()
        );
        return Err(PolicyError::new("rules", message));
    }
    Ok(())
}

fn domains(fields: &Fields<'_>, name: &str) -> Result<Arc<[DomainPattern]>, PolicyError> {
    Ok(match fields.list(name, MAX_DOMAINS, domain)? {
        Some(list) if !list.is_empty() => list.into(),
        // All empty ones are one.
        Some(_) | None => Arc::default(),
    })
}

fn domain(path: String, value: &Value) -> Result<DomainPattern, PolicyError> {
    let Some(text) = value.as_str() else {
        return Err(expected(
            path,
            "a domain such as \"api.example.org\" or \"*.example.org\"",
            value,
        ));
    };
    DomainPattern::parse(text).map_err(|error| {
        let hint = match error {
            NameError::Address => "; addresses belong into the list of CIDRs",
            NameError::Character if text.contains("://") => "; give the host alone, without scheme and path",
            NameError::Character if text.contains(':') => "; give the host alone, ports have their own list",
            NameError::Empty
            | NameError::TooLong
            | NameError::LabelTooLong
            | NameError::EmptyLabel
            | NameError::Character
            | NameError::Idna
            | NameError::Wildcard
            | NameError::PublicSuffix => "",
        };
        PolicyError::new(path, format!("{} {error}{hint}", quote(value)))
    })
}

fn cidrs(fields: &Fields<'_>, name: &str) -> Result<Vec<IpNet>, PolicyError> {
    Ok(fields.list(name, MAX_CIDRS, cidr)?.unwrap_or_default())
}

fn cidr(path: String, value: &Value) -> Result<IpNet, PolicyError> {
    let expectation = "a CIDR such as \"203.0.113.0/24\" or an address";
    let Some(range) = value.as_str().and_then(range) else {
        return Err(expected(path, expectation, value));
    };
    let found = quote(value);
    if range.addr() != range.network() {
        let message = format!(
            "{found} has bits beyond its prefix length; the range is \"{}\"",
            range.trunc()
        );
        return Err(PolicyError::new(path, message));
    }
    match range {
        IpNet::V6(range) if range.prefix_len() >= 96 && range.addr().to_ipv4_mapped().is_some() => {
            Err(PolicyError::new(
                path,
                format!("{found} is an IPv4 address in IPv6 form; write it as IPv4"),
            ))
        }
        IpNet::V4(_) | IpNet::V6(_) => Ok(range),
    }
}

/// A CIDR, or an address for the range of this address alone. Leading zeros and other spellings are refused.
fn range(text: &str) -> Option<IpNet> {
    let (address, length) = match text.split_once('/') {
        Some((address, length)) => (address, Some(length)),
        None => (text, None),
    };
    let length = match length {
        Some(length) => {
            let plain = length.bytes().all(|byte| byte.is_ascii_digit());
            let canonical = length == "0" || !length.starts_with('0');
            Some(length.parse::<u8>().ok().filter(|_| plain && canonical)?)
        }
        None => None,
    };
    match address.parse().ok()? {
        std::net::IpAddr::V4(address) => Some(Ipv4Net::new(address, length.unwrap_or(32)).ok()?.into()),
        std::net::IpAddr::V6(address) => Some(Ipv6Net::new(address, length.unwrap_or(128)).ok()?.into()),
    }
}

fn port(path: String, value: &Value) -> Result<u16, PolicyError> {
    let port = value
        .as_u64()
        .and_then(|port| u16::try_from(port).ok())
        .filter(|port| *port != 0);
    port.ok_or_else(|| expected(path, "a port 1-65535", value))
}

fn span(path: String, value: &Value) -> Result<PortSpan, PolicyError> {
    let span = match value {
        Value::Number(_) => return port(path, value).map(PortSpan::one),
        Value::String(text) => PortSpan::parse(text),
        Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_) => None,
    };
    span.ok_or_else(|| expected(path, "a port 1-65535 or a range such as \"8000-8080\"", value))
}
