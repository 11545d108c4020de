//! The IPv6 addresses of local sandboxes, `SANDGATE_SANDBOX_CIDR6`, as controller and netd must agree on them. Pure:
//! whether the node has IPv6 at all is for the controller to find out.

use ipnet::Ipv6Net;

/// Longest and shortest prefix: beneath it there is room for as many sandboxes as in the largest IPv4 range.
const PREFIXES: std::ops::RangeInclusive<u8> = 48..=112;
/// Unique local addresses, RFC 4193: nobody outside this machine may have the same.
const UNIQUE_LOCAL: Ipv6Net = Ipv6Net::new_assert(std::net::Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, 0, 0), 7);
/// Where the range of an instance is that was told nothing: one /64 of fd53:4700::/32.
const USUAL: u128 = 0xfd53_4700 << 96;

/// Where the IPv6 addresses of an instance's sandboxes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Range6 {
    /// Sandboxes have no IPv6.
    Off,
    /// Told nothing: sandboxes have addresses of this range when the node has an IPv6 default route.
    Usual(Ipv6Net),
    /// Sandboxes have addresses of this range, whatever the node has.
    Chosen(Ipv6Net),
}

/// Not a range for sandboxes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "expected `off` or a unique local IPv6 network (fc00::/7) with a prefix between 48 and 112, for example fd12:3456:789a:1::/64, got `{0}`"
)]
pub struct InvalidRange6(String);

impl Range6 {
    /// Reads the variable. Empty, it stands for a /64 that is the instance's own as far as `instance` (its run
    /// directory) tells it from others.
    ///
    /// # Errors
    /// When it is neither `off` nor such a range.
    pub fn parse(text: &str, instance: &[u8]) -> Result<Self, InvalidRange6> {
        let invalid = || InvalidRange6(text.to_owned());
        match text {
            "" => Ok(Self::Usual(usual(instance))),
            "off" => Ok(Self::Off),
            text => {
                let range: Ipv6Net = text.parse().map_err(|_not_one| invalid())?;
                let fits = range.trunc() == range
                    && PREFIXES.contains(&range.prefix_len())
                    && UNIQUE_LOCAL.contains(&range);
                fits.then_some(Self::Chosen(range)).ok_or_else(invalid)
            }
        }
    }

    /// The range, also where the node may have no IPv6: other sandboxes lie in it.
    pub fn network(self) -> Option<Ipv6Net> {
        match self {
            Self::Off => None,
            Self::Usual(range) | Self::Chosen(range) => Some(range),
        }
    }
}

/// A /64 by the FNV-1a hash of the instance's name: it must be the same in every program and version.
fn usual(instance: &[u8]) -> Ipv6Net {
    let hash = instance.iter().fold(0x811c_9dc5_u32, |hash, byte| {
        (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193)
    });
    let network = USUAL | (u128::from(hash) << 64);
    Ipv6Net::new_assert(network.into(), 64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instance_that_is_told_nothing_has_a_range_of_its_own_each_time() {
        let one = Range6::parse("", b"/run/sandgate").expect("usual");
        assert_eq!(Range6::parse("", b"/run/sandgate"), Ok(one));
        assert_ne!(Range6::parse("", b"/run/another"), Ok(one));
        let range = one.network().expect("a range");
        let all: Ipv6Net = "fd53:4700::/32".parse().expect("a network");
        assert!(all.contains(&range) && range.prefix_len() == 64, "{range}");
        // Changing it would strand the sandboxes of an instance that is upgraded.
        assert_eq!(range.to_string(), "fd53:4700:957b:c4e5::/64");
    }

    #[test]
    fn what_is_chosen_is_a_unique_local_network_or_off() {
        let range = |text| Range6::parse(text, b"x");
        assert_eq!(range("off"), Ok(Range6::Off));
        let chosen = "fd00:1::/48".parse().expect("a network");
        assert_eq!(range("fd00:1::/48"), Ok(Range6::Chosen(chosen)));
        for wrong in [
            "on",
            "fd00:1::",
            "fd00:1::1/64",
            "fd00::/40",
            "fd00::/113",
            "2001:db8::/64",
            "fe80::/64",
            "10.0.0.0/16",
        ] {
            let error = range(wrong).expect_err(wrong).to_string();
            assert!(error.contains(wrong), "{error}");
        }
    }
}
