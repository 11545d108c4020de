//! WebSockets against the real listener, as far as they need no running sandbox.

use std::{net::SocketAddr, time::Duration};

use futures_util::{SinkExt as _, StreamExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream, connect_async,
    tungstenite::{Error, Message, client::IntoClientRequest as _},
};

use super::*;

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// The API on a port of this machine.
struct Listening {
    address: SocketAddr,
    tasks: Tasks,
}

impl Listening {
    async fn to(world: &World) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let tasks = Tasks::new(CancellationToken::new());
        let serving = serve(listener, world.router.clone(), tasks.clone());
        tasks.spawn("serve", serving);
        Self { address, tasks }
    }

    /// Opens a socket, or answers status and code of the refusal.
    async fn open(&self, path: &str, headers: &[(&'static str, &str)]) -> Result<Socket, (u16, String)> {
        let mut request = format!("ws://{}{path}", self.address)
            .into_client_request()
            .expect("a request");
        for (name, value) in headers {
            request
                .headers_mut()
                .insert(*name, value.parse().expect("a header"));
        }
        match connect_async(request).await {
            Ok((socket, _answer)) => Ok(socket),
            Err(Error::Http(answer)) => {
                let body: Value =
                    serde_json::from_slice(answer.body().as_deref().unwrap_or_default()).expect("JSON");
                let code = body["error"]["code"].as_str().expect("a code").to_owned();
                Err((answer.status().as_u16(), code))
            }
            Err(other) => panic!("{other}"),
        }
    }

    async fn commands(&self, tenant: &Tenant) -> Socket {
        self.open(&format!("/ws?token={}", tenant.key), &[])
            .await
            .expect("a socket")
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.tasks.shutdown().cancel();
    }
}

async fn next(socket: &mut Socket) -> Value {
    loop {
        match socket.next().await.expect("a message").expect("a message") {
            Message::Text(text) => return serde_json::from_str(&text).expect("JSON"),
            Message::Ping(_) => {}
            other => panic!("{other:?}"),
        }
    }
}

/// The `error` that answers a message, after which comes `done`. Both have the message's id.
async fn refusal(socket: &mut Socket, message: impl Into<Message>) -> (String, Value) {
    socket.send(message.into()).await.expect("sent");
    let error = next(socket).await;
    assert_eq!(error["type"], "error", "{error}");
    let done = next(socket).await;
    assert_eq!(done["type"], "done", "{done}");
    assert_eq!(done["id"], error["id"]);
    (
        error["error"].as_str().expect("a text").to_owned(),
        error["id"].clone(),
    )
}

#[tokio::test]
async fn a_socket_needs_a_good_credential_in_a_header_or_in_the_query() {
    let world = world().await;
    let api = Listening::to(&world).await;
    let tenant = world.tenant("a@acme.test").await;
    let other = world.tenant("b@acme.test").await;
    let bearer = format!("Bearer {}", tenant.key);
    let good = format!("/ws?token={}", tenant.key);
    let own = format!("{good}&org_id={}", tenant.org.as_str());
    for (path, headers) in [
        (&*good, vec![]),
        (&*own, vec![]),
        ("/ws", vec![("authorization", &*bearer)]),
        ("/ws", vec![("x-api-key", &*tenant.key)]),
        (&*good, vec![("origin", "https://elsewhere.test")]),
    ] {
        assert!(api.open(path, &headers).await.is_ok(), "{headers:?}");
    }
    let unauthorized = (401, "UNAUTHORIZED".to_owned());
    let forbidden = (403, "FORBIDDEN".to_owned());
    let foreign = format!("{good}&org_id={}", other.org.as_str());
    for (path, headers, expected) in [
        ("/ws", vec![], &unauthorized),
        ("/ws?token=", vec![], &unauthorized),
        ("/ws?token=sk_sandbox_x.y.z", vec![], &unauthorized),
        // A header wins, so that a good token cannot hide a bad one.
        (&*good, vec![("x-api-key", "sk_sandbox_x.y.z")], &unauthorized),
        (&*foreign, vec![], &forbidden),
        (&*good, vec![("x-org-id", other.org.as_str())], &forbidden),
    ] {
        assert_eq!(
            api.open(path, &headers).await.err().as_ref(),
            Some(expected),
            "{headers:?}"
        );
    }
    // Only here, and only as a WebSocket.
    let listed = Request::get(format!("/api/v1/sandboxes?token={}", tenant.key)).body(Body::empty());
    assert_eq!(world.send(listed.expect("a request")).await.refusal().0, 401);
    let plain = Request::get(good).body(Body::empty());
    let plain = world.send(plain.expect("a request")).await;
    assert_eq!(plain.refusal(), (400, "VALIDATION_ERROR", None));
}

#[tokio::test]
async fn what_cannot_be_done_is_said_on_the_socket_which_goes_on() {
    let world = world().await;
    let api = Listening::to(&world).await;
    let tenant = world.tenant("a@acme.test").await;
    let other = world.tenant("b@acme.test").await;
    let foreign = world.stored_sandbox(&other).await;
    let mut socket = api.commands(&tenant).await;
    let execute = |more: Value| {
        let mut message = json!({"type": "execute", "sandboxId": foreign.as_str(), "command": "true", "stream": true, "id": 7});
        for (name, value) in more.as_object().expect("fields") {
            message[name] = value.clone();
        }
        message.to_string()
    };
    for (message, begins) in [
        ("no JSON".to_owned(), "the body is not JSON"),
        ("[]".to_owned(), "the body must be a JSON object"),
        (json!({"id": {}}).to_string(), "id: "),
        (json!({"id": "x".repeat(300)}).to_string(), "id: "),
    ] {
        let (error, id) = refusal(&mut socket, message).await;
        assert!(error.starts_with(begins) && id.is_null(), "{error}");
    }
    for (more, begins) in [
        (json!({"type": "kill"}), "type: "),
        (json!({"sandboxId": null}), "sandbox_id: "),
        (json!({"sandbox_id": "sb-other"}), "sandboxId: "),
        (json!({"sandboxId": 1}), "sandboxId: "),
        (json!({"command": ""}), "command: "),
        (json!({"comand": ""}), "comand: "),
        (json!({"timeout": 0}), "timeout: "),
        (json!({"env": {"A": 1}}), "env.A: "),
        (json!({"working_dir": "x"}), "working_dir: "),
        (
            json!({"org_id": other.org.as_str()}),
            "the API key belongs to another organization",
        ),
        (json!({"sandboxId": "sb-none"}), "there is no sandbox sb-none"),
        // Another's sandbox does not exist.
        (json!({}), "there is no sandbox "),
    ] {
        let (error, id) = refusal(&mut socket, execute(more)).await;
        assert!(error.starts_with(begins), "{error}");
        assert_eq!(id, json!(7));
    }
    let (error, id) = refusal(&mut socket, Message::binary(vec![0, 1])).await;
    assert!(error.starts_with("expected a text") && id.is_null(), "{error}");
    // One's own stands in the store and on no node: still an answer, and the socket goes on.
    let own = world.stored_sandbox(&tenant).await;
    for id in [json!("a"), json!(1.5)] {
        let message = execute(json!({"sandboxId": own.as_str(), "id": id}));
        assert_eq!(refusal(&mut socket, message).await.1, id);
    }
}

#[tokio::test]
async fn a_message_over_the_limit_ends_the_socket() {
    let world = world().await;
    let api = Listening::to(&world).await;
    let tenant = world.tenant("a@acme.test").await;
    let mut socket = api.commands(&tenant).await;
    // The other side may hang up before all of it is sent.
    let _sent = socket.send(Message::text("x".repeat(2 * 1024 * 1024))).await;
    while let Some(Ok(message)) = socket.next().await {
        assert!(!message.is_text(), "{message}");
    }
}

#[tokio::test]
async fn an_organisation_holds_only_so_many_and_gets_them_back() {
    let world = world().await;
    let api = Listening::to(&world).await;
    let tenant = world.tenant("a@acme.test").await;
    let other = world.tenant("b@acme.test").await;
    let mut open = Vec::new();
    for _ in 0..64 {
        open.push(api.commands(&tenant).await);
    }
    let path = format!("/ws?token={}", tenant.key);
    let refused = api.open(&path, &[]).await.err();
    assert_eq!(refused, Some((429, "RATE_LIMITED".to_owned())));
    drop(api.commands(&other).await);
    drop(open.pop());
    let freed = async {
        while api.open(&path, &[]).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let freed = tokio::time::timeout(Duration::from_secs(60), freed).await;
    assert!(freed.is_ok(), "a socket that was closed still counts");
}

#[tokio::test]
async fn a_key_without_the_scope_runs_nothing() {
    let world = world().await;
    let api = Listening::to(&world).await;
    let tenant = world.tenant("a@acme.test").await;
    let reader = json!({"name": "reader", "scopes": ["sandbox:read"]});
    let answer = world.call(&tenant, "POST", "/api-keys", &reader).await;
    let reader = Tenant {
        key: answer.body["key"].as_str().expect("a key").to_owned(),
        org: tenant.org.clone(),
    };
    let sandbox = world.stored_sandbox(&tenant).await;
    let mut socket = api.commands(&reader).await;
    let message = json!({"type": "execute", "sandbox_id": sandbox.as_str(), "command": "true"});
    let (error, _) = refusal(&mut socket, message.to_string()).await;
    assert!(error.contains("sandbox:execute"), "{error}");
    let terminal = format!(
        "/api/v1/sandbox/{}/terminal?token={}",
        sandbox.as_str(),
        reader.key
    );
    assert_eq!(
        api.open(&terminal, &[]).await.err(),
        Some((403, "FORBIDDEN".to_owned()))
    );
    for (method, path, body) in [
        ("GET", "processes", Value::Null),
        ("POST", "processes", json!({"command": "true"})),
        ("GET", "processes/proc-1/output", Value::Null),
        ("POST", "processes/proc-1/stdin", json!({"data": "x"})),
        ("POST", "processes/proc-1/signal", json!({"signal": "TERM"})),
        ("POST", "processes/proc-1/resize", json!({})),
        ("DELETE", "processes/proc-1", Value::Null),
        ("POST", "repl/sessions", json!({})),
        (
            "POST",
            "repl/sessions/python-proc-1/execute",
            json!({"code": "1"}),
        ),
        ("POST", "repl/sessions/python-proc-1/interrupt", Value::Null),
        ("DELETE", "repl/sessions/python-proc-1", Value::Null),
    ] {
        let path = format!("/sandbox/{}/{path}", sandbox.as_str());
        let answer = world.call(&reader, method, &path, &body).await;
        assert_eq!(answer.refusal().0, 403, "{method} {path}: {}", answer.body);
    }
}

#[tokio::test]
async fn processes_of_others_and_names_of_none_do_not_exist() {
    let world = world().await;
    let api = Listening::to(&world).await;
    let tenant = world.tenant("a@acme.test").await;
    let other = world.tenant("b@acme.test").await;
    let foreign = world.stored_sandbox(&other).await;
    let own = world.stored_sandbox(&tenant).await;
    for (method, path, body) in [
        ("GET", "processes", Value::Null),
        ("POST", "processes", json!({"command": "true"})),
        ("GET", "processes/proc-1/output", Value::Null),
        ("POST", "processes/1/stdin", json!({"data": "x"})),
        ("POST", "processes/proc-1/signal", json!({"signal": 9})),
        ("POST", "processes/proc-1/resize", json!({"rows": 3})),
        ("POST", "repl/sessions", json!({"language": "python"})),
        (
            "POST",
            "repl/sessions/python-proc-1/execute",
            json!({"code": "1"}),
        ),
        ("POST", "repl/sessions/python-proc-1/interrupt", Value::Null),
        ("DELETE", "repl/sessions/python-proc-1", Value::Null),
        ("DELETE", "processes/proc-1", Value::Null),
    ] {
        let path = format!("/sandbox/{}/{path}", foreign.as_str());
        let answer = world.call(&tenant, method, &path, &body).await;
        assert_eq!(
            answer.refusal(),
            (404, "SANDBOX_NOT_FOUND", None),
            "{method} {path}"
        );
    }
    let path = format!("/sandbox/{}/processes/a.b/output", own.as_str());
    let answer = world.call(&tenant, "GET", &path, &Value::Null).await;
    assert_eq!(answer.refusal(), (404, "NOT_FOUND", None));
    for session in ["python", "proc-1", "cobol-proc-1", "python-1", "python-proc-x"] {
        let path = format!("/sandbox/{}/repl/sessions/{session}/execute", own.as_str());
        let answer = world.call(&tenant, "POST", &path, &json!({"code": "1"})).await;
        assert_eq!(answer.refusal(), (404, "NOT_FOUND", None), "{session}");
    }
    for (query, field) in [("since=-1", "since"), ("since=x", "since")] {
        let path = format!("/sandbox/{}/processes/proc-1/output?{query}", own.as_str());
        let answer = world.call(&tenant, "GET", &path, &Value::Null).await;
        assert_eq!(
            answer.refusal(),
            (400, "VALIDATION_ERROR", Some(field)),
            "{query}"
        );
    }
    for (query, expected) in [
        ("process_id=a.b", (404, "NOT_FOUND")),
        ("since=x", (400, "VALIDATION_ERROR")),
        ("process_id=proc-1", (404, "SANDBOX_NOT_FOUND")),
    ] {
        let path = format!(
            "/api/v1/sandbox/{}/terminal?token={}&{query}",
            foreign.as_str(),
            tenant.key
        );
        let (status, code) = api.open(&path, &[]).await.expect_err("a refusal");
        assert_eq!((status, &*code), expected, "{query}");
    }
}
