//! Flows that the kernel forwards: who may open one, what comes back, how it ends. On crafted packets; the uplink is an
//! interface where nothing is ever sent.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    thread,
    time::{Duration, Instant},
};

use netd::kernel::{DenyEvent, EndedFlow, EndpointHandle, FlowEnd};
use netd_common::{limit, mark};
use sandgate_policy::{KernelAction, KernelTable, PortRange, PrefixEntry, Protocol, Reason};

use crate::{
    lab::{Lab, OK, PEER_MAC, REDIRECT, Seen, address6},
    packet::{ACK, Frame, GATEWAY_MAC, RST, SYN, TCP, UDP},
    packet6::{Frame6, datagram, segment},
    world::{Sandbox, events_until, platform, privileged, table},
};

const REMOTE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
const FIN: u8 = 0x01;

fn remote6() -> Ipv6Addr {
    "2001:db8::1".parse().expect("an address")
}

/// TCP and UDP 443 of the documentation ranges pass; UDP 8000 to 8999 does, but tiers in audit mode deny it.
pub(crate) fn passing() -> KernelTable {
    let range = |protocol, first, last, action| PortRange {
        protocol,
        first,
        last,
        action,
    };
    let entry = |prefix: &str| PrefixEntry {
        prefix: prefix.parse().expect("a prefix"),
        ranges: vec![
            range(Protocol::Tcp, 80, 80, KernelAction::Proxy),
            range(Protocol::Tcp, 443, 443, KernelAction::Pass),
            range(Protocol::Udp, 443, 443, KernelAction::Pass),
            range(
                Protocol::Udp,
                8000,
                8999,
                KernelAction::Audit(Reason::DeniedByRule),
            ),
        ],
    };
    KernelTable {
        entries: vec![entry("203.0.113.0/24"), entry("2001:db8::/32")],
    }
}

fn syn(sandbox: &Sandbox) -> Frame {
    Frame::tcp(sandbox.endpoint.address, sandbox.endpoint.mac, REMOTE, 443)
}

/// What comes back for a frame.
fn reply(frame: &Frame, flags: u8) -> Frame {
    Frame {
        to_mac: frame.from_mac,
        from_mac: GATEWAY_MAC,
        from: frame.to,
        to: frame.from,
        from_port: frame.to_port,
        to_port: frame.from_port,
        flags,
        ..frame.clone()
    }
}

fn left(seen: &Seen) -> bool {
    match (seen.returned, seen.mark) {
        (REDIRECT, mark::PASS) => true,
        (OK, mark::REFUSE) => false,
        _ => panic!("{seen:?}"),
    }
}

