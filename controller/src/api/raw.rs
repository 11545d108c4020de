//! Files as they are: any length, in both directions, at the memory of a few frames.

use std::time::Duration;

use axum::{
    Json,
    body::Body,
    extract::{Request, State},
    response::{IntoResponse as _, Response},
};
use bytes::Bytes;
use futures_util::{Stream, stream};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use http_body_util::BodyExt as _;
use jiff::{Timestamp, fmt::rfc2822::DateTimePrinter};
use sandgate_api::{
    agent::OpenedFile,
    error::{ErrorCode, ErrorEnvelope},
    id::SandboxId,
    rest::FileStored,
};

use super::{
    auth::Authenticated,
    document::drain,
    error::ApiError,
    path::{self, SandboxPath},
    query::Parameters,
};
use crate::service::{Caller, MAX_STREAMED, Scope, Service, ServiceError};

/// How long a body may stand still. The agent waits longer.
const STALL: Duration = Duration::from_secs(30);

/// Stores a file that is the body, of any length. Nothing shows at the path before all of it has come.
#[utoipa::path(
    put, path = "/sandbox/{id}/files/raw", operation_id = "store_file", tag = "files",
    params(
        ("path" = String, Query, description = "Absolute; missing directories are made"),
        ("mode" = Option<String>, Query, description = "Permission bits in octal, for example `0755`; else those of the file that is replaced, or `0644`")
    ),
    request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    responses((status = 200, description = "It is stored", body = FileStored))
)]
pub(super) async fn put(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    SandboxPath(id): SandboxPath,
    parameters: Parameters,
    request: Request,
) -> Result<Json<FileStored>, ApiError> {
    caller.may(Scope::SandboxExecute)?;
    let path = parameters.text("path").unwrap_or_default();
    path::file("path", path)?;
    let mode = mode(&parameters)?;
    let size = declared(request.headers());
    let waits = request.headers().contains_key(header::EXPECT);
    let mut body = request.into_body();
    let stored = match size {
        Some(size) if size > MAX_STREAMED => Err(ServiceError::TooLarge(format!(
            "a file is at most {MAX_STREAMED} bytes long"
        ))),
        Some(_) | None => {
            let parts = arriving(&mut body);
            service
                .store_file((caller.org_id(), &id), path, (size, mode), parts)
                .await
        }
    };
    match stored {
        Ok(size) => Ok(Json(FileStored {
            success: true,
            path: path.to_owned(),
            size,
        })),
        Err(error) => {
            if !waits {
                drain(&mut body).await;
            }
            Err(error.into())
        }
    }
}

fn declared(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

fn mode(parameters: &Parameters) -> Result<Option<u32>, ApiError> {
    let Some(text) = parameters.text("mode") else {
        return Ok(None);
    };
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 => Ok(Some(mode)),
        Ok(_) | Err(_) => Err(ApiError::field(
            "mode",
            "expected permission bits in octal, for example 0755",
        )),
    }
}

/// A body as it comes; no more is taken from the client than is asked for here.
pub(super) fn arriving(body: &mut Body) -> impl Stream<Item = Result<Bytes, ServiceError>> {
    let refuse = |message: &str| ServiceError::Invalid {
        field: String::new(),
        message: message.to_owned(),
    };
    stream::unfold(Some(body), move |body| async move {
        let body = body?;
        loop {
            match tokio::time::timeout(STALL, body.frame()).await {
                Ok(None) => return None,
                Ok(Some(Ok(frame))) => match frame.into_data() {
                    Ok(bytes) if !bytes.is_empty() => return Some((Ok(bytes), Some(body))),
                    // Trailers say nothing here.
                    Ok(_) | Err(_) => {}
                },
                Ok(Some(Err(error))) => {
                    tracing::debug!(%error, "a body broke off");
                    return Some((Err(refuse("the body broke off")), None));
                }
                Err(_elapsed) => return Some((Err(refuse("the body stood still")), None)),
            }
        }
    })
}

