//! The wall: two classifiers on the router end of each sandbox's veth.
//!
//! `from_sandbox` (TCX ingress) judges every packet that a sandbox sends, `to_sandbox` (TCX egress) every packet that
//! would reach it. They know only what stands in the maps; an interface without an entry is shut both ways.
//! Nothing here is ever forwarded by the kernel: a packet goes to a socket of netd, is refused, or is dropped.
#![no_std]
#![cfg_attr(target_arch = "bpf", no_main)]
#![cfg(target_arch = "bpf")]

mod events;
mod from_sandbox;
mod maps;
mod packet;
mod steer;
mod to_sandbox;

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // Unreachable: the verifier accepts no program that could get here.
    loop {}
}

/// The kernel lets only GPL-compatible programs use the socket helpers.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
