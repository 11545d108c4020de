//! The API's description as it is served, and a page that shows it. Both are parts of this program: the page
//! loads nothing from anywhere else, and its policy lets it load nothing.

use std::sync::Arc;

use axum::{
    Extension,
    response::{IntoResponse as _, Response},
};
use bytes::Bytes;
use http::{HeaderName, HeaderValue, header};

const PAGE: &str = include_str!("reference/page.html");
const SCRIPT: &str = include_str!("reference/page.js");
const STYLE: &str = include_str!("reference/page.css");

/// Only what this server itself serves, no inline code, no frames, no forms.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// The description, written once.
#[derive(Clone)]
pub(super) struct Description(pub(super) Arc<[u8]>);

/// This description, OpenAPI 3.1.
#[utoipa::path(
    get, path = "/openapi.json", operation_id = "openapi", tag = "reference", security(()),
    responses((status = 200, description = "OpenAPI 3.1", body = Object))
)]
pub(super) async fn openapi(Extension(description): Extension<Description>) -> Response {
    served("application/json", Bytes::from_owner(description.0))
}

/// A page that shows this description.
#[utoipa::path(
    get, path = "/docs", operation_id = "docs", tag = "reference", security(()),
    responses((status = 200, description = "The page", body = String, content_type = "text/html"))
)]
pub(super) async fn page() -> Response {
    served("text/html; charset=utf-8", PAGE.into())
}

/// The page's script.
#[utoipa::path(
    get, path = "/docs/page.js", operation_id = "docs_script", tag = "reference", security(()),
    responses((status = 200, description = "The script", body = String, content_type = "text/javascript"))
)]
pub(super) async fn script() -> Response {
    served("text/javascript; charset=utf-8", SCRIPT.into())
}

/// The page's style.
#[utoipa::path(
    get, path = "/docs/page.css", operation_id = "docs_style", tag = "reference", security(()),
    responses((status = 200, description = "The style", body = String, content_type = "text/css"))
)]
pub(super) async fn style() -> Response {
    served("text/css; charset=utf-8", STYLE.into())
}

fn served(content_type: &'static str, body: Bytes) -> Response {
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static(content_type)),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        (header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY)),
        (
            header::X_CONTENT_TYPE_OPTIONS,
            HeaderValue::from_static("nosniff"),
        ),
        (header::REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
        (
            HeaderName::from_static("cross-origin-opener-policy"),
            HeaderValue::from_static("same-origin"),
        ),
    ];
    (headers, body).into_response()
}
