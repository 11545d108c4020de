//! The controller's configuration, from flags and environment: read once, checked, then immutable.
//!
//! Every setting is a flag and an environment variable; the flag wins. An empty variable counts as unset.
//! netd's settings are not read here: `controller up` hands its whole environment down.

mod tunnels;

use std::{net::SocketAddr, path::PathBuf};

use ipnet::Ipv4Net;
use sandgate_daemon::metrics::{InvalidPlace, Place};
use sandgate_policy::{DeniedRanges, Platform, PrivateException, Range6};

pub use tunnels::{MAX_TUNNELS, MAX_TUNNELS_OF_ORGANIZATION, Scheme, Tunnels};

use crate::{
    jwt::MIN_SECRET,
    limiter::Rate,
    metrics::ADDRESS_VARIABLE,
    spec::{Cpus, LIFETIME_SECONDS, Size},
};

/// Longest lifetime that can be configured, in seconds: thirty days.
const LONGEST_LIFETIME: u64 = 30 * 86_400;

/// Exit status for a bad configuration (`EX_USAGE` of sysexits.h).
pub const EXIT_USAGE: u8 = 64;

/// Where the connected API listener of `controller up` comes from.
pub const API_FD_VARIABLE: &str = "SANDGATE_API_FD";

macro_rules! settings {
    ($($(#[$doc:meta])* $field:ident = $variable:literal, $flag:literal;)*) => {
        /// Settings as given, unchecked.
        #[derive(Debug, Clone, Default, clap::Args)]
        pub struct Settings {
            $(
                $(#[$doc])*
                #[arg(long = $flag, env = $variable, global = true, hide_env_values = true, value_name = "VALUE")]
                pub $field: Option<String>,
            )*
        }

        impl Settings {
            /// As environment variables, for a child.
            pub fn variables(&self) -> Vec<(&'static str, String)> {
                let mut variables = Vec::new();
                $(
                    if let Some(value) = &self.$field {
                        variables.push(($variable, value.clone()));
                    }
                )*
                variables
            }

            /// Only what the lookup knows.
            #[cfg(test)]
            fn from_lookup(lookup: impl Fn(&str) -> Option<String>) -> Self {
                Self { $($field: lookup($variable),)* }
            }
        }
    };
}

settings! {
    /// Database, keys, writable layers [default: /var/lib/sandgate]
    data_dir = "SANDGATE_DATA_DIR", "data-dir";
    /// Root file systems, read-only at run time [default: /var/lib/sandgate/images]
    image_dir = "SANDGATE_IMAGE_DIR", "image-dir";
    /// Sockets and kernel objects; its last component names the instance [default: /run/sandgate]
    run_dir = "SANDGATE_RUN_DIR", "run-dir";
    /// Where the API listens [default: 127.0.0.1:8080]
    api_addr = "SANDGATE_API_ADDR", "api-addr";
    /// Where the controller shows its metrics, or `off` [default: 127.0.0.1:9464]
    metrics_addr = "SANDGATE_METRICS_ADDR", "metrics-addr";
    /// `open`, `invite` or `closed`: who may register [default: open on loopback, else closed]
    registration = "SANDGATE_REGISTRATION", "registration";
    /// Addresses of local sandboxes [default: 10.213.0.0/16]
    sandbox_cidr = "SANDGATE_SANDBOX_CIDR", "sandbox-cidr";
    /// IPv6 addresses of local sandboxes, or `off` [default: a /64 of fd53:4700::/32 by the run directory, when
    /// the node has an IPv6 default route]
    sandbox_cidr6 = "SANDGATE_SANDBOX_CIDR6", "sandbox-cidr6";
    /// Operator exceptions to the private ranges, as netd reads them
    allow_private = "SANDGATE_ALLOW_PRIVATE", "allow-private";
    /// Ranges that no sandbox may reach besides, as netd reads them
    deny_ranges = "SANDGATE_DENY_RANGES", "deny-ranges";
    /// Name of the root file system below the image directory [default: default]
    sandbox_image = "SANDBOX_IMAGE", "sandbox-image";
    /// Processors of a sandbox that asks for none [default: 2]
    default_cpus = "DEFAULT_CPUS", "default-cpus";
    /// Memory of a sandbox that asks for none [default: 2Gi]
    default_memory = "DEFAULT_MEMORY", "default-memory";
    /// Writable layer of a sandbox that asks for none [default: 2Gi]
    default_disk = "SANDGATE_DEFAULT_DISK", "default-disk";
    /// Processes of a sandbox that asks for none [default: 512]
    default_pids = "SANDGATE_DEFAULT_PIDS", "default-pids";
    /// Seconds that a sandbox lives when it asks for nothing else [default: 600]
    default_timeout = "DEFAULT_TIMEOUT", "default-timeout";
    /// Seconds that a sandbox lives at most, however often it is extended [default: 86400]
    max_lifetime = "SANDGATE_MAX_LIFETIME", "max-lifetime";
    /// Live sandboxes of one organisation [default: 20]
    max_sandboxes = "MAX_SANDBOXES_PER_ORG", "max-sandboxes-per-org";
    /// `true` or `false`: whether sandboxes are made before anybody asks for them [default: false]
    warm_pool_enabled = "WARM_POOL_ENABLED", "warm-pool-enabled";
    /// Most sandboxes that wait in the pool [default: 5]
    warm_pool_size = "WARM_POOL_SIZE", "warm-pool-size";
    /// Disk space that sandboxes never get [default: 2Gi]
    disk_reserve = "SANDGATE_DISK_RESERVE", "disk-reserve";
    /// `sqlite://<path>` [default: sandgate.db in the data directory]
    database_url = "DATABASE_URL", "database-url";
    /// File with the key that encrypts secrets' keys: 32 bytes, or their hexadecimal or base64 text. Instead
    /// of it the variable SANDGATE_KEY may hold the text [default: secrets.key in the data directory, made
    /// when it is missing]
    key_file = "SANDGATE_KEY_FILE", "key-file";
    /// The secret that tokens (JSON Web Tokens, HS256) are signed with, at least 32 bytes; better in the environment
    /// than as a flag, which other users of the machine can see [default: one of this installation's own]
    jwt_secret = "JWT_SECRET", "jwt-secret";
    /// Requests of one organisation: so many a second, and so many at once; or `off` [default: 500:5000]
    rate_limit = "SANDGATE_RATE_LIMIT", "rate-limit";
    /// The same for one address without a key that works [default: 50:500]
    peer_rate_limit = "SANDGATE_PEER_RATE_LIMIT", "peer-rate-limit";
    /// Where tunnel-proxy listens [default: 127.0.0.1:8081]
    tunnel_addr = "SANDGATE_TUNNEL_ADDR", "tunnel-addr";
    /// What the host names of tunnels end with; with `localhost` each tunnel also has a port of its own on
    /// 127.0.0.1 [default: localhost]
    tunnel_domain = "SANDGATE_TUNNEL_DOMAIN", "tunnel-domain";
    /// `http` or `https`: how the URLs of tunnels begin [default: http for localhost, else https]
    tunnel_scheme = "SANDGATE_TUNNEL_SCHEME", "tunnel-scheme";
    /// The user id that tunnel-proxy runs as; it should belong to nobody else [default: 60742]
    tunnel_uid = "SANDGATE_TUNNEL_UID", "tunnel-uid";
    /// Open tunnels of one sandbox [default: 16]
    max_tunnels = "SANDGATE_MAX_TUNNELS_PER_SANDBOX", "max-tunnels-per-sandbox";
    /// The OCI runtime [default: runc]
    runtime = "SANDGATE_RUNC", "runc";
}

/// Who may register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Registration {
    /// Anybody who reaches the API.
    Open,
    /// Whoever has an invitation.
    Invite,
    /// Nobody.
    Closed,
}

/// A secret that signs tokens. It is not shown.
#[derive(Clone, PartialEq, Eq)]
pub struct JwtSecret(String);

impl JwtSecret {
    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }

    fn parse(text: &str) -> Result<Option<Self>, String> {
        match text.len() {
            0 => Ok(None),
            // The secret itself stays out of the message.
            1..MIN_SECRET => Err(format!(
                "the secret has {} bytes and needs at least {MIN_SECRET}, for example of `openssl rand -hex 32`",
                text.len()
            )),
            _ => Ok(Some(Self(text.to_owned()))),
        }
    }
}

impl std::fmt::Debug for JwtSecret {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("JwtSecret(…)")
    }
}

