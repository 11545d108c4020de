//! Ranges that no sandbox may reach, whatever its policy says, and the operator's exceptions.

mod own;

use std::{
    net::{IpAddr, SocketAddr},
    num::NonZeroU16,
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

pub use self::own::{DeniedRangeError, DeniedRanges};
use crate::{
    address,
    document::{Action, Policy},
    error::PolicyError,
};

const fn v4(a: u8, b: u8, c: u8, d: u8, length: u8) -> Ipv4Net {
    Ipv4Net::new_assert(std::net::Ipv4Addr::new(a, b, c, d), length)
}

const fn v6(segments: [u16; 8], length: u8) -> Ipv6Net {
    let [a, b, c, d, e, f, g, h] = segments;
    Ipv6Net::new_assert(std::net::Ipv6Addr::new(a, b, c, d, e, f, g, h), length)
}

/// From the IANA registry of special-purpose addresses; the documentation ranges are deliberately not among them.
const DENIED4: &[Ipv4Net] = &[
    v4(0, 0, 0, 0, 8),
    v4(10, 0, 0, 0, 8),
    v4(100, 64, 0, 0, 10),
    v4(127, 0, 0, 0, 8),
    v4(168, 63, 129, 16, 32), // metadata and DNS of Azure
    v4(169, 254, 0, 0, 16),
    v4(172, 16, 0, 0, 12),
    v4(192, 0, 0, 0, 24),
    v4(192, 168, 0, 0, 16),
    v4(198, 18, 0, 0, 15),
    v4(224, 0, 0, 0, 4),
    v4(240, 0, 0, 0, 4),
];

const DENIED6: &[Ipv6Net] = &[
    v6([0, 0, 0, 0, 0, 0, 0, 0], 128),
    v6([0, 0, 0, 0, 0, 0, 0, 1], 128),
    v6([0x64, 0xff9b, 1, 0, 0, 0, 0, 0], 48), // local NAT64 (RFC 8215): where the IPv4 address stands is not known
    v6([0xfc00, 0, 0, 0, 0, 0, 0, 0], 7),
    v6([0xfe80, 0, 0, 0, 0, 0, 0, 0], 10),
    v6([0xfec0, 0, 0, 0, 0, 0, 0, 0], 10),
    v6([0xff00, 0, 0, 0, 0, 0, 0, 0], 8),
];

/// The IPv4 ranges that are always denied, in order, disjoint.
pub const fn always_denied4() -> &'static [Ipv4Net] {
    DENIED4
}

/// The IPv6 ranges that are always denied, in order, disjoint. IPv6 addresses that carry a denied IPv4 address are
/// denied too; [`Platform::denies`] unwraps them.
pub const fn always_denied6() -> &'static [Ipv6Net] {
    DENIED6
}

/// A part of the denied ranges that the operator opened: `SANDGATE_ALLOW_PRIVATE`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PrivateException {
    /// The addresses. Always inside one denied range.
    network: IpNet,
    /// The port; `None` is every port.
    port: Option<NonZeroU16>,
}

/// `SANDGATE_ALLOW_PRIVATE` is not a list of exceptions.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExceptionError {
    /// The entry has not the form of an exception.
    #[error("`{0}`: expected CIDR:PORT, such as 10.0.0.5/32:443, 10.1.0.0/16:* or [fd00::]/8:443")]
    Form(String),
    /// The range has bits beyond its prefix length: which range is meant is not clear.
    #[error("`{entry}` has bits beyond its prefix length; the range is {range}")]
    HostBits {
        /// The entry.
        entry: String,
        /// What it would be without these bits.
        range: IpNet,
    },
    /// Nothing denies the range, so it cannot be opened; a policy decides about it.
    #[error("`{0}` is not inside one of the ranges that are denied")]
    NotDenied(String),
    /// More than the kernel's table of one range takes.
    #[error("{0} exceptions are too many; the limit is {MAX_EXCEPTIONS}")]
    TooMany(usize),
}

/// Exceptions of one platform.
const MAX_EXCEPTIONS: usize = 64;

impl PrivateException {
    /// Reads a comma-separated list such as `10.0.0.5/32:443,[fd00::]/8:443,10.1.0.0/16:*`. Empty is no exception.
    ///
    /// # Errors
    ///
    /// [`ExceptionError`] names the entry: a typing error must not open more than was meant.
    pub fn parse_list(text: &str) -> Result<Vec<Self>, ExceptionError> {
        if text.trim().is_empty() {
            return Ok(Vec::new());
        }
        let entries: Vec<&str> = text.split(',').map(str::trim).collect();
        if entries.len() > MAX_EXCEPTIONS {
            return Err(ExceptionError::TooMany(entries.len()));
        }
        entries.into_iter().map(Self::parse).collect()
    }

