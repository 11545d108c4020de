//! A small world around the interception: a real TLS server, a real TLS client, real rules, all on loopback.

use std::{
    collections::BTreeSet,
    convert::Infallible,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body_util::{BodyExt as _, Empty, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    body::{Body, Frame, Incoming},
    client::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName},
};
use sandgate_api::{
    credential::{Binding, CaLease, CaRequest, CredentialLease, CredentialRequest, Inject, Sensitive},
    feed::{PolicyTier, TierName},
    id::{OrgId, SandboxId},
};
use sandgate_daemon::tasks::Tasks;
use sandgate_policy::{DomainName, Flow as PolicyFlow, Platform, Policy, Protocol};
use sandgate_relay::redact::Needles;
use serde_json::Value;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};
use tokio_rustls::{TlsAcceptor, TlsConnector, client::TlsStream};
use tokio_util::sync::CancellationToken;

use super::super::{
    Channel, End, Leave, Target, World,
    account::Exchange,
    authority::Authority,
    bindings::Bindings,
    leases::{Broker, BrokerError, Lease, Leases, Unavailable},
    near::{Meter, Near},
    pool::Pool,
    provider, serve, serve_http2_in_clear, serve_in_clear,
    upstream::UpstreamTls,
};
use crate::{
    egress::dial::NotDialled,
    sandbox::{
        Decision, Host, OverQuota, RequestFacts, Rules,
        spending::{Spending, over_upload},
    },
};

pub(super) const NAME: &str = "api.test";
pub(super) const CANARY: &str = "canary+value/4711-deadbeef";
pub(super) const PLACEHOLDER: &str = "sk-sgp00123456789abcdef0123456789abcdef";

/// A certificate authority made for the test.
pub(super) struct Ca {
    pem: String,
    key: String,
    issuer: Issuer<'static, KeyPair>,
    der: CertificateDer<'static>,
}

impl Ca {
    pub(super) fn new(name: &str) -> Self {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let certificate = params.self_signed(&key).expect("a certificate");
        Self {
            pem: certificate.pem(),
            key: key.serialize_pem(),
            der: certificate.der().clone(),
            issuer: Issuer::new(params, key),
        }
    }

    fn roots(&self) -> RootCertStore {
        let mut roots = RootCertStore::empty();
        roots.add(self.der.clone()).expect("a root");
        roots
    }

    fn server(&self, alpn: &[&str]) -> Arc<ServerConfig> {
        let key = KeyPair::generate().expect("a key");
        let params = CertificateParams::new(vec![NAME.to_owned()]).expect("a name");
        let certificate = params.signed_by(&key, &self.issuer).expect("signed");
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key)
            .expect("a certificate");
        config.alpn_protocols = alpn.iter().map(|alpn| alpn.as_bytes().to_vec()).collect();
        Arc::new(config)
    }
}

/// Gives the canary, in a version, unless it is away.
pub(super) struct Vault {
    pub(super) lease: Mutex<(String, u64)>,
    pub(super) away: AtomicBool,
}

impl Broker for Vault {
    fn credential(
        &self,
        request: CredentialRequest,
    ) -> BoxFuture<'_, Result<Option<CredentialLease>, BrokerError>> {
        assert_eq!(request.secret, "KEY");
        Box::pin(async {
            if self.away.load(Ordering::Relaxed) {
                return Err(BrokerError("away".to_owned()));
            }
            let (value, version) = self.lease.lock().expect("whole").clone();
            Ok(Some(CredentialLease {
                value: Sensitive::new(value),
                version,
                lease_seconds: 60,
            }))
        })
    }

    fn authority(&self, _request: CaRequest) -> BoxFuture<'_, Result<Option<CaLease>, BrokerError>> {
        Box::pin(async { Ok(None) })
    }
}

/// The surroundings of all flows of a test.
pub(super) struct Surroundings {
    id: SandboxId,
    rules: Mutex<Rules>,
    spending: Mutex<Spending>,
    leases: Leases,
    pub(super) vault: Vault,
    pub(super) pool: Arc<Pool>,
    /// Where its connections really go.
    pub(super) server: Mutex<SocketAddr>,
    to: SocketAddr,
    pub(super) records: Mutex<Vec<(Decision, Exchange)>>,
    pub(super) fails_open: AtomicBool,
    /// Connections made to the server.
    pub(super) dialled: Mutex<usize>,
}

