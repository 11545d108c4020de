//! Registration.

use axum::{Json, extract::State};
use http::StatusCode;
use sandgate_api::rest::RegisterResponse;

use super::{document::Document, error::ApiError};
use crate::service::{Registration, Service};

pub(super) async fn register(
    State(service): State<Service>,
    document: Document,
) -> Result<(StatusCode, Json<RegisterResponse>), ApiError> {
    let registered = service.register(request(document)?).await?;
    Ok((StatusCode::CREATED, Json(registered)))
}

fn request(mut document: Document) -> Result<Registration, ApiError> {
    let registration = Registration {
        email: document.required_text("email")?,
        organization_name: document.required_text("organization_name")?,
        first_name: document.text("first_name")?,
        last_name: document.text("last_name")?,
        use_case: document.text("use_case")?,
    };
    document.finish()?;
    Ok(registration)
}
