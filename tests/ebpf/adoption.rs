//! The wall stands without netd, and the next netd takes it over.

use std::{
    io::{BufRead as _, BufReader, ErrorKind},
    net::Ipv4Addr,
    path::PathBuf,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use aya::maps::{Array, Map, MapData};
use netd::{
    kernel::{Datapath, DatapathError},
    router::RouterNamespace,
};
use netd_common::Meta;
use sandgate_policy::{KernelAction, Reason};

use crate::{
    sockets::{Listeners, ask, at, connect},
    world::{
        RunDir, Sandbox, World, allow_443, config, events_until, open_table, platform, privileged, table,
    },
};

/// Tells the child what it is: `<run directory> <number of the sandbox's interface>`.
const CHILD: &str = "SANDGATE_TEST_LOADER";

fn refused(sandbox: &Sandbox, to: std::net::SocketAddrV4) {
    let (result, took) = sandbox.run(|| connect(to));
    assert_eq!(
        result.expect_err("refused").kind(),
        ErrorKind::ConnectionRefused,
        "{to}"
    );
    // Below the second after which a SYN would be sent again (RFC 6298, 2).
    assert!(took < Duration::from_millis(900), "{to} took {took:?}");
}

/// Not a test of its own: the process that the next one kills.
#[test]
fn loader_process() {
    let Some(run_dir) = std::env::var_os(CHILD).map(PathBuf::from) else {
        return;
    };
    let endpoint =
        serde_json::from_slice(&std::fs::read(run_dir.join("endpoint.json")).expect("the endpoint"))
            .expect("an endpoint");
    let datapath = Datapath::open(&config(&run_dir), &platform()).expect("a datapath");
    let handle = datapath.attach(&endpoint).expect("attached");
    datapath.set_policy(handle, &allow_443()).expect("a policy");
    datapath
        .bind_address(handle, Ipv4Addr::new(198, 51, 100, 7).into())
        .expect("bound");
    let _listeners = Listeners::serve(&datapath);
    println!("\nloader-ready");
    thread::sleep(Duration::from_secs(60));
}

#[test]
fn a_killed_netd_leaves_the_wall_standing_and_the_next_one_adopts_it() {
    if !privileged() {
        return;
    }
    let run_dir = RunDir::new();
    let router = RouterNamespace::open(run_dir.path()).expect("a router");
    let sandbox = Sandbox::create(&router, 1);
    let endpoint = serde_json::to_vec(&sandbox.endpoint).expect("JSON");
    std::fs::write(run_dir.path().join("endpoint.json"), endpoint).expect("written");
    let mut child = Command::new(std::env::current_exe().expect("this binary"))
        .args([
            "--exact",
            "adoption::loader_process",
            "--nocapture",
            "--test-threads",
            "1",
        ])
        .env(CHILD, run_dir.path())
        .stdout(Stdio::piped())
        .spawn()
        .expect("started");
    let output = BufReader::new(child.stdout.take().expect("piped"));
    let ready = output
        .lines()
        .map_while(Result::ok)
        .any(|line| line == "loader-ready");
    assert!(ready, "the loader ended early");
    sandbox.start(&router);
    let allowed = at([203, 0, 113, 10], 443);
    let denied = at([203, 0, 113, 10], 80);
    assert_eq!(
        sandbox.run(|| ask(allowed)).expect("an answer"),
        format!("tcp {allowed}")
    );
    refused(&sandbox, denied);
    let second = Datapath::open(&config(run_dir.path()), &platform());
    assert!(matches!(second, Err(DatapathError::Busy { .. })), "two at once");

    child.kill().expect("killed");
    child.wait().expect("gone");

    // Enforcement goes on, and what was allowed is refused, not open and not hung.
    refused(&sandbox, denied);
    refused(&sandbox, allowed);
    refused(&sandbox, at([10, 0, 0, 1], 443));

    let datapath = Datapath::open(&config(run_dir.path()), &platform()).expect("a datapath");
    let known = datapath.known();
    let [(handle, address)] = known[..] else {
        panic!("one endpoint is known: {known:?}");
    };
    assert_eq!(
        (address, handle.ifindex),
        (sandbox.address(), sandbox.endpoint.ifindex)
    );
    // What happened in between is told.
    let mut reader = datapath.take_events().expect("a reader");
    let events = events_until(&mut reader, |events| events.len() >= 4);
    assert!(
        events
            .iter()
            .any(|event| event.reason == Reason::UpstreamUnreachable && event.dst == allowed.into())
    );
    assert!(events.iter().any(|event| event.reason == Reason::PlatformDenied));
    // The policy is in force before anything is announced again; announcing it again changes nothing.
    let _listeners = Listeners::serve(&datapath);
    assert_eq!(
        sandbox.run(|| ask(allowed)).expect("an answer"),
        format!("tcp {allowed}")
    );
    refused(&sandbox, denied);
    assert_eq!(datapath.attach(&sandbox.endpoint).expect("attached"), handle);
    assert_eq!(
        sandbox.run(|| ask(allowed)).expect("an answer"),
        format!("tcp {allowed}")
    );
    let bound_only = table(&[("0.0.0.0/0", &[(443, 443, KernelAction::ProxyBound)])]);
    datapath.set_policy(handle, &bound_only).expect("a policy");
    let pinned = at([198, 51, 100, 7], 443);
    assert_eq!(
        sandbox.run(|| ask(pinned)).expect("pins survive"),
        format!("tcp {pinned}")
    );
    refused(&sandbox, allowed);
}

#[test]
fn a_restart_leaves_no_moment_without_the_wall() {
    if !privileged() {
        return;
    }
    let mut world = World::with_sandboxes(1);
    let (_, handle) = world.first();
    world.datapath.set_policy(handle, &allow_443()).expect("a policy");
    for _ in 0..3 {
        let stop = std::sync::atomic::AtomicBool::new(false);
        let World {
            datapath,
            sandboxes,
            run_dir,
        } = world;
        let datapath = thread::scope(|scope| {
            let (sandbox, _) = &sandboxes[0];
            let stop = &stop;
            let probe = scope.spawn(move || {
                let mut tried = 0;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    refused(sandbox, at([203, 0, 113, 10], 80));
                    tried += 1;
                }
                tried
            });
            drop(datapath);
            let datapath = Datapath::open(&config(run_dir.path()), &platform()).expect("a datapath");
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            assert!(probe.join().expect("always refused") > 0);
            datapath
        });
        world = World {
            datapath,
            sandboxes,
            run_dir,
        };
        assert_eq!(world.datapath.known().len(), 1);
    }
}

