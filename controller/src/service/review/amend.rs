//! The smallest change of a policy that allows an attempt.

use std::net::IpAddr;

use sandgate_api::feed::TierName;
use sandgate_policy::{Platform, Policy, Protocol};
use serde_json::{Value, json};

use super::{
    super::policies::merged,
    attempt::{Attempt, Said, Tiers},
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
    let allows = amended.judge(platform).ok()?.say(attempt).is_allowed();
    (allows && !changes.is_empty()).then_some(changes)
}

/// Changes that might help, the one that opens least first.
fn candidates(document: &Value, attempt: &Attempt, said: &Said) -> Vec<Value> {
    let name = attempt.name().map(|name| name.as_str().to_owned());
    let target = attempt.target();
    let texts = [name.clone(), target.map(|target| target.to.ip().to_string())];
    let own = target.map(|target| range(target.to.ip()));
    let taken = |field: &str, words: &[Option<String>]| {
        let entries = list(document, field);
        let kept: Vec<Value> = entries
            .iter()
            .filter(|entry| !words.iter().flatten().any(|word| entry.as_str() == Some(word)))
            .cloned()
            .collect();
        (kept.len() < entries.len()).then(|| json!({ field: kept }))
    };
    let added = |field: &str, entry: Value| {
        let mut entries = list(document, field);
        entries.push(entry);
        json!({ field: entries })
    };
    let ruled = |rule: Value| {
        // First, so that no rule above it decides.
        let mut rules = list(document, "rules");
        rules.insert(0, rule);
        json!({ "rules": rules })
    };
    let mut found: Vec<Value> = Vec::new();
    found.extend(requests(document, attempt, said));
    found.extend(taken("denied_domains", &texts[..1]));
    found.extend(taken("denied_cidrs", &[texts[1].clone(), own.clone()]));
    let ports = target.map(|target| vec![target.to.port()]);
    match (&name, target) {
        (Some(name), _) => {
            if document["mode"] == "allowlist" {
                found.push(added("allowed_domains", json!(name)));
            }
            found.push(ruled(rule(
                json!({ "action": "allow", "domains": [name] }),
                &ports,
            )));
        }
        (None, Some(target)) => {
            let protocol = match target.protocol {
                Protocol::Tcp => "tcp",
                Protocol::Udp => "udp",
            };
            let by_address = json!({ "action": "allow", "cidrs": [own], "protocol": protocol });
            found.push(ruled(rule(by_address, &ports)));
        }
        (None, None) => {}
    }
    found
}

/// Another entry for the list of requests of the rule that decided.
fn requests(document: &Value, attempt: &Attempt, said: &Said) -> Option<Value> {
    let Attempt::Request { method, path, .. } = attempt else {
        return None;
    };
    let decided = said.rule.as_deref()?;
    let mut rules = list(document, "rules");
    let at = rules
        .iter()
        .enumerate()
        .position(|(index, rule)| rule["name"] == decided || decided == format!("rules[{index}]"))?;
    let entries = rules.get_mut(at)?.get_mut("http")?.as_array_mut()?;
    entries.push(json!({ "methods": [method], "paths": [path.as_str()] }));
    Some(json!({ "rules": rules }))
}

fn rule(mut rule: Value, ports: &Option<Vec<u16>>) -> Value {
    if let Some(ports) = ports {
        let ports: Vec<String> = ports.iter().map(u16::to_string).collect();
        rule["ports"] = json!(ports);
    }
    rule
}

fn list(document: &Value, field: &str) -> Vec<Value> {
    document[field].as_array().cloned().unwrap_or_default()
}

fn range(address: IpAddr) -> String {
    let bits = if address.is_ipv4() { 32 } else { 128 };
    format!("{address}/{bits}")
}
