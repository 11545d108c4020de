//! `from_sandbox` on crafted packets, by `BPF_PROG_TEST_RUN`: one row per rule. No listener is open here, so an allowed
//! packet shows as a refusal with `upstream_unreachable`, counted as such.

use aya::TestRunOptions;
use netd::kernel::Datapath;
use netd_common::mark;
use sandgate_policy::Reason;

use crate::{
    cases,
    packet::{ACK, Frame, SYN},
    world::{Sandbox, World, events_until, privileged},
};

/// Offsets in `struct __sk_buff` (linux/bpf.h).
const MARK: usize = 8;
const IFINDEX: usize = 40;
const CONTEXT: usize = 192;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    /// TCX_DROP.
    Dropped,
    /// TCX_PASS with the refuse mark.
    Refused,
    /// TCX_NEXT with this mark.
    Passed(u32),
    Other(u32, u32),
}

/// Runs a program on a frame that came in through an interface.
fn run(datapath: &Datapath, program: &'static str, ifindex: u32, set_mark: u32, frame: &[u8]) -> (u32, u32) {
    let mut context = [0_u8; CONTEXT];
    context[IFINDEX..IFINDEX + 4].copy_from_slice(&ifindex.to_ne_bytes());
    context[MARK..MARK + 4].copy_from_slice(&set_mark.to_ne_bytes());
    let mut after = [0_u8; CONTEXT];
    let options = TestRunOptions {
        data_in: Some(frame),
        ctx_in: Some(&context),
        ctx_out: Some(&mut after),
        ..TestRunOptions::default()
    };
    let returned = datapath
        .test_run(program, options)
        .unwrap_or_else(|error| panic!("{error}: {frame:x?}"))
        .return_value;
    let marked = u32::from_ne_bytes(after[MARK..MARK + 4].try_into().expect("four bytes"));
    (returned, marked)
}

pub(crate) fn delivered(datapath: &Datapath, ifindex: u32, set_mark: u32, frame: &Frame) -> bool {
    delivered_bytes(datapath, ifindex, set_mark, &frame.bytes())
}

pub(crate) fn delivered_bytes(datapath: &Datapath, ifindex: u32, set_mark: u32, frame: &[u8]) -> bool {
    match run(datapath, "to_sandbox", ifindex, set_mark, frame).0 {
        u32::MAX => true,
        2 => false,
        other => panic!("to_sandbox returned {other}"),
    }
}

fn fate(datapath: &Datapath, ifindex: u32, frame: &[u8]) -> Fate {
    match run(datapath, "from_sandbox", ifindex, 0, frame) {
        (2, _) => Fate::Dropped,
        (0, mark::REFUSE) => Fate::Refused,
        (u32::MAX, marked) => Fate::Passed(marked),
        (returned, marked) => Fate::Other(returned, marked),
    }
}

#[test]
fn every_packet_meets_its_fate() {
    if !privileged() {
        return;
    }
    let world = World::with_sandboxes(1);
    let (sandbox, handle) = world.first();
    let datapath = &world.datapath;
    datapath.set_policy(handle, &cases::policy()).expect("a policy");
    datapath.bind_address(handle, cases::BOUND.into()).expect("bound");
    datapath
        .set_node_addresses(&[cases::NODE.into()])
        .expect("node addresses");

    let mut reader = datapath.take_events().expect("a reader");
    for group in cases::all(sandbox.address(), sandbox.endpoint.mac) {
        for (name, frame) in group.frames {
            assert_eq!(
                fate(datapath, handle.ifindex, &frame.bytes()),
                group.fate,
                "{name}: {frame:?}"
            );
            let events = events_until(&mut reader, |events| !events.is_empty());
            let [event] = events[..] else {
                panic!("{name}: {events:?}");
            };
            assert_eq!(event.reason, group.reason, "{name}");
            assert_eq!((event.ordinal, event.repeated), (handle.ordinal, 1), "{name}");
        }
    }

    // A good packet through an interface that nobody announced.
    let good = cases::allowed(sandbox.address(), sandbox.endpoint.mac);
    let stranger = Sandbox::create(datapath.router(), 9);
    assert_eq!(
        fate(datapath, stranger.endpoint.ifindex, &good.bytes()),
        Fate::Dropped
    );
    let events = events_until(&mut reader, |events| !events.is_empty());
    assert_eq!((events[0].reason, events[0].ordinal), (Reason::UnknownSandbox, 0));
    assert_eq!(events[0].ifindex, stranger.endpoint.ifindex);
}

