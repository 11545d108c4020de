//! API keys, and the tokens that are made with them.

use std::time::Duration;

use axum::{Json, extract::State};
use http::StatusCode;
use sandgate_api::rest::{ApiKeyCreated, ApiKeyList, Success, TokenCreated};

use super::{
    auth::Authenticated,
    bodies::{KeyBody, RotateBody, TokenBody},
    document::Document,
    error::ApiError,
    path::KeyPath,
};
use crate::service::{KeyRequest, Scope, Service, TokenRequest};

/// Seconds that a token works when it asks for nothing else.
const TOKEN_LIFETIME: u64 = 300;

/// Lists the organisation's API keys; for a member, the member's own.
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
        api_keys: service.keys(&caller).await?,
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
    service.revoke_key(&caller, &id).await?;
    Ok(Json(Success::OK))
}

/// Puts another key in the place of one: the same name, scopes and length of life. The old one ends at once, or after
/// `grace_seconds`.
#[utoipa::path(
    post, path = "/api-keys/{id}/rotate", operation_id = "rotate_api_key", tag = "accounts",
    request_body = RotateBody, responses((status = 201, description = "The new key, shown once", body = ApiKeyCreated))
)]
pub(super) async fn rotate(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    KeyPath(id): KeyPath,
    mut document: Document,
) -> Result<(StatusCode, Json<ApiKeyCreated>), ApiError> {
    caller.may(Scope::Keys)?;
    document.organization(&caller)?;
    let grace = document.whole("grace_seconds", 0..=86_400)?.unwrap_or(0);
    document.finish()?;
    let (api_key, key) = service
        .rotate_key(&caller, &id, Duration::from_secs(grace))
        .await?;
    Ok((StatusCode::CREATED, Json(ApiKeyCreated { api_key, key })))
}

/// Makes a token (a JSON Web Token) that works for a short time in the key's place: in a browser, as `?token=`. It ends
/// with its key, and makes neither keys nor users nor other tokens.
#[utoipa::path(
    post, path = "/tokens", operation_id = "create_token", tag = "accounts",
    request_body = TokenBody, responses((status = 201, description = "The token", body = TokenCreated))
)]
pub(super) async fn create_token(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    mut document: Document,
) -> Result<(StatusCode, Json<TokenCreated>), ApiError> {
    document.organization(&caller)?;
    let seconds = document.whole("expires_in", 1..=3_600)?.unwrap_or(TOKEN_LIFETIME);
    let request = TokenRequest {
        lifetime: Duration::from_secs(seconds),
        scopes: document.texts("scopes")?,
    };
    document.finish()?;
    Ok((StatusCode::CREATED, Json(service.make_token(&caller, request)?)))
}
