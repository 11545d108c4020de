//! Secrets: create, list, change, delete, give to a sandbox. No answer holds a value, and no refusal repeats one.

use axum::{Json, extract::State};
use http::StatusCode;
use sandgate_api::{
    credential::{Inject, PlaceholderPlace, Sensitive, VALUE_MARK},
    rest::{EgressBinding, Secret, SecretList, SecretsInjected, Success},
};
use serde_json::Value;

use super::{
    auth::Authenticated,
    bodies::{InjectBody, SecretBody, SecretChangeBody},
    document::{Document, PatchDocument},
    error::ApiError,
    path::{SandboxPath, SecretPath},
};
use crate::{
    service::{EgressRequest, SCOPE, Scope, SecretChangeRequest, SecretRequest, Service},
    store::SecretChoice,
};

/// Port of a binding that names none.
const HTTPS: u16 = 443;

/// Documented fields that this version does not have.
pub(super) const UNSUPPORTED: [(&str, &str); 2] = [
    ("allowed_sandbox_patterns", "patterns of sandboxes"),
    ("expires_at", "expiry times of secrets"),
];

/// Most names in one list.
const MOST_NAMES: usize = 256;

/// Lists the organisation's secrets.
#[utoipa::path(
    get, path = "/secrets", operation_id = "list_secrets", tag = "secrets",
    responses((status = 200, description = "The secrets, without their values", body = SecretList))
)]
pub(super) async fn list(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
) -> Result<Json<SecretList>, ApiError> {
    caller.may(Scope::SecretsRead)?;
    Ok(Json(SecretList {
        secrets: service.secrets(caller.org_id()).await?,
    }))
}

/// Stores a secret.
#[utoipa::path(
    post, path = "/secrets", operation_id = "create_secret", tag = "secrets",
    request_body = SecretBody, responses((status = 201, description = "The secret, without its value", body = Secret))
)]
pub(super) async fn create(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    document: PatchDocument,
) -> Result<(StatusCode, Json<Secret>), ApiError> {
    caller.may(Scope::SecretsWrite)?;
    let (egress, mut document) = egress(document)?;
    document.organization(&caller)?;
    let request = SecretRequest {
        name: document.required_text("name")?,
        value: Sensitive::new(document.required_text("value")?),
        egress: egress.unwrap_or(EgressRequest::Preset),
    };
    scope(&mut document)?;
    unsupported(&mut document)?;
    document.finish()?;
    let secret = service.create_secret(caller.org_id(), request).await?;
    Ok((StatusCode::CREATED, Json(secret)))
}

/// Changes the value, the binding, or both.
#[utoipa::path(
    put, path = "/secrets/{name}", operation_id = "update_secret", tag = "secrets",
    request_body = SecretChangeBody, responses((status = 200, description = "The secret, without its value", body = Secret))
)]
pub(super) async fn update(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    SecretPath(name): SecretPath,
    document: PatchDocument,
) -> Result<Json<Secret>, ApiError> {
    caller.may(Scope::SecretsWrite)?;
    let (egress, mut document) = egress(document)?;
    document.organization(&caller)?;
    if let Some(named) = document.text("name")?
        && named != name
    {
        return Err(ApiError::field("name", "a secret cannot be renamed"));
    }
    let request = SecretChangeRequest {
        value: document.text("value")?.map(Sensitive::new),
        egress,
    };
    scope(&mut document)?;
    unsupported(&mut document)?;
    document.finish()?;
    Ok(Json(
        service.update_secret(caller.org_id(), &name, request).await?,
    ))
}

/// Deletes a secret; running sandboxes lose it with the next request.
#[utoipa::path(
    delete, path = "/secrets/{name}", operation_id = "delete_secret", tag = "secrets",
    responses((status = 200, description = "It is revoked", body = Success))
)]
pub(super) async fn delete(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    SecretPath(name): SecretPath,
) -> Result<Json<Success>, ApiError> {
    caller.may(Scope::SecretsWrite)?;
    service.delete_secret(caller.org_id(), &name).await?;
    Ok(Json(Success::OK))
}

