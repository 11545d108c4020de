//! Tunnels, with a node and a tunnel-proxy that the test plays where they must answer.

use sandgate_api::{
    control::Open,
    feed::FeedAck,
    tunnel::{Listening, TunnelAck, TunnelFrame},
};
use std::{
    os::fd::{AsFd as _, OwnedFd},
    time::Duration,
};

use http_body_util::Full;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;

use super::*;

type Sender = http1::SendRequest<Full<bytes::Bytes>>;

/// The other program's way to a feed.
async fn http(channel: &handover::Channel) -> Sender {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().expect("a stream pair");
    let packet = serde_json::to_vec(&Open::Feed).expect("a packet");
    channel.send(&packet, Some(theirs.as_fd())).await.expect("sent");
    drop(theirs);
    ours.set_nonblocking(true).expect("non-blocking");
    let stream = tokio::net::UnixStream::from_std(ours).expect("a stream");
    let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.expect("a handshake");
    Tasks::new(CancellationToken::new()).spawn("connection", async move { drop(connection.await) });
    sender
}

async fn post(sender: &mut Sender, path: &str, body: &impl serde::Serialize) {
    let body = Full::from(serde_json::to_vec(body).expect("a body"));
    let request = Request::post(path).body(body).expect("a request");
    let response = sender.send_request(request).await.expect("a response");
    assert_eq!(response.status(), 200);
    drop(response.into_body().collect().await.expect("a body"));
}

/// Acknowledges whatever the store says, as both programs do.
struct Both {
    node: Sender,
    proxy: Sender,
    store: Store,
}

impl Both {
    async fn new(world: &World) -> Self {
        let channel =
            |end: &OwnedFd| handover::Channel::from_fd(end.try_clone().expect("a copy")).expect("a channel");
        Self {
            node: http(&channel(&world.netd)).await,
            proxy: http(&channel(&world.proxy)).await,
            store: world.store.clone(),
        }
    }

    async fn acknowledge(&mut self) {
        let change = self.store.tunnels_since(None).await.expect("a change");
        let TunnelFrame::Snapshot { revision, routes } = change.frame else {
            panic!("a snapshot")
        };
        let listening = routes.iter().enumerate().map(|(index, route)| Listening {
            tunnel_id: route.tunnel_id.clone(),
            local_port: 40_000 + u16::try_from(index).expect("few"),
        });
        let ack = TunnelAck {
            revision,
            listening: listening.collect(),
            errors: vec![],
        };
        post(&mut self.proxy, "/tunnels/ack", &ack).await;
        let ack = FeedAck {
            revision,
            ready: true,
            not_ready_reason: None,
            kernel_pass: false,
            no_kernel_pass_reason: None,
            kernel_pass6: false,
            no_kernel_pass6_reason: None,
            errors: vec![],
        };
        post(&mut self.node, "/feed/ack", &ack).await;
    }

    /// Both go on at the same time: one that was put off could hold what the other waits for.
    async fn answering(&mut self, asked: impl Future<Output = Answer>) -> Answer {
        let answered = std::cell::Cell::new(false);
        let asking = async {
            let answer = asked.await;
            answered.set(true);
            answer
        };
        let acknowledging = async {
            while !answered.get() {
                tokio::time::sleep(Duration::from_millis(20)).await;
                self.acknowledge().await;
            }
        };
        tokio::join!(asking, acknowledging).0
    }
}

#[tokio::test]
async fn bad_bodies_name_the_field_and_open_nothing() {
    let world = world().await;
    let tenant = world.tenant("a@b").await;
    let id = world.stored_sandbox(&tenant).await;
    let path = format!("/sandbox/{id}/tunnels");
    let agent = sandgate_api::agent::AGENT_PORT;
    for (body, field) in [
        (Value::Null, "port"),
        (json!({"port": 0}), "port"),
        (json!({"port": 65_536}), "port"),
        (json!({"port": -1}), "port"),
        (json!({"port": 1.5}), "port"),
        (json!({"port": "3000"}), "port"),
        (json!({"port": agent}), "port"),
        (json!({"port": agent, "public": true}), "port"),
        (json!({"port": 3000, "protocol": "udp"}), "protocol"),
        (json!({"port": 3000, "protocol": 1}), "protocol"),
        (json!({"port": 3000, "expires_in": 0}), "expires_in"),
        (json!({"port": 3000, "expiresIn": 604_801}), "expiresIn"),
        (
            json!({"port": 3000, "expires_in": 1, "expiresIn": 1}),
            "expiresIn",
        ),
        (json!({"port": 3000, "public": "yes"}), "public"),
        (json!({"port": 3000, "wake": true}), "wake"),
    ] {
        let answer = world.call(&tenant, "POST", &path, &body).await;
        assert_eq!(answer.refusal(), (400, "VALIDATION_ERROR", Some(field)), "{body}");
    }
    let listed = world.call(&tenant, "GET", &path, &Value::Null).await;
    assert_eq!(listed.body, json!({"tunnels": []}));
}

