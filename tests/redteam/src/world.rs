//! What a run is told about the world around the sandbox.
//!
//! The addresses of a world are of the documentation ranges, or it is refused: an attack suite that is pointed at the
//! wrong machine must not work. Private and link-local addresses are tried only in a world that says it is `closed`:
//! one that has no way to anybody's real network.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use serde::{Deserialize, Serialize};

/// Longest wait for an answer where the file does not say, in milliseconds.
const TIMEOUT: u64 = 3000;
/// Bounds of that wait.
const TIMEOUTS: std::ops::RangeInclusive<u64> = 100..=30_000;

/// The file that a run is told with.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct World {
    /// Stands in everything that is sent, so that it is known again outside: 4 to 12 lower-case letters and digits.
    pub canary: String,
    /// There is no way from the sandbox to a real network: private and metadata addresses may be tried.
    #[serde(default)]
    pub closed: bool,
    /// Longest wait for an answer, in milliseconds.
    #[serde(default = "timeout")]
    pub timeout_ms: u64,
    /// The same for answers on which nothing depends, where only what arrives outside is judged.
    #[serde(default)]
    pub patience_ms: Option<u64>,
    /// The name server to ask; otherwise the first one of /etc/resolv.conf.
    #[serde(default)]
    pub resolver: Option<IpAddr>,
    /// Allowed by name on ports 80 and 443, and on 22 whatever is spoken there.
    pub ok: Host,
    /// A name that is not allowed and has the address of `ok`.
    pub tenant: String,
    /// Another name that is allowed on 80 and 443.
    pub plain: Host,
    /// A name that is allowed and that nobody resolves before a case does.
    pub late: Host,
    /// Every name below this one is allowed, the name itself is not; on 80 and 443.
    pub wild: Host,
    /// A further zone of which the same holds, for the case that asks for many names.
    pub budget: String,
    /// Not allowed, and neither is any name below; listens on TCP and UDP ports of all kinds.
    pub evil: Host,
    /// An allowed name that resolves to private addresses only.
    pub rebind: String,
    /// An allowed name that resolves to a private address and to that of `ok`.
    pub half_rebind: String,
    /// Allowed by address: TCP 443 and UDP 7000.
    pub open: IpAddr,
    /// The same by IPv6, where there is any.
    #[serde(default)]
    pub ipv6: Option<Ipv6World>,
    /// A listener on the machine that the sandbox runs on.
    #[serde(default)]
    pub node: Option<SocketAddr>,
    /// A listener in another sandbox.
    #[serde(default)]
    pub neighbour: Option<SocketAddr>,
    /// A key that the sandbox may use and must not have.
    #[serde(default)]
    pub secret: Option<Secret>,
}

/// A name and its address.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Host {
    /// The name.
    pub name: String,
    /// Its one address.
    pub address: IpAddr,
}

/// Hosts by IPv6.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ipv6World {
    /// Allowed by name on ports 80 and 443.
    pub ok: Host,
    /// Not allowed.
    pub evil: IpAddr,
    /// Allowed by address: TCP 443 and UDP 7000.
    pub open: IpAddr,
}

/// A key by what a program in the sandbox knows of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Secret {
    /// The variable that stands for it.
    pub variable: String,
    /// The allowed host that gets it, by TLS, as a bearer token.
    pub host: Host,
}

/// Why a world is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused(pub String);

impl fmt::Display for Refused {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl std::error::Error for Refused {}

impl World {
    /// Reads and checks it.
    ///
    /// # Errors
    /// When it is no such file, or names an address that a run may not send to.
    pub fn parse(text: &str) -> Result<Self, Refused> {
        let world: Self =
            serde_json::from_str(text).map_err(|error| Refused(format!("the world: {error}")))?;
        world.check()?;
        Ok(world)
    }

