//! Random policies, and everything that the laws ask of them: for tests.

use std::net::{IpAddr, SocketAddr};

use proptest::{collection::vec, prelude::*, sample::select};
use serde_json::{Value, json};

use crate::{
    BoundHost, DomainName, DomainPattern, Flow, NormalPath, Platform, Policy, Protocol, SandboxPolicy,
    Verdict,
};

pub(crate) const NAMES: [&str; 5] = [
    "wild.test",
    "a.wild.test",
    "b.a.wild.test",
    "evil.test",
    "other.test",
];
pub(crate) const PATTERNS: [&str; 6] = [
    "*",
    "wild.test",
    "*.wild.test",
    "*.a.wild.test",
    "evil.test",
    "a.wild.test",
];
pub(crate) const RANGES: [&str; 15] = [
    "::/0",
    "2001:db8::/32",
    "2001:db8:0:5::/64",
    "2001:db8:0:5::5/128",
    "2002::/16",
    "64:ff9b::/64",
    "0.0.0.0/0",
    "203.0.0.0/16",
    "203.0.113.0/24",
    "203.0.113.0/25",
    "203.0.113.64/26",
    "203.0.113.5/32",
    "203.0.113.6/31",
    "198.51.100.0/24",
    "198.51.100.128/25",
];
pub(crate) const SPANS: [&str; 8] = [
    "22",
    "80",
    "443",
    "442-444",
    "1-1024",
    "8000-8080",
    "1-65535",
    "443-8010",
];
pub(crate) const ADDRESSES: [&str; 18] = [
    "2001:db8:0:5::5",
    "2001:db8:0:5::6",
    "2001:db8::1",
    "2606:4700::1111",
    "2002:cb00:7105::1",
    "64:ff9b::203.0.113.5",
    "::203.0.113.70",
    "::ffff:0:198.51.100.1",
    "2001:0:cb00:7105::1",
    "203.0.113.5",
    "203.0.113.6",
    "203.0.113.7",
    "203.0.113.70",
    "203.0.113.200",
    "203.0.1.1",
    "198.51.100.1",
    "198.51.100.200",
    "192.0.2.9",
];
pub(crate) const PORTS: [u16; 12] = [1, 22, 23, 80, 442, 443, 444, 1024, 1025, 8000, 8080, 65535];

/// What a random policy may hold.
#[derive(Clone, Copy)]
pub(crate) struct Parts {
    pub(crate) deny_names: bool,
    pub(crate) allow_ranges: bool,
    pub(crate) tcp: bool,
    pub(crate) inside: bool,
    pub(crate) udp: bool,
    pub(crate) audit: bool,
}

pub(crate) const ALL: Parts = Parts {
    deny_names: true,
    allow_ranges: true,
    tcp: true,
    inside: true,
    udp: true,
    audit: false,
};

pub(crate) fn some(
    from: &'static [&'static str],
    at_most: usize,
) -> impl Strategy<Value = Vec<&'static str>> {
    vec(select(from), 0..=at_most)
}

/// What a rule may ask of requests.
pub(crate) fn any_inside() -> impl Strategy<Value = Value> {
    let methods = vec(select(vec!["GET", "POST"]), 0..2);
    let paths = vec(select(vec!["/", "/a/*", "/a/**"]), 0..2);
    let entry = (methods, paths, any::<bool>()).prop_map(
        |(methods, paths, upgrade)| json!({"methods": methods, "paths": paths, "upgrade": upgrade}),
    );
    prop_oneof![
        3 => Just(json!({})),
        3 => vec(entry, 1..3).prop_map(|entries| json!({"http": entries})),
        1 => Just(json!({"tls": "intercept"})),
        1 => Just(json!({"tls": "splice"})),
        1 => Just(json!({"credential": "KEY"})),
    ]
}

pub(crate) fn any_rule(parts: Parts) -> impl Strategy<Value = Value> {
    let rule = any_plain_rule(parts);
    (rule, any_inside()).prop_map(move |(mut rule, inside)| {
        let readable = rule["action"] == "allow" && rule["protocol"] == "http" && rule["cidrs"] == json!([]);
        if parts.inside && readable {
            let inside = inside.as_object().expect("an object").clone();
            rule.as_object_mut().expect("an object").extend(inside);
        }
        rule
    })
}

pub(crate) fn any_plain_rule(parts: Parts) -> impl Strategy<Value = Value> {
    (
        any::<bool>(),
        select(vec!["http", "http", "tcp", "tcp", "udp"]),
        some(&PATTERNS, 2),
        some(&RANGES, 2),
        some(&SPANS, 2),
    )
        .prop_filter_map(
            "a rule without destination",
            move |(allow, protocol, domains, cidrs, ports)| {
                let protocol = match protocol {
                    "tcp" if !parts.tcp => "http",
                    "udp" if !parts.udp => "http",
                    other => other,
                };
                let domains = if (allow || parts.deny_names) && protocol != "udp" {
                    domains
                } else {
                    Vec::new()
                };
                let cidrs = if !allow || parts.allow_ranges || protocol == "udp" {
                    cidrs
                } else {
                    Vec::new()
                };
                let mut rule = json!({
                    "action": if allow { "allow" } else { "deny" },
                    "protocol": protocol,
                    "domains": domains,
                    "cidrs": cidrs,
                });
                if !ports.is_empty() {
                    rule["ports"] = json!(ports);
                } else if protocol == "udp" && allow {
                    rule["ports"] = json!(["1-65535"]);
                }
                (!domains.is_empty() || !cidrs.is_empty()).then_some(rule)
            },
        )
}

