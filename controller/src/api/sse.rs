//! Server-sent events, in the form that published clients read: one line per event, beginning with exactly
//! `data: `.
//!
//! They split lines as Python does, also at U+0085, U+2028 and U+2029, and give up when 30 s pass without a
//! byte: so these characters are escaped, and a comment is sent when there is nothing to say.

use std::{convert::Infallible, time::Duration};

use axum::{
    body::Body,
    response::{IntoResponse as _, Response},
};
use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, stream};
use http::{HeaderName, header};
use sandgate_api::{
    agent::{FileAction, FileChange},
    rest::WatchEvent,
};
use serde::Serialize;

use super::events::CommandEvents;
use crate::{
    agent::Changes,
    service::{Events, Running, Trail, Watching},
};

/// Longest silence.
pub(super) const KEEP_ALIVE: Duration = Duration::from_secs(8);

/// What is said when there is nothing to say.
pub(super) const PING: Bytes = Bytes::from_static(b": ping\n\n");

/// A command's events: its output, `exit` or `error`, and `done`. The client that goes away takes the
/// command with it.
pub(super) fn commands(running: Running) -> Response {
    let events = stream::unfold(CommandEvents::new(running), |mut events| async move {
        let bytes = match tokio::time::timeout(KEEP_ALIVE, events.next()).await {
            Err(_elapsed) => PING,
            Ok(event) => line(&event?),
        };
        Some((Ok::<Bytes, Infallible>(bytes), events))
    });
    answer(Body::from_stream(events))
}

/// Audit records as they are stored, each with its position as the event's id.
pub(super) fn records(trail: Trail) -> Response {
    kept_alive(stream::unfold(trail, |mut trail| async move {
        let (position, record) = trail.next().await?;
        let line = line(&record);
        let mut bytes = Vec::with_capacity(2 * line.len() + 64);
        // Before the record, whose id says that all up to it was read.
        if record.event.alert.is_some() {
            bytes.extend_from_slice(b"event: security.alert\n");
            bytes.extend_from_slice(&line);
        }
        bytes.extend_from_slice(format!("id: {position}\n").as_bytes());
        bytes.extend_from_slice(&line);
        Some((bytes.into(), trail))
    }))
}

/// What happens to sandboxes, each event with its kind and its position.
pub(super) fn happenings(events: Events) -> Response {
    kept_alive(stream::unfold(events, |mut events| async move {
        let (position, event) = events.next().await?;
        let head = format!("event: {}\nid: {position}\n", event.kind.as_str());
        let mut bytes = Vec::from(head);
        bytes.extend_from_slice(&line(&event));
        Some((bytes.into(), events))
    }))
}

/// Whatever comes, and a comment when nothing does for a while.
fn kept_alive(events: impl Stream<Item = Bytes> + Send + 'static) -> Response {
    let events = stream::unfold(Box::pin(events), |mut events| async move {
        let bytes = match tokio::time::timeout(KEEP_ALIVE, events.next()).await {
            Err(_elapsed) => PING,
            Ok(next) => next?,
        };
        Some((Ok::<Bytes, Infallible>(bytes), events))
    });
    answer(Body::from_stream(events))
}

/// What happens below a directory.
pub(super) fn changes(path: String, watching: Watching) -> Response {
    let first = line(&WatchEvent::Watching {
        path,
        partly: watching.partly(),
    });
    let first = stream::once(std::future::ready(Ok::<Bytes, Infallible>(first)));
    let rest = stream::unfold(Some(watching), |watching| async move {
        let mut watching = watching?;
        match tokio::time::timeout(KEEP_ALIVE, watching.next()).await {
            Err(_elapsed) => Some((Ok(PING), Some(watching))),
            Ok(Some(Ok(Changes { changes, lost }))) => {
                let mut bytes = Vec::new();
                for FileChange {
                    action,
                    path,
                    directory,
                } in changes
                {
                    bytes.extend_from_slice(&line(&match action {
                        FileAction::Created => WatchEvent::Created { path, directory },
                        FileAction::Modified => WatchEvent::Modified { path, directory },
                        FileAction::Deleted => WatchEvent::Deleted { path, directory },
                    }));
                }
                if lost {
                    bytes.extend_from_slice(&line(&WatchEvent::Overflow));
                }
                Some((Ok(bytes.into()), Some(watching)))
            }
            Ok(ended) => {
                let mut bytes = Vec::new();
                if let Some(Err(error)) = ended {
                    let error = error.to_string();
                    bytes.extend_from_slice(&line(&WatchEvent::Error { error }));
                }
                bytes.extend_from_slice(&line(&WatchEvent::Done));
                Some((Ok(bytes.into()), None))
            }
        }
    });
    answer(Body::from_stream(first.chain(rest)))
}

/// The answer that brings them.
pub(super) fn answer(body: Body) -> Response {
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream"),
        (header::CACHE_CONTROL, "no-cache"),
        // Asks proxies on the way not to hold events back.
        (HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    (headers, body).into_response()
}

/// One event.
pub(super) fn line<T: Serialize>(event: &T) -> Bytes {
    // These types hold nothing that JSON cannot say.
    let json = serde_json::to_string(event).unwrap_or_default();
    let mut line = String::with_capacity(json.len() + 8);
    line.push_str("data: ");
    for character in json.chars() {
        match character {
            '\u{85}' => line.push_str("\\u0085"),
            '\u{2028}' => line.push_str("\\u2028"),
            '\u{2029}' => line.push_str("\\u2029"),
            other => line.push(other),
        }
    }
    line.push_str("\n\n");
    line.into()
}

#[cfg(test)]
mod tests {
    use sandgate_api::rest::StreamEvent;

    use super::*;

    #[test]
    fn an_event_is_one_line_also_for_python() {
        let data = "a\nb\r\u{85}\u{2028}\u{2029}\u{b}\u{c}\u{1c}é".to_owned();
        let bytes = line(&StreamEvent::Stdout { data: data.clone() });
        let text = std::str::from_utf8(&bytes).expect("text");
        let json = text
            .strip_prefix("data: ")
            .and_then(|rest| rest.strip_suffix("\n\n"))
            .expect("framing");
        let splits = [
            '\n', '\r', '\u{b}', '\u{c}', '\u{1c}', '\u{1d}', '\u{1e}', '\u{85}', '\u{2028}', '\u{2029}',
        ];
        assert!(!json.contains(splits), "{json:?}");
        let parsed: StreamEvent = serde_json::from_str(json).expect("JSON");
        assert_eq!(parsed, StreamEvent::Stdout { data });
    }

    #[test]
    fn the_words_are_those_of_the_contract() {
        let exit = line(&StreamEvent::Exit {
            code: 3,
            timed_out: false,
            duration_ms: 5,
            files_changed: None,
            files_changed_truncated: None,
        });
        assert!(exit.starts_with(br#"data: {"type":"exit","code":3"#), "{exit:?}");
        assert_eq!(line(&StreamEvent::Done), "data: {\"type\":\"done\"}\n\n");
    }
}
