//! What sandboxes can be made from.

use std::collections::BTreeMap;

use axum::{Json, extract::State};
use http::StatusCode;
use sandgate_api::rest::{self, Success, TemplateList};
use serde_json::Value;

use super::{
    auth::Authenticated,
    bodies::TemplateBody,
    document::Document,
    error::ApiError,
    lifetime,
    path::{self, TemplatePath},
    query::Parameters,
    sandboxes::quantity,
};
use crate::{
    config::SandboxDefaults,
    service::{Scope, Service, TemplateFilter},
    spec::{Cpus, PIDS, Size, check_environment},
    template::{MAX_COMMAND, MAX_COMMANDS, MAX_FILE_BYTES, MAX_FILES, Template, TemplateFile},
    terms::IDLE_SECONDS,
};

/// Longest name and category, in characters.
const MAX_NAME: usize = 100;

/// Longest description, in characters.
const MAX_DESCRIPTION: usize = 2_000;

/// Most tags.
const MAX_TAGS: usize = 20;

/// Lists what sandboxes can be made from: what is built in, and the organisation's own.
#[utoipa::path(
    get, path = "/templates", operation_id = "list_templates", tag = "sandboxes",
    params(
        ("category" = Option<String>, Query, description = "Of this category"),
        ("search" = Option<String>, Query, description = "With this text in id, name, description or tags")
    ),
    responses((status = 200, description = "Templates", body = TemplateList))
)]
pub(super) async fn list(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    parameters: Parameters,
) -> Result<Json<TemplateList>, ApiError> {
    caller.may(Scope::SandboxRead)?;
    let filter = TemplateFilter {
        category: parameters.text("category").map(str::to_owned),
        search: parameters.text("search").map(str::to_owned),
    };
    let templates = service.templates(caller.org_id(), &filter).await?;
    Ok(Json(TemplateList { templates }))
}

/// Shows a template.
#[utoipa::path(
    get, path = "/templates/{id}", operation_id = "get_template", tag = "sandboxes",
    responses((status = 200, description = "The template", body = rest::Template))
)]
pub(super) async fn get(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    TemplatePath(id): TemplatePath,
) -> Result<Json<rest::Template>, ApiError> {
    caller.may(Scope::SandboxRead)?;
    Ok(Json(service.template(caller.org_id(), &id).await?))
}

/// Stores a template of the organisation. Its sandboxes are handed out when its files are written and its commands have
/// ended with 0, all in at most 300 s; one that fails is a 409 that says why, and the sandbox is gone.
#[utoipa::path(
    post, path = "/templates", operation_id = "create_template", tag = "sandboxes",
    request_body = TemplateBody,
    responses((status = 201, description = "It is stored", body = rest::Template))
)]
pub(super) async fn create(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    mut document: Document,
) -> Result<(StatusCode, Json<rest::Template>), ApiError> {
    caller.may(Scope::SandboxCreate)?;
    document.organization(&caller)?;
    let template = template(&service, document)?;
    let stored = service.create_template(caller.org_id(), template).await?;
    Ok((StatusCode::CREATED, Json(stored)))
}

/// Replaces a template of the organisation. Sandboxes made from it stay as they are.
#[utoipa::path(
    put, path = "/templates/{id}", operation_id = "replace_template", tag = "sandboxes",
    request_body = TemplateBody,
    responses((status = 200, description = "It is stored", body = rest::Template))
)]
pub(super) async fn replace(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    TemplatePath(id): TemplatePath,
    mut document: Document,
) -> Result<Json<rest::Template>, ApiError> {
    caller.may(Scope::SandboxCreate)?;
    document.organization(&caller)?;
    let template = template(&service, document)?;
    let stored = service.replace_template(caller.org_id(), &id, template).await?;
    Ok(Json(stored))
}

/// Deletes a template of the organisation. Sandboxes made from it stay as they are.
#[utoipa::path(
    delete, path = "/templates/{id}", operation_id = "delete_template", tag = "sandboxes",
    responses((status = 200, description = "It is gone", body = Success))
)]
pub(super) async fn delete(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    TemplatePath(id): TemplatePath,
) -> Result<Json<Success>, ApiError> {
    caller.may(Scope::SandboxCreate)?;
    service.delete_template(caller.org_id(), &id).await?;
    Ok(Json(Success::OK))
}

