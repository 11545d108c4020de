//! What nobody may reach by IPv6 is refused before there is a connection, and at once.

use std::net::{IpAddr, Ipv6Addr};

use harness::{
    collector::Collector,
    probe::{self, as_root, with},
    wait,
    world::{EVIL6, NODE6, OK6},
};
use serde_json::{Value, json};

use super::{SOON, Six, address, pin};
use crate::names::denied_because;

pub(crate) fn what_is_not_allowed_is_refused_at_once(six: &Six) {
    let sandbox = six.fenced();
    let probe = six.probe(&sandbox);
    let capture = six.world.capture();
    let mark = capture.mark_at_rest();
    // Nobody has resolved it yet.
    probe
        .try_one(&probe::https(OK6, "six.test"))
        .assert_refused_at_connect();
    denied_because(
        &sandbox,
        &json!({ "ip": OK6.to_string(), "port": 443 }),
        &["address_not_bound", "default_deny"],
    );
    capture.assert_nothing_to(OK6, mark);
    pin(&probe);
    for port in [22, 8443, 1, 444, 65_535] {
        probe
            .try_one(&probe::tcp(OK6, port, "x"))
            .assert_refused_at_connect();
        denied_because(
            &sandbox,
            &json!({ "ip": OK6.to_string(), "port": port }),
            &["port_denied", "default_deny"],
        );
    }
    for port in [22, 53_000, 80, 443, 853, 8080] {
        probe
            .try_one(&probe::tcp(EVIL6, port, "x"))
            .assert_refused_at_connect();
        sandbox.audited(&json!({ "decision": "deny", "ip": EVIL6.to_string(), "port": port }));
    }
    for name in ["evil6.test", "xsix.test", "six.test.evil.test"] {
        let outcome = probe.try_one(&probe::https(name, name));
        assert_eq!(outcome.outcome, "no_name", "{name}: {outcome:?}");
        outcome.assert_at_once();
    }
    // Another name toward the pinned address is read, and refused.
    for name in ["evil6.test", "ok.test"] {
        let outcome = probe.try_one(&with(probe::https(OK6, name), json!({ "unverified": true })));
        outcome.assert_refused();
        assert_eq!(outcome.data, "", "{name}: {outcome:?}");
    }
    denied_because(
        &sandbox,
        &json!({ "host": "evil6.test", "ip": OK6.to_string() }),
        &["name_denied", "default_deny"],
    );
    sandbox.audited(&json!({ "host": "ok.test", "ip": OK6.to_string(), "reason": "address_not_bound" }));
    // Each one, however many: none is lost to a limit of answers.
    let attempts = vec![probe::tcp(EVIL6, 8080, "x"); 300];
    for outcome in probe.try_all(&attempts) {
        outcome.assert_refused_at_connect();
    }
    capture.assert_nothing_to(EVIL6, mark);
    capture.assert_nothing_to(OK6, mark);
    sandbox.stop();
}

