//! Forged frames of IPv6, sent as root in the sandbox's network namespace.

use harness::{
    probe::{self, as_root, with},
    wait,
    world::{EVIL, EVIL6, NODE6},
};
use serde_json::{Value, json};

use super::{SOON, Six, address};
use crate::frames::dns_query;

/// Extension headers: a number, and what follows the first byte.
const HOP_BY_HOP: (u8, &str) = (0, "00010400000000");
const DESTINATION: (u8, &str) = (60, "00010400000000");
const ROUTING: (u8, &str) = (43, "00000000000000");
const SEGMENTS: (u8, &str) = (43, "020401000000000000000000000000000000000000000001");
const FIRST_FRAGMENT: (u8, &str) = (44, "00000100000007");
const ATOMIC_FRAGMENT: (u8, &str) = (44, "00000000000007");
const LATER_FRAGMENT: (u8, &str) = (44, "00001000000007");
const AUTHENTICATION: (u8, &str) = (51, "040000000000010000000100000000000000000000000000");
const MOBILITY: (u8, &str) = (135, "00000000000000");

pub(crate) fn forged_frames_go_nowhere(six: &Six) {
    let (sandbox, victim) = (six.wide(), six.wide());
    let (own, stolen) = (address(&sandbox), address(&victim));
    let honest =
        json!({ "kind": "frame", "source": own, "to": EVIL6.to_string(), "port": 8080, "protocol": 6 });
    let change = |changes: Value| with(honest.clone(), changes);
    let mut attempts = Vec::new();
    // Somebody else's address: another sandbox's, the node's, the gateway's, the server's, a link-local one of its
    // own, its IPv4 address in another dress, none, loopback, a group.
    for source in [
        stolen.to_string(),
        NODE6.to_string(),
        "fe80::5347:1".to_owned(),
        EVIL6.to_string(),
        "fe80::53:47ff:fe01:1".to_owned(),
        "::ffff:10.213.0.1".to_owned(),
        "::".to_owned(),
        "::1".to_owned(),
        "ff02::1".to_owned(),
    ] {
        attempts.push(change(json!({ "source": source })));
        attempts.push(change(
            json!({ "source": source, "protocol": 17, "port": 53, "send": dns_query("six-frame.evil.test") }),
        ));
    }
    // Extension headers, alone, repeated and before each other, in front of TCP, UDP and DNS.
    for chain in [
        &[HOP_BY_HOP][..],
        &[DESTINATION],
        &[ROUTING],
        &[SEGMENTS],
        &[FIRST_FRAGMENT],
        &[ATOMIC_FRAGMENT],
        &[LATER_FRAGMENT],
        &[AUTHENTICATION],
        &[MOBILITY],
        &[HOP_BY_HOP, HOP_BY_HOP],
        &[HOP_BY_HOP, DESTINATION, ROUTING, ATOMIC_FRAGMENT, DESTINATION],
        &[DESTINATION; 20],
    ] {
        attempts.push(change(json!({ "extensions": chain })));
        attempts.push(change(
            json!({ "extensions": chain, "protocol": 17, "port": 443 }),
        ));
        let query = dns_query("six-frame.evil.test");
        attempts.push(change(
            json!({ "extensions": chain, "protocol": 17, "port": 53, "send": query }),
        ));
    }
    // Protocols nobody needs: IPv4 and IPv6 in IPv6, GRE, ESP, none, SCTP, one that does not exist; IPv6 in IPv4.
    for protocol in [4, 41, 47, 50, 59, 132, 253] {
        attempts.push(change(json!({ "protocol": protocol })));
    }
    let four = sandbox.sh_ok("hostname -I");
    let four = four.split(' ').next().unwrap_or_default();
    attempts.push(json!({ "kind": "frame", "source": four, "to": EVIL.to_string(), "protocol": 41 }));
    // Segments of connections that do not exist.
    for flags in [0x10, 0x12, 0x04, 0x00] {
        attempts.push(change(json!({ "flags": flags })));
    }
    // Discovery: a router, a redirect, an echo, a group; questions and claims about the gateway and the victim.
    let hex = |text: &str| {
        let address: std::net::Ipv6Addr = text.parse().expect("an address");
        format!("{:032x}", address.to_bits())
    };
    let (gateway, neighbour) = (hex("fe80::5347:1"), hex(&stolen.to_string()));
    for body in [
        "85000000 00000000".to_owned(),
        "86000000 40000708 00000000 00000000".to_owned(),
        format!("87000000 00000000 {gateway}"),
        format!("87000000 00000000 {neighbour}"),
        format!("88000000 20000000 {gateway} 0201 025347010001"),
        format!("88000000 20000000 {neighbour} 0201 025347010001"),
        format!("89000000 00000000 {gateway} {neighbour}"),
        "80000000 00070001 63616e617279".to_owned(),
        format!("8f000000 00000001 04000000 {}", hex("ff02::1:3")),
        format!("01010000 00000000 {}", "60000000 0000 06 40".replace(' ', "")),
    ] {
        let body = body.replace(' ', "");
        for source in [own.to_string(), "fe80::1".to_owned(), "::".to_owned()] {
            for to in ["ff02::1", "fe80::5347:1", &stolen.to_string(), &EVIL6.to_string()] {
                attempts.push(change(json!({
                    "protocol": 58, "body": body, "sum_at": 2, "hops": 255, "source": source, "to": to,
                })));
            }
        }
    }
    // VLAN tags; other Ethernet addresses; a group's.
    attempts.push(change(json!({ "tags": "81000001" })));
    attempts.push(change(json!({ "tags": "88a8000181000001" })));
    attempts.push(change(json!({ "source": stolen, "mac": "025347010000" })));
    attempts.push(change(json!({ "mac": "025347010000" })));
    attempts.push(change(json!({ "source": stolen, "gateway": "ffffffffffff" })));
    attempts.push(change(json!({ "source": stolen, "gateway": "333300000001" })));
    // Too short, of another version, longer than it is, garbage.
    for raw in [
        "60000000".to_owned(),
        format!(
            "6000000000040640{}{}",
            hex(&own.to_string()),
            hex(&EVIL6.to_string())
        ),
        format!(
            "60000000ffff0640{}{}00",
            hex(&own.to_string()),
            hex(&EVIL6.to_string())
        ),
        format!(
            "4000000000140640{}{}",
            hex(&own.to_string()),
            hex(&EVIL6.to_string())
        ),
        "ff".repeat(60),
    ] {
        attempts.push(change(json!({ "type": 0x86dd, "raw": raw })));
    }

    let mark = six.world.capture().mark_at_rest();
    for outcome in as_root(&six.node, &sandbox, &attempts) {
        let fits = ["sent", "OSError"].contains(&outcome.outcome.as_str());
        assert!(fits, "{outcome:?}");
    }
    let sent = six.world.capture().sent_since(mark);
    assert!(sent.is_empty(), "forged frames made the node send: {sent:#?}");
    assert!(six.world.dns.queries_for("six-frame.evil.test").is_empty());
    sandbox.audited(&json!({ "decision": "deny", "reason": "spoofed_source" }));
    // Nobody believed any of it: both go on as before.
    for sandbox in [&sandbox, &victim] {
        six.probe(sandbox)
            .try_one(&probe::tcp(EVIL6, 8080, "canary"))
            .assert_answered("canary");
    }
    assert_eq!(address(&victim), stolen);
    // The twin: the same frame with its own address is a question like any other.
    sandbox.set_network(&json!({ "mode": "allowlist", "allowed_domains": ["*.wild.test"] }));
    let twin = change(json!({
        "protocol": 17, "port": 53, "send": dns_query("six-frame.wild.test"), "to": "2001:db8:53::53",
    }));
    as_root(&six.node, &sandbox, &[twin]);
    wait::until("the honest frame is answered", SOON, || {
        (!six.world.dns.queries_for("six-frame.wild.test").is_empty()).then_some(())
    });
    sandbox.stop();
    victim.stop();
}
