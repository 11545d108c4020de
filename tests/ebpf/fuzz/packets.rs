//! Random packets: mostly good ones to and from interesting places, some of them then damaged.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::model::FlowId;
use crate::{
    packet::{ACK, Frame, GATEWAY_MAC, RST, SYN, TCP, UDP},
    packet6::{Arp, Frame6, GATEWAY6, ICMP6, icmp4, icmp6, neighbour, transport},
};

/// SplitMix64: small, and the same everywhere for one seed.
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        let limit = u64::try_from(limit).expect("small");
        usize::try_from(self.roll() % limit).expect("below a small number")
    }

    pub(crate) fn one_in(&mut self, number: usize) -> bool {
        self.below(number) == 0
    }

    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    fn byte(&mut self) -> u8 {
        self.roll().to_le_bytes()[0]
    }
}

pub(crate) const PORTS: &[u16] = &[
    0, 1, 22, 53, 79, 80, 81, 443, 444, 1000, 1004, 1005, 7000, 8443, 40_000, 65_535,
];
const FLAGS: &[u8] = &[
    SYN,
    SYN,
    SYN,
    ACK,
    ACK,
    SYN | ACK,
    RST,
    RST | ACK,
    0x11,
    0x03,
    0x06,
    0x01,
    0x29,
    0x32,
    0x24,
    0x18,
    0,
];
const ADDRESSES4: &[[u8; 4]] = &[
    [203, 0, 113, 10],
    [203, 0, 113, 66],
    [203, 0, 113, 130],
    [203, 0, 113, 200],
    [198, 51, 100, 10],
    [198, 51, 100, 200],
    [192, 0, 2, 1],
    [192, 0, 0, 192],
    [10, 0, 0, 5],
    [10, 0, 0, 6],
    [10, 1, 2, 3],
    [100, 64, 0, 1],
    [127, 0, 0, 1],
    [169, 254, 1, 1],
    [169, 254, 169, 254],
    [168, 63, 129, 16],
    [10, 213, 0, 1],
    [10, 213, 0, 2],
    [0, 0, 0, 0],
    [224, 0, 0, 251],
    [255, 255, 255, 255],
];
const ADDRESSES6: &[&str] = &[
    "2001:db8::1",
    "2001:db8:1::1",
    "2001:db8:1:2::3",
    "2001:db8:ffff::9",
    "fd00:1::5",
    "fc00::1",
    "fe80::5347:1",
    "fe80::1",
    "fec0::1",
    "fd53:4700::1",
    "fd53:4700::2",
    "64:ff9b:1::1",
    "ff02::1",
    "ff02::1:ff47:1",
    "::",
    "::1",
];

/// Whose packets these are, and what exists already.
pub(crate) struct Place<'a> {
    pub(crate) mac: [u8; 6],
    pub(crate) address: Ipv4Addr,
    pub(crate) address6: Ipv6Addr,
    pub(crate) flows: &'a [FlowId],
    pub(crate) inward: &'a [(SocketAddr, u16)],
}

pub(crate) fn address4(dice: &mut Dice) -> Ipv4Addr {
    Ipv4Addr::from(dice.pick(ADDRESSES4))
}

/// Among them all that carry an IPv4 address.
pub(crate) fn address6(dice: &mut Dice) -> Ipv6Addr {
    let [a, b, c, d] = dice.pick(ADDRESSES4);
    let pair = |high: u8, low: u8| u16::from_be_bytes([high, low]);
    let (high, low) = (pair(a, b), pair(c, d));
    match dice.below(16) {
        0 => Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, high, low),
        1 => Ipv6Addr::new(0, 0, 0, 0, 0, 0, high, low),
        2 => Ipv6Addr::new(0, 0, 0, 0, 0xffff, 0, high, low),
        3 => Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, high, low),
        4 => Ipv6Addr::new(0x2002, high, low, 0, 0, 0, 0, 1),
        5 => Ipv6Addr::new(0x2001, 0, high, low, 0, 0, !0xcb00, !0x710a),
        6 => Ipv6Addr::new(0x2001, 0, 0xcb00, 0x710a, 0, 0, !high, !low),
        _ => dice.pick(ADDRESSES6).parse().expect("an address"),
    }
}

