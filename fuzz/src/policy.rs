//! Policy documents, as they were sent or made of choices: what is refused says where, what is accepted survives the way
//! through the store, and the decision, the kernel's table and a reader of the bare document agree.

mod naive;

use std::net::{IpAddr, SocketAddr};

use sandgate_policy::{
    DomainName, Flow, KernelAction, KernelTable, Platform, Policy, PolicyError, Protocol, Reason,
    SandboxPolicy, Verdict,
};
use serde_json::{Value, json};

use crate::bytes::Choices;

/// Longest message to somebody who wrote a document, in bytes: it quotes, and not without end.
const MESSAGE_MAX: usize = 1000;

const PATTERNS: [&str; 8] = [
    "*",
    "wild.test",
    "*.wild.test",
    "*.a.wild.test",
    "evil.test",
    "a.wild.test",
    "host.internal",
    "*.co.uk",
];
const NAMES: [&str; 6] = [
    "wild.test",
    "a.wild.test",
    "b.a.wild.test",
    "evil.test",
    "host.internal",
    "single",
];
const RANGES: [&str; 14] = [
    "::/0",
    "2001:db8::/32",
    "2001:db8:0:5::/64",
    "2001:db8:0:5::5",
    "2002::/16",
    "64:ff9b::/64",
    "::ffff:203.0.113.0/120",
    "0.0.0.0/0",
    "203.0.113.0/24",
    "203.0.113.0/25",
    "203.0.113.5/32",
    "203.0.113.6/31",
    "198.51.100.0/24",
    "10.0.0.0/8",
];
const ADDRESSES: [&str; 12] = [
    "2001:db8:0:5::5",
    "2001:db8::1",
    "2002:cb00:7105::1",
    "64:ff9b::203.0.113.5",
    "2001:0:cb00:7105::1",
    "::ffff:203.0.113.5",
    "203.0.113.5",
    "203.0.113.7",
    "203.0.113.200",
    "198.51.100.1",
    "10.0.0.1",
    "169.254.169.254",
];
const SPANS: [&str; 7] = ["22", "80", "443", "442-444", "1-1024", "1-65535", "443-8010"];
const PORTS: [u16; 8] = [1, 22, 80, 442, 443, 1024, 8000, 65535];

pub(crate) fn check(data: &[u8]) {
    let [kind, rest @ ..] = data else { return };
    if kind & 1 == 0 {
        let Ok(document) = serde_json::from_slice::<Value>(rest) else {
            return;
        };
        if let Some(policy) = parsed(&document) {
            decided(&[(document, policy)], &mut Choices(&[]));
        }
        return;
    }
    let mut choices = Choices(rest);
    let documents = choices.some(2, document);
    let tiers: Vec<(Value, Policy)> = documents
        .into_iter()
        .filter_map(|document| parsed(&document).map(|policy| (document, policy)))
        .collect();
    if !tiers.is_empty() {
        decided(&tiers, &mut choices);
    }
}

fn parsed(document: &Value) -> Option<Policy> {
    let policy = match Policy::parse(document) {
        Ok(policy) => policy,
        Err(error) => {
            says_where(document, &error);
            return None;
        }
    };
    let written = policy.to_value();
    assert_eq!(Policy::parse(&written).as_ref(), Ok(&policy), "{written}");
    let text = serde_json::to_string(&policy).expect("it can be written");
    let again: Policy = serde_json::from_str(&text).expect("it can be read");
    assert_eq!(again, policy);
    assert_eq!(again.to_value(), written);
    Some(policy)
}

fn says_where(document: &Value, error: &PolicyError) {
    assert!(
        !error.message.is_empty() && error.message.len() <= MESSAGE_MAX,
        "{error}"
    );
    assert!(error.field.len() <= MESSAGE_MAX);
    assert!(
        !error.field.is_empty() || !document.is_object(),
        "{error} in {document}"
    );
    assert!(leads_somewhere(document, &error.field), "{error} in {document}");
    let below = error.clone().under("network").field;
    assert!(below.starts_with("network"));
}

