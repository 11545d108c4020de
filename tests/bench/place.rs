//! Where everything is measured: one internet with the origin, and four ways to it.
//!
//! ```text
//!  sandbox ── router (netd) ── [node] ── internet     through Sandgate
//!  deep ───── inner ────────── gate ──── internet     the same three links, the kernel forwards and masquerades
//!  plain ─────── middle ──────────────── internet     two links, the kernel forwards
//!                middle ──────────────── internet     one link
//! ```

use std::{
    fs,
    net::{Ipv4Addr, SocketAddrV4},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use harness::{
    ca::Validity,
    namespace::Namespace,
    node::Node,
    sandbox::{Organization, Sandbox},
    wait,
    world::{RESOLVER, World},
};
use serde_json::{Value, json};

pub(crate) mod peers;

use crate::load::{self, Access, Identity, NameServer, Origin, Server, Target, stream::Secure};

/// The origin.
pub(crate) const ORIGIN: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 50);
/// A port that a rule opens by the address alone: it leaves by the kernel.
pub(crate) const PASSED: u16 = 5001;
/// A port that a rule opens by the address's name, without a look at what is said: netd copies it.
pub(crate) const OPAQUE: u16 = 5002;
/// Answers every name with the origin's address, to whichever resolver asks.
const NAME_SERVER: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(203, 0, 113, 51), 53);
/// Plain's gateway, and where nginx and unbound listen.
pub(crate) const MIDDLE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 137);
/// Plain's address.
pub(crate) const PLAIN: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 138);
/// Names of the origin: what netd does with each is in the policy.
pub(crate) const NAMES: [&str; 3] = ["spliced.test", "read.test", "masked.test"];
/// One more, of which a rule lists what may be asked.
pub(crate) const LISTED: &str = "listed.test";
/// Ports of the origin by TLS on the way to which something else than netd reads.
pub(crate) const PEER_PORTS: [u16; 4] = [8441, 8442, 8443, 8444];
const API: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 8080);
/// A secret that netd puts into requests to `masked.test`, and masks in what comes back.
const SECRET: &str = "sk-bench-0123456789abcdefghijklmnopqrstuv";

/// Names, links and the origin, without Sandgate.
pub(crate) struct Ground {
    pub(crate) middle: Namespace,
    pub(crate) plain: Namespace,
    pub(crate) deep: Namespace,
    pub(crate) world: Arc<World>,
    _between: [Namespace; 2],
    _origin: Server,
    _names: Server,
    authorities: PathBuf,
}

impl Ground {
    pub(crate) fn make() -> Result<Self> {
        let mut builder = World::builder().unwatched();
        for name in NAMES.into_iter().chain([LISTED]) {
            builder = builder.name(name, &[&ORIGIN.to_string()]);
        }
        let world = builder.build()?;
        let (middle, plain) = (Namespace::network("middle")?, Namespace::network("plain")?);
        join(&world, &middle, &plain)?;
        let deep = Namespace::network("deep")?;
        let between = [Namespace::network("gate")?, Namespace::network("inner")?];
        join_deep(&world, &between, &deep)?;
        let (certificate, key) = world.ca.issue(&[&NAMES[..], &[LISTED]].concat(), Validity::Now)?;
        let file = |name: &str| world.directory().join(name);
        fs::write(file("origin.crt"), &certificate)?;
        fs::write(file("origin.key"), key.secret_pkcs8_der())?;
        fs::write(file("authority.pem"), world.ca.pem())?;
        let origin = Origin {
            address: ORIGIN,
            plain: vec![PASSED, OPAQUE],
            tls: [&[443][..], &PEER_PORTS].concat(),
            identity: Some(Identity {
                certificate: file("origin.crt"),
                key: file("origin.key"),
            }),
        };
        let origin = load::serve(world.internet(), origin)?;
        let authorities = file("authority.pem");
        let names = NameServer {
            listen: NAME_SERVER,
            address: ORIGIN,
        };
        let names = load::serve_dns(world.internet(), names)?;
        Ok(Self {
            middle,
            plain,
            deep,
            world,
            _between: between,
            _origin: origin,
            _names: names,
            authorities,
        })
    }