/// What a sandbox gets when it asks for nothing, and how many there may be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxDefaults {
    /// Processors.
    pub cpus: Cpus,
    /// Memory.
    pub memory: Size,
    /// Writable layer.
    pub disk: Size,
    /// Processes.
    pub pids: u64,
    /// Lifetime in seconds.
    pub timeout_seconds: u64,
    /// Longest lifetime in seconds, however often it is extended.
    pub max_lifetime_seconds: u64,
    /// Live sandboxes of one organisation. The published default of 5 is too low: fork, clone and session
    /// flows of published clients hold four or five at once, beside whatever else the organisation runs.
    pub max_per_organization: u32,
    /// Name of the root file system.
    pub image: String,
}

/// The warm pool. Name and defaults are those of the published product: whoever brings its settings along finds
/// them meaning the same, and whoever sets nothing gets no sandbox that nobody asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolConfig {
    /// Whether there is one.
    pub enabled: bool,
    /// Most sandboxes that wait in it.
    pub size: u32,
}

/// The controller's configuration.
#[derive(Debug, Clone)]
pub struct Config {
    /// Database, writable layers.
    pub data_dir: PathBuf,
    /// Root file systems.
    pub image_dir: PathBuf,
    /// Sockets and kernel objects.
    pub run_dir: PathBuf,
    /// Where the API listens.
    pub api_addr: SocketAddr,
    /// Where its metrics are shown.
    pub metrics_addr: Place,
    /// Who may register.
    pub registration: Registration,
    /// What tokens are signed with, where the operator says so.
    pub jwt_secret: Option<JwtSecret>,
    /// Requests of one organisation.
    pub rate_limit: Option<Rate>,
    /// Requests from one address without a key that works.
    pub peer_rate_limit: Option<Rate>,
    /// Addresses of local sandboxes.
    pub sandbox_cidr: Ipv4Net,
    /// Their IPv6 addresses.
    pub sandbox_cidr6: Range6,
    /// The operator's tier of every policy.
    pub platform: Platform,
    /// Defaults and limits of sandboxes.
    pub sandbox: SandboxDefaults,
    /// Sandboxes made in advance.
    pub pool: PoolConfig,
    /// Disk space that sandboxes never get, in bytes.
    pub disk_reserve_bytes: u64,
    /// The database file.
    pub database: PathBuf,
    /// Where the key-encryption key of secrets is, when it is configured to be in a file.
    pub key_file: Option<PathBuf>,
    /// How tunnels are served.
    pub tunnels: Tunnels,
    /// The OCI runtime: a path, or a name to be found in `PATH`.
    pub runtime: PathBuf,
}