/// The file's bytes as they are, all or one range of them. A file that breaks off breaks the connection off. Of several
/// ranges none is looked at: the whole file comes.
#[utoipa::path(
    get, path = "/sandbox/{id}/files/raw", operation_id = "fetch_file", tag = "files",
    params(
        ("path" = String, Query, description = "Absolute"),
        ("Range" = Option<String>, Header, description = "`bytes=0-99`, `bytes=100-` or `bytes=-100`"),
        ("If-Range" = Option<String>, Header, description = "The `ETag` or `Last-Modified` that the file must still have for `Range` to count")
    ),
    responses(
        (status = 200, description = "The bytes, with `ETag` and `Last-Modified`", body = Vec<u8>, content_type = "application/octet-stream"),
        (status = 206, description = "The range, which `Content-Range` names", body = Vec<u8>, content_type = "application/octet-stream"),
        (status = 416, description = "The file has no such range; `Content-Range` says how long it is", body = ErrorEnvelope)
    )
)]
pub(super) async fn get(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    SandboxPath(id): SandboxPath,
    parameters: Parameters,
    method: Method,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    answer(&service, &caller, &id, &parameters, &headers, &method).await
}

/// The same under the name that published guides have for it.
#[utoipa::path(
    get, path = "/sandbox/{id}/files/download", operation_id = "download_file", tag = "files",
    params(
        ("path" = String, Query, description = "Absolute"),
        ("Range" = Option<String>, Header, description = "As of `files/raw`"),
        ("If-Range" = Option<String>, Header, description = "As of `files/raw`")
    ),
    responses(
        (status = 200, description = "The bytes", body = Vec<u8>, content_type = "application/octet-stream"),
        (status = 206, description = "The range", body = Vec<u8>, content_type = "application/octet-stream"),
        (status = 416, description = "The file has no such range", body = ErrorEnvelope)
    )
)]
pub(super) async fn download(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    SandboxPath(id): SandboxPath,
    parameters: Parameters,
    method: Method,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    answer(&service, &caller, &id, &parameters, &headers, &method).await
}

async fn answer(
    service: &Service,
    caller: &Caller,
    id: &SandboxId,
    parameters: &Parameters,
    headers: &HeaderMap,
    method: &Method,
) -> Result<Response, ApiError> {
    caller.may(Scope::SandboxExecute)?;
    let path = parameters.text("path").unwrap_or_default();
    path::inside("path", path)?;
    let opened = service.open_file(caller.org_id(), id, path).await?;
    let file = opened.file();
    let shown = Shown::of(&file);
    let (status, offset, length) = match shown.wanted(headers) {
        Wanted::Whole => (StatusCode::OK, 0, file.size),
        Wanted::Part { offset, length } => (StatusCode::PARTIAL_CONTENT, offset, length),
        Wanted::Nothing => {
            let message = format!("the file has {} bytes, and none in this range", file.size);
            return Err(ApiError::new(ErrorCode::RangeNotSatisfiable, message).of_length(file.size));
        }
    };
    let body = if method == Method::HEAD {
        Body::empty()
    } else {
        let part = opened.part(offset, length).await.map_err(ServiceError::from)?;
        let bytes = stream::unfold(part, |mut part| async move {
            let bytes = part.next().await?;
            Some((bytes, part))
        });
        Body::from_stream(bytes)
    };
    let mut response = (status, body).into_response();
    let mut add = |name: HeaderName, value: String| {
        if let Ok(value) = HeaderValue::try_from(value) {
            response.headers_mut().insert(name, value);
        }
    };
    add(header::CONTENT_TYPE, "application/octet-stream".to_owned());
    add(header::CONTENT_LENGTH, length.to_string());
    add(header::CONTENT_DISPOSITION, "attachment".to_owned());
    // The bytes are the sandbox's: no browser may take them for a page of ours.
    add(header::X_CONTENT_TYPE_OPTIONS, "nosniff".to_owned());
    add(header::ACCEPT_RANGES, "bytes".to_owned());
    add(header::ETAG, shown.etag);
    if let Some(modified) = shown.modified {
        add(header::LAST_MODIFIED, modified);
    }
    if status == StatusCode::PARTIAL_CONTENT {
        let last = offset + length - 1;
        add(
            header::CONTENT_RANGE,
            format!("bytes {offset}-{last}/{}", file.size),
        );
    }
    Ok(response)
}

/// What a client compares.
struct Shown {
    size: u64,
    etag: String,
    modified: Option<String>,
}

#[derive(Debug, PartialEq, Eq)]
enum Wanted {
    Whole,
    Part { offset: u64, length: u64 },
    Nothing,
}

impl Shown {
    fn of(file: &OpenedFile) -> Self {
        let modified = Timestamp::from_second(file.modified).ok();
        Self {
            size: file.size,
            etag: format!("\"{:016x}\"", file.version),
            // Years of more than four digits have no such form.
            modified: modified
                .and_then(|time| DateTimePrinter::new().timestamp_to_rfc9110_string(&time).ok()),
        }
    }

