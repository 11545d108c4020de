//! What a sandbox may ask, in which form, and what it is answered.

use std::{collections::HashSet, net::IpAddr};

use harness::{
    dns::Answer,
    probe::{self, with},
    world::{OK, RESOLVER, WILD},
};
use hickory_proto::rr::{
    Name, RData,
    rdata::{self, CNAME},
};
use serde_json::json;

use super::{NXDOMAIN, Named, REFUSED, SERVFAIL, ask, ask_type, assert_addresses};
use crate::names::denied_because;

fn wire(name: &str) -> Name {
    Name::from_ascii(name).expect("a name")
}

pub(crate) fn real_clients_resolve_what_is_allowed_and_nothing_else(named: &Named) {
    let sandbox = named.fenced();
    let clients = [
        "python3 -c \"import socket; print(socket.getaddrinfo('NAME', 443)[0][4][0])\"",
        "getent ahosts NAME | awk '{ print $1; exit }'",
        "node -e \"require('dns').lookup('NAME', (e, a) => { console.log(a); process.exit(e ? 1 : 0) })\"",
        "node -e \"require('dns').resolve4('NAME', (e, a) => { console.log(a && a[0]); process.exit(e ? 1 : 0) })\"",
        "curl -sk --max-time 20 -o /dev/null -w '%{remote_ip}' https://NAME/",
    ];
    for client in clients {
        let allowed = sandbox.sh_ok(&client.replace("NAME", "ok.test"));
        assert_eq!(allowed, OK.to_string(), "{client}");
        let denied = sandbox.sh(&client.replace("NAME", "secret.evil.test"));
        assert!(!denied.stdout.contains("203.0.113.66"), "{client}: {denied:?}");
    }
    assert_eq!(named.asked("evil.test"), 0, "a denied name was asked upstream");
    sandbox.stop();
}

pub(crate) fn types_that_no_policy_lists_are_refused_and_service_bindings_are_empty(named: &Named) {
    let sandbox = named.fenced();
    let probe = named.probe(&sandbox);
    let name = "default-types.wild.test";
    named.world.dns.set(
        name,
        Answer::Records(vec![
            RData::A(WILD.into()),
            RData::TXT(rdata::TXT::new(vec!["text of the world".to_owned()])),
        ]),
    );
    for (kind, code) in [
        (1, Some(0)),
        // HTTPS and SVCB exist and are empty: no key that hides a name, no hint at QUIC.
        (65, Some(0)),
        (64, Some(0)),
        (2, REFUSED),
        (5, REFUSED),
        (6, REFUSED),
        (10, REFUSED),
        (12, REFUSED),
        (15, REFUSED),
        (16, REFUSED),
        (33, REFUSED),
        (35, REFUSED),
        (43, REFUSED),
        (48, REFUSED),
        (252, REFUSED),
        (255, REFUSED),
        (257, REFUSED),
        (65_280, REFUSED),
    ] {
        let outcome = ask_type(&probe, name, kind);
        assert_eq!(outcome.rcode, code, "type {kind}: {outcome:?}");
        let is_full = !outcome.records.is_empty();
        assert_eq!(is_full, kind == 1, "type {kind}: {outcome:?}");
    }
    let kinds: HashSet<u16> = named
        .world
        .dns
        .queries_for(name)
        .iter()
        .map(|query| query.kind.into())
        .collect();
    assert_eq!(kinds, HashSet::from([1]), "asked upstream");
    denied_because(
        &sandbox,
        &json!({ "host": name, "protocol": "dns" }),
        &["dns_type"],
    );
    sandbox.stop();
}

