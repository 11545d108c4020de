//! Decisions as stories; the laws that hold for all policies are in `kernel/tests.rs`.

use serde_json::{Value, json};

use super::*;
use crate::FailureMode;

const SERVER: &str = "203.0.113.5";

pub(super) fn compile(tiers: &[Value]) -> SandboxPolicy {
    let tiers: Vec<(String, Policy)> = tiers
        .iter()
        .enumerate()
        .map(|(index, document)| (format!("tier {index}"), Policy::parse(document).unwrap()))
        .collect();
    SandboxPolicy::compile(&Platform::default(), &tiers).unwrap()
}

fn name(text: &str) -> DomainName {
    DomainName::parse(text).unwrap()
}

/// A TCP flow to `address:port` that shows `shown` where the address is pinned for `bound`.
fn ask(policy: &SandboxPolicy, to: &str, shown: Option<&str>, bound: &[&str]) -> Verdict {
    let shown = shown.map(name);
    let bound: Vec<DomainName> = bound.iter().map(|text| name(text)).collect();
    let to = to.parse().unwrap();
    policy.decide(&Flow {
        protocol: Protocol::Tcp,
        to,
        name: shown.as_ref(),
        names_bound: &bound,
    })
}

fn kernel(policy: &SandboxPolicy, to: &str) -> KernelAction {
    policy.decide_address_port(Protocol::Tcp, to.parse().unwrap())
}

#[track_caller]
pub(super) fn denied(verdict: &Verdict, reason: Reason) {
    assert!(!verdict.allowed, "{verdict:?}");
    assert_eq!(verdict.reason, reason, "{verdict:?}");
}

#[track_caller]
pub(super) fn allowed(verdict: &Verdict) {
    assert!(
        verdict.allowed && verdict.reason == Reason::Allowed,
        "{verdict:?}"
    );
}

#[test]
fn without_a_policy_port_443_is_open_to_the_public_internet() {
    let policy = compile(&[]);
    let verdict = ask(&policy, "203.0.113.5:443", None, &[]);
    allowed(&verdict);
    assert_eq!(
        (verdict.tier, verdict.rule.as_deref(), verdict.needs_name),
        (None, Some("mode"), false)
    );
    denied(&ask(&policy, "203.0.113.5:80", None, &[]), Reason::PortDenied);
    denied(&ask(&policy, "10.0.0.1:443", None, &[]), Reason::PlatformDenied);
    denied(
        &ask(&policy, "[::ffff:10.0.0.1]:443", None, &[]),
        Reason::PlatformDenied,
    );
    assert_eq!(kernel(&policy, "203.0.113.5:443"), KernelAction::Pass);
    assert_eq!(
        kernel(&policy, "203.0.113.5:80"),
        KernelAction::Deny(Reason::PortDenied)
    );
    assert_eq!(
        kernel(&policy, "169.254.169.254:80"),
        KernelAction::Deny(Reason::PlatformDenied)
    );
    assert!(policy.decide_name(&name("ok.test")).allowed);
    assert!(!policy.decide_name(&name("metadata.google.internal")).allowed);
    assert_eq!(policy.failure_mode(), FailureMode::FailClosed);
}

fn ask_udp(policy: &SandboxPolicy, to: &str) -> Verdict {
    policy.decide(&Flow {
        protocol: Protocol::Udp,
        to: to.parse().unwrap(),
        name: None,
        names_bound: &[],
    })
}

