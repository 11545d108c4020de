//! netd's configuration: flags and environment in, checked values out. Nothing else of netd reads either.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
};

use clap::Parser;
use ipnet::{Ipv4Net, Ipv6Net};
use sandgate_daemon::metrics::{InvalidPlace, Place};
use sandgate_policy::{DeniedRanges, PrivateException, Range6};

use crate::{audit::spool, kernel::Attach, metrics::ADDRESS_VARIABLE};

/// Enforces the egress of every sandbox on this node. Started by `controller up`.
#[derive(Debug, Parser)]
#[command(name = "netd", version)]
pub struct Arguments {
    /// Sockets, namespaces and pins of this instance
    #[arg(
        long,
        env = "SANDGATE_RUN_DIR",
        default_value = "/run/sandgate",
        value_name = "DIRECTORY"
    )]
    pub run_dir: PathBuf,
    /// Database, keys, writable layers; netd keeps the audit's spool there
    #[arg(
        long,
        env = "SANDGATE_DATA_DIR",
        default_value = "/var/lib/sandgate",
        value_name = "DIRECTORY"
    )]
    pub data_dir: PathBuf,
    /// How many bytes of audit records may wait for the controller, for example `256Mi`
    #[arg(
        long,
        env = "SANDGATE_AUDIT_SPOOL",
        default_value = "256Mi",
        value_name = "SIZE"
    )]
    pub audit_spool: String,
    /// Resolvers that netd asks, `ip:port[,ip:port]` [default: those of /etc/resolv.conf]
    #[arg(long, env = "SANDGATE_DNS_UPSTREAM", value_name = "SERVERS")]
    pub dns_upstream: Option<String>,
    /// Exceptions to the private ranges, `10.0.0.5/32:443,10.1.0.0/16:*`
    #[arg(long, env = "SANDGATE_ALLOW_PRIVATE", value_name = "EXCEPTIONS")]
    pub allow_private: Option<String>,
    /// Ranges that no sandbox may reach, besides the private ones, `198.51.100.0/24,2001:db8:5::/48`
    #[arg(long, env = "SANDGATE_DENY_RANGES", value_name = "RANGES")]
    pub deny_ranges: Option<String>,
    /// Addresses of local sandboxes
    #[arg(
        long,
        env = "SANDGATE_SANDBOX_CIDR",
        default_value = "10.213.0.0/16",
        value_name = "CIDR"
    )]
    pub sandbox_cidr: String,
    /// IPv6 addresses of local sandboxes, or `off` [default: a /64 of fd53:4700::/32, by the run directory]
    #[arg(
        long,
        env = "SANDGATE_SANDBOX_CIDR6",
        default_value = "",
        hide_default_value = true,
        value_name = "CIDR"
    )]
    pub sandbox_cidr6: String,
    /// Whether what address and port alone allow may leave without passing netd: `auto`, or `off`, which leaves the
    /// node's network settings alone
    #[arg(
        long,
        env = "SANDGATE_KERNEL_PASS",
        default_value = "auto",
        value_name = "MODE"
    )]
    pub kernel_pass: String,
    /// How the programs hang on interfaces: `auto` (TCX links where the kernel has them, else clsact filters), `tcx` or
    /// `clsact`
    #[arg(long, env = "SANDGATE_ATTACH", default_value = "auto", value_name = "MEANS")]
    pub attach: String,
    /// PEM file of roots that servers are verified against besides the system's, where requests are read
    #[arg(long, env = "SANDGATE_UPSTREAM_CA_FILE", value_name = "FILE")]
    pub upstream_ca_file: Option<PathBuf>,
    /// Where netd shows its metrics, or `off`
    #[arg(
        long,
        env = "SANDGATE_NETD_METRICS_ADDR",
        default_value = "127.0.0.1:9465",
        value_name = "ADDRESS"
    )]
    pub metrics_addr: String,
    /// Name under which the controller knows this node
    #[arg(long, default_value = "local", value_name = "NAME")]
    pub node: String,
    /// Take away what an earlier netd left in the node's network, restore what it changed there, and end. For
    /// `controller down`
    #[arg(long)]
    pub remove_uplink: bool,
    /// Find out whether this kernel can carry the wall, and end. For `controller up`
    #[arg(long)]
    pub check: bool,
}

