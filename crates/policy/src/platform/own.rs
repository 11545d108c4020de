//! Ranges that the operator denies besides those that are always denied: `SANDGATE_DENY_RANGES`.

use std::net::IpAddr;

use ipnet::{IpNet, Ipv6Net};

/// Ranges of one platform: all of them stand in the kernel's table, beside the node's addresses.
const MAX_RANGES: usize = 256;
/// Where IPv4 addresses are written as IPv6 (RFC 4291, 2.5.5.2), and in the kernel's one space of both.
const MAPPED: Ipv6Net = super::v6([0, 0, 0, 0, 0, 0xffff, 0, 0], 96);

/// Ranges that nobody may reach, whatever else the operator has opened.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DeniedRanges(Vec<IpNet>);

/// `SANDGATE_DENY_RANGES` is not a list of ranges.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeniedRangeError {
    /// The entry is no range.
    #[error("`{0}` is not a range, such as 198.51.100.0/24 or 2001:db8:5::/48")]
    Form(String),
    /// The range has bits beyond its prefix length: which range is meant is not clear.
    #[error("`{entry}` has bits beyond its prefix length; the range is {range}")]
    HostBits {
        /// The entry.
        entry: String,
        /// What it would be without these bits.
        range: IpNet,
    },
    /// IPv4 addresses would be denied by a range of IPv6.
    #[error(
        "`{0}` holds IPv4 addresses in their IPv6 form; write them as IPv4, and all public IPv6 as 2000::/3"
    )]
    Mapped(String),
    /// More than the kernel's table is meant for.
    #[error("{0} ranges are too many; the limit is {MAX_RANGES}")]
    TooMany(usize),
}

impl DeniedRanges {
    /// Reads a comma-separated list such as `198.51.100.0/24,2001:db8:5::/48`. Empty is no range.
    ///
    /// # Errors
    ///
    /// [`DeniedRangeError`] names the entry.
    pub fn parse(text: &str) -> Result<Self, DeniedRangeError> {
        if text.trim().is_empty() {
            return Ok(Self::default());
        }
        let entries: Vec<&str> = text.split(',').map(str::trim).collect();
        if entries.len() > MAX_RANGES {
            return Err(DeniedRangeError::TooMany(entries.len()));
        }
        entries.into_iter().map(range).collect::<Result<_, _>>().map(Self)
    }

    /// The ranges, as they were listed.
    pub fn ranges(&self) -> &[IpNet] {
        &self.0
    }

    pub(super) fn hold(&self, address: &IpAddr) -> bool {
        self.0.iter().any(|range| range.contains(address))
    }

    pub(super) fn cover(&self, network: &IpNet) -> bool {
        self.0.iter().any(|range| range.contains(network))
    }
}

fn range(entry: &str) -> Result<IpNet, DeniedRangeError> {
    let range: IpNet = entry
        .parse()
        .map_err(|_unspecific| DeniedRangeError::Form(entry.to_owned()))?;
    if range.addr() != range.network() {
        return Err(DeniedRangeError::HostBits {
            entry: entry.to_owned(),
            range: range.trunc(),
        });
    }
    match range {
        IpNet::V6(range) if range.contains(&MAPPED) || MAPPED.contains(&range) => {
            Err(DeniedRangeError::Mapped(entry.to_owned()))
        }
        IpNet::V4(_) | IpNet::V6(_) => Ok(range),
    }
}
