//! What is neither TCP nor UDP and let through all the same: who asks for the gateway's Ethernet address, who answers,
//! and ICMP errors about flows that the kernel forwards.

use aya_ebpf::programs::TcContext;
use netd_common::{Address, Endpoint, GATEWAY, GATEWAY_MAC, GATEWAY6, MAPPED, limit, wire, wire6};

use crate::{
    events, flows,
    packet::{
        ETHERNET, IPV4, IPV4_PLAIN, IPV6, PROTOCOL_TCP, PROTOCOL_UDP, Packet, Window, linearize_deep, same,
    },
    rules::Remote,
};

/// "Ethernet, IPv4, six and four bytes of address" (RFC 826).
const ARP_FORM: [u16; 3] = [1, 0x0800, 0x0604];
const ARP_LENGTH: usize = ETHERNET + 28;
const ARP_REQUEST: u16 = 1;
const ARP_REPLY: u16 = 2;
const BROADCAST: [u8; 6] = [0xff; 6];

const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;
const SOURCE_OPTION: u8 = 1;
const TARGET_OPTION: u8 = 2;
/// Header, target, and one option with an Ethernet address (RFC 4861, 4.3 and 4.6.1).
const NEIGHBOUR: usize = 24 + 8;
const NEIGHBOUR_LENGTH: usize = ETHERNET + IPV6 + NEIGHBOUR;
/// Proves that nobody forwarded it (RFC 4861, 7.1).
const HOPS: u8 = 255;
/// To whom a solicitation for [`GATEWAY6`] goes (RFC 4291, 2.7.1), and in which frame (RFC 2464, 7).
const SOLICITED: [u8; 16] = [
    0xff,
    2,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    0,
    1,
    0xff,
    GATEWAY6[13],
    GATEWAY6[14],
    GATEWAY6[15],
];
const SOLICITED_MAC: [u8; 6] = [0x33, 0x33, 0xff, GATEWAY6[13], GATEWAY6[14], GATEWAY6[15]];

/// Which way a packet goes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Way {
    FromSandbox,
    ToSandbox,
}

/// An ARP request of the endpoint for exactly the gateway, or its answer.
#[inline(always)]
pub fn is_gateway_arp(ctx: &TcContext, endpoint: &Endpoint, way: Way) -> bool {
    let Some(frame) = Window::<ARP_LENGTH>::of(ctx) else {
        return false;
    };
    let form = frame.half(ETHERNET) == ARP_FORM[0]
        && frame.half(ETHERNET + 2) == ARP_FORM[1]
        && frame.half(ETHERNET + 4) == ARP_FORM[2];
    let operation = frame.half(ETHERNET + 6);
    let (sender, target) = (frame.word(ETHERNET + 14), frame.word(ETHERNET + 24));
    let own = endpoint.address[3];
    form && match way {
        Way::FromSandbox => {
            operation == ARP_REQUEST
                && (frame.is_to(&BROADCAST) || frame.is_to(&GATEWAY_MAC))
                && frame.mac_is(ETHERNET + 8, &endpoint.mac)
                && sender == own
                && target == wire(GATEWAY)
        }
        Way::ToSandbox => {
            operation == ARP_REPLY
                && frame.is_to(&endpoint.mac)
                && frame.mac_is(ETHERNET + 8, &GATEWAY_MAC)
                && sender == wire(GATEWAY)
                && frame.mac_is(ETHERNET + 18, &endpoint.mac)
                && target == own
        }
    }
}

/// A neighbour solicitation of the endpoint for exactly the gateway, or its answer. The addresses of the IPv6 header
/// have been read, and from the sandbox the source was checked.
#[inline(always)]
pub fn is_gateway_neighbour(ctx: &TcContext, endpoint: &Endpoint, packet: &Packet, way: Way) -> bool {
    if !packet.is_ipv6() {
        return false;
    }
    linearize_deep(ctx);
    let Some(frame) = Window::<NEIGHBOUR_LENGTH>::of(ctx) else {
        return false;
    };
    const ICMP: usize = ETHERNET + IPV6;
    let gateway = wire6(GATEWAY6);
    let form = frame.half(ETHERNET + 4) == NEIGHBOUR as u16
        && frame.byte(ETHERNET + 7) == HOPS
        && frame.byte(ICMP + 1) == 0
        && frame.byte(ICMP + 25) == 1
        && same(&frame.address(ICMP + 8), &gateway);
    let (kind, option) = (frame.byte(ICMP), frame.byte(ICMP + 24));
    form && match way {
        Way::FromSandbox => {
            let alone = frame.is_to(&GATEWAY_MAC) && same(&packet.destination, &gateway);
            let all = frame.is_to(&SOLICITED_MAC) && same(&packet.destination, &wire6(SOLICITED));
            kind == SOLICITATION
                && option == SOURCE_OPTION
                && (alone || all)
                && frame.mac_is(ICMP + 26, &endpoint.mac)
        }
        Way::ToSandbox => {
            kind == ADVERTISEMENT
                && option == TARGET_OPTION
                && same(&packet.source, &gateway)
                && frame.mac_is(ICMP + 26, &GATEWAY_MAC)
        }
    }
}