/// A tuple as the sandbox sends it: protocol, its port, the other end.
fn tuple(dice: &mut Dice, place: &Place<'_>) -> (u8, u16, SocketAddr) {
    if !place.flows.is_empty() && dice.one_in(3) {
        let flow = dice.pick(place.flows);
        return (flow.protocol, flow.sandbox_port, flow.remote);
    }
    if !place.inward.is_empty() && dice.one_in(12) {
        let (local, port) = dice.pick(place.inward);
        return (TCP, port, local);
    }
    let remote: IpAddr = if dice.one_in(2) {
        address4(dice).into()
    } else {
        address6(dice).into()
    };
    let to_port = dice.pick(PORTS);
    (
        dice.pick(&[TCP, TCP, UDP]),
        dice.pick(&[40_000, 40_001, 7000]),
        SocketAddr::new(remote, to_port),
    )
}

fn between(
    (from_mac, to_mac): ([u8; 6], [u8; 6]),
    (from, to): (SocketAddr, SocketAddr),
    protocol: u8,
    flags: u8,
) -> Vec<u8> {
    match (from.ip(), to.ip()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => Frame {
            to_mac,
            protocol,
            from_port: from.port(),
            flags,
            ..Frame::tcp(source, from_mac, destination, to.port())
        }
        .bytes(),
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let payload = transport(protocol, from.port(), to.port(), flags);
            Frame6 {
                to_mac,
                ..Frame6::new(source, from_mac, destination, protocol, payload)
            }
            .bytes()
        }
        _ => unreachable!("both ends are of one family"),
    }
}

/// An ICMP error between two places about a packet the other way.
fn error(
    dice: &mut Dice,
    (from_mac, to_mac): ([u8; 6], [u8; 6]),
    (from, to): (SocketAddr, SocketAddr),
    protocol: u8,
) -> Vec<u8> {
    match (from.ip(), to.ip()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let outer = Frame {
                to_mac,
                ..Frame::tcp(source, from_mac, destination, 0)
            };
            let quoted = Frame {
                protocol,
                from_port: to.port(),
                ..Frame::tcp(destination, to_mac, source, from.port())
            };
            let kinds = [(3, 3), (3, 4), (3, 1), (11, 0), (12, 0), (8, 0), (5, 1)];
            let (kind, code) = dice.pick(&kinds);
            icmp4(&outer, kind, code, &quoted)
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let outer = Frame6 {
                to_mac,
                ..Frame6::new(source, from_mac, destination, ICMP6, Vec::new())
            };
            let payload = transport(protocol, to.port(), from.port(), 0);
            let quoted = Frame6::new(destination, to_mac, source, protocol, payload);
            let (kind, code) = dice.pick(&[
                (2, 0),
                (1, 4),
                (1, 1),
                (3, 0),
                (4, 0),
                (128, 0),
                (134, 0),
                (137, 0),
            ]);
            icmp6(&outer, kind, code, &quoted)
        }
        _ => unreachable!("both ends are of one family"),
    }
}

fn own(place: &Place<'_>, like: SocketAddr, port: u16) -> SocketAddr {
    let ip = match like.ip() {
        IpAddr::V4(_) => IpAddr::V4(place.address),
        IpAddr::V6(_) => IpAddr::V6(place.address6),
    };
    SocketAddr::new(ip, port)
}

/// What a sandbox may send.
pub(crate) fn out(dice: &mut Dice, place: &Place<'_>) -> Vec<u8> {
    let macs = (place.mac, GATEWAY_MAC);
    let mut frame = match dice.below(20) {
        0 => arp(dice, place, true),
        1 => {
            let all: Ipv6Addr = "ff02::1:ff47:1".parse().expect("an address");
            let (to, to_mac) = dice.pick(&[(GATEWAY6, GATEWAY_MAC), (all, [0x33, 0x33, 0xff, 0x47, 0, 1])]);
            let message = neighbour(135, GATEWAY6, 1, place.mac);
            Frame6 {
                to_mac,
                hops: 255,
                ..Frame6::new(place.address6, place.mac, to, ICMP6, message)
            }
            .bytes()
        }
        2 | 3 => {
            let (protocol, port, remote) = tuple(dice, place);
            error(dice, macs, (own(place, remote, port), remote), protocol)
        }
        4 => (0..dice.below(120) + 34).map(|_| dice.byte()).collect(),
        _ => {
            let (protocol, port, remote) = tuple(dice, place);
            let flags = if protocol == TCP { dice.pick(FLAGS) } else { 0 };
            between(macs, (own(place, remote, port), remote), protocol, flags)
        }
    };
    if dice.one_in(3) {
        damage(dice, &mut frame);
    }
    frame
}

