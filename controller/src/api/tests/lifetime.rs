//! Lifetimes, sessions, notes and pauses, as far as nothing has to run.

use super::*;
use crate::store::samples;

impl World {
    /// A sandbox that the store says is running, made with these terms a moment ago for a minute.
    async fn stored_with(&self, tenant: &Tenant, terms: Terms) -> SandboxId {
        let new = NewSandbox {
            terms,
            ..samples::sandbox(&tenant.org, None)
        };
        let id = self.store.insert_sandbox(&new, 99).await.expect("inserted").id;
        self.store.mark_running(&id).await.expect("running");
        id
    }

    async fn get(&self, tenant: &Tenant, path: &str) -> Value {
        let answer = self.call(tenant, "GET", path, &Value::Null).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.body);
        answer.body
    }
}

fn time(value: &Value) -> Timestamp {
    value.as_str().expect("a text").parse().expect("a time")
}

#[tokio::test]
async fn an_extension_moves_the_end_up_to_the_longest_life() {
    let settings = Settings {
        max_lifetime: Some("600".to_owned()),
        default_timeout: Some("600".to_owned()),
        ..Settings::default()
    };
    let world = world_with(settings).await;
    let tenant = world.tenant("a@b").await;
    let id = world.stored_with(&tenant, Terms::default()).await;
    let path = format!("/sandbox/{id}/extend");
    let before = time(&world.get(&tenant, &format!("/sandbox/{id}")).await["expires_at"]);
    let extended = world
        .call(&tenant, "POST", &path, &json!({"additional_seconds": 500}))
        .await;
    assert_eq!(extended.status, StatusCode::OK, "{}", extended.body);
    assert_eq!(
        time(&extended.body["expires_at"]),
        before + SignedDuration::from_secs(500)
    );
    let status = world.get(&tenant, &format!("/sandbox/{id}/status")).await;
    assert_eq!(status["expires_at"], extended.body["expires_at"]);
    assert_eq!(
        (
            &status["max_lifetime_seconds"],
            &status["remaining_extend_seconds"]
        ),
        (&json!(600), &json!(40))
    );
    let beyond = world
        .call(&tenant, "POST", &path, &json!({"additional_seconds": 41}))
        .await;
    assert_eq!(beyond.refusal(), (409, "CONFLICT", None));
    let message = beyond.body["error"]["message"].as_str().expect("a message");
    assert!(message.contains("40 seconds more"), "{message}");
    for (body, field) in [
        (json!({}), "additional_seconds"),
        (json!({"additional_seconds": 0}), "additional_seconds"),
        (json!({"additional_seconds": "60"}), "additional_seconds"),
        (json!({"additional_seconds": 601}), "additional_seconds"),
        (json!({"additional_seconds": 60, "seconds": 1}), "seconds"),
    ] {
        let answer = world.call(&tenant, "POST", &path, &body).await;
        assert_eq!(answer.refusal(), (400, "VALIDATION_ERROR", Some(field)), "{body}");
    }
    let too_long = world
        .call(
            &tenant,
            "POST",
            "/sandbox/create",
            &json!({"timeout_seconds": 601}),
        )
        .await;
    assert_eq!(too_long.refusal().2, Some("timeout_seconds"));
}

#[tokio::test]
async fn what_is_asked_of_foreign_or_ended_sandboxes_changes_nothing() {
    let world = world().await;
    let (owner, stranger) = (world.tenant("a@b").await, world.tenant("c@d").await);
    let id = world.stored_with(&owner, Terms::default()).await;
    let body = json!({"additional_seconds": 60});
    for (what, body) in [
        ("extend", &body),
        ("pause", &Value::Null),
        ("resume", &Value::Null),
    ] {
        let answer = world
            .call(&stranger, "POST", &format!("/sandbox/{id}/{what}"), body)
            .await;
        assert_eq!(answer.refusal(), (404, "SANDBOX_NOT_FOUND", None), "{what}");
    }
    world.store.withdraw(&id).await.expect("withdrawn");
    let answer = world
        .call(&owner, "POST", &format!("/sandbox/{id}/extend"), &body)
        .await;
    assert_eq!(answer.refusal(), (409, "CONFLICT", None));
}