pub(crate) fn private_and_wrapped_addresses_are_refused_whatever_the_policy_says(six: &Six) {
    let sandbox = six.wide();
    let probe = six.probe(&sandbox);
    let capture = six.world.capture();
    let mark = capture.mark_at_rest();
    let targets = [
        // Unique local, metadata, site local, link local.
        "fd00:ec2::254",
        "fd00:5::5",
        "fc00::1",
        "fd53:4700::1",
        "fec0::1",
        "fe80::1%eth0",
        // 10.0.0.5 and 169.254.169.254, compatible, translated, NAT64, 6to4, and as server and client of Teredo.
        "::10.0.0.5",
        "::ffff:0:10.0.0.5",
        "64:ff9b::10.0.0.5",
        "64:ff9b::169.254.169.254",
        "64:ff9b:1::10.0.0.5",
        "2002:a00:5::1",
        "2002:a9fe:a9fe::1",
        "2001:0:a00:5::1",
        "2001:0:cb00:7142:8000:63bf:f5ff:fffa",
    ];
    for target in targets {
        let attempts = [probe::tcp(target, 80, "x"), probe::tcp(target, 443, "x")];
        for outcome in probe.try_all(&attempts) {
            outcome.assert_refused_at_connect();
        }
        let plain: IpAddr = target.trim_end_matches("%eth0").parse().expect("an address");
        capture.assert_nothing_to(plain, mark);
        sandbox.audited(
            &json!({ "decision": "deny", "ip": plain.to_string(), "port": 80, "reason": "platform_denied" }),
        );
    }
    for port in [53, 80, 443] {
        probe
            .try_one(&probe::tcp("fe80::5347:1%eth0", port, "x"))
            .assert_refused_at_connect();
    }
    // To every socket it is the IPv4 address.
    for target in ["::ffff:10.0.0.5", "::ffff:169.254.169.254"] {
        probe
            .try_one(&probe::tcp(target, 80, "x"))
            .assert_refused_at_connect();
    }
    capture.assert_nothing_to([10, 0, 0, 5], mark);
    capture.assert_nothing_to([169, 254, 169, 254], mark);
    // On the wire it is one that nobody may send.
    let own = address(&sandbox);
    let mapped = ["::ffff:10.0.0.5", "::ffff:203.0.113.66"]
        .map(|to| json!({ "kind": "frame", "source": own, "to": to, "port": 8080, "protocol": 6 }));
    as_root(&six.node, &sandbox, &mapped);
    for target in ["ff02::1%eth0", "ff0e::1", "ff02::fb%eth0"] {
        let outcome = probe.try_one(&with(probe::udp(target, 5353), json!({ "timeout": 0.3 })));
        assert_ne!(outcome.outcome, "answered", "{target}: {outcome:?}");
    }
    let sent = capture.sent_since(mark);
    assert!(sent.is_empty(), "{sent:#?}");
    probe
        .try_one(&probe::tcp(EVIL6, 8080, "canary"))
        .assert_answered("canary");
    capture.assert_something_to(EVIL6, mark);
    sandbox.stop();
}

pub(crate) fn addresses_of_the_node_are_refused_also_new_ones(six: &Six) {
    const NEW: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x200, 0, 0, 0, 0, 1);
    const PORT: u16 = 7777;
    let sandbox = six.wide();
    let probe = six.probe(&sandbox);
    let old = Collector::tcp(six.world.node(), (NODE6, PORT).into(), "the node\r\n").expect("a listener");
    let reached = six
        .world
        .internet()
        .run(|| std::net::TcpStream::connect((NODE6, PORT)));
    reached.expect("the node's listener can be reached from the internet");
    wait::until("it was reached once", SOON, || {
        (old.arrivals().len() == 1).then_some(())
    });
    probe
        .try_one(&probe::tcp(NODE6, PORT, "x"))
        .assert_refused_at_connect();
    sandbox.audited(
        &json!({ "decision": "deny", "ip": NODE6.to_string(), "port": PORT, "reason": "platform_denied" }),
    );
    // 198.51.100.130, the node's IPv4 address, by 6to4.
    let mark = six.world.capture().mark();
    let wrapped: Ipv6Addr = "2002:c633:6482::1".parse().expect("an address");
    probe.try_one(&probe::tcp(wrapped, PORT, "x")).assert_refused();
    six.world.capture().assert_nothing_to(wrapped, mark);

    probe
        .try_one(&probe::tcp(NEW, PORT, "x"))
        .assert_answered("the internet");
    six.world.add_node_address(NEW).expect("an address");
    let new = Collector::tcp(six.world.node(), (NEW, PORT).into(), "the node\r\n").expect("a listener");
    let outcome = probe.try_one(&probe::tcp(NEW, PORT, "x"));
    assert_ne!(
        outcome.outcome, "answered",
        "an address of a moment ago: {outcome:?}"
    );
    wait::until("it is refused before there is a connection", SOON, || {
        (!probe.try_one(&probe::tcp(NEW, PORT, "x")).connected).then_some(())
    });
    sandbox.audited(
        &json!({ "decision": "deny", "ip": NEW.to_string(), "port": PORT, "reason": "platform_denied" }),
    );
    assert!(new.arrivals().is_empty(), "{:?}", new.arrivals());
    assert_eq!(old.arrivals().len(), 1, "{:?}", old.arrivals());
    six.world.remove_node_address(NEW).expect("it is there");
    wait::until("the address is the internet's again", SOON, || {
        (probe.try_one(&probe::tcp(NEW, PORT, "x")).outcome == "answered").then_some(())
    });
    sandbox.stop();
}

