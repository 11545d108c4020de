//! JSON documents written by users, read field by field, so that a refusal names the field.
//!
//! An empty body is an empty document; `null` is an absent field; what is left when everything known has
//! been taken is a misspelt field, and refused.

use std::{collections::BTreeMap, ops::RangeInclusive, time::Duration};

use axum::{
    body::Body,
    extract::{FromRequest, Request},
};
use bytes::Bytes;
use http::header;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use jiff::Timestamp;
use sandgate_api::error::ErrorCode;
use serde_json::{Map, Value};

use super::{auth::same_organization, error::ApiError};
use crate::service::{Caller, Service};

/// Largest body of an ordinary request, in bytes. A policy of 10,000 rules has room in it.
const MAX_BODY: usize = 4 * 1024 * 1024;

/// Largest body of a request that carries files, in bytes.
const MAX_FILES_BODY: usize = 64 * 1024 * 1024;

/// How long a body may take to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(120);

/// How much of a body that is too large is read to its end, so that the client reads the answer and not a
/// reset connection.
const DRAINED: usize = 256 * 1024 * 1024;

/// How long that may take.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(15);

/// A document of at most 4 MiB.
#[derive(Debug, Default)]
pub(super) struct Document {
    fields: Map<String, Value>,
    /// Path of the document inside a larger one, with a dot at its end; empty for a whole body.
    inside: String,
}

/// A document of at most 64 MiB.
pub(super) struct LargeDocument(pub(super) Document);

/// A document of at most 4 MiB in which `null` means something: a merge patch (RFC 7396).
pub(super) struct PatchDocument(pub(super) Document);

impl FromRequest<Service> for PatchDocument {
    type Rejection = ApiError;

    async fn from_request(request: Request, _service: &Service) -> Result<Self, ApiError> {
        let fields = fields(&read(request, MAX_BODY).await?)?;
        Ok(Self(Document {
            fields,
            inside: String::new(),
        }))
    }
}

impl FromRequest<Service> for Document {
    type Rejection = ApiError;

    async fn from_request(request: Request, _service: &Service) -> Result<Self, ApiError> {
        Self::parse(&read(request, MAX_BODY).await?)
    }
}

impl FromRequest<Service> for LargeDocument {
    type Rejection = ApiError;

    async fn from_request(request: Request, _service: &Service) -> Result<Self, ApiError> {
        let body = read(request, MAX_FILES_BODY).await?;
        // Tens of megabytes take tens of milliseconds: not on a thread that serves others.
        let parsed = tokio::task::spawn_blocking(move || Document::parse(&body)).await;
        let document = parsed
            .map_err(|_stopped| ApiError::new(ErrorCode::Unavailable, "the controller is shutting down"))??;
        Ok(Self(document))
    }
}

async fn read(request: Request, limit: usize) -> Result<Bytes, ApiError> {
    let too_large = || {
        ApiError::new(
            ErrorCode::PayloadTooLarge,
            format!("the body is larger than {limit} bytes"),
        )
    };
    let declared = request
        .headers()
        .get(header::CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
    let waits = request.headers().contains_key(header::EXPECT);
    let mut body = request.into_body();
    if declared.is_some_and(|length| length > limit) {
        if !waits {
            drain(&mut body).await;
        }
        return Err(too_large());
    }
    match tokio::time::timeout(BODY_TIMEOUT, Limited::new(&mut body, limit).collect()).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            drain(&mut body).await;
            Err(too_large())
        }
        Ok(Err(error)) => {
            tracing::debug!(%error, "a body broke off");
            Err(ApiError::new(ErrorCode::ValidationError, "the body broke off"))
        }
        Err(_elapsed) => Err(ApiError::new(
            ErrorCode::ValidationError,
            "the body did not arrive in time",
        )),
    }
}

/// Reads the rest of a body that is refused.
pub(super) async fn drain(body: &mut Body) {
    let draining = async {
        let mut left = DRAINED;
        while let Some(Ok(frame)) = body.frame().await {
            let length = frame.data_ref().map_or(0, Bytes::len);
            match left.checked_sub(length) {
                Some(rest) => left = rest,
                None => return,
            }
        }
    };
    // Whether it came to an end or not: the answer is the same.
    let _in_time = tokio::time::timeout(DRAIN_TIMEOUT, draining).await;
}

