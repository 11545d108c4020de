//! Laws of random policies: the table is the decision, and tiers only narrow.

use std::net::{Ipv4Addr, SocketAddr};

use proptest::{collection::vec, prelude::*, sample::select};
use serde_json::{Value, json};

use super::*;
use crate::{
    BoundHost, DomainName, DomainPattern, Flow, NormalPath, Platform, Protocol, RequestHead, SandboxPolicy,
    Verdict,
};

const NAMES: [&str; 5] = [
    "wild.test",
    "a.wild.test",
    "b.a.wild.test",
    "evil.test",
    "other.test",
];
const PATTERNS: [&str; 6] = [
    "*",
    "wild.test",
    "*.wild.test",
    "*.a.wild.test",
    "evil.test",
    "a.wild.test",
];
const RANGES: [&str; 9] = [
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
const SPANS: [&str; 8] = [
    "22",
    "80",
    "443",
    "442-444",
    "1-1024",
    "8000-8080",
    "1-65535",
    "443-8010",
];
const ADDRESSES: [&str; 9] = [
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
const PORTS: [u16; 12] = [1, 22, 23, 80, 442, 443, 444, 1024, 1025, 8000, 8080, 65535];

/// What a random policy may hold.
#[derive(Clone, Copy)]
struct Parts {
    deny_names: bool,
    allow_ranges: bool,
    tcp: bool,
    inside: bool,
}

const ALL: Parts = Parts {
    deny_names: true,
    allow_ranges: true,
    tcp: true,
    inside: true,
};

fn some(from: &'static [&'static str], at_most: usize) -> impl Strategy<Value = Vec<&'static str>> {
    vec(select(from), 0..=at_most)
}

/// What a rule may ask of requests.
fn any_inside() -> impl Strategy<Value = Value> {
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

fn any_rule(parts: Parts) -> impl Strategy<Value = Value> {
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

fn any_plain_rule(parts: Parts) -> impl Strategy<Value = Value> {
    (
        any::<bool>(),
        any::<bool>(),
        some(&PATTERNS, 2),
        some(&RANGES, 2),
        some(&SPANS, 2),
    )
        .prop_filter_map(
            "a rule without destination",
            move |(allow, tcp, domains, cidrs, ports)| {
                let domains = if allow || parts.deny_names {
                    domains
                } else {
                    Vec::new()
                };
                let cidrs = if !allow || parts.allow_ranges {
                    cidrs
                } else {
                    Vec::new()
                };
                let mut rule = json!({
                    "action": if allow { "allow" } else { "deny" },
                    "protocol": if tcp && parts.tcp { "tcp" } else { "http" },
                    "domains": domains,
                    "cidrs": cidrs,
                });
                if !ports.is_empty() {
                    rule["ports"] = json!(ports);
                }
                (!domains.is_empty() || !cidrs.is_empty()).then_some(rule)
            },
        )
}

fn any_policy(parts: Parts) -> impl Strategy<Value = Policy> {
    let lists = (
        some(&PATTERNS, 2),
        some(&PATTERNS, 1),
        some(&RANGES, 2),
        some(&RANGES, 1),
    );
    let modes = select(vec!["allow_all", "deny_all", "allowlist", "denylist"]);
    let ports = vec(select(&PORTS[..]), 0..4);
    (modes, lists, ports, vec(any_rule(parts), 0..5)).prop_map(move |(mode, lists, ports, rules)| {
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
        });
        Policy::parse(&document).expect("the strategy writes valid documents")
    })
}

fn any_tiers(parts: Parts) -> impl Strategy<Value = Vec<Policy>> {
    vec(any_policy(parts), 1..4)
}

fn compile(tiers: &[Policy]) -> SandboxPolicy {
    let tiers: Vec<(String, Policy)> = tiers
        .iter()
        .map(|policy| ("tier".to_owned(), policy.clone()))
        .collect();
    SandboxPolicy::compile(&Platform::default(), &tiers).unwrap()
}

