//! The policy that allows what a sandbox did, and nothing else.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use sandgate_policy::{Policy, PolicyError, Protocol};
use serde_json::{Value, json};

use super::attempt::Attempt;

/// The port that plain lists of names are written for.
const HTTPS: u16 = 443;
/// Paths of one host beyond which all of them are allowed: a longer list is data, not a rule.
const PATHS_LISTED: usize = 20;

/// What was used, put together.
#[derive(Debug, Default)]
pub(super) struct Used {
    /// By name: the ports.
    names: BTreeMap<String, BTreeSet<u16>>,
    /// By name and method: the paths of what was read.
    read: BTreeMap<String, BTreeMap<String, BTreeSet<String>>>,
    /// By protocol and address: the ports.
    addresses: BTreeMap<(&'static str, IpAddr), BTreeSet<u16>>,
}

impl Used {
    /// Adds an attempt that went through. A name that was only asked for opens nothing.
    pub(super) fn add(&mut self, attempt: &Attempt) {
        let Some(target) = attempt.target() else {
            return;
        };
        let port = target.to.port();
        let Some(name) = target.name.as_ref().map(|name| name.as_str().to_owned()) else {
            let protocol = match target.protocol {
                Protocol::Tcp => "tcp",
                Protocol::Udp => "udp",
            };
            let key = (protocol, target.to.ip());
            self.addresses.entry(key).or_default().insert(port);
            return;
        };
        if let Attempt::Request { method, path, .. } = attempt {
            let methods = self.read.entry(name.clone()).or_default();
            let paths = methods.entry(method.clone()).or_default();
            paths.insert(path.as_str().to_owned());
        }
        self.names.entry(name).or_default().insert(port);
    }

    /// The document; what is no rule is taken from `present`.
    ///
    /// # Errors
    /// When it is larger than a policy may be.
    pub(super) fn policy(&self, present: &Policy) -> Result<Policy, PolicyError> {
        let mut listed: Vec<&str> = Vec::new();
        let mut by_ports: BTreeMap<&BTreeSet<u16>, Vec<&str>> = BTreeMap::new();
        let mut rules: Vec<Value> = Vec::new();
        for (name, ports) in &self.names {
            match self.read.get(name) {
                Some(methods) => {
                    let entries: Vec<Value> = methods
                        .iter()
                        .map(|(method, paths)| entry(method, paths))
                        .collect();
                    let mut rule = allow(ports);
                    rule["domains"] = json!([name]);
                    rule["http"] = json!(entries);
                    rules.push(rule);
                }
                None if ports.iter().eq([&HTTPS]) => listed.push(name),
                None => by_ports.entry(ports).or_default().push(name),
            }
        }
        for (ports, names) in by_ports {
            let mut rule = allow(ports);
            rule["domains"] = json!(names);
            rules.push(rule);
        }
        let mut ranges: BTreeMap<(&str, &BTreeSet<u16>), Vec<String>> = BTreeMap::new();
        for ((protocol, address), ports) in &self.addresses {
            ranges
                .entry((protocol, ports))
                .or_default()
                .push(address.to_string());
        }
        for ((protocol, ports), addresses) in ranges {
            let mut rule = allow(ports);
            rule["protocol"] = json!(protocol);
            rule["cidrs"] = json!(addresses);
            rules.push(rule);
        }
        let mut document = present.to_value();
        let written = json!({
            "mode": "allowlist", "allowed_domains": listed, "denied_domains": [], "allowed_cidrs": [], "denied_cidrs": [],
            "allowed_ports": [HTTPS], "rules": rules, "enforcement": "enforce",
        });
        if let (Value::Object(document), Value::Object(written)) = (&mut document, written) {
            document.extend(written);
        }
        Policy::parse(&document)
    }
}

fn entry(method: &str, paths: &BTreeSet<String>) -> Value {
    let mut entry = json!({ "methods": [method] });
    // An asterisk in a path would say more than itself.
    if paths.len() <= PATHS_LISTED && !paths.iter().any(|path| path.contains('*')) {
        entry["paths"] = json!(paths);
    }
    entry
}

fn allow(ports: &BTreeSet<u16>) -> Value {
    let ports: Vec<String> = ports.iter().map(u16::to_string).collect();
    json!({ "action": "allow", "ports": ports })
}
