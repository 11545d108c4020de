//! IPv6 on crafted packets: what is judged as IPv4 is, what is dropped for what it is, and under which addresses a
//! destination is judged. No listener is open, so an allowed packet shows as a refusal with `upstream_unreachable`.

use std::net::{IpAddr, Ipv6Addr};

use netd::kernel::{EndpointHandle, EventReader};
use netd_common::mark;
use sandgate_policy::{KernelAction, Reason};

use crate::{
    lab::{Lab, OK, SHOT, Seen, address6},
    packet::{ACK, GATEWAY_MAC, RST, SYN, TCP, UDP},
    packet6::{Frame6, GATEWAY6, ICMP6, datagram, neighbour, segment},
    world::{events_until, platform, privileged, table},
};

const NODE: &str = "2001:db8::9";

/// What becomes of a frame: refused (or dropped) with this reason.
fn reason(lab: &Lab, reader: &mut EventReader, handle: EndpointHandle, frame: &[u8]) -> (bool, Reason) {
    let seen = lab.out(handle, frame);
    let refused = match seen {
        Seen {
            returned: OK,
            mark: mark::REFUSE,
            ..
        } => true,
        Seen { returned: SHOT, .. } => false,
        other => panic!("{other:?}"),
    };
    let events = events_until(reader, |events| !events.is_empty());
    assert_eq!(
        (events.len(), events[0].ordinal),
        (1, handle.ordinal),
        "{events:?}"
    );
    (refused, events[0].reason)
}

