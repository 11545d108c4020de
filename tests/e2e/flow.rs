//! What a user does on the first day.

use harness::{probe, wait, world::EVIL};
use serde_json::json;

use crate::machine::Machine;

pub(crate) fn register_create_write_execute_read_restrict_and_stop(machine: &Machine) {
    let person = json!({
        "email": "first@example.org", "organization_name": "First", "first_name": "Ada", "last_name": "L",
    });
    let registered = machine.node.client().post("/register").json(&person).send().ok();
    for (area, field) in [
        ("organization", "id"),
        ("organization", "name"),
        ("organization", "slug"),
        ("organization", "plan"),
        ("user", "id"),
        ("user", "email"),
        ("user", "role"),
        ("api_key", "key"),
        ("api_key", "key_prefix"),
        ("api_key", "name"),
    ] {
        assert!(
            registered[area][field].is_string(),
            "{area}.{field} is missing in {registered}"
        );
    }
    let key = registered["api_key"]["key"].as_str().expect("checked above");
    // Published clients take only keys of three parts without an organisation's id.
    assert!(
        key.starts_with("sk_sandbox_") && key.split('.').filter(|part| !part.is_empty()).count() == 3,
        "{key}"
    );

    let organization = &machine.organization;
    let sandbox = organization.sandbox(&json!({ "env": { "GREETING": "hello" }, "timeout_seconds": 600 }));
    for field in ["sandbox_id", "org_id", "session_id", "created_at", "expires_at"] {
        assert!(
            sandbox.created[field].is_string(),
            "{field} is missing in {}",
            sandbox.created
        );
    }
    for field in ["total_ms", "pod_creation_ms", "pod_ready_ms"] {
        assert!(
            sandbox.created["startup_metrics"][field].is_number(),
            "{field} is missing in {}",
            sandbox.created
        );
    }
    assert!(organization.running().contains(&sandbox.id));

    sandbox.write(
        "/workspace/src/main.py",
        "import os, sys\nprint(os.environ['GREETING'], sys.version_info.major)\n",
    );
    sandbox.write(
        "/workspace/src/main.js",
        "const fs = require('fs'); fs.writeFileSync('/workspace/out.txt', 'from node');",
    );
    assert_eq!(sandbox.sh_ok("python3 /workspace/src/main.py"), "hello 3");
    assert_eq!(sandbox.sh_ok("node /workspace/src/main.js && echo done"), "done");
    assert_eq!(sandbox.read("/workspace/out.txt"), b"from node");
    let list = sandbox
        .client()
        .get(&sandbox.path("/files/list?path=/workspace/src"))
        .send()
        .ok();
    let names: Vec<_> = list["files"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|entry| entry["name"].clone())
        .collect();
    assert!(
        names.contains(&json!("main.py")) && names.contains(&json!("main.js")),
        "{list}"
    );
    let download = sandbox
        .client()
        .get(&sandbox.path("/files/download?path=/workspace/out.txt"))
        .send();
    assert_eq!(download.text(), "from node");

    sandbox.set_network(&json!({ "mode": "allowlist", "allowed_domains": ["ok.test"] }));
    sandbox.write(probe::CA, machine.world.ca.pem());
    let hello = sandbox.sh_ok(&format!(
        "curl -sS --max-time 30 --cacert {} https://ok.test/",
        probe::CA
    ));
    assert_eq!(hello, "hello from ok.test at 203.0.113.10");
    let by_node = format!(
        "NODE_EXTRA_CA_CERTS={} node -e \"require('https').get('https://ok.test/', r => r.on('data', d => process.stdout.write(d)))\"",
        probe::CA
    );
    assert_eq!(sandbox.sh_ok(&by_node), "hello from ok.test at 203.0.113.10");
    sandbox.audited(&json!({ "decision": "allow", "host": "ok.test", "port": 443, "reason": "allowed" }));

    let mark = machine.world.capture().mark();
    for target in [
        "https://evil.test/",
        "https://203.0.113.66/",
        "http://ok.test:8080/",
        "http://169.254.169.254/",
    ] {
        let refused = sandbox.sh(&format!("curl -sSk --max-time 30 {target}"));
        assert_ne!(refused.exit_code, 0, "{target}: {refused:?}");
        assert_ne!(refused.exit_code, 28, "{target} ended by timeout");
        assert!(refused.took < probe::AT_ONCE, "{target} took {:?}", refused.took);
    }
    machine.world.capture().assert_nothing_to(EVIL, mark);
    assert!(machine.world.dns.queries_for("evil.test").is_empty());
    sandbox.audited(&json!({ "decision": "deny", "host": "evil.test", "reason": "dns_refused" }));
    sandbox.audited(&json!({ "decision": "deny", "ip": "203.0.113.66", "port": 443 }));
    sandbox.audited(
        &json!({ "decision": "deny", "ip": "169.254.169.254", "port": 80, "reason": "platform_denied" }),
    );
    assert!(
        sandbox
            .audit("decision=deny")
            .iter()
            .all(|event| event["decision"] == "deny")
    );
    assert!(
        sandbox
            .audit("decision=allow&host=ok.test")
            .iter()
            .all(|event| event["host"] == "ok.test")
    );

    sandbox.stop();
    assert_eq!(sandbox.status(), "terminated");
    assert!(!organization.running().contains(&sandbox.id));
    sandbox.stop();
}

