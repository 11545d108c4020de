//! Sandboxes: create, look at, list, stop, delete.

use axum::{Json, extract::State};
use http::StatusCode;
use sandgate_api::{
    error::ErrorCode,
    rest::{Isolation, Sandbox, SandboxLifetime, SandboxList, Success},
};
use serde_json::Value;

use super::{
    auth::Authenticated, bodies::SandboxBody, document::Document, error::ApiError, path::SandboxPath,
    query::Parameters, request, secrets,
};
use crate::{
    config::SandboxDefaults,
    service::{SandboxRequest, Scope, Service},
    spec::{Cpus, InvalidQuantity, LIFETIME_SECONDS, PIDS, SandboxSpec, Size, check_environment},
};

/// Documented fields that this version does not have. Accepting them silently would promise what is not kept.
pub(super) const UNSUPPORTED: [(&str, &str); 14] = [
    ("gpu", "GPUs"),
    ("gpu.count", "GPUs"),
    ("gpu.type", "GPUs"),
    ("gpu.memory_gb", "GPUs"),
    ("desktop_os", "desktops"),
    ("template", "templates"),
    ("template_id", "templates"),
    ("override_cpus", "templates"),
    ("override_memory", "templates"),
    ("volumes", "volumes"),
    ("session_key", "session keys"),
    ("idle_timeout_seconds", "idle timeouts"),
    ("bandwidth_mbps", "bandwidth limits"),
    ("metadata", "metadata"),
];

/// Creates a sandbox; the answer comes when it can be used.
#[utoipa::path(
    post, path = "/sandbox/create", operation_id = "create_sandbox", tag = "sandboxes",
    request_body = SandboxBody, responses((status = 201, description = "It runs", body = Sandbox))
)]
pub(super) async fn create(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    mut document: Document,
) -> Result<(StatusCode, Json<Sandbox>), ApiError> {
    caller.may(Scope::SandboxCreate)?;
    document.organization(&caller)?;
    let network = document.value("network");
    let chosen = secrets::choice(&mut document)?;
    let spec = spec(document, service.sandbox_defaults())?;
    let policy = network
        .map(|network| service.parse_policy("network", &network))
        .transpose()?;
    let started = service
        .create_sandbox(
            caller.org_id(),
            SandboxRequest {
                spec,
                policy,
                secrets: chosen,
            },
        )
        .await?;
    request::concerns(&started.sandbox.sandbox_id);
    Ok((StatusCode::CREATED, Json(started.sandbox)))
}

/// The same as `POST /sandbox/create`.
#[utoipa::path(
    post, path = "/sandbox", operation_id = "create_sandbox_short", tag = "sandboxes",
    request_body = SandboxBody, responses((status = 201, description = "It runs", body = Sandbox))
)]
pub(super) async fn create_short(
    service: State<Service>,
    caller: Authenticated,
    document: Document,
) -> Result<(StatusCode, Json<Sandbox>), ApiError> {
    create(service, caller, document).await
}

/// Shows a sandbox.
#[utoipa::path(
    get, path = "/sandbox/{id}", operation_id = "get_sandbox", tag = "sandboxes",
    responses((status = 200, description = "The sandbox", body = Sandbox))
)]
pub(super) async fn get(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    SandboxPath(id): SandboxPath,
) -> Result<Json<Sandbox>, ApiError> {
    caller.may(Scope::SandboxRead)?;
    Ok(Json(service.sandbox(caller.org_id(), &id).await?))
}

/// Shows how much of its life a sandbox has used.
#[utoipa::path(
    get, path = "/sandbox/{id}/status", operation_id = "sandbox_status", tag = "sandboxes",
    responses((status = 200, description = "Its lifetime", body = SandboxLifetime))
)]
pub(super) async fn status(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    SandboxPath(id): SandboxPath,
) -> Result<Json<SandboxLifetime>, ApiError> {
    caller.may(Scope::SandboxRead)?;
    Ok(Json(service.sandbox_lifetime(caller.org_id(), &id).await?))
}

