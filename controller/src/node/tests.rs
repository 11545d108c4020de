//! The link against the other end of its own sockets: the test speaks as netd does.

use std::os::fd::AsFd as _;

use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use jiff::Timestamp;
use sandgate_api::{
    control::{DialError, DialReply, DialRequest, MAX_PACKET, Open},
    credential::{CaLease, CaRequest, CredentialLease, CredentialRequest, Sensitive},
    feed::{FeedError, FeedFrame},
    id::{OrgId, SecretId},
};
use sandgate_daemon::handover;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, UnixStream},
};
use tokio_util::sync::CancellationToken;

use super::*;
use crate::{
    installation::InstallationKey,
    store::{AuditFilter, AuthorityRecord, NewSandbox, NewSecret, SecretChoice, samples},
    vault::Vault,
};

/// Longest wait for what happens at once on a machine that has nothing else to do.
const SOON: Duration = Duration::from_secs(60);

struct World {
    link: NodeLink,
    store: Store,
    vault: Arc<Vault>,
    org: OrgId,
    /// netd's end.
    netd: Channel,
    _directory: tempfile::TempDir,
}

async fn world() -> World {
    let (store, directory) = samples::store().await;
    let (ours, theirs) = handover::pair().expect("a pair");
    let tasks = Tasks::new(CancellationToken::new());
    let key = InstallationKey::open(&directory.path().join("installation.key")).expect("a key");
    let vault = Arc::new(Vault::open(None, None, directory.path()).expect("a vault"));
    let broker = Broker::new(store.clone(), Arc::clone(&vault), key);
    let channel = Channel::from_fd(ours).expect("a channel");
    World {
        link: NodeLink::start(channel, store.clone(), broker, &tasks),
        org: samples::organization(&store, "a@b").await,
        store,
        vault,
        netd: Channel::from_fd(theirs).expect("a channel"),
        _directory: directory,
    }
}

impl World {
    async fn announced(&self) -> (SandboxId, Revision) {
        let new = NewSandbox {
            secrets: SecretChoice::All,
            authority: Some(AuthorityRecord {
                generation: 1,
                certificate: "certificate".to_owned(),
            }),
            ..samples::sandbox(&self.org, None)
        };
        let id = self.store.insert_sandbox(&new, 9).await.expect("inserted").id;
        let announced = self.store.announce(&id, &samples::endpoint(7)).await;
        (id, announced.expect("announced"))
    }

    /// What netd does to speak HTTP to the controller.
    async fn http(&self) -> http1::SendRequest<Full<bytes::Bytes>> {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().expect("a stream pair");
        let packet = serde_json::to_vec(&Open::Feed).expect("a packet");
        self.netd.send(&packet, Some(theirs.as_fd())).await.expect("sent");
        drop(theirs);
        ours.set_nonblocking(true).expect("non-blocking");
        let stream = UnixStream::from_std(ours).expect("a stream");
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.expect("a handshake");
        Tasks::new(CancellationToken::new()).spawn("connection", async move { drop(connection.await) });
        sender
    }

