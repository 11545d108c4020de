//! The REST API: routes, and what happens to every request on its way.
//!
//! A request passes, from the outside in: [`request`] (its id, its log line, and the error envelope for
//! whatever comes back), routing, [`auth`] (who is it), the handler of its area (fields read and checked),
//! and then a use case of [`crate::service`]. Handlers hold no logic; an error becomes a status in one
//! place, [`error`].

mod accounts;
mod audit;
mod auth;
mod commands;
mod document;
mod error;
mod files;
mod health;
mod keys;
mod network;
mod path;
mod query;
mod request;
mod sandboxes;
mod secrets;
mod serve;
mod settings;
mod sse;

use axum::{
    Router, middleware,
    routing::{delete, get, post, put},
};
use sandgate_api::error::ErrorCode;

pub use serve::serve;

use crate::service::Service;
use error::ApiError;

/// Every route.
pub fn router(service: Service) -> Router {
    let v1 = Router::new()
        .route("/register", post(accounts::register))
        .route("/api-keys", get(keys::list).post(keys::create))
        .route("/api-keys/{id}", delete(keys::revoke))
        .route("/sandboxes", get(sandboxes::list))
        .route("/sandbox", post(sandboxes::create))
        .route("/sandbox/create", post(sandboxes::create))
        .route("/sandbox/{id}", get(sandboxes::get).delete(sandboxes::delete))
        .route("/sandbox/{id}/status", get(sandboxes::status))
        .route("/sandbox/{id}/stop", post(sandboxes::stop))
        .route("/sandbox/{id}/execute", post(commands::execute))
        .route("/sandbox/{id}/files", get(files::read).post(files::write))
        .route("/sandbox/{id}/files/list", get(files::list))
        .route("/sandbox/{id}/files/download", get(files::download))
        .route(
            "/sandbox/{id}/network",
            get(network::get).put(network::put).patch(network::patch),
        )
        .route("/sandbox/{id}/network/doctor", get(network::doctor))
        .route("/sandbox/{id}/secrets/inject", post(secrets::inject))
        .route("/secrets", get(secrets::list).post(secrets::create))
        .route("/secrets/{name}", put(secrets::update).delete(secrets::delete))
        .route(
            "/settings/egress",
            get(settings::get_egress).put(settings::put_egress),
        )
        .route("/egress/audit", get(audit::list));
    let metrics = service.metrics().clone();
    Router::new()
        .nest("/api/v1", v1)
        .route("/health", get(health::health))
        .route("/ready", get(health::ready))
        .fallback(no_such_route)
        .method_not_allowed_fallback(no_such_method)
        .with_state(service)
        .layer(middleware::from_fn_with_state(metrics, request::around))
}

async fn no_such_route() -> ApiError {
    ApiError::new(ErrorCode::NotFound, "there is no such endpoint")
}

async fn no_such_method() -> ApiError {
    ApiError::new(
        ErrorCode::MethodNotAllowed,
        "this endpoint does not know the method",
    )
}

#[cfg(test)]
mod tests;
