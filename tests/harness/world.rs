//! A node and an internet, joined by one link, far from any real network.
//!
//! ```text
//!   node                          internet (answers for every address there is)
//!   198.51.100.130/30 uplink ──── 198.51.100.129/30   capture: everything on this link
//!   2001:db8:ffff::2/64           2001:db8:ffff::1/64
//! ```
//! The internet accepts packets to *any* destination, private and metadata addresses too: what should not
//! have been sent is seen there, not lost on the way.

use std::{
    io::{BufRead as _, BufReader},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Arc, OnceLock},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::mount::{MsFlags, mount};
use tempfile::TempDir;
use tokio::runtime::Runtime;

use crate::{
    ca::{CertificateAuthority, Validity},
    capture::Capture,
    collector::Collector,
    dns::{Answer, Dns},
    mirror::Mirror,
    namespace::Namespace,
    wait,
    web::Web,
};

/// The node's address on the link.
pub const NODE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 130);
/// The internet's address on the link: the node's default gateway.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 129);
/// The name server the node uses.
pub const RESOLVER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 53);
/// Others that a node may be told to use besides.
pub const SECOND_RESOLVER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 54);
/// The same, by IPv6.
pub const RESOLVER6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x53, 0, 0, 0, 0, 0x53);
/// A public name server that is not the node's.
pub const OTHER_RESOLVER: Ipv4Addr = Ipv4Addr::new(8, 8, 8, 8);
/// The node's IPv6 address on the link.
pub const NODE6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 2);
/// The internet's: the node's default gateway.
pub const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 1);
/// `six.test` and `dual.test`.
pub const OK6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x10, 0, 0, 0, 0, 0x10);
/// `mirror.test`.
pub const MIRROR6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x20, 0, 0, 0, 0, 0x20);
/// The attacker, `evil6.test`.
pub const EVIL6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x66, 0, 0, 0, 0, 0x66);
/// `ok.test`, and another tenant of the same front, `tenant.test`.
pub const OK: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
/// `api.test` and `plain.test`.
pub const API: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 20);
/// Everything below `wild.test`.
pub const WILD: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 30);
/// The attacker, `evil.test`.
pub const EVIL: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 66);

/// Longest wait for a link to be at rest.
const SETTLED: Duration = Duration::from_secs(60);

/// A runtime for every server and client of the harness. Sockets are made in a namespace and then served
/// here: it does not matter where they are polled.
pub fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        builder
            .worker_threads(2)
            .enable_all()
            .thread_name("world")
            .build()
            .expect("a tokio runtime")
    })
}