impl Document {
    /// Reads a body.
    pub(super) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        Ok(Self::from_fields(fields(body)?, ""))
    }

    /// A document inside a larger one, `inside` being its path with a dot at the end.
    pub(super) fn nested(fields: Map<String, Value>, inside: &str) -> Self {
        Self::from_fields(fields, inside)
    }

    /// From here on `null` is an absent field.
    pub(super) fn without_nulls(self) -> Self {
        Self::from_fields(self.fields, &self.inside)
    }

    fn from_fields(mut fields: Map<String, Value>, inside: &str) -> Self {
        fields.retain(|_, value| !value.is_null());
        Self {
            fields,
            inside: inside.to_owned(),
        }
    }

    /// The path of a field, as errors name it.
    pub(super) fn path(&self, field: &str) -> String {
        format!("{}{field}", self.inside)
    }

    /// Nothing was sent.
    pub(super) fn is_empty(&self) -> bool {
        self.fields.is_empty()
    }

    /// Takes a field whatever it is.
    pub(super) fn value(&mut self, field: &str) -> Option<Value> {
        #[cfg(test)]
        asked::note(&self.path(field));
        self.fields.remove(field)
    }

    /// Takes a text.
    pub(super) fn text(&mut self, field: &str) -> Result<Option<String>, ApiError> {
        match self.value(field) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.wrong(field, "a string", &other)),
        }
    }

    /// Takes a text that must be there.
    pub(super) fn required_text(&mut self, field: &str) -> Result<String, ApiError> {
        self.text(field)?
            .ok_or_else(|| ApiError::field(self.path(field), "is required"))
    }

    /// Takes a whole number.
    pub(super) fn whole(&mut self, field: &str, range: RangeInclusive<u64>) -> Result<Option<u64>, ApiError> {
        let Some(value) = self.value(field) else {
            return Ok(None);
        };
        if !value.is_number() {
            return Err(self.wrong(field, "a whole number", &value));
        }
        match value.as_u64().filter(|number| range.contains(number)) {
            Some(number) => Ok(Some(number)),
            None => Err(ApiError::field(
                self.path(field),
                format!(
                    "expected a whole number between {} and {}",
                    range.start(),
                    range.end()
                ),
            )),
        }
    }

    /// Takes a time, as RFC 3339 or in seconds since 1970.
    pub(super) fn time(&mut self, field: &str) -> Result<Option<Timestamp>, ApiError> {
        let parsed = match self.value(field) {
            None => return Ok(None),
            Some(Value::String(text)) => text.parse().ok(),
            Some(Value::Number(seconds)) => seconds
                .as_i64()
                .and_then(|seconds| Timestamp::from_second(seconds).ok()),
            Some(other) => return Err(self.wrong(field, "a time", &other)),
        };
        let expected = "expected a time, for example 2026-01-30T10:00:00Z";
        match parsed {
            Some(time) => Ok(Some(time)),
            None => Err(ApiError::field(self.path(field), expected)),
        }
    }

    /// Takes a yes or no.
    pub(super) fn flag(&mut self, field: &str) -> Result<Option<bool>, ApiError> {
        match self.value(field) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(flag)),
            Some(other) => Err(self.wrong(field, "true or false", &other)),
        }
    }

    /// Takes a list of texts.
    pub(super) fn texts(&mut self, field: &str) -> Result<Option<Vec<String>>, ApiError> {
        let values = match self.value(field) {
            None => return Ok(None),
            Some(Value::Array(values)) => values,
            Some(other) => return Err(self.wrong(field, "a list of strings", &other)),
        };
        let mut texts = Vec::with_capacity(values.len());
        for (index, value) in values.into_iter().enumerate() {
            match value {
                Value::String(text) => texts.push(text),
                other => return Err(self.wrong(&format!("{field}[{index}]"), "a string", &other)),
            }
        }
        Ok(Some(texts))
    }

    /// Takes an object whose values are texts.
    pub(super) fn text_map(&mut self, field: &str) -> Result<Option<BTreeMap<String, String>>, ApiError> {
        let values = match self.value(field) {
            None => return Ok(None),
            Some(Value::Object(values)) => values,
            Some(other) => return Err(self.wrong(field, "an object of strings", &other)),
        };
        let mut texts = BTreeMap::new();
        for (name, value) in values {
            match value {
                Value::String(text) => drop(texts.insert(name, text)),
                other => return Err(self.wrong(&format!("{field}.{name}"), "a string", &other)),
            }
        }
        Ok(Some(texts))
    }

    /// Takes a list of documents.
    pub(super) fn documents(&mut self, field: &str) -> Result<Option<Vec<Self>>, ApiError> {
        let values = match self.value(field) {
            None => return Ok(None),
            Some(Value::Array(values)) => values,
            Some(other) => return Err(self.wrong(field, "a list of objects", &other)),
        };
        let mut documents = Vec::with_capacity(values.len());
        for (index, value) in values.into_iter().enumerate() {
            match value {
                Value::Object(fields) => {
                    documents.push(Self::from_fields(
                        fields,
                        &format!("{}{field}[{index}].", self.inside),
                    ));
                }
                other => return Err(self.wrong(&format!("{field}[{index}]"), "an object", &other)),
            }
        }
        Ok(Some(documents))
    }

    /// Takes `org_id`, which published clients add to many bodies.
    pub(super) fn organization(&mut self, caller: &Caller) -> Result<(), ApiError> {
        match self.text("org_id")? {
            Some(named) => same_organization(caller, &named),
            None => Ok(()),
        }
    }

    /// Everything known has been taken.
    pub(super) fn finish(self) -> Result<(), ApiError> {
        match self.fields.keys().next() {
            None => Ok(()),
            Some(field) => {
                let field: String = field.chars().take(80).collect();
                Err(ApiError::field(
                    self.path(&field),
                    "is not a field of this request",
                ))
            }
        }
    }

    /// What has not been taken, as a document of somebody else's.
    pub(super) fn into_value(self) -> Value {
        Value::Object(self.fields)
    }

    fn wrong(&self, field: &str, expected: &str, found: &Value) -> ApiError {
        ApiError::field(
            self.path(field),
            format!("expected {expected}, not {}", kind(found)),
        )
    }
}