#[test]
fn udp_passes_only_by_a_rule_for_it() {
    let open = json!({"mode": "allow_all", "allowed_cidrs": ["203.0.113.0/24"]});
    let verdict = ask_udp(&compile(std::slice::from_ref(&open)), "203.0.113.5:443");
    denied(&verdict, Reason::ProtocolDenied);
    assert_eq!((verdict.tier, verdict.rule), (None, None), "nobody mentions it");

    let time = json!({"mode": "deny_all", "rules": [
        {"name": "not this one", "action": "deny", "cidrs": ["203.0.113.7"]},
        {"name": "time", "action": "allow", "protocol": "udp", "cidrs": ["203.0.113.0/24", "2001:db8::/32"], "ports": ["123"]},
        {"name": "no tcp", "action": "allow", "cidrs": ["198.51.100.0/24"], "ports": ["123"]},
    ]});
    let policy = compile(std::slice::from_ref(&time));
    for to in ["203.0.113.5:123", "[2001:db8::5]:123"] {
        let verdict = ask_udp(&policy, to);
        allowed(&verdict);
        assert_eq!(verdict.rule.as_deref(), Some("time"));
        let to = to.parse().unwrap();
        assert_eq!(policy.decide_address_port(Protocol::Udp, to), KernelAction::Pass);
        // A rule for UDP opens nothing of TCP.
        assert_eq!(
            policy.decide_address_port(Protocol::Tcp, to),
            KernelAction::Deny(Reason::DefaultDeny)
        );
    }
    let verdict = ask_udp(&policy, "203.0.113.7:123");
    denied(&verdict, Reason::DeniedByRule);
    assert_eq!(
        verdict.rule.as_deref(),
        Some("not this one"),
        "a denied range is denied to UDP too"
    );
    for to in ["203.0.113.5:124", "198.51.100.5:123", "[2002:cb00:7105::1]:123"] {
        denied(&ask_udp(&policy, to), Reason::ProtocolDenied);
    }
    denied(&ask_udp(&policy, "10.0.0.1:123"), Reason::PlatformDenied);
    // The tier that has no such rule denies it, and is named.
    let verdict = ask_udp(&compile(&[time, open]), "203.0.113.5:123");
    denied(&verdict, Reason::ProtocolDenied);
    assert_eq!((verdict.tier, verdict.rule.as_deref()), (Some(1), Some("mode")));
}

#[test]
fn what_a_tier_in_audit_mode_denies_passes_and_says_so() {
    let audit = json!({"mode": "allowlist", "enforcement": "audit", "allowed_domains": ["ok.test"]});
    let policy = compile(std::slice::from_ref(&audit));
    let to = "203.0.113.5:443";
    assert_eq!(kernel(&policy, to), KernelAction::Proxy);
    let verdict = ask(&policy, to, Some("evil.test"), &["evil.test"]);
    assert!(
        verdict.is_audited() && verdict.reason == Reason::NameDenied,
        "{verdict:?}"
    );
    assert_eq!((verdict.tier, verdict.rule.as_deref()), (Some(0), Some("mode")));
    allowed(&ask(&policy, to, Some("ok.test"), &["ok.test"]));
    let unseen = ask(&policy, to, None, &["ok.test"]);
    assert!(
        unseen.is_audited() && unseen.needs_name,
        "a name could still make it no denial: {unseen:?}"
    );
    let flat = ask(&policy, "203.0.113.5:22", None, &[]);
    assert!(
        flat.is_audited() && !flat.needs_name && flat.reason == Reason::DefaultDeny,
        "{flat:?}"
    );
    assert!(policy.decide_name(&name("evil.test")).is_audited());
    // The platform is in no mode.
    denied(&ask(&policy, "10.0.0.1:443", None, &[]), Reason::PlatformDenied);
    denied(&ask_udp(&policy, "203.0.113.5:443"), Reason::ProtocolDenied);
    // Nor are the other tiers.
    let strict = json!({"mode": "allowlist", "allowed_domains": ["ok.test", "evil.test"]});
    for tiers in [[audit.clone(), strict.clone()], [strict, audit]] {
        let policy = compile(&tiers);
        assert_eq!(kernel(&policy, to), KernelAction::ProxyBound);
        assert!(ask(&policy, to, Some("evil.test"), &["evil.test"]).is_audited());
        denied(
            &ask(&policy, to, Some("other.test"), &["other.test"]),
            Reason::NameDenied,
        );
        denied(&ask(&policy, to, Some("ok.test"), &[]), Reason::AddressNotBound);
        assert!(!policy.decide_name(&name("other.test")).allowed);
    }
}

