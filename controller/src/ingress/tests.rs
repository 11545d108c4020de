//! The link against the other end of its own sockets: the test speaks as tunnel-proxy does.

use std::os::fd::AsFd as _;

use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use jiff::{SignedDuration, Timestamp};
use sandgate_api::{
    control::Open,
    id::{OrgId, SandboxId},
    tunnel::{Access, TunnelError, TunnelFrame, TunnelProtocol},
};
use sandgate_daemon::handover;
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::store::{TunnelLimits, TunnelRecord, samples};

/// Longest wait for what happens at once on a machine that has nothing else to do.
const SOON: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(50);

struct World {
    link: ProxyLink,
    store: Store,
    org: OrgId,
    sandbox: SandboxId,
    /// tunnel-proxy's end.
    proxy: Channel,
    _directory: tempfile::TempDir,
}

async fn world() -> World {
    let (store, directory) = samples::store().await;
    let (ours, theirs) = handover::pair().expect("a pair");
    let tasks = Tasks::new(CancellationToken::new());
    let channel = Channel::from_fd(ours).expect("a channel");
    let org = samples::organization(&store, "a@b").await;
    World {
        link: ProxyLink::start(channel, store.clone(), &tasks),
        sandbox: running(&store, &org).await,
        store,
        org,
        proxy: Channel::from_fd(theirs).expect("a channel"),
        _directory: directory,
    }
}

async fn running(store: &Store, org: &OrgId) -> SandboxId {
    let new = samples::sandbox(org, None);
    let id = store.insert_sandbox(&new, 9).await.expect("inserted").id;
    store
        .announce(&id, &samples::endpoint(7))
        .await
        .expect("announced");
    store.mark_running(&id).await.expect("running");
    id
}

impl World {
    async fn open(&self) -> (TunnelId, Revision) {
        let now = Timestamp::now();
        let tunnel = TunnelRecord {
            id: TunnelId::random(),
            org_id: self.org.clone(),
            sandbox_id: self.sandbox.clone(),
            port: 3000,
            protocol: TunnelProtocol::Http,
            token_hash: Some([7; 32]),
            local_port: None,
            created_at: now,
            expires_at: now + SignedDuration::from_secs(60),
        };
        let limits = TunnelLimits {
            of_sandbox: 9,
            of_organization: 9,
            in_all: 9,
        };
        let revision = self.store.open_tunnel(&tunnel, limits).await.expect("opened");
        (tunnel.id, revision)
    }

    /// What tunnel-proxy does to speak HTTP to the controller.
    async fn http(&self) -> http1::SendRequest<Full<bytes::Bytes>> {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().expect("a stream pair");
        let packet = serde_json::to_vec(&Open::Feed).expect("a packet");
        self.proxy
            .send(&packet, Some(theirs.as_fd()))
            .await
            .expect("sent");
        drop(theirs);
        ours.set_nonblocking(true).expect("non-blocking");
        let stream = UnixStream::from_std(ours).expect("a stream");
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.expect("a handshake");
        Tasks::new(CancellationToken::new()).spawn("connection", async move { drop(connection.await) });
        sender
    }

    async fn follow(&self, since: Option<Revision>) -> Follower {
        let mut sender = self.http().await;
        let since = since.map_or_else(String::new, |since| format!("?since={since}"));
        let request = http::Request::get(format!("/tunnels/feed{since}"))
            .body(Full::default())
            .expect("a request");
        let response = sender.send_request(request).await.expect("a response");
        assert_eq!(response.status(), 200);
        Follower {
            body: response.into_body(),
            held: Vec::new(),
            _sender: sender,
        }
    }

    async fn ask(&self, method: &str, path: &str, body: &str) -> http::StatusCode {
        let request = http::Request::builder()
            .method(method)
            .uri(path)
            .body(Full::from(body.to_owned()))
            .expect("a request");
        let mut sender = self.http().await;
        sender.send_request(request).await.expect("a response").status()
    }

    async fn ack(&self, ack: &TunnelAck) -> http::StatusCode {
        let body = serde_json::to_string(ack).expect("a body");
        self.ask("POST", "/tunnels/ack", &body).await
    }
}

struct Follower {
    body: hyper::body::Incoming,
    held: Vec<u8>,
    _sender: http1::SendRequest<Full<bytes::Bytes>>,
}

impl Follower {
    async fn frame(&mut self) -> TunnelFrame {
        loop {
            if let Some(end) = self.held.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.held.drain(..=end).collect();
                return serde_json::from_slice(&line).expect("a frame");
            }
            let frame = tokio::time::timeout(SOON * 2, self.body.frame())
                .await
                .expect("in time");
            let data = frame
                .expect("not the end")
                .expect("no error")
                .into_data()
                .expect("data");
            self.held.extend_from_slice(&data);
        }
    }
}

fn ack(revision: Revision) -> TunnelAck {
    TunnelAck {
        revision,
        listening: Vec::new(),
        errors: Vec::new(),
    }
}

