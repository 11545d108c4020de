//! Follows the controller. Owns: the feed connection, its heartbeats and reconnects, and the
//! acknowledgements. What a frame means for the node is [`enforce`]; what is kept across restarts is
//! [`state`].

mod client;
pub mod enforce;
mod state;

use std::{sync::Arc, time::Duration};

use sandgate_api::feed::{FeedAck, FeedFrame, HEARTBEAT_SECONDS, Revision};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use self::enforce::Enforcer;
pub use self::{
    client::{ClientError, Controller},
    state::StateFile,
};

/// Silence after which the connection counts as broken.
const SILENCE: Duration = Duration::from_secs(3 * HEARTBEAT_SECONDS);
/// Pauses between attempts, growing from one to the other.
const PAUSE: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(3)];

/// Whether the node may get sandboxes; the reason why not.
pub type Ready = Result<(), String>;

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
    pub errors: Vec<sandgate_api::feed::FeedError>,
    /// Counts connections: a controller that comes back wants to hear it again.
    pub connection: u64,
}

impl Feed {
    /// Follows the feed until the program ends.
    pub async fn follow(self, mut enforcer: Enforcer, end: CancellationToken) {
        let mut pause = PAUSE[0];
        let mut connection = 0;
        loop {
            connection += 1;
            let failed = tokio::select! {
                failed = self.connection(&mut enforcer, connection, &mut pause) => failed,
                () = end.cancelled() => return,
            };
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
        connection: u64,
        pause: &mut Duration,
    ) -> ClientError {
        let mut frames = match self.controller.frames(&self.node, enforcer.revision()).await {
            Ok(frames) => frames,
            Err(error) => return error,
        };
        loop {
            let frame = match tokio::time::timeout(SILENCE, frames.next()).await {
                Ok(Ok(frame)) => frame,
                Ok(Err(error)) => return error,
                Err(_elapsed) => return ClientError::Silent,
            };
            *pause = PAUSE[0];
            let heartbeat = match &frame {
                FeedFrame::Heartbeat { revision } => Some(*revision),
                FeedFrame::Snapshot { .. } | FeedFrame::Delta { .. } => None,
            };
            match heartbeat {
                None => enforcer.apply(&frame).await,
                // A controller that is further than we have heard: begin anew, with all we know.
                Some(revision) if enforcer.revision().is_some_and(|ours| ours < revision) => {
                    return ClientError::Behind;
                }
                Some(_) => enforcer.retry().await,
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
        }
    }
}

/// Tells the controller what is in force, whenever that or the readiness changes.
pub async fn acknowledge(
    controller: Arc<Controller>,
    mut enforced: watch::Receiver<Option<Enforced>>,
    mut ready: watch::Receiver<Ready>,
) {
    let mut pause = PAUSE[0];
    loop {
        let ack = {
            let readiness = ready.borrow_and_update().clone();
            enforced.borrow_and_update().clone().map(|enforced| FeedAck {
                revision: enforced.revision,
                ready: readiness.is_ok(),
                not_ready_reason: readiness.err(),
                kernel_pass: false,
                errors: enforced.errors,
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
                    changed = ready.changed() => changed.is_err(),
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
