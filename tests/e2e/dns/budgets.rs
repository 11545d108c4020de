//! How much a sandbox may say by asking for names that its policy allows.

use std::{collections::HashSet, net::IpAddr, time::Duration};

use harness::{
    dns::{Answer, Manner},
    probe::{self, Probe},
    sandbox::Sandbox,
    wait,
    world::{OK, RESOLVER, WILD},
};
use serde_json::{Value, json};

use super::{Named, REFUSED, ask, assert_addresses};

/// Questions for one name. A case asks fewer than 200 in all: the kernel refuses what is beyond that in a tenth of a
/// second, which a fast machine may need for all of them.
const REPEATED: usize = 80;

/// Asks for many names, one after the other, and gives how many were answered and how many refused.
#[track_caller]
fn ask_all(probe: &Probe<'_>, names: impl Iterator<Item = String>) -> (usize, usize) {
    let attempts: Vec<Value> = names.map(|name| probe::dns(RESOLVER, &name)).collect();
    let outcomes = probe.try_all(&attempts);
    let count = |code| outcomes.iter().filter(|outcome| outcome.rcode == code).count();
    let (answered, refused) = (count(Some(0)), count(REFUSED));
    assert_eq!(answered + refused, outcomes.len(), "{outcomes:#?}");
    (answered, refused)
}

/// The budget's records of a sandbox, when they tell of this many refusals.
#[track_caller]
fn events(sandbox: &Sandbox) -> Vec<Value> {
    sandbox.audited(&json!({ "reason": "dns_budget", "protocol": "dns", "decision": "deny" }));
    let mut events = sandbox.audit("");
    events.retain(|event| event["reason"] == "dns_budget");
    events
}

pub(crate) fn names_under_a_wildcard_carry_little_out(named: &Named) {
    let sandbox = named.fenced();
    let probe = named.probe(&sandbox);
    // What an attacker would do: the data in labels, a fresh name each.
    let (answered, refused) = ask_all(&probe, (0..150).map(|index| format!("{index:032x}.wild.test")));
    assert_eq!((answered, refused), (60, 90), "the default is 60 names a minute");
    let asked = named.world.dns.queries_for("wild.test");
    let asked: HashSet<String> = asked
        .into_iter()
        .map(|query| query.name)
        .filter(|name| name.len() == "wild.test".len() + 33)
        .collect();
    assert_eq!(asked.len(), 60, "what is refused is not asked upstream");
    // Depth is no way around it, nor is another type, and names that were asked go on working.
    assert_eq!(ask(&probe, "a.b.c.d.wild.test").rcode, REFUSED);
    assert_addresses(&ask(&probe, &format!("{:032x}.wild.test", 0)), &[WILD.into()]);
    // Another zone has a budget of its own, and so has another sandbox.
    assert_eq!(ask(&probe, "ok.test").rcode, Some(0));
    let other = named.fenced();
    assert_addresses(&ask(&named.probe(&other), "mine.wild.test"), &[WILD.into()]);
    let [event] = events(&sandbox)
        .try_into()
        .unwrap_or_else(|all| panic!("one event, not {all:#?}"));
    let detail = event["detail"].as_str().unwrap_or_default();
    assert!(
        detail.contains("unique_names_per_minute is 60") && detail.contains("wild.test"),
        "{event}"
    );
    other.stop();
    sandbox.stop();
}

pub(crate) fn long_labels_and_names_are_refused(named: &Named) {
    let sandbox = named.fenced();
    let probe = named.probe(&sandbox);
    let (forty, long) = (
        "a".repeat(40),
        format!("{}.wild.test", ["abcdefghi"; 12].join(".")),
    );
    assert_addresses(&ask(&probe, &format!("{forty}.wild.test")), &[WILD.into()]);
    let refused = [
        format!("{forty}a.wild.test"),
        format!("b.{forty}a.wild.test"),
        long,
    ];
    for name in &refused {
        assert_eq!(ask(&probe, name).rcode, REFUSED, "{name}");
        assert_eq!(named.asked(name), 0, "{name} was asked upstream");
    }
    events(&sandbox);
    sandbox.set_network(&super::policy(&json!({ "label_max": 63, "name_max": 253 })));
    for name in &refused {
        assert_addresses(&ask(&probe, name), &[WILD.into()]);
    }
    sandbox.stop();
}

