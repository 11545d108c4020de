//! Registration.

use axum::{Json, extract::State};
use http::StatusCode;
use sandgate_api::rest::RegisterResponse;

use super::{bodies::RegisterBody, document::Document, error::ApiError, present};
use crate::service::{Caller, Registration, Service};

/// Registers an organisation and its first user, where the installation lets strangers do so; with an invitation into
/// an organisation, a user of that one.
#[utoipa::path(
    post, path = "/register", operation_id = "register", tag = "accounts", security(()),
    request_body = RegisterBody, responses((status = 201, description = "The organisation, its first user and its first key", body = RegisterResponse))
)]
pub(super) async fn register(
    State(service): State<Service>,
    document: Document,
) -> Result<(StatusCode, Json<RegisterResponse>), ApiError> {
    let registered = service.register(request(document)?).await?;
    present::asks(&Caller::registered(&registered));
    Ok((StatusCode::CREATED, Json(registered)))
}

fn request(mut document: Document) -> Result<Registration, ApiError> {
    let registration = Registration {
        email: document.required_text("email")?,
        organization_name: document.text("organization_name")?,
        first_name: document.text("first_name")?,
        last_name: document.text("last_name")?,
        use_case: document.text("use_case")?,
        invitation: document.text("invitation")?,
    };
    document.finish()?;
    Ok(registration)
}