#[tokio::test]
async fn raw_tcp_needs_loopback_ports() {
    let world = world_with(Settings {
        tunnel_domain: Some("tunnels.example.org".to_owned()),
        ..Settings::default()
    })
    .await;
    let tenant = world.tenant("a@b").await;
    let id = world.stored_sandbox(&tenant).await;
    let body = json!({"port": 5432, "protocol": "tcp"});
    let answer = world
        .call(&tenant, "POST", &format!("/sandbox/{id}/tunnels"), &body)
        .await;
    assert_eq!(answer.refusal(), (400, "VALIDATION_ERROR", Some("protocol")));
}

#[tokio::test]
async fn a_tunnel_is_opened_shown_without_its_token_and_closed() {
    let world = world().await;
    let tenant = world.tenant("a@b").await;
    let id = world.stored_sandbox(&tenant).await;
    let path = format!("/sandbox/{id}/tunnels");
    let mut both = Both::new(&world).await;
    // As published clients send it.
    let body = json!({"port": 3000, "protocol": null, "expiresIn": 120, "public": false});
    let opened = both.answering(world.call(&tenant, "POST", &path, &body)).await;
    assert_eq!(opened.status, StatusCode::CREATED, "{}", opened.body);
    let tunnel = &opened.body;
    assert_eq!(
        (&tunnel["port"], &tunnel["protocol"], &tunnel["sandbox_id"]),
        (&json!(3000), &json!("http"), &json!(id))
    );
    assert_eq!(tunnel["url"], "http://127.0.0.1:40000/");
    assert_eq!(tunnel["host_url"], format!("http://3000-{id}.localhost:8081/"));
    let time =
        |field: &str| -> Timestamp { tunnel[field].as_str().expect("a time").parse().expect("a time") };
    assert_eq!(
        time("expires_at").duration_since(time("created_at")),
        SignedDuration::from_secs(120)
    );
    let token = tunnel["token"].as_str().expect("a token");
    assert!(token.len() > 43, "{token}");

    let public = json!({"port": 3001, "public": true, "protocol": "h2c"});
    let public = both.answering(world.call(&tenant, "POST", &path, &public)).await;
    assert!(public.body["token"].is_null(), "{}", public.body);

    let listed = world.call(&tenant, "GET", &path, &Value::Null).await.body;
    assert_eq!(listed["tunnels"].as_array().map(Vec::len), Some(2), "{listed}");
    assert!(!listed.to_string().contains(token), "shown once");
    assert_eq!(listed["tunnels"][0]["url"], tunnel["url"]);

    let ids = [&tunnel["tunnel_id"], &public.body["tunnel_id"]].map(|id| id.as_str().expect("an id"));
    for path in [format!("{path}/{}", ids[0]), format!("/tunnels/{}", ids[1])] {
        let closed = both
            .answering(world.call(&tenant, "DELETE", &path, &Value::Null))
            .await;
        assert_eq!(closed.body, json!({"success": true}), "{path}");
        let again = world.call(&tenant, "DELETE", &path, &Value::Null).await;
        assert_eq!(again.refusal(), (404, "NOT_FOUND", None), "{path}");
    }
    let listed = world.call(&tenant, "GET", &path, &Value::Null).await.body;
    assert_eq!(listed, json!({"tunnels": []}));
}

#[tokio::test]
async fn without_tunnel_proxy_nothing_is_left_open() {
    let world = world().await;
    let tenant = world.tenant("a@b").await;
    let id = world.stored_sandbox(&tenant).await;
    let path = format!("/sandbox/{id}/tunnels");
    let answer = world.call(&tenant, "POST", &path, &json!({"port": 3000})).await;
    assert_eq!(answer.refusal(), (503, "UNAVAILABLE", None));
    let left = world.store.tunnels_since(None).await.expect("a change");
    assert!(
        matches!(&left.frame, TunnelFrame::Snapshot { routes, .. } if routes.is_empty()),
        "{left:?}"
    );
    let health = world
        .send(Request::get("/health").body(Body::empty()).expect("a request"))
        .await;
    assert_eq!(health.body["tunnel_proxy"], "away");
}