pub(crate) fn any_policy(parts: Parts) -> impl Strategy<Value = Policy> {
    let lists = (
        some(&PATTERNS, 2),
        some(&PATTERNS, 1),
        some(&RANGES, 2),
        some(&RANGES, 1),
    );
    let modes = select(vec!["allow_all", "deny_all", "allowlist", "denylist"]);
    let ports = vec(select(&PORTS[..]), 0..4);
    let rules = vec(any_rule(parts), 0..6);
    (modes, lists, ports, rules, any::<bool>()).prop_map(move |(mode, lists, ports, rules, audit)| {
        let (allowed_domains, denied_domains, allowed_cidrs, denied_cidrs) = lists;
        let closed = mode == "deny_all";
        let document = json!({
            "mode": mode,
            "allowed_domains": if closed { Vec::new() } else { allowed_domains },
            "allowed_cidrs": if closed || !parts.allow_ranges { Vec::new() } else { allowed_cidrs },
            "denied_domains": if parts.deny_names { denied_domains } else { Vec::new() },
            "denied_cidrs": denied_cidrs,
            "allowed_ports": ports,
            "rules": rules,
            "enforcement": if parts.audit && audit { "audit" } else { "enforce" },
        });
        Policy::parse(&document).expect("the strategy writes valid documents")
    })
}

pub(crate) fn any_tiers(parts: Parts) -> impl Strategy<Value = Vec<Policy>> {
    vec(any_policy(parts), 1..4)
}

pub(crate) fn compile(tiers: &[Policy]) -> SandboxPolicy {
    let tiers: Vec<(String, Policy)> = tiers
        .iter()
        .map(|policy| ("tier".to_owned(), policy.clone()))
        .collect();
    SandboxPolicy::compile(&Platform::default(), &tiers).unwrap()
}

pub(crate) fn any_bindings() -> impl Strategy<Value = Vec<BoundHost>> {
    let bound = (select(&PATTERNS[1..]), vec(select(&PORTS[..]), 1..3)).prop_map(|(host, ports)| BoundHost {
        hosts: vec![DomainPattern::parse(host).unwrap()],
        ports,
    });
    vec(bound, 0..3)
}

pub(crate) fn compile_with(tiers: &[Policy], bindings: &[BoundHost]) -> SandboxPolicy {
    let tiers: Vec<(String, Policy)> = tiers
        .iter()
        .map(|policy| ("tier".to_owned(), policy.clone()))
        .collect();
    SandboxPolicy::compile_with(&Platform::default(), &tiers, bindings).unwrap()
}

/// The document without anything that is asked of requests.
pub(crate) fn blind(policy: &Policy) -> Policy {
    let mut document = policy.to_value();
    for rule in document["rules"].as_array_mut().expect("a list") {
        let rule = rule.as_object_mut().expect("an object");
        for field in ["http", "tls", "credential"] {
            rule.remove(field);
        }
    }
    Policy::parse(&document).expect("what is left is valid")
}

/// Every request that the strategies tell apart, as far as they are told apart.
pub(crate) fn requests() -> Vec<(&'static str, NormalPath, bool)> {
    let paths = ["/", "/a", "/a/b", "/a/b/c", "/b"].map(|path| NormalPath::parse(path).unwrap().0);
    let heads = ["GET", "POST", "DELETE"].into_iter().flat_map(|method| {
        let paths = paths.clone();
        paths.into_iter().map(move |path| (method, path))
    });
    heads
        .flat_map(|(method, path)| [false, true].map(|upgrade| (method, path.clone(), upgrade)))
        .collect()
}

pub(crate) fn names() -> Vec<DomainName> {
    NAMES
        .iter()
        .map(|name| DomainName::parse(name).unwrap())
        .collect()
}

/// Every set of names an address may be pinned for.
pub(crate) fn pins() -> Vec<Vec<DomainName>> {
    let names = names();
    let sets = 0u32..1 << names.len();
    sets.map(|set| {
        let held = names
            .iter()
            .enumerate()
            .filter(|(index, _)| set >> index & 1 == 1);
        held.map(|(_, name)| name.clone()).collect()
    })
    .collect()
}

pub(crate) fn destinations() -> impl Iterator<Item = (IpAddr, u16)> {
    ADDRESSES
        .iter()
        .flat_map(|address| PORTS.map(|port| (address.parse().unwrap(), port)))
}

pub(crate) fn any_destination() -> impl Strategy<Value = SocketAddr> {
    select(destinations().collect::<Vec<_>>()).prop_map(SocketAddr::from)
}

pub(crate) fn decide(
    policy: &SandboxPolicy,
    to: SocketAddr,
    name: Option<&DomainName>,
    bound: &[DomainName],
) -> Verdict {
    policy.decide(&Flow {
        protocol: Protocol::Tcp,
        to,
        name,
        names_bound: bound,
    })
}

/// Everything `decide` can answer for the destination, with the names the address was pinned for.
pub(crate) fn answers(
    policy: &SandboxPolicy,
    to: SocketAddr,
) -> Vec<(Vec<DomainName>, Option<DomainName>, Verdict)> {
    let shown: Vec<Option<DomainName>> = names().into_iter().map(Some).chain([None]).collect();
    let mut answers = Vec::new();
    for bound in pins() {
        for name in &shown {
            let verdict = decide(policy, to, name.as_ref(), &bound);
            answers.push((bound.clone(), name.clone(), verdict));
        }
    }
    answers
}
