//! Policies and the egress audit.

use sandgate_api::audit::AuditEvent;

use super::*;

#[tokio::test]
async fn an_organization_without_policy_shows_the_default() {
    let world = world().await;
    let tenant = world.tenant("a@b").await;
    let shown = world
        .call(&tenant, "GET", "/settings/egress", &Value::Null)
        .await
        .body;
    assert_eq!(
        (&shown["mode"], &shown["allowed_ports"]),
        (&json!("allow_all"), &json!([443]))
    );
    assert_eq!((&shown["revision"], &shown["applied"]), (&json!(0), &json!(true)));
    assert_eq!(shown["org_id"], json!(tenant.org));
}

#[tokio::test]
async fn an_organizations_policy_is_replaced_whole() {
    let world = world().await;
    let tenant = world.tenant("a@b").await;
    let stranger = world.tenant("c@d").await;
    // The six fields that published clients send.
    let body = json!({
        "mode": "allowlist", "enforcement": "enforce", "failure_mode": "fail_closed",
        "allowed_domains": ["API.example.org", "*.wild.test"], "denied_domains": ["evil.test"], "allowed_ports": [443, 8443]
    });
    let stored = world.call(&tenant, "PUT", "/settings/egress", &body).await;
    assert_eq!(stored.status, StatusCode::OK, "{}", stored.body);
    assert_eq!(
        stored.body["allowed_domains"],
        json!(["api.example.org", "*.wild.test"])
    );
    assert_eq!(
        stored.body["applied"],
        json!(true),
        "no sandbox has to hear of it"
    );
    let shown = world
        .call(&tenant, "GET", "/settings/egress", &Value::Null)
        .await
        .body;
    assert_eq!(shown, stored.body);

    // What was read can be written.
    let again = world.call(&tenant, "PUT", "/settings/egress", &shown).await;
    assert_eq!(again.status, StatusCode::OK, "{}", again.body);
    let less = world
        .call(&tenant, "PUT", "/settings/egress", &json!({"mode": "deny_all"}))
        .await
        .body;
    assert_eq!(
        (&less["allowed_domains"], &less["mode"]),
        (&json!([]), &json!("deny_all"))
    );
    let foreign = world
        .call(&stranger, "GET", "/settings/egress", &Value::Null)
        .await
        .body;
    assert_eq!(foreign["mode"], "allow_all");
}

#[tokio::test]
async fn a_bad_policy_names_the_field_and_changes_nothing() {
    let world = world().await;
    let tenant = world.tenant("a@b").await;
    let id = world.stored_sandbox(&tenant).await;
    let before = world
        .call(&tenant, "GET", "/settings/egress", &Value::Null)
        .await
        .body;
    for (body, field) in [
        (json!({"mode": "open"}), "mode"),
        (json!({"mode": 1}), "mode"),
        (json!({"mode": "deny_all", "allowed_hosts": []}), "allowed_hosts"),
        (
            json!({"mode": "allowlist", "allowed_domains": "ok.test"}),
            "allowed_domains",
        ),
        (
            json!({"mode": "allowlist", "allowed_domains": ["ok.test", "a b"]}),
            "allowed_domains[1]",
        ),
        (
            json!({"mode": "allowlist", "allowed_cidrs": ["300.0.0.0/8"]}),
            "allowed_cidrs[0]",
        ),
        (
            json!({"mode": "allowlist", "allowed_cidrs": ["169.254.169.254/32"]}),
            "allowed_cidrs[0]",
        ),
        (
            json!({"mode": "allow_all", "allowed_ports": [70_000]}),
            "allowed_ports[0]",
        ),
        (
            json!({"mode": "allow_all", "allowed_ports": ["443"]}),
            "allowed_ports[0]",
        ),
    ] {
        for path in ["/settings/egress".to_owned(), format!("/sandbox/{id}/network")] {
            let answer = world.call(&tenant, "PUT", &path, &body).await;
            assert_eq!(
                answer.refusal(),
                (400, "VALIDATION_ERROR", Some(field)),
                "{path} {body}"
            );
        }
        let answer = world
            .call(&tenant, "PATCH", &format!("/sandbox/{id}/network"), &body)
            .await;
        assert_eq!(
            answer.refusal(),
            (400, "VALIDATION_ERROR", Some(field)),
            "PATCH {body}"
        );
    }
    assert_eq!(
        world
            .call(&tenant, "GET", "/settings/egress", &Value::Null)
            .await
            .body,
        before
    );
}