    fn parse(entry: &str) -> Result<Self, ExceptionError> {
        let form = || ExceptionError::Form(entry.to_owned());
        let (network, port) = entry.rsplit_once(':').ok_or_else(form)?;
        let network: IpNet = match network.strip_prefix('[') {
            Some(rest) => {
                let (address, length) = rest.split_once("]/").ok_or_else(form)?;
                let network = format!("{address}/{length}").parse::<Ipv6Net>();
                IpNet::V6(network.map_err(|_unspecific| form())?)
            }
            None => IpNet::V4(network.parse::<Ipv4Net>().map_err(|_unspecific| form())?),
        };
        let port = match port {
            "*" => None,
            digits if digits.bytes().all(|byte| byte.is_ascii_digit()) => {
                Some(digits.parse().map_err(|_unspecific| form())?)
            }
            _ => return Err(form()),
        };
        if network.addr() != network.network() {
            return Err(ExceptionError::HostBits {
                entry: entry.to_owned(),
                range: network.trunc(),
            });
        }
        if !inside_denied(&network) {
            return Err(ExceptionError::NotDenied(entry.to_owned()));
        }
        Ok(Self { network, port })
    }

    /// The addresses, inside one denied range.
    pub fn network(&self) -> IpNet {
        self.network
    }

    /// The port; `None` is every port.
    pub fn port(&self) -> Option<u16> {
        self.port.map(NonZeroU16::get)
    }

    fn opens(&self, address: &IpAddr, port: u16) -> bool {
        self.network.contains(address) && self.port.is_none_or(|open| open.get() == port)
    }
}

/// The operator's tier: denies before every other tier is asked.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Platform {
    exceptions: Vec<PrivateException>,
    /// Without exceptions.
    own: DeniedRanges,
}

impl Platform {
    /// The denied ranges but for `allow`.
    pub fn new(allow: Vec<PrivateException>) -> Self {
        Self {
            exceptions: allow,
            own: DeniedRanges::default(),
        }
    }

    /// The same, and these ranges without exception.
    #[must_use]
    pub fn without(self, own: DeniedRanges) -> Self {
        Self { own, ..self }
    }

    /// What the operator denies besides.
    pub fn own(&self) -> &DeniedRanges {
        &self.own
    }

    /// What the operator opened.
    pub fn exceptions(&self) -> &[PrivateException] {
        &self.exceptions
    }

    /// Whether nobody may reach `to`. IPv6 forms that carry an IPv4 address (mapped, compatible, translated, 6to4,
    /// NAT64, Teredo) are denied where that address is. The node's own addresses are not known here.
    pub fn denies(&self, to: SocketAddr) -> bool {
        address::faces(to.ip()).any(|face| {
            let opened = || {
                let mut exceptions = self.exceptions.iter();
                exceptions.any(|exception| exception.opens(&face, to.port()))
            };
            self.own.hold(&face) || denied(&face) && !opened()
        })
    }

    /// Refuses a policy that allows ranges which the platform denies whole: nothing of that would ever take effect.
    ///
    /// # Errors
    ///
    /// [`PolicyError`] with the path of the first such range.
    pub fn check(&self, policy: &Policy) -> Result<(), PolicyError> {
        let listed = policy.allowed_cidrs.iter().enumerate();
        let listed = listed.map(|(index, range)| (format!("allowed_cidrs[{index}]"), range));
        let rules = policy
            .rules
            .iter()
            .enumerate()
            .filter(|(_, rule)| rule.action == Action::Allow);
        let ruled = rules.flat_map(|(rule_index, rule)| {
            let ranges = rule.cidrs.iter().enumerate();
            ranges.map(move |(index, range)| (format!("rules[{rule_index}].cidrs[{index}]"), range))
        });
        let opened = |range: &IpNet| {
            let exceptions = self.exceptions.iter().map(|exception| exception.network);
            exceptions
                .into_iter()
                .any(|open| open.contains(range) || range.contains(&open))
        };
        match listed
            .chain(ruled)
            .find(|(_, range)| self.own.cover(range) || inside_denied(range) && !opened(range))
        {
            Some((field, range)) => Err(PolicyError::new(
                field,
                format!(
                    "\"{range}\" is a private or reserved range that no sandbox of this installation may reach"
                ),
            )),
            None => Ok(()),
        }
    }
}

fn denied(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => DENIED4.iter().any(|range| range.contains(address)),
        IpAddr::V6(address) => DENIED6.iter().any(|range| range.contains(address)),
    }
}

fn inside_denied(network: &IpNet) -> bool {
    match network {
        IpNet::V4(network) => DENIED4.iter().any(|range| range.contains(network)),
        IpNet::V6(network) => DENIED6.iter().any(|range| range.contains(network)),
    }
}

#[cfg(test)]
mod tests;