#[test]
fn an_event_says_what_was_tried() {
    if !privileged() {
        return;
    }
    let world = World::with_sandboxes(1);
    let (sandbox, handle) = world.first();
    let mut reader = world.datapath.take_events().expect("a reader");
    let frame = Frame {
        from_port: 12_345,
        ..Frame::tcp(
            sandbox.address(),
            sandbox.endpoint.mac,
            [203, 0, 113, 66].into(),
            8080,
        )
    };
    // Attached, but without a policy yet: denied.
    assert_eq!(
        fate(&world.datapath, handle.ifindex, &frame.bytes()),
        Fate::Refused
    );
    let events = events_until(&mut reader, |events| !events.is_empty());
    let event = events[0];
    assert_eq!(event.reason, Reason::DefaultDeny);
    assert_eq!(event.src, "10.213.0.1:12345".parse().expect("an address"));
    assert_eq!(event.dst, "203.0.113.66:8080".parse().expect("an address"));
    assert_eq!(
        (event.protocol, event.ethertype, event.ifindex),
        (6, 0x0800, handle.ifindex)
    );
}

#[test]
fn a_connection_that_netd_opened_is_known_by_its_exact_four_tuple() {
    if !privileged() {
        return;
    }
    let world = World::with_sandboxes(2);
    let (sandbox, handle) = world.first();
    let datapath = &world.datapath;
    let local = "169.254.1.1:50000".parse().expect("an address");
    datapath.admit_inbound(handle, 7000, local, 1).expect("admitted");
    let reply = Frame {
        from_port: 7000,
        flags: SYN | ACK,
        ..Frame::tcp(
            sandbox.address(),
            sandbox.endpoint.mac,
            [169, 254, 1, 1].into(),
            50_000,
        )
    };
    let seen = |frame: &Frame| fate(datapath, handle.ifindex, &frame.bytes());
    assert_eq!(seen(&reply), Fate::Passed(mark::INBOUND));
    assert_eq!(
        seen(&Frame {
            flags: SYN,
            ..reply.clone()
        }),
        Fate::Refused,
        "the sandbox may not open one itself"
    );
    assert_eq!(
        seen(&Frame {
            from_port: 7001,
            ..reply.clone()
        }),
        Fate::Refused
    );
    assert_eq!(
        seen(&Frame {
            to_port: 50_001,
            ..reply.clone()
        }),
        Fate::Refused
    );
    assert_eq!(
        seen(&Frame {
            to: [169, 254, 1, 2].into(),
            ..reply.clone()
        }),
        Fate::Refused
    );
    let (other, other_handle) = &world.sandboxes[1];
    let stolen = Frame {
        from: other.address(),
        from_mac: other.endpoint.mac,
        ..reply.clone()
    };
    assert_eq!(
        fate(datapath, other_handle.ifindex, &stolen.bytes()),
        Fate::Refused,
        "another sandbox's entry"
    );
    datapath.revoke_inbound(handle, 7000, local).expect("revoked");
    assert_eq!(seen(&reply), Fate::Refused);
}

