//! The description of the API: that it is well-formed, checked in, and neither promises a field that is refused
//! nor hides one that is read.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use super::*;
use crate::api::{document::asked, sandboxes, secrets};

const CHECKED_IN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/openapi.json");

/// Set by `make openapi`.
const UPDATE: &str = "UPDATE_OPENAPI";

pub(super) fn description() -> Value {
    described().split().1
}

/// Every operation: path, method, description.
pub(super) fn operations(description: &Value) -> Vec<(String, String, Value)> {
    let paths = description["paths"].as_object().expect("paths");
    paths
        .iter()
        .flat_map(|(path, item)| {
            let item = item.as_object().expect("a path item");
            item.iter()
                .map(|(method, operation)| (path.clone(), method.clone(), operation.clone()))
        })
        .collect()
}

fn walk<'a>(value: &'a Value, visit: &mut impl FnMut(&'a serde_json::Map<String, Value>)) {
    match value {
        Value::Object(fields) => {
            visit(fields);
            fields.values().for_each(|value| walk(value, visit));
        }
        Value::Array(values) => values.iter().for_each(|value| walk(value, visit)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

fn resolved<'a>(description: &'a Value, schema: &'a Value) -> &'a Value {
    match schema["$ref"].as_str() {
        Some(reference) => description
            .pointer(reference.trim_start_matches('#'))
            .expect("a reference that leads somewhere"),
        None => schema,
    }
}

/// Every field that a schema names, as a path; lists leave no trace in it.
fn fields(description: &Value, schema: &Value, inside: &str, found: &mut BTreeSet<String>) {
    let schema = resolved(description, schema);
    for choice in ["oneOf", "anyOf", "allOf"] {
        for part in schema[choice].as_array().into_iter().flatten() {
            fields(description, part, inside, found);
        }
    }
    if schema["items"].is_object() {
        fields(description, &schema["items"], inside, found);
    }
    for (name, property) in schema["properties"].as_object().into_iter().flatten() {
        let path = format!("{inside}{name}");
        fields(description, property, &format!("{path}."), found);
        found.insert(path);
    }
}

#[test]
fn the_checked_in_description_is_the_present_one() {
    let mut present = serde_json::to_string_pretty(&description()).expect("JSON");
    present.push('\n');
    if std::env::var_os(UPDATE).is_some() {
        fs::write(CHECKED_IN, &present).expect("written");
    }
    let stored = fs::read_to_string(CHECKED_IN).unwrap_or_default();
    assert!(
        stored == present,
        "controller/openapi.json is stale: run `make openapi`"
    );
}

#[test]
fn the_description_is_well_formed() {
    let description = description();
    assert_eq!(description["openapi"], "3.1.0");
    walk(&description, &mut |fields| {
        if let Some(reference) = fields.get("$ref") {
            let reference = reference.as_str().expect("a text");
            let pointer = reference.strip_prefix('#').expect("in this document");
            assert!(
                description.pointer(pointer).is_some(),
                "{reference} leads nowhere"
            );
        }
        if let Some(text) = fields.get("description").and_then(Value::as_str) {
            assert!(!text.contains("[`"), "a link to a type of ours: {text}");
        }
    });
    let tags: BTreeSet<&str> = description["tags"]
        .as_array()
        .expect("tags")
        .iter()
        .filter_map(|tag| tag["name"].as_str())
        .collect();
    let mut ids = BTreeSet::new();
    for (path, method, operation) in operations(&description) {
        let place = format!("{method} {path}");
        let id = operation["operationId"].as_str().expect("an id").to_owned();
        assert!(ids.insert(id), "{place}: its operationId is taken");
        assert!(operation["summary"].is_string(), "{place}: no summary");
        let tag = operation["tags"][0].as_str().unwrap_or_default();
        assert!(tags.contains(tag), "{place}: the tag `{tag}` is unknown");
        let responses = operation["responses"].as_object().expect("responses");
        assert!(
            responses
                .keys()
                .any(|status| status.starts_with('2') || status == "101"),
            "{place}: no success"
        );
        assert_eq!(
            responses["default"]["content"]["application/json"]["schema"]["$ref"],
            "#/components/schemas/ErrorEnvelope",
            "{place}"
        );
        for name in path.split('{').skip(1).filter_map(|rest| rest.split('}').next()) {
            let declared = operation["parameters"].as_array().into_iter().flatten();
            let declared = declared.filter(|known| known["name"] == name && known["in"] == "path");
            assert_eq!(declared.count(), 1, "{place}: {{{name}}}");
        }
    }
}

#[test]
fn no_endpoint_is_registered_without_its_description() {
    let api = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/api");
    let mut files = vec![api.with_extension("rs")];
    files.extend(
        fs::read_dir(&api)
            .expect("the folder")
            .map(|entry| entry.expect("an entry").path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "rs")),
    );
    for file in files {
        let text = fs::read_to_string(&file).expect("text");
        for way_around in [".route(", ".route_service(", "Router::new()", ".nest_service("] {
            let own = file.ends_with("openapi.rs") && way_around == "Router::new()";
            assert!(
                own || !text.contains(way_around) || file.ends_with("tests.rs"),
                "{}: `{way_around}`; endpoints are added with Routes::add(routes!(…))",
                file.display()
            );
        }
    }
}

/// Bodies to send: the examples of the schema, which together show every field at the top.
fn examples(description: &Value, schema: &Value, place: &str) -> Vec<serde_json::Map<String, Value>> {
    let schema = resolved(description, schema);
    let mut bodies: Vec<_> = schema["example"].as_object().cloned().into_iter().collect();
    let several = schema["examples"].as_array().into_iter().flatten();
    bodies.extend(several.filter_map(|example| example.as_object().cloned()));
    let shown: BTreeSet<&String> = bodies.iter().flat_map(serde_json::Map::keys).collect();
    for name in schema["properties"].as_object().expect("fields").keys() {
        assert!(
            shown.contains(name) || name == "org_id",
            "{place}: no example shows `{name}`"
        );
    }
    bodies
}

/// A body to send, of an operation that takes one.
pub(super) fn example(description: &Value, operation: &Value) -> Option<Value> {
    let schema = &operation["requestBody"]["content"]["application/json"]["schema"];
    if schema.is_null() {
        return None;
    }
    let schema = resolved(description, schema);
    let several = schema["examples"].as_array().and_then(|several| several.first());
    schema.get("example").or(several).cloned()
}

/// Fields that are read for a reason of their own: an answer of ours may be sent back, and what this version does
/// not have is refused by name.
fn undocumented(path: &str) -> BTreeSet<&'static str> {
    let mut known = BTreeSet::from(["org_id"]);
    if path.ends_with("/network") || path.ends_with("/egress") {
        known.extend([
            "policy",
            "sandbox_id",
            "applied",
            "effective",
            "updated_at",
            "revision",
        ]);
    }
    if path.ends_with("/sandbox")
        || path.ends_with("/sandbox/create")
        || path.ends_with("/create-from-template")
    {
        known.extend(sandboxes::UNSUPPORTED.iter().map(|(name, _)| *name));
    }
    if path.contains("/secrets") {
        known.extend(secrets::UNSUPPORTED.iter().map(|(name, _)| *name));
    }
    known
}

#[tokio::test]
async fn every_documented_field_is_accepted_and_every_accepted_field_is_documented() {
    let mut world = world().await;
    // There is no node to connect to a sandbox, and none is waited for.
    world.netd = fs::File::open("/dev/null").expect("it is there").into();
    let tenant = world.tenant("a@acme.test").await;
    let sandbox = world.stored_sandbox(&tenant).await;
    let bound = json!({"name": "EXAMPLE_TOKEN", "value": "secret-value", "egress": {
        "hosts": ["api.example.org"], "inject": [{"kind": "bearer"}]
    }});
    assert_eq!(
        world.call(&tenant, "POST", "/secrets", &bound).await.status,
        StatusCode::CREATED
    );
    let description = description();
    let mut checked = 0;
    for (path, method, operation) in operations(&description) {
        let schema = &operation["requestBody"]["content"]["application/json"]["schema"];
        if schema.is_null() {
            continue;
        }
        let place = format!("{method} {path}");
        let mut documented = BTreeSet::new();
        fields(&description, schema, "", &mut documented);
        let url = path
            .replace("/api/v1", "")
            .replace("{id}", sandbox.as_str())
            .replace("{name}", "EXAMPLE_TOKEN")
            .replace("{pid}", "proc-1")
            .replace("{sid}", "python-proc-1");
        assert!(!url.contains('{'), "{place}: this test has no value for its path");
        drop(asked::take());
        for mut body in examples(&description, schema, &place) {
            if documented.contains("org_id") {
                body.insert("org_id".to_owned(), tenant.org.as_str().into());
            }
            let method = method.to_uppercase();
            let answer = world.call(&tenant, &method, &url, &Value::Object(body)).await;
            let (status, code, field) = answer.refusal();
            assert!(
                answer.status.is_success() || code != "VALIDATION_ERROR",
                "{place}: the example is refused: {status} {field:?} {}",
                answer.body
            );
        }
        let known = undocumented(&path);
        for field in asked::take() {
            assert!(
                documented.contains(&field) || known.contains(field.as_str()),
                "{place}: `{field}` is read and not documented"
            );
        }
        checked += 1;
    }
    assert!(checked >= 10, "{checked} bodies were checked");
}

#[tokio::test]
async fn the_schema_of_policies_is_the_one_that_the_parser_goes_by() {
    let world = world().await;
    let (status, _headers, text) = fetch(&world.router, "/api/v1/policy-schema").await;
    assert_eq!(status, StatusCode::OK, "{text}");
    let mut served: Value = serde_json::from_str(&text).expect("JSON");
    let version = served.as_object_mut().and_then(|schema| schema.remove("$schema"));
    assert_eq!(
        version,
        Some(json!("https://json-schema.org/draft/2020-12/schema"))
    );
    assert_eq!(served, description()["components"]["schemas"]["PolicyDocument"]);
    let examples = served
        .as_object_mut()
        .and_then(|schema| schema.remove("examples"));
    for example in examples.as_ref().and_then(Value::as_array).expect("examples") {
        sandgate_policy::Policy::parse(example).expect("an example");
    }
    assert_eq!(served, sandgate_policy::Policy::schema());
}

async fn fetch(router: &Router, path: &str) -> (StatusCode, http::HeaderMap, String) {
    let request = Request::get(path).body(Body::empty()).expect("a request");
    let (parts, body) = router
        .clone()
        .oneshot(request)
        .await
        .expect("an answer")
        .into_parts();
    let bytes = body.collect().await.expect("a body").to_bytes();
    let text = String::from_utf8(bytes.to_vec()).expect("text");
    (parts.status, parts.headers, text)
}

#[tokio::test]
async fn the_description_and_its_page_are_served_without_a_key_and_load_nothing_else() {
    let world = world().await;
    let types = BTreeMap::from([
        ("/openapi.json", "application/json"),
        ("/docs", "text/html"),
        ("/docs/page.js", "text/javascript"),
        ("/docs/page.css", "text/css"),
    ]);
    for (path, kind) in types {
        let (status, headers, text) = fetch(&world.router, path).await;
        assert_eq!(status, StatusCode::OK, "{path}");
        let header = |name: &str| headers[name].to_str().expect("text").to_owned();
        assert!(header("content-type").starts_with(kind), "{path}");
        assert_eq!(header("x-content-type-options"), "nosniff", "{path}");
        let policy = header("content-security-policy");
        assert!(policy.starts_with("default-src 'none'"), "{path}: {policy}");
        assert!(!policy.contains("unsafe"), "{path}: {policy}");
        if path == "/openapi.json" {
            let served: Value = serde_json::from_str(&text).expect("JSON");
            assert_eq!(served, description());
        } else {
            for foreign in ["http://", "https://", "innerHTML", "eval(", " style=", "onclick"] {
                assert!(!text.contains(foreign), "{path} has `{foreign}`");
            }
        }
    }
}

#[tokio::test]
async fn ready_is_no_until_a_sandbox_could_be_created_and_stands_at_the_root_only() {
    let world = world().await;
    let (status, _headers, text) = fetch(&world.router, "/ready").await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{text}");
    let health: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(health["backend"], "starting");
    assert_eq!(health["nodes"][0]["ready"], false);
    assert_eq!(fetch(&world.router, "/health").await.0, StatusCode::OK);
    assert_eq!(
        fetch(&world.router, "/api/v1/ready").await.0,
        StatusCode::NOT_FOUND
    );
    world.service.backend_failed("no loop devices".to_owned());
    let (status, _headers, text) = fetch(&world.router, "/ready").await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{text}");
    assert!(text.contains("no loop devices"), "{text}");
}
