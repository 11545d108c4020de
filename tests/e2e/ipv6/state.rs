//! When there is IPv6, when there is none, and what survives netd.

use std::net::IpAddr;

use harness::{
    capture::protocol,
    node::Node,
    probe::{self, Probe, as_root, with},
    wait,
    world::{EVIL6, OK, OK6, RESOLVER, World},
};
use hickory_proto::rr::RecordType;
use serde_json::json;

use crate::passes::{passes, passes6};

use super::{BY_DEFAULT, SOON, Six, aaaa, address, addresses, pin};

/// Of an instance beside another one.
const BESIDE: [(&str, &str); 6] = [
    ("SANDGATE_API_ADDR", "127.0.0.1:18080"),
    ("SANDGATE_TUNNEL_ADDR", "127.0.0.1:18081"),
    ("SANDGATE_METRICS_ADDR", "127.0.0.1:19464"),
    ("SANDGATE_NETD_METRICS_ADDR", "127.0.0.1:19465"),
    ("SANDGATE_TUNNEL_METRICS_ADDR", "127.0.0.1:19466"),
    ("SANDGATE_SANDBOX_CIDR", "10.214.0.0/16"),
];

pub(crate) fn a_killed_netd_lets_nothing_out_and_recovers(six: &Six) {
    six.node.wait_ready();
    let sandbox = six.fenced();
    let probe = six.probe(&sandbox);
    pin(&probe);
    let allowed = probe::https(OK6, "six.test");
    probe.try_one(&allowed).assert_answered("hello from six.test");
    let mark = six.world.capture().mark();
    let attempts = [
        allowed.clone(),
        with(probe::https(OK6, "evil6.test"), json!({ "unverified": true })),
        with(probe::https(EVIL6, "six.test"), json!({ "unverified": true })),
        probe::tcp(EVIL6, 8080, "canary"),
        probe::tcp(OK6, 22, "canary"),
        probe::tcp("fd00:ec2::254", 80, "canary"),
        with(probe::udp(EVIL6, 8080), json!({ "timeout": 0.05 })),
        with(aaaa(EVIL6, "leak.evil6.test"), json!({ "timeout": 0.2 })),
    ];
    sandbox.background(&Probe::loop_line(&attempts, 0), |sandbox| {
        sandbox.sh("grep -q answered /workspace/background.log").exit_code == 0
    });
    for _ in 0..3 {
        six.node.replace(Node::netd);
        // The address is still pinned: nobody asks again.
        wait::until("allowed traffic passes again", SOON, || {
            (probe.try_one(&allowed).outcome == "answered").then_some(())
        });
    }
    sandbox.sh("pkill -f probe.py || kill $(cat /proc/[0-9]*/stat | awk '$2 ~ /python/ {print $1}')");
    for packet in six.world.capture().sent_since(mark) {
        let expected = packet.destination == IpAddr::from(OK6)
            && packet.protocol == protocol::TCP
            && packet.destination_port == 443
            // The node tells the resolver that nobody waits any more for what a killed netd had asked.
            || packet.destination == IpAddr::from(RESOLVER);
        assert!(expected, "this left the node: {packet:#?}");
    }
    assert!(six.world.dns.queries_for("evil6.test").is_empty());
    sandbox.audited(&json!({ "decision": "deny", "ip": EVIL6.to_string(), "port": 8080 }));
    sandbox.stop();
}

