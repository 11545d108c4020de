//! The record of who did what.

use std::task::Poll;

use super::*;

impl World {
    async fn recorded(&self, tenant: &Tenant, query: &str) -> Vec<Value> {
        let answer = self
            .call(tenant, "GET", &format!("/audit{query}"), &Value::Null)
            .await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.body);
        answer.body["events"].as_array().expect("events").clone()
    }
}

/// What happened and how it went, oldest first.
fn told(events: &[Value]) -> Vec<String> {
    let text = |event: &Value, name: &str| event[name].as_str().expect("a text").to_owned();
    let told = events
        .iter()
        .map(|event| format!("{} {}", text(event, "action"), text(event, "outcome")));
    told.rev().collect()
}

#[tokio::test]
async fn every_change_is_on_record_when_it_is_answered_and_no_look_is() {
    let world = world().await;
    let owner = world.tenant("owner@acme.test").await;
    let stranger = world.tenant("owner@other.test").await;
    let (viewer_id, viewer) = world.user(&owner, "viewer@acme.test", "viewer").await;
    let sandbox = world.stored_sandbox(&owner).await;
    let secret = json!({"name": "TOKEN", "value": "the-value-itself"});
    for (who, method, path, body) in [
        (&owner, "GET", "/sandboxes".to_owned(), Value::Null),
        (&owner, "POST", "/secrets".to_owned(), secret.clone()),
        (&owner, "POST", "/secrets".to_owned(), secret.clone()),
        (&viewer, "POST", "/secrets".to_owned(), secret),
        (&owner, "GET", format!("/sandbox/{sandbox}/status"), Value::Null),
        (
            &owner,
            "POST",
            format!("/sandbox/{sandbox}/execute"),
            json!({"command": "echo the-command-itself"}),
        ),
        (
            &owner,
            "GET",
            format!("/sandbox/{sandbox}/files?path=/workspace/a"),
            Value::Null,
        ),
        (
            &owner,
            "POST",
            format!("/sandbox/{sandbox}/files"),
            json!({"files": [{"path": "/workspace/b", "content": "dGhlLWNvbnRlbnQ="}, {"path": "/workspace/c", "content": ""}]}),
        ),
        (&stranger, "POST", format!("/sandbox/{sandbox}/stop"), Value::Null),
    ] {
        world.call(who, method, &path, &body).await;
    }
    let events = world.recorded(&owner, "").await;
    assert_eq!(
        told(&events),
        [
            "organization.register success",
            "user.add success",
            "secret.create success",
            "secret.create failure",
            "secret.create denied",
            "command.execute failure",
            "file.read failure",
            "file.write failure",
        ]
    );
    let all = Value::from(events.clone()).to_string();
    for hidden in [
        "the-value-itself",
        "the-command-itself",
        "dGhlLWNvbnRlbnQ",
        &owner.key,
        &viewer.key,
    ] {
        assert!(!all.contains(hidden), "{hidden}: {all}");
    }
    let written = &events[0];
    for name in [
        "id",
        "timestamp",
        "sandbox_id",
        "org_id",
        "user_id",
        "session_id",
        "resource",
        "error_message",
    ] {
        assert!(written[name].is_string(), "{name}: {written}");
    }
    assert_eq!(written["sandbox_id"], sandbox.as_str());
    assert_ne!(written["session_id"], "");
    assert_eq!(written["resource"], "/workspace/b");
    assert_eq!(
        written["details"]["paths"],
        json!(["/workspace/b", "/workspace/c"])
    );
    assert!(written["duration"].is_u64() && written["details"]["request_id"].is_string());
    let denied = &events[3];
    assert_eq!(
        (&denied["user_id"], &denied["details"]["status"]),
        (&json!(viewer_id), &json!(403))
    );
    assert_eq!(
        (&denied["sandbox_id"], &denied["session_id"]),
        (&json!(""), &json!(""))
    );
    assert_eq!(denied["resource"], "/secrets");

    // The stranger's attempt is the stranger's, and says nothing of the sandbox.
    let strangers = world.recorded(&stranger, "?action=sandbox.stop").await;
    assert_eq!(told(&strangers), ["sandbox.stop failure"]);
    assert_eq!(
        (&strangers[0]["sandbox_id"], &strangers[0]["session_id"]),
        (&json!(sandbox), &json!(""))
    );
}

