//! The second family: what is allowed passes by IPv6, and the wall is as high as in IPv4.

use std::{
    net::{IpAddr, Ipv6Addr},
    sync::Arc,
    time::Duration,
};

use anyhow::Result;
use harness::{
    node::Node,
    probe::{self, Probe, with},
    sandbox::{Organization, Sandbox},
    suite::Fixture,
    wait,
    world::{EVIL6, MIRROR6, NODE6, OK, OK6, OTHER_RESOLVER, RESOLVER, RESOLVER6, World},
};
use serde_json::{Value, json};

use crate::promise::{assert_bearer, store};

pub(crate) mod frames;
pub(crate) mod passes;
pub(crate) mod refusals;
pub(crate) mod state;

/// Turns on what other groups have off.
pub(crate) const BY_DEFAULT: (&str, &str) = ("SANDGATE_SANDBOX_CIDR6", "");
/// The type of AAAA records.
const AAAA: u16 = 28;
/// What a change may take to be seen.
const SOON: Duration = Duration::from_secs(20);

/// A node whose sandboxes have IPv6.
pub(crate) struct Six {
    pub(crate) organization: Organization,
    // Stopped before its world goes.
    pub(crate) node: Node,
    pub(crate) world: Arc<World>,
}

impl Fixture for Six {
    fn start() -> Result<Self> {
        let world = World::fixture6().build()?;
        let node = Node::start_with(&world, &[BY_DEFAULT])?;
        let organization = node.register("six");
        Ok(Self {
            organization,
            node,
            world,
        })
    }

    fn report(&self) -> String {
        self.node.report()
    }
}

impl Six {
    /// A sandbox that may reach some names, on ports 80 and 443.
    #[track_caller]
    fn fenced(&self) -> Sandbox {
        let names = [
            "ok.test",
            "six.test",
            "dual.test",
            "rebind6.test",
            "half-rebind6.test",
        ];
        let network = json!({ "mode": "allowlist", "allowed_domains": names, "allowed_ports": [80, 443] });
        self.organization.sandbox(&json!({ "network": network }))
    }

    /// A sandbox that may do whatever a tenant can allow over TCP.
    #[track_caller]
    fn wide(&self) -> Sandbox {
        let everything = json!({
            "name": "everything", "action": "allow", "cidrs": ["0.0.0.0/0", "::/0"], "ports": ["1-65535"],
            "protocol": "tcp",
        });
        let network = json!({ "mode": "allowlist", "rules": [everything] });
        self.organization.sandbox(&json!({ "network": network }))
    }

    /// The attacker's program, installed.
    #[track_caller]
    fn probe<'a>(&self, sandbox: &'a Sandbox) -> Probe<'a> {
        Probe::install(sandbox, &self.world)
    }
}

/// The IPv6 addresses on a sandbox's interface.
#[track_caller]
pub(crate) fn addresses(sandbox: &Sandbox) -> Vec<Ipv6Addr> {
    let table = sandbox.sh_ok("cat /proc/net/if_inet6 2>/dev/null || true");
    let lines = table.lines().filter(|line| line.ends_with("eth0"));
    let address = |line: &str| u128::from_str_radix(&line[..32], 16).expect("hexadecimal digits");
    lines.map(|line| Ipv6Addr::from_bits(address(line))).collect()
}

/// The one IPv6 address of a sandbox.
#[track_caller]
pub(crate) fn address(sandbox: &Sandbox) -> Ipv6Addr {
    let addresses = addresses(sandbox);
    assert_eq!(addresses.len(), 1, "{addresses:?}");
    addresses[0]
}

/// A question for AAAA records.
fn aaaa(server: impl ToString, name: &str) -> Value {
    with(probe::dns(server, name), json!({ "type": AAAA }))
}

/// Resolves `six.test`, so that its address is pinned for the sandbox.
#[track_caller]
fn pin(probe: &Probe<'_>) {
    let found = probe.try_one(&probe::lookup("six.test")).addresses;
    assert_eq!(found, [IpAddr::from(OK6)]);
}

