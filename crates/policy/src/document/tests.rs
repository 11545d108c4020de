use serde_json::{Value, json};

use super::*;

/// The document is refused, at `field`, and the message says `says`.
#[track_caller]
fn refused(document: Value, field: &str, says: &str) {
    let error = Policy::parse(&document).expect_err("the document was accepted");
    assert_eq!(error.field, field, "{error}");
    assert!(error.message.contains(says), "{error}");
    // The feed and the database are as strict, and name the field as well.
    let on_the_feed = serde_json::from_value::<Policy>(document)
        .expect_err("the feed took it")
        .to_string();
    assert!(on_the_feed.contains(&error.to_string()), "{on_the_feed}");
}

fn with(field: &str, value: Value) -> Value {
    let mut document = json!({"mode": "allowlist"});
    document[field] = value;
    document
}

fn with_rule(field: &str, value: Value) -> Value {
    let mut rule = json!({"action": "allow", "domains": ["ok.test"]});
    rule[field] = value;
    json!({"mode": "allowlist", "rules": [{"action": "deny", "domains": ["evil.test"]}, rule]})
}

#[test]
fn a_document_of_published_clients_is_read() {
    let document = json!({
        "mode": "allowlist",
        "allowed_domains": ["API.github.com", "*.example.org."],
        "denied_domains": [],
        "allowed_ports": [443],
        "enforcement": "enforce",
        "failure_mode": "fail_closed",
    });
    let policy = Policy::parse(&document).unwrap();
    assert_eq!(policy.mode(), Mode::Allowlist);
    assert_eq!(
        policy.to_value()["allowed_domains"],
        json!(["api.github.com", "*.example.org"])
    );
    assert_eq!(policy.to_value()["allowed_cidrs"], json!([]));
}

#[test]
fn what_the_api_answers_can_be_written_back() {
    let mut answer = Policy::default().to_value();
    for (field, value) in [
        ("org_id", json!("org-1")),
        ("updated_at", json!(null)),
        ("revision", json!(7)),
        ("applied", json!(true)),
        ("effective", json!([{"tier": "organization"}])),
    ] {
        answer[field] = value;
    }
    assert_eq!(Policy::parse(&answer), Ok(Policy::default()));
}

#[test]
fn the_least_document_is_a_mode() {
    assert_eq!(
        Policy::parse(&json!({"mode": "allow_all"})),
        Ok(Policy::default())
    );
    refused(
        json!({}),
        "mode",
        "is required: one of allow_all, deny_all, allowlist, denylist",
    );
    refused(json!([]), "", "expected an object, got a list");
    refused(json!(null), "", "expected an object, got null");
    refused(json!("allow_all"), "", "expected an object, got \"allow_all\"");
}

#[test]
fn a_rule_survives_the_way_through_the_store() {
    let document = json!({
        "mode": "deny_all",
        "denied_cidrs": ["203.0.113.7", "2001:db8::/32"],
        "rules": [
            {"name": "git", "action": "allow", "protocol": "tcp", "domains": ["git.test"], "ports": ["22", 9418, "8000-8080"]},
            {"action": "deny", "cidrs": ["203.0.113.0/24"], "tls": "auto", "http": []},
        ],
        "ech": "deny",
        "dns": {"types": ["A", "AAAA"], "label_max": 40},
        "failure_mode": "fail_open",
    });
    let policy = Policy::parse(&document).unwrap();
    let stored = serde_json::to_string(&policy).unwrap();
    assert_eq!(serde_json::from_str::<Policy>(&stored).unwrap(), policy);
    let value = policy.to_value();
    assert_eq!(value["denied_cidrs"], json!(["203.0.113.7/32", "2001:db8::/32"]));
    assert_eq!(value["rules"][0]["ports"], json!(["22", "9418", "8000-8080"]));
    assert_eq!(
        value["rules"][1].get("ports"),
        None,
        "a deny rule without ports still concerns every port"
    );
}

#[test]
fn unknown_fields_are_refused_with_what_may_have_been_meant() {
    refused(
        with("allowed_domain", json!([])),
        "allowed_domain",
        "did you mean `allowed_domains`?",
    );
    refused(
        with("allowedDomains", json!([])),
        "allowedDomains",
        "did you mean `allowed_domains`?",
    );
    refused(with("sandbox_id", json!("x")), "sandbox_id", "unknown field");
    refused(with("", json!("x")), "", "unknown field");
    refused(
        with_rule("port", json!(["443"])),
        "rules[1].port",
        "did you mean `ports`?",
    );
    refused(
        with_rule("org_id", json!("x")),
        "rules[1].org_id",
        "unknown field",
    );
    refused(
        with("dns", json!({"typ": []})),
        "dns.typ",
        "did you mean `types`?",
    );
    let long = "x".repeat(100_000);
    let error = Policy::parse(&with(&long, json!(1))).unwrap_err();
    assert!(error.to_string().len() < 200);
}