fn any_bindings() -> impl Strategy<Value = Vec<BoundHost>> {
    let bound = (select(&PATTERNS[1..]), vec(select(&PORTS[..]), 1..3)).prop_map(|(host, ports)| BoundHost {
        hosts: vec![DomainPattern::parse(host).unwrap()],
        ports,
    });
    vec(bound, 0..3)
}

fn compile_with(tiers: &[Policy], bindings: &[BoundHost]) -> SandboxPolicy {
    let tiers: Vec<(String, Policy)> = tiers
        .iter()
        .map(|policy| ("tier".to_owned(), policy.clone()))
        .collect();
    SandboxPolicy::compile_with(&Platform::default(), &tiers, bindings).unwrap()
}

/// The document without anything that is asked of requests.
fn blind(policy: &Policy) -> Policy {
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
fn requests() -> Vec<(&'static str, NormalPath, bool)> {
    let paths = ["/", "/a", "/a/b", "/a/b/c", "/b"].map(|path| NormalPath::parse(path).unwrap().0);
    let heads = ["GET", "POST", "DELETE"].into_iter().flat_map(|method| {
        let paths = paths.clone();
        paths.into_iter().map(move |path| (method, path))
    });
    heads
        .flat_map(|(method, path)| [false, true].map(|upgrade| (method, path.clone(), upgrade)))
        .collect()
}

fn names() -> Vec<DomainName> {
    NAMES
        .iter()
        .map(|name| DomainName::parse(name).unwrap())
        .collect()
}

/// Every set of names an address may be pinned for.
fn pins() -> Vec<Vec<DomainName>> {
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

fn destinations() -> impl Iterator<Item = (Ipv4Addr, u16)> {
    ADDRESSES
        .iter()
        .flat_map(|address| PORTS.map(|port| (address.parse().unwrap(), port)))
}

fn any_destination() -> impl Strategy<Value = SocketAddr> {
    select(destinations().collect::<Vec<_>>()).prop_map(SocketAddr::from)
}

fn decide(
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
fn answers(policy: &SandboxPolicy, to: SocketAddr) -> Vec<(Vec<DomainName>, Option<DomainName>, Verdict)> {
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

fn strictness(action: KernelAction) -> u8 {
    match action {
        KernelAction::Pass => 0,
        KernelAction::Audit(_) | KernelAction::Proxy => 1,
        KernelAction::ProxyBound => 2,
        KernelAction::Deny(_) => 3,
    }
}

fn coarse(action: KernelAction) -> KernelAction {
    match action {
        KernelAction::Deny(_) => KernelAction::Deny(Reason::DefaultDeny),
        KernelAction::Pass | KernelAction::Proxy | KernelAction::ProxyBound | KernelAction::Audit(_) => {
            action
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn the_table_is_well_formed_and_says_what_the_rules_say(
        tiers in any_tiers(ALL), bindings in any_bindings(), random in any::<(u32, u16)>(),
    ) {
        let policy = compile_with(&tiers, &bindings);
        let table = policy.kernel_table();
        prop_assert_eq!(table.entries[0].prefix, IpNet::V4(Ipv4Net::default()));
        prop_assert!(table.entries.windows(2).all(|pair| pair[0].prefix < pair[1].prefix));
        for entry in &table.entries {
            prop_assert!(entry.ranges.len() <= MAX_RANGES);
            prop_assert!(entry.ranges.iter().all(|range| range.first <= range.last));
            prop_assert!(entry.ranges.windows(2).all(|pair| pair[0].last < pair[1].first));
        }
        for (address, port) in destinations().chain([(Ipv4Addr::from_bits(random.0), random.1)]) {
            let found = table.lookup(address.into(), Protocol::Tcp, port);
            let decided = policy.decide_address_port(SocketAddr::from((address, port)));
            if decided == KernelAction::Deny(Reason::PlatformDenied) {
                continue;
            }
            // Bindings may make more be read than is needed.
            let widened = decided == KernelAction::Pass && found == KernelAction::Proxy && !bindings.is_empty();
            prop_assert!(widened || coarse(found) == coarse(decided), "{address}:{port}: {found:?}, {decided:?}");
            if let KernelAction::Deny(reason) = found {
                prop_assert!(reason == Reason::DefaultDeny || KernelAction::Deny(reason) == decided);
            }
        }
    }

    #[test]
    fn the_kernel_never_says_what_the_decision_cannot_answer(tiers in any_tiers(ALL), to in any_destination()) {
        let policy = compile(&tiers);
        let action = policy.decide_address_port(to);
        for (bound, name, verdict) in answers(&policy, to) {
            let context = format!("{action:?}, pinned for {bound:?}, shows {name:?}: {verdict:?}");
            match action {
                KernelAction::Deny(_) => {
                    prop_assert!(!verdict.allowed && !verdict.needs_name, "{}", context);
                    // The kernel's reason is the decision's.
                    let nothing_known = name.is_none() && bound.is_empty();
                    prop_assert!(!nothing_known || KernelAction::Deny(verdict.reason) == action, "{}", context);
                }
                KernelAction::Pass => prop_assert!(verdict.allowed && !verdict.needs_name, "{}", context),
                KernelAction::ProxyBound if bound.is_empty() => {
                    prop_assert!(!verdict.allowed && !verdict.needs_name, "{}", context);
                }
                KernelAction::ProxyBound | KernelAction::Proxy => {}
                KernelAction::Audit(_) => prop_assert!(false, "{}", context),
            }
        }
    }

    #[test]
    fn bindings_change_only_what_is_read(tiers in any_tiers(ALL), bindings in any_bindings(), to in any_destination()) {
        let (without, with) = (compile(&tiers), compile_with(&tiers, &bindings));
        let is_read = bindings.iter().any(|binding| binding.ports.contains(&to.port()));
        prop_assert_eq!(with.decide_address_port(to), reading(without.decide_address_port(to), is_read));
        for ((bound, name, before), (_, _, after)) in answers(&without, to).into_iter().zip(answers(&with, to)) {
            let concerned = |name: &DomainName| {
                bindings.iter().any(|binding| {
                    binding.ports.contains(&to.port()) && binding.hosts.iter().any(|host| host.matches(name))
                })
            };
            let context = format!("pinned for {bound:?}, shows {name:?}: {before:?} became {after:?}");
            prop_assert!(after.intercept >= before.intercept && after.needs_name >= before.needs_name, "{}", context);
            if after.intercept != before.intercept {
                let name = name.as_ref().expect("only named flows are read");
                prop_assert!(after.allowed && bound.contains(name) && concerned(name), "{}", context);
            }
            if after.needs_name != before.needs_name {
                prop_assert!(after.allowed && name.is_none() && bound.iter().any(concerned), "{}", context);
            }
            let (intercept, needs_name) = (before.intercept, before.needs_name);
            prop_assert_eq!(Verdict { intercept, needs_name, ..after }, before, "{}", context);
        }
    }

    #[test]
    fn what_must_be_read_is_never_passed_unread(
        tiers in any_tiers(ALL), bindings in any_bindings(), to in any_destination(),
    ) {
        let policy = compile_with(&tiers, &bindings);
        let action = policy.decide_address_port(to);
        for (bound, name, verdict) in answers(&policy, to) {
            let context = format!("{action:?}, pinned for {bound:?}, shows {name:?}: {verdict:?}");
            prop_assert!(!verdict.intercept || verdict.allowed, "{}", context);
            prop_assert!(verdict.credentials.is_empty() || verdict.intercept, "{}", context);
            if verdict.intercept {
                prop_assert!(matches!(action, KernelAction::Proxy | KernelAction::ProxyBound), "{}", context);
                // Nor is it given up before its name was looked for.
                let blind = decide(&policy, to, None, &bound);
                prop_assert!(blind.needs_name, "{} but {:?}", context, blind);
                prop_assert!(name.is_some_and(|name| bound.contains(&name)), "{}", context);
            }
        }
    }

    #[test]
    fn asking_for_requests_never_widens(tiers in any_tiers(ALL), to in any_destination()) {
        let blind: Vec<Policy> = tiers.iter().map(blind).collect();
        let (policy, blind) = (compile(&tiers), compile(&blind));
        prop_assert!(strictness(policy.decide_address_port(to)) >= strictness(blind.decide_address_port(to)));
        for ((bound, name, asked), (_, _, plain)) in answers(&policy, to).into_iter().zip(answers(&blind, to)) {
            prop_assert!(plain.allowed || !asked.allowed, "pinned for {bound:?}, shows {name:?}: {plain:?}, {asked:?}");
        }
        for name in names() {
            prop_assert!(blind.decide_name(&name).allowed || !policy.decide_name(&name).allowed, "{}", name);
        }
    }

    #[test]
    fn a_request_passes_exactly_if_its_flow_passes_and_every_tier_alone_lets_it_pass(
        tiers in any_tiers(ALL), to in any_destination(),
    ) {
        let together = compile(&tiers);
        let alone: Vec<SandboxPolicy> = tiers.iter().map(|tier| compile(std::slice::from_ref(tier))).collect();
        let names = names();
        for name in names.iter().map(Some).chain([None]) {
            let bound = &names[..];
            let flow = Flow { protocol: Protocol::Tcp, to, name, names_bound: bound };
            for (method, path, upgrade) in &requests() {
                let request = RequestHead { method, path, upgrade: *upgrade };
                let verdict = together.decide_request(&flow, &request);
                let each = alone.iter().all(|policy| policy.decide_request(&flow, &request).allowed);
                let context = format!("{request} showing {name:?}: {verdict:?}");
                prop_assert_eq!(verdict.allowed, each, "{}", context);
                let of_flow = together.decide(&flow);
                prop_assert!(of_flow.allowed || verdict == of_flow, "{}", context);
                prop_assert!(!verdict.allowed || verdict == of_flow, "{}", context);
                if of_flow.allowed && !verdict.allowed {
                    prop_assert!(matches!(verdict.reason, Reason::MethodDenied | Reason::PathDenied), "{}", context);
                    prop_assert!(of_flow.intercept, "who denies requests must read them: {}", context);
                }
            }
        }
    }

    #[test]
    fn where_no_name_is_denied_the_kernel_asks_userland_only_when_a_name_decides(
        policy in any_policy(Parts { deny_names: false, inside: false, ..ALL }), to in any_destination(),
    ) {
        let policy = compile(&[policy]);
        let answers = answers(&policy, to);
        match policy.decide_address_port(to) {
            KernelAction::ProxyBound => {
                prop_assert!(answers.iter().any(|(_, _, verdict)| verdict.allowed));
                prop_assert!(answers.iter().any(|(_, _, verdict)| !verdict.allowed));
            }
            KernelAction::Proxy | KernelAction::Audit(_) => {
                prop_assert!(false, "nothing makes a name necessary");
            }
            KernelAction::Deny(_) | KernelAction::Pass => {}
        }
    }

    #[test]
    fn the_answer_to_a_nameless_flow_says_truly_whether_a_name_can_help(tiers in any_tiers(ALL), to in any_destination()) {
        let policy = compile(&tiers);
        let unlisted = DomainName::parse("nobody.example").unwrap();
        for bound in pins() {
            let blind = decide(&policy, to, None, &bound);
            let shown = names();
            let mut shown = shown.iter().chain([&unlisted]);
            let helped = shown.any(|name| decide(&policy, to, Some(name), &bound).allowed);
            if !blind.allowed {
                prop_assert_eq!(blind.needs_name, helped, "pinned for {:?}: {:?}", bound, blind);
            }
            prop_assert!(!(blind.allowed && blind.needs_name));
        }
    }

    #[test]
    fn a_flow_passes_exactly_if_every_tier_alone_lets_it_pass(tiers in any_tiers(ALL), to in any_destination()) {
        let together = compile(&tiers);
        let alone: Vec<SandboxPolicy> = tiers.iter().map(|tier| compile(std::slice::from_ref(tier))).collect();
        for (bound, name, verdict) in answers(&together, to) {
            let each = alone.iter().map(|policy| decide(policy, to, name.as_ref(), &bound).allowed);
            let context = format!("pinned for {bound:?}, shows {name:?}: {verdict:?}");
            prop_assert_eq!(verdict.allowed, each.into_iter().all(|allowed| allowed), "{}", context);
        }
        for name in names() {
            let resolves = together.decide_name(&name).allowed;
            prop_assert!(!resolves || alone.iter().all(|policy| policy.decide_name(&name).allowed), "{}", name);
        }
        // One more tier takes away, also in the kernel.
        let above = compile(&tiers[..1]).decide_address_port(to);
        let below = together.decide_address_port(to);
        prop_assert!(strictness(below) >= strictness(above), "{:?} became {:?}", above, below);
        prop_assert!(!matches!(above, KernelAction::Deny(_)) || below == above);
    }

    #[test]
    fn a_name_resolves_exactly_if_some_flow_under_it_may_pass(
        tiers in any_tiers(Parts { allow_ranges: false, tcp: false, ..ALL }),
        address in select(vec![Ipv4Addr::new(192, 0, 2, 9)]),
    ) {
        let policy = compile(&tiers);
        for name in names() {
            let bound = [name.clone()];
            let mut ports = (1..=1100).chain(7990..8100).chain([65535]);
            // The address is in no listed range but 0.0.0.0/0.
            let reachable = ports.any(|port| decide(&policy, (address, port).into(), Some(&name), &bound).allowed);
            prop_assert_eq!(policy.decide_name(&name).allowed, reachable, "{}", name);
        }
    }

    #[test]
    fn a_document_comes_back_from_the_store_as_it_was(policy in any_policy(ALL)) {
        let text = serde_json::to_string(&policy).unwrap();
        prop_assert_eq!(serde_json::from_str::<Policy>(&text).unwrap(), policy);
    }
}

#[test]
fn reasons_give_way_before_ports_do() {
    let ports: Vec<u16> = (0..12).map(|index| 1000 + 2 * index).collect();
    let few = Policy::parse(&json!({"mode": "allow_all", "allowed_ports": [443]})).unwrap();
    let many = Policy::parse(&json!({"mode": "allow_all", "allowed_ports": ports})).unwrap();
    let reason = |policy| {
        compile(&[policy])
            .kernel_table()
            .lookup(Ipv4Addr::new(203, 0, 113, 5).into(), Protocol::Tcp, 80)
    };
    assert_eq!(reason(few), KernelAction::Deny(Reason::PortDenied));
    assert_eq!(reason(many), KernelAction::Deny(Reason::DefaultDeny));
}

#[test]
fn prefixes_that_say_nothing_new_are_left_out() {
    let document = json!({"mode": "allow_all", "allowed_cidrs": ["203.0.113.0/24", "198.51.100.0/24"]});
    let table = compile(&[Policy::parse(&document).unwrap()]).kernel_table();
    assert_eq!(table.entries.len(), 2, "{table:?}");
}

#[test]
fn a_prefix_that_says_what_a_distant_one_says_is_kept() {
    let rules = json!([
        {"action": "allow", "cidrs": ["203.0.113.5"], "ports": ["443"]},
        {"action": "deny", "cidrs": ["203.0.113.0/24"], "ports": ["443"]},
    ]);
    let document = json!({"mode": "allow_all", "rules": rules});
    let table = compile(&[Policy::parse(&document).unwrap()]).kernel_table();
    let at = |address: &str| table.lookup(address.parse().unwrap(), Protocol::Tcp, 443);
    assert_eq!(at("203.0.112.5"), KernelAction::Pass);
    assert_eq!(at("203.0.113.6"), KernelAction::Deny(Reason::DeniedByRule));
    assert_eq!(at("203.0.113.5"), KernelAction::Pass);
}
