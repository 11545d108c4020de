//! Connections to the programs in sandboxes. Owns: which are open, which may be used again, and what is tried a second
//! time. They are made by netd and passed here as descriptors; no address is ever dialled. A connection belongs to one
//! tunnel and ends with it.

pub mod far;

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use futures_util::future::BoxFuture;
use http::{
    HeaderValue, Method, Request, Response, Uri, Version,
    header::{CONTENT_LENGTH, COOKIE, HOST, TE, TRANSFER_ENCODING},
    uri::{Authority, PathAndQuery, Scheme},
};
use http_body_util::{BodyExt as _, Empty};
use hyper::{
    body::{Body as _, Incoming},
    client::conn::{http1, http2},
    rt::Executor,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use sandgate_api::id::SandboxId;
use sandgate_daemon::tasks::Tasks;
use sandgate_relay::inward::{DialFailure, Dialer};
use tokio::{net::TcpStream, sync::Semaphore};
use tokio_util::sync::CancellationToken;

use self::far::Far;
use crate::{forward::body::Body, metrics::Metrics, tunnel::Tunnel};

/// Connections of one tunnel that wait for another request.
const IDLE_MAX: usize = 32;
/// How long they wait. Servers close idle connections after 2 s and more.
pub const IDLE_TIME: Duration = Duration::from_millis(1500);
/// How long one may have waited for a request that could not be sent a second time.
const FRESH: Duration = Duration::from_millis(500);
/// Time for a connection to be ready for its next request once it was said to be.
const READY_TIME: Duration = Duration::from_secs(1);
const HEADERS_MAX: usize = 100;
const HTTP1_BUFFER: usize = 128 * 1024;
/// Bytes that a peer may send ahead of us reading them.
pub const STREAM_WINDOW: u32 = 256 * 1024;
/// The same over all streams of a connection.
pub const CONNECTION_WINDOW: u32 = 1024 * 1024;
/// Bytes of headers in HTTP/2.
pub const HEADER_LIST_MAX: u32 = 64 * 1024;
/// Bytes that are held for a peer that does not read.
pub const SEND_BUFFER: usize = 64 * 1024;

/// Makes connections into sandboxes. The second implementation is that of tests without a netd.
pub trait Dial: Send + Sync + 'static {
    /// Connects to a port inside.
    fn dial<'a>(&'a self, id: &'a SandboxId, port: u16) -> BoxFuture<'a, Result<TcpStream, DialFailure>>;
}

impl Dial for Dialer {
    fn dial<'a>(&'a self, id: &'a SandboxId, port: u16) -> BoxFuture<'a, Result<TcpStream, DialFailure>> {
        Box::pin(Self::dial(self, id, port))
    }
}

