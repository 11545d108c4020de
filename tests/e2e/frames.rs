//! Forged frames, sent as root in the sandbox's network namespace: what code could try that had broken out
//! of its user (cases 44-46).

use harness::{
    probe::{self, as_root, with},
    wait,
    world::{EVIL, OK, WILD},
};
use serde_json::{Value, json};

use crate::machine::Machine;

pub(crate) fn forged_frames_go_nowhere(machine: &Machine) {
    let (sandbox, victim) = (machine.wide(), machine.wide());
    let address = |of: &harness::sandbox::Sandbox| {
        of.sh_ok("hostname -I")
            .split(' ')
            .next()
            .unwrap_or_default()
            .to_owned()
    };
    let (own, stolen) = (address(&sandbox), address(&victim));
    let query = dns_query("frame.wild.test");
    let honest =
        json!({ "kind": "frame", "source": own, "to": EVIL.to_string(), "port": 8080, "protocol": 6 });
    let change = |changes: Value| with(honest.clone(), changes);
    let gateway = |operation: &str| {
        format!(
            "0001080006040{operation}020000000001a9fe0101020000000002{}",
            "0ad50001"
        )
    };
    let mut attempts = vec![
        // Somebody else's address: another sandbox's, the node's, the gateway's, the server's own.
        change(json!({ "source": stolen })),
        change(json!({ "source": "198.51.100.130" })),
        change(json!({ "source": "169.254.1.1" })),
        change(json!({ "source": EVIL.to_string() })),
        change(json!({ "source": "0.0.0.0" })),
        change(json!({ "source": "127.0.0.1" })),
        change(json!({ "source": stolen, "protocol": 17, "port": 53, "send": query })),
        // VLAN tags, one and two.
        change(json!({ "tags": "8100 0001".replace(' ', "") })),
        change(json!({ "tags": "88a8000181000001" })),
        // IPv4 options (source route), fragments first and later.
        change(json!({ "options": format!("8307040a{}00", "000005") })),
        change(json!({ "fragment": 0x2000 })),
        change(json!({ "fragment": 0x0010, "protocol": 17 })),
        // Protocols nobody needs: IGMP, IP in IP, GRE, ESP, SCTP, one that does not exist.
        change(json!({ "protocol": 2 })),
        change(json!({ "protocol": 4 })),
        change(json!({ "protocol": 47 })),
        change(json!({ "protocol": 50 })),
        change(json!({ "protocol": 132 })),
        change(json!({ "protocol": 253 })),
        // Segments of connections that do not exist.
        change(json!({ "flags": 0x10 })),
        change(json!({ "flags": 0x12 })),
        change(json!({ "flags": 0x04 })),
        change(json!({ "flags": 0x00 })),
        // Not IP: ARP claims, MPLS, a short packet, garbage.
        change(json!({ "type": 0x0806, "raw": gateway("002") })),
        change(json!({ "type": 0x8847, "raw": "00000140" })),
        change(json!({ "type": 0x0800, "raw": "45000014" })),
        change(json!({ "type": 0x0800, "raw": "ff".repeat(60) })),
        // Another Ethernet address, a broadcast one.
        change(json!({ "source": stolen, "mac": "025347010000" })),
        change(json!({ "source": stolen, "gateway": "ffffffffffff" })),
    ];
    let mark = machine.world.capture().mark_at_rest();
    for outcome in as_root(&machine.node, &sandbox, &attempts) {
        assert!(
            ["sent", "OSError"].contains(&outcome.outcome.as_str()),
            "{outcome:?}"
        );
    }
    let sent = machine.world.capture().sent_since(mark);
    assert!(sent.is_empty(), "forged frames made the node send: {sent:#?}");
    assert!(machine.world.dns.queries_for("frame.wild.test").is_empty());
    sandbox.audited(&json!({ "decision": "deny", "reason": "spoofed_source" }));
    // The twin: the same frame with its own address is a query like any other.
    let twin = change(json!({ "protocol": 17, "port": 53, "send": query, "to": "203.0.113.53" }));
    sandbox.set_network(&json!({ "mode": "allowlist", "allowed_domains": ["*.wild.test"] }));
    attempts.clear();
    as_root(&machine.node, &sandbox, &[twin]);
    wait::until("the honest frame is answered", probe::AT_ONCE * 5, || {
        (!machine.world.dns.queries_for("frame.wild.test").is_empty()).then_some(())
    });
    // Root there is behind the same wall: what is allowed passes, what is not does not.
    let outcomes = as_root(
        &machine.node,
        &sandbox,
        &[
            probe::tcp(OK, 443, "x"),
            probe::tcp(EVIL, 8080, "x"),
            with(probe::dns("203.0.113.53", "root.wild.test"), json!({})),
        ],
    );
    outcomes[0].assert_refused_at_connect();
    outcomes[1].assert_refused_at_connect();
    assert_eq!(outcomes[2].addresses, [std::net::IpAddr::from(WILD)]);
    sandbox.stop();
    victim.stop();
}

/// A query for an address record as the frame maker sends it: one character for each byte.
pub(crate) fn dns_query(name: &str) -> String {
    let mut bytes = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        bytes.push(u8::try_from(label.len()).expect("a short label"));
        bytes.extend_from_slice(label.as_bytes());
    }
    bytes.extend_from_slice(&[0, 0, 1, 0, 1]);
    bytes.into_iter().map(char::from).collect()
}