impl World for Surroundings {
    fn sandbox_id(&self) -> &SandboxId {
        &self.id
    }

    fn admit(&self, facts: RequestFacts) -> Result<Leave, Decision> {
        let rules = self.rules.lock().expect("whole");
        let name = DomainName::parse(NAME).expect("a name");
        let judgement = rules.judge_request(
            &PolicyFlow {
                protocol: Protocol::Tcp,
                to: self.to,
                name: Some(&name),
                names_bound: std::slice::from_ref(&name),
            },
            &facts.head(),
        );
        if !judgement.decision.is_allowed() {
            return Err(judgement.decision);
        }
        Ok(Leave {
            judgement,
            bindings: Arc::clone(rules.bindings()),
            books: None,
        })
    }

    fn spend(&self, bytes: usize) -> Result<Option<Decision>, OverQuota> {
        let rules = self.rules.lock().expect("whole");
        let host = Host::Name(DomainName::parse(NAME).expect("a name"));
        let mut spending = self.spending.lock().expect("whole");
        let (upload, noted) = spending.meet(&rules, &host, Instant::now())?;
        if upload.take(bytes) {
            Ok(noted)
        } else {
            Err(over_upload(&rules))
        }
    }

    fn use_secrets(&self, secrets: &BTreeSet<&str>) -> Result<Option<Decision>, OverQuota> {
        let rules = self.rules.lock().expect("whole");
        let mut spending = self.spending.lock().expect("whole");
        spending.use_secrets(&rules, secrets.iter().copied(), Instant::now())
    }

    fn fails_open(&self) -> bool {
        self.fails_open.load(Ordering::Relaxed)
    }

    fn has_room(&self) -> bool {
        true
    }

    fn record(&self, decision: &Decision, exchange: Exchange) -> Option<String> {
        let mut records = self.records.lock().expect("whole");
        records.push((decision.clone(), exchange));
        Some(format!("event-{}", records.len()))
    }

    fn lease<'a>(&'a self, secret: &'a str, version: u64) -> BoxFuture<'a, Result<Lease, Unavailable>> {
        Box::pin(self.leases.value(&self.vault, &self.id, secret, version))
    }

    fn needles(&self) -> Arc<Needles> {
        self.leases.needles()
    }

    fn pool(&self) -> Arc<Pool> {
        Arc::clone(&self.pool)
    }

    fn dial(&self) -> BoxFuture<'_, Result<TcpStream, NotDialled>> {
        *self.dialled.lock().expect("whole") += 1;
        let server = *self.server.lock().expect("whole");
        Box::pin(async move { Ok(TcpStream::connect(server).await.expect("the server listens")) })
    }
}

/// One request as the server saw it.
#[derive(Debug, Clone)]
pub(super) struct Seen {
    pub(super) target: String,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
}

/// How a test wants its world.
pub(super) struct Plan {
    pub(super) policy: Value,
    pub(super) bindings: Vec<Binding>,
    pub(super) server_alpn: &'static [&'static str],
    /// The server's certificate is signed by somebody nobody trusts.
    pub(super) bad_certificate: bool,
    /// How client and server speak.
    pub(super) channel: Channel,
}

/// The whole world.
pub(super) struct Place {
    pub(super) world: Arc<Surroundings>,
    near: SocketAddr,
    trust: RootCertStore,
    pub(super) seen: Arc<Mutex<Vec<Seen>>>,
    /// How flows ended.
    pub(super) ends: Arc<Mutex<Vec<End>>>,
    /// Each permit lets `/stream` send one more part.
    pub(super) go: Arc<Semaphore>,
    pub(super) tasks: Tasks,
}

pub(super) fn binding(inject: Vec<Inject>, version: u64) -> Binding {
    Binding {
        secret: "KEY".to_owned(),
        version,
        hosts: vec![NAME.to_owned()],
        ports: vec![443],
        methods: Vec::new(),
        paths: Vec::new(),
        inject,
        strip_client_auth: true,
        placeholders: vec![PLACEHOLDER.to_owned()],
    }
}

pub(super) fn open_world(bindings: Vec<Binding>) -> Plan {
    Plan {
        policy: serde_json::json!({ "mode": "allow_all" }),
        bindings,
        server_alpn: &["http/1.1"],
        bad_certificate: false,
        channel: Channel::Tls,
    }
}

