//! Sandboxes: create, look at, list, stop, delete.

use std::{collections::BTreeMap, sync::Arc};

use axum::{Json, extract::State};
use http::StatusCode;
use sandgate_api::{
    error::ErrorCode,
    rest::{Isolation, Sandbox, SandboxLifetime, SandboxList, Success},
};
use serde_json::Value;

use super::{
    auth::Authenticated,
    bodies::{FromTemplateBody, SandboxBody},
    document::Document,
    error::ApiError,
    lifetime,
    path::SandboxPath,
    query::Parameters,
    request, secrets,
};
use crate::{
    config::SandboxDefaults,
    service::{Caller, SandboxRequest, Scope, Service},
    spec::{Cpus, InvalidQuantity, PIDS, SandboxSpec, Size, check_environment},
};

/// Documented fields that this version does not have. Accepting them silently would promise what is not kept.
pub(super) const UNSUPPORTED: [(&str, &str); 7] = [
    ("gpu", "GPUs"),
    ("gpu.count", "GPUs"),
    ("gpu.type", "GPUs"),
    ("gpu.memory_gb", "GPUs"),
    ("desktop_os", "desktops"),
    ("volumes", "volumes"),
    ("bandwidth_mbps", "bandwidth limits"),
];

/// Creates a sandbox; the answer comes when it can be used.
#[utoipa::path(
    post, path = "/sandbox/create", operation_id = "create_sandbox", tag = "sandboxes",
    request_body = SandboxBody, responses(
        (status = 201, description = "It runs", body = Sandbox),
        (status = 200, description = "That of the `session_key` runs already; it is `reused`", body = Sandbox)
    )
)]
pub(super) async fn create(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    mut document: Document,
) -> Result<(StatusCode, Json<Sandbox>), ApiError> {
    made(&service, &caller, &mut document, &PLAIN).await
}

/// Creates a sandbox from a template; the answer comes when its files are written and its commands have ended with 0.
/// What is asked for beside the template counts instead of the template's; `env` is added to it.
#[utoipa::path(
    post, path = "/sandbox/create-from-template", operation_id = "create_sandbox_from_template", tag = "sandboxes",
    request_body = FromTemplateBody, responses(
        (status = 201, description = "It runs", body = Sandbox),
        (status = 200, description = "That of the `session_key` runs already; it is `reused`", body = Sandbox)
    )
)]
pub(super) async fn create_from_template(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    mut document: Document,
) -> Result<(StatusCode, Json<Sandbox>), ApiError> {
    made(&service, &caller, &mut document, &FROM_TEMPLATE).await
}

/// How the fields of a creation are called.
struct Names {
    template: &'static str,
    is_needed: bool,
    cpus: &'static str,
    memory: &'static str,
}

const PLAIN: Names = Names {
    template: "template",
    is_needed: false,
    cpus: "cpus",
    memory: "memory",
};

const FROM_TEMPLATE: Names = Names {
    template: "template_id",
    is_needed: true,
    cpus: "override_cpus",
    memory: "override_memory",
};

async fn made(
    service: &Service,
    caller: &Caller,
    document: &mut Document,
    names: &Names,
) -> Result<(StatusCode, Json<Sandbox>), ApiError> {
    caller.may(Scope::SandboxCreate)?;
    document.organization(caller)?;
    let mut defaults = service.sandbox_defaults().clone();
    let template_id = document.text(names.template)?;
    let template = match &template_id {
        None if names.is_needed => return Err(ApiError::field(names.template, "is required")),
        None => None,
        Some(id) => {
            let found = service.find_template(caller.org_id(), id).await?;
            Some(found.ok_or_else(|| ApiError::field(names.template, "there is no template of this id"))?)
        }
    };
    let network = document.value("network");
    let secrets = secrets::choice(document)?;
    let mut terms = lifetime::terms(document)?;
    terms.template_id = template_id;
    let (mut own_env, mut own_network, mut furnishing) = (BTreeMap::new(), None, None);
    if let Some(template) = template {
        furnishing = template.furnishing().map(Arc::new);
        defaults.cpus = template.cpus.unwrap_or(defaults.cpus);
        defaults.memory = template.memory.unwrap_or(defaults.memory);
        defaults.disk = template.disk.unwrap_or(defaults.disk);
        defaults.pids = template.pids.unwrap_or(defaults.pids);
        // The longest life may have become shorter since the template was stored.
        let longest = *lifetime::timeouts(&defaults).end();
        let usual = template.timeout_seconds.unwrap_or(defaults.timeout_seconds);
        defaults.timeout_seconds = usual.min(longest);
        terms.idle_timeout_seconds = terms.idle_timeout_seconds.or(template.idle_timeout_seconds);
        own_env = template.env;
        own_network = template.network;
    }
    let document = std::mem::take(document);
    let mut spec = spec(document, &defaults, names)?;
    own_env.append(&mut spec.env);
    check_environment(&own_env).map_err(|error| ApiError::field("env", error.to_string()))?;
    spec.env = own_env;
    let policy = match network {
        Some(network) => Some(service.parse_policy("network", &network)?),
        None => own_network,
    };
    let asked = SandboxRequest {
        spec,
        policy,
        secrets,
        terms,
        furnishing,
    };
    let started = service.create_sandbox(caller.org_id(), asked).await?;
    request::concerns(&started.sandbox.sandbox_id);
    let status = if started.sandbox.reused {
        StatusCode::OK
    } else {
        StatusCode::CREATED
    };
    Ok((status, Json(started.sandbox)))
}

/// The same as `POST /sandbox/create`.
#[utoipa::path(
    post, path = "/sandbox", operation_id = "create_sandbox_short", tag = "sandboxes",
    request_body = SandboxBody, responses(
        (status = 201, description = "It runs", body = Sandbox),
        (status = 200, description = "That of the `session_key` runs already; it is `reused`", body = Sandbox)
    )
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
        ("metadata.{name}" = Option<String>, Query, description = "Only those whose metadata have this text under the name; of several, all must fit"),
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
        .sandboxes(
            caller.org_id(),
            with_ended,
            parameters.cursor()?,
            limit,
            &parameters.below("metadata."),
        )
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
fn spec(mut document: Document, defaults: &SandboxDefaults, names: &Names) -> Result<SandboxSpec, ApiError> {
    let cpus = quantity(&mut document, names.cpus, str::parse::<Cpus>)?;
    let memory = quantity(&mut document, names.memory, Size::memory)?;
    let disk = quantity(&mut document, "disk", Size::disk)?;
    let pids = document.whole("pids", PIDS)?;
    let timeout_seconds = document.whole("timeout_seconds", lifetime::timeouts(defaults))?;
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

pub(super) fn quantity<T>(
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
