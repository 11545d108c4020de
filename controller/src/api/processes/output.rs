//! What a process wrote: as JSON what there is, or as server-sent events until it ends.

use std::{collections::VecDeque, convert::Infallible, time::Duration};

use axum::{
    Json,
    body::Body,
    extract::State,
    response::{IntoResponse as _, Response},
};
use bytes::Bytes;
use futures_util::stream;
use http::{HeaderMap, header};
use sandgate_api::rest::{ProcessEvent, ProcessOutput};

use super::super::{
    auth::Authenticated, error::ApiError, processes::ProcessPath, query::Parameters, sse, text::Text,
};
use crate::{
    agent::{AgentError, Follow, ProcessOutput as Told},
    service::{Scope, Service, Socket},
};

/// Events in one JSON answer, in bytes. The rest is for the next.
const MAX_TEXT: usize = 1024 * 1024;

/// What an event costs besides its text.
const EVENT: usize = 64;

/// How long a sandbox may take to send what it has.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a process wrote since a position in its output.
///
/// Positions count bytes. The last 512 KiB are kept; where the process wrote more since, `dropped` says how much is
/// left out. With `Accept: text/event-stream` the answer goes on until the process ends; each event's `id` is a
/// position: given back as `Last-Event-ID` or `since`, nothing is missed and nothing told twice.
#[utoipa::path(
    get, path = "/sandbox/{id}/processes/{pid}/output", operation_id = "process_output", tag = "commands",
    params(("since" = Option<u64>, Query, description = "A position: an earlier `next_seq` or `seq`; 0 without it.")),
    responses((status = 200, description = "What it wrote", content(
        (ProcessOutput = "application/json"), (ProcessEvent = "text/event-stream")
    )))
)]
pub(in crate::api) async fn output(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    ProcessPath(id, process): ProcessPath,
    query: Parameters,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    caller.may(Scope::SandboxExecute)?;
    let streams = headers
        .get(header::ACCEPT)
        .and_then(|accept| accept.to_str().ok())
        .is_some_and(|accept| accept.contains("text/event-stream"));
    let since = since(&query, &headers)?;
    let org_id = caller.org_id();
    if streams {
        let place = service.socket(org_id)?;
        let follow = service
            .follow_process(org_id, &id, &process, since, (true, false))
            .await?;
        return Ok(stream(follow, place));
    }
    let mut events = Events::of(
        service
            .follow_process(org_id, &id, &process, since, (false, false))
            .await?,
    );
    let collected = tokio::time::timeout(PATIENCE, events.collect()).await;
    let (told, truncated) = collected
        .unwrap_or(Err(AgentError::Timeout))
        .map_err(crate::service::ServiceError::from)?;
    Ok(Json(ProcessOutput {
        events: told,
        next_seq: events.seq,
        truncated,
    })
    .into_response())
}

/// The position to go on from: of a stream that broke off, else of the query.
fn since(query: &Parameters, headers: &HeaderMap) -> Result<u64, ApiError> {
    let (name, text) = match headers.get("last-event-id") {
        Some(id) => ("Last-Event-ID", Some(id.to_str().unwrap_or("-"))),
        None => ("since", query.text("since")),
    };
    let Some(text) = text else { return Ok(0) };
    text.parse().map_err(|_other| {
        ApiError::field(
            name,
            "expected a position: a next_seq or seq of an earlier answer",
        )
    })
}

/// A process's output as events.
struct Events {
    follow: Follow,
    stdout: Text,
    stderr: Text,
    /// Up to here all is told.
    seq: u64,
    /// What is still to be told.
    last: VecDeque<ProcessEvent>,
}

impl Events {
    fn of(follow: Follow) -> Self {
        Self {
            seq: follow.position(),
            follow,
            stdout: Text::default(),
            stderr: Text::default(),
            last: VecDeque::new(),
        }
    }