/// Whether a path leads to a value of the document, or to a field that an object of it lacks.
fn leads_somewhere(value: &Value, path: &str) -> bool {
    let go_on = |value: &Value, rest: &str| match rest.strip_prefix('.') {
        Some(rest) => value.is_object() && leads_somewhere(value, rest),
        None => rest.is_empty() || rest.starts_with('[') && leads_somewhere(value, rest),
    };
    match value {
        _ if path.is_empty() => true,
        Value::Array(items) => path
            .strip_prefix('[')
            .and_then(|rest| rest.split_once(']'))
            .and_then(|(index, rest)| Some((items.get(index.parse::<usize>().ok()?)?, rest)))
            .is_some_and(|(item, rest)| go_on(item, rest)),
        Value::Object(fields) => {
            let is_name = path.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
            is_name
                || fields
                    .iter()
                    .any(|(name, value)| match path.strip_prefix(name.as_str()) {
                        Some(rest) => go_on(value, rest),
                        // Of a long name the beginning is told.
                        None => path
                            .strip_suffix('…')
                            .is_some_and(|beginning| name.starts_with(beginning)),
                    })
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => false,
    }
}

fn document(choices: &mut Choices<'_>) -> Value {
    let mode = choices.pick(&["allow_all", "deny_all", "allowlist", "denylist"]);
    let mut document = json!({
        "mode": mode,
        "denied_domains": choices.some(2, |choices| choices.pick(&PATTERNS)),
        "denied_cidrs": choices.some(2, |choices| choices.pick(&RANGES)),
        "allowed_ports": choices.some(3, |choices| choices.pick(&PORTS)),
        "rules": choices.some(4, rule),
        "enforcement": choices.pick(&["enforce", "enforce", "audit"]),
    });
    if mode != "deny_all" {
        document["allowed_domains"] = json!(choices.some(2, |choices| choices.pick(&PATTERNS)));
        document["allowed_cidrs"] = json!(choices.some(2, |choices| choices.pick(&RANGES)));
    }
    document
}

fn rule(choices: &mut Choices<'_>) -> Value {
    let protocol = choices.pick(&["http", "http", "tcp", "udp"]);
    let allow = choices.flag();
    let mut rule = json!({
        "action": if allow { "allow" } else { "deny" },
        "protocol": protocol,
        "cidrs": choices.some(2, |choices| choices.pick(&RANGES)),
    });
    if protocol != "udp" {
        rule["domains"] = json!(choices.some(2, |choices| choices.pick(&PATTERNS)));
    }
    if choices.flag() || protocol == "udp" {
        rule["ports"] = json!([choices.pick(&SPANS), choices.pick(&SPANS)]);
    }
    if allow && protocol == "http" {
        match choices.below(6) {
            0 => rule["tls"] = json!("intercept"),
            1 => rule["credential"] = json!("KEY"),
            2 => rule["http"] = json!([{"methods": ["GET"], "paths": ["/a/**"]}]),
            _ => {}
        }
    }
    rule
}

fn decided(tiers: &[(Value, Policy)], choices: &mut Choices<'_>) {
    let platform = Platform::default();
    let named: Vec<(String, Policy)> = tiers
        .iter()
        .map(|(_, policy)| ("tier".to_owned(), policy.clone()))
        .collect();
    let Ok((policy, table)) = SandboxPolicy::compile_with_table(&platform, &named, &[]) else {
        // One alone fits: that was asked when it was parsed.
        assert!(tiers.len() > 1, "{tiers:?}");
        return;
    };
    assert_eq!(policy.kernel_table(), table);
    let documents: Vec<Value> = tiers.iter().map(|(_, policy)| policy.to_value()).collect();
    let names = NAMES.map(|name| DomainName::parse(name).expect("a name"));
    let (some, port) = (choices.byte(), choices.half());
    let bound: Vec<DomainName> = names
        .iter()
        .enumerate()
        .filter(|(index, _)| some >> index & 1 == 1)
        .map(|(_, name)| name.clone())
        .collect();
    for address in ADDRESSES {
        let address: IpAddr = address.parse().expect("an address");
        for port in [80, 443, 1024, port] {
            let to = SocketAddr::new(address, port);
            let action = by_table(&policy, &table, to);
            for name in names.iter().map(Some).chain([None]) {
                let flow = Flow {
                    protocol: Protocol::Tcp,
                    to,
                    name,
                    names_bound: &bound,
                };
                let verdict = policy.decide(&flow);
                let context = || format!("{flow:?}: {verdict:?}, {action:?} by {documents:?}");
                if let Some(name) = name {
                    let expected = naive::allows(&platform, &documents, to, name, &bound);
                    assert_eq!(verdict.allowed, expected, "{}", context());
                    // Whoever may be reached because a list holds the name may be asked for.
                    let listed = verdict
                        .rule
                        .as_deref()
                        .is_some_and(|rule| rule.starts_with("allowed_domains"));
                    assert!(
                        !verdict.allowed || !listed || policy.decide_name(name).allowed,
                        "{}",
                        context()
                    );
                }
                fits(action, &verdict, bound.is_empty(), context);
            }
        }
    }
}

/// What the kernel finds in its table.
fn by_table(policy: &SandboxPolicy, table: &KernelTable, to: SocketAddr) -> KernelAction {
    let coarse = |action| match action {
        KernelAction::Deny(_) => KernelAction::Deny(Reason::DefaultDeny),
        KernelAction::Pass | KernelAction::Proxy | KernelAction::ProxyBound | KernelAction::Audit(_) => {
            action
        }
    };
    for protocol in [Protocol::Udp, Protocol::Tcp] {
        let decided = policy.decide_address_port(protocol, to);
        let found = table.lookup(to.ip().to_canonical(), protocol, to.port());
        let platform = decided == KernelAction::Deny(Reason::PlatformDenied);
        assert!(
            platform || coarse(found) == coarse(decided),
            "{to}: {found:?} is {decided:?}"
        );
    }
    policy.decide_address_port(Protocol::Tcp, to)
}

/// Whether the kernel may say this where the decision is that.
fn fits(action: KernelAction, verdict: &Verdict, nothing_bound: bool, context: impl Fn() -> String) {
    match action {
        KernelAction::Deny(_) => assert!(!verdict.allowed && !verdict.needs_name, "{}", context()),
        KernelAction::Pass => {
            assert!(
                verdict.allowed && !verdict.needs_name && !verdict.is_audited(),
                "{}",
                context()
            );
        }
        KernelAction::ProxyBound if nothing_bound => {
            assert!(!verdict.allowed && !verdict.needs_name, "{}", context());
        }
        KernelAction::ProxyBound | KernelAction::Proxy => {}
        KernelAction::Audit(_) => panic!("of TCP: {}", context()),
    }
}
