//! What is wrong is refused with the documented status, naming the field, and changes nothing.

use http::Method;
use serde_json::{Value, json};

use crate::machine::Machine;

pub(crate) fn bodies_that_are_wrong_name_the_field(machine: &Machine) {
    let organization = &machine.organization;
    let sandbox = organization.sandbox(&json!({}));
    let running = organization.running();
    let create = "/sandbox/create".to_owned();
    let (execute, files) = (sandbox.path("/execute"), sandbox.path("/files"));
    let content = "aGk=";
    let table: Vec<(&str, Value, &str)> = vec![
        (&create, json!({ "cpuss": "2" }), "cpuss"),
        (&create, json!({ "cpus": 2 }), "cpus"),
        (&create, json!({ "cpus": "many" }), "cpus"),
        (&create, json!({ "cpus": "-1" }), "cpus"),
        (&create, json!({ "memory": "2 bananas" }), "memory"),
        (&create, json!({ "timeout_seconds": 5 }), "timeout_seconds"),
        (&create, json!({ "timeout_seconds": "600" }), "timeout_seconds"),
        (
            &create,
            json!({ "timeout_seconds": 1_000_000 }),
            "timeout_seconds",
        ),
        (&create, json!({ "env": { "A": 1 } }), "env.A"),
        (&create, json!({ "env": { "A=B": "x" } }), "env"),
        (&create, json!({ "network": { "mode": "open" } }), "network.mode"),
        (
            &create,
            json!({ "network": { "mode": "allowlist", "allowed_cidrs": ["10.0.0.0/33"] } }),
            "network.allowed_cidrs[0]",
        ),
        (&execute, json!({}), "command"),
        (&execute, json!({ "command": 7 }), "command"),
        (&execute, json!({ "command": [] }), "command"),
        (&execute, json!({ "command": ["ls", 7] }), "command[1]"),
        (&execute, json!({ "command": "true", "timeout": -1 }), "timeout"),
        (&execute, json!({ "command": "true", "shell": "zsh" }), "shell"),
        (
            &execute,
            json!({ "command": "true", "working_dir": "relative" }),
            "working_dir",
        ),
        (&files, json!({}), "files"),
        (
            &files,
            json!({ "files": [{ "path": "/workspace/../etc/x", "content": content }] }),
            "files[0].path",
        ),
        (
            &files,
            json!({ "files": [{ "path": "relative", "content": content }] }),
            "files[0].path",
        ),
        (
            &files,
            json!({ "files": [{ "path": "/workspace/a", "content": "***" }] }),
            "files[0].content",
        ),
        (
            &files,
            json!({ "files": [{ "path": "/workspace/a", "content": content }, { "path": "/a\u{0}b", "content": content }] }),
            "files[1].path",
        ),
        (
            &files,
            json!({ "files": [{ "path": "/workspace/a" }] }),
            "files[0].content",
        ),
    ];
    let mut wrong = Vec::new();
    for (path, body, field) in &table {
        let answer = organization.client.post(path).json(body).send();
        let check = std::panic::catch_unwind(|| answer.refused_field(field));
        if check.is_err() {
            wrong.push(format!(
                "POST {path} {body}: expected a 400 for {field}, got {} {}",
                answer.status,
                answer.text()
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let get = |query: &str| organization.client.get(&sandbox.path(query)).send();
    get("/files?path=/workspace/../etc/passwd").refused_field("path");
    get("/files").refused_field("path");
    get("/files?path=%2fworkspace%2f..%2fetc%2fpasswd").refused_field("path");
    get("/files/list?path=relative").refused_field("path");
    get("/files/download?path=/a/../b").refused_field("path");
    organization
        .client
        .get("/egress/audit?limit=x")
        .send()
        .refused_field("limit");
    organization
        .client
        .get("/egress/audit?decision=maybe")
        .send()
        .refused_field("decision");
    for body in [
        "{",
        "[]",
        "null",
        "\"x\"",
        "{\"command\": \"true\"} x",
        "\u{feff}{}",
    ] {
        let answer = organization
            .client
            .post(&execute)
            .header("content-type", "application/json")
            .raw(body)
            .send();
        answer.refused(400, "VALIDATION_ERROR");
    }
    // An empty body means `{}`, whatever the content type says.
    let empty = organization
        .client
        .post(&execute)
        .header("content-type", "application/json")
        .send();
    empty.refused_field("command");
    let created = organization
        .client
        .post(&create)
        .header("content-type", "application/json")
        .send()
        .ok();
    let id = created["sandbox_id"].as_str().expect("an id").to_owned();
    organization.client.delete(&format!("/sandbox/{id}")).send().ok();
    let register = machine
        .node
        .client()
        .post("/register")
        .json(&json!({ "email": "x", "organization_name": "X" }))
        .send();
    register.refused_field("email");
    machine
        .node
        .client()
        .post("/register")
        .json(&json!({ "email": "a@example.org" }))
        .send()
        .refused_field("organization_name");
    let twice = json!({ "email": "acme@example.org", "organization_name": "Acme" });
    machine
        .node
        .client()
        .post("/register")
        .json(&twice)
        .send()
        .refused(409, "CONFLICT");
    let large = vec![b'x'; 200 << 20];
    if let Ok(answer) = organization
        .client
        .post(&files)
        .header("content-type", "application/json")
        .raw(large)
        .try_send()
    {
        answer.refused(413, "PAYLOAD_TOO_LARGE");
    }
    assert_eq!(
        organization.running(),
        running,
        "a refused request changed something"
    );
    assert_eq!(
        sandbox.sh_ok("ls -A /workspace | grep -c '^a$' || true"),
        "0",
        "a refused write left a file"
    );
    sandbox.stop();
}

pub(crate) fn policies_that_are_wrong_name_the_field_and_change_nothing(machine: &Machine) {
    let organization = machine.node.register("careful");
    let sandbox = organization.sandbox(&json!({}));
    let good = json!({ "mode": "allowlist", "allowed_domains": ["ok.test"] });
    organization.set_egress(&good);
    sandbox.set_network(&good);
    let table = [
        (json!({ "mode": "open" }), "mode"),
        (json!({ "mode": 7 }), "mode"),
        (json!({ "mode": "allowlist", "colour": "red" }), "colour"),
        (
            json!({ "mode": "allowlist", "allowed_domains": "ok.test" }),
            "allowed_domains",
        ),
        (
            json!({ "mode": "allowlist", "allowed_domains": ["ok.test", "bad name"] }),
            "allowed_domains[1]",
        ),
        (
            json!({ "mode": "allowlist", "allowed_domains": ["a.*.test"] }),
            "allowed_domains[0]",
        ),
        (
            json!({ "mode": "allowlist", "allowed_domains": ["**.test"] }),
            "allowed_domains[0]",
        ),
        (
            json!({ "mode": "allowlist", "allowed_domains": ["*.com"] }),
            "allowed_domains[0]",
        ),
        (
            json!({ "mode": "allowlist", "allowed_domains": ["*.co.uk"] }),
            "allowed_domains[0]",
        ),
        (
            json!({ "mode": "allowlist", "allowed_domains": ["203.0.113.66"] }),
            "allowed_domains[0]",
        ),
        (
            json!({ "mode": "allowlist", "allowed_domains": ["ok.test\u{0}.evil.test"] }),
            "allowed_domains[0]",
        ),
        (
            json!({ "mode": "allowlist", "allowed_domains": ["ok.test.."] }),
            "allowed_domains[0]",
        ),
        (
            json!({ "mode": "denylist", "denied_domains": [""] }),
            "denied_domains[0]",
        ),
        (
            json!({ "mode": "allowlist", "allowed_cidrs": ["203.0.113.0/33"] }),
            "allowed_cidrs[0]",
        ),
        (
            json!({ "mode": "allowlist", "allowed_cidrs": ["203.0.113"] }),
            "allowed_cidrs[0]",
        ),
        (
            json!({ "mode": "denylist", "denied_cidrs": ["nonsense/8"] }),
            "denied_cidrs[0]",
        ),
        (
            json!({ "mode": "allowlist", "allowed_ports": [0] }),
            "allowed_ports[0]",
        ),
        (
            json!({ "mode": "allowlist", "allowed_ports": [443, 70000] }),
            "allowed_ports[1]",
        ),
        (
            json!({ "mode": "allowlist", "allowed_ports": ["https"] }),
            "allowed_ports[0]",
        ),
        (
            json!({ "mode": "allowlist", "enforcement": "log" }),
            "enforcement",
        ),
        (
            json!({ "mode": "allowlist", "failure_mode": "open" }),
            "failure_mode",
        ),
        (
            json!({ "mode": "allowlist", "rules": [{ "name": "x", "action": "allow" }] }),
            "rules[0].domains",
        ),
        (
            json!({ "mode": "allowlist", "rules": [{ "name": "x", "action": "permit", "cidrs": ["203.0.113.0/24"] }] }),
            "rules[0].action",
        ),
        (
            json!({ "mode": "allowlist", "rules": [{ "name": "x", "action": "allow", "cidrs": ["203.0.113.0/24"], "ports": ["9-1"] }] }),
            "rules[0].ports[0]",
        ),
        (
            json!({ "mode": "allowlist", "rules": [{ "name": "x", "action": "allow", "domains": ["ok.test"], "tls": "peek" }] }),
            "rules[0].tls",
        ),
        (
            json!({ "mode": "allowlist", "rules": [{ "name": "x", "action": "allow", "cidrs": ["203.0.113.0/24"], "protocol": "udp" }] }),
            "rules[0].ports",
        ),
        (json!({ "mode": "allowlist", "ech": "off" }), "ech"),
        (
            json!({ "mode": "allowlist", "dns": { "types": ["A", "HTTPS"] } }),
            "dns.types[1]",
        ),
    ];
    let before = (
        organization.client.get("/settings/egress").send().ok(),
        sandbox.client().get(&sandbox.path("/network")).send().ok(),
    );
    let mut wrong = Vec::new();
    for (body, field) in &table {
        for path in ["/settings/egress".to_owned(), sandbox.path("/network")] {
            let answer = organization.client.put(&path).json(body).send();
            if std::panic::catch_unwind(|| answer.refused_field(field)).is_err() {
                wrong.push(format!(
                    "PUT {path} {body}: expected a 400 for {field}, got {} {}",
                    answer.status,
                    answer.text()
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    organization
        .client
        .put("/settings/egress")
        .send()
        .refused_field("mode");
    let after = (
        organization.client.get("/settings/egress").send().ok(),
        sandbox.client().get(&sandbox.path("/network")).send().ok(),
    );
    assert_eq!(after, before, "a refused policy changed something");
    sandbox.stop();
}

pub(crate) fn callers_without_a_good_key_get_nothing(machine: &Machine) {
    let sandbox = machine.organization.sandbox(&json!({}));
    let key = &machine.organization.key;
    let mut almost = key.clone();
    let last = almost.pop().expect("a key is not empty");
    almost.push(if last == 'A' { 'B' } else { 'A' });
    let keys = ["", "x", "sk_sandbox_a.b.c", &key[..key.len() - 1], &almost];
    let paths = [
        "/sandboxes".to_owned(),
        sandbox.path(""),
        "/settings/egress".to_owned(),
        "/egress/audit".to_owned(),
    ];
    for path in &paths {
        machine
            .node
            .client()
            .get(path)
            .send()
            .refused(401, "UNAUTHORIZED");
        for key in keys {
            machine
                .node
                .client()
                .with_key(key)
                .get(path)
                .send()
                .refused(401, "UNAUTHORIZED");
        }
        // Query tokens are for streams and sockets only: addresses end up in logs.
        machine
            .node
            .client()
            .get(&format!("{path}?token={key}"))
            .send()
            .refused(401, "UNAUTHORIZED");
    }
    let changes = [
        (Method::POST, "/sandbox/create".to_owned()),
        (Method::POST, sandbox.path("/stop")),
        (Method::DELETE, sandbox.path("")),
    ];
    for (method, path) in changes {
        machine
            .node
            .client()
            .call(method, &path)
            .send()
            .refused(401, "UNAUTHORIZED");
    }
    assert_eq!(sandbox.status(), "running");
    let logs = machine.node.log_lines().join("\n");
    assert!(!logs.contains(key.as_str()), "a key is in the log");
    sandbox.stop();
}

pub(crate) fn what_does_not_exist_is_404_in_the_envelope(machine: &Machine) {
    let client = &machine.organization.client;
    for id in [
        "sandbox-0123456789abcdef",
        "sandbox-..",
        "nonsense",
        "..%2f..%2fetc",
    ] {
        for rest in ["", "/status", "/files/list", "/network"] {
            client
                .get(&format!("/sandbox/{id}{rest}"))
                .send()
                .refused(404, "SANDBOX_NOT_FOUND");
        }
        client
            .post(&format!("/sandbox/{id}/stop"))
            .send()
            .refused(404, "SANDBOX_NOT_FOUND");
        client
            .post(&format!("/sandbox/{id}/execute"))
            .json(&json!({ "command": "id" }))
            .send()
            .refused(404, "SANDBOX_NOT_FOUND");
    }
    for path in ["/nowhere", "//", "//api/v2/sandboxes", "/sandboxes/"] {
        let answer = client.get(path).send();
        assert_eq!(answer.status.as_u16(), 404, "{answer:?}");
        assert!(answer.json()["error"]["code"].is_string(), "{answer:?}");
    }
    let method = client.patch("/sandbox/create").send();
    assert!([404, 405].contains(&method.status.as_u16()), "{method:?}");
    assert!(method.json()["error"]["code"].is_string(), "{method:?}");
    let echoed = client.get("/sandboxes").header("x-request-id", "req-7").send();
    assert!(echoed.headers.contains_key("x-request-id"));
}
