//! Around every request: its id, its log line, its limits, the body of errors, and the record of what was done.

use std::{collections::BTreeSet, sync::Arc, time::Instant};

use axum::{
    extract::{MatchedPath, Request, State},
    middleware::Next,
    response::{IntoResponse as _, Response},
};
use http::{HeaderName, HeaderValue, Method, StatusCode};
use jiff::Timestamp;
use sandgate_api::{id::SandboxId, rest::ActionOutcome};
use serde_json::{Map, Value, json};
use tracing::{Instrument as _, Span, field::Empty};

use super::{
    actions::{self, MAX_TEXT},
    error::ApiError,
    limits,
    present::{self, Known, Present},
    remainder::Remainder,
};
use crate::{
    limiter::Peer,
    metrics::Requested,
    service::Service,
    store::{ActionText, NewAction},
};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Longest id taken over from a client.
const MAX_ID: usize = 128;

/// Asked all the time by machines.
const PROBES: [&str; 2] = ["/health", "/ready"];

/// What requests are held against.
#[derive(Clone)]
pub(super) struct Around {
    pub(super) service: Service,
    /// `GET /path`, for every endpoint that needs no credential.
    pub(super) open: Arc<BTreeSet<String>>,
}

impl Around {
    /// By the description of the API.
    pub(super) fn new(service: Service, description: &Value) -> Self {
        let mut open = BTreeSet::new();
        for (path, item) in description["paths"].as_object().into_iter().flatten() {
            for (method, operation) in item.as_object().into_iter().flatten() {
                if operation["security"] == json!([{}]) {
                    open.insert(format!("{} {path}", method.to_uppercase()));
                }
            }
        }
        Self {
            service,
            open: Arc::new(open),
        }
    }

    /// Whether the request counts against where it comes from, before anything is done about it.
    fn is_open(&self, method: &Method, route: Option<&str>) -> bool {
        match route {
            None => true,
            Some(route) if PROBES.contains(&route) => false,
            Some(route) => {
                let method = if *method == Method::HEAD {
                    &Method::GET
                } else {
                    method
                };
                self.open.contains(&format!("{method} {route}"))
            }
        }
    }
}

/// Names the request in the log, in the answer's header and in an error's body. The log line holds the
/// route and never the query, which may hold a token.
pub(super) async fn around(State(around): State<Around>, request: Request, next: Next) -> Response {
    let id = given_id(&request).unwrap_or_else(|| uuid::Uuid::new_v4().to_string());
    let route = request
        .extensions()
        .get::<MatchedPath>()
        .map(|path| path.as_str().to_owned());
    let method: Method = request.method().clone();
    let watched = Requested::new(around.service.metrics().clone(), route.as_deref(), &method);
    let span = tracing::info_span!("request", request_id = %id, sandbox_id = Empty);
    let (request, remainder) = Remainder::of(request);
    async move {
        let began = Instant::now();
        let present = Present::default();
        let mut record = Record {
            service: around.service.clone(),
            present: present.clone(),
            action: route.as_deref().and_then(|route| actions::name(&method, route)),
            method: method.clone(),
            path: request.uri().path().chars().take(MAX_TEXT).collect(),
            request_id: id.clone(),
            began,
            time: Timestamp::now(),
            is_noted: false,
            is_written: false,
        };
        let admitted = if around.is_open(&method, route.as_deref()) {
            let peer = peer(request.extensions());
            present
                .during(async { present::counts(around.service.count_peer(&peer)) })
                .await
        } else {
            Ok(())
        };
        let mut response = match admitted {
            Ok(()) => present.during(next.run(request)).await,
            Err(error) => error.into_response(),
        };
        let error = response.extensions_mut().remove::<ApiError>();
        let code = error.as_ref().map(ApiError::code);
        record.answered(response.status(), error.as_ref()).await;
        if let Some(error) = error {
            response = error.render(&id);
        }
        if let Ok(value) = HeaderValue::from_str(&id) {
            response.headers_mut().insert(REQUEST_ID, value);
        }
        if let Some(allowance) = &present.known().allowance {
            limits::say(allowance, &mut response);
        }
        remainder.settle(&mut response).await;
        watched.answered(response.status());
        let status = response.status().as_u16();
        let took_ms = millis(began);
        let route = route.as_deref().unwrap_or("-");
        if PROBES.contains(&route) {
            tracing::debug!(target: "access", %method, route, status, took_ms);
        } else {
            tracing::info!(target: "access", %method, route, status, code = code.as_ref().map(tracing::field::debug), took_ms);
        }
        response
    }
    .instrument(span)
    .await
}

