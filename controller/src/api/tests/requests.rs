//! Requests as such: credentials, envelopes, limits, keys.

use super::*;

#[tokio::test]
async fn a_registration_shows_its_key_in_both_places_once() {
    let world = world().await;
    let answer = world.register("A@Example.org").await;
    assert_eq!(answer.status, StatusCode::CREATED);
    let body = &answer.body;
    assert_eq!(body["success"], json!(true));
    assert_eq!(body["key"], body["api_key"]["key"]);
    for path in [
        "/organization/id",
        "/organization/name",
        "/organization/slug",
        "/organization/plan",
        "/user/id",
        "/user/email",
        "/user/role",
        "/api_key/key",
        "/api_key/key_prefix",
        "/api_key/name",
    ] {
        assert!(body.pointer(path).is_some_and(Value::is_string), "{path}");
    }
    assert_eq!(body["user"]["email"], "a@example.org");
    let again = world.register("a@example.ORG").await;
    assert_eq!(again.refusal(), (409, "CONFLICT", None));
    let tenant = Tenant {
        key: body["key"].as_str().expect("a key").to_owned(),
        org: OrgId::random(),
    };
    let listed = world.call(&tenant, "GET", "/api-keys", &Value::Null).await;
    assert_eq!(listed.status, StatusCode::OK);
    assert!(
        !listed.body.to_string().contains(&tenant.key),
        "a key is shown once"
    );
}

#[tokio::test]
async fn a_registration_that_is_refused_names_the_field() {
    let world = world().await;
    for (body, field) in [
        (json!({}), "email"),
        (json!({"email": 1, "organization_name": "x"}), "email"),
        (json!({"email": "x", "organization_name": "x"}), "email"),
        (json!({"email": "a@b"}), "organization_name"),
        (
            json!({"email": "a@b", "organization_name": ""}),
            "organization_name",
        ),
        (
            json!({"email": "a@b", "organization_name": "x", "first_name": []}),
            "first_name",
        ),
        (
            json!({"email": "a@b", "organization_name": "x", "admin": true}),
            "admin",
        ),
    ] {
        let request = Request::post("/api/v1/register")
            .body(Body::from(body.to_string()))
            .expect("a request");
        let answer = world.send(request).await;
        assert_eq!(answer.refusal(), (400, "VALIDATION_ERROR", Some(field)), "{body}");
    }
    assert_eq!(
        world.register("a@b").await.status,
        StatusCode::CREATED,
        "nothing was left behind"
    );
}

#[tokio::test]
async fn closed_registration_lets_nobody_in() {
    let world = world_with(Settings {
        registration: Some("closed".to_owned()),
        ..Settings::default()
    })
    .await;
    assert_eq!(world.register("a@b").await.refusal(), (403, "FORBIDDEN", None));
}

#[tokio::test]
async fn a_key_is_accepted_in_every_form_of_published_clients() {
    let world = world().await;
    let tenant = world.tenant("a@b").await;
    for (header, value) in [
        ("authorization", format!("Bearer {}", tenant.key)),
        ("authorization", format!("ApiKey {}", tenant.key)),
        ("x-api-key", tenant.key.clone()),
    ] {
        let request = Request::get("/api/v1/sandboxes")
            .header(header, &value)
            .body(Body::empty())
            .expect("a request");
        assert_eq!(world.send(request).await.status, StatusCode::OK, "{header}");
    }
    let mut wrong = tenant.key.clone();
    wrong.pop();
    for value in ["", "x", "sk_sandbox_a.b.c", &wrong, &format!("{}x", tenant.key)] {
        let request = Request::get("/api/v1/sandboxes")
            .header("x-api-key", value)
            .body(Body::empty())
            .expect("a request");
        assert_eq!(
            world.send(request).await.refusal(),
            (401, "UNAUTHORIZED", None),
            "{value:?}"
        );
    }
    let query = Request::get(format!("/api/v1/sandboxes?token={}", tenant.key))
        .body(Body::empty())
        .expect("a request");
    assert_eq!(
        world.send(query).await.refusal(),
        (401, "UNAUTHORIZED", None),
        "a key in the query ends up in logs"
    );
}

