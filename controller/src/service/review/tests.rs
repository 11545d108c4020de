use std::net::IpAddr;

use jiff::Timestamp;
use serde_json::{Value, json};

use super::*;

fn event(fields: &Value) -> AuditEvent {
    let mut event = json!({
        "id": "0193", "time": Timestamp::UNIX_EPOCH, "org_id": "org-0123456789abcdef",
        "sandbox_id": "sandbox-0123456789abcdef", "verdict": "deny", "reason": "name_denied", "protocol": "tls",
        "ip": "203.0.113.10", "port": 443,
    });
    for (field, value) in fields.as_object().unwrap() {
        event[field] = value.clone();
    }
    serde_json::from_value(event).unwrap()
}

fn policy(document: &Value) -> Policy {
    Policy::parse(document).unwrap()
}

fn attempt(fields: &Value) -> Attempt {
    Attempt::of(&event(fields)).unwrap()
}

fn platform() -> Platform {
    Platform::default()
}

/// The changes that allow it, after which it is allowed.
#[track_caller]
fn amended(organization: Option<&Value>, sandbox: Option<&Value>, fields: &Value) -> Vec<(TierName, Value)> {
    let tiers = Tiers::new(organization.map(policy), sandbox.map(policy));
    let changes = amend::changes(&platform(), &tiers, &attempt(fields)).expect("it can be allowed");
    changes
        .into_iter()
        .map(|change| (change.tier, change.patch))
        .collect()
}

#[test]
fn a_name_is_added_to_the_list_that_lacks_it() {
    let own = json!({ "mode": "allowlist", "allowed_domains": ["ok.example"] });
    for fields in [
        json!({ "host": "new.example" }),
        json!({ "host": "new.example", "protocol": "dns", "reason": "dns_refused", "ip": null, "port": null }),
    ] {
        let [(tier, patch)] = amended(None, Some(&own), &fields).try_into().unwrap();
        assert_eq!(tier, TierName::Sandbox);
        assert_eq!(patch, json!({ "allowed_domains": ["ok.example", "new.example"] }));
    }
}

#[test]
fn each_tier_that_denies_is_changed_and_no_other() {
    let organization = json!({ "mode": "allowlist", "allowed_domains": ["ok.example", "new.example"] });
    let own = json!({ "mode": "allowlist", "allowed_domains": ["ok.example"] });
    let fields = json!({ "host": "new.example" });
    let tiers: Vec<TierName> = amended(Some(&organization), Some(&own), &fields)
        .into_iter()
        .map(|(tier, _)| tier)
        .collect();
    assert_eq!(tiers, [TierName::Sandbox]);
    let fields = json!({ "host": "new.test" });
    let tiers: Vec<TierName> = amended(Some(&organization), Some(&own), &fields)
        .into_iter()
        .map(|(tier, _)| tier)
        .collect();
    assert_eq!(tiers, [TierName::Sandbox, TierName::Organization]);
}

#[test]
fn a_change_opens_no_more_than_what_was_tried() {
    let own = json!({ "mode": "allowlist", "allowed_domains": ["ok.example"], "denied_domains": ["*.bad.example"] });
    for fields in [
        json!({ "host": "ok.example", "port": 8443, "reason": "port_denied" }),
        json!({ "host": "a.bad.example", "reason": "denied_by_rule" }),
        json!({ "protocol": "tcp", "port": 22, "reason": "default_deny" }),
        json!({ "protocol": "udp", "port": 9000, "reason": "protocol_denied" }),
    ] {
        let tiers = Tiers::new(None, Some(policy(&own)));
        let changes = amend::changes(&platform(), &tiers, &attempt(&fields)).expect("it can be allowed");
        let [change] = changes.try_into().unwrap();
        let after = policy(&super::super::policies::merged(
            &policy(&own).to_value(),
            &change.patch,
        ));
        let judge = Tiers::new(None, Some(after)).judge(&platform()).unwrap();
        assert!(judge.say(&attempt(&fields)).is_allowed(), "{fields}");
        for other in [
            json!({ "host": "b.bad.example" }),
            json!({ "host": "other.example", "port": 8443 }),
            json!({ "protocol": "tcp", "port": 23 }),
            json!({ "protocol": "tcp", "ip": "203.0.113.11", "port": 22 }),
            json!({ "protocol": "udp", "port": 9001 }),
        ] {
            assert!(!judge.say(&attempt(&other)).passes, "{fields} opens {other}");
        }
    }
}