/// Ended flows, when `count` of them have ended.
fn ended(lab: &Lab, count: usize) -> Vec<EndedFlow> {
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut flows = Vec::new();
    loop {
        flows.extend(lab.datapath.ended_flows().expect("flows"));
        if flows.len() >= count {
            return flows;
        }
        assert!(Instant::now() < deadline, "{flows:?}");
        thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn without_an_uplink_connections_go_to_netd_and_datagrams_are_refused() {
    if !privileged() {
        return;
    }
    let lab = Lab::open(1, &platform());
    let mut reader = lab.datapath.take_events().expect("a reader");
    let (sandbox, handle) = &lab.sandboxes[0];
    lab.datapath.set_policy(*handle, &passing()).expect("a policy");
    let opening = syn(sandbox);
    let query = Frame::udp(opening.from, opening.from_mac, REMOTE, 443);
    let refused = [
        (&opening, Reason::UpstreamUnreachable),
        (&query, Reason::ProtocolDenied),
    ];
    for uplink in [false, true, false] {
        if uplink {
            lab.set_uplink();
        } else {
            lab.datapath.set_uplink(None).expect("no uplink");
        }
        for (frame, reason) in &refused {
            assert_eq!(left(&lab.out(*handle, &frame.bytes())), uplink);
            if !uplink {
                let events = events_until(&mut reader, |events| !events.is_empty());
                assert_eq!(events[0].reason, *reason);
            }
        }
    }
    assert_eq!(lab.datapath.counters().expect("counters").passed, 2);
}

#[test]
fn a_flow_is_opened_from_inside_and_answered_through_the_uplink_alone() {
    if !privileged() {
        return;
    }
    let lab = Lab::open(2, &platform());
    let mut reader = lab.datapath.take_events().expect("a reader");
    let uplink = lab.set_uplink();
    let [(sandbox, handle), (_, other)] = &lab.sandboxes[..] else {
        panic!("two sandboxes");
    };
    for handle in [handle, other] {
        lab.datapath.set_policy(*handle, &passing()).expect("a policy");
    }
    let opening = syn(sandbox);
    let answer = reply(&opening, SYN | ACK);
    let ack = opening.but(|frame| frame.flags = ACK);
    assert!(!left(&lab.out(*handle, &ack.bytes())), "nobody has opened it");
    let events = events_until(&mut reader, |events| !events.is_empty());
    assert_eq!(events[0].reason, Reason::ProtocolDenied);
    assert!(!lab.toward(*handle, 0, uplink, &answer.bytes()));

    let seen = lab.out(*handle, &opening.bytes());
    assert!(left(&seen));
    assert_eq!(
        (&seen.frame[..6], &seen.frame[6..12]),
        (&PEER_MAC[..], &GATEWAY_MAC[..])
    );
    assert_eq!(seen.frame[12..], opening.bytes()[12..]);
    assert!(left(&lab.out(*handle, &ack.bytes())));
    assert!(lab.toward(*handle, 0, uplink, &answer.bytes()));
    assert!(!lab.toward(*handle, 0, 0, &answer.bytes()), "made here");
    assert!(
        !lab.toward(*handle, mark::PASS, 0, &answer.bytes()),
        "a mark is not enough"
    );
    assert!(
        !lab.toward(*handle, 0, uplink + 76, &answer.bytes()),
        "another interface"
    );
    assert!(!lab.toward(*other, 0, uplink, &answer.bytes()), "another sandbox");
    for wrong in [
        reply(&opening, SYN),
        answer.but(|frame| frame.from_port = 444),
        answer.but(|frame| frame.to_port += 1),
        answer.but(|frame| frame.from = [203, 0, 113, 11].into()),
        answer.but(|frame| frame.protocol = 17),
        answer.but(|frame| frame.fragment = 0x2000),
    ] {
        assert!(!lab.toward(*handle, 0, uplink, &wrong.bytes()), "{wrong:?}");
    }
    // netd's mark opens nothing through the uplink.
    assert!(!lab.toward(
        *handle,
        mark::NETD,
        uplink,
        &reply(&opening.but(|frame| frame.to_port = 80), ACK).bytes()
    ));

    let (me, mac) = (address6(1), sandbox.endpoint.mac);
    let opening6 = Frame6::new(me, mac, remote6(), TCP, segment(40_000, 443, SYN));
    let answer6 = Frame6::new(remote6(), GATEWAY_MAC, me, TCP, segment(443, 40_000, SYN | ACK))
        .but(|frame| frame.to_mac = mac);
    assert!(!lab.toward(*handle, 0, uplink, &answer6.bytes()));
    assert!(left(&lab.out(*handle, &opening6.bytes())));
    assert!(lab.toward(*handle, 0, uplink, &answer6.bytes()));
}

#[test]
fn each_family_leaves_by_an_uplink_that_has_it() {
    if !privileged() {
        return;
    }
    let lab = Lab::open(1, &platform());
    let mut reader = lab.datapath.take_events().expect("a reader");
    let (sandbox, handle) = &lab.sandboxes[0];
    lab.datapath.set_policy(*handle, &passing()).expect("a policy");
    let (me, mac) = (address6(1), sandbox.endpoint.mac);
    let of = |protocol, payload| Frame6::new(me, mac, remote6(), protocol, payload).bytes();
    let opening = of(TCP, segment(40_000, 443, SYN));
    let query = of(UDP, datagram(40_000, 443));
    let segment4 = syn(sandbox);

    lab.set_uplink_for(false);
    assert!(left(&lab.out(*handle, &segment4.bytes())), "the other family");
    for (frame, reason) in [
        (&opening, Reason::UpstreamUnreachable),
        (&query, Reason::ProtocolDenied),
    ] {
        assert!(!left(&lab.out(*handle, frame)));
        let events = events_until(&mut reader, |events| !events.is_empty());
        assert_eq!(events[0].reason, reason);
    }
    lab.set_uplink_for(true);
    assert!(left(&lab.out(*handle, &opening)));
    assert!(left(&lab.out(*handle, &query)));
    // What is open does not leave by an uplink that has lost it, and goes on by one that has it again.
    lab.set_uplink_for(false);
    let next = of(TCP, segment(40_000, 443, ACK));
    assert!(!left(&lab.out(*handle, &query)));
    lab.set_uplink_for(true);
    assert!(left(&lab.out(*handle, &next)));
}

#[test]
fn while_no_new_flow_is_allowed_those_that_are_open_go_on() {
    if !privileged() {
        return;
    }
    let lab = Lab::open(2, &platform());
    let mut reader = lab.datapath.take_events().expect("a reader");
    let uplink = lab.set_uplink();
    let [(sandbox, handle), (neighbour, other)] = &lab.sandboxes[..] else {
        panic!("two sandboxes");
    };
    for handle in [handle, other] {
        lab.datapath.set_policy(*handle, &passing()).expect("a policy");
    }
    let open = syn(sandbox);
    assert!(left(&lab.out(*handle, &open.bytes())));

    lab.datapath.allow_new_flows(*handle, false).expect("said");
    // Other rules change nothing about it.
    lab.datapath.set_policy(*handle, &passing()).expect("a policy");
    assert!(left(
        &lab.out(*handle, &open.but(|frame| frame.flags = ACK).bytes())
    ));
    assert!(lab.toward(*handle, 0, uplink, &reply(&open, ACK).bytes()));
    let new = open.but(|frame| frame.from_port += 1);
    let query = Frame::udp(open.from, open.from_mac, REMOTE, 443);
    for refused in [&new, &query] {
        assert!(!left(&lab.out(*handle, &refused.bytes())));
        let events = events_until(&mut reader, |events| !events.is_empty());
        assert_eq!(events[0].reason, Reason::Quota);
    }
    assert!(left(&lab.out(*other, &syn(neighbour).bytes())), "another sandbox");

    lab.datapath.allow_new_flows(*handle, true).expect("said");
    assert!(left(&lab.out(*handle, &new.bytes())));
    assert!(left(&lab.out(*handle, &query.bytes())));
}

#[test]
fn a_flow_stops_with_the_rules_that_allowed_it() {
    if !privileged() {
        return;
    }
    let lab = Lab::open(1, &platform());
    let uplink = lab.set_uplink();
    let (sandbox, handle) = &lab.sandboxes[0];
    let datapath = &lab.datapath;
    let opening = syn(sandbox);
    let (ack, answer) = (opening.but(|frame| frame.flags = ACK), reply(&opening, ACK));
    let node = [IpAddr::V4(REMOTE)];
    let proxied = table(&[("203.0.113.0/24", &[(443, 443, KernelAction::Proxy)])]);
    let stops: [(&str, &dyn Fn()); 3] = [
        ("nothing allowed", &|| {
            datapath
                .set_policy(*handle, &table(&[]))
                .map(drop)
                .expect("a policy");
        }),
        ("to be read", &|| {
            datapath
                .set_policy(*handle, &proxied)
                .map(drop)
                .expect("a policy")
        }),
        ("the node's", &|| {
            datapath.set_node_addresses(&node).expect("an address")
        }),
    ];
    for (name, stop) in stops {
        for inward_first in [false, true] {
            datapath.set_policy(*handle, &passing()).expect("a policy");
            datapath.set_node_addresses(&[]).expect("no addresses");
            assert!(left(&lab.out(*handle, &opening.bytes())), "{name}");
            assert!(lab.toward(*handle, 0, uplink, &answer.bytes()), "{name}");
            // One that goes on allowing it disturbs nothing.
            let mut wider = passing();
            wider.entries.pop();
            datapath.set_policy(*handle, &wider).expect("a policy");
            assert!(lab.toward(*handle, 0, uplink, &answer.bytes()), "{name}");
            assert!(left(&lab.out(*handle, &ack.bytes())), "{name}");
            stop();
            if inward_first {
                assert!(!lab.toward(*handle, 0, uplink, &answer.bytes()), "{name}");
            }
            assert!(!left(&lab.out(*handle, &ack.bytes())), "{name}");
            assert!(!lab.toward(*handle, 0, uplink, &answer.bytes()), "{name}");
            // What was stopped does not go on when it is allowed again.
            datapath.set_policy(*handle, &passing()).expect("a policy");
            datapath.set_node_addresses(&[]).expect("no addresses");
            assert!(!lab.toward(*handle, 0, uplink, &answer.bytes()), "{name}");
            let flows = ended(&lab, 1);
            let [flow] = flows[..] else {
                panic!("{flows:?}");
            };
            assert_eq!(
                (flow.endpoint, flow.why),
                (*handle, FlowEnd::PolicyTightened),
                "{name}"
            );
            let length = opening.bytes().len() as u64;
            assert_eq!((flow.up, flow.down), (2 * length, 2 * length), "{name}");
            assert!(!left(&lab.out(*handle, &ack.bytes())), "{name}");
        }
    }
    assert_eq!(datapath.ended_flows().expect("flows"), []);
}

#[test]
fn a_flow_that_both_sides_closed_or_one_reset_is_told_once() {
    if !privileged() {
        return;
    }
    let lab = Lab::open(1, &platform());
    let uplink = lab.set_uplink();
    let (sandbox, handle) = &lab.sandboxes[0];
    lab.datapath.set_policy(*handle, &passing()).expect("a policy");
    let closed = syn(sandbox);
    let reset = closed.but(|frame| frame.from_port = 40_001);
    let open = closed.but(|frame| frame.from_port = 40_002);
    for opening in [&closed, &reset, &open] {
        assert!(left(&lab.out(*handle, &opening.bytes())));
        assert!(lab.toward(*handle, 0, uplink, &reply(opening, SYN | ACK).bytes()));
    }
    assert!(lab.toward(*handle, 0, uplink, &reply(&closed, FIN | ACK).bytes()));
    assert_eq!(lab.datapath.ended_flows().expect("flows"), []);
    assert!(left(
        &lab.out(*handle, &closed.but(|frame| frame.flags = FIN | ACK).bytes())
    ));
    assert!(lab.toward(*handle, 0, uplink, &reply(&reset, RST).bytes()));
    // One of the sandbox's own may be none of the connection's.
    assert!(left(
        &lab.out(*handle, &open.but(|frame| frame.flags = RST).bytes())
    ));
    // The last acknowledgement still gets through.
    assert!(lab.toward(*handle, 0, uplink, &reply(&closed, ACK).bytes()));
    let mut flows = ended(&lab, 2);
    flows.sort_by_key(|flow| flow.src.port());
    let ports: Vec<_> = flows.iter().map(|flow| (flow.src.port(), flow.why)).collect();
    assert_eq!(ports, [(40_000, FlowEnd::Closed), (40_001, FlowEnd::Reset)]);
    let length = closed.bytes().len() as u64;
    assert_eq!((flows[0].up, flows[0].down), (2 * length, 3 * length));
    assert_eq!(flows[0].src, (closed.from, 40_000).into());
    assert_eq!(flows[0].dst, (REMOTE, 443).into());
    assert_eq!(flows[0].protocol, Protocol::Tcp);
    assert!(!lab.toward(*handle, 0, uplink, &reply(&closed, ACK).bytes()));
    assert!(lab.toward(*handle, 0, uplink, &reply(&open, ACK).bytes()));
    // Its ports may be used again.
    assert!(left(&lab.out(*handle, &closed.bytes())));
}

#[test]
fn an_audited_flow_passes_and_is_told_once_however_many_there_are() {
    if !privileged() {
        return;
    }
    const FLOWS: u16 = 500;
    let lab = Lab::open(1, &platform());
    lab.set_uplink();
    let mut reader = lab.datapath.take_events().expect("a reader");
    let (sandbox, handle) = &lab.sandboxes[0];
    lab.datapath.set_policy(*handle, &passing()).expect("a policy");
    let query = Frame::udp(sandbox.endpoint.address, sandbox.endpoint.mac, REMOTE, 8000);
    for port in 0..FLOWS {
        let query = query.but(|frame| frame.to_port = 8000 + port);
        for _ in 0..2 {
            assert!(left(&lab.out(*handle, &query.bytes())));
        }
        let denied = query.but(|frame| frame.to_port = 7000);
        assert!(!left(&lab.out(*handle, &denied.bytes())));
    }
    let sum = |events: &[DenyEvent], audit| -> u64 {
        let some = events.iter().filter(|event| event.audit == audit);
        some.map(|event| event.repeated).sum()
    };
    let all = u64::from(FLOWS);
    let events = events_until(&mut reader, |events| {
        sum(events, true) >= all && sum(events, false) >= all
    });
    assert_eq!((sum(&events, true), sum(&events, false)), (all, all));
    let reasons: BTreeSet<_> = events
        .iter()
        .map(|event| (event.audit, event.reason.as_str()))
        .collect();
    assert_eq!(
        reasons,
        BTreeSet::from([(true, "denied_by_rule"), (false, "protocol_denied")])
    );
}

#[test]
fn flows_are_not_inherited_with_an_address_and_survive_netd() {
    if !privileged() {
        return;
    }
    let lab = Lab::open(1, &platform());
    let uplink = lab.set_uplink();
    let (sandbox, old) = (&lab.sandboxes[0].0, lab.sandboxes[0].1);
    lab.datapath.set_policy(old, &passing()).expect("a policy");
    let opening = syn(sandbox);
    let answer = reply(&opening, ACK).bytes();
    assert!(left(&lab.out(old, &opening.bytes())));

    let lab = lab.restart(&platform());
    assert!(lab.toward(old, 0, uplink, &answer));
    assert_eq!(lab.datapath.ended_flows().expect("flows"), []);

    // The same interface, MAC and IPv4 address, but another endpoint.
    let mut endpoint = lab.sandboxes[0].0.endpoint.clone();
    endpoint.address6 = Some(address6(7));
    let new = lab.datapath.attach(&endpoint).expect("attached anew");
    assert_ne!(new.ordinal, old.ordinal);
    lab.datapath.set_policy(new, &passing()).expect("a policy");
    assert!(!lab.toward(new, 0, uplink, &answer));
    assert!(!left(
        &lab.out(new, &opening.but(|frame| frame.flags = ACK).bytes())
    ));
    let flows = ended(&lab, 1);
    assert_eq!(
        (flows.len(), flows[0].endpoint, flows[0].why),
        (1, old, FlowEnd::EndpointGone)
    );
    assert_eq!(flows[0].src, (opening.from, opening.from_port).into());
    assert!(flows[0].up > 0 && flows[0].down > 0);
    assert!(left(&lab.out(new, &opening.bytes())));
    lab.datapath.detach(new).expect("detached");
    assert_eq!(ended(&lab, 1)[0].endpoint, new);
}

/// Opens flows until there is no room for one more; the rate of new ones is waited for.
fn open_all(lab: &Lab, handle: EndpointHandle, sandbox: &Sandbox) -> u64 {
    for port in 1..=u16::MAX {
        let opening = syn(sandbox).but(|frame| frame.from_port = port);
        if !left(&lab.out(handle, &opening.bytes())) {
            thread::sleep(Duration::from_nanos(limit::WINDOW_NS) * 2);
            if !left(&lab.out(handle, &opening.bytes())) {
                return u64::from(port) - 1;
            }
        }
    }
    panic!("there is no end to them");
}

#[test]
fn a_scan_by_one_sandbox_takes_no_flow_from_another() {
    if !privileged() {
        return;
    }
    let lab = Lab::open(2, &platform());
    let mut reader = lab.datapath.take_events().expect("a reader");
    let uplink = lab.set_uplink();
    let [(scanner, scanning), (sandbox, handle)] = &lab.sandboxes[..] else {
        panic!("two sandboxes");
    };
    for handle in [scanning, handle] {
        lab.datapath.set_policy(*handle, &passing()).expect("a policy");
    }
    let before = syn(sandbox);
    assert!(left(&lab.out(*handle, &before.bytes())));
    assert_eq!(open_all(&lab, *scanning, scanner), limit::FLOWS_PER_ENDPOINT);
    let events = events_until(&mut reader, |events| !events.is_empty());
    assert!(
        events.iter().all(|event| event.reason == Reason::Quota),
        "{events:?}"
    );
    // The first of the scanner's own still stands, too.
    let first = syn(scanner).but(|frame| frame.from_port = 1);
    assert!(lab.toward(*scanning, 0, uplink, &reply(&first, ACK).bytes()));
    assert!(lab.toward(*handle, 0, uplink, &reply(&before, ACK).bytes()));
    assert!(left(
        &lab.out(*handle, &before.but(|frame| frame.from_port = 50_000).bytes())
    ));
    // Exactly as many as end make room.
    let reset = |port: u16| {
        let opening = syn(scanner).but(|frame| frame.from_port = port);
        assert!(lab.toward(*scanning, 0, uplink, &reply(&opening, RST).bytes()));
    };
    reset(1);
    reset(2);
    assert_eq!(ended(&lab, 2).len(), 2);
    let again = |port: u16| {
        let opening = syn(scanner).but(|frame| frame.from_port = port);
        left(&lab.out(*scanning, &opening.bytes()))
    };
    assert_eq!([again(1), again(50_001), again(50_002)], [true, true, false]);
}