pub(crate) fn an_organisation_sees_only_its_own(machine: &Machine) {
    let sandbox = machine.organization.sandbox(&json!({}));
    let other = machine.node.register("other");
    assert!(other.running().is_empty());
    other
        .client
        .get(&sandbox.path(""))
        .send()
        .refused(404, "SANDBOX_NOT_FOUND");
    let command = json!({ "command": "id" });
    other
        .client
        .post(&sandbox.path("/execute"))
        .json(&command)
        .send()
        .refused(404, "SANDBOX_NOT_FOUND");
    other
        .client
        .put(&sandbox.path("/network"))
        .json(&json!({ "mode": "allow_all" }))
        .send()
        .refused(404, "SANDBOX_NOT_FOUND");
    other
        .client
        .post(&sandbox.path("/stop"))
        .send()
        .refused(404, "SANDBOX_NOT_FOUND");
    let foreign = sandbox
        .client()
        .get("/sandboxes")
        .header("x-org-id", &other.id)
        .send();
    foreign.refused(403, "FORBIDDEN");
    sandbox
        .client()
        .get("/sandboxes")
        .header("x-org-id", &machine.organization.id)
        .send()
        .ok();
    let records = other
        .client
        .get(&format!("/egress/audit?sandbox_id={}", sandbox.id))
        .send();
    assert!(
        !records.status.is_success() || records.ok()["events"] == json!([]),
        "{records:?}"
    );
    assert_eq!(sandbox.status(), "running");
    for (scheme, name) in [
        ("ApiKey ", "authorization"),
        ("Bearer ", "authorization"),
        ("", "x-api-key"),
    ] {
        let key = format!("{scheme}{}", machine.organization.key);
        machine
            .node
            .client()
            .get("/sandboxes")
            .header(name, &key)
            .send()
            .ok();
    }
    sandbox.stop();
}

pub(crate) fn what_the_readme_promises_by_default(machine: &Machine) {
    // Without any policy: HTTPS to any public name, nothing else.
    let sandbox = machine.organization.sandbox(&json!({}));
    let probe = machine.probe(&sandbox);
    probe
        .try_one(&probe::https("tenant.test", "tenant.test"))
        .assert_answered("hello from tenant.test");
    let mark = machine.world.capture().mark();
    for attempt in [
        probe::tcp("203.0.113.66", 8080, "x"),
        probe::http("203.0.113.20", "plain.test"),
        probe::tcp("10.0.0.5", 443, "x"),
    ] {
        probe.try_one(&attempt).assert_refused_at_connect();
    }
    machine.world.capture().assert_nothing_to([203, 0, 113, 66], mark);
    machine.world.capture().assert_nothing_to([10, 0, 0, 5], mark);
    let health = machine.node.client().get("//health").send().ok();
    assert!(
        health["status"].is_string() && health["version"].is_string(),
        "{health}"
    );
    wait::until("the audit lists the allowed flow", probe::AT_ONCE * 10, || {
        sandbox
            .audit("decision=allow")
            .iter()
            .any(|event| event["host"] == "tenant.test")
            .then_some(())
    });
    sandbox.stop();
}
