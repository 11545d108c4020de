//! How sandboxes end, and that nothing of them is left.

use std::time::Duration;

use harness::wait;
use serde_json::json;

use crate::machine::Machine;

/// Cleaning up takes a moment after the end was reported.
pub(crate) const CLEANED: Duration = Duration::from_secs(60);

#[track_caller]
pub(crate) fn assert_gone(machine: &Machine, sandbox: &str) {
    let left = || {
        let traces = machine.node.traces_of(sandbox);
        traces.is_empty().then_some(())
    };
    if wait::within(CLEANED, left).is_none() {
        panic!("{sandbox} left behind: {:#?}", machine.node.traces_of(sandbox));
    }
}

pub(crate) fn a_sandbox_that_expires_is_cleaned_up(machine: &Machine) {
    // It has seen the outages of the other cases: its end was committed before them.
    let sandbox = &machine.mayfly;
    let status = sandbox.client().get(&sandbox.path("/status")).send().ok();
    assert!(status["expires_at"].is_string(), "{status}");
    wait::until("it expires", Duration::from_secs(180), || {
        std::thread::sleep(Duration::from_secs(1));
        (sandbox.status() == "terminated").then_some(())
    });
    assert_gone(machine, &sandbox.id);
    let late = sandbox
        .client()
        .post(&sandbox.path("/execute"))
        .json(&json!({ "command": "true" }))
        .send();
    assert!(late.status.is_client_error(), "{late:?}");
}

pub(crate) fn a_stopped_sandbox_leaves_nothing(machine: &Machine) {
    let before = machine.node.traces();
    let sandboxes: Vec<_> = (0..4).map(|_| machine.organization.sandbox(&json!({}))).collect();
    for sandbox in &sandboxes {
        // Busy ones end as well.
        sandbox.background("exec sleep 7654", |sandbox| sandbox.sh("true").exit_code == 0);
        assert!(
            machine.node.processes_of(&sandbox.id).len() >= 2,
            "the judge sees its processes"
        );
    }
    for (index, sandbox) in sandboxes.iter().enumerate() {
        if index % 2 == 0 {
            sandbox.stop();
        } else {
            let deleted = sandbox.client().delete(&sandbox.path("")).send().ok();
            assert_eq!(deleted["success"], true);
        }
        assert_gone(machine, &sandbox.id);
    }
    // Programs that set the network up or take it down for somebody else come and go.
    let new = || {
        let mut new = machine.node.traces();
        new.retain(|trace| !before.contains(trace));
        new
    };
    if wait::within(CLEANED, || new().is_empty().then_some(())).is_none() {
        panic!("{:#?}", new());
    }
    // An address is free again, and belongs to the new one alone.
    let next = machine.organization.sandbox(&json!({}));
    assert_eq!(next.sh_ok("echo fine"), "fine");
    next.stop();
}

pub(crate) fn a_sandbox_whose_first_process_dies_is_cleaned_up(machine: &Machine) {
    let (sandbox, other) = (
        machine.organization.sandbox(&json!({})),
        machine.organization.sandbox(&json!({})),
    );
    let processes = machine.node.processes_of(&sandbox.id);
    let first = processes
        .iter()
        .find(|process| process.numbers.last() == Some(&1))
        .expect("a first process");
    machine.node.kill(first).expect("it runs");
    wait::until("the end is noticed", CLEANED, || {
        ["error", "terminated"]
            .contains(&sandbox.status().as_str())
            .then_some(())
    });
    assert_gone(machine, &sandbox.id);
    assert_eq!(other.sh_ok("echo fine"), "fine");
    other.stop();
}
