//! Secrets over the API: what is accepted, what is refused and how, and that no value ever comes back.

mod given;

use std::{
    cell::RefCell,
    io,
    sync::{Mutex, Once, PoisonError},
};

use sandgate_api::{
    agent::{Command, Exec},
    credential::{CaRequest, CredentialRequest},
    feed::Endpoint,
};

use super::*;
use crate::store::{AuthorityRecord, SandboxRecord};

const CANARY: &str = "sk-ant-api03-canary-0123456789";

impl World {
    async fn store_secret(&self, tenant: &Tenant, body: Value) -> Answer {
        let answer = self.call(tenant, "POST", "/secrets", &body).await;
        assert_eq!(answer.status, StatusCode::CREATED, "{}", answer.body);
        answer
    }

    /// On the feed, with all secrets there are.
    async fn holder(&self, tenant: &Tenant) -> SandboxRecord {
        let id = self.stored_sandbox(tenant).await;
        let running = self
            .store
            .sandbox(&tenant.org, &id)
            .await
            .expect("a reading")
            .expect("a sandbox");
        let new = NewSandbox {
            id: SandboxId::random(),
            org_id: tenant.org.clone(),
            spec: running.spec,
            policy: None,
            secrets: SecretChoice::All,
            authority: Some(AuthorityRecord {
                generation: 1,
                certificate: "PEM".to_owned(),
            }),
            terms: running.terms,
            created_at: running.created_at,
            expires_at: running.expires_at,
        };
        let record = self.store.insert_sandbox(&new, 99).await.expect("inserted");
        let endpoint = Endpoint {
            ifindex: 7,
            interface: "sg7".to_owned(),
            address: std::net::Ipv4Addr::new(10, 213, 0, 7),
            address6: None,
            mac: [2, 83, 71, 1, 0, 7],
            agent_port: 9111,
        };
        self.store
            .announce(&record.id, &endpoint)
            .await
            .expect("announced");
        self.store.mark_running(&record.id).await.expect("running");
        record
    }

    async fn environment(&self, record: &SandboxRecord, env: Value) -> BTreeMap<String, String> {
        let exec = Exec {
            command: Command::Shell("env".to_owned()),
            env: serde_json::from_value(env).expect("an environment"),
            working_dir: None,
            timeout_ms: None,
            track: None,
        };
        self.service.with_secrets(record, exec).await.expect("merged").env
    }
}

fn request(name: &str, egress: &Value) -> Value {
    json!({"name": name, "value": CANARY, "scope": "sandbox", "egress": egress})
}

fn binding() -> Value {
    json!({"hosts": ["api.ok.test"], "inject": [{"kind": "bearer"}]})
}

/// Everything that its thread logs while it exists, of every level.
#[derive(Clone, Default)]
pub(super) struct Logged(Arc<Mutex<Vec<u8>>>);

thread_local! {
    static LISTENING: RefCell<Option<Logged>> = const { RefCell::new(None) };
}

impl Logged {
    /// One subscriber for all threads: what a thread without one meets first would stay switched off for all.
    pub(super) fn listen() -> Self {
        static SUBSCRIBER: Once = Once::new();
        SUBSCRIBER.call_once(|| {
            tracing_subscriber::fmt()
                .with_max_level(tracing::level_filters::LevelFilter::TRACE)
                .with_writer(|| LISTENING.with_borrow(|listening| listening.clone().unwrap_or_default()))
                .init();
        });
        let logged = Self::default();
        LISTENING.set(Some(logged.clone()));
        logged
    }

