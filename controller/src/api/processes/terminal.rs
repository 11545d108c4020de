//! A process over a WebSocket: binary messages are bytes, texts are JSON about it.

use axum::{
    extract::{FromRequestParts, State, ws::Message},
    response::Response,
};
use http::request::Parts;
use sandgate_api::{
    agent::{Command, Exec, Start},
    error::ErrorCode,
    rest::ProcessEvent,
};
use serde_json::json;
use tokio::time::MissedTickBehavior;

use super::{
    super::{
        document::Document,
        error::ApiError,
        path::SandboxPath,
        query::Parameters,
        socket::{HungUp, Line, Opening, PING},
    },
    TERMINAL, is_name, size,
};
use crate::{
    agent::{AgentError, Follow, ProcessOutput},
    service::{Scope, Service},
};

/// What runs on a terminal when nobody says what.
const SHELL: &str = "if command -v bash >/dev/null 2>&1; then exec bash -l; else exec sh -l; fi";

/// Which process a terminal is for, and from where on.
pub(in crate::api) struct Wanted {
    process: Option<String>,
    since: u64,
}

impl<S: Sync> FromRequestParts<S> for Wanted {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, ApiError> {
        let query = Parameters::of(parts)?;
        let process = query.text("process_id").map(str::to_owned);
        if process.as_deref().is_some_and(|name| !is_name(name)) {
            return Err(ApiError::new(
                ErrorCode::NotFound,
                "there is no such process in this sandbox",
            ));
        }
        let since = match query.text("since").map(str::parse) {
            None => 0,
            Some(Ok(since)) => since,
            Some(Err(_other)) => return Err(ApiError::field("since", "expected a position: an earlier seq")),
        };
        Ok(Self { process, since })
    }
}

/// A terminal: of a process that was started, or of a new shell that ends with this connection.
///
/// Binary messages are what is typed and what is shown. The first text says `{"type": "attached", "process_id",
/// "seq"}`; texts of the client are `{"type": "resize", "rows", "cols"}`; others say `dropped`, `exit` or `error`.
/// A process with `since` is shown from that position of its output on, else from the first that is kept.
#[utoipa::path(
    get, path = "/sandbox/{id}/terminal", operation_id = "terminal", tag = "commands",
    params(
        ("process_id" = Option<String>, Query, description = "A process; a new shell without it."),
        ("since" = Option<u64>, Query, description = "A position in its output."),
        ("token" = Option<String>, Query, description = "The API key, where no header can be sent."),
    ),
    responses((status = 101, description = "A WebSocket"))
)]
pub(in crate::api) async fn terminal(
    State(service): State<Service>,
    SandboxPath(id): SandboxPath,
    wanted: Wanted,
    opening: Opening,
) -> Result<Response, ApiError> {
    let caller = &opening.caller;
    caller.may(Scope::SandboxExecute)?;
    let (process, is_own) = match wanted.process {
        Some(process) => (process, false),
        None => {
            let shell = Start {
                exec: Exec {
                    command: Command::Shell(SHELL.to_owned()),
                    env: Default::default(),
                    working_dir: None,
                    timeout_ms: None,
                    track: None,
                },
                terminal: Some(TERMINAL),
                attended: true,
            };
            let started = service.start_process(caller.org_id(), &id, shell).await?;
            (started.process_id, true)
        }
    };
    let followed = service
        .follow_process(caller.org_id(), &id, &process, wanted.since, (true, true))
        .await;
    let follow = match followed {
        Ok(follow) => follow,
        Err(error) => {
            if is_own {
                // Nobody else knows of it. What cannot be reached for this either ends with the sandbox.
                let _forgotten = service.remove_process(caller.org_id(), &id, &process).await;
            }
            return Err(error.into());
        }
    };
    Ok(opening.accept(move |line| async move {
        // Whoever hangs up knows.
        let _hung_up = serve(line, follow, &process).await;
    }))
}

async fn serve(mut line: Line, mut follow: Follow, process: &str) -> Result<(), HungUp> {
    let attached = json!({ "type": "attached", "process_id": process, "seq": follow.position() });
    line.tell(attached.to_string()).await?;
    let mut pings = tokio::time::interval(PING);
    pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let ended = tokio::select! {
            event = follow.next() => show(&mut line, &follow, event).await?,
            message = line.receive() => {
                let message = message?;
                type_in(&mut line, &mut follow, message).await?
            }
            _ = pings.tick() => {
                line.ping().await?;
                false
            }
        };
        if ended {
            line.close("the process has ended").await;
            return Ok(());
        }
    }
}

/// Sends on what the process did. True after its end.
async fn show(
    line: &mut Line,
    follow: &Follow,
    event: Option<Result<ProcessOutput, AgentError>>,
) -> Result<bool, HungUp> {
    let (event, last) = match event {
        Some(Ok(ProcessOutput::Part { bytes, .. })) => {
            line.send(Message::Binary(bytes)).await?;
            return Ok(false);
        }
        Some(Ok(ProcessOutput::Lost(bytes))) => {
            let seq = follow.position();
            (ProcessEvent::Dropped { bytes, seq }, false)
        }
        Some(Ok(ProcessOutput::Exited {
            exit_code,
            duration_ms,
        })) => {
            let code = exit_code;
            (ProcessEvent::Exit { code, duration_ms }, true)
        }
        Some(Err(error)) => {
            let error = error.to_string();
            (ProcessEvent::Error { error }, true)
        }
        Some(Ok(ProcessOutput::CaughtUp)) | None => {
            let error = "the sandbox ended before the process did".to_owned();
            (ProcessEvent::Error { error }, true)
        }
    };
    line.tell(serde_json::to_string(&event).unwrap_or_default())
        .await?;
    Ok(last)
}

/// Sends on what the client said. True when the process takes nothing any more.
async fn type_in(line: &mut Line, follow: &mut Follow, message: Message) -> Result<bool, HungUp> {
    let done = match message {
        Message::Binary(bytes) => follow.write(&bytes).await,
        Message::Text(text) => match control(text.as_bytes()) {
            Ok(size) => follow.resize(size).await,
            Err(error) => {
                let error = error.message().to_owned();
                let event = ProcessEvent::Error { error };
                line.tell(serde_json::to_string(&event).unwrap_or_default())
                    .await?;
                Ok(())
            }
        },
        Message::Ping(_) | Message::Pong(_) | Message::Close(_) => Ok(()),
    };
    match done {
        Ok(()) => Ok(false),
        // The end of the process is on its way, and says more.
        Err(AgentError::Io(_)) => Ok(false),
        Err(error) => show(line, follow, Some(Err(error))).await,
    }
}

fn control(text: &[u8]) -> Result<sandgate_api::agent::TerminalSize, ApiError> {
    let mut document = Document::parse(text)?;
    if document.required_text("type")? != "resize" {
        return Err(ApiError::field("type", "expected `resize`"));
    }
    let size = size(&mut document)?;
    document.finish()?;
    Ok(size)
}
