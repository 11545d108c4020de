//! An uplink on which others stand before netd's program, and that cannot be mended.

use std::{fs, fs::File, path::Path, thread};

use aya::programs::{LinkOrder, SchedClassifier, TcAttachType, tc::TcAttachOptions};
use harness::{
    bpf::pin_open_door,
    probe::{self, Probe},
    wait,
    world::{NODE, OK},
};
use nix::sched::{CloneFlags, setns};
use serde_json::json;

use super::{ECHO, LATER, Passing, SOON, open, passes};

/// Puts a program that lets everything pass before all others on the uplink, until what is returned is dropped; none when
/// the interface takes no more, or is gone.
fn come_first(run_dir: &Path, number: usize) -> Option<SchedClassifier> {
    let pinned = run_dir.join(format!("bpf/intruder{number}"));
    pin_open_door(&pinned).expect("a program");
    let program = SchedClassifier::from_pin(&pinned);
    fs::remove_file(&pinned).expect("its pin");
    let mut program = program.expect("the intruder");
    let router = File::open(run_dir.join("netns/router")).expect("the router namespace");
    let attaching = thread::spawn(move || {
        setns(&router, CloneFlags::CLONE_NEWNET).expect("entered");
        let order = TcAttachOptions::TcxOrder(LinkOrder::first());
        let attached = program.attach_with_options("uplink", TcAttachType::Ingress, order);
        attached.is_ok().then_some(program)
    });
    attaching.join().expect("no panic")
}

pub(crate) fn an_uplink_that_others_took_over_is_used_no_more_and_made_anew(machine: &Passing) {
    let sandbox = machine.sandbox(&open(&[443, ECHO]));
    let probe = Probe::install(&sandbox, &machine.world);
    assert_eq!(passes(&machine.node), Ok(()));
    // As the node sees it: its mounts are not ours.
    let run_dir = machine.node.run_dir().strip_prefix("/").expect("absolute");
    let run_dir = machine.world.node().task().join("root").join(run_dir);
    // As many as there is room for, so that ours cannot be put before them again.
    let mut intruders = Vec::new();
    let reason = wait::within(SOON, || {
        while let Some(intruder) = come_first(&run_dir, intruders.len()) {
            intruders.push(intruder);
        }
        passes(&machine.node).err()
    });
    let reason = reason.expect("it is noticed");
    assert!(reason.contains("from_uplink is not the first"), "{reason}");
    // Through netd it goes on, which reads that it is TLS.
    probe
        .try_one(&probe::https("ok.test", "ok.test"))
        .assert_answered("hello from ok.test");
    sandbox.audited(&json!({ "protocol": "tls", "verdict": "allow", "host": "ok.test" }));
    drop(intruders);
    wait::until("it passes again", LATER, || passes(&machine.node).ok());
    probe.try_one(&probe::tcp(OK, ECHO, "canary"));
    let arrivals = machine.world.tcp_collector((OK, ECHO)).arrivals();
    assert_eq!(arrivals.last().expect("it arrived").from.ip(), NODE);
    sandbox.audited(&json!({ "protocol": "tcp", "verdict": "allow", "port": ECHO }));
    sandbox.stop();
}
