//! One task per live sandbox, somebody's or the pool's: carries out what [`crate::lifecycle`] asks for.
//!
//! Nobody else changes a live sandbox's status, so there are no two hands on one sandbox. A claim is the one
//! exception: it moves a member of the pool to its owner in the store, and from then on the member's keeper finds
//! nothing that is its own; the owner's keeper goes on with what runs.

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, PoisonError},
    time::{Duration, Instant},
};

use sandgate_api::{
    agent::{AGENT_PORT, Claim},
    feed::{Endpoint, Revision},
    id::SandboxId,
    rest::StartupBreakdown,
};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::{Service, Shared};
use crate::{
    agent::Agent,
    backend::{BackendError, LaunchSpec, LocalBackend},
    lifecycle::{self, Cause, Effect, Event, Next, State},
    node::Enforcement,
    store::{PoolRecord, SandboxRecord, StoreError, Withdrawal},
};

/// How long the node may take to acknowledge a new sandbox.
const ENFORCE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the agent of a new sandbox may take to answer.
const GREET_TIMEOUT: Duration = Duration::from_secs(15);

/// How long the agent of a sandbox that was made in advance may take to answer: it did once, and if it does not
/// now, another sandbox must still be there in time.
const CLAIM_TIMEOUT: Duration = Duration::from_secs(2);

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
    /// It was made in advance and does not answer.
    Stale,
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
    released: CancellationToken,
}

impl Keeper {
    /// One without a task: what it is asked for, and what can be seen of it, are the test's.
    #[cfg(test)]
    pub(super) fn without_task(state: State) -> (Self, mpsc::Receiver<Cause>, watch::Sender<Progress>) {
        let (ends, ending) = mpsc::channel(1);
        let (sender, progress) = watch::channel(Progress {
            state,
            failure: None,
            breakdown: StartupBreakdown::default(),
        });
        let keeper = Self {
            ends,
            progress,
            released: CancellationToken::new(),
        };
        (keeper, ending, sender)
    }

    /// Asks for the end. The first cause counts.
    pub(super) fn end(&self, cause: Cause) -> watch::Receiver<Progress> {
        // Full or closed: an end is under way already.
        let _under_way = self.ends.try_send(cause);
        self.progress.clone()
    }

    /// Where the sandbox stands.
    pub(super) fn state(&self) -> State {
        self.progress.borrow().state
    }

    /// The sandbox was claimed: this keeper has nothing more to do with it.
    pub(super) fn release(&self) {
        self.released.cancel();
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
        subject: impl Into<Subject>,
        state: State,
    ) -> watch::Receiver<Progress> {
        let subject = subject.into();
        let (ends, ending) = mpsc::channel(1);
        let (sender, progress) = watch::channel(Progress {
            state,
            failure: None,
            breakdown: StartupBreakdown::default(),
        });
        let released = CancellationToken::new();
        let keeper = Keeper {
            ends,
            progress: progress.clone(),
            released: released.clone(),
        };
        let id = subject.id().clone();
        let is_pooled = match &subject {
            Subject::Owned(_) => {
                let mut keepers = self.shared.keepers.lock().unwrap_or_else(PoisonError::into_inner);
                keepers.insert(id.clone(), keeper);
                false
            }
            Subject::Pooled(member) => {
                self.shared.pool.insert(member.clone(), keeper);
                true
            }
        };
        let work = Work {
            shared: Arc::clone(&self.shared),
            backend,
            subject,
        };
        let shared = Arc::clone(&self.shared);
        // Of its own: its life is longer than the request that began it.
        let span = tracing::info_span!(parent: None, "sandbox", sandbox_id = %id);
        self.shared.tasks.spawn_within("keeper", &span, async move {
            let work = Arc::new(work);
            let end = Box::pin(run(work, state, (ending, released), sender)).await;
            if is_pooled {
                shared.pool.remove(&id);
            } else {
                let mut keepers = shared.keepers.lock().unwrap_or_else(PoisonError::into_inner);
                keepers.remove(&id);
            }
            // What the node said of a claimed sandbox concerns its owner.
            if end == End::Gone {
                shared.node.forget(&id);
            }
        });
        progress
    }
}

/// Whose sandbox a keeper looks after.
#[derive(Debug, Clone)]
pub(super) enum Subject {
    /// Somebody's.
    Owned(SandboxRecord),
    /// Nobody's yet.
    Pooled(PoolRecord),
}

impl Subject {
    fn id(&self) -> &SandboxId {
        match self {
            Self::Owned(record) => &record.id,
            Self::Pooled(member) => &member.id,
        }
    }
}

