//! What both feeds have in common: a channel on which the other program opens stream sockets, and HTTP/1.1 on each of
//! them. What is served there, and what it means, belongs to [`crate::node`] and [`crate::ingress`].

use std::{io, os::unix::net::UnixStream, sync::Arc, time::Duration};

use axum::{
    Router,
    response::{IntoResponse as _, Response},
};
use http::StatusCode;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use sandgate_api::control::{MAX_PACKET, Open};
use sandgate_daemon::handover::Channel;
use tokio_util::sync::CancellationToken;

/// Pause after a packet that could not be received.
const PAUSE: Duration = Duration::from_millis(100);

/// Receives the sockets that `who` opens, until the supervisor is gone or the controller drains.
pub(crate) async fn accept(
    channel: Arc<Channel>,
    who: &'static str,
    shutdown: CancellationToken,
    mut opened: impl FnMut(UnixStream),
) {
    let mut buffer = [0; MAX_PACKET];
    loop {
        let received = tokio::select! {
            () = shutdown.cancelled() => return,
            received = channel.recv(&mut buffer) => received,
        };
        let (length, descriptor) = match received {
            Ok((0, _)) => {
                tracing::error!(who, "a control channel is closed: the supervisor is gone");
                return;
            }
            Ok(received) => received,
            Err(error) => {
                tracing::warn!(who, %error, "a packet on a control channel was lost");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        match (serde_json::from_slice::<Open>(&buffer[..length]), descriptor) {
            (Ok(Open::Feed), Some(descriptor)) => opened(descriptor.into()),
            (Ok(Open::Dial), _) => tracing::warn!(
                who,
                "a dial socket was asked for; it is the controller that dials"
            ),
            (Ok(Open::Feed), None) => tracing::warn!(who, "a feed was opened without a socket"),
            (Err(error), _) => tracing::warn!(who, %error, "an unknown packet on a control channel"),
        }
    }
}

/// Serves one socket until its other end closes it or the controller drains.
pub(crate) async fn serve(stream: UnixStream, router: Router, shutdown: CancellationToken) {
    let stream = match stream
        .set_nonblocking(true)
        .and_then(|()| tokio::net::UnixStream::from_std(stream))
    {
        Ok(stream) => stream,
        Err(error) => {
            tracing::warn!(%error, "a socket that was passed in cannot be used");
            return;
        }
    };
    // The socket's other end is one program alone, which may be silent for as long as it likes.
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(None)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let ended = tokio::select! {
        ended = connection => ended,
        () = shutdown.cancelled() => return,
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a feed connection ended");
    }
}

/// What was asked for is done.
pub(crate) fn done() -> Response {
    ([(http::header::CONTENT_TYPE, "application/json")], "{}").into_response()
}

/// What was sent is not understood.
pub(crate) fn refused(error: &serde_json::Error) -> Response {
    tracing::warn!(%error, "a feed's follower sent what is not understood");
    (StatusCode::BAD_REQUEST, error.to_string()).into_response()
}

/// A frame of a feed, as one line.
pub(crate) fn line(frame: &impl serde::Serialize) -> Option<bytes::Bytes> {
    let mut text = serde_json::to_vec(frame)
        .map_err(io::Error::from)
        .inspect_err(|error| tracing::error!(%error, "a feed frame cannot be written"))
        .ok()?;
    text.push(b'\n');
    Some(text.into())
}
