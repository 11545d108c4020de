//! What the cases share: a node, an organisation, and sandboxes under the policies that most cases need.

use std::sync::Arc;

use anyhow::Result;
use harness::{
    node::Node,
    probe::Probe,
    sandbox::{Organization, Sandbox},
    suite::Fixture,
    world::World,
};
use serde_json::{Value, json};

/// A running node.
pub(crate) struct Machine {
    pub(crate) organization: Organization,
    /// A sandbox with the shortest life there is: it ends while other cases run.
    pub(crate) mayfly: Sandbox,
    // Stopped before its world goes.
    pub(crate) node: Node,
    pub(crate) world: Arc<World>,
}

impl Fixture for Machine {
    fn start() -> Result<Self> {
        Self::with(&[])
    }

    fn report(&self) -> String {
        self.node.report()
    }
}

impl Machine {
    /// With further environment variables.
    pub(crate) fn with(settings: &[(&str, &str)]) -> Result<Self> {
        let world = World::fixture().build()?;
        let node = Node::start_with(&world, settings)?;
        let organization = node.register("acme");
        let mayfly = node.register("mayfly").sandbox(&json!({ "timeout_seconds": 60 }));
        Ok(Self {
            mayfly,
            organization,
            node,
            world,
        })
    }
}

/// The policy of the attack cases: some names, on ports 80 and 443.
pub(crate) fn fixture_policy() -> Value {
    json!({
        "mode": "allowlist",
        "allowed_domains": [
            "ok.test", "api.test", "plain.test", "*.wild.test", "alias.test", "loop.test", "trap.test",
            "rebind.test", "half-rebind.test", "many.test",
        ],
        "allowed_ports": [80, 443],
    })
}

/// Everything that a tenant can allow.
pub(crate) fn widest_policy() -> Value {
    json!({
        "mode": "allowlist",
        "rules": [{
            "name": "everything", "action": "allow", "cidrs": ["0.0.0.0/0"], "ports": ["1-65535"], "protocol": "tcp",
        }],
    })
}

impl Machine {
    /// A sandbox under the fixture's policy.
    #[track_caller]
    pub(crate) fn fenced(&self) -> Sandbox {
        self.organization.sandbox(&json!({ "network": fixture_policy() }))
    }

    /// A sandbox that may do whatever a tenant can allow.
    #[track_caller]
    pub(crate) fn wide(&self) -> Sandbox {
        self.organization.sandbox(&json!({ "network": widest_policy() }))
    }

    /// The attacker's program, installed.
    #[track_caller]
    pub(crate) fn probe<'a>(&self, sandbox: &'a Sandbox) -> Probe<'a> {
        Probe::install(sandbox, &self.world)
    }
}