pub(crate) fn types_that_the_policy_lists_are_answered_from_parsed_records(named: &Named) {
    let types = [
        "A", "AAAA", "CAA", "CNAME", "MX", "NS", "PTR", "SOA", "SRV", "TXT",
    ];
    let sandbox = named.allowed(&json!({ "types": types }));
    let probe = named.probe(&sandbox);
    let name = "listed-types.wild.test";
    let start = rdata::SOA::new(wire("ns.test."), wire("admin.test."), 7, 3600, 600, 86_400, 30);
    named.world.dns.set(
        name,
        Answer::Records(vec![
            RData::A(WILD.into()),
            RData::TXT(rdata::TXT::new(vec!["one".to_owned(), "two".to_owned()])),
            RData::MX(rdata::MX::new(10, wire("mail.evil.test."))),
            RData::SRV(rdata::SRV::new(1, 2, 443, wire("service.evil.test."))),
            RData::NS(rdata::NS(wire("ns.evil.test."))),
            RData::PTR(rdata::PTR(wire("host.evil.test."))),
            RData::SOA(start),
            RData::CAA(rdata::CAA::new_issue(false, Some(wire("ca.test.")), Vec::new())),
            RData::CNAME(CNAME(wire("target.evil.test."))),
        ]),
    );
    for (kind, part) in [
        (1, "203.0.113.30"),
        (16, "\u{3}one\u{3}two"),
        (15, "mail"),
        (33, "service"),
        (2, "ns"),
        (12, "host"),
        (6, "admin"),
        (257, "ca.test"),
        (5, "target.evil.test"),
    ] {
        let outcome = ask_type(&probe, name, kind);
        let [(owner, found, data)] = outcome.records.as_slice() else {
            panic!("type {kind}: {outcome:?}")
        };
        assert!(
            owner == name && *found == kind && data.contains(part),
            "type {kind}: {outcome:?}"
        );
    }
    // The names in them open nothing.
    assert_eq!(ask(&probe, "mail.evil.test").rcode, REFUSED);
    for kind in [10, 35, 43, 255, 65_280] {
        assert_eq!(ask_type(&probe, name, kind).rcode, REFUSED, "type {kind}");
    }
    assert!(ask_type(&probe, name, 65).records.is_empty());
    sandbox.set_network(&super::policy(&json!({ "types": ["TXT"] })));
    assert_eq!(ask_type(&probe, name, 1).rcode, REFUSED);
    let quiet = ask_type(&probe, name, 28);
    assert_eq!((quiet.rcode, quiet.records.len()), (Some(0), 0), "{quiet:?}");
    sandbox.stop();
}

pub(crate) fn nothing_but_a_name_and_a_type_goes_upstream(named: &Named) {
    let sandbox = named.fenced();
    let probe = named.probe(&sandbox);
    // Client subnet, cookie, padding and an option that nobody knows, all with something to say.
    let options = format!(
        "{}{}{}{}",
        "0008000700011800636f76", "000a0008636f766572746564", "000c0006636f76657274", "fde90006636f76657274"
    );
    let (mut ids, mut ports, mut spellings) = (HashSet::new(), HashSet::new(), HashSet::new());
    for index in 0..20 {
        let name = format!("Plain{index}.Wild.TEST");
        let attempt = with(
            probe::dns(RESOLVER, &name),
            json!({ "edns": 4096, "options": options, "edns_flags": 0xffff, "flags": 0x01f0, "tcp": index % 2 == 1 }),
        );
        assert_addresses(&probe.try_one(&attempt), &[WILD.into()]);
        let name = name.to_lowercase();
        let queries = named.world.dns.queries_for(&name);
        let query = queries.first().expect("it was asked upstream");
        // Header, name, type and class, and an OPT record without options.
        assert_eq!(query.packet.len(), 12 + name.len() + 2 + 4 + 11, "{query:?}");
        assert_eq!(query.packet[2..4], [1, 0], "recursion desired and nothing else");
        assert_eq!(
            query.packet[query.packet.len() - 6..],
            [0; 6],
            "an OPT record that says nothing"
        );
        ids.insert(query.packet[..2].to_vec());
        ports.insert(query.from.port());
        spellings.insert(query.spelt.replace(|letter: char| !letter.is_alphabetic(), ""));
    }
    assert!(
        ids.len() >= 19 && ports.len() >= 18,
        "{} ids, {} ports",
        ids.len(),
        ports.len()
    );
    assert!(spellings.len() >= 15, "{spellings:?}");
    sandbox.stop();
}