/// Those that live; with `status=all` also those that have ended and were not deleted.
#[utoipa::path(
    get, path = "/sandboxes", operation_id = "list_sandboxes", tag = "sandboxes",
    params(
        ("status" = Option<String>, Query, description = "`live` (the default) or `all`"),
        ("limit" = Option<u32>, Query, description = "At most so many, 1 to 1000"),
        ("cursor" = Option<String>, Query, description = "`next_cursor` of the page before")
    ),
    responses((status = 200, description = "A page, newest first", body = SandboxList))
)]
pub(super) async fn list(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    parameters: Parameters,
) -> Result<Json<SandboxList>, ApiError> {
    caller.may(Scope::SandboxRead)?;
    let with_ended = match parameters.text("status") {
        None | Some("live") => false,
        Some("all") => true,
        Some(_) => return Err(ApiError::field("status", "expected `live` or `all`")),
    };
    let limit = parameters.whole("limit", 1..=1_000)?.unwrap_or(1_000);
    let page = service
        .sandboxes(caller.org_id(), with_ended, parameters.cursor()?, limit)
        .await?;
    Ok(Json(SandboxList {
        sandboxes: page.sandboxes,
        next_cursor: page.next.map(|next| next.to_string()),
    }))
}

/// The body, if there is one, says nothing.
#[utoipa::path(
    post, path = "/sandbox/{id}/stop", operation_id = "stop_sandbox", tag = "sandboxes",
    responses((status = 200, description = "It has ended", body = Success))
)]
pub(super) async fn stop(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    SandboxPath(id): SandboxPath,
) -> Result<Json<Success>, ApiError> {
    caller.may(Scope::SandboxCreate)?;
    service.stop_sandbox(caller.org_id(), &id).await?;
    Ok(Json(Success::OK))
}

/// Stops a sandbox and forgets it. Doing it again is no error.
#[utoipa::path(
    delete, path = "/sandbox/{id}", operation_id = "delete_sandbox", tag = "sandboxes",
    responses((status = 200, description = "It is gone", body = Success))
)]
pub(super) async fn delete(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    SandboxPath(id): SandboxPath,
) -> Result<Json<Success>, ApiError> {
    caller.may(Scope::SandboxCreate)?;
    service.delete_sandbox(caller.org_id(), &id).await?;
    Ok(Json(Success::OK))
}

/// Reads what a sandbox may use, after the fields that do not belong to that have been taken.
fn spec(mut document: Document, defaults: &SandboxDefaults) -> Result<SandboxSpec, ApiError> {
    let cpus = quantity(&mut document, "cpus", str::parse::<Cpus>)?;
    let memory = quantity(&mut document, "memory", Size::memory)?;
    let disk = quantity(&mut document, "disk", Size::disk)?;
    let pids = document.whole("pids", PIDS)?;
    let timeout_seconds = document.whole("timeout_seconds", LIFETIME_SECONDS)?;
    let env = document.text_map("env")?.unwrap_or_default();
    check_environment(&env).map_err(|error| ApiError::field("env", error.to_string()))?;
    let isolation = match document.text("isolation")?.as_deref() {
        None | Some("container") => Isolation::Container,
        Some(known @ ("gvisor" | "microvm" | "wasm")) => {
            let message = format!("isolation: `{known}` is not available here; use `container`");
            return Err(ApiError::new(ErrorCode::UnsupportedIsolation, message).naming("isolation"));
        }
        Some(_) => return Err(ApiError::field("isolation", "expected `container`")),
    };
    if let Some(image) = document.text("image")?
        && image != defaults.image
    {
        let message = format!("only the image `{}` is available here", defaults.image);
        return Err(ApiError::field("image", message));
    }
    for (field, what) in UNSUPPORTED {
        match document.value(field) {
            None => {}
            // Nothing was asked for.
            Some(Value::Array(list)) if list.is_empty() => {}
            Some(Value::Object(fields)) if fields.is_empty() => {}
            Some(_) => {
                return Err(ApiError::field(
                    field,
                    format!("{what} are not supported by this version"),
                ));
            }
        }
    }
    document.finish()?;
    Ok(SandboxSpec {
        cpus: cpus.unwrap_or_else(|| defaults.cpus.clone()),
        memory: memory.unwrap_or_else(|| defaults.memory.clone()),
        disk: disk.unwrap_or_else(|| defaults.disk.clone()),
        pids: pids.unwrap_or(defaults.pids),
        timeout_seconds: timeout_seconds.unwrap_or(defaults.timeout_seconds),
        env,
        isolation,
    })
}

fn quantity<T>(
    document: &mut Document,
    field: &str,
    parse: impl FnOnce(&str) -> Result<T, InvalidQuantity>,
) -> Result<Option<T>, ApiError> {
    let Some(text) = document.text(field)? else {
        return Ok(None);
    };
    parse(&text)
        .map(Some)
        .map_err(|error| ApiError::field(document.path(field), error.to_string()))
}

#[cfg(test)]
mod tests;