#[tokio::test]
async fn the_record_is_asked_in_pages_and_by_kind() {
    let world = world().await;
    let owner = world.tenant("owner@acme.test").await;
    let sandbox = world.stored_sandbox(&owner).await;
    for _ in 0..3 {
        let execute = format!("/sandbox/{sandbox}/execute");
        world
            .call(&owner, "POST", &execute, &json!({"command": "true"}))
            .await;
    }
    let file = format!("/sandbox/{sandbox}/files/download?path=/workspace/a");
    world.call(&owner, "GET", &file, &Value::Null).await;
    let page = world
        .call(
            &owner,
            "GET",
            "/audit?limit=2&offset=1&action=command.execute",
            &Value::Null,
        )
        .await;
    assert_eq!(
        (page.body["events"].as_array().map(Vec::len), &page.body["total"]),
        (Some(2), &json!(3))
    );
    let later = (Timestamp::now() + SignedDuration::from_hours(1)).as_second();
    for (query, number) in [
        (String::new(), 5),
        (format!("?sandbox_id={sandbox}"), 4),
        ("?sandbox_id=sandbox-0".to_owned(), 0),
        ("?outcome=success".to_owned(), 1),
        ("?outcome=failure".to_owned(), 4),
        (format!("?start_time={later}"), 0),
        (format!("?end_time={later}"), 5),
        ("?user_id=user-0".to_owned(), 0),
    ] {
        assert_eq!(world.recorded(&owner, &query).await.len(), number, "{query}");
    }
    for field in [
        "limit=0",
        "limit=1001",
        "offset=-1",
        "outcome=good",
        "sandbox_id=x",
        "user_id=x",
        "start_time=then",
    ] {
        let answer = world
            .call(&owner, "GET", &format!("/audit?{field}"), &Value::Null)
            .await;
        let name = field.split('=').next();
        assert_eq!(answer.refusal(), (400, "VALIDATION_ERROR", name), "{field}");
    }
    let path = format!("/sandbox/{sandbox}/audit/summary");
    let summary = world.call(&owner, "GET", &path, &Value::Null).await.body;
    for (name, number) in [
        ("total_events", 4),
        ("commands_executed", 3),
        ("files_read", 1),
        ("files_written", 0),
        ("secrets_accessed", 0),
        ("errors", 4),
    ] {
        assert_eq!(summary[name], number, "{name}: {summary}");
    }
    assert!(summary["duration"].is_u64(), "{summary}");
    let nowhere = world
        .call(&owner, "GET", "/sandbox/sandbox-0/audit/summary", &Value::Null)
        .await;
    assert_eq!(nowhere.refusal(), (404, "SANDBOX_NOT_FOUND", None));
}

#[tokio::test]
async fn what_a_client_gave_up_is_on_record_too() {
    let world = world().await;
    let owner = world.tenant("owner@acme.test").await;
    let (asked, reached) = tokio::sync::oneshot::channel();
    let mut asked = Some(asked);
    // The body never comes. That it is waited for means that the key was looked at.
    let body = futures_util::stream::poll_fn(move |_context| {
        if let Some(asked) = asked.take() {
            asked.send(()).expect("somebody waits");
        }
        Poll::<Option<Result<bytes::Bytes, std::io::Error>>>::Pending
    });
    let request = Request::post("/api/v1/secrets")
        .header("x-api-key", &owner.key)
        .body(Body::from_stream(body))
        .expect("a request");
    tokio::select! {
        _answer = world.router.clone().oneshot(request) => panic!("there is nothing to answer"),
        reached = reached => reached.expect("reached"),
    }
    // Nobody waits for it to be written, so it may take a moment.
    for _ in 0..1_000 {
        let events = world.recorded(&owner, "?action=secret.create").await;
        if !events.is_empty() {
            assert_eq!(told(&events), ["secret.create cancelled"]);
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    panic!("it is not on record");
}

#[tokio::test]
async fn an_organization_has_so_many_requests_and_is_told_how_many() {
    let world = world_with(Settings {
        rate_limit: Some("1:4".to_owned()),
        ..Settings::default()
    })
    .await;
    let owner = world.tenant("owner@acme.test").await;
    let other = world.tenant("owner@other.test").await;
    let number = |answer: &Answer, name: &str| -> u64 {
        let value = answer.headers[name].to_str().expect("text");
        value.parse().expect("a whole number")
    };
    let mut refused = None;
    for _ in 0..500 {
        let answer = world.call(&owner, "GET", "/sandboxes", &Value::Null).await;
        assert_eq!(number(&answer, "ratelimit-limit"), 4);
        if answer.status != StatusCode::OK {
            refused = Some(answer);
            break;
        }
        assert!(number(&answer, "ratelimit-remaining") < 4);
        assert!((1..=4).contains(&number(&answer, "ratelimit-reset")));
    }
    let refused = refused.expect("too many");
    assert_eq!(refused.refusal(), (429, "RATE_LIMITED", None));
    assert_eq!(
        (
            number(&refused, "retry-after"),
            number(&refused, "ratelimit-remaining")
        ),
        (1, 0)
    );
    let others = world.call(&other, "GET", "/sandboxes", &Value::Null).await;
    assert_eq!(others.status, StatusCode::OK, "everybody has their own");
}

#[tokio::test]
async fn whoever_shows_no_key_that_works_is_counted_by_address() {
    for credential in [None, Some("sk_sandbox_a.b.c"), Some("a.b.c")] {
        let world = world_with(Settings {
            peer_rate_limit: Some("1:4".to_owned()),
            ..Settings::default()
        })
        .await;
        let owner = world.tenant("owner@acme.test").await;
        let mut last = 0;
        for _ in 0..500 {
            let mut request = match credential {
                None => Request::post("/api/v1/register"),
                Some(key) => Request::get("/api/v1/sandboxes").header("x-api-key", key),
            };
            if let Some(extensions) = request.extensions_mut() {
                extensions.insert(crate::limiter::Peer::new(
                    "192.0.2.1".parse().expect("an address"),
                ));
            }
            let answer = world.send(request.body(Body::empty()).expect("a request")).await;
            last = answer.status.as_u16();
            if last == 429 {
                assert!(answer.headers.contains_key("retry-after"));
                break;
            }
        }
        assert_eq!(last, 429, "{credential:?}");
        let answer = world.call(&owner, "GET", "/sandboxes", &Value::Null).await;
        assert_eq!(
            answer.status,
            StatusCode::OK,
            "a key that works is its organization's"
        );
    }
}