pub(crate) fn improper_questions_get_no_further(named: &Named) {
    let sandbox = named.fenced();
    let probe = named.probe(&sandbox);
    let asked = named.world.dns.queries().len();
    let to = |changes| with(probe::dns(RESOLVER, "improper.wild.test"), changes);
    for (changes, code) in [
        (json!({ "questions": 2 }), 1),
        (json!({ "questions": 0 }), 1),
        (json!({ "trailing": "636f76657274" }), 1),
        (json!({ "class": 3 }), 5),
        (json!({ "class": 255 }), 5),
        // Status, notify and update.
        (json!({ "flags": 0x1100 }), 4),
        (json!({ "flags": 0x2100 }), 4),
    ] {
        let outcome = probe.try_one(&to(changes.clone()));
        assert_eq!(outcome.rcode, Some(code), "{changes}: {outcome:?}");
        outcome.assert_at_once();
    }
    // A response is never answered, and neither is what is no message.
    for raw in [
        "00078000000100000000000003",
        "00",
        "ffffffffffffffffffffffffffffffffff",
    ] {
        let silent = probe.try_one(&to(json!({ "raw": raw, "timeout": 0.3 })));
        assert_eq!(silent.outcome, "timeout", "{raw}: {silent:?}");
    }
    for name in ["10.0.0.5", "a b.wild.test", "1.2.3.4.wild.test\u{7f}"] {
        assert_eq!(ask(&probe, name).rcode, REFUSED, "{name}");
    }
    assert_eq!(named.world.dns.queries().len(), asked, "asked upstream");
    // Junk harms nobody. No more of it than a sandbox may ask at once: beyond that the kernel refuses all questions.
    let junk = "python3 -c \"import os, socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n\
                for i in range(150): s.sendto(os.urandom(2 * i), ('203.0.113.53', 53))\n\
                for i in range(20):\n  t = socket.create_connection(('203.0.113.53', 53)); t.sendall(os.urandom(200)); t.close()\"";
    sandbox.sh_ok(junk);
    assert_addresses(&ask(&probe, "after-junk.wild.test"), &[WILD.into()]);
    sandbox.stop();
}

pub(crate) fn answers_are_cut_to_what_a_client_takes_and_whole_by_tcp(named: &Named) {
    let sandbox = named.fenced();
    let probe = named.probe(&sandbox);
    let name = "three-hundred.wild.test";
    let all: Vec<IpAddr> = (0..300_u16)
        .map(|index| {
            let [high, low] = index.to_be_bytes();
            IpAddr::from([198, 51, 101 + high, low])
        })
        .collect();
    named.world.dns.set(name, Answer::Addresses(all.clone()));
    for (edns, limit) in [
        (None, 512),
        (Some(100), 512),
        (Some(800), 800),
        (Some(1232), 1232),
        (Some(65_000), 1232),
    ] {
        let mut attempt = probe::dns(RESOLVER, name);
        if let Some(size) = edns {
            attempt["edns"] = json!(size);
        }
        let cut = probe.try_one(&attempt);
        assert!(
            cut.truncated && cut.size <= limit && !cut.addresses.is_empty() && cut.rcode == Some(0),
            "{edns:?}: {cut:?}"
        );
    }
    let whole = probe.try_one(&with(probe::dns(RESOLVER, name), json!({ "tcp": true })));
    assert_eq!(
        (whole.truncated, whole.addresses.len()),
        (false, 300),
        "{whole:?}"
    );
    let found: HashSet<IpAddr> = probe
        .try_one(&probe::lookup(name))
        .addresses
        .into_iter()
        .collect();
    assert_eq!(found, all.into_iter().collect(), "getaddrinfo tries again by TCP");
    sandbox.stop();
}

