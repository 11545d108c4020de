//! The listener: who may reach it may look, within bounds.

use std::{convert::Infallible, io, net, pin::Pin, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::{encoding::text, registry::Registry};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};

use crate::tasks::Tasks;

/// Connections at once; more wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 16;

/// How long a connection may be silent before a request, or take for its head.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a connection may last, whatever it does: one that does not read its answer holds a place.
const LIFE: Duration = Duration::from_secs(300);

/// How long numbers that must be asked for are waited for; then the last ones are shown.
const REFRESH_TIMEOUT: Duration = Duration::from_secs(2);

/// After a failed accept (no descriptors left): the reason does not go away at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// OpenMetrics 1.0, section "Protocol Negotiation".
const OPENMETRICS: HeaderValue =
    HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");

const TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");

/// Brings gauges up to date before they are shown.
pub type Refresh = Arc<dyn Fn() -> Pin<Box<dyn Future<Output = ()> + Send>> + Send + Sync>;

struct Shown {
    registry: Registry,
    refresh: Option<Refresh>,
}

/// Serves the registry in a task of its own until the tasks drain.
///
/// Must be called inside a tokio runtime.
///
/// # Errors
/// When the listener cannot be used by the runtime.
pub fn serve(
    listener: net::TcpListener,
    registry: Registry,
    refresh: Option<Refresh>,
    tasks: &Tasks,
) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = TcpListener::from_std(listener)?;
    let shown = Arc::new(Shown { registry, refresh });
    let inner = tasks.clone();
    tasks.spawn("metrics", accept(listener, shown, inner));
    Ok(())
}

async fn accept(listener: TcpListener, shown: Arc<Shown>, tasks: Tasks) {
    let shutdown = tasks.shutdown();
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let accepted = async {
            // The semaphore is never closed.
            let place = Arc::clone(&places).acquire_owned().await.ok()?;
            Some((place, listener.accept().await))
        };
        let accepted = tokio::select! {
            () = shutdown.cancelled() => return,
            accepted = accepted => accepted,
        };
        match accepted {
            Some((place, Ok((stream, _peer)))) => {
                let (shown, end) = (Arc::clone(&shown), shutdown.clone());
                tasks.spawn("metrics connection", async move {
                    tokio::select! {
                        () = end.cancelled() => {}
                        _ended = tokio::time::timeout(LIFE, connection(stream, shown)) => {}
                    }
                    drop(place);
                });
            }
            Some((_place, Err(error))) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
            None => return,
        }
    }
}

async fn connection(stream: TcpStream, shown: Arc<Shown>) {
    let service = service_fn(move |request| {
        let shown = Arc::clone(&shown);
        async move { Ok::<_, Infallible>(answer(&request, &shown).await) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(IDLE_TIMEOUT)
        .max_buf_size(16 * 1024)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "a metrics connection ended early");
    }
}

async fn answer(request: &Request<Incoming>, shown: &Arc<Shown>) -> Response<Full<Bytes>> {
    let path = request.uri().path();
    if !matches!(path, "/metrics" | "/healthz") {
        return plain(StatusCode::NOT_FOUND, "there are /metrics and /healthz\n");
    }
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut refused = plain(StatusCode::METHOD_NOT_ALLOWED, "only GET\n");
        refused
            .headers_mut()
            .insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
        return refused;
    }
    if path == "/healthz" {
        return plain(StatusCode::OK, "ok\n");
    }
    if let Some(refresh) = &shown.refresh
        && tokio::time::timeout(REFRESH_TIMEOUT, refresh()).await.is_err()
    {
        tracing::warn!("some metrics could not be brought up to date in time");
    }
    // Collectors read files and ask the kernel: not on a thread that serves others.
    let written = tokio::task::spawn_blocking({
        let shown = Arc::clone(shown);
        move || {
            let mut body = String::with_capacity(16 * 1024);
            text::encode(&mut body, &shown.registry).map(|()| body)
        }
    });
    match written.await {
        Ok(Ok(body)) => typed(StatusCode::OK, OPENMETRICS, body),
        Ok(Err(_)) | Err(_) => plain(
            StatusCode::INTERNAL_SERVER_ERROR,
            "the metrics cannot be written\n",
        ),
    }
}

fn plain(status: StatusCode, text: &'static str) -> Response<Full<Bytes>> {
    typed(status, TEXT, text)
}

fn typed(status: StatusCode, content_type: HeaderValue, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, content_type);
    headers.insert(
        header::X_CONTENT_TYPE_OPTIONS,
        HeaderValue::from_static("nosniff"),
    );
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}
