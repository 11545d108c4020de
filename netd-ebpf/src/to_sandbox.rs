//! What would reach a sandbox.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC},
    helpers::bpf_get_socket_cookie,
    macros::classifier,
    programs::TcContext,
};
use netd_common::{Endpoint, InboundKey, counter, mark};

use crate::{
    maps::{ENDPOINTS, INBOUND, count},
    packet::{
        ETHERNET, ETHERTYPE_IPV4, Headers, IPV4, IPV4_PLAIN, PROTOCOL_ICMP, PROTOCOL_TCP, PROTOCOL_UDP,
        Packet, at, linearize,
    },
};

const DNS: u16 = 53;
const ICMP_UNREACHABLE: u8 = 3;

/// TCX egress of the router end.
#[classifier]
pub fn to_sandbox(ctx: TcContext) -> i32 {
    linearize(&ctx);
    // SAFETY: the context of a classifier.
    let (ifindex, marked) = unsafe { ((*ctx.skb.skb).ifindex, (*ctx.skb.skb).mark) };
    // SAFETY: netd replaces whole entries and never writes into one.
    let admitted = match unsafe { ENDPOINTS.get(ifindex) } {
        Some(endpoint) => admits(&ctx, endpoint, marked).is_some(),
        None => false,
    };
    if admitted {
        count(counter::DELIVERED, ctx.len());
        // Programs behind this one may look at it too.
        TC_ACT_UNSPEC
    } else {
        count(counter::UNADMITTED, ctx.len());
        TC_ACT_SHOT as i32
    }
}

/// A mark admits only what its owner would send, so that a socket that got hold of one opens nothing.
#[inline(always)]
fn admits(ctx: &TcContext, endpoint: &Endpoint, marked: u32) -> Option<()> {
    let headers = Headers::of(ctx)?;
    if headers.ethertype() != ETHERTYPE_IPV4
        || headers.first_byte() != IPV4_PLAIN
        || headers.is_fragment()
        || headers.destination() != endpoint.address
    {
        return None;
    }
    let mut packet = Packet {
        protocol: headers.protocol(),
        source: headers.source(),
        destination: headers.destination(),
        ..Packet::EMPTY
    };
    if packet.protocol == PROTOCOL_ICMP {
        let kind: u8 = at(ctx, ETHERNET + IPV4)?;
        // The kernel's answer to a refused datagram reflects its mark.
        return (marked == mark::REFUSE && kind == ICMP_UNREACHABLE).then_some(());
    }
    if packet.protocol != PROTOCOL_TCP && packet.protocol != PROTOCOL_UDP {
        return None;
    }
    packet.read_ports(ctx)?;
    if packet.protocol == PROTOCOL_UDP {
        return (marked == mark::NETD && packet.source_port == DNS).then_some(());
    }
    // TCP. netd's transparent sockets never open a connection, and neither does the kernel when it answers a packet
    // of one (resets and late acknowledgements, with the mark of what they answer).
    if (marked == mark::NETD || marked == mark::PROXY) && !packet.opens() {
        return Some(());
    }
    if marked == mark::REFUSE && packet.resets() {
        return Some(());
    }
    let key = InboundKey {
        ordinal: endpoint.ordinal,
        local_address: packet.source,
        local_port: packet.source_port,
        sandbox_port: packet.destination_port,
    };
    // SAFETY: netd replaces whole entries and never writes into one.
    let admitted = *unsafe { INBOUND.get(key) }?;
    // SAFETY: the context of a classifier.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    // An entry outlives its connection by seconds. In that time its port is free, and may become that of a socket
    // which was passed on and disconnected: opening is for the socket that netd admitted.
    (!packet.opens() || cookie == admitted).then_some(())
}
