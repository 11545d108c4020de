//! Sandboxes, as far as nothing has to run.

use super::*;

#[tokio::test]
async fn a_creation_without_a_node_leaves_nothing() {
    let world = world().await;
    let tenant = world.tenant("a@b").await;
    for (path, body) in [
        ("/sandbox/create", Value::Null),
        ("/sandbox/create", json!({})),
        ("/sandbox", json!({"cpus": "1"})),
    ] {
        let answer = world.call(&tenant, "POST", path, &body).await;
        assert_eq!(answer.refusal(), (503, "UNAVAILABLE", None), "{path}");
    }
    let listed = world
        .call(&tenant, "GET", "/sandboxes?status=all", &Value::Null)
        .await;
    assert_eq!(listed.body, json!({"sandboxes": []}));
}

#[tokio::test]
async fn a_bad_creation_names_the_field_and_leaves_nothing() {
    let world = world().await;
    let tenant = world.tenant("a@b").await;
    for (body, field) in [
        (json!({"cpus": 2}), "cpus"),
        (json!({"colour": "red"}), "colour"),
        (json!({"timeout_seconds": 5}), "timeout_seconds"),
        (json!({"template": "nothing"}), "template"),
        (json!({"template_id": "base"}), "template_id"),
        (json!({"network": "none"}), "network"),
        (json!({"network": {"mode": "sometimes"}}), "network.mode"),
        (
            json!({"network": {"mode": "allowlist", "allowed_domains": ["ok.test", "*.*"]}}),
            "network.allowed_domains[1]",
        ),
        (
            json!({"network": {"mode": "allowlist", "allowed_cidrs": ["10.0.0.0/8"]}}),
            "network.allowed_cidrs[0]",
        ),
        (
            json!({"network": {"mode": "allow_all", "allowed_ports": [0]}}),
            "network.allowed_ports[0]",
        ),
    ] {
        let answer = world.call(&tenant, "POST", "/sandbox/create", &body).await;
        assert_eq!(answer.refusal(), (400, "VALIDATION_ERROR", Some(field)), "{body}");
    }
    let gvisor = world
        .call(
            &tenant,
            "POST",
            "/sandbox/create",
            &json!({"isolation": "gvisor"}),
        )
        .await;
    assert_eq!(
        gvisor.refusal(),
        (400, "UNSUPPORTED_ISOLATION", Some("isolation"))
    );
    let listed = world
        .call(&tenant, "GET", "/sandboxes?status=all", &Value::Null)
        .await;
    assert_eq!(listed.body, json!({"sandboxes": []}));
}

#[tokio::test]
async fn a_sandbox_is_shown_with_everything_that_published_clients_need() {
    let world = world().await;
    let tenant = world.tenant("a@b").await;
    let id = world.stored_sandbox(&tenant).await;
    let shown = world
        .call(&tenant, "GET", &format!("/sandbox/{id}"), &Value::Null)
        .await;
    assert_eq!(shown.status, StatusCode::OK);
    for field in [
        "sandbox_id",
        "org_id",
        "session_id",
        "status",
        "created_at",
        "expires_at",
        "cpus",
        "memory",
    ] {
        assert!(shown.body[field].is_string(), "{field}: {}", shown.body);
    }
    assert_eq!(
        (&shown.body["status"], &shown.body["cpus"]),
        (&json!("running"), &json!("500m"))
    );
    assert!(
        shown
            .body
            .as_object()
            .is_some_and(|body| body["pod_ip"].is_null())
    );
    assert!(
        shown.body["created_at"]
            .as_str()
            .is_some_and(|time| time.ends_with('Z') && time.contains('T'))
    );

    let status = world
        .call(&tenant, "GET", &format!("/sandbox/{id}/status"), &Value::Null)
        .await
        .body;
    assert_eq!(
        (&status["sandbox_id"], &status["status"]),
        (&json!(id), &json!("running"))
    );
    assert!(status["expires_at"].is_string() && status["max_expires_at"].is_string());
    assert_eq!(
        (
            &status["max_lifetime_seconds"],
            &status["remaining_extend_seconds"]
        ),
        (&json!(86_400), &json!(85_800))
    );
    assert!(
        status["lifetime_used_percent"]
            .as_f64()
            .is_some_and(|percent| (0.0..5.0).contains(&percent))
    );

    let listed = world.call(&tenant, "GET", "/sandboxes", &Value::Null).await.body;
    assert_eq!(listed["sandboxes"], json!([shown.body]));
}

