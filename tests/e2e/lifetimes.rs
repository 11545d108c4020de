//! How long sandboxes live, how they stand still, and what is known and told of them.

use std::{collections::BTreeSet, thread, time::Duration};

use harness::{node::Node, sandbox::Sandbox, wait};
use serde_json::{Value, json};

use crate::machine::Machine;

/// How long something that must come may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(120);

/// A process that counts for as long as it may.
const COUNTING: &str = "setsid sh -c 'n=0; while :; do n=$((n+1)); echo $n > /workspace/at.new; \
    mv /workspace/at.new /workspace/at; sleep 0.05; done' >/dev/null 2>&1 </dev/null & \
    while ! test -e /workspace/at; do sleep 0.05; done";

fn shown(sandbox: &Sandbox) -> Value {
    sandbox.client().get(&sandbox.path("")).send().ok()
}

fn at(sandbox: &Sandbox) -> u64 {
    let text = sandbox.sh_ok("cat /workspace/at");
    text.parse().unwrap_or_else(|_| panic!("no number: {text}"))
}

pub(crate) fn of_many_creations_of_a_session_one_makes_the_sandbox(machine: &Machine) {
    machine.node.wait_ready();
    let organization = machine.node.register("sessions");
    let body = json!({"session_key": "thread 7", "timeout_seconds": 120, "memory": "256Mi"});
    let created: Vec<Value> = thread::scope(|scope| {
        let asking: Vec<_> = (0..6)
            .map(|_| {
                let (client, body) = (&organization.client, &body);
                scope.spawn(move || client.post("/sandbox/create").json(body).send().ok())
            })
            .collect();
        let joined = asking.into_iter().map(|one| one.join());
        joined.map(|one| one.expect("an answer")).collect()
    });
    let ids: BTreeSet<&str> = created
        .iter()
        .filter_map(|created| created["sandbox_id"].as_str())
        .collect();
    assert_eq!(ids.len(), 1, "{created:#?}");
    let new = created.iter().filter(|created| created["reused"] != true);
    assert_eq!(new.count(), 1, "{created:#?}");
    assert_eq!(organization.running().len(), 1);
    let first = Sandbox {
        organization: organization.clone(),
        id: created[0]["sandbox_id"].as_str().unwrap_or_default().to_owned(),
        created: Value::Null,
    };
    // A paused one goes on when its session asks for it.
    first.sh_ok("echo kept > /workspace/x");
    let paused = first.client().post(&first.path("/pause")).send().ok();
    assert_eq!(paused["paused"], true);
    let again = organization
        .client
        .post("/sandbox/create")
        .json(&body)
        .send()
        .ok();
    assert_eq!(
        (&again["sandbox_id"], &again["reused"], &again["paused"]),
        (&json!(first.id), &json!(true), &json!(false))
    );
    assert_eq!(first.sh_ok("cat /workspace/x"), "kept");
    first.stop();
    let next = organization
        .client
        .post("/sandbox/create")
        .json(&body)
        .send()
        .ok();
    assert_ne!(next["sandbox_id"], json!(first.id));
    assert_ne!(next["reused"], true);
}

pub(crate) fn a_paused_sandbox_stands_still_also_over_a_restart_of_the_controller(machine: &Machine) {
    machine.node.wait_ready();
    let sandbox = machine.organization.sandbox(&json!({"memory": "256Mi"}));
    sandbox.sh_ok(COUNTING);
    let client = sandbox.client();
    for _ in 0..2 {
        let paused = client.post(&sandbox.path("/pause")).send().ok();
        assert_eq!(
            (&paused["status"], &paused["paused"]),
            (&json!("running"), &json!(true))
        );
    }
    let used = || {
        let metrics = client.get(&sandbox.path("/metrics")).send().ok();
        metrics["metrics"]["cpu"]["usage"].as_f64()
    };
    let command = json!({"command": "true"});
    let refused = client.post(&sandbox.path("/execute")).json(&command).send();
    let message = refused.refused(409, "CONFLICT")["message"].to_string();
    assert!(message.contains("paused"), "{message}");
    machine.node.replace(Node::controller);
    machine.node.wait_ready();
    assert_eq!(shown(&sandbox)["paused"], true);
    client
        .post(&sandbox.path("/execute"))
        .json(&command)
        .send()
        .refused(409, "CONFLICT");
    // Measured since the restart: it has used nothing at all.
    let idle = wait::within(LIMIT, used);
    assert_eq!(idle, Some(0.0));
    for _ in 0..2 {
        let resumed = client.post(&sandbox.path("/resume")).send().ok();
        assert_eq!(resumed["paused"], false);
    }
    let before = at(&sandbox);
    wait::until("it goes on", LIMIT, || (at(&sandbox) > before).then_some(()));
    client.post(&sandbox.path("/pause")).send().ok();
    sandbox.stop();
    assert_eq!(shown(&sandbox)["status"], "terminated");
}

