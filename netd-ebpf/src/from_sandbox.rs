//! What a sandbox sends.

use aya_ebpf::{
    bindings::{TC_ACT_OK, TC_ACT_SHOT, TC_ACT_UNSPEC},
    macros::classifier,
    programs::TcContext,
};
use netd_common::{
    BoundKey, Endpoint, GATEWAY, GATEWAY_MAC, InboundKey, NO_ADDRESS, SELF_TEST_PORT, Uplink, counter, limit,
    listener, mapped, mark, reason,
};

use crate::{
    control::{self, Way},
    events, flows,
    maps::{BOUND, ENDPOINTS, INBOUND, count},
    packet::{ETHERNET, Kind, PROTOCOL_UDP, Packet, Window, linearize, same},
    rules::{self, Remote, Ruling},
    steer, uplink,
};

const DNS: u16 = 53;

/// What becomes of a packet.
enum Verdict {
    /// Silently gone: nobody honest sends such.
    Drop(u8),
    /// Answered at once.
    Refuse(u8),
    /// Of a connection that netd opened inward.
    Inbound,
    /// Asks for the gateway's Ethernet address: the stack answers.
    Neighbour,
    /// To the TCP listener, or the connection it has accepted. `bound`: a new one only to a bound address. `open`: a new
    /// one at all.
    Proxy { bound: bool, open: bool },
    /// To a DNS socket.
    Dns,
    /// Out through the uplink, as part of its flow. The reason of tiers in audit mode; 0 when none denies it.
    Pass(&'static Uplink, u8),
    /// The same, an error about one.
    Error(&'static Uplink),
}

/// TCX ingress of the router end.
#[classifier]
pub fn from_sandbox(ctx: TcContext) -> i32 {
    linearize(&ctx);
    let mut packet = Packet::EMPTY;
    let kind = packet.read(&ctx);
    // SAFETY: the context of a classifier.
    let ifindex = unsafe { (*ctx.skb.skb).ifindex };
    // SAFETY: netd replaces whole entries and never writes into one.
    let Some(endpoint) = (unsafe { ENDPOINTS.get(ifindex) }) else {
        return drop(&ctx, 0, &packet, reason::UNKNOWN_SANDBOX);
    };
    let mut verdict = check(&ctx, &packet, endpoint, kind);
    if let Verdict::Pass(uplink, audit) = verdict {
        match pass(&ctx, &packet, endpoint, audit) {
            Ok(()) => {
                count(counter::PASSED, ctx.len());
                return uplink::leave(&ctx, uplink);
            }
            Err(other) => verdict = other,
        }
    }
    match verdict {
        Verdict::Refuse(code) => {
            cut(&packet, endpoint);
            refuse(&ctx, endpoint.ordinal, &packet, code)
        }
        Verdict::Inbound => {
            ctx.set_mark(mark::INBOUND);
            count(counter::INBOUND, ctx.len());
            // Programs behind this one may look at it too.
            TC_ACT_UNSPEC
        }
        Verdict::Neighbour => {
            // Routed to the local host, as the answer supposes.
            ctx.set_mark(mark::PROXY);
            TC_ACT_UNSPEC
        }
        Verdict::Proxy { bound, open } => proxy(&ctx, endpoint, &packet, bound, open),
        Verdict::Dns => dns(&ctx, endpoint, &packet),
        Verdict::Error(uplink) => {
            count(counter::PASSED, ctx.len());
            uplink::leave(&ctx, uplink)
        }
        Verdict::Drop(code) => drop(&ctx, endpoint.ordinal, &packet, code),
        Verdict::Pass(..) => drop(&ctx, endpoint.ordinal, &packet, reason::MALFORMED),
    }
}

#[inline(always)]
fn drop(ctx: &TcContext, ordinal: u32, packet: &Packet, code: u8) -> i32 {
    count(counter::DROPPED, ctx.len());
    events::denied(ctx, ordinal, packet, code);
    TC_ACT_SHOT as i32
}

/// Lets the stack answer with a reset or an ICMP error. The mark is all it needs: see netd's router/settings.rs.
#[inline(always)]
fn refuse(ctx: &TcContext, ordinal: u32, packet: &Packet, code: u8) -> i32 {
    ctx.set_mark(mark::REFUSE);
    count(counter::REFUSED, ctx.len());
    events::denied(ctx, ordinal, packet, code);
    TC_ACT_OK as i32
}

/// Checks that the packet is of this endpoint and of a kind that can be judged, and judges it.
#[inline(always)]
fn check(ctx: &TcContext, packet: &Packet, endpoint: &Endpoint, kind: Kind) -> Verdict {
    let Some(ethernet) = Window::<ETHERNET>::of(ctx) else {
        return Verdict::Drop(reason::MALFORMED);
    };
    if !ethernet.is_from(&endpoint.mac) {
        return Verdict::Drop(reason::SPOOFED_SOURCE);
    }
    let to_gateway = ethernet.is_to(&GATEWAY_MAC);
    if packet.is_ipv6() && same(&endpoint.address6, &NO_ADDRESS) {
        return Verdict::Drop(reason::PROTOCOL_DENIED);
    }
    if kind == Kind::Arp {
        return if control::is_gateway_arp(ctx, endpoint, Way::FromSandbox) {
            neighbour(endpoint)
        } else {
            Verdict::Drop(reason::PROTOCOL_DENIED)
        };
    }
    // Of other frames no address was read, and they are dropped for what they are.
    let own = if packet.is_ipv6() {
        &endpoint.address6
    } else {
        &endpoint.address
    };
    if !same(&packet.source, &NO_ADDRESS) && !same(&packet.source, own) {
        return Verdict::Drop(reason::SPOOFED_SOURCE);
    }
    match kind {
        // No source at all is another's too.
        Kind::Transport | Kind::Icmp if !same(&packet.source, own) => Verdict::Drop(reason::SPOOFED_SOURCE),
        Kind::Icmp if control::is_gateway_neighbour(ctx, endpoint, packet, Way::FromSandbox) => {
            neighbour(endpoint)
        }
        // The stack would ignore it, and a refusal would never be answered.
        Kind::Transport | Kind::Icmp if !to_gateway => Verdict::Drop(reason::PROTOCOL_DENIED),
        Kind::Transport => judge(packet, endpoint),
        Kind::Icmp => match uplink::for_endpoint(endpoint, packet.is_ipv6()) {
            Some(uplink) if control::is_error_of_flow(ctx, endpoint, packet, Way::FromSandbox) => {
                if control::within_controls(endpoint) {
                    Verdict::Error(uplink)
                } else {
                    Verdict::Drop(reason::QUOTA)
                }
            }
            Some(_) | None => Verdict::Drop(reason::PROTOCOL_DENIED),
        },
        Kind::Arp => Verdict::Drop(reason::PROTOCOL_DENIED),
        Kind::Unwanted(code) => Verdict::Drop(code),
    }
}

#[inline(always)]
fn neighbour(endpoint: &Endpoint) -> Verdict {
    if control::within_controls(endpoint) {
        Verdict::Neighbour
    } else {
        Verdict::Drop(reason::QUOTA)
    }
}

/// Decides by addresses and ports.
#[inline(always)]
fn judge(packet: &Packet, endpoint: &Endpoint) -> Verdict {
    let tcp = packet.is_tcp();
    // A sandbox only ever answers on such a connection; one that it opens itself is judged like any other.
    if tcp && !packet.opens() && !packet.is_ipv6() {
        let key = InboundKey {
            ordinal: endpoint.ordinal,
            local_address: packet.destination[3],
            local_port: packet.destination_port,
            sandbox_port: packet.source_port,
        };
        // SAFETY: the value is not read.
        if unsafe { INBOUND.get(key) }.is_some() {
            return Verdict::Inbound;
        }
    }
    // A socket cannot answer from a link-local address without its interface, so nobody serves one: refused below.
    if packet.destination_port == DNS && !is_link_local6(packet) {
        return Verdict::Dns;
    }
    // netd's own host, where a sandbox checks what it trusts: no policy is asked, and nothing is dialled for it.
    if tcp && packet.destination_port == SELF_TEST_PORT && same(&packet.destination, &mapped(GATEWAY)) {
        return Verdict::Proxy {
            bound: false,
            open: true,
        };
    }
    let remote = remote(packet);
    if rules::platform_denies(&remote) {
        return Verdict::Refuse(reason::PLATFORM_DENIED);
    }
    match rules::ruling(endpoint.policy, &remote) {
        Ruling::Deny(code) => Verdict::Refuse(code),
        // Nobody reads datagrams.
        Ruling::Proxy { .. } if !tcp => Verdict::Refuse(reason::PROTOCOL_DENIED),
        Ruling::Proxy { bound } => Verdict::Proxy { bound, open: true },
        Ruling::Pass(audit) => match uplink::for_endpoint(endpoint, packet.is_ipv6()) {
            Some(uplink) => Verdict::Pass(uplink, audit),
            None if tcp => Verdict::Proxy {
                bound: false,
                open: true,
            },
            None => Verdict::Refuse(reason::PROTOCOL_DENIED),
        },
    }
}

/// fe80::/10 (RFC 4291, 2.5.6).
#[inline(always)]
fn is_link_local6(packet: &Packet) -> bool {
    packet.is_ipv6() && u32::from_be(packet.destination[0]) >> 22 == 0xfe80 >> 6
}

#[inline(always)]
fn remote(packet: &Packet) -> Remote {
    Remote {
        address: packet.destination,
        port: packet.destination_port,
        protocol: packet.protocol,
    }
}

/// Finds or makes the flow of a packet that the policy lets pass; else what becomes of it.
#[inline(always)]
fn pass(ctx: &TcContext, packet: &Packet, endpoint: &Endpoint, audit: u8) -> Result<(), Verdict> {
    let key = flows::key(endpoint.ordinal, &remote(packet), packet.source_port);
    let flow = flows::find(&key);
    if !flow.is_null() {
        flows::count_up(flow, ctx, packet, endpoint.policy);
        return Ok(());
    }
    if packet.is_tcp() && !packet.opens() {
        // It may be of a connection that netd took while there was no uplink, or under another policy.
        return Err(Verdict::Proxy {
            bound: false,
            open: false,
        });
    }
    if endpoint.no_new_flows != 0
        || !within_flows(endpoint)
        || !flows::open(&key, ctx, endpoint, &packet.source)
    {
        return Err(Verdict::Refuse(reason::QUOTA));
    }
    if audit != 0 {
        events::audited(ctx, endpoint.ordinal, packet, audit);
    }
    Ok(())
}

/// Ends the flow that a packet belongs to which no rule lets pass any more.
#[inline(always)]
fn cut(packet: &Packet, endpoint: &Endpoint) {
    if !packet.opens() {
        flows::cut(&flows::key(endpoint.ordinal, &remote(packet), packet.source_port));
    }
}

/// Redirects a TCP packet that the policy allows.
#[inline(always)]
fn proxy(ctx: &TcContext, endpoint: &Endpoint, packet: &Packet, bound: bool, open: bool) -> i32 {
    let socket = steer::connection(ctx, packet);
    let given = if socket.is_null() {
        cut(packet, endpoint);
        if !open {
            return refuse(ctx, endpoint.ordinal, packet, reason::PROTOCOL_DENIED);
        }
        // No connection yet. The address is asked for only here: one that is open outlives its pin.
        if bound && !is_bound(endpoint, packet) {
            return refuse(ctx, endpoint.ordinal, packet, reason::ADDRESS_NOT_BOUND);
        }
        if packet.opens() && !within_flows(endpoint) {
            return refuse(ctx, endpoint.ordinal, packet, reason::QUOTA);
        }
        steer::to_listener(ctx, of_family(packet, listener::TCP, listener::TCP6))
    } else {
        steer::assign(ctx, socket)
    };
    finish(ctx, endpoint, packet, given, counter::STEERED)
}

/// Redirects a packet for port 53 of any address.
#[inline(always)]
fn dns(ctx: &TcContext, endpoint: &Endpoint, packet: &Packet) -> i32 {
    if packet.protocol == PROTOCOL_UDP {
        if !within_queries(endpoint) {
            return refuse(ctx, endpoint.ordinal, packet, reason::QUOTA);
        }
        let index = of_family(packet, listener::DNS_UDP, listener::DNS_UDP6);
        let given = steer::to_listener(ctx, index);
        return finish(ctx, endpoint, packet, given, counter::DNS);
    }
    let socket = steer::connection(ctx, packet);
    let given = if socket.is_null() {
        if packet.opens() && !within_flows(endpoint) {
            return refuse(ctx, endpoint.ordinal, packet, reason::QUOTA);
        }
        steer::to_listener(ctx, of_family(packet, listener::DNS_TCP, listener::DNS_TCP6))
    } else {
        steer::assign(ctx, socket)
    };
    finish(ctx, endpoint, packet, given, counter::DNS)
}

/// Ends a redirect: with the mark that routes the packet to the local host, or, when netd has no socket for it, with
/// a refusal.
#[inline(always)]
fn finish(ctx: &TcContext, endpoint: &Endpoint, packet: &Packet, given: bool, counted: u32) -> i32 {
    if given {
        ctx.set_mark(mark::PROXY);
        count(counted, ctx.len());
        return TC_ACT_OK as i32;
    }
    count(counter::NO_LISTENER, ctx.len());
    refuse(ctx, endpoint.ordinal, packet, reason::NO_LISTENER)
}

#[inline(always)]
fn of_family(packet: &Packet, ipv4: u32, ipv6: u32) -> u32 {
    if packet.is_ipv6() { ipv6 } else { ipv4 }
}

#[inline(always)]
fn is_bound(endpoint: &Endpoint, packet: &Packet) -> bool {
    let key = BoundKey {
        ordinal: endpoint.ordinal,
        address: packet.destination,
    };
    // SAFETY: the value is not read.
    unsafe { BOUND.get(key) }.is_some()
}

#[inline(always)]
fn within_flows(endpoint: &Endpoint) -> bool {
    let Some((throttle, _)) = events::throttle(endpoint.ordinal) else {
        return false;
    };
    // SAFETY: a live map value; a lost increment lets one more through.
    unsafe {
        (*throttle).flows += 1;
        (*throttle).flows <= limit::FLOWS_PER_WINDOW
    }
}

#[inline(always)]
fn within_queries(endpoint: &Endpoint) -> bool {
    let Some((throttle, _)) = events::throttle(endpoint.ordinal) else {
        return false;
    };
    // SAFETY: as above.
    unsafe {
        (*throttle).queries += 1;
        (*throttle).queries <= limit::QUERIES_PER_WINDOW
    }
}