const READ: &str = r#"{ "mode": "allowlist", "rules": [
    { "name": "read", "action": "allow", "domains": ["api.example", "other.example"], "ports": ["443", "8443"],
      "http": [{ "methods": ["GET"], "paths": ["/v1/**"] }] }
] }"#;

fn request(method: &str, path: &str) -> Value {
    json!({ "protocol": "https", "host": "api.example", "method": method, "path": path, "reason": "method_denied" })
}

#[test]
fn a_request_is_allowed_for_its_host_and_port_alone() {
    let own: Value = serde_json::from_str(READ).unwrap();
    let tried = request("POST", "/v1/items");
    let [(_, patch)] = amended(None, Some(&own), &tried).try_into().unwrap();
    let after = policy(&super::super::policies::merged(&policy(&own).to_value(), &patch));
    let judge = Tiers::new(None, Some(after)).judge(&platform()).unwrap();
    for fields in [tried.clone(), request("GET", "/v1/a")] {
        assert!(judge.say(&attempt(&fields)).is_allowed(), "{fields}");
    }
    let mut elsewhere = tried.clone();
    elsewhere["host"] = json!("other.example");
    let mut other_port = tried;
    other_port["port"] = json!(8443);
    for fields in [
        elsewhere,
        other_port,
        request("POST", "/v1/other"),
        request("DELETE", "/v1/items"),
    ] {
        assert!(!judge.say(&attempt(&fields)).passes, "{fields}");
    }
}

#[test]
fn a_path_is_never_taken_for_a_pattern() {
    let own: Value = serde_json::from_str(READ).unwrap();
    let tiers = Tiers::new(None, Some(policy(&own)));
    for path in ["/**", "/v*", "/v1/*/x"] {
        let tried = attempt(&request("DELETE", path));
        assert_eq!(amend::changes(&platform(), &tiers, &tried), None, "{path}");
    }
}

#[test]
fn what_was_forwarded_unread_is_known_by_what_dns_answered() {
    let own = json!({ "mode": "deny_all" });
    let ssh = json!({ "protocol": "tcp", "host": "git.example", "port": 22, "reason": "default_deny" });
    let [(_, patch)] = amended(None, Some(&own), &ssh).try_into().unwrap();
    assert_eq!(
        (&patch["rules"][0]["protocol"], &patch["rules"][0]["domains"]),
        (&json!("tcp"), &json!(["git.example"]))
    );
    let voice = json!({ "protocol": "udp", "host": "voice.example", "port": 443, "reason": "allowed", "verdict": "allow" });
    let mut used = suggest::Used::default();
    used.add(&attempt(&voice));
    used.add(&attempt(&ssh));
    let suggested = used.policy(&Policy::default()).unwrap();
    let judge = Tiers::new(None, Some(suggested)).judge(&platform()).unwrap();
    assert!(judge.say(&attempt(&voice)).is_allowed() && judge.say(&attempt(&ssh)).is_allowed());
    for fields in [
        json!({ "host": "voice.example" }),
        json!({ "host": "git.example" }),
    ] {
        assert!(!judge.say(&attempt(&fields)).passes, "{fields}");
    }
}

#[test]
fn what_no_policy_decides_is_left_alone() {
    for fields in [
        json!({ "reason": "malformed" }),
        json!({ "protocol": "icmp", "reason": "protocol_denied" }),
        json!({ "host": "not a name" }),
        json!({ "host": "ok.example", "reason": "upstream_unreachable" }),
    ] {
        assert_eq!(Attempt::of(&event(&fields)), None, "{fields}");
    }
    let own = json!({ "mode": "allowlist", "allowed_domains": ["ok.example"] });
    let tiers = Tiers::new(None, Some(policy(&own)));
    for fields in [
        json!({ "protocol": "tcp", "ip": "10.0.0.5", "reason": "platform_denied" }),
        json!({ "protocol": "tcp", "ip": "169.254.169.254", "port": 80, "reason": "platform_denied" }),
    ] {
        assert_eq!(
            amend::changes(&platform(), &tiers, &attempt(&fields)),
            None,
            "{fields}"
        );
    }
}

#[test]
fn a_tier_in_audit_mode_is_changed_as_if_it_denied() {
    let own = json!({ "mode": "allowlist", "allowed_domains": ["ok.example"], "enforcement": "audit" });
    let [(tier, _)] = amended(
        None,
        Some(&own),
        &json!({ "host": "new.example", "verdict": "audit" }),
    )
    .try_into()
    .unwrap();
    assert_eq!(tier, TierName::Sandbox);
}

