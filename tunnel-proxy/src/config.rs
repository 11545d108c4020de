//! tunnel-proxy's configuration: flags and environment in, checked values out. Nothing else of it reads either,
//! but for the inherited descriptors. An empty variable counts as unset.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use clap::Parser;
use sandgate_daemon::metrics::{InvalidPlace, Place};

use crate::metrics::ADDRESS_VARIABLE;

/// Serves the URLs of sandboxes' ports. Started by `controller up`.
#[derive(Debug, Clone, Parser)]
#[command(name = "tunnel-proxy", version)]
pub struct Arguments {
    /// Sockets and state of this instance [default: /run/sandgate]
    #[arg(long, env = "SANDGATE_RUN_DIR", value_name = "DIRECTORY")]
    pub run_dir: Option<PathBuf>,
    /// Domain below which tunnels have their host names; with `localhost` each has a port of its own too
    /// [default: localhost]
    #[arg(long, env = "SANDGATE_TUNNEL_DOMAIN", value_name = "DOMAIN")]
    pub domain: Option<String>,
    /// What clients speak to reach us: `http`, or `https` where TLS ends in front of us [default: http with
    /// the domain `localhost`, else https]
    #[arg(long, env = "SANDGATE_TUNNEL_SCHEME", value_name = "SCHEME")]
    pub scheme: Option<String>,
    /// Connections at once [default: 4096]
    #[arg(long, env = "SANDGATE_TUNNEL_CONNECTIONS", value_name = "COUNT")]
    pub connections: Option<String>,
    /// Requests and connections at once of one tunnel [default: 256]
    #[arg(long, env = "SANDGATE_TUNNEL_CONNECTIONS_EACH", value_name = "COUNT")]
    pub connections_each: Option<String>,
    /// Seconds for the head of a request [default: 10]
    #[arg(long, env = "SANDGATE_TUNNEL_HEADER_TIMEOUT", value_name = "SECONDS")]
    pub header_timeout: Option<String>,
    /// Seconds without a byte either way after which a connection is closed [default: 3600]
    #[arg(long, env = "SANDGATE_TUNNEL_IDLE_TIMEOUT", value_name = "SECONDS")]
    pub idle_timeout: Option<String>,
    /// Where tunnel-proxy shows its metrics, or `off` [default: 127.0.0.1:9466]
    #[arg(long, env = ADDRESS_VARIABLE, value_name = "ADDRESS")]
    pub metrics_addr: Option<String>,
}

/// What tunnel-proxy runs with.
#[derive(Debug, Clone)]
pub struct Config {
    /// Sockets and state of this instance.
    pub run_dir: PathBuf,
    /// Lower-case, without a dot at either end.
    pub domain: String,
    /// What clients speak to reach us.
    pub scheme: Scheme,
    /// Limits.
    pub limits: Limits,
    /// Where its metrics are shown.
    pub metrics_addr: Place,
}

/// What clients speak to reach us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    /// In clear.
    Http,
    /// TLS, which ends in front of us.
    Https,
}

impl Scheme {
    /// The word in a URL.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
        }
    }
}

/// Bounds on what strangers may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Connections at once.
    pub connections: usize,
    /// Requests and connections at once of one tunnel.
    pub connections_each: usize,
    /// Time from the first byte of a request's head to its last, and from a connection's beginning to its first byte.
    pub header_timeout: Duration,
    /// Time without a byte either way while something is under way.
    pub idle_timeout: Duration,
}

/// The domain with which tunnels have loopback ports.
pub const LOCAL_DOMAIN: &str = "localhost";

const DEFAULT_METRICS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9466);

/// A value that tunnel-proxy cannot run with.
#[derive(Debug, thiserror::Error)]
#[error("{variable}: {problem}")]
pub struct ConfigError {
    /// The variable to correct.
    pub variable: &'static str,
    /// What is wrong with it, and what would be right.
    pub problem: String,
}

impl Config {
    /// Whether tunnels have loopback ports of their own.
    pub fn is_local(&self) -> bool {
        self.domain == LOCAL_DOMAIN
    }
}

impl TryFrom<Arguments> for Config {
    type Error = ConfigError;

    fn try_from(arguments: Arguments) -> Result<Self, ConfigError> {
        let run_dir = arguments
            .run_dir
            .filter(|path| !path.as_os_str().is_empty())
            .unwrap_or_else(|| "/run/sandgate".into());
        if !run_dir.is_absolute() {
            return Err(invalid("SANDGATE_RUN_DIR", "must be an absolute path"));
        }
        let domain = domain(given(&arguments.domain).unwrap_or(LOCAL_DOMAIN))?;
        let scheme = match given(&arguments.scheme) {
            None if domain == LOCAL_DOMAIN => Scheme::Http,
            None | Some("https") => Scheme::Https,
            Some("http") => Scheme::Http,
            Some(other) => {
                return Err(invalid(
                    "SANDGATE_TUNNEL_SCHEME",
                    format!("`{other}` is neither `http` nor `https`"),
                ));
            }
        };
        let limits = Limits {
            connections: number(
                "SANDGATE_TUNNEL_CONNECTIONS",
                &arguments.connections,
                4096,
                1..=100_000,
            )?,
            connections_each: number(
                "SANDGATE_TUNNEL_CONNECTIONS_EACH",
                &arguments.connections_each,
                256,
                1..=100_000,
            )?,
            header_timeout: seconds(
                "SANDGATE_TUNNEL_HEADER_TIMEOUT",
                &arguments.header_timeout,
                10,
                300,
            )?,
            idle_timeout: seconds(
                "SANDGATE_TUNNEL_IDLE_TIMEOUT",
                &arguments.idle_timeout,
                3600,
                86_400,
            )?,
        };
        let metrics_addr = match given(&arguments.metrics_addr) {
            None => Place::At(DEFAULT_METRICS),
            Some(text) => text
                .parse()
                .map_err(|error: InvalidPlace| invalid(ADDRESS_VARIABLE, error.to_string()))?,
        };
        Ok(Self {
            run_dir,
            domain,
            scheme,
            limits,
            metrics_addr,
        })
    }
}