#[test]
fn a_tier_in_audit_mode_looks_inside_and_wants_no_credential() {
    let reading = json!({"mode": "allowlist", "enforcement": "audit", "rules": [
        {"name": "read", "action": "allow", "domains": ["api.test"], "http": [{"methods": ["GET"]}], "credential": "KEY"},
    ]});
    let policy = compile(&[json!({"mode": "allow_all"}), reading]);
    let verdict = request(&policy, "api.test", "GET", "/", false);
    allowed(&verdict);
    assert!(verdict.intercept && verdict.credentials.is_empty());
    let verdict = request(&policy, "api.test", "POST", "/", false);
    assert!(verdict.is_audited() && verdict.intercept, "{verdict:?}");
    assert_eq!(
        (verdict.reason, verdict.tier, verdict.rule.as_deref()),
        (Reason::MethodDenied, Some(1), Some("read"))
    );
    let other = request(&policy, "other.test", "POST", "/", false);
    assert!(other.is_audited() && !other.intercept);
}

#[test]
fn an_allowlist_wants_the_name_and_the_address_that_dns_gave_for_it() {
    let policy = compile(&[json!({"mode": "allowlist", "allowed_domains": ["api.test", "*.wild.test"]})]);
    let to = "203.0.113.5:443";
    assert_eq!(kernel(&policy, to), KernelAction::ProxyBound);

    let verdict = ask(&policy, to, Some("a.wild.test"), &["a.wild.test"]);
    allowed(&verdict);
    assert_eq!(verdict.rule.as_deref(), Some("allowed_domains[1]"));
    assert!(verdict.needs_name);

    let unseen = ask(&policy, to, None, &["a.wild.test"]);
    denied(&unseen, Reason::NoName);
    assert!(unseen.needs_name, "netd must look for a name");
    // A wrong SNI to a pinned address, an allowed SNI to another address, and an address without any name.
    denied(
        &ask(&policy, to, Some("evil.test"), &["a.wild.test"]),
        Reason::NameDenied,
    );
    denied(
        &ask(&policy, to, Some("api.test"), &["a.wild.test"]),
        Reason::AddressNotBound,
    );
    denied(&ask(&policy, to, Some("api.test"), &[]), Reason::AddressNotBound);
    let literal = ask(&policy, to, None, &[]);
    denied(&literal, Reason::AddressNotBound);
    assert!(!literal.needs_name, "no name could help");
    // Other ports are not the list's business.
    denied(
        &ask(&policy, "203.0.113.5:80", Some("api.test"), &["api.test"]),
        Reason::DefaultDeny,
    );
    assert_eq!(
        kernel(&policy, "203.0.113.5:80"),
        KernelAction::Deny(Reason::DefaultDeny)
    );
}

#[test]
fn label_boundaries_hold_in_decisions() {
    let policy = compile(&[json!({"mode": "allowlist", "allowed_domains": ["*.wild.test"]})]);
    for outside in ["wild.test", "evil-wild.test", "wild.test.evil.test", "xwild.test"] {
        denied(
            &ask(&policy, "203.0.113.5:443", Some(outside), &[outside]),
            Reason::NameDenied,
        );
        denied(&policy.decide_name(&name(outside)), Reason::NameDenied);
    }
}

#[test]
fn a_range_is_open_without_a_look_inside() {
    let policy = compile(&[
        json!({"mode": "allowlist", "allowed_cidrs": ["203.0.113.0/24"], "allowed_ports": [443, 5432]}),
    ]);
    let verdict = ask(&policy, "203.0.113.5:5432", None, &[]);
    allowed(&verdict);
    assert_eq!(
        (verdict.rule.as_deref(), verdict.needs_name),
        (Some("allowed_cidrs[0]"), false)
    );
    assert_eq!(kernel(&policy, "203.0.113.5:5432"), KernelAction::Pass);
    denied(&ask(&policy, "198.51.100.5:5432", None, &[]), Reason::DefaultDeny);
    // An open range opens no name: DNS would carry anything to anyone.
    denied(&policy.decide_name(&name("ok.test")), Reason::NameDenied);
}