/// What may come toward it.
pub(crate) fn into(dice: &mut Dice, place: &Place<'_>) -> Vec<u8> {
    let macs = (GATEWAY_MAC, place.mac);
    let mut frame = match dice.below(20) {
        0 => arp(dice, place, false),
        1 => {
            let message = neighbour(136, GATEWAY6, 2, GATEWAY_MAC);
            Frame6 {
                to_mac: place.mac,
                hops: 255,
                ..Frame6::new(GATEWAY6, GATEWAY_MAC, place.address6, ICMP6, message)
            }
            .bytes()
        }
        2..5 => {
            let (protocol, port, remote) = tuple(dice, place);
            error(dice, macs, (remote, own(place, remote, port)), protocol)
        }
        _ => {
            let (protocol, port, remote) = tuple(dice, place);
            let flags = if protocol == TCP { dice.pick(FLAGS) } else { 0 };
            between(macs, (remote, own(place, remote, port)), protocol, flags)
        }
    };
    if dice.one_in(3) {
        damage(dice, &mut frame);
    }
    frame
}

fn arp(dice: &mut Dice, place: &Place<'_>, asks: bool) -> Vec<u8> {
    let (ours, gateway) = (
        (place.mac, place.address),
        (GATEWAY_MAC, Ipv4Addr::new(169, 254, 1, 1)),
    );
    let request = Arp {
        to_mac: dice.pick(&[[0xff; 6], GATEWAY_MAC]),
        from_mac: place.mac,
        operation: 1,
        sender: ours,
        target: ([0; 6], gateway.1),
    };
    let reply = Arp {
        to_mac: place.mac,
        from_mac: GATEWAY_MAC,
        operation: 2,
        sender: gateway,
        target: ours,
    };
    let mut arp = if asks { request } else { reply };
    match dice.below(8) {
        0 => arp.operation = dice.pick(&[1, 2, 3]),
        1 => arp.sender.1 = address4(dice),
        2 => arp.target.1 = address4(dice),
        3 => arp.sender.0 = [2; 6],
        _ => {}
    }
    arp.bytes()
}

/// Makes something wrong, or only different.
fn damage(dice: &mut Dice, frame: &mut Vec<u8>) {
    const HEADERS: &[u8] = &[0, 1, 4, 6, 17, 41, 43, 44, 47, 50, 51, 58, 59, 60, 132, 135, 255];
    let ipv4 = frame[12..14] == [8, 0];
    match dice.below(12) {
        0 => {
            let at = dice.below(frame.len().min(100));
            frame[at] ^= 1 << dice.below(8);
        }
        1 => {
            let at = dice.below(frame.len().min(100));
            frame[at] = dice.byte();
        }
        2 => frame.truncate(34.max(dice.below(frame.len()))),
        3 => {
            let more = dice.below(1300);
            frame.extend((0..more).map(|_| 0xa5));
        }
        4 => {
            let tag = [0x81, 0, 0, 7];
            frame.splice(12..12, tag);
        }
        5 => frame[..6].copy_from_slice(&dice.pick(&[[0xff; 6], [0x33, 0x33, 0, 0, 0, 1], [2; 6]])),
        6 => frame[11] ^= 1,
        7 if ipv4 => frame[20] = dice.pick(&[0x20, 0x3f, 0x80, 0x40, 0]),
        8 => frame[if ipv4 { 23 } else { 20 }] = dice.pick(HEADERS),
        9 => {
            let length = dice.pick(&[0, 7, 8, 12, 19, 20, 28, 39, 40, 41, 60, 1500, 65_535_u16]);
            let at = if ipv4 { 16 } else { 18 };
            frame[at..at + 2].copy_from_slice(&length.to_be_bytes());
        }
        10 => frame[14] = dice.pick(&[0x45, 0x46, 0x4f, 0x44, 0x60, 0x65, 0x00]),
        _ => {
            // Of somebody else.
            let at = if ipv4 { 29 } else { 37 };
            if let Some(last) = frame.get_mut(at) {
                *last ^= 3;
            }
        }
    }
}