/// The same without TLS.
pub(super) fn clear_world(channel: Channel, policy: Value) -> Plan {
    Plan {
        policy,
        channel,
        ..open_world(vec![binding(vec![Inject::Bearer], 1)])
    }
}

fn rules(policy: &Value, bindings: &[Binding]) -> Rules {
    let tier = PolicyTier {
        tier: TierName::Sandbox,
        policy: Policy::parse(policy).expect("a policy").into(),
    };
    let bindings = Bindings::compile(bindings).expect("bindings");
    Rules::with(&Platform::new(Vec::new()), &[tier], bindings, 0, OrgId::nobody()).expect("rules")
}

impl Place {
    pub(super) async fn make<A>(plan: Plan, answer: A) -> Self
    where
        A: Fn(&Seen) -> Response<Full<Bytes>> + Clone + Send + Sync + 'static,
    {
        let tasks = Tasks::new(CancellationToken::new());
        let upstream_ca = Ca::new("upstream");
        let signer = if plan.bad_certificate {
            Ca::new("nobody")
        } else {
            Ca::new("unused")
        };
        let signer = if plan.bad_certificate {
            &signer
        } else {
            &upstream_ca
        };
        let seen = Arc::new(Mutex::new(Vec::new()));
        let go = Arc::new(Semaphore::new(0));
        let is_secure = plan.channel == Channel::Tls;
        let tls = is_secure.then(|| signer.server(plan.server_alpn));
        let server = serve_world(&tasks, tls, Arc::clone(&seen), Arc::clone(&go), answer).await;

        let sandbox_ca = Ca::new("sandbox");
        let lease = CaLease {
            certificate_pem: sandbox_ca.pem.clone(),
            key_pem: Sensitive::new(sandbox_ca.key.clone()),
            generation: 0,
        };
        let authority = Arc::new(Authority::new(&lease, provider()).expect("an authority"));
        let to = SocketAddr::from(([203, 0, 113, 10], if is_secure { 443 } else { 80 }));
        let rules = rules(&plan.policy, &plan.bindings);
        let world = Arc::new(Surroundings {
            id: SandboxId::random(),
            spending: Mutex::new(Spending::new(&rules)),
            rules: Mutex::new(rules),
            leases: Leases::default(),
            vault: Vault {
                lease: Mutex::new((CANARY.to_owned(), 1)),
                away: AtomicBool::new(false),
            },
            pool: Arc::default(),
            server: Mutex::new(server),
            to,
            records: Mutex::default(),
            fails_open: AtomicBool::new(false),
            dialled: Mutex::new(0),
        });
        let tls = Arc::new(UpstreamTls::trusting(upstream_ca.roots()).expect("TLS"));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let near = listener.local_addr().expect("bound");
        let (around, flows) = (Arc::clone(&world), tasks.clone());
        let (channel, ends) = (plan.channel, Arc::new(Mutex::new(Vec::new())));
        let ended = Arc::clone(&ends);
        tasks.spawn("near", async move {
            while let Ok((stream, _)) = listener.accept().await {
                let name = DomainName::parse(NAME).expect("a name");
                let server = authority.server(&name).expect("a certificate");
                let name = Some(name);
                let target = Target { name, to, channel };
                let near = Near::new(stream, Vec::new(), Arc::new(Meter::default()));
                let world = Arc::clone(&around) as Arc<dyn World>;
                let (tls, tasks, ended) = (Arc::clone(&tls), flows.clone(), Arc::clone(&ended));
                flows.spawn("flow", async move {
                    let end = match channel {
                        Channel::Tls => serve(near, server, target, world, tls, tasks).await,
                        Channel::Clear => serve_in_clear(near, target, world, tasks).await,
                        Channel::ClearHttp2 => {
                            let open = move |authority: &str| {
                                (authority == NAME).then(|| (target.clone(), Arc::clone(&world)))
                            };
                            serve_http2_in_clear(near, open, tasks).await
                        }
                    };
                    ended.lock().expect("whole").push(end);
                });
            }
        });
        Self {
            world,
            near,
            trust: sandbox_ca.roots(),
            seen,
            ends,
            go,
            tasks,
        }
    }

