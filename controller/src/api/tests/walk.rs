//! Every route of the description, asked by those who have no business there. A route that is added is asked too.

use super::*;
use crate::api::tests::openapi::{description, example, operations};

/// What is a foreign organisation's, and must not come up anywhere.
struct Victim {
    tenant: Tenant,
    sandbox: String,
    key: String,
    user: String,
    invitation: String,
}

const SECRET: &str = "VICTIMS_TOKEN";

async fn victim(world: &World) -> Victim {
    let tenant = world.tenant("victim@victim.test").await;
    let sandbox = world.stored_sandbox(&tenant).await.to_string();
    let secret = json!({"name": SECRET, "value": "v"});
    let made = world.call(&tenant, "POST", "/secrets", &secret).await;
    assert_eq!(made.status, StatusCode::CREATED, "{}", made.body);
    let text = |value: &Value| value.as_str().expect("a text").to_owned();
    let keys = world.call(&tenant, "GET", "/api-keys", &Value::Null).await;
    let invited = world
        .call(&tenant, "POST", "/invitations", &json!({"role": "viewer"}))
        .await;
    Victim {
        sandbox,
        key: text(&keys.body["api_keys"][0]["id"]),
        user: text(&keys.body["api_keys"][0]["user_id"]),
        invitation: text(&invited.body["invitation"]["id"]),
        tenant,
    }
}

impl Victim {
    /// The path, with the victim's ids in it.
    fn fill(&self, path: &str) -> String {
        let id = [
            ("/api-keys/", self.key.as_str()),
            ("/users/", self.user.as_str()),
            ("/invitations/", self.invitation.as_str()),
            ("/v1/tunnels/", "tunnel-0123456789abcdef"),
            ("/egress/audit/", "event-0123456789abcdef"),
        ]
        .into_iter()
        .find(|(part, _)| path.contains(part))
        .map_or(self.sandbox.as_str(), |(_, id)| id);
        let mut filled = path
            .replace("{id}", id)
            .replace("{name}", SECRET)
            .replace("{tunnel}", "tunnel-0123456789abcdef")
            .replace("{sid}", "python-proc-1");
        while let Some((before, rest)) = filled.split_once('{') {
            let (_, after) = rest.split_once('}').expect("a parameter");
            filled = format!("{before}1{after}");
        }
        filled
    }

    fn marks(&self) -> [&str; 6] {
        [
            self.tenant.org.as_str(),
            &self.sandbox,
            &self.key,
            &self.user,
            SECRET,
            "victim@victim.test",
        ]
    }

    /// Everything that somebody could have changed.
    async fn state(&self, world: &World) -> Vec<Value> {
        let mut state = Vec::new();
        for path in [
            "/sandboxes",
            "/secrets",
            "/users",
            "/invitations",
            "/settings/egress",
            &format!("/sandbox/{}", self.sandbox),
            &format!("/sandbox/{}/network", self.sandbox),
        ] {
            let answer = world.call(&self.tenant, "GET", path, &Value::Null).await;
            assert_eq!(answer.status, StatusCode::OK, "{path}: {}", answer.body);
            state.push(answer.body);
        }
        let keys = world.call(&self.tenant, "GET", "/api-keys", &Value::Null).await;
        state.push(keys.body["api_keys"].as_array().map(Vec::len).into());
        state
    }
}

/// Status and text of an answer. A stream is not read: it does not end.
async fn ask(
    world: &World,
    key: Option<&str>,
    method: &str,
    path: &str,
    body: Option<&Value>,
) -> (u16, String) {
    let query = "path=/workspace/x";
    let mut request = Request::builder()
        .method(method.to_uppercase().as_str())
        .uri(format!("{path}?{query}"))
        .header("content-type", "application/json");
    if let Some(key) = key {
        request = request.header("authorization", format!("Bearer {key}"));
    }
    let body = body.map_or_else(Body::empty, |body| Body::from(body.to_string()));
    let request = request.body(body).expect("a request");
    let answer = world.router.clone().oneshot(request).await.expect("an answer");
    let (parts, body) = answer.into_parts();
    let kind = parts
        .headers
        .get("content-type")
        .map(|kind| kind.to_str().expect("text"));
    if kind.is_some_and(|kind| kind.starts_with("text/event-stream")) {
        return (parts.status.as_u16(), String::new());
    }
    let bytes = body.collect().await.expect("a body").to_bytes();
    (
        parts.status.as_u16(),
        String::from_utf8_lossy(&bytes).into_owned(),
    )
}