/// A setting cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{variable}: {message}")]
pub struct ConfigError {
    /// The environment variable (the flag has the same name).
    pub variable: &'static str,
    /// What is wrong with it.
    pub message: String,
}

impl Config {
    /// Checks the settings.
    ///
    /// # Errors
    /// Names the first variable that cannot be used.
    pub fn new(settings: &Settings) -> Result<Self, ConfigError> {
        let data_dir = directory("SANDGATE_DATA_DIR", &settings.data_dir, "/var/lib/sandgate")?;
        let run_dir = directory("SANDGATE_RUN_DIR", &settings.run_dir, "/run/sandgate")?;
        let api_addr: SocketAddr = read(
            "SANDGATE_API_ADDR",
            &settings.api_addr,
            "127.0.0.1:8080",
            |text| {
                text.parse()
                    .map_err(|_not_one| "expected an address and port, for example 127.0.0.1:8080".to_owned())
            },
        )?;
        let default_registration = if api_addr.ip().is_loopback() {
            "open"
        } else {
            "closed"
        };
        Ok(Self {
            image_dir: directory(
                "SANDGATE_IMAGE_DIR",
                &settings.image_dir,
                "/var/lib/sandgate/images",
            )?,
            api_addr,
            metrics_addr: read(
                ADDRESS_VARIABLE,
                &settings.metrics_addr,
                "127.0.0.1:9464",
                |text| text.parse().map_err(|error: InvalidPlace| error.to_string()),
            )?,
            registration: read(
                "SANDGATE_REGISTRATION",
                &settings.registration,
                default_registration,
                |text| match text {
                    "open" => Ok(Registration::Open),
                    "closed" => Ok(Registration::Closed),
                    "invite" => Ok(Registration::Invite),
                    other => Err(format!("expected `open`, `invite` or `closed`, got `{other}`")),
                },
            )?,
            jwt_secret: read("JWT_SECRET", &settings.jwt_secret, "", JwtSecret::parse)?,
            rate_limit: read("SANDGATE_RATE_LIMIT", &settings.rate_limit, "500:5000", rate)?,
            peer_rate_limit: read(
                "SANDGATE_PEER_RATE_LIMIT",
                &settings.peer_rate_limit,
                "50:500",
                rate,
            )?,
            sandbox_cidr: read(
                "SANDGATE_SANDBOX_CIDR",
                &settings.sandbox_cidr,
                "10.213.0.0/16",
                sandbox_cidr,
            )?,
            sandbox_cidr6: read("SANDGATE_SANDBOX_CIDR6", &settings.sandbox_cidr6, "", |text| {
                Range6::parse(text, run_dir.as_os_str().as_encoded_bytes()).map_err(|error| error.to_string())
            })?,
            platform: Platform::new(read(
                "SANDGATE_ALLOW_PRIVATE",
                &settings.allow_private,
                "",
                |text| PrivateException::parse_list(text).map_err(|error| error.to_string()),
            )?)
            .without(read("SANDGATE_DENY_RANGES", &settings.deny_ranges, "", |text| {
                DeniedRanges::parse(text).map_err(|error| error.to_string())
            })?),
            sandbox: sandbox_defaults(settings)?,
            pool: pool(settings)?,
            disk_reserve_bytes: read("SANDGATE_DISK_RESERVE", &settings.disk_reserve, "2Gi", |text| {
                Size::disk(text)
                    .map(|size| size.bytes())
                    .map_err(|error| error.to_string())
            })?,
            database: database(settings, &data_dir)?,
            key_file: match settings.key_file.as_deref() {
                None | Some("") => None,
                Some(path) => Some(directory("SANDGATE_KEY_FILE", &Some(path.to_owned()), "")?),
            },
            tunnels: Tunnels::new(settings)?,
            runtime: PathBuf::from(read("SANDGATE_RUNC", &settings.runtime, "runc", |text| {
                Ok(text.to_owned())
            })?),
            data_dir,
            run_dir,
        })
    }
}