#[tokio::test]
async fn closing_says_so_when_nobody_has_cut_and_can_be_asked_again() {
    let world = world().await;
    let owner = world.tenant("a@b").await;
    let stranger = world.tenant("c@d").await;
    let id = world.stored_sandbox(&owner).await;
    let path = format!("/sandbox/{id}/tunnels");
    let mut both = Both::new(&world).await;
    let opened = both
        .answering(world.call(&owner, "POST", &path, &json!({"port": 3000})))
        .await;
    let tunnel = opened.body["tunnel_id"].as_str().expect("an id").to_owned();
    let (short, long) = (format!("/tunnels/{tunnel}"), format!("{path}/{tunnel}"));

    // Nobody answers; the second time it is no longer in the list.
    let (first, second) = tokio::join!(world.call(&owner, "DELETE", &short, &Value::Null), async {
        let listed = async || world.call(&owner, "GET", &path, &Value::Null).await.body;
        while listed().await != json!({"tunnels": []}) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        world.call(&owner, "DELETE", &long, &Value::Null).await
    });
    assert_eq!(first.refusal(), (503, "UNAVAILABLE", None));
    assert_eq!(second.refusal(), (503, "UNAVAILABLE", None));
    let asked = world.call(&stranger, "DELETE", &short, &Value::Null).await;
    assert_eq!(asked.refusal(), (404, "NOT_FOUND", None));

    let closed = both
        .answering(world.call(&owner, "DELETE", &long, &Value::Null))
        .await;
    // It may have been cut before this was asked.
    let is_cut = closed.refusal() == (404, "NOT_FOUND", None);
    assert!(
        is_cut || closed.body == json!({"success": true}),
        "{}",
        closed.body
    );
    for path in [short, long] {
        let again = world.call(&owner, "DELETE", &path, &Value::Null).await;
        assert_eq!(again.refusal(), (404, "NOT_FOUND", None), "it is cut");
    }
}

#[tokio::test]
async fn another_organisations_tunnels_do_not_exist() {
    let world = world().await;
    let owner = world.tenant("a@b").await;
    let stranger = world.tenant("c@d").await;
    let id = world.stored_sandbox(&owner).await;
    let other = world.stored_sandbox(&owner).await;
    let path = format!("/sandbox/{id}/tunnels");
    let mut both = Both::new(&world).await;
    let opened = both
        .answering(world.call(&owner, "POST", &path, &json!({"port": 3000})))
        .await;
    let tunnel = opened.body["tunnel_id"].as_str().expect("an id").to_owned();
    for (method, path, body) in [
        ("GET", path.clone(), Value::Null),
        ("POST", path.clone(), json!({"port": 3000})),
        ("DELETE", format!("{path}/{tunnel}"), Value::Null),
    ] {
        let answer = world.call(&stranger, method, &path, &body).await;
        assert_eq!(
            answer.refusal(),
            (404, "SANDBOX_NOT_FOUND", None),
            "{method} {path}"
        );
    }
    for (tenant, path) in [
        (&stranger, format!("/tunnels/{tunnel}")),
        (&stranger, "/tunnels/..%2Fx".to_owned()),
        // Its owner names the wrong sandbox.
        (&owner, format!("/sandbox/{other}/tunnels/{tunnel}")),
        (&owner, format!("{path}/x")),
    ] {
        let answer = world.call(tenant, "DELETE", &path, &Value::Null).await;
        assert_eq!(answer.refusal(), (404, "NOT_FOUND", None), "{path}");
    }
    let listed = world.call(&owner, "GET", &path, &Value::Null).await.body;
    assert_eq!(listed["tunnels"].as_array().map(Vec::len), Some(1), "{listed}");
}

#[tokio::test]
async fn a_sandbox_has_so_many_tunnels_and_no_more() {
    let world = world_with(Settings {
        max_tunnels: Some("1".to_owned()),
        ..Settings::default()
    })
    .await;
    let tenant = world.tenant("a@b").await;
    let id = world.stored_sandbox(&tenant).await;
    let path = format!("/sandbox/{id}/tunnels");
    let mut both = Both::new(&world).await;
    let body = json!({"port": 3000});
    let first = both.answering(world.call(&tenant, "POST", &path, &body)).await;
    assert_eq!(first.status, StatusCode::CREATED, "{}", first.body);
    let second = world.call(&tenant, "POST", &path, &body).await;
    assert_eq!(second.refusal(), (403, "QUOTA_EXCEEDED", None));
}

#[tokio::test]
async fn who_may_only_look_opens_and_closes_nothing() {
    let world = world().await;
    let tenant = world.tenant("a@b").await;
    let id = world.stored_sandbox(&tenant).await;
    let path = format!("/sandbox/{id}/tunnels");
    let key = json!({"name": "looks", "scopes": ["sandbox:read"]});
    let key = world.call(&tenant, "POST", "/api-keys", &key).await;
    let looks = Tenant {
        key: key.body["key"].as_str().expect("a key").to_owned(),
        org: tenant.org.clone(),
    };
    assert_eq!(
        world.call(&looks, "GET", &path, &Value::Null).await.status,
        StatusCode::OK
    );
    for (method, path, body) in [
        ("POST", path.clone(), json!({"port": 3000})),
        ("DELETE", format!("{path}/tunnel-1"), Value::Null),
        ("DELETE", "/tunnels/tunnel-1".to_owned(), Value::Null),
    ] {
        let answer = world.call(&looks, method, &path, &body).await;
        assert_eq!(answer.refusal(), (403, "FORBIDDEN", None), "{method} {path}");
    }
}
