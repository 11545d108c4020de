//! Users, roles, invitations, tokens, and how keys follow them.

use super::*;
use crate::{jwt, service};

/// What an organisation's owner, or somebody they added, goes by.
fn holder(answer: &Answer, org: &OrgId) -> Tenant {
    assert!(answer.status.is_success(), "{}", answer.body);
    Tenant {
        key: answer.body["key"].as_str().expect("a key").to_owned(),
        org: org.clone(),
    }
}

impl World {
    /// Adds a user; answers the user's id and key.
    pub(super) async fn user(&self, by: &Tenant, email: &str, role: &str) -> (String, Tenant) {
        let body = json!({"email": email, "role": role});
        let answer = self.call(by, "POST", "/users", &body).await;
        assert_eq!(answer.status, StatusCode::CREATED, "{}", answer.body);
        assert_eq!(answer.body["user"]["role"], role);
        let id = answer.body["user"]["id"].as_str().expect("an id").to_owned();
        (id, holder(&answer, &by.org))
    }

    async fn status_of(&self, tenant: &Tenant, method: &str, path: &str, body: &Value) -> u16 {
        self.call(tenant, method, path, body).await.status.as_u16()
    }

    async fn invited(&self, body: &Value) -> Answer {
        let request = Request::post("/api/v1/register")
            .body(Body::from(body.to_string()))
            .expect("a request");
        self.send(request).await
    }
}

fn settings(change: impl FnOnce(&mut Settings)) -> Settings {
    let mut settings = Settings::default();
    change(&mut settings);
    settings
}

#[tokio::test]
async fn a_role_bounds_what_a_users_key_may_do() {
    let world = world().await;
    let owner = world.tenant("owner@acme.test").await;
    let (_, admin) = world.user(&owner, "admin@acme.test", "admin").await;
    let (_, member) = world.user(&owner, "member@acme.test", "member").await;
    let (viewer_id, viewer) = world.user(&admin, "viewer@acme.test", "viewer").await;
    let sandbox = world.stored_sandbox(&owner).await;
    let read = format!("/sandbox/{sandbox}");
    let stop = format!("/sandbox/{sandbox}/stop");
    for who in [&owner, &admin, &member, &viewer] {
        assert_eq!(world.status_of(who, "GET", &read, &Value::Null).await, 200);
        assert_eq!(world.status_of(who, "GET", "/secrets", &Value::Null).await, 200);
        assert_eq!(world.status_of(who, "GET", "/users", &Value::Null).await, 200);
    }
    assert_eq!(world.status_of(&viewer, "POST", &stop, &Value::Null).await, 403);
    assert_eq!(
        world.status_of(&viewer, "GET", "/api-keys", &Value::Null).await,
        403
    );
    let secret = json!({"name": "TOKEN", "value": "v"});
    let policy = json!({"mode": "deny_all"});
    let new_user = json!({"email": "new@acme.test", "role": "viewer"});
    for who in [&member, &viewer] {
        assert_eq!(world.status_of(who, "POST", "/secrets", &secret).await, 403);
        assert_eq!(
            world.status_of(who, "PUT", "/settings/egress", &policy).await,
            403
        );
        assert_eq!(world.status_of(who, "POST", "/users", &new_user).await, 403);
        assert_eq!(
            world.status_of(who, "GET", "/invitations", &Value::Null).await,
            403
        );
    }
    assert_eq!(world.status_of(&admin, "POST", "/secrets", &secret).await, 201);
    // Only the node is missing here.
    assert_eq!(world.status_of(&member, "POST", &stop, &Value::Null).await, 503);

    // A role counts from the next request on, for keys that are there already.
    let change = json!({"role": "member"});
    let path = format!("/users/{viewer_id}");
    let changed = world.call(&admin, "PATCH", &path, &change).await;
    assert_eq!(changed.body["role"], "member", "{}", changed.body);
    assert_eq!(
        world.status_of(&viewer, "GET", "/api-keys", &Value::Null).await,
        200
    );
    // And without the user there is no key.
    assert_eq!(world.status_of(&admin, "DELETE", &path, &Value::Null).await, 200);
    assert_eq!(world.status_of(&viewer, "GET", &read, &Value::Null).await, 401);
    assert_eq!(world.status_of(&admin, "GET", &path, &Value::Null).await, 404);
}

