//! Addresses that carry another address: an IPv4 destination must not be reachable under an IPv6 spelling.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

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
