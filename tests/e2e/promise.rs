//! The promise: a stored key works inside the sandbox and is never there.
//!
//! What arrived with the key is judged by the servers of the internet, whether it was seen by looking into the
//! sandbox from outside.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use anyhow::Result;
use harness::{
    mirror::{Heard, Mirror},
    node::Node,
    probe,
    sandbox::{Organization, Sandbox},
    search,
    suite::Fixture,
    world::{Front, World},
};
use serde_json::{Value, json};
use uuid::Uuid;

pub(crate) mod calls;
pub(crate) mod canary;
pub(crate) mod clients;
pub(crate) mod doctor;
pub(crate) mod leaks;
pub(crate) mod refusals;
pub(crate) mod rotation;
pub(crate) mod store;
pub(crate) mod trust;

/// An organisation with stored keys, and a sandbox that may use them.
pub(crate) struct Promise {
    pub(crate) organization: Organization,
    pub(crate) sandbox: Sandbox,
    pub(crate) keys: Vec<Key>,
    // Stopped before its world goes.
    pub(crate) node: Node,
    pub(crate) world: Arc<World>,
}

/// A stored key.
#[derive(Clone)]
pub(crate) struct Key {
    pub(crate) name: &'static str,
    pub(crate) value: String,
}

/// Hosts by the addresses that have them.
const MIRRORS: [(&str, &[&str], Front); 9] = [
    ("203.0.113.20", &["api.test"], Front::Both),
    ("203.0.113.21", &["old.test"], Front::Http1),
    (
        "203.0.113.22",
        &[
            "odd.test",
            "query.test",
            "placed.test",
            "limited.test",
            "keeping.test",
            "rotated.test",
            "revoked.test",
            "cold.test",
            "strict.test",
        ],
        Front::Both,
    ),
    ("203.0.113.24", &["git.test"], Front::Both),
    ("203.0.113.25", &["over.test"], Front::Over),
    ("203.0.113.26", &["stranger.test"], Front::Stranger),
    ("203.0.113.27", &["right.test"], Front::Both),
    ("203.0.113.28", &["other.test", "unread.test"], Front::Both),
    ("203.0.113.66", &["evil.test"], Front::Both),
];

/// A value that can be told from all others, with everything in it that some encoding writes differently.
pub(crate) fn odd_value() -> String {
    format!("cn+/\"q\\%7e?=&~{}", Uuid::new_v4().simple())
}

fn value(name: &str) -> String {
    format!("sk-canary-{}-{}", name.to_lowercase(), Uuid::new_v4().simple())
}

/// The policy of the sandboxes here: everything but the attacker's host may be reached.
pub(crate) fn policy() -> Value {
    let mut names: Vec<&str> = MIRRORS
        .iter()
        .flat_map(|(_, names, _)| names.iter().copied())
        .collect();
    names.retain(|name| *name != "evil.test");
    names.extend(["ok.test", "wrong.test", "late.test", "api.anthropic.com"]);
    json!({
        "mode": "allowlist", "allowed_domains": names, "allowed_ports": [80, 443, 8443],
        "rules": [
            { "name": "read", "action": "allow", "domains": ["unread.test"], "ports": ["443"], "tls": "intercept" },
        ],
    })
}

/// Name, hosts, and what else the binding says.
fn bindings() -> Vec<(&'static str, Value)> {
    let bearer = json!([{ "kind": "bearer" }]);
    let bound = |host: &str| json!({ "hosts": [host], "ports": [443], "inject": bearer });
    vec![
        (
            "API_KEY",
            json!({ "hosts": ["api.test", "old.test"], "ports": [443], "inject": bearer }),
        ),
        (
            "ODD_KEY",
            json!({
                "hosts": ["odd.test"], "ports": [443],
                "inject": [{ "kind": "header", "header": "x-odd", "format": "key {value}" }],
            }),
        ),
        (
            "QUERY_KEY",
            json!({ "hosts": ["query.test"], "ports": [443], "inject": [{ "kind": "query", "parameter": "key" }] }),
        ),
        (
            "PLACED_KEY",
            json!({
                "hosts": ["placed.test"], "ports": [443],
                "inject": [{ "kind": "placeholder", "in": ["header", "query"] }],
            }),
        ),
        (
            "GIT_PASSWORD",
            json!({
                "hosts": ["git.test"], "ports": [443],
                "inject": [{ "kind": "basic", "username": "x-access-token" }],
            }),
        ),
        (
            "LIMITED_KEY",
            json!({
                "hosts": ["limited.test"], "ports": [443], "methods": ["GET"], "paths": ["/v1/**"], "inject": bearer,
            }),
        ),
        (
            "KEEPING_KEY",
            json!({ "hosts": ["keeping.test"], "ports": [443], "inject": bearer, "strip_client_auth": false }),
        ),
        (
            "UNTRUSTED_KEY",
            json!({ "hosts": ["over.test", "stranger.test", "wrong.test"], "ports": [443], "inject": bearer }),
        ),
        ("ROTATED_KEY", bound("rotated.test")),
        ("REVOKED_KEY", bound("revoked.test")),
        ("COLD_KEY", bound("cold.test")),
        ("STRICT_KEY", bound("strict.test")),
    ]
}

