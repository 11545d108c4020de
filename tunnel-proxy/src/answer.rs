//! What tunnel-proxy answers itself, in the place of the program behind the tunnel: JSON, or a small page for
//! browsers. Owns: the one table from problems to statuses. An answer of ours is never kept by a cache.

use bytes::Bytes;
use http::{
    HeaderMap, HeaderName, HeaderValue, Response, StatusCode,
    header::{
        ACCEPT, ALLOW, CACHE_CONTROL, CONNECTION, CONTENT_SECURITY_POLICY, CONTENT_TYPE, PROXY_AUTHENTICATE,
        RETRY_AFTER, WWW_AUTHENTICATE, X_CONTENT_TYPE_OPTIONS,
    },
};
use http_body_util::{BodyExt as _, Full};
use sandgate_api::control::DialError;
use sandgate_relay::{
    http1::strict::{TOO_LONG, TOO_SLOW},
    inward::DialFailure,
};
use serde_json::json;

use crate::{forward::body::Body, upstream::UpstreamError};

/// Carries the request's id, as everywhere in Sandgate.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Tells an answer of ours from one of the program behind the tunnel.
const ERROR_HEADER: HeaderName = HeaderName::from_static("x-sandgate-error");

/// Why the program behind the tunnel did not answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Problem {
    /// Not HTTP as it must be.
    Malformed(&'static str),
    /// A method that is served elsewhere.
    Connect,
    /// No tunnel of this name.
    Unknown,
    /// The tunnel is no more.
    Expired,
    /// It was closed meanwhile.
    Closed,
    /// No token.
    TokenMissing,
    /// The same, for a client of a proxy.
    ProxyTokenMissing,
    /// Another token.
    TokenWrong,
    /// Too much at once on this tunnel.
    TunnelFull,
    /// Too much at once in all.
    ProxyFull,
    /// The sandbox is no more.
    SandboxGone,
    /// Nothing listens.
    NotListening(u16),
    /// It does not take connections in time.
    Silent(u16),
    /// It breaks off, or speaks something else.
    Broken(u16),
    /// netd is away.
    NodeAway,
}

impl Problem {
    /// What a request is that could not be read.
    pub fn unreadable(why: &'static str) -> Self {
        Self::Malformed(why)
    }

    /// What an unsuccessful dial means for the client.
    pub fn dial(failure: &DialFailure, port: u16) -> Self {
        match failure {
            DialFailure::Refused(error) => match error {
                DialError::Refused => Self::NotListening(port),
                DialError::TimedOut => Self::Silent(port),
                DialError::UnknownSandbox => Self::SandboxGone,
                // netd knows already what we do not: the tunnel is closing.
                DialError::PortNotAllowed => Self::Closed,
                DialError::Failed => Self::Broken(port),
            },
            DialFailure::Silent | DialFailure::Away | DialFailure::Io(_) => Self::NodeAway,
        }
    }

    /// What an unanswered request means for the client.
    pub fn upstream(error: &UpstreamError, port: u16) -> Self {
        match error {
            UpstreamError::Full => Self::ProxyFull,
            UpstreamError::Dial(failure) => Self::dial(failure, port),
            UpstreamError::Http(_) => Self::Broken(port),
        }
    }

