//! Requests that are read: netd stands between a sandbox and a server, by TLS or in clear, judges each request, and puts
//! secrets into those by TLS that the sandbox never sees. Owns: both sessions of such a flow and everything between
//! them. HTTP/1.1 and HTTP/2, with TLS and without, go through the same code from a request's head on.
//! Never decides: every request goes to the rules in force, through [`World`], and none is forwarded without
//! their leave. Never lets a value out to the sandbox, into a record, a log or an error text.
//!
//! | module | owns |
//! |---|---|
//! | [`authority`] | the certificates shown in the hosts' place |
//! | [`leases`] | values and authorities on lease from the controller |
//! | [`bindings`], [`inject`] | which secret goes into which request, and where |
//! | [`doh`] | questions to name servers, which are refused |
//! | [`near`] | the client's bytes: what was sniffed comes first |
//! | [`request`], [`response`], [`upgrade`] | one exchange: checks, forwarding, masking, other protocols |
//! | [`upstream`], [`pool`] | the connections to the server, verified, and used again within a sandbox |
//! | [`answer`], [`account`] | what netd answers itself, and what is recorded |

pub mod account;
pub mod answer;
pub mod authority;
pub mod bindings;
mod doh;
pub mod inject;
pub mod leases;
pub mod near;
pub mod pool;
mod query;
mod request;
mod response;
mod upgrade;
pub mod upstream;

use std::{
    collections::BTreeSet,
    convert::Infallible,
    future::Future,
    io,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, LazyLock, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{Request, header::HOST};
use http_body_util::combinators::UnsyncBoxBody;
use hyper::{
    body::Incoming,
    rt::Executor,
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use rustls::{AlertDescription, ServerConfig, crypto::CryptoProvider};
use sandgate_api::id::SandboxId;
use sandgate_daemon::tasks::Tasks;
use sandgate_policy::DomainName;
use sandgate_relay::{
    http1::strict::{Notes, Strict},
    redact::Needles,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::TlsAcceptor;
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};

use self::{
    account::Exchange,
    bindings::Bindings,
    leases::{Lease, Unavailable},
    near::{Meter, Near},
    pool::Pool,
    upstream::{Upstream, UpstreamTls},
};
use crate::{
    egress::dial::NotDialled,
    sandbox::{AdmittedRequest, Decision, Judgement, OverQuota, RequestFacts},
};

/// Time for the client's half of the TLS handshake.
const HANDSHAKE_TIME: Duration = Duration::from_secs(15);
/// Silence after which a flow ends whose client has closed its half.
const HALF_IDLE: Duration = Duration::from_secs(300);
/// Requests at once on one connection of HTTP/2.
const STREAMS_MAX: u32 = 64;
/// Streams that a client may have reset before they were looked at, and those that were reset for a fault of theirs:
/// one more ends the connection (CVE-2023-44487, and what came after it).
const RESETS_MAX: usize = 32;
/// Bytes that a peer may send ahead of us reading them.
const STREAM_WINDOW: u32 = 256 * 1024;
const CONNECTION_WINDOW: u32 = 512 * 1024;
const SEND_BUFFER: usize = 32 * 1024;
const HEADERS_MAX: usize = 100;
const HEADER_LIST_MAX: u32 = 32 * 1024;
const HTTP1_BUFFER: usize = 64 * 1024;

/// A body on its way, in either direction.
pub(crate) type Body = UnsyncBoxBody<Bytes, BodyError>;
/// Why a body ended early.
pub(crate) type BodyError = Box<dyn std::error::Error + Send + Sync>;

/// The one cryptographic provider, named wherever TLS begins.
pub fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: LazyLock<Arc<CryptoProvider>> =
        LazyLock::new(|| Arc::new(rustls::crypto::aws_lc_rs::default_provider()));
    Arc::clone(&PROVIDER)
}

/// In what a client speaks HTTP, and netd to the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Channel {
    /// TLS; inside, each side has the version of HTTP that it agrees on.
    Tls,
    /// HTTP/1.x in clear.
    Clear,
    /// HTTP/2 in clear, by prior knowledge.
    ClearHttp2,
}

/// Whom a flow is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// The server's name, for which the address is pinned. In clear there may be none: the client names the address.
    pub name: Option<DomainName>,
    /// The address that the sandbox chose.
    pub to: SocketAddr,
    /// How it is spoken to.
    pub channel: Channel,
}