#[tokio::test]
async fn nobody_reaches_above_themselves_and_an_owner_stays() {
    let world = world().await;
    let owner = world.tenant("owner@acme.test").await;
    let stranger = world.tenant("owner@other.test").await;
    let (_, admin) = world.user(&owner, "admin@acme.test", "admin").await;
    let users = world.call(&owner, "GET", "/users", &Value::Null).await;
    let owner_id = users.body["users"][0]["id"].as_str().expect("an id").to_owned();
    assert_eq!(users.body["users"][0]["role"], "owner");
    let path = format!("/users/{owner_id}");
    let keys = world.call(&admin, "GET", "/api-keys", &Value::Null).await;
    let owners_key = keys.body["api_keys"]
        .as_array()
        .expect("keys")
        .iter()
        .find(|key| key["user_id"] == owner_id.as_str())
        .expect("the owner's key")["id"]
        .as_str()
        .expect("an id")
        .to_owned();
    for (method, path, body) in [
        ("PATCH", path.clone(), json!({"role": "viewer"})),
        ("DELETE", path.clone(), Value::Null),
        (
            "POST",
            "/users".to_owned(),
            json!({"email": "x@acme.test", "role": "owner"}),
        ),
        ("POST", "/invitations".to_owned(), json!({"role": "owner"})),
        ("DELETE", format!("/api-keys/{owners_key}"), Value::Null),
        ("POST", format!("/api-keys/{owners_key}/rotate"), Value::Null),
    ] {
        let answer = world.call(&admin, method, &path, &body).await;
        assert_eq!(answer.refusal(), (403, "FORBIDDEN", None), "{method} {path}");
        let answer = world.call(&stranger, method, &path, &body).await;
        let creates = path == "/users" || path == "/invitations";
        assert_eq!(
            answer.status.as_u16(),
            if creates { 201 } else { 404 },
            "{method} {path}"
        );
    }
    for (method, body) in [("PATCH", json!({"role": "admin"})), ("DELETE", Value::Null)] {
        let last = world.call(&owner, method, &path, &body).await;
        assert_eq!(last.refusal(), (409, "CONFLICT", None), "{method}");
    }
    let (_, second) = world.user(&owner, "second@acme.test", "owner").await;
    assert_eq!(world.status_of(&second, "DELETE", &path, &Value::Null).await, 200);
    assert_eq!(world.status_of(&owner, "GET", "/users", &Value::Null).await, 401);

    for (body, field) in [
        (json!({"role": "viewer"}), "email"),
        (json!({"email": "x", "role": "viewer"}), "email"),
        (json!({"email": "y@acme.test"}), "role"),
        (json!({"email": "y@acme.test", "role": "root"}), "role"),
        (
            json!({"email": "y@acme.test", "role": "viewer", "scopes": []}),
            "scopes",
        ),
    ] {
        let answer = world.call(&second, "POST", "/users", &body).await;
        assert_eq!(answer.refusal(), (400, "VALIDATION_ERROR", Some(field)), "{body}");
    }
    let taken = json!({"email": "Owner@other.test", "role": "viewer"});
    assert_eq!(world.status_of(&second, "POST", "/users", &taken).await, 409);
}