/// What the internet of a world shall hold.
#[derive(Default)]
pub struct Builder {
    names: Vec<(String, Answer)>,
    sites: Vec<(IpAddr, Vec<&'static str>)>,
    mirrors: Vec<(IpAddr, Vec<&'static str>, Front)>,
    tcp: Vec<(SocketAddr, &'static str)>,
    udp: Vec<SocketAddr>,
    unwatched: bool,
    without_ipv6: bool,
}

/// What a mirror shows by TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Front {
    /// HTTP/2 and HTTP/1.1.
    Both,
    /// HTTP/1.1 alone.
    Http1,
    /// A certificate that is over.
    Over,
    /// A certificate of an authority that nobody trusts.
    Stranger,
}

/// The world. Dropping it ends every process of the node and everything they made.
pub struct World {
    /// The internet's zones and what was asked of them.
    pub dns: Dns,
    /// What the web servers saw.
    pub web: Web,
    /// What the servers that look closely saw.
    pub mirror: Mirror,
    /// Signs the web servers' certificates.
    pub ca: CertificateAuthority,
    capture: Option<Capture>,
    tcp: Vec<Collector>,
    udp: Vec<Collector>,
    // Dropped in this order: processes, then the namespaces they live in, then their files.
    init: Init,
    node: Arc<Namespace>,
    internet: Namespace,
    directory: TempDir,
}

impl World {
    /// An empty internet to be filled.
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// The fixture of the attack cases: `ok.test`, `*.wild.test`, `api.test`, `plain.test`, the attacker's
    /// `evil.test`, and listeners on whatever a sandbox must never reach.
    pub fn fixture() -> Builder {
        let private = [
            "10.0.0.5",
            "172.16.0.5",
            "192.168.0.5",
            "100.64.0.5",
            "169.254.169.254",
            "168.63.129.16",
        ];
        // Too many for a datagram.
        let many: Vec<String> = (100..160).map(|last| format!("203.0.113.{last}")).collect();
        let mut builder = Self::builder()
            .name("ok.test", &["203.0.113.10"])
            .name("tenant.test", &["203.0.113.10"])
            .name("api.test", &["203.0.113.20"])
            .name("plain.test", &["203.0.113.20"])
            .name("wild.test", &["203.0.113.30"])
            .name("*.wild.test", &["203.0.113.30"])
            .name("evil.test", &["203.0.113.66"])
            .name("*.evil.test", &["203.0.113.66"])
            .name("rebind.test", &["10.0.0.5", "127.0.0.1", "169.254.169.254", "198.51.100.130"])
            .name("half-rebind.test", &["10.0.0.5", "203.0.113.10"])
            .alias("alias.test", "hop.alias.test")
            .alias("hop.alias.test", "ok.test")
            .alias("loop.test", "loop.test")
            .alias("trap.test", "inside.test")
            .name("inside.test", &["10.0.0.5"])
            .name("many.test", &many.iter().map(String::as_str).collect::<Vec<_>>())
            .name("xwild.test", &["203.0.113.66"])
            // What the README's tour visits.
            .name("example.com", &["203.0.113.40"])
            .name("example.org", &["203.0.113.41"])
            .name("httpbin.org", &["203.0.113.42"])
            .site("203.0.113.10", &["ok.test", "dual.test", "tenant.test", "alias.test", "half-rebind.test"])
            .site("203.0.113.20", &["api.test", "plain.test"])
            .site("203.0.113.30", &["wild.test", "*.wild.test", "deep.down.wild.test"])
            .site("203.0.113.40", &["example.com"])
            .mirror("203.0.113.42", &["httpbin.org"], Front::Both)
            .site("203.0.113.66", &["evil.test", "*.evil.test"])
            .collect_tcp("203.0.113.10", &[22, 8443], "SSH-2.0-world\r\n")
            .collect_tcp("203.0.113.66", &[22, 53, 853, 5353, 8080, 8443], "")
            // An address that will become the node's.
            .collect_tcp("203.0.113.200", &[7777], "the internet\r\n")
            .collect_udp("203.0.113.66", &[53, 443, 853, 5353, 8080])
            .collect_udp("203.0.113.10", &[443, 8080]);
        for address in private {
            builder = builder
                .collect_tcp(address, &[80, 443], "")
                .collect_udp(address, &[443]);
        }
        builder
    }

    /// The same with hosts of IPv6: `six.test` has nothing else, `dual.test` both.
    pub fn fixture6() -> Builder {
        let hidden = ["fd00:ec2::254", "fd00:5::5", "64:ff9b::a00:5", "2002:a00:5::1"];
        let mut builder = Self::fixture()
            .name("six.test", &["2001:db8:10::10"])
            .name("dual.test", &["203.0.113.10", "2001:db8:10::10"])
            .name("mirror.test", &["2001:db8:20::20"])
            .name("evil6.test", &["2001:db8:66::66"])
            .name("rebind6.test", &hidden)
            .name(
                "half-rebind6.test",
                &[
                    "fe80::1",
                    "::1",
                    "::ffff:10.0.0.5",
                    "2001:db8:ffff::2",
                    "2001:db8:10::10",
                ],
            )
            .site("2001:db8:10::10", &["six.test", "dual.test", "half-rebind6.test"])
            .mirror("2001:db8:20::20", &["mirror.test"], Front::Both)
            .collect_tcp("2001:db8:10::10", &[22], "SSH-2.0-world\r\n")
            .collect_tcp("2001:db8:66::66", &[22, 53, 443, 853, 8080], "")
            .collect_tcp("2001:db8:200::1", &[7777], "the internet\r\n")
            .collect_udp("2001:db8:10::10", &[443, 8080])
            .collect_udp("2001:db8:66::66", &[53, 443, 853, 8080]);
        for address in hidden {
            builder = builder.collect_tcp(address, &[80, 443], "");
        }
        builder
    }

    /// Every packet between node and internet.
    ///
    /// # Panics
    /// In a world that was built to be unwatched.
    pub fn capture(&self) -> &Capture {
        self.capture.as_ref().expect("a watched world")
    }

    /// The TCP collector on an address of the internet.
    ///
    /// # Panics
    /// When the builder made none there.
    pub fn tcp_collector(&self, address: impl Into<SocketAddr>) -> &Collector {
        find(&self.tcp, address.into())
    }

    /// The UDP collector on an address of the internet.
    ///
    /// # Panics
    /// When the builder made none there.
    pub fn udp_collector(&self, address: impl Into<SocketAddr>) -> &Collector {
        find(&self.udp, address.into())
    }

    /// The node's namespaces.
    pub fn node(&self) -> &Namespace {
        &self.node
    }

    /// The same, to be kept.
    pub fn place(&self) -> &Arc<Namespace> {
        &self.node
    }

    /// Another network namespace on the node, with a link of its own to the internet. What passes there is not in the
    /// capture.
    ///
    /// # Errors
    /// When there is one already.
    pub fn annex(&self) -> Result<Arc<Namespace>> {
        let annex = Namespace::network("annex")?;
        let there = annex.task().join("ns/net");
        self.internet.ip(&format!(
            "link add annex type veth peer name uplink netns {}",
            there.display()
        ))?;
        self.internet.sysctl("net/ipv4/conf/annex/rp_filter", "0")?;
        for line in ["addr add 198.51.100.133/30 dev annex", "link set annex up"] {
            self.internet.ip(line)?;
        }
        for line in [
            "addr add 198.51.100.134/30 dev uplink",
            "link set uplink up",
            "route add default via 198.51.100.133",
        ] {
            annex.ip(line)?;
        }
        // Only then does it look the same each time.
        let up = || {
            annex
                .ip("-o link show uplink")
                .ok()
                .filter(|line| line.contains("state UP"))
        };
        wait::within(SETTLED, up).context("the annex's link does not come up")?;
        Ok(Arc::new(annex))
    }

    /// The internet's namespace.
    pub fn internet(&self) -> &Namespace {
        &self.internet
    }

    /// Gives the node another address, as an administrator might at any time.
    ///
    /// # Errors
    /// When it has it already.
    pub fn add_node_address(&self, address: impl Into<IpAddr>) -> Result<()> {
        let line = match address.into() {
            IpAddr::V4(address) => format!("addr add {address}/32 dev lo"),
            IpAddr::V6(address) => format!("addr add {address}/128 dev lo nodad"),
        };
        self.node.ip(&line).map(|_| ())
    }

    /// Takes an address from the node.
    ///
    /// # Errors
    /// When it does not have it.
    pub fn remove_node_address(&self, address: impl Into<IpAddr>) -> Result<()> {
        let address = address.into();
        let length = if address.is_ipv4() { 32 } else { 128 };
        self.node
            .ip(&format!("addr del {address}/{length} dev lo"))
            .map(|_| ())
    }

    /// A directory that goes with the world, readable by all, as every parent of a root file system must be.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The process all of the node's processes descend from, as numbered outside.
    pub fn init_pid(&self) -> u32 {
        self.init.0.id()
    }
}

impl Builder {
    /// `name` (which may begin with `*.`) resolves to these addresses.
    #[must_use]
    pub fn name(mut self, name: &str, addresses: &[&str]) -> Self {
        let addresses = addresses
            .iter()
            .map(|text| text.parse().expect("an address"))
            .collect();
        self.names.push((name.to_owned(), Answer::Addresses(addresses)));
        self
    }

    /// `name` is another name for `target`.
    #[must_use]
    pub fn alias(mut self, name: &str, target: &str) -> Self {
        self.names
            .push((name.to_owned(), Answer::Alias(target.to_owned())));
        self
    }

    /// A web server on ports 80 and 443 with a certificate for `names`.
    #[must_use]
    pub fn site(mut self, address: &str, names: &[&'static str]) -> Self {
        self.sites
            .push((address.parse().expect("an address"), names.to_vec()));
        self
    }

    /// A server that looks closely, in clear on port 80 and by TLS on 443 and 8443, with a certificate for `names`.
    #[must_use]
    pub fn mirror(mut self, address: &str, names: &[&'static str], front: Front) -> Self {
        self.mirrors
            .push((address.parse().expect("an address"), names.to_vec(), front));
        self
    }

    /// TCP ports that take everything, after saying `banner`.
    #[must_use]
    pub fn collect_tcp(mut self, address: &str, ports: &[u16], banner: &'static str) -> Self {
        let address: IpAddr = address.parse().expect("an address");
        self.tcp
            .extend(ports.iter().map(|&port| (SocketAddr::new(address, port), banner)));
        self
    }

    /// UDP ports that take everything.
    #[must_use]
    pub fn collect_udp(mut self, address: &str, ports: &[u16]) -> Self {
        let address: IpAddr = address.parse().expect("an address");
        self.udp
            .extend(ports.iter().map(|&port| SocketAddr::new(address, port)));
        self
    }

    /// The node has an IPv6 address and no way to the world by it.
    #[must_use]
    pub fn without_ipv6(mut self) -> Self {
        self.without_ipv6 = true;
        self
    }

    /// Without capture: for measurements, which a copy of every packet would be part of.
    #[must_use]
    pub fn unwatched(mut self) -> Self {
        self.unwatched = true;
        self
    }

    /// Makes the world.
    ///
    /// # Errors
    /// Without root, or when it would have a way out.
    pub fn build(self) -> Result<Arc<World>> {
        let directory = tempfile::Builder::new().prefix("sg-world-").tempdir()?;
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755))?;
        let internet = Namespace::network("internet")?;
        let node = Arc::new(Namespace::network_and_mounts("node")?);
        let interface = join(&node, &internet)?;
        if self.without_ipv6 {
            node.ip("-6 route del default")?;
        }
        assert_no_uplink(&node, &internet)?;
        use_resolver(&node, directory.path())?;
        let init = Init::start(&node)?;
        let capture = if self.unwatched {
            None
        } else {
            Some(Capture::start(&internet, interface, Arc::clone(&node), GATEWAY)?)
        };

        let dns = Dns::default();
        for (name, answer) in self.names {
            dns.set(&name, answer);
        }
        let servers: [IpAddr; 4] = [
            RESOLVER.into(),
            SECOND_RESOLVER.into(),
            RESOLVER6.into(),
            OTHER_RESOLVER.into(),
        ];
        for server in servers {
            dns.serve(&internet, (server, 53).into())?;
        }
        let (web, ca) = (Web::default(), CertificateAuthority::new()?);
        for (address, names) in self.sites {
            web.serve(&internet, (address, 80).into(), None)?;
            web.serve(&internet, (address, 443).into(), Some(ca.server(&names)?))?;
        }
        let (mirror, stranger) = (Mirror::default(), CertificateAuthority::new()?);
        for (address, names, front) in self.mirrors {
            let both = ["h2", "http/1.1"];
            let tls = match front {
                Front::Both => ca.server_with(&names, &both, Validity::Now)?,
                Front::Http1 => ca.server_with(&names, &both[1..], Validity::Now)?,
                Front::Over => ca.server_with(&names, &both, Validity::Over)?,
                Front::Stranger => stranger.server_with(&names, &both, Validity::Now)?,
            };
            mirror.serve(&internet, (address, 80).into(), None)?;
            for port in [443, 8443] {
                mirror.serve(&internet, (address, port).into(), Some(Arc::clone(&tls)))?;
            }
        }
        let tcp = self
            .tcp
            .into_iter()
            .map(|(address, banner)| Collector::tcp(&internet, address, banner));
        let tcp = tcp.collect::<Result<_>>()?;
        let udp = self
            .udp
            .into_iter()
            .map(|address| Collector::udp(&internet, address))
            .collect::<Result<_>>()?;
        Ok(Arc::new(World {
            dns,
            web,
            mirror,
            ca,
            capture,
            tcp,
            udp,
            init,
            node,
            internet,
            directory,
        }))
    }
}

fn find(collectors: &[Collector], address: SocketAddr) -> &Collector {
    let found = collectors.iter().find(|collector| collector.address == address);
    found.unwrap_or_else(|| panic!("the world has no collector on {address}"))
}

/// Joins the two and gives the index of the internet's end.
fn join(node: &Namespace, internet: &Namespace) -> Result<usize> {
    let there = node.task().join("ns/net");
    internet.ip(&format!(
        "link add world type veth peer name uplink netns {}",
        there.display()
    ))?;
    // Nothing of the world needs an address of its own: a route makes the internet answer for all.
    for key in ["net/ipv4/ip_nonlocal_bind", "net/ipv6/ip_nonlocal_bind"] {
        internet.sysctl(key, "1")?;
    }
    for key in ["net/ipv4/conf/all/rp_filter", "net/ipv4/conf/world/rp_filter"] {
        internet.sysctl(key, "0")?;
    }
    for line in [
        "addr add 198.51.100.129/30 dev world",
        "addr add 2001:db8:ffff::1/64 dev world nodad",
        "link set world up",
        "route add local default dev lo",
        // In the main table: that of local routes is asked first, and would take the node's own address too.
        "-6 route add local default dev lo table main",
    ] {
        internet.ip(line)?;
    }
    for line in [
        "addr add 198.51.100.130/30 dev uplink",
        "addr add 2001:db8:ffff::2/64 dev uplink nodad",
        "link set uplink up",
        "route add default via 198.51.100.129",
        "-6 route add default via 2001:db8:ffff::1",
    ] {
        node.ip(line)?;
    }
    let index = internet.ip("-o link show world")?;
    index
        .split(':')
        .next()
        .and_then(|index| index.parse().ok())
        .context("the link's index")
}

/// The one thing that must never be wrong: there is no way from here to a real network.
fn assert_no_uplink(node: &Namespace, internet: &Namespace) -> Result<()> {
    for (namespace, only) in [(node, "uplink"), (internet, "world")] {
        let links = namespace.ip("-o link show up")?;
        let names: Vec<&str> = links
            .lines()
            .filter_map(|line| line.split([':', '@']).nth(1))
            .map(str::trim)
            .collect();
        ensure!(
            names == ["lo", only],
            "the world has other interfaces than its own: {names:?}"
        );
    }
    let default = node.ip("route show default")?;
    ensure!(
        default.trim() == "default via 198.51.100.129 dev uplink",
        "the node's way out is {default}"
    );
    let default6 = node.ip("-6 route show default")?;
    let only = "default via 2001:db8:ffff::1 dev uplink ";
    ensure!(
        default6.is_empty() || default6.lines().count() == 1 && default6.starts_with(only),
        "the node's way out is {default6}"
    );
    for line in ["-4 route get 203.0.113.66", "-6 route get 2001:db8:66::66"] {
        let there = internet.ip(line)?;
        ensure!(there.starts_with("local "), "the internet forwards: {there}");
    }
    Ok(())
}

/// What the node's programs read as /etc/resolv.conf.
fn use_resolver(node: &Namespace, directory: &Path) -> Result<()> {
    let file = directory.join("resolv.conf");
    std::fs::write(&file, format!("nameserver {RESOLVER}\n"))?;
    let target = std::fs::canonicalize("/etc/resolv.conf").context("/etc/resolv.conf")?;
    node.run(move || {
        let nothing = None::<&str>;
        mount(Some(&file), &target, nothing, MsFlags::MS_BIND, nothing).context("the node's resolv.conf")
    })
}

/// PID 1 of the node: with it, every process of the node ends, also when this program is killed.
struct Init(Child);

impl Init {
    fn start(node: &Namespace) -> Result<Self> {
        // A process number space of its own needs a /proc of its own. The shell reaps what is orphaned while
        // it waits for `sleep`.
        let script = "mount -t proc proc /proc && echo up && while :; do sleep 1000; done";
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL", "sh", "-c", script])
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let child = node.run(move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWPID)?;
            anyhow::Ok(command.spawn()?)
        });
        let mut init = Self(child.context("the node's init (setpriv of util-linux)")?);
        let mut line = String::new();
        BufReader::new(init.0.stdout.as_mut().expect("a pipe")).read_line(&mut line)?;
        ensure!(line == "up\n", "the node's init did not start");
        Ok(init)
    }
}

impl Drop for Init {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}
