//! What happens to sandboxes, as it happens.

use axum::{extract::State, response::Response};
use http::HeaderMap;
use sandgate_api::{error::ErrorEnvelope, rest::SandboxEvent};

use super::{auth::Authenticated, error::ApiError, query::Parameters, sse};
use crate::service::{Scope, Service};

/// Sends what happens to the organisation's sandboxes, as server-sent events: `sandbox.created`, `sandbox.ready`,
/// `sandbox.stopped`, `sandbox.error`, `sandbox.timeout`, `command.started`, `command.completed`, `command.failed`. Each
/// event's id is its position: given back as `lastEventId`, or as the header `Last-Event-ID`, what was missed comes
/// first, as far as it is among the newest 10,000 events of the organisation. Without either, events follow from now on.
#[utoipa::path(
    get, path = "/events/stream", operation_id = "stream_events", tag = "sandboxes",
    params(
        ("lastEventId" = Option<String>, Query, description = "The id of the last event that was seen; 0: from the oldest"),
        ("token" = Option<String>, Query, description = "The API key, for clients that cannot send headers"),
        ("Last-Event-ID" = Option<String>, Header, description = "The same as `lastEventId`; it wins")
    ),
    responses(
        (status = 200, description = "Events", body = SandboxEvent, content_type = "text/event-stream"),
        (status = 429, description = "The organisation follows 16 streams already", body = ErrorEnvelope)
    )
)]
pub(super) async fn stream(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    headers: HeaderMap,
    parameters: Parameters,
) -> Result<Response, ApiError> {
    caller.may(Scope::SandboxRead)?;
    let by_header = headers.get("last-event-id").map(|id| id.to_str().unwrap_or("?"));
    let (field, last) = match by_header.filter(|id| !id.is_empty()) {
        Some(id) => ("last-event-id", Some(id)),
        None => ("lastEventId", parameters.text("lastEventId")),
    };
    let after = last.map(|id| position(field, id)).transpose()?;
    Ok(sse::happenings(
        service.follow_events(caller.org_id(), after).await?,
    ))
}

fn position(field: &str, id: &str) -> Result<i64, ApiError> {
    let position = id.parse::<i64>().ok().filter(|position| *position >= 0);
    position.ok_or_else(|| ApiError::field(field, "expected the id of an event of this stream"))
}