#[tokio::test]
async fn a_sandboxs_policy_is_put_merged_and_shown_with_its_tiers() {
    let world = world().await;
    let tenant = world.tenant("a@b").await;
    let id = world.stored_sandbox(&tenant).await;
    let path = format!("/sandbox/{id}/network");
    let shown = world.call(&tenant, "GET", &path, &Value::Null).await;
    assert_eq!(
        (&shown.body["policy"]["mode"], &shown.body["revision"]),
        (&json!("allow_all"), &json!(0))
    );
    assert_eq!(shown.headers["etag"], "\"0\"");

    let put = json!({"mode": "allowlist", "allowed_domains": ["ok.test"], "allowed_ports": [443, 80]});
    let stored = world.call(&tenant, "PUT", &path, &put).await.body;
    assert_eq!(stored["policy"]["allowed_domains"], json!(["ok.test"]));
    assert_eq!(stored["effective"].as_array().map(Vec::len), Some(1));

    let patch = json!({"allowed_domains": ["ok.test", "also.test"], "allowed_ports": null});
    let merged = world.call(&tenant, "PATCH", &path, &patch).await.body;
    assert_eq!(merged["policy"]["mode"], "allowlist");
    assert_eq!(
        merged["policy"]["allowed_domains"],
        json!(["ok.test", "also.test"])
    );
    assert_eq!(
        merged["policy"]["allowed_ports"],
        json!([443]),
        "null brings the default back"
    );
    assert!(merged["revision"].as_u64() > stored["revision"].as_u64());

    world
        .call(&tenant, "PUT", "/settings/egress", &json!({"mode": "deny_all"}))
        .await;
    let shown = world.call(&tenant, "GET", &path, &Value::Null).await.body;
    let tiers: Vec<_> = shown["effective"]
        .as_array()
        .expect("tiers")
        .iter()
        .map(|tier| tier["tier"].clone())
        .collect();
    assert_eq!(tiers, [json!("organization"), json!("sandbox")]);

    // What was read can be written, whole.
    let again = world.call(&tenant, "PUT", &path, &shown).await;
    assert_eq!(again.status, StatusCode::OK, "{}", again.body);
    assert_eq!(again.body["policy"], shown["policy"]);
    let mut misspelt = shown.clone();
    misspelt["modus"] = json!("x");
    assert_eq!(
        world.call(&tenant, "PUT", &path, &misspelt).await.status,
        StatusCode::BAD_REQUEST
    );
}

