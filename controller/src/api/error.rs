//! The one table from errors to statuses. What is inside a 5xx stays in the log.

use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use sandgate_api::error::{ErrorBody, ErrorCode, ErrorEnvelope};
use serde_json::{Map, Value};

use crate::service::ServiceError;

/// Seconds after which whoever has too much at once may try again: what it has ends when it likes.
const RETRY_AFTER: &str = "5";

/// An answer that is not 2xx. [`super::request`] writes its body, which names the request.
#[derive(Debug, Clone)]
pub(crate) struct ApiError {
    code: ErrorCode,
    message: String,
    details: Option<Map<String, Value>>,
    /// How long what was asked for is, where a range of it was asked for.
    length: Option<u64>,
}

impl ApiError {
    pub(crate) fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            details: None,
            length: None,
        }
    }

    /// 400, naming the field.
    pub(crate) fn field(field: impl Into<String>, message: impl Into<String>) -> Self {
        let field = field.into();
        let message = message.into();
        let message = if field.is_empty() {
            message
        } else {
            format!("{field}: {message}")
        };
        Self::new(ErrorCode::ValidationError, message).detail("field", field)
    }

    fn detail(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.details
            .get_or_insert_with(Map::new)
            .insert(name.to_owned(), value.into());
        self
    }

    /// Adds the field to an error that has a code of its own.
    pub(crate) fn naming(self, field: &str) -> Self {
        self.detail("field", field)
    }

    /// Says how long it is that was asked for.
    pub(crate) fn of_length(mut self, length: u64) -> Self {
        self.length = Some(length);
        self
    }

    #[cfg(test)]
    pub(crate) fn refused_field(&self) -> Option<String> {
        Some(self.details.as_ref()?.get("field")?.as_str()?.to_owned())
    }

    /// For people.
    pub(super) fn message(&self) -> &str {
        &self.message
    }

    pub(crate) fn code(&self) -> ErrorCode {
        self.code
    }

    /// With status and body.
    pub(super) fn render(self, request_id: &str) -> Response {
        let status = StatusCode::from_u16(self.code.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let envelope = ErrorEnvelope {
            error: ErrorBody {
                code: self.code,
                message: self.message,
                request_id: Some(request_id.to_owned()),
                details: self.details,
            },
        };
        let mut response = (status, axum::Json(envelope)).into_response();
        if status == StatusCode::UNAUTHORIZED {
            response
                .headers_mut()
                .insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if let Some(length) = self.length
            && let Ok(range) = HeaderValue::try_from(format!("bytes */{length}"))
        {
            response.headers_mut().insert(header::CONTENT_RANGE, range);
        }
        if status == StatusCode::TOO_MANY_REQUESTS {
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, HeaderValue::from_static(RETRY_AFTER));
        }
        response
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.code.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = status.into_response();
        response.extensions_mut().insert(self);
        response
    }
}

impl From<ServiceError> for ApiError {
    fn from(error: ServiceError) -> Self {
        let message = error.to_string();
        match error {
            ServiceError::Invalid { field, message } => Self::field(field, message),
            ServiceError::Unauthorized(_) => Self::new(ErrorCode::Unauthorized, message),
            ServiceError::Forbidden(_) => Self::new(ErrorCode::Forbidden, message),
            ServiceError::Quota(_) => Self::new(ErrorCode::QuotaExceeded, message),
            ServiceError::SandboxNotFound(_) => Self::new(ErrorCode::SandboxNotFound, message),
            ServiceError::FileNotFound(_) => Self::new(ErrorCode::FileNotFound, message),
            ServiceError::NotFound(_) => Self::new(ErrorCode::NotFound, message),
            ServiceError::Conflict(_) => Self::new(ErrorCode::Conflict, message),
            ServiceError::Stale { current } => {
                Self::new(ErrorCode::Conflict, message).detail("revision", current)
            }
            ServiceError::TooLarge(_) => Self::new(ErrorCode::PayloadTooLarge, message),
            ServiceError::TooMany(_) => Self::new(ErrorCode::RateLimited, message),
            ServiceError::Unavailable(_) => Self::new(ErrorCode::Unavailable, message),
            ServiceError::Store(error) => {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "a request failed in the store"
                );
                Self::new(
                    ErrorCode::InternalError,
                    "the request failed; the log has the reason",
                )
            }
            ServiceError::Internal(reason) => {
                tracing::error!(reason, "a request failed");
                Self::new(
                    ErrorCode::InternalError,
                    "the request failed; the log has the reason",
                )
            }
        }
    }
}

/// A revision that came by `If-Match` is a precondition; one in the body is part of the request.
pub(super) fn precondition(error: ServiceError, by_header: bool) -> ApiError {
    match error {
        ServiceError::Stale { current } if by_header => {
            ApiError::new(ErrorCode::PreconditionFailed, error.to_string()).detail("revision", current)
        }
        other => other.into(),
    }
}
