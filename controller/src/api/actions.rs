//! The record of who did what: what an action is called, what is recorded, and the endpoints that show it.
//!
//! [`super::request`] records every request for which [`name`] has a name. That is whatever is not a look, so an
//! endpoint that is added is recorded without anybody thinking of it.

use axum::{Json, extract::State};
use http::Method;
use jiff::Timestamp;
use sandgate_api::{
    error::ErrorCode,
    id::SandboxId,
    rest::{ActionList, ActionOutcome, ActionSummary},
};
use serde_json::{Map, Value};

use super::{auth::Authenticated, error::ApiError, path::SandboxPath, query::Parameters};
use crate::{
    service::{Caller, Scope, Service},
    store::{ActionFilter, ActionText, NewAction},
};

/// Longest text of a request that is recorded, in characters.
pub(super) const MAX_TEXT: usize = 500;

/// Where the published contract has a name of its own, or the path is a poor one.
const NAMED: &[(&str, &str, &str)] = &[
    ("POST", "/register", "organization.register"),
    ("POST", "/users", "user.add"),
    ("PATCH", "/users/{id}", "user.change"),
    ("DELETE", "/users/{id}", "user.remove"),
    ("POST", "/invitations", "invitation.create"),
    ("DELETE", "/invitations/{id}", "invitation.withdraw"),
    ("POST", "/api-keys", "key.create"),
    ("POST", "/api-keys/{id}/rotate", "key.rotate"),
    ("DELETE", "/api-keys/{id}", "key.revoke"),
    ("POST", "/tokens", "token.create"),
    ("POST", "/sandbox", "sandbox.create"),
    ("POST", "/sandbox/create", "sandbox.create"),
    ("POST", "/sandbox/create-from-template", "sandbox.create"),
    ("POST", "/sandbox/{id}/execute", "command.execute"),
    ("GET", "/sandbox/{id}/files", "file.read"),
    ("GET", "/sandbox/{id}/files/download", "file.read"),
    ("GET", "/sandbox/{id}/files/raw", "file.read"),
    ("GET", "/sandbox/{id}/files/list", "file.list"),
    ("POST", "/sandbox/{id}/files/glob", "file.list"),
    ("GET", "/sandbox/{id}/files/watch", "file.watch"),
    ("POST", "/sandbox/{id}/files", "file.write"),
    ("PUT", "/sandbox/{id}/files/raw", "file.write"),
    ("POST", "/sandbox/{id}/files/upload", "file.write"),
    ("DELETE", "/sandbox/{id}/files", "file.delete"),
    ("POST", "/sandbox/{id}/files/mkdir", "file.mkdir"),
    ("POST", "/sandbox/{id}/files/move", "file.move"),
    ("POST", "/sandbox/{id}/files/copy", "file.copy"),
    ("POST", "/sandbox/{id}/processes", "process.start"),
    ("POST", "/sandbox/{id}/secrets/inject", "secret.inject"),
    ("POST", "/sandbox/{id}/tunnels", "tunnel.open"),
    ("DELETE", "/sandbox/{id}/tunnels/{tunnel}", "tunnel.close"),
    ("DELETE", "/tunnels/{id}", "tunnel.close"),
    ("PUT", "/sandbox/{id}/network", "policy.update"),
    ("PATCH", "/sandbox/{id}/network", "policy.update"),
    ("POST", "/sandbox/{id}/network/simulate", "policy.simulate"),
    ("POST", "/sandbox/{id}/network/suggest", "policy.suggest"),
    ("GET", "/sandbox/{id}/network/doctor", "sandbox.doctor"),
    ("PUT", "/settings/egress", "policy.update"),
    ("PATCH", "/settings/egress", "policy.update"),
    ("POST", "/egress/audit/{id}/allow", "policy.allow"),
    ("POST", "/secrets", "secret.create"),
    ("PUT", "/secrets/{name}", "secret.update"),
    ("DELETE", "/secrets/{name}", "secret.delete"),
    ("GET", "/ws", "command.connect"),
];

/// What can be seen of a sandbox without touching what is in it.
const LOOKS: [&str; 14] = [
    "",
    "/status",
    "/network",
    "/network/effective",
    "/tunnels",
    "/metrics",
    "/metrics/history",
    "/metrics/summary",
    "/usage",
    "/audit/summary",
    "/events",
    "/events/stream",
    "/processes",
    "/checkpoints",
];

/// What an action is called; none for a look, which is not recorded.
pub(super) fn name(method: &Method, route: &str) -> Option<String> {
    let route = route.strip_prefix("/api/v1").unwrap_or(route);
    let looks = *method == Method::GET || *method == Method::HEAD || *method == Method::OPTIONS;
    let method = if *method == Method::HEAD {
        "GET"
    } else {
        method.as_str()
    };
    let named = NAMED.iter().find(|known| (known.0, known.1) == (method, route));
    if let Some((_, _, name)) = named {
        return Some((*name).to_owned());
    }
    if looks {
        let inside = route.strip_prefix("/sandbox/{id}")?;
        if LOOKS.contains(&inside) {
            return None;
        }
    }
    let words: Vec<&str> = route
        .split('/')
        .filter(|part| !part.is_empty() && !part.starts_with('{'))
        .collect();
    let verb = match method {
        "POST" => "",
        "PUT" | "PATCH" => ".update",
        "DELETE" => ".delete",
        _ => ".read",
    };
    Some(format!("{}{verb}", words.join(".")))
}