/// Gives a running sandbox secrets, for the commands that follow.
#[utoipa::path(
    post, path = "/sandbox/{id}/secrets/inject", operation_id = "inject_secrets", tag = "secrets",
    request_body = InjectBody, responses((status = 200, description = "What it has", body = SecretsInjected))
)]
pub(super) async fn inject(
    State(service): State<Service>,
    Authenticated(caller): Authenticated,
    SandboxPath(id): SandboxPath,
    mut document: Document,
) -> Result<Json<SecretsInjected>, ApiError> {
    caller.may(Scope::SandboxExecute)?;
    document.organization(&caller)?;
    let all = document.flag("all")?.unwrap_or(false);
    let named = names(&mut document)?;
    document.finish()?;
    let choice = match (all, named) {
        (true, _) => SecretChoice::All,
        (false, Some(names)) if !names.is_empty() => SecretChoice::Named(names),
        (false, Some(_) | None) => {
            return Err(ApiError::field(
                "secrets",
                "expected names of secrets, or `\"all\": true`",
            ));
        }
    };
    Ok(Json(service.inject_secrets(caller.org_id(), &id, choice).await?))
}

/// Reads `secrets` of a creation: `all` (the default), `none`, or names.
pub(super) fn choice(document: &mut Document) -> Result<SecretChoice, ApiError> {
    match document.value("secrets") {
        None => Ok(SecretChoice::All),
        Some(Value::String(text)) if text == "all" => Ok(SecretChoice::All),
        Some(Value::String(text)) if text == "none" => Ok(SecretChoice::None),
        Some(list @ Value::Array(_)) => match list_of_names(list)? {
            names if names.is_empty() => Ok(SecretChoice::None),
            names => Ok(SecretChoice::Named(names)),
        },
        Some(_) => Err(ApiError::field(
            "secrets",
            "expected `all`, `none` or a list of names",
        )),
    }
}

fn names(document: &mut Document) -> Result<Option<Vec<String>>, ApiError> {
    document.value("secrets").map(list_of_names).transpose()
}

fn list_of_names(value: Value) -> Result<Vec<String>, ApiError> {
    let Value::Array(elements) = value else {
        return Err(ApiError::field("secrets", "expected a list of names"));
    };
    if elements.len() > MOST_NAMES {
        return Err(ApiError::field("secrets", format!("at most {MOST_NAMES} names")));
    }
    let mut names = Vec::with_capacity(elements.len());
    for (index, element) in elements.into_iter().enumerate() {
        match element {
            Value::String(name) => names.push(name),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_) => {
                return Err(ApiError::field(format!("secrets[{index}]"), "expected a name"));
            }
        }
    }
    Ok(names)
}

fn scope(document: &mut Document) -> Result<(), ApiError> {
    match document.text("scope")?.as_deref() {
        None | Some(SCOPE) => Ok(()),
        Some(_) => Err(ApiError::field(
            "scope",
            format!("only `{SCOPE}` is supported by this version"),
        )),
    }
}

fn unsupported(document: &mut Document) -> Result<(), ApiError> {
    for (field, what) in UNSUPPORTED {
        match document.value(field) {
            None => {}
            Some(Value::Array(list)) if list.is_empty() => {}
            Some(_) => {
                return Err(ApiError::field(
                    field,
                    format!("{what} are not supported by this version"),
                ));
            }
        }
    }
    Ok(())
}

/// Takes `egress`, in which `null` means something, and gives the rest, in which it does not.
fn egress(document: PatchDocument) -> Result<(Option<EgressRequest>, Document), ApiError> {
    let mut document = document.0;
    let egress = match document.value("egress") {
        None => None,
        Some(Value::Null) => Some(EgressRequest::Plain),
        Some(Value::Object(fields)) => {
            let one = Document::nested(fields, "egress.");
            Some(EgressRequest::Bound(vec![binding(one)?]))
        }
        Some(Value::Array(list)) => {
            let mut bindings = Vec::new();
            for (index, element) in list.into_iter().enumerate() {
                let Value::Object(fields) = element else {
                    return Err(ApiError::field(format!("egress[{index}]"), "expected an object"));
                };
                bindings.push(binding(Document::nested(fields, &format!("egress[{index}].")))?);
            }
            Some(EgressRequest::Bound(bindings))
        }
        Some(Value::Bool(_) | Value::Number(_) | Value::String(_)) => {
            return Err(ApiError::field(
                "egress",
                "expected an object, a list of objects, or `null` for a plain environment variable",
            ));
        }
    };
    Ok((egress, document.without_nulls()))
}