#[test]
fn every_ipv6_packet_meets_its_fate() {
    if !privileged() {
        return;
    }
    let lab = Lab::open(1, &platform());
    let mut reader = lab.datapath.take_events().expect("a reader");
    let (sandbox, handle) = &lab.sandboxes[0];
    let everything = |action| [(0, u16::MAX, action)];
    let policy = table(&[
        ("0.0.0.0/0", &[(80, 80, KernelAction::Proxy)]),
        ("::/0", &[(443, 443, KernelAction::ProxyBound)]),
        ("2001:db8::/32", &[(80, 80, KernelAction::Proxy)]),
        (
            "2001:db8::66/128",
            &everything(KernelAction::Deny(Reason::DeniedByRule)),
        ),
        ("2001::/16", &everything(KernelAction::Proxy)),
        ("2002::/16", &everything(KernelAction::Proxy)),
        ("64:ff9b::/32", &everything(KernelAction::Proxy)),
        ("::/8", &everything(KernelAction::Proxy)),
        ("fc00::/6", &everything(KernelAction::Proxy)),
    ]);
    lab.datapath.set_policy(*handle, &policy).expect("a policy");
    let node: IpAddr = NODE.parse().expect("an address");
    let node4 = IpAddr::from([203, 0, 113, 200]);
    lab.datapath
        .set_node_addresses(&[node, node4])
        .expect("node addresses");
    let pinned: Ipv6Addr = "2001:db8:5::5".parse().expect("an address");
    lab.datapath.bind_address(*handle, pinned.into()).expect("bound");
    let (me, mac) = (address6(1), sandbox.endpoint.mac);
    let to = |to: &str, next: u8, payload: Vec<u8>| {
        Frame6::new(me, mac, to.parse().expect("an address"), next, payload)
    };
    let tcp = |address: &str, port| to(address, TCP, segment(40_000, port, SYN));
    let udp = |address: &str, port| to(address, UDP, datagram(40_000, port));
    let ok = tcp("2001:db8::1", 80);

    let refused = [
        ("proxy", ok.clone(), Reason::UpstreamUnreachable),
        (
            "not a SYN",
            ok.but(|frame| frame.payload = segment(40_000, 80, ACK)),
            Reason::UpstreamUnreachable,
        ),
        ("bound", tcp("2001:db8:5::5", 443), Reason::DefaultDeny),
        ("DNS", udp("2001:db8::53", 53), Reason::UpstreamUnreachable),
        (
            "DNS over TCP",
            tcp("2001:db8::53", 53),
            Reason::UpstreamUnreachable,
        ),
        (
            "DNS to the gateway",
            udp("fe80::5347:1", 53),
            Reason::PlatformDenied,
        ),
        ("self-test host", tcp("fe80::5347:1", 443), Reason::PlatformDenied),
        ("beside it", tcp("fe80::5347:2", 443), Reason::PlatformDenied),
        ("gateway", tcp("fe80::5347:1", 80), Reason::PlatformDenied),
        ("port of no range", tcp("2001:db8::1", 81), Reason::DefaultDeny),
        ("longer prefix", tcp("2001:db8::66", 80), Reason::DeniedByRule),
        ("unbound", tcp("3fff::1", 443), Reason::AddressNotBound),
        ("UDP", udp("2001:db8::1", 80), Reason::ProtocolDenied),
        ("QUIC", udp("2001:db8::1", 443), Reason::ProtocolDenied),
        ("unique local", tcp("fd12::1", 80), Reason::PlatformDenied),
        ("metadata", tcp("fd00:ec2::254", 80), Reason::PlatformDenied),
        ("another sandbox", tcp("fd53:4700::2", 80), Reason::PlatformDenied),
        ("itself", tcp("fd53:4700::1", 80), Reason::PlatformDenied),
        ("loopback", tcp("::1", 80), Reason::PlatformDenied),
        ("no address", tcp("::", 80), Reason::PlatformDenied),
        ("the node", tcp(NODE, 80), Reason::PlatformDenied),
        ("all nodes", udp("ff02::1", 5353), Reason::PlatformDenied),
        (
            "compatible, private",
            tcp("::10.1.2.3", 80),
            Reason::PlatformDenied,
        ),
        (
            "compatible, public",
            tcp("::203.0.113.7", 80),
            Reason::UpstreamUnreachable,
        ),
        (
            "translated, private",
            tcp("::ffff:0:10.1.2.3", 80),
            Reason::PlatformDenied,
        ),
        (
            "translated, exception",
            tcp("::ffff:0:10.0.0.5", 443),
            Reason::UpstreamUnreachable,
        ),
        (
            "NAT64, metadata",
            tcp("64:ff9b::169.254.169.254", 80),
            Reason::PlatformDenied,
        ),
        (
            "NAT64, public",
            tcp("64:ff9b::203.0.113.7", 80),
            Reason::UpstreamUnreachable,
        ),
        (
            "NAT64, the node",
            tcp("64:ff9b::203.0.113.200", 80),
            Reason::PlatformDenied,
        ),
        (
            "NAT64 of a local prefix",
            tcp("64:ff9b:1::1", 80),
            Reason::PlatformDenied,
        ),
        (
            "6to4, private",
            tcp("2002:a01:203::1", 80),
            Reason::PlatformDenied,
        ),
        (
            "6to4, a sandbox",
            tcp("2002:ad5:1::1", 80),
            Reason::PlatformDenied,
        ),
        (
            "6to4, public",
            tcp("2002:cb00:7107::1", 80),
            Reason::UpstreamUnreachable,
        ),
        (
            "Teredo, private server",
            tcp("2001:0:a01:203::34ff:8ef8", 80),
            Reason::PlatformDenied,
        ),
        (
            "Teredo, private client",
            tcp("2001:0:cb00:7107::f5fe:fdfc", 80),
            Reason::PlatformDenied,
        ),
        (
            "Teredo, public",
            tcp("2001:0:cb00:7107::34ff:8ef8", 80),
            Reason::UpstreamUnreachable,
        ),
    ];
    for (name, frame, expected) in refused {
        assert_eq!(
            reason(&lab, &mut reader, *handle, &frame.bytes()),
            (true, expected),
            "{name}"
        );
    }
    let mut late = neighbour(134, GATEWAY6, 1, mac);
    late.truncate(16);
    let dropped = [
        (
            "mapped destination",
            tcp("::ffff:203.0.113.7", 80),
            Reason::Malformed,
        ),
        (
            "fragment",
            ok.but(|frame| frame.next_header = 44),
            Reason::Fragment,
        ),
        (
            "hop by hop",
            ok.but(|frame| frame.next_header = 0),
            Reason::ProtocolDenied,
        ),
        (
            "routing header",
            ok.but(|frame| frame.next_header = 43),
            Reason::ProtocolDenied,
        ),
        (
            "options",
            ok.but(|frame| frame.next_header = 60),
            Reason::ProtocolDenied,
        ),
        (
            "authentication",
            ok.but(|frame| frame.next_header = 51),
            Reason::ProtocolDenied,
        ),
        (
            "nothing follows",
            ok.but(|frame| frame.next_header = 59),
            Reason::ProtocolDenied,
        ),
        (
            "IPv4 inside",
            ok.but(|frame| frame.next_header = 4),
            Reason::ProtocolDenied,
        ),
        (
            "SCTP",
            ok.but(|frame| frame.next_header = 132),
            Reason::ProtocolDenied,
        ),
        ("version", ok.but(|frame| frame.version = 0x40), Reason::Malformed),
        (
            "length beyond the frame",
            ok.but(|frame| frame.payload_length = Some(21)),
            Reason::Malformed,
        ),
        (
            "length within TCP",
            ok.but(|frame| frame.payload_length = Some(19)),
            Reason::Malformed,
        ),
        (
            "no length",
            ok.but(|frame| frame.payload_length = Some(0)),
            Reason::Malformed,
        ),
        (
            "cut within TCP",
            ok.but(|frame| frame.payload.truncate(12)),
            Reason::Malformed,
        ),
        (
            "another's address",
            ok.but(|frame| frame.from = address6(2)),
            Reason::SpoofedSource,
        ),
        (
            "link-local source",
            ok.but(|frame| frame.from = "fe80::1".parse().expect("an address")),
            Reason::SpoofedSource,
        ),
        (
            "no source",
            ok.but(|frame| frame.from = Ipv6Addr::UNSPECIFIED),
            Reason::SpoofedSource,
        ),
        (
            "gateway's source",
            ok.but(|frame| frame.from = GATEWAY6),
            Reason::SpoofedSource,
        ),
        (
            "other MAC",
            ok.but(|frame| frame.from_mac[5] = 99),
            Reason::SpoofedSource,
        ),
        (
            "frame to all",
            ok.but(|frame| frame.to_mac = [0xff; 6]),
            Reason::ProtocolDenied,
        ),
        (
            "router advertisement",
            to("ff02::1", ICMP6, late).but(|frame| frame.hops = 255),
            Reason::ProtocolDenied,
        ),
        (
            "echo",
            to("2001:db8::1", ICMP6, vec![128, 0, 0, 0, 0, 1, 0, 1]),
            Reason::ProtocolDenied,
        ),
        (
            "listener report",
            to("ff02::16", ICMP6, vec![143; 28]),
            Reason::ProtocolDenied,
        ),
    ];
    for (name, frame, expected) in dropped {
        assert_eq!(
            reason(&lab, &mut reader, *handle, &frame.bytes()),
            (false, expected),
            "{name}"
        );
    }
}

