//! The organisation's egress policy.

use axum::{Json, extract::State};
use http::HeaderMap;
use sandgate_api::openapi::PolicyDocument;

use super::{
    auth::Authenticated,
    document::Document,
    error::{ApiError, precondition},
    network::{Expected, expected},
};
use crate::service::{OrganizationView, Scope, Service};

/// Shows the organisation's egress policy.
#[utoipa::path(
    get, path = "/settings/egress", operation_id = "get_egress", tag = "network",
    responses((status = 200, description = "The policy", body = sandgate_api::rest::OrganizationEgress))
)]
pub(super) async fn get_egress(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
) -> Result<Json<OrganizationView>, ApiError> {
    caller.may(Scope::NetworkRead)?;
    Ok(Json(service.organization_policy(caller.org_id()).await?))
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
) -> Result<Json<OrganizationView>, ApiError> {
    caller.may(Scope::NetworkWrite)?;
    document.organization(&caller)?;
    let Expected { revision, by_header } = expected(&headers, &mut document)?;
    let stored = service
        .set_organization_policy(caller.org_id(), &document.into_value(), revision)
        .await;
    stored.map(Json).map_err(|error| precondition(error, by_header))
}