fn binding(mut document: Document) -> Result<EgressBinding, ApiError> {
    let hosts = document.texts("hosts")?;
    let hosts = hosts.ok_or_else(|| ApiError::field(document.path("hosts"), "is required"))?;
    let ports = match document.value("ports") {
        None => vec![HTTPS],
        Some(Value::Array(list)) => {
            let mut ports = Vec::with_capacity(list.len());
            for (index, port) in list.iter().enumerate() {
                let number = port.as_u64().and_then(|number| u16::try_from(number).ok());
                let field = || document.path(&format!("ports[{index}]"));
                ports.push(number.filter(|&port| port > 0).ok_or_else(|| {
                    ApiError::field(field(), "expected a port, a number between 1 and 65535")
                })?);
            }
            ports
        }
        Some(_) => {
            return Err(ApiError::field(
                document.path("ports"),
                "expected a list of ports",
            ));
        }
    };
    let methods = document.texts("methods")?.unwrap_or_default();
    let paths = document.texts("paths")?.unwrap_or_default();
    let strip_client_auth = document.flag("strip_client_auth")?.unwrap_or(true);
    let injects = document.documents("inject")?;
    let injects = injects.ok_or_else(|| ApiError::field(document.path("inject"), "is required"))?;
    let inject = injects.into_iter().map(kind).collect::<Result<_, _>>()?;
    document.finish()?;
    Ok(EgressBinding {
        hosts: hosts.iter().map(|host| host.to_ascii_lowercase()).collect(),
        ports,
        methods,
        paths,
        inject,
        strip_client_auth,
    })
}

fn kind(mut document: Document) -> Result<Inject, ApiError> {
    let kind = document.required_text("kind")?;
    let inject = match kind.as_str() {
        "bearer" => Inject::Bearer,
        "basic" => Inject::Basic {
            username: document.required_text("username")?,
        },
        "header" => Inject::Header {
            header: document.required_text("header")?.to_ascii_lowercase(),
            format: document.text("format")?.unwrap_or_else(|| VALUE_MARK.to_owned()),
        },
        "query" => Inject::Query {
            parameter: document.required_text("parameter")?,
        },
        "placeholder" => Inject::Placeholder {
            places: places(&mut document)?,
        },
        "aws_sigv4" | "oauth2_client_credentials" | "oauth2_refresh_token" | "github_app" | "mtls" => {
            return Err(ApiError::field(
                document.path("kind"),
                format!("`{kind}` is not supported by this version"),
            ));
        }
        _unknown => {
            return Err(ApiError::field(
                document.path("kind"),
                "expected `bearer`, `basic`, `header`, `query` or `placeholder`",
            ));
        }
    };
    document.finish()?;
    Ok(inject)
}

/// Where a placeholder is replaced; in headers and the query when nothing is said.
fn places(document: &mut Document) -> Result<Vec<PlaceholderPlace>, ApiError> {
    let Some(words) = document.texts("in")? else {
        return Ok(vec![PlaceholderPlace::Header, PlaceholderPlace::Query]);
    };
    let mut places = Vec::new();
    for (index, word) in words.iter().enumerate() {
        let place = match word.as_str() {
            "header" => PlaceholderPlace::Header,
            "query" => PlaceholderPlace::Query,
            known @ ("path" | "body") => {
                return Err(ApiError::field(
                    document.path(&format!("in[{index}]")),
                    format!("placeholders in the {known} are not supported by this version"),
                ));
            }
            _unknown => {
                return Err(ApiError::field(
                    document.path(&format!("in[{index}]")),
                    "expected `header` or `query`",
                ));
            }
        };
        if !places.contains(&place) {
            places.push(place);
        }
    }
    Ok(places)
}
