//! Whether what is installed inside trusts the sandbox's authority, as the API tells it.

use std::net::Ipv4Addr;

use harness::{
    probe::{self, Probe},
    sandbox::Sandbox,
};
use serde_json::{Value, json};

use super::{Promise, policy};

const HOST: &str = "doctor.sandgate.internal";
const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
const CLIENTS: [&str; 8] = [
    "curl",
    "openssl",
    "python-ssl",
    "python-requests",
    "python-httpx",
    "node-fetch",
    "node-https",
    "git",
];

#[track_caller]
fn doctor(sandbox: &Sandbox) -> Value {
    let answer = sandbox.client().get(&sandbox.path("/network/doctor")).send().ok();
    let names: Vec<&str> = clients(&answer)
        .iter()
        .filter_map(|client| client["name"].as_str())
        .collect();
    assert_eq!(names, CLIENTS, "{answer:#}");
    assert_eq!(
        (&answer["success"], &answer["host"]),
        (&json!(true), &json!(HOST))
    );
    answer
}

#[track_caller]
fn clients(answer: &Value) -> &[Value] {
    answer["clients"]
        .as_array()
        .unwrap_or_else(|| panic!("no clients in {answer}"))
}

/// Everything is well but these clients, which are as told.
#[track_caller]
fn assert_well_but(answer: &Value, others: &[(&str, Value)]) {
    assert_eq!(
        answer["dns"],
        json!({ "installed": true, "ok": true, "detail": GATEWAY.to_string() }),
        "{answer:#}"
    );
    for client in clients(answer) {
        let other = others.iter().find(|(name, _)| client["name"] == *name);
        let expected = other.map_or_else(
            || json!({ "installed": true, "ok": true }),
            |(_, told)| told.clone(),
        );
        for (field, value) in expected.as_object().expect("an object") {
            assert_eq!(&client[field], value, "{answer:#}");
        }
    }
}

/// The detail on a client.
#[track_caller]
fn detail<'a>(answer: &'a Value, name: &str) -> &'a str {
    let client = clients(answer).iter().find(|client| client["name"] == name);
    client
        .and_then(|client| client["detail"].as_str())
        .expect("a detail")
}

pub(crate) fn every_client_is_well_whatever_the_policy_says(promise: &Promise) {
    for network in [policy(), json!({ "mode": "deny_all" })] {
        let sandbox = promise.organization.sandbox(&json!({ "network": network }));
        let mark = promise.world.capture().mark();
        let answer = doctor(&sandbox);
        assert_well_but(&answer, &[]);
        assert_eq!(answer["healthy"], true, "{answer:#}");
        // Nothing of it left the node, not even a question.
        let sent = promise.world.capture().begun_since(mark);
        assert!(sent.is_empty(), "{sent:#?}");
        // Whose it is, inside too.
        let told = sandbox.sh_ok(&format!("curl -sS --max-time 30 https://{HOST}/"));
        let told: Value = serde_json::from_str(&told).expect("JSON");
        assert_eq!(told, json!({ "sandgate": "doctor", "sandbox_id": sandbox.id }));
        // The rest is as it was: a refusal comes after every record of the doctor would have.
        let refused = sandbox.sh("curl -sS --max-time 30 https://evil.test/");
        assert_ne!(refused.exit_code, 0, "{refused:?}");
        sandbox.audited(&json!({ "decision": "deny", "host": "evil.test" }));
        let about: Vec<Value> = sandbox.audit("");
        assert!(
            about
                .iter()
                .all(|event| event["host"] != HOST && event["ip"] != GATEWAY.to_string()),
            "{about:#?}"
        );
        sandbox.stop();
    }
    let asked = promise.world.dns.queries();
    assert!(
        !asked.iter().any(|query| query.name.ends_with(HOST)),
        "the world was asked for it"
    );
}

pub(crate) fn a_client_that_does_not_trust_is_told_apart(promise: &Promise) {
    let sandbox = promise.organization.sandbox(&json!({
        "network": policy(), "env": { "REQUESTS_CA_BUNDLE": probe::CA },
    }));
    sandbox.write(probe::CA, promise.world.ca.pem());
    let answer = doctor(&sandbox);
    assert_well_but(
        &answer,
        &[("python-requests", json!({ "installed": true, "ok": false }))],
    );
    assert_eq!(answer["healthy"], false, "{answer:#}");
    assert!(
        detail(&answer, "python-requests").contains("CERTIFICATE_VERIFY_FAILED"),
        "{answer:#}"
    );
    sandbox.stop();
}

