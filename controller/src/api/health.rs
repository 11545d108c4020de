//! How the installation is. No credential: there is nothing secret in it.

use axum::{Json, extract::State, response::IntoResponse as _, response::Response};
use http::StatusCode;

use crate::service::Service;

/// 200 while the controller can answer requests at all.
#[utoipa::path(
    get, path = "/health", operation_id = "health", tag = "operations", security(()),
    responses(
        (status = 200, description = "The controller answers", body = sandgate_api::rest::Health),
        (status = 503, description = "The database does not", body = sandgate_api::rest::Health)
    )
)]
pub(super) async fn health(State(service): State<Service>) -> Response {
    let health = service.health().await;
    let status = if health.database == "ok" {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    (status, Json(health)).into_response()
}

/// 200 while a sandbox could be created.
#[utoipa::path(
    get, path = "/ready", operation_id = "ready", tag = "operations", security(()),
    responses(
        (status = 200, description = "A sandbox could be created now", body = sandgate_api::rest::Health),
        (status = 503, description = "No sandbox can be created at the moment", body = sandgate_api::rest::Health)
    )
)]
pub(super) async fn ready(State(service): State<Service>) -> Response {
    let health = service.health().await;
    let status = if Service::is_ready(&health) {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    (status, Json(health)).into_response()
}
