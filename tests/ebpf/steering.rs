//! Allowed traffic reaches netd's sockets, with its original destination.

use std::{
    io::ErrorKind,
    net::{SocketAddrV4, TcpStream},
    thread,
    time::{Duration, Instant},
};

use sandgate_policy::{KernelAction, Reason};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    sockets::{Listeners, ask, at, connect, query},
    world::{Sandbox, World, allow_443, open_table, privileged, table},
};

#[test]
fn redirected_connections_keep_their_destination() {
    if !privileged() {
        return;
    }
    let world = World::with_sandboxes(1);
    let (sandbox, handle) = world.first();
    world.datapath.set_policy(handle, &allow_443()).expect("a policy");
    let _listeners = Listeners::serve(&world.datapath);
    sandbox.run(|| {
        for last in [1, 10, 254] {
            let to = at([203, 0, 113, last], 443);
            assert_eq!(ask(to).expect("an answer"), format!("tcp {to}"));
        }
        for to in [
            at([203, 0, 113, 53], 53),
            at([10, 9, 9, 9], 53),
            at([169, 254, 1, 1], 53),
        ] {
            assert_eq!(ask(to).expect("an answer"), format!("dns {to}"));
            assert_eq!(query(to).0.expect("an answer"), format!("udp {to}"));
        }
    });
    let counters = world.datapath.counters().expect("counters");
    assert!(
        counters.steered > 0 && counters.dns > 0 && counters.delivered > 0,
        "{counters:?}"
    );
    assert_eq!(
        (counters.refused, counters.dropped, counters.unadmitted),
        (0, 0, 0),
        "{counters:?}"
    );
}

#[test]
fn netds_own_host_is_reached_whatever_the_policy_says() {
    if !privileged() {
        return;
    }
    let world = World::with_sandboxes(1);
    let (sandbox, handle) = world.first();
    let datapath = &world.datapath;
    let _listeners = Listeners::serve(datapath);
    let denying = KernelAction::Deny(Reason::DeniedByRule);
    for policy in [
        table(&[]),
        table(&[("0.0.0.0/0", &[(0, u16::MAX, denying)])]),
        open_table(),
    ] {
        datapath.set_policy(handle, &policy).expect("a policy");
        sandbox.run(|| {
            let host = at([169, 254, 1, 1], 443);
            assert_eq!(ask(host).expect("an answer"), format!("tcp {host}"));
            for (last, port) in [(1, 80), (1, 442), (1, 444), (1, 8443), (1, 15_001), (2, 443)] {
                let (result, _) = connect(at([169, 254, 1, last], port));
                assert_eq!(
                    result.expect_err("refused").kind(),
                    ErrorKind::ConnectionRefused,
                    "{last}:{port}"
                );
            }
        });
    }
}

#[test]
fn an_address_is_open_while_it_is_bound() {
    if !privileged() {
        return;
    }
    let world = World::with_sandboxes(2);
    let (sandbox, handle) = world.first();
    let datapath = &world.datapath;
    let bound_only = table(&[("0.0.0.0/0", &[(443, 443, KernelAction::ProxyBound)])]);
    for (_, handle) in &world.sandboxes {
        datapath.set_policy(*handle, &bound_only).expect("a policy");
    }
    let _listeners = Listeners::serve(datapath);
    let to = at([203, 0, 113, 10], 443);
    let refused = |sandbox: &Sandbox| {
        let (result, _) = sandbox.run(|| connect(to));
        assert_eq!(result.expect_err("refused").kind(), ErrorKind::ConnectionRefused);
    };
    refused(sandbox);
    datapath.bind_address(handle, (*to.ip()).into()).expect("bound");
    // One that stays open while its address is unbound goes on.
    let (held, _) = sandbox.run(|| connect(to));
    let mut held: TcpStream = held.expect("accepted");
    refused(&world.sandboxes[1].0);
    datapath
        .unbind_address(handle, (*to.ip()).into())
        .expect("unbound");
    refused(sandbox);
    let mut answer = String::new();
    std::io::Read::read_to_string(&mut held, &mut answer).expect("an answer");
    assert_eq!(answer, format!("tcp {to}"));
}

#[test]
fn a_new_policy_holds_from_the_next_packet_on() {
    if !privileged() {
        return;
    }
    let world = World::with_sandboxes(1);
    let (sandbox, handle) = world.first();
    let datapath = &world.datapath;
    let _listeners = Listeners::serve(datapath);
    let to = at([203, 0, 113, 10], 443);
    for _ in 0..20 {
        datapath.set_policy(handle, &open_table()).expect("a policy");
        sandbox.run(|| connect(to).0.expect("accepted"));
        datapath.set_policy(handle, &table(&[])).expect("a policy");
        let (result, _) = sandbox.run(|| connect(to));
        assert_eq!(result.expect_err("refused").kind(), ErrorKind::ConnectionRefused);
    }
}

