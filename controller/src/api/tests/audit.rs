//! The audit as it is followed and verified.

use std::time::Duration;

use http_body_util::BodyExt as _;
use sandgate_api::audit::{AlertKind, AuditEvent};

use super::*;

/// Longest wait for what happens at once.
const SOON: Duration = Duration::from_secs(60);

fn event(tenant: &Tenant, number: u32, verdict: &str) -> AuditEvent {
    serde_json::from_value(json!({
        "id": format!("event-{number}"), "time": "2026-01-30T10:00:00Z", "org_id": tenant.org, "sandbox_id": "sandbox-1",
        "verdict": verdict, "reason": "default_deny", "protocol": "tls", "host": format!("n{number}.test")
    }))
    .expect("an event")
}

/// A stream that is being read.
struct Stream {
    body: Body,
    text: String,
}

impl Stream {
    async fn open(world: &World, tenant: &Tenant, query: &str, last: Option<&str>) -> Self {
        let mut request =
            Request::get(format!("/api/v1/egress/audit/stream?{query}")).header("x-api-key", &tenant.key);
        if let Some(last) = last {
            request = request.header("last-event-id", last);
        }
        let request = request.body(Body::empty()).expect("a request");
        let answer = world.router.clone().oneshot(request).await.expect("an answer");
        assert_eq!(answer.status(), StatusCode::OK);
        assert_eq!(answer.headers()["content-type"], "text/event-stream");
        Self {
            body: answer.into_body(),
            text: String::new(),
        }
    }

    /// The next event: its id (or its name, where it has no id), and the record's id.
    async fn next(&mut self) -> (String, String) {
        loop {
            if let Some((block, rest)) = self.text.split_once("\n\n") {
                let (block, rest) = (block.to_owned(), rest.to_owned());
                self.text = rest;
                let Some((id, data)) = block.split_once('\n') else {
                    continue;
                };
                let data = data.strip_prefix("data: ").expect("one line of data");
                let data: Value = serde_json::from_str(data).expect("JSON");
                return (
                    id.strip_prefix("id: ").unwrap_or(id).to_owned(),
                    data["id"].as_str().expect("an id").to_owned(),
                );
            }
            let frame = tokio::time::timeout(SOON, self.body.frame())
                .await
                .expect("in time");
            let bytes = frame.expect("more").expect("a frame").into_data().expect("data");
            self.text.push_str(std::str::from_utf8(&bytes).expect("text"));
        }
    }
}

async fn store(world: &World, events: &[AuditEvent]) {
    world
        .store
        .insert_audit(world.broker.chain(), events)
        .await
        .expect("stored");
}

#[tokio::test]
async fn a_stream_replays_from_its_cursor_and_then_follows() {
    let world = world().await;
    let (tenant, stranger) = (world.tenant("a@b").await, world.tenant("c@d").await);
    let first: Vec<_> = (0..500).map(|number| event(&tenant, number, "deny")).collect();
    store(&world, &first).await;
    let mut from_now = Stream::open(&world, &tenant, "", None).await;
    let mut all = Stream::open(&world, &tenant, "since=0", None).await;
    let mut cursor = String::new();
    for number in 0..500 {
        let (id, record) = all.next().await;
        assert_eq!(record, format!("event-{number}"));
        if number == 400 {
            cursor = id;
        }
    }
    store(
        &world,
        &[event(&stranger, 600, "deny"), event(&tenant, 500, "allow")],
    )
    .await;
    assert_eq!(all.next().await.1, "event-500");
    assert_eq!(from_now.next().await.1, "event-500");
    let mut resumed = Stream::open(&world, &tenant, &format!("cursor={cursor}"), None).await;
    assert_eq!(resumed.next().await.1, "event-401");
    let mut header = Stream::open(&world, &tenant, "decision=allow", Some(&cursor)).await;
    assert_eq!(header.next().await.1, "event-500");
}

#[tokio::test]
async fn streams_at_once_are_counted_by_organisation() {
    let world = world().await;
    let (tenant, stranger) = (world.tenant("a@b").await, world.tenant("c@d").await);
    let mut streams = Vec::new();
    for _ in 0..16 {
        streams.push(Stream::open(&world, &tenant, "", None).await);
    }
    let another = || Request::get("/api/v1/egress/audit/stream").header("x-api-key", &tenant.key);
    let request = another().body(Body::empty()).expect("a request");
    let refusal = world.send(request).await;
    assert_eq!(refusal.refusal(), (429, "RATE_LIMITED", None));
    let message = refusal.body["error"]["message"].as_str().unwrap_or_default();
    assert!(message.contains("16 streams"), "{message}");
    assert!(refusal.headers.contains_key("retry-after"));
    // What is wrong is said before, and others have places of their own.
    let request = another().header("last-event-id", "x");
    let request = request.body(Body::empty()).expect("a request");
    assert_eq!(world.send(request).await.status, StatusCode::BAD_REQUEST);
    let mut other = Stream::open(&world, &stranger, "", None).await;
    streams.pop();
    let mut again = Stream::open(&world, &tenant, "", None).await;
    store(&world, &[event(&tenant, 1, "deny"), event(&stranger, 2, "deny")]).await;
    assert_eq!(again.next().await.1, "event-1");
    assert_eq!(other.next().await.1, "event-2");
}

