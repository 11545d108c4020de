//! Policies as tenants set them: tiers, modes, and what happens to open connections.

pub(crate) mod edits;
pub(crate) mod large;

use std::time::Duration;

use harness::{
    probe,
    sandbox::Sandbox,
    wait,
    world::{API, EVIL, OK},
};
use serde_json::json;

use crate::{
    machine::Machine,
    names::{assert_no_connection, denied_because},
};

/// Longest wait for what a change of policy does at once.
const CUT: Duration = Duration::from_secs(60);

pub(crate) fn a_tier_below_narrows_and_never_widens(machine: &Machine) {
    let organization = machine.node.register("tiers");
    let sandbox = organization.sandbox(&json!({}));
    let probe = machine.probe(&sandbox);
    organization.set_egress(&json!({ "mode": "allowlist", "allowed_domains": ["ok.test", "api.test"] }));
    sandbox.set_network(&json!({ "mode": "allowlist", "allowed_domains": ["ok.test", "evil.test"] }));
    probe
        .try_one(&probe::https("ok.test", "ok.test"))
        .assert_answered("hello from ok.test");
    let mark = machine.world.capture().mark();
    for name in ["api.test", "evil.test"] {
        assert_eq!(
            probe.try_one(&probe::https(name, name)).outcome,
            "no_name",
            "{name}"
        );
    }
    machine.world.capture().assert_nothing_to(EVIL, mark);
    machine.world.capture().assert_nothing_to(API, mark);
    denied_because(
        &sandbox,
        &json!({ "host": "api.test", "tier": "sandbox" }),
        &["dns_refused"],
    );
    denied_because(
        &sandbox,
        &json!({ "host": "evil.test", "tier": "organization" }),
        &["dns_refused"],
    );
    // Without its own tier the organisation's decides; another organisation is not concerned.
    let other = machine.organization.sandbox(&json!({}));
    machine
        .probe(&other)
        .try_one(&probe::https("api.test", "api.test"))
        .assert_answered("hello from api.test");
    let sibling = organization.sandbox(&json!({}));
    machine
        .probe(&sibling)
        .try_one(&probe::https("api.test", "api.test"))
        .assert_answered("hello from api.test");
    for sandbox in [sandbox, other, sibling] {
        sandbox.stop();
    }
}

pub(crate) fn each_mode_does_what_it_says(machine: &Machine) {
    let sandbox = machine.organization.sandbox(&json!({}));
    let probe = machine.probe(&sandbox);
    let passes = |name: &str| probe.try_one(&probe::https(name, name)).outcome == "answered";
    sandbox.set_network(&json!({ "mode": "deny_all" }));
    assert!(!passes("ok.test") && !passes("evil.test"));
    sandbox.set_network(&json!({ "mode": "denylist", "denied_domains": ["evil.test", "*.wild.test"], "denied_cidrs": ["203.0.113.20/32"] }));
    assert!(passes("ok.test") && passes("wild.test"));
    assert!(!passes("evil.test") && !passes("x.wild.test") && !passes("api.test"));
    sandbox.set_network(&json!({ "mode": "allowlist", "allowed_domains": ["ok.test", "api.test"], "denied_domains": ["ok.test"] }));
    assert!(passes("api.test") && !passes("ok.test"));
    let rules = json!([
        { "name": "not this one", "action": "deny", "domains": ["bad.wild.test"] },
        { "name": "the rest", "action": "allow", "domains": ["*.wild.test"], "ports": ["443"] },
    ]);
    sandbox.set_network(&json!({ "mode": "allowlist", "rules": rules }));
    assert!(passes("good.wild.test") && !passes("bad.wild.test"));
    denied_because(
        &sandbox,
        &json!({ "host": "bad.wild.test", "rule": "not this one" }),
        &["dns_refused", "denied_by_rule"],
    );
    sandbox.set_network(&json!({ "mode": "allow_all" }));
    assert!(passes("ok.test") && passes("evil.test"));
    let mark = machine.world.capture().mark();
    sandbox.set_network(&json!({ "mode": "allow_all", "allowed_ports": [] }));
    assert!(!passes("ok.test"));
    assert!(
        !machine
            .world
            .capture()
            .sent_to(OK, mark)
            .iter()
            .any(|packet| packet.opens)
    );
    sandbox.stop();
}