#[tokio::test]
async fn a_member_looks_after_their_own_keys_only() {
    let world = world().await;
    let owner = world.tenant("owner@acme.test").await;
    let (_, one) = world.user(&owner, "one@acme.test", "member").await;
    let (_, other) = world.user(&owner, "other@acme.test", "member").await;
    let made = world
        .call(&one, "POST", "/api-keys", &json!({"name": "ci"}))
        .await;
    assert_eq!(made.status, StatusCode::CREATED, "{}", made.body);
    let scopes = made.body["api_key"]["scopes"].as_array().expect("scopes");
    assert!(
        !scopes.contains(&json!("*")) && scopes.contains(&json!("sandbox:execute")),
        "{scopes:?}"
    );
    let id = made.body["api_key"]["id"].as_str().expect("an id");
    let path = format!("/api-keys/{id}");
    let count = async |who: &Tenant| {
        let listed = world.call(who, "GET", "/api-keys", &Value::Null).await;
        listed.body["api_keys"].as_array().map(Vec::len)
    };
    assert_eq!(
        (count(&one).await, count(&other).await, count(&owner).await),
        (Some(2), Some(1), Some(4))
    );
    assert_eq!(world.status_of(&other, "DELETE", &path, &Value::Null).await, 404);
    assert_eq!(
        world
            .status_of(&other, "POST", &format!("{path}/rotate"), &Value::Null)
            .await,
        404
    );
    assert_eq!(world.status_of(&owner, "DELETE", &path, &Value::Null).await, 200);
    assert_eq!(world.status_of(&owner, "DELETE", &path, &Value::Null).await, 200);
}

#[tokio::test]
async fn a_key_is_rotated_at_once_or_with_grace() {
    let world = world().await;
    let owner = world.tenant("owner@acme.test").await;
    let body = json!({"name": "ci", "expires_in_days": 7, "scopes": ["sandbox:read"]});
    let made = world.call(&owner, "POST", "/api-keys", &body).await;
    let mut last = holder(&made, &owner.org);
    let mut id = made.body["api_key"]["id"].as_str().expect("an id").to_owned();
    for (body, old_works) in [
        (Value::Null, 401),
        (json!({}), 401),
        (json!({"grace_seconds": 0}), 401),
        (json!({"grace_seconds": 3600}), 200),
    ] {
        let path = format!("/api-keys/{id}/rotate");
        let answer = world.call(&owner, "POST", &path, &body).await;
        let next = holder(&answer, &owner.org);
        let shown = &answer.body["api_key"];
        assert_eq!(
            (&shown["name"], &shown["scopes"]),
            (&json!("ci"), &json!(["sandbox:read"]))
        );
        let time =
            |name: &str| -> Timestamp { shown[name].as_str().expect("a time").parse().expect("a time") };
        let days = time("expires_at").duration_since(time("created_at")).as_hours() / 24;
        assert_eq!(days, 7, "{body}: a new life");
        assert_eq!(
            world.status_of(&last, "GET", "/sandboxes", &Value::Null).await,
            old_works,
            "{body}"
        );
        assert_eq!(
            world.status_of(&next, "GET", "/sandboxes", &Value::Null).await,
            200,
            "{body}"
        );
        assert_eq!(
            world.status_of(&next, "GET", "/secrets", &Value::Null).await,
            403,
            "{body}"
        );
        (last, id) = (next, shown["id"].as_str().expect("an id").to_owned());
    }
    let path = format!("/api-keys/{id}/rotate");
    for body in [json!({"grace_seconds": 86401}), json!({"grace_seconds": "1"})] {
        let answer = world.call(&owner, "POST", &path, &body).await;
        assert_eq!(answer.refusal(), (400, "VALIDATION_ERROR", Some("grace_seconds")));
    }
    // A key that may only look after keys does not get at what others may.
    let keeper = json!({"name": "keeper", "scopes": ["api-keys:write"]});
    let keeper = holder(
        &world.call(&owner, "POST", "/api-keys", &keeper).await,
        &owner.org,
    );
    assert_eq!(world.status_of(&keeper, "POST", &path, &Value::Null).await, 403);
}