    /// The origin by TLS, for a client without netd.
    pub(crate) fn secure(&self, name: &str) -> Target {
        Target {
            to: SocketAddrV4::new(ORIGIN, 443),
            tls: Some(Secure {
                name: name.to_owned(),
                authorities: self.authorities.clone(),
                resolver: None,
            }),
        }
    }

    /// nginx in `middle` by this configuration, listening on this port of it.
    pub(crate) fn nginx(&self, port: u16, blocks: &str) -> Result<Option<Nginx>> {
        Nginx::start(&self.middle, self.world.directory(), port, blocks)
    }

    /// unbound in `middle`, forwarding to the name server that netd asks too.
    pub(crate) fn unbound(&self, port: u16) -> Result<Option<Unbound>> {
        Unbound::start(&self.middle, self.world.directory(), port)
    }
}

/// The origin in clear.
pub(crate) fn clear(to: Ipv4Addr, port: u16) -> Target {
    Target {
        to: SocketAddrV4::new(to, port),
        tls: None,
    }
}

fn place(namespace: &Namespace) -> String {
    namespace.task().join("ns/net").display().to_string()
}

/// What a node does to a packet that the kernel passes, without a program: two forwards, and one address for all.
fn join_deep(world: &World, [gate, inner]: &[Namespace; 2], deep: &Namespace) -> Result<()> {
    let links = [
        (
            world.internet(),
            "deepside",
            gate,
            "198.51.100.141",
            "198.51.100.142",
        ),
        (gate, "below", inner, "198.51.100.145", "198.51.100.146"),
        (inner, "below", deep, "198.51.100.149", "198.51.100.150"),
    ];
    for (above, name, below, address, other) in links {
        above.ip(&format!(
            "link add {name} type veth peer name outer netns {}",
            place(below)
        ))?;
        above.ip(&format!("addr add {address}/30 dev {name}"))?;
        above.ip(&format!("link set {name} up"))?;
        below.ip(&format!("addr add {other}/30 dev outer"))?;
        below.ip("link set outer up")?;
        below.ip(&format!("route add default via {address}"))?;
    }
    gate.ip("route add 198.51.100.148/30 via 198.51.100.146")?;
    for forwards in [gate, inner] {
        forwards.sysctl("net/ipv4/ip_forward", "1")?;
    }
    let masquerade = "add table ip gate; \
                      add chain ip gate out { type nat hook postrouting priority 100; }; \
                      add rule ip gate out oifname outer masquerade";
    let done = gate.command("nft", &[masquerade])?;
    ensure!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    Ok(())
}

fn join(world: &World, middle: &Namespace, plain: &Namespace) -> Result<()> {
    let internet = world.internet();
    internet.ip(&format!(
        "link add side type veth peer name uplink netns {}",
        place(middle)
    ))?;
    middle.ip(&format!(
        "link add inner type veth peer name eth0 netns {}",
        place(plain)
    ))?;
    for line in [
        "addr add 198.51.100.133/30 dev side",
        "link set side up",
        "route add 198.51.100.136/30 via 198.51.100.134",
    ] {
        internet.ip(line)?;
    }
    internet.sysctl("net/ipv4/conf/side/rp_filter", "0")?;
    for line in [
        "addr add 198.51.100.134/30 dev uplink",
        "link set uplink up",
        "route add default via 198.51.100.133",
        "addr add 198.51.100.137/30 dev inner",
        "link set inner up",
    ] {
        middle.ip(line)?;
    }
    middle.sysctl("net/ipv4/ip_forward", "1")?;
    for line in [
        "addr add 198.51.100.138/30 dev eth0",
        "link set eth0 up",
        "route add default via 198.51.100.137",
    ] {
        plain.ip(line)?;
    }
    Ok(())
}

/// Sandgate on the ground, with a sandbox whose policy has a rule for each way through netd.
pub(crate) struct Guarded {
    pub(crate) sandbox: Sandbox,
    /// The sandbox's network namespace.
    pub(crate) inside: Namespace,
    pub(crate) organization: Organization,
    authorities: PathBuf,
    // Stopped before its world goes.
    pub(crate) node: Node,
}

