//! Secrets that sandboxes are given: which, how they look inside, what a node leases, and what policies say to them.

use super::*;

#[tokio::test]
async fn an_injection_is_checked() {
    let world = world().await;
    let tenant = world.tenant("a@b").await;
    let id = world.stored_sandbox(&tenant).await;
    let path = format!("/sandbox/{id}/secrets/inject");
    for (body, field) in [
        (json!({}), "secrets"),
        (json!({"secrets": []}), "secrets"),
        (json!({"all": false}), "secrets"),
        (json!({"all": "yes"}), "all"),
        (json!({"secrets": "A"}), "secrets"),
        (json!({"secrets": [1]}), "secrets[0]"),
        (json!({"secrets": ["A"], "names": []}), "names"),
    ] {
        let answer = world.call(&tenant, "POST", &path, &body).await;
        assert_eq!(answer.refusal(), (400, "VALIDATION_ERROR", Some(field)), "{body}");
    }
    let unknown = world
        .call(&tenant, "POST", &path, &json!({"secrets": ["NO"]}))
        .await;
    assert_eq!(unknown.refusal(), (404, "NOT_FOUND", None));
    world.store.withdraw(&id).await.expect("withdrawn");
    let ended = world.call(&tenant, "POST", &path, &json!({"all": true})).await;
    assert_eq!(ended.refusal(), (409, "CONFLICT", None));
}

#[tokio::test]
async fn what_a_creation_asks_for_is_checked() {
    let world = world().await;
    let tenant = world.tenant("a@b").await;
    for (body, field) in [
        (json!({"secrets": "some"}), "secrets"),
        (json!({"secrets": true}), "secrets"),
        (json!({"secrets": {"A": "b"}}), "secrets"),
        (json!({"secrets": [null]}), "secrets[0]"),
        (json!({"secrets": ["A", 1]}), "secrets[1]"),
    ] {
        let answer = world.call(&tenant, "POST", "/sandbox/create", &body).await;
        assert_eq!(answer.refusal(), (400, "VALIDATION_ERROR", Some(field)), "{body}");
    }
}

#[tokio::test]
async fn keys_need_the_scope() {
    let world = world().await;
    let owner = world.tenant("a@b").await;
    let limited = async |scope: &str| {
        let body = json!({"name": "x", "scopes": [scope]});
        let answer = world.call(&owner, "POST", "/api-keys", &body).await;
        Tenant {
            key: answer.body["key"].as_str().expect("a key").to_owned(),
            org: owner.org.clone(),
        }
    };
    let (reader, writer) = (limited("secrets:read").await, limited("secrets:write").await);
    let other = limited("sandbox:execute").await;
    let create = |name: &str| json!({"name": name, "value": "x"});
    for (tenant, method, path, body, status) in [
        (&reader, "GET", "/secrets", Value::Null, 200),
        (&reader, "POST", "/secrets", create("A"), 403),
        (&reader, "PUT", "/secrets/A", json!({"value": "x"}), 403),
        (&reader, "DELETE", "/secrets/A", Value::Null, 403),
        (&writer, "GET", "/secrets", Value::Null, 200),
        (&writer, "POST", "/secrets", create("A"), 201),
        (&writer, "DELETE", "/secrets/A", Value::Null, 200),
        (&other, "GET", "/secrets", Value::Null, 403),
        (&other, "POST", "/secrets", create("A"), 403),
    ] {
        let answer = world.call(tenant, method, path, &body).await;
        assert_eq!(answer.status.as_u16(), status, "{method} {path}: {}", answer.body);
    }
}

