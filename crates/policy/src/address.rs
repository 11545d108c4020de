//! Addresses that carry another address: an IPv4 destination must not be reachable under an IPv6 spelling.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv6Net};

/// The address itself: `::ffff:a.b.c.d` is the IPv4 address, to every socket.
pub(crate) fn canonical(address: IpAddr) -> IpAddr {
    address.to_canonical()
}

/// The address in canonical form, and every IPv4 address that something on the way might take out of it.
pub fn faces(address: IpAddr) -> impl Iterator<Item = IpAddr> + Clone {
    let address = canonical(address);
    let inner = match address {
        IpAddr::V4(_) => [None, None],
        IpAddr::V6(outer) => embedded(outer),
    };
    [Some(address)]
        .into_iter()
        .chain(inner.map(|inner| inner.map(IpAddr::V4)))
        .flatten()
}

/// The ranges whose addresses carry an IPv4 address, but for `::ffff:0:0/96`, which is IPv4 itself. None contains
/// another.
pub(crate) const WRAPPING: [Ipv6Net; 5] = [
    wrapping([0, 0, 0, 0, 0, 0, 0, 0], 96),
    wrapping([0, 0, 0, 0, 0xffff, 0, 0, 0], 96),
    wrapping([0x64, 0xff9b, 0, 0, 0, 0, 0, 0], 96),
    wrapping([0x2001, 0, 0, 0, 0, 0, 0, 0], 32),
    wrapping([0x2002, 0, 0, 0, 0, 0, 0, 0], 16),
];

const fn wrapping(segments: [u16; 8], length: u8) -> Ipv6Net {
    let [a, b, c, d, e, f, g, h] = segments;
    Ipv6Net::new_assert(Ipv6Addr::new(a, b, c, d, e, f, g, h), length)
}

/// Whether every address of the range, which may be one address, is an IPv6 address that carries an IPv4 address.
pub(crate) fn wraps(range: &IpNet) -> bool {
    match range {
        IpNet::V4(_) => false,
        IpNet::V6(range) => WRAPPING.iter().any(|wrapping| wrapping.contains(range)),
    }
}

fn embedded(outer: Ipv6Addr) -> [Option<Ipv4Addr>; 2] {
    let bytes = outer.octets();
    let at = |start: usize| {
        Some(Ipv4Addr::new(
            bytes[start],
            bytes[start + 1],
            bytes[start + 2],
            bytes[start + 3],
        ))
    };
    match outer.segments() {
        // IPv4-compatible (RFC 4291, 2.5.5.1), and translated (RFC 2765).
        [0, 0, 0, 0, 0, 0, _, _] | [0, 0, 0, 0, 0xffff, 0, _, _] => [at(12), None],
        // NAT64 under the well-known prefix (RFC 6052). The local-use prefix 64:ff9b:1::/48 is denied whole.
        [0x64, 0xff9b, 0, 0, 0, 0, _, _] => [at(12), None],
        // 6to4 (RFC 3056).
        [0x2002, ..] => [at(2), None],
        // Teredo (RFC 4380): the server, and the client with its bits flipped.
        [0x2001, 0, ..] => [
            at(4),
            at(12).map(|flipped| Ipv4Addr::from_bits(!flipped.to_bits())),
        ],
        _ => [None, None],
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn an_address_carries_another_exactly_in_the_wrapping_ranges(bytes in any::<[u8; 16]>(), range in 0usize..6) {
            let mut bytes = bytes;
            if let Some(range) = WRAPPING.get(range) {
                let length = usize::from(range.prefix_len() / 8);
                bytes[..length].copy_from_slice(&range.network().octets()[..length]);
            }
            let address = IpAddr::from(bytes).to_canonical();
            prop_assert_eq!(wraps(&IpNet::from(address)), faces(address).count() > 1, "{}", address);
        }
    }
}