pub(crate) fn without_a_way_out_there_is_no_ipv6(_: &Six) {
    let world = World::fixture6().without_ipv6().build().expect("a world");
    let node = Node::start_with(&world, &[BY_DEFAULT]).expect("it starts");
    let organization = node.register("four");
    let names = json!({ "mode": "allowlist", "allowed_domains": ["six.test", "dual.test"] });
    let sandbox = organization.sandbox(&json!({ "network": names }));
    let probe = Probe::install(&sandbox, &world);
    assert!(addresses(&sandbox).is_empty());
    // Not an error: there is nothing of that kind.
    let outcome = probe.try_one(&aaaa(RESOLVER, "dual.test"));
    assert_eq!((outcome.rcode, outcome.addresses), (Some(0), vec![]));
    let outcome = probe.try_one(&probe::lookup("six.test"));
    assert_eq!(outcome.outcome, "no_name", "{outcome:?}");
    let asked = world.dns.queries();
    assert!(
        !asked.iter().any(|query| query.kind == RecordType::AAAA),
        "{asked:#?}"
    );
    probe
        .try_one(&probe::https("dual.test", "dual.test"))
        .assert_answered(&format!("at {OK}"));
    probe
        .try_one(&probe::tcp(OK6, 443, "x"))
        .assert_refused_at_connect();
    let mark = world.capture().mark();
    let frame = |source: &str, to: &str, protocol: u8, port: u16| json!({ "kind": "frame", "source": source, "to": to, "port": port, "protocol": protocol });
    let mut attempts = Vec::new();
    for source in ["fd53:4700::1", "fe80::1", "::", "2001:db8::7"] {
        for to in ["2001:db8:10::10", "2001:db8:53::53", "fe80::5347:1", "ff02::1"] {
            attempts.extend([
                frame(source, to, 6, 443),
                frame(source, to, 17, 53),
                frame(source, to, 58, 0),
            ]);
        }
    }
    as_root(&node, &sandbox, &attempts);
    let sent = world.capture().sent_since(mark);
    assert!(sent.is_empty(), "{sent:#?}");
    // What the kernel cannot forward is not accepted, and IPv4 passes all the same.
    let reason = passes6(&node).expect_err("there is no way");
    assert!(reason.contains("no route"), "{reason}");
    assert_eq!(passes(&node), Ok(()));
    let rule = json!({ "action": "allow", "cidrs": ["203.0.113.66/32", "::/0"], "ports": ["8080"], "protocol": "udp" });
    let asked = sandbox.client().put(&sandbox.path("/network"));
    asked
        .json(&json!({ "mode": "allowlist", "rules": [rule] }))
        .send()
        .refused_field("rules[0].cidrs[1]");
    sandbox.stop();
}

pub(crate) fn the_range_is_the_operators(six: &Six) {
    let world = &six.world;
    let refused = |value: &str, words: &[&str]| {
        let settings = [&BESIDE[..], &[("SANDGATE_SANDBOX_CIDR6", value)]].concat();
        let other = Node::new(world, world.place(), "refused", &settings).expect("settings");
        let (status, said) = other.run("controller", &["up"]).expect("it runs");
        assert!(!status.success(), "{value}: {said}");
        for word in [&["SANDGATE_SANDBOX_CIDR6"], words].concat() {
            assert!(said.contains(word), "`{word}` is not in: {said}");
        }
        let (status, said) = other.run("netd", &["--sandbox-cidr6", value]).expect("it runs");
        assert!(!status.success(), "{value}: {said}");
    };
    for value in ["on", "2001:db8::/64", "fd00::1/64", "fd00::/113", "10.0.0.0/16"] {
        refused(value, &[value]);
    }
    for (name, value, prefix) in [
        ("off", "off", None),
        ("chosen", "fd12:3456:789a:1::/64", Some([0xfd12, 0x3456])),
    ] {
        let settings = [&BESIDE[..], &[("SANDGATE_SANDBOX_CIDR6", value)]].concat();
        let other = Node::start_in(world, world.place(), name, &settings).expect("it starts");
        let names = json!({ "mode": "allowlist", "allowed_domains": ["dual.test"] });
        let sandbox = other.register(name).sandbox(&json!({ "network": names }));
        let probe = Probe::install(&sandbox, world);
        let found = probe.try_one(&aaaa(RESOLVER, "dual.test")).addresses;
        match prefix {
            None => assert_eq!((addresses(&sandbox), found), (vec![], vec![])),
            Some(prefix) => {
                assert_eq!(address(&sandbox).segments()[..2], prefix);
                assert_eq!(found, [IpAddr::from(OK6)]);
                probe
                    .try_one(&probe::https(OK6, "dual.test"))
                    .assert_answered(&format!("at {OK6}"));
            }
        }
    }
}