#[tokio::test]
async fn a_foreign_sandbox_does_not_exist() {
    let world = world().await;
    let owner = world.tenant("a@b").await;
    let stranger = world.tenant("c@d").await;
    let id = world.stored_sandbox(&owner).await;
    let policy = json!({"mode": "deny_all"});
    for (method, path, body) in [
        ("GET", "", Value::Null),
        ("DELETE", "", Value::Null),
        ("GET", "/status", Value::Null),
        ("POST", "/stop", Value::Null),
        ("POST", "/execute", json!({"command": "true"})),
        ("POST", "/execute", json!({"command": "true", "stream": true})),
        ("POST", "/files", json!({"path": "/workspace/a", "content": ""})),
        ("GET", "/files?path=/workspace/a", Value::Null),
        ("GET", "/files/list", Value::Null),
        ("GET", "/files/download?path=/workspace/a", Value::Null),
        ("GET", "/network", Value::Null),
        ("PUT", "/network", policy.clone()),
        ("PATCH", "/network", policy.clone()),
        ("GET", "/network/doctor", Value::Null),
    ] {
        for id in [
            id.as_str(),
            "sandbox-0000000000000000",
            "x",
            "..%2Fx",
            "SANDBOX-1",
        ] {
            let answer = world
                .call(&stranger, method, &format!("/sandbox/{id}{path}"), &body)
                .await;
            assert_eq!(
                answer.refusal(),
                (404, "SANDBOX_NOT_FOUND", None),
                "{method} {id}{path}"
            );
        }
    }
    let listed = world
        .call(&stranger, "GET", "/sandboxes?status=all", &Value::Null)
        .await;
    assert_eq!(listed.body, json!({"sandboxes": []}));
    let shown = world
        .call(&owner, "GET", &format!("/sandbox/{id}"), &Value::Null)
        .await;
    assert_eq!(shown.body["status"], "running");
}

#[tokio::test]
async fn an_ended_sandbox_can_be_stopped_and_deleted_again_and_runs_nothing() {
    let world = world().await;
    let tenant = world.tenant("a@b").await;
    let id = world.stored_sandbox(&tenant).await;
    world.store.withdraw(&id).await.expect("withdrawn");
    let ended = sandgate_api::rest::SandboxStatus::Terminated;
    world
        .store
        .finish(&id, ended, Some("stopped on request"), Timestamp::now())
        .await
        .expect("finished");
    for _ in 0..2 {
        let stopped = world
            .call(&tenant, "POST", &format!("/sandbox/{id}/stop"), &Value::Null)
            .await;
        assert_eq!(stopped.body, json!({"success": true}));
    }
    let shown = world
        .call(&tenant, "GET", &format!("/sandbox/{id}"), &Value::Null)
        .await;
    assert_eq!(shown.body["status"], "terminated");
    for (path, body) in [
        ("execute", json!({"command": "true"})),
        ("files", json!({"path": "/a", "content": ""})),
    ] {
        let answer = world
            .call(&tenant, "POST", &format!("/sandbox/{id}/{path}"), &body)
            .await;
        assert_eq!(answer.refusal(), (409, "CONFLICT", None), "{path}");
    }
    let path = format!("/sandbox/{id}/network/doctor");
    let examined = world.call(&tenant, "GET", &path, &Value::Null).await;
    assert_eq!(examined.refusal(), (409, "CONFLICT", None));
    for _ in 0..2 {
        let deleted = world
            .call(&tenant, "DELETE", &format!("/sandbox/{id}"), &Value::Null)
            .await;
        assert_eq!(deleted.body, json!({"success": true}));
    }
    let shown = world
        .call(&tenant, "GET", &format!("/sandbox/{id}"), &Value::Null)
        .await;
    assert_eq!(shown.refusal(), (404, "SANDBOX_NOT_FOUND", None));
}