impl From<SandboxRecord> for Subject {
    fn from(record: SandboxRecord) -> Self {
        Self::Owned(record)
    }
}

impl From<PoolRecord> for Subject {
    fn from(member: PoolRecord) -> Self {
        Self::Pooled(member)
    }
}

/// Why a keeper ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// The sandbox is gone.
    Gone,
    /// It goes on without this keeper.
    Left,
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
    /// The node acknowledged the owner's rules after so many milliseconds.
    Admitted(u64),
    /// It is somebody else's to look after.
    Claimed,
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
    (mut ending, released): (mpsc::Receiver<Cause>, CancellationToken),
    progress: watch::Sender<Progress>,
) -> End {
    let shutdown = work.shared.tasks.shutdown();
    let mut made = Made::default();
    let Some(first) = state.effect() else {
        return End::Gone;
    };
    let mut doing = work.begin(first, &made);
    let mut effect = first;
    let mut began = Instant::now();
    loop {
        let outcome = tokio::select! {
            biased;
            Some(cause) = ending.recv() => Outcome { event: Event::End(cause), note: Note::Nothing },
            outcome = &mut doing => outcome,
            // What runs goes on running without the controller, and the next one adopts it.
            () = shutdown.cancelled(), if state == State::Running => return End::Left,
            () = released.cancelled(), if state == State::Running => return End::Left,
        };
        let mut failure = None;
        let mut admitted = 0;
        match outcome.note {
            Note::Nothing => {}
            Note::Endpoint(endpoint) => made.endpoint = Some(endpoint),
            Note::Revision(revision) => made.revision = revision,
            Note::Failure(why) => failure = Some(why),
            Note::Admitted(after) => admitted = after,
            Note::Claimed => return End::Left,
        }
        let (after, next) = lifecycle::step(state, outcome.event);
        tracing::debug!(sandbox_id = %work.id(), ?state, event = ?outcome.event, ?after, "lifecycle");
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
                Some(Effect::Admit) => {
                    progress.breakdown.enforce_ms = admitted;
                    progress.breakdown.agent_ms = took.saturating_sub(admitted);
                }
                Some(_) | None => {}
            }
        });
        if let State::Ended(cause) = state {
            match &work.subject {
                Subject::Owned(record) => {
                    tracing::info!(sandbox_id = %record.id, org_id = %record.org_id, reason = cause.reason(), "a sandbox ended");
                }
                Subject::Pooled(member) => {
                    tracing::info!(sandbox_id = %member.id, reason = cause.reason(), "a sandbox of the pool ended");
                }
            }
            return End::Gone;
        }
    }
}