#[tokio::test]
async fn a_sessions_sandbox_is_given_again_and_lives_longer() {
    let world = world().await;
    let (tenant, other) = (world.tenant("a@b").await, world.tenant("c@d").await);
    let terms = Terms {
        session_key: Some("thread 7".to_owned()),
        ..Terms::default()
    };
    let id = world.stored_with(&tenant, terms).await;
    let before = time(&world.get(&tenant, &format!("/sandbox/{id}")).await["expires_at"]);
    // There is no node, so a new one could not be made.
    let body = json!({"session_key": "thread 7", "timeout_seconds": 300, "cpus": "7"});
    let again = world.call(&tenant, "POST", "/sandbox/create", &body).await;
    assert_eq!(again.status, StatusCode::OK, "{}", again.body);
    assert_eq!(
        (
            &again.body["sandbox_id"],
            &again.body["reused"],
            &again.body["cpus"]
        ),
        (&json!(id), &json!(true), &json!("500m"))
    );
    assert!(time(&again.body["expires_at"]) >= before + SignedDuration::from_secs(200));
    let shorter = json!({"session_key": "thread 7", "timeout_seconds": 60});
    let shorter = world.call(&tenant, "POST", "/sandbox/create", &shorter).await;
    assert_eq!(
        shorter.body["expires_at"], again.body["expires_at"],
        "no life gets shorter"
    );
    for (who, key) in [(&tenant, "thread 8"), (&other, "thread 7")] {
        let body = json!({"session_key": key});
        let answer = world.call(who, "POST", "/sandbox/create", &body).await;
        assert_eq!(answer.refusal(), (503, "UNAVAILABLE", None), "{key}");
    }
    world.store.withdraw(&id).await.expect("withdrawn");
    let answer = world.call(&tenant, "POST", "/sandbox/create", &body).await;
    assert_eq!(
        answer.refusal(),
        (503, "UNAVAILABLE", None),
        "a new one is wanted"
    );
}

#[tokio::test]
async fn a_list_can_be_of_those_with_a_note() {
    let world = world().await;
    let tenant = world.tenant("a@b").await;
    let noted = |owner: &str, team: &str| Terms {
        metadata: BTreeMap::from([
            ("owner".to_owned(), owner.to_owned()),
            ("team".to_owned(), team.to_owned()),
        ]),
        ..Terms::default()
    };
    let one = world.stored_with(&tenant, noted("ada", "a b")).await;
    let two = world.stored_with(&tenant, noted("ada", "c")).await;
    world.stored_with(&tenant, noted("bob", "c")).await;
    world.stored_with(&tenant, Terms::default()).await;
    let listed = async |query: &str| {
        let list = world.get(&tenant, &format!("/sandboxes?{query}")).await;
        let ids: Vec<Value> = list["sandboxes"]
            .as_array()
            .expect("a list")
            .iter()
            .map(|sandbox| sandbox["sandbox_id"].clone())
            .collect();
        (ids, list["next_cursor"].as_str().map(str::to_owned))
    };
    assert_eq!(listed("limit=9").await.0.len(), 4);
    assert_eq!(
        listed("metadata.owner=ada").await,
        (vec![json!(two), json!(one)], None)
    );
    assert_eq!(
        listed("metadata.owner=ada&metadata.team=a%20b").await.0,
        [json!(one)]
    );
    assert!(listed("metadata.owner=eve").await.0.is_empty());
    assert!(listed("metadata.nobody=ada").await.0.is_empty());
    let (first, cursor) = listed("metadata.owner=ada&limit=1").await;
    assert_eq!(first, [json!(two)]);
    let rest = format!("metadata.owner=ada&limit=1&cursor={}", cursor.expect("more"));
    assert_eq!(listed(&rest).await.0, [json!(one)]);
    let shown = world.get(&tenant, &format!("/sandbox/{one}")).await;
    assert_eq!(shown["metadata"], json!({"owner": "ada", "team": "a b"}));
}

#[tokio::test]
async fn a_paused_sandbox_is_shown_and_does_nothing_before_it_is_resumed() {
    let world = world().await;
    let tenant = world.tenant("a@b").await;
    let id = world.stored_with(&tenant, Terms::default()).await;
    assert!(world.store.mark_paused(&id, true).await.expect("marked"));
    let shown = world.get(&tenant, &format!("/sandbox/{id}")).await;
    assert_eq!(
        (&shown["status"], &shown["paused"]),
        (&json!("running"), &json!(true))
    );
    for (method, path, body) in [
        ("POST", "execute", json!({"command": "true"})),
        ("POST", "files", json!({"path": "/a", "content": ""})),
        ("GET", "files?path=/a", Value::Null),
        ("POST", "tunnels", json!({"port": 8000})),
    ] {
        let answer = world
            .call(&tenant, method, &format!("/sandbox/{id}/{path}"), &body)
            .await;
        assert_eq!(answer.refusal(), (409, "CONFLICT", None), "{path}");
        let message = answer.body["error"]["message"].as_str().expect("a message");
        assert!(message.contains("paused"), "{message}");
    }
    // Its lifetime goes on, and can be extended; without a node nothing can be frozen.
    let body = json!({"additional_seconds": 60});
    let extended = world
        .call(&tenant, "POST", &format!("/sandbox/{id}/extend"), &body)
        .await;
    assert_eq!(extended.status, StatusCode::OK, "{}", extended.body);
    let resumed = world
        .call(&tenant, "POST", &format!("/sandbox/{id}/resume"), &Value::Null)
        .await;
    assert_eq!(resumed.refusal(), (503, "UNAVAILABLE", None));
    world.store.withdraw(&id).await.expect("withdrawn");
    assert!(!world.store.mark_paused(&id, false).await.expect("asked"));
}