fn sandbox_defaults(settings: &Settings) -> Result<SandboxDefaults, ConfigError> {
    let max_lifetime_seconds = read("SANDGATE_MAX_LIFETIME", &settings.max_lifetime, "86400", |text| {
        number(text, *LIFETIME_SECONDS.start()..=LONGEST_LIFETIME)
    })?;
    Ok(SandboxDefaults {
        cpus: read("DEFAULT_CPUS", &settings.default_cpus, "2", |text| {
            text.parse::<Cpus>().map_err(|error| error.to_string())
        })?,
        memory: read("DEFAULT_MEMORY", &settings.default_memory, "2Gi", |text| {
            Size::memory(text).map_err(|error| error.to_string())
        })?,
        disk: read("SANDGATE_DEFAULT_DISK", &settings.default_disk, "2Gi", |text| {
            Size::disk(text).map_err(|error| error.to_string())
        })?,
        pids: read("SANDGATE_DEFAULT_PIDS", &settings.default_pids, "512", |text| {
            number(text, crate::spec::PIDS)
        })?,
        timeout_seconds: read("DEFAULT_TIMEOUT", &settings.default_timeout, "600", |text| {
            number(
                text,
                *LIFETIME_SECONDS.start()..=max_lifetime_seconds.min(*LIFETIME_SECONDS.end()),
            )
        })?,
        max_lifetime_seconds,
        max_per_organization: read("MAX_SANDBOXES_PER_ORG", &settings.max_sandboxes, "20", |text| {
            let limit = number(text, 1..=100_000)?;
            u32::try_from(limit).map_err(|error| error.to_string())
        })?,
        image: read("SANDBOX_IMAGE", &settings.sandbox_image, "default", |text| {
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
            if text.starts_with('.') || !text.bytes().all(plain) {
                return Err("expected the name of a root file system in the image directory".to_owned());
            }
            Ok(text.to_owned())
        })?,
    })
}

