//! Which secrets a sandbox gets, and when.

use harness::sandbox::Sandbox;
use serde_json::json;

use super::{
    Promise, assert_bearer,
    clients::{CLIENTS, CURL, call},
    fresh, policy,
};

/// The variables of a sandbox that are named like keys.
#[track_caller]
fn names(sandbox: &Sandbox) -> Vec<String> {
    let names =
        sandbox.sh_ok("env -0 | tr '\\n' ' ' | tr '\\0' '\\n' | grep -o '^[A-Z]*_KEY' | sort || true");
    names.lines().map(str::to_owned).collect()
}

pub(crate) fn a_sandbox_gets_the_keys_that_it_was_promised(promise: &Promise) {
    let none = promise.another(json!({ "secrets": "none" }));
    assert_eq!(names(&none), Vec::<String>::new());
    let some = promise.another(json!({ "secrets": ["ODD_KEY", "API_KEY"] }));
    assert_eq!(names(&some), ["API_KEY", "ODD_KEY"]);
    assert!(names(&promise.sandbox).len() > 8);
    let path = fresh("promised");
    call(&some, CURL, &format!("https://api.test{path}"), &[]);
    assert_bearer(&promise.mirror().only(&path), promise.key("API_KEY"));
    // Later, into one that had none: the commands from then on have it.
    let inject = |names: &[&str]| {
        let call = none.client().post(&none.path("/secrets/inject"));
        call.json(&json!({ "secrets": names })).send()
    };
    inject(&["NO_SUCH_KEY"]).refused(404, "NOT_FOUND");
    let injected = inject(&["API_KEY"]).ok();
    assert_eq!(injected["injected"], json!(["API_KEY"]), "{injected}");
    assert_eq!(injected["applied"], true, "{injected}");
    assert_eq!(names(&none), ["API_KEY"]);
    for (name, client) in CLIENTS {
        let path = fresh("promised");
        let answered = call(
            &none,
            client,
            &format!("https://api.test{path}"),
            &["Authorization: Bearer $API_KEY"],
        );
        assert_eq!(answered.status, 200, "{name}: {answered:?}");
        assert_bearer(&promise.mirror().only(&path), promise.key("API_KEY"));
        promise.assert_no_key(&answered.body);
    }
    // A caller's own variable of that name is that caller's business, and no key.
    let output = none.execute(&json!({ "command": "printenv API_KEY", "env": { "API_KEY": "own" } }));
    assert_eq!(output.stdout.trim(), "own", "{output:?}");
    none.stop();
    some.stop();
}

pub(crate) fn well_known_names_need_no_binding(promise: &Promise) {
    let organization = promise.node.register("presets");
    let value = format!("sk-ant-canary-{}", uuid::Uuid::new_v4().simple());
    let body = json!({ "name": "ANTHROPIC_API_KEY", "value": value });
    let stored = organization.client.post("/secrets").json(&body).send().ok();
    assert_eq!(
        stored["egress"]["hosts"],
        json!(["api.anthropic.com"]),
        "{stored}"
    );
    let sandbox = organization.sandbox(&json!({ "network": policy() }));
    super::clients::install(&sandbox);
    let placeholder = sandbox.sh_ok("printenv ANTHROPIC_API_KEY");
    assert!(
        placeholder.starts_with("sk-ant-") && placeholder != value,
        "{placeholder}"
    );
    let path = fresh("preset");
    let url = format!("https://api.anthropic.com{path}");
    let answered = call(&sandbox, CURL, &url, &["x-api-key: $ANTHROPIC_API_KEY"]);
    assert_eq!(answered.status, 200, "{answered:?}");
    assert_eq!(promise.mirror().only(&path).all("x-api-key"), [value.as_str()]);
    assert!(
        harness::search::sighting(answered.body.as_bytes(), &value).is_none(),
        "{answered:?}"
    );
    sandbox.stop();
}

pub(crate) fn a_key_that_a_rule_demands_must_be_bound(promise: &Promise) {
    // `credential` narrows: without that binding nothing passes.
    let sandbox = promise.another(json!({ "secrets": ["API_KEY"], "network": {
        "mode": "allowlist",
        "rules": [
            { "name": "with", "action": "allow", "domains": ["api.test"], "ports": ["443"], "credential": "API_KEY" },
            { "name": "without", "action": "allow", "domains": ["other.test"], "ports": ["443"], "credential": "API_KEY" },
        ],
    }}));
    let path = fresh("demanded");
    call(&sandbox, CURL, &format!("https://api.test{path}"), &[]);
    assert_bearer(&promise.mirror().only(&path), promise.key("API_KEY"));
    let path = fresh("demanded");
    let refused = call(&sandbox, CURL, &format!("https://other.test{path}"), &[]);
    assert_ne!(refused.status, 200, "{refused:?}");
    assert!(promise.mirror().heard_below(&path).is_empty());
    sandbox.stop();
}
