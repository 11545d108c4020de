//! Templates, as far as nothing has to run.

use super::*;

fn flask() -> Value {
    json!({
        "name": "Flask", "category": "web", "tags": ["python", "http"],
        "config": {
            "cpus": "500m", "timeout_seconds": 120, "env": {"A": "b"},
            "setup_commands": ["echo one", "echo two"]
        },
        "files": [{"path": "/workspace/settings.py", "content": "DEBUG = False\n"}],
        "network": {"mode": "allowlist", "allowed_domains": ["pypi.org"]}
    })
}

#[tokio::test]
async fn what_is_built_in_is_there_for_everybody_and_cannot_be_changed() {
    let world = world().await;
    let tenant = world.tenant("a@b").await;
    let list = world.call(&tenant, "GET", "/templates", &Value::Null).await.body;
    let templates = list["templates"].as_array().expect("a list");
    let ids: Vec<&str> = templates.iter().filter_map(|one| one["id"].as_str()).collect();
    assert_eq!(ids, ["base", "node-basic", "python-basic"]);
    for template in templates {
        for field in ["id", "name", "description", "category"] {
            assert!(template[field].is_string(), "{field}: {template}");
        }
        let config = &template["config"];
        assert!(config["cpus"].is_string() && config["memory"].is_string());
        assert!(config["timeout_seconds"].is_u64() && config["env"].is_object());
        assert!(template["tags"].is_array() && template["files"].is_array());
    }
    let one = world
        .call(&tenant, "GET", "/templates/python-basic", &Value::Null)
        .await;
    assert_eq!(one.body, templates[2]);
    for (method, body) in [("PUT", flask()), ("DELETE", Value::Null)] {
        let answer = world.call(&tenant, method, "/templates/base", &body).await;
        assert_eq!(answer.refusal(), (409, "CONFLICT", None), "{method}");
    }
    for (query, expected) in [
        ("category=language", vec!["node-basic", "python-basic"]),
        ("category=Language&search=PIP", vec!["python-basic"]),
        ("search=nothing", vec![]),
    ] {
        let path = format!("/templates?{query}");
        let list = world.call(&tenant, "GET", &path, &Value::Null).await.body;
        let found = list["templates"].as_array().expect("a list").iter();
        let ids: Vec<&str> = found.filter_map(|one| one["id"].as_str()).collect();
        assert_eq!(ids, expected, "{query}");
    }
}

#[tokio::test]
async fn own_templates_are_stored_replaced_and_deleted_and_are_nobody_elses() {
    let world = world().await;
    let (tenant, other) = (world.tenant("a@b").await, world.tenant("c@d").await);
    let created = world.call(&tenant, "POST", "/templates", &flask()).await;
    assert_eq!(created.status, StatusCode::CREATED, "{}", created.body);
    let id = created.body["id"].as_str().expect("an id").to_owned();
    let path = format!("/templates/{id}");
    let shown = world.call(&tenant, "GET", &path, &Value::Null).await.body;
    assert_eq!(shown, created.body);
    assert_eq!(shown["config"]["cpus"], "500m");
    assert_eq!(shown["config"]["memory"], "2Gi", "what is left out is usual");
    assert_eq!(shown["config"]["setup_commands"], json!(["echo one", "echo two"]));
    assert_eq!(shown["files"][0]["content"], "DEBUG = False\n");
    assert_eq!(shown["network"]["allowed_domains"], json!(["pypi.org"]));
    for (method, body) in [("GET", Value::Null), ("PUT", flask()), ("DELETE", Value::Null)] {
        let answer = world.call(&other, method, &path, &body).await;
        assert_eq!(answer.refusal(), (404, "NOT_FOUND", None), "{method}");
    }
    let from_it = json!({"template_id": id});
    let answer = world
        .call(&other, "POST", "/sandbox/create-from-template", &from_it)
        .await;
    assert_eq!(answer.refusal(), (400, "VALIDATION_ERROR", Some("template_id")));
    let replaced = world
        .call(
            &tenant,
            "PUT",
            &path,
            &json!({"name": "Empty", "category": "other"}),
        )
        .await;
    assert_eq!(replaced.status, StatusCode::OK, "{}", replaced.body);
    assert_eq!(
        (&replaced.body["id"], &replaced.body["config"]["cpus"]),
        (&json!(id), &json!("2"))
    );
    let deleted = world.call(&tenant, "DELETE", &path, &Value::Null).await;
    assert_eq!(deleted.body, json!({"success": true}));
    let again = world.call(&tenant, "DELETE", &path, &Value::Null).await;
    assert_eq!(again.refusal(), (404, "NOT_FOUND", None));
}

#[tokio::test]
async fn a_bad_template_names_the_field() {
    let world = world().await;
    let tenant = world.tenant("a@b").await;
    for (change, field) in [
        (json!({"name": ""}), "name"),
        (json!({"name": 7}), "name"),
        (json!({"category": "a\nb"}), "category"),
        (json!({"tags": ["a", ""]}), "tags[1]"),
        (json!({"colour": "red"}), "colour"),
        (json!({"config": []}), "config"),
        (json!({"config": {"cpus": 1}}), "config.cpus"),
        (json!({"config": {"cpus": "many"}}), "config.cpus"),
        (
            json!({"config": {"timeout_seconds": 5}}),
            "config.timeout_seconds",
        ),
        (json!({"config": {"env": {"A B": "c"}}}), "config.env"),
        (
            json!({"config": {"setup_commands": "ls"}}),
            "config.setup_commands",
        ),
        (
            json!({"config": {"setup_commands": ["ls", " "]}}),
            "config.setup_commands[1]",
        ),
        (json!({"config": {"image": "x"}}), "config.image"),
        (json!({"files": [{"path": "a", "content": ""}]}), "files[0].path"),
        (
            json!({"files": [{"path": "/a/../b", "content": ""}]}),
            "files[0].path",
        ),
        (json!({"files": [{"path": "/a"}]}), "files[0].content"),
        (
            json!({"files": [{"path": "/a", "content": "x".repeat(1_048_577)}]}),
            "files",
        ),
        (json!({"network": {"mode": "sometimes"}}), "network.mode"),
    ] {
        let mut body = flask();
        let fields = change.as_object().expect("an object").clone();
        body.as_object_mut().expect("an object").extend(fields);
        let answer = world.call(&tenant, "POST", "/templates", &body).await;
        assert_eq!(
            answer.refusal(),
            (400, "VALIDATION_ERROR", Some(field)),
            "{change}"
        );
    }
    for (body, field) in [
        (json!({}), "template_id"),
        (json!({"template_id": "base", "cpus": "1"}), "cpus"),
        (
            json!({"template_id": "base", "override_cpus": "x"}),
            "override_cpus",
        ),
        (
            json!({"template_id": "base", "override_memory": 1}),
            "override_memory",
        ),
    ] {
        let path = "/sandbox/create-from-template";
        let answer = world.call(&tenant, "POST", path, &body).await;
        assert_eq!(answer.refusal(), (400, "VALIDATION_ERROR", Some(field)), "{body}");
    }
    // Everything right, and no node to make it.
    let body = json!({"template_id": "base", "override_cpus": "1", "env": {"A": "b"}});
    let answer = world
        .call(&tenant, "POST", "/sandbox/create-from-template", &body)
        .await;
    assert_eq!(answer.refusal(), (503, "UNAVAILABLE", None));
}
