//! What leaves by the kernel in the second family, and what becomes of it where the node cannot have it leave.

use std::net::{IpAddr, SocketAddr};

use harness::{
    node::Node,
    probe::{self, Probe},
    wait,
    world::{EVIL6, NODE6, OK, OK6, World},
};
use serde_json::{Value, json};

use super::{BY_DEFAULT, Six};
use crate::passes::{LATER, SOON, UPLINK, chatter, goes_on, links, open, passes, passes6};

/// A port on which the internet greets and echoes what it gets.
const ECHO: u16 = 22;
/// The same of UDP.
const DATAGRAMS: u16 = 8080;

/// Rules that open one port of UDP to ranges of both families.
fn datagrams() -> Value {
    let ranges = [format!("{OK}/32"), format!("{OK6}/128")];
    let rule = json!({ "name": "games", "action": "allow", "cidrs": ranges, "ports": [DATAGRAMS.to_string()],
        "protocol": "udp" });
    json!({ "mode": "allowlist", "rules": [rule] })
}

/// `0` or `1`, of an interface of the node.
fn switch(node: &Node, interface: &str) -> String {
    let path = format!("/proc/sys/net/ipv6/conf/{interface}/force_forwarding");
    let text = node
        .place()
        .run(move || std::fs::read_to_string(path).expect("a switch"));
    text.trim().to_owned()
}

pub(crate) fn what_address_and_port_allow_leaves_by_the_kernel_and_is_recorded(six: &Six) {
    assert_eq!((passes(&six.node), passes6(&six.node)), (Ok(()), Ok(())));
    let sandbox = six
        .organization
        .sandbox(&json!({ "network": open(&[443, ECHO]) }));
    let probe = six.probe(&sandbox);
    let mark = six.world.capture().mark();
    probe
        .try_one(&probe::https("six.test", "six.test"))
        .assert_answered(&format!("hello from six.test at {OK6}"));
    // Not read, so of TLS nothing is known; the name is that of the address.
    let event =
        sandbox.audited(&json!({ "protocol": "tcp", "verdict": "allow", "host": "six.test", "port": 443 }));
    assert_eq!(event["ip"], OK6.to_string(), "{event}");
    assert_eq!(event["reason"], "allowed", "{event}");
    for bytes in ["bytes_up", "bytes_down"] {
        assert!(event[bytes].as_u64().is_some_and(|bytes| bytes > 100), "{event}");
    }
    // The other end sees the node, and nothing of the sandbox.
    probe
        .try_one(&probe::tcp(OK6, ECHO, "canary"))
        .assert_answered("SSH-2.0-world");
    let arrivals = six.world.tcp_collector((OK6, ECHO)).arrivals();
    let from: SocketAddr = arrivals.last().expect("it arrived").from;
    assert_eq!(from.ip(), IpAddr::from(NODE6));
    let sent = six.world.capture().sent_to(OK6, mark);
    assert!(
        !sent.is_empty() && sent.iter().all(|packet| packet.source == IpAddr::from(NODE6)),
        "{sent:#?}"
    );
    // A large answer, in segments as the way takes them.
    let large = probe::with(
        probe::https("six.test", "six.test"),
        json!({ "path": "/bytes/3000000" }),
    );
    probe.try_one(&large).assert_answered("xxxx");
    sandbox.stop();
}

pub(crate) fn datagrams_pass_by_a_rule_and_only_by_one(six: &Six) {
    let sandbox = six.organization.sandbox(&json!({ "network": datagrams() }));
    let probe = six.probe(&sandbox);
    let mark = six.world.capture().mark();
    let outcomes = probe.try_all(&[
        probe::udp(OK6, DATAGRAMS),
        probe::udp(OK6, 443),
        probe::udp(EVIL6, DATAGRAMS),
        probe::udp("fd00:5::5", DATAGRAMS),
        probe::udp(NODE6, DATAGRAMS),
    ]);
    assert_eq!(outcomes[0].data, "canary", "{outcomes:?}");
    for refused in &outcomes[1..] {
        refused.assert_refused();
    }
    six.world.capture().assert_nothing_to(EVIL6, mark);
    // Datagrams say of no packet that it is the last: the record comes after a minute of silence, or here.
    sandbox.stop();
    let event = sandbox.audited(&json!({ "protocol": "udp", "verdict": "allow", "port": DATAGRAMS }));
    assert_eq!(
        (&event["rule"], &event["ip"]),
        (&json!("games"), &json!(OK6.to_string())),
        "{event}"
    );
}

pub(crate) fn open_connections_outlive_netd_and_not_their_rules(six: &Six) {
    let sandbox = six.organization.sandbox(&json!({ "network": open(&[ECHO]) }));
    chatter(&sandbox, OK6, ECHO);
    let before = links(six.world.node());
    for _ in 0..2 {
        six.node.replace(Node::netd);
        goes_on(&sandbox);
        six.node.wait_ready();
        wait::until("it passes again", SOON, || passes6(&six.node).ok());
    }
    goes_on(&sandbox);
    assert_eq!(links(six.world.node()), before, "adopted");
    sandbox.set_network(&json!({ "mode": "deny_all" }));
    let mark = six.world.capture().mark();
    wait::until("the connection is cut", SOON, || {
        let log = sandbox.sh("tail -n 1 /workspace/background.log").stdout;
        log.contains("ended").then_some(())
    });
    let event = sandbox.audited(&json!({ "protocol": "tcp", "port": ECHO, "reason": "policy_tightened" }));
    assert_eq!(event["ip"], OK6.to_string(), "{event}");
    six.world.capture().assert_nothing_to(OK6, mark);
    sandbox.stop();
}