#[test]
fn a_suggestion_allows_what_was_done_and_nothing_else() {
    let done = [
        json!({ "verdict": "audit", "host": "a.example" }),
        json!({ "verdict": "allow", "reason": "allowed", "host": "b.example", "port": 8443 }),
        json!({ "verdict": "audit", "protocol": "tcp", "port": 22, "reason": "default_deny" }),
        json!({ "verdict": "allow", "reason": "allowed", "protocol": "udp", "ip": "203.0.113.20", "port": 9000 }),
        json!({ "verdict": "allow", "reason": "allowed", "protocol": "https", "host": "c.example", "method": "GET", "path": "/v1/a" }),
        json!({ "verdict": "allow", "reason": "allowed", "protocol": "https", "host": "c.example", "method": "POST", "path": "/v1/b" }),
    ];
    let mut used = suggest::Used::default();
    done.iter().for_each(|fields| used.add(&attempt(fields)));
    let suggested = used.policy(&Policy::default()).unwrap();
    let judge = Tiers::new(None, Some(suggested.clone()))
        .judge(&platform())
        .unwrap();
    for fields in &done {
        assert!(
            judge.say(&attempt(fields)).is_allowed(),
            "{fields}: {}",
            suggested.to_value()
        );
    }
    for fields in [
        json!({ "host": "x.example" }),
        json!({ "host": "a.example", "port": 8443 }),
        json!({ "host": "b.example" }),
        json!({ "protocol": "tcp", "port": 23 }),
        json!({ "protocol": "tcp", "ip": "203.0.113.11", "port": 22 }),
        json!({ "protocol": "udp", "ip": "203.0.113.20", "port": 9001 }),
        json!({ "protocol": "https", "host": "c.example", "method": "POST", "path": "/v1/a" }),
    ] {
        assert!(
            !judge.say(&attempt(&fields)).passes,
            "{fields}: {}",
            suggested.to_value()
        );
    }
}

#[test]
fn many_paths_are_not_listed_one_by_one() {
    let mut used = suggest::Used::default();
    for index in 0..100 {
        used.add(&attempt(&json!({
            "protocol": "https", "host": "c.example", "method": "GET", "path": format!("/item/{index}"), "reason": "allowed",
        })));
    }
    let suggested = used.policy(&Policy::default()).unwrap().to_value();
    let entry = &suggested["rules"][0]["http"][0];
    assert_eq!(entry["methods"], json!(["GET"]));
    assert!(entry["paths"].as_array().is_none_or(Vec::is_empty), "{entry}");
}

#[test]
fn sentences_say_what_how_and_why() {
    let refused = event(&json!({ "host": "evil.example", "tier": "sandbox", "rule": "mode", "repeated": 3 }));
    assert_eq!(
        words::sentence(&refused),
        "A connection (tls) to `evil.example` (203.0.113.10) on port 443 (3 times) was refused: the policy allows no such name \
         (`mode` of the policy of the sandbox)."
    );
    let address: IpAddr = [203, 0, 113, 10].into();
    assert!(words::sentence(&event(&json!({ "protocol": "udp" }))).contains(&address.to_string()));
}

#[test]
fn a_quota_is_explained_by_the_tier_that_has_it() {
    let fields = json!({
        "reason": "quota", "tier": "organization", "rule": "quotas.upload_bytes_per_host",
        "detail": "quotas.upload_bytes_per_host is 1000",
    });
    let record = event(&fields);
    assert_eq!(Attempt::of(&record), None, "what was used is not known here");
    let say = |organization: Value| {
        let own = json!({ "mode": "allow_all", "quotas": { "upload_bytes_per_host": 5 } });
        let tiers = Tiers::new(Some(policy(&organization)), Some(policy(&own)));
        advice(&record, &tiers, None, &[], true)
    };
    let present = json!({ "mode": "allow_all", "quotas": { "upload_bytes_per_host": 2000 } });
    assert_eq!(
        say(present),
        "The policy of the organization says 2000 in `quotas.upload_bytes_per_host` now; a higher one, or none, lets \
         more through."
    );
    assert!(say(json!({ "mode": "allow_all" })).contains("has no such quota any more"));
    assert!(words::sentence(&record).contains("a limit of the sandbox was reached"));
    let other = event(&json!({ "reason": "quota", "detail": "too many connections at once" }));
    let tiers = Tiers::new(None, None);
    assert_eq!(advice(&other, &tiers, None, &[], true), "No policy decides this.");
}