impl Target {
    /// The server without its port.
    pub fn host(&self) -> String {
        match (&self.name, self.to.ip()) {
            (Some(name), _) => name.as_str().to_owned(),
            (None, IpAddr::V4(address)) => address.to_string(),
            (None, IpAddr::V6(address)) => format!("[{address}]"),
        }
    }

    /// As in a Host field.
    pub fn authority(&self) -> String {
        let default = match self.channel {
            Channel::Tls => 443,
            Channel::Clear | Channel::ClearHttp2 => 80,
        };
        match self.to.port() {
            port if port == default => self.host(),
            port => format!("{}:{port}", self.host()),
        }
    }

    /// Whether a request for this host and port, as its head says, is one for it.
    fn is_meant_by(&self, said: &str) -> bool {
        let (host, port) = match said.rsplit_once(':') {
            Some((host, port)) if !said.ends_with(']') => (host, Some(port)),
            Some(_) | None => (said, None),
        };
        let is_host = match &self.name {
            Some(name) => DomainName::parse(host).is_ok_and(|host| host == *name),
            None => {
                let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
                bare.unwrap_or(host).parse() == Ok(self.to.ip())
            }
        };
        is_host && port.is_none_or(|port| port.parse() == Ok(self.to.port()))
    }

    /// Whether secrets may go to it.
    fn is_secure(&self) -> bool {
        self.channel == Channel::Tls
    }
}

/// Leave for one request. Dropping it takes the request out of the books.
pub struct Leave {
    /// What the rules say.
    pub judgement: Judgement,
    /// The bindings in force when they did.
    pub bindings: Arc<Bindings>,
    /// The entry in the books.
    pub books: Option<AdmittedRequest>,
}

/// What an intercepted flow asks of the rest of netd.
pub trait World: Send + Sync + 'static {
    /// Whose flow it is.
    fn sandbox_id(&self) -> &SandboxId;
    /// Judges a request by the rules in force.
    ///
    /// # Errors
    /// The decision against it.
    fn admit(&self, facts: RequestFacts) -> Result<Leave, Decision>;
    /// Counts bytes that are about to go to the host, and the host with the first of them. The denial of a tier in audit
    /// mode, if there is one.
    ///
    /// # Errors
    /// When they are too many; then they must not go.
    fn spend(&self, bytes: usize) -> Result<Option<Decision>, OverQuota>;
    /// Counts a request into which these secrets are about to go. The denial of a tier in audit mode, if there is one.
    ///
    /// # Errors
    /// When one of them was used as often as it may be; then none may be used.
    fn use_secrets(&self, secrets: &BTreeSet<&str>) -> Result<Option<Decision>, OverQuota>;
    /// Whether a request goes on where a failure of ours keeps it from being recorded or from its secret.
    fn fails_open(&self) -> bool;
    /// Whether another request could be recorded.
    fn has_room(&self) -> bool;
    /// Records an exchange; returns the record's id, unless it was put together with others.
    fn record(&self, decision: &Decision, exchange: Exchange) -> Option<String>;
    /// A value on lease.
    fn lease<'a>(&'a self, secret: &'a str, version: u64) -> BoxFuture<'a, Result<Lease, Unavailable>>;
    /// Everything that must not reach the sandbox.
    fn needles(&self) -> Arc<Needles>;
    /// Connections that wait for a flow like this one.
    fn pool(&self) -> Arc<Pool>;
    /// Connects to the flow's address.
    fn dial(&self) -> BoxFuture<'_, Result<TcpStream, NotDialled>>;
}

/// One flow whose requests are read.
pub(crate) struct Flow {
    pub(crate) world: Arc<dyn World>,
    pub(crate) target: Target,
    pub(crate) upstream: Upstream,
    pub(crate) notes: Arc<Notes>,
    pub(crate) tasks: FlowTasks,
}

/// How an intercepted flow ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// By itself.
    Closed,
    /// The client broke off; this is what it said or did.
    Client(String),
    /// The handshake that was answered is not the one that was judged.
    AnotherName,
}

