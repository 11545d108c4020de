//! The tunnel feed server: HTTP/1.1 on sockets that tunnel-proxy passed in.

use std::{convert::Infallible, time::Duration};

use axum::{
    Router,
    body::Body,
    extract::{DefaultBodyLimit, Query, State},
    response::{IntoResponse as _, Response},
    routing::{get, post},
};
use bytes::Bytes;
use futures_util::stream;
use http::StatusCode;
use sandgate_api::{
    feed::{HEARTBEAT_SECONDS, Revision},
    tunnel::{TunnelAck, TunnelFrame},
};
use sandgate_daemon::keep::MAX_SOCKETS;
use serde::Deserialize;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::ProxyLink;
use crate::{
    feedsocket::{done, line, refused},
    store::Store,
};

/// Largest acknowledgement, in bytes: a port and an error for every tunnel.
const MAX_BODY: usize = 1024 * 1024;

#[derive(Clone)]
struct Context {
    link: ProxyLink,
    store: Store,
    shutdown: CancellationToken,
}

#[derive(Debug, Deserialize)]
struct Position {
    since: Option<Revision>,
}

/// Everything that tunnel-proxy may ask.
pub(super) fn router(link: ProxyLink, store: Store, shutdown: CancellationToken) -> Router {
    Router::new()
        .route("/tunnels/feed", get(follow))
        .route("/tunnels/ack", post(acknowledge))
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(Context {
            link,
            store,
            shutdown,
        })
}

async fn follow(State(context): State<Context>, Query(position): Query<Position>) -> Response {
    let follower = Follower {
        revision: context.store.watch_revision(),
        position: Point::Start(position.since),
        told: 0,
        _connected: Connected::new(context.link.clone()),
        context,
    };
    let frames = stream::unfold(follower, |mut follower| async move {
        let frame = follower.next().await?;
        Some((Ok::<Bytes, Infallible>(frame), follower))
    });
    (
        [(http::header::CONTENT_TYPE, "application/x-ndjson")],
        Body::from_stream(frames),
    )
        .into_response()
}

/// tunnel-proxy counts as connected while this exists.
struct Connected(ProxyLink);

impl Connected {
    fn new(link: ProxyLink) -> Self {
        link.follow();
        Self(link)
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        self.0.unfollow();
    }
}

enum Point {
    Start(Option<Revision>),
    After(Revision),
}

struct Follower {
    context: Context,
    revision: watch::Receiver<Revision>,
    position: Point,
    /// The revision of the last frame.
    told: Revision,
    _connected: Connected,
}

impl Follower {
    /// The next line; none when the store fails, so that tunnel-proxy comes back for a fresh start.
    async fn next(&mut self) -> Option<Bytes> {
        let heartbeat = tokio::time::sleep(Duration::from_secs(HEARTBEAT_SECONDS));
        tokio::pin!(heartbeat);
        loop {
            let (since, starts) = match self.position {
                Point::Start(since) => (since, true),
                Point::After(sent) => {
                    tokio::select! {
                        () = self.context.shutdown.cancelled() => return None,
                        changed = self.revision.wait_for(|revision| *revision > sent) => {
                            changed.ok()?;
                        }
                        () = &mut heartbeat => return line(&beat(&mut self.told, sent)),
                    }
                    (Some(sent), false)
                }
            };
            let change = match self.context.store.tunnels_since(since).await {
                Ok(change) => change,
                Err(error) => {
                    tracing::error!(
                        error = &error as &dyn std::error::Error,
                        "the tunnel feed cannot be read"
                    );
                    return None;
                }
            };
            self.position = Point::After(change.revision);
            // Most revisions are about sandboxes. The first frame goes out in any case, and is acknowledged.
            if starts || !says_nothing(&change.frame) {
                self.told = change.revision;
                return line(&change.frame);
            }
        }
    }
}

/// After revisions that are none of its business, tunnel-proxy hears with the heartbeat that it has missed nothing.
/// `told`: the revision of the last frame.
fn beat(told: &mut Revision, revision: Revision) -> TunnelFrame {
    if std::mem::replace(told, revision) == revision {
        return TunnelFrame::Heartbeat { revision };
    }
    TunnelFrame::Delta {
        revision,
        upserts: Vec::new(),
        removed: Vec::new(),
    }
}

fn says_nothing(frame: &TunnelFrame) -> bool {
    matches!(frame, TunnelFrame::Delta { upserts, removed, .. } if upserts.is_empty() && removed.is_empty())
}

async fn acknowledge(State(context): State<Context>, body: Bytes) -> Response {
    let ack: TunnelAck = match serde_json::from_slice(&body) {
        Ok(ack) => ack,
        Err(error) => return refused(&error),
    };
    if ack.listening.len() > MAX_SOCKETS {
        return (StatusCode::BAD_REQUEST, "more ports than can be kept").into_response();
    }
    // Stored before anybody is told that the tunnel is there: its URL names the port.
    let news = context.link.news(&ack.listening);
    if let Err(error) = context.store.note_local_ports(&news).await {
        tracing::error!(
            error = &error as &dyn std::error::Error,
            "loopback ports cannot be stored"
        );
        return (StatusCode::SERVICE_UNAVAILABLE, "the store failed").into_response();
    }
    context.link.acknowledge(ack);
    done()
}
