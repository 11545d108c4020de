//! Attacks on addresses, ports and protocols (cases 4, 6-11, 22, 31, 46).

use std::net::{IpAddr, Ipv4Addr};

use harness::{
    capture::protocol,
    collector::Collector,
    probe::{self, as_root, with},
    wait,
    world::{EVIL, GATEWAY, NODE, OK, RESOLVER},
};
use serde_json::{Value, json};

use crate::{machine::Machine, names::denied_because};

pub(crate) fn ports_outside_the_rule_are_refused(machine: &Machine) {
    let sandbox = machine.fenced();
    let probe = machine.probe(&sandbox);
    assert_eq!(
        probe.try_one(&probe::lookup("ok.test")).addresses,
        [IpAddr::from(OK)]
    );
    let mark = machine.world.capture().mark_at_rest();
    for port in [22, 8443, 1, 444, 65_535] {
        probe
            .try_one(&probe::tcp(OK, port, "x"))
            .assert_refused_at_connect();
        denied_because(
            &sandbox,
            &json!({ "ip": OK.to_string(), "port": port }),
            &["port_denied", "default_deny"],
        );
    }
    machine.world.capture().assert_nothing_to(OK, mark);
    // With a rule for that port, whatever is spoken there passes.
    let ssh = json!({ "name": "ssh", "action": "allow", "domains": ["ok.test"], "ports": ["22"], "protocol": "tcp" });
    sandbox.set_network(&json!({ "mode": "allowlist", "rules": [ssh] }));
    assert_eq!(
        probe.try_one(&probe::lookup("ok.test")).addresses,
        [IpAddr::from(OK)]
    );
    probe
        .try_one(&probe::tcp(OK, 22, "hello"))
        .assert_answered("SSH-2.0-world");
    probe
        .try_one(&probe::tcp(EVIL, 22, "hello"))
        .assert_refused_at_connect();
    machine.world.capture().assert_nothing_to(EVIL, mark);
    sandbox.stop();
}

pub(crate) fn private_and_metadata_addresses_are_refused_whatever_the_policy_says(machine: &Machine) {
    let sandbox = machine.wide();
    let probe = machine.probe(&sandbox);
    let mark = machine.world.capture().mark();
    let targets = [
        "0.0.0.1",
        "10.0.0.5",
        "10.213.0.1",
        "100.64.0.5",
        "100.100.100.200",
        "168.63.129.16",
        "169.254.169.254",
        "169.254.169.253",
        "169.254.170.2",
        "172.16.0.5",
        "172.31.255.254",
        "192.0.0.192",
        "192.168.0.5",
        "198.18.0.1",
    ];
    for target in targets {
        let attempts = [probe::tcp(target, 80, "x"), probe::tcp(target, 443, "x")];
        for outcome in probe.try_all(&attempts) {
            outcome.assert_refused_at_connect();
        }
        machine
            .world
            .capture()
            .assert_nothing_to(target.parse::<IpAddr>().expect("an address"), mark);
    }
    for target in ["10.0.0.5", "169.254.169.254", "168.63.129.16"] {
        sandbox
            .audited(&json!({ "decision": "deny", "ip": target, "port": 80, "reason": "platform_denied" }));
    }
    // Never sent at all: multicast, broadcast, reserved.
    for target in ["224.0.0.251", "240.0.0.1", "255.255.255.255"] {
        let outcome = probe.try_one(&with(probe::udp(target, 5353), json!({ "timeout": 0.3 })));
        assert_ne!(outcome.outcome, "answered", "{target}: {outcome:?}");
        machine
            .world
            .capture()
            .assert_nothing_to(target.parse::<IpAddr>().expect("an address"), mark);
    }
    probe
        .try_one(&probe::tcp(EVIL, 8080, "canary"))
        .assert_answered("canary");
    machine.world.capture().assert_something_to(EVIL, mark);
    let too_much = json!({ "mode": "allowlist", "allowed_cidrs": ["169.254.169.254/32", "10.0.0.0/8"], "allowed_ports": [80] });
    if sandbox
        .client()
        .put(&sandbox.path("/network"))
        .json(&too_much)
        .send()
        .status
        .is_success()
    {
        probe
            .try_one(&probe::tcp("169.254.169.254", 80, "x"))
            .assert_refused_at_connect();
        machine
            .world
            .capture()
            .assert_nothing_to([169, 254, 169, 254], mark);
    }
    sandbox.stop();
}

