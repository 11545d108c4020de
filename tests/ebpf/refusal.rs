//! A refusal is immediate: measured with real sockets in a real namespace.

use std::{io::ErrorKind, process::Command, time::Duration};

use sandgate_policy::Reason;

use crate::{
    sockets::{Listeners, at, connect, query},
    world::{World, allow_443, events_until, privileged},
};

/// Below the second after which a SYN would be sent again (RFC 6298, 2), far above what a loaded machine needs.
const AT_ONCE: Duration = Duration::from_millis(900);

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

#[test]
fn forbidden_connections_are_refused_at_once() {
    if !privileged() {
        return;
    }
    let world = World::with_sandboxes(2);
    let (sandbox, handle) = world.first();
    world.datapath.set_policy(handle, &allow_443()).expect("a policy");
    let _listeners = Listeners::serve(&world.datapath);
    let other = world.sandboxes[1].0.address();
    let destinations = [
        at([198, 51, 100, 66], 443),
        at([203, 0, 113, 10], 80),
        at([203, 0, 113, 10], 8443),
        at([10, 1, 2, 3], 443),
        at([169, 254, 169, 254], 80),
        at([169, 254, 1, 1], 80),
        at([169, 254, 1, 1], 15001),
        at([0, 0, 0, 1], 443),
        at([240, 0, 0, 1], 443),
        at(other.octets(), 443),
    ];
    sandbox.run(|| {
        for to in destinations {
            let (result, took) = connect(to);
            let error = result.expect_err("refused");
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{to}: {error}");
            assert!(took < AT_ONCE, "{to} took {took:?}");
        }
    });
    assert_eq!(world.datapath.counters().expect("counters").refused, 10);
}

#[test]
fn two_thousand_refusals_none_of_them_slow() {
    if !privileged() {
        return;
    }
    let world = World::with_sandboxes(1);
    let (sandbox, handle) = world.first();
    world.datapath.set_policy(handle, &allow_443()).expect("a policy");
    let (tcp, udp) = sandbox.run(|| {
        let tcp: Vec<Duration> = (0..2000)
            .map(|_| {
                let (result, took) = connect(at([203, 0, 113, 10], 80));
                assert_eq!(result.expect_err("refused").kind(), ErrorKind::ConnectionRefused);
                took
            })
            .collect();
        let udp: Vec<Duration> = (0..2000)
            .map(|_| {
                let (result, took) = query(at([203, 0, 113, 10], 443));
                let error = result.expect_err("refused");
                assert_eq!(error.raw_os_error(), Some(libc::EHOSTUNREACH), "{error}");
                took
            })
            .collect();
        (tcp, udp)
    });
    for (what, times) in [("TCP", tcp), ("UDP", udp)] {
        let slowest = *times.iter().max().expect("two thousand");
        let middle = median(times);
        eprintln!("refusal of {what}: median {middle:?}, slowest of 2000 {slowest:?}");
        assert!(middle < Duration::from_millis(5), "{what}: {middle:?}");
        assert!(slowest < AT_ONCE, "{what}: {slowest:?}");
    }
    let mut reader = world.datapath.take_events().expect("a reader");
    let sum = |events: &[netd::kernel::DenyEvent]| events.iter().map(|event| event.repeated).sum::<u64>();
    let events = events_until(&mut reader, |events| sum(events) >= 4000);
    assert_eq!(sum(&events), 4000);
    assert!(
        events
            .iter()
            .all(|event| matches!(event.reason, Reason::DefaultDeny | Reason::ProtocolDenied))
    );
}

#[test]
fn without_a_listener_an_allowed_connection_is_refused_not_hung() {
    if !privileged() {
        return;
    }
    let world = World::with_sandboxes(1);
    let (sandbox, handle) = world.first();
    world.datapath.set_policy(handle, &allow_443()).expect("a policy");
    let to = at([203, 0, 113, 10], 443);
    let refused = || {
        sandbox.run(|| {
            for target in [to, at([203, 0, 113, 53], 53)] {
                let (result, took) = connect(target);
                assert_eq!(
                    result.expect_err("refused").kind(),
                    ErrorKind::ConnectionRefused,
                    "{target}"
                );
                assert!(took < AT_ONCE, "{took:?}");
            }
            let (result, took) = query(at([203, 0, 113, 53], 53));
            assert!(result.is_err() && took < AT_ONCE, "{result:?} after {took:?}");
        });
    };
    refused();
    let listeners = Listeners::serve(&world.datapath);
    sandbox.run(|| connect(to).0.expect("accepted"));
    listeners.close();
    refused();
}

#[test]
fn protocols_that_cannot_be_allowed_are_dropped_and_reported() {
    if !privileged() {
        return;
    }
    let world = World::with_sandboxes(1);
    let (sandbox, _) = world.first();
    let mut reader = world.datapath.take_events().expect("a reader");
    sandbox.run(|| {
        use socket2::{Domain, Protocol, Socket, Type};
        let raw = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4)).expect("a raw socket");
        raw.send_to(&[8, 0, 0xf7, 0xff, 0, 0, 0, 0], &at([203, 0, 113, 10], 0).into())
            .expect("sent");
    });
    let events = events_until(&mut reader, |events| !events.is_empty());
    assert_eq!(
        (events[0].reason, events[0].protocol),
        (Reason::ProtocolDenied, 1)
    );
    assert_eq!(events[0].dst, "203.0.113.10:0".parse().expect("an address"));
}

#[test]
fn without_the_nftables_table_a_refused_packet_still_goes_nowhere() {
    if !privileged() {
        return;
    }
    let world = World::with_sandboxes(2);
    let (sandbox, _) = world.first();
    let (other, other_handle) = &world.sandboxes[1];
    let deleted = world
        .datapath
        .router()
        .run(|| {
            Command::new("nft")
                .args(["delete", "table", "inet", "sandgate"])
                .status()
                .expect("nft runs")
        })
        .expect("router");
    assert!(deleted.success());
    let before = world.datapath.counters().expect("counters");
    for to in [
        at(other.address().octets(), 443),
        at([203, 0, 113, 10], 80),
        at([169, 254, 1, 1], 80),
    ] {
        assert!(sandbox.run(|| connect(to).0).is_err(), "{to}");
    }
    let after = world.datapath.counters().expect("counters");
    assert!(after.refused > before.refused);
    // Not one of them was even tried toward the other sandbox.
    assert_eq!(after.unadmitted, before.unadmitted);
    assert_eq!(after.delivered, before.delivered);
    world.datapath.detach(*other_handle).expect("detached");
    // The next start puts it back.
    let world = world.restart();
    let (sandbox, _) = world.first();
    let (result, took) = sandbox.run(|| connect(at([203, 0, 113, 10], 80)));
    assert_eq!(result.expect_err("refused").kind(), ErrorKind::ConnectionRefused);
    assert!(took < AT_ONCE, "{took:?}");
}