/// Serves the requests of one flow by TLS until its client is done. Dropping the future ends everything about it.
pub async fn serve(
    near: Near,
    server: Arc<ServerConfig>,
    target: Target,
    world: Arc<dyn World>,
    tls: Arc<UpstreamTls>,
    tasks: Tasks,
) -> End {
    let accepted = tokio::time::timeout(HANDSHAKE_TIME, TlsAcceptor::from(server).accept(near)).await;
    let stream = match accepted {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return End::Client(broke_off(&error)),
        Err(_elapsed) => return End::Client("the client did not finish the TLS handshake".to_owned()),
    };
    let (is_h2, is_same) = {
        let session = stream.get_ref().1;
        let named = session.server_name().map(DomainName::parse);
        let same = matches!((named, &target.name), (Some(Ok(named)), Some(name)) if named == *name);
        (session.alpn_protocol() == Some(b"h2"), same)
    };
    if !is_same {
        return End::AnotherName;
    }
    let flow = Flow::new(target, world, Some(tls), FlowTasks::new(tasks));
    // Whatever ends this future ends what it began.
    let _ends_with_us = flow.tasks.drop_guard();
    if is_h2 {
        let opened = Arc::clone(&flow);
        let ended = serve_http2(stream, &flow.tasks, move |_request| Some(Arc::clone(&opened))).await;
        flow.finish(ended).await
    } else {
        serve_http1(stream, flow, "https").await
    }
}

/// The same for HTTP/1.x in clear.
pub async fn serve_in_clear(near: Near, target: Target, world: Arc<dyn World>, tasks: Tasks) -> End {
    let flow = Flow::new(target, world, None, FlowTasks::new(tasks));
    let _ends_with_us = flow.tasks.drop_guard();
    serve_http1(near, flow, "http").await
}

/// The same for HTTP/2 in clear (RFC 9113 3.3). `open` is asked once, with whom the first request is for; where it gives
/// nothing, no request is answered, and the caller should end the flow.
pub async fn serve_http2_in_clear<O>(near: Near, open: O, tasks: Tasks) -> End
where
    O: Fn(&str) -> Option<(Target, Arc<dyn World>)> + Send + Sync + 'static,
{
    let tasks = FlowTasks::new(tasks);
    let _ends_with_us = tasks.drop_guard();
    let opened: Arc<OnceLock<Option<Arc<Flow>>>> = Arc::default();
    let (kept, flow_tasks) = (Arc::clone(&opened), tasks.clone());
    let ended = serve_http2(near, &tasks, move |request| {
        let flow = opened.get_or_init(|| {
            let (target, world) = open(said_authority(request)?)?;
            Some(Flow::new(target, world, None, flow_tasks.clone()))
        });
        flow.clone()
    })
    .await;
    match kept.get() {
        Some(Some(flow)) => flow.finish(ended).await,
        Some(None) | None => end_of(ended),
    }
}

/// Whom a request says it is for: by its target, or by its Host field.
fn said_authority<B>(request: &Request<B>) -> Option<&str> {
    let of_target = request.uri().authority().map(http::uri::Authority::as_str);
    of_target.or_else(|| request.headers().get(HOST)?.to_str().ok())
}

async fn serve_http2<S>(
    stream: S,
    tasks: &FlowTasks,
    open: impl Fn(&Request<Incoming>) -> Option<Arc<Flow>> + Send + 'static,
) -> hyper::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(move |request| {
        let flow = open(&request);
        async move {
            match flow {
                Some(flow) => Ok::<_, Infallible>(request::answer(flow, request, None).await),
                None => std::future::pending().await,
            }
        }
    });
    let mut builder = http2::Builder::new(tasks.clone());
    builder
        .max_concurrent_streams(STREAMS_MAX)
        .max_pending_accept_reset_streams(RESETS_MAX)
        .max_local_error_reset_streams(RESETS_MAX)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_send_buf_size(SEND_BUFFER)
        .max_header_list_size(HEADER_LIST_MAX);
    builder.serve_connection(TokioIo::new(stream), service).await
}

async fn serve_http1<S>(stream: S, flow: Arc<Flow>, scheme: &'static str) -> End
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let ordinals = AtomicU64::new(0);
    let served = Arc::clone(&flow);
    let service = service_fn(move |request| {
        let flow = Arc::clone(&served);
        // Requests of one connection begin one after another.
        let ordinal = ordinals.fetch_add(1, Ordering::Relaxed);
        async move { Ok::<_, Infallible>(request::answer(flow, request, Some(ordinal)).await) }
    });
    let mut builder = http1::Builder::new();
    builder
        .header_read_timeout(None)
        .max_headers(HEADERS_MAX)
        .max_buf_size(HTTP1_BUFFER)
        // In clear a client may close its half after its last request; by TLS that is an end (RFC 8446 6.1 allows it,
        // clients do not do it).
        .half_close(!flow.target.is_secure());
    let strict = Strict::new(stream, Arc::clone(&flow.notes)).with_absolute(scheme);
    let ended = builder
        .serve_connection(TokioIo::new(strict), service)
        .with_upgrades()
        .await;
    flow.finish(ended).await
}