fn invalid(variable: &'static str, problem: impl Into<String>) -> ConfigError {
    ConfigError {
        variable,
        problem: problem.into(),
    }
}

fn given(value: &Option<String>) -> Option<&str> {
    value.as_deref().map(str::trim).filter(|value| !value.is_empty())
}

fn domain(text: &str) -> Result<String, ConfigError> {
    let domain = text.to_ascii_lowercase();
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let is_number = |label: &str| label.bytes().all(|byte| byte.is_ascii_digit());
    // A name of a tunnel stands before it: 65535-sandbox-<40> and a dot.
    if domain.len() > 190
        || !domain.split('.').all(is_label)
        || domain.rsplit('.').next().is_some_and(is_number)
    {
        return Err(invalid(
            "SANDGATE_TUNNEL_DOMAIN",
            format!("`{text}` is not a domain, for example `tunnels.example.org`"),
        ));
    }
    Ok(domain)
}

fn number(
    variable: &'static str,
    value: &Option<String>,
    default: usize,
    range: std::ops::RangeInclusive<usize>,
) -> Result<usize, ConfigError> {
    let Some(text) = given(value) else {
        return Ok(default);
    };
    text.parse()
        .ok()
        .filter(|number| range.contains(number))
        .ok_or_else(|| {
            invalid(
                variable,
                format!(
                    "`{text}` is not a number from {} to {}",
                    range.start(),
                    range.end()
                ),
            )
        })
}

fn seconds(
    variable: &'static str,
    value: &Option<String>,
    default: u32,
    most: u32,
) -> Result<Duration, ConfigError> {
    let default = usize::try_from(default).unwrap_or(usize::MAX);
    let most = usize::try_from(most).unwrap_or(usize::MAX);
    let seconds = number(variable, value, default, 1..=most)?;
    Ok(Duration::from_secs(seconds as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments() -> Arguments {
        Arguments {
            run_dir: None,
            domain: None,
            scheme: None,
            connections: None,
            connections_each: None,
            header_timeout: None,
            idle_timeout: None,
            metrics_addr: None,
        }
    }

    #[test]
    fn without_settings_it_is_the_embedded_default() {
        let config = Config::try_from(Arguments {
            domain: Some(" ".to_owned()),
            ..arguments()
        })
        .expect("accepted");
        assert_eq!(
            (config.domain.as_str(), config.scheme),
            ("localhost", Scheme::Http)
        );
        assert!(config.is_local());
        assert_eq!(config.limits.header_timeout, Duration::from_secs(10));
    }

    #[test]
    fn a_domain_of_its_own_means_https_unless_told() {
        let config = |scheme: Option<&str>| {
            Config::try_from(Arguments {
                domain: Some("Tunnels.Example.org".to_owned()),
                scheme: scheme.map(str::to_owned),
                ..arguments()
            })
            .expect("accepted")
        };
        assert_eq!(config(None).domain, "tunnels.example.org");
        assert!(!config(None).is_local());
        assert_eq!(config(None).scheme, Scheme::Https);
        assert_eq!(config(Some("http")).scheme, Scheme::Http);
    }

    #[test]
    fn what_is_wrong_is_named() {
        type Spoil = fn(&mut Arguments, String);
        let cases: [(&str, &[&str], Spoil); 7] = [
            (
                "SANDGATE_TUNNEL_DOMAIN",
                &[
                    "example.org.",
                    ".example.org",
                    "a b",
                    "ex_ample.org",
                    "127.0.0.1",
                    "-a.org",
                ],
                |arguments, value| arguments.domain = Some(value),
            ),
            ("SANDGATE_TUNNEL_SCHEME", &["HTTP", "tcp"], |arguments, value| {
                arguments.scheme = Some(value)
            }),
            (
                "SANDGATE_TUNNEL_CONNECTIONS",
                &["0", "-1", "many"],
                |arguments, value| arguments.connections = Some(value),
            ),
            ("SANDGATE_TUNNEL_CONNECTIONS_EACH", &["0"], |arguments, value| {
                arguments.connections_each = Some(value)
            }),
            (
                "SANDGATE_TUNNEL_HEADER_TIMEOUT",
                &["0", "1s"],
                |arguments, value| arguments.header_timeout = Some(value),
            ),
            ("SANDGATE_TUNNEL_IDLE_TIMEOUT", &["86401"], |arguments, value| {
                arguments.idle_timeout = Some(value)
            }),
            (ADDRESS_VARIABLE, &["9466", "on"], |arguments, value| {
                arguments.metrics_addr = Some(value)
            }),
        ];
        for (variable, values, spoil) in cases {
            for value in values {
                let mut arguments = arguments();
                spoil(&mut arguments, (*value).to_owned());
                let error = Config::try_from(arguments).expect_err(value);
                assert_eq!(error.variable, variable, "{value}: {error}");
            }
        }
    }
}
