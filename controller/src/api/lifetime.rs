//! How long sandboxes live, and what their owners note about them.

use std::ops::RangeInclusive;

use axum::{Json, extract::State};
use sandgate_api::rest::Sandbox;

use super::{
    auth::Authenticated, bodies::ExtendBody, document::Document, error::ApiError, path::SandboxPath,
};
use crate::{
    config::SandboxDefaults,
    service::{Scope, Service},
    spec::LIFETIME_SECONDS,
    terms::{IDLE_SECONDS, Terms, wrong_metadata, wrong_session_key},
};

/// Lets a running sandbox live longer: in all at most as long as the installation allows, beyond which it is a 409.
#[utoipa::path(
    post, path = "/sandbox/{id}/extend", operation_id = "extend_sandbox", tag = "sandboxes",
    request_body = ExtendBody, responses((status = 200, description = "The sandbox with its new end", body = Sandbox))
)]
pub(super) async fn extend(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    SandboxPath(id): SandboxPath,
    mut document: Document,
) -> Result<Json<Sandbox>, ApiError> {
    caller.may(Scope::SandboxCreate)?;
    document.organization(&caller)?;
    let most = service.sandbox_defaults().max_lifetime_seconds;
    let additional = document
        .whole("additional_seconds", 1..=most)?
        .ok_or_else(|| ApiError::field("additional_seconds", "is required"))?;
    document.finish()?;
    Ok(Json(
        service.extend_sandbox(caller.org_id(), &id, additional).await?,
    ))
}

/// Stops every process of a running sandbox where it stands: it uses no processor; its memory, files and lifetime go on,
/// it is not idle, and what is asked of it (commands, files, tunnels) is a 409 until it is resumed. Doing it again is no
/// error.
#[utoipa::path(
    post, path = "/sandbox/{id}/pause", operation_id = "pause_sandbox", tag = "sandboxes",
    responses((status = 200, description = "It stands still: `paused`", body = Sandbox))
)]
pub(super) async fn pause(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    SandboxPath(id): SandboxPath,
) -> Result<Json<Sandbox>, ApiError> {
    caller.may(Scope::SandboxCreate)?;
    Ok(Json(service.pause_sandbox(caller.org_id(), &id).await?))
}

/// Lets a paused sandbox go on. Doing it again is no error.
#[utoipa::path(
    post, path = "/sandbox/{id}/resume", operation_id = "resume_sandbox", tag = "sandboxes",
    responses((status = 200, description = "It goes on", body = Sandbox))
)]
pub(super) async fn resume(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    SandboxPath(id): SandboxPath,
) -> Result<Json<Sandbox>, ApiError> {
    caller.may(Scope::SandboxCreate)?;
    Ok(Json(service.resume_sandbox(caller.org_id(), &id).await?))
}

/// Lifetimes that can be asked for.
pub(super) fn timeouts(defaults: &SandboxDefaults) -> RangeInclusive<u64> {
    let longest = *LIFETIME_SECONDS.end();
    *LIFETIME_SECONDS.start()..=longest.min(defaults.max_lifetime_seconds)
}

/// Takes what is asked for beside resources.
pub(super) fn terms(document: &mut Document) -> Result<Terms, ApiError> {
    let session_key = document.text("session_key")?;
    if let Some(message) = session_key.as_deref().and_then(wrong_session_key) {
        return Err(ApiError::field(document.path("session_key"), message));
    }
    let idle_timeout_seconds = document.whole("idle_timeout_seconds", IDLE_SECONDS)?;
    let metadata = document.text_map("metadata")?.unwrap_or_default();
    if let Some((name, message)) = wrong_metadata(&metadata) {
        let field = match name {
            Some(name) => document.path(&format!("metadata.{name}")),
            None => document.path("metadata"),
        };
        return Err(ApiError::field(field, message));
    }
    Ok(Terms {
        session_key,
        idle_timeout_seconds,
        metadata,
        template_id: None,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn parsed(body: &Value) -> Result<Terms, ApiError> {
        let mut document = Document::parse(body.to_string().as_bytes())?;
        let terms = terms(&mut document)?;
        document.finish()?;
        Ok(terms)
    }

    #[test]
    fn everything_may_be_left_out() {
        assert_eq!(parsed(&json!({})).expect("terms"), Terms::default());
        let terms = parsed(&json!({
            "session_key": "thread 7", "idle_timeout_seconds": 10, "metadata": {"a": "b", "c": ""}
        }))
        .expect("terms");
        assert_eq!(terms.session_key.as_deref(), Some("thread 7"));
        assert_eq!((terms.idle_timeout_seconds, terms.metadata.len()), (Some(10), 2));
    }

    #[test]
    fn a_refusal_names_the_field() {
        let long = "x".repeat(513);
        for (body, field) in [
            (json!({"session_key": ""}), "session_key"),
            (json!({"session_key": 7}), "session_key"),
            (json!({"session_key": "a\nb"}), "session_key"),
            (json!({"idle_timeout_seconds": 9}), "idle_timeout_seconds"),
            (json!({"idle_timeout_seconds": "60"}), "idle_timeout_seconds"),
            (json!({"idle_timeout_seconds": 86_401}), "idle_timeout_seconds"),
            (json!({"metadata": []}), "metadata"),
            (json!({"metadata": {"a": 1}}), "metadata.a"),
            (json!({"metadata": {"a b": "x"}}), "metadata"),
            (json!({"metadata": {"a": long}}), "metadata.a"),
        ] {
            let error = parsed(&body).expect_err("refused");
            assert_eq!(error.refused_field().as_deref(), Some(field), "{body}");
        }
    }
}
