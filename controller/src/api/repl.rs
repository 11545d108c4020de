//! Sessions of an interpreter, which keeps its state from one piece of code to the next.

use std::time::Duration;

use axum::{
    Json,
    extract::{FromRequestParts, Path, State},
};
use http::request::Parts;
use sandgate_api::{
    error::ErrorCode,
    id::SandboxId,
    rest::{ReplInterrupted, ReplOutput, ReplSession, Success},
};

use super::{
    auth::Authenticated,
    bodies::{ReplCodeBody, ReplSessionBody},
    commands::place,
    document::Document,
    error::ApiError,
    path::{SandboxPath, sandbox},
    processes::is_name,
};
use crate::service::{Language, Scope, Service};

/// How long code may take when nobody says.
const TIMEOUT_MS: u64 = 30_000;
/// Longest time that code may take, in milliseconds.
const MAX_TIMEOUT_MS: u64 = 86_400_000;
/// Longest code, in bytes.
const MAX_CODE: usize = 1024 * 1024;

/// `{id}` and `{sid}` of a session's routes: the language, and the id of its process.
pub(super) struct SessionPath(SandboxId, String);

impl<S: Send + Sync> FromRequestParts<S> for SessionPath {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let none = || ApiError::new(ErrorCode::NotFound, "there is no such session in this sandbox");
        let Ok(Path((id, session))) = Path::<(String, String)>::from_request_parts(parts, state).await else {
            return Err(none());
        };
        let id = sandbox(&id)?;
        let process = Language::ALL.iter().find_map(|language| {
            let process = session.strip_prefix(language.name())?.strip_prefix('-')?;
            (process.starts_with("proc-") && is_name(process)).then(|| process.to_owned())
        });
        Ok(Self(id, process.ok_or_else(none)?))
    }
}

/// Begins a session of Python, Node.js or bash. It ends when it is destroyed, or with the sandbox.
#[utoipa::path(
    post, path = "/sandbox/{id}/repl/sessions", operation_id = "create_repl_session", tag = "commands",
    request_body = ReplSessionBody,
    responses((status = 200, description = "It has begun", body = ReplSession))
)]
pub(super) async fn create(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    SandboxPath(id): SandboxPath,
    mut document: Document,
) -> Result<Json<ReplSession>, ApiError> {
    caller.may(Scope::SandboxExecute)?;
    document.organization(&caller)?;
    let language = match document.text("language")? {
        None => Language::Python,
        Some(name) => named(&name)?,
    };
    let place = place(&mut document)?;
    document.finish()?;
    let process = service
        .begin_session(caller.org_id(), &id, language, place)
        .await?;
    Ok(Json(ReplSession {
        session_id: format!("{}-{process}", language.name()),
        language: language.name().to_owned(),
    }))
}

fn named(name: &str) -> Result<Language, ApiError> {
    match name.to_ascii_lowercase().as_str() {
        "python" | "python3" => Ok(Language::Python),
        "node" | "nodejs" | "javascript" => Ok(Language::Node),
        "bash" | "shell" => Ok(Language::Bash),
        _ => Err(ApiError::field("language", "expected python, node or bash")),
    }
}

/// Runs code in a session, one piece after the other. A client that goes away interrupts it.
#[utoipa::path(
    post, path = "/sandbox/{id}/repl/sessions/{sid}/execute", operation_id = "execute_repl", tag = "commands",
    request_body = ReplCodeBody,
    responses((status = 200, description = "The code has ended", body = ReplOutput))
)]
pub(super) async fn execute(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    SessionPath(id, process): SessionPath,
    mut document: Document,
) -> Result<Json<ReplOutput>, ApiError> {
    caller.may(Scope::SandboxExecute)?;
    document.organization(&caller)?;
    let (code, limit) = code(document)?;
    let executed = service
        .execute_in_session(caller.org_id(), &id, &process, (&code, limit))
        .await?;
    Ok(Json(ReplOutput {
        output: executed.output,
        output_truncated: executed.truncated,
        error: executed.error,
        execution_count: executed.count,
        timed_out: executed.timed_out,
        duration_ms: u64::try_from(executed.took.as_millis()).unwrap_or(u64::MAX),
    }))
}

fn code(mut document: Document) -> Result<(String, Duration), ApiError> {
    let code = document.required_text("code")?;
    let limit = document.whole("timeout_ms", 1..=MAX_TIMEOUT_MS)?;
    document.finish()?;
    if code.len() > MAX_CODE {
        return Err(ApiError::field(
            "code",
            format!("is longer than {MAX_CODE} bytes"),
        ));
    }
    Ok((code, Duration::from_millis(limit.unwrap_or(TIMEOUT_MS))))
}

/// Interrupts what runs in a session, which goes on.
#[utoipa::path(
    post, path = "/sandbox/{id}/repl/sessions/{sid}/interrupt", operation_id = "interrupt_repl", tag = "commands",
    responses((status = 200, description = "It was told to", body = ReplInterrupted))
)]
pub(super) async fn interrupt(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    SessionPath(id, process): SessionPath,
) -> Result<Json<ReplInterrupted>, ApiError> {
    caller.may(Scope::SandboxExecute)?;
    service.interrupt_session(caller.org_id(), &id, &process).await?;
    Ok(Json(ReplInterrupted {
        success: true,
        status: "idle".to_owned(),
    }))
}

/// Ends a session with everything it started.
#[utoipa::path(
    delete, path = "/sandbox/{id}/repl/sessions/{sid}", operation_id = "destroy_repl_session", tag = "commands",
    responses((status = 200, description = "It is gone", body = Success))
)]
pub(super) async fn destroy(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    SessionPath(id, process): SessionPath,
) -> Result<Json<Success>, ApiError> {
    caller.may(Scope::SandboxExecute)?;
    service.remove_process(caller.org_id(), &id, &process).await?;
    Ok(Json(Success::OK))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn document(body: &Value) -> Document {
        Document::parse(body.to_string().as_bytes()).expect("a document")
    }

    #[test]
    fn languages_have_names() {
        assert_eq!(named("Python").ok(), Some(Language::Python));
        assert_eq!(named("javascript").ok(), Some(Language::Node));
        assert_eq!(named("bash").ok(), Some(Language::Bash));
        let refused = named("cobol").expect_err("refused");
        assert_eq!(refused.refused_field().as_deref(), Some("language"));
    }

    #[test]
    fn a_refusal_names_the_field() {
        let (given, limit) = code(document(&json!({"code": ""}))).expect("code");
        assert_eq!((given.as_str(), limit), ("", Duration::from_secs(30)));
        for (body, field) in [
            (json!({}), "code"),
            (json!({"code": 1}), "code"),
            (json!({"code": "x".repeat(MAX_CODE + 1)}), "code"),
            (json!({"code": "x", "timeout_ms": 0}), "timeout_ms"),
            (json!({"code": "x", "timeout": 5}), "timeout"),
        ] {
            let error = code(document(&body)).expect_err("refused");
            assert_eq!(error.refused_field().as_deref(), Some(field));
        }
    }
}
