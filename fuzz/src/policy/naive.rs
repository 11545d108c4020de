//! Whether a flow under a name passes, read from the documents rule by rule: no index, no table, no compiled form. Says it
//! a second time, from what documents are said to mean.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use sandgate_policy::{DomainName, DomainPattern, Platform, faces};
use serde_json::Value;

pub(crate) fn allows(
    platform: &Platform,
    documents: &[Value],
    to: SocketAddr,
    name: &DomainName,
    bound: &[DomainName],
) -> bool {
    let asked = Asked { to, name, bound };
    // A tier in audit mode denies nothing.
    let denies = |document: &&Value| document["enforcement"] != "audit" && !asked.passes(document);
    !platform.denies(to) && !documents.iter().any(|document| denies(&document))
}

struct Asked<'a> {
    to: SocketAddr,
    name: &'a DomainName,
    bound: &'a [DomainName],
}

fn items<'a>(value: &'a Value, field: &str) -> impl Iterator<Item = &'a Value> {
    value[field].as_array().into_iter().flatten()
}

fn texts<'a>(value: &'a Value, field: &str) -> impl Iterator<Item = &'a str> {
    items(value, field).map(|item| item.as_str().expect("a text"))
}

fn is_read(rule: &Value) -> bool {
    rule["tls"] == "intercept" || items(rule, "http").next().is_some() || !rule["credential"].is_null()
}

fn is_public(name: &DomainName) -> bool {
    let labels: Vec<&str> = name.as_str().split('.').collect();
    let local = ["alt", "internal", "invalid", "local", "localhost", "onion"];
    match labels.as_slice() {
        [] | [_] => false,
        [.., "home", "arpa"] => false,
        [.., last] => !local.contains(last),
    }
}

/// Whether a pattern is for the name. `*` is every name where it denies, every public one where it allows.
fn is_for(pattern: &str, name: &DomainName, denies: bool) -> bool {
    match DomainPattern::parse(pattern).expect("a pattern") {
        DomainPattern::Any => denies || is_public(name),
        DomainPattern::Exact(exact) => exact == *name,
        DomainPattern::Below(apex) => name.as_str().ends_with(&format!(".{apex}")),
    }
}

fn is_in(range: &str, address: IpAddr) -> bool {
    match range.parse::<IpNet>() {
        Ok(range) => range.contains(&address),
        Err(_) => range.parse::<IpAddr>().expect("an address") == address,
    }
}

impl Asked<'_> {
    fn passes(&self, document: &Value) -> bool {
        for rule in items(document, "rules") {
            if rule["protocol"] != "udp"
                && self.is_on_port(document, rule)
                && let Some(passes) = self.by_rule(rule)
            {
                return passes;
            }
        }
        if texts(document, "denied_domains").any(|pattern| is_for(pattern, self.name, true))
            || texts(document, "denied_cidrs").any(|range| self.leads_into(range))
        {
            return false;
        }
        let listed = items(document, "allowed_ports").any(|port| *port == self.to.port());
        if !listed {
            return false;
        }
        let pinned = self.bound.contains(self.name);
        let by_name =
            pinned && texts(document, "allowed_domains").any(|pattern| is_for(pattern, self.name, false));
        by_name
            || texts(document, "allowed_cidrs").any(|range| is_in(range, self.to.ip().to_canonical()))
            || self.by_mode(document, pinned)
    }

    /// An allowing mode lets a flow go where no name is denied, or where DNS has led it.
    fn by_mode(&self, document: &Value, pinned: bool) -> bool {
        if document["mode"] != "allow_all" && document["mode"] != "denylist" {
            return false;
        }
        let concerned = || {
            items(document, "rules")
                .filter(|rule| rule["protocol"] != "udp" && self.is_on_port(document, rule))
        };
        let denies_names = |protocol: &str| {
            concerned().any(|rule| {
                rule["action"] == "deny"
                    && rule["protocol"] == protocol
                    && texts(rule, "domains").next().is_some()
            })
        };
        let narrows = concerned().any(|rule| rule["action"] == "allow" && is_read(rule));
        if denies_names("http") || narrows || texts(document, "denied_domains").next().is_some() {
            pinned
        } else {
            !denies_names("tcp") || !self.bound.is_empty()
        }
    }

    fn is_on_port(&self, document: &Value, rule: &Value) -> bool {
        let spans = match rule["ports"].as_array() {
            Some(spans) => spans,
            None if rule["action"] == "deny" => return true,
            None => document["allowed_ports"].as_array().expect("a list"),
        };
        spans.iter().any(|span| match span.as_str() {
            None => *span == self.to.port(),
            Some(text) => {
                let (first, last) = text.split_once('-').unwrap_or((text, text));
                let port = |text: &str| text.parse::<u16>().expect("a port");
                (port(first)..=port(last)).contains(&self.to.port())
            }
        })
    }

    fn leads_into(&self, range: &str) -> bool {
        faces(self.to.ip()).any(|face| is_in(range, face))
    }

    /// What the rule says, if it says anything.
    fn by_rule(&self, rule: &Value) -> Option<bool> {
        let is_tcp = rule["protocol"] == "tcp";
        let domains =
            |name: &DomainName, denies| texts(rule, "domains").any(|pattern| is_for(pattern, name, denies));
        if rule["action"] == "deny" {
            let by_pin = is_tcp && self.bound.iter().any(|name| domains(name, true));
            let any = texts(rule, "domains").any(|pattern| pattern == "*");
            let by_range = texts(rule, "cidrs").any(|range| self.leads_into(range));
            return (any || by_pin || by_range || domains(self.name, true)).then_some(false);
        }
        if texts(rule, "cidrs").any(|range| is_in(range, self.to.ip().to_canonical())) {
            return Some(true);
        }
        if is_tcp {
            return self.bound.iter().any(|name| domains(name, false)).then_some(true);
        }
        match (domains(self.name, false), self.bound.contains(self.name)) {
            (false, _) => None,
            (true, true) => Some(true),
            // It holds for the name wherever the flow goes.
            (true, false) => is_read(rule).then_some(false),
        }
    }
}