impl Guarded {
    pub(crate) fn start(ground: &Ground) -> Result<Self> {
        let names = NAME_SERVER.to_string();
        let node = start_node(&ground.world, &[("SANDGATE_DNS_UPSTREAM", &names)])?;
        let organization = node.register("bench");
        let secret = json!({ "name": "BENCH_KEY", "value": SECRET, "egress": {
            "hosts": ["masked.test"], "ports": [443], "inject": [{ "kind": "bearer" }],
        } });
        organization.client.post("/secrets").json(&secret).send().ok();
        let sandbox = organization.sandbox(&json!({ "network": policy(), "timeout_seconds": 86_400 }));
        // For as long as the name is remembered, the address is its.
        sandbox.sh_ok(&format!("getent hosts {}", NAMES[0]));
        let inside = Namespace::join("sandbox", &network_of(&node, &sandbox.id)?[0])?;
        let bundle = sandbox.sh_ok("cat /etc/ssl/certs/ca-certificates.crt");
        let authorities = ground.world.directory().join("inside.pem");
        fs::write(&authorities, bundle + "\n" + ground.world.ca.pem())?;
        Ok(Self {
            sandbox,
            inside,
            organization,
            authorities,
            node,
        })
    }

    /// The origin by TLS under a name, as a client in the sandbox sees it.
    pub(crate) fn secure(&self, name: &str) -> Target {
        Target {
            to: SocketAddrV4::new(ORIGIN, 443),
            tls: Some(Secure {
                name: name.to_owned(),
                authorities: self.authorities.clone(),
                resolver: Some(RESOLVER),
            }),
        }
    }

    /// The same in another sandbox, which has an authority of its own.
    pub(crate) fn secure_in(&self, ground: &Ground, sandbox: &Sandbox, name: &str) -> Result<Target> {
        let bundle = sandbox.sh_ok("cat /etc/ssl/certs/ca-certificates.crt");
        let authorities = ground.world.directory().join(format!("{}.pem", sandbox.id));
        fs::write(&authorities, bundle + "\n" + ground.world.ca.pem())?;
        let mut target = self.secure(name);
        if let Some(secure) = &mut target.tls {
            secure.authorities = authorities;
        }
        Ok(target)
    }

    /// The network namespace of another sandbox.
    pub(crate) fn inside_of(&self, sandbox: &str) -> Result<Namespace> {
        Namespace::join("another sandbox", &network_of(&self.node, sandbox)?[0])
    }

    /// The API for a load on the node.
    pub(crate) fn access(&self) -> Access {
        access(&self.organization)
    }
}

/// A node whose sandboxes are small enough that many fit on this disk.
pub(crate) fn start_node(world: &Arc<World>, settings: &[(&str, &str)]) -> Result<Node> {
    let mut all = vec![
        ("SANDGATE_DEFAULT_DISK", "128Mi"),
        ("MAX_SANDBOXES_PER_ORG", "200"),
    ];
    all.extend(settings);
    Node::start_with(world, &all)
}

/// The API for a load on the node.
pub(crate) fn access(organization: &Organization) -> Access {
    Access {
        api: API,
        key: organization.key.clone(),
    }
}

/// The files of a sandbox's network namespace, as they are called here and on the node.
pub(crate) fn network_of(node: &Node, sandbox: &str) -> Result<[PathBuf; 2]> {
    let processes = node.processes_of(sandbox);
    let first = processes
        .iter()
        .find(|process| process.numbers.last() == Some(&1));
    let first = first.with_context(|| format!("{sandbox} has no first process"))?;
    let numbers = [first.numbers.first(), first.numbers.get(1)];
    let [Some(here), Some(there)] = numbers else {
        bail!("{first:?} lives in too few namespaces");
    };
    Ok([here, there].map(|number| format!("/proc/{number}/ns/net").into()))
}

/// A rule for each way through netd.
pub(crate) fn policy() -> Value {
    json!({ "mode": "allowlist", "allowed_domains": ["masked.test"], "allowed_ports": [443], "rules": [
        { "name": "passed", "action": "allow", "cidrs": [format!("{ORIGIN}/32")],
          "ports": [PASSED.to_string()], "protocol": "tcp" },
        { "name": "opaque", "action": "allow", "domains": ["spliced.test"],
          "ports": [OPAQUE.to_string()], "protocol": "tcp" },
        { "name": "spliced", "action": "allow", "domains": ["spliced.test"], "ports": ["443"] },
        { "name": "read", "action": "allow", "domains": ["read.test"], "ports": ["443"], "tls": "intercept" },
        { "name": "listed", "action": "allow", "domains": [LISTED], "ports": ["443"],
          "http": [{ "methods": ["GET"], "paths": ["/"] }] },
    ] })
}