#[tokio::test]
async fn every_route_but_registration_and_health_wants_a_key() {
    let world = world().await;
    for (method, path) in [
        ("GET", "/api-keys"),
        ("POST", "/api-keys"),
        ("DELETE", "/api-keys/key-1"),
        ("GET", "/sandboxes"),
        ("POST", "/sandbox"),
        ("POST", "/sandbox/create"),
        ("GET", "/sandbox/sandbox-1"),
        ("DELETE", "/sandbox/sandbox-1"),
        ("GET", "/sandbox/sandbox-1/status"),
        ("POST", "/sandbox/sandbox-1/stop"),
        ("POST", "/sandbox/sandbox-1/execute"),
        ("GET", "/sandbox/sandbox-1/files"),
        ("POST", "/sandbox/sandbox-1/files"),
        ("GET", "/sandbox/sandbox-1/files/list"),
        ("GET", "/sandbox/sandbox-1/files/download"),
        ("GET", "/sandbox/sandbox-1/network"),
        ("PUT", "/sandbox/sandbox-1/network"),
        ("PATCH", "/sandbox/sandbox-1/network"),
        ("GET", "/sandbox/sandbox-1/network/doctor"),
        ("GET", "/settings/egress"),
        ("PUT", "/settings/egress"),
        ("GET", "/egress/audit"),
        ("GET", "/egress/audit/stream"),
        ("GET", "/egress/audit/verify"),
    ] {
        // The body is not even looked at before the key.
        let request = Request::builder()
            .method(method)
            .uri(format!("/api/v1{path}"))
            .body(Body::from("{"))
            .expect("a request");
        assert_eq!(
            world.send(request).await.refusal(),
            (401, "UNAUTHORIZED", None),
            "{method} {path}"
        );
    }
}

#[tokio::test]
async fn naming_another_organization_is_refused_and_never_selects_it() {
    let world = world().await;
    let tenant = world.tenant("a@b").await;
    let other = world.tenant("c@d").await;
    for (named, status) in [(&tenant.org, 200), (&other.org, 403)] {
        let request = Request::get("/api/v1/sandboxes")
            .header("x-api-key", &tenant.key)
            .header("x-org-id", named.as_str())
            .body(Body::empty())
            .expect("a request");
        assert_eq!(world.send(request).await.status.as_u16(), status, "header");
        let query = world
            .call(
                &tenant,
                "GET",
                &format!("/sandboxes?org_id={named}"),
                &Value::Null,
            )
            .await;
        assert_eq!(query.status.as_u16(), status, "query");
    }
    let body = json!({"org_id": other.org});
    for path in ["/sandbox/create", "/api-keys"] {
        assert_eq!(
            world.call(&tenant, "POST", path, &body).await.refusal().0,
            403,
            "{path}"
        );
    }
    assert_eq!(
        world
            .call(&tenant, "PUT", "/settings/egress", &body)
            .await
            .refusal()
            .0,
        403
    );
}

#[tokio::test]
async fn what_does_not_exist_is_said_in_the_envelope() {
    let world = world().await;
    let tenant = world.tenant("a@b").await;
    for path in [
        "/nothing",
        "/sandboxes/",
        "/sandbox/sandbox-1/nothing",
        "/api-keys/key-1/turn",
    ] {
        assert_eq!(
            world.call(&tenant, "GET", path, &Value::Null).await.refusal(),
            (404, "NOT_FOUND", None),
            "{path}"
        );
    }
    for (method, path) in [
        ("PUT", "/sandboxes"),
        ("GET", "/register"),
        ("DELETE", "/settings/egress"),
        ("PATCH", "/sandbox/sandbox-1"),
    ] {
        let answer = world.call(&tenant, method, path, &Value::Null).await;
        assert_eq!(
            answer.refusal(),
            (405, "METHOD_NOT_ALLOWED", None),
            "{method} {path}"
        );
    }
    let root = world
        .send(Request::get("/").body(Body::empty()).expect("a request"))
        .await;
    assert_eq!(root.refusal(), (404, "NOT_FOUND", None));
}

#[tokio::test]
async fn a_request_id_comes_back_unless_it_could_forge_something() {
    let world = world().await;
    for (given, kept) in [
        ("req-1", true),
        ("7d3f", true),
        ("a b", false),
        ("", false),
        (&"x".repeat(200), false),
    ] {
        let request = Request::get("/health")
            .header("x-request-id", given)
            .body(Body::empty())
            .expect("a request");
        let answer = world.send(request).await;
        let id = answer.headers["x-request-id"].to_str().expect("text");
        assert_eq!(id == given, kept, "{given:?}");
        assert!(!id.is_empty());
    }
}

#[tokio::test]
async fn a_body_that_is_no_object_is_refused() {
    let world = world().await;
    let tenant = world.tenant("a@b").await;
    for body in ["[]", "1", "\"x\"", "{", "nothing"] {
        let request = Request::post("/api/v1/sandbox/create")
            .header("x-api-key", &tenant.key)
            .body(Body::from(body))
            .expect("a request");
        assert_eq!(
            world.send(request).await.refusal(),
            (400, "VALIDATION_ERROR", None),
            "{body}"
        );
    }
}