/// Opens a connection from the sandbox to `ok.test` that never ends by itself.
#[track_caller]
pub(crate) fn open_drip(sandbox: &Sandbox) {
    let line = format!("exec curl -sSN --cacert {} https://ok.test/drip", probe::CA);
    sandbox.background(&line, |sandbox| {
        sandbox.sh_ok("wc -l < /workspace/background.log") != "0"
    });
}

#[track_caller]
pub(crate) fn lines(sandbox: &Sandbox) -> u64 {
    sandbox
        .sh_ok("grep -c drip /workspace/background.log")
        .parse()
        .expect("a number")
}

pub(crate) fn tightening_cuts_open_connections(machine: &Machine) {
    let organization = machine.node.register("tight");
    let both = json!({ "network": { "mode": "allowlist", "allowed_domains": ["ok.test", "api.test"] } });
    let sandboxes: Vec<Sandbox> = (0..3).map(|_| organization.sandbox(&both)).collect();
    for sandbox in &sandboxes {
        machine.probe(sandbox);
        open_drip(sandbox);
    }
    let open = || {
        machine
            .world
            .web
            .visits_for("ok.test")
            .iter()
            .filter(|visit| !visit.closed)
            .count()
    };
    // What earlier cases opened may still be about to end.
    wait::until("three connections are open", CUT, || (open() == 3).then_some(()));
    // By the sandbox's own policy: cut before the call answers.
    sandboxes[0].set_network(&json!({ "mode": "allowlist", "allowed_domains": ["api.test"] }));
    wait::until("the server sees the connection end", CUT, || {
        (open() == 2).then_some(())
    });
    sandboxes[0].audited(&json!({ "host": "ok.test", "reason": "policy_tightened" }));
    // The client may read more slowly than the connection is cut.
    wait::until("the client has seen it", CUT, || {
        let processes = machine.node.processes_of(&sandboxes[0].id);
        (!processes.iter().any(|process| process.is("curl", None))).then_some(())
    });
    let frozen = lines(&sandboxes[0]);
    // A change that still allows it leaves it alone.
    sandboxes[1].set_network(&json!({ "mode": "allowlist", "allowed_domains": ["ok.test"] }));
    let before = lines(&sandboxes[1]);
    wait::until("the other goes on", CUT, || {
        (lines(&sandboxes[1]) > before + 5).then_some(())
    });
    assert_eq!(lines(&sandboxes[0]), frozen);
    // By the organisation's: every sandbox of it.
    organization.set_egress(&json!({ "mode": "deny_all" }));
    wait::until("every connection ends", CUT, || (open() == 0).then_some(()));
    let mark = machine.world.capture().mark();
    let probe = machine.probe(&sandboxes[1]);
    probe
        .try_one(&probe::https(OK, "ok.test"))
        .assert_refused_at_connect();
    assert_no_connection(machine, OK, mark);
    organization.set_egress(&json!({ "mode": "allow_all" }));
    probe
        .try_one(&probe::https("ok.test", "ok.test"))
        .assert_answered("hello from ok.test");
    for sandbox in &sandboxes {
        sandbox.stop();
    }
}

pub(crate) fn what_began_in_audit_mode_is_held_to_what_is_enforced_since(machine: &Machine) {
    let policy = |enforcement: &str| {
        json!({
            "mode": "allowlist",
            "enforcement": enforcement,
            "rules": [{
                "action": "allow", "protocol": "http", "domains": ["ok.test"], "ports": [80],
                "http": [{ "methods": ["GET"], "paths": ["/**"] }],
            }],
        })
    };
    let organization = machine.node.register("late");
    let sandbox = organization.sandbox(&json!({ "network": policy("audit") }));
    machine.probe(&sandbox);
    let mark = machine.world.capture().mark();
    sandbox.sh_ok("curl -sS -o /dev/null -X POST http://ok.test/");
    machine.world.capture().assert_something_to(OK, mark);
    // A connection on which nothing is said until other rules hold.
    sandbox.write(
        "/workspace/late.py",
        "import os, socket, time\n\
         flow = socket.create_connection(('ok.test', 80))\n\
         print('open', flush=True)\n\
         while not os.path.exists('/workspace/go'): time.sleep(0.01)\n\
         try:\n\
         \x20 flow.sendall(b'POST / HTTP/1.1\\r\\nHost: ok.test\\r\\nContent-Length: 0\\r\\n\\r\\n')\n\
         \x20 print('answer', flow.recv(4096), flush=True)\n\
         except OSError as error: print('answer', error, flush=True)\n",
    );
    let mark = machine.world.capture().mark();
    sandbox.background("exec python3 /workspace/late.py", |sandbox| {
        sandbox.sh("grep -q open /workspace/background.log").exit_code == 0
    });
    sandbox.set_network(&policy("enforce"));
    sandbox.write("/workspace/go", "");
    wait::until("the sandbox has an answer", CUT, || {
        (sandbox.sh("grep -q answer /workspace/background.log").exit_code == 0).then_some(())
    });
    // The first connection may be closed as late as this.
    let mut sent = machine.world.capture().sent_to(OK, mark);
    sent.retain(|packet| packet.opens || !packet.payload.is_empty());
    assert!(sent.is_empty(), "{sent:#?}");
    sandbox.stop();
}

