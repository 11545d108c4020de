//! Sending a packet on its way without the stack: to the uplink, and from it to a sandbox.

use aya_ebpf::{
    bindings::TC_ACT_SHOT,
    helpers::{bpf_redirect, bpf_redirect_peer, bpf_skb_store_bytes},
    programs::TcContext,
};
use netd_common::{Endpoint, GATEWAY_MAC, Uplink, mark};

use crate::maps::UPLINK;

/// The way out, if there is one.
#[inline(always)]
pub fn known() -> Option<&'static Uplink> {
    UPLINK.get(0).filter(|uplink| uplink.ifindex != 0)
}

/// The way out for an endpoint's packets of this family, if there is one: proven, or this endpoint's to prove.
#[inline(always)]
pub fn for_endpoint(endpoint: &Endpoint, ipv6: bool) -> Option<&'static Uplink> {
    let family = if ipv6 { Uplink::IPV6 } else { Uplink::IPV4 };
    known().filter(|uplink| uplink.proven & family != 0 || uplink.prover == endpoint.ordinal)
}

/// Sends the packet out. The mark is for the stack, should it ever see the packet: it routes it to the uplink alone.
#[inline(always)]
pub fn leave(ctx: &TcContext, uplink: &Uplink) -> i32 {
    ctx.set_mark(mark::PASS);
    if !address_frame(ctx, &uplink.peer_mac) {
        return TC_ACT_SHOT as i32;
    }
    // SAFETY: a helper that takes numbers.
    unsafe { bpf_redirect(uplink.ifindex, 0) as i32 }
}

/// Puts the packet into the sandbox, past `to_sandbox`: whoever calls it has judged the packet.
#[inline(always)]
pub fn enter(ctx: &TcContext, endpoint: &Endpoint, ifindex: u32) -> i32 {
    ctx.set_mark(0);
    if !address_frame(ctx, &endpoint.mac) {
        return TC_ACT_SHOT as i32;
    }
    // SAFETY: a helper that takes numbers.
    unsafe { bpf_redirect_peer(ifindex, 0) as i32 }
}

#[inline(always)]
fn address_frame(ctx: &TcContext, to: &[u8; 6]) -> bool {
    let from = &GATEWAY_MAC;
    let addresses = [
        to[0], to[1], to[2], to[3], to[4], to[5], from[0], from[1], from[2], from[3], from[4], from[5],
    ];
    // SAFETY: the context, and as many bytes as are said.
    unsafe { bpf_skb_store_bytes(ctx.skb.skb, 0, addresses.as_ptr().cast(), 12, 0) == 0 }
}