#[tokio::test]
async fn the_use_of_a_key_is_seen_at_once_and_written_later() {
    let world = world().await;
    let owner = world.tenant("owner@acme.test").await;
    let before = Timestamp::now() - SignedDuration::from_secs(1);
    let listed = world.call(&owner, "GET", "/api-keys", &Value::Null).await;
    let used: Timestamp = listed.body["api_keys"][0]["last_used_at"]
        .as_str()
        .expect("a time")
        .parse()
        .expect("a time");
    assert!(used > before, "{used}");
    let stored = world.store.keys(&owner.org).await.expect("keys").remove(0);
    assert_eq!(
        stored.last_used_at, None,
        "no request waits for the database because of it"
    );
}

#[tokio::test]
async fn registration_by_invitation_is_for_those_who_have_one_and_once() {
    let world = world_with(settings(|settings| {
        settings.registration = Some("invite".to_owned())
    }))
    .await;
    let body = json!({"email": "a@acme.test", "organization_name": "Acme"});
    assert_eq!(world.invited(&body).await.refusal(), (403, "FORBIDDEN", None));
    let operators = service::invite_from_outside(&world.store, None, 1)
        .await
        .expect("an invitation");
    let with =
        |email: &str, token: &str| json!({"email": email, "organization_name": "Acme", "invitation": token});
    for wrong in [
        "",
        "x",
        "sg_invite_1.x",
        &operators.token[..operators.token.len() - 1],
    ] {
        let answer = world.invited(&with("a@acme.test", wrong)).await;
        assert_eq!(answer.refusal(), (403, "FORBIDDEN", None), "{wrong}");
    }
    let nameless = json!({"email": "a@acme.test", "invitation": operators.token});
    let answer = world.invited(&nameless).await;
    assert_eq!(
        answer.refusal(),
        (400, "VALIDATION_ERROR", Some("organization_name"))
    );
    let registered = world.invited(&with("a@acme.test", &operators.token)).await;
    assert_eq!(registered.body["user"]["role"], "owner", "{}", registered.body);
    let again = world.invited(&with("b@acme.test", &operators.token)).await;
    assert_eq!(again.refusal(), (403, "FORBIDDEN", None), "it was used");

    let org = registered.body["organization"]["id"].as_str().expect("an id");
    let owner = holder(&registered, &org.parse().expect("an id"));
    let invitation = json!({"role": "member", "email": "C@acme.test"});
    let made = world.call(&owner, "POST", "/invitations", &invitation).await;
    assert_eq!(made.status, StatusCode::CREATED, "{}", made.body);
    let token = made.body["token"].as_str().expect("a token");
    let listed = world.call(&owner, "GET", "/invitations", &Value::Null).await;
    assert_eq!(listed.body["invitations"], json!([made.body["invitation"]]));
    assert!(!listed.body.to_string().contains(token));
    let other = world.invited(&with("d@acme.test", token)).await;
    assert_eq!(other.refusal(), (403, "FORBIDDEN", None), "for another address");
    let joined = world
        .invited(&json!({"email": "c@acme.test", "invitation": token}))
        .await;
    assert_eq!(
        joined.body["organization"], registered.body["organization"],
        "{}",
        joined.body
    );
    assert_eq!(joined.body["user"]["role"], "member");

    let made = world
        .call(&owner, "POST", "/invitations", &json!({"role": "viewer"}))
        .await;
    let token = made.body["token"].as_str().expect("a token").to_owned();
    let path = format!(
        "/invitations/{}",
        made.body["invitation"]["id"].as_str().expect("an id")
    );
    let member = holder(&joined, &owner.org);
    assert_eq!(world.status_of(&member, "DELETE", &path, &Value::Null).await, 403);
    assert_eq!(world.status_of(&owner, "DELETE", &path, &Value::Null).await, 200);
    assert_eq!(world.status_of(&owner, "DELETE", &path, &Value::Null).await, 404);
    let withdrawn = world.invited(&with("e@acme.test", &token)).await;
    assert_eq!(withdrawn.refusal(), (403, "FORBIDDEN", None));
}