pub(crate) fn bytes_that_go_upstream_are_counted_and_the_caches_are_not(named: &Named) {
    let limits = json!({ "query_bytes_per_minute": 200, "unique_names_per_minute": 100 });
    let sandbox = named.allowed(&limits);
    let probe = named.probe(&sandbox);
    let (kept, fresh) = ("kept20bytes.wild.test", "fresh0bytes.wild.test");
    for (name, ttl) in [(kept, 60), (fresh, 0)] {
        let manner = Manner {
            ttl,
            ..Manner::default()
        };
        named.world.dns.behave(name, manner);
    }
    let repeated = |name: &str| ask_all(&probe, std::iter::repeat_n(name.to_owned(), REPEATED));
    assert_eq!(
        repeated(kept),
        (REPEATED, 0),
        "a name that is known says nothing to anybody"
    );
    assert_eq!(named.asked(kept), 1);
    let (answered, refused) = repeated(fresh);
    let expected = (200 - kept.len()) / fresh.len();
    assert_eq!((answered, refused), (expected, REPEATED - expected));
    assert_eq!(named.asked(fresh), expected);
    assert_addresses(&ask(&probe, kept), &[WILD.into()]);
    events(&sandbox);
    sandbox.stop();
}

pub(crate) fn the_strictest_tier_sets_the_budget(named: &Named) {
    let organization = named.node.register("frugal");
    organization.set_egress(&json!({
        "mode": "allowlist", "allowed_domains": ["*.wild.test"], "dns": { "unique_names_per_minute": 3, "types": ["A", "TXT"] },
    }));
    let wide = json!({ "unique_names_per_minute": 1000, "types": ["A", "AAAA", "MX", "TXT"] });
    let sandbox = organization.sandbox(&json!({ "network": super::policy(&wide) }));
    let probe = named.probe(&sandbox);
    let (answered, refused) = ask_all(&probe, (0..10).map(|index| format!("n{index}.wild.test")));
    assert_eq!((answered, refused), (3, 7));
    assert_eq!(super::ask_type(&probe, "n0.wild.test", 15).rcode, REFUSED);
    assert_eq!(super::ask_type(&probe, "n0.wild.test", 16).rcode, Some(0));
    sandbox.stop();
}

/// `policy` in audit mode.
fn in_audit_mode(mut policy: Value) -> Value {
    policy["enforcement"] = json!("audit");
    policy
}