/// What netd runs with.
#[derive(Debug, Clone)]
pub struct Config {
    /// Sockets, namespaces and pins of this instance.
    pub run_dir: PathBuf,
    /// Where the audit's spool is.
    pub spool_dir: PathBuf,
    /// How many bytes it may take.
    pub spool_bytes: u64,
    /// Resolvers, in the order in which they are asked; at least one.
    pub dns_upstream: Vec<SocketAddr>,
    /// Exceptions to the private ranges.
    pub allow_private: Vec<PrivateException>,
    /// Ranges that no sandbox may reach, besides the private ones.
    pub deny_ranges: DeniedRanges,
    /// Addresses of local sandboxes.
    pub sandbox_cidr: Ipv4Net,
    /// Their IPv6 addresses, also where the node has no IPv6 and none of them is used.
    pub sandbox_cidr6: Option<Ipv6Net>,
    /// Whether what address and port alone allow may leave without passing netd.
    pub kernel_pass: KernelPass,
    /// How the programs hang on interfaces.
    pub attach: Attach,
    /// Roots that servers are verified against besides the system's.
    pub upstream_ca_file: Option<PathBuf>,
    /// Where its metrics are shown.
    pub metrics_addr: Place,
    /// Name under which the controller knows this node.
    pub node: String,
}

/// The values of `SANDGATE_KERNEL_PASS`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KernelPass {
    /// Where the node supports it.
    Auto,
    /// Never.
    Off,
}

/// A value that netd cannot run with.
#[derive(Debug, thiserror::Error)]
#[error("{variable}: {problem}")]
pub struct ConfigError {
    /// The variable to correct.
    pub variable: &'static str,
    /// What is wrong with it, and what would be right.
    pub problem: String,
}

/// Largest spool.
const SPOOL_MAX: u64 = 64 << 30;
const RESOLV_CONF: &str = "/etc/resolv.conf";
const DNS_PORT: u16 = 53;
/// Also where an empty variable leaves it.
const DEFAULT_METRICS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9465);
/// The smallest range in which there is room for a sandbox and the canary.
const SMALLEST_CIDR: u8 = 29;

impl TryFrom<Arguments> for Config {
    type Error = ConfigError;

    fn try_from(arguments: Arguments) -> Result<Self, ConfigError> {
        let dns_upstream = match arguments.dns_upstream.as_deref().map(str::trim) {
            None | Some("") => resolv_conf(Path::new(RESOLV_CONF))?,
            Some(list) => servers(list)?,
        };
        let allow_private = match arguments.allow_private.as_deref().map(str::trim) {
            None | Some("") => Vec::new(),
            Some(list) => PrivateException::parse_list(list)
                .map_err(|error| invalid("SANDGATE_ALLOW_PRIVATE", error.to_string()))?,
        };
        let deny_ranges = DeniedRanges::parse(arguments.deny_ranges.as_deref().unwrap_or_default())
            .map_err(|error| invalid("SANDGATE_DENY_RANGES", error.to_string()))?;
        if !arguments.run_dir.is_absolute() {
            return Err(invalid("SANDGATE_RUN_DIR", "must be an absolute path"));
        }
        if !arguments.data_dir.is_absolute() {
            return Err(invalid("SANDGATE_DATA_DIR", "must be an absolute path"));
        }
        let kernel_pass = match arguments.kernel_pass.as_str() {
            "auto" => KernelPass::Auto,
            "off" => KernelPass::Off,
            other => {
                return Err(invalid(
                    "SANDGATE_KERNEL_PASS",
                    format!("`{other}` is neither `auto` nor `off`"),
                ));
            }
        };
        let attach = match arguments.attach.trim() {
            "" | "auto" => Attach::Auto,
            "tcx" => Attach::Tcx,
            "clsact" => Attach::Clsact,
            other => {
                return Err(invalid(
                    "SANDGATE_ATTACH",
                    format!("`{other}` is none of `auto`, `tcx` and `clsact`"),
                ));
            }
        };
        let node = arguments.node;
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
        if node.is_empty() || node.len() > 253 || !node.bytes().all(plain) {
            return Err(invalid(
                "--node",
                "must be a name of letters, digits, `-`, `.` and `_`",
            ));
        }
        let instance = arguments.run_dir.as_os_str().as_encoded_bytes();
        let range6 = Range6::parse(arguments.sandbox_cidr6.trim(), instance)
            .map_err(|error| invalid("SANDGATE_SANDBOX_CIDR6", error.to_string()))?;
        Ok(Self {
            run_dir: arguments.run_dir,
            spool_dir: arguments.data_dir.join("spool"),
            spool_bytes: size("SANDGATE_AUDIT_SPOOL", &arguments.audit_spool)?,
            dns_upstream,
            allow_private,
            deny_ranges,
            sandbox_cidr: sandbox_cidr(&arguments.sandbox_cidr)?,
            sandbox_cidr6: range6.network(),
            kernel_pass,
            attach,
            upstream_ca_file: arguments
                .upstream_ca_file
                .filter(|path| !path.as_os_str().is_empty()),
            metrics_addr: match arguments.metrics_addr.trim() {
                "" => Place::At(DEFAULT_METRICS),
                text => text
                    .parse()
                    .map_err(|error: InvalidPlace| invalid(ADDRESS_VARIABLE, error.to_string()))?,
            },
            node,
        })
    }
}

