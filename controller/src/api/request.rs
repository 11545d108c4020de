//! Around every request: its id, its log line, the body of errors.

use std::time::Instant;

use axum::{
    extract::{MatchedPath, Request, State},
    middleware::Next,
    response::Response,
};
use http::{HeaderName, HeaderValue, Method};
use sandgate_api::id::SandboxId;
use tracing::{Instrument as _, Span, field::Empty};

use super::error::ApiError;
use crate::metrics::{Metrics, Requested};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Longest id taken over from a client.
const MAX_ID: usize = 128;

/// Asked all the time by machines.
const PROBES: [&str; 2] = ["/health", "/ready"];

/// Names the request in the log, in the answer's header and in an error's body. The log line holds the
/// route and never the query, which may hold a token.
pub(super) async fn around(State(metrics): State<Metrics>, request: Request, next: Next) -> Response {
    let id = given_id(&request).unwrap_or_else(|| uuid::Uuid::new_v4().to_string());
    let route = request
        .extensions()
        .get::<MatchedPath>()
        .map(|path| path.as_str().to_owned());
    let method: Method = request.method().clone();
    let watched = Requested::new(metrics, route.as_deref(), &method);
    let span = tracing::info_span!("request", request_id = %id, sandbox_id = Empty);
    async move {
        let began = Instant::now();
        let mut response = next.run(request).await;
        let mut code = None;
        if let Some(error) = response.extensions_mut().remove::<ApiError>() {
            code = Some(error.code());
            response = error.render(&id);
        }
        if let Ok(value) = HeaderValue::from_str(&id) {
            response.headers_mut().insert(REQUEST_ID, value);
        }
        watched.answered(response.status());
        let status = response.status().as_u16();
        let took_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
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

/// Names the sandbox that the present request is about, in everything it logs from here on.
pub(crate) fn concerns(id: &SandboxId) {
    Span::current().record("sandbox_id", tracing::field::display(id));
}

fn given_id(request: &Request) -> Option<String> {
    let text = request.headers().get(REQUEST_ID)?.to_str().ok()?;
    let plain = (1..=MAX_ID).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic());
    plain.then(|| text.to_owned())
}