pub(crate) fn limits_of_a_tier_in_audit_mode_are_recorded_and_refuse_nothing(named: &Named) {
    const TXT: u16 = 16;
    let limits = json!({ "unique_names_per_minute": 3, "types": ["A"] });
    let names = |of: &'static str| (0..8).map(move |index| format!("{of}{index}.wild.test"));
    let record = |sandbox: &Sandbox, fields: Value| {
        let event = sandbox.audited(&fields);
        assert_eq!(
            (&event["protocol"], &event["decision"]),
            (&json!("dns"), &json!("deny")),
            "{event}"
        );
        event
    };
    let recorded = |sandbox: &Sandbox, reason: &str, tier: &str, enforced: bool| {
        record(
            sandbox,
            json!({ "reason": reason, "tier": tier, "rule": "dns", "enforced": enforced }),
        )
    };
    // The same document, alone and beneath a tier that enforces other limits: nothing is refused, all is recorded.
    let above = named.node.register("patient");
    above.set_egress(&super::policy(
        &json!({ "unique_names_per_minute": 50, "types": ["A", "TXT"] }),
    ));
    for (organization, of) in [(&named.organization, "alone"), (&above, "beneath")] {
        let network = in_audit_mode(super::policy(&limits));
        let sandbox = organization.sandbox(&json!({ "network": network }));
        let probe = named.probe(&sandbox);
        assert_eq!(ask_all(&probe, names(of)), (8, 0));
        for name in names(of) {
            assert_eq!(named.asked(&name), 1, "{name}");
        }
        let event = recorded(&sandbox, "dns_budget", "sandbox", false);
        let detail = event["detail"].as_str().unwrap_or_default();
        assert!(
            detail.contains("unique_names_per_minute is 3") && detail.contains("wild.test"),
            "{event}"
        );
        let first = format!("{of}0.wild.test");
        assert_eq!(super::ask_type(&probe, &first, TXT).rcode, Some(0));
        let event = recorded(&sandbox, "dns_type", "sandbox", false);
        assert_eq!(
            (&event["host"], &event["detail"]),
            (&json!(first), &json!("type TXT"))
        );
        let mut events = sandbox.audit("");
        events.retain(|event| event["decision"] == "deny");
        assert!(
            events.iter().all(|event| event["enforced"] == false),
            "{events:#?}"
        );
        sandbox.stop();
    }
    // Where a tier enforces the limit that another only records, it counts.
    let strict = named.node.register("strict");
    strict.set_egress(&super::policy(&limits));
    let sandbox = strict.sandbox(&json!({ "network": in_audit_mode(super::policy(&limits)) }));
    let probe = named.probe(&sandbox);
    assert_eq!(ask_all(&probe, names("strict")), (3, 5));
    recorded(&sandbox, "dns_budget", "organization", true);
    assert_eq!(super::ask_type(&probe, "strict0.wild.test", TXT).rcode, REFUSED);
    record(
        &sandbox,
        json!({ "reason": "dns_type", "host": "strict0.wild.test", "enforced": true }),
    );
    sandbox.stop();
}

pub(crate) fn large_answers_asked_in_turn_are_refused_to_who_asks_alone(named: &Named) {
    const PATIENCE: Duration = Duration::from_secs(60);
    let limits = json!({ "unique_names_per_minute": 10_000, "query_bytes_per_minute": 10_000_000 });
    let (sandbox, other) = (named.allowed(&limits), named.fenced());
    let (probe, others) = (named.probe(&sandbox), named.probe(&other));
    // More addresses than are remembered, so that each answer has its own pinned anew.
    let questions: Vec<Value> = (0..10_u8)
        .map(|index| {
            let name = format!("crowd{index}.wild.test");
            let address = |last: u16| {
                let [high, low] = last.to_be_bytes();
                IpAddr::from([198, 51, 130 + 2 * index + high, low])
            };
            named
                .world
                .dns
                .set(&name, Answer::Addresses((0..500).map(address).collect()));
            probe::dns(RESOLVER, &name)
        })
        .collect();
    wait::until("it is refused", PATIENCE, || {
        let outcomes = probe.try_all(&questions);
        outcomes
            .iter()
            .any(|outcome| outcome.rcode == REFUSED)
            .then_some(())
    });
    assert_addresses(&ask(&others, "ok.test"), &[OK.into()]);
    sandbox.audited(&json!({ "reason": "quota", "protocol": "dns", "decision": "deny",
        "detail": "too many addresses in a short time" }));
    // It is made up for, and what was answered before is as good as it was.
    wait::until("it is answered again", PATIENCE, || {
        let outcome = ask(&probe, "ok.test");
        (outcome.rcode != REFUSED).then(|| assert_addresses(&outcome, &[OK.into()]))
    });
    let denied = other.audit("");
    assert!(
        denied.iter().all(|event| event["reason"] != "quota"),
        "{denied:#?}"
    );
    sandbox.stop();
    other.stop();
}