#[tokio::test]
async fn what_is_asked_of_a_sandbox_is_checked_before_it_is_reached() {
    let world = world().await;
    let tenant = world.tenant("a@b").await;
    let id = world.stored_sandbox(&tenant).await;
    for (method, path, body, field) in [
        ("POST", "execute", Value::Null, "command"),
        ("POST", "execute", json!({"command": "x", "shell": true}), "shell"),
        ("POST", "files", Value::Null, "files"),
        (
            "POST",
            "files",
            json!({"files": [{"path": "/workspace/../etc/x", "content": ""}]}),
            "files[0].path",
        ),
        ("GET", "files", Value::Null, "path"),
        ("GET", "files?path=relative", Value::Null, "path"),
        ("GET", "files?path=/workspace/../etc/passwd", Value::Null, "path"),
        (
            "GET",
            "files?path=/workspace/%2e%2e/etc/passwd",
            Value::Null,
            "path",
        ),
        ("GET", "files/list?path=/..", Value::Null, "path"),
        ("GET", "files/list?recursive=perhaps", Value::Null, "recursive"),
        ("GET", "files/download", Value::Null, "path"),
        ("POST", "files/upload?path=a", Value::Null, "path"),
        ("GET", "files/watch?path=a", Value::Null, "path"),
        ("GET", "files/watch?recursive=2", Value::Null, "recursive"),
        ("GET", "files/raw", Value::Null, "path"),
        ("PUT", "files/raw?path=a", Value::Null, "path"),
        ("PUT", "files/raw?path=/a/", Value::Null, "path"),
        ("PUT", "files/raw?path=/a&mode=4755", Value::Null, "mode"),
        ("DELETE", "files", Value::Null, "path"),
        ("DELETE", "files", json!({"path": "/a/../b"}), "path"),
        (
            "DELETE",
            "files",
            json!({"path": "/a", "recursive": 1}),
            "recursive",
        ),
        (
            "DELETE",
            "files?path=/a&recursive=perhaps",
            Value::Null,
            "recursive",
        ),
        ("POST", "files/glob", Value::Null, "pattern"),
        ("POST", "files/glob", json!({"pattern": "../*"}), "pattern"),
        ("POST", "files/glob", json!({"pattern": "*", "path": "a"}), "path"),
        ("POST", "files/mkdir", Value::Null, "path"),
        ("POST", "files/mkdir", json!({"path": "a"}), "path"),
        (
            "POST",
            "files/mkdir",
            json!({"path": "/a", "parents": true}),
            "parents",
        ),
        ("POST", "files/move", json!({"source": "/a"}), "destination"),
        (
            "POST",
            "files/move",
            json!({"source": "a", "destination": "/b"}),
            "source",
        ),
        (
            "POST",
            "files/copy",
            json!({"source": "/a", "destination": "/../b"}),
            "destination",
        ),
    ] {
        let answer = world
            .call(&tenant, method, &format!("/sandbox/{id}/{path}"), &body)
            .await;
        assert_eq!(
            answer.refusal(),
            (400, "VALIDATION_ERROR", Some(field)),
            "{method} {path} {body}"
        );
    }
}

#[tokio::test]
async fn lists_are_paged() {
    let world = world().await;
    let tenant = world.tenant("a@b").await;
    for _ in 0..3 {
        world.stored_sandbox(&tenant).await;
    }
    let first = world
        .call(&tenant, "GET", "/sandboxes?limit=2", &Value::Null)
        .await
        .body;
    assert_eq!(first["sandboxes"].as_array().map(Vec::len), Some(2));
    let cursor = first["next_cursor"].as_str().expect("a cursor");
    let second = world
        .call(
            &tenant,
            "GET",
            &format!("/sandboxes?limit=2&cursor={cursor}"),
            &Value::Null,
        )
        .await
        .body;
    assert_eq!(second["sandboxes"].as_array().map(Vec::len), Some(1));
    assert!(second.get("next_cursor").is_none());
    for (query, field) in [
        ("limit=0", "limit"),
        ("cursor=x", "cursor"),
        ("status=stopped", "status"),
    ] {
        let answer = world
            .call(&tenant, "GET", &format!("/sandboxes?{query}"), &Value::Null)
            .await;
        assert_eq!(
            answer.refusal(),
            (400, "VALIDATION_ERROR", Some(field)),
            "{query}"
        );
    }
}

#[tokio::test]
async fn the_pools_numbers_are_those_that_published_clients_need() {
    let world = world().await;
    let tenant = world.tenant("a@b").await;
    let stats = world.call(&tenant, "GET", "/pool/stats", &Value::Null).await;
    assert_eq!(stats.status, StatusCode::OK);
    assert_eq!(
        stats.body,
        json!({
            "total": 0, "ready": 0, "creating": 0,
            "enabled": false, "size": 5, "hits": 0, "misses": 0, "hit_rate": 0.0,
        })
    );
    let request = Request::get("/api/v1/pool/stats").body(Body::empty());
    let answer = world.send(request.expect("a request")).await;
    assert_eq!(answer.refusal().0, 401);
}