pub(crate) fn a_connection_carries_many_questions_at_once(named: &Named) {
    let sandbox = named.fenced();
    let probe = named.probe(&sandbox);
    let slow = harness::dns::Manner {
        delay: std::time::Duration::from_millis(800),
        ..harness::dns::Manner::default()
    };
    named.world.dns.behave("first.slow.test", slow);
    named
        .world
        .dns
        .set("first.slow.test", Answer::Addresses(vec![OK.into()]));
    let mut names = vec!["first.slow.test".to_owned()];
    names.extend((0..25).map(|index| format!("many{index}.wild.test")));
    names.push("no.evil.test".to_owned());
    let outcome = probe.try_one(&probe::dns_stream(RESOLVER, &names));
    let answered: HashSet<&str> = outcome
        .answers
        .iter()
        .filter_map(|answer| answer["name"].as_str())
        .collect();
    assert_eq!(
        answered,
        names.iter().map(String::as_str).collect(),
        "{outcome:?}"
    );
    for answer in &outcome.answers {
        let expected = match answer["name"].as_str() {
            Some("no.evil.test") => json!([5, []]),
            Some("first.slow.test") => json!([0, [OK.to_string()]]),
            _ => json!([0, [WILD.to_string()]]),
        };
        assert_eq!(
            json!([answer["rcode"], answer["addresses"]]),
            expected,
            "{answer}"
        );
    }
    assert_ne!(
        outcome.answers[0]["name"], "first.slow.test",
        "nobody waits for the slow one"
    );
    // One that says nothing more is closed.
    let attempt = with(
        probe::dns_stream(RESOLVER, &["ok.test".to_owned()]),
        json!({ "until_closed": true, "timeout": 40.0 }),
    );
    let idle = probe.try_one(&attempt);
    assert_eq!(
        (idle.outcome.as_str(), idle.answers.len()),
        ("closed", 1),
        "{idle:?}"
    );
    // So is one that never finishes a question, and neither keeps others out.
    let slow = "python3 -c \"import socket, time\nall = [socket.create_connection(('203.0.113.53', 53)) for _ in range(8)]\n\
                [s.sendall(bytes([0, 40, 1])) for s in all]\ntime.sleep(1)\n\"";
    sandbox.sh_ok(slow);
    assert_addresses(&ask(&probe, "meanwhile.wild.test"), &[WILD.into()]);
    sandbox.stop();
}

pub(crate) fn aliases_are_judged_by_the_name_that_was_asked(named: &Named) {
    let sandbox = named.fenced();
    let probe = named.probe(&sandbox);
    let alias = |name: &str, target: &str| named.world.dns.set(name, Answer::Alias(target.to_owned()));
    alias("to-denied.wild.test", "cdn.evil.test");
    named
        .world
        .dns
        .set("cdn.evil.test", Answer::Addresses(vec![WILD.into()]));
    let found = ask(&probe, "to-denied.wild.test");
    assert_addresses(&found, &[WILD.into()]);
    let chain: Vec<(&str, u16)> = found
        .records
        .iter()
        .map(|(owner, kind, _)| (owner.as_str(), *kind))
        .collect();
    assert_eq!(chain, [("to-denied.wild.test", 5), ("cdn.evil.test", 1)]);
    probe
        .try_one(&probe::https("to-denied.wild.test", "to-denied.wild.test"))
        .assert_answered("hello from to-denied.wild.test");
    // The alias gave an address, and no right to the name behind it.
    assert_eq!(ask(&probe, "cdn.evil.test").rcode, REFUSED);
    probe
        .try_one(&with(
            probe::https(WILD, "cdn.evil.test"),
            json!({ "unverified": true }),
        ))
        .assert_refused();
    // Chains end: in an address, by their length, or because they go round.
    for links in [3, 16, 17] {
        for at in 0..links {
            let name = format!("c{links}-{at}.wild.test");
            if at + 1 < links {
                alias(&name, &format!("c{links}-{}.wild.test", at + 1));
            } else {
                alias(&name, "ok.test");
            }
        }
        let outcome = ask(&probe, &format!("c{links}-0.wild.test"));
        if links <= 16 {
            assert_addresses(&outcome, &[OK.into()]);
        } else {
            assert_eq!(outcome.rcode, SERVFAIL, "{outcome:?}");
        }
    }
    alias("round.wild.test", "and-round.wild.test");
    alias("and-round.wild.test", "round.wild.test");
    for name in ["round.wild.test", "loop.test"] {
        let outcome = ask(&probe, name);
        assert_eq!(
            (outcome.rcode, outcome.records.len()),
            (SERVFAIL, 0),
            "{outcome:?}"
        );
    }
    alias("nowhere.wild.test", "does-not-exist.test");
    assert!(ask(&probe, "nowhere.wild.test").addresses.is_empty());
    sandbox.stop();
}

