//! What DNS answered stays reachable as long as a client may remember it, for whoever asked and nobody else.

use std::{net::IpAddr, time::Duration};

use harness::{
    dns::{Answer, Manner},
    node::Node,
    probe::{self, Probe},
    sandbox::Sandbox,
    wait,
    world::{API, OK, WILD},
};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::{Named, REFUSED, TURNS, ask, assert_addresses, policy};
use crate::names::denied_because;

/// Time for whatever must come back.
const RECOVERY: Duration = Duration::from_secs(60);

#[track_caller]
fn reaches(probe: &Probe<'_>, address: IpAddr, name: &str) {
    probe
        .try_one(&probe::https(address, name))
        .assert_answered(&format!("hello from {name}"));
}

fn turns() -> Vec<IpAddr> {
    TURNS
        .iter()
        .map(|text| text.parse().expect("an address"))
        .collect()
}

pub(crate) fn an_address_that_turns_all_the_time_drops_no_flow(named: &Named) {
    let sandbox = named.fenced();
    let probe = named.probe(&sandbox);
    named.world.dns.set(
        "www.turn.test",
        Answer::Rotating(turns(), Duration::from_millis(700)),
    );
    named.world.dns.behave(
        "www.turn.test",
        Manner {
            ttl: 0,
            ..Manner::default()
        },
    );
    let mut seen: Vec<IpAddr> = Vec::new();
    wait::until("every address was answered", RECOVERY, || {
        let outcome = ask(&probe, "www.turn.test");
        assert_eq!(
            (outcome.rcode, outcome.addresses.len(), outcome.ttl),
            (Some(0), 1, Some(0)),
            "{outcome:?}"
        );
        // Connects by the answer of a moment ago, whatever the name means by then.
        reaches(&probe, outcome.addresses[0], "www.turn.test");
        if !seen.contains(&outcome.addresses[0]) {
            seen.push(outcome.addresses[0]);
        }
        (seen.len() == TURNS.len()).then_some(())
    });
    // A client that looked once goes on with what it knows.
    let asked = named.asked("www.turn.test");
    for address in &seen {
        reaches(&probe, *address, "www.turn.test");
    }
    assert_eq!(
        named.asked("www.turn.test"),
        asked,
        "netd dials what the client chose, and never looks again"
    );
    // Every name of an address counts for itself.
    let wrong = probe::with(
        probe::https(seen[0], "other.turn.test"),
        json!({ "unverified": true }),
    );
    probe.try_one(&wrong).assert_refused();
    denied_because(
        &sandbox,
        &json!({ "ip": seen[0].to_string(), "host": "other.turn.test" }),
        &["address_not_bound"],
    );
    sandbox.stop();
}

pub(crate) fn every_one_of_three_hundred_addresses_is_pinned(named: &Named) {
    let sandbox = named.fenced();
    let probe = named.probe(&sandbox);
    let mut all: Vec<IpAddr> = (0..300_u16)
        .map(|index| {
            let [high, low] = index.to_be_bytes();
            IpAddr::from([198, 51, 103 + high, low])
        })
        .collect();
    // Three of them can be reached: the first, one in the middle, and the last.
    for (at, address) in [(0, TURNS[0]), (150, TURNS[1]), (299, TURNS[2])] {
        all[at] = address.parse().expect("an address");
    }
    for round in 0..4 {
        let name = format!("huge{round}.turn.test");
        named.world.dns.set(&name, Answer::Addresses(all.clone()));
        assert_eq!(probe.try_one(&probe::lookup(&name)).addresses.len(), 300);
        for address in &turns()[..3] {
            reaches(&probe, *address, &name);
        }
    }
    sandbox.stop();
}

pub(crate) fn what_a_flow_uses_is_not_forgotten_however_much_is_asked(named: &Named) {
    let limits = json!({ "unique_names_per_minute": 10_000, "query_bytes_per_minute": 10_000_000 });
    let sandbox = named.allowed(&limits);
    let probe = named.probe(&sandbox);
    assert_addresses(&ask(&probe, "api.test"), &[API.into()]);
    assert_addresses(&ask(&probe, "ok.test"), &[OK.into()]);
    // A connection to `ok.test` that is kept while thousands of pairs are pinned after it.
    let keep = format!(
        "python3 -c \"import socket, ssl, time\n\
         c = ssl.create_default_context(); c.check_hostname = False; c.verify_mode = ssl.CERT_NONE\n\
         s = c.wrap_socket(socket.create_connection(('{OK}', 443)), server_hostname='ok.test')\n\
         open('/workspace/open', 'w').close()\n\
         while True:\n\
         \x20 s.sendall(b'GET / HTTP/1.1\\r\\nHost: ok.test\\r\\n\\r\\n')\n\
         \x20 assert s.recv(65536), 'closed'\n\
         \x20 open('/workspace/alive', 'a').write('x'); time.sleep(0.05)\""
    );
    sandbox.write("/workspace/keep.sh", &keep);
    sandbox.background("sh /workspace/keep.sh", |sandbox| {
        sandbox.sh("test -e /workspace/open").exit_code == 0
    });
    let all: Vec<IpAddr> = (0..500_u16)
        .map(|index| {
            let [high, low] = index.to_be_bytes();
            IpAddr::from([198, 51, 105 + high, low])
        })
        .collect();
    for round in 0..10 {
        let name = format!("flood{round}.wild.test");
        named.world.dns.set(&name, Answer::Addresses(all.clone()));
        assert_eq!(probe.try_one(&probe::lookup(&name)).addresses.len(), 500);
    }
    let beats = || {
        sandbox
            .sh_ok("wc -c < /workspace/alive")
            .parse::<usize>()
            .expect("a number")
    };
    let before = beats();
    wait::until("the connection is alive", RECOVERY, || {
        (beats() > before + 3).then_some(())
    });
    // Its address may be connected to anew; the one that nobody used made room.
    reaches(&probe, OK.into(), "ok.test");
    probe
        .try_one(&probe::https(API, "api.test"))
        .assert_refused_at_connect();
    reaches_after_asking(&probe, API.into(), "api.test");
    sandbox.stop();
}

