//! The feed server: HTTP/1.1 on sockets that netd passed in.

use std::{convert::Infallible, sync::atomic::Ordering, time::Duration};

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
    credential::{CaRequest, CredentialRequest},
    feed::{AuditBatch, FeedAck, FeedFrame, HEARTBEAT_SECONDS, Revision},
};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::NodeLink;
use crate::{
    broker::{Broker, BrokerError},
    feedsocket::{done, line, refused},
    store::{Store, StoreError},
};

/// Largest acknowledgement or batch of records, in bytes.
const MAX_BODY: usize = 16 * 1024 * 1024;

#[derive(Clone)]
struct Context {
    link: NodeLink,
    store: Store,
    broker: Broker,
    shutdown: CancellationToken,
}

#[derive(Debug, Deserialize)]
struct Position {
    node: String,
    since: Option<Revision>,
}

/// Everything that netd may ask.
pub(super) fn router(
    link: NodeLink,
    (store, broker): (Store, Broker),
    shutdown: CancellationToken,
) -> Router {
    Router::new()
        .route("/feed", get(follow))
        .route("/feed/ack", post(acknowledge))
        .route("/feed/audit", post(audit))
        .route("/feed/credential", post(credential))
        .route("/feed/ca", post(authority))
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(Context {
            link,
            store,
            broker,
            shutdown,
        })
}

async fn follow(State(context): State<Context>, Query(position): Query<Position>) -> Response {
    if position.node != super::LOCAL_NODE {
        return (StatusCode::NOT_FOUND, "no such node").into_response();
    }
    let follower = Follower {
        revision: context.store.watch_revision(),
        position: Point::Start(position.since),
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

/// The node counts as connected while this exists.
struct Connected(NodeLink);

impl Connected {
    fn new(link: NodeLink) -> Self {
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
    _connected: Connected,
}

impl Follower {
    /// The next line; none when the store fails, so that the node comes back for a fresh start.
    async fn next(&mut self) -> Option<Bytes> {
        let since = match self.position {
            Point::Start(since) => since,
            Point::After(sent) => {
                let heartbeat = tokio::time::sleep(Duration::from_secs(HEARTBEAT_SECONDS));
                tokio::select! {
                    () = self.context.shutdown.cancelled() => return None,
                    changed = self.revision.wait_for(|revision| *revision > sent) => {
                        changed.ok()?;
                    }
                    () = heartbeat => return line(&FeedFrame::Heartbeat { revision: sent }),
                }
                Some(sent)
            }
        };
        let change = match self.context.store.feed_since(since).await {
            Ok(change) => change,
            Err(error) => {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "the feed cannot be read"
                );
                return None;
            }
        };
        self.position = Point::After(change.revision);
        line(&change.frame)
    }
}

async fn acknowledge(State(context): State<Context>, body: Bytes) -> Response {
    let ack: FeedAck = match serde_json::from_slice(&body) {
        Ok(ack) => ack,
        Err(error) => return refused(&error),
    };
    context.link.acknowledge(ack);
    done()
}

async fn audit(State(context): State<Context>, body: Bytes) -> Response {
    let mut batch: AuditBatch = match serde_json::from_slice(&body) {
        Ok(batch) => batch,
        Err(error) => return refused(&error),
    };
    let mut alerts = context.link.shared.alerts.lock().await;
    let raised = alerts.mark(&mut batch.events);
    match context
        .store
        .insert_audit(context.broker.chain(), &batch.events)
        .await
    {
        Ok(()) => {
            let count = u64::try_from(batch.events.len()).unwrap_or(u64::MAX);
            context.link.shared.records.fetch_add(count, Ordering::Relaxed);
            for alert in raised {
                tracing::warn!(target: "audit", sandbox_id = %alert.sandbox_id, alert = alert.kind.as_str(), "security.alert");
                context.link.count_alert(alert.kind);
            }
            done()
        }
        Err(error) => {
            alerts.unmark(raised);
            failed(&error)
        }
    }
}

async fn credential(State(context): State<Context>, body: Bytes) -> Response {
    match serde_json::from_slice::<CredentialRequest>(&body) {
        Ok(request) => lease("credential", &context.broker.credential(&request).await),
        Err(error) => refused(&error),
    }
}

async fn authority(State(context): State<Context>, body: Bytes) -> Response {
    match serde_json::from_slice::<CaRequest>(&body) {
        Ok(request) => lease("certificate authority", &context.broker.authority(&request).await),
        Err(error) => refused(&error),
    }
}

/// What is leased goes into the answer and nowhere else.
fn lease<T: Serialize>(what: &'static str, lease: &Result<Option<T>, BrokerError>) -> Response {
    let lease = match lease {
        Ok(Some(lease)) => lease,
        Ok(None) => return (StatusCode::NOT_FOUND, format!("no such {what}")).into_response(),
        Err(error) => {
            tracing::error!(
                error = error as &dyn std::error::Error,
                what,
                "no lease can be given"
            );
            return (
                StatusCode::SERVICE_UNAVAILABLE,
                format!("no {what} at the moment"),
            )
                .into_response();
        }
    };
    match serde_json::to_vec(lease) {
        Ok(text) => (
            [
                (http::header::CONTENT_TYPE, "application/json"),
                (http::header::CACHE_CONTROL, "no-store"),
            ],
            text,
        )
            .into_response(),
        Err(_unwritable) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

fn failed(error: &StoreError) -> Response {
    tracing::error!(
        error = error as &dyn std::error::Error,
        "audit records cannot be stored"
    );
    (StatusCode::SERVICE_UNAVAILABLE, "the store failed").into_response()
}