/// A request got no answer.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// As many connections are open, to all sandboxes, as there is room for.
    #[error("too many connections to sandboxes at once")]
    Full,
    /// No connection.
    #[error(transparent)]
    Dial(#[from] DialFailure),
    /// What speaks there breaks off, or speaks something else.
    #[error("{0}")]
    Http(#[from] hyper::Error),
}

/// The open connections of one tunnel.
#[derive(Default)]
pub struct Pool {
    idle: Mutex<Vec<Idle>>,
    /// Held while a connection is made, so that streams share one.
    shared: tokio::sync::Mutex<Option<http2::SendRequest<Body>>>,
}

struct Idle {
    sender: http1::SendRequest<Body>,
    since: Instant,
}

impl Pool {
    /// Closes what has waited too long.
    pub fn sweep(&self) {
        self.lock()
            .retain(|idle| idle.since.elapsed() < IDLE_TIME && !idle.sender.is_closed());
    }

    /// Closes what waits.
    pub fn clear(&self) {
        self.lock().clear();
    }

    fn take(&self, within: Duration) -> Option<http1::SendRequest<Body>> {
        let mut idle = self.lock();
        while let Some(last) = idle.pop() {
            if last.since.elapsed() < within && !last.sender.is_closed() {
                return Some(last.sender);
            }
        }
        None
    }

    fn put(&self, sender: http1::SendRequest<Body>) {
        let mut idle = self.lock();
        if idle.len() < IDLE_MAX && !sender.is_closed() {
            idle.push(Idle {
                sender,
                since: Instant::now(),
            });
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Idle>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Pool")
            .field("idle", &self.lock().len())
            .finish_non_exhaustive()
    }
}

/// Where a connection goes when the answer on it has ended.
pub struct Home {
    back: Option<(Arc<Tunnel>, http1::SendRequest<Body>)>,
}

impl Home {
    /// The answer has ended well: the connection may be used again.
    pub fn go(self) {
        if let Some((tunnel, sender)) = self.back
            && !tunnel.end().is_cancelled()
        {
            tunnel.pool.put(sender);
        }
    }
}

/// Sends requests into sandboxes.
#[derive(Clone)]
pub struct Upstream {
    dial: Arc<dyn Dial>,
    /// For every connection that is open or made.
    places: Arc<Semaphore>,
    tasks: Tasks,
    metrics: Arc<Metrics>,
}

impl Upstream {
    /// Connects through `dial`, which is counted; at most `most` connections at once, which live among the tasks.
    pub fn new(dial: Arc<dyn Dial>, most: usize, tasks: Tasks, metrics: Arc<Metrics>) -> Self {
        Self {
            dial,
            places: Arc::new(Semaphore::new(most.min(Semaphore::MAX_PERMITS))),
            tasks,
            metrics,
        }
    }

    /// A connection by itself, for bytes.
    ///
    /// # Errors
    /// What netd says, or that there is no room.
    pub async fn connect(&self, tunnel: &Tunnel) -> Result<Far, UpstreamError> {
        let place = Arc::clone(&self.places)
            .try_acquire_owned()
            .map_err(|_none| UpstreamError::Full)?;
        let began = Instant::now();
        let dialled = self.dial.dial(&tunnel.sandbox_id, tunnel.port).await;
        self.metrics.dialled(&dialled, began.elapsed());
        let stream = dialled?;
        // A missing TCP_NODELAY costs latency, nothing else.
        drop(stream.set_nodelay(true));
        Ok(Far::new(stream, place))
    }

    /// Sends a request of HTTP/1.1 whose target is a path, and waits for the head of its answer. A connection that was
    /// used before and turns out to be closed is replaced once; a request that may have arrived is repeated only when
    /// that changes nothing.
    ///
    /// # Errors
    /// When there is no connection, or no answer on it.
    pub async fn send(
        &self,
        tunnel: &Arc<Tunnel>,
        mut request: Request<Body>,
    ) -> Result<(Response<Incoming>, Home), UpstreamError> {
        for_http1(&mut request);
        let again = repeatable(&request);
        let within = if again.is_some() { IDLE_TIME } else { FRESH };
        if let Some(mut sender) = tunnel.pool.take(within)
            && matches!(tokio::time::timeout(READY_TIME, sender.ready()).await, Ok(Ok(())))
        {
            let mut failed = match sender.try_send_request(request).await {
                Ok(answer) => return Ok((answer, home(tunnel, sender))),
                Err(failed) => failed,
            };
            let unsent = failed.take_message();
            let error = failed.into_error();
            request = match (unsent, again) {
                // Given back whole: the connection ended before a byte of it was sent.
                (Some(unsent), _) => unsent,
                (None, Some(again)) if error.is_incomplete_message() || error.is_canceled() => again,
                (None, _) => return Err(error.into()),
            };
        }
        self.send_alone(tunnel, request).await
    }

    /// The same on a connection of its own, on which another protocol may follow.
    ///
    /// # Errors
    /// When there is no connection, or no answer on it.
    pub async fn send_alone(
        &self,
        tunnel: &Arc<Tunnel>,
        mut request: Request<Body>,
    ) -> Result<(Response<Incoming>, Home), UpstreamError> {
        for_http1(&mut request);
        let stream = self.connect(tunnel).await?;
        let mut builder = http1::Builder::new();
        builder.max_buf_size(HTTP1_BUFFER).max_headers(HEADERS_MAX);
        let (mut sender, connection) = builder.handshake(TokioIo::new(stream)).await?;
        self.spawn(tunnel.end(), connection.with_upgrades());
        sender.ready().await?;
        let answer = sender.send_request(request).await?;
        Ok((answer, home(tunnel, sender)))
    }

    /// Sends a request of HTTP/2 over the tunnel's one connection.
    ///
    /// # Errors
    /// When there is no connection, or no answer on it.
    pub async fn send_http2(
        &self,
        tunnel: &Arc<Tunnel>,
        mut request: Request<Body>,
    ) -> Result<Response<Incoming>, UpstreamError> {
        for_http2(&mut request);
        let mut sender = self.shared(tunnel).await?;
        match sender.try_send_request(request).await {
            Ok(answer) => Ok(answer),
            Err(mut failed) => match failed.take_message() {
                Some(unsent) => {
                    let mut sender = self.shared(tunnel).await?;
                    Ok(sender.send_request(unsent).await?)
                }
                None => Err(failed.into_error().into()),
            },
        }
    }

    async fn shared(&self, tunnel: &Arc<Tunnel>) -> Result<http2::SendRequest<Body>, UpstreamError> {
        let mut shared = tunnel.pool.shared.lock().await;
        if let Some(sender) = &mut *shared
            && !sender.is_closed()
            && sender.ready().await.is_ok()
        {
            return Ok(sender.clone());
        }
        *shared = None;
        let stream = self.connect(tunnel).await?;
        let executor = UpstreamTasks {
            upstream: self.clone(),
            end: tunnel.end().clone(),
        };
        let mut builder = http2::Builder::new(executor);
        builder
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_send_buf_size(SEND_BUFFER)
            .max_header_list_size(HEADER_LIST_MAX);
        let (mut sender, connection) = builder.handshake(TokioIo::new(stream)).await?;
        self.spawn(tunnel.end(), connection);
        sender.ready().await?;
        *shared = Some(sender.clone());
        Ok(sender)
    }

    /// Runs a connection until the tunnel ends.
    fn spawn<F>(&self, end: &CancellationToken, connection: F)
    where
        F: Future + Send + 'static,
    {
        let end = end.clone();
        self.tasks.spawn("sandbox connection", async move {
            tokio::select! {
                _ended = connection => {}
                () = end.cancelled() => {}
            }
        });
    }
}

/// Where streams of HTTP/2 run.
#[derive(Clone)]
struct UpstreamTasks {
    upstream: Upstream,
    end: CancellationToken,
}

impl<F> Executor<F> for UpstreamTasks
where
    F: Future + Send + 'static,
{
    fn execute(&self, task: F) {
        self.upstream.spawn(&self.end, task);
    }
}

fn home(tunnel: &Arc<Tunnel>, sender: http1::SendRequest<Body>) -> Home {
    Home {
        back: Some((Arc::clone(tunnel), sender)),
    }
}

/// The request once more, when sending it twice means no more than sending it once (RFC 9110 9.2.2) and there is no
/// body that is gone after the first time.
fn repeatable(request: &Request<Body>) -> Option<Request<Body>> {
    let idempotent = [
        Method::GET,
        Method::HEAD,
        Method::OPTIONS,
        Method::TRACE,
        Method::PUT,
        Method::DELETE,
    ];
    if !request.body().is_end_stream() || !idempotent.contains(request.method()) {
        return None;
    }
    let body = Empty::new().map_err(|never| match never {}).boxed_unsync();
    let mut again = Request::new(body);
    *again.method_mut() = request.method().clone();
    *again.uri_mut() = request.uri().clone();
    *again.version_mut() = request.version();
    *again.headers_mut() = request.headers().clone();
    Some(again)
}

/// A path as target, the authority in `Host`.
fn for_http1(request: &mut Request<Body>) {
    *request.version_mut() = Version::HTTP_11;
    let path = request.uri().path_and_query().cloned();
    *request.uri_mut() = Uri::from(path.unwrap_or_else(|| PathAndQuery::from_static("/")));
    let is_unmeasured = !request.body().is_end_stream() && request.body().size_hint().exact().is_none();
    let headers = request.headers_mut();
    headers.remove(TE);
    if is_unmeasured {
        // hyper would take a GET or a HEAD for one without a body, and drop it.
        headers.remove(CONTENT_LENGTH);
        headers.insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
    }
    // HTTP/2 may cut the field into several (RFC 9113 8.2.3).
    let cookies: Vec<&[u8]> = headers
        .get_all(COOKIE)
        .iter()
        .map(HeaderValue::as_bytes)
        .collect();
    if cookies.len() > 1
        && let Ok(joined) = HeaderValue::from_bytes(&cookies.join(&b"; "[..]))
    {
        headers.insert(COOKIE, joined);
    }
}

/// The authority in the target, where HTTP/2 has it.
fn for_http2(request: &mut Request<Body>) {
    *request.version_mut() = Version::HTTP_2;
    let host = request.headers_mut().remove(HOST);
    let mut parts = std::mem::take(request.uri_mut()).into_parts();
    parts.scheme = Some(Scheme::HTTP);
    parts.authority = host
        .and_then(|host| Authority::try_from(host.as_bytes()).ok())
        .or(parts.authority);
    if parts.path_and_query.is_none() {
        parts.path_and_query = Some(PathAndQuery::from_static("/"));
    }
    if let Ok(uri) = Uri::from_parts(parts) {
        *request.uri_mut() = uri;
    }
}