#[test]
fn a_denied_name_makes_names_mandatory() {
    let policy = compile(&[json!({"mode": "denylist", "denied_domains": ["evil.test", "*.evil.test"]})]);
    let to = "203.0.113.5:443";
    assert_eq!(kernel(&policy, to), KernelAction::ProxyBound);
    allowed(&ask(&policy, to, Some("ok.test"), &["ok.test"]));
    let verdict = ask(&policy, to, Some("x.evil.test"), &["ok.test"]);
    denied(&verdict, Reason::DeniedByRule);
    assert_eq!(verdict.rule.as_deref(), Some("denied_domains[1]"));
    denied(&ask(&policy, to, None, &["ok.test"]), Reason::NoName);
    // A name that is not denied, to an address that was not got by asking for it: it may be the denied one's.
    denied(&ask(&policy, to, Some("ok.test"), &[]), Reason::AddressNotBound);
    denied(&ask(&policy, to, None, &[]), Reason::AddressNotBound);
    denied(&policy.decide_name(&name("evil.test")), Reason::DeniedByRule);
    assert!(policy.decide_name(&name("ok.test")).allowed);
}

#[test]
fn a_range_below_a_denied_name_is_open_to_flows_that_show_another_name() {
    let document =
        json!({"mode": "allowlist", "denied_domains": ["evil.test"], "allowed_cidrs": ["203.0.113.0/24"]});
    let policy = compile(&[document]);
    let to = "203.0.113.5:443";
    assert_eq!(kernel(&policy, to), KernelAction::Proxy);
    let unseen = ask(&policy, to, None, &[]);
    denied(&unseen, Reason::NoName);
    assert!(unseen.needs_name);
    allowed(&ask(&policy, to, Some("other.test"), &[]));
    denied(&ask(&policy, to, Some("evil.test"), &[]), Reason::DeniedByRule);
    // Who wants the range open in any case puts a rule before the list.
    let rules = json!([{"action": "allow", "cidrs": ["203.0.113.0/24"], "ports": ["443"]}]);
    let policy = compile(&[json!({"mode": "allowlist", "denied_domains": ["evil.test"], "rules": rules})]);
    assert_eq!(kernel(&policy, to), KernelAction::Pass);
    allowed(&ask(&policy, to, None, &[]));
}

#[test]
fn denied_ranges_beat_allowed_names() {
    let policy = compile(&[json!({
        "mode": "allowlist", "allowed_domains": ["ok.test"], "denied_cidrs": ["203.0.113.0/24"],
    })]);
    let verdict = ask(&policy, "203.0.113.5:443", Some("ok.test"), &["ok.test"]);
    denied(&verdict, Reason::DeniedByRule);
    assert_eq!(verdict.rule.as_deref(), Some("denied_cidrs[0]"));
    assert_eq!(
        kernel(&policy, "203.0.113.5:443"),
        KernelAction::Deny(Reason::DeniedByRule)
    );
    allowed(&ask(&policy, "198.51.100.5:443", Some("ok.test"), &["ok.test"]));
    // Not under an IPv6 spelling either.
    let spelled = ask(
        &policy,
        "[64:ff9b::203.0.113.5]:443",
        Some("ok.test"),
        &["ok.test"],
    );
    denied(&spelled, Reason::DeniedByRule);
}

#[test]
fn the_first_rule_that_matches_decides() {
    let policy = compile(&[json!({
        "mode": "deny_all",
        "rules": [
            {"name": "one host", "action": "allow", "cidrs": ["203.0.113.5"], "ports": ["1-1024"]},
            {"name": "its net", "action": "deny", "cidrs": ["203.0.113.0/24"]},
            {"action": "allow", "cidrs": ["203.0.0.0/16"], "ports": ["443"]},
        ],
    })]);
    assert_eq!(
        ask(&policy, "203.0.113.5:443", None, &[]).rule.as_deref(),
        Some("one host")
    );
    let verdict = ask(&policy, "203.0.113.5:2000", None, &[]);
    denied(&verdict, Reason::DeniedByRule);
    assert_eq!(verdict.rule.as_deref(), Some("its net"));
    assert_eq!(
        ask(&policy, "203.0.1.1:443", None, &[]).rule.as_deref(),
        Some("rules[2]")
    );
    assert_eq!(
        ask(&policy, "203.0.1.1:80", None, &[]).rule.as_deref(),
        Some("mode")
    );
}