pub(crate) fn the_gateway_and_netds_own_ports_are_refused(machine: &Machine) {
    let sandbox = machine.wide();
    let probe = machine.probe(&sandbox);
    // All but 443, where the self-test host is: see `promise::doctor`.
    let ports = [22, 80, 442, 444, 8080, 8443, 9111, 15_001, 15_053];
    let attempts: Vec<Value> = ports
        .iter()
        .map(|&port| probe::tcp("169.254.1.1", port, "x"))
        .collect();
    for outcome in probe.try_all(&attempts) {
        outcome.assert_refused_at_connect();
    }
    for outcome in probe.try_all(&[probe::udp("169.254.1.1", 15_053), probe::udp("169.254.1.1", 443)]) {
        outcome.assert_refused();
    }
    sandbox.audited(&json!({ "decision": "deny", "ip": "169.254.1.1", "port": 15_001 }));
    sandbox.stop();
}

pub(crate) fn addresses_of_the_node_are_refused_also_new_ones(machine: &Machine) {
    const NEW: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 200);
    const PORT: u16 = 7777;
    let sandbox = machine.wide();
    let probe = machine.probe(&sandbox);
    let old = Collector::tcp(machine.world.node(), (NODE, PORT).into(), "the node\r\n").expect("a listener");
    // Seen from outside it is there; the sandbox gets nothing.
    let reached = machine
        .world
        .internet()
        .run(|| std::net::TcpStream::connect((NODE, PORT)));
    reached.expect("the node's listener can be reached from the internet");
    wait::until("it was reached once", probe::AT_ONCE * 5, || {
        (old.arrivals().len() == 1).then_some(())
    });
    probe
        .try_one(&probe::tcp(NODE, PORT, "x"))
        .assert_refused_at_connect();
    sandbox.audited(
        &json!({ "decision": "deny", "ip": NODE.to_string(), "port": PORT, "reason": "platform_denied" }),
    );

    probe
        .try_one(&probe::tcp(NEW, PORT, "x"))
        .assert_answered("the internet");
    machine.world.add_node_address(NEW).expect("an address");
    let new = Collector::tcp(machine.world.node(), (NEW, PORT).into(), "the node\r\n").expect("a listener");
    let outcome = probe.try_one(&probe::tcp(NEW, PORT, "x"));
    assert_ne!(
        outcome.outcome, "answered",
        "an address of a moment ago: {outcome:?}"
    );
    wait::until("the kernel refuses the new address", probe::AT_ONCE * 5, || {
        let outcome = probe.try_one(&probe::tcp(NEW, PORT, "x"));
        assert_ne!(outcome.outcome, "answered", "{outcome:?}");
        (outcome.outcome == "refused" && !outcome.connected).then_some(())
    });
    sandbox.audited(
        &json!({ "decision": "deny", "ip": NEW.to_string(), "port": PORT, "reason": "platform_denied" }),
    );
    assert!(new.arrivals().is_empty(), "{:?}", new.arrivals());
    assert_eq!(old.arrivals().len(), 1, "{:?}", old.arrivals());
    machine.world.remove_node_address(NEW).expect("it is there");
    wait::until("the address is the internet's again", probe::AT_ONCE * 5, || {
        (probe.try_one(&probe::tcp(NEW, PORT, "x")).outcome == "answered").then_some(())
    });
    sandbox.stop();
}

pub(crate) fn sandboxes_cannot_reach_each_other(machine: &Machine) {
    let (one, other) = (machine.wide(), machine.wide());
    other.background(
        "cd /workspace && exec python3 -u -m http.server 8000",
        |sandbox| {
            sandbox
                .sh("curl -s --max-time 30 http://127.0.0.1:8000/")
                .exit_code
                == 0
        },
    );
    let address = other
        .sh_ok("hostname -I")
        .split(' ')
        .next()
        .expect("an address")
        .to_owned();
    assert!(address.starts_with("10.213."), "{address}");
    let own = other.sh(&format!(
        "curl -s --max-time 30 -o /dev/null http://{address}:8000/by-itself"
    ));
    assert_eq!(own.exit_code, 0, "it can reach itself: {own:?}");
    let mark = machine.world.capture().mark();
    let probe = machine.probe(&one);
    for port in [8000, 9111, 1] {
        probe
            .try_one(&probe::tcp(&address, port, "GET /stolen HTTP/1.0\r\n\r\n"))
            .assert_refused_at_connect();
        one.audited(&json!({ "decision": "deny", "ip": address, "port": port, "reason": "platform_denied" }));
    }
    for outcome in as_root(
        &machine.node,
        &one,
        &[
            probe::tcp(&address, 8000, "GET /stolen HTTP/1.0\r\n\r\n"),
            probe::udp(&address, 8000),
        ],
    ) {
        outcome.assert_refused();
    }
    machine
        .world
        .capture()
        .assert_nothing_to(address.parse::<IpAddr>().expect("an address"), mark);
    let log = other.sh_ok("cat /workspace/background.log");
    assert!(log.contains("/by-itself") && !log.contains("/stolen"), "{log}");
    one.stop();
    other.stop();
}

