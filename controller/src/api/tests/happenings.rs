//! The stream of events, as far as nothing has to run.

use std::time::Duration;

use http_body_util::BodyExt as _;
use sandgate_api::rest::{EventDetails, EventKind};

use super::*;
use crate::store::Happening;

/// How long something that must come may take.
const LIMIT: Duration = Duration::from_secs(30);

struct Stream(Body, String);

impl World {
    async fn happens(&self, tenant: &Tenant, kind: EventKind) {
        let happening = Happening {
            org_id: tenant.org.clone(),
            sandbox_id: SandboxId::random(),
            kind,
            time: Timestamp::now(),
            details: EventDetails {
                reason: Some("a\u{2028}b".to_owned()),
                ..EventDetails::default()
            },
        };
        self.store.add_events(&[happening]).await.expect("stored");
    }

    async fn open(&self, tenant: &Tenant, query: &str, last: Option<&str>) -> Stream {
        let mut request = Request::get(format!("/api/v1/events/stream{query}"))
            .header("authorization", format!("Bearer {}", tenant.key));
        if let Some(last) = last {
            request = request.header("last-event-id", last);
        }
        let request = request.body(Body::empty()).expect("a request");
        let response = self.router.clone().oneshot(request).await.expect("an answer");
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        Stream(response.into_body(), String::new())
    }
}

impl Stream {
    /// Kind, id and data of the next event.
    async fn next(&mut self) -> (String, i64, Value) {
        loop {
            if let Some(end) = self.1.find("\n\n") {
                let block: String = self.1.drain(..end + 2).collect();
                let lines: Vec<&str> = block.trim_end().split('\n').collect();
                let [kind, id, data] = lines[..] else { continue };
                let kind = kind.strip_prefix("event: ").expect("a kind").to_owned();
                let id = id
                    .strip_prefix("id: ")
                    .expect("an id")
                    .parse()
                    .expect("a position");
                let data = data.strip_prefix("data: ").expect("data");
                return (kind, id, serde_json::from_str(data).expect("JSON"));
            }
            let frame = tokio::time::timeout(LIMIT, self.0.frame())
                .await
                .expect("in time");
            let bytes = frame
                .expect("a frame")
                .expect("a frame")
                .into_data()
                .expect("data");
            self.1.push_str(std::str::from_utf8(&bytes).expect("text"));
        }
    }
}

#[tokio::test]
async fn what_happens_is_told_to_its_organisation_and_what_was_missed_comes_first() {
    let world = world().await;
    let (tenant, other) = (world.tenant("a@b").await, world.tenant("c@d").await);
    world.happens(&tenant, EventKind::SandboxCreated).await;
    let mut from_now = world.open(&tenant, "", None).await;
    world.happens(&other, EventKind::SandboxError).await;
    world.happens(&tenant, EventKind::SandboxReady).await;
    let (kind, ready, data) = from_now.next().await;
    assert_eq!(kind, "sandbox.ready");
    assert_eq!(
        (&data["type"], &data["id"], &data["org_id"]),
        (
            &json!("sandbox.ready"),
            &json!(ready.to_string()),
            &json!(tenant.org)
        )
    );
    assert_eq!(data["data"], json!({"reason": "a\u{2028}b"}));
    world.happens(&tenant, EventKind::CommandFailed).await;
    assert_eq!(from_now.next().await.0, "command.failed");
    // Everything again, by either way of saying where to begin; the header wins.
    for (query, last) in [("?lastEventId=0", None), ("?lastEventId=9999", Some("0"))] {
        let mut again = world.open(&tenant, query, last).await;
        let mut kinds = Vec::new();
        for _ in 0..3 {
            kinds.push(again.next().await.0);
        }
        assert_eq!(kinds, ["sandbox.created", "sandbox.ready", "command.failed"]);
    }
    let mut rest = world.open(&tenant, &format!("?lastEventId={ready}"), None).await;
    assert_eq!(rest.next().await.0, "command.failed");
    for (query, field) in [
        ("?lastEventId=x", "lastEventId"),
        ("?lastEventId=-1", "lastEventId"),
    ] {
        let answer = world
            .call(&tenant, "GET", &format!("/events/stream{query}"), &Value::Null)
            .await;
        assert_eq!(
            answer.refusal(),
            (400, "VALIDATION_ERROR", Some(field)),
            "{query}"
        );
    }
}

#[tokio::test]
async fn an_organisation_follows_so_many_streams_and_no_more() {
    let world = world().await;
    let (tenant, other) = (world.tenant("a@b").await, world.tenant("c@d").await);
    let mut open = Vec::new();
    for _ in 0..16 {
        open.push(world.open(&tenant, "", None).await);
    }
    let answer = world.call(&tenant, "GET", "/events/stream", &Value::Null).await;
    assert_eq!(answer.refusal(), (429, "RATE_LIMITED", None));
    drop(world.open(&other, "", None).await);
    drop(open.pop());
    world.happens(&tenant, EventKind::SandboxStopped).await;
    let mut again = world.open(&tenant, "?lastEventId=0", None).await;
    assert_eq!(again.next().await.0, "sandbox.stopped");
}
