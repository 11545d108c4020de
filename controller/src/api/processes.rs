//! Processes that outlive the request that started them: their output, input, signals and end.

mod output;
pub(super) mod terminal;

use axum::{
    Json,
    extract::{FromRequestParts, Path, State},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use http::request::Parts;
use sandgate_api::{
    agent::{Start, TerminalSize},
    error::ErrorCode,
    id::SandboxId,
    rest::{InputWritten, ProcessList, ProcessStarted, Success},
};
use serde_json::Value;

pub(super) use output::{__path_output, output};

use super::{
    auth::Authenticated,
    bodies::{InputBody, ProcessBody, ResizeBody, SignalBody},
    commands::program,
    document::Document,
    error::ApiError,
    path::{SandboxPath, sandbox},
};
use crate::service::{Scope, Service};

/// Rows and columns of a terminal that nobody gave a size.
const TERMINAL: TerminalSize = TerminalSize {
    rows: 24,
    columns: 80,
};

/// Largest number of rows or columns.
const MAX_SIDE: u64 = 1000;

/// Most that is written to a process at once, in bytes.
const MAX_INPUT: usize = 1024 * 1024;

/// Signals by name, as Linux counts them.
const SIGNALS: [(&str, u64); 14] = [
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ABRT", 6),
    ("KILL", 9),
    ("USR1", 10),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("WINCH", 28),
];

/// `{id}` and `{pid}` of a process's routes: its id, or its number inside the sandbox.
pub(super) struct ProcessPath(SandboxId, String);

impl<S: Send + Sync> FromRequestParts<S> for ProcessPath {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let none = || ApiError::new(ErrorCode::NotFound, "there is no such process in this sandbox");
        let Ok(Path((id, process))) = Path::<(String, String)>::from_request_parts(parts, state).await else {
            return Err(none());
        };
        let id = sandbox(&id)?;
        is_name(&process).then_some(Self(id, process)).ok_or_else(none)
    }
}

/// What can be a process's id or number.
pub(super) fn is_name(name: &str) -> bool {
    let number = name.strip_prefix("proc-").unwrap_or(name);
    (1..=20).contains(&number.len()) && number.bytes().all(|byte| byte.is_ascii_digit())
}

/// Starts a process that goes on when this request has been answered.
///
/// At most 32 run or are remembered in a sandbox; ended ones make room. They end with the sandbox.
#[utoipa::path(
    post, path = "/sandbox/{id}/processes", operation_id = "start_process", tag = "commands",
    request_body = ProcessBody,
    responses((status = 200, description = "It runs", body = ProcessStarted))
)]
pub(super) async fn start(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    SandboxPath(id): SandboxPath,
    mut document: Document,
) -> Result<Json<ProcessStarted>, ApiError> {
    caller.may(Scope::SandboxExecute)?;
    document.organization(&caller)?;
    let start = begin(document)?;
    Ok(Json(service.start_process(caller.org_id(), &id, start).await?))
}

fn begin(mut document: Document) -> Result<Start, ApiError> {
    let exec = program(&mut document)?;
    let terminal = match document.value("pty") {
        None | Some(Value::Bool(false)) => None,
        Some(Value::Bool(true)) => Some(TERMINAL),
        Some(Value::Object(fields)) => {
            let mut inner = Document::nested(fields, "pty.");
            let size = size(&mut inner)?;
            inner.finish()?;
            Some(size)
        }
        Some(_) => {
            return Err(ApiError::field(
                "pty",
                "expected true, false or an object with rows and cols",
            ));
        }
    };
    let background = document.flag("background")?.unwrap_or(true);
    document.finish()?;
    Ok(Start {
        exec,
        terminal,
        attended: !background,
    })
}

fn size(document: &mut Document) -> Result<TerminalSize, ApiError> {
    let mut side = |field: &str, default: u16| {
        let given = document.whole(field, 1..=MAX_SIDE)?;
        Ok::<_, ApiError>(given.and_then(|side| u16::try_from(side).ok()).unwrap_or(default))
    };
    Ok(TerminalSize {
        rows: side("rows", TERMINAL.rows)?,
        columns: side("cols", TERMINAL.columns)?,
    })
}

/// The processes of a sandbox that were started so.
#[utoipa::path(
    get, path = "/sandbox/{id}/processes", operation_id = "list_processes", tag = "commands",
    responses((status = 200, description = "Its processes", body = ProcessList))
)]
pub(super) async fn list(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    SandboxPath(id): SandboxPath,
) -> Result<Json<ProcessList>, ApiError> {
    caller.may(Scope::SandboxExecute)?;
    let processes = service.processes(caller.org_id(), &id).await?;
    Ok(Json(ProcessList { processes }))
}