fn pool(settings: &Settings) -> Result<PoolConfig, ConfigError> {
    Ok(PoolConfig {
        enabled: read(
            "WARM_POOL_ENABLED",
            &settings.warm_pool_enabled,
            "false",
            |text| match text.to_ascii_lowercase().as_str() {
                "true" | "1" => Ok(true),
                "false" | "0" => Ok(false),
                _ => Err(format!("expected `true` or `false`, got `{text}`")),
            },
        )?,
        size: read("WARM_POOL_SIZE", &settings.warm_pool_size, "5", |text| {
            u32::try_from(number(text, 1..=1_000)?).map_err(|error| error.to_string())
        })?,
    })
}

fn rate(text: &str) -> Result<Option<Rate>, String> {
    match text {
        "off" => Ok(None),
        text => Rate::parse(text).map(Some),
    }
}

fn read<T>(
    variable: &'static str,
    setting: &Option<String>,
    default: &str,
    check: impl FnOnce(&str) -> Result<T, String>,
) -> Result<T, ConfigError> {
    let text = setting
        .as_deref()
        .filter(|text| !text.is_empty())
        .unwrap_or(default);
    check(text).map_err(|message| ConfigError { variable, message })
}

fn directory(
    variable: &'static str,
    setting: &Option<String>,
    default: &str,
) -> Result<PathBuf, ConfigError> {
    read(variable, setting, default, |text| {
        let path = PathBuf::from(text);
        let plain = path.is_absolute()
            && path
                .components()
                .all(|part| !matches!(part, std::path::Component::ParentDir))
            && path.file_name().is_some();
        if plain {
            Ok(path)
        } else {
            Err(format!("expected an absolute path without `..`, got `{text}`"))
        }
    })
}

fn number(text: &str, range: std::ops::RangeInclusive<u64>) -> Result<u64, String> {
    match text.parse::<u64>() {
        Ok(number) if range.contains(&number) => Ok(number),
        Ok(_) | Err(_) => Err(format!(
            "expected a whole number between {} and {}, got `{text}`",
            range.start(),
            range.end()
        )),
    }
}

