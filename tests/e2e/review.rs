//! What people ask of the egress audit afterwards: why, what would allow it, what another policy would have said.

use harness::{
    probe,
    sandbox::Sandbox,
    world::{EVIL, OK},
};
use serde_json::{Value, json};

use crate::machine::Machine;

const CLOSED: &[&str] = &["ok.test"];

fn listing(names: &[&str]) -> Value {
    json!({ "mode": "allowlist", "allowed_domains": names })
}

#[track_caller]
fn answer(sandbox: &Sandbox, path: &str, body: &Value) -> Value {
    sandbox.client().post(&sandbox.path(path)).json(body).send().ok()
}

/// How many attempts of a list are for the name.
fn counted(list: &Value, host: &str) -> u64 {
    let groups = list.as_array().expect("a list").iter();
    let for_host = groups.filter(|group| group["host"] == host);
    for_host.filter_map(|group| group["count"].as_u64()).sum()
}

pub(crate) fn a_record_is_explained_and_allowed_by_one_call(machine: &Machine) {
    let sandbox = machine
        .organization
        .sandbox(&json!({ "network": listing(CLOSED) }));
    let probe = machine.probe(&sandbox);
    assert_eq!(
        probe.try_one(&probe::https("api.test", "api.test")).outcome,
        "no_name"
    );
    let event = sandbox.audited(&json!({ "host": "api.test", "decision": "deny" }));
    let id = event["id"].as_str().expect("an id");
    let explain = format!("/egress/audit/{id}/explain");
    let client = sandbox.client();
    let explained = client.get(&explain).send().ok();
    assert_eq!(explained["decision_now"], "deny", "{explained}");
    let sentence = explained["sentence"].as_str().expect("a sentence");
    assert!(
        sentence.contains("`api.test`") && sentence.contains("was refused"),
        "{sentence}"
    );
    let [call] = explained["calls"].as_array().expect("calls").as_slice() else {
        panic!("not one call: {explained}");
    };
    assert_eq!(call["path"], format!("/api/v1{}", sandbox.path("/network")));
    assert_eq!(
        call["body"],
        json!({ "allowed_domains": ["ok.test", "api.test"] })
    );
    // Nobody else has such a record.
    let stranger = machine.node.register("strangers");
    stranger.client.get(&explain).send().refused(404, "NOT_FOUND");
    let allow = format!("/egress/audit/{id}/allow");
    stranger.client.post(&allow).send().refused(404, "NOT_FOUND");
    assert_eq!(
        probe.try_one(&probe::https("api.test", "api.test")).outcome,
        "no_name"
    );
    let allowed = client.post(&allow).send().ok();
    assert_eq!(
        (&allowed["decision_now"], &allowed["applied"]),
        (&json!("allow"), &json!(true)),
        "{allowed}"
    );
    probe
        .try_one(&probe::https("api.test", "api.test"))
        .assert_answered("hello from api.test");
    assert_eq!(
        probe.try_one(&probe::https("evil.test", "evil.test")).outcome,
        "no_name"
    );
    let again = client.post(&allow).send().ok();
    assert_eq!(again["calls"], json!([]), "{again}");
    // What nobody may reach no policy allows.
    let private = probe::tcp("10.0.0.5", 443, "x");
    probe.try_one(&private).assert_refused();
    let event = sandbox.audited(&json!({ "ip": "10.0.0.5", "decision": "deny" }));
    let allow = format!("/egress/audit/{}/allow", event["id"].as_str().expect("an id"));
    client.post(&allow).send().refused(409, "CONFLICT");
    sandbox.stop();
}