#[test]
fn words_are_those_of_the_contract() {
    refused(
        with("mode", json!("Allowlist")),
        "mode",
        "expected one of \"allow_all\"",
    );
    refused(with("mode", json!(1)), "mode", "got 1");
    refused(with("mode", json!(null)), "mode", "got null");
    refused(
        with("failure_mode", json!("open")),
        "failure_mode",
        "\"fail_closed\", \"fail_open\", got \"open\"",
    );
    refused(
        with("enforcement", json!(true)),
        "enforcement",
        "\"enforce\", \"audit\", got true",
    );
    refused(
        with_rule("action", json!("block")),
        "rules[1].action",
        "\"allow\", \"deny\", got \"block\"",
    );
    refused(
        with_rule("protocol", json!("https")),
        "rules[1].protocol",
        "\"http\", \"tcp\", \"udp\", got \"https\"",
    );
    refused(
        json!({"mode": "allowlist", "rules": [{"domains": ["ok.test"]}]}),
        "rules[0].action",
        "is required",
    );
}

#[test]
fn ports_are_numbers_with_a_path() {
    let error = Policy::parse(&with("allowed_ports", json!(["x"]))).unwrap_err();
    assert_eq!(
        error.to_string(),
        "allowed_ports[0]: expected a port 1-65535, got \"x\""
    );
    for bad in [
        json!(0),
        json!(65536),
        json!(-1),
        json!(443.5),
        json!(443.0),
        json!("443"),
        json!(null),
        json!([443]),
    ] {
        refused(
            with("allowed_ports", json!([443, bad])),
            "allowed_ports[1]",
            "expected a port 1-65535",
        );
    }
    refused(
        with("allowed_ports", json!(443)),
        "allowed_ports",
        "expected a list, got 443",
    );
    for bad in [
        json!("0"),
        json!("x"),
        json!("9-8"),
        json!("1-65536"),
        json!(" 443"),
        json!(0),
        json!({}),
    ] {
        refused(
            with_rule("ports", json!(["443", bad])),
            "rules[1].ports[1]",
            "expected a port 1-65535",
        );
    }
    refused(with_rule("ports", json!([])), "rules[1].ports", "matches nothing");
}

#[test]
fn domains_are_refused_with_what_is_wrong() {
    let cases = [
        (
            json!("203.0.113.5"),
            "is an address, not a name; addresses belong into the list of CIDRs",
        ),
        (json!("https://ok.test/x"), "without scheme and path"),
        (json!("ok.test:443"), "ports have their own list"),
        (json!("*.com"), "wildcard over a public suffix"),
        (json!("*.co.uk"), "wildcard over a public suffix"),
        (json!("a.*.test"), "wildcard in a place where none can be"),
        (json!("ok.test\u{0}evil.test"), "character that is not allowed"),
        (json!("ok.test.."), "empty label"),
        (json!(""), "is empty"),
        (json!(7), "expected a domain such as"),
        (json!(null), "expected a domain such as"),
    ];
    for (bad, says) in cases {
        let list = json!(["ok.test", "*.wild.test", bad]);
        refused(with("allowed_domains", list.clone()), "allowed_domains[2]", says);
        refused(with("denied_domains", list.clone()), "denied_domains[2]", says);
        refused(with_rule("domains", list), "rules[1].domains[2]", says);
    }
    refused(
        with("allowed_domains", json!("ok.test")),
        "allowed_domains",
        "expected a list, got \"ok.test\"",
    );
    refused(
        with("allowed_domains", json!({"0": "ok.test"})),
        "allowed_domains",
        "expected a list, got an object",
    );
}

