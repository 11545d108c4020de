//! The resolver that every sandbox has: what it asks upstream, whom it believes, what it keeps, and what it gives out
//! (attack cases 24, 25, 27-29, 32-35). What was asked is judged by the name servers and the capture, never by a
//! client's word.

pub(crate) mod asking;
pub(crate) mod budgets;
pub(crate) mod pinned;
pub(crate) mod upstreams;

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use anyhow::Result;
use harness::{
    node::Node,
    probe::{self, Outcome, Probe, with},
    sandbox::{Organization, Sandbox},
    suite::Fixture,
    world::{RESOLVER, RESOLVER6, SECOND_RESOLVER, World},
};
use serde_json::{Value, json};

use crate::machine::fixture_policy;

/// A private address that the operator opened, on port 443.
pub(crate) const OPENED: &str = "10.0.0.7";
/// Addresses of the internet at which everything below `turn.test` is served.
pub(crate) const TURNS: [&str; 4] = ["203.0.113.81", "203.0.113.82", "203.0.113.83", "203.0.113.84"];

/// A node that has three upstream resolvers.
pub(crate) struct Named {
    pub(crate) organization: Organization,
    pub(crate) other: Organization,
    // Stopped before its world goes.
    pub(crate) node: Node,
    pub(crate) world: Arc<World>,
}

impl Fixture for Named {
    fn start() -> Result<Self> {
        let mut builder = World::fixture().collect_tcp(OPENED, &[443], "opened\r\n");
        for address in TURNS {
            builder = builder.site(address, &["turn.test", "*.turn.test"]);
        }
        let world = builder.build()?;
        let upstream = format!("{RESOLVER}:53,{SECOND_RESOLVER}:53,[{RESOLVER6}]:53");
        let private = format!("{OPENED}/32:443");
        let settings = [
            ("SANDGATE_DNS_UPSTREAM", upstream.as_str()),
            ("SANDGATE_ALLOW_PRIVATE", &private),
        ];
        let node = Node::start_with(&world, &settings)?;
        let organization = node.register("names");
        let other = node.register("others");
        Ok(Self {
            organization,
            other,
            node,
            world,
        })
    }

    fn report(&self) -> String {
        self.node.report()
    }
}

/// The fixture's names, with these changes to `dns`.
pub(crate) fn policy(dns: &Value) -> Value {
    let mut policy = fixture_policy();
    let names = policy["allowed_domains"].as_array_mut().expect("a list");
    names.extend(["*.turn.test", "*.other.test", "*.slow.test"].map(Value::from));
    policy["dns"] = dns.clone();
    policy
}

impl Named {
    /// A sandbox under the fixture's policy.
    #[track_caller]
    pub(crate) fn fenced(&self) -> Sandbox {
        self.allowed(&json!({}))
    }

    /// The same, with these changes to `dns`.
    #[track_caller]
    pub(crate) fn allowed(&self, dns: &Value) -> Sandbox {
        self.organization.sandbox(&json!({ "network": policy(dns) }))
    }

    /// The attacker's program, installed.
    #[track_caller]
    pub(crate) fn probe<'a>(&self, sandbox: &'a Sandbox) -> Probe<'a> {
        Probe::install(sandbox, &self.world)
    }

    /// How often names were asked upstream: `name`, and those below it. Where netd lost its patience it has asked the
    /// other servers too, each of them once for a question.
    pub(crate) fn asked(&self, name: &str) -> usize {
        let mut servers: HashMap<SocketAddr, usize> = HashMap::new();
        for query in self.world.dns.queries_for(name).iter().filter(|query| !query.tcp) {
            *servers.entry(query.server).or_default() += 1;
        }
        servers.into_values().max().unwrap_or(0)
    }
}

/// Asks for the address records of a name.
#[track_caller]
pub(crate) fn ask(probe: &Probe<'_>, name: &str) -> Outcome {
    probe.try_one(&probe::dns(RESOLVER, name))
}

/// Asks for records of a type.
#[track_caller]
pub(crate) fn ask_type(probe: &Probe<'_>, name: &str, kind: u16) -> Outcome {
    probe.try_one(&with(probe::dns(RESOLVER, name), json!({ "type": kind })))
}

/// The answer has these addresses and no other.
#[track_caller]
pub(crate) fn assert_addresses(outcome: &Outcome, addresses: &[IpAddr]) {
    assert_eq!(
        (outcome.rcode, outcome.addresses.as_slice()),
        (Some(0), addresses),
        "{outcome:?}"
    );
}

/// Response codes (RFC 1035, 4.1.1).
pub(crate) const SERVFAIL: Option<u8> = Some(2);
pub(crate) const NXDOMAIN: Option<u8> = Some(3);
pub(crate) const REFUSED: Option<u8> = Some(5);