fn invalid(variable: &'static str, problem: impl Into<String>) -> ConfigError {
    ConfigError {
        variable,
        problem: problem.into(),
    }
}

/// A size in bytes: a number with `Ki`, `Mi`, `Gi`, or nothing after it.
fn size(variable: &'static str, text: &str) -> Result<u64, ConfigError> {
    let text = text.trim();
    let (number, unit) = text.split_at(
        text.find(|letter: char| !letter.is_ascii_digit())
            .unwrap_or(text.len()),
    );
    let shift = match unit {
        "" => Some(0),
        "Ki" => Some(10),
        "Mi" => Some(20),
        "Gi" => Some(30),
        _ => None,
    };
    let bytes = number
        .parse::<u64>()
        .ok()
        .zip(shift)
        .and_then(|(number, shift)| number.checked_mul(1 << shift));
    match bytes {
        Some(bytes) if (spool::SMALLEST..=SPOOL_MAX).contains(&bytes) => Ok(bytes),
        Some(_) | None => Err(invalid(
            variable,
            format!("`{text}` is not a size between 1Mi and 64Gi, for example `256Mi`"),
        )),
    }
}

fn servers(list: &str) -> Result<Vec<SocketAddr>, ConfigError> {
    list.split(',')
        .map(str::trim)
        .map(|text| {
            let server = text.parse::<SocketAddr>().map_err(|_invalid| {
                invalid(
                    "SANDGATE_DNS_UPSTREAM",
                    format!("`{text}` is not `ip:port`, for example `192.0.2.53:53`"),
                )
            })?;
            if server.port() == 0 || server.ip().is_unspecified() || server.ip().is_multicast() {
                return Err(invalid(
                    "SANDGATE_DNS_UPSTREAM",
                    format!("`{text}` cannot be asked"),
                ));
            }
            Ok(server)
        })
        .collect()
}

fn resolv_conf(path: &Path) -> Result<Vec<SocketAddr>, ConfigError> {
    let variable = "SANDGATE_DNS_UPSTREAM";
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(error) => {
            return Err(invalid(
                variable,
                format!("not set, and {}: {error}", path.display()),
            ));
        }
    };
    let servers: Vec<SocketAddr> = nameservers(&text)
        .map(|ip| SocketAddr::new(ip, DNS_PORT))
        .collect();
    if servers.is_empty() {
        let problem = format!(
            "not set, and {} names no `nameserver`; set it to `ip:port`",
            path.display()
        );
        return Err(invalid(variable, problem));
    }
    Ok(servers)
}

fn nameservers(text: &str) -> impl Iterator<Item = IpAddr> {
    text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        (words.next() == Some("nameserver"))
            .then(|| words.next()?.parse().ok())
            .flatten()
    })
}