#[test]
fn a_tcp_rule_passes_what_is_pinned_without_a_look_inside() {
    let rules = json!([{"action": "allow", "protocol": "tcp", "domains": ["git.test"], "ports": ["22"]}]);
    let policy = compile(&[json!({"mode": "allowlist", "rules": rules})]);
    assert_eq!(kernel(&policy, "203.0.113.5:22"), KernelAction::ProxyBound);
    let verdict = ask(&policy, "203.0.113.5:22", None, &["git.test"]);
    allowed(&verdict);
    assert!(!verdict.needs_name);
    denied(
        &ask(&policy, "203.0.113.5:22", None, &[]),
        Reason::AddressNotBound,
    );
    denied(
        &ask(&policy, "203.0.113.5:22", None, &["other.test"]),
        Reason::AddressNotBound,
    );
    assert!(policy.decide_name(&name("git.test")).allowed);
}

#[test]
fn a_denied_tcp_name_leaves_other_pinned_addresses_opaque() {
    let rules = json!([{"action": "deny", "protocol": "tcp", "domains": ["evil.test"], "ports": ["22"]}]);
    let policy = compile(&[json!({"mode": "allow_all", "allowed_ports": [22, 443], "rules": rules})]);
    let verdict = ask(&policy, "203.0.113.5:22", None, &["git.test"]);
    allowed(&verdict);
    assert!(!verdict.needs_name);
    denied(
        &ask(&policy, "203.0.113.5:22", None, &["git.test", "evil.test"]),
        Reason::DeniedByRule,
    );
    denied(
        &ask(&policy, "203.0.113.5:22", None, &[]),
        Reason::AddressNotBound,
    );
    denied(
        &ask(&policy, "203.0.113.5:22", Some("evil.test"), &["git.test"]),
        Reason::DeniedByRule,
    );
    assert_eq!(kernel(&policy, "203.0.113.5:443"), KernelAction::Pass);
    // 443 is still open to it, so DNS must answer.
    assert!(policy.decide_name(&name("evil.test")).allowed);
}

#[test]
fn a_denied_star_is_every_destination() {
    let rules = json!([
        {"action": "allow", "domains": ["ok.test"], "ports": ["443"]},
        {"action": "deny", "domains": ["*"]},
        {"action": "allow", "cidrs": ["203.0.113.0/24"], "ports": ["1-65535"]},
    ]);
    let policy = compile(&[json!({"mode": "allow_all", "rules": rules})]);
    allowed(&ask(&policy, "203.0.113.5:443", Some("ok.test"), &["ok.test"]));
    denied(
        &ask(&policy, "203.0.113.5:443", Some("x.test"), &["x.test"]),
        Reason::DeniedByRule,
    );
    denied(&ask(&policy, "203.0.113.5:80", None, &[]), Reason::DeniedByRule);
    assert_eq!(
        kernel(&policy, "203.0.113.5:80"),
        KernelAction::Deny(Reason::DeniedByRule)
    );
    denied(&policy.decide_name(&name("x.test")), Reason::DeniedByRule);
}