#[tokio::test]
async fn a_token_stands_for_its_key_and_ends_with_it() {
    let world = world().await;
    let owner = world.tenant("owner@acme.test").await;
    let body = json!({"name": "ci", "scopes": ["sandbox:execute", "network:read", "api-keys:write"]});
    let made = world.call(&owner, "POST", "/api-keys", &body).await;
    let key = holder(&made, &owner.org);
    let answer = world.call(&key, "POST", "/tokens", &Value::Null).await;
    assert_eq!(answer.status, StatusCode::CREATED, "{}", answer.body);
    assert_eq!(
        answer.body["scopes"],
        json!(["sandbox:read", "sandbox:execute", "network:read"])
    );
    let token = Tenant {
        key: answer.body["token"].as_str().expect("a token").to_owned(),
        org: owner.org.clone(),
    };
    assert_eq!(
        world.status_of(&token, "GET", "/sandboxes", &Value::Null).await,
        200
    );
    for (method, path, body) in [
        ("GET", "/secrets", Value::Null),
        ("GET", "/api-keys", Value::Null),
        ("POST", "/api-keys", json!({"name": "x"})),
        ("POST", "/tokens", Value::Null),
    ] {
        assert_eq!(
            world.status_of(&token, method, path, &body).await,
            403,
            "{method} {path}"
        );
    }
    let narrow = json!({"scopes": ["network:read"], "expires_in": 60});
    let narrow = world.call(&key, "POST", "/tokens", &narrow).await;
    assert_eq!(narrow.body["scopes"], json!(["network:read"]));
    for (body, refusal) in [
        (json!({"scopes": ["secrets:read"]}), (403, "FORBIDDEN", None)),
        (json!({"scopes": []}), (400, "VALIDATION_ERROR", Some("scopes"))),
        (
            json!({"expires_in": 3601}),
            (400, "VALIDATION_ERROR", Some("expires_in")),
        ),
        (
            json!({"lifetime": 5}),
            (400, "VALIDATION_ERROR", Some("lifetime")),
        ),
    ] {
        let answer = world.call(&key, "POST", "/tokens", &body).await;
        assert_eq!(answer.refusal(), refusal, "{body}");
    }
    let path = format!(
        "/api-keys/{}",
        made.body["api_key"]["id"].as_str().expect("an id")
    );
    assert_eq!(world.status_of(&owner, "DELETE", &path, &Value::Null).await, 200);
    assert_eq!(
        world.status_of(&token, "GET", "/sandboxes", &Value::Null).await,
        401
    );
}

#[tokio::test]
async fn whoever_has_the_secret_makes_tokens_for_users_and_for_others() {
    let secret = "0123456789abcdef0123456789abcdef";
    let world = world_with(settings(|settings| settings.jwt_secret = Some(secret.to_owned()))).await;
    let owner = world.tenant("owner@acme.test").await;
    let stranger = world.tenant("owner@other.test").await;
    let (viewer_id, _) = world.user(&owner, "viewer@acme.test", "viewer").await;
    let now = Timestamp::now().as_second();
    let token = |sub: &str, org: &str, role: Option<&str>, scopes: Option<&[&str]>| Tenant {
        key: jwt::TokenKey::new(secret.as_bytes()).sign(
            &jwt::Claims {
                sub: sub.to_owned(),
                org_id: org.to_owned(),
                role: role.map(str::to_owned),
                scopes: scopes.map(|scopes| scopes.iter().map(|scope| (*scope).to_owned()).collect()),
                exp: now + 600,
            },
            now,
        ),
        org: owner.org.clone(),
    };
    let org = owner.org.as_str();
    let policy = json!({"mode": "deny_all"});
    for (who, reads, writes) in [
        (token("app", org, Some("admin"), None), 200, 200),
        (token("app", org, Some("member"), None), 200, 403),
        (
            token("app", org, Some("admin"), Some(&["network:read"])),
            200,
            403,
        ),
        (token("app", org, Some("admin"), Some(&["unheard:of"])), 403, 403),
        (token(&viewer_id, org, None, None), 200, 403),
        (token(&viewer_id, org, Some("owner"), None), 200, 403),
        (token("app", org, None, None), 401, 401),
        (token("app", org, Some("root"), None), 401, 401),
        (token("app", "org-nowhere", Some("admin"), None), 401, 401),
        (token(&viewer_id, stranger.org.as_str(), None, None), 401, 401),
        (token("user-1", org, Some("admin"), None), 401, 401),
        (token("key-1", org, Some("admin"), None), 401, 401),
    ] {
        assert_eq!(
            world
                .status_of(&who, "GET", "/settings/egress", &Value::Null)
                .await,
            reads,
            "{}",
            who.key
        );
        assert_eq!(
            world.status_of(&who, "PUT", "/settings/egress", &policy).await,
            writes,
            "{}",
            who.key
        );
        let keys = world
            .status_of(&who, "POST", "/api-keys", &json!({"name": "x"}))
            .await;
        assert!(
            keys == 403 || keys == 401,
            "a token makes nothing that lasts: {keys}"
        );
    }
}

