//! The warm pool.

use axum::{Json, extract::State};
use sandgate_api::rest::PoolStats;

use super::{auth::Authenticated, error::ApiError};
use crate::service::{Scope, Service};

/// Shows how the warm pool is, and what it was worth.
///
/// Hits and misses are those of the caller's organisation: what others do is not theirs to see.
#[utoipa::path(
    get, path = "/pool/stats", operation_id = "pool_stats", tag = "sandboxes",
    responses((status = 200, description = "The pool", body = PoolStats))
)]
pub(super) async fn stats(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
) -> Result<Json<PoolStats>, ApiError> {
    caller.may(Scope::SandboxRead)?;
    Ok(Json(service.pool_stats(caller.org_id())))
}