    /// The status.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::Malformed(why) if *why == TOO_LONG => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Self::Malformed(why) if *why == TOO_SLOW => StatusCode::REQUEST_TIMEOUT,
            Self::Malformed(_) => StatusCode::BAD_REQUEST,
            Self::Connect => StatusCode::METHOD_NOT_ALLOWED,
            Self::Unknown | Self::Closed | Self::SandboxGone => StatusCode::NOT_FOUND,
            Self::Expired => StatusCode::GONE,
            Self::TokenMissing => StatusCode::UNAUTHORIZED,
            Self::ProxyTokenMissing => StatusCode::PROXY_AUTHENTICATION_REQUIRED,
            Self::TokenWrong => StatusCode::FORBIDDEN,
            Self::TunnelFull => StatusCode::TOO_MANY_REQUESTS,
            Self::ProxyFull | Self::NodeAway => StatusCode::SERVICE_UNAVAILABLE,
            Self::NotListening(_) | Self::Broken(_) => StatusCode::BAD_GATEWAY,
            Self::Silent(_) => StatusCode::GATEWAY_TIMEOUT,
        }
    }

    /// The word that programs compare.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Malformed(_) => "VALIDATION_ERROR",
            Self::Connect => "METHOD_NOT_ALLOWED",
            Self::Unknown | Self::Closed => "TUNNEL_NOT_FOUND",
            Self::Expired => "TUNNEL_EXPIRED",
            Self::TokenMissing | Self::ProxyTokenMissing => "UNAUTHORIZED",
            Self::TokenWrong => "FORBIDDEN",
            Self::TunnelFull => "RATE_LIMITED",
            Self::ProxyFull | Self::NodeAway => "UNAVAILABLE",
            Self::SandboxGone => "SANDBOX_NOT_FOUND",
            Self::NotListening(_) => "PORT_NOT_LISTENING",
            Self::Silent(_) => "PORT_TIMED_OUT",
            Self::Broken(_) => "BAD_GATEWAY",
        }
    }

    /// For people. Holds nothing that the client sent.
    pub fn message(&self) -> String {
        match self {
            Self::Malformed(why) => format!("the request is not well-formed HTTP: {why}"),
            Self::Connect => {
                "CONNECT is served only on the loopback port of a private tunnel of protocol tcp".to_owned()
            }
            Self::Unknown => "there is no tunnel of this name".to_owned(),
            Self::Closed => "the tunnel was closed".to_owned(),
            Self::Expired => "the tunnel has expired".to_owned(),
            Self::TokenMissing => {
                "this tunnel is private: send its token in `Authorization: Bearer` or `X-Tunnel-Token`"
                    .to_owned()
            }
            Self::ProxyTokenMissing => {
                "this tunnel is private: send CONNECT with its token in `X-Tunnel-Token` or `Proxy-Authorization`"
                    .to_owned()
            }
            Self::TokenWrong => "this is not the token of this tunnel".to_owned(),
            Self::TunnelFull => "too many requests at once on this tunnel".to_owned(),
            Self::ProxyFull => "too many connections at once".to_owned(),
            Self::SandboxGone => "the sandbox is gone".to_owned(),
            Self::NotListening(port) => format!("nothing listens on port {port} in the sandbox"),
            Self::Silent(port) => format!("port {port} in the sandbox did not take the connection in time"),
            Self::Broken(port) => {
                format!("what listens on port {port} in the sandbox did not answer as the tunnel's protocol asks")
            }
            Self::NodeAway => "sandboxes cannot be reached at the moment".to_owned(),
        }
    }

    /// Seconds after which it may go better.
    fn retry_after(&self) -> Option<u32> {
        match self {
            Self::TunnelFull | Self::ProxyFull | Self::NodeAway => Some(1),
            Self::Malformed(_)
            | Self::Connect
            | Self::Unknown
            | Self::Closed
            | Self::Expired
            | Self::TokenMissing
            | Self::ProxyTokenMissing
            | Self::TokenWrong
            | Self::SandboxGone
            | Self::NotListening(_)
            | Self::Silent(_)
            | Self::Broken(_) => None,
        }
    }

    /// Whether nothing more is read from the connection.
    fn closes(&self) -> bool {
        matches!(
            self,
            Self::Malformed(_) | Self::ProxyFull | Self::TunnelFull | Self::ProxyTokenMissing
        )
    }

    /// The answer.
    pub fn answer(&self, request_id: &str, page: bool, is_http1: bool) -> Response<Body> {
        let status = self.status();
        let body = if page {
            self.page(request_id)
        } else {
            self.json(request_id)
        };
        let body = Full::new(Bytes::from(body)).map_err(|never| match never {});
        let mut response = Response::new(body.boxed_unsync());
        *response.status_mut() = status;
        let headers = response.headers_mut();
        let text = if page {
            "text/html; charset=utf-8"
        } else {
            "application/json"
        };
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(text));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        headers.insert(
            CONTENT_SECURITY_POLICY,
            HeaderValue::from_static("default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"),
        );
        headers.insert(ERROR_HEADER, HeaderValue::from_static(self.code()));
        if let Some(seconds) = self.retry_after() {
            headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(
                WWW_AUTHENTICATE,
                HeaderValue::from_static("Bearer realm=\"tunnel\""),
            );
        }
        if status == StatusCode::PROXY_AUTHENTICATION_REQUIRED {
            headers.append(
                PROXY_AUTHENTICATE,
                HeaderValue::from_static("Basic realm=\"tunnel\""),
            );
            headers.append(
                PROXY_AUTHENTICATE,
                HeaderValue::from_static("Bearer realm=\"tunnel\""),
            );
        }
        if status == StatusCode::METHOD_NOT_ALLOWED {
            headers.insert(
                ALLOW,
                HeaderValue::from_static("GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"),
            );
        }
        if self.closes() && is_http1 {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }

    /// As the API's errors.
    pub fn json(&self, request_id: &str) -> String {
        json!({"error": {"code": self.code(), "message": self.message(), "request_id": request_id}})
            .to_string()
    }

    fn page(&self, request_id: &str) -> String {
        let status = self.status();
        let reason = status.canonical_reason().unwrap_or("Error");
        format!(
            "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\"><title>{code} {reason}</title>\n\
             <style>body{{font:16px/1.5 system-ui,sans-serif;margin:4em auto;max-width:36em;padding:0 1em}}\
             small{{color:#666}}</style>\n<h1>{code} {reason}</h1>\n<p>{message}</p>\n\
             <p><small>Sandgate tunnel, request {request_id}</small></p>\n</html>\n",
            code = status.as_u16(),
            message = escape(&self.message()),
            request_id = escape(request_id),
        )
    }
}

fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            other => out.push(other),
        }
    }
    out
}

/// Whether a client would rather read a page: it names HTML, as browsers do.
pub fn wants_page(headers: &HeaderMap) -> bool {
    let mut ranges = headers
        .get_all(ACCEPT)
        .iter()
        .flat_map(|value| value.as_bytes().split(|byte| *byte == b','));
    ranges.any(|range| {
        let kind = range.split(|byte| *byte == b';').next().unwrap_or(range);
        let refused = range.split(|byte| *byte == b';').skip(1).any(|parameter| {
            let parameter = parameter.trim_ascii();
            matches!(parameter, b"q=0" | b"q=0.0" | b"q=0.00" | b"q=0.000")
        });
        let kind = kind.trim_ascii();
        !refused
            && (kind.eq_ignore_ascii_case(b"text/html")
                || kind.eq_ignore_ascii_case(b"application/xhtml+xml"))
    })
}

/// The client's own id for a request, when it is a short plain text.
pub fn given_id(headers: &HeaderMap) -> Option<String> {
    /// Longest id taken over from a client.
    const MAX_ID: usize = 128;
    let text = headers.get(REQUEST_ID)?.to_str().ok()?;
    let plain = (1..=MAX_ID).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic());
    plain.then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_problem_is_json_or_a_page_and_never_kept() {
        for page in [false, true] {
            let response = Problem::NodeAway.answer("<id>", page, true);
            assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
            assert_eq!(response.headers()[CACHE_CONTROL], "no-store");
            assert_eq!(response.headers()[RETRY_AFTER], "1");
            let body = response.into_body().collect().await.expect("a body").to_bytes();
            let body = String::from_utf8(body.to_vec()).expect("text");
            if page {
                assert!(body.contains("&lt;id&gt;") && !body.contains("<id>"), "{body}");
            } else {
                let body: serde_json::Value = serde_json::from_str(&body).expect("JSON");
                assert_eq!(body["error"]["code"], "UNAVAILABLE");
                assert_eq!(body["error"]["request_id"], "<id>");
            }
        }
        let response = Problem::TokenMissing.answer("id", false, false);
        assert_eq!(response.headers()[WWW_AUTHENTICATE], "Bearer realm=\"tunnel\"");
        assert!(response.headers().get(CONNECTION).is_none());
    }

    #[test]
    fn browsers_get_pages() {
        for (accept, page) in [
            (
                "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8",
                true,
            ),
            ("application/json, Text/HTML;q=0.5", true),
            ("*/*", false),
            ("application/json", false),
            ("text/html;q=0, application/json", false),
            ("text/htmlx", false),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(ACCEPT, HeaderValue::from_static(accept));
            assert_eq!(wants_page(&headers), page, "{accept}");
        }
        assert!(!wants_page(&HeaderMap::new()));
    }

    #[test]
    fn only_a_plain_id_is_taken_over() {
        let given = |id: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(REQUEST_ID, HeaderValue::from_static(id));
            given_id(&headers)
        };
        assert_eq!(given("abc-1").as_deref(), Some("abc-1"));
        assert_eq!(given("a b"), None);
        assert_eq!(given(""), None);
    }
}
