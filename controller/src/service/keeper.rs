//! One task per live sandbox: carries out what [`crate::lifecycle`] asks for.
//!
//! Nobody else changes a live sandbox's status, so there are no two hands on one sandbox.

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, PoisonError},
    time::{Duration, Instant},
};

use sandgate_api::{
    agent::AGENT_PORT,
    feed::{Endpoint, Revision},
    id::SandboxId,
    rest::StartupBreakdown,
};
use tokio::sync::{mpsc, watch};

use super::{Service, Shared};
use crate::{
    agent::Agent,
    backend::{BackendError, Isolation, LaunchSpec, LocalBackend},
    lifecycle::{self, Cause, Effect, Event, Next, State},
    node::Enforcement,
    store::{SandboxRecord, StoreError},
};

/// How long the node may take to acknowledge a new sandbox.
const ENFORCE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the agent of a new sandbox may take to answer.
const GREET_TIMEOUT: Duration = Duration::from_secs(15);

/// How long an ending waits for the node to forget the sandbox, before its address may be leased again. A
/// node that is away hears of the end and of the next lease in one frame, so waiting longer gains nothing.
const WITHDRAW_TIMEOUT: Duration = Duration::from_secs(3);

/// How long the answer to a failed creation waits for the clean-up.
const CLEANUP_TIMEOUT: Duration = Duration::from_secs(5);

/// Longest pause between two attempts to take a sandbox away.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Why a creation failed, for whoever asked for it.
#[derive(Debug, Clone)]
pub(super) enum Failure {
    /// It does not fit beside the others.
    NoCapacity(String),
    /// The backend cannot make anything of it.
    Invalid { field: &'static str, message: String },
    /// The node cannot enforce its policy.
    NotEnforceable(String),
    /// The node did not acknowledge in time.
    NodeSilent,
    /// Our fault; the log has it.
    Internal,
}

/// What can be seen of a keeper.
#[derive(Debug, Clone)]
pub(super) struct Progress {
    pub(super) state: State,
    pub(super) failure: Option<Failure>,
    pub(super) breakdown: StartupBreakdown,
}

/// A handle on the task.
pub(super) struct Keeper {
    ends: mpsc::Sender<Cause>,
    progress: watch::Receiver<Progress>,
}

impl Keeper {
    /// Asks for the end. The first cause counts.
    pub(super) fn end(&self, cause: Cause) -> watch::Receiver<Progress> {
        // Full or closed: an end is under way already.
        let _under_way = self.ends.try_send(cause);
        self.progress.clone()
    }
}

/// Waits until the sandbox is gone.
pub(super) async fn gone(mut progress: watch::Receiver<Progress>) {
    // An error means that the keeper ended, which it does only then (or with the controller).
    let _ended = progress
        .wait_for(|progress| matches!(progress.state, State::Ended(_)))
        .await;
}

/// Waits until the sandbox runs or is gone, so that its quota is free again when a failure is told. One that
/// cannot be taken away at once does not hold the answer up.
pub(super) async fn settled(mut progress: watch::Receiver<Progress>) -> Option<Progress> {
    let made = progress.wait_for(|progress| !matches!(progress.state, State::Creating { .. }));
    made.await.ok()?;
    let over = progress.wait_for(|progress| matches!(progress.state, State::Running | State::Ended(_)));
    let _in_time = tokio::time::timeout(CLEANUP_TIMEOUT, over).await.map(drop);
    let last = progress.borrow().clone();
    Some(last)
}

impl Service {
    /// Starts looking after a sandbox that stands in the store as live.
    pub(super) fn keep(
        &self,
        backend: Arc<LocalBackend>,
        record: SandboxRecord,
        state: State,
    ) -> watch::Receiver<Progress> {
        let (ends, ending) = mpsc::channel(1);
        let (sender, progress) = watch::channel(Progress {
            state,
            failure: None,
            breakdown: StartupBreakdown::default(),
        });
        let keeper = Keeper {
            ends,
            progress: progress.clone(),
        };
        let id = record.id.clone();
        self.shared
            .keepers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(id.clone(), keeper);
        let work = Work {
            shared: Arc::clone(&self.shared),
            backend,
            record,
        };
        let shared = Arc::clone(&self.shared);
        // Of its own: its life is longer than the request that began it.
        let span = tracing::info_span!(parent: None, "sandbox", sandbox_id = %id);
        self.shared.tasks.spawn_within("keeper", &span, async move {
            Box::pin(run(Arc::new(work), state, ending, sender)).await;
            shared
                .keepers
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .remove(&id);
            shared.node.forget(&id);
        });
        progress
    }
}

type Doing = Pin<Box<dyn Future<Output = Outcome> + Send>>;

/// How an effect ended.
struct Outcome {
    event: Event,
    note: Note,
}

/// What an effect leaves for later ones.
enum Note {
    Nothing,
    Endpoint(Endpoint),
    Revision(Revision),
    Failure(Failure),
}

/// What effects hand to each other.
#[derive(Default)]
struct Made {
    endpoint: Option<Endpoint>,
    revision: Revision,
}

async fn run(
    work: Arc<Work>,
    mut state: State,
    mut ending: mpsc::Receiver<Cause>,
    progress: watch::Sender<Progress>,
) {
    let shutdown = work.shared.tasks.shutdown();
    let mut made = Made::default();
    let Some(first) = state.effect() else { return };
    let mut doing = work.begin(first, &made);
    let mut effect = first;
    let mut began = Instant::now();
    loop {
        let outcome = tokio::select! {
            biased;
            Some(cause) = ending.recv() => Outcome { event: Event::End(cause), note: Note::Nothing },
            outcome = &mut doing => outcome,
            // What runs goes on running without the controller, and the next one adopts it.
            () = shutdown.cancelled(), if state == State::Running => return,
        };
        let mut failure = None;
        match outcome.note {
            Note::Nothing => {}
            Note::Endpoint(endpoint) => made.endpoint = Some(endpoint),
            Note::Revision(revision) => made.revision = revision,
            Note::Failure(why) => failure = Some(why),
        }
        let (after, next) = lifecycle::step(state, outcome.event);
        tracing::debug!(sandbox_id = %work.record.id, ?state, event = ?outcome.event, ?after, "lifecycle");
        state = after;
        let took = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        let finished = (outcome.event == Event::Done).then_some(effect);
        if let Next::Begin(begun) = next {
            doing = work.begin(begun, &made);
            effect = begun;
            began = Instant::now();
        }
        progress.send_modify(|progress| {
            progress.state = state;
            progress.failure = progress.failure.take().or(failure);
            match finished {
                Some(Effect::Prepare) => progress.breakdown.prepare_ms = took,
                Some(Effect::AwaitEnforced) => progress.breakdown.enforce_ms = took,
                Some(Effect::Launch) => progress.breakdown.launch_ms = took,
                Some(Effect::Greet) => progress.breakdown.agent_ms = took,
                Some(_) | None => {}
            }
        });
        if let State::Ended(cause) = state {
            tracing::info!(sandbox_id = %work.record.id, org_id = %work.record.org_id, reason = cause.reason(), "a sandbox ended");
            return;
        }
    }
}

/// What a keeper works with.
struct Work {
    shared: Arc<Shared>,
    backend: Arc<LocalBackend>,
    record: SandboxRecord,
}

impl Work {
    fn begin(self: &Arc<Self>, effect: Effect, made: &Made) -> Doing {
        let work = Arc::clone(self);
        match effect {
            Effect::Prepare => Box::pin(async move { work.prepare().await }),
            Effect::Announce => {
                let endpoint = made.endpoint.clone();
                Box::pin(async move { work.announce(endpoint).await })
            }
            Effect::AwaitEnforced => {
                let revision = made.revision;
                Box::pin(async move { work.await_enforced(revision).await })
            }
            Effect::Launch => Box::pin(async move { work.launch().await }),
            Effect::Greet => Box::pin(async move { work.greet().await }),
            Effect::RecordRunning => Box::pin(async move { work.record_running().await }),
            Effect::Watch => Box::pin(async move { work.watch().await }),
            Effect::Withdraw { failures } => Box::pin(async move { work.withdraw(failures).await }),
            Effect::Destroy { failures } => Box::pin(async move { work.destroy(failures).await }),
            Effect::RecordEnd { cause, failures } => {
                Box::pin(async move { work.record_end(cause, failures).await })
            }
        }
    }