/// Counts an ARP request, a solicitation or an error; false beyond the limit.
#[inline(always)]
pub fn within_controls(endpoint: &Endpoint) -> bool {
    let Some((throttle, _)) = events::throttle(endpoint.ordinal) else {
        return false;
    };
    // SAFETY: a live map value; a lost increment lets one more through.
    unsafe {
        (*throttle).controls += 1;
        (*throttle).controls <= limit::CONTROLS_PER_WINDOW
    }
}

/// What an ICMP error is about: the first bytes of a packet.
struct Quoted {
    source: Address,
    destination: Address,
    source_port: u16,
    destination_port: u16,
    protocol: u8,
}

/// Whether it is an ICMP error about a flow that the endpoint has and may have: toward the sandbox any kind, from it
/// only those that a host must send so that others do not wait (too big, port unreachable).
#[inline(always)]
pub fn is_error_of_flow(ctx: &TcContext, endpoint: &Endpoint, packet: &Packet, way: Way) -> bool {
    linearize_deep(ctx);
    let quoted = if packet.is_ipv6() {
        quoted6(ctx, way)
    } else {
        quoted4(ctx, way)
    };
    let Some(quoted) = quoted else {
        return false;
    };
    if quoted.protocol != PROTOCOL_TCP && quoted.protocol != PROTOCOL_UDP {
        return false;
    }
    let own = if packet.is_ipv6() {
        &endpoint.address6
    } else {
        &endpoint.address
    };
    // An error goes to whoever sent what it quotes.
    let (remote, sandbox_port) = match way {
        Way::ToSandbox => {
            if !same(&quoted.source, own) {
                return false;
            }
            let remote = Remote {
                address: quoted.destination,
                port: quoted.destination_port,
                protocol: quoted.protocol,
            };
            (remote, quoted.source_port)
        }
        Way::FromSandbox => {
            if !same(&quoted.destination, own) || !same(&quoted.source, &packet.destination) {
                return false;
            }
            let remote = Remote {
                address: quoted.source,
                port: quoted.source_port,
                protocol: quoted.protocol,
            };
            (remote, quoted.destination_port)
        }
    };
    let flow = flows::find(&flows::key(endpoint.ordinal, &remote, sandbox_port));
    !flow.is_null() && flows::still_allowed(flow, endpoint, &remote)
}

#[inline(always)]
fn quoted4(ctx: &TcContext, way: Way) -> Option<Quoted> {
    const ICMP: usize = ETHERNET + IPV4;
    const INNER: usize = ICMP + 8;
    let frame = Window::<{ INNER + IPV4 + 4 }>::of(ctx)?;
    let (kind, code) = (frame.byte(ICMP), frame.byte(ICMP + 1));
    // Unreachable, time exceeded, parameter problem (RFC 792).
    let wanted = match way {
        Way::ToSandbox => kind == 3 || kind == 11 || kind == 12,
        Way::FromSandbox => kind == 3 && (code == 3 || code == 4),
    };
    let length = u32::from(frame.half(ETHERNET + 2));
    let fits = length >= (IPV4 + 8 + IPV4 + 8) as u32
        && ETHERNET as u32 + length <= ctx.len()
        && (way == Way::ToSandbox || length <= limit::ICMP_BYTES);
    let first = frame.half(INNER + 6) & 0x1fff == 0;
    if !wanted || !fits || !first || frame.byte(INNER) != IPV4_PLAIN {
        return None;
    }
    Some(Quoted {
        source: [0, 0, MAPPED, frame.word(INNER + 12)],
        destination: [0, 0, MAPPED, frame.word(INNER + 16)],
        source_port: frame.half(INNER + IPV4),
        destination_port: frame.half(INNER + IPV4 + 2),
        protocol: frame.byte(INNER + 9),
    })
}

#[inline(always)]
fn quoted6(ctx: &TcContext, way: Way) -> Option<Quoted> {
    const ICMP: usize = ETHERNET + IPV6;
    const INNER: usize = ICMP + 8;
    let frame = Window::<{ INNER + IPV6 + 4 }>::of(ctx)?;
    let (kind, code) = (frame.byte(ICMP), frame.byte(ICMP + 1));
    // Unreachable, too big, time exceeded, parameter problem (RFC 4443).
    let wanted = match way {
        Way::ToSandbox => kind >= 1 && kind <= 4,
        Way::FromSandbox => kind == 2 || kind == 1 && code == 4,
    };
    let length = u32::from(frame.half(ETHERNET + 4));
    let fits = length >= (8 + IPV6 + 8) as u32
        && (ETHERNET + IPV6) as u32 + length <= ctx.len()
        && (way == Way::ToSandbox || IPV6 as u32 + length <= limit::ICMP_BYTES);
    if !wanted || !fits || frame.byte(INNER) >> 4 != 6 {
        return None;
    }
    Some(Quoted {
        source: frame.address(INNER + 8),
        destination: frame.address(INNER + 24),
        source_port: frame.half(INNER + IPV6),
        destination_port: frame.half(INNER + IPV6 + 2),
        protocol: frame.byte(INNER + 6),
    })
}