    pub(super) fn text(&self) -> String {
        let bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl io::Write for Logged {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn a_secret_lives_without_ever_being_shown() {
    let logged = Logged::listen();
    let world = world().await;
    let tenant = world.tenant("a@b").await;
    let mut answers = vec![
        world
            .store_secret(
                &tenant,
                json!({"name": "ANTHROPIC_API_KEY", "value": CANARY, "scope": "sandbox"}),
            )
            .await,
    ];
    let shown = &answers[0].body;
    for field in ["id", "name", "scope", "created_at", "updated_at"] {
        assert!(shown[field].is_string(), "{field}: {shown}");
    }
    assert_eq!(shown["egress"]["hosts"], json!(["api.anthropic.com"]));
    for (method, path, body) in [
        ("GET", "/secrets", Value::Null),
        (
            "PUT",
            "/secrets/ANTHROPIC_API_KEY",
            json!({"value": format!("{CANARY}-2")}),
        ),
        (
            "PUT",
            "/secrets/ANTHROPIC_API_KEY",
            json!({"value": format!("{CANARY}\r\nx: y")}),
        ),
        ("PUT", "/secrets/ANTHROPIC_API_KEY", json!({"value": [CANARY]})),
        ("PUT", "/secrets/ANTHROPIC_API_KEY", json!({"egress": null})),
        ("GET", "/secrets", Value::Null),
        ("POST", "/secrets", json!({"name": CANARY, "value": CANARY})),
        ("POST", "/secrets", json!({"name": "A", "value": {"x": CANARY}})),
        (
            "POST",
            "/secrets",
            json!({"name": "A", "value": CANARY, "egress": CANARY}),
        ),
        ("PUT", &format!("/secrets/{CANARY}"), json!({"value": CANARY})),
        ("DELETE", &format!("/secrets/{CANARY}"), Value::Null),
        ("DELETE", "/secrets/ANTHROPIC_API_KEY", Value::Null),
        ("DELETE", "/secrets/ANTHROPIC_API_KEY", Value::Null),
    ] {
        answers.push(world.call(&tenant, method, path, &body).await);
    }
    for answer in &answers {
        let text = format!("{} {:?}", answer.body, answer.headers);
        assert!(!text.contains("canary"), "{text}");
    }
    let text = logged.text();
    assert!(text.contains("secret stored"), "nothing was logged: {text}");
    assert!(!text.contains("canary"), "{text}");
}

#[tokio::test]
async fn the_five_calls_of_published_clients() {
    let world = world().await;
    let tenant = world.tenant("a@b").await;
    // What `create_secret`, `list_secrets`, `update_secret`, `inject_secrets` and `delete_secret` send.
    let created = json!({"name": "MY_KEY", "value": "any text", "scope": "sandbox"});
    let created = world.store_secret(&tenant, created).await;
    assert_eq!(created.body["egress"], Value::Null);
    let listed = world.call(&tenant, "GET", "/secrets", &Value::Null).await;
    assert_eq!(listed.body["secrets"][0], created.body);
    let updated = world
        .call(&tenant, "PUT", "/secrets/MY_KEY", &json!({"value": "another"}))
        .await;
    assert_eq!(
        (updated.status, &updated.body["id"]),
        (StatusCode::OK, &created.body["id"])
    );
    let id = world.stored_sandbox(&tenant).await;
    let path = format!("/sandbox/{id}/secrets/inject");
    for body in [
        json!({"secrets": ["MY_KEY"]}),
        json!({"all": true}),
        json!({"secrets": [], "all": true}),
    ] {
        let injected = world.call(&tenant, "POST", &path, &body).await;
        assert_eq!(injected.body["injected"], json!(["MY_KEY"]), "{}", injected.body);
    }
    let deleted = world
        .call(&tenant, "DELETE", "/secrets/MY_KEY", &Value::Null)
        .await;
    assert_eq!(deleted.body, json!({"success": true}));
    let gone = world
        .call(&tenant, "DELETE", "/secrets/MY_KEY", &Value::Null)
        .await;
    assert_eq!(gone.refusal(), (404, "NOT_FOUND", None));
}

#[tokio::test]
async fn a_refusal_names_the_field() {
    let world = world().await;
    let tenant = world.tenant("a@b").await;
    let with = |change: Value| {
        let mut whole = binding();
        for (field, value) in change.as_object().expect("an object") {
            whole[field] = value.clone();
        }
        request("A", &whole)
    };
    let inject = |inject: Value| with(json!({"inject": [inject]}));
    for (body, field) in [
        (json!({}), "name"),
        (json!({"name": "A"}), "value"),
        (json!({"name": 1, "value": "x"}), "name"),
        (json!({"name": "A-B", "value": "x"}), "name"),
        (json!({"name": "A", "value": ""}), "value"),
        (json!({"name": "A", "value": "a\u{0}b"}), "value"),
        (json!({"name": "A", "value": "x", "scope": "user"}), "scope"),
        (
            json!({"name": "A", "value": "x", "expires_at": "2030-01-01T00:00:00Z"}),
            "expires_at",
        ),
        (
            json!({"name": "A", "value": "x", "allowed_sandbox_patterns": ["x"]}),
            "allowed_sandbox_patterns",
        ),
        (json!({"name": "A", "value": "x", "colour": "red"}), "colour"),
        (
            json!({"name": "OPENAI_API_KEY", "value": "sk-bad\r\nhost: x"}),
            "value",
        ),
        (json!({"name": "OPENAI_API_KEY", "value": "short"}), "value"),
        (request("A", &json!("api.ok.test")), "egress"),
        (request("A", &json!([])), "egress"),
        (request("A", &json!([1])), "egress[0]"),
        (request("A", &json!({})), "egress.hosts"),
        (
            request("A", &json!([binding(), {"hosts": ["a.test"]}])),
            "egress[1].inject",
        ),
        (with(json!({"hosts": []})), "egress.hosts"),
        (with(json!({"hosts": "api.ok.test"})), "egress.hosts"),
        (with(json!({"hosts": ["*"]})), "egress.hosts[0]"),
        (with(json!({"hosts": ["ok.test", "*.com"]})), "egress.hosts[1]"),
        (with(json!({"ports": []})), "egress.ports"),
        (with(json!({"ports": [443, 0]})), "egress.ports[1]"),
        (with(json!({"ports": [65536]})), "egress.ports[0]"),
        (with(json!({"ports": ["443"]})), "egress.ports[0]"),
        (with(json!({"methods": ["get"]})), "egress.methods[0]"),
        (with(json!({"paths": ["v1"]})), "egress.paths[0]"),
        (
            with(json!({"strip_client_auth": "no"})),
            "egress.strip_client_auth",
        ),
        (with(json!({"port": 443})), "egress.port"),
        (with(json!({"inject": []})), "egress.inject"),
        (with(json!({"inject": "bearer"})), "egress.inject"),
        (with(json!({"inject": ["bearer"]})), "egress.inject[0]"),
        (inject(json!({})), "egress.inject[0].kind"),
        (inject(json!({"kind": "magic"})), "egress.inject[0].kind"),
        (
            inject(json!({"kind": "aws_sigv4", "service": "s3"})),
            "egress.inject[0].kind",
        ),
        (
            inject(json!({"kind": "oauth2_refresh_token"})),
            "egress.inject[0].kind",
        ),
        (inject(json!({"kind": "github_app"})), "egress.inject[0].kind"),
        (inject(json!({"kind": "mtls"})), "egress.inject[0].kind"),
        (
            inject(json!({"kind": "bearer", "header": "x"})),
            "egress.inject[0].header",
        ),
        (inject(json!({"kind": "basic"})), "egress.inject[0].username"),
        (
            inject(json!({"kind": "basic", "username": "a:b"})),
            "egress.inject[0].username",
        ),
        (inject(json!({"kind": "header"})), "egress.inject[0].header"),
        (
            inject(json!({"kind": "header", "header": "Host"})),
            "egress.inject[0].header",
        ),
        (
            inject(json!({"kind": "header", "header": "x-a", "format": "x"})),
            "egress.inject[0].format",
        ),
        (inject(json!({"kind": "query"})), "egress.inject[0].parameter"),
        (
            inject(json!({"kind": "placeholder", "in": ["body"]})),
            "egress.inject[0].in[0]",
        ),
        (
            inject(json!({"kind": "placeholder", "in": ["header", "path"]})),
            "egress.inject[0].in[1]",
        ),
        (
            inject(json!({"kind": "placeholder", "in": []})),
            "egress.inject[0].in",
        ),
    ] {
        let answer = world.call(&tenant, "POST", "/secrets", &body).await;
        assert_eq!(answer.refusal(), (400, "VALIDATION_ERROR", Some(field)), "{body}");
    }
    let listed = world.call(&tenant, "GET", "/secrets", &Value::Null).await;
    assert_eq!(listed.body, json!({"secrets": []}));
}

#[tokio::test]
async fn every_kind_is_stored_as_it_was_written() {
    let world = world().await;
    let tenant = world.tenant("a@b").await;
    let egress = json!({
        "hosts": ["API.ok.test", "*.wild.test"],
        "methods": ["GET", "POST"],
        "paths": ["/v1/**"],
        "inject": [
            {"kind": "bearer"},
            {"kind": "basic", "username": "x-access-token"},
            {"kind": "header", "header": "X-Api-Key"},
            {"kind": "query", "parameter": "key"},
            {"kind": "placeholder", "in": ["header", "query"]}
        ]
    });
    let stored = world.store_secret(&tenant, request("A", &egress)).await;
    let shown = &stored.body["egress"];
    assert_eq!(shown["hosts"], json!(["api.ok.test", "*.wild.test"]));
    assert_eq!(
        (&shown["ports"], &shown["strip_client_auth"]),
        (&json!([443]), &json!(true))
    );
    assert_eq!(
        shown["inject"][2],
        json!({"kind": "header", "header": "x-api-key", "format": "{value}"})
    );
    // What was read can be written.
    let again = world
        .call(&tenant, "PUT", "/secrets/A", &json!({ "egress": shown }))
        .await;
    assert_eq!((again.status, &again.body["egress"]), (StatusCode::OK, shown));
    let two = world
        .call(
            &tenant,
            "PUT",
            "/secrets/A",
            &json!({"egress": [shown, binding()]}),
        )
        .await;
    assert_eq!(two.body["egress"].as_array().map(Vec::len), Some(2));
}

#[tokio::test]
async fn a_change_keeps_what_it_does_not_name_and_checks_both_together() {
    let world = world().await;
    let tenant = world.tenant("a@b").await;
    world.store_secret(&tenant, request("A", &binding())).await;
    world
        .store_secret(&tenant, json!({"name": "PLAIN", "value": "two\nlines"}))
        .await;
    for (path, body, field) in [
        ("/secrets/A", json!({}), "value"),
        ("/secrets/A", json!({"value": "a\nb-0123456789"}), "value"),
        ("/secrets/A", json!({"name": "B", "value": "x"}), "name"),
        (
            "/secrets/A",
            json!({"egress": {"hosts": ["*"], "inject": [{"kind": "bearer"}]}}),
            "egress.hosts[0]",
        ),
        ("/secrets/PLAIN", json!({"egress": binding()}), "egress"),
    ] {
        let answer = world.call(&tenant, "PUT", path, &body).await;
        assert_eq!(
            answer.refusal(),
            (400, "VALIDATION_ERROR", Some(field)),
            "{path} {body}"
        );
    }
    let rotated = world
        .call(
            &tenant,
            "PUT",
            "/secrets/A",
            &json!({"value": "sk-rotated-0123456789"}),
        )
        .await;
    assert_eq!(rotated.body["egress"]["hosts"], json!(["api.ok.test"]));
    assert_eq!(rotated.body["applied"], json!(true));
    let plain = world
        .call(
            &tenant,
            "PUT",
            "/secrets/A",
            &json!({"egress": null, "value": "two\nlines"}),
        )
        .await;
    assert_eq!(
        (plain.status, &plain.body["egress"]),
        (StatusCode::OK, &Value::Null)
    );
    let missing = world
        .call(&tenant, "PUT", "/secrets/NONE", &json!({"value": "x"}))
        .await;
    assert_eq!(missing.refusal(), (404, "NOT_FOUND", None));
    let taken = world
        .call(&tenant, "POST", "/secrets", &json!({"name": "A", "value": "x"}))
        .await;
    assert_eq!(taken.refusal(), (409, "CONFLICT", None));
}

#[tokio::test]
async fn another_organisation_sees_and_gets_nothing() {
    let world = world().await;
    let (owner, stranger) = (world.tenant("a@b").await, world.tenant("c@d").await);
    world.store_secret(&owner, request("A", &binding())).await;
    let own = world.stored_sandbox(&owner).await;
    let foreign = world.stored_sandbox(&stranger).await;
    let listed = world.call(&stranger, "GET", "/secrets", &Value::Null).await;
    assert_eq!(listed.body, json!({"secrets": []}));
    for (method, path, body, code) in [
        ("PUT", "/secrets/A".to_owned(), json!({"value": "x"}), "NOT_FOUND"),
        ("DELETE", "/secrets/A".to_owned(), Value::Null, "NOT_FOUND"),
        (
            "POST",
            format!("/sandbox/{foreign}/secrets/inject"),
            json!({"secrets": ["A"]}),
            "NOT_FOUND",
        ),
        (
            "POST",
            format!("/sandbox/{own}/secrets/inject"),
            json!({"all": true}),
            "SANDBOX_NOT_FOUND",
        ),
    ] {
        let answer = world.call(&stranger, method, &path, &body).await;
        assert_eq!(answer.refusal(), (404, code, None), "{method} {path}");
    }
    let nothing = world
        .call(
            &stranger,
            "POST",
            &format!("/sandbox/{foreign}/secrets/inject"),
            &json!({"all": true}),
        )
        .await;
    assert_eq!(nothing.body["injected"], json!([]));
}
