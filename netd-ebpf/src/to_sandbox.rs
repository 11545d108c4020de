//! What would reach a sandbox.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC},
    helpers::bpf_get_socket_cookie,
    macros::classifier,
    programs::TcContext,
};
use netd_common::{Endpoint, InboundKey, NO_ADDRESS, counter, mark};

use crate::{
    control::{self, Way},
    flows,
    maps::{ENDPOINTS, INBOUND, count},
    packet::{ETHERNET, IPV4, IPV6, Kind, Packet, at, linearize, same},
    uplink,
};

const DNS: u16 = 53;
const ICMP_UNREACHABLE: u8 = 3;
const ICMP6_UNREACHABLE: u8 = 1;

/// TCX egress of the router end.
#[classifier]
pub fn to_sandbox(ctx: TcContext) -> i32 {
    linearize(&ctx);
    // SAFETY: the context of a classifier.
    let ifindex = unsafe { (*ctx.skb.skb).ifindex };
    // SAFETY: netd replaces whole entries and never writes into one.
    let admitted = match unsafe { ENDPOINTS.get(ifindex) } {
        Some(endpoint) => admits(&ctx, endpoint),
        None => None,
    };
    if let Some(counted) = admitted {
        count(counted, ctx.len());
        // Programs behind this one may look at it too.
        TC_ACT_UNSPEC
    } else {
        count(counter::UNADMITTED, ctx.len());
        TC_ACT_SHOT as i32
    }
}

/// As which counter it is admitted.
#[inline(always)]
fn admits(ctx: &TcContext, endpoint: &Endpoint) -> Option<u32> {
    let mut packet = Packet::EMPTY;
    let kind = packet.read(ctx);
    if kind == Kind::Arp {
        return control::is_gateway_arp(ctx, endpoint, Way::ToSandbox).then_some(counter::DELIVERED);
    }
    let own = if packet.is_ipv6() {
        &endpoint.address6
    } else {
        &endpoint.address
    };
    // An endpoint without an IPv6 address has none, not that of all zeros.
    if same(own, &NO_ADDRESS) || !same(&packet.destination, own) {
        return None;
    }
    // SAFETY: the context of a classifier. An interface it came in through; 0 for what this machine made itself.
    let (marked, came_from) = unsafe { ((*ctx.skb.skb).mark, (*ctx.skb.skb).ingress_ifindex) };
    let returned = came_from != 0 && uplink::known().is_some_and(|uplink| uplink.ifindex == came_from);
    match kind {
        Kind::Transport if returned => flows::returns(ctx, endpoint, &packet).then_some(counter::RETURNED),
        Kind::Transport => by_mark(ctx, endpoint, &packet, marked).then_some(counter::DELIVERED),
        Kind::Icmp if returned => {
            control::is_error_of_flow(ctx, endpoint, &packet, Way::ToSandbox).then_some(counter::RETURNED)
        }
        Kind::Icmp => {
            let answer = is_refusal(ctx, &packet, marked)
                || control::is_gateway_neighbour(ctx, endpoint, &packet, Way::ToSandbox);
            answer.then_some(counter::DELIVERED)
        }
        Kind::Arp | Kind::Unwanted(_) => None,
    }
}

/// The kernel's answer to a refused datagram reflects its mark.
#[inline(always)]
fn is_refusal(ctx: &TcContext, packet: &Packet, marked: u32) -> bool {
    let unreachable = if packet.is_ipv6() {
        at::<u8>(ctx, ETHERNET + IPV6) == Some(ICMP6_UNREACHABLE)
    } else {
        at::<u8>(ctx, ETHERNET + IPV4) == Some(ICMP_UNREACHABLE)
    };
    marked == mark::REFUSE && unreachable
}

/// A mark admits only what its owner would send, so that a socket that got hold of one opens nothing.
#[inline(always)]
fn by_mark(ctx: &TcContext, endpoint: &Endpoint, packet: &Packet, marked: u32) -> bool {
    if !packet.is_tcp() {
        return marked == mark::NETD && packet.source_port == DNS;
    }
    // netd's transparent sockets never open a connection, and neither does the kernel when it answers a packet of one
    // (resets and late acknowledgements, with the mark of what they answer).
    if (marked == mark::NETD || marked == mark::PROXY) && !packet.opens() {
        return true;
    }
    if marked == mark::REFUSE && packet.resets() {
        return true;
    }
    // netd opens connections inward in IPv4.
    !packet.is_ipv6() && is_inward(ctx, endpoint, packet)
}

#[inline(always)]
fn is_inward(ctx: &TcContext, endpoint: &Endpoint, packet: &Packet) -> bool {
    let key = InboundKey {
        ordinal: endpoint.ordinal,
        local_address: packet.source[3],
        local_port: packet.source_port,
        sandbox_port: packet.destination_port,
    };
    // SAFETY: netd replaces whole entries and never writes into one.
    let Some(admitted) = (unsafe { INBOUND.get(key) }) else {
        return false;
    };
    // SAFETY: the context of a classifier.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    // An entry outlives its connection by seconds. In that time its port is free, and may become that of a socket
    // which was passed on and disconnected: opening is for the socket that netd admitted.
    !packet.opens() || cookie == *admitted
}