    fn id(&self) -> &SandboxId {
        &self.record.id
    }

    fn launch_spec(&self) -> LaunchSpec {
        let spec = &self.record.spec;
        LaunchSpec {
            sandbox_id: self.id().clone(),
            cpu_millis: spec.cpus.millis(),
            memory_bytes: spec.memory.bytes(),
            pids: spec.pids,
            disk_bytes: spec.disk.bytes(),
            env: spec.env.clone(),
            agent_key: self.shared.installation.agent_key(self.id()),
            ca_certificate: self
                .record
                .authority
                .as_ref()
                .map(|authority| authority.certificate.clone()),
            isolation: match spec.isolation {
                sandgate_api::rest::Isolation::Container => Isolation::Container,
            },
        }
    }

    async fn prepare(&self) -> Outcome {
        match self.backend.prepare(&self.launch_spec()).await {
            Ok(endpoint) => Outcome {
                event: Event::Done,
                note: Note::Endpoint(endpoint),
            },
            Err(error) => self.backend_failed("prepare", &error),
        }
    }

    async fn announce(&self, endpoint: Option<Endpoint>) -> Outcome {
        let Some(endpoint) = endpoint else {
            tracing::error!(sandbox_id = %self.id(), "announced before it was prepared");
            return failed(Failure::Internal);
        };
        match self.shared.store.announce(self.id(), &endpoint).await {
            Ok(revision) => Outcome {
                event: Event::Done,
                note: Note::Revision(revision),
            },
            Err(error) => self.store_failed("announce", &error),
        }
    }