#[test]
fn a_flood_is_counted_to_the_last_packet_and_kept_within_its_endpoint() {
    if !privileged() {
        return;
    }
    const FLOOD: u32 = 5000;
    let world = World::with_sandboxes(2);
    let (sandbox, handle) = world.first();
    let datapath = &world.datapath;
    let frame = Frame::tcp(
        sandbox.address(),
        sandbox.endpoint.mac,
        [203, 0, 113, 66].into(),
        22,
    );
    for _ in 0..FLOOD {
        assert_eq!(fate(datapath, handle.ifindex, &frame.bytes()), Fate::Refused);
    }
    let (other, other_handle) = &world.sandboxes[1];
    let quiet = Frame::tcp(other.address(), other.endpoint.mac, [203, 0, 113, 67].into(), 23);
    assert_eq!(
        fate(datapath, other_handle.ifindex, &quiet.bytes()),
        Fate::Refused
    );

    let total = |events: &[netd::kernel::DenyEvent], of: u32| -> u64 {
        events
            .iter()
            .filter(|event| event.ordinal == of)
            .map(|event| event.repeated)
            .sum()
    };
    let mut reader = datapath.take_events().expect("a reader");
    let events = events_until(&mut reader, |events| {
        total(events, handle.ordinal) >= u64::from(FLOOD)
    });
    assert_eq!(total(&events, handle.ordinal), u64::from(FLOOD));
    assert_eq!(total(&events, other_handle.ordinal), 1);
    let aggregate = events
        .iter()
        .find(|event| event.repeated > 1)
        .expect("most were suppressed");
    assert_eq!(aggregate.dst, "203.0.113.66:22".parse().expect("an address"));
    assert_eq!(aggregate.reason, Reason::DefaultDeny);
    assert!(datapath.counters().expect("counters").suppressed > u64::from(FLOOD) / 2);

    // What is suppressed and not yet reported when an endpoint goes is reported all the same.
    for _ in 0..FLOOD {
        assert_eq!(fate(datapath, handle.ifindex, &frame.bytes()), Fate::Refused);
    }
    datapath.detach(handle).expect("detached");
    let events = events_until(&mut reader, |events| {
        total(events, handle.ordinal) >= u64::from(FLOOD)
    });
    assert_eq!(total(&events, handle.ordinal), u64::from(FLOOD));
}

/// The test run refuses such frames itself, so these are really sent.
#[test]
fn a_frame_too_short_for_a_header_is_dropped() {
    use nix::sys::socket::{LinkAddr, MsgFlags, SockaddrLike as _, SockaddrStorage, sendto};
    use socket2::{Domain, Socket, Type};
    use std::os::fd::AsRawFd as _;

    if !privileged() {
        return;
    }
    let world = World::with_sandboxes(1);
    let (sandbox, handle) = world.first();
    let whole = Frame::tcp(
        sandbox.address(),
        sandbox.endpoint.mac,
        [203, 0, 113, 10].into(),
        80,
    )
    .bytes();
    let mut reader = world.datapath.take_events().expect("a reader");
    for length in [14, 15, 20, 33, 34, 37, 47] {
        sandbox.run(|| {
            let socket = Socket::new(Domain::PACKET, Type::RAW, None).expect("a packet socket");
            let eth0: LinkAddr = nix::ifaddrs::getifaddrs()
                .expect("interfaces")
                .filter(|interface| interface.interface_name == "eth0")
                .find_map(|interface| {
                    interface
                        .address
                        .as_ref()
                        .and_then(SockaddrStorage::as_link_addr)
                        .copied()
                })
                .expect("eth0");
            assert!(eth0.len() > 0);
            sendto(socket.as_raw_fd(), &whole[..length], &eth0, MsgFlags::empty()).expect("sent");
        });
        let events = events_until(&mut reader, |events| !events.is_empty());
        assert_eq!(events[0].reason, Reason::Malformed, "{length}: {events:?}");
        assert_eq!(events[0].ordinal, handle.ordinal);
    }
    assert_eq!(world.datapath.counters().expect("counters").dropped, 7);
}
