//! The node that enforces: what it has acknowledged, and the way into its sandboxes.
//!
//! netd connects to the controller, never the other way round, by sockets passed over the control channel
//! ([`sandgate_api::control`]). The feed server ([`feed`]) tells it what to enforce and hears what it has
//! applied; [`sandgate_relay::inward`] asks it for connections into sandboxes. A netd that restarts passes fresh
//! sockets and is a new conversation; nothing here survives a conversation but what was acknowledged, which
//! stays enforced in the kernel.

mod feed;

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use sandgate_api::{
    audit::AlertKind,
    feed::{FeedAck, HEARTBEAT_SECONDS, Revision},
    id::SandboxId,
};
use sandgate_daemon::{handover::Channel, tasks::Tasks};
use sandgate_relay::inward::Dialer;
use tokio::{
    net::TcpStream,
    sync::{Notify, watch},
};

pub use sandgate_relay::inward::DialFailure;

use crate::{alerts::Alerts, broker::Broker, feedsocket, store::Store};

/// Most sandboxes whose last refusal is remembered.
const MAX_REFUSALS: usize = 10_000;

/// Silence of the node after which it is not ready.
const SILENCE: Duration = Duration::from_secs(3 * HEARTBEAT_SECONDS);

/// Longest text taken over from the node, in characters.
const MAX_TEXT: usize = 512;

/// Name of the one node of an embedded installation.
pub const LOCAL_NODE: &str = "local";

/// What the node says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeState {
    /// It follows the feed.
    pub connected: bool,
    /// Its canaries are green and it takes new sandboxes. Never true while it is not connected.
    pub ready: bool,
    /// Why it is not ready.
    pub reason: Option<String>,
    /// Whether packets of IPv4 may leave it without passing through netd, which rules for UDP need. As it last said, also
    /// while it is not connected; before that, the reason is that it has said nothing yet.
    pub kernel_pass: Result<(), String>,
    /// The same of IPv6, never without the other.
    pub kernel_pass6: Result<(), String>,
    /// Everything up to this revision is enforced, but for refusals.
    pub acknowledged: Revision,
    /// Open feed bodies: while netd restarts, the new one may come before the old one is seen to end.
    followers: u32,
}

impl Default for NodeState {
    fn default() -> Self {
        Self {
            connected: false,
            ready: false,
            reason: None,
            kernel_pass: Err("the node has not reported yet".to_owned()),
            kernel_pass6: Err("the node has not reported yet".to_owned()),
            acknowledged: 0,
            followers: 0,
        }
    }
}

/// Whether a revision is in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Enforcement {
    /// It is.
    Applied,
    /// The node cannot enforce it for the sandbox, which is denied everything.
    Refused(String),
    /// The node has not said so in time.
    Pending,
}

/// The way to the node. Clones share it.
#[derive(Clone)]
pub struct NodeLink {
    shared: Arc<Shared>,
}

struct Shared {
    state: watch::Sender<NodeState>,
    /// By sandbox: the last revision at which the node reported an error about it, and the error.
    refusals: Mutex<HashMap<SandboxId, (Revision, String)>>,
    dialer: Dialer,
    /// Audit records that were stored.
    records: AtomicU64,
    /// Which of them are alerts. Held while a batch is stored.
    alerts: tokio::sync::Mutex<Alerts>,
    /// Alerts that were stored, by kind, in the order of all kinds.
    raised: Vec<AtomicU64>,
    /// Told with every acknowledgement.
    heard: Notify,
}

impl NodeLink {
    /// Serves the node on its control channel until the tasks drain.
    pub fn start(channel: Channel, store: Store, broker: Broker, tasks: &Tasks) -> Self {
        let channel = Arc::new(channel);
        let shared = Arc::new(Shared {
            state: watch::channel(NodeState::default()).0,
            refusals: Mutex::default(),
            dialer: Dialer::new(Arc::clone(&channel), tasks.clone()),
            records: AtomicU64::new(0),
            alerts: tokio::sync::Mutex::default(),
            raised: AlertKind::ALL.iter().map(|_kind| AtomicU64::new(0)).collect(),
            heard: Notify::new(),
        });
        let link = Self { shared };
        let (serving, spawning) = (link.clone(), tasks.clone());
        let opened = move |stream| {
            let shutdown = spawning.shutdown();
            let context = (store.clone(), broker.clone());
            let router = feed::router(serving.clone(), context, shutdown.clone());
            spawning.spawn("feed connection", feedsocket::serve(stream, router, shutdown));
        };
        let accepting = feedsocket::accept(channel, "netd", tasks.shutdown(), opened);
        tasks.spawn("control channel", accepting);
        let (listening, shutdown) = (link.clone(), tasks.shutdown());
        tasks.spawn("node silence", async move {
            tokio::select! {
                () = listening.notice_silence(SILENCE) => {}
                () = shutdown.cancelled() => {}
            }
        });
        link
    }

    /// What the node says about itself.
    pub fn state(&self) -> NodeState {
        self.shared.state.borrow().clone()
    }

    /// The same, to wait for changes.
    pub fn watch(&self) -> watch::Receiver<NodeState> {
        self.shared.state.subscribe()
    }