/// Where a request comes from.
pub(super) fn peer(extensions: &http::Extensions) -> Peer {
    extensions.get::<Peer>().copied().unwrap_or_else(Peer::unknown)
}

/// What is put on record of one request, also when its client goes away before it is answered.
struct Record {
    service: Service,
    present: Present,
    action: Option<String>,
    method: Method,
    path: String,
    request_id: String,
    began: Instant,
    time: Timestamp,
    is_noted: bool,
    is_written: bool,
}

impl Record {
    async fn answered(&mut self, status: StatusCode, error: Option<&ApiError>) {
        let outcome = if status == StatusCode::FORBIDDEN {
            ActionOutcome::Denied
        } else if status.is_client_error() || status.is_server_error() {
            ActionOutcome::Failure
        } else {
            ActionOutcome::Success
        };
        if self.note(outcome, Some(status), error) {
            self.service.write_actions().await;
        }
        self.is_written = true;
    }

    /// False when there is nothing to record: a look, one request too many, or nobody whom it could be told.
    fn note(&mut self, outcome: ActionOutcome, status: Option<StatusCode>, error: Option<&ApiError>) -> bool {
        self.is_noted = true;
        let Known {
            caller,
            sandbox,
            paths,
            allowance,
        } = self.present.known().clone();
        // What was too much was not even looked at, and is not to cost a write.
        if allowance.is_some_and(|allowance| allowance.retry_after.is_some()) {
            return false;
        }
        let (Some(action), Some(caller)) = (self.action.take(), caller) else {
            return false;
        };
        let mut details = Map::new();
        details.insert("method".to_owned(), self.method.as_str().into());
        details.insert("path".to_owned(), self.path.clone().into());
        details.insert("request_id".to_owned(), self.request_id.clone().into());
        if let Some(status) = status {
            details.insert("status".to_owned(), status.as_u16().into());
        }
        if let Some(key_id) = caller.key_id() {
            details.insert("key_id".to_owned(), key_id.as_str().into());
        }
        let resource = paths.first().cloned().unwrap_or_else(|| {
            let path = self.path.strip_prefix("/api/v1").unwrap_or(&self.path);
            path.to_owned()
        });
        if !paths.is_empty() {
            details.insert("paths".to_owned(), paths.into());
        }
        self.service.note_action(NewAction {
            id: actions::fresh_id(),
            org_id: caller.org_id().clone(),
            user_id: caller.user_id().cloned(),
            sandbox_id: sandbox,
            time: self.time,
            action,
            outcome,
            duration: millis(self.began),
            text: ActionText {
                resource,
                details,
                error_message: error.map(|error| error.message().chars().take(MAX_TEXT).collect()),
            },
        });
        true
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let is_noted = self.is_noted || self.note(ActionOutcome::Cancelled, None, None);
        if is_noted && !self.is_written {
            self.service.write_actions_soon();
        }
    }
}

/// Names the sandbox that the present request is about, in everything it logs from here on and on record.
pub(crate) fn concerns(id: &SandboxId) {
    Span::current().record("sandbox_id", tracing::field::display(id));
    present::concerns(id);
}

fn millis(began: Instant) -> u64 {
    u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX)
}

fn given_id(request: &Request) -> Option<String> {
    let text = request.headers().get(REQUEST_ID)?.to_str().ok()?;
    let plain = (1..=MAX_ID).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic());
    plain.then(|| text.to_owned())
}