pub(crate) fn a_candidate_is_tried_on_what_happened(machine: &Machine) {
    let sandbox = machine
        .organization
        .sandbox(&json!({ "network": listing(CLOSED) }));
    let probe = machine.probe(&sandbox);
    probe
        .try_one(&probe::https("ok.test", "ok.test"))
        .assert_answered("hello from ok.test");
    assert_eq!(
        probe.try_one(&probe::https("api.test", "api.test")).outcome,
        "no_name"
    );
    sandbox.audited(&json!({ "host": "ok.test", "decision": "allow" }));
    sandbox.audited(&json!({ "host": "api.test", "decision": "deny" }));
    let before = sandbox.client().get(&sandbox.path("/network")).send().ok();
    let simulated = answer(
        &sandbox,
        "/network/simulate",
        &json!({ "network": listing(&["api.test"]) }),
    );
    assert!(
        counted(&simulated["newly_allowed"], "api.test") > 0,
        "{simulated}"
    );
    assert_eq!(counted(&simulated["newly_denied"], "ok.test"), 1, "{simulated}");
    assert_eq!(simulated["truncated"], false);
    // The same policy changes nothing, in the answer as in the sandbox.
    let simulated = answer(
        &sandbox,
        "/network/simulate",
        &json!({ "network": listing(CLOSED) }),
    );
    assert_eq!(
        (&simulated["newly_allowed"], &simulated["newly_denied"]),
        (&json!([]), &json!([])),
        "{simulated}"
    );
    assert!(simulated["unchanged"].as_u64() > Some(1), "{simulated}");
    let after = sandbox.client().get(&sandbox.path("/network")).send().ok();
    assert_eq!(after, before);
    let simulate = |body: &Value| {
        sandbox
            .client()
            .post(&sandbox.path("/network/simulate"))
            .json(body)
            .send()
    };
    simulate(&json!({})).refused_field("network");
    simulate(&json!({ "network": { "mode": "some" } })).refused_field("network.mode");
    simulate(&json!({ "network": listing(CLOSED), "since": "yesterday" })).refused_field("since");
    let none = answer(
        &sandbox,
        "/network/simulate",
        &json!({ "network": listing(&[]), "until": 1 }),
    );
    assert_eq!(none["attempts"], 0, "{none}");
    sandbox.stop();
}

pub(crate) fn what_was_done_in_audit_mode_becomes_a_policy(machine: &Machine) {
    let mut open = listing(&[]);
    open["enforcement"] = json!("audit");
    let sandbox = machine.organization.sandbox(&json!({ "network": open }));
    let probe = machine.probe(&sandbox);
    let done = [
        probe::https("ok.test", "ok.test"),
        probe::http("plain.test", "plain.test"),
        probe::https("deep.wild.test", "deep.wild.test"),
    ];
    for attempt in &done {
        probe.try_one(attempt).assert_answered("hello from");
    }
    for host in ["ok.test", "plain.test", "deep.wild.test"] {
        sandbox.audited(&json!({ "host": host, "enforced": false, "ip": ip_of(&sandbox, host) }));
    }
    let suggested = answer(&sandbox, "/network/suggest", &json!({}));
    let policy = &suggested["policy"];
    assert_eq!(policy["enforcement"], "enforce", "{suggested}");
    assert_eq!(
        policy["allowed_domains"],
        json!(["deep.wild.test", "ok.test"]),
        "{suggested}"
    );
    sandbox.set_network(policy);
    for attempt in &done {
        probe.try_one(attempt).assert_answered("hello from");
    }
    let mark = machine.world.capture().mark();
    for name in ["evil.test", "api.test", "other.wild.test"] {
        assert_eq!(
            probe.try_one(&probe::https(name, name)).outcome,
            "no_name",
            "{name}"
        );
    }
    probe.try_one(&probe::tcp(OK, 8443, "x")).assert_refused();
    machine.world.capture().assert_nothing_to(EVIL, mark);
    sandbox.stop();
}

/// Where a recorded flow for the name went.
#[track_caller]
fn ip_of(sandbox: &Sandbox, host: &str) -> Value {
    let with_address = |event: &&Value| event["host"] == host && event["ip"].is_string();
    let found = harness::wait::within(probe::TIMEOUT, || {
        sandbox
            .audit("")
            .iter()
            .find(with_address)
            .map(|event| event["ip"].clone())
    });
    found.unwrap_or_else(|| panic!("no flow to {host} is recorded"))
}
