use sandgate_api::{
    feed::{PolicyTier, TierName},
    id::OrgId,
};
use sandgate_policy::{Platform, Policy};
use serde_json::{Value, json};

use super::*;
use crate::intercept::bindings::Bindings;

fn rules(tiers: &[(TierName, Value)]) -> Rules {
    let tiers: Vec<PolicyTier> = tiers
        .iter()
        .map(|(tier, document)| PolicyTier {
            tier: *tier,
            policy: Policy::parse(document).expect("a policy").into(),
        })
        .collect();
    Rules::with(
        &Platform::new(Vec::new()),
        &tiers,
        Bindings::default(),
        0,
        OrgId::nobody(),
    )
    .expect("compiled")
}

fn document(quotas: &Value, enforcement: &str) -> Value {
    json!({ "mode": "allow_all", "quotas": quotas, "enforcement": enforcement })
}

fn own(quotas: &Value) -> Rules {
    rules(&[(TierName::Sandbox, document(quotas, "enforce"))])
}

fn host(name: &str) -> Host {
    Host::Name(DomainName::parse(name).expect("a name"))
}

#[test]
fn bytes_to_a_host_are_counted_over_all_its_flows_and_after_them() {
    let rules = own(&json!({ "upload_bytes_per_host": 100 }));
    let (mut spending, now) = (Spending::new(&rules), Instant::now());
    let (first, noted) = spending.meet(&rules, &host("a.test"), now).expect("room");
    assert_eq!(noted, None);
    let (second, _) = spending.meet(&rules, &host("a.test"), now).expect("room");
    assert!(first.take(60) && !second.take(41) && second.take(40));
    spending.part(&host("a.test"));
    spending.part(&host("a.test"));
    let later = now + 100 * HOUR;
    let over = spending
        .meet(&rules, &host("a.test"), later)
        .expect_err("used up");
    assert_eq!(over.decision.reason, Reason::Quota);
    assert_eq!(over.decision.tier, Some(TierName::Sandbox));
    assert_eq!(
        over.decision.rule.as_deref(),
        Some("quotas.upload_bytes_per_host")
    );
    assert_eq!(over.detail, "quotas.upload_bytes_per_host is 100");
    assert_eq!(over.retry_after, None);
    spending
        .meet(&rules, &host("b.test"), now)
        .expect("another host has its own");
}

#[test]
fn a_new_limit_counts_for_what_is_under_way() {
    let open = own(&json!({}));
    let (mut spending, now) = (Spending::new(&open), Instant::now());
    let (upload, _) = spending.meet(&open, &host("a.test"), now).expect("no limit");
    assert!(upload.take(1000));
    let narrow = own(&json!({ "upload_bytes_per_host": 1500 }));
    spending.follow(&narrow);
    assert!(upload.take(500) && !upload.take(1), "counted from its beginning");
    spending.follow(&own(&json!({ "upload_bytes_per_host": 1501 })));
    assert!(upload.take(1) && !upload.take(1));
    spending.follow(&open);
    assert!(upload.take(1 << 30));
}

#[test]
fn nothing_is_remembered_that_nobody_counts() {
    let open = own(&json!({}));
    let (mut spending, now) = (Spending::new(&open), Instant::now());
    spending.meet(&open, &host("a.test"), now).expect("no limit");
    spending.meet(&open, &host("b.test"), now).expect("no limit");
    spending.part(&host("a.test"));
    assert_eq!(spending.hosts.len(), 1);
    let counted = own(&json!({ "new_hosts_per_hour": 1, "secret_uses_per_hour": 1 }));
    spending.follow(&counted);
    spending.part(&host("b.test"));
    spending
        .meet(&counted, &host("b.test"), now)
        .expect("known before the quota");
    spending
        .use_secrets(&counted, ["KEY"].into_iter(), now)
        .expect("room");
    spending.part(&host("b.test"));
    assert_eq!((spending.hosts.len(), spending.secrets.len()), (1, 1));
    spending.follow(&open);
    assert!(spending.hosts.is_empty() && spending.secrets.is_empty() && spending.met.is_none());
}

#[test]
fn new_hosts_are_counted_by_the_hour_and_known_ones_go_on() {
    let rules = own(&json!({ "new_hosts_per_hour": 2 }));
    let (mut spending, now) = (Spending::new(&rules), Instant::now());
    let address = Host::Address(IpAddr::from([203, 0, 113, 10]));
    spending.meet(&rules, &host("a.test"), now).expect("the first");
    spending.meet(&rules, &address, now).expect("the second");
    spending.meet(&rules, &host("a.test"), now).expect("known");
    let half = now + HOUR / 2;
    let over = spending
        .meet(&rules, &host("c.test"), half)
        .expect_err("the third");
    assert_eq!(over.decision.rule.as_deref(), Some("quotas.new_hosts_per_hour"));
    assert_eq!(over.retry_after, Some(HOUR / 2));
    spending.meet(&rules, &address, half).expect("known");
    spending
        .meet(&rules, &host("c.test"), now + HOUR)
        .expect("the next hour");
    spending
        .meet(&rules, &host("d.test"), now + HOUR)
        .expect("its second");
    spending
        .meet(&rules, &host("e.test"), now + HOUR)
        .expect_err("its third");
}