fn is_open(operation: &Value) -> bool {
    operation["security"] == json!([{}])
}

#[tokio::test]
async fn a_foreign_key_sees_and_changes_nothing() {
    let world = world().await;
    let victim = victim(&world).await;
    let before = victim.state(&world).await;
    let thief = world.tenant("thief@thief.test").await;
    let description = description();
    let mut operations = operations(&description);
    // The record of who did what comes first: later it shows what the thief asked for.
    operations.sort_by_key(|(path, ..)| path != "/api/v1/audit");
    for (path, method, operation) in &operations {
        let place = format!("{method} {path}");
        let filled = victim.fill(path);
        let body = example(&description, operation);
        let (status, text) = ask(&world, Some(&thief.key), method, &filled, body.as_ref()).await;
        // Some are not there without a node. They come so far with nothing of anybody else's.
        let waits = !path.contains('{') && status == 503;
        assert!(status < 500 || waits, "{place}: {status} {text}");
        assert_ne!(status, 401, "{place}: the key works");
        if path.contains('{') {
            assert!((400..500).contains(&status), "{place}: {status} {text}");
            // A WebSocket may first say that the request is no upgrade to one.
            let upgrades = operation["responses"]["101"].is_object();
            if !upgrades && (method == "get" || method == "delete") {
                assert_eq!(status, 404, "{place}: {text}");
            }
        }
        for mark in victim.marks() {
            assert!(filled.contains(mark) || !text.contains(mark), "{place}: {text}");
        }
    }
    assert!(operations.len() > 50, "{} were asked", operations.len());
    assert_eq!(victim.state(&world).await, before);
}

/// What viewers may ask for by other methods than GET: it changes nothing.
const LOOKS: [&str; 6] = [
    "/api/v1/register",
    "/api/v1/tokens",
    "/api/v1/billing/upgrade",
    "/api/v1/billing/portal",
    "/api/v1/sandbox/{id}/network/simulate",
    "/api/v1/sandbox/{id}/network/suggest",
];

/// What they may not see.
const HIDDEN: [&str; 5] = [
    "/api/v1/api-keys",
    "/api/v1/invitations",
    "/api/v1/sandbox/{id}/files",
    "/api/v1/sandbox/{id}/files/list",
    "/api/v1/sandbox/{id}/files/download",
];

#[tokio::test]
async fn a_viewers_key_changes_nothing() {
    let world = world().await;
    let victim = victim(&world).await;
    let (_, viewer) = world.user(&victim.tenant, "viewer@victim.test", "viewer").await;
    let before = victim.state(&world).await;
    let description = description();
    let mut asked = 0;
    for (path, method, operation) in operations(&description) {
        let place = format!("{method} {path}");
        let body = example(&description, &operation);
        let filled = victim.fill(&path);
        let refused = method != "get" && !LOOKS.contains(&path.as_str());
        if !refused && !HIDDEN.contains(&path.as_str()) {
            continue;
        }
        let (status, text) = ask(&world, Some(&viewer.key), &method, &filled, body.as_ref()).await;
        // Of a body that has no example, the form may be what is refused.
        let has_form = body.is_none() && !operation["requestBody"].is_null();
        assert!(
            status == 403 || (has_form && status == 400),
            "{place}: {status} {text}"
        );
        asked += 1;
    }
    assert!(asked > 25, "{asked} were asked");
    assert_eq!(victim.state(&world).await, before);
}

#[tokio::test]
async fn without_a_key_there_is_only_what_is_said_to_be_open() {
    let world = world().await;
    let victim = victim(&world).await;
    let description = description();
    let mut open = Vec::new();
    for (path, method, operation) in operations(&description) {
        let place = format!("{method} {path}");
        let body = example(&description, &operation);
        let (status, text) = ask(&world, None, &method, &victim.fill(&path), body.as_ref()).await;
        if is_open(&operation) {
            assert_ne!(status, 401, "{place}");
            open.push(path);
        } else {
            assert_eq!(status, 401, "{place}: {text}");
        }
        for mark in victim.marks() {
            assert!(!text.contains(mark), "{place}: {text}");
        }
    }
    open.sort();
    assert_eq!(
        open,
        [
            "/api/v1/policy-schema",
            "/api/v1/register",
            "/docs",
            "/docs/page.css",
            "/docs/page.js",
            "/health",
            "/openapi.json",
            "/ready",
        ]
    );
}
