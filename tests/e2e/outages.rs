//! Programs that are killed at the worst moment (case 47): nothing gets out, nothing is forgotten.

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use harness::{
    capture::{Mark, protocol},
    node::Node,
    probe::{self, Probe},
    wait,
    world::{EVIL, OK, RESOLVER, World},
};
use serde_json::json;

use crate::{
    lifecycle::assert_gone,
    machine::{Machine, fixture_policy},
};

pub(crate) const RECOVERY: Duration = Duration::from_secs(60);

/// Everything the node sent since `mark` was allowed: connections to `ok.test`, and queries of its resolver
/// for allowed names.
#[track_caller]
pub(crate) fn assert_only_allowed_traffic(world: &World, mark: Mark) {
    for packet in world.capture().sent_since(mark) {
        let allowed = packet.destination == IpAddr::from(OK) && packet.protocol == protocol::TCP && packet.destination_port == 443
            || packet.destination == IpAddr::from(RESOLVER) && packet.destination_port == 53
            // The node tells the resolver that nobody waits any more for what a killed netd had asked.
            || packet.destination == IpAddr::from(RESOLVER) && packet.protocol == protocol::ICMP;
        assert!(allowed, "this left the node: {packet:#?}");
    }
    assert!(
        world.dns.queries_for("evil.test").is_empty(),
        "a denied name was asked"
    );
}

#[track_caller]
pub(crate) fn wait_until_served(probe: &Probe<'_>) -> Duration {
    let started = Instant::now();
    wait::until("allowed traffic passes again", RECOVERY, || {
        (probe.try_one(&probe::https("ok.test", "ok.test")).outcome == "answered").then_some(())
    });
    started.elapsed()
}

pub(crate) fn a_killed_netd_lets_nothing_out_and_recovers(machine: &Machine) {
    machine.node.wait_ready();
    let sandbox = machine
        .organization
        .sandbox(&json!({ "network": fixture_policy() }));
    let probe = machine.probe(&sandbox);
    probe
        .try_one(&probe::https("ok.test", "ok.test"))
        .assert_answered("hello from ok.test");
    let mark = machine.world.capture().mark();
    let attempts = [
        probe::https(OK, "ok.test"),
        probe::with(probe::https(OK, "evil.test"), json!({ "unverified": true })),
        probe::with(probe::https(EVIL, "ok.test"), json!({ "unverified": true })),
        probe::tcp(EVIL, 8080, "canary"),
        probe::tcp(OK, 22, "canary"),
        probe::tcp("10.0.0.5", 80, "canary"),
        probe::tcp("169.254.169.254", 80, "canary"),
        probe::with(probe::udp(EVIL, 8080), json!({ "timeout": 0.05 })),
        // Longer than it takes to start a netd: without one this is refused, and does not hang.
        probe::dns(EVIL, "leak.evil.test"),
    ];
    let line = Probe::loop_line(&attempts, 0);
    sandbox.background(&line, |sandbox| {
        sandbox.sh("grep -q answered /workspace/background.log").exit_code == 0
    });
    for _ in 0..3 {
        let before = sandbox
            .sh_ok("wc -l < /workspace/background.log")
            .parse::<u64>()
            .expect("a number");
        machine.node.replace(Node::netd);
        wait_until_served(&probe);
        wait::until("the attacker is awake", RECOVERY, || {
            let after = sandbox.sh_ok("wc -l < /workspace/background.log");
            (after.parse::<u64>().expect("a number") > before).then_some(())
        });
    }
    // Names resolved before the kills still open their addresses: nobody has to resolve them again.
    let asked = machine.world.dns.queries_for("ok.test").len();
    machine.node.replace(Node::netd);
    wait::until("a pinned address works without another query", RECOVERY, || {
        (probe.try_one(&probe::https(OK, "ok.test")).outcome == "answered").then_some(())
    });
    assert_eq!(machine.world.dns.queries_for("ok.test").len(), asked);
    sandbox.sh("pkill -f [p]robe.py || kill $(cat /proc/[0-9]*/stat | awk '$2 ~ /python/ {print $1}')");
    assert_only_allowed_traffic(&machine.world, mark);
    let hung = sandbox.sh_ok("grep -c '\"timeout\"' /workspace/background.log || true");
    let all = sandbox.sh_ok("wc -l < /workspace/background.log");
    // What a dying netd had accepted may hang for a moment; refusals may not.
    assert!(
        hung.parse::<u64>().expect("a number") <= 12,
        "{hung} of {all} attempts ended by timeout"
    );
    // And the policy is still the same one.
    sandbox.audited(&json!({ "decision": "deny", "ip": EVIL.to_string(), "port": 8080 }));
    sandbox.stop();
    assert_gone(machine, &sandbox.id);
}

