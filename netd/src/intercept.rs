//! Interception: netd stands between a sandbox and a server, reads each request, judges it, and puts secrets
//! into it that the sandbox never sees. Owns: both TLS sessions of such a flow and everything between them.
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
//! | [`upstream`] | the connections to the server, verified |
//! | [`answer`], [`account`] | what netd answers itself, and what is recorded |

pub mod account;
pub mod answer;
pub mod authority;
pub mod bindings;
mod doh;
pub mod inject;
pub mod leases;
pub mod near;
mod query;
mod request;
mod response;
mod upgrade;
pub mod upstream;

use std::{
    convert::Infallible,
    future::Future,
    io,
    net::SocketAddr,
    sync::{
        Arc, LazyLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http_body_util::combinators::UnsyncBoxBody;
use hyper::{
    rt::Executor,
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use rustls::{ServerConfig, crypto::CryptoProvider};
use sandgate_api::id::SandboxId;
use sandgate_daemon::tasks::Tasks;
use sandgate_policy::DomainName;
use sandgate_relay::{
    http1::strict::{Notes, Strict},
    redact::Needles,
};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::{
    account::Exchange,
    bindings::Bindings,
    leases::{Lease, Unavailable},
    near::{Meter, Near},
    upstream::{Upstream, UpstreamTls},
};
use crate::{
    egress::dial::NotDialled,
    sandbox::{AdmittedRequest, Decision, Judgement, RequestFacts},
};

/// Time for the client's half of the TLS handshake.
const HANDSHAKE_TIME: Duration = Duration::from_secs(15);
/// Requests at once on one connection of HTTP/2.
const STREAMS_MAX: u32 = 64;
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

/// Whom a flow is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// The server's name, for which the address is pinned.
    pub name: DomainName,
    /// The address that the sandbox chose.
    pub to: SocketAddr,
}

impl Target {
    /// As in a Host field.
    pub fn authority(&self) -> String {
        match self.to.port() {
            443 => self.name.as_str().to_owned(),
            port => format!("{}:{port}", self.name.as_str()),
        }
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
    /// Connects to the flow's address.
    fn dial(&self) -> BoxFuture<'_, Result<TcpStream, NotDialled>>;
}

/// One intercepted flow.
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

/// Serves the requests of one flow until its client is done. Dropping the future ends everything about it.
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
        Ok(Err(error)) => return End::Client(format!("the client broke off the TLS handshake: {error}")),
        Err(_elapsed) => return End::Client("the client did not finish the TLS handshake".to_owned()),
    };
    let (is_h2, is_same) = {
        let session = stream.get_ref().1;
        let named = session.server_name();
        let same = named.is_some_and(|name| DomainName::parse(name).is_ok_and(|name| name == target.name));
        (session.alpn_protocol() == Some(b"h2"), same)
    };
    if !is_same {
        return End::AnotherName;
    }
    let tasks = FlowTasks::new(tasks);
    // Whatever ends this future ends what it began.
    let _ends_with_us = tasks.end.clone().drop_guard();
    let notes = Arc::new(Notes::default());
    let flow = Arc::new(Flow {
        upstream: Upstream::new(Arc::clone(&world), tls, target.clone(), tasks.clone()),
        world,
        target,
        notes: Arc::clone(&notes),
        tasks: tasks.clone(),
    });
    let ended = if is_h2 {
        let service = service_fn(move |request| {
            let flow = Arc::clone(&flow);
            async move { Ok::<_, Infallible>(request::answer(flow, request, None).await) }
        });
        let mut builder = http2::Builder::new(tasks.clone());
        builder
            .max_concurrent_streams(STREAMS_MAX)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_send_buf_size(SEND_BUFFER)
            .max_header_list_size(HEADER_LIST_MAX);
        builder.serve_connection(TokioIo::new(stream), service).await
    } else {
        let ordinals = AtomicU64::new(0);
        let service = service_fn(move |request| {
            let flow = Arc::clone(&flow);
            // Requests of one connection begin one after another.
            let ordinal = ordinals.fetch_add(1, Ordering::Relaxed);
            async move { Ok::<_, Infallible>(request::answer(flow, request, Some(ordinal)).await) }
        });
        let mut builder = http1::Builder::new();
        builder
            .header_read_timeout(None)
            .max_headers(HEADERS_MAX)
            .max_buf_size(HTTP1_BUFFER);
        let strict = TokioIo::new(Strict::new(stream, notes));
        builder.serve_connection(strict, service).with_upgrades().await
    };
    // Connections that went on as another protocol are still part of the flow.
    tasks.upgrades.close();
    tasks.upgrades.wait().await;
    match ended {
        Ok(()) => End::Closed,
        Err(error) if went_away(&error) => End::Client("the client went away".to_owned()),
        Err(error) => End::Client(error.to_string()),
    }
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

/// Serves a flow until it ends or nothing has moved for `idle`.
pub async fn serve_until_idle(
    serving: impl Future<Output = End>,
    meter: &Meter,
    idle: Duration,
) -> Option<End> {
    tokio::select! {
        end = serving => Some(end),
        () = meter.activity.silence(idle) => None,
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
