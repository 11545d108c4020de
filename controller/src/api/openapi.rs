//! The description of the API, OpenAPI 3.1, made from the handlers.
//!
//! [`Routes`] is the only way to add an endpoint, and takes none without its description. What holds for every
//! endpoint (the error envelope, credentials, ids in paths) is added here once.

use axum::Router;
use sandgate_api::{error::ErrorEnvelope, openapi::PolicyDocument};
use serde_json::{Value, json};
use utoipa::{
    OpenApi, ToSchema as _,
    openapi::{self, InfoBuilder, OpenApiBuilder},
};
use utoipa_axum::router::{OpenApiRouter, UtoipaMethodRouter};

use crate::service::Service;

/// Schemas that no handler's signature leads to.
#[derive(OpenApi)]
#[openapi(components(schemas(
    ErrorEnvelope,
    sandgate_api::error::ErrorBody,
    sandgate_api::error::ErrorCode,
    sandgate_api::rest::StreamEvent,
    sandgate_api::rest::WatchEvent,
    sandgate_api::rest::ProcessEvent
)))]
struct Further;

/// Areas, in the order in which they are shown.
const TAGS: [(&str, &str); 9] = [
    ("accounts", "Registration, users, API keys and tokens."),
    ("sandboxes", "Their life."),
    ("commands", "What runs in a sandbox."),
    ("files", "A sandbox's files."),
    ("network", "What may get out, and what tried to."),
    ("secrets", "Credentials that code uses and never sees."),
    ("tunnels", "URLs that lead to a port of a sandbox."),
    ("operations", "How the installation is."),
    ("reference", "This description."),
];

/// Endpoints with their descriptions.
pub(super) struct Routes(OpenApiRouter<Service>);

impl Routes {
    pub(super) fn new() -> Self {
        Self(OpenApiRouter::new())
    }

    /// Adds handlers of one path: `routes!(get, put)`.
    pub(super) fn add(self, routes: UtoipaMethodRouter<Service>) -> Self {
        Self(self.0.routes(routes))
    }

    /// Adds endpoints below a path.
    pub(super) fn below(self, path: &str, routes: Self) -> Self {
        Self(self.0.nest(path, routes.0))
    }

    /// The router and the description.
    pub(super) fn split(self) -> (Router<Service>, Value) {
        let (router, described) = self.0.split_for_parts();
        (router, complete(described))
    }
}

fn complete(mut described: openapi::OpenApi) -> Value {
    described.merge(Further::openapi());
    let info = InfoBuilder::new()
        .title("Sandgate")
        .version(env!("CARGO_PKG_VERSION"))
        .description(Some(
            "Isolated sandboxes whose network, credentials and exposure the operator owns. Every 2xx answer is a \
             JSON object in snake_case with RFC 3339 times; every other answer is the error envelope. \
             `x-request-id` of a request, or a fresh one, is in the answer's header and in the logs.",
        ))
        .build();
    described = OpenApiBuilder::from(described).info(info).build();
    // A document that was built cannot fail to be written.
    let mut document = serde_json::to_value(&described).unwrap_or_default();
    document["openapi"] = "3.1.0".into();
    document["components"]["schemas"][&*PolicyDocument::name()] = PolicyDocument::json();
    document["tags"] = TAGS
        .iter()
        .map(|(name, description)| json!({"name": name, "description": description}))
        .collect();
    document["components"]["securitySchemes"] = json!({
        "bearer": {
            "type": "http", "scheme": "bearer",
            "description": "The API key, or a token, as `Authorization: Bearer <key>`; `ApiKey` is understood instead of \
                            `Bearer`."
        },
        "header": {
            "type": "apiKey", "in": "header", "name": "x-api-key", "description": "The API key alone."
        }
    });
    document["security"] = json!([{"bearer": []}, {"header": []}]);
    if let Some(paths) = document["paths"].as_object_mut() {
        for (path, item) in paths {
            for operation in item
                .as_object_mut()
                .into_iter()
                .flat_map(|item| item.values_mut())
            {
                complete_operation(path, operation);
            }
        }
    }
    plain(&mut document);
    document
}

fn complete_operation(path: &str, operation: &mut Value) {
    operation["responses"]["default"] = json!({
        "description": "Refused or failed; `code` says how, and with a 400 `details.field` says which field.",
        "content": {"application/json": {
            "schema": {"$ref": "#/components/schemas/ErrorEnvelope"},
            "example": {"error": {
                "code": "VALIDATION_ERROR", "message": "cpus: expected a number of processors, for example 2",
                "request_id": "req-1", "details": {"field": "cpus"}
            }}
        }}
    });
    if let Some(answers) = operation["responses"].as_object_mut() {
        answers.values_mut().for_each(describe_events);
    }
    let mut parameters: Vec<Value> = operation["parameters"].as_array().cloned().unwrap_or_default();
    for name in path.split('{').skip(1).filter_map(|rest| rest.split('}').next()) {
        let is_known = |known: &Value| known["name"] == name && known["in"] == "path";
        if !parameters.iter().any(is_known) {
            parameters.push(json!({
                "name": name, "in": "path", "required": true, "schema": {"type": "string"}
            }));
        }
    }
    if !parameters.is_empty() {
        operation["parameters"] = parameters.into();
    }
}

/// Handlers name what an event carries; the description shows the event as it is on the wire (WHATWG HTML, 9.2).
fn describe_events(answer: &mut Value) {
    let Some(schema) = answer.pointer_mut("/content/text~1event-stream/schema") else {
        return;
    };
    *schema = json!({
        "type": "object",
        "required": ["data"],
        "properties": {
            "data": {"type": "string", "contentMediaType": "application/json", "contentSchema": schema.take()},
            "event": {"type": "string"},
            "id": {"type": "string"},
            "retry": {"type": "integer"}
        }
    });
}

/// Doc comments name our own types as links; whoever reads the description has only the words.
fn plain(value: &mut Value) {
    match value {
        Value::String(text) if text.contains("[`") => {
            let mut words = String::with_capacity(text.len());
            let mut rest = text.as_str();
            while let Some((before, link)) = rest.split_once("[`") {
                words.push_str(before);
                let (name, after) = link.split_once("`]").unwrap_or((link, ""));
                words.push('`');
                words.push_str(name);
                words.push('`');
                rest = match after.strip_prefix('(').and_then(|target| target.split_once(')')) {
                    Some((_target, after)) => after,
                    None => after,
                };
            }
            words.push_str(rest);
            *text = words;
        }
        Value::Array(values) => values.iter_mut().for_each(plain),
        Value::Object(fields) => fields.values_mut().for_each(plain),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}