#[tokio::test]
async fn a_stale_change_is_412_by_header_and_409_in_the_body() {
    let world = world().await;
    let tenant = world.tenant("a@b").await;
    let id = world.stored_sandbox(&tenant).await;
    for path in ["/settings/egress".to_owned(), format!("/sandbox/{id}/network")] {
        let first = world
            .call(&tenant, "PUT", &path, &json!({"mode": "deny_all", "revision": 0}))
            .await;
        assert_eq!(first.status, StatusCode::OK, "{}", first.body);
        let revision = first.body["revision"].as_u64().expect("a revision");
        let stale = json!({"mode": "allow_all", "revision": revision - 1});
        assert_eq!(
            world.call(&tenant, "PUT", &path, &stale).await.refusal().0,
            409,
            "{path}"
        );
        for (tag, status) in [
            (format!("\"{}\"", revision - 1), 412),
            ("\"0\"".to_owned(), 412),
            ("nonsense".to_owned(), 400),
            (format!("\"{revision}\""), 200),
        ] {
            let request = Request::put(format!("/api/v1{path}"))
                .header("x-api-key", &tenant.key)
                .header("if-match", &tag)
                .body(Body::from(r#"{"mode": "deny_all"}"#))
                .expect("a request");
            assert_eq!(world.send(request).await.status.as_u16(), status, "{path} {tag}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_two_changes_at_once_none_is_lost() {
    let world = world().await;
    let tenant = world.tenant("a@b").await;
    let id = world.stored_sandbox(&tenant).await;
    for path in ["/settings/egress".to_owned(), format!("/sandbox/{id}/network")] {
        let shown = world.call(&tenant, "GET", &path, &Value::Null).await;
        assert_eq!(shown.headers["etag"], "\"0\"", "{path}");
        // Everybody wants to change the same revision: one does, and the others hear of it.
        let conditional = |name: String, how: &'static str| {
            let body = json!({"mode": "allowlist", "allowed_domains": [name]}).to_string();
            let request = Request::builder()
                .method(how)
                .uri(format!("/api/v1{path}"))
                .header("x-api-key", &tenant.key)
                .header("if-match", "\"0\"")
                .body(Body::from(body))
                .expect("a request");
            world.send(request)
        };
        let attempts = (0..8).map(|index| {
            let how = if index % 2 == 0 { "PUT" } else { "PATCH" };
            conditional(format!("n{index}.test"), how)
        });
        let answers = futures_util::future::join_all(attempts).await;
        let statuses: Vec<u16> = answers.iter().map(|answer| answer.status.as_u16()).collect();
        assert_eq!(
            statuses.iter().filter(|status| **status == 200).count(),
            1,
            "{path}: {statuses:?}"
        );
        assert_eq!(
            statuses.iter().filter(|status| **status == 412).count(),
            7,
            "{path}: {statuses:?}"
        );
        let winner = answers
            .iter()
            .find(|answer| answer.status == StatusCode::OK)
            .expect("one");
        let shown = world.call(&tenant, "GET", &path, &Value::Null).await;
        assert_eq!(
            (&shown.body["revision"], &shown.headers["etag"]),
            (&winner.body["revision"], &winner.headers["etag"])
        );

        // Changes of different fields that nobody tied to a revision all stay.
        let changes = [
            json!({"denied_domains": ["evil.test"]}),
            json!({"failure_mode": "fail_open"}),
            json!({"dns": {"label_max": 63}}),
            json!({"dns": {"name_max": 253}}),
        ];
        let attempts = changes
            .iter()
            .map(|change| world.call(&tenant, "PATCH", &path, change));
        for answer in futures_util::future::join_all(attempts).await {
            assert_eq!(answer.status, StatusCode::OK, "{path}: {}", answer.body);
        }
        let shown = world.call(&tenant, "GET", &path, &Value::Null).await.body;
        let policy = shown.get("policy").unwrap_or(&shown);
        assert_eq!(policy["denied_domains"], json!(["evil.test"]), "{path}");
        assert_eq!(policy["failure_mode"], "fail_open", "{path}");
        assert_eq!(
            (&policy["dns"]["label_max"], &policy["dns"]["name_max"]),
            (&json!(63), &json!(253)),
            "{path}"
        );
        assert_eq!(
            policy["allowed_domains"].as_array().map(Vec::len),
            Some(1),
            "{path}"
        );
        // A revision in the body that somebody was faster with is a conflict.
        let mut stale = winner.body.clone();
        stale["revision"] = winner.body["revision"].clone();
        assert_eq!(
            world.call(&tenant, "PUT", &path, &stale).await.refusal().0,
            409,
            "{path}"
        );
    }
}

#[tokio::test]
async fn ten_thousand_rules_are_taken_and_one_more_is_not() {
    let world = world().await;
    let tenant = world.tenant("a@b").await;
    let rules = |count: usize| -> Vec<Value> {
        let rule = |index: usize| {
            json!({
                "name": format!("rule {index}"), "action": "allow", "protocol": "tcp", "ports": ["443"],
                "domains": [format!("host-{index}.example.org")],
                "cidrs": [format!("203.{}.{}.0/24", index / 250, index % 250)],
            })
        };
        (0..count).map(rule).collect()
    };
    let body = |count| json!({"mode": "allowlist", "rules": rules(count)});
    let stored = world
        .call(&tenant, "PUT", "/settings/egress", &body(10_000))
        .await;
    assert_eq!(stored.status, StatusCode::OK);
    assert_eq!(stored.body["rules"].as_array().map(Vec::len), Some(10_000));
    let refused = world
        .call(&tenant, "PUT", "/settings/egress", &body(10_001))
        .await;
    assert_eq!(refused.refusal(), (400, "VALIDATION_ERROR", Some("rules")));
}

#[tokio::test]
async fn what_a_tier_in_audit_mode_lets_through_is_a_denial_that_is_not_enforced() {
    let world = world().await;
    let tenant = world.tenant("a@b").await;
    let events = [
        event(&tenant, "1", "ok.test", "allow"),
        event(&tenant, "2", "evil.test", "deny"),
        event(&tenant, "3", "other.test", "audit"),
    ];
    world
        .store
        .insert_audit(world.broker.chain(), &events)
        .await
        .expect("stored");
    for (query, hosts) in [
        ("decision=deny", &["other.test", "evil.test"][..]),
        ("decision=deny&enforced=false", &["other.test"]),
        ("enforced=false", &["other.test"]),
        ("decision=deny&enforced=true", &["evil.test"]),
        ("enforced=true", &["evil.test", "ok.test"]),
        ("decision=allow", &["ok.test"]),
    ] {
        let path = format!("/egress/audit?{query}");
        let page = world.call(&tenant, "GET", &path, &Value::Null).await.body;
        let events = page["events"].as_array().expect("events");
        let found: Vec<_> = events
            .iter()
            .map(|event| event["host"].as_str().expect("a host"))
            .collect();
        assert_eq!(found, hosts, "{query}");
        for event in events.iter().filter(|event| event["host"] == "other.test") {
            assert_eq!(
                (&event["verdict"], &event["decision"], &event["enforced"]),
                (&json!("audit"), &json!("deny"), &json!(false))
            );
        }
    }
}

fn event(tenant: &Tenant, id: &str, host: &str, verdict: &str) -> AuditEvent {
    serde_json::from_value(json!({
        "id": id, "time": "2026-01-30T10:00:00Z", "org_id": tenant.org, "sandbox_id": "sandbox-1", "verdict": verdict,
        "reason": "default_deny", "protocol": "tls", "host": host, "ip": "203.0.113.66", "port": 443,
        "bytes_up": 1, "bytes_down": 2
    }))
    .expect("an event")
}

#[tokio::test]
async fn the_audit_has_the_names_that_published_clients_expect() {
    let world = world().await;
    let tenant = world.tenant("a@b").await;
    let stranger = world.tenant("c@d").await;
    let events = [
        event(&tenant, "1", "ok.test", "allow"),
        event(&tenant, "2", "evil.test", "deny"),
        event(&stranger, "3", "x.test", "deny"),
    ];
    world
        .store
        .insert_audit(world.broker.chain(), &events)
        .await
        .expect("stored");
    let page = world
        .call(&tenant, "GET", "/egress/audit?decision=deny", &Value::Null)
        .await
        .body;
    let events = page["events"].as_array().expect("events");
    assert_eq!(events.len(), 1);
    let event = &events[0];
    assert_eq!(
        (&event["host"], &event["decision"], &event["verdict"]),
        (&json!("evil.test"), &json!("deny"), &json!("deny"))
    );
    assert_eq!(
        (&event["timestamp"], &event["time"]),
        (&json!("2026-01-30T10:00:00Z"), &json!("2026-01-30T10:00:00Z"))
    );
    assert_eq!(
        (&event["enforced"], &event["bytes"], &event["port"]),
        (&json!(true), &json!(3), &json!(443))
    );
    assert_eq!(
        (&event["reason"], &event["ip"]),
        (&json!("default_deny"), &json!("203.0.113.66"))
    );

    let first = world
        .call(&tenant, "GET", "/egress/audit?limit=1", &Value::Null)
        .await
        .body;
    let cursor = first["next_cursor"].as_str().expect("a cursor");
    let second = world
        .call(
            &tenant,
            "GET",
            &format!("/egress/audit?limit=1&cursor={cursor}"),
            &Value::Null,
        )
        .await
        .body;
    assert_eq!(
        (&first["events"][0]["host"], &second["events"][0]["host"]),
        (&json!("evil.test"), &json!("ok.test"))
    );
    let none = world
        .call(&tenant, "GET", "/egress/audit?host=x.test", &Value::Null)
        .await
        .body;
    assert_eq!(none["events"], json!([]));
}
