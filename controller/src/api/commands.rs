//! Commands: buffered, or as a stream of events.

use axum::{
    Json,
    extract::State,
    response::{IntoResponse as _, Response},
};
use sandgate_api::{
    agent::{ChangeAction, Changes, Exec},
    rest::{ExecuteResponse, FileAction, FileChange, StreamEvent},
};
use serde_json::Value;

use super::{
    auth::Authenticated,
    bodies::ExecuteBody,
    document::Document,
    error::ApiError,
    path::{self, SandboxPath},
    sse,
};
use crate::{
    service::{Command, Scope, Service},
    spec::check_environment,
};

/// Longest command line or argument vector, in bytes (`MAX_ARG_STRLEN` of Linux for the former).
const MAX_COMMAND: usize = 128 * 1024;

/// Longest timeout of a command: the longest life of a sandbox, in milliseconds.
const MAX_TIMEOUT_MS: u64 = 86_400_000;

/// Below it `track_files` looks for changes.
const TRACKED: &str = "/workspace";

/// Runs a command. A client that goes away takes it with it, and everything it started.
#[utoipa::path(
    post, path = "/sandbox/{id}/execute", operation_id = "execute", tag = "commands",
    request_body = ExecuteBody,
    responses((status = 200, description = "The command has ended, or its events with `stream`", content(
        (ExecuteResponse = "application/json"), (StreamEvent = "text/event-stream")
    )))
)]
pub(super) async fn execute(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    SandboxPath(id): SandboxPath,
    mut document: Document,
) -> Result<Response, ApiError> {
    caller.may(Scope::SandboxExecute)?;
    document.organization(&caller)?;
    let (exec, stream) = request(document)?;
    if stream {
        let running = service.start_command(caller.org_id(), &id, exec).await?;
        return Ok(sse::commands(running));
    }
    let output = service.run_command(caller.org_id(), &id, exec).await?;
    let (files_changed, files_changed_truncated) = told(output.changes);
    Ok(Json(ExecuteResponse {
        exit_code: output.exit_code,
        stdout: output.stdout,
        stderr: output.stderr,
        output_truncated: output.truncated,
        timed_out: output.timed_out,
        duration_ms: output.duration_ms,
        files_changed,
        files_changed_truncated,
    })
    .into_response())
}

/// `files_changed` and `files_changed_truncated`.
pub(super) fn told(changes: Option<Changes>) -> (Option<Vec<FileChange>>, Option<bool>) {
    let Some(Changes { files, truncated }) = changes else {
        return (None, None);
    };
    let files = files.into_iter().map(|change| FileChange {
        path: change.path,
        action: match change.action {
            ChangeAction::Created => FileAction::Created,
            ChangeAction::Modified => FileAction::Modified,
            ChangeAction::Deleted => FileAction::Deleted,
        },
        size_bytes: change.size,
    });
    (Some(files.collect()), Some(truncated))
}

fn request(mut document: Document) -> Result<(Exec, bool), ApiError> {
    let stream = document.flag("stream")?.unwrap_or(false);
    let exec = exec(&mut document)?;
    document.finish()?;
    Ok((exec, stream))
}

/// The fields that say what to run and how.
pub(super) fn exec(document: &mut Document) -> Result<Exec, ApiError> {
    let exec = program(document)?;
    let timeout_ms = document.whole("timeout", 1..=MAX_TIMEOUT_MS)?;
    let tracks = document.flag("track_files")?.unwrap_or(false);
    Ok(Exec {
        timeout_ms,
        track: tracks.then(|| TRACKED.to_owned()),
        ..exec
    })
}

/// The fields that say what to run and where.
pub(super) fn program(document: &mut Document) -> Result<Exec, ApiError> {
    let command = command(document)?;
    Ok(Exec {
        command,
        ..place(document)?
    })
}

/// The fields that say where, with a command that does nothing.
pub(super) fn place(document: &mut Document) -> Result<Exec, ApiError> {
    let env = document.text_map("env")?.unwrap_or_default();
    check_environment(&env).map_err(|error| ApiError::field("env", error.to_string()))?;
    let working_dir = match (document.text("working_dir")?, document.text("cwd")?) {
        (Some(one), Some(other)) if one != other => {
            return Err(ApiError::field(
                "cwd",
                "is another name for working_dir, and they differ",
            ));
        }
        (Some(directory), _) | (None, Some(directory)) => {
            path::inside("working_dir", &directory)?;
            Some(directory)
        }
        (None, None) => None,
    };
    Ok(Exec {
        command: Command::Shell(":".to_owned()),
        env,
        working_dir,
        timeout_ms: None,
        track: None,
    })
}

