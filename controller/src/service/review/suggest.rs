//! The policy that allows what a sandbox did, and nothing else.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use sandgate_policy::{DomainName, Policy, PolicyError, Protocol};
use serde_json::{Value, json};

use super::attempt::{Attempt, Target};

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
    /// By the name under which DNS gave the address, of what was forwarded unread: the ports.
    opaque: BTreeMap<String, BTreeSet<u16>>,
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
        let text = |name: &DomainName| name.as_str().to_owned();
        let name = match (target.protocol, &target.name, &target.bound) {
            (Protocol::Tcp, Some(name), _) => text(name),
            (Protocol::Tcp, None, Some(bound)) => {
                self.opaque.entry(text(bound)).or_default().insert(port);
                return;
            }
            (Protocol::Tcp, None, None) => return self.add_address("tcp", target),
            (Protocol::Udp, _, _) => return self.add_address("udp", target),
        };
        if let Attempt::Request { method, path, .. } = attempt {
            let methods = self.read.entry(name.clone()).or_default();
            let paths = methods.entry(method.clone()).or_default();
            paths.insert(path.as_str().to_owned());
        }
        self.names.entry(name).or_default().insert(port);
    }

    fn add_address(&mut self, protocol: &'static str, target: &Target) {
        let ports = self.addresses.entry((protocol, target.to.ip())).or_default();
        ports.insert(target.to.port());
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
        let mut opaque: BTreeMap<&BTreeSet<u16>, Vec<&str>> = BTreeMap::new();
        for (name, ports) in &self.opaque {
            opaque.entry(ports).or_default().push(name);
        }
        for (ports, names) in opaque {
            let mut rule = allow(ports);
            rule["protocol"] = json!("tcp");
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