pub(crate) fn what_is_not_installed_or_hostile_is_told_apart(promise: &Promise) {
    let sandbox = promise.organization.sandbox(&json!({
        "network": policy(), "env": { "PATH": "/workspace/bin" },
    }));
    sandbox.sh_ok(
        "PATH=/usr/local/bin:/usr/bin:/bin; mkdir /workspace/bin
         for program in openssl python3 node getent; do ln -s $(command -v $program) /workspace/bin; done",
    );
    let absent = json!({ "installed": false, "ok": false, "detail": "not installed" });
    let answer = doctor(&sandbox);
    assert_well_but(&answer, &[("curl", absent.clone()), ("git", absent.clone())]);
    // Less is installed, and that is well.
    assert_eq!(answer["healthy"], true, "{answer:#}");

    let curl = "#!/bin/sh\nwhile :; do printf '\\033[2J\\nfine\\342\\200\\256\\000' >&2; done\n";
    sandbox.write("/workspace/bin/curl", curl);
    sandbox.sh_ok("/bin/chmod +x /workspace/bin/curl");
    let answer = doctor(&sandbox);
    assert_well_but(
        &answer,
        &[
            ("curl", json!({ "installed": true, "ok": false })),
            ("git", absent),
        ],
    );
    assert_eq!(answer["healthy"], false, "{answer:#}");
    let said = detail(&answer, "curl");
    assert!(
        said.contains("fine")
            && said.chars().count() <= 300
            && said
                .chars()
                .all(|character| character.is_ascii_graphic() || character == ' '),
        "{said:?}"
    );
    sandbox.stop();
}

pub(crate) fn the_gateway_has_that_one_host_only(promise: &Promise) {
    let sandbox = promise.organization.sandbox(&json!({
        "network": { "mode": "allow_all", "allowed_ports": [80, 443] },
    }));
    let attacker = Probe::install(&sandbox, &promise.world);
    let mark = promise.world.capture().mark();
    let to = "169.254.1.1";
    let attempts = [
        probe::https(to, "api.test"),
        probe::https(to, &format!("x.{HOST}")),
        probe::https(to, "sandgate.internal"),
        probe::https_without_sni(to),
        probe::tcp(to, 443, &format!("GET / HTTP/1.1\r\nHost: {HOST}\r\n\r\n")),
    ];
    for (outcome, attempt) in attacker.try_all(&attempts).iter().zip(&attempts) {
        // What is no TLS may be told so, by an alert of seven bytes.
        let alert = outcome.data.starts_with("\u{15}\u{3}") && outcome.data.len() == 7;
        assert!(
            outcome.data.is_empty() || (attempt["kind"] == "tcp" && alert),
            "{attempt}: {outcome:?}"
        );
        outcome.assert_at_once();
    }
    for said in [
        json!({ "protocol": "tls", "host": "api.test" }),
        json!({ "protocol": "tls", "host": "sandgate.internal" }),
        json!({ "protocol": "tcp" }),
    ] {
        let refusal = json!({ "decision": "deny", "reason": "platform_denied", "ip": to, "port": 443 });
        sandbox.audited(&probe::with(refusal, said));
    }
    for attempt in [
        probe::http(to, HOST),
        probe::tcp(to, 8443, "x"),
        probe::tcp("169.254.1.2", 443, "x"),
        probe::udp(to, 443),
    ] {
        let outcome = attacker.try_one(&attempt);
        outcome.assert_refused();
        assert!(!outcome.connected, "{attempt}: {outcome:?}");
    }
    // Nothing but the one answer: no upload, no tunnel, no other method.
    for line in [
        "curl -sS --max-time 30 -X POST -d x",
        "curl -sS --max-time 30 -X DELETE",
        "curl -sS --max-time 30 --http2-prior-knowledge -X PUT",
    ] {
        let refused = sandbox.sh(&format!("{line} https://{HOST}/"));
        assert!(
            refused.exit_code != 0 && refused.stdout.is_empty(),
            "{line}: {refused:?}"
        );
    }
    // The name is good for that address alone, even where a tenant allows it.
    sandbox.set_network(&json!({ "mode": "allowlist", "allowed_domains": [HOST] }));
    let elsewhere = attacker.try_one(&probe::https("203.0.113.20", HOST));
    elsewhere.assert_refused();
    let sent = promise.world.capture().begun_since(mark);
    assert!(sent.is_empty(), "{sent:#?}");
    sandbox.stop();
}

pub(crate) fn only_its_owner_may_ask_and_only_while_it_runs(promise: &Promise) {
    let sandbox = promise.organization.sandbox(&json!({ "network": policy() }));
    let path = sandbox.path("/network/doctor");
    let other = promise.node.register("doctors-stranger");
    other.client.get(&path).send().refused(404, "SANDBOX_NOT_FOUND");
    let reader = sandbox.client().post("/api-keys").json(&json!({
        "name": "reader", "scopes": ["sandbox:read", "network:write"],
    }));
    let reader = reader.send().ok();
    let key = reader["key"]
        .as_str()
        .unwrap_or_else(|| panic!("no key in {reader}"));
    let reader = promise.node.client().with_key(key);
    reader.get(&path).send().refused(403, "FORBIDDEN");
    sandbox.stop();
    sandbox.client().get(&path).send().refused(409, "CONFLICT");
}
