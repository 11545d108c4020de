//! A sandbox's own egress policy.

use axum::{
    Json,
    extract::State,
    response::{IntoResponse as _, Response},
};
use http::{HeaderMap, header};
use sandgate_api::{feed::Revision, openapi::PolicyDocument, rest::NetworkDoctor};
use serde::Serialize;
use serde_json::Value;

use super::{
    auth::Authenticated,
    document::{Document, PatchDocument},
    error::{ApiError, precondition},
    path::SandboxPath,
};
use crate::service::{NetworkView, Scope, Service};

/// Shows a sandbox's egress policy, and every tier that governs it.
#[utoipa::path(
    get, path = "/sandbox/{id}/network", operation_id = "get_network", tag = "network",
    responses((status = 200, description = "Its own policy and every tier", body = sandgate_api::rest::SandboxNetwork))
)]
pub(super) async fn get(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    SandboxPath(id): SandboxPath,
) -> Result<Response, ApiError> {
    caller.may(Scope::NetworkRead)?;
    Ok(shown(service.sandbox_policy(caller.org_id(), &id).await?))
}

/// Replaces the whole policy. The answer comes when the node has applied it, or says that it has not.
#[utoipa::path(
    put, path = "/sandbox/{id}/network", operation_id = "put_network", tag = "network",
    params(("If-Match" = Option<String>, Header, description = "The revision that is to be changed, in quotes; another one is a 412")),
    request_body = PolicyDocument, responses((status = 200, description = "The policy as stored", body = sandgate_api::rest::SandboxNetwork))
)]
pub(super) async fn put(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    SandboxPath(id): SandboxPath,
    headers: HeaderMap,
    mut document: Document,
) -> Result<Response, ApiError> {
    caller.may(Scope::NetworkWrite)?;
    document.organization(&caller)?;
    let Expected { revision, by_header } = expected(&headers, &mut document)?;
    let policy = unwrapped(document);
    let stored = service
        .set_sandbox_policy(caller.org_id(), &id, &policy, revision)
        .await;
    stored.map(shown).map_err(|error| precondition(error, by_header))
}

/// Changes only the given fields.
#[utoipa::path(
    patch, path = "/sandbox/{id}/network", operation_id = "patch_network", tag = "network",
    params(("If-Match" = Option<String>, Header, description = "The revision that is to be changed, in quotes; another one is a 412")),
    request_body(content = PolicyDocument, description = "Only fields that change; `null` brings a default back (RFC 7396)"),
    responses((status = 200, description = "The policy as stored", body = sandgate_api::rest::SandboxNetwork))
)]
pub(super) async fn patch(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    SandboxPath(id): SandboxPath,
    headers: HeaderMap,
    mut document: PatchDocument,
) -> Result<Response, ApiError> {
    caller.may(Scope::NetworkWrite)?;
    document.0.organization(&caller)?;
    let Expected { revision, by_header } = expected(&headers, &mut document.0)?;
    let changes = unwrapped(document.0);
    let stored = service
        .merge_sandbox_policy(caller.org_id(), &id, &changes, revision)
        .await;
    stored.map(shown).map_err(|error| precondition(error, by_header))
}

/// Runs what is installed inside against netd's self-test host.
#[utoipa::path(
    get, path = "/sandbox/{id}/network/doctor", operation_id = "network_doctor", tag = "network",
    responses((status = 200, description = "What was found", body = NetworkDoctor))
)]
pub(super) async fn doctor(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    SandboxPath(id): SandboxPath,
) -> Result<Json<NetworkDoctor>, ApiError> {
    caller.may(Scope::SandboxExecute)?;
    Ok(Json(service.network_doctor(caller.org_id(), &id).await?))
}

fn shown(view: NetworkView) -> Response {
    tagged(view.revision, view)
}

/// An answer whose revision is its ETag.
pub(super) fn tagged(revision: Revision, view: impl Serialize) -> Response {
    let etag = format!("\"{revision}\"");
    ([(header::ETAG, etag)], Json(view)).into_response()
}

/// The revision that the caller wants to change.
pub(super) struct Expected {
    pub(super) revision: Option<Revision>,
    /// It came by `If-Match`.
    pub(super) by_header: bool,
}

/// Reads `If-Match`, or else `revision` in the body, which an earlier answer may have put there.
pub(super) fn expected(headers: &HeaderMap, document: &mut Document) -> Result<Expected, ApiError> {
    let in_body = document.whole("revision", 0..=u64::MAX)?;
    let Some(value) = headers.get(header::IF_MATCH) else {
        return Ok(Expected {
            revision: in_body,
            by_header: false,
        });
    };
    let text = value.to_str().unwrap_or_default().trim();
    if text == "*" {
        return Ok(Expected {
            revision: in_body,
            by_header: false,
        });
    }
    let digits = text.strip_prefix("W/").unwrap_or(text).trim_matches('"');
    match digits.parse() {
        Ok(revision) => Ok(Expected {
            revision: Some(revision),
            by_header: true,
        }),
        Err(_not_a_number) => Err(ApiError::field(
            "If-Match",
            "expected a revision in quotes, for example \"7\"",
        )),
    }
}

/// The policy is the document itself; an answer of ours, in which it stands under `policy`, is understood too,
/// so that what was read can be written.
fn unwrapped(mut document: Document) -> Value {
    match document.value("policy") {
        Some(policy @ Value::Object(_)) => {
            for ours in ["sandbox_id", "applied", "effective", "updated_at"] {
                drop(document.value(ours));
            }
            if document.is_empty() {
                return policy;
            }
            let mut both = document.into_value();
            both["policy"] = policy;
            both
        }
        Some(other) => {
            let mut whole = document.into_value();
            whole["policy"] = other;
            whole
        }
        None => document.into_value(),
    }
}