    /// The next event; none when there is nothing more at the moment. Can be dropped and called again.
    async fn next(&mut self) -> Option<Result<ProcessEvent, AgentError>> {
        loop {
            if let Some(event) = self.last.pop_front() {
                return Some(Ok(event));
            }
            let event = match self.follow.next().await? {
                Ok(event) => event,
                Err(error) => return Some(Err(error)),
            };
            let event = match event {
                Told::Part {
                    to_stderr,
                    next,
                    bytes,
                } => {
                    let text = if to_stderr {
                        &mut self.stderr
                    } else {
                        &mut self.stdout
                    };
                    let data = text.push(&bytes);
                    // Half a character at the end is told with its other half, also to whoever comes back for it.
                    self.seq = next - u64::try_from(text.held()).unwrap_or(0);
                    if data.is_empty() {
                        continue;
                    }
                    let seq = self.seq;
                    if to_stderr {
                        ProcessEvent::Stderr { data, seq }
                    } else {
                        ProcessEvent::Stdout { data, seq }
                    }
                }
                Told::Lost(bytes) => {
                    self.seq = self.follow.position();
                    ProcessEvent::Dropped { bytes, seq: self.seq }
                }
                Told::Exited {
                    exit_code,
                    duration_ms,
                } => {
                    self.end(ProcessEvent::Exit {
                        code: exit_code,
                        duration_ms,
                    });
                    continue;
                }
                Told::CaughtUp => return None,
            };
            return Some(Ok(event));
        }
    }

    /// Also tells what was held back because it was half a character.
    fn end(&mut self, exit: ProcessEvent) {
        self.seq = self.follow.position();
        let seq = self.seq;
        let (stdout, stderr) = (self.stdout.finish(), self.stderr.finish());
        if !stdout.is_empty() {
            self.last.push_back(ProcessEvent::Stdout { data: stdout, seq });
        }
        if !stderr.is_empty() {
            self.last.push_back(ProcessEvent::Stderr { data: stderr, seq });
        }
        self.last.push_back(exit);
    }

    /// What there is at the moment, and whether something of it is left for another answer.
    async fn collect(&mut self) -> Result<(Vec<ProcessEvent>, bool), AgentError> {
        let (mut events, mut length) = (Vec::new(), 0);
        while let Some(event) = self.next().await {
            let event = event?;
            length += EVENT;
            if let ProcessEvent::Stdout { data, .. } | ProcessEvent::Stderr { data, .. } = &event {
                length += data.len();
            }
            events.push(event);
            if length >= MAX_TEXT {
                return Ok((events, true));
            }
        }
        Ok((events, false))
    }
}

/// Events until the process ends. Who goes away can come back.
fn stream(follow: Follow, place: Socket) -> Response {
    let state = Some((Events::of(follow), place));
    let events = stream::unfold(state, |state| async move {
        let (mut events, place) = state?;
        let next = tokio::select! {
            () = place.ended() => return None,
            next = tokio::time::timeout(sse::KEEP_ALIVE, events.next()) => next,
        };
        let last = |event: ProcessEvent| [sse::line(&event), sse::line(&ProcessEvent::Done)].concat();
        let (bytes, state) = match next {
            Err(_elapsed) => (sse::PING, Some((events, place))),
            Ok(Some(Ok(exit @ ProcessEvent::Exit { .. }))) => (last(exit).into(), None),
            Ok(Some(Ok(event))) => {
                let id = format!("id: {}\n", events.seq);
                (
                    [id.as_bytes(), &sse::line(&event)].concat().into(),
                    Some((events, place)),
                )
            }
            Ok(Some(Err(error))) => {
                let error = error.to_string();
                (last(ProcessEvent::Error { error }).into(), None)
            }
            Ok(None) => {
                let error = "the sandbox ended before the process did".to_owned();
                (last(ProcessEvent::Error { error }).into(), None)
            }
        };
        Some((Ok::<Bytes, Infallible>(bytes), state))
    });
    sse::answer(Body::from_stream(events))
}
