//! What comes back through the uplink.

use aya_ebpf::{
    bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC},
    macros::classifier,
    programs::TcContext,
};
use netd_common::{Endpoint, counter};

use crate::{
    control::{self, Way},
    flows,
    maps::{ADDRESSES, ENDPOINTS, count},
    packet::{ETHERNET, IPV6, Kind, PROTOCOL_ICMP6, Packet, at, linearize},
    uplink,
};

/// TCX ingress of the router's end of the uplink. Packets of flows go to their sandbox; of the rest only what two
/// neighbours need to find each other is left to the stack.
#[classifier]
pub fn from_uplink(ctx: TcContext) -> i32 {
    linearize(&ctx);
    let mut packet = Packet::EMPTY;
    let kind = packet.read(&ctx);
    if kind == Kind::Arp || kind == Kind::Icmp && is_discovery(&ctx, &packet) {
        return TC_ACT_UNSPEC;
    }
    // SAFETY: netd replaces whole entries and never writes into one.
    let owner = unsafe { ADDRESSES.get(packet.destination) };
    if let Some(ifindex) = owner
        // SAFETY: the same.
        && let Some(endpoint) = unsafe { ENDPOINTS.get(*ifindex) }
        && admits(&ctx, endpoint, &packet, kind)
    {
        count(counter::RETURNED, ctx.len());
        return uplink::enter(&ctx, endpoint, *ifindex);
    }
    count(counter::UNADMITTED, ctx.len());
    TC_ACT_SHOT as i32
}

#[inline(always)]
fn admits(ctx: &TcContext, endpoint: &Endpoint, packet: &Packet, kind: Kind) -> bool {
    match kind {
        Kind::Transport => flows::returns(ctx, endpoint, packet),
        Kind::Icmp => control::is_error_of_flow(ctx, endpoint, packet, Way::ToSandbox),
        Kind::Arp | Kind::Unwanted(_) => false,
    }
}

/// Neighbour solicitations and advertisements: the stack takes those alone that nobody forwarded.
#[inline(always)]
fn is_discovery(ctx: &TcContext, packet: &Packet) -> bool {
    let kind: Option<u8> = at(ctx, ETHERNET + IPV6);
    packet.protocol == PROTOCOL_ICMP6 && packet.is_ipv6() && matches!(kind, Some(135 | 136))
}