pub(crate) fn read_modify_write_works(machine: &Machine) {
    let organization = machine.node.register("editor");
    let policy = json!({ "mode": "allowlist", "allowed_domains": ["ok.test"], "allowed_ports": [443] });
    let stored = organization.set_egress(&policy);
    for field in [
        "mode",
        "allowed_domains",
        "denied_domains",
        "allowed_ports",
        "enforcement",
        "failure_mode",
    ] {
        assert!(!stored[field].is_null(), "{field} is missing in {stored}");
    }
    let mut read = organization.client.get("/settings/egress").send().ok();
    assert_eq!(read["allowed_domains"], json!(["ok.test"]));
    read["allowed_domains"] = json!(["ok.test", "api.test"]);
    organization.set_egress(&read);
    assert_eq!(
        organization.client.get("/settings/egress").send().ok()["allowed_domains"],
        json!(["ok.test", "api.test"])
    );
    // PUT replaces: what is not given is empty again.
    organization.set_egress(&json!({ "mode": "allowlist" }));
    assert_eq!(
        organization.client.get("/settings/egress").send().ok()["allowed_domains"],
        json!([])
    );

    let sandbox = organization.sandbox(&json!({}));
    let path = sandbox.path("/network");
    let first = sandbox.set_network(&policy);
    for field in ["policy", "revision", "applied", "effective"] {
        assert!(!first[field].is_null(), "{field} is missing in {first}");
    }
    let mut read = sandbox.client().get(&path).send().ok();
    assert_eq!(read["policy"]["allowed_domains"], json!(["ok.test"]), "{read}");
    read["policy"]["allowed_domains"] = json!(["api.test"]);
    let second = sandbox.set_network(&read["policy"]);
    assert!(
        second["revision"].as_u64() > first["revision"].as_u64(),
        "{first} then {second}"
    );
    let patched = sandbox
        .client()
        .patch(&path)
        .json(&json!({ "allowed_ports": [80] }))
        .send()
        .ok();
    assert_eq!(
        (
            &patched["policy"]["allowed_domains"],
            &patched["policy"]["allowed_ports"]
        ),
        (&json!(["api.test"]), &json!([80])),
        "{patched}"
    );
    let mut stale = policy;
    stale["revision"] = first["revision"].clone();
    sandbox
        .client()
        .put(&path)
        .json(&stale)
        .send()
        .refused(409, "CONFLICT");
    sandbox.stop();
}

pub(crate) fn a_policy_given_at_create_holds_from_the_first_packet(machine: &Machine) {
    let mark = machine.world.capture().mark_at_rest();
    for _ in 0..5 {
        let sandbox = machine
            .organization
            .sandbox(&json!({ "network": { "mode": "deny_all" } }));
        // The very first thing that runs.
        let line = "python3 -c 'import socket; socket.create_connection((\"203.0.113.66\", 443), 3)'";
        assert_ne!(sandbox.sh(line).exit_code, 0);
        assert!(sandbox.sh("getent hosts ok.test").exit_code != 0);
        sandbox.stop();
    }
    machine.world.capture().assert_nothing_to(EVIL, mark);
    machine.world.capture().assert_nothing_to(OK, mark);
}