fn template(service: &Service, mut document: Document) -> Result<Template, ApiError> {
    let name = document.required_text("name")?;
    named("name", &name, MAX_NAME)?;
    let description = document.text("description")?.unwrap_or_default();
    if description.chars().count() > MAX_DESCRIPTION {
        let message = format!("expected at most {MAX_DESCRIPTION} characters");
        return Err(ApiError::field("description", message));
    }
    let category = document.text("category")?.unwrap_or_else(|| "custom".to_owned());
    named("category", &category, MAX_NAME)?;
    let tags = document.texts("tags")?.unwrap_or_default();
    if tags.len() > MAX_TAGS {
        return Err(ApiError::field(
            "tags",
            format!("at most {MAX_TAGS} are possible"),
        ));
    }
    for (index, tag) in tags.iter().enumerate() {
        named(&format!("tags[{index}]"), tag, MAX_NAME)?;
    }
    let files = files(&mut document)?;
    let network = document
        .value("network")
        .map(|network| service.parse_policy("network", &network))
        .transpose()?;
    let config = match document.value("config") {
        None => Document::parse(b"")?,
        Some(Value::Object(fields)) => Document::nested(fields, "config."),
        Some(_) => return Err(ApiError::field("config", "expected an object")),
    };
    document.finish()?;
    let plain = Template {
        name,
        description,
        category,
        tags,
        cpus: None,
        memory: None,
        disk: None,
        pids: None,
        timeout_seconds: None,
        idle_timeout_seconds: None,
        env: BTreeMap::new(),
        setup_commands: Vec::new(),
        files,
        network,
    };
    configured(plain, config, service.sandbox_defaults())
}

fn configured(
    template: Template,
    mut config: Document,
    defaults: &SandboxDefaults,
) -> Result<Template, ApiError> {
    let env = config.text_map("env")?.unwrap_or_default();
    check_environment(&env).map_err(|error| ApiError::field("config.env", error.to_string()))?;
    let setup_commands = config.texts("setup_commands")?.unwrap_or_default();
    if setup_commands.len() > MAX_COMMANDS {
        let message = format!("at most {MAX_COMMANDS} are possible");
        return Err(ApiError::field("config.setup_commands", message));
    }
    for (index, line) in setup_commands.iter().enumerate() {
        if line.trim().is_empty() || line.len() > MAX_COMMAND || line.contains('\0') {
            let message = format!("expected a shell line of at most {MAX_COMMAND} bytes");
            return Err(ApiError::field(
                format!("config.setup_commands[{index}]"),
                message,
            ));
        }
    }
    let template = Template {
        cpus: quantity(&mut config, "cpus", str::parse::<Cpus>)?,
        memory: quantity(&mut config, "memory", Size::memory)?,
        disk: quantity(&mut config, "disk", Size::disk)?,
        pids: config.whole("pids", PIDS)?,
        timeout_seconds: config.whole("timeout_seconds", lifetime::timeouts(defaults))?,
        idle_timeout_seconds: config.whole("idle_timeout_seconds", IDLE_SECONDS)?,
        env,
        setup_commands,
        ..template
    };
    config.finish()?;
    Ok(template)
}

fn files(document: &mut Document) -> Result<Vec<TemplateFile>, ApiError> {
    let documents = document.documents("files")?.unwrap_or_default();
    if documents.len() > MAX_FILES {
        return Err(ApiError::field(
            "files",
            format!("at most {MAX_FILES} are possible"),
        ));
    }
    let mut files = Vec::with_capacity(documents.len());
    let mut bytes = 0;
    for mut file in documents {
        let field = file.path("path");
        let path = file.required_text("path")?;
        path::inside(&field, &path)?;
        let content = file.required_text("content")?;
        bytes += content.len();
        file.finish()?;
        files.push(TemplateFile { path, content });
    }
    if bytes > MAX_FILE_BYTES {
        let message = format!("together they may have at most {MAX_FILE_BYTES} bytes");
        return Err(ApiError::field("files", message));
    }
    Ok(files)
}

fn named(field: &str, text: &str, most: usize) -> Result<(), ApiError> {
    if text.trim().is_empty() || text.chars().count() > most || text.chars().any(char::is_control) {
        let message = format!("expected 1 to {most} characters without control characters");
        return Err(ApiError::field(field, message));
    }
    Ok(())
}
