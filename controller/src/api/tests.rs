//! The API against the real store, without a node: whatever needs no running sandbox.

use std::{collections::BTreeMap, sync::Arc};

use axum::body::Body;
use http::{Request, StatusCode};
use http_body_util::BodyExt as _;
use jiff::{SignedDuration, Timestamp};
use sandgate_api::{
    id::{OrgId, SandboxId},
    rest::Isolation,
};
use sandgate_daemon::{handover, tasks::Tasks};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

use super::*;
use crate::{
    broker::Broker,
    config::{Config, Settings},
    ingress::ProxyLink,
    installation::InstallationKey,
    node::NodeLink,
    spec::{SandboxSpec, Size},
    store::{NewSandbox, SecretChoice, Store},
    terms::Terms,
    vault::Vault,
};

mod accounts;
mod actions;
mod audit;
mod happenings;
mod lifetime;
mod openapi;
mod policies;
mod remainder;
mod requests;
mod sandboxes;
mod secrets;
mod sockets;
mod templates;
mod tunnels;
mod usage;
mod walk;

struct World {
    router: Router,
    store: Store,
    service: Service,
    broker: Broker,
    netd: std::os::fd::OwnedFd,
    proxy: std::os::fd::OwnedFd,
    _directory: tempfile::TempDir,
}

/// Somebody with a key.
#[derive(Clone)]
struct Tenant {
    key: String,
    org: OrgId,
}

struct Answer {
    status: StatusCode,
    headers: http::HeaderMap,
    body: Value,
}

impl Answer {
    /// Status, code and field of an error.
    fn refusal(&self) -> (u16, &str, Option<&str>) {
        let error = &self.body["error"];
        (
            self.status.as_u16(),
            error["code"].as_str().unwrap_or("none"),
            error["details"]["field"].as_str(),
        )
    }
}

async fn world() -> World {
    world_with(Settings::default()).await
}

async fn world_with(mut settings: Settings) -> World {
    let directory = tempfile::tempdir().expect("a directory");
    settings.data_dir = Some(directory.path().display().to_string());
    let config = Arc::new(Config::new(&settings).expect("a configuration"));
    let store = Store::open(&config.database).await.expect("a store");
    let (ours, theirs) = handover::pair().expect("a pair");
    let tasks = Tasks::new(CancellationToken::new());
    let channel = handover::Channel::from_fd(ours).expect("a channel");
    let key = InstallationKey::open(&directory.path().join("installation.key")).expect("a key");
    let vault = Arc::new(Vault::open(None, None, directory.path()).expect("a vault"));
    let broker = Broker::new(store.clone(), Arc::clone(&vault), key.clone());
    let node = NodeLink::start(channel, store.clone(), broker.clone(), &tasks);
    let (ours, proxy) = handover::pair().expect("a pair");
    let channel = handover::Channel::from_fd(ours).expect("a channel");
    let link = ProxyLink::start(channel, store.clone(), &tasks);
    let service = Service::new(config, store.clone(), (node, link), key, vault, tasks);
    let router = router(service.clone());
    World {
        router,
        store,
        service,
        broker,
        netd: theirs,
        proxy,
        _directory: directory,
    }
}

impl World {
    async fn send(&self, request: Request<Body>) -> Answer {
        let response = self.router.clone().oneshot(request).await.expect("an answer");
        let (parts, body) = response.into_parts();
        let bytes = body.collect().await.expect("a body").to_bytes();
        let body: Value = serde_json::from_slice(&bytes).expect("JSON");
        assert!(body.is_object(), "every answer is an object: {body}");
        assert_ne!(parts.status, StatusCode::NO_CONTENT);
        assert!(!parts.status.is_redirection(), "never a redirect");
        if !parts.status.is_success() {
            let error = &body["error"];
            assert!(
                error["code"].is_string() && error["message"].is_string(),
                "{body}"
            );
            assert_eq!(
                error["request_id"].as_str(),
                parts.headers["x-request-id"].to_str().ok(),
                "{body}"
            );
            assert!(
                error["details"].is_null() || error["details"].is_object(),
                "{body}"
            );
        }
        Answer {
            status: parts.status,
            headers: parts.headers,
            body,
        }
    }

    async fn call(&self, tenant: &Tenant, method: &str, path: &str, body: &Value) -> Answer {
        let body = if body.is_null() {
            Body::empty()
        } else {
            Body::from(body.to_string())
        };
        let request = Request::builder()
            .method(method)
            .uri(format!("/api/v1{path}"))
            .header("authorization", format!("Bearer {}", tenant.key))
            .header("content-type", "application/json")
            .body(body)
            .expect("a request");
        self.send(request).await
    }

    async fn register(&self, email: &str) -> Answer {
        let body = json!({"email": email, "organization_name": "Acme"});
        let request = Request::post("/api/v1/register")
            .body(Body::from(body.to_string()))
            .expect("a request");
        self.send(request).await
    }

    async fn tenant(&self, email: &str) -> Tenant {
        let answer = self.register(email).await;
        assert_eq!(answer.status, StatusCode::CREATED, "{}", answer.body);
        Tenant {
            key: answer.body["api_key"]["key"].as_str().expect("a key").to_owned(),
            org: answer.body["organization"]["id"]
                .as_str()
                .expect("an id")
                .parse()
                .expect("an id"),
        }
    }

    /// A sandbox that the store says is running. No process stands behind it.
    async fn stored_sandbox(&self, tenant: &Tenant) -> SandboxId {
        let now = Timestamp::now();
        let new = NewSandbox {
            id: SandboxId::random(),
            org_id: tenant.org.clone(),
            spec: SandboxSpec {
                cpus: "500m".parse().expect("cpus"),
                memory: Size::memory("512Mi").expect("memory"),
                disk: Size::disk("1Gi").expect("disk"),
                pids: 64,
                timeout_seconds: 600,
                env: BTreeMap::new(),
                isolation: Isolation::Container,
            },
            policy: None,
            secrets: SecretChoice::None,
            authority: None,
            terms: Terms::default(),
            created_at: now,
            expires_at: now + SignedDuration::from_secs(600),
        };
        let id = self.store.insert_sandbox(&new, 99).await.expect("inserted").id;
        self.store.mark_running(&id).await.expect("running");
        id
    }
}