    /// New rules, as a feed would bring them.
    pub(super) fn replace(&self, policy: &Value, bindings: &[Binding]) {
        let rules = rules(policy, bindings);
        self.world.leases.retain(rules.bindings(), 0);
        self.world.pool.renew();
        self.world.spending.lock().expect("whole").follow(&rules);
        *self.world.rules.lock().expect("whole") = rules;
    }

    /// Connections made to the server so far.
    pub(super) fn dialled(&self) -> usize {
        *self.world.dialled.lock().expect("whole")
    }

    /// A connection without TLS.
    pub(super) async fn plain(&self) -> TcpStream {
        TcpStream::connect(self.near).await.expect("connected")
    }

    pub(super) async fn connect(&self, alpn: &str) -> TlsStream<TcpStream> {
        let stream = self.connect_trusting(self.trust.clone(), alpn).await;
        let stream = stream.expect("the sandbox trusts its authority");
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(alpn.as_bytes()));
        stream
    }

    /// By TLS, trusting these alone.
    pub(super) async fn connect_trusting(
        &self,
        trust: RootCertStore,
        alpn: &str,
    ) -> std::io::Result<TlsStream<TcpStream>> {
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(trust)
            .with_no_client_auth();
        config.alpn_protocols = vec![alpn.as_bytes().to_vec()];
        let name = ServerName::try_from(NAME).expect("a name");
        TlsConnector::from(Arc::new(config))
            .connect(name, self.plain().await)
            .await
    }

    pub(super) async fn http1(&self) -> http1::SendRequest<Full<Bytes>> {
        self.http1_over(self.connect("http/1.1").await).await
    }

    pub(super) async fn http1_over<S, B>(&self, stream: S) -> http1::SendRequest<B>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
        B: Body<Data = Bytes, Error = Infallible> + Send + 'static,
    {
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.expect("HTTP");
        self.tasks.spawn("client", async move {
            let _ended = connection.with_upgrades().await;
        });
        sender
    }

    pub(super) async fn http2(&self) -> http2::SendRequest<Full<Bytes>> {
        self.http2_over(self.connect("h2").await).await
    }

    pub(super) async fn http2_over<S, B>(&self, stream: S) -> http2::SendRequest<B>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
        B: Body<Data = Bytes, Error = Infallible> + Send + Unpin + 'static,
    {
        let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .expect("HTTP");
        self.tasks.spawn("client", async move {
            let _ended = connection.await;
        });
        sender
    }

    pub(super) fn last_seen(&self) -> Seen {
        self.seen
            .lock()
            .expect("whole")
            .last()
            .expect("a request")
            .clone()
    }
}

async fn serve_world<A>(
    tasks: &Tasks,
    tls: Option<Arc<ServerConfig>>,
    seen: Arc<Mutex<Vec<Seen>>>,
    go: Arc<Semaphore>,
    answer: A,
) -> SocketAddr
where
    A: Fn(&Seen) -> Response<Full<Bytes>> + Clone + Send + Sync + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let address = listener.local_addr().expect("bound");
    let connections = tasks.clone();
    tasks.spawn("server", async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (tls, seen, answer) = (tls.clone(), Arc::clone(&seen), answer.clone());
            let (upgraded, go) = (connections.clone(), Arc::clone(&go));
            connections.spawn("connection", async move {
                let service = service_fn(move |mut request: Request<Incoming>| {
                    let (seen, answer) = (Arc::clone(&seen), answer.clone());
                    let (tasks, go) = (upgraded.clone(), Arc::clone(&go));
                    async move {
                        if request.uri().path() == "/ws" {
                            return Ok(websocket(&tasks, &mut request));
                        }
                        if request.uri().path() == "/echo" {
                            return Ok(echoed(request.into_body()));
                        }
                        let (parts, body) = request.into_parts();
                        if parts.uri.path() == "/swallow" {
                            return Ok(swallowed(body).await);
                        }
                        let body = body.collect().await?.to_bytes();
                        let this = Seen {
                            target: parts
                                .uri
                                .path_and_query()
                                .map(ToString::to_string)
                                .unwrap_or_default(),
                            headers: parts.headers,
                            body,
                        };
                        if this.target == "/stream" {
                            return Ok(streamed(&this, go));
                        }
                        let response =
                            answer(&this).map(|body| body.map_err(|never| match never {}).boxed_unsync());
                        seen.lock().expect("whole").push(this);
                        Ok::<_, hyper::Error>(response)
                    }
                });
                let builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
                let Some(tls) = tls else {
                    let stream = TokioIo::new(stream);
                    let _ended = builder.serve_connection_with_upgrades(stream, service).await;
                    return;
                };
                let Ok(stream) = TlsAcceptor::from(tls).accept(stream).await else {
                    return;
                };
                let stream = TokioIo::new(stream);
                let _ended = builder.serve_connection_with_upgrades(stream, service).await;
            });
        }
    });
    address
}