#[test]
fn every_tier_must_allow_and_the_first_that_denies_is_named() {
    let organization = json!({"mode": "allowlist", "allowed_domains": ["*.wild.test"]});
    let sandbox = json!({"mode": "allowlist", "allowed_domains": ["a.wild.test", "b.other.test"]});
    let policy = compile(&[organization, sandbox]);
    let to = "203.0.113.5:443";
    let verdict = ask(&policy, to, Some("a.wild.test"), &["a.wild.test"]);
    allowed(&verdict);
    assert_eq!(
        (verdict.tier, verdict.rule.as_deref()),
        (Some(1), Some("allowed_domains[0]"))
    );
    assert_eq!(
        ask(&policy, to, Some("b.other.test"), &["b.other.test"]).tier,
        Some(0)
    );
    assert_eq!(
        ask(&policy, to, Some("b.wild.test"), &["b.wild.test"]).tier,
        Some(1)
    );
    // One name for each tier is no name for both.
    let split = ask(&policy, to, None, &["b.wild.test", "b.other.test"]);
    denied(&split, Reason::AddressNotBound);
    assert!(!split.needs_name);
    for (query, tier) in [("b.other.test", 0), ("b.wild.test", 1)] {
        let verdict = policy.decide_name(&name(query));
        assert_eq!((verdict.allowed, verdict.tier), (false, Some(tier)), "{query}");
    }
}

#[test]
fn a_name_without_a_common_port_is_not_resolved() {
    let open_on =
        |ports: Value| json!({"mode": "allowlist", "allowed_domains": ["ok.test"], "allowed_ports": ports});
    let policy = compile(&[open_on(json!([443])), open_on(json!([8443]))]);
    denied(&policy.decide_name(&name("ok.test")), Reason::PortDenied);
    let policy = compile(&[open_on(json!([443, 8443])), open_on(json!([8443]))]);
    assert!(policy.decide_name(&name("ok.test")).allowed);
    denied(
        &compile(&[open_on(json!([]))]).decide_name(&name("ok.test")),
        Reason::NameDenied,
    );
}

#[test]
fn deny_all_denies_all_but_its_rules() {
    let policy = compile(&[json!({"mode": "deny_all"})]);
    for port in [22, 80, 443] {
        let to = SocketAddr::new(SERVER.parse::<IpAddr>().unwrap(), port);
        assert_eq!(
            policy.decide_address_port(Protocol::Tcp, to),
            KernelAction::Deny(Reason::DefaultDeny)
        );
    }
    denied(&policy.decide_name(&name("ok.test")), Reason::NameDenied);
    let table = policy.kernel_table();
    assert_eq!((table.entries.len(), table.entries[0].ranges.len()), (2, 0));
}

#[test]
fn failure_is_closed_if_any_tier_wants_it_closed() {
    let open = json!({"mode": "allow_all", "failure_mode": "fail_open"});
    let closed = json!({"mode": "allow_all"});
    assert_eq!(
        compile(&[open.clone(), open.clone()]).failure_mode(),
        FailureMode::FailOpen
    );
    assert_eq!(compile(&[open, closed]).failure_mode(), FailureMode::FailClosed);
}

fn compile_with(tiers: &[Value], bindings: &[(&str, u16)]) -> SandboxPolicy {
    let tiers: Vec<(String, Policy)> = tiers
        .iter()
        .map(|document| ("tier".to_owned(), Policy::parse(document).unwrap()))
        .collect();
    let bindings: Vec<BoundHost> = bindings
        .iter()
        .map(|(host, port)| BoundHost {
            hosts: vec![DomainPattern::parse(host).unwrap()],
            ports: vec![*port],
        })
        .collect();
    SandboxPolicy::compile_with(&Platform::default(), &tiers, &bindings).unwrap()
}

/// A request for `method path` on a flow to port 443 that shows `shown`, pinned for it.
fn request(policy: &SandboxPolicy, shown: &str, method: &str, path: &str, upgrade: bool) -> Verdict {
    let shown = name(shown);
    let path = crate::NormalPath::parse(path).unwrap().0;
    policy.decide_request(
        &Flow {
            protocol: Protocol::Tcp,
            to: "203.0.113.5:443".parse().unwrap(),
            name: Some(&shown),
            names_bound: std::slice::from_ref(&shown),
        },
        &RequestHead {
            method,
            path: &path,
            upgrade,
        },
    )
}

