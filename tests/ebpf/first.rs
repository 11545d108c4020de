//! Ours come first: who comes before them is noticed and put behind, on kernels with TCX and by clsact filters.

use std::io::ErrorKind;

use harness::bpf::pin_open_door;
use netd::{
    kernel::{Datapath, DatapathConfig},
    router::RouterNamespace,
};

use crate::{
    sockets::{Listeners, at, connect},
    world::{RunDir, Sandbox, allow_443, config, platform, privileged},
};

fn clsact(run_dir: &RunDir) -> DatapathConfig {
    DatapathConfig {
        force_clsact: true,
        ..config(run_dir.path())
    }
}

fn tc(router: &RouterNamespace, line: &str) -> String {
    let arguments: Vec<&str> = line.split_whitespace().collect();
    let output = router
        .run(|| std::process::Command::new("tc").args(&arguments).output())
        .expect("the router")
        .expect("tc");
    assert!(
        output.status.success(),
        "tc {line}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn assert_wall(sandbox: &Sandbox) {
    sandbox.run(|| {
        let (refused, _) = connect(at([203, 0, 113, 10], 80));
        assert_eq!(refused.expect_err("refused").kind(), ErrorKind::ConnectionRefused);
        let (allowed, _) = connect(at([203, 0, 113, 10], 443));
        allowed.expect("allowed");
    });
}

#[test]
fn clsact_filters_are_the_same_wall_and_are_adopted() {
    if !privileged() {
        return;
    }
    let run_dir = RunDir::new();
    let datapath = Datapath::open(&clsact(&run_dir), &platform()).expect("a datapath");
    let sandbox = Sandbox::create(datapath.router(), 1);
    let handle = datapath.attach(&sandbox.endpoint).expect("attached");
    sandbox.start(datapath.router());
    datapath.set_policy(handle, &allow_443()).expect("a policy");
    let interface = sandbox.endpoint.interface.clone();
    let _listeners = Listeners::serve(&datapath);
    assert_wall(&sandbox);
    let filters = |datapath: &Datapath| {
        let shown = |side| tc(datapath.router(), &format!("filter show dev {interface} {side}"));
        (shown("ingress"), shown("egress"))
    };
    let before = filters(&datapath);
    assert!(
        before.0.contains("from_sandbox") && before.0.contains("pref 1 "),
        "{before:?}"
    );
    assert!(
        before.1.contains("to_sandbox") && before.1.contains("pref 1 "),
        "{before:?}"
    );
    drop(datapath);
    // Without netd it stands; the next one puts its own programs into the same filters.
    let datapath = Datapath::open(&clsact(&run_dir), &platform()).expect("a datapath");
    assert_eq!(datapath.known().len(), 1, "adopted");
    let after = filters(&datapath);
    let number = |text: &str| {
        let words: Vec<&str> = text.split_whitespace().collect();
        words
            .windows(2)
            .find(|pair| pair[0] == "id")
            .map(|pair| pair[1].to_owned())
    };
    assert_ne!(number(&after.0), number(&before.0), "{after:?}");
    assert_eq!(
        after.0.matches("from_sandbox").count(),
        before.0.matches("from_sandbox").count()
    );
    assert_wall(&sandbox);
    datapath.detach(handle).expect("detached");
    let gone = filters(&datapath);
    assert!(
        !gone.0.contains("from_sandbox") && !gone.1.contains("to_sandbox"),
        "{gone:?}"
    );
}

#[test]
fn a_filter_that_comes_before_ours_is_put_behind() {
    if !privileged() {
        return;
    }
    let run_dir = RunDir::new();
    let datapath = Datapath::open(&clsact(&run_dir), &platform()).expect("a datapath");
    let sandbox = Sandbox::create(datapath.router(), 1);
    let handle = datapath.attach(&sandbox.endpoint).expect("attached");
    sandbox.start(datapath.router());
    datapath.set_policy(handle, &allow_443()).expect("a policy");
    let _listeners = Listeners::serve(&datapath);
    assert!(datapath.guard().expect("a look").is_empty());
    let interface = &sandbox.endpoint.interface;
    // Of the same priority and younger: it runs first.
    let pinned = run_dir.path().join("bpf/intruder");
    pin_open_door(&pinned).expect("a program");
    let line = format!(
        "filter add dev {interface} ingress pref 1 handle 7 protocol all bpf da object-pinned {}",
        pinned.display()
    );
    tc(datapath.router(), &line);
    let found = datapath.guard().expect("a look");
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(found[0].ifindex, sandbox.endpoint.ifindex);
    assert!(found[0].outcome.is_ok(), "{found:?}");
    assert!(datapath.guard().expect("a look").is_empty());
    assert_wall(&sandbox);
}

#[test]
fn a_program_that_comes_before_ours_is_put_behind() {
    if !privileged() {
        return;
    }
    let run_dir = RunDir::new();
    let datapath = Datapath::open(&config(run_dir.path()), &platform()).expect("a datapath");
    let sandbox = Sandbox::create(datapath.router(), 1);
    let handle = datapath.attach(&sandbox.endpoint).expect("attached");
    sandbox.start(datapath.router());
    datapath.set_policy(handle, &allow_443()).expect("a policy");
    let _listeners = Listeners::serve(&datapath);
    assert!(datapath.guard().expect("a look").is_empty());
    let pinned = run_dir.path().join("bpf/intruder");
    pin_open_door(&pinned).expect("a program");
    let program = aya::programs::SchedClassifier::from_pin(&pinned);
    let mut program = program.expect("the intruder");
    let order = aya::programs::tc::TcAttachOptions::TcxOrder(aya::programs::LinkOrder::first());
    let interface = sandbox.endpoint.interface.clone();
    let side = aya::programs::TcAttachType::Ingress;
    let attached = datapath
        .router()
        .run(|| program.attach_with_options(&interface, side, order))
        .expect("the router");
    attached.expect("before ours");
    let found = datapath.guard().expect("a look");
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].outcome.is_ok(), "{found:?}");
    assert!(datapath.guard().expect("a look").is_empty());
    assert_wall(&sandbox);
}