    /// Has the node connect to a port inside a sandbox.
    ///
    /// # Errors
    /// When the node is away, or what it says.
    pub async fn dial(&self, id: &SandboxId, port: u16) -> Result<TcpStream, DialFailure> {
        self.shared.dialer.dial(id, port).await
    }

    /// Waits until the node has acknowledged the revision, with what it says about these sandboxes.
    pub async fn enforced(&self, revision: Revision, concerns: &[SandboxId], wait: Duration) -> Enforcement {
        let mut state = self.watch();
        let acknowledged = state.wait_for(|state| state.acknowledged >= revision);
        match tokio::time::timeout(wait, acknowledged).await {
            Ok(Ok(_state)) => self.outcome(revision, concerns),
            Ok(Err(_gone)) => Enforcement::Pending,
            Err(_elapsed) => Enforcement::Pending,
        }
    }

    /// The same without waiting.
    pub fn is_enforced(&self, revision: Revision, concerns: &[SandboxId]) -> Enforcement {
        if self.shared.state.borrow().acknowledged < revision {
            return Enforcement::Pending;
        }
        self.outcome(revision, concerns)
    }

    fn outcome(&self, revision: Revision, concerns: &[SandboxId]) -> Enforcement {
        let refusals = self
            .shared
            .refusals
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        concerns
            .iter()
            .filter_map(|id| refusals.get(id))
            .find(|(refused, _)| *refused >= revision)
            .map_or(Enforcement::Applied, |(_, message)| {
                Enforcement::Refused(message.clone())
            })
    }

    /// Forgets what the node said about a sandbox that is gone.
    pub fn forget(&self, id: &SandboxId) {
        self.shared
            .refusals
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(id);
    }

    /// How many audit records the node delivered and the store took, those it has delivered twice included.
    pub fn records_stored(&self) -> u64 {
        self.shared.records.load(Ordering::Relaxed)
    }

    /// How many of them are alerts, by kind.
    pub fn alerts_stored(&self) -> impl Iterator<Item = (AlertKind, u64)> {
        let raised = self.shared.raised.iter();
        let counts = AlertKind::ALL.iter().zip(raised);
        counts.map(|(kind, count)| (*kind, count.load(Ordering::Relaxed)))
    }

    fn count_alert(&self, raised: AlertKind) {
        let mut kinds = AlertKind::ALL.iter().zip(&self.shared.raised);
        if let Some((_, count)) = kinds.find(|(kind, _)| **kind == raised) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A node that hangs keeps its connections; what it says no more is that all is well.
    async fn notice_silence(&self, limit: Duration) {
        loop {
            let heard = self.shared.heard.notified();
            if tokio::time::timeout(limit, heard).await.is_ok() {
                continue;
            }
            self.shared.state.send_if_modified(|state| {
                let was_ready = std::mem::replace(&mut state.ready, false);
                if was_ready {
                    let reason = format!("the node has been silent for {} s", limit.as_secs());
                    tracing::warn!(node = LOCAL_NODE, reason, "the node's readiness changed");
                    state.reason = Some(reason);
                }
                was_ready
            });
        }
    }

    fn follow(&self) {
        self.shared.state.send_modify(|state| {
            state.followers += 1;
            state.connected = true;
            state.ready = false;
            state.reason = Some("the node has not reported yet".to_owned());
        });
        tracing::info!(node = LOCAL_NODE, "the node follows the feed");
    }

    fn unfollow(&self) {
        self.shared.state.send_modify(|state| {
            state.followers = state.followers.saturating_sub(1);
            if state.followers == 0 {
                state.connected = false;
                state.ready = false;
                state.reason = Some("the node does not follow the feed".to_owned());
            }
        });
        tracing::info!(node = LOCAL_NODE, "a feed connection of the node ended");
    }

    fn acknowledge(&self, ack: FeedAck) {
        self.shared.heard.notify_one();
        {
            let mut refusals = self
                .shared
                .refusals
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            for error in ack.errors {
                let message: String = clean(&error.message);
                tracing::warn!(sandbox_id = %error.sandbox_id, message, "the node cannot enforce a policy");
                if refusals.len() < MAX_REFUSALS || refusals.contains_key(&error.sandbox_id) {
                    refusals.insert(error.sandbox_id, (ack.revision, message));
                }
            }
        }
        self.shared.state.send_if_modified(|state| {
            let before = state.clone();
            state.acknowledged = state.acknowledged.max(ack.revision);
            state.ready = ack.ready && state.connected;
            state.reason = ack
                .not_ready_reason
                .as_deref()
                .map(clean)
                .filter(|_| !state.ready);
            state.kernel_pass = passes(ack.kernel_pass, ack.no_kernel_pass_reason.as_deref());
            state.kernel_pass6 = passes(ack.kernel_pass6, ack.no_kernel_pass6_reason.as_deref());
            if before.ready != state.ready {
                tracing::info!(
                    node = LOCAL_NODE,
                    ready = state.ready,
                    reason = state.reason,
                    "the node's readiness changed"
                );
            }
            before != *state
        });
    }
}

fn passes(so: bool, why_not: Option<&str>) -> Result<(), String> {
    if so {
        return Ok(());
    }
    Err(clean(why_not.unwrap_or("the node did not say why")))
}

fn clean(text: &str) -> String {
    text.chars()
        .filter(|character| !character.is_control())
        .take(MAX_TEXT)
        .collect()
}

#[cfg(test)]
mod tests;