#[test]
fn pins_of_another_layout_are_replaced_and_everything_is_denied() {
    if !privileged() {
        return;
    }
    let world = World::with_sandboxes(1);
    let (_, handle) = world.first();
    world
        .datapath
        .set_policy(handle, &open_table())
        .expect("a policy");
    let meta = MapData::from_pin(world.run_dir.path().join("bpf/maps/META")).expect("the pinned map");
    let mut meta: Array<_, Meta> = Array::try_from(Map::Array(meta)).expect("an array");
    let standing = meta.get(&0, 0).expect("an entry");
    meta.set(
        0,
        Meta {
            layout: standing.layout + 1,
            ..standing
        },
        0,
    )
    .expect("written");
    drop(meta);

    let world = world.restart();
    let (sandbox, _) = world.first();
    assert_eq!(world.datapath.known(), []);
    let _listeners = Listeners::serve(&world.datapath);
    let to = at([203, 0, 113, 10], 443);
    let dropped = world.datapath.counters().expect("counters").dropped;
    assert!(sandbox.run(|| connect(to).0).is_err());
    assert!(
        world.datapath.counters().expect("counters").dropped > dropped,
        "the new program runs in the old link"
    );
    let handle = world.datapath.attach(&sandbox.endpoint).expect("attached");
    refused(sandbox, to);
    world
        .datapath
        .set_policy(handle, &open_table())
        .expect("a policy");
    assert_eq!(sandbox.run(|| ask(to)).expect("an answer"), format!("tcp {to}"));
}

