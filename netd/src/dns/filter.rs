//! Which addresses a sandbox may learn: none that it may not reach, whoever answers with them under whatever name (DNS
//! rebinding).

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use ipnet::IpNet;
use sandgate_policy::{Platform, faces};

use crate::nodeaddr::NodeAddresses;

/// A port as good as any where an exception names none.
const SOME_PORT: u16 = 443;

/// The addresses that nobody may learn.
pub struct Filter {
    platform: Arc<Platform>,
    node: NodeAddresses,
    sandboxes: Vec<IpNet>,
}

impl Filter {
    /// Withholds what the platform denies on every port, the node's addresses, and those of sandboxes.
    pub fn new(platform: Arc<Platform>, node: NodeAddresses, sandboxes: Vec<IpNet>) -> Self {
        Self {
            platform,
            node,
            sandboxes,
        }
    }

    /// Whether a sandbox may learn the address. Of an IPv6 address that carries an IPv4 address both must be allowed.
    pub fn lets_pass(&self, address: IpAddr) -> bool {
        // To every socket this is the IPv4 address, which has records of its own.
        let is_disguised = address.is_ipv6() && address.to_canonical().is_ipv4();
        let ours = |face: IpAddr| {
            self.node.contains(face) || self.sandboxes.iter().any(|range| range.contains(&face))
        };
        !is_disguised && !faces(address).any(ours) && opens_any_port(&self.platform, address)
    }
}

/// Whether some port of the address may be reached as far as the platform is concerned.
fn opens_any_port(platform: &Platform, address: IpAddr) -> bool {
    let opens = |port| !platform.denies(SocketAddr::new(address, port));
    let mut opened = platform.exceptions().iter().map(|exception| exception.port());
    opens(SOME_PORT) || opened.any(|port| opens(port.unwrap_or(SOME_PORT)))
}

#[cfg(test)]
mod tests {
    use sandgate_policy::PrivateException;

    use super::*;

    fn filter(exceptions: &str) -> Filter {
        let exceptions = PrivateException::parse_list(exceptions).expect("exceptions");
        let sandboxes = ["10.213.0.0/16", "fd53:4700::/64"].map(|range| range.parse().expect("a range"));
        Filter::new(
            Arc::new(Platform::new(exceptions)),
            NodeAddresses::default(),
            sandboxes.to_vec(),
        )
    }

    #[test]
    fn a_private_address_may_be_learnt_only_where_the_operator_opened_it() {
        let filter = filter("10.0.0.5/32:8443,10.1.0.0/16:*,[fd00:5::]/32:443,10.213.9.9/32:*");
        for (address, passes) in [
            ("203.0.113.10", true),
            ("10.0.0.5", true),
            ("10.1.2.3", true),
            ("10.0.0.6", false),
            ("10.213.9.9", false),
            ("127.0.0.1", false),
            ("169.254.169.254", false),
            ("0.0.0.0", false),
            ("2001:db8::1", true),
            ("fd00:5::1", true),
            ("fd00:6::1", false),
            ("fd53:4700::7", false),
            ("::1", false),
            ("::", false),
            ("fe80::5347:1", false),
            ("fd00:ec2::254", false),
        ] {
            assert_eq!(
                filter.lets_pass(address.parse().expect("an address")),
                passes,
                "{address}"
            );
        }
    }

    #[test]
    fn no_wrapping_hides_a_private_address() {
        let filter = filter("");
        for inner in ["10.0.0.5", "127.0.0.1", "169.254.169.254", "10.213.0.1"] {
            let inner: std::net::Ipv4Addr = inner.parse().expect("an address");
            let [a, b, c, d] = inner.octets();
            let flipped = !inner.to_bits();
            for wrapped in [
                format!("::ffff:{inner}"),
                format!("::{inner}"),
                format!("::ffff:0:{inner}"),
                format!("64:ff9b::{inner}"),
                format!("64:ff9b:1::{inner}"),
                format!("2002:{a:02x}{b:02x}:{c:02x}{d:02x}::1"),
                format!("2001:0:{a:02x}{b:02x}:{c:02x}{d:02x}::1"),
                format!("2001:0:cb00:710a::{:x}:{:x}", flipped >> 16, flipped & 0xffff),
            ] {
                let address: IpAddr = wrapped.parse().expect("an address");
                assert!(!filter.lets_pass(address), "{wrapped}");
            }
        }
        // Of a public address the forms that a network may carry pass, and the one that is no IPv6 at all does not.
        for (address, passes) in [("64:ff9b::203.0.113.10", true), ("::ffff:203.0.113.10", false)] {
            assert_eq!(
                filter.lets_pass(address.parse().expect("an address")),
                passes,
                "{address}"
            );
        }
    }
}
