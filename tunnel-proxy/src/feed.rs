//! Follows the controller. Owns: the feed connection, its heartbeats and reconnects, what a frame changes, and the
//! acknowledgement: the routes are served, their ports are open, and what was removed is cut.

mod client;
mod state;

use std::{sync::Arc, time::Duration};

use sandgate_api::{
    feed::HEARTBEAT_SECONDS,
    tunnel::{TunnelAck, TunnelFrame},
};
use tokio_util::sync::CancellationToken;

use self::state::Saved;
pub use self::{
    client::{ClientError, Controller},
    state::StateFile,
};
use crate::{app::Proxy, listeners::OwnPorts, tunnel::Tunnel};

/// Silence after which the connection counts as broken.
const SILENCE: Duration = Duration::from_secs(3 * HEARTBEAT_SECONDS);
/// Pauses between attempts, growing from one to the other.
const PAUSE: [Duration; 2] = [Duration::from_millis(50), Duration::from_secs(2)];

/// Follows the feed.
pub struct Feed {
    /// What is served.
    pub proxy: Arc<Proxy>,
    /// The way to the controller.
    pub controller: Controller,
    /// The tunnels' own ports, where they have some.
    pub ports: Option<OwnPorts>,
    /// What is kept across restarts.
    pub state: StateFile,
}

impl Feed {
    /// Serves what was served before this program was restarted.
    pub async fn restore(&mut self) {
        match self.state.load() {
            Ok(Some(saved)) => {
                let frame = TunnelFrame::Snapshot {
                    revision: saved.revision,
                    routes: saved.routes,
                };
                let none = self.proxy.table.apply(frame);
                debug_assert!(none.is_empty(), "nothing was served before");
                if let Some(ports) = &mut self.ports {
                    ports.follow(false).await;
                }
                self.proxy.metrics.serves(self.proxy.table.all().len());
                tracing::info!(revision = saved.revision, "the last routes are served again");
            }
            Ok(None) => {}
            Err(error) => {
                tracing::warn!(%error, "the saved routes cannot be read; waiting for the controller")
            }
        }
    }

    /// Follows the feed until the program ends.
    pub async fn follow(mut self, end: CancellationToken) {
        let mut pause = PAUSE[0];
        loop {
            let failed = tokio::select! {
                failed = self.connection(&mut pause) => failed,
                () = end.cancelled() => return,
            };
            tracing::warn!(error = %failed, "the feed is interrupted; the last routes are served on");
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = end.cancelled() => return,
            }
            pause = (pause * 2).min(PAUSE[1]);
        }
    }

    async fn connection(&mut self, pause: &mut Duration) -> ClientError {
        let mut frames = match self.controller.frames(self.proxy.table.revision()).await {
            Ok(frames) => frames,
            Err(error) => return error,
        };
        // A controller that comes back wants to hear it again.
        let mut is_acknowledged = false;
        loop {
            let frame = match tokio::time::timeout(SILENCE, frames.next()).await {
                Ok(Ok(frame)) => frame,
                Ok(Err(error)) => return error,
                Err(_elapsed) => return ClientError::Silent,
            };
            *pause = PAUSE[0];
            match &frame {
                // A controller that is further than we have heard: begin anew, with all we know.
                TunnelFrame::Heartbeat { revision } => {
                    if self.proxy.table.revision().is_some_and(|ours| ours < *revision) {
                        return ClientError::Behind;
                    }
                }
                TunnelFrame::Snapshot { .. } | TunnelFrame::Delta { .. } => {
                    self.apply(frame).await;
                    is_acknowledged = false;
                }
            }
            if !is_acknowledged && let Some(ack) = self.acknowledgement() {
                if let Err(error) = self.controller.post("/tunnels/ack", &ack).await {
                    return error;
                }
                tracing::debug!(revision = ack.revision, "acknowledged");
                is_acknowledged = true;
            }
        }
    }

    async fn apply(&mut self, frame: TunnelFrame) {
        let gone = self.proxy.table.apply(frame);
        close(&gone).await;
        if let Some(ports) = &mut self.ports {
            ports.follow(true).await;
        }
        let Some(revision) = self.proxy.table.revision() else {
            return;
        };
        let saved = Saved {
            revision,
            routes: self.proxy.table.routes(),
        };
        self.proxy.metrics.serves(saved.routes.len());
        if let Err(error) = self.state.save(&saved) {
            tracing::warn!(%error, "the routes cannot be saved: a restart will wait for the controller");
        }
    }

    fn acknowledgement(&self) -> Option<TunnelAck> {
        let mut errors = self.proxy.table.errors();
        let mut listening = Vec::new();
        if let Some(ports) = &self.ports {
            errors.extend(ports.errors());
            listening = ports.listening();
        }
        Some(TunnelAck {
            revision: self.proxy.table.revision()?,
            listening,
            errors,
        })
    }
}

/// Cuts everything under way on these tunnels, all at the same time.
pub async fn close(tunnels: &[Arc<Tunnel>]) {
    futures_util::future::join_all(tunnels.iter().map(|tunnel| tunnel.close())).await;
}
