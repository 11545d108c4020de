use serde_json::{Value, json};

use super::*;
use crate::{
    Platform, Policy, PolicyError,
    decide::tests::{allowed, compile, denied},
};

fn compiled(tiers: &[Value]) -> Result<SandboxPolicy, PolicyError> {
    let tiers: Vec<(String, Policy)> = tiers
        .iter()
        .enumerate()
        .map(|(index, document)| (format!("tier {index}"), Policy::parse(document).unwrap()))
        .collect();
    SandboxPolicy::compile(&Platform::default(), &tiers)
}

#[test]
fn what_is_no_rule_counts_in_the_strictest_of_the_tiers_that_enforce() {
    let names = |number: u32, enforcement: &str, ech: &str| json!({"mode": "allow_all", "enforcement": enforcement, "ech": ech, "dns": {"unique_names_per_minute": number}});
    let policy = compile(&[
        names(90, "enforce", "allow"),
        names(70, "enforce", "allow"),
        names(5, "audit", "deny"),
    ]);
    assert_eq!(policy.dns().unique_names_per_minute, 70);
    let audited = policy.dns_audited().map(|budget| budget.unique_names_per_minute);
    assert_eq!(audited, Some(5));
    assert_eq!(compile(&[names(5, "enforce", "allow")]).dns_audited(), None);
    let breach = |count: u32| {
        move |budget: &DnsBudget| (budget.unique_names_per_minute < count).then_some(Reason::DnsBudget)
    };
    allowed(&policy.decide_dns(breach(5)));
    let audited = policy.decide_dns(breach(6));
    assert!(audited.is_audited() && audited.tier == Some(2), "{audited:?}");
    let verdict = policy.decide_dns(breach(71));
    denied(&verdict, Reason::DnsBudget);
    assert_eq!((verdict.tier, verdict.rule.as_deref()), (Some(1), Some("dns")));
    assert!(policy.decide_ech().is_audited());
    denied(&compile(&[]).decide_ech(), Reason::Ech);
    let only_audit = compile(&[names(5, "audit", "allow")]);
    assert_eq!(only_audit.dns(), DnsBudget::UNLIMITED);
    assert_eq!(only_audit.failure_mode(), FailureMode::FailOpen);
    allowed(&only_audit.decide_ech());
}

#[test]
fn a_quota_is_that_of_the_strictest_tier_that_enforces_and_names_it() {
    let tier = |limit: u64, enforcement: &str| json!({"mode": "allow_all", "enforcement": enforcement, "quotas": {"upload_bytes_per_host": limit}});
    let quota = Quota::UploadBytesPerHost;
    let policy = compile(&[tier(900, "enforce"), tier(700, "enforce"), tier(50, "audit")]);
    assert_eq!(policy.quotas().limit(quota), Some(700));
    assert_eq!(policy.quotas_counted().limit(quota), Some(50));
    allowed(&policy.decide_quota(quota, 50));
    let audited = policy.decide_quota(quota, 51);
    assert!(audited.is_audited() && audited.tier == Some(2), "{audited:?}");
    assert!(policy.decide_quota(quota, 700).is_audited());
    let verdict = policy.decide_quota(quota, 701);
    denied(&verdict, Reason::Quota);
    assert_eq!(
        (verdict.tier, verdict.rule.as_deref()),
        (Some(1), Some("quotas.upload_bytes_per_host"))
    );
    // A lower tier cannot raise what a higher one says.
    denied(
        &compile(&[tier(10, "enforce"), tier(99, "enforce")]).decide_quota(quota, 11),
        Reason::Quota,
    );
    for other in [Quota::NewHostsPerHour, Quota::SecretUsesPerHour] {
        allowed(&policy.decide_quota(other, u64::MAX));
        assert_eq!(policy.quotas_counted().limit(other), None);
    }
    assert_eq!(compile(&[]).quotas_counted(), Quotas::default());
}

#[test]
fn a_tier_with_a_quota_and_one_that_allows_datagrams_are_refused_together() {
    let quotas = json!({"mode": "allow_all", "quotas": {"new_hosts_per_hour": 5}});
    let udp = json!({"mode": "allow_all", "rules": [
        {"action": "allow", "protocol": "udp", "cidrs": ["203.0.113.0/24"], "ports": ["123"]}]});
    let error = compiled(&[quotas.clone(), udp.clone()]).unwrap_err();
    assert_eq!(error.field, "rules[0].protocol");
    assert!(
        error.message.contains("`quotas.new_hosts_per_hour`")
            && error.message.contains("together with tier 0"),
        "{error}"
    );
    let error = compiled(&[udp.clone(), quotas]).unwrap_err();
    assert_eq!(error.field, "quotas.new_hosts_per_hour");
    let uses = json!({"mode": "allow_all", "quotas": {"secret_uses_per_hour": 5}});
    assert!(compiled(&[udp, uses]).is_ok());
}