#[tokio::test]
async fn a_command_has_placeholders_plain_values_and_what_its_caller_set() {
    let world = world().await;
    let tenant = world.tenant("a@b").await;
    world
        .store_secret(&tenant, json!({"name": "ANTHROPIC_API_KEY", "value": CANARY}))
        .await;
    world
        .store_secret(
            &tenant,
            json!({"name": "OPENAI_API_KEY", "value": "plain-on-request", "egress": null}),
        )
        .await;
    let mut record = world.holder(&tenant).await;
    let env = world.environment(&record, json!({"A": "b"})).await;
    let placeholder = env["ANTHROPIC_API_KEY"].clone();
    assert!(placeholder.starts_with("sk-ant-api03-sgp0"), "{placeholder}");
    assert!(!placeholder.contains("canary"));
    assert_eq!(
        (env["OPENAI_API_KEY"].as_str(), env["A"].as_str()),
        ("plain-on-request", "b")
    );
    // A rotation: the same placeholder, the new plain value.
    for (name, value) in [
        ("ANTHROPIC_API_KEY", "sk-ant-rotated-0123"),
        ("OPENAI_API_KEY", "rotated"),
    ] {
        let update = world.service.update_secret(
            &tenant.org,
            name,
            crate::service::SecretChangeRequest {
                value: Some(sandgate_api::credential::Sensitive::new(value.to_owned())),
                egress: None,
            },
        );
        // The node of this test never acknowledges; the store has changed before it is waited for.
        let _pending = tokio::time::timeout(std::time::Duration::from_secs(2), update).await;
    }
    let env = world.environment(&record, json!({})).await;
    assert_eq!(env["ANTHROPIC_API_KEY"], placeholder);
    assert_eq!(env["OPENAI_API_KEY"], "rotated");
    // What somebody set by hand is theirs.
    let env = world
        .environment(&record, json!({"OPENAI_API_KEY": "mine"}))
        .await;
    assert_eq!(env["OPENAI_API_KEY"], "mine");
    record
        .spec
        .env
        .insert("ANTHROPIC_API_KEY".to_owned(), "mine".to_owned());
    assert!(
        !world
            .environment(&record, json!({}))
            .await
            .contains_key("ANTHROPIC_API_KEY")
    );
    // A revocation.
    world
        .store
        .delete_secret(&tenant.org, "OPENAI_API_KEY")
        .await
        .expect("deleted");
    assert!(
        !world
            .environment(&record, json!({}))
            .await
            .contains_key("OPENAI_API_KEY")
    );
}

#[tokio::test]
async fn a_node_is_given_what_its_sandboxes_have() {
    let world = world().await;
    let tenant = world.tenant("a@b").await;
    world
        .store_secret(&tenant, json!({"name": "ANTHROPIC_API_KEY", "value": CANARY}))
        .await;
    let record = world.holder(&tenant).await;
    let bystander = world.stored_sandbox(&tenant).await;
    let ask = |id: &SandboxId, secret: &str| CredentialRequest {
        sandbox_id: id.clone(),
        secret: secret.to_owned(),
    };
    let lease = world
        .broker
        .credential(&ask(&record.id, "ANTHROPIC_API_KEY"))
        .await
        .expect("an answer")
        .expect("a lease");
    assert_eq!((lease.value.expose(), lease.lease_seconds), (CANARY, 60));
    for (id, name) in [(&record.id, "OPENAI_API_KEY"), (&bystander, "ANTHROPIC_API_KEY")] {
        assert_eq!(
            world.broker.credential(&ask(id, name)).await.expect("an answer"),
            None
        );
    }
    let authority = async |id: &SandboxId| {
        let request = CaRequest {
            sandbox_id: id.clone(),
        };
        world.broker.authority(&request).await.expect("an answer")
    };
    let given = authority(&record.id).await.expect("an authority");
    assert_eq!((given.certificate_pem.as_str(), given.generation), ("PEM", 1));
    assert!(given.key_pem.expose().contains("PRIVATE KEY"));
    assert_eq!(authority(&record.id).await.expect("again").key_pem, given.key_pem);
    assert_eq!(authority(&bystander).await, None);
}

