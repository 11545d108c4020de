//! What leaves by the kernel, without netd: that it does, that it is recorded and cut, that nothing else gets out that
//! way, and that the node is as it was where it cannot be had, and afterwards.

pub(crate) mod doubt;

use std::{
    fmt::Display,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use anyhow::{Result, ensure};
use harness::{
    namespace::Namespace,
    node::Node,
    probe::{self, Probe},
    sandbox::{Organization, Sandbox},
    snapshot::Snapshot,
    suite::Fixture,
    wait,
    world::{EVIL, NODE, OK, World},
};
use serde_json::{Value, json};

/// Longest wait for what happens at once, or within seconds.
pub(crate) const SOON: Duration = Duration::from_secs(60);
/// Longest wait for what is tried again only after a while.
pub(crate) const LATER: Duration = Duration::from_secs(120);
/// How the uplink's end in the node's namespace begins.
pub(crate) const UPLINK: &str = "sgup";
/// A port on which the internet's collectors echo what they get.
const ECHO: u16 = 8443;
/// The same of UDP.
const DATAGRAMS: u16 = 8080;

/// A node whose kernel forwards.
pub(crate) struct Passing {
    organization: Organization,
    node: Node,
    world: Arc<World>,
}

impl Fixture for Passing {
    fn start() -> Result<Self> {
        let world = World::fixture().build()?;
        let node = Node::start(&world)?;
        ensure!(passes(&node) == Ok(()), "no kernel pass: {:?}", passes(&node));
        Ok(Self {
            organization: node.register("passes"),
            node,
            world,
        })
    }

    fn report(&self) -> String {
        self.node.report()
    }
}

impl Passing {
    fn sandbox(&self, policy: &Value) -> Sandbox {
        self.organization.sandbox(&json!({ "network": policy }))
    }
}

/// Whether the node says that it forwards IPv4; why not.
pub(crate) fn passes(node: &Node) -> Result<(), String> {
    says(node, "kernel_pass")
}

/// The same of IPv6.
pub(crate) fn passes6(node: &Node) -> Result<(), String> {
    says(node, "kernel_pass6")
}

fn says(node: &Node, field: &str) -> Result<(), String> {
    let health = node.client().get("//ready").send().ok();
    let first = &health["nodes"][0];
    if first[field] == true {
        return Ok(());
    }
    Err(first[format!("{field}_reason")]
        .as_str()
        .unwrap_or_default()
        .to_owned())
}

/// What everything that may leave by address and port alone does.
pub(crate) fn open(ports: &[u16]) -> Value {
    json!({ "mode": "allow_all", "allowed_ports": ports })
}

/// A client in the sandbox that sends a line now and again on one connection, and writes how far it came.
pub(crate) fn chatter(sandbox: &Sandbox, to: impl Display, port: u16) {
    let program = format!(
        "import socket, time
connection = socket.create_connection((\"{to}\", {port}))
connection.settimeout(20)
count = 0
while True:
    try:
        connection.sendall(b\"x\" * 100)
        if not connection.recv(1000): break
    except OSError as error:
        print(\"ended\", type(error).__name__, flush=True)
        break
    count += 1
    print(count, flush=True)
    time.sleep(0.02)
"
    );
    sandbox.write("/workspace/chatter.py", program);
    sandbox.background("exec python3 /workspace/chatter.py", |sandbox| {
        sandbox.sh("grep -q 5 /workspace/background.log").exit_code == 0
    });
}

fn said(sandbox: &Sandbox) -> u64 {
    let last = sandbox.sh("tail -n 1 /workspace/background.log").stdout;
    last.trim()
        .parse()
        .unwrap_or_else(|_| panic!("the connection has ended: {last}"))
}

#[track_caller]
pub(crate) fn goes_on(sandbox: &Sandbox) {
    let before = said(sandbox);
    wait::until("the open connection goes on", SOON, || {
        (said(sandbox) > before + 20).then_some(())
    });
}

pub(crate) fn what_address_and_port_allow_leaves_by_the_kernel_and_is_recorded(machine: &Passing) {
    let sandbox = machine.sandbox(&open(&[443, ECHO]));
    let probe = Probe::install(&sandbox, &machine.world);
    probe
        .try_one(&probe::https("ok.test", "ok.test"))
        .assert_answered("hello from ok.test");
    // Not read, so of TLS nothing is known; the name is that of the address.
    let event =
        sandbox.audited(&json!({ "protocol": "tcp", "verdict": "allow", "host": "ok.test", "port": 443 }));
    assert_eq!(event["ip"], OK.to_string(), "{event}");
    assert_eq!(event["reason"], "allowed", "{event}");
    for bytes in ["bytes_up", "bytes_down"] {
        assert!(event[bytes].as_u64().is_some_and(|bytes| bytes > 100), "{event}");
    }
    // The other end sees the node, and nothing of the sandbox.
    probe.try_one(&probe::tcp(OK, ECHO, "canary"));
    let arrivals = machine.world.tcp_collector((OK, ECHO)).arrivals();
    let from: SocketAddr = arrivals.last().expect("it arrived").from;
    assert_eq!(from.ip(), NODE);
    sandbox.stop();
}

pub(crate) fn tightening_ends_an_open_connection(machine: &Passing) {
    let sandbox = machine.sandbox(&open(&[ECHO]));
    chatter(&sandbox, OK, ECHO);
    sandbox.set_network(&json!({ "mode": "deny_all" }));
    let mark = machine.world.capture().mark();
    wait::until("the connection is cut", SOON, || {
        let log = sandbox.sh("tail -n 1 /workspace/background.log").stdout;
        log.contains("ended").then_some(())
    });
    let event = sandbox.audited(&json!({ "protocol": "tcp", "port": ECHO, "reason": "policy_tightened" }));
    assert!(
        event["bytes_up"].as_u64().is_some_and(|bytes| bytes > 500),
        "{event}"
    );
    machine.world.capture().assert_nothing_to(OK, mark);
    sandbox.stop();
}

pub(crate) fn nothing_else_gets_out_that_way(machine: &Passing) {
    let everything = json!({ "mode": "allowlist", "rules": [{
        "name": "everything", "action": "allow", "cidrs": ["0.0.0.0/0"], "ports": ["1-65535"], "protocol": "tcp",
    }] });
    let (sandbox, other) = (machine.sandbox(&everything), machine.sandbox(&everything));
    let probe = Probe::install(&sandbox, &machine.world);
    let neighbour = other.sh_ok("hostname -i | cut -d\" \" -f1");
    other.background("exec python3 -m http.server 8000", |other| {
        other.sh("curl -s -m 5 http://127.0.0.1:8000/").exit_code == 0
    });
    let new = Ipv4Addr::new(203, 0, 113, 200);
    let mark = machine.world.capture().mark();
    let server = machine
        .world
        .node()
        .run(|| std::net::TcpListener::bind("0.0.0.0:7777").expect("a listener on the node"));
    machine.world.add_node_address(new).expect("a new address");
    let attempts: Vec<Value> = [
        NODE.to_string(),
        new.to_string(),
        "127.0.0.1".to_owned(),
        "169.254.83.71".to_owned(),
        "169.254.1.1".to_owned(),
        neighbour,
        "10.0.0.5".to_owned(),
        "169.254.169.254".to_owned(),
        "192.168.0.5".to_owned(),
    ]
    .into_iter()
    .flat_map(|to| [7777, 8000, 443].map(|port| probe::tcp(&to, port, "canary")))
    // The gateway's own host is for everybody.
    .filter(|attempt| !(attempt["to"] == "169.254.1.1" && attempt["port"] == 443))
    .collect();
    for (attempt, outcome) in attempts.iter().zip(probe.try_all(&attempts)) {
        if attempt["to"] == "127.0.0.1" {
            assert_eq!(outcome.outcome, "refused", "{attempt}");
        } else {
            outcome.assert_refused_at_connect();
        }
    }
    server.set_nonblocking(true).expect("a listener");
    let nobody = server.accept().expect_err("somebody has reached the node");
    assert_eq!(nobody.kind(), std::io::ErrorKind::WouldBlock);
    for private in ["10.0.0.5", "169.254.169.254", "192.168.0.5"] {
        let address: Ipv4Addr = private.parse().expect("an address");
        machine.world.capture().assert_nothing_to(address, mark);
    }
    machine.world.remove_node_address(new).expect("it had it");
    sandbox.stop();
    other.stop();
}

pub(crate) fn what_the_nodes_firewall_redirects_is_not_for_sandboxes(machine: &Passing) {
    const WITHIN: u16 = 7778;
    let node = machine.world.node();
    let sandbox = machine.sandbox(&open(&[ECHO, ECHO + 1]));
    let probe = Probe::install(&sandbox, &machine.world);
    let server =
        node.run(|| std::net::TcpListener::bind(("0.0.0.0", WITHIN)).expect("a listener on the node"));
    let collector = machine.world.tcp_collector((OK, ECHO));
    let to = |port: u16| probe::tcp(OK, port, "canary");
    probe.try_one(&to(ECHO));
    let arrived = collector.arrivals().len();
    assert!(arrived > 0, "it passes while nobody redirects it");
    let table = format!(
        "add table ip redirecting; \
        add chain ip redirecting pre {{ type nat hook prerouting priority dstnat; }}; \
        add rule ip redirecting pre ip daddr {OK} tcp dport {ECHO} redirect to :{WITHIN}; \
        add rule ip redirecting pre ip daddr {OK} tcp dport {} dnat to 10.0.0.5:443",
        ECHO + 1
    );
    node.command("nft", &[table.as_str()]).expect("a firewall");
    let mark = machine.world.capture().mark();
    probe.try_all(&[to(ECHO), to(ECHO + 1)]);
    server.set_nonblocking(true).expect("a listener");
    let nobody = server.accept().expect_err("somebody has reached the node");
    assert_eq!(nobody.kind(), std::io::ErrorKind::WouldBlock);
    let private = Ipv4Addr::new(10, 0, 0, 5);
    machine.world.capture().assert_nothing_to(private, mark);
    assert_eq!(collector.arrivals().len(), arrived, "it was redirected");
    node.command("nft", &["delete table ip redirecting"])
        .expect("it stands");
    sandbox.stop();
}

pub(crate) fn datagrams_pass_by_a_rule_and_only_by_one(machine: &Passing) {
    let rule = json!({ "name": "games", "action": "allow", "cidrs": [format!("{EVIL}/32")],
        "ports": [DATAGRAMS.to_string()], "protocol": "udp" });
    let sandbox = machine.sandbox(&json!({ "mode": "allowlist", "rules": [rule] }));
    let probe = Probe::install(&sandbox, &machine.world);
    let mark = machine.world.capture().mark();
    let outcomes = probe.try_all(&[
        probe::udp(EVIL, DATAGRAMS),
        probe::udp(EVIL, 443),
        probe::udp(OK, DATAGRAMS),
    ]);
    assert_eq!(outcomes[0].data, "canary", "{outcomes:?}");
    for refused in &outcomes[1..] {
        refused.assert_refused();
    }
    machine.world.capture().assert_nothing_to(OK, mark);
    // Datagrams say of no packet that it is the last: the record comes after a minute of silence, or here.
    sandbox.stop();
    let event = sandbox.audited(&json!({ "protocol": "udp", "verdict": "allow", "port": DATAGRAMS }));
    assert_eq!(event["rule"], "games", "{event}");
}

pub(crate) fn a_killed_netd_does_not_touch_what_passes(machine: &Passing) {
    let sandbox = machine.sandbox(&open(&[ECHO]));
    chatter(&sandbox, OK, ECHO);
    let links = || links(machine.world.node());
    let before = links();
    for _ in 0..3 {
        machine.node.replace(Node::netd);
        goes_on(&sandbox);
        machine.node.wait_ready();
        wait::until("it passes again", SOON, || passes(&machine.node).ok());
    }
    goes_on(&sandbox);
    assert_eq!(links(), before, "adopted");
    sandbox.stop();
}

/// Number and name of every interface but those of canaries, which come and go.
pub(crate) fn links(place: &Namespace) -> Vec<String> {
    let shown = place.ip("-o link").expect("the links");
    let names = shown.lines().filter_map(|line| {
        let mut parts = line.splitn(3, ": ");
        Some(format!("{} {}", parts.next()?, parts.next()?))
    });
    names.filter(|name| !name.contains(" sgcn")).collect()
}

pub(crate) fn a_firewall_that_drops_is_named_and_left_alone(machine: &Passing) {
    let node = machine.world.node();
    let table = "add table inet strict; \
        add chain inet strict forward { type filter hook forward priority 10; policy drop; }";
    node.command("nft", &[table]).expect("a firewall");
    let sandbox = machine.sandbox(&open(&[443, ECHO]));
    let reason = wait::within(SOON, || passes(&machine.node).err());
    let reason = reason.expect("the canary finds the firewall");
    assert!(reason.contains("inet strict forward"), "{reason}");
    // Through netd it goes on.
    let probe = Probe::install(&sandbox, &machine.world);
    probe
        .try_one(&probe::https("ok.test", "ok.test"))
        .assert_answered("hello from ok.test");
    sandbox.audited(&json!({ "protocol": "tls", "verdict": "allow", "host": "ok.test" }));
    // What is tried again after a while raises it for a moment.
    wait::until("nothing of the uplink is left", SOON, || {
        (!node.ip("-o link").expect("the links").contains(UPLINK)).then_some(())
    });
    // And what needs it is refused by name.
    let rule =
        json!({ "action": "allow", "cidrs": ["203.0.113.66/32"], "ports": ["8080"], "protocol": "udp" });
    sandbox
        .client()
        .put(&sandbox.path("/network"))
        .json(&json!({ "mode": "allowlist", "rules": [rule] }))
        .send()
        .refused_field("rules[0].protocol");
    let listed = node
        .command("nft", &["list", "table", "inet", "strict"])
        .expect("it stands");
    assert!(String::from_utf8_lossy(&listed.stdout).contains("policy drop"));
    node.command("nft", &["delete table inet strict"])
        .expect("it stands");
    wait::until("it passes again", LATER, || passes(&machine.node).ok());
    sandbox.stop();
}

pub(crate) fn a_firewall_that_is_flushed_gets_its_table_back(machine: &Passing) {
    let node = machine.world.node();
    let sandbox = machine.sandbox(&open(&[ECHO]));
    let probe = Probe::install(&sandbox, &machine.world);
    // A canary's come and go.
    let uplink = || {
        let links = node.ip("-o link").expect("the links");
        let line = links.lines().find(|line| line.contains(UPLINK));
        line.expect("the uplink").to_owned()
    };
    let before = uplink();
    let collector = machine.world.tcp_collector((OK, ECHO));
    node.command("nft", &["flush", "ruleset"]).expect("flushed");
    wait::until("the table stands again", SOON, || {
        let listed = node.command("nft", &["list", "ruleset"]).expect("the rules");
        let text = String::from_utf8_lossy(&listed.stdout).into_owned();
        text.contains("masquerade").then_some(())
    });
    // What is opened from then on leaves under the node's address.
    let arrived = collector.arrivals().len();
    probe.try_one(&probe::tcp(OK, ECHO, "canary"));
    let arrivals = collector.arrivals();
    assert_eq!(arrivals.len(), arrived + 1);
    assert_eq!(arrivals[arrived].from.ip(), NODE);
    // Mended, and not taken down and raised again.
    assert_eq!(uplink(), before);
    assert_eq!(passes(&machine.node), Ok(()));
    sandbox.stop();
}

pub(crate) fn one_that_goes_leaves_its_guard_to_one_that_stays(machine: &Passing) {
    let annex = wait::within(SOON, || machine.world.annex().ok()).expect("a namespace of its own");
    let own = [
        ("SANDGATE_API_ADDR", "127.0.0.1:18080"),
        ("SANDGATE_TUNNEL_ADDR", "127.0.0.1:18081"),
        ("SANDGATE_METRICS_ADDR", "off"),
        ("SANDGATE_NETD_METRICS_ADDR", "off"),
        ("SANDGATE_TUNNEL_METRICS_ADDR", "off"),
        ("SANDGATE_SANDBOX_CIDR", "10.214.0.0/16"),
    ];
    let forwards = || {
        let switch = "/proc/sys/net/ipv4/conf/uplink/forwarding";
        let text = annex.run(move || std::fs::read_to_string(switch).expect("a switch"));
        text.trim() == "1"
    };
    let rules = || {
        let listed = annex.command("nft", &["list", "ruleset"]).expect("the rules");
        String::from_utf8_lossy(&listed.stdout).into_owned()
    };
    let guard = "iifname \"uplink\" oifname != \"sgup*\" drop";
    assert!(!forwards());
    let start = |name, settings| Node::start_in(&machine.world, &annex, name, settings).expect("it starts");
    // The one that turns the switch on.
    let first = start("-first", &[]);
    let second = start("-second", &own);
    assert_eq!((passes(&first), passes(&second)), (Ok(()), Ok(())));
    assert_eq!(rules().matches(guard).count(), 1);
    // The one that stays hears of nothing: what its uplink needs stays, and with it what guards it.
    second.stop().expect("it ends");
    first.stop().expect("it ends");
    first.down().expect("it is taken down");
    assert!(forwards());
    assert_eq!(rules().matches(guard).count(), 1, "{}", rules());
    // What was left to it goes with it.
    second.down().expect("it is taken down");
    assert!(!forwards());
    assert_eq!(rules(), "");
}

pub(crate) fn switched_off_it_leaves_the_node_alone(machine: &Passing) {
    let annex = wait::within(SOON, || machine.world.annex().ok()).expect("a namespace of its own");
    let look = || {
        let shown = [["ip", "route"], ["ip", "rule"], ["nft", "list ruleset"]].map(|[program, argument]| {
            let output = annex.command(program, &[argument]).expect(argument);
            String::from_utf8_lossy(&output.stdout).into_owned()
        });
        let forwarding = annex.run(|| {
            [
                "ipv4/conf/all/forwarding",
                "ipv4/conf/uplink/forwarding",
                "ipv6/conf/all/forwarding",
            ]
            .map(|name| std::fs::read_to_string(format!("/proc/sys/net/{name}")).expect(name))
        });
        (links(&annex), shown, forwarding)
    };
    let before = look();
    let as_before = |when: &str| {
        if wait::within(SOON, || (look() == before).then_some(())).is_none() {
            assert_eq!(look(), before, "{when}");
        }
    };
    for (mode, makes) in [("off", false), ("auto", true)] {
        let settings = [("SANDGATE_KERNEL_PASS", mode)];
        let name = format!("-{mode}");
        let node = Node::start_in(&machine.world, &annex, &name, &settings).expect("it starts");
        assert_eq!(passes(&node).is_ok(), makes, "{mode}");
        if makes {
            assert_ne!(look(), before, "it passes by what it has made");
        } else {
            as_before(mode);
        }
        // Stops it and takes it down.
        drop(node);
        as_before("taken down");
    }
}

pub(crate) fn the_node_is_as_it_was_when_all_is_taken_down(machine: &Passing) {
    let settings = [
        ("SANDGATE_API_ADDR", "127.0.0.1:18080"),
        ("SANDGATE_TUNNEL_ADDR", "127.0.0.1:18081"),
        ("SANDGATE_METRICS_ADDR", "off"),
        ("SANDGATE_NETD_METRICS_ADDR", "off"),
        ("SANDGATE_TUNNEL_METRICS_ADDR", "off"),
    ];
    let forwarding = || {
        let namespace = machine.world.node();
        namespace
            .run(|| std::fs::read_to_string("/proc/sys/net/ipv4/conf/uplink/forwarding").expect("a switch"))
    };
    let sandbox = machine.sandbox(&open(&[ECHO]));
    chatter(&sandbox, OK, ECHO);
    // The canaries' own interfaces come and go; a link's own address comes when nobody has objected (RFC 4862, 5.4).
    let passing = [
        "process ",
        "namespace ",
        "descriptor ",
        "BPF map entry ",
        "file ",
        "node: ip -o -6 address: 2: uplink ",
        "node: ip -6 route show table all: local fe80::",
    ];
    let before = Snapshot::at_rest(&machine.node, &passing, SOON);
    // One with the same range does without; one with a range of its own passes beside us.
    for (name, range, makes) in [("-same", "10.213.0.0/16", false), ("-own", "10.214.0.0/16", true)] {
        let mut all = settings.to_vec();
        all.push(("SANDGATE_SANDBOX_CIDR", range));
        let other = Node::start_in(&machine.world, machine.world.place(), name, &all).expect("it starts");
        assert_eq!(passes(&other).is_ok(), makes, "{name}: {:?}", passes(&other));
        drop(other);
        goes_on(&sandbox);
    }
    before.assert_returns_but(&machine.node, &passing, SOON);
    sandbox.stop();
    machine.node.stop().expect("it ends");
    assert_eq!(
        forwarding().trim(),
        "1",
        "what is open goes on until all is taken down"
    );
    machine.node.down().expect("it is taken down");
    assert_eq!(forwarding().trim(), "0");
    let left = machine.world.node().ip("-o link").expect("the links");
    assert!(!left.contains(UPLINK), "{left}");
    let rules = machine
        .world
        .node()
        .command("nft", &["list", "ruleset"])
        .expect("the rules");
    assert!(
        rules.stdout.is_empty(),
        "{}",
        String::from_utf8_lossy(&rules.stdout)
    );
    machine.node.start_again().expect("and starts again");
}