fn sandbox_cidr(text: &str) -> Result<Ipv4Net, String> {
    let network: Ipv4Net = text
        .parse()
        .map_err(|_not_one| "expected an IPv4 network, for example 10.213.0.0/16".to_owned())?;
    if network.trunc() != network || !(16..=28).contains(&network.prefix_len()) {
        return Err(
            "expected a network address with a prefix between 16 and 28, for example 10.213.0.0/16"
                .to_owned(),
        );
    }
    Ok(network)
}

fn database(settings: &Settings, data_dir: &std::path::Path) -> Result<PathBuf, ConfigError> {
    read("DATABASE_URL", &settings.database_url, "", |url| {
        if url.is_empty() {
            return Ok(data_dir.join("sandgate.db"));
        }
        // The URL itself stays out of the message: it may hold a password.
        let scheme = url.split(':').next().unwrap_or_default();
        match url
            .strip_prefix("sqlite://")
            .or_else(|| url.strip_prefix("sqlite:"))
        {
            Some(path) if path.starts_with('/') && !path.contains('?') => Ok(PathBuf::from(path)),
            Some(_) => Err("expected sqlite:// and an absolute path without options".to_owned()),
            None => Err(format!(
                "`{scheme}` databases are not supported by this version; use sqlite://<absolute path>"
            )),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(variable: &str, value: &str) -> Result<Config, ConfigError> {
        Config::new(&Settings::from_lookup(|name| {
            (name == variable).then(|| value.to_owned())
        }))
    }

    #[test]
    fn the_defaults_are_those_of_the_architecture() {
        let config = Config::new(&Settings::default()).expect("defaults");
        assert_eq!(config.api_addr.to_string(), "127.0.0.1:8080");
        assert_eq!(config.registration, Registration::Open);
        assert_eq!(config.database, PathBuf::from("/var/lib/sandgate/sandgate.db"));
        assert_eq!(config.sandbox.max_per_organization, 20);
        assert_eq!(config.sandbox.timeout_seconds, 600);
        assert_eq!(
            config.pool,
            PoolConfig {
                enabled: false,
                size: 5
            }
        );
        assert_eq!(config.sandbox_cidr.to_string(), "10.213.0.0/16");
        assert!(matches!(config.sandbox_cidr6, Range6::Usual(_)));
    }

    #[test]
    fn registration_is_closed_where_strangers_can_reach_it() {
        assert_eq!(
            with("SANDGATE_API_ADDR", "0.0.0.0:80").map(|c| c.registration),
            Ok(Registration::Closed)
        );
        assert_eq!(
            with("SANDGATE_API_ADDR", "[::1]:80").map(|c| c.registration),
            Ok(Registration::Open)
        );
    }

    #[test]
    fn an_empty_variable_counts_as_unset() {
        assert_eq!(
            with("DEFAULT_TIMEOUT", "").map(|config| config.sandbox.timeout_seconds),
            Ok(600)
        );
    }

    #[test]
    fn tunnels_have_ports_of_their_own_on_the_local_domain_only() {
        let tunnels = with("SANDGATE_TUNNEL_DOMAIN", "").expect("unset").tunnels;
        assert!(tunnels.has_local_ports());
        assert_eq!((tunnels.scheme, tunnels.user), (Scheme::Http, 60_742));
        let tunnels = with("SANDGATE_TUNNEL_DOMAIN", "tunnels.example.org")
            .expect("a domain")
            .tunnels;
        assert!(!tunnels.has_local_ports());
        assert_eq!(tunnels.scheme, Scheme::Https);
    }

    #[test]
    fn a_bad_value_names_its_variable() {
        for (variable, value) in [
            ("SANDGATE_DATA_DIR", "relative"),
            ("SANDGATE_DATA_DIR", "/a/../b"),
            ("SANDGATE_RUN_DIR", "/"),
            ("SANDGATE_IMAGE_DIR", "x"),
            ("SANDGATE_API_ADDR", "8080"),
            ("SANDGATE_API_ADDR", "localhost:8080"),
            ("SANDGATE_METRICS_ADDR", "9464"),
            ("SANDGATE_METRICS_ADDR", "none"),
            ("SANDGATE_REGISTRATION", "maybe"),
            ("JWT_SECRET", "0123456789abcdef0123456789abcde"),
            ("SANDGATE_RATE_LIMIT", "500"),
            ("SANDGATE_PEER_RATE_LIMIT", "0:1"),
            ("SANDGATE_SANDBOX_CIDR", "10.213.0.1/16"),
            ("SANDGATE_SANDBOX_CIDR", "10.213.0.0/30"),
            ("SANDGATE_SANDBOX_CIDR", "fd00::/64"),
            ("SANDGATE_SANDBOX_CIDR6", "on"),
            ("SANDGATE_SANDBOX_CIDR6", "2001:db8::/64"),
            ("SANDGATE_SANDBOX_CIDR6", "fd00::/120"),
            ("SANDGATE_ALLOW_PRIVATE", "10.0.0.5"),
            ("SANDGATE_DENY_RANGES", "198.51.100.7/24"),
            ("SANDBOX_IMAGE", "../etc"),
            ("DEFAULT_CPUS", "lots"),
            ("DEFAULT_MEMORY", "2"),
            ("SANDGATE_DEFAULT_DISK", "x"),
            ("SANDGATE_DEFAULT_PIDS", "0"),
            ("DEFAULT_TIMEOUT", "59"),
            ("DEFAULT_TIMEOUT", "86401"),
            ("SANDGATE_MAX_LIFETIME", "59"),
            ("SANDGATE_MAX_LIFETIME", "2592001"),
            ("MAX_SANDBOXES_PER_ORG", "0"),
            ("MAX_SANDBOXES_PER_ORG", "-1"),
            ("WARM_POOL_ENABLED", "perhaps"),
            ("WARM_POOL_SIZE", "0"),
            ("WARM_POOL_SIZE", "1001"),
            ("SANDGATE_DISK_RESERVE", "none"),
            ("SANDGATE_TUNNEL_ADDR", "8081"),
            ("SANDGATE_TUNNEL_ADDR", "127.0.0.1:0"),
            ("SANDGATE_TUNNEL_DOMAIN", "example.org:8081"),
            ("SANDGATE_TUNNEL_DOMAIN", "Example.org"),
            ("SANDGATE_TUNNEL_DOMAIN", "example..org"),
            ("SANDGATE_TUNNEL_DOMAIN", "192.0.2.1"),
            ("SANDGATE_TUNNEL_SCHEME", "ftp"),
            ("SANDGATE_TUNNEL_UID", "0"),
            ("SANDGATE_TUNNEL_UID", "1000000"),
            ("SANDGATE_MAX_TUNNELS_PER_SANDBOX", "0"),
            ("DATABASE_URL", "postgres://user:secret@host/db"),
            ("DATABASE_URL", "sqlite://relative.db"),
        ] {
            let error = with(variable, value).err().map(|error| error.variable);
            assert_eq!(error, Some(variable), "{variable}={value}");
        }
    }

    #[test]
    fn a_secret_is_long_enough_and_never_shown() {
        let short = "short-and-secret";
        let error = with("JWT_SECRET", short).expect_err("refused");
        assert!(!error.to_string().contains(short), "{error}");
        let long = "0123456789abcdef0123456789abcdef";
        let config = with("JWT_SECRET", long).expect("long enough");
        assert!(!format!("{config:?}").contains(long));
        assert_eq!(with("JWT_SECRET", "").map(|config| config.jwt_secret), Ok(None));
    }

    #[test]
    fn a_refused_database_url_is_not_repeated() {
        let error = with("DATABASE_URL", "postgres://user:secret@host/db").expect_err("refused");
        assert!(!error.to_string().contains("secret"), "{error}");
        assert!(error.message.contains("postgres"), "{error}");
    }
}
