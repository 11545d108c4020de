//! The smallest change of a policy that allows an attempt.

use std::net::IpAddr;

use sandgate_api::feed::TierName;
use sandgate_policy::{Platform, Policy, Protocol};
use serde_json::{Value, json};

use super::{
    super::policies::merged,
    attempt::{Attempt, Said, Target, Tiers},
};

/// A merge patch (RFC 7396) for the policy of a tier.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Change {
    pub(super) tier: TierName,
    pub(super) patch: Value,
}

/// The changes after which all tiers allow the attempt, one for each tier that denies it. None where no change of a
/// policy allows it, or none that this knows. Every answer was tried.
pub(super) fn changes(platform: &Platform, tiers: &Tiers, attempt: &Attempt) -> Option<Vec<Change>> {
    // In a list an asterisk would say more than itself, and the path is the sandbox's own word.
    if let Attempt::Request { path, .. } = attempt
        && path.as_str().contains('*')
    {
        return None;
    }
    let mut amended = tiers.clone();
    let mut changes = Vec::new();
    for (tier, policy) in tiers.written() {
        let alone = |policy: Policy| {
            Tiers::new(None, Some(policy))
                .judge(platform)
                .ok()
                .map(|judge| judge.say(attempt))
        };
        let said = alone(policy.clone())?;
        if said.is_allowed() {
            continue;
        }
        let document = policy.to_value();
        let (patch, policy) = candidates(&document, attempt, &said)
            .into_iter()
            .find_map(|patch| {
                let policy = Policy::parse(&merged(&document, &patch)).ok()?;
                platform.check(&policy).ok()?;
                alone(policy.clone())?.is_allowed().then_some((patch, policy))
            })?;
        amended = amended.with(tier, policy);
        changes.push(Change { tier, patch });
    }
    // The organisation's last: if that fails, what it denies stays denied.
    changes.reverse();
    let allows = amended.judge(platform).ok()?.say(attempt).is_allowed();
    (allows && !changes.is_empty()).then_some(changes)
}

/// Changes that might help, the one that opens least first.
fn candidates(document: &Value, attempt: &Attempt, said: &Said) -> Vec<Value> {
    match attempt {
        Attempt::Name(name) => listed(document, name.as_str()).into_iter().collect(),
        Attempt::Request { to, method, path } => {
            let entry = json!({ "methods": [method], "paths": [path.as_str()] });
            narrowed(document, to, said, &entry).into_iter().collect()
        }
        Attempt::Flow(target) => of_flow(document, target),
    }
}

fn of_flow(document: &Value, target: &Target) -> Vec<Value> {
    let port = target.to.port();
    let by_address = |protocol: &str| json!({ "protocol": protocol, "cidrs": [range(target.to.ip())] });
    let openings = match (target.protocol, &target.name, &target.bound) {
        (Protocol::Udp, _, _) => vec![by_address("udp")],
        (Protocol::Tcp, Some(name), _) => {
            let only_its_port = document["allowed_ports"] == json!([port]);
            if let Some(patch) = listed(document, name.as_str()).filter(|_| only_its_port) {
                return vec![
                    patch,
                    ruled(document, 0, opened(json!({ "domains": [name.as_str()] }), port)),
                ];
            }
            vec![json!({ "domains": [name.as_str()] })]
        }
        (Protocol::Tcp, None, Some(bound)) => {
            vec![
                json!({ "protocol": "tcp", "domains": [bound.as_str()] }),
                by_address("tcp"),
            ]
        }
        (Protocol::Tcp, None, None) => vec![by_address("tcp")],
    };
    // First, so that no rule above it decides.
    let rules = openings
        .into_iter()
        .map(|opening| ruled(document, 0, opened(opening, port)));
    rules.collect()
}

/// The name in the list of names, where that is what opens names.
fn listed(document: &Value, name: &str) -> Option<Value> {
    let mut names = list(document, "allowed_domains");
    names.push(json!(name));
    (document["mode"] == "allowlist").then(|| json!({ "allowed_domains": names }))
}

/// The rule that decided once more for this name and port alone, with another entry in its list of requests. Its other
/// names and ports keep what they had.
fn narrowed(document: &Value, to: &Target, said: &Said, entry: &Value) -> Option<Value> {
    let decided = said.rule.as_deref()?;
    let name = to.name.as_ref()?;
    let (at, rule) = list(document, "rules")
        .into_iter()
        .enumerate()
        .find(|(index, rule)| rule["name"] == decided || decided == format!("rules[{index}]"))?;
    let mut rule = opened(rule, to.to.port());
    rule["domains"] = json!([name.as_str()]);
    rule["cidrs"] = json!([]);
    rule.as_object_mut()?.remove("name");
    rule.get_mut("http")?.as_array_mut()?.push(entry.clone());
    Some(ruled(document, at, rule))
}

fn ruled(document: &Value, at: usize, rule: Value) -> Value {
    let mut rules = list(document, "rules");
    rules.insert(at.min(rules.len()), rule);
    json!({ "rules": rules })
}

fn opened(mut rule: Value, port: u16) -> Value {
    rule["action"] = json!("allow");
    rule["ports"] = json!([port.to_string()]);
    rule
}

fn list(document: &Value, field: &str) -> Vec<Value> {
    document[field].as_array().cloned().unwrap_or_default()
}

fn range(address: IpAddr) -> String {
    let bits = if address.is_ipv4() { 32 } else { 128 };
    format!("{address}/{bits}")
}
