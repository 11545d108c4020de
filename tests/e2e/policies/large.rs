//! A policy as large as a document may be, on a sandbox that runs.

use harness::{
    probe::{self, Probe},
    sandbox::Sandbox,
    wait,
    world::{API, EVIL, OK},
};
use serde_json::{Value, json};

use super::CUT;
use crate::machine::Machine;

/// Rules of a document.
const RULES: usize = 10_000;
/// The places of the rules that are tried: of names, and of addresses.
const BY_NAME: [usize; 3] = [0, RULES / 2, RULES - 2];
const BY_ADDRESS: [usize; 3] = [1, RULES / 2 + 1, RULES - 1];

fn name(index: usize) -> String {
    format!("n{index}.wild.test")
}

/// Names and ranges in turn. The addresses that are tried stand in the first, the middle and the last range.
fn rule(index: usize) -> Value {
    let name = format!("rule-{index}");
    if index.is_multiple_of(2) {
        return json!({ "name": name, "action": "allow", "domains": [self::name(index)], "ports": [443] });
    }
    let (range, port) = match index {
        index if index == BY_ADDRESS[0] => (format!("{OK}/32"), 22),
        index if index == BY_ADDRESS[1] => (format!("{API}/32"), 443),
        index if index == BY_ADDRESS[2] => (format!("{OK}/32"), 8443),
        index if index % 4 == 1 => (format!("2001:db8:{index:x}::/48"), 443),
        index => (format!("192.0.2.{}/32", index % 256), 8443),
    };
    json!({ "name": name, "action": "allow", "protocol": "tcp", "cidrs": [range], "ports": [port] })
}

fn document() -> Value {
    let rules: Vec<Value> = (0..RULES).map(rule).collect();
    json!({ "mode": "allowlist", "rules": rules })
}

/// Replaces the policy, and waits until the node enforces it: that may take longer than an answer waits.
#[track_caller]
fn put(sandbox: &Sandbox, policy: &Value) {
    let path = sandbox.path("/network");
    sandbox.client().put(&path).json(policy).send().ok();
    wait::until("the node enforces the policy", CUT, || {
        let shown = sandbox.client().get(&path).send().ok();
        (shown["applied"] == true).then_some(())
    });
}

/// What the rules that are tried let through, but for those that deny now, and what no rule does.
#[track_caller]
fn assert_enforced(probe: &Probe<'_>, machine: &Machine, without: &[usize]) {
    let mark = machine.world.capture().mark();
    let by_name = BY_NAME.map(|index| (index, probe::https(name(index), &name(index))));
    let by_address = [
        (BY_ADDRESS[0], probe::tcp(OK, 22, "canary")),
        (BY_ADDRESS[1], probe::https(API, "api.test")),
        (BY_ADDRESS[2], probe::tcp(OK, 8443, "canary")),
    ];
    for (index, attempt) in by_name.into_iter().chain(by_address) {
        let outcome = probe.try_one(&attempt);
        if without.contains(&index) {
            outcome.assert_refused_at_connect();
        } else {
            assert_eq!(outcome.outcome, "answered", "rule {index}: {outcome:?}");
        }
    }
    // Names and addresses beside those that are listed, and other ports of those.
    for refused in [
        probe::https(name(1), &name(1)),
        probe::https("evil.test", "evil.test"),
        probe::https("wild.test", "wild.test"),
        probe::tcp(EVIL, 22, "canary"),
        probe::tcp(EVIL, 443, "canary"),
        probe::tcp(OK, 443, "canary"),
        probe::tcp(API, 22, "canary"),
    ] {
        probe.try_one(&refused).assert_refused_at_connect();
    }
    machine.world.capture().assert_nothing_to(EVIL, mark);
    assert!(machine.world.dns.queries_for(&name(1)).is_empty());
}

pub(crate) fn ten_thousand_rules_are_enforced_and_one_more_changes_nothing(machine: &Machine) {
    let organization = machine.node.register("large");
    let sandbox = organization.sandbox(&json!({ "network": { "mode": "deny_all" } }));
    let probe = machine.probe(&sandbox);
    put(&sandbox, &document());
    assert_enforced(&probe, machine, &[]);
    // One of each.
    let denied = [BY_NAME[1], BY_ADDRESS[2]];
    let mut changed = document();
    for index in denied {
        changed["rules"][index]["action"] = json!("deny");
    }
    put(&sandbox, &changed);
    assert_enforced(&probe, machine, &denied);
    put(&sandbox, &document());

    // What is too much, for a document, for a prefix and for all tiers together, names the field and changes nothing.
    let path = sandbox.path("/network");
    let revision = || sandbox.client().get(&path).send().ok()["revision"].clone();
    let before = revision();
    let mut one_more = document();
    let rules = one_more["rules"].as_array_mut().expect("a list");
    rules.push(json!({ "action": "deny", "domains": ["evil.test"] }));
    let mut many_ports = document();
    let ports: Vec<u16> = (0..20).map(|number| 1000 + 2 * number).collect();
    many_ports["rules"][BY_ADDRESS[0]]["ports"] = json!(ports);
    let denied: Vec<String> = (0..10_000)
        .map(|number| format!("2001:db8:8000:{number:x}::/64"))
        .collect();
    organization
        .set_egress(&json!({ "mode": "denylist", "denied_cidrs": denied, "allowed_ports": [22, 443, 8443] }));
    let mut many_ranges = document();
    let allowed: Vec<String> = (0..7_000)
        .map(|number| format!("2001:db8:9000:{number:x}::/64"))
        .collect();
    many_ranges["allowed_cidrs"] = json!(allowed);
    for (too_much, field) in [
        (one_more, "rules"),
        (many_ports, "rules"),
        (many_ranges, "allowed_cidrs"),
    ] {
        let answer = sandbox.client().put(&path).json(&too_much).send();
        answer.refused_field(field);
        assert_eq!(revision(), before, "{}", answer.text());
    }
    assert_enforced(&probe, machine, &[]);
    sandbox.stop();
}