#[test]
fn ranges_are_refused_unless_they_mean_one_thing() {
    let bad = [
        "203.0.113.0/33",
        "203.0.113/24",
        "203.0.113.0/",
        "203.0.113.0/024",
        "203.0.113.0/+8",
        "010.1.2.3",
        "203.0.113.0/24/8",
        "x",
        "",
        " 203.0.113.1",
        "203.0.113.1-203.0.113.9",
        "fe80::1%eth0",
        "ok.test",
    ];
    for text in bad {
        for list in ["allowed_cidrs", "denied_cidrs"] {
            refused(
                with(list, json!([text])),
                &format!("{list}[0]"),
                "expected a CIDR",
            );
        }
        refused(
            with_rule("cidrs", json!([text])),
            "rules[1].cidrs[0]",
            "expected a CIDR",
        );
    }
    refused(
        with("denied_cidrs", json!(["203.0.113.5/24"])),
        "denied_cidrs[0]",
        "the range is \"203.0.113.0/24\"",
    );
    refused(
        with("denied_cidrs", json!(["::ffff:203.0.113.5"])),
        "denied_cidrs[0]",
        "write it as IPv4",
    );
    for list in ["allowed_cidrs", "denied_cidrs"] {
        assert!(Policy::parse(&with(list, json!(["2001:db8::/32", "0.0.0.0/0", "::/0"]))).is_ok());
    }
}

#[test]
fn tiers_may_be_in_audit_mode_and_let_hidden_names_pass() {
    let policy = Policy::parse(&with("enforcement", json!("audit"))).unwrap();
    assert_eq!(policy.enforcement(), Enforcement::Audit);
    assert_eq!(policy.to_value()["enforcement"], "audit");
    let policy = Policy::parse(&with("ech", json!("allow"))).unwrap();
    assert_eq!(policy.ech(), Ech::Allow);
    assert_eq!(Policy::default().to_value()["ech"], "deny");
    refused(
        with("ech", json!("off")),
        "ech",
        "one of \"deny\", \"allow\", got \"off\"",
    );
    refused(with("ech", json!(null)), "ech", "got null");
}

fn udp(changes: Value) -> Value {
    let mut rule =
        json!({"action": "allow", "protocol": "udp", "cidrs": ["203.0.113.0/24"], "ports": ["123"]});
    for (name, value) in changes.as_object().expect("an object") {
        match value {
            Value::Null => drop(rule.as_object_mut().expect("an object").remove(name)),
            value => rule[name] = value.clone(),
        }
    }
    json!({"mode": "deny_all", "rules": [rule]})
}

#[test]
fn udp_is_allowed_by_address_and_port_alone() {
    assert!(Policy::parse(&udp(json!({}))).is_ok());
    assert!(Policy::parse(&udp(json!({"cidrs": ["2001:db8::/32"], "ports": ["1-65535"]}))).is_ok());
    assert!(Policy::parse(&udp(json!({"action": "deny", "ports": null}))).is_ok());
    refused(
        udp(json!({"domains": ["time.test"]})),
        "rules[0].domains",
        "shows no name",
    );
    refused(
        udp(json!({"cidrs": []})),
        "rules[0].domains",
        "at least one entry",
    );
    refused(
        udp(json!({"ports": null})),
        "rules[0].ports",
        "`allowed_ports` are those of TCP",
    );
    refused(udp(json!({"ports": ["53"]})), "rules[0].ports", "the resolver's");
    refused(
        udp(json!({"http": [{"methods": ["GET"]}]})),
        "rules[0].http",
        "nobody looks into \"udp\"",
    );
    refused(
        udp(json!({"credential": "KEY"})),
        "rules[0].credential",
        "needs protocol \"http\"",
    );
    for word in ["intercept", "splice"] {
        let says = if word == "splice" {
            "nothing on UDP"
        } else {
            "needs protocol"
        };
        refused(udp(json!({"tls": word})), "rules[0].tls", says);
    }
}

fn looking_inside(changes: Value) -> Value {
    let mut rule = json!({"action": "allow", "domains": ["api.test"]});
    for (name, value) in changes.as_object().expect("an object") {
        rule[name] = value.clone();
    }
    json!({"mode": "allowlist", "rules": [rule]})
}

#[test]
fn what_a_rule_asks_of_requests_survives_the_way_through_the_store() {
    let document = looking_inside(json!({
        "tls": "intercept",
        "http": [{"methods": ["GET"], "paths": ["/repos/**", "/%7euser"]}, {"upgrade": true}],
        "credential": "GITHUB_TOKEN",
    }));
    let policy = Policy::parse(&document).unwrap();
    assert_eq!(Policy::parse(&policy.to_value()).as_ref(), Ok(&policy));
    let rule = &policy.to_value()["rules"][0];
    assert_eq!(
        rule["http"],
        json!([
            {"methods": ["GET"], "paths": ["/repos/**", "/~user"], "upgrade": false},
            {"methods": [], "paths": [], "upgrade": true},
        ])
    );
    assert_eq!(
        (&rule["tls"], &rule["credential"]),
        (&json!("intercept"), &json!("GITHUB_TOKEN"))
    );
    assert_eq!(policy.rules()[0].credential(), Some("GITHUB_TOKEN"));
    let plain = Policy::parse(&looking_inside(json!({"tls": "auto", "http": []}))).unwrap();
    assert_eq!(plain, Policy::parse(&looking_inside(json!({}))).unwrap());
    assert!(Policy::parse(&looking_inside(json!({"tls": "splice"}))).is_ok());
}