    /// What of the file is to be sent (RFC 9110, 14). What is no range of bytes is no range at all.
    fn wanted(&self, headers: &HeaderMap) -> Wanted {
        let text = |name| {
            headers
                .get(name)
                .and_then(|value: &HeaderValue| value.to_str().ok())
        };
        let Some(range) = text(header::RANGE) else {
            return Wanted::Whole;
        };
        if let Some(condition) = headers.get(header::IF_RANGE) {
            let condition = condition.to_str().unwrap_or_default().trim();
            if condition != self.etag && Some(condition) != self.modified.as_deref() {
                return Wanted::Whole;
            }
        }
        let Some((first, last)) = range
            .trim()
            .strip_prefix("bytes=")
            .and_then(|range| range.split_once('-'))
        else {
            return Wanted::Whole;
        };
        let (first, last) = (first.trim(), last.trim());
        let number = |text: &str| {
            let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            // More than fits is more than any file has.
            digits.then(|| text.parse::<u64>().unwrap_or(u64::MAX))
        };
        match (first, number(first), last, number(last)) {
            ("", None, _, Some(0)) => Wanted::Nothing,
            ("", None, _, Some(count)) => self.part(self.size.saturating_sub(count), self.size),
            (_, Some(first), "", None) => self.part(first, self.size),
            (_, Some(first), _, Some(last)) if first <= last => {
                self.part(first, last.saturating_add(1).min(self.size))
            }
            (_, _, _, _) => Wanted::Whole,
        }
    }

    fn part(&self, offset: u64, end: u64) -> Wanted {
        if offset >= self.size {
            return Wanted::Nothing;
        }
        Wanted::Part {
            offset,
            length: end - offset,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(size: u64) -> Shown {
        Shown::of(&OpenedFile {
            size,
            modified: 1_769_767_200,
            version: 0xab,
        })
    }

    fn wanted(size: u64, range: &'static str, condition: Option<&'static str>) -> Wanted {
        let mut headers = HeaderMap::new();
        headers.insert(header::RANGE, HeaderValue::from_static(range));
        if let Some(condition) = condition {
            headers.insert(header::IF_RANGE, HeaderValue::from_static(condition));
        }
        shown(size).wanted(&headers)
    }

    #[test]
    fn one_range_is_served_and_what_is_none_is_the_whole() {
        let part = |offset, length| Wanted::Part { offset, length };
        for (range, expected) in [
            ("bytes=0-0", part(0, 1)),
            ("bytes=2-4", part(2, 3)),
            ("bytes=2-", part(2, 8)),
            ("bytes=9-1000", part(9, 1)),
            ("bytes=-3", part(7, 3)),
            ("bytes=-1000", part(0, 10)),
            ("bytes=0-99999999999999999999999", part(0, 10)),
            ("bytes=10-", Wanted::Nothing),
            ("bytes=99999999999999999999999-", Wanted::Nothing),
            ("bytes=-0", Wanted::Nothing),
            ("bytes=4-2", Wanted::Whole),
            ("bytes=0-1,3-4", Wanted::Whole),
            ("bytes=-", Wanted::Whole),
            ("bytes=a-b", Wanted::Whole),
            ("bytes=+1-2", Wanted::Whole),
            ("lines=1-2", Wanted::Whole),
            ("", Wanted::Whole),
        ] {
            assert_eq!(wanted(10, range, None), expected, "{range:?}");
        }
        assert_eq!(wanted(0, "bytes=0-", None), Wanted::Nothing);
        assert_eq!(wanted(0, "bytes=-5", None), Wanted::Nothing);
    }

    #[test]
    fn a_range_of_another_file_is_not_served() {
        let part = Wanted::Part { offset: 1, length: 1 };
        assert_eq!(wanted(10, "bytes=1-1", Some("\"00000000000000ab\"")), part);
        assert_eq!(
            wanted(10, "bytes=1-1", Some("Fri, 30 Jan 2026 10:00:00 GMT")),
            part
        );
        for other in [
            "\"00000000000000ac\"",
            "W/\"00000000000000ab\"",
            "Fri, 30 Jan 2026 10:00:01 GMT",
            "",
        ] {
            assert_eq!(wanted(10, "bytes=1-1", Some(other)), Wanted::Whole, "{other}");
        }
    }
}