#[track_caller]
fn reaches_after_asking(probe: &Probe<'_>, address: IpAddr, name: &str) {
    assert_addresses(&ask(probe, name), &[address]);
    reaches(probe, address, name);
}

/// Ends netd and waits until the next one serves.
#[track_caller]
fn replace_netd(named: &Named, probe: &Probe<'_>, signal: Signal) {
    named.node.replace_by(Node::netd, signal);
    crate::outages::wait_until_served(probe);
    named.node.wait_ready();
}

pub(crate) fn pins_outlive_netd_and_not_the_policy(named: &Named) {
    let sandbox = named.fenced();
    let probe = named.probe(&sandbox);
    for (name, address) in [
        ("ok.test", OK),
        ("api.test", API),
        ("kept.turn.test", TURNS[0].parse().expect("one")),
    ] {
        named
            .world
            .dns
            .set("kept.turn.test", Answer::Addresses(vec![turns()[0]]));
        assert_addresses(&ask(&probe, name), &[address.into()]);
    }
    for signal in [Signal::SIGKILL, Signal::SIGTERM] {
        replace_netd(named, &probe, signal);
        let asked = named.world.dns.queries().len();
        for (address, name) in [(API.into(), "api.test"), (turns()[0], "kept.turn.test")] {
            reaches(&probe, address, name);
        }
        assert_eq!(
            named.world.dns.queries().len(),
            asked,
            "{signal}: nothing was asked again"
        );
    }
    // A policy that no longer allows the name takes the pin at once, and another one does not bring it back.
    let mut narrow = policy(&json!({}));
    let names = narrow["allowed_domains"].as_array_mut().expect("a list");
    names.retain(|name| name != "api.test" && name != "*.turn.test");
    sandbox.set_network(&narrow);
    for address in [API.into(), turns()[0]] {
        probe
            .try_one(&probe::https(address, "api.test"))
            .assert_refused_at_connect();
    }
    sandbox.set_network(&policy(&json!({})));
    probe
        .try_one(&probe::https(API, "api.test"))
        .assert_refused_at_connect();
    replace_netd(named, &probe, Signal::SIGKILL);
    probe
        .try_one(&probe::https(API, "api.test"))
        .assert_refused_at_connect();
    reaches_after_asking(&probe, API.into(), "api.test");
    sandbox.stop();
}

pub(crate) fn whoever_gets_an_address_next_inherits_no_pin(named: &Named) {
    let organization = named.node.register("heirs");
    let make = || -> (Sandbox, String) {
        let sandbox = organization.sandbox(&json!({ "network": policy(&json!({})) }));
        let address = sandbox.sh_ok("hostname -I | cut -d' ' -f1");
        (sandbox, address)
    };
    let (first, place) = make();
    reaches_after_asking(&named.probe(&first), OK.into(), "ok.test");
    first.stop();
    // Until somebody has its address; the others stay, so that theirs are taken.
    let mut others = Vec::new();
    for _ in 0..15 {
        let (heir, address) = make();
        named
            .probe(&heir)
            .try_one(&probe::https(OK, "ok.test"))
            .assert_refused_at_connect();
        others.push(heir);
        if address == place {
            break;
        }
    }
    for other in others {
        other.stop();
    }
}

pub(crate) fn names_resolve_while_policies_change(named: &Named) {
    let sandbox = named.fenced();
    let probe = named.probe(&sandbox);
    reaches_after_asking(&probe, WILD.into(), "steady.wild.test");
    named
        .world
        .dns
        .set("steady.wild.test", Answer::Addresses(vec![WILD.into()]));
    let looks = [
        probe::lookup("steady.wild.test"),
        probe::https("ok.test", "ok.test"),
    ];
    sandbox.background(&Probe::loop_line(&looks, 5), |sandbox| {
        sandbox.sh("grep -q answered /workspace/background.log").exit_code == 0
    });
    let outcomes = || -> Vec<Value> {
        let log = sandbox.sh_ok("cat /workspace/background.log");
        log.lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect()
    };
    let mut round = 0;
    wait::until("many looks and many changes", RECOVERY, || {
        let mut changed = policy(&json!({ "label_max": 30 + round % 20 }));
        changed["allowed_ports"] = if round % 2 == 0 {
            json!([443])
        } else {
            json!([80, 443])
        };
        sandbox.set_network(&changed);
        round += 1;
        (round >= 15 && outcomes().len() > 40).then_some(())
    });
    let mut failed = outcomes();
    failed.retain(|outcome| outcome["outcome"] != "answered");
    assert!(failed.is_empty(), "{failed:#?}");
    // And a name that a change takes away is refused from its acknowledgement on.
    sandbox.set_network(&json!({ "mode": "allowlist", "allowed_domains": ["ok.test"] }));
    assert_eq!(ask(&probe, "steady.wild.test").rcode, REFUSED);
    sandbox.stop();
}