#[test]
fn what_a_rule_asks_of_requests_is_read_strictly() {
    let list = |entry: Value| looking_inside(json!({"http": [entry]}));
    refused(
        list(json!({"method": ["GET"]})),
        "rules[0].http[0].method",
        "did you mean `methods`?",
    );
    refused(list(json!("GET")), "rules[0].http[0]", "expected an object");
    refused(
        list(json!({"methods": "GET"})),
        "rules[0].http[0].methods",
        "expected a list",
    );
    refused(
        list(json!({"methods": ["GET", "post"]})),
        "rules[0].http[0].methods[1]",
        "capital letters",
    );
    refused(
        list(json!({"paths": ["repos"]})),
        "rules[0].http[0].paths[0]",
        "begin with a slash",
    );
    refused(
        list(json!({"paths": ["/v*"]})),
        "rules[0].http[0].paths[0]",
        "whole segment",
    );
    refused(
        list(json!({"paths": [7]})),
        "rules[0].http[0].paths[0]",
        "expected a path",
    );
    refused(
        list(json!({"upgrade": "yes"})),
        "rules[0].http[0].upgrade",
        "true or false",
    );
    refused(
        looking_inside(json!({"http": {}})),
        "rules[0].http",
        "expected a list",
    );
    refused(
        looking_inside(json!({"tls": "on"})),
        "rules[0].tls",
        "expected one of",
    );
    for name in [json!(null), json!(""), json!("A B"), json!("x".repeat(129))] {
        refused(
            looking_inside(json!({"credential": name})),
            "rules[0].credential",
            "the name of a secret",
        );
    }
}

#[test]
fn requests_can_be_asked_only_of_flows_that_can_be_read() {
    let asks = [
        ("http", json!([{"methods": ["GET"]}])),
        ("credential", json!("GITHUB_TOKEN")),
        ("tls", json!("intercept")),
    ];
    for (field, value) in asks {
        let path = format!("rules[0].{field}");
        let with = |name: &str, other: Value| {
            let mut document = looking_inside(json!({field: value}));
            document["rules"][0][name] = other;
            document
        };
        refused(with("action", json!("deny")), &path, "a rule that allows");
        refused(with("protocol", json!("tcp")), &path, "needs protocol \"http\"");
        refused(
            with("cidrs", json!(["203.0.113.0/24"])),
            &path,
            "cannot be asked of `cidrs`",
        );
        if field != "tls" {
            refused(
                with("tls", json!("splice")),
                "rules[0].tls",
                "needs a look inside",
            );
        }
    }
    refused(
        looking_inside(json!({"action": "deny", "tls": "splice"})),
        "rules[0].tls",
        "means nothing",
    );
}

#[test]
fn lists_that_could_never_matter_are_refused() {
    for list in ["allowed_domains", "allowed_cidrs"] {
        let entry = if list == "allowed_domains" {
            "ok.test"
        } else {
            "203.0.113.0/24"
        };
        let document = json!({"mode": "deny_all", list: [entry]});
        refused(document, list, "must be empty when mode is \"deny_all\"");
    }
    refused(
        json!({"mode": "allowlist", "rules": [{"action": "deny"}]}),
        "rules[0].domains",
        "at least one entry",
    );
}

#[test]
fn rules_have_names_that_can_be_told_apart() {
    for bad in [
        json!(""),
        json!(" x"),
        json!("x\ny"),
        json!("x".repeat(65)),
        json!("ж"),
        json!(7),
    ] {
        refused(
            with_rule("name", bad),
            "rules[1].name",
            "expected 1 to 64 letters",
        );
    }
    let twice = json!({"name": "one", "action": "deny", "domains": ["ok.test"]});
    refused(
        json!({"mode": "allowlist", "rules": [twice, twice]}),
        "rules[1].name",
        "is the name of rules[0] already",
    );
}

