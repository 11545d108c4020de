//! Settings of tunnels: where they are reached, under which names, and by whom they are served.

use std::net::SocketAddr;

use super::{ConfigError, Settings, number, read};

/// The domain with which every tunnel has a port of its own on the loopback address.
const LOCAL_DOMAIN: &str = "localhost";

/// The user that tunnel-proxy runs as. It belongs to nobody: outside the ranges that Debian's tools allocate
/// (Debian Policy 9.2.2), that systemd takes for dynamic users (61184 to 65519), and that sandboxes get.
const DEFAULT_USER: &str = "60742";

/// User ids that tunnel-proxy may have; sandboxes' are above.
const USERS: std::ops::RangeInclusive<u64> = 1..=999_999;

/// Tunnels that tunnel-proxy serves at once, in all. One loopback port each, and as many sockets are kept over
/// its restarts ([`sandgate_daemon::keep::MAX_SOCKETS`]).
pub const MAX_TUNNELS: u32 = 1_000;

/// Open tunnels of one organisation, so that none takes them all; more if one sandbox alone may have more.
pub const MAX_TUNNELS_OF_ORGANIZATION: u32 = 100;

/// How tunnels are served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tunnels {
    /// Where tunnel-proxy listens.
    pub address: SocketAddr,
    /// What the host names of tunnels end with.
    pub domain: String,
    /// How their URLs begin.
    pub scheme: Scheme,
    /// The user that tunnel-proxy runs as.
    pub user: u32,
    /// Open tunnels of one sandbox.
    pub max_per_sandbox: u32,
}

/// How a URL begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    /// In clear.
    Http,
    /// TLS, which ends in front of tunnel-proxy.
    Https,
}

impl Scheme {
    /// As it stands in a URL.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
        }
    }
}

impl Tunnels {
    /// Checks the settings.
    ///
    /// # Errors
    /// Names the first variable that cannot be used.
    pub(super) fn new(settings: &Settings) -> Result<Self, ConfigError> {
        let domain = read(
            "SANDGATE_TUNNEL_DOMAIN",
            &settings.tunnel_domain,
            LOCAL_DOMAIN,
            domain,
        )?;
        let default_scheme = if domain == LOCAL_DOMAIN { "http" } else { "https" };
        Ok(Self {
            address: read(
                "SANDGATE_TUNNEL_ADDR",
                &settings.tunnel_addr,
                "127.0.0.1:8081",
                |text| match text.parse::<SocketAddr>() {
                    Ok(address) if address.port() != 0 => Ok(address),
                    Ok(_) | Err(_) => {
                        Err("expected an address and port, for example 127.0.0.1:8081".to_owned())
                    }
                },
            )?,
            scheme: read(
                "SANDGATE_TUNNEL_SCHEME",
                &settings.tunnel_scheme,
                default_scheme,
                |text| match text {
                    "http" => Ok(Scheme::Http),
                    "https" => Ok(Scheme::Https),
                    other => Err(format!("expected `http` or `https`, got `{other}`")),
                },
            )?,
            user: read(
                "SANDGATE_TUNNEL_UID",
                &settings.tunnel_uid,
                DEFAULT_USER,
                |text| u32::try_from(number(text, USERS)?).map_err(|error| error.to_string()),
            )?,
            max_per_sandbox: read(
                "SANDGATE_MAX_TUNNELS_PER_SANDBOX",
                &settings.max_tunnels,
                "16",
                |text| {
                    u32::try_from(number(text, 1..=MAX_TUNNELS.into())?).map_err(|error| error.to_string())
                },
            )?,
            domain,
        })
    }

    /// Whether every tunnel has a port of its own on the loopback address: client libraries seldom resolve
    /// names below `localhost`.
    pub fn has_local_ports(&self) -> bool {
        self.domain == LOCAL_DOMAIN
    }
}

/// Host names of tunnels are `{port}-{sandbox}.{domain}`, at most 253 characters (RFC 1035, 2.3.4).
fn domain(text: &str) -> Result<String, String> {
    let label = |label: &str| {
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        (1..=63).contains(&label.len())
            && label.bytes().all(plain)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if text.len() <= 180 && text.split('.').all(label) && text.parse::<std::net::IpAddr>().is_err() {
        return Ok(text.to_owned());
    }
    Err(format!(
        "expected a domain name in lower case without port, for example tunnels.example.org, got `{text}`"
    ))
}
