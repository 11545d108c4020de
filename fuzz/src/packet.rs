//! Packets, read by the code of the kernel programs (built for the host) and a second time from the RFCs: both must see
//! the same addresses, ports and flags, or the same fault, however much of a packet lies in one piece.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netd_common::{Address, MAPPED, reason};
use netd_ebpf::{
    context::TcContext,
    packet::{Kind, Packet, linearize},
};

const TCP: u8 = 6;
const UDP: u8 = 17;
/// The kernel keeps an Ethernet header in one piece.
const ETHERNET: usize = 14;

pub(crate) fn check(data: &[u8]) {
    let [options, pulled, frame @ ..] = data else {
        return;
    };
    let is_tagged = options & 7 == 1;
    let in_pieces = read(frame, ETHERNET + usize::from(*pulled), is_tagged);
    let (seen, kind) = read(frame, frame.len(), is_tagged);
    assert_eq!(
        (&seen, kind),
        (&in_pieces.0, in_pieces.1),
        "it depends on what was pulled"
    );
    match (expected(frame, is_tagged), kind) {
        (Expected::Transport(expected), Seen::Transport) => assert_eq!(seen, expected),
        (Expected::Icmp { source, destination }, Seen::Icmp) => {
            assert_eq!((seen.source, seen.destination), (source, destination));
        }
        (Expected::Arp, Seen::Arp) => {}
        (Expected::Unwanted(reasons), Seen::Unwanted(found)) => {
            assert!(reasons.contains(&found), "{found} is none of {reasons:?}");
        }
        (expected, kind) => panic!("{kind:?} is {expected:?}: {seen:?}"),
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Fields {
    source: IpAddr,
    destination: IpAddr,
    source_port: u16,
    destination_port: u16,
    protocol: u8,
    tcp_flags: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Seen {
    Transport,
    Icmp,
    Arp,
    Unwanted(u8),
}

#[derive(Debug)]
enum Expected {
    Transport(Fields),
    Icmp {
        source: IpAddr,
        destination: IpAddr,
    },
    Arp,
    /// For one of these reasons.
    Unwanted(Vec<u8>),
}

/// As the programs begin.
fn read(frame: &[u8], readable: usize, is_tagged: bool) -> (Fields, Seen) {
    let ctx = TcContext::new(frame, readable, is_tagged).expect("no input is longer than a frame");
    linearize(&ctx);
    let mut packet = Packet::EMPTY;
    let kind = match packet.read(&ctx) {
        Kind::Transport => Seen::Transport,
        Kind::Icmp => Seen::Icmp,
        Kind::Arp => Seen::Arp,
        Kind::Unwanted(reason) => Seen::Unwanted(reason),
    };
    let fields = Fields {
        source: address(&packet.source),
        destination: address(&packet.destination),
        source_port: packet.source_port,
        destination_port: packet.destination_port,
        protocol: packet.protocol,
        tcp_flags: packet.tcp_flags,
    };
    (fields, kind)
}

/// Of the form that both families have in the maps.
fn address(words: &Address) -> IpAddr {
    match words {
        [0, 0, MAPPED, word] => Ipv4Addr::from(word.to_ne_bytes()).into(),
        words => {
            let mut bytes = [0; 16];
            for (part, word) in bytes.chunks_mut(4).zip(words) {
                part.copy_from_slice(&word.to_ne_bytes());
            }
            Ipv6Addr::from(bytes).into()
        }
    }
}

fn half(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn expected(frame: &[u8], is_tagged: bool) -> Expected {
    let malformed = || Expected::Unwanted(vec![reason::MALFORMED]);
    let unwanted = || Expected::Unwanted(vec![reason::PROTOCOL_DENIED]);
    if frame.len() < ETHERNET {
        return malformed();
    }
    match half(frame, 12) {
        _ if is_tagged => unwanted(),
        0x0806 => Expected::Arp,
        0x0800 if frame.len() < 34 => malformed(),
        0x0800 => expected4(frame),
        0x86dd if frame.len() < 54 => malformed(),
        0x86dd => expected6(frame),
        _ => unwanted(),
    }
}

/// RFC 791.
fn expected4(frame: &[u8]) -> Expected {
    let header = &frame[ETHERNET..];
    let mut faults = Vec::new();
    match (header[0] >> 4, header[0] & 15) {
        (4, 5) => {}
        (4, 6..) => faults.push(reason::PROTOCOL_DENIED),
        _ => faults.push(reason::MALFORMED),
    }
    let (more, offset) = (header[6] & 0x20 != 0, half(header, 6) & 0x1fff);
    if more || offset != 0 {
        faults.push(reason::FRAGMENT);
    }
    let octets = |at: usize| IpAddr::from(<[u8; 4]>::try_from(&header[at..at + 4]).expect("four bytes"));
    let ends = (octets(12), octets(16));
    let protocol = header[9];
    if protocol == 1 {
        return icmp(ends, faults);
    }
    let length = usize::from(half(header, 2));
    transport(frame, 34, ends, protocol, length.checked_sub(20), faults)
}

/// RFC 8200.
fn expected6(frame: &[u8]) -> Expected {
    let header = &frame[ETHERNET..];
    let mut faults = Vec::new();
    if header[0] >> 4 != 6 {
        faults.push(reason::MALFORMED);
    }
    let octets = |at: usize| IpAddr::from(<[u8; 16]>::try_from(&header[at..at + 16]).expect("sixteen bytes"));
    let ends = (octets(8), octets(24));
    // An IPv4 address has no business in an IPv6 packet.
    if [ends.0, ends.1].iter().any(|end| end.to_canonical().is_ipv4()) {
        faults.push(reason::MALFORMED);
    }
    match header[6] {
        58 => icmp(ends, faults),
        44 => {
            faults.push(reason::FRAGMENT);
            Expected::Unwanted(faults)
        }
        protocol => transport(
            frame,
            54,
            ends,
            protocol,
            Some(usize::from(half(header, 4))),
            faults,
        ),
    }
}

fn icmp((source, destination): (IpAddr, IpAddr), faults: Vec<u8>) -> Expected {
    if faults.is_empty() {
        Expected::Icmp { source, destination }
    } else {
        Expected::Unwanted(faults)
    }
}

/// What is behind the IP header; `length` is how much that says there is.
fn transport(
    frame: &[u8],
    at: usize,
    (source, destination): (IpAddr, IpAddr),
    protocol: u8,
    length: Option<usize>,
    mut faults: Vec<u8>,
) -> Expected {
    let shortest = match protocol {
        TCP => 20,
        UDP => 8,
        _ => {
            faults.push(reason::PROTOCOL_DENIED);
            return Expected::Unwanted(faults);
        }
    };
    if length.is_none_or(|length| length < shortest || length > frame.len() - at) {
        faults.push(reason::MALFORMED);
        return Expected::Unwanted(faults);
    }
    let tcp_flags = if protocol == TCP { frame[at + 13] } else { 0 };
    if protocol == TCP && !is_sensible(tcp_flags) {
        faults.push(reason::MALFORMED);
    }
    if !faults.is_empty() {
        return Expected::Unwanted(faults);
    }
    Expected::Transport(Fields {
        source,
        destination,
        source_port: half(frame, at),
        destination_port: half(frame, at + 2),
        protocol,
        tcp_flags,
    })
}

/// A segment opens, resets, finishes or goes on, and only one of these; all but the first one and a reset acknowledge;
/// what is urgent is neither an answer to an opening nor a reset.
fn is_sensible(flags: u8) -> bool {
    let [finishes, opens, resets, _, acknowledges, urgent] =
        [0, 1, 2, 3, 4, 5].map(|bit| flags >> bit & 1 == 1);
    match (opens, resets, finishes) {
        (true, false, false) => !(acknowledges && urgent),
        (false, true, false) => !urgent,
        (false, false, _) => acknowledges,
        (true, true, _) | (true, _, true) | (_, true, true) => false,
    }
}