impl Flow {
    fn new(
        target: Target,
        world: Arc<dyn World>,
        tls: Option<Arc<UpstreamTls>>,
        tasks: FlowTasks,
    ) -> Arc<Self> {
        Arc::new(Self {
            upstream: Upstream::new(Arc::clone(&world), tls, target.clone(), tasks.clone()),
            world,
            target,
            notes: Arc::default(),
            tasks,
        })
    }

    /// Waits for connections that went on as another protocol: they are still part of the flow.
    async fn finish(&self, ended: hyper::Result<()>) -> End {
        self.tasks.upgrades.close();
        self.tasks.upgrades.wait().await;
        let end = end_of(ended);
        if end == End::Closed {
            self.upstream.give_back().await;
        }
        end
    }
}

fn end_of(ended: hyper::Result<()>) -> End {
    match ended {
        Ok(()) => End::Closed,
        Err(error) if went_away(&error) => End::Client("the client went away".to_owned()),
        Err(error) => End::Client(error.to_string()),
    }
}

/// What a client says that does not take the certificate that it is shown, so that people know what to do about it.
fn broke_off(error: &io::Error) -> String {
    let alert = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<rustls::Error>());
    let is_distrust = matches!(
        alert,
        Some(rustls::Error::AlertReceived(
            AlertDescription::UnknownCA
                | AlertDescription::BadCertificate
                | AlertDescription::CertificateUnknown
                | AlertDescription::UnsupportedCertificate
        ))
    );
    if is_distrust {
        return format!(
            "the client does not trust the certificate of this sandbox ({error}): it pins another one, or does not \
             read the sandbox's trust store; `tls: splice` lets it through unread"
        );
    }
    if error.kind() == io::ErrorKind::UnexpectedEof {
        return "the client closed the connection within the TLS handshake, as some do that do not trust the \
                certificate of this sandbox"
            .to_owned();
    }
    format!("the client broke off the TLS handshake: {error}")
}

/// Whether the connection just ended, with or without a word.
fn went_away(error: &hyper::Error) -> bool {
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if let Some(error) = cause.downcast_ref::<io::Error>() {
            return matches!(
                error.kind(),
                io::ErrorKind::UnexpectedEof
                    | io::ErrorKind::ConnectionReset
                    | io::ErrorKind::ConnectionAborted
                    | io::ErrorKind::BrokenPipe
            );
        }
        source = cause.source();
    }
    error.is_incomplete_message()
}

/// Serves a flow until it ends or nothing has moved for `idle`. A client that has closed its half is perhaps gone
/// altogether, so that the answer it waits for has [`HALF_IDLE`].
pub async fn serve_until_idle(
    serving: impl Future<Output = End>,
    meter: &Meter,
    idle: Duration,
) -> Option<End> {
    let half_closed = async {
        meter.half_closed().await;
        meter.activity.silence(HALF_IDLE.min(idle)).await;
    };
    tokio::select! {
        end = serving => Some(end),
        () = meter.activity.silence(idle) => None,
        () = half_closed => None,
    }
}

/// The tasks of one flow, which end with it.
#[derive(Debug, Clone)]
pub(crate) struct FlowTasks {
    tasks: Tasks,
    end: CancellationToken,
    /// Those that outlive the HTTP connection.
    upgrades: TaskTracker,
}

impl FlowTasks {
    fn new(tasks: Tasks) -> Self {
        Self {
            tasks,
            end: CancellationToken::new(),
            upgrades: TaskTracker::new(),
        }
    }

    /// Others, which end by themselves or when netd ends.
    fn apart(&self) -> Self {
        Self {
            end: self.tasks.shutdown().child_token(),
            upgrades: TaskTracker::new(),
            tasks: self.tasks.clone(),
        }
    }

    /// Ends them when it is dropped.
    fn drop_guard(&self) -> DropGuard {
        self.end.clone().drop_guard()
    }

    pub(crate) fn spawn<F>(&self, name: &'static str, task: F)
    where
        F: Future + Send + 'static,
    {
        let end = self.end.clone();
        self.tasks
            .spawn_within(name, &tracing::Span::current(), async move {
                tokio::select! {
                    _output = task => {}
                    () = end.cancelled() => {}
                }
            });
    }

    pub(crate) fn spawn_upgrade<F>(&self, task: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.spawn("upgraded connection", self.upgrades.track_future(task));
    }
}

impl<F> Executor<F> for FlowTasks
where
    F: Future + Send + 'static,
{
    fn execute(&self, task: F) {
        self.spawn("intercepted stream", task);
    }
}

#[cfg(test)]
mod tests;