    fn check(&self) -> Result<(), Refused> {
        let letters = |letter: char| letter.is_ascii_lowercase() || letter.is_ascii_digit();
        if !(4..=12).contains(&self.canary.len()) || !self.canary.chars().all(letters) {
            return refuse("canary", "4 to 12 lower-case letters and digits");
        }
        if !TIMEOUTS.contains(&self.timeout_ms) {
            return refuse("timeout_ms", "100 to 30000");
        }
        for (field, address) in self.addresses() {
            if !is_documentation(address) {
                return Err(Refused(format!(
                    "{field}: {address} is not of a documentation range (192.0.2.0/24, 198.51.100.0/24, 203.0.113.0/24, \
                     2001:db8::/32, 3fff::/20): attacks are sent to no other"
                )));
            }
        }
        for (field, inside) in [("node", self.node), ("neighbour", self.neighbour)] {
            let Some(inside) = inside else { continue };
            let is_fine = is_documentation(inside.ip()) || self.closed && is_private(inside.ip());
            if !is_fine {
                return Err(Refused(format!(
                    "{field}: {} is neither of a documentation range nor a private one in a world that is `closed`",
                    inside.ip()
                )));
            }
        }
        match self.resolver {
            Some(address) if !is_documentation(address) && !is_private(address) => {
                refuse("resolver", "an address of a documentation range or a private one")
            }
            Some(_) | None => Ok(()),
        }
    }

    /// Everything of the world's internet.
    fn addresses(&self) -> Vec<(&'static str, IpAddr)> {
        let mut all = vec![
            ("ok.address", self.ok.address),
            ("plain.address", self.plain.address),
            ("late.address", self.late.address),
            ("wild.address", self.wild.address),
            ("evil.address", self.evil.address),
            ("open", self.open),
        ];
        if let Some(six) = &self.ipv6 {
            all.extend([
                ("ipv6.ok.address", six.ok.address),
                ("ipv6.evil", six.evil),
                ("ipv6.open", six.open),
            ]);
        }
        all.extend(
            self.secret
                .as_ref()
                .map(|secret| ("secret.host.address", secret.host.address)),
        );
        all
    }

    /// Whether a run may send to this address.
    pub fn permits(&self, address: IpAddr) -> bool {
        is_documentation(address)
            || address.is_loopback()
            || self.resolver == Some(address)
            || self.closed && is_private(address)
    }

    /// Addresses where nothing may ever arrive.
    pub fn attackers(&self) -> Vec<IpAddr> {
        let mut attackers = vec![self.evil.address];
        attackers.extend(self.ipv6.as_ref().map(|six| six.evil));
        attackers
    }
}

fn timeout() -> u64 {
    TIMEOUT
}

fn refuse(field: &str, wanted: &str) -> Result<(), Refused> {
    Err(Refused(format!("{field}: not {wanted}")))
}

/// RFC 5737, RFC 3849, RFC 9637.
pub fn is_documentation(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_documentation(),
        IpAddr::V6(address) => {
            let [first, second, ..] = address.segments();
            first == 0x2001 && second == 0xdb8 || first == 0x3fff && second >> 12 == 0
        }
    }
}

/// Addresses that no router of the internet carries (RFC 6890), also as IPv6 writes those of IPv4.
pub fn is_private(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => is_private4(address),
        IpAddr::V6(address) => is_private6(address),
    }
}

fn is_private4(address: Ipv4Addr) -> bool {
    let [first, second, third, _] = address.octets();
    address.is_private()
        || address.is_link_local()
        || address.is_multicast()
        || address.is_broadcast()
        || first == 0
        || first == 100 && second & 0xc0 == 64
        || first == 192 && second == 0 && third == 0
        || first == 198 && second & 0xfe == 18
        || first >= 240
}

fn is_private6(address: Ipv6Addr) -> bool {
    let segments = address.segments();
    let embedded = |high: u16, low: u16| {
        let address = Ipv4Addr::from(u32::from(high) << 16 | u32::from(low));
        is_private4(address) || is_documentation(address.into())
    };
    match segments {
        [0, 0, 0, 0, 0, 0xffff, high, low] | [0x64, 0xff9b, 0, 0, 0, 0, high, low] => embedded(high, low),
        [0x2002, high, low, ..] => embedded(high, low),
        [first, ..] => {
            first & 0xfe00 == 0xfc00
                || first & 0xffc0 == 0xfe80
                || first & 0xffc0 == 0xfec0
                || first & 0xff00 == 0xff00
        }
    }
}

#[cfg(test)]
mod tests;