pub(crate) fn a_killed_controller_forgets_nothing(machine: &Machine) {
    machine.node.wait_ready();
    let sandbox = machine
        .organization
        .sandbox(&json!({ "network": fixture_policy() }));
    let probe = machine.probe(&sandbox);
    sandbox.write("/workspace/kept", "kept");
    let mark = machine.world.capture().mark();
    machine.node.replace(Node::controller);
    wait::until("the API answers again", RECOVERY, || {
        machine
            .node
            .client()
            .get("//health")
            .try_send()
            .ok()
            .filter(|answer| answer.status.is_success())
    });
    // What was committed is known before anything else is.
    assert_eq!(sandbox.status(), "running");
    assert!(machine.organization.running().contains(&sandbox.id));
    wait::until("commands run again", RECOVERY, || {
        let call = sandbox
            .client()
            .post(&sandbox.path("/execute"))
            .json(&json!({ "command": "cat /workspace/kept" }));
        let answer = call.try_send().ok()?;
        (answer.status.is_success() && answer.ok()["stdout"] == "kept").then_some(())
    });
    probe
        .try_one(&probe::https("ok.test", "ok.test"))
        .assert_answered("hello from ok.test");
    probe
        .try_one(&probe::tcp(EVIL, 8080, "x"))
        .assert_refused_at_connect();
    // The new one rules.
    sandbox.set_network(&json!({ "mode": "deny_all" }));
    probe
        .try_one(&probe::https(OK, "ok.test"))
        .assert_refused_at_connect();
    sandbox.set_network(&fixture_policy());
    assert_only_allowed_traffic(&machine.world, mark);
    // Both at once.
    let (netd, controller) = (
        machine.node.netd().expect("netd runs"),
        machine.node.controller().expect("it runs"),
    );
    machine.node.kill(&netd).expect("it runs");
    machine.node.kill(&controller).expect("it runs");
    let restored = wait::within(RECOVERY, || {
        let call = sandbox
            .client()
            .post(&sandbox.path("/execute"))
            .json(&json!({ "command": "true" }));
        call.try_send().ok().filter(|answer| answer.status.is_success())
    });
    assert!(restored.is_some(), "no commands after both were killed");
    wait_until_served(&probe);
    assert_only_allowed_traffic(&machine.world, mark);
    machine.node.wait_ready();
    let fresh = machine.organization.sandbox(&json!({}));
    assert_eq!(fresh.sh_ok("echo fine"), "fine");
    fresh.stop();
    sandbox.stop();
    assert_gone(machine, &sandbox.id);
}

pub(crate) fn a_create_cut_off_by_a_kill_leaves_nothing(machine: &Machine) {
    machine.node.wait_ready();
    let before = machine.node.traces();
    for pause in [5, 20, 60, 150] {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // Whether it is answered depends on who is faster.
                machine
                    .organization
                    .client
                    .post("/sandbox/create")
                    .json(&json!({}))
                    .try_send()
                    .ok();
            });
            std::thread::sleep(Duration::from_millis(pause));
            machine.node.replace(Node::controller);
        });
        machine.node.wait_ready();
    }
    for id in machine.organization.running() {
        // Whatever is called running must be so.
        wait::until("a running sandbox runs", RECOVERY, || {
            let call = machine
                .organization
                .client
                .post(&format!("/sandbox/{id}/execute"))
                .json(&json!({ "command": "true" }));
            call.try_send().ok().filter(|answer| answer.status.is_success())
        });
        machine
            .organization
            .client
            .post(&format!("/sandbox/{id}/stop"))
            .send()
            .ok();
    }
    let left = || {
        let new: Vec<_> = machine
            .node
            .traces()
            .into_iter()
            .filter(|trace| !before.contains(trace))
            .collect();
        new
    };
    if wait::within(RECOVERY, || left().is_empty().then_some(())).is_none() {
        panic!("half-made sandboxes are left: {:#?}", left());
    }
}

pub(crate) fn a_killed_supervisor_takes_nothing_with_it(machine: &Machine) {
    machine.node.wait_ready();
    let sandbox = machine
        .organization
        .sandbox(&json!({ "network": fixture_policy() }));
    let probe = machine.probe(&sandbox);
    probe
        .try_one(&probe::https("ok.test", "ok.test"))
        .assert_answered("hello from ok.test");
    let attempts = [probe::tcp(EVIL, 8080, "canary"), probe::https(OK, "ok.test")];
    sandbox.background(&Probe::loop_line(&attempts, 10), |sandbox| {
        sandbox.sh("test -s /workspace/background.log").exit_code == 0
    });
    let mark = machine.world.capture().mark();
    machine.node.kill_up().expect("it runs");
    wait::until("its children follow it", RECOVERY, || {
        (machine.node.netd().is_none() && machine.node.controller().is_none()).then_some(())
    });
    assert!(
        !machine.node.processes_of(&sandbox.id).is_empty(),
        "the sandbox ended with its supervisor"
    );
    std::thread::sleep(Duration::from_secs(1));
    assert_only_allowed_traffic(&machine.world, mark);
    machine.node.start_again().expect("it starts again");
    assert_eq!(sandbox.status(), "running");
    wait_until_served(&probe);
    assert_eq!(sandbox.sh_ok("echo fine"), "fine");
    assert_only_allowed_traffic(&machine.world, mark);
    sandbox.stop();
    assert_gone(machine, &sandbox.id);
    // An orderly end and a new start are no different.
    let kept = machine.organization.sandbox(&json!({}));
    machine.node.stop().expect("it ends when asked");
    machine.node.start_again().expect("it starts again");
    assert_eq!(kept.sh_ok("echo fine"), "fine");
    kept.stop();
    assert_gone(machine, &kept.id);
}