#[test]
fn a_list_of_requests_narrows_its_rule_and_hands_nothing_on() {
    let rules = json!([
        {"name": "read", "action": "allow", "domains": ["api.test"], "http": [
            {"methods": ["GET"], "paths": ["/repos/**"]},
            {"methods": ["POST"], "paths": ["/graphql"]},
            {"methods": ["GET"], "paths": ["/socket"], "upgrade": true},
        ]},
        {"name": "all of it", "action": "allow", "domains": ["api.test"]},
    ]);
    let policy = compile(&[json!({"mode": "allow_all", "rules": rules, "allowed_domains": ["api.test"]})]);
    let verdict = request(&policy, "api.test", "GET", "/repos/x", false);
    allowed(&verdict);
    assert_eq!((verdict.rule.as_deref(), verdict.intercept), (Some("read"), true));
    allowed(&request(&policy, "api.test", "GET", "/socket", true));
    for (method, path, upgrade, reason) in [
        ("DELETE", "/repos/x", false, Reason::MethodDenied),
        ("POST", "/repos/x", false, Reason::PathDenied),
        ("GET", "/graphql", false, Reason::PathDenied),
        ("GET", "/repos/x", true, Reason::PathDenied),
        ("POST", "/graphql", true, Reason::MethodDenied),
        ("GET", "/repos/../user", false, Reason::PathDenied),
    ] {
        let verdict = request(&policy, "api.test", method, path, upgrade);
        denied(&verdict, reason);
        assert_eq!(
            (verdict.rule.as_deref(), verdict.tier),
            (Some("read"), Some(0)),
            "{method} {path}"
        );
    }
    // Other hosts are none of the rule's business.
    let other = request(&policy, "other.test", "DELETE", "/", false);
    allowed(&other);
    assert!(!other.intercept);
}

#[test]
fn a_rule_that_looks_inside_cannot_be_passed_by_showing_no_name() {
    for inside in [
        json!({"http": [{"methods": ["GET"]}]}),
        json!({"tls": "intercept"}),
        json!({"credential": "KEY"}),
    ] {
        let mut rule = json!({"action": "allow", "domains": ["api.test"]});
        rule.as_object_mut()
            .unwrap()
            .extend(inside.as_object().unwrap().clone());
        let open = json!({"mode": "allow_all", "rules": [rule.clone()]});
        let ranged = json!({"mode": "allowlist", "rules": [rule], "allowed_cidrs": ["203.0.113.0/24"]});
        for document in [open, ranged] {
            let policy = compile(&[document]);
            let to = "203.0.113.5:443";
            assert!(matches!(
                kernel(&policy, to),
                KernelAction::Proxy | KernelAction::ProxyBound
            ));
            denied(&ask(&policy, to, None, &["api.test"]), Reason::NoName);
            // Nor by showing the name where DNS did not point.
            denied(
                &ask(&policy, to, Some("api.test"), &["other.test"]),
                Reason::AddressNotBound,
            );
            let verdict = ask(&policy, to, Some("api.test"), &["api.test"]);
            allowed(&verdict);
            assert!(verdict.intercept, "{verdict:?}");
            let other = ask(&policy, to, Some("other.test"), &["other.test"]);
            assert!(other.allowed && !other.intercept, "{other:?}");
        }
    }
}

#[test]
fn what_all_winning_rules_ask_holds_together() {
    let tier = |method: &str, credential: &str| {
        json!({"mode": "allowlist", "rules": [{
            "action": "allow", "domains": ["api.test"], "credential": credential, "http": [{"methods": [method, "PUT"]}],
        }]})
    };
    let policy = compile(&[
        tier("GET", "ONE"),
        tier("POST", "TWO"),
        json!({"mode": "allow_all"}),
    ]);
    let verdict = request(&policy, "api.test", "PUT", "/", false);
    allowed(&verdict);
    assert_eq!(verdict.credentials, ["ONE", "TWO"]);
    let verdict = request(&policy, "api.test", "GET", "/", false);
    denied(&verdict, Reason::MethodDenied);
    assert_eq!(verdict.tier, Some(1));
    assert_eq!(request(&policy, "api.test", "POST", "/", false).tier, Some(0));
    // A denial asks for nothing.
    assert!(verdict.credentials.is_empty() && !verdict.intercept);
}

