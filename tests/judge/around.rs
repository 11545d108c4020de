//! The world that the suite is run in, and the file that tells the attacker of it.

use std::{net::SocketAddr, sync::Arc};

use anyhow::Result;
use harness::{
    collector::Collector,
    world::{Front, NODE, World},
};
use serde_json::{Value, json};

use crate::system::PATIENCE;

/// A port of the machine that runs the sandbox.
const NODE_PORT: u16 = 7777;
/// Stands in everything that attackers send.
const CANARY: &str = "rtq7";
/// The variable of the key.
pub(crate) const VARIABLE: &str = "REDTEAM_KEY";
/// Its value.
pub(crate) const SECRET: &str = "sk-redteam-8c41f0a77d2e4b6f93aa5d1c";
/// What is allowed by address.
const OPEN: &str = "192.0.2.40";
const OPEN6: &str = "2001:db8:40::40";

/// A world, with a listener on its node.
pub(crate) struct Around {
    pub(crate) world: Arc<World>,
    pub(crate) node: Collector,
}

impl Around {
    pub(crate) fn build() -> Result<Self> {
        let world = World::builder()
            .name("ok.test", &["203.0.113.10"])
            .name("tenant.test", &["203.0.113.10"])
            .name("plain.test", &["203.0.113.20"])
            .name("key.test", &["203.0.113.21"])
            .name("wild.test", &["203.0.113.30"])
            .name("*.wild.test", &["203.0.113.30"])
            .name("*.budget.test", &["203.0.113.30"])
            .name("late.test", &["203.0.113.70"])
            .name("evil.test", &["203.0.113.66"])
            .name("*.evil.test", &["203.0.113.66"])
            .name(
                "rebind.test",
                &["10.0.0.5", "127.0.0.1", "169.254.169.254", "192.168.0.5"],
            )
            .name("half-rebind.test", &["10.0.0.5", "203.0.113.10"])
            .name("six.test", &["2001:db8:10::10"])
            .mirror(
                "203.0.113.10",
                &["ok.test", "tenant.test", "half-rebind.test"],
                Front::Both,
            )
            .mirror("203.0.113.20", &["plain.test"], Front::Both)
            .mirror("203.0.113.21", &["key.test"], Front::Both)
            .mirror("203.0.113.30", &["wild.test", "*.wild.test"], Front::Both)
            .mirror("203.0.113.70", &["late.test"], Front::Both)
            .mirror("203.0.113.66", &["evil.test", "*.evil.test"], Front::Both)
            .mirror("2001:db8:10::10", &["six.test"], Front::Both)
            .mirror(OPEN, &["open.test"], Front::Both)
            .collect_tcp("203.0.113.10", &[22], "SSH-2.0-world\r\n")
            .collect_tcp("203.0.113.66", &[22, 53, 853, 5353, 8080], "")
            .collect_udp("203.0.113.66", &[53, 443, 853, 5353, 8080])
            .collect_udp("203.0.113.10", &[443])
            .collect_tcp("2001:db8:66::66", &[22, 80, 443, 853, 8080], "")
            .collect_udp(OPEN, &[7000])
            .collect_udp(OPEN6, &[7000])
            .build()?;
        let node = Collector::tcp(world.node(), (NODE, NODE_PORT).into(), "the node\r\n")?;
        Ok(Self { world, node })
    }

    /// What the attacker is told.
    pub(crate) fn told(&self, neighbour: Option<SocketAddr>) -> Value {
        let host = |name: &str, address: &str| json!({ "name": name, "address": address });
        json!({
            "canary": CANARY, "closed": true, "timeout_ms": PATIENCE,
            "ok": host("ok.test", "203.0.113.10"), "tenant": "tenant.test",
            "plain": host("plain.test", "203.0.113.20"), "late": host("late.test", "203.0.113.70"),
            "wild": host("wild.test", "203.0.113.30"), "budget": "budget.test",
            "evil": host("evil.test", "203.0.113.66"), "rebind": "rebind.test", "half_rebind": "half-rebind.test",
            "open": OPEN,
            "ipv6": { "ok": host("six.test", "2001:db8:10::10"), "evil": "2001:db8:66::66", "open": OPEN6 },
            "node": SocketAddr::from((NODE, NODE_PORT)), "neighbour": neighbour,
            "secret": { "variable": VARIABLE, "host": host("key.test", "203.0.113.21") },
        })
    }

    /// What the sandbox is allowed, as a policy of ours.
    pub(crate) fn policy() -> Value {
        let addresses = [format!("{OPEN}/32"), format!("{OPEN6}/128")];
        json!({
            "mode": "allowlist", "allowed_ports": [80, 443],
            "allowed_domains": [
                "ok.test", "plain.test", "late.test", "key.test", "*.wild.test", "*.budget.test", "rebind.test",
                "half-rebind.test", "six.test",
            ],
            "rules": [
                { "name": "shell", "action": "allow", "domains": ["ok.test"], "ports": ["22"], "protocol": "tcp" },
                { "name": "open", "action": "allow", "cidrs": addresses, "ports": ["443"] },
                { "name": "datagrams", "action": "allow", "cidrs": addresses, "ports": ["7000"], "protocol": "udp" },
            ],
        })
    }
}
