//! How the installation is. No credential: there is nothing secret in it.

use axum::{Json, extract::State, response::IntoResponse as _, response::Response};
use http::StatusCode;

use crate::service::Service;

/// 200 while the controller can answer requests at all.
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
pub(super) async fn ready(State(service): State<Service>) -> Response {
    let health = service.health().await;
    let status = if Service::is_ready(&health) {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    (status, Json(health)).into_response()
}