#[tokio::test]
async fn a_gap_shows_what_the_chain_ended_with_before_it() {
    let world = world().await;
    let tenant = world.tenant("a@b").await;
    store(&world, &[event(&tenant, 0, "deny"), event(&tenant, 1, "deny")]).await;
    let verify = async || {
        let answer = world
            .call(&tenant, "GET", "/egress/audit/verify", &Value::Null)
            .await;
        assert_eq!(answer.body["verified"], true, "{}", answer.body);
        answer.body
    };
    let before = verify().await;
    let mut gap = serde_json::to_value(event(&tenant, 2, "deny")).expect("JSON");
    gap["gap"] = json!({});
    store(&world, &[serde_json::from_value(gap).expect("a record")]).await;
    let stored = world
        .call(&tenant, "GET", "/egress/audit?limit=2", &Value::Null)
        .await;
    let events = &stored.body["events"];
    assert_eq!(
        events[0]["gap"],
        json!({ "position": before["position"], "mac": before["mac"] })
    );
    assert_eq!(before["position"], 2);
    assert!(events[1].get("gap").is_none(), "{events}");
    assert_eq!(verify().await["position"], 3);
}

#[tokio::test]
async fn alerts_are_found_and_come_with_an_event_of_their_own() {
    let world = world().await;
    let tenant = world.tenant("a@b").await;
    let mut alert = event(&tenant, 1, "deny");
    alert.alert = Some(AlertKind::Scanning);
    store(
        &world,
        &[event(&tenant, 0, "deny"), alert, event(&tenant, 2, "deny")],
    )
    .await;
    for (query, found) in [
        ("", vec!["event-2", "event-1", "event-0"]),
        ("?alert=any", vec!["event-1"]),
        ("?alert=scanning", vec!["event-1"]),
        ("?alert=quota_exceeded", vec![]),
        ("?alert=scanning&decision=allow", vec![]),
    ] {
        let path = format!("/egress/audit{query}");
        let page = world.call(&tenant, "GET", &path, &Value::Null).await.body;
        let events = page["events"].as_array().expect("events");
        let ids: Vec<&str> = events.iter().filter_map(|event| event["id"].as_str()).collect();
        assert_eq!(ids, found, "{query}");
        for event in events {
            let kind = (event["id"] == "event-1").then(|| json!("scanning"));
            assert_eq!(event.get("alert"), kind.as_ref(), "{event}");
        }
    }
    let verified = world
        .call(&tenant, "GET", "/egress/audit/verify", &Value::Null)
        .await
        .body;
    assert_eq!(verified["verified"], true, "{verified}");

    let mut stream = Stream::open(&world, &tenant, "since=0", None).await;
    assert_eq!(stream.next().await.1, "event-0");
    assert_eq!(
        stream.next().await,
        ("event: security.alert".to_owned(), "event-1".to_owned())
    );
    let (position, record) = stream.next().await;
    assert_eq!(record, "event-1");
    assert_eq!(stream.next().await.1, "event-2");
    let mut only = Stream::open(&world, &tenant, "since=0&alert=any", None).await;
    assert_eq!(only.next().await.0, "event: security.alert");
    assert_eq!(only.next().await, (position, "event-1".to_owned()));
}

#[tokio::test]
async fn a_position_that_is_none_is_refused() {
    let world = world().await;
    let tenant = world.tenant("a@b").await;
    for last in ["x", "-1", "", "1.5"] {
        let request = Request::get("/api/v1/egress/audit/stream")
            .header("x-api-key", &tenant.key)
            .header("last-event-id", last)
            .body(Body::empty())
            .expect("a request");
        let refusal = world.send(request).await;
        assert_eq!(
            refusal.refusal(),
            (400, "VALIDATION_ERROR", Some("last-event-id")),
            "{last:?}"
        );
    }
}

#[tokio::test]
async fn verification_tells_what_was_found() {
    let world = world().await;
    let tenant = world.tenant("a@b").await;
    let none = world
        .call(&tenant, "GET", "/egress/audit/verify", &Value::Null)
        .await;
    assert_eq!(
        (&none.body["verified"], &none.body["records"]),
        (&json!(true), &json!(0))
    );
    store(&world, &[event(&tenant, 0, "deny"), event(&tenant, 1, "allow")]).await;
    let found = world
        .call(&tenant, "GET", "/egress/audit/verify", &Value::Null)
        .await
        .body;
    assert_eq!(
        (
            &found["verified"],
            &found["records"],
            &found["position"],
            &found["problem"]
        ),
        (&json!(true), &json!(2), &json!(2), &Value::Null),
        "{found}"
    );
    assert_eq!(found["mac"].as_str().map(str::len), Some(64));
}