#[test]
fn an_endpoint_without_an_ipv6_address_sends_none_and_gets_none() {
    if !privileged() {
        return;
    }
    let lab = Lab::open(1, &platform());
    let mut reader = lab.datapath.take_events().expect("a reader");
    let (sandbox, with) = &lab.sandboxes[0];
    let mac = sandbox.endpoint.mac;
    let open = table(&[
        ("0.0.0.0/0", &[]),
        ("::/0", &[(0, u16::MAX, KernelAction::Proxy)]),
    ]);
    lab.datapath.set_policy(*with, &open).expect("a policy");
    let remote: Ipv6Addr = "2001:db8::1".parse().expect("an address");
    let out = Frame6::new(address6(1), mac, remote, TCP, segment(40_000, 80, SYN)).bytes();
    let answer = Frame6::new(
        remote,
        GATEWAY_MAC,
        address6(1),
        TCP,
        segment(80, 40_000, SYN | ACK),
    )
    .but(|frame| frame.to_mac = mac);
    let reset = answer.but(|frame| frame.payload = segment(80, 40_000, RST | ACK));
    assert_eq!(
        reason(&lab, &mut reader, *with, &out),
        (true, Reason::UpstreamUnreachable)
    );
    assert!(lab.toward(*with, mark::NETD, 0, &answer.bytes()));
    assert!(lab.toward(*with, mark::REFUSE, 0, &reset.bytes()));
    assert!(!lab.toward(*with, 0, 0, &answer.bytes()));

    let mut without = sandbox.endpoint.clone();
    without.address6 = None;
    let without = lab.datapath.attach(&without).expect("attached anew");
    assert_ne!(without.ordinal, with.ordinal, "nothing is inherited");
    lab.datapath.set_policy(without, &open).expect("a policy");
    assert_eq!(
        reason(&lab, &mut reader, without, &out),
        (false, Reason::ProtocolDenied)
    );
    let unaddressed = Frame6::new(Ipv6Addr::UNSPECIFIED, mac, remote, TCP, segment(40_000, 80, SYN));
    assert!(!reason(&lab, &mut reader, without, &unaddressed.bytes()).0);
    assert!(!lab.toward(without, mark::NETD, 0, &answer.bytes()));
    let nobody = answer.but(|frame| frame.to = Ipv6Addr::UNSPECIFIED);
    assert!(!lab.toward(without, mark::NETD, 0, &nobody.bytes()));
}

#[test]
fn what_is_said_of_ipv6_says_nothing_of_ipv4() {
    if !privileged() {
        return;
    }
    let lab = Lab::open(1, &platform());
    let mut reader = lab.datapath.take_events().expect("a reader");
    let (sandbox, handle) = &lab.sandboxes[0];
    let ipv6_only = table(&[
        ("::/0", &[(0, u16::MAX, KernelAction::Proxy)]),
        ("::ffff:0:0/96", &[(0, u16::MAX, KernelAction::Proxy)]),
    ]);
    lab.datapath.set_policy(*handle, &ipv6_only).expect("a policy");
    let frame = crate::packet::Frame::tcp(
        sandbox.endpoint.address,
        sandbox.endpoint.mac,
        [203, 0, 113, 10].into(),
        80,
    );
    assert_eq!(
        reason(&lab, &mut reader, *handle, &frame.bytes()),
        (true, Reason::DefaultDeny)
    );
}