pub(crate) fn udp_is_refused_at_once(machine: &Machine) {
    let sandbox = machine.wide();
    let probe = machine.probe(&sandbox);
    let mark = machine.world.capture().mark();
    for (target, port) in [
        (OK, 443),
        (OK, 8080),
        (EVIL, 443),
        (EVIL, 8080),
        (EVIL, 853),
        (EVIL, 5353),
        (GATEWAY, 123),
    ] {
        let outcome = probe.try_one(&probe::udp(target, port));
        outcome.assert_refused();
        machine.world.capture().assert_nothing_to(target, mark);
    }
    for address in [(EVIL, 443), (EVIL, 8080), (OK, 443)] {
        assert!(
            machine.world.udp_collector(address).arrivals().is_empty(),
            "{address:?} got a datagram"
        );
    }
    denied_because(
        &sandbox,
        &json!({ "ip": EVIL.to_string(), "port": 8080, "protocol": "udp" }),
        &["protocol_denied", "port_denied", "default_deny"],
    );
    // The one exception, and it ends at our own resolver.
    probe.try_one(&probe::dns(RESOLVER, "ok.test")).assert_at_once();
    sandbox.stop();
}

pub(crate) fn icmp_and_ipv6_go_nowhere(machine: &Machine) {
    let sandbox = machine.wide();
    let probe = machine.probe(&sandbox);
    let mark = machine.world.capture().mark_at_rest();
    let ping = |to: &str, socket: &str| json!({ "kind": "icmp", "to": to, "socket": socket });
    for outcome in probe.try_all(&[ping("203.0.113.66", "raw"), ping("203.0.113.66", "dgram")]) {
        assert!(
            ["denied", "prohibited"].contains(&outcome.outcome.as_str()),
            "{outcome:?}"
        );
    }
    let six = [
        "2001:db8:66::66",
        "2001:db8:ffff::1",
        "fd00:ec2::254",
        "::ffff:203.0.113.66",
        "64:ff9b::cb00:7142",
        "2002:cb00:7142::1",
    ];
    for target in six {
        let outcome = probe.try_one(&probe::tcp(target, 443, "x"));
        // A mapped address is IPv4 by another name, and port 443 of the attacker's web server is allowed here.
        if target.starts_with("::ffff:") {
            assert!(outcome.connected, "{target}: {outcome:?}");
        } else {
            outcome.assert_refused_at_connect();
        }
    }
    let mark_root = machine.world.capture().mark();
    let as_root_attempts = [
        ping("203.0.113.66", "raw"),
        ping("169.254.169.254", "raw"),
        ping("198.51.100.130", "raw"),
        json!({ "kind": "frame", "source": "2001:db8::1", "to": "2001:db8:66::66", "port": 443 }),
        json!({ "kind": "frame", "source": "fe80::1", "to": "ff02::1", "port": 5353 }),
    ];
    for outcome in as_root(&machine.node, &sandbox, &as_root_attempts) {
        assert!(
            ["silent", "sent"].contains(&outcome.outcome.as_str()),
            "{outcome:?}"
        );
    }
    let sent = machine.world.capture().begun_since(mark_root);
    assert!(sent.is_empty(), "{sent:#?}");
    let sent = machine.world.capture().sent_since(mark);
    let wrong =
        |packet: &&harness::capture::Packet| packet.protocol == protocol::ICMP || packet.source.is_ipv6();
    assert!(!sent.iter().any(|packet| wrong(&packet)), "{sent:#?}");
    sandbox.audited(&json!({ "decision": "deny", "ip": EVIL.to_string(), "protocol": "icmp" }));
    sandbox.stop();
}

pub(crate) fn every_attempt_is_counted(machine: &Machine) {
    let sandbox = machine.fenced();
    let probe = machine.probe(&sandbox);
    let attempts = vec![probe::tcp(EVIL, 8080, "x"); 300];
    for outcome in probe.try_all(&attempts) {
        outcome.assert_refused_at_connect();
    }
    let count = || {
        let events = sandbox.audit("decision=deny");
        let ours = events
            .iter()
            .filter(|event| event["ip"] == EVIL.to_string() && event["port"] == 8080);
        ours.map(|event| event["repeated"].as_u64().unwrap_or(0))
            .sum::<u64>()
    };
    wait::within(probe::AT_ONCE * 10, || (count() >= 300).then_some(()));
    assert_eq!(count(), 300, "attempts in the audit");
    let page = sandbox
        .client()
        .get(&format!("/egress/audit?sandbox_id={}&limit=1", sandbox.id))
        .send()
        .ok();
    assert_eq!(page["events"].as_array().map(Vec::len), Some(1), "{page}");
    sandbox.stop();
}