    async fn await_enforced(&self, revision: Revision) -> Outcome {
        let concerns = [self.id().clone()];
        match self
            .shared
            .node
            .enforced(revision, &concerns, ENFORCE_TIMEOUT)
            .await
        {
            Enforcement::Applied => done(),
            Enforcement::Refused(message) => failed(Failure::NotEnforceable(message)),
            Enforcement::Pending => {
                tracing::warn!(sandbox_id = %self.id(), revision, "the node did not acknowledge a new sandbox in time");
                failed(Failure::NodeSilent)
            }
        }
    }

    async fn launch(&self) -> Outcome {
        match self.backend.launch(&self.launch_spec()).await {
            Ok(metrics) => {
                tracing::debug!(sandbox_id = %self.id(), ?metrics, "launched");
                done()
            }
            Err(error) => self.backend_failed("launch", &error),
        }
    }

    async fn greet(&self) -> Outcome {
        let greeting = async {
            let stream = self
                .shared
                .node
                .dial(self.id(), AGENT_PORT)
                .await
                .map_err(|error| error.to_string())?;
            let agent = Agent::new(stream, &self.shared.installation.agent_key(self.id()));
            agent.ping().await.map_err(|error| error.to_string())
        };
        let error = match tokio::time::timeout(GREET_TIMEOUT, greeting).await {
            Ok(Ok(())) => return done(),
            Ok(Err(error)) => error,
            Err(_elapsed) => "no answer in time".to_owned(),
        };
        tracing::error!(sandbox_id = %self.id(), error, "the agent of a new sandbox does not answer");
        failed(Failure::Internal)
    }

    async fn record_running(&self) -> Outcome {
        match self.shared.store.mark_running(self.id()).await {
            Ok(()) => done(),
            Err(error) => self.store_failed("record", &error),
        }
    }

    /// Ends with the sandbox's life, which is announced as an event of its own.
    async fn watch(&self) -> Outcome {
        let left = self.record.expires_at.duration_since(super::now());
        let left = Duration::try_from(left).unwrap_or(Duration::ZERO);
        let cause = tokio::select! {
            () = self.backend.wait_exit(self.id()) => Cause::Died,
            () = tokio::time::sleep(left) => Cause::Expired,
        };
        Outcome {
            event: Event::End(cause),
            note: Note::Nothing,
        }
    }

    async fn withdraw(&self, failures: u32) -> Outcome {
        pause(failures).await;
        match self.shared.store.withdraw(self.id()).await {
            Ok(None) => done(),
            Ok(Some(revision)) => {
                if self.shared.node.state().connected {
                    let forgotten = self.shared.node.enforced(revision, &[], WITHDRAW_TIMEOUT).await;
                    if forgotten != Enforcement::Applied {
                        tracing::warn!(sandbox_id = %self.id(), "the node has not acknowledged a sandbox's end yet");
                    }
                }
                done()
            }
            Err(error) => self.store_failed("withdraw", &error),
        }
    }

    async fn destroy(&self, failures: u32) -> Outcome {
        pause(failures).await;
        match self.backend.destroy(self.id()).await {
            Ok(()) => done(),
            Err(error) => self.backend_failed("destroy", &error),
        }
    }

    async fn record_end(&self, cause: Cause, failures: u32) -> Outcome {
        pause(failures).await;
        let ended = self
            .shared
            .store
            .finish(self.id(), cause.status(), Some(cause.reason()), super::now());
        match ended.await {
            Ok(()) => done(),
            Err(error) => self.store_failed("record the end of", &error),
        }
    }

    fn backend_failed(&self, step: &'static str, error: &BackendError) -> Outcome {
        match error {
            BackendError::NoCapacity(message) => {
                tracing::warn!(sandbox_id = %self.id(), message, "no capacity for a sandbox");
                failed(Failure::NoCapacity(message.clone()))
            }
            BackendError::Invalid { field, message } => {
                tracing::warn!(sandbox_id = %self.id(), field, message, "the backend refuses what was accepted");
                failed(Failure::Invalid {
                    field,
                    message: message.clone(),
                })
            }
            BackendError::Unusable(_)
            | BackendError::Exists(_)
            | BackendError::NotPrepared(_)
            | BackendError::Failed { .. } => {
                tracing::error!(sandbox_id = %self.id(), step, %error, "the backend failed");
                failed(Failure::Internal)
            }
        }
    }

    fn store_failed(&self, step: &'static str, error: &StoreError) -> Outcome {
        tracing::error!(sandbox_id = %self.id(), step, error = error as &dyn std::error::Error, "the store failed");
        failed(Failure::Internal)
    }
}

fn done() -> Outcome {
    Outcome {
        event: Event::Done,
        note: Note::Nothing,
    }
}

fn failed(failure: Failure) -> Outcome {
    Outcome {
        event: Event::Failed,
        note: Note::Failure(failure),
    }
}

/// Before another attempt: 0.2 s, doubling.
async fn pause(failures: u32) {
    if failures > 0 {
        let pause = Duration::from_millis(100) * 2_u32.saturating_pow(failures.min(16));
        tokio::time::sleep(pause.min(LONGEST_PAUSE)).await;
    }
}
