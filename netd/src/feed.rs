//! Follows the controller. Owns: the feed connection, its heartbeats and reconnects, and the
//! acknowledgements. What a frame means for the node is [`enforce`], whether it may mean anything [`sequence`]; what is
//! kept across restarts is [`state`].

mod client;
pub mod enforce;
mod sequence;
mod state;

use std::{sync::Arc, time::Duration};

use sandgate_api::feed::{FeedAck, FeedError, FeedFrame, HEARTBEAT_SECONDS, Revision};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

pub use self::{
    client::{ClientError, Controller},
    state::StateFile,
};
use self::{enforce::Enforcer, sequence::Sequence};
use crate::uplink::Passing;

/// Silence after which the connection counts as broken.
const SILENCE: Duration = Duration::from_secs(3 * HEARTBEAT_SECONDS);
/// Pauses between attempts, growing from one to the other.
const PAUSE: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(3)];

/// What the canaries said of the node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    /// Whether it may get sandboxes; the reason why not.
    pub ready: Result<(), String>,
    /// Whether packets may leave it without passing through netd, by family; the reason why not.
    pub kernel_pass: Passing,
    /// Sandboxes that ceased to be enforced without a change of their rules; nothing passes to or from them.
    pub lost: Vec<FeedError>,
}

/// Follows the feed and acknowledges it.
pub struct Feed {
    /// The way to the controller.
    pub controller: Arc<Controller>,
    /// This node's name.
    pub node: String,
    /// What is in force, for the acknowledger.
    pub enforced: watch::Sender<Option<Enforced>>,
}

/// What is in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Enforced {
    /// Up to this revision.
    pub revision: Revision,
    /// But for these.
    pub errors: Vec<FeedError>,
    /// Counts connections: a controller that comes back wants to hear it again.
    pub connection: u64,
}

impl Feed {
    /// Follows the feed until the program ends.
    pub async fn follow(self, mut enforcer: Enforcer, end: CancellationToken) {
        let mut pause = PAUSE[0];
        let mut connection = 0;
        let mut anew = false;
        loop {
            connection += 1;
            let since = enforcer.revision().filter(|_| !anew);
            let failed = tokio::select! {
                failed = self.connection(&mut enforcer, since, connection, &mut pause) => failed,
                () = end.cancelled() => return,
            };
            anew = matches!(failed, ClientError::OutOfOrder);
            tracing::warn!(error = %failed, "the feed is interrupted; the last state stays in force");
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = end.cancelled() => return,
            }
            pause = (pause * 2).min(PAUSE[1]);
        }
    }

    async fn connection(
        &self,
        enforcer: &mut Enforcer,
        since: Option<Revision>,
        connection: u64,
        pause: &mut Duration,
    ) -> ClientError {
        let mut frames = match self.controller.frames(&self.node, since).await {
            Ok(frames) => frames,
            Err(error) => return error,
        };
        let mut sequence = Sequence::after(since);
        loop {
            let (frame, line) = match tokio::time::timeout(SILENCE, frames.next()).await {
                Ok(Ok(next)) => next,
                Ok(Err(error)) => return error,
                Err(_elapsed) => return ClientError::Silent,
            };
            if !sequence.takes(&frame) {
                return ClientError::OutOfOrder;
            }
            *pause = PAUSE[0];
            match frame {
                FeedFrame::Snapshot { .. } | FeedFrame::Delta { .. } => enforcer.apply(frame, &line).await,
                FeedFrame::Heartbeat { .. } => enforcer.retry().await,
            }
            if let Some(revision) = enforcer.revision() {
                let enforced = Enforced {
                    revision,
                    errors: enforcer.errors(),
                    connection,
                };
                self.enforced.send_if_modified(|before| {
                    let is_new = before.as_ref() != Some(&enforced);
                    *before = Some(enforced);
                    is_new
                });
            }
            drop(line);
            enforcer.tidy();
        }
    }
}

/// Tells the controller what is in force, whenever that or the readiness changes, and again with every heartbeat: a
/// netd that says nothing is one that does nothing.
pub async fn acknowledge(
    controller: Arc<Controller>,
    mut enforced: watch::Receiver<Option<Enforced>>,
    mut standing: watch::Receiver<Standing>,
) {
    let mut pause = PAUSE[0];
    loop {
        let ack = {
            let standing = standing.borrow_and_update().clone();
            enforced.borrow_and_update().clone().map(|enforced| FeedAck {
                revision: enforced.revision,
                ready: standing.ready.is_ok(),
                not_ready_reason: standing.ready.err(),
                kernel_pass: standing.kernel_pass.ipv4.is_ok(),
                no_kernel_pass_reason: standing.kernel_pass.ipv4.err(),
                kernel_pass6: standing.kernel_pass.ipv6.is_ok(),
                no_kernel_pass6_reason: standing.kernel_pass.ipv6.err(),
                errors: enforced.errors.into_iter().chain(standing.lost).collect(),
            })
        };
        let Some(ack) = ack else {
            if enforced.changed().await.is_err() {
                return;
            }
            continue;
        };
        match controller.post("/feed/ack", &ack).await {
            Ok(()) => {
                tracing::debug!(revision = ack.revision, ready = ack.ready, "acknowledged");
                pause = PAUSE[0];
                let closed = tokio::select! {
                    changed = enforced.changed() => changed.is_err(),
                    changed = standing.changed() => changed.is_err(),
                    () = tokio::time::sleep(Duration::from_secs(HEARTBEAT_SECONDS)) => false,
                };
                if closed {
                    return;
                }
            }
            Err(error) => {
                tracing::warn!(%error, "cannot acknowledge, trying again");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(PAUSE[1]);
            }
        }
    }
}