#[tokio::test]
async fn a_token_in_the_query_counts_where_no_header_can_be_sent_and_nowhere_else() {
    let world = world().await;
    let owner = world.tenant("owner@acme.test").await;
    let sandbox = world.stored_sandbox(&owner).await;
    let token = world.call(&owner, "POST", "/tokens", &Value::Null).await.body["token"]
        .as_str()
        .expect("a token")
        .to_owned();
    let get = async |path: String| {
        let request = Request::get(format!("/api/v1{path}")).body(Body::empty());
        world.send(request.expect("a request")).await.status.as_u16()
    };
    for credential in [&token, &owner.key] {
        let download = format!("/sandbox/{sandbox}/files/download?path=/workspace/a&token={credential}");
        let status = get(download).await;
        assert!(status != 401 && status != 403, "{status}");
        assert_eq!(get(format!("/sandboxes?token={credential}")).await, 401);
        assert_eq!(
            get(format!("/sandbox/{sandbox}/files?path=/a&token={credential}")).await,
            401
        );
    }
    assert_eq!(
        get(format!("/sandbox/{sandbox}/files/download?path=/a&token=x")).await,
        401
    );
}

#[tokio::test]
async fn billing_answers_as_of_ones_own() {
    let world = world().await;
    let owner = world.tenant("owner@acme.test").await;
    let subscription = world
        .call(&owner, "GET", "/billing/subscription", &Value::Null)
        .await;
    assert_eq!(
        subscription.body,
        json!({"subscription": null, "plan": "self-hosted"})
    );
    let invoices = world
        .call(&owner, "GET", "/billing/invoices?limit=3", &Value::Null)
        .await;
    assert_eq!(invoices.body, json!({"invoices": []}));
    for path in ["/billing/upgrade", "/billing/portal"] {
        let answer = world.call(&owner, "POST", path, &json!({"plan": "pro"})).await;
        assert_eq!(answer.refusal(), (409, "CONFLICT", None), "{path}");
    }
}

#[tokio::test]
async fn a_token_in_the_query_is_in_no_log() {
    let logged = secrets::Logged::listen();
    let world = world().await;
    let owner = world.tenant("owner@acme.test").await;
    let sandbox = world.stored_sandbox(&owner).await;
    for path in ["/sandboxes", &format!("/sandbox/{sandbox}/files/download")] {
        let uri = format!("/api/v1{path}?path=/workspace/a&token={}", owner.key);
        let request = Request::get(uri).body(Body::empty());
        world.send(request.expect("a request")).await;
    }
    let text = logged.text();
    assert!(text.contains("/api/v1/sandbox/{id}/files/download"), "{text}");
    assert!(!text.contains(&owner.key), "{text}");
}
