//! `/ws`: commands over one WebSocket, one after the other.

use std::collections::VecDeque;

use axum::{
    extract::{State, ws::Message},
    response::Response,
};
use sandgate_api::{id::SandboxId, rest::StreamEvent};
use serde_json::Value;
use tokio::time::{Interval, MissedTickBehavior};

use super::{
    actions,
    commands::exec,
    document::Document,
    error::ApiError,
    events::CommandEvents,
    path::sandbox,
    socket::{HungUp, Line, Opening, PING},
};
use crate::service::{Caller, Scope, Service};

/// Messages that wait while a command runs.
const MAX_WAITING: usize = 16;

/// Their length together, in bytes.
const MAX_WAITING_BYTES: usize = 512 * 1024;

/// Longest `id` of a message, as JSON.
const MAX_ID: usize = 256;

/// Runs commands over a WebSocket.
///
/// A message `{"type": "execute", "sandbox_id", "command", "working_dir", "env", "timeout", "track_files", "id"}` is
/// answered by the events of the streamed execute, each a message, with the message's `id` if it has one; what cannot
/// be done by `error` and `done`. Messages are worked off in order; at most 16, and 512 KiB, may wait. A client that goes away
/// takes the running command with it.
#[utoipa::path(
    get, path = "/ws", operation_id = "command_socket", tag = "commands",
    params(("token" = Option<String>, Query, description = "The API key, where no header can be sent.")),
    responses((status = 101, description = "A WebSocket whose messages are `StreamEvent`s"))
)]
pub(super) async fn commands(State(service): State<Service>, opening: Opening) -> Response {
    let caller = opening.caller.clone();
    opening.accept(move |line| async move {
        // Whoever hangs up knows.
        let _hung_up = serve(line, &service, &caller).await;
    })
}

/// An `execute`, or what is wrong with a message.
struct Asked {
    /// Of the message, in bytes.
    length: usize,
    id: Option<Value>,
    what: Result<Box<Execute>, ApiError>,
}

struct Execute {
    sandbox: SandboxId,
    exec: sandgate_api::agent::Exec,
}

async fn serve(mut line: Line, service: &Service, caller: &Caller) -> Result<(), HungUp> {
    let mut waiting: VecDeque<Asked> = VecDeque::new();
    let mut pings = tokio::time::interval(PING);
    pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        while let Some(asked) = waiting.pop_front() {
            answer(&mut line, service, caller, asked, &mut waiting, &mut pings).await?;
        }
        tokio::select! {
            message = line.receive() => waiting.push_back(understand(&message?, caller)),
            _ = pings.tick() => line.ping().await?,
        }
    }
}

/// Answers one message; those that come meanwhile wait.
async fn answer(
    line: &mut Line,
    service: &Service,
    caller: &Caller,
    Asked { id, what, .. }: Asked,
    waiting: &mut VecDeque<Asked>,
    pings: &mut Interval,
) -> Result<(), HungUp> {
    let sandbox = what.as_ref().ok().map(|execute| execute.sandbox.clone());
    let begun = async {
        let execute = what?;
        let running = service.start_command(caller.org_id(), &execute.sandbox, execute.exec);
        Ok::<_, ApiError>(CommandEvents::new(running.await?))
    };
    let begun = begun.await;
    actions::command(service, caller, sandbox, begun.as_ref().err()).await;
    let mut events = match begun {
        Ok(events) => events,
        Err(error) => return refuse(line, id.as_ref(), &error).await,
    };
    loop {
        tokio::select! {
            event = events.next() => match event {
                Some(event) => line.tell(told(&event, id.as_ref())).await?,
                None => return Ok(()),
            },
            message = line.receive() => {
                let asked = understand(&message?, caller);
                let length: usize = waiting.iter().map(|other| other.length).sum();
                if waiting.len() < MAX_WAITING && length + asked.length <= MAX_WAITING_BYTES {
                    waiting.push_back(asked);
                } else {
                    let message = "as many messages wait as may";
                    let error = ApiError::new(sandgate_api::error::ErrorCode::RateLimited, message);
                    refuse(line, asked.id.as_ref(), &error).await?;
                }
            }
            _ = pings.tick() => line.ping().await?,
        }
    }
}

async fn refuse(line: &mut Line, id: Option<&Value>, error: &ApiError) -> Result<(), HungUp> {
    let error = error.message().to_owned();
    for event in [StreamEvent::Error { error }, StreamEvent::Done] {
        line.tell(told(&event, id)).await?;
    }
    Ok(())
}

/// An event as a message, with the `id` of what it answers.
fn told(event: &StreamEvent, id: Option<&Value>) -> String {
    let mut event = serde_json::to_value(event).unwrap_or_default();
    if let Some(id) = id {
        event["id"] = id.clone();
    }
    event.to_string()
}

fn understand(message: &Message, caller: &Caller) -> Asked {
    let text = match message {
        Message::Text(text) => text.as_bytes(),
        Message::Binary(_) | Message::Ping(_) | Message::Pong(_) | Message::Close(_) => {
            let what = Err(ApiError::field("", "expected a text with a JSON object"));
            return Asked {
                length: 0,
                id: None,
                what,
            };
        }
    };
    let length = text.len();
    let mut document = match Document::parse(text) {
        Ok(document) => document,
        Err(error) => {
            return Asked {
                length,
                id: None,
                what: Err(error),
            };
        }
    };
    let id = match document.value("id") {
        Some(id) if !fits(&id) => {
            let message = format!("expected a string or a number of at most {MAX_ID} bytes");
            return Asked {
                length,
                id: None,
                what: Err(ApiError::field("id", message)),
            };
        }
        id => id,
    };
    let what = execute(document, caller).map(Box::new);
    Asked { length, id, what }
}

fn fits(id: &Value) -> bool {
    (id.is_string() || id.is_number()) && id.to_string().len() <= MAX_ID
}

fn execute(mut document: Document, caller: &Caller) -> Result<Execute, ApiError> {
    caller.may(Scope::SandboxExecute)?;
    document.organization(caller)?;
    match document.required_text("type")?.as_str() {
        "execute" => {}
        _ => return Err(ApiError::field("type", "expected `execute`")),
    }
    let named = match (document.text("sandbox_id")?, document.text("sandboxId")?) {
        (Some(one), Some(other)) if one != other => {
            return Err(ApiError::field(
                "sandboxId",
                "is another name for sandbox_id, and they differ",
            ));
        }
        (Some(named), _) | (None, Some(named)) => named,
        (None, None) => return Err(ApiError::field("sandbox_id", "is required")),
    };
    // Output always comes as it is written.
    let _always = document.flag("stream")?;
    let exec = exec(&mut document)?;
    document.finish()?;
    Ok(Execute {
        sandbox: sandbox(&named)?,
        exec,
    })
}