pub(crate) fn allowed_names_pass_by_ipv6(six: &Six) {
    let sandbox = six.fenced();
    let probe = six.probe(&sandbox);
    let own = address(&sandbox);
    assert_eq!(own.segments()[..2], [0xfd53, 0x4700], "{own}");
    let capture = six.world.capture();
    let mark = capture.mark();
    let answer = format!("hello from six.test at {OK6}");
    probe
        .try_one(&probe::https("six.test", "six.test"))
        .assert_answered(&answer);
    probe
        .try_one(&probe::http("six.test", "six.test"))
        .assert_answered(&answer);
    let crumbs = with(probe::https("six.test", "six.test"), json!({ "crumbs": 50 }));
    probe.try_one(&crumbs).assert_answered(&answer);
    let large = with(
        probe::https("six.test", "six.test"),
        json!({ "path": "/bytes/3000000" }),
    );
    probe.try_one(&large).assert_answered("xxxx");
    let authority = probe::CA;
    let python = "import ssl, sys, urllib.request as r; \
                  print(r.urlopen(sys.argv[1], context=ssl.create_default_context(cafile=sys.argv[2])).read().decode())";
    for line in [
        format!("curl -sS --max-time 30 --cacert {authority} https://six.test/"),
        format!("python3 -c '{python}' https://six.test/ {authority}"),
        format!(
            "NODE_EXTRA_CA_CERTS={authority} node -e \
             'fetch(\"https://six.test/\").then(answer => answer.text()).then(console.log)'"
        ),
    ] {
        assert_eq!(sandbox.sh_ok(&line), answer, "{line}");
    }
    for (family, at) in [("-4", IpAddr::from(OK)), ("-6", OK6.into())] {
        let line = format!("curl -sS {family} --max-time 30 --cacert {authority} https://dual.test/");
        assert_eq!(sandbox.sh_ok(&line), format!("hello from dual.test at {at}"));
    }
    let sent = capture.sent_to(OK6, mark);
    assert!(!sent.is_empty(), "it went another way");
    // From the node's address: the sandbox's own stays inside.
    assert!(
        sent.iter().all(|packet| packet.source == IpAddr::from(NODE6)),
        "{sent:#?}"
    );
    let event = sandbox.audited(&json!({ "decision": "allow", "host": "six.test", "protocol": "tls" }));
    let expected = json!({ "reason": "allowed", "ip": OK6.to_string(), "port": 443, "tier": "sandbox" });
    for (field, value) in expected.as_object().expect("an object") {
        assert_eq!(&event[field], value, "{field} of {event}");
    }
    assert!(
        event["bytes_up"].as_u64() > Some(0) && event["bytes_down"].as_u64() > Some(0),
        "{event}"
    );
    sandbox.audited(&json!({ "decision": "allow", "host": "six.test", "protocol": "http", "port": 80 }));

    // By range, without a name.
    sandbox.set_network(
        &json!({ "mode": "allowlist", "allowed_cidrs": ["2001:db8:10::/48"], "allowed_ports": [22, 80] }),
    );
    probe
        .try_one(&probe::tcp(OK6, 22, "hello"))
        .assert_answered("SSH-2.0-world");
    let literal = sandbox.sh_ok(&format!("curl -sSg --max-time 30 http://[{OK6}]/"));
    assert!(literal.ends_with(&format!("at {OK6}")), "{literal}");
    probe
        .try_one(&probe::tcp(EVIL6, 22, "hello"))
        .assert_refused_at_connect();
    capture.assert_nothing_to(EVIL6, mark);
    sandbox.stop();
}

pub(crate) fn a_client_goes_on_with_the_family_that_works(six: &Six) {
    let sandbox = six.fenced();
    let probe = six.probe(&sandbox);
    for (denied, works) in [(IpAddr::from(OK6), IpAddr::from(OK)), (OK.into(), OK6.into())] {
        let length = if denied.is_ipv6() { 128 } else { 32 };
        sandbox.set_network(&json!({
            "mode": "allowlist", "allowed_domains": ["dual.test"], "denied_cidrs": [format!("{denied}/{length}")],
        }));
        let mark = six.world.capture().mark();
        let mut both = probe.try_one(&probe::lookup("dual.test")).addresses;
        both.sort();
        assert_eq!(both, [IpAddr::from(OK), OK6.into()]);
        let answer = format!("hello from dual.test at {works}");
        // The one that is denied first; brackets are how curl writes an address of IPv6.
        let written = |ip: IpAddr| match ip {
            IpAddr::V4(ip) => ip.to_string(),
            IpAddr::V6(ip) => format!("[{ip}]"),
        };
        let order = format!("dual.test:443:{},{}", written(denied), written(works));
        let curl = format!("curl -sS --max-time 30 --cacert {}", probe::CA);
        for line in [
            format!("{curl} --resolve {order} https://dual.test/"),
            format!("{curl} https://dual.test/"),
            format!(
                "NODE_EXTRA_CA_CERTS={} node -e \
                 'fetch(\"https://dual.test/\").then(answer => answer.text()).then(console.log)'",
                probe::CA
            ),
        ] {
            assert_eq!(sandbox.sh_ok(&line), answer, "{line}");
        }
        let python = "import socket; print(socket.create_connection((\"dual.test\", 443)).getpeername()[0])";
        assert_eq!(
            sandbox.sh_ok(&format!("python3 -c '{python}'")),
            works.to_string()
        );
        six.world.capture().assert_nothing_to(denied, mark);
        six.world.capture().assert_something_to(works, mark);
        sandbox.audited(&json!({ "decision": "deny", "ip": denied.to_string(), "port": 443 }));
    }
    sandbox.stop();
}

