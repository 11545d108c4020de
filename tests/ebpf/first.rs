//! Ours come first: who comes before them is noticed and put behind, on kernels with TCX and by clsact filters.

use std::{io::ErrorKind, path::Path, time::Duration};

use aya::{
    maps::{Array, Map, MapData},
    programs::{LinkOrder, SchedClassifier, TcAttachType, tc::TcAttachOptions},
};
use harness::{bpf::pin_open_door, wait};
use netd::{
    kernel::{Attach, Datapath, DatapathConfig, Uplink},
    router::{RouterNamespace, pass},
};

use crate::{
    lab::PEER_MAC,
    sockets::{Listeners, at, connect},
    world::{RunDir, Sandbox, allow_443, config, platform, privileged},
};

/// `bpf_mprog_max()` of linux/bpf_mprog.h: so many programs are in an interface's list at most.
const LIST_MAX: usize = 63;

fn clsact(run_dir: &RunDir) -> DatapathConfig {
    DatapathConfig {
        attach: Attach::Clsact,
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

/// Puts a pinned program before all others, until what is returned is dropped.
fn come_first(datapath: &Datapath, interface: &str, pinned: &Path) -> SchedClassifier {
    let mut program = SchedClassifier::from_pin(pinned).expect("the intruder");
    let order = TcAttachOptions::TcxOrder(LinkOrder::first());
    let attached = datapath
        .router()
        .run(|| program.attach_with_options(interface, TcAttachType::Ingress, order))
        .expect("the router");
    attached.expect("before ours");
    program
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
fn filters_that_are_taken_away_are_missed_and_put_back() {
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
    assert_wall(&sandbox);
    let interface = &sandbox.endpoint.interface;
    for (line, judged) in [
        (format!("filter del dev {interface} ingress"), false),
        (format!("filter del dev {interface} egress"), true),
        (format!("qdisc del dev {interface} clsact"), false),
    ] {
        tc(datapath.router(), &line);
        // What no program has judged goes nowhere.
        let (allowed, _) = sandbox.run(|| connect(at([203, 0, 113, 10], 443)));
        assert_eq!(allowed.is_ok(), judged, "{line}");
        let found = datapath.guard().expect("a look");
        let [guarded] = &found[..] else {
            panic!("{line}: {found:?}");
        };
        assert_eq!(guarded.ifindex, sandbox.endpoint.ifindex, "{line}");
        assert!(guarded.outcome.is_ok(), "{line}: {found:?}");
        assert!(datapath.guard().expect("a look").is_empty(), "{line}");
        assert_wall(&sandbox);
    }
}

#[test]
fn another_means_takes_the_place_of_the_one_before() {
    if !privileged() {
        return;
    }
    let run_dir = RunDir::new();
    let by = |attach| DatapathConfig {
        attach,
        ..config(run_dir.path())
    };
    let router = RouterNamespace::open(run_dir.path()).expect("a router");
    let sandbox = Sandbox::create(&router, 1);
    sandbox.start(&router);
    let interface = sandbox.endpoint.interface.as_str();
    // They stay in the map, which every datapath here adopts.
    let mut listeners = None;
    for attach in [Attach::Tcx, Attach::Clsact, Attach::Tcx, Attach::Auto] {
        let datapath = Datapath::open(&by(attach), &platform()).expect("a datapath");
        let handle = datapath.attach(&sandbox.endpoint).expect("attached");
        datapath.set_policy(handle, &allow_443()).expect("a policy");
        listeners.get_or_insert_with(|| Listeners::serve(&datapath));
        assert_wall(&sandbox);
        assert!(datapath.guard().expect("a look").is_empty(), "{attach:?}");
        // Not one of the other kind is left.
        let filters = tc(&router, &format!("filter show dev {interface} ingress"));
        let count = filters.matches("handle").count();
        assert_eq!(
            count,
            usize::from(attach == Attach::Clsact),
            "{attach:?}: {filters}"
        );
        let links = if attach == Attach::Clsact { 0 } else { 1 };
        hang(&datapath, interface, links);
    }
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
    let _intruder = come_first(&datapath, &sandbox.endpoint.interface, &pinned);
    let found = datapath.guard().expect("a look");
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].outcome.is_ok(), "{found:?}");
    assert!(datapath.guard().expect("a look").is_empty());
    assert_wall(&sandbox);
}

/// An uplink in use whose other end is nowhere.
fn uplink(datapath: &Datapath) -> Uplink {
    let uplink = lead_nowhere(datapath);
    datapath.attach_uplink(&uplink).expect("attached");
    datapath.set_uplink(Some(uplink)).expect("used");
    assert!(datapath.guard().expect("a look").is_empty());
    uplink
}

/// The same before anybody is told of it.
pub(crate) fn lead_nowhere(datapath: &Datapath) -> Uplink {
    let router = datapath.router();
    let ifindex = router.run(|| {
        let line = [
            "link",
            "add",
            pass::INTERFACE,
            "type",
            "veth",
            "peer",
            "name",
            "nowhere",
        ];
        let made = std::process::Command::new("ip").args(line).status();
        assert!(made.expect("ip").success());
        nix::net::if_::if_nametoindex(pass::INTERFACE).expect("the uplink")
    });
    Uplink {
        ifindex: ifindex.expect("the router"),
        peer_mac: PEER_MAC,
        ipv6: true,
    }
}

/// The programs of an interface's own list, in their order.
fn listed(datapath: &Datapath, interface: &str) -> Vec<String> {
    let asked = || SchedClassifier::query_tcx(interface, TcAttachType::Ingress);
    let (_, programs) = datapath.router().run(asked).expect("the router").expect("a list");
    // Intruders have none.
    let name = |program: &aya::programs::ProgramInfo| program.name_as_str().unwrap_or_default().to_owned();
    programs.iter().map(name).collect()
}

/// Waits until so many programs are there: the kernel lets go of links a moment later.
#[track_caller]
fn hang(datapath: &Datapath, interface: &str, count: usize) {
    wait::until("the kernel lets go", Duration::from_secs(20), || {
        (listed(datapath, interface).len() == count).then_some(())
    });
}

/// Which interface the programs send to, by the map itself.
fn used(run_dir: &RunDir) -> u32 {
    let map = MapData::from_pin(run_dir.path().join("bpf/maps/UPLINK")).expect("the pinned map");
    let map: Array<_, netd_common::Uplink> = Array::try_from(Map::Array(map)).expect("an array");
    map.get(&0, 0).expect("its entry").ifindex
}

#[test]
fn the_uplinks_program_is_put_back_when_it_is_taken_away_or_displaced() {
    if !privileged() {
        return;
    }
    let run_dir = RunDir::new();
    let datapath = Datapath::open(&config(run_dir.path()), &platform()).expect("a datapath");
    let uplink = uplink(&datapath);
    let restored = |what: &str| {
        let found = datapath.guard().expect("a look");
        let [guarded] = &found[..] else {
            panic!("{what}: {found:?}");
        };
        assert!(guarded.uplink && guarded.outcome.is_ok(), "{what}: {found:?}");
        assert_eq!(guarded.ifindex, uplink.ifindex, "{what}");
        assert_eq!(
            listed(&datapath, pass::INTERFACE).first().map(String::as_str),
            Some("from_uplink"),
            "{what}"
        );
        assert!(datapath.guard().expect("a look").is_empty(), "{what}");
        assert_eq!(used(&run_dir), uplink.ifindex, "{what}");
    };
    let link = format!("bpf/links/{}-from_uplink", uplink.ifindex);
    std::fs::remove_file(run_dir.path().join(link)).expect("the pinned link");
    hang(&datapath, pass::INTERFACE, 0);
    restored("taken away");
    let pinned = run_dir.path().join("bpf/intruder");
    pin_open_door(&pinned).expect("a program");
    let _intruder = come_first(&datapath, pass::INTERFACE, &pinned);
    restored("displaced");
}

#[test]
fn an_uplink_whose_program_cannot_be_put_first_is_used_no_more() {
    if !privileged() {
        return;
    }
    let run_dir = RunDir::new();
    let datapath = Datapath::open(&config(run_dir.path()), &platform()).expect("a datapath");
    let uplink = uplink(&datapath);
    assert_eq!(used(&run_dir), uplink.ifindex);
    let intruders: Vec<_> = (1..LIST_MAX)
        .map(|number| {
            let pinned = run_dir.path().join(format!("bpf/intruder{number}"));
            pin_open_door(&pinned).expect("a program");
            come_first(&datapath, pass::INTERFACE, &pinned)
        })
        .collect();
    let found = datapath.guard().expect("a look");
    let [guarded] = &found[..] else {
        panic!("{found:?}");
    };
    assert!(guarded.uplink && guarded.outcome.is_err(), "{found:?}");
    assert_eq!(used(&run_dir), 0);
    // No longer in use, no longer looked at.
    assert!(datapath.guard().expect("a look").is_empty());
    // Nor does anybody use it again who did not see to the program first.
    assert!(datapath.open_uplink(&uplink, false).is_err());
    datapath.close_uplink6().expect("nothing to close");
    datapath.set_prover(None).expect("nothing to prove");
    assert!(datapath.prepare_uplink(&uplink).is_err());
    assert_eq!(used(&run_dir), 0);
    drop(intruders);
    hang(&datapath, pass::INTERFACE, 1);
    let proven = datapath.prepare_uplink(&uplink).expect("prepared again");
    assert!(!proven.ipv4 && !proven.ipv6, "what was proven is proven anew");
    datapath.open_uplink(&uplink, false).expect("used again");
    assert!(datapath.guard().expect("a look").is_empty());
}
