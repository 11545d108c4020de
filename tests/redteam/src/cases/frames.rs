//! Frames and packets that the sandbox's own kernel would never send: whoever has raw sockets in its network namespace
//! can. The twin is one that it would send, sent in the same way.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Instant;

use super::{DATAGRAMS, at};
use crate::{
    attempt::{Attempts, End, Outcome, Wanted},
    case::{Case, Trace},
    wire::packet::{Packet, TCP, UDP, Wire, checksum, default_gateway},
};

/// Errors of ICMP that may leave, to the other end of an allowed conversation: more would not be needed.
const OWED: usize = 2;

pub(super) const CASES: &[Case] = &[
    Case::new(
        "F01",
        [
            "packets in somebody else's name: the machine's, the neighbour's, the gateway's, the receiver's own",
            "thrown away: the source must be the address that the sandbox was given",
            "an honest packet, sent in the same way",
        ],
        |attempts| {
            let world = attempts.world;
            let mut sources: Vec<IpAddr> = vec![
                world.open,
                world.evil.address,
                world.ok.address,
                Ipv4Addr::UNSPECIFIED.into(),
                Ipv4Addr::LOCALHOST.into(),
                Ipv4Addr::BROADCAST.into(),
                Ipv4Addr::new(224, 0, 0, 1).into(),
            ];
            sources.extend([world.node, world.neighbour].iter().flatten().map(std::net::SocketAddr::ip));
            sources.extend(default_gateway().map(IpAddr::from));
            with_wire(attempts, |attempts, wire| {
                for source in sources.iter().filter(|source| **source != IpAddr::from(wire.address)) {
                    let honest = datagram(attempts, wire);
                    let packet = Packet { source: *source, ..honest };
                    sent(attempts, format!("a datagram from {source}"), wire.send(&packet));
                    let segment = Packet { protocol: TCP, port: 443, ..packet };
                    sent(attempts, format!("a segment from {source}"), wire.send(&segment));
                }
            });
        },
        honest,
    )
    .forbids(|world| vec![Trace::To(world.open)])
    .raw(),
    Case::new(
        "F02",
        [
            "fragments and options of IP, behind which a filter may not find the port",
            "thrown away",
            "a whole packet without options, sent in the same way",
        ],
        |attempts| {
            with_wire(attempts, |attempts, wire| {
                let packet = datagram(attempts, wire);
                for (what, fragment) in [
                    ("the first of several fragments", 0x2000),
                    ("a middle fragment", 0x2010),
                    ("the last fragment", 0x0010),
                    ("a fragment that would overwrite the ports", 0x0001),
                ] {
                    let packet = Packet { fragment, ..packet.clone() };
                    sent(attempts, what, wire.send(&packet));
                }
                let IpAddr::V4(evil) = attempts.world.evil.address else { return };
                let [a, b, c, d] = evil.octets();
                for (what, options) in [
                    ("a loose source route by the attacker's host", vec![131, 7, 4, a, b, c, d, 0]),
                    ("a strict source route by the attacker's host", vec![137, 7, 4, a, b, c, d, 0]),
                    ("a record of the route", vec![7, 7, 4, 0, 0, 0, 0, 0]),
                    ("a router alert", vec![148, 4, 0, 0]),
                ] {
                    let packet = Packet { options, ..packet.clone() };
                    sent(attempts, what, wire.send(&packet));
                }
            });
        },
        honest,
    )
    .forbids(|world| vec![Trace::To(world.open)])
    .raw(),
    Case::new(
        "F03",
        [
            "tags between Ethernet and IP, and no IP at all",
            "thrown away",
            "an untagged packet, sent in the same way",
        ],
        |attempts| {
            with_wire(attempts, |attempts, wire| {
                let packet = datagram(attempts, wire);
                for (what, tags) in [
                    ("a VLAN tag", &[0x81, 0, 0, 1][..]),
                    ("a tag of VLAN 0", &[0x81, 0, 0, 0]),
                    ("two VLAN tags", &[0x88, 0xa8, 0, 1, 0x81, 0, 0, 1]),
                ] {
                    sent(attempts, what, wire.send_tagged(tags, &packet));
                }
                // Claims of another's address, and types that nobody needs.
                let gateway = default_gateway().unwrap_or(Ipv4Addr::UNSPECIFIED).octets();
                let claim = [&[0, 1, 8, 0, 6, 4, 0, 2][..], &wire.own(), &gateway, &[0xff; 6], &gateway].concat();
                sent(attempts, "a claim to be the gateway (ARP)", wire.send_frame(&[], 0x0806, &claim));
                let token = attempts.token.clone();
                for (what, kind) in [("MPLS", 0x8847), ("PPPoE", 0x8864), ("an unknown type", 0x88b5)] {
                    sent(attempts, what, wire.send_frame(&[], kind, token.as_bytes()));
                }
            });
        },
        honest,
    )
    .forbids(|world| vec![Trace::To(world.open)])
    .raw(),
    Case::new(
        "F04",
        [
            "tunnels and other protocols directly on IP",
            "thrown away",
            "a datagram, sent in the same way",
        ],
        |attempts| {
            with_wire(attempts, |attempts, wire| {
                for to in [attempts.world.open, attempts.world.evil.address] {
                    for protocol in [2, 4, 41, 47, 50, 51, 89, 103, 132, 136, 253] {
                        let packet = Packet { to, protocol, ..datagram(attempts, wire) };
                        sent(attempts, format!("protocol {protocol} to {to}"), wire.send(&packet));
                    }
                    // An echo request, and a redirect of the node's own routes.
                    for (what, head) in [("an echo request", [8, 0]), ("a redirect", [5, 1])] {
                        let mut data = vec![head[0], head[1], 0, 0, 0, 7, 0, 1];
                        data.extend(attempts.token.as_bytes());
                        let packet = Packet { to, protocol: 1, data, ..datagram(attempts, wire) };
                        sent(attempts, format!("{what} to {to}"), wire.send(&packet));
                    }
                }
            });
        },
        honest,
    )
    .forbids(|world| vec![Trace::To(world.open)])
    .raw(),
    Case::new(
        "F05",
        [
            "segments of connections that do not exist, with data in them",
            "nothing of them leaves",
            "a datagram, sent in the same way",
        ],
        |attempts| {
            with_wire(attempts, |attempts, wire| {
                let world = attempts.world;
                for to in [at(world.open, 443), at(world.ok.address, 443), at(world.evil.address, 443)] {
                    for (what, flags) in [
                        ("an acknowledgement", 0x10),
                        ("a push", 0x18),
                        ("the answer to a beginning", 0x12),
                        ("a reset", 0x04),
                        ("an end", 0x01),
                        ("no flags", 0x00),
                        ("all flags", 0x3f),
                        ("a beginning and an end", 0x03),
                    ] {
                        let packet = Packet {
                            to: to.ip(),
                            port: to.port(),
                            protocol: TCP,
                            flags,
                            ..datagram(attempts, wire)
                        };
                        sent(attempts, format!("{what} to {to}"), wire.send(&packet));
                    }
                }
            });
        },
        honest,
    )
    .forbids(|world| vec![Trace::To(world.open), Trace::To(world.ok.address)])
    .raw(),
    Case::new(
        "F07",
        [
            "errors of ICMP with data in them, about a conversation that is allowed and about none",
            "thrown away, but for the two that a host owes its peers: port unreachable, and too big",
            "a datagram, sent in the same way",
        ],
        |attempts| {
            with_wire(attempts, |attempts, wire| {
                let token = std::mem::take(&mut attempts.token);
                let begins = datagram(attempts, wire);
                attempts.token = token;
                sent(attempts, "the beginning of a conversation", wire.send(&begins));
                let (IpAddr::V4(open), IpAddr::V4(evil)) = (attempts.world.open, attempts.world.evil.address) else {
                    return;
                };
                for (what, kind, code) in [
                    ("port unreachable", 3, 3),
                    ("too big", 3, 4),
                    ("prohibited", 3, 13),
                    ("time exceeded", 11, 0),
                    ("a parameter problem", 12, 0),
                    ("a source quench", 4, 0),
                ] {
                    for (about, quoted) in [("that conversation", open), ("another", evil)] {
                        let mut data = vec![kind, code, 0, 0, 0, 0, 0x05, 0];
                        data.extend([0x45, 0, 0, 60, 0, 7, 0, 0, 64, UDP, 0, 0]);
                        data.extend(quoted.octets());
                        data.extend(wire.address.octets());
                        data.extend([DATAGRAMS.to_be_bytes(), 40_000_u16.to_be_bytes(), [0, 40], [0, 0]].concat());
                        data.extend(attempts.token.as_bytes());
                        let sum = checksum(&data);
                        data[2..4].copy_from_slice(&sum);
                        let packet = Packet {
                            protocol: 1,
                            to: quoted.into(),
                            data,
                            ..datagram(attempts, wire)
                        };
                        sent(attempts, format!("{what}, about {about}"), wire.send(&packet));
                    }
                }
            });
        },
        honest,
    )
    .at_most(OWED)
    .raw(),
    Case::new(
        "F06",
        [
            "the same by IPv6: another's address, extension headers, fragments, forged advertisements",
            "thrown away",
            "an honest packet of IPv4, sent in the same way",
        ],
        |attempts| {
            let Some(six) = &attempts.world.ipv6 else {
                return attempts.impossible("the world has no IPv6");
            };
            with_wire(attempts, |attempts, wire| {
                let Some(own) = wire.address6 else {
                    return attempts.impossible("the sandbox has no IPv6");
                };
                let packet = Packet::datagram(own, six.open, DATAGRAMS, &attempts.token);
                for source in [six.evil, six.open, IpAddr::V6(std::net::Ipv6Addr::LOCALHOST)] {
                    let packet = Packet { source, ..packet.clone() };
                    sent(attempts, format!("a datagram from {source}"), wire.send(&packet));
                }
                for (what, number, rest) in [
                    ("hop-by-hop options", 0, vec![0, 1, 4, 0, 0, 0, 0]),
                    ("destination options", 60, vec![0, 1, 4, 0, 0, 0, 0]),
                    ("a routing header", 43, vec![0, 4, 0, 0, 0, 0, 0]),
                    ("a fragment", 44, vec![0, 0, 1, 0, 0, 0, 7]),
                ] {
                    let extensions = vec![(number, rest)];
                    let packet = Packet { extensions, ..packet.clone() };
                    sent(attempts, format!("{what} before a datagram"), wire.send(&packet));
                }
                for (what, kind) in [("an echo request", 128), ("a router advertisement", 134), ("a redirect", 137)] {
                    let mut data = vec![kind, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
                    data.extend(attempts.token.as_bytes());
                    let packet = Packet { protocol: 58, hops: 255, data, ..packet.clone() };
                    sent(attempts, what, wire.send(&packet));
                }
                for protocol in [4, 41, 47, 50, 132, 253] {
                    let packet = Packet { protocol, ..packet.clone() };
                    sent(attempts, format!("protocol {protocol}"), wire.send(&packet));
                }
            });
        },
        honest,
    )
    .forbids(|world| world.ipv6.iter().map(|six| Trace::To(six.open)).collect())
    .raw(),
];

/// An honest datagram to where it is allowed.
fn datagram(attempts: &Attempts<'_>, wire: &Wire) -> Packet {
    Packet {
        protocol: UDP,
        ..Packet::datagram(wire.address, attempts.world.open, DATAGRAMS, &attempts.token)
    }
}

fn honest(attempts: &mut Attempts<'_>) {
    with_wire(attempts, |attempts, wire| {
        let packet = datagram(attempts, wire);
        sent(attempts, "a datagram", wire.send(&packet));
    });
}

/// Opens the wire, after something was sent that makes the kernel learn the gateway's address on it.
fn with_wire(attempts: &mut Attempts<'_>, work: impl FnOnce(&mut Attempts<'_>, &Wire)) {
    let learn = std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0));
    if let (Ok(socket), Ok(())) = (learn, attempts.permit(attempts.world.open)) {
        // Whether it arrives does not matter.
        socket
            .send_to(b"", at(attempts.world.ok.address, DATAGRAMS + 1))
            .ok();
    }
    match Wire::open() {
        Ok(wire) => work(attempts, &wire),
        Err(error) => attempts.impossible(format!("raw sockets: {error}")),
    }
}

fn sent(attempts: &mut Attempts<'_>, what: impl Into<String>, result: std::io::Result<()>) {
    let started = Instant::now();
    let outcome = match result {
        Ok(()) => Outcome::of(End::Sent, false, started),
        Err(error) => Outcome::of_error(&error, false, started),
    };
    attempts.note(what, &Wanted::NoAnswer, outcome);
}