pub(crate) fn sandboxes_cannot_reach_each_other(six: &Six) {
    let (one, other) = (six.wide(), six.wide());
    other.background(
        "cd /workspace && exec python3 -u -m http.server --bind :: 8000",
        |sandbox| {
            sandbox
                .sh("curl -sg --max-time 2 -o /dev/null http://[::1]:8000/by-itself")
                .exit_code
                == 0
        },
    );
    let target = address(&other);
    assert_ne!(target, address(&one));
    let own = other.sh(&format!(
        "curl -sg --max-time 5 -o /dev/null http://[{target}]:8000/by-itself"
    ));
    assert_eq!(own.exit_code, 0, "it can reach itself: {own:?}");
    let mark = six.world.capture().mark();
    let probe = six.probe(&one);
    for port in [8000, 9111, 1] {
        probe
            .try_one(&probe::tcp(target, port, "GET /stolen HTTP/1.0\r\n\r\n"))
            .assert_refused_at_connect();
        one.audited(
            &json!({ "decision": "deny", "ip": target.to_string(), "port": port, "reason": "platform_denied" }),
        );
    }
    let attempts = [
        probe::tcp(target, 8000, "GET /stolen HTTP/1.0\r\n\r\n"),
        probe::udp(target, 8000),
    ];
    for outcome in as_root(&six.node, &one, &attempts) {
        outcome.assert_refused();
    }
    six.world.capture().assert_nothing_to(target, mark);
    let log = other.sh_ok("cat /workspace/background.log");
    assert!(log.contains("/by-itself") && !log.contains("/stolen"), "{log}");
    one.stop();
    other.stop();
}

pub(crate) fn udp_and_echoes_go_nowhere(six: &Six) {
    let sandbox = six.wide();
    let probe = six.probe(&sandbox);
    let mark = six.world.capture().mark_at_rest();
    for (target, port) in [
        (OK6, 443),
        (EVIL6, 443),
        (EVIL6, 8080),
        (EVIL6, 853),
        (NODE6, 123),
    ] {
        probe.try_one(&probe::udp(target, port)).assert_refused();
    }
    // Each of many: errors are not sent at a limited rate.
    for outcome in probe.try_all(&vec![probe::udp(EVIL6, 8080); 50]) {
        outcome.assert_refused();
    }
    denied_because(
        &sandbox,
        &json!({ "ip": EVIL6.to_string(), "port": 8080, "protocol": "udp" }),
        &["protocol_denied", "port_denied", "default_deny"],
    );
    let ping = |to: Ipv6Addr, socket: &str| json!({ "kind": "icmp", "to": to.to_string(), "socket": socket });
    for outcome in probe.try_all(&[ping(EVIL6, "raw"), ping(EVIL6, "dgram")]) {
        let denied = ["denied", "prohibited"].contains(&outcome.outcome.as_str());
        assert!(denied, "{outcome:?}");
    }
    let gateway = "fe80::5347:1".parse().expect("an address");
    let attempts: Vec<Value> = [EVIL6, NODE6, gateway].map(|to| ping(to, "raw")).to_vec();
    for outcome in as_root(&six.node, &sandbox, &attempts) {
        assert_ne!(outcome.outcome, "answered", "{outcome:?}");
    }
    let sent = six.world.capture().sent_since(mark);
    assert!(sent.is_empty(), "{sent:#?}");
    for port in [443, 853, 8080] {
        let arrivals = six.world.udp_collector((EVIL6, port)).arrivals();
        assert!(arrivals.is_empty(), "{arrivals:?}");
    }
    sandbox.stop();
}

pub(crate) fn private_answers_are_stripped(six: &Six) {
    let sandbox = six.fenced();
    let probe = six.probe(&sandbox);
    let outcome = probe.try_one(&probe::lookup("rebind6.test"));
    assert_eq!(outcome.outcome, "no_name", "{outcome:?}");
    let outcome = probe.try_one(&probe::lookup("half-rebind6.test"));
    assert_eq!(outcome.addresses, [IpAddr::from(OK6)], "{outcome:?}");
    probe
        .try_one(&probe::https("half-rebind6.test", "half-rebind6.test"))
        .assert_answered(&format!("at {OK6}"));
    sandbox.audited(&json!({ "decision": "deny", "host": "rebind6.test", "reason": "dns_rebinding" }));
    sandbox.stop();
}