/// nginx, the peer of everything that relays.
pub(crate) struct Nginx(Child);

impl Nginx {
    fn start(namespace: &Namespace, directory: &Path, port: u16, blocks: &str) -> Result<Option<Self>> {
        if !Path::new("/usr/sbin/nginx").exists() {
            return Ok(None);
        }
        let stream = "/usr/lib/nginx/modules/ngx_stream_module.so";
        let module = if Path::new(stream).exists() {
            format!("load_module {stream};\n")
        } else if blocks.contains("stream {") {
            return Ok(None);
        } else {
            String::new()
        };
        let folder = directory.join(format!("nginx-{port}"));
        fs::create_dir_all(&folder)?;
        let own = folder.display();
        let text = format!(
            "{module}daemon off;\nuser root;\nworker_processes 2;\npid {own}/pid;\nerror_log stderr error;\n\
             events {{ worker_connections 1024; }}\n{}",
            blocks.replace("{own}", &own.to_string())
        );
        fs::write(folder.join("nginx.conf"), text)?;
        let mut command = Command::new("/usr/sbin/nginx");
        command
            .arg("-p")
            .arg(&folder)
            .args(["-e", "stderr", "-c"])
            .arg(folder.join("nginx.conf"))
            .stdin(Stdio::null());
        let child = namespace.run(move || command.spawn()).context("nginx")?;
        let nginx = Self(child);
        let listens = wait::within(Duration::from_secs(5), || {
            let to = SocketAddrV4::new(MIDDLE, port);
            namespace
                .run(move || std::net::TcpStream::connect(to))
                .ok()
                .map(drop)
        });
        ensure!(listens.is_some(), "nginx does not listen");
        Ok(Some(nginx))
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        end(&mut self.0);
    }
}

/// unbound, the peer of the resolver: without DNSSEC, which netd leaves to its upstream, and with what netd does too:
/// names in random case, private addresses stripped.
pub(crate) struct Unbound(Child);

impl Unbound {
    fn start(namespace: &Namespace, directory: &Path, port: u16) -> Result<Option<Self>> {
        let program = "/usr/sbin/unbound";
        if !Path::new(program).exists() {
            return Ok(None);
        }
        let file = directory.join("unbound.conf");
        let private: String = [
            "10.0.0.0/8",
            "127.0.0.0/8",
            "169.254.0.0/16",
            "172.16.0.0/12",
            "192.168.0.0/16",
        ]
        .map(|range| format!("  private-address: {range}\n"))
        .concat();
        let text = format!(
            "server:\n  interface: {MIDDLE}\n  port: {port}\n  access-control: {PLAIN}/32 allow\n  chroot: \"\"\n  \
             username: \"\"\n  pidfile: \"\"\n  directory: \"{}\"\n  use-syslog: no\n  verbosity: 0\n  \
             num-threads: 2\n  so-reuseport: yes\n  module-config: \"iterator\"\n  use-caps-for-id: yes\n  \
             outgoing-range: 4096\n  num-queries-per-thread: 2048\n  local-zone: \"test.\" nodefault\n{private}\
             remote-control:\n  control-enable: no\nforward-zone:\n  name: \".\"\n  forward-addr: {}\n",
            directory.display(),
            NAME_SERVER.ip(),
        );
        fs::write(&file, text)?;
        let mut command = Command::new(program);
        command.arg("-d").arg("-c").arg(file).stdin(Stdio::null());
        let child = namespace.run(move || command.spawn()).context("unbound")?;
        let unbound = Self(child);
        // By TCP: it listens for both.
        let listens = wait::within(Duration::from_secs(20), || {
            let to = SocketAddrV4::new(MIDDLE, port);
            namespace
                .run(move || std::net::TcpStream::connect(to))
                .ok()
                .map(drop)
        });
        ensure!(listens.is_some(), "unbound does not listen");
        Ok(Some(unbound))
    }
}

impl Drop for Unbound {
    fn drop(&mut self) {
        end(&mut self.0);
    }
}

/// By SIGTERM, so that its workers end with it.
fn end(child: &mut Child) {
    if let Ok(number) = i32::try_from(child.id()) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(number), nix::sys::signal::SIGTERM).ok();
    }
    child.wait().ok();
}
