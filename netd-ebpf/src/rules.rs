//! What the tables say of a destination: the platform's ranges and the endpoint's policy.

use aya_ebpf::btf_maps::lpm_trie::Key;
use netd_common::{Address, MAPPED, POLICY_BITS, PolicyKey, action, limit, reason};

use crate::{
    maps::{PLATFORM, POLICIES},
    packet::{PROTOCOL_UDP, is_mapped},
};

const ADDRESS_BITS: u32 = 128;

/// A destination of some flow.
#[derive(Clone, Copy)]
pub struct Remote {
    pub address: Address,
    pub port: u16,
    pub protocol: u8,
}

/// What the policy says.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Ruling {
    Deny(u8),
    /// Address and port alone allow it. The reason for which tiers in audit mode deny it; 0 when none does.
    Pass(u8),
    /// `bound`: only to a bound address.
    Proxy {
        bound: bool,
    },
}

/// Whether nobody may reach it, under any address that something on the way might take out of it. The same forms as in
/// crates/policy/src/address.rs.
#[inline(always)]
pub fn platform_denies(remote: &Remote) -> bool {
    let address = &remote.address;
    if range_denies(address, remote.port) {
        return true;
    }
    if is_mapped(address) {
        return false;
    }
    let [first, second, third, fourth] = [
        u32::from_be(address[0]),
        u32::from_be(address[1]),
        u32::from_be(address[2]),
        u32::from_be(address[3]),
    ];
    let embedded = if first == 0 && second == 0 && (third == 0 || third == 0xffff_0000) {
        // IPv4-compatible (RFC 4291, 2.5.5.1), and translated (RFC 2765).
        fourth
    } else if first == 0x0064_ff9b && second == 0 && third == 0 {
        // NAT64 under the well-known prefix (RFC 6052).
        fourth
    } else if first >> 16 == 0x2002 {
        // 6to4 (RFC 3056).
        first << 16 | second >> 16
    } else if first == 0x2001_0000 {
        // Teredo (RFC 4380): the client with its bits flipped, and the server.
        if range_denies(&[0, 0, MAPPED, (!fourth).to_be()], remote.port) {
            return true;
        }
        second
    } else {
        return false;
    };
    range_denies(&[0, 0, MAPPED, embedded.to_be()], remote.port)
}

#[inline(always)]
fn range_denies(address: &Address, port: u16) -> bool {
    let Some(entry) = PLATFORM.get(&Key::new(ADDRESS_BITS, *address)) else {
        return false;
    };
    if entry.denied == 0 {
        return false;
    }
    for index in 0..limit::RANGES {
        if index as u32 >= entry.len {
            break;
        }
        let span = &entry.exceptions[index];
        if port >= span.first && port <= span.last {
            return false;
        }
    }
    true
}

/// What a policy says.
#[inline(always)]
pub fn ruling(policy: u32, remote: &Remote) -> Ruling {
    let unlisted = Ruling::Deny(if remote.protocol == PROTOCOL_UDP {
        reason::PROTOCOL_DENIED
    } else {
        reason::DEFAULT_DENY
    });
    let key = Key::new(
        POLICY_BITS + ADDRESS_BITS,
        PolicyKey {
            policy,
            address: remote.address,
        },
    );
    let Some(table) = POLICIES.get(&key) else {
        return unlisted;
    };
    for index in 0..limit::RANGES {
        if index as u32 >= table.len {
            break;
        }
        let range = &table.ranges[index];
        if remote.port >= range.first && remote.port <= range.last && remote.protocol == range.protocol {
            return match range.action {
                action::PASS => Ruling::Pass(0),
                action::AUDIT => Ruling::Pass(range.reason),
                action::PROXY => Ruling::Proxy { bound: false },
                action::PROXY_BOUND => Ruling::Proxy { bound: true },
                _ => Ruling::Deny(range.reason),
            };
        }
    }
    unlisted
}
