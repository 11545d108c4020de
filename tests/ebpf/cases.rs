//! The table of crafted packets: what a sandbox may try, and what becomes of it.

use std::net::Ipv4Addr;

use sandgate_policy::{KernelAction, KernelTable, Reason};

use crate::{
    classifier::Fate,
    packet::{ACK, Frame, ICMP},
    world::table,
};

/// The only address that a DNS answer gave.
pub(crate) const BOUND: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 10);
/// An address of the node, in a range that the policy allows.
pub(crate) const NODE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 200);

/// Frames with one fate.
pub(crate) struct Group {
    pub(crate) fate: Fate,
    pub(crate) reason: Reason,
    pub(crate) frames: Vec<(&'static str, Frame)>,
}

fn refused(reason: Reason, frames: Vec<(&'static str, Frame)>) -> Group {
    Group {
        fate: Fate::Refused,
        reason,
        frames,
    }
}

fn dropped(reason: Reason, frames: Vec<(&'static str, Frame)>) -> Group {
    Group {
        fate: Fate::Dropped,
        reason,
        frames,
    }
}

/// The policy that the table is about.
pub(crate) fn policy() -> KernelTable {
    let everything = |action| [(0, u16::MAX, action)];
    let denied = |reason| KernelAction::Deny(reason);
    let sixteen: Vec<(u16, u16, KernelAction)> = (0..16)
        .map(|index| (1000 + index * 10, 1004 + index * 10, KernelAction::Proxy))
        .collect();
    table(&[
        ("0.0.0.0/0", &[(443, 443, KernelAction::ProxyBound)]),
        (
            "203.0.113.0/24",
            &[(80, 80, KernelAction::Proxy), (443, 443, KernelAction::Pass)],
        ),
        ("203.0.113.66/32", &everything(denied(Reason::DeniedByRule))),
        (
            "203.0.113.128/25",
            &[
                (100, 200, KernelAction::Proxy),
                (201, 300, denied(Reason::PortDenied)),
            ],
        ),
        ("198.51.100.200/32", &sixteen),
        ("10.0.0.0/8", &everything(KernelAction::Proxy)),
        ("169.254.0.0/16", &everything(KernelAction::Proxy)),
        ("127.0.0.0/8", &everything(KernelAction::Proxy)),
    ])
}

/// A SYN that the policy allows.
pub(crate) fn allowed(me: Ipv4Addr, mac: [u8; 6]) -> Frame {
    Frame::tcp(me, mac, Ipv4Addr::new(203, 0, 113, 10), 80)
}

/// All of them, sent by `me`. An allowed packet is refused with `upstream_unreachable`: nothing listens.
pub(crate) fn all(me: Ipv4Addr, mac: [u8; 6]) -> Vec<Group> {
    let ok = allowed(me, mac);
    let tcp = |to: [u8; 4], port| Frame::tcp(me, mac, Ipv4Addr::from(to), port);
    let udp = |to: [u8; 4], port| Frame::udp(me, mac, Ipv4Addr::from(to), port);
    vec![
        refused(
            Reason::UpstreamUnreachable,
            vec![
                ("proxy", ok.clone()),
                ("pass", tcp([203, 0, 113, 10], 443)),
                ("not a SYN", ok.but(|frame| frame.flags = ACK)),
                ("first of a range", tcp([203, 0, 113, 130], 100)),
                ("last of a range", tcp([203, 0, 113, 130], 200)),
                ("sixteenth range", tcp([198, 51, 100, 200], 1154)),
                ("bound address", tcp(BOUND.octets(), 443)),
                ("operator's exception", tcp([10, 0, 0, 5], 443)),
                ("exception of the range around", tcp([10, 0, 0, 5], 80)),
                ("DNS", udp([203, 0, 113, 53], 53)),
                ("DNS over TCP", tcp([198, 51, 100, 53], 53)),
                ("DNS to a private address", udp([10, 1, 1, 1], 53)),
                ("DNS to the gateway", udp([169, 254, 1, 1], 53)),
                ("self-test host", tcp([169, 254, 1, 1], 443)),
            ],
        ),
        refused(
            Reason::DefaultDeny,
            vec![
                ("port of no range", tcp([203, 0, 113, 10], 81)),
                ("no prefix but the widest", tcp([198, 51, 100, 9], 80)),
                ("below a range", tcp([203, 0, 113, 130], 99)),
                ("above a range", tcp([203, 0, 113, 130], 301)),
                ("port of the shorter prefix", tcp([203, 0, 113, 130], 80)),
                ("between ranges", tcp([198, 51, 100, 200], 1005)),
                ("after the sixteenth", tcp([198, 51, 100, 200], 1155)),
                ("bound address, other port", tcp(BOUND.octets(), 444)),
                ("port 0", tcp([203, 0, 113, 10], 0)),
            ],
        ),
        refused(
            Reason::DeniedByRule,
            vec![("longer prefix", tcp([203, 0, 113, 66], 80))],
        ),
        refused(
            Reason::PortDenied,
            vec![("denying range", tcp([203, 0, 113, 130], 201))],
        ),
        refused(
            Reason::AddressNotBound,
            vec![("unbound address", tcp([198, 51, 100, 11], 443))],
        ),
        refused(
            Reason::PlatformDenied,
            vec![
                ("private", tcp([10, 1, 2, 3], 80)),
                ("port of a neighbour's exception", tcp([10, 0, 0, 6], 443)),
                ("metadata", tcp([169, 254, 169, 254], 80)),
                ("metadata outside the ranges", tcp([168, 63, 129, 16], 80)),
                ("gateway", tcp([169, 254, 1, 1], 80)),
                ("below the self-test host", tcp([169, 254, 1, 1], 442)),
                ("above the self-test host", tcp([169, 254, 1, 1], 444)),
                ("self-test host by UDP", udp([169, 254, 1, 1], 443)),
                ("beside the self-test host", tcp([169, 254, 1, 2], 443)),
                ("agent's port at the gateway", tcp([169, 254, 1, 1], 9111)),
                ("proxy's port at the gateway", tcp([169, 254, 1, 1], 15001)),
                ("proxy itself", tcp([127, 0, 0, 1], 15001)),
                ("this network", tcp([0, 0, 0, 1], 443)),
                ("multicast", udp([224, 0, 0, 251], 5353)),
                ("broadcast", udp([255, 255, 255, 255], 67)),
                ("another sandbox", tcp([10, 213, 0, 2], 443)),
                ("itself", tcp(me.octets(), 80)),
                ("the node", tcp(NODE.octets(), 80)),
            ],
        ),
        refused(
            Reason::ProtocolDenied,
            vec![
                ("UDP", udp([203, 0, 113, 10], 80)),
                ("QUIC", udp([203, 0, 113, 10], 443)),
                ("UDP to an operator's exception", udp([10, 0, 0, 5], 443)),
            ],
        ),
        dropped(
            Reason::SpoofedSource,
            vec![
                (
                    "another sandbox's address",
                    ok.but(|frame| frame.from = [10, 213, 0, 2].into()),
                ),
                ("no address", ok.but(|frame| frame.from = [0; 4].into())),
                (
                    "gateway's address",
                    ok.but(|frame| frame.from = [169, 254, 1, 1].into()),
                ),
                (
                    "public address",
                    ok.but(|frame| frame.from = [203, 0, 113, 1].into()),
                ),
                ("another sandbox's MAC", ok.but(|frame| frame.from_mac[5] = 99)),
                ("gateway's MAC", ok.but(|frame| frame.from_mac = frame.to_mac)),
                (
                    "DNS",
                    udp([1, 1, 1, 1], 53).but(|frame| frame.from = [10, 213, 0, 2].into()),
                ),
                (
                    "fragment",
                    ok.but(|frame| (frame.from, frame.fragment) = ([10, 213, 0, 2].into(), 1)),
                ),
            ],
        ),
        dropped(
            Reason::ProtocolDenied,
            vec![
                ("frame to all", ok.but(|frame| frame.to_mac = [0xff; 6])),
                ("VLAN tag", ok.but(|frame| frame.vlan = Some(7))),
                (
                    "IPv6",
                    ok.but(|frame| (frame.ethertype, frame.version_and_length) = (0x86dd, 0x60)),
                ),
                ("ARP", ok.but(|frame| frame.ethertype = 0x0806)),
                ("unknown ethertype", ok.but(|frame| frame.ethertype = 0x88b5)),
                (
                    "options",
                    ok.but(|frame| (frame.version_and_length, frame.options) = (0x46, vec![1; 4])),
                ),
                ("ICMP", ok.but(|frame| frame.protocol = ICMP)),
                ("SCTP", ok.but(|frame| frame.protocol = 132)),
                ("protocol 0", ok.but(|frame| frame.protocol = 0)),
                ("protocol 255", ok.but(|frame| frame.protocol = 255)),
            ],
        ),
        dropped(
            Reason::Fragment,
            vec![
                ("first", ok.but(|frame| frame.fragment = 0x2000)),
                ("later", ok.but(|frame| frame.fragment = 0x0001)),
                (
                    "of DNS",
                    udp([1, 1, 1, 1], 53).but(|frame| frame.fragment = 0x2000),
                ),
            ],
        ),
        dropped(
            Reason::Malformed,
            vec![
                (
                    "version 6 in an IPv4 frame",
                    ok.but(|frame| frame.version_and_length = 0x65),
                ),
                (
                    "header of four words",
                    ok.but(|frame| frame.version_and_length = 0x44),
                ),
                (
                    "length beyond the frame",
                    ok.but(|frame| frame.total_length = Some(60)),
                ),
                (
                    "length before the ports",
                    ok.but(|frame| frame.total_length = Some(20)),
                ),
                ("length within TCP", ok.but(|frame| frame.total_length = Some(39))),
                ("cut within TCP", ok.but(|frame| frame.cut_to = Some(40))),
            ],
        ),
    ]
}
