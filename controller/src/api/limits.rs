//! How answers say what limits there are.

use axum::response::Response;
use http::{HeaderName, HeaderValue, header};
use sandgate_api::error::ErrorCode;

use super::error::ApiError;
use crate::limiter::Allowance;

const LIMIT: HeaderName = HeaderName::from_static("ratelimit-limit");
const REMAINING: HeaderName = HeaderName::from_static("ratelimit-remaining");
const RESET: HeaderName = HeaderName::from_static("ratelimit-reset");

pub(super) fn too_many() -> ApiError {
    ApiError::new(
        ErrorCode::RateLimited,
        "too many requests; `Retry-After` says in how many seconds the next one may come",
    )
}

/// Says in an answer's headers what may still be done (draft-ietf-httpapi-ratelimit-headers-06).
pub(super) fn say(allowance: &Allowance, response: &mut Response) {
    let headers = response.headers_mut();
    headers.insert(LIMIT, allowance.limit.into());
    headers.insert(REMAINING, allowance.remaining.into());
    headers.insert(RESET, seconds(allowance.reset));
    if let Some(wait) = allowance.retry_after {
        headers.insert(header::RETRY_AFTER, seconds(wait));
    }
}

/// Whole seconds, rather too many than too few.
fn seconds(duration: std::time::Duration) -> HeaderValue {
    HeaderValue::from(duration.as_secs() + u64::from(duration.subsec_nanos() > 0))
}
