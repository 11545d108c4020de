//! Addresses and prefixes of both families as the kernel's maps hold them, and back.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv6Net};
use netd_common::{Address, MAPPED_BITS, mapped, octets, wire6};

/// As the maps hold it. `::ffff:a.b.c.d` is the IPv4 address.
pub(super) fn to_wire(address: IpAddr) -> Address {
    match address {
        IpAddr::V4(address) => mapped(address.octets()),
        IpAddr::V6(address) => wire6(address.octets()),
    }
}

/// The address itself.
pub(super) fn from_wire(address: Address) -> IpAddr {
    IpAddr::V6(Ipv6Addr::from(octets(address))).to_canonical()
}

/// The IPv4 address of an entry that holds one; unspecified for another.
pub(super) fn ipv4_from_wire(address: Address) -> Ipv4Addr {
    match from_wire(address) {
        IpAddr::V4(address) => address,
        IpAddr::V6(_) => Ipv4Addr::UNSPECIFIED,
    }
}

/// The prefix in the one space of both families. `None`: an IPv6 prefix within that of the IPv4 addresses, which no
/// packet can match.
pub(super) fn in_one_space(prefix: IpNet) -> Option<Ipv6Net> {
    match prefix.trunc() {
        IpNet::V4(prefix) => Some(Ipv6Net::new_assert(
            prefix.addr().to_ipv6_mapped(),
            prefix.prefix_len() + MAPPED_BITS,
        )),
        IpNet::V6(prefix) => (!ipv4_space().contains(&prefix)).then_some(prefix),
    }
}

/// All IPv4 addresses.
pub(super) fn ipv4_space() -> Ipv6Net {
    Ipv6Net::new_assert(Ipv4Addr::UNSPECIFIED.to_ipv6_mapped(), MAPPED_BITS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_families_come_back_as_they_were() {
        for text in ["192.0.2.7", "0.0.0.0", "2001:db8::7", "::", "fe80::5347:1"] {
            let address: IpAddr = text.parse().unwrap();
            assert_eq!(from_wire(to_wire(address)), address);
        }
        assert_eq!(
            to_wire("::ffff:192.0.2.7".parse().unwrap()),
            to_wire("192.0.2.7".parse().unwrap())
        );
    }

    #[test]
    fn prefixes_of_the_families_do_not_meet() {
        let space = |text: &str| in_one_space(text.parse().unwrap());
        assert_eq!(space("10.1.2.3/8").unwrap().to_string(), "::ffff:10.0.0.0/104");
        assert_eq!(space("0.0.0.0/0"), Some(ipv4_space()));
        assert_eq!(space("2001:db8::/32").unwrap().to_string(), "2001:db8::/32");
        assert_eq!(space("::/0").unwrap().prefix_len(), 0);
        assert_eq!(space("::ffff:10.0.0.0/104"), None);
        assert_eq!(space("::ffff:0:0/96"), None);
    }
}
