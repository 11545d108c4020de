//! The wall: two classifiers on the router end of each sandbox's veth.
//!
//! `from_sandbox` (TCX ingress) judges every packet that a sandbox sends, `to_sandbox` (TCX egress) every packet that
//! would reach it. They know only what stands in the maps; an interface without an entry is shut both ways.
//! A packet goes to a socket of netd, is refused, is dropped, or, where address and port alone allow it and there is an
//! uplink, leaves through that; `from_uplink` (TCX ingress of the uplink) lets in what comes back.
#![no_std]
#![cfg_attr(target_arch = "bpf", no_main)]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]
#![cfg(target_arch = "bpf")]

mod context;
mod control;
mod events;
mod flows;
mod from_sandbox;
mod from_uplink;
mod maps;
mod packet;
mod rules;
mod steer;
mod to_sandbox;
mod uplink;

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // Unreachable: the verifier accepts no program that could get here.
    loop {}
}

/// The kernel lets only GPL-compatible programs use the socket helpers.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