pub(crate) fn a_sandbox_that_nobody_uses_ends_and_says_why(machine: &Machine) {
    machine.node.wait_ready();
    let organization = machine.node.register("idlers");
    let body = json!({"idle_timeout_seconds": 10, "timeout_seconds": 3600, "memory": "256Mi"});
    let (left, busy) = (organization.sandbox(&body), organization.sandbox(&body));
    let other = organization.sandbox(&json!({"timeout_seconds": 60, "memory": "256Mi"}));
    let extended = other
        .client()
        .post(&other.path("/extend"))
        .json(&json!({"additional_seconds": 600}))
        .send()
        .ok();
    // A process that computes keeps its sandbox, whoever looks.
    busy.sh_ok("setsid sh -c 'while :; do :; done' >/dev/null 2>&1 </dev/null &");
    wait::until("the one that was left ends", LIMIT, || {
        (shown(&left)["status"] == "terminated").then_some(())
    });
    let reason = shown(&left)["status_reason"].to_string();
    assert!(reason.contains("idle timeout"), "{reason}");
    assert_eq!(shown(&busy)["status"], "running");
    assert_eq!(shown(&other)["expires_at"], extended["expires_at"]);
    let used = wait::until("what it used is known", LIMIT, || {
        let usage = organization.client.get("/usage/sandboxes").send().ok();
        let all = usage["sandboxes"].as_array()?.clone();
        all.into_iter().find(|one| one["sandbox_id"] == json!(left.id))
    });
    assert!(used["cpu_hours"].as_f64() > Some(0.0), "{used}");
    let current = organization.client.get("/usage/current").send().ok();
    assert_eq!(current["sandbox_creations"], 3, "{current}");
    busy.stop();
    other.stop();
}

pub(crate) fn what_happens_is_told_as_it_happens(machine: &Machine) {
    machine.node.wait_ready();
    let organization = machine.node.register("watchers");
    let stream = |query: &str| {
        let call = organization.client.get(&format!("/events/stream{query}"));
        call.events().expect("a stream")
    };
    let mut told = stream("");
    let sandbox = organization.sandbox(&json!({"memory": "256Mi"}));
    sandbox.sh_ok("true");
    assert_eq!(sandbox.sh("exit 3").exit_code, 3);
    sandbox.stop();
    let mut events = Vec::new();
    while events.len() < 7 {
        events.push(told.next(LIMIT).expect("the stream goes on"));
    }
    let kinds: Vec<&str> = events.iter().filter_map(|event| event["type"].as_str()).collect();
    assert_eq!(
        kinds,
        [
            "sandbox.created",
            "sandbox.ready",
            "command.started",
            "command.completed",
            "command.started",
            "command.failed",
            "sandbox.stopped"
        ]
    );
    assert!(
        events
            .iter()
            .all(|event| event["sandbox_id"] == json!(sandbox.id))
    );
    assert_eq!(events[5]["data"]["exit_code"], 3);
    assert_eq!(events[4]["data"]["command_id"], events[5]["data"]["command_id"]);
    let mut again = stream(&format!(
        "?lastEventId={}",
        events[4]["id"].as_str().unwrap_or_default()
    ));
    assert_eq!(again.next(LIMIT), Some(events[5].clone()));
    assert_eq!(again.next(LIMIT), Some(events[6].clone()));
    // A sandbox that has ended has no metrics, and what it used stays known.
    let metrics = sandbox.client().get(&sandbox.path("/metrics")).send().ok();
    assert_eq!(metrics, json!({"metrics": null}));
}
