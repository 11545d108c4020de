//! The way to tunnel-proxy: what it has acknowledged, and what it listens on.
//!
//! tunnel-proxy connects to the controller, never the other way round, by sockets passed over a channel of its own
//! ([`sandgate_api::control`]). The feed server ([`feed`]) tells it what to serve and hears what it serves. It faces
//! strangers, so there is nothing else to be had on that channel, above all no secret, and what comes from it is
//! bounded and believed only about itself.

mod feed;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use sandgate_api::{
    feed::Revision,
    id::TunnelId,
    tunnel::{Listening, TunnelAck},
};
use sandgate_daemon::{handover::Channel, tasks::Tasks};
use tokio::sync::{Semaphore, watch};

use crate::{config::MAX_TUNNELS, feedsocket, store::Store};

/// Sockets that tunnel-proxy may have open at once: it needs two, and twice as many for a moment when it restarts.
const MAX_SOCKETS: usize = 8;

/// Longest text taken over from tunnel-proxy, in characters.
const MAX_TEXT: usize = 512;

/// What tunnel-proxy says about itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ProxyState {
    /// It follows the feed.
    pub connected: bool,
    /// Everything up to this revision is served, but for refusals, and what was removed is cut.
    pub acknowledged: Revision,
    /// Open feed bodies: the new program may come before the old one is seen to end.
    followers: u32,
}

/// Whether a revision is in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Serving {
    /// It is.
    Applied,
    /// The tunnel cannot be served.
    Refused(String),
    /// tunnel-proxy has not said so in time.
    Pending,
}

/// The way to tunnel-proxy. Clones share it.
#[derive(Clone)]
pub struct ProxyLink {
    shared: Arc<Shared>,
}

struct Shared {
    state: watch::Sender<ProxyState>,
    said: Mutex<Said>,
}

#[derive(Default)]
struct Said {
    /// What it listened on when it last said so.
    ports: HashMap<TunnelId, u16>,
    /// By tunnel: the last revision at which it reported an error about it, and the error.
    refusals: HashMap<TunnelId, (Revision, String)>,
}

impl ProxyLink {
    /// Serves tunnel-proxy on its control channel until the tasks drain.
    pub fn start(channel: Channel, store: Store, tasks: &Tasks) -> Self {
        let link = Self {
            shared: Arc::new(Shared {
                state: watch::channel(ProxyState::default()).0,
                said: Mutex::default(),
            }),
        };
        let (serving, spawning) = (link.clone(), tasks.clone());
        let slots = Arc::new(Semaphore::new(MAX_SOCKETS));
        let opened = move |stream| {
            let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else {
                tracing::warn!("tunnel-proxy has too many sockets open");
                return;
            };
            let shutdown = spawning.shutdown();
            let router = feed::router(serving.clone(), store.clone(), shutdown.clone());
            spawning.spawn("tunnel feed connection", async move {
                feedsocket::serve(stream, router, shutdown).await;
                drop(slot);
            });
        };
        let accepting = feedsocket::accept(Arc::new(channel), "tunnel-proxy", tasks.shutdown(), opened);
        tasks.spawn("tunnel control channel", accepting);
        link
    }

    /// What tunnel-proxy says about itself.
    pub fn state(&self) -> ProxyState {
        self.shared.state.borrow().clone()
    }

    /// Waits until tunnel-proxy has acknowledged the revision, with what it says about this tunnel.
    pub async fn served(&self, revision: Revision, tunnel: &TunnelId, wait: Duration) -> Serving {
        let mut state = self.shared.state.subscribe();
        let acknowledged = state.wait_for(|state| state.acknowledged >= revision);
        match tokio::time::timeout(wait, acknowledged).await {
            Ok(Ok(_state)) => match self.said().refusals.get(tunnel) {
                Some((refused, message)) if *refused >= revision => Serving::Refused(message.clone()),
                Some(_) | None => Serving::Applied,
            },
            Ok(Err(_gone)) => Serving::Pending,
            Err(_elapsed) => Serving::Pending,
        }
    }

    /// Forgets what tunnel-proxy said about a tunnel that is gone.
    pub fn forget(&self, tunnel: &TunnelId) {
        self.said().refusals.remove(tunnel);
    }

    /// Those of the ports that are news.
    fn news(&self, listening: &[Listening]) -> Vec<Listening> {
        let said = self.said();
        listening
            .iter()
            .filter(|one| said.ports.get(&one.tunnel_id) != Some(&one.local_port))
            .cloned()
            .collect()
    }

    fn acknowledge(&self, ack: TunnelAck) {
        {
            let mut said = self.said();
            let ports = ack.listening.into_iter();
            said.ports = ports.map(|one| (one.tunnel_id, one.local_port)).collect();
            for error in ack.errors {
                let message: String = error
                    .message
                    .chars()
                    .filter(|character| !character.is_control())
                    .take(MAX_TEXT)
                    .collect();
                tracing::warn!(tunnel_id = %error.tunnel_id, message, "a tunnel cannot be served");
                let known = said.refusals.contains_key(&error.tunnel_id);
                if known || said.refusals.len() < MAX_TUNNELS as usize {
                    said.refusals.insert(error.tunnel_id, (ack.revision, message));
                }
            }
        }
        self.shared.state.send_if_modified(|state| {
            let newer = ack.revision > state.acknowledged;
            state.acknowledged = state.acknowledged.max(ack.revision);
            newer
        });
    }

    fn follow(&self) {
        self.shared.state.send_modify(|state| {
            state.followers += 1;
            state.connected = true;
        });
        tracing::info!("tunnel-proxy follows the feed");
    }

    fn unfollow(&self) {
        self.shared.state.send_modify(|state| {
            state.followers = state.followers.saturating_sub(1);
            state.connected = state.followers > 0;
        });
        tracing::info!("a feed connection of tunnel-proxy ended");
    }

    fn said(&self) -> MutexGuard<'_, Said> {
        self.shared.said.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
