//! Quotas of a policy, over real connections.

use harness::{
    probe,
    sandbox::Sandbox,
    world::{API, EVIL, OK},
};
use serde_json::{Value, json};

use crate::machine::Machine;

/// Bytes that may go to one host.
const LIMIT: u64 = 200_000;
/// A part of them, so that two do not fit beside the TLS around them.
const PART: u64 = 100_000;

fn counted(quotas: &Value) -> Value {
    json!({
        "mode": "allowlist", "allowed_domains": ["ok.test", "api.test", "plain.test"], "allowed_ports": [80, 443],
        "quotas": quotas,
    })
}

/// Posts so many bytes. Gives the status that curl tells (000: none) and what was answered.
#[track_caller]
fn post(sandbox: &Sandbox, url: &str, bytes: u64) -> (String, String) {
    let line = format!(
        "head -c {bytes} /dev/zero > /workspace/part; : > /workspace/answer; \
         curl -sS -m 30 --http1.1 --cacert {} -H 'Expect:' --data-binary @/workspace/part -o /workspace/answer \
         -w '%{{http_code}}' {url}",
        probe::CA
    );
    let status = sandbox.sh(&line).stdout;
    let answer = sandbox.sh_ok("head -c 2000 /workspace/answer | tr -d '\\0'");
    (status, answer)
}

pub(crate) fn what_goes_to_a_host_is_counted_over_all_connections(machine: &Machine) {
    let quotas = |limit: u64| counted(&json!({ "upload_bytes_per_host": limit }));
    let sandbox = machine.organization.sandbox(&json!({ "network": quotas(LIMIT) }));
    let probe = machine.probe(&sandbox);
    assert_eq!(post(&sandbox, "https://ok.test/", PART).0, "200");
    assert_eq!(
        post(&sandbox, "https://ok.test/", PART).0,
        "000",
        "reset within the second"
    );
    let record = sandbox.audited(&json!({
        "decision": "deny", "reason": "quota", "tier": "sandbox", "rule": "quotas.upload_bytes_per_host",
        "host": "ok.test", "alert": "quota_exceeded",
    }));
    // Another host has its own, and what was reset is no end of the sandbox.
    probe
        .try_one(&probe::https("api.test", "api.test"))
        .assert_answered("hello from api.test");
    let sent: u64 = sandbox
        .audit("host=ok.test")
        .iter()
        .filter_map(|event| event["bytes_up"].as_u64())
        .sum();
    assert!((PART..=LIMIT).contains(&sent), "{sent} bytes");

    // A request in clear is told why.
    let (status, answer) = post(&sandbox, "http://plain.test/", LIMIT + PART);
    assert_eq!(status, "429", "{answer}");
    let answer: Value = serde_json::from_str(&answer).expect("JSON");
    assert_eq!(answer["code"], "egress_refused");
    assert_eq!(answer["rule"], "quotas.upload_bytes_per_host");

    let id = record["id"].as_str().expect("an id");
    let explained = sandbox
        .client()
        .get(&format!("/egress/audit/{id}/explain"))
        .send()
        .ok();
    let sentence = explained["sentence"].as_str().expect("a sentence");
    assert!(
        sentence.contains(&format!("says {LIMIT} in `quotas.upload_bytes_per_host`")),
        "{sentence}"
    );
    assert_eq!(explained["calls"], json!([]));

    // What was used stays used under another limit.
    sandbox.set_network(&quotas(LIMIT + 2 * PART));
    assert_eq!(post(&sandbox, "https://ok.test/", PART).0, "200");
    assert_eq!(post(&sandbox, "https://ok.test/", 2 * PART).0, "000");
    sandbox.set_network(&counted(&json!({})));
    assert_eq!(post(&sandbox, "https://ok.test/", 5 * PART).0, "200");
    sandbox.stop();
}

pub(crate) fn hosts_beyond_the_quota_are_not_met(machine: &Machine) {
    // What the kernel would otherwise forward by itself.
    let quotas = json!({ "mode": "allow_all", "quotas": { "new_hosts_per_hour": 2 } });
    let sandbox = machine.organization.sandbox(&json!({ "network": quotas }));
    let probe = machine.probe(&sandbox);
    for name in ["ok.test", "api.test", "ok.test"] {
        let attempt = probe::https(name, name);
        probe
            .try_one(&attempt)
            .assert_answered(&format!("hello from {name}"));
    }
    let mark = machine.world.capture().mark();
    probe
        .try_one(&probe::https("evil.test", "evil.test"))
        .assert_refused();
    probe.try_one(&probe::https(EVIL, "ok.test")).assert_refused();
    machine.world.capture().assert_nothing_to(EVIL, mark);
    let refused = json!({
        "decision": "deny", "reason": "quota", "rule": "quotas.new_hosts_per_hour", "ip": EVIL.to_string(),
    });
    sandbox.audited(&refused);
    probe
        .try_one(&probe::https("api.test", "api.test"))
        .assert_answered("hello from api.test");
    for address in [OK, API] {
        let ip = json!({ "decision": "allow", "ip": address.to_string() });
        sandbox.audited(&ip);
    }
    sandbox.stop();
}

pub(crate) fn a_quota_in_audit_mode_is_told_and_stops_nothing(machine: &Machine) {
    let mut policy = counted(&json!({ "upload_bytes_per_host": PART, "new_hosts_per_hour": 1 }));
    policy["enforcement"] = json!("audit");
    let sandbox = machine.organization.sandbox(&json!({ "network": policy }));
    let probe = machine.probe(&sandbox);
    assert_eq!(post(&sandbox, "https://ok.test/", 2 * PART).0, "200");
    probe
        .try_one(&probe::https("api.test", "api.test"))
        .assert_answered("hello from api.test");
    for (rule, host) in [
        ("quotas.upload_bytes_per_host", "ok.test"),
        ("quotas.new_hosts_per_hour", "api.test"),
    ] {
        sandbox.audited(&json!({
            "verdict": "audit", "enforced": false, "reason": "quota", "rule": rule, "host": host,
        }));
    }
    sandbox.stop();
}
