//! Flows that the kernel forwards: made by the sandbox's first packet, counted packet by packet, ended and removed by
//! netd. An entry opens nothing by itself: what it is for must be allowed by the policy in force.

use aya_ebpf::{bindings::BPF_NOEXIST, helpers::bpf_ktime_get_ns, programs::TcContext};
use netd_common::{Address, Endpoint, Flow, FlowKey, limit};

use crate::{
    maps::{FLOW_COUNTS, FLOWS, FLOWS_FREED, add},
    packet::Packet,
    rules::{self, Remote, Ruling},
};

/// Place of all endpoints together among the counts: no endpoint has this ordinal.
const TOGETHER: u32 = 0;

#[inline(always)]
pub fn key(ordinal: u32, remote: &Remote, sandbox_port: u16) -> FlowKey {
    FlowKey {
        ordinal,
        remote: remote.address,
        remote_port: remote.port,
        sandbox_port,
        protocol: remote.protocol,
        padding: [0, 0, 0],
    }
}

/// A living entry; null when there is none.
#[inline(always)]
pub fn find(key: &FlowKey) -> *mut Flow {
    match FLOWS.get_ptr_mut(key) {
        // SAFETY: a live map value.
        Some(flow) if unsafe { (*flow).cut } == 0 => flow,
        Some(_) | None => core::ptr::null_mut(),
    }
}

/// Counts a packet from the sandbox, which `policy` allows.
#[inline(always)]
pub fn count_up(flow: *mut Flow, ctx: &TcContext, packet: &Packet, policy: u32) {
    // SAFETY: a helper without arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    // SAFETY: a live map value; single fields are stored whole.
    unsafe {
        add(&raw mut (*flow).up_packets, 1);
        add(&raw mut (*flow).up_bytes, u64::from(ctx.len()));
        (*flow).up_ns = now;
        (*flow).policy = policy;
        if packet.opens() {
            // The same ports again: a connection of its own, in the same entry.
            (*flow).up_fin = 0;
            (*flow).down_fin = 0;
            (*flow).reset = 0;
        }
        if packet.finishes() {
            (*flow).up_fin = 1;
        }
        if packet.resets() && (*flow).reset == 0 {
            (*flow).reset = Flow::RESET_UP;
        }
    }
}

/// Counts a packet to the sandbox.
#[inline(always)]
fn count_down(flow: *mut Flow, ctx: &TcContext, packet: &Packet) {
    // SAFETY: a helper without arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    // SAFETY: as above.
    unsafe {
        add(&raw mut (*flow).down_packets, 1);
        add(&raw mut (*flow).down_bytes, u64::from(ctx.len()));
        (*flow).down_ns = now;
        if packet.finishes() {
            (*flow).down_fin = 1;
        }
        if packet.resets() {
            (*flow).reset = Flow::RESET_DOWN;
        }
    }
}

/// Makes an entry for a flow's first packet; false when there is no room for it.
///
/// What is counted before it is made is taken back when it is not: two CPUs at the border refuse both rather than let
/// one through too many.
#[inline(always)]
pub fn open(key: &FlowKey, ctx: &TcContext, endpoint: &Endpoint, sandbox: &Address) -> bool {
    let (Some(own), Some(all)) = (
        FLOW_COUNTS.get_ptr_mut(endpoint.ordinal),
        FLOW_COUNTS.get_ptr_mut(TOGETHER),
    ) else {
        return false;
    };
    // SAFETY: live map values.
    let (live, together) = unsafe {
        add(own, 1);
        add(all, 1);
        (
            (*own).wrapping_sub(freed(endpoint.ordinal)),
            (*all).wrapping_sub(freed(TOGETHER)),
        )
    };
    let room = live <= limit::FLOWS_PER_ENDPOINT
        && (live <= limit::FLOWS_ASSURED || together <= limit::FLOWS_SHARED);
    // SAFETY: a helper without arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    let first = Flow {
        began_ns: now,
        up_ns: now,
        down_ns: 0,
        up_packets: 1,
        up_bytes: u64::from(ctx.len()),
        down_packets: 0,
        down_bytes: 0,
        sandbox: *sandbox,
        // SAFETY: the context of a classifier.
        ifindex: unsafe { (*ctx.skb.skb).ifindex },
        policy: endpoint.policy,
        up_fin: 0,
        down_fin: 0,
        reset: 0,
        cut: 0,
        padding: 0,
    };
    if room && FLOWS.insert(key, &first, u64::from(BPF_NOEXIST)).is_ok() {
        return true;
    }
    // SAFETY: live map values.
    unsafe {
        add(own, u64::MAX);
        add(all, u64::MAX);
    }
    // Another CPU may have made it this very moment.
    room && !find(key).is_null()
}

/// How many entries netd has removed.
#[inline(always)]
fn freed(ordinal: u32) -> u64 {
    // SAFETY: netd replaces whole entries and never writes into one.
    unsafe { FLOWS_FREED.get(ordinal) }.copied().unwrap_or(0)
}

/// Ends a flow that the policy no longer allows, if there is one.
#[inline(always)]
pub fn cut(key: &FlowKey) {
    if let Some(flow) = FLOWS.get_ptr_mut(key) {
        // SAFETY: a live map value.
        unsafe { (*flow).cut = 1 };
    }
}

/// Whether a packet that came through the uplink belongs to a flow that the endpoint has and may have. If so, it is
/// counted.
#[inline(always)]
pub fn returns(ctx: &TcContext, endpoint: &Endpoint, packet: &Packet) -> bool {
    if packet.is_tcp() && packet.opens() {
        return false;
    }
    let remote = Remote {
        address: packet.source,
        port: packet.source_port,
        protocol: packet.protocol,
    };
    let key = key(endpoint.ordinal, &remote, packet.destination_port);
    let flow = find(&key);
    if flow.is_null() {
        return false;
    }
    if !still_allowed(flow, endpoint, &remote) {
        // SAFETY: a live map value.
        unsafe { (*flow).cut = 1 };
        return false;
    }
    count_down(flow, ctx, packet);
    true
}

/// Whether the rules in force allow a flow's packets.
#[inline(always)]
pub fn still_allowed(flow: *mut Flow, endpoint: &Endpoint, remote: &Remote) -> bool {
    if rules::platform_denies(remote) {
        return false;
    }
    // SAFETY: a live map value.
    if unsafe { (*flow).policy } == endpoint.policy {
        return true;
    }
    matches!(rules::ruling(endpoint.policy, remote), Ruling::Pass(_))
}