#[tokio::test]
async fn a_body_that_is_too_large_is_refused_in_the_envelope() {
    let world = world().await;
    let tenant = world.tenant("a@b").await;
    let id = world.stored_sandbox(&tenant).await;
    let ordinary = vec![b' '; 4 * 1024 * 1024 + 1];
    let files = vec![b' '; 64 * 1024 * 1024 + 1];
    for (path, body) in [
        ("/sandbox/create".to_owned(), ordinary),
        (format!("/sandbox/{id}/files"), files),
    ] {
        for declared in [true, false] {
            let mut request = Request::post(format!("/api/v1{path}")).header("x-api-key", &tenant.key);
            if declared {
                request = request.header("content-length", body.len());
            }
            let answer = world
                .send(request.body(Body::from(body.clone())).expect("a request"))
                .await;
            assert_eq!(
                answer.refusal(),
                (413, "PAYLOAD_TOO_LARGE", None),
                "{path} {declared}"
            );
        }
    }
    let most = vec![b' '; 4 * 1024 * 1024 + 1];
    let request = Request::post(format!("/api/v1/sandbox/{id}/files")).header("x-api-key", &tenant.key);
    let answer = world
        .send(request.body(Body::from(most)).expect("a request"))
        .await;
    assert_eq!(
        answer.refusal(),
        (400, "VALIDATION_ERROR", Some("files")),
        "files may be larger than other bodies"
    );
}

#[tokio::test]
async fn keys_are_made_listed_and_revoked() {
    let world = world().await;
    let tenant = world.tenant("a@b").await;
    let stranger = world.tenant("c@d").await;
    let body = json!({"name": "ci", "expires_in_days": 7, "scopes": ["sandbox:create", "sandbox:execute"]});
    let created = world.call(&tenant, "POST", "/api-keys", &body).await;
    assert_eq!(created.status, StatusCode::CREATED, "{}", created.body);
    let ci = Tenant {
        key: created.body["key"].as_str().expect("a key").to_owned(),
        org: tenant.org.clone(),
    };
    let id = created.body["api_key"]["id"].as_str().expect("an id").to_owned();
    assert_eq!(created.body["api_key"]["scopes"], body["scopes"]);
    assert!(created.body["api_key"]["expires_at"].is_string());

    let listed = world.call(&tenant, "GET", "/api-keys", &Value::Null).await;
    assert_eq!(listed.body["api_keys"].as_array().map(Vec::len), Some(2));
    assert_eq!(
        world.call(&ci, "GET", "/sandboxes", &Value::Null).await.status,
        StatusCode::OK
    );
    for (method, path) in [
        ("GET", "/api-keys"),
        ("GET", "/settings/egress"),
        ("GET", "/egress/audit"),
        ("GET", "/egress/audit/stream"),
        ("GET", "/egress/audit/verify"),
    ] {
        assert_eq!(
            world.call(&ci, method, path, &Value::Null).await.refusal(),
            (403, "FORBIDDEN", None),
            "{path}"
        );
    }

    let path = format!("/api-keys/{id}");
    assert_eq!(
        world
            .call(&stranger, "DELETE", &path, &Value::Null)
            .await
            .refusal(),
        (404, "NOT_FOUND", None)
    );
    assert_eq!(
        world.call(&ci, "GET", "/sandboxes", &Value::Null).await.status,
        StatusCode::OK
    );
    for _ in 0..2 {
        let revoked = world.call(&tenant, "DELETE", &path, &Value::Null).await;
        assert_eq!(revoked.body, json!({"success": true}));
    }
    assert_eq!(
        world.call(&ci, "GET", "/sandboxes", &Value::Null).await.refusal(),
        (401, "UNAUTHORIZED", None)
    );
}

#[tokio::test]
async fn a_key_that_is_refused_names_the_field() {
    let world = world().await;
    let tenant = world.tenant("a@b").await;
    for (body, field) in [
        (json!({}), "name"),
        (json!({"name": " "}), "name"),
        (json!({"name": "x", "expires_in_days": 0}), "expires_in_days"),
        (json!({"name": "x", "expires_in_days": "7"}), "expires_in_days"),
        (json!({"name": "x", "scopes": "all"}), "scopes"),
        (json!({"name": "x", "scopes": []}), "scopes"),
        (
            json!({"name": "x", "scopes": ["sandbox:create", "sandbox:fly"]}),
            "scopes[1]",
        ),
        (json!({"name": "x", "role": "owner"}), "role"),
    ] {
        let answer = world.call(&tenant, "POST", "/api-keys", &body).await;
        assert_eq!(answer.refusal(), (400, "VALIDATION_ERROR", Some(field)), "{body}");
    }
    let listed = world.call(&tenant, "GET", "/api-keys", &Value::Null).await;
    assert_eq!(
        listed.body["api_keys"].as_array().map(Vec::len),
        Some(1),
        "nothing was made"
    );
}

#[tokio::test]
async fn health_needs_no_key_and_readiness_needs_a_node() {
    let world = world().await;
    let health = world
        .send(Request::get("/health").body(Body::empty()).expect("a request"))
        .await;
    assert_eq!(health.status, StatusCode::OK);
    assert_eq!(
        (&health.body["status"], &health.body["database"]),
        (&json!("ok"), &json!("ok"))
    );
    let response = world
        .router
        .clone()
        .oneshot(Request::get("/ready").body(Body::empty()).expect("a request"))
        .await
        .expect("an answer");
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
}
