//! Handing a packet to one of netd's sockets, whatever its destination is: the packet keeps its original addresses,
//! and the socket it is accepted on reports them.

use core::ffi::c_void;

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_TCP_LISTEN, bpf_sock, bpf_sock_tuple, bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1,
        bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2,
    },
    helpers::{bpf_map_lookup_elem, bpf_sk_assign, bpf_sk_release, bpf_skc_lookup_tcp},
    programs::TcContext,
};

use crate::{maps::LISTENERS, packet::Packet};

/// `BPF_F_CURRENT_NETNS`.
const CURRENT_NETNS: u64 = u64::MAX;
const IPV4_TUPLE: u32 = size_of::<bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1>() as u32;
const IPV6_TUPLE: u32 = size_of::<bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2>() as u32;

/// The socket of netd that serves this packet's connection already; null when it has none. To be given to [`assign`].
#[inline(always)]
pub fn connection(ctx: &TcContext, packet: &Packet) -> *mut bpf_sock {
    // SAFETY: plain integers, of which zero is a value.
    let mut tuple: bpf_sock_tuple = unsafe { core::mem::zeroed() };
    let (sport, dport) = (packet.source_port.to_be(), packet.destination_port.to_be());
    let length = if packet.is_ipv6() {
        tuple.__bindgen_anon_1.ipv6 = bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2 {
            saddr: packet.source,
            daddr: packet.destination,
            sport,
            dport,
        };
        IPV6_TUPLE
    } else {
        tuple.__bindgen_anon_1.ipv4 = bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1 {
            saddr: packet.source[3],
            daddr: packet.destination[3],
            sport,
            dport,
        };
        IPV4_TUPLE
    };
    // SAFETY: a context, a tuple of the length given. The reference is released below or by `assign`.
    let socket = unsafe { bpf_skc_lookup_tcp(ctx.as_ptr(), &raw mut tuple, length, CURRENT_NETNS, 0) };
    if socket.is_null() {
        return socket;
    }
    // SAFETY: not null.
    if unsafe { (*socket).state } == BPF_TCP_LISTEN {
        // A listener at the destination itself: not one of ours, which are bound to loopback.
        // SAFETY: holds the reference.
        unsafe { bpf_sk_release(socket.cast()) };
        return core::ptr::null_mut();
    }
    socket
}

/// Gives the packet to a socket from [`connection`].
#[inline(always)]
pub fn assign(ctx: &TcContext, socket: *mut bpf_sock) -> bool {
    // SAFETY: not null, and its reference is held until the release.
    unsafe {
        let done = bpf_sk_assign(ctx.as_ptr(), socket.cast(), 0);
        bpf_sk_release(socket.cast());
        done == 0
    }
}

/// Gives the packet to one of netd's listening sockets; false when it is not there.
#[inline(always)]
pub fn to_listener(ctx: &TcContext, index: u32) -> bool {
    // Its state is not read here: the compiler would merge the load with the one in `connection`, and the verifier
    // refuses one instruction with two kinds of socket pointers.
    // SAFETY: the map and a key of its type. A socket from a SOCKMAP holds a reference.
    let socket: *mut bpf_sock = unsafe {
        bpf_map_lookup_elem(
            core::ptr::addr_of!(LISTENERS).cast_mut().cast::<c_void>(),
            core::ptr::from_ref(&index).cast::<c_void>(),
        )
    }
    .cast();
    !socket.is_null() && assign(ctx, socket)
}
