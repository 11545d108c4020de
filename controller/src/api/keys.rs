//! API keys.

use axum::{Json, extract::State};
use http::StatusCode;
use sandgate_api::rest::{ApiKeyCreated, ApiKeyList, Success};

use super::{auth::Authenticated, document::Document, error::ApiError, path::KeyPath};
use crate::service::{KeyRequest, Scope, Service};

pub(super) async fn list(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
) -> Result<Json<ApiKeyList>, ApiError> {
    caller.may(Scope::Keys)?;
    Ok(Json(ApiKeyList {
        api_keys: service.keys(caller.org_id()).await?,
    }))
}

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

pub(super) async fn revoke(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    KeyPath(id): KeyPath,
) -> Result<Json<Success>, ApiError> {
    caller.may(Scope::Keys)?;
    service.revoke_key(caller.org_id(), &id).await?;
    Ok(Json(Success::OK))
}