pub(crate) fn addresses_that_nobody_may_reach_are_stripped_in_every_form(named: &Named) {
    let sandbox = named.fenced();
    let probe = named.probe(&sandbox);
    let set = |name: &str, addresses: &[&str]| {
        let addresses = addresses
            .iter()
            .map(|text| text.parse().expect("an address"))
            .collect();
        named.world.dns.set(name, Answer::Addresses(addresses));
    };
    let own = sandbox.sh_ok("hostname -I | cut -d' ' -f1");
    for (index, address) in [
        "10.0.0.5",
        "127.0.0.1",
        "169.254.169.254",
        "169.254.1.1",
        "100.64.0.5",
        "192.168.0.5",
        "168.63.129.16",
        "0.0.0.0",
        "255.255.255.255",
        "198.51.100.130",
        &own,
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("rebind{index}.wild.test");
        set(&name, &[address]);
        let outcome = ask(&probe, &name);
        assert_eq!(
            (outcome.rcode, outcome.records.len()),
            (NXDOMAIN, 0),
            "{address}: {outcome:?}"
        );
        denied_because(
            &sandbox,
            &json!({ "host": name, "protocol": "dns" }),
            &["dns_rebinding"],
        );
    }
    set(
        "rebind-some.wild.test",
        &["10.0.0.5", "203.0.113.30", "::1", "127.0.0.1"],
    );
    assert_addresses(&ask(&probe, "rebind-some.wild.test"), &[WILD.into()]);
    // What the operator opened may be learnt and reached, on its port.
    set("rebind-opened.wild.test", &[super::OPENED]);
    let opened: IpAddr = super::OPENED.parse().expect("an address");
    assert_addresses(&ask(&probe, "rebind-opened.wild.test"), &[opened]);
    sandbox.stop();
}

pub(crate) fn names_of_a_cluster_and_of_search_domains_go_nowhere_unless_listed(named: &Named) {
    let sandbox = named.fenced();
    let probe = named.probe(&sandbox);
    let everything = named
        .organization
        .sandbox(&json!({ "network": { "mode": "allow_all", "allowed_ports": [443] } }));
    let open = named.probe(&everything);
    let names = [
        "kubernetes",
        "ok",
        "kubernetes.default.svc.cluster.local",
        "ok.test.default.svc.cluster.local",
        "printer.local",
        "db.internal",
        "router.home.arpa",
        "hidden.onion",
        "x.localhost",
    ];
    for name in names {
        named.world.dns.set(name, Answer::Addresses(vec![OK.into()]));
        for probe in [&probe, &open] {
            assert_eq!(ask(probe, name).rcode, REFUSED, "{name}");
        }
        assert_eq!(named.asked(name), 0, "{name} was asked upstream");
    }
    assert_addresses(&ask(&open, "ok.test"), &[OK.into()]);
    let listed = json!({ "mode": "allowlist", "allowed_domains": ["kubernetes", "db.internal"] });
    sandbox.set_network(&listed);
    for name in ["kubernetes", "db.internal"] {
        assert_addresses(&ask(&probe, name), &[OK.into()]);
    }
    assert_eq!(ask(&probe, "other.internal").rcode, REFUSED);
    everything.stop();
    sandbox.stop();
}
