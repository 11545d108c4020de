//! The listener: connections in, within bounds.

use std::{sync::Arc, time::Duration};

use axum::Router;
use hyper::{
    Request,
    body::Incoming,
    service::{Service as _, service_fn},
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto::Builder,
    service::TowerToHyperService,
};
use sandgate_daemon::tasks::Tasks;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};
use tokio_util::sync::CancellationToken;

use crate::limiter::Peer;

/// Connections at once; more wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 2_048;

/// How long a connection may be silent before a request, or take for its head. Published clients keep idle
/// connections for 120 s and repeat a POST that meets a reset, so this is longer.
const IDLE_TIMEOUT: Duration = Duration::from_secs(150);

/// After a failed accept (no descriptors left): the reason does not go away at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves the API until the tasks drain. Requests under way are finished.
pub async fn serve(listener: TcpListener, router: Router, tasks: Tasks) {
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
            Some((place, Ok((stream, peer)))) => {
                let peer = Peer::new(peer.ip());
                let connection = connection(stream, peer, router.clone(), shutdown.clone());
                tasks.spawn("api connection", async move {
                    connection.await;
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

async fn connection(stream: TcpStream, peer: Peer, router: Router, shutdown: CancellationToken) {
    // A missing TCP_NODELAY costs latency, nothing else.
    drop(stream.set_nodelay(true));
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(IDLE_TIMEOUT);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(128);
    let router = TowerToHyperService::new(router);
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(peer);
        router.call(request)
    });
    let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = shutdown.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection ended early");
    }
}