    async fn follow(&self, since: Option<Revision>) -> Follower {
        let mut sender = self.http().await;
        let since = since.map_or_else(String::new, |since| format!("&since={since}"));
        let request = http::Request::get(format!("/feed?node=local{since}"))
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

    async fn post(&self, path: &str, body: &impl serde::Serialize) -> http::StatusCode {
        self.ask(path, body).await.0
    }

    async fn ask(&self, path: &str, body: &impl serde::Serialize) -> (http::StatusCode, bytes::Bytes) {
        let body = Full::from(serde_json::to_vec(body).expect("a body"));
        let request = http::Request::post(path).body(body).expect("a request");
        let mut sender = self.http().await;
        let response = sender.send_request(request).await.expect("a response");
        let status = response.status();
        (
            status,
            response.into_body().collect().await.expect("a body").to_bytes(),
        )
    }

    async fn ack(&self, revision: Revision, errors: Vec<FeedError>) {
        let ack = FeedAck {
            revision,
            ready: true,
            not_ready_reason: None,
            kernel_pass: false,
            no_kernel_pass_reason: None,
            kernel_pass6: false,
            no_kernel_pass6_reason: None,
            errors,
        };
        assert_eq!(self.post("/feed/ack", &ack).await, 200);
    }
}

struct Follower {
    body: hyper::body::Incoming,
    held: Vec<u8>,
    _sender: http1::SendRequest<Full<bytes::Bytes>>,
}

impl Follower {
    async fn frame(&mut self) -> FeedFrame {
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

#[tokio::test]
async fn a_node_hears_everything_and_then_what_changes_and_then_that_nothing_does() {
    let world = world().await;
    let (one, _) = world.announced().await;
    let mut follower = world.follow(None).await;
    let FeedFrame::Snapshot { revision, sandboxes } = follower.frame().await else {
        panic!("a snapshot first")
    };
    assert_eq!(
        sandboxes
            .iter()
            .map(|sandbox| &sandbox.sandbox_id)
            .collect::<Vec<_>>(),
        [&one]
    );
    assert!(world.link.state().connected);

    let gone = world
        .store
        .withdraw(&one)
        .await
        .expect("withdrawn")
        .expect("a revision");
    assert!(gone > revision);
    let frame = follower.frame().await;
    assert_eq!(
        frame,
        FeedFrame::Delta {
            since: Some(revision),
            revision: gone,
            upserts: vec![],
            removed: vec![one]
        }
    );
    assert_eq!(follower.frame().await, FeedFrame::Heartbeat { revision: gone });

    let mut again = world.follow(Some(revision)).await;
    let FeedFrame::Delta { removed, .. } = again.frame().await else {
        panic!("a delta for a known position")
    };
    assert_eq!(removed.len(), 1);
}

#[tokio::test]
async fn an_acknowledgement_is_awaited_and_names_who_is_refused() {
    let world = world().await;
    let (good, first) = world.announced().await;
    let (bad, second) = world.announced().await;
    let mut follower = world.follow(None).await;
    follower.frame().await;
    assert!(
        !world.link.state().ready,
        "a node that has not reported is not ready"
    );
    let short = Duration::from_millis(50);
    let both = [good.clone(), bad.clone()];
    assert_eq!(
        world.link.enforced(second, &both, short).await,
        Enforcement::Pending
    );

    world.ack(first, vec![]).await;
    assert!(world.link.state().ready);
    assert_eq!(
        world.link.is_enforced(first, std::slice::from_ref(&good)),
        Enforcement::Applied
    );
    assert_eq!(
        world.link.is_enforced(second, std::slice::from_ref(&bad)),
        Enforcement::Pending
    );

    let (waited, ()) = tokio::join!(
        world.link.enforced(second, std::slice::from_ref(&bad), SOON),
        async {
            tokio::time::sleep(short).await;
            let error = FeedError {
                sandbox_id: bad.clone(),
                message: "map\u{1b}[31m full".to_owned(),
            };
            world.ack(second, vec![error]).await;
        }
    );
    assert_eq!(waited, Enforcement::Refused("map[31m full".to_owned()));
    assert_eq!(world.link.is_enforced(second, &[good]), Enforcement::Applied);

    // A later state that the node takes makes the earlier refusal history.
    let gone = world
        .store
        .withdraw(&bad)
        .await
        .expect("withdrawn")
        .expect("a revision");
    world.ack(gone, vec![]).await;
    assert_eq!(world.link.is_enforced(gone, &[bad]), Enforcement::Applied);
}

#[tokio::test]
async fn a_node_that_goes_away_is_not_ready_until_it_reports_again() {
    let world = world().await;
    let mut follower = world.follow(None).await;
    follower.frame().await;
    world.ack(1, vec![]).await;
    assert!(world.link.state().ready);

    // The new netd may come before the old one is seen to be gone.
    let mut newer = world.follow(None).await;
    newer.frame().await;
    assert!(
        !world.link.state().ready,
        "what the old one said does not count for the new one"
    );
    drop(follower);
    world.ack(1, vec![]).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(world.link.state().ready && world.link.state().connected);

    drop(newer);
    let mut state = world.link.watch();
    let away = tokio::time::timeout(SOON, state.wait_for(|state| !state.connected)).await;
    away.expect("in time").expect("the link lives");
    assert!(!world.link.state().ready);
}

#[tokio::test]
async fn a_node_that_keeps_its_connection_and_says_nothing_is_not_ready() {
    let world = world().await;
    let mut follower = world.follow(None).await;
    follower.frame().await;
    world.ack(1, vec![]).await;
    let mut state = world.link.watch();
    assert!(state.borrow_and_update().ready);
    let silence = Duration::from_secs(1);
    let silent = tokio::select! {
        silent = tokio::time::timeout(SOON, state.wait_for(|state| !state.ready)) => {
            silent.expect("in time").expect("the link lives").clone()
        }
        () = world.link.notice_silence(silence) => unreachable!("it goes on"),
    };
    assert!(silent.connected);
    assert_eq!(silent.reason.as_deref(), Some("the node has been silent for 1 s"));
    world.ack(1, vec![]).await;
    assert!(world.link.state().ready);
}

#[tokio::test]
async fn records_arrive_once_however_often_they_are_delivered() {
    let world = world().await;
    let event = serde_json::json!({
        "id": "0190a", "time": "2026-01-30T10:00:00Z", "org_id": world.org, "sandbox_id": "sandbox-1",
        "verdict": "deny", "reason": "default_deny", "protocol": "tls", "host": "evil.test"
    });
    let batch = serde_json::json!({"events": [event]});
    assert_eq!(world.post("/feed/audit", &batch).await, 200);
    assert_eq!(world.post("/feed/audit", &batch).await, 200);
    let filter = AuditFilter {
        limit: 9,
        ..AuditFilter::default()
    };
    assert_eq!(
        world
            .store
            .audit(&world.org, &filter)
            .await
            .expect("records")
            .len(),
        1
    );
    assert_eq!(
        world
            .post("/feed/audit", &serde_json::json!({"events": [{}]}))
            .await,
        400
    );
}

#[tokio::test]
async fn of_what_somebody_should_look_at_the_first_is_marked_and_counted() {
    let world = world().await;
    let event = |number: u32, sandbox: &str| {
        serde_json::json!({
            "id": format!("alert-{number}"), "time": "2026-01-30T10:00:00Z", "org_id": world.org,
            "sandbox_id": sandbox, "verdict": "deny", "reason": "placeholder_misuse", "protocol": "https",
            "host": "evil.test",
        })
    };
    let events = [
        event(1, "sandbox-1"),
        event(2, "sandbox-1"),
        event(3, "sandbox-2"),
    ];
    let batch = serde_json::json!({ "events": events });
    assert_eq!(world.post("/feed/audit", &batch).await, 200);
    // Delivered again it raises nothing.
    assert_eq!(world.post("/feed/audit", &batch).await, 200);
    let filter = AuditFilter {
        limit: 9,
        alerts: AlertKind::ALL,
        ..AuditFilter::default()
    };
    let marked = world.store.audit(&world.org, &filter).await.expect("records");
    let mut ids: Vec<&str> = marked.iter().map(|row| row.event.id.as_str()).collect();
    ids.sort_unstable();
    assert_eq!(ids, ["alert-1", "alert-3"]);
    for (kind, count) in world.link.alerts_stored() {
        let expected = if kind == AlertKind::PlaceholderMisuse {
            2
        } else {
            0
        };
        assert_eq!(count, expected, "{kind:?}");
    }
}

#[tokio::test]
async fn another_node_has_no_feed_here() {
    let world = world().await;
    let request = http::Request::get("/feed?node=other")
        .body(Full::default())
        .expect("a request");
    let response = world
        .http()
        .await
        .send_request(request)
        .await
        .expect("a response");
    assert_eq!(response.status(), 404);
    assert!(!world.link.state().connected);
}

/// Receives the dial socket that the controller opened.
async fn dial_socket(netd: &Channel) -> Channel {
    let mut buffer = [0; MAX_PACKET];
    let (length, descriptor) = tokio::time::timeout(SOON, netd.recv(&mut buffer))
        .await
        .expect("in time")
        .expect("a packet");
    assert_eq!(
        serde_json::from_slice::<Open>(&buffer[..length]).expect("an opening"),
        Open::Dial
    );
    Channel::from_fd(descriptor.expect("a socket")).expect("a channel")
}

async fn request(socket: &Channel) -> DialRequest {
    let mut buffer = [0; MAX_PACKET];
    let (length, _) = socket.recv(&mut buffer).await.expect("a packet");
    serde_json::from_slice(&buffer[..length]).expect("a request")
}

async fn answer(socket: &Channel, request_id: u64, answer: Result<std::os::fd::OwnedFd, DialError>) {
    let reply = serde_json::to_vec(&DialReply {
        request_id,
        error: answer.as_ref().err().copied(),
    })
    .expect("a reply");
    let descriptor = answer.ok();
    socket
        .send(&reply, descriptor.as_ref().map(std::os::fd::AsFd::as_fd))
        .await
        .expect("sent");
}

#[tokio::test]
async fn a_connection_comes_back_as_a_descriptor_in_any_order() {
    let world = world().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a listener");
    let address = listener.local_addr().expect("an address");
    let (left, right) = (SandboxId::random(), SandboxId::random());
    let (one, other, ()) = tokio::join!(
        world.link.dial(&left, 9111),
        world.link.dial(&right, 9111),
        async {
            let socket = dial_socket(&world.netd).await;
            let (first, second) = (request(&socket).await, request(&socket).await);
            assert_ne!(first.request_id, second.request_id);
            assert_eq!(first.port, 9111);
            let stream = std::net::TcpStream::connect(address).expect("connected");
            answer(&socket, 4_711, Err(DialError::Failed)).await;
            answer(&socket, second.request_id, Err(DialError::Refused)).await;
            answer(&socket, first.request_id, Ok(stream.into())).await;
        }
    );
    let (connected, refused) = if one.is_ok() { (one, other) } else { (other, one) };
    assert!(
        matches!(refused, Err(DialFailure::Refused(DialError::Refused))),
        "{refused:?}"
    );
    let mut connected = connected.expect("connected");
    let (mut accepted, _) = listener.accept().await.expect("accepted");
    accepted.write_all(b"hello").await.expect("written");
    drop(accepted);
    let mut text = String::new();
    connected.read_to_string(&mut text).await.expect("read");
    assert_eq!(text, "hello");
}

#[tokio::test]
async fn a_restarted_node_gets_a_fresh_socket_and_the_request_again() {
    let world = world().await;
    let id = SandboxId::random();
    let (dialled, ()) = tokio::join!(world.link.dial(&id, 9111), async {
        let first = dial_socket(&world.netd).await;
        request(&first).await;
        drop(first);
        let second = dial_socket(&world.netd).await;
        let again = request(&second).await;
        assert_eq!(again.sandbox_id, id);
        answer(&second, again.request_id, Err(DialError::UnknownSandbox)).await;
    });
    assert!(
        matches!(dialled, Err(DialFailure::Refused(DialError::UnknownSandbox))),
        "{dialled:?}"
    );
}

#[tokio::test]
async fn an_answer_without_descriptor_is_no_connection() {
    let world = world().await;
    let id = SandboxId::random();
    let (dialled, ()) = tokio::join!(world.link.dial(&id, 9111), async {
        let socket = dial_socket(&world.netd).await;
        let request = request(&socket).await;
        let reply = serde_json::to_vec(&DialReply {
            request_id: request.request_id,
            error: None,
        })
        .expect("a reply");
        socket.send(&reply, None).await.expect("sent");
    });
    assert!(
        matches!(dialled, Err(DialFailure::Refused(DialError::Failed))),
        "{dialled:?}"
    );
}

#[tokio::test]
async fn a_node_asks_for_values_and_authorities_and_hears_of_their_change() {
    let world = world().await;
    let value = Sensitive::new("sk-ant-canary-0123456789".to_owned());
    let new = NewSecret {
        id: SecretId::random(),
        org_id: world.org.clone(),
        name: "A_KEY".to_owned(),
        scope: "sandbox".to_owned(),
        egress: crate::presets::bindings("ANTHROPIC_API_KEY"),
        placeholder_prefix: String::new(),
        sealed: world.vault.seal(&world.org, "A_KEY", &value).expect("sealed"),
        created_at: Timestamp::now(),
    };
    let secret = world.store.insert_secret(&new, 9).await.expect("inserted");
    let (id, _) = world.announced().await;
    let mut follower = world.follow(None).await;
    let FeedFrame::Snapshot { sandboxes, .. } = follower.frame().await else {
        panic!("a snapshot first")
    };
    assert_eq!(sandboxes[0].bindings[0].secret, "A_KEY");
    assert_eq!(sandboxes[0].bindings[0].version, secret.version);

    let credential = CredentialRequest {
        sandbox_id: id.clone(),
        secret: "A_KEY".to_owned(),
    };
    let (status, body) = world.ask("/feed/credential", &credential).await;
    assert_eq!(status, 200);
    let lease: CredentialLease = serde_json::from_slice(&body).expect("a lease");
    assert_eq!((lease.value, lease.version), (value, secret.version));
    let authority = CaRequest {
        sandbox_id: id.clone(),
    };
    let (status, body) = world.ask("/feed/ca", &authority).await;
    assert_eq!(status, 200);
    let lease: CaLease = serde_json::from_slice(&body).expect("a lease");
    assert_eq!(
        (lease.certificate_pem.as_str(), lease.generation),
        ("certificate", 1)
    );
    assert_eq!(sandboxes[0].ca_generation, lease.generation);

    world
        .store
        .delete_secret(&world.org, "A_KEY")
        .await
        .expect("deleted");
    let FeedFrame::Delta { upserts, .. } = follower.frame().await else {
        panic!("a delta of the revocation")
    };
    assert!(upserts[0].bindings.is_empty());
    assert_eq!(world.post("/feed/credential", &credential).await, 404);
    world.store.withdraw(&id).await.expect("withdrawn");
    assert_eq!(world.post("/feed/ca", &authority).await, 404);
    for path in ["/feed/credential", "/feed/ca"] {
        assert_eq!(world.post(path, &"nonsense").await, 400, "{path}");
    }
}

#[tokio::test]
async fn a_value_that_does_not_open_is_no_lease_and_no_error_text() {
    let world = world().await;
    let other = Vault::new(&[3; 32]).expect("a vault");
    let value = Sensitive::new("sk-ant-canary-0123456789".to_owned());
    let new = NewSecret {
        id: SecretId::random(),
        org_id: world.org.clone(),
        name: "A_KEY".to_owned(),
        scope: "sandbox".to_owned(),
        egress: crate::presets::bindings("ANTHROPIC_API_KEY"),
        placeholder_prefix: String::new(),
        sealed: other.seal(&world.org, "A_KEY", &value).expect("sealed"),
        created_at: Timestamp::now(),
    };
    world.store.insert_secret(&new, 9).await.expect("inserted");
    let (id, _) = world.announced().await;
    let request = CredentialRequest {
        sandbox_id: id,
        secret: "A_KEY".to_owned(),
    };
    let (status, body) = world.ask("/feed/credential", &request).await;
    assert_eq!(
        (status.as_u16(), body.as_ref()),
        (503, b"no credential at the moment".as_slice())
    );
}
