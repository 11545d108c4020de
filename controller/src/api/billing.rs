//! Billing, which an installation of one's own does not have: published clients ask all the same.

use axum::Json;
use sandgate_api::{
    error::ErrorCode,
    rest::{Invoices, Subscription, Success},
};

use super::{auth::Authenticated, error::ApiError};

/// The subscription: none, the installation is one's own.
#[utoipa::path(
    get, path = "/billing/subscription", operation_id = "get_subscription", tag = "accounts",
    responses((status = 200, description = "No subscription", body = Subscription))
)]
pub(super) async fn subscription(Authenticated(_caller): Authenticated) -> Json<Subscription> {
    Json(Subscription::SELF_HOSTED)
}

/// Lists invoices, of which there are none.
#[utoipa::path(
    get, path = "/billing/invoices", operation_id = "list_invoices", tag = "accounts",
    responses((status = 200, description = "No invoices", body = Invoices))
)]
pub(super) async fn invoices(Authenticated(_caller): Authenticated) -> Json<Invoices> {
    Json(Invoices { invoices: Vec::new() })
}

/// Refuses: there is no plan to change to.
#[utoipa::path(
    post, path = "/billing/upgrade", operation_id = "upgrade_plan", tag = "accounts",
    responses((status = 200, description = "Never: always a 409", body = Success))
)]
pub(super) async fn upgrade(Authenticated(_caller): Authenticated) -> ApiError {
    refused()
}

/// Refuses: there is no portal.
#[utoipa::path(
    post, path = "/billing/portal", operation_id = "billing_portal", tag = "accounts",
    responses((status = 200, description = "Never: always a 409", body = Success))
)]
pub(super) async fn portal(Authenticated(_caller): Authenticated) -> ApiError {
    refused()
}

fn refused() -> ApiError {
    ApiError::new(
        ErrorCode::Conflict,
        "this installation is self-hosted: nothing is billed, and there is no plan to change",
    )
}