#[tokio::test]
async fn tunnel_proxy_hears_of_every_tunnel_and_of_nothing_else() {
    let world = world().await;
    let (one, opened) = world.open().await;
    let mut follower = world.follow(None).await;
    let TunnelFrame::Snapshot { revision, routes } = follower.frame().await else {
        panic!("a snapshot first")
    };
    assert_eq!((revision, routes.len()), (opened, 1));
    assert_eq!((&routes[0].tunnel_id, routes[0].port), (&one, 3000));
    assert_eq!(
        routes[0].access,
        Access::Token {
            sha256: "07".repeat(32)
        }
    );
    assert!(world.link.state().connected);

    // A revision that is about a sandbox alone is none of its business.
    let policy = sandgate_policy::Policy::parse(&serde_json::json!({"mode": "deny_all"})).expect("a policy");
    let change = || async {
        let set = world
            .store
            .set_organization_policy(&world.org, &policy, None, Timestamp::now());
        set.await.expect("set").stored.revision
    };
    change().await;
    let (closed, _) = world
        .store
        .close_tunnel(&world.org, &one)
        .await
        .expect("closed")
        .expect("it was there");
    assert_eq!(
        follower.frame().await,
        TunnelFrame::Delta {
            revision: closed,
            upserts: vec![],
            removed: vec![one]
        }
    );
    assert_eq!(
        follower.frame().await,
        TunnelFrame::Heartbeat { revision: closed }
    );
    // With the next sign of life it hears that it missed nothing, and has no reason to come anew.
    let later = change().await;
    assert_eq!(
        follower.frame().await,
        TunnelFrame::Delta {
            revision: later,
            upserts: vec![],
            removed: vec![]
        }
    );
    drop(follower);

    // Whoever comes back up to date is told so, and can say that it is.
    let mut again = world.follow(Some(later)).await;
    assert_eq!(
        again.frame().await,
        TunnelFrame::Delta {
            revision: later,
            upserts: vec![],
            removed: vec![]
        }
    );
}

#[tokio::test]
async fn nothing_else_is_served_to_tunnel_proxy() {
    let world = world().await;
    for (method, path) in [
        ("GET", "/feed?node=local"),
        ("POST", "/feed/ack"),
        ("POST", "/feed/audit"),
        ("POST", "/feed/credential"),
        ("POST", "/feed/ca"),
        ("GET", "/api/v1/sandboxes"),
    ] {
        assert_eq!(world.ask(method, path, "{}").await, 404, "{path}");
    }
    assert_eq!(world.ask("POST", "/tunnels/ack", "{}").await, 400);
    assert_eq!(world.ask("POST", "/tunnels/ack", &" ".repeat(2 << 20)).await, 413);
}

#[tokio::test]
async fn an_acknowledgement_is_awaited_and_its_port_is_stored_before() {
    let world = world().await;
    let (tunnel, revision) = world.open().await;
    assert_eq!(
        world.link.served(revision, &tunnel, SHORT).await,
        Serving::Pending
    );
    let listening = Listening {
        tunnel_id: tunnel.clone(),
        local_port: 40_001,
    };
    let (served, status) = tokio::join!(world.link.served(revision, &tunnel, SOON), async {
        world
            .ack(&TunnelAck {
                listening: vec![listening],
                ..ack(revision)
            })
            .await
    });
    assert_eq!((served, status.as_u16()), (Serving::Applied, 200));
    let stored = world.store.tunnel(&world.org, &tunnel).await.expect("asked");
    assert_eq!(stored.expect("there").local_port, Some(40_001));
    // The next tunnel-proxy is asked to listen there again.
    let TunnelFrame::Snapshot { routes, .. } = world.follow(None).await.frame().await else {
        panic!("a snapshot")
    };
    assert_eq!(routes[0].local_port, Some(40_001));
}

#[tokio::test]
async fn what_tunnel_proxy_cannot_serve_is_told_and_bounded() {
    let world = world().await;
    let (bad, revision) = world.open().await;
    let error = TunnelError {
        tunnel_id: bad.clone(),
        message: format!("no \u{1b}[31mport{}", "x".repeat(10_000)),
    };
    let refused = TunnelAck {
        errors: vec![error],
        ..ack(revision)
    };
    assert_eq!(world.ack(&refused).await, 200);
    let Serving::Refused(message) = world.link.served(revision, &bad, SHORT).await else {
        panic!("refused")
    };
    assert!(
        message.starts_with("no [31mport") && message.len() <= MAX_TEXT,
        "{message}"
    );
    world.link.forget(&bad);
    assert_eq!(world.link.served(revision, &bad, SHORT).await, Serving::Applied);
    let many = (0..2_000).map(|number| Listening {
        tunnel_id: format!("tunnel-{number}").parse().expect("an id"),
        local_port: 1,
    });
    let too_many = TunnelAck {
        listening: many.collect(),
        ..ack(revision)
    };
    assert_eq!(world.ack(&too_many).await, 400);
}

#[tokio::test]
async fn tunnel_proxy_counts_as_there_while_it_follows() {
    let world = world().await;
    assert!(!world.link.state().connected);
    let mut older = world.follow(None).await;
    older.frame().await;
    let mut newer = world.follow(None).await;
    newer.frame().await;
    drop(older);
    tokio::time::sleep(SHORT).await;
    assert!(
        world.link.state().connected,
        "the new one came before the old one went"
    );
    drop(newer);
    let mut state = world.link.shared.state.subscribe();
    let away = tokio::time::timeout(SOON, state.wait_for(|state| !state.connected)).await;
    away.expect("in time").expect("the link lives");
}