#[test]
fn sizes_have_limits() {
    let many = |count: usize, entry: fn(usize) -> Value| Value::Array((0..count).map(entry).collect());
    let rule = |_| json!({"action": "deny", "domains": ["ok.test"]});
    refused(
        with("rules", many(10_001, rule)),
        "rules",
        "has 10001 entries; the limit is 10000",
    );
    assert!(Policy::parse(&with("rules", many(10_000, rule))).is_ok());
    let domain = |index| json!(format!("n{index}.ok.test"));
    refused(
        with("allowed_domains", many(10_001, domain)),
        "allowed_domains",
        "the limit is 10000",
    );
    assert!(Policy::parse(&with("allowed_domains", many(10_000, domain))).is_ok());
    let address = |index: usize| format!("203.{}.{}.{}", index / 40_000, index / 200 % 200, index % 200);
    let range = |index| {
        json!(format!(
            "203.{}.{}.{}",
            index / 40_000,
            index / 200 % 200,
            index % 200
        ))
    };
    refused(
        with("denied_cidrs", many(10_001, range)),
        "denied_cidrs",
        "the limit is 10000",
    );
    let wide = |list: usize, each: usize| {
        let ranges: Vec<String> = (0..each).map(|index| address(list * each + index)).collect();
        json!({"action": "allow", "cidrs": ranges})
    };
    let mut document = with("rules", json!([wide(0, 8000), wide(1, 8000)]));
    assert!(Policy::parse(&document).is_ok());
    document["denied_cidrs"] = json!((16_000..16_500).map(address).collect::<Vec<_>>());
    refused(
        document,
        "rules",
        "16500 different ranges; the limit for one sandbox is 16384",
    );
    refused(
        with("rules", json!([wide(0, 8000), wide(1, 8000), wide(2, 8000)])),
        "rules",
        "all rules together have 24000 entries in `cidrs`",
    );
    let ported = |index: usize| json!({"action": "deny", "cidrs": [address(index)], "ports": [format!("{}", 1 + index % 300)]});
    let rules = |count: usize| Value::Array((0..count).map(ported).collect());
    assert!(Policy::parse(&with("rules", rules(256))).is_ok());
    refused(
        with("rules", rules(400)),
        "rules",
        "300 different lists in `ports`; the limit is 256",
    );
    let port = |index: usize| json!(1000 + 2 * index);
    let mut document = json!({"mode": "allow_all", "allowed_ports": many(17, port)});
    refused(
        document.clone(),
        "allowed_ports",
        "too many separate ranges; the limit is 16",
    );
    document["allowed_ports"] = many(16, port);
    assert!(Policy::parse(&document).is_ok());
}

#[test]
fn an_error_can_be_put_below_the_field_that_holds_the_document() {
    let error = Policy::parse(&with("allowed_ports", json!([0])))
        .unwrap_err()
        .under("network");
    assert_eq!(
        error.to_string(),
        "network.allowed_ports[0]: expected a port 1-65535, got 0"
    );
    assert_eq!(
        Policy::parse(&json!(1)).unwrap_err().to_string(),
        "expected an object, got 1"
    );
    assert_eq!(
        Policy::parse(&json!(1)).unwrap_err().under("network").field,
        "network"
    );
}

#[test]
fn what_may_be_asked_of_dns_is_read_strictly() {
    let budget = |dns: Value| Policy::parse(&with("dns", dns)).unwrap().dns();
    assert_eq!(budget(json!({})), DnsBudget::default());
    let written = json!({
        "types": ["A", "TXT"], "unique_names_per_minute": 600, "query_bytes_per_minute": 1, "label_max": 63, "name_max": 253,
    });
    let policy = Policy::parse(&with("dns", written.clone())).unwrap();
    assert_eq!(policy.to_value()["dns"], written);
    assert_eq!(budget(json!({"types": []})).types.iter().count(), 0);
    for (field, bad, says) in [
        ("unique_names_per_minute", json!(0), "from 1 to 100000, got 0"),
        ("query_bytes_per_minute", json!(1.5), "a whole number"),
        ("label_max", json!(64), "from 1 to 63"),
        ("name_max", json!("128"), "from 1 to 253"),
        ("types", json!("A"), "a list"),
    ] {
        refused(with("dns", json!({field: bad})), &format!("dns.{field}"), says);
    }
    refused(
        with("dns", json!({"types": ["A", "HTTPS"]})),
        "dns.types[1]",
        "never answered",
    );
    refused(
        with("dns", json!({"types": ["a"]})),
        "dns.types[0]",
        "one of A, AAAA, CAA",
    );
    refused(with("dns", json!(null)), "dns", "expected an object");
}