fn fields(body: &[u8]) -> Result<Map<String, Value>, ApiError> {
    if body.iter().all(u8::is_ascii_whitespace) {
        return Ok(Map::new());
    }
    match serde_json::from_slice(body) {
        Ok(Value::Object(fields)) => Ok(fields),
        Ok(other) => Err(ApiError::new(
            ErrorCode::ValidationError,
            format!("the body must be a JSON object, not {}", kind(&other)),
        )),
        Err(error) => Err(ApiError::new(
            ErrorCode::ValidationError,
            format!("the body is not JSON: {error}"),
        )),
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// Which fields handlers ask for, so that a test can hold the description of the API against it.
#[cfg(test)]
pub(super) mod asked {
    use std::{cell::RefCell, collections::BTreeSet};

    thread_local! {
        static FIELDS: RefCell<BTreeSet<String>> = const { RefCell::new(BTreeSet::new()) };
    }

    /// Positions in lists are left out: `a[3].b` is `a.b`.
    pub(super) fn note(path: &str) {
        let mut plain = String::with_capacity(path.len());
        let mut depth = 0_u32;
        for character in path.chars() {
            match character {
                '[' => depth += 1,
                ']' => depth -= 1,
                _ if depth == 0 => plain.push(character),
                _ => {}
            }
        }
        FIELDS.with_borrow_mut(|fields| fields.insert(plain));
    }

    /// Those that were asked for on this thread since the last call.
    pub(in crate::api) fn take() -> BTreeSet<String> {
        FIELDS.with_borrow_mut(std::mem::take)
    }
}

#[cfg(test)]
mod tests;
