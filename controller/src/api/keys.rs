//! API keys.

use axum::{Json, extract::State};
use http::StatusCode;
use sandgate_api::rest::{ApiKeyCreated, ApiKeyList, Success};

use super::{auth::Authenticated, bodies::KeyBody, document::Document, error::ApiError, path::KeyPath};
use crate::service::{KeyRequest, Scope, Service};

/// Lists the organisation's API keys.
#[utoipa::path(
    get, path = "/api-keys", operation_id = "list_api_keys", tag = "accounts",
    responses((status = 200, description = "The keys, without their secrets", body = ApiKeyList))
)]
pub(super) async fn list(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
) -> Result<Json<ApiKeyList>, ApiError> {
    caller.may(Scope::Keys)?;
    Ok(Json(ApiKeyList {
        api_keys: service.keys(caller.org_id()).await?,
    }))
}

/// Makes an API key, which can do at most what the caller's can.
#[utoipa::path(
    post, path = "/api-keys", operation_id = "create_api_key", tag = "accounts",
    request_body = KeyBody, responses((status = 201, description = "The key, shown once", body = ApiKeyCreated))
)]
pub(super) async fn create(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    mut document: Document,
) -> Result<(StatusCode, Json<ApiKeyCreated>), ApiError> {
    caller.may(Scope::Keys)?;
    document.organization(&caller)?;
    let request = KeyRequest {
        name: document.required_text("name")?,
        expires_in_days: document.whole("expires_in_days", 1..=3_650)?,
        scopes: document.texts("scopes")?,
    };
    document.finish()?;
    let (api_key, key) = service.create_key(&caller, request).await?;
    Ok((StatusCode::CREATED, Json(ApiKeyCreated { api_key, key })))
}

/// Revokes an API key.
#[utoipa::path(
    delete, path = "/api-keys/{id}", operation_id = "revoke_api_key", tag = "accounts",
    responses((status = 200, description = "It works no more", body = Success))
)]
pub(super) async fn revoke(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    KeyPath(id): KeyPath,
) -> Result<Json<Success>, ApiError> {
    caller.may(Scope::Keys)?;
    service.revoke_key(caller.org_id(), &id).await?;
    Ok(Json(Success::OK))
}