/// Puts a command on record that came over a WebSocket, where it is no request of its own.
pub(super) async fn command(
    service: &Service,
    caller: &Caller,
    sandbox_id: Option<SandboxId>,
    error: Option<&ApiError>,
) {
    let mut details = Map::from_iter([("path".to_owned(), Value::from("/ws"))]);
    if let Some(key_id) = caller.key_id() {
        details.insert("key_id".to_owned(), key_id.as_str().into());
    }
    let outcome = match error.map(ApiError::code) {
        None => ActionOutcome::Success,
        Some(ErrorCode::Forbidden) => ActionOutcome::Denied,
        Some(_) => ActionOutcome::Failure,
    };
    service.note_action(NewAction {
        id: fresh_id(),
        org_id: caller.org_id().clone(),
        user_id: caller.user_id().cloned(),
        sandbox_id,
        time: Timestamp::now(),
        action: "command.execute".to_owned(),
        outcome,
        duration: 0,
        text: ActionText {
            resource: "/ws".to_owned(),
            details,
            error_message: error.map(|error| error.message().chars().take(MAX_TEXT).collect()),
        },
    });
    service.write_actions().await;
}

pub(super) fn fresh_id() -> String {
    format!("event-{}", uuid::Uuid::new_v4().simple())
}

/// Lists who did what by the API: every action that changes something or touches what is in a sandbox, also those that
/// were refused or failed. No values of secrets, no contents of files, no command lines.
#[utoipa::path(
    get, path = "/audit", operation_id = "list_audit_events", tag = "accounts",
    params(
        ("limit" = Option<u32>, Query, description = "At most so many, 1 to 1000; 100 when left out"),
        ("offset" = Option<u32>, Query, description = "How many to skip"),
        ("sandbox_id" = Option<String>, Query, description = "About one sandbox"),
        ("user_id" = Option<String>, Query, description = "By one user"),
        ("action" = Option<String>, Query, description = "Of one kind, for example `sandbox.create`"),
        ("outcome" = Option<String>, Query, description = "`success`, `failure`, `denied` or `cancelled`"),
        ("start_time" = Option<String>, Query, description = "Not before: RFC 3339, or seconds since 1970"),
        ("end_time" = Option<String>, Query, description = "Before")
    ),
    responses((status = 200, description = "A page, newest first", body = ActionList))
)]
pub(super) async fn list(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    parameters: Parameters,
) -> Result<Json<ActionList>, ApiError> {
    caller.may(Scope::AuditRead)?;
    let filter = ActionFilter {
        sandbox_id: parsed(&parameters, "sandbox_id")?,
        user_id: parsed(&parameters, "user_id")?,
        action: parameters.text("action").map(str::to_owned),
        outcome: parsed(&parameters, "outcome")?,
        since: parameters.time("start_time")?,
        until: parameters.time("end_time")?,
        offset: parameters.whole("offset", 0..=1_000_000)?.unwrap_or(0),
        limit: parameters.whole("limit", 1..=1_000)?.unwrap_or(100),
    };
    Ok(Json(service.actions(caller.org_id(), &filter).await?))
}

/// Shows what was done to a sandbox by the API, in numbers.
#[utoipa::path(
    get, path = "/sandbox/{id}/audit/summary", operation_id = "sandbox_audit_summary", tag = "accounts",
    responses((status = 200, description = "The numbers", body = ActionSummary))
)]
pub(super) async fn summary(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    SandboxPath(id): SandboxPath,
) -> Result<Json<ActionSummary>, ApiError> {
    caller.may(Scope::AuditRead)?;
    Ok(Json(service.action_summary(caller.org_id(), &id).await?))
}

fn parsed<T>(parameters: &Parameters, name: &str) -> Result<Option<T>, ApiError>
where
    T: std::str::FromStr<Err: std::fmt::Display>,
{
    let Some(text) = parameters.text(name) else {
        return Ok(None);
    };
    match text.parse() {
        Ok(value) => Ok(Some(value)),
        Err(error) => Err(ApiError::field(name, error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_is_not_a_look_has_a_name() {
        for (method, route, expected) in [
            (Method::POST, "/api/v1/sandbox/create", Some("sandbox.create")),
            (Method::POST, "/api/v1/sandbox/{id}/stop", Some("sandbox.stop")),
            (Method::DELETE, "/api/v1/sandbox/{id}", Some("sandbox.delete")),
            (
                Method::POST,
                "/api/v1/sandbox/{id}/execute",
                Some("command.execute"),
            ),
            (Method::GET, "/api/v1/sandbox/{id}/files", Some("file.read")),
            (Method::HEAD, "/api/v1/sandbox/{id}/files/raw", Some("file.read")),
            (
                Method::POST,
                "/api/v1/sandbox/{id}/new/thing",
                Some("sandbox.new.thing"),
            ),
            (
                Method::GET,
                "/api/v1/sandbox/{id}/new/{x}/thing",
                Some("sandbox.new.thing.read"),
            ),
            (Method::DELETE, "/api/v1/new/{id}", Some("new.delete")),
            (Method::GET, "/ws", Some("command.connect")),
            (Method::GET, "/api/v1/sandbox/{id}", None),
            (Method::GET, "/api/v1/sandbox/{id}/status", None),
            (Method::GET, "/api/v1/sandboxes", None),
            (Method::GET, "/health", None),
        ] {
            assert_eq!(name(&method, route).as_deref(), expected, "{method} {route}");
        }
    }
}