/// What a keeper works with.
struct Work {
    shared: Arc<Shared>,
    backend: Arc<LocalBackend>,
    subject: Subject,
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
            Effect::Admit => Box::pin(async move { work.admit().await }),
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
        self.subject.id()
    }

    fn launch_spec(&self) -> LaunchSpec {
        let (spec, authority) = match &self.subject {
            Subject::Owned(record) => (&record.spec, record.authority.as_ref()),
            Subject::Pooled(member) => (&member.spec, Some(&member.authority)),
        };
        LaunchSpec {
            sandbox_id: self.id().clone(),
            cpu_millis: spec.cpus.millis(),
            memory_bytes: spec.memory.bytes(),
            pids: spec.pids,
            disk_bytes: spec.disk.bytes(),
            env: spec.env.clone(),
            agent_key: self.shared.installation.agent_key(self.id()),
            ca_certificate: authority.map(|authority| authority.certificate.clone()),
            isolation: spec.isolation,
        }
    }

    async fn prepare(&self) -> Outcome {
        loop {
            let error = match self.backend.prepare(&self.launch_spec()).await {
                Ok(endpoint) => {
                    return Outcome {
                        event: Event::Done,
                        note: Note::Endpoint(endpoint),
                    };
                }
                Err(error) => error,
            };
            // What nobody has asked for makes room for what somebody has.
            let is_owned = matches!(self.subject, Subject::Owned(_));
            let has_room = match &error {
                BackendError::NoCapacity { missing, .. } if is_owned => {
                    self.shared.pool.make_room(*missing).await
                }
                _ => false,
            };
            if !has_room {
                return self.backend_failed("prepare", &error);
            }
        }
    }

    async fn announce(&self, endpoint: Option<Endpoint>) -> Outcome {
        let Some(endpoint) = endpoint else {
            tracing::error!(sandbox_id = %self.id(), "announced before it was prepared");
            return failed(Failure::Internal);
        };
        let announced = match &self.subject {
            Subject::Owned(_) => self.shared.store.announce(self.id(), &endpoint).await,
            Subject::Pooled(_) => self.shared.store.announce_pooled(self.id(), &endpoint).await,
        };
        match announced {
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
            // After a restart the node may be a moment behind.
            let mut node = self.shared.node.watch();
            let _stopped = node.wait_for(|node| node.connected).await.map(drop);
            let agent = self.agent().await?;
            agent.ping().await.map_err(|error| error.to_string())
        };
        self.answered(greeting, GREET_TIMEOUT, Failure::Internal).await
    }

    /// The node enforces the owner's rules, and the agent knows whose it is. Neither waits for the other: nothing
    /// runs in the sandbox before both are done.
    async fn admit(&self) -> Outcome {
        let Subject::Owned(record) = &self.subject else {
            tracing::error!(sandbox_id = %self.id(), "admitted without an owner");
            return failed(Failure::Internal);
        };
        let begun = Instant::now();
        let enforced = async {
            let enforced = self.await_enforced(record.feed_revision).await;
            (
                enforced,
                u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
            )
        };
        let claiming = async {
            let env = record.spec.env.clone();
            let agent = self.agent().await?;
            agent
                .claim(Claim { env })
                .await
                .map_err(|error| error.to_string())
        };
        let claimed = self.answered(claiming, CLAIM_TIMEOUT, Failure::Stale);
        let ((enforced, after), claimed) = tokio::join!(enforced, claimed);
        match (enforced.event, claimed.event) {
            (Event::Done, Event::Done) => Outcome {
                event: Event::Done,
                note: Note::Admitted(after),
            },
            (Event::Done, _) => claimed,
            (_, _) => enforced,
        }
    }

    async fn agent(&self) -> Result<Agent, String> {
        let stream = self.shared.node.dial(self.id(), AGENT_PORT).await;
        let stream = stream.map_err(|error| error.to_string())?;
        Ok(Agent::new(stream, &self.shared.installation.agent_key(self.id())))
    }

    async fn answered(
        &self,
        asking: impl Future<Output = Result<(), String>>,
        limit: Duration,
        failure: Failure,
    ) -> Outcome {
        let error = match tokio::time::timeout(limit, asking).await {
            Ok(Ok(())) => return done(),
            Ok(Err(error)) => error,
            Err(_elapsed) => "no answer in time".to_owned(),
        };
        tracing::error!(sandbox_id = %self.id(), error, "the agent of a new sandbox does not answer");
        failed(failure)
    }

    async fn record_running(&self) -> Outcome {
        let recorded = match &self.subject {
            Subject::Owned(_) => self.shared.store.mark_running(self.id()).await,
            Subject::Pooled(_) => self.shared.store.mark_pooled_ready(self.id()).await,
        };
        match recorded {
            Ok(()) => done(),
            Err(error) => self.store_failed("record", &error),
        }
    }

    /// Ends with the sandbox's life, which is announced as an event of its own.
    async fn watch(&self) -> Outcome {
        let (ends, cause) = match &self.subject {
            Subject::Owned(record) => (record.expires_at, Cause::Expired),
            Subject::Pooled(member) => (super::pool::best_before(member), Cause::Retired),
        };
        let left = Duration::try_from(ends.duration_since(super::now())).unwrap_or(Duration::ZERO);
        let cause = tokio::select! {
            () = self.backend.wait_exit(self.id()) => Cause::Died,
            () = tokio::time::sleep(left) => cause,
        };
        Outcome {
            event: Event::End(cause),
            note: Note::Nothing,
        }
    }

    async fn withdraw(&self, failures: u32) -> Outcome {
        pause(failures).await;
        let withdrawn = match &self.subject {
            Subject::Owned(_) => self.shared.store.withdraw(self.id()).await,
            Subject::Pooled(_) => match self.shared.store.withdraw_pooled(self.id()).await {
                Ok(Withdrawal::Ending(revision)) => Ok(revision),
                Ok(Withdrawal::Claimed) => {
                    return Outcome {
                        event: Event::Done,
                        note: Note::Claimed,
                    };
                }
                Err(error) => Err(error),
            },
        };
        match withdrawn {
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
        let store = &self.shared.store;
        let ended = match &self.subject {
            Subject::Owned(_) => {
                let reason = Some(cause.reason());
                store
                    .finish(self.id(), cause.status(), reason, super::now())
                    .await
            }
            Subject::Pooled(_) => store.forget_pooled(self.id()).await,
        };
        match ended {
            Ok(()) => done(),
            Err(error) => self.store_failed("record the end of", &error),
        }
    }

    fn backend_failed(&self, step: &'static str, error: &BackendError) -> Outcome {
        match error {
            BackendError::NoCapacity { message, .. } => {
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