#[test]
fn an_address_that_is_used_again_inherits_nothing() {
    if !privileged() {
        return;
    }
    let world = World::with_sandboxes(1);
    let (sandbox, old) = world.first();
    let datapath = &world.datapath;
    let bound_only = table(&[("0.0.0.0/0", &[(443, 443, KernelAction::ProxyBound)])]);
    let to = at([203, 0, 113, 10], 443);
    let local = at([169, 254, 1, 1], 50_000);
    datapath.set_policy(old, &bound_only).expect("a policy");
    datapath.bind_address(old, (*to.ip()).into()).expect("bound");
    datapath.admit_inbound(old, 7000, local, 1).expect("admitted");
    let _listeners = Listeners::serve(datapath);
    assert!(sandbox.run(|| ask(to)).is_ok());

    datapath.detach(old).expect("detached");
    datapath.detach(old).expect("twice is fine");
    assert_eq!(datapath.known(), []);
    assert!(sandbox.run(|| connect(to).0).is_err());
    assert!(matches!(
        datapath.set_policy(old, &open_table()),
        Err(DatapathError::Detached { .. })
    ));
    assert!(matches!(
        datapath.bind_address(old, (*to.ip()).into()),
        Err(DatapathError::Detached { .. })
    ));

    let new = datapath.attach(&sandbox.endpoint).expect("attached");
    assert!(new.ordinal > old.ordinal);
    refused(sandbox, to);
    datapath.set_policy(new, &bound_only).expect("a policy");
    refused(sandbox, to);
    datapath.bind_address(new, (*to.ip()).into()).expect("bound");
    assert!(sandbox.run(|| ask(to)).is_ok());
}

#[test]
fn what_is_announced_wrongly_is_not_attached() {
    if !privileged() {
        return;
    }
    let world = World::with_sandboxes(1);
    let (sandbox, handle) = world.first();
    let datapath = &world.datapath;
    let wrong_index = sandgate_api::feed::Endpoint {
        ifindex: 9999,
        address: Ipv4Addr::new(10, 213, 9, 9),
        ..sandbox.endpoint.clone()
    };
    assert!(matches!(
        datapath.attach(&wrong_index),
        Err(DatapathError::Interface { found: Some(_), .. })
    ));
    let wrong_name = sandgate_api::feed::Endpoint {
        interface: "sgnone".to_owned(),
        ..wrong_index
    };
    assert!(matches!(
        datapath.attach(&wrong_name),
        Err(DatapathError::Interface { found: None, .. })
    ));
    let second = Sandbox::create(datapath.router(), 2);
    let same_address = sandgate_api::feed::Endpoint {
        address: sandbox.address(),
        ..second.endpoint
    };
    assert!(matches!(
        datapath.attach(&same_address),
        Err(DatapathError::AddressInUse { .. })
    ));
    assert_eq!(datapath.known(), [(handle, sandbox.address())]);
}

#[test]
fn an_index_that_is_used_again_inherits_nothing() {
    if !privileged() {
        return;
    }
    let mut world = World::with_sandboxes(1);
    let (_, old) = world.first();
    world.datapath.set_policy(old, &open_table()).expect("a policy");
    let (gone, _) = world.sandboxes.remove(0);
    let (endpoint, router) = (gone.endpoint.clone(), world.datapath.router());
    drop(gone);
    wait_gone(&world, &endpoint.interface);
    // The same index, name, address and MAC, but another interface.
    let again = Sandbox::create_at(router, 1, Some(endpoint.ifindex));
    assert_eq!(again.endpoint, endpoint);
    let new = world.datapath.attach(&endpoint).expect("attached");
    assert_ne!(new.ordinal, old.ordinal);
    again.start(router);
    refused(&again, at([203, 0, 113, 10], 443));
}

#[test]
fn an_interface_that_is_gone_frees_its_address() {
    if !privileged() {
        return;
    }
    let mut world = World::with_sandboxes(1);
    let (gone, old) = world.sandboxes.remove(0);
    drop(gone);
    wait_gone(&world, "sg1");
    let again = Sandbox::create(world.datapath.router(), 1);
    let new = world.datapath.attach(&again.endpoint).expect("attached");
    assert_ne!(new.ordinal, old.ordinal);
    assert_eq!(world.datapath.known(), [(new, again.address())]);
}

/// Waits until an interface is gone whose sandbox's namespace has just lost its last holder.
fn wait_gone(world: &World, interface: &str) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while world
        .datapath
        .router()
        .run(|| nix::net::if_::if_nametoindex(interface).is_ok())
        .expect("router")
    {
        assert!(Instant::now() < deadline, "{interface} stays");
        thread::sleep(Duration::from_millis(20));
    }
}