#[tokio::test]
async fn a_rule_that_leaves_tls_unread_and_a_binding_to_its_host_exclude_each_other() {
    let world = world().await;
    let tenant = world.tenant("a@b").await;
    let spliced = |domain: &str| {
        json!({"mode": "allowlist", "rules": [
            {"action": "allow", "domains": ["other.test"], "ports": ["443"]},
            {"action": "allow", "domains": [domain], "ports": ["443"], "tls": "splice"}
        ]})
    };
    world.store_secret(&tenant, request("A", &binding())).await;
    let id = world.holder(&tenant).await.id;
    for domain in ["api.ok.test", "*.ok.test"] {
        for (path, field) in [
            (format!("/sandbox/{id}/network"), "rules[1].tls"),
            ("/settings/egress".to_owned(), "rules[1].tls"),
        ] {
            let answer = world.call(&tenant, "PUT", &path, &spliced(domain)).await;
            assert_eq!(
                answer.refusal(),
                (400, "VALIDATION_ERROR", Some(field)),
                "{path} {domain}"
            );
        }
    }
    world
        .store
        .delete_secret(&tenant.org, "A")
        .await
        .expect("deleted");
    world.store.withdraw(&id).await.expect("withdrawn");
    let accepted = world
        .call(&tenant, "PUT", "/settings/egress", &spliced("api.ok.test"))
        .await;
    assert_eq!(accepted.status, StatusCode::OK, "{}", accepted.body);
    let refused = world
        .call(&tenant, "POST", "/secrets", &request("A", &binding()))
        .await;
    assert_eq!(refused.refusal(), (400, "VALIDATION_ERROR", Some("egress.hosts")));
    let elsewhere = json!({"hosts": ["api.wild.test"], "inject": [{"kind": "bearer"}]});
    world.store_secret(&tenant, request("B", &elsewhere)).await;
}

#[tokio::test]
async fn a_rule_can_ask_only_for_a_binding_that_there_is() {
    let world = world().await;
    let tenant = world.tenant("a@b").await;
    let id = world.stored_sandbox(&tenant).await;
    let rule =
        |credential: &str| json!({"action": "allow", "domains": ["api.ok.test"], "credential": credential});
    world.store_secret(&tenant, request("A", &binding())).await;
    world
        .store_secret(&tenant, json!({"name": "PLAIN", "value": "x"}))
        .await;
    for path in [format!("/sandbox/{id}/network"), "/settings/egress".to_owned()] {
        for name in ["NONE", "PLAIN"] {
            let body = json!({"mode": "allowlist", "rules": [rule("A"), rule(name)]});
            let answer = world.call(&tenant, "PUT", &path, &body).await;
            assert_eq!(
                answer.refusal(),
                (400, "VALIDATION_ERROR", Some("rules[1].credential")),
                "{path}"
            );
        }
        let body = json!({"mode": "allowlist", "rules": [rule("A")]});
        let answer = world.call(&tenant, "PUT", &path, &body).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.body);
    }
}

#[tokio::test]
async fn changes_at_the_same_time_all_succeed_and_one_of_them_is_last() {
    let world = world().await;
    let tenant = world.tenant("a@b").await;
    world.store_secret(&tenant, request("A", &binding())).await;
    let values: Vec<String> = (0..4).map(|number| format!("sk-parallel-{number}")).collect();
    let bodies: Vec<Value> = values.iter().map(|value| json!({ "value": value })).collect();
    let changes = bodies
        .iter()
        .map(|body| world.call(&tenant, "PUT", "/secrets/A", body));
    for answer in futures_util::future::join_all(changes).await {
        assert!(
            matches!(answer.status, StatusCode::OK | StatusCode::CONFLICT),
            "{}",
            answer.body
        );
    }
    let record = world.holder(&tenant).await;
    let request = CredentialRequest {
        sandbox_id: record.id,
        secret: "A".to_owned(),
    };
    let lease = world
        .broker
        .credential(&request)
        .await
        .expect("an answer")
        .expect("a lease");
    assert!(values.iter().any(|value| value == lease.value.expose()));
}