pub(crate) fn every_resolver_is_our_own_by_ipv6_too(six: &Six) {
    let sandbox = six.fenced();
    let probe = six.probe(&sandbox);
    let mark = six.world.capture().mark();
    let over_tcp = |attempt| with(attempt, json!({ "tcp": true }));
    // Whoever is asked, by whichever family and transport: the answer is netd's.
    for server in ["2001:db8:66::66", "2001:db8:53::53", "203.0.113.66"] {
        for attempt in [aaaa(server, "six.test"), over_tcp(aaaa(server, "six.test"))] {
            let outcome = probe.try_one(&attempt);
            assert_eq!(outcome.rcode, Some(0), "{attempt}: {outcome:?}");
            assert_eq!(outcome.addresses, [IpAddr::from(OK6)], "{attempt}");
        }
        let outcome = probe.try_one(&probe::dns(server, "dual.test"));
        assert_eq!(outcome.addresses, [IpAddr::from(OK)], "{server}: {outcome:?}");
        for attempt in [
            aaaa(server, "evil6.test"),
            over_tcp(aaaa(server, "leak.evil.test")),
        ] {
            let outcome = probe.try_one(&attempt);
            assert_eq!(outcome.rcode, Some(5), "{attempt}: {outcome:?}");
        }
    }
    six.world.capture().assert_nothing_to(EVIL6, mark);
    for name in ["evil6.test", "evil.test"] {
        assert!(six.world.dns.queries_for(name).is_empty(), "{name} was asked");
    }
    let sent = six.world.capture().sent_since(mark);
    let asked = |packet: &&harness::capture::Packet| packet.destination_port == 53;
    assert!(
        sent.iter()
            .filter(asked)
            .all(|packet| packet.destination == IpAddr::from(RESOLVER)),
        "not {OTHER_RESOLVER} nor {RESOLVER6}: {sent:#?}"
    );
    sandbox.audited(&json!({ "decision": "deny", "host": "evil6.test", "reason": "dns_refused" }));
    sandbox.stop();
}

pub(crate) fn requests_are_read_and_keys_injected_by_ipv6(six: &Six) {
    let organization = six.node.register("six-keys");
    let value = "sk-canary-by-ipv6-0123456789abcdef";
    let binding = json!({ "hosts": ["mirror.test"], "ports": [443], "inject": [{ "kind": "bearer" }] });
    store(&organization, "API_KEY", value, &binding);
    let rule = json!({
        "name": "read", "action": "allow", "domains": ["mirror.test"], "ports": ["443"],
        "http": [{ "methods": ["GET"], "paths": ["/six/**"] }],
    });
    let sandbox = organization.sandbox(&json!({ "network": { "mode": "allowlist", "rules": [rule] } }));
    let call = |method: &str, path: &str| {
        sandbox.sh_ok(&format!(
            "curl -sS --max-time 30 -X {method} -o /workspace/body -w \"%{{http_code}} %{{remote_ip}}\" \
             -H \"Authorization: Bearer $API_KEY\" https://mirror.test{path}"
        ))
    };
    assert_eq!(call("GET", "/six/one"), format!("200 {MIRROR6}"));
    assert_bearer(&six.world.mirror.only("/six/one"), value);
    let body = sandbox.sh_ok("cat /workspace/body");
    assert!(body.contains("[redacted:") && !body.contains(value), "{body}");
    assert_ne!(sandbox.sh_ok("printenv API_KEY"), value);
    sandbox.audited(&json!({
        "decision": "allow", "host": "mirror.test", "ip": MIRROR6.to_string(), "method": "GET", "path": "/six/one",
        "credential": "API_KEY",
    }));
    assert!(call("POST", "/six/two").starts_with("403 "));
    assert!(call("GET", "/seven").starts_with("403 "));
    assert!(six.world.mirror.heard_below("/six/two").is_empty());
    assert!(six.world.mirror.heard_below("/seven").is_empty());
    sandbox.audited(&json!({
        "decision": "deny", "host": "mirror.test", "ip": MIRROR6.to_string(), "reason": "path_denied",
    }));
    // The self-test host answers a sandbox that has IPv6, too, and by IPv4 alone.
    let answer = sandbox.sh_ok("curl -sS --max-time 30 https://doctor.sandgate.internal/");
    assert!(answer.contains(&sandbox.id), "{answer}");
    sandbox.stop();
}

pub(crate) fn tightening_cuts_flows_of_ipv6(six: &Six) {
    let sandbox = six.fenced();
    six.probe(&sandbox);
    let line = format!("exec curl -sSN --cacert {} https://six.test/drip", probe::CA);
    sandbox.background(&line, |sandbox| {
        sandbox.sh_ok("wc -l < /workspace/background.log") != "0"
    });
    let open = || {
        let visits = six.world.web.visits_for("six.test");
        let drips = visits
            .iter()
            .filter(|visit| visit.requests.iter().any(|request| request.ends_with("/drip")));
        drips.filter(|visit| !visit.closed).count()
    };
    assert_eq!(open(), 1);
    sandbox.set_network(&json!({ "mode": "allowlist", "allowed_domains": ["ok.test"] }));
    wait::until("the server sees the connection end", SOON, || {
        (open() == 0).then_some(())
    });
    sandbox.audited(&json!({ "host": "six.test", "ip": OK6.to_string(), "reason": "policy_tightened" }));
    sandbox.stop();
}