fn command(document: &mut Document) -> Result<Command, ApiError> {
    let command = match document.value("command") {
        None => return Err(ApiError::field("command", "is required")),
        Some(Value::String(line)) => Command::Shell(line),
        Some(Value::Array(arguments)) => {
            let mut argv = Vec::with_capacity(arguments.len());
            for (index, argument) in arguments.into_iter().enumerate() {
                let Value::String(argument) = argument else {
                    return Err(ApiError::field(format!("command[{index}]"), "expected a string"));
                };
                argv.push(argument);
            }
            Command::Argv(argv)
        }
        Some(_) => {
            return Err(ApiError::field(
                "command",
                "expected a string or a list of strings",
            ));
        }
    };
    let (empty, length, nul) = match &command {
        Command::Shell(line) => (line.trim().is_empty(), line.len(), line.contains('\0')),
        Command::Argv(argv) => (
            argv.first().is_none_or(String::is_empty),
            argv.iter().map(|argument| argument.len() + 1).sum(),
            argv.iter().any(|argument| argument.contains('\0')),
        ),
    };
    if empty {
        return Err(ApiError::field("command", "is empty"));
    }
    if length > MAX_COMMAND {
        return Err(ApiError::field(
            "command",
            format!("is longer than {MAX_COMMAND} bytes"),
        ));
    }
    if nul {
        return Err(ApiError::field("command", "contains a NUL character"));
    }
    Ok(command)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parsed(body: &Value) -> Result<(Exec, bool), ApiError> {
        request(Document::parse(body.to_string().as_bytes())?)
    }

    #[test]
    fn a_command_is_a_line_or_a_vector() {
        let (exec, stream) = parsed(&json!({"command": "echo a; echo b"})).expect("a line");
        assert_eq!(
            (exec.command, stream),
            (Command::Shell("echo a; echo b".to_owned()), false)
        );
        let (exec, stream) = parsed(&json!({
            "command": ["echo", "a b", ""], "stream": true, "timeout": 1500, "env": {"A": "b"}, "cwd": "/tmp"
        }))
        .expect("a vector");
        assert_eq!(
            exec.command,
            Command::Argv(vec!["echo".to_owned(), "a b".to_owned(), String::new()])
        );
        assert!(stream);
        assert_eq!(exec.track, None);
        assert_eq!(
            (exec.timeout_ms, exec.working_dir.as_deref()),
            (Some(1500), Some("/tmp"))
        );
        assert_eq!(exec.env.get("A").map(String::as_str), Some("b"));
        let (exec, _) = parsed(&json!({"command": "a", "track_files": true})).expect("tracked");
        assert_eq!(exec.track.as_deref(), Some("/workspace"));
    }

    #[test]
    fn a_refusal_names_the_field() {
        let long = "x".repeat(MAX_COMMAND + 1);
        for (body, field) in [
            (json!({}), "command"),
            (json!({"command": null}), "command"),
            (json!({"command": 1}), "command"),
            (json!({"command": ""}), "command"),
            (json!({"command": "  "}), "command"),
            (json!({"command": []}), "command"),
            (json!({"command": [""]}), "command"),
            (json!({"command": ["a", 1]}), "command[1]"),
            (json!({"command": "a\u{0}b"}), "command"),
            (json!({"command": ["a", "\u{0}"]}), "command"),
            (json!({"command": long}), "command"),
            (json!({"command": "a", "stream": "true"}), "stream"),
            (json!({"command": "a", "timeout": 0}), "timeout"),
            (json!({"command": "a", "timeout": -1}), "timeout"),
            (json!({"command": "a", "timeout": 1.5}), "timeout"),
            (json!({"command": "a", "timeout": "1000"}), "timeout"),
            (json!({"command": "a", "timeout": 86_400_001_u64}), "timeout"),
            (json!({"command": "a", "env": {"A": 1}}), "env.A"),
            (json!({"command": "a", "env": {"A=B": "x"}}), "env"),
            (json!({"command": "a", "env": []}), "env"),
            (json!({"command": "a", "working_dir": "tmp"}), "working_dir"),
            (json!({"command": "a", "working_dir": "/tmp/.."}), "working_dir"),
            (json!({"command": "a", "working_dir": "/a", "cwd": "/b"}), "cwd"),
            (json!({"command": "a", "comand": "b"}), "comand"),
            (json!({"command": "a", "track_files": 1}), "track_files"),
        ] {
            let error = parsed(&body).expect_err("refused");
            assert_eq!(error.refused_field().as_deref(), Some(field), "{body}");
        }
    }
}