pub(crate) fn a_firewall_that_drops_ipv6_is_named_and_ipv4_goes_on(six: &Six) {
    let node = six.world.node();
    let sandbox = six
        .organization
        .sandbox(&json!({ "network": open(&[443, 8443]) }));
    let probe = six.probe(&sandbox);
    chatter(&sandbox, OK, 8443);
    let table = "add table inet strict; \
        add chain inet strict forward { type filter hook forward priority 10; }; \
        add rule inet strict forward meta nfproto ipv6 drop";
    node.command("nft", &[table]).expect("a firewall");
    let reason = wait::within(SOON, || passes6(&six.node).err());
    let reason = reason.expect("the canary finds the firewall");
    assert!(reason.contains("inet strict forward"), "{reason}");
    // The other family passes as before, without a gap.
    assert_eq!(passes(&six.node), Ok(()));
    goes_on(&sandbox);
    // What is tried again after a while turns it on for a moment.
    wait::until("what nothing needs is restored", SOON, || {
        (switch(&six.node, "uplink") == "0").then_some(())
    });
    // Through netd it goes on, which reads that it is TLS.
    probe
        .try_one(&probe::https("six.test", "six.test"))
        .assert_answered("hello from six.test");
    sandbox.audited(
        &json!({ "protocol": "tls", "verdict": "allow", "host": "six.test", "ip": OK6.to_string() }),
    );
    // And what needs it is refused by the range that does.
    let refused = |policy: &Value, field: &str| {
        let asked = sandbox.client().put(&sandbox.path("/network")).json(policy);
        asked.send().refused_field(field);
    };
    refused(&datagrams(), "rules[0].cidrs[1]");
    let mut wider = datagrams();
    wider["rules"][0]["cidrs"] = json!([format!("{OK}/32"), "203.0.113.66/32", "::/0"]);
    refused(&wider, "rules[0].cidrs[2]");
    wider["rules"][0]["cidrs"] = json!([format!("{OK}/32")]);
    sandbox.set_network(&wider);
    node.command("nft", &["delete table inet strict"])
        .expect("it stands");
    wait::until("it passes again", LATER, || passes6(&six.node).ok());
    sandbox.set_network(&datagrams());
    assert_eq!(probe.try_one(&probe::udp(OK6, DATAGRAMS)).data, "canary");
    sandbox.stop();
}

pub(crate) fn without_a_way_out_it_is_refused_by_the_range(_: &Six) {
    let world = World::fixture6().build().expect("a world");
    // An address of the network around, which looks as public as any other.
    let settings = [BY_DEFAULT, ("SANDGATE_DENY_RANGES", "2001:db8:66::/48")];
    let node = Node::start_with(&world, &settings).expect("it starts");
    let sandbox = node.register("six").sandbox(&json!({ "network": open(&[443]) }));
    let probe = Probe::install(&sandbox, &world);
    assert_eq!(passes6(&node), Ok(()));
    let mark = world.capture().mark();
    probe
        .try_one(&probe::tcp(EVIL6, 443, "canary"))
        .assert_refused_at_connect();
    sandbox.audited(&json!({ "ip": EVIL6.to_string(), "reason": "platform_denied" }));
    world.capture().assert_nothing_to(EVIL6, mark);
    let within = json!({ "mode": "allowlist", "allowed_cidrs": ["2001:db8:66::/64"] });
    let asked = sandbox.client().put(&sandbox.path("/network")).json(&within);
    asked.send().refused_field("allowed_cidrs[0]");
    world.node().ip("-6 route del default").expect("there was one");
    let reason = wait::within(SOON, || passes6(&node).err()).expect("it is noticed");
    assert!(reason.contains("no route"), "{reason}");
    assert_eq!(passes(&node), Ok(()));
    let asked = sandbox.client().put(&sandbox.path("/network")).json(&datagrams());
    asked.send().refused_field("rules[0].cidrs[1]");
    world
        .node()
        .ip("-6 route add default via 2001:db8:ffff::1")
        .expect("a way");
    wait::until("it passes again", LATER, || passes6(&node).ok());
    sandbox.set_network(&datagrams());
    assert_eq!(probe.try_one(&probe::udp(OK6, DATAGRAMS)).data, "canary");
    sandbox.stop();
}

pub(crate) fn the_node_is_as_it_was_when_all_is_taken_down(six: &Six) {
    assert_eq!(passes6(&six.node), Ok(()));
    assert_eq!(switch(&six.node, "uplink"), "1");
    six.node.stop().expect("it ends");
    six.node.down().expect("it is taken down");
    assert_eq!(switch(&six.node, "uplink"), "0");
    assert_eq!(switch(&six.node, "all"), "0");
    let node = six.world.node();
    let left = node.ip("-o link").expect("the links");
    assert!(!left.contains(UPLINK), "{left}");
    for family in ["-4", "-6"] {
        let routes = node
            .ip(&format!("{family} route show table all"))
            .expect("the routes");
        assert!(
            !routes.contains("fd53") && !routes.contains("fe80::5347"),
            "{routes}"
        );
    }
    let rules = node.command("nft", &["list", "ruleset"]).expect("the rules");
    assert!(
        rules.stdout.is_empty(),
        "{}",
        String::from_utf8_lossy(&rules.stdout)
    );
    six.node.start_again().expect("and starts again");
    wait::until("it passes again", SOON, || passes6(&six.node).ok());
}
