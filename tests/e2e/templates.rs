//! Sandboxes made from templates.

use harness::sandbox::Sandbox;
use serde_json::{Value, json};

use crate::machine::Machine;

fn from(machine: &Machine, body: &Value) -> Sandbox {
    let organization = &machine.organization;
    let call = organization.client.post("/sandbox/create-from-template");
    let created = call.json(body).send().ok();
    assert_eq!(created["status"], "running", "{created}");
    Sandbox {
        organization: organization.clone(),
        id: created["sandbox_id"].as_str().unwrap_or_default().to_owned(),
        created,
    }
}

pub(crate) fn what_a_template_says_is_done_before_anybody_gets_the_sandbox(machine: &Machine) {
    machine.node.wait_ready();
    let client = &machine.organization.client;
    let template = client
        .post("/templates")
        .json(&json!({
            "name": "Prepared",
            "config": {
                "memory": "256Mi", "cpus": "1", "env": {"FROM": "template", "BOTH": "template"},
                "setup_commands": ["cat greeting > /workspace/result", "printf %s \"$FROM-$BOTH\" >> result"]
            },
            "files": [{"path": "/workspace/greeting", "content": "grüße\n"}],
            "network": {"mode": "deny_all"}
        }))
        .send()
        .ok();
    let id = template["id"].as_str().unwrap_or_default();
    let body = json!({"template_id": id, "env": {"BOTH": "request"}, "override_memory": "300Mi"});
    let sandbox = from(machine, &body);
    assert_eq!(sandbox.sh_ok("cat /workspace/result"), "grüße\ntemplate-request");
    assert_eq!(sandbox.sh_ok("echo $FROM $BOTH"), "template request");
    assert_eq!(
        (
            &sandbox.created["memory"],
            &sandbox.created["cpus"],
            &sandbox.created["template_id"]
        ),
        (&json!("300Mi"), &json!("1"), &json!(id))
    );
    let network = client.get(&sandbox.path("/network")).send().ok();
    assert_eq!(network["policy"]["mode"], "deny_all", "{network}");
    sandbox.stop();
    // What is built in has what it promises.
    for (id, line, expected) in [
        ("base", "echo ok", "ok"),
        (
            "python-basic",
            "python3 -c 'print(6*7)' && python3 -m pip --version >/dev/null",
            "42",
        ),
        ("node-basic", "node -e 'console.log(6*7)'", "42"),
    ] {
        let sandbox = machine
            .organization
            .sandbox(&json!({"template": id, "memory": "256Mi"}));
        assert_eq!(sandbox.sh_ok(line), expected, "{id}");
        sandbox.stop();
    }
}

pub(crate) fn a_template_whose_command_fails_gives_no_sandbox_and_says_why(machine: &Machine) {
    machine.node.wait_ready();
    let organization = machine.node.register("templates");
    let client = &organization.client;
    let template = client
        .post("/templates")
        .json(&json!({
            "name": "Broken", "config": {
                "memory": "256Mi", "setup_commands": ["true", "echo what went wrong >&2; exit 3", "touch /workspace/x"]
            }
        }))
        .send()
        .ok();
    let body = json!({"template_id": template["id"]});
    let refused = client.post("/sandbox/create-from-template").json(&body).send();
    let message = refused.refused(409, "CONFLICT")["message"].to_string();
    for part in ["setup_commands[1]", "ended with 3", "what went wrong"] {
        assert!(message.contains(part), "{message}");
    }
    assert!(organization.running().is_empty());
    let all = client.get("/sandboxes?status=all").send().ok();
    let ended = &all["sandboxes"][0];
    assert_eq!(ended["status"], "error", "{all}");
    let reason = ended["status_reason"].to_string();
    assert!(reason.contains("setup_commands[1]"), "{reason}");
}
