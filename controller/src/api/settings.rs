//! The organisation's egress policy, and what policies look like.

use axum::{Json, extract::State, response::Response};
use http::HeaderMap;
use sandgate_api::openapi::PolicyDocument;
use serde_json::Value;

use super::{
    auth::Authenticated,
    document::{Document, PatchDocument},
    error::{ApiError, precondition},
    network::{Expected, expected, tagged},
};
use crate::service::{OrganizationView, Scope, Service};

/// Shows the organisation's egress policy.
#[utoipa::path(
    get, path = "/settings/egress", operation_id = "get_egress", tag = "network",
    responses((status = 200, description = "The policy; its revision is the ETag too", body = sandgate_api::rest::OrganizationEgress))
)]
pub(super) async fn get_egress(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
) -> Result<Response, ApiError> {
    caller.may(Scope::NetworkRead)?;
    Ok(shown(service.organization_policy(caller.org_id()).await?))
}

/// Replaces the whole policy. The answer comes when the node has applied it, or says that it has not.
#[utoipa::path(
    put, path = "/settings/egress", operation_id = "put_egress", tag = "network",
    params(("If-Match" = Option<String>, Header, description = "The revision that is to be changed, in quotes; another one is a 412")),
    request_body = PolicyDocument, responses((status = 200, description = "The policy as stored", body = sandgate_api::rest::OrganizationEgress))
)]
pub(super) async fn put_egress(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    headers: HeaderMap,
    mut document: Document,
) -> Result<Response, ApiError> {
    caller.may(Scope::NetworkWrite)?;
    document.organization(&caller)?;
    let Expected { revision, by_header } = expected(&headers, &mut document)?;
    let stored = service
        .set_organization_policy(caller.org_id(), &document.into_value(), revision)
        .await;
    stored.map(shown).map_err(|error| precondition(error, by_header))
}

/// Changes only the given fields.
#[utoipa::path(
    patch, path = "/settings/egress", operation_id = "patch_egress", tag = "network",
    params(("If-Match" = Option<String>, Header, description = "The revision that is to be changed, in quotes; another one is a 412")),
    request_body(content = PolicyDocument, description = "Only fields that change; `null` brings a default back (RFC 7396)"),
    responses((status = 200, description = "The policy as stored", body = sandgate_api::rest::OrganizationEgress))
)]
pub(super) async fn patch_egress(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    headers: HeaderMap,
    mut document: PatchDocument,
) -> Result<Response, ApiError> {
    caller.may(Scope::NetworkWrite)?;
    document.0.organization(&caller)?;
    let Expected { revision, by_header } = expected(&headers, &mut document.0)?;
    let stored = service
        .merge_organization_policy(caller.org_id(), &document.0.into_value(), revision)
        .await;
    stored.map(shown).map_err(|error| precondition(error, by_header))
}

/// What policies look like: a JSON Schema (2020-12), for editors.
#[utoipa::path(
    get, path = "/policy-schema", operation_id = "get_policy_schema", tag = "network", security(()),
    responses((status = 200, description = "The schema", body = Object))
)]
pub(super) async fn schema() -> Json<Value> {
    let mut schema = PolicyDocument::json();
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema".into();
    Json(schema)
}

fn shown(view: OrganizationView) -> Response {
    tagged(view.revision, view)
}