#[test]
fn each_secret_has_its_own_uses_and_all_of_a_request_or_none_are_counted() {
    let rules = own(&json!({ "secret_uses_per_hour": 2 }));
    let (mut spending, now) = (Spending::new(&rules), Instant::now());
    let mut using = |secrets: &[&'static str], now| {
        spending
            .use_secrets(&rules, secrets.iter().copied(), now)
            .map_err(|over| (over.decision.rule, over.retry_after, over.detail))
    };
    using(&["A"], now).expect("the first");
    using(&["A", "B"], now).expect("the second of A");
    let (rule, retry_after, detail) = using(&["B", "A"], now).expect_err("the third of A");
    assert_eq!(rule.as_deref(), Some("quotas.secret_uses_per_hour"));
    assert_eq!(retry_after, Some(HOUR));
    assert_eq!(detail, "quotas.secret_uses_per_hour is 2 and used up for A");
    using(&["B"], now).expect("the refused one did not count");
    using(&["B"], now).expect_err("the third of B");
    using(&[], now).expect("nothing is used");
    using(&["A"], now + HOUR).expect("the next hour");
}

#[test]
fn what_only_a_tier_in_audit_mode_limits_goes_on_and_is_told() {
    let organization = json!({ "upload_bytes_per_host": 1000, "new_hosts_per_hour": 2 });
    let sandbox = json!({ "upload_bytes_per_host": 10, "new_hosts_per_hour": 1, "secret_uses_per_hour": 1 });
    let rules = rules(&[
        (TierName::Organization, document(&organization, "enforce")),
        (TierName::Sandbox, document(&sandbox, "audit")),
    ]);
    let (mut spending, now) = (Spending::new(&rules), Instant::now());
    let (upload, noted) = spending.meet(&rules, &host("a.test"), now).expect("room");
    assert!(noted.is_none() && upload.take(500));
    let (_, noted) = spending.meet(&rules, &host("a.test"), now).expect("room");
    let noted = noted.expect("told");
    assert!(
        noted.is_audited() && noted.tier == Some(TierName::Sandbox),
        "{noted:?}"
    );
    let (_, noted) = spending.meet(&rules, &host("b.test"), now).expect("room");
    assert_eq!(
        noted.expect("told").rule.as_deref(),
        Some("quotas.new_hosts_per_hour")
    );
    let over = spending
        .meet(&rules, &host("c.test"), now)
        .expect_err("the organisation's");
    assert_eq!(over.decision.tier, Some(TierName::Organization));
    let uses = |spending: &mut Spending| spending.use_secrets(&rules, ["KEY"].into_iter(), now);
    assert_eq!(uses(&mut spending), Ok(None));
    assert!(uses(&mut spending).expect("not refused").is_some());
    assert!(upload.take(500) && !upload.take(1), "the organisation's limit");
    assert_eq!(over_upload(&rules).decision.tier, Some(TierName::Organization));
}

/// Meets as many hosts as are remembered.
fn meet_all(spending: &mut Spending, rules: &Rules, now: Instant) {
    for number in 0..HOSTS_MAX {
        let host = host(&format!("h{number}.test"));
        spending.meet(rules, &host, now).expect("room");
        spending.part(&host);
    }
}

#[test]
fn hosts_beyond_those_that_are_remembered_are_refused() {
    let rules = own(&json!({ "upload_bytes_per_host": 100 }));
    let (mut spending, now) = (Spending::new(&rules), Instant::now());
    meet_all(&mut spending, &rules, now);
    let over = spending
        .meet(&rules, &host("one-more.test"), now)
        .expect_err("too many");
    assert_eq!(over.decision.reason, Reason::Quota);
    spending.meet(&rules, &host("h0.test"), now).expect("known");
}

#[test]
fn hosts_beyond_those_that_are_remembered_go_on_where_no_tier_enforces_a_quota() {
    let quotas = json!({ "upload_bytes_per_host": 100 });
    let rules = rules(&[(TierName::Sandbox, document(&quotas, "audit"))]);
    let (mut spending, now) = (Spending::new(&rules), Instant::now());
    meet_all(&mut spending, &rules, now);
    let (upload, noted) = spending
        .meet(&rules, &host("one-more.test"), now)
        .expect("audit mode refuses nothing");
    assert!(noted.expect("told").is_audited() && upload.take(1000));
    spending.part(&host("one-more.test"));
    assert_eq!(spending.hosts.len(), HOSTS_MAX, "it is not remembered");
}