fn sandbox_cidr(text: &str) -> Result<Ipv4Net, ConfigError> {
    let variable = "SANDGATE_SANDBOX_CIDR";
    let range: Ipv4Net = text.parse().map_err(|_invalid| {
        invalid(
            variable,
            format!("`{text}` is not an IPv4 range, for example `10.213.0.0/16`"),
        )
    })?;
    if range.trunc() != range {
        let right = range.trunc();
        return Err(invalid(
            variable,
            format!("`{text}` has bits beyond its prefix; `{right}` has not"),
        ));
    }
    if range.prefix_len() > SMALLEST_CIDR {
        return Err(invalid(
            variable,
            format!("`{text}` is smaller than a /{SMALLEST_CIDR}"),
        ));
    }
    let network = range.network();
    if network.is_loopback() || network.is_multicast() || network.is_unspecified() || network.is_link_local()
    {
        return Err(invalid(variable, format!("`{text}` is not a range for hosts")));
    }
    Ok(range)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments() -> Arguments {
        Arguments {
            run_dir: "/run/sandgate".into(),
            data_dir: "/var/lib/sandgate".into(),
            audit_spool: "256Mi".into(),
            dns_upstream: Some("192.0.2.53:53, [2001:db8::1]:5353".into()),
            allow_private: Some("10.0.0.5/32:443".into()),
            deny_ranges: Some("198.51.100.0/24,2001:db8:5::/48".into()),
            sandbox_cidr: "10.213.0.0/16".into(),
            sandbox_cidr6: String::new(),
            kernel_pass: "auto".into(),
            attach: "auto".into(),
            upstream_ca_file: None,
            metrics_addr: "off".into(),
            node: "local".into(),
            remove_uplink: false,
            check: false,
        }
    }

    #[test]
    fn what_is_right_is_taken() {
        let config = Config::try_from(arguments()).expect("accepted");
        assert_eq!(config.dns_upstream.len(), 2);
        assert_eq!(config.allow_private.len(), 1);
        assert_eq!(config.deny_ranges.ranges().len(), 2);
        assert_eq!(config.kernel_pass, KernelPass::Auto);
        assert_eq!(config.attach, Attach::Auto);
        assert_eq!(config.spool_bytes, 256 << 20);
        assert!(config.sandbox_cidr6.is_some());
    }

    #[test]
    fn what_is_wrong_is_named() {
        type Spoil = fn(&mut Arguments);
        let cases: [(&str, Spoil); 18] = [
            ("SANDGATE_RUN_DIR", |arguments| arguments.run_dir = "run".into()),
            ("SANDGATE_DATA_DIR", |arguments| arguments.data_dir = "lib".into()),
            ("SANDGATE_AUDIT_SPOOL", |arguments| {
                arguments.audit_spool = "256M".into()
            }),
            ("SANDGATE_AUDIT_SPOOL", |arguments| {
                arguments.audit_spool = "1023Ki".into()
            }),
            ("SANDGATE_AUDIT_SPOOL", |arguments| {
                arguments.audit_spool = "99999999999999999999Gi".into()
            }),
            ("SANDGATE_DNS_UPSTREAM", |arguments| {
                arguments.dns_upstream = Some("192.0.2.53".into())
            }),
            ("SANDGATE_DNS_UPSTREAM", |arguments| {
                arguments.dns_upstream = Some("192.0.2.53:53,".into())
            }),
            ("SANDGATE_DNS_UPSTREAM", |arguments| {
                arguments.dns_upstream = Some("192.0.2.53:0".into())
            }),
            ("SANDGATE_ALLOW_PRIVATE", |arguments| {
                arguments.allow_private = Some("10.0.0.5/33:443".into())
            }),
            ("SANDGATE_DENY_RANGES", |arguments| {
                arguments.deny_ranges = Some("198.51.100.7/24".into())
            }),
            ("SANDGATE_SANDBOX_CIDR", |arguments| {
                arguments.sandbox_cidr = "fd00::/64".into()
            }),
            ("SANDGATE_SANDBOX_CIDR", |arguments| {
                arguments.sandbox_cidr = "10.213.1.0/16".into()
            }),
            ("SANDGATE_SANDBOX_CIDR", |arguments| {
                arguments.sandbox_cidr = "10.213.0.0/30".into()
            }),
            ("SANDGATE_SANDBOX_CIDR6", |arguments| {
                arguments.sandbox_cidr6 = "2001:db8::/64".into()
            }),
            ("SANDGATE_KERNEL_PASS", |arguments| {
                arguments.kernel_pass = "on".into()
            }),
            ("SANDGATE_ATTACH", |arguments| arguments.attach = "TCX".into()),
            ("SANDGATE_NETD_METRICS_ADDR", |arguments| {
                arguments.metrics_addr = "9465".into()
            }),
            ("--node", |arguments| arguments.node = "a&b".into()),
        ];
        for (variable, spoil) in cases {
            let mut arguments = arguments();
            spoil(&mut arguments);
            let error = Config::try_from(arguments).expect_err(variable);
            assert_eq!(error.variable, variable, "{error}");
        }
    }

    #[test]
    fn the_means_of_attachment_are_the_operators() {
        for (text, means) in [
            ("auto", Attach::Auto),
            ("", Attach::Auto),
            ("tcx", Attach::Tcx),
            (" clsact ", Attach::Clsact),
        ] {
            let chosen = Arguments {
                attach: text.into(),
                ..arguments()
            };
            assert_eq!(
                Config::try_from(chosen).expect("accepted").attach,
                means,
                "{text:?}"
            );
        }
    }

    #[test]
    fn resolv_conf_names_the_servers_when_nothing_else_does() {
        let text = "# nameserver 192.0.2.1\nsearch x\nnameserver 192.0.2.53 # local\nnameserver fe80::1%eth0\nnameserver ::1\n";
        let found: Vec<String> = nameservers(text).map(|ip| ip.to_string()).collect();
        assert_eq!(found, ["192.0.2.53", "::1"]);
    }
}