type Reply = Response<UnsyncBoxBody<Bytes, hyper::Error>>;

/// Returns each piece as it comes, and a status behind them, as a call of gRPC does that streams both ways.
fn echoed(body: Incoming) -> Reply {
    let parts = futures_util::stream::unfold(Some(body), |body| async move {
        let mut body = body?;
        match body.frame().await {
            Some(frame) => Some((frame, Some(body))),
            None => {
                let status = (
                    http::HeaderName::from_static("grpc-status"),
                    HeaderValue::from_static("0"),
                );
                Some((Ok(Frame::trailers(HeaderMap::from_iter([status]))), None))
            }
        }
    });
    Response::new(StreamBody::new(parts).boxed_unsync())
}

/// Counts a body and keeps nothing of it.
async fn swallowed(mut body: Incoming) -> Reply {
    let mut length = 0;
    while let Some(Ok(frame)) = body.frame().await {
        length += frame.data_ref().map_or(0, Bytes::len);
    }
    let text = Full::from(length.to_string()).map_err(|never| match never {});
    Response::new(text.boxed_unsync())
}

/// Sends the request's credential in two parts, the second when the test lets it, and again in a trailer.
fn streamed(seen: &Seen, go: Arc<Semaphore>) -> Reply {
    let value = seen.headers.get("authorization").cloned();
    let value = value.unwrap_or_else(|| HeaderValue::from_static("none"));
    let parts = futures_util::stream::unfold(0, move |part| {
        let (go, value) = (Arc::clone(&go), value.clone());
        async move {
            let text = String::from_utf8_lossy(value.as_bytes()).into_owned();
            let (first, second) = text.split_at(text.len() / 2);
            let frame = match part {
                0 => Frame::data(Bytes::from("data: begin\n\n")),
                1 | 2 => {
                    go.acquire().await.expect("open").forget();
                    Frame::data(Bytes::from(if part == 1 {
                        first.to_owned()
                    } else {
                        second.to_owned()
                    }))
                }
                3 => Frame::trailers(HeaderMap::from_iter([(
                    http::HeaderName::from_static("x-trailer"),
                    value,
                )])),
                _ => return None,
            };
            Some((Ok::<_, hyper::Error>(frame), part + 1))
        }
    });
    let mut reply = Response::new(StreamBody::new(parts).boxed_unsync());
    reply
        .headers_mut()
        .insert("trailer", HeaderValue::from_static("x-trailer"));
    reply
}

/// Agrees to WebSocket, sends the request's credential in two frames, then returns what it is sent.
fn websocket(tasks: &Tasks, request: &mut Request<Incoming>) -> Reply {
    let value = request.headers()["authorization"].as_bytes().to_vec();
    let upgrade = hyper::upgrade::on(request);
    tasks.spawn("websocket", async move {
        let mut stream = TokioIo::new(upgrade.await.expect("agreed"));
        let (first, second) = value.split_at(value.len() / 2);
        for (head, part) in [(0x01, first), (0x80, second)] {
            let length = u8::try_from(part.len()).expect("short");
            stream.write_all(&[head, length]).await.expect("written");
            stream.write_all(part).await.expect("written");
            stream.flush().await.expect("flushed");
        }
        let mut said = [0; 4];
        stream.read_exact(&mut said).await.expect("read");
        stream.write_all(&[0x82, 4]).await.expect("written");
        stream.write_all(&said).await.expect("written");
        stream.shutdown().await.expect("closed");
    });
    let mut reply = Response::new(Empty::new().map_err(|never| match never {}).boxed_unsync());
    *reply.status_mut() = http::StatusCode::SWITCHING_PROTOCOLS;
    let headers = reply.headers_mut();
    headers.insert("connection", HeaderValue::from_static("Upgrade"));
    headers.insert("upgrade", HeaderValue::from_static("websocket"));
    reply
}