#[test]
fn a_policy_change_disturbs_no_flow_that_both_allow() {
    if !privileged() {
        return;
    }
    let world = World::with_sandboxes(1);
    let (sandbox, handle) = world.first();
    let datapath = &world.datapath;
    datapath.set_policy(handle, &open_table()).expect("a policy");
    let _listeners = Listeners::serve(datapath);
    thread::scope(|scope| {
        let clients = scope.spawn(|| {
            sandbox.run(|| {
                for _ in 0..1000 {
                    let to = at([203, 0, 113, 10], 443);
                    assert_eq!(ask(to).expect("an answer"), format!("tcp {to}"));
                }
            });
        });
        while !clients.is_finished() {
            datapath.set_policy(handle, &open_table()).expect("a policy");
            thread::sleep(Duration::from_millis(1));
        }
        clients.join().expect("no client failed");
    });
}

#[test]
fn one_port_may_be_used_again_at_once() {
    if !privileged() {
        return;
    }
    let world = World::with_sandboxes(1);
    let (sandbox, handle) = world.first();
    world
        .datapath
        .set_policy(handle, &open_table())
        .expect("a policy");
    let _listeners = Listeners::serve(&world.datapath);
    let to = at([203, 0, 113, 10], 443);
    sandbox.run(|| {
        // netd closes first here, so its end would wait; the sandbox's end forgets and takes the same port. A SYN that
        // met the waiting end would be answered with an old acknowledgement, reset it and be sent again.
        let mut times = Vec::new();
        for _ in 0..50 {
            let (socket, took) = from_port(45_000, to);
            times.push(took);
            let mut stream = TcpStream::from(socket);
            let mut answer = String::new();
            std::io::Read::read_to_string(&mut stream, &mut answer).expect("an answer");
            assert_eq!(answer, format!("tcp {to}"));
        }
        times.sort_unstable();
        assert!(times[times.len() / 2] < Duration::from_millis(5), "{times:?}");
    });
}

/// Connects from a given port as soon as this end has let go of it; the other end gets less than a SYN needs to be sent again.
fn from_port(port: u16, to: SocketAddrV4) -> (Socket, Duration) {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        socket.set_reuse_address(true).expect("reuse");
        socket.bind(&at([10, 213, 0, 1], port).into()).expect("bound");
        let started = Instant::now();
        match socket.connect_timeout(&to.into(), Duration::from_millis(900)) {
            Ok(()) => return (socket, started.elapsed()),
            // The last acknowledgement of the connection before is still to come.
            Err(error) if error.kind() == ErrorKind::AddrNotAvailable && Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(1));
            }
            Err(error) => panic!("not accepted at once: {error}"),
        }
    }
}

/// How often a flood that was too slow for the limit is made again.
const GOES: usize = 10;

#[test]
fn a_flood_of_connections_is_refused_beyond_the_limit_and_leaves_others_alone() {
    if !privileged() {
        return;
    }
    let world = World::with_sandboxes(2);
    let datapath = &world.datapath;
    for (_, handle) in &world.sandboxes {
        datapath.set_policy(*handle, &open_table()).expect("a policy");
    }
    let _listeners = Listeners::serve(datapath);
    let (flooder, _) = &world.sandboxes[0];
    let (quiet, _) = &world.sandboxes[1];
    let to = at([203, 0, 113, 10], 443);
    // SYNs that nobody completes, as fast as the machine makes them. A busy one may need more than one go.
    let flood = || {
        let raw = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::TCP)).expect("a raw socket");
        let mut sent = 0_u32;
        for port in 20_000_u16..60_000 {
            let frame = crate::packet::Frame {
                from_port: port,
                ..crate::packet::Frame::tcp([10, 213, 0, 1].into(), [0; 6], *to.ip(), 443)
            };
            let mut segment = frame.bytes()[34..].to_vec();
            checksum(&mut segment, [10, 213, 0, 1], to.ip().octets());
            sent += u32::from(raw.send_to(&segment, &at(to.ip().octets(), 0).into()).is_ok());
        }
        sent
    };
    let limited = (0..GOES).any(|_| {
        let sent = flooder.run(flood);
        assert!(sent > 30_000, "{sent}");
        let (answer, took) = quiet.run(|| (ask(to), connect(to).1));
        assert_eq!(answer.expect("an answer"), format!("tcp {to}"));
        // A lost SYN is sent again after a second (RFC 6298, 2).
        assert!(took < Duration::from_millis(900), "{took:?}");
        datapath.counters().expect("counters").refused > 0
    });
    let counters = datapath.counters().expect("counters");
    assert!(limited, "the limit was not reached: {counters:?}");
}

/// TCP's checksum over the pseudo header.
fn checksum(segment: &mut [u8], from: [u8; 4], to: [u8; 4]) {
    let mut bytes = Vec::new();
    bytes.extend(from);
    bytes.extend(to);
    bytes.extend([0, 6]);
    bytes.extend(u16::try_from(segment.len()).expect("short").to_be_bytes());
    bytes.extend(segment.iter());
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let sum = !u16::try_from(sum).expect("folded");
    segment[16..18].copy_from_slice(&sum.to_be_bytes());
}