#[test]
fn a_bound_host_is_read_under_plain_allow_all_and_nothing_else_is() {
    let policy = compile_with(&[], &[("api.test", 443), ("*.wild.test", 8443)]);
    let to = "203.0.113.5:443";
    assert_eq!(kernel(&policy, to), KernelAction::Proxy);
    let verdict = ask(&policy, to, Some("api.test"), &["api.test"]);
    allowed(&verdict);
    assert!(verdict.intercept);
    // Another host, or an address that DNS did not give for the name: unread, and the placeholder is worthless there.
    for (shown, bound) in [
        (Some("other.test"), &["other.test"][..]),
        (Some("api.test"), &[]),
        (None, &[]),
    ] {
        let verdict = ask(&policy, to, shown, bound);
        allowed(&verdict);
        assert!(!verdict.intercept && !verdict.needs_name, "{verdict:?}");
    }
    // Only where the address is pinned for a bound host is it worth waiting for a name.
    let unseen = ask(&policy, to, None, &["other.test", "api.test"]);
    allowed(&unseen);
    assert!(unseen.needs_name && !unseen.intercept);
    // A binding opens nothing.
    denied(
        &ask(&policy, "203.0.113.5:8443", Some("a.wild.test"), &["a.wild.test"]),
        Reason::PortDenied,
    );
    assert_eq!(
        kernel(&policy, "203.0.113.5:8443"),
        KernelAction::Deny(Reason::PortDenied)
    );

    let splice = json!({"mode": "allow_all", "rules": [{"action": "allow", "domains": ["api.test"], "tls": "splice"}]});
    let policy = compile_with(std::slice::from_ref(&splice), &[("api.test", 443)]);
    assert!(
        !ask(&policy, to, Some("api.test"), &["api.test"]).intercept,
        "an explicit splice is kept"
    );
    let listed =
        json!({"mode": "allow_all", "rules": [{"action": "allow", "domains": ["api.test"], "http": [{}]}]});
    let policy = compile_with(&[splice, listed], &[("api.test", 443)]);
    assert!(
        ask(&policy, to, Some("api.test"), &["api.test"]).intercept,
        "a list of requests needs a look"
    );
}

#[test]
fn bindings_on_many_ports_never_make_a_policy_too_large() {
    let document = json!({"mode": "allow_all", "rules": [
        {"action": "allow", "cidrs": ["0.0.0.0/0"], "ports": ["1000-2000", "3000-4000"]},
    ]});
    let ports: Vec<(&str, u16)> = (0..40).map(|index| ("api.test", 1000 + 7 * index)).collect();
    let policy = compile_with(&[document], &ports);
    for (_, port) in &ports {
        let found = policy
            .kernel_table()
            .lookup(SERVER.parse().unwrap(), Protocol::Tcp, *port);
        assert_eq!(found, KernelAction::Proxy, "{port}");
    }
    let denied = policy
        .kernel_table()
        .lookup(SERVER.parse().unwrap(), Protocol::Tcp, 2500);
    assert!(matches!(denied, KernelAction::Deny(_)));
}

#[test]
fn tiers_that_are_too_large_together_are_refused_by_name() {
    let ranges = |net: usize| -> Vec<String> {
        (0..5000)
            .map(|host| format!("203.{net}.{}.{}", host / 200, host % 200))
            .collect()
    };
    let tier = |net| {
        let document =
            json!({"mode": "allowlist", "allowed_cidrs": ranges(net), "denied_cidrs": ranges(net + 1)});
        Policy::parse(&document).unwrap()
    };
    let tiers = [
        ("organization".to_owned(), tier(1)),
        ("sandbox".to_owned(), tier(3)),
    ];
    let error = SandboxPolicy::compile(&Platform::default(), &tiers).unwrap_err();
    assert_eq!(error.field, "denied_cidrs");
    assert!(
        error
            .message
            .contains("the limit for one sandbox is 16384 (policy of sandbox, together with organization)")
    );
}