impl Fixture for Promise {
    fn start() -> Result<Self> {
        let mut builder = World::builder()
            .name("ok.test", &["203.0.113.10"])
            .site("203.0.113.10", &["ok.test"])
            .name("wrong.test", &["203.0.113.27"])
            .name("api.anthropic.com", &["203.0.113.30"])
            .mirror("203.0.113.30", &["api.anthropic.com"], Front::Both);
        for (address, names, front) in MIRRORS {
            builder = builder.mirror(address, names, front);
            for name in names {
                builder = builder.name(name, &[address]);
            }
        }
        let world = builder.build()?;
        // Everything that is ever logged is looked through.
        let node = Node::start_with(&world, &[("SANDGATE_LOG", "trace")])?;
        let organization = node.register("promise");
        let mut keys = Vec::new();
        for (name, egress) in bindings() {
            let value = if name == "ODD_KEY" {
                odd_value()
            } else {
                value(name)
            };
            store(&organization, name, &value, &egress);
            keys.push(Key { name, value });
        }
        let sandbox = organization.sandbox(&json!({
            "network": policy(), "timeout_seconds": 7200, "memory": "1Gi", "disk": "256Mi",
        }));
        clients::install(&sandbox);
        sandbox.write(probe::CA, world.ca.pem());
        Ok(Self {
            organization,
            sandbox,
            keys,
            node,
            world,
        })
    }

    fn report(&self) -> String {
        self.node.report()
    }
}

/// Stores a secret.
#[track_caller]
pub(crate) fn store(organization: &Organization, name: &str, value: &str, egress: &Value) -> Value {
    let body = json!({ "name": name, "value": value, "egress": egress });
    organization.client.post("/secrets").json(&body).send().ok()
}

impl Promise {
    /// A key's value.
    #[track_caller]
    pub(crate) fn key(&self, name: &str) -> &str {
        let key = self.keys.iter().find(|key| key.name == name);
        &key.unwrap_or_else(|| panic!("no key {name}")).value
    }

    /// What stands in the sandbox in a key's place.
    #[track_caller]
    pub(crate) fn placeholder(&self, name: &str) -> String {
        self.sandbox.sh_ok(&format!("printenv {name}"))
    }

    pub(crate) fn mirror(&self) -> &Mirror {
        &self.world.mirror
    }

    /// Another sandbox of the same organisation.
    #[track_caller]
    pub(crate) fn another(&self, body: Value) -> Sandbox {
        let mut body = body;
        if body.get("network").is_none() {
            body["network"] = policy();
        }
        let sandbox = self.organization.sandbox(&body);
        clients::install(&sandbox);
        sandbox
    }

    /// No key stands in `text`, in any form.
    #[track_caller]
    pub(crate) fn assert_no_key(&self, text: &str) {
        for key in &self.keys {
            if let Some(form) = search::sighting(text.as_bytes(), &key.value) {
                panic!("{} stands here, {form}: {text}", key.name);
            }
        }
    }
}

/// A path that nobody has asked for yet.
pub(crate) fn fresh(area: &str) -> String {
    static COUNTER: AtomicUsize = AtomicUsize::new(0);
    format!("/{area}/{}", COUNTER.fetch_add(1, Ordering::Relaxed))
}

/// The request carries this key as its only authorization.
#[track_caller]
pub(crate) fn assert_bearer(heard: &Heard, key: &str) {
    assert_eq!(
        heard.all("authorization"),
        [format!("Bearer {key}")],
        "{heard:#?}"
    );
}
