//! The error envelope of the REST API: `{"error": {"code", "message", "request_id", "details"}}`.

use serde::{Deserialize, Serialize};

/// What went wrong, as a word clients can compare. Part of the published contract.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum ErrorCode {
    /// 400: the request is not well-formed; `details.field` names the field.
    ValidationError,
    /// 400: the isolation level is not available here.
    UnsupportedIsolation,
    /// 401: no credential, or one that is unknown, revoked or expired.
    Unauthorized,
    /// 403: the credential is valid, and this is not its business.
    Forbidden,
    /// 403: a limit of the organisation is reached.
    QuotaExceeded,
    /// 404: no such sandbox in this organisation.
    SandboxNotFound,
    /// 404: no such file in the sandbox.
    FileNotFound,
    /// 404: no such route or other object.
    NotFound,
    /// 405: the path exists, the method does not.
    MethodNotAllowed,
    /// 409: the request does not fit the present state.
    Conflict,
    /// 412: `If-Match` names another revision than the present one.
    PreconditionFailed,
    /// 413: the body, or a field of it, is too large.
    PayloadTooLarge,
    /// 416: the file is shorter than the range that was asked for begins.
    RangeNotSatisfiable,
    /// 429: too many requests; `Retry-After` says when.
    RateLimited,
    /// 500: our fault; the log has the rest under the request id.
    InternalError,
    /// 503: a part of the system is not there at the moment.
    Unavailable,
}

impl ErrorCode {
    /// The HTTP status that goes with the code.
    pub fn status(self) -> u16 {
        match self {
            Self::ValidationError | Self::UnsupportedIsolation => 400,
            Self::Unauthorized => 401,
            Self::Forbidden | Self::QuotaExceeded => 403,
            Self::SandboxNotFound | Self::FileNotFound | Self::NotFound => 404,
            Self::MethodNotAllowed => 405,
            Self::Conflict => 409,
            Self::PreconditionFailed => 412,
            Self::PayloadTooLarge => 413,
            Self::RangeNotSatisfiable => 416,
            Self::RateLimited => 429,
            Self::InternalError => 500,
            Self::Unavailable => 503,
        }
    }
}

/// The body of every answer that is not 2xx.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ErrorEnvelope {
    /// The error itself.
    pub error: ErrorBody,
}

/// The inside of [`ErrorEnvelope`].
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// Comparable.
    pub code: ErrorCode,
    /// For people: what is wrong and, where it can be said, what would be right.
    pub message: String,
    /// Also in the `x-request-id` header.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
    /// Always an object when present: published clients crash on anything else.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<Object>))]
    pub details: Option<serde_json::Map<String, serde_json::Value>>,
}
