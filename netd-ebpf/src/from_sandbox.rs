//! What a sandbox sends.

use aya_ebpf::{
    bindings::{TC_ACT_OK, TC_ACT_SHOT, TC_ACT_UNSPEC},
    btf_maps::lpm_trie::Key,
    macros::classifier,
    programs::TcContext,
};
use netd_common::{
    BoundKey, Endpoint, GATEWAY, GATEWAY_MAC, InboundKey, POLICY_BITS, PolicyKey, SELF_TEST_PORT, action,
    counter, limit, listener, mark, reason, wire,
};

use crate::{
    events,
    maps::{BOUND, ENDPOINTS, INBOUND, PLATFORM, POLICIES, count},
    packet::{ETHERNET, ETHERTYPE_IPV4, Headers, IPV4_PLAIN, PROTOCOL_TCP, PROTOCOL_UDP, Packet, linearize},
    steer,
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
    /// To the TCP listener, or the connection it has accepted. `bound`: a new one only to a bound address.
    Proxy { bound: bool },
    /// To a DNS socket.
    Dns,
}

/// TCX ingress of the router end.
#[classifier]
pub fn from_sandbox(ctx: TcContext) -> i32 {
    linearize(&ctx);
    let mut packet = Packet::EMPTY;
    // SAFETY: the context of a classifier.
    let ifindex = unsafe { (*ctx.skb.skb).ifindex };
    // SAFETY: netd replaces whole entries and never writes into one.
    let Some(endpoint) = (unsafe { ENDPOINTS.get(ifindex) }) else {
        // What can be read is read, for the event alone.
        if let Some(headers) = Headers::of(&ctx) {
            let _verdict = read(&ctx, headers, &mut packet);
        }
        return drop(&ctx, 0, &packet, reason::UNKNOWN_SANDBOX);
    };
    let verdict = match check(&ctx, &mut packet, endpoint) {
        Ok(()) => judge(&packet, endpoint),
        Err(code) => Verdict::Drop(code),
    };
    match verdict {
        Verdict::Drop(code) => drop(&ctx, endpoint.ordinal, &packet, code),
        Verdict::Refuse(code) => refuse(&ctx, endpoint.ordinal, &packet, code),
        Verdict::Inbound => {
            ctx.set_mark(mark::INBOUND);
            count(counter::INBOUND, ctx.len());
            // Programs behind this one may look at it too.
            TC_ACT_UNSPEC
        }
        Verdict::Proxy { bound } => proxy(&ctx, endpoint, &packet, bound),
        Verdict::Dns => dns(&ctx, endpoint, &packet),
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

/// Reads the headers; `Err` says why the packet must be dropped whoever sent it.
#[inline(always)]
fn read(ctx: &TcContext, headers: Headers, packet: &mut Packet) -> Result<(), u8> {
    packet.ethertype = headers.ethertype();
    // SAFETY: the context of a classifier. A tag may have been moved out of the frame into the buffer's description.
    if packet.ethertype != ETHERTYPE_IPV4 || unsafe { (*ctx.skb.skb).vlan_present } != 0 {
        return Err(reason::PROTOCOL_DENIED);
    }
    packet.protocol = headers.protocol();
    packet.source = headers.source();
    packet.destination = headers.destination();
    let first = headers.first_byte();
    if first != IPV4_PLAIN {
        // Another version than the frame says is nonsense; options are only refused.
        let options = first >> 4 == 4 && first > IPV4_PLAIN;
        return Err(if options {
            reason::PROTOCOL_DENIED
        } else {
            reason::MALFORMED
        });
    }
    if headers.is_fragment() {
        return Err(reason::FRAGMENT);
    }
    // What the length field does not cover, the stack cuts off: the ports must lie before that.
    let shortest = match packet.protocol {
        PROTOCOL_TCP => 40,
        PROTOCOL_UDP => 28,
        _ => return Err(reason::PROTOCOL_DENIED),
    };
    let length = headers.total_length();
    if length < shortest || ETHERNET as u32 + u32::from(length) > ctx.len() {
        return Err(reason::MALFORMED);
    }
    packet.read_ports(ctx).ok_or(reason::MALFORMED)
}

/// Reads the headers and checks that the packet is of this endpoint and of a kind that can be judged.
#[inline(always)]
fn check(ctx: &TcContext, packet: &mut Packet, endpoint: &Endpoint) -> Result<(), u8> {
    let headers = Headers::of(ctx).ok_or(reason::MALFORMED)?;
    let readable = read(ctx, headers, packet);
    if !headers.is_from(&endpoint.mac) {
        return Err(reason::SPOOFED_SOURCE);
    }
    // Of frames that are not IPv4 no address was read, and they are dropped for what they are.
    if packet.ethertype == ETHERTYPE_IPV4 && packet.source != endpoint.address {
        return Err(reason::SPOOFED_SOURCE);
    }
    readable?;
    if !headers.is_to(&GATEWAY_MAC) {
        // The stack would ignore it, and a refusal would never be answered.
        return Err(reason::PROTOCOL_DENIED);
    }
    Ok(())
}

/// Decides by addresses and ports.
#[inline(always)]
fn judge(packet: &Packet, endpoint: &Endpoint) -> Verdict {
    let tcp = packet.protocol == PROTOCOL_TCP;
    // A sandbox only ever answers on such a connection; one that it opens itself is judged like any other.
    if tcp && !packet.opens() {
        let key = InboundKey {
            ordinal: endpoint.ordinal,
            local_address: packet.destination,
            local_port: packet.destination_port,
            sandbox_port: packet.source_port,
        };
        // SAFETY: the value is not read.
        if unsafe { INBOUND.get(key) }.is_some() {
            return Verdict::Inbound;
        }
    }
    if packet.destination_port == DNS {
        return Verdict::Dns;
    }
    // netd's own host, where a sandbox checks what it trusts: no policy is asked, and nothing is dialled for it.
    if tcp && packet.destination == wire(GATEWAY) && packet.destination_port == SELF_TEST_PORT {
        return Verdict::Proxy { bound: false };
    }
    if platform_denies(packet) {
        return Verdict::Refuse(reason::PLATFORM_DENIED);
    }
    if !tcp {
        return Verdict::Refuse(reason::PROTOCOL_DENIED);
    }
    let key = Key::new(
        POLICY_BITS + 32,
        PolicyKey {
            policy: endpoint.policy,
            address: packet.destination,
        },
    );
    let Some(table) = POLICIES.get(&key) else {
        return Verdict::Refuse(reason::DEFAULT_DENY);
    };
    for index in 0..limit::RANGES {
        if index as u32 >= table.len {
            break;
        }
        let range = &table.ranges[index];
        if packet.destination_port >= range.first && packet.destination_port <= range.last {
            return match range.action {
                action::PASS | action::PROXY => Verdict::Proxy { bound: false },
                action::PROXY_BOUND => Verdict::Proxy { bound: true },
                _ => Verdict::Refuse(range.reason),
            };
        }
    }
    Verdict::Refuse(reason::DEFAULT_DENY)
}

/// Whether nobody may reach the destination. Exceptions are for TCP.
#[inline(always)]
fn platform_denies(packet: &Packet) -> bool {
    let Some(entry) = PLATFORM.get(&Key::new(32, packet.destination)) else {
        return false;
    };
    if entry.denied == 0 {
        return false;
    }
    if packet.protocol == PROTOCOL_TCP {
        for index in 0..limit::RANGES {
            if index as u32 >= entry.len {
                break;
            }
            let span = &entry.exceptions[index];
            if packet.destination_port >= span.first && packet.destination_port <= span.last {
                return false;
            }
        }
    }
    true
}

/// Redirects a TCP packet that the policy allows.
#[inline(always)]
fn proxy(ctx: &TcContext, endpoint: &Endpoint, packet: &Packet, bound: bool) -> i32 {
    let socket = steer::connection(ctx, packet);
    let given = if socket.is_null() {
        // No connection yet. The address is asked for only here: one that is open outlives its pin.
        if bound && !is_bound(endpoint, packet) {
            return refuse(ctx, endpoint.ordinal, packet, reason::ADDRESS_NOT_BOUND);
        }
        if packet.opens() && !within_flows(endpoint) {
            return refuse(ctx, endpoint.ordinal, packet, reason::QUOTA);
        }
        steer::to_listener(ctx, listener::TCP)
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
        let given = steer::to_listener(ctx, listener::DNS_UDP);
        return finish(ctx, endpoint, packet, given, counter::DNS);
    }
    let socket = steer::connection(ctx, packet);
    let given = if socket.is_null() {
        if packet.opens() && !within_flows(endpoint) {
            return refuse(ctx, endpoint.ordinal, packet, reason::QUOTA);
        }
        steer::to_listener(ctx, listener::DNS_TCP)
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