/// Writes to a process's standard input, or types on its terminal.
#[utoipa::path(
    post, path = "/sandbox/{id}/processes/{pid}/stdin", operation_id = "write_process", tag = "commands",
    request_body = InputBody,
    responses((status = 200, description = "What it took", body = InputWritten))
)]
pub(super) async fn stdin(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    ProcessPath(id, process): ProcessPath,
    mut document: Document,
) -> Result<Json<InputWritten>, ApiError> {
    caller.may(Scope::SandboxExecute)?;
    document.organization(&caller)?;
    let input = input(document)?;
    let written = service
        .write_process(caller.org_id(), &id, &process, input)
        .await?;
    Ok(Json(InputWritten {
        success: true,
        written,
    }))
}

fn input(mut document: Document) -> Result<(Bytes, bool), ApiError> {
    let data = document.text("data")?;
    let encoding = document.text("encoding")?;
    let close = document.flag("close")?.unwrap_or(false);
    document.finish()?;
    let bytes = match (data, encoding.as_deref()) {
        (None, _) if close => Vec::new(),
        (None, _) => return Err(ApiError::field("data", "is required")),
        (Some(data), None | Some("utf8" | "utf-8")) => data.into_bytes(),
        (Some(data), Some("base64")) => {
            let dense: String = data
                .chars()
                .filter(|letter| !letter.is_ascii_whitespace())
                .collect();
            STANDARD
                .decode(dense)
                .map_err(|error| ApiError::field("data", format!("is not base64: {error}")))?
        }
        (Some(_), Some(_)) => return Err(ApiError::field("encoding", "expected utf8 or base64")),
    };
    if bytes.len() > MAX_INPUT {
        return Err(ApiError::field(
            "data",
            format!("is longer than {MAX_INPUT} bytes"),
        ));
    }
    Ok((bytes.into(), close))
}

/// Sends a signal to a process and its group.
#[utoipa::path(
    post, path = "/sandbox/{id}/processes/{pid}/signal", operation_id = "signal_process", tag = "commands",
    request_body = SignalBody,
    responses((status = 200, description = "It was sent", body = Success))
)]
pub(super) async fn signal(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    ProcessPath(id, process): ProcessPath,
    mut document: Document,
) -> Result<Json<Success>, ApiError> {
    caller.may(Scope::SandboxExecute)?;
    document.organization(&caller)?;
    let value = document.value("signal");
    document.finish()?;
    let signal = signal_number(value.as_ref())?;
    service
        .signal_process(caller.org_id(), &id, &process, signal)
        .await?;
    Ok(Json(Success::OK))
}

fn signal_number(value: Option<&Value>) -> Result<i32, ApiError> {
    let found = match value {
        None => return Err(ApiError::field("signal", "is required")),
        Some(Value::Number(number)) => number.as_u64(),
        Some(Value::String(name)) => {
            let upper = name.to_ascii_uppercase();
            let short = upper.strip_prefix("SIG").unwrap_or(&upper);
            SIGNALS
                .iter()
                .find_map(|(known, number)| (*known == short).then_some(*number))
        }
        Some(_) => None,
    };
    found
        .filter(|number| SIGNALS.iter().any(|(_, known)| known == number))
        .and_then(|number| i32::try_from(number).ok())
        .ok_or_else(|| {
            let names = SIGNALS.map(|(name, _)| name).join(", ");
            ApiError::field("signal", format!("expected one of {names}, or its number"))
        })
}

/// Gives a process's terminal another size.
#[utoipa::path(
    post, path = "/sandbox/{id}/processes/{pid}/resize", operation_id = "resize_process", tag = "commands",
    request_body = ResizeBody,
    responses((status = 200, description = "It has it", body = Success))
)]
pub(super) async fn resize(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    ProcessPath(id, process): ProcessPath,
    mut document: Document,
) -> Result<Json<Success>, ApiError> {
    caller.may(Scope::SandboxExecute)?;
    let size = size(&mut document)?;
    document.finish()?;
    service
        .resize_process(caller.org_id(), &id, &process, size)
        .await?;
    Ok(Json(Success::OK))
}

/// Ends a process with everything it started, and forgets it and its output.
#[utoipa::path(
    delete, path = "/sandbox/{id}/processes/{pid}", operation_id = "delete_process", tag = "commands",
    responses((status = 200, description = "It is being killed", body = Success))
)]
pub(super) async fn delete(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    ProcessPath(id, process): ProcessPath,
) -> Result<Json<Success>, ApiError> {
    caller.may(Scope::SandboxExecute)?;
    service.remove_process(caller.org_id(), &id, &process).await?;
    Ok(Json(Success::OK))
}

#[cfg(test)]
mod tests;
