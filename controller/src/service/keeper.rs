//! One task per live sandbox, somebody's or the pool's: carries out what [`crate::lifecycle`] asks for.
//!
//! Nobody else changes a live sandbox's status, so there are no two hands on one sandbox. A claim is the one
//! exception: it moves a member of the pool to its owner in the store, and from then on the member's keeper finds
//! nothing that is its own; the owner's keeper goes on with what runs.

mod life;
mod work;

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use sandgate_api::{
    feed::{Endpoint, Revision},
    id::SandboxId,
    rest::StartupBreakdown,
};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

pub(super) use self::life::{Life, Use};
use self::work::Work;
use super::Service;
use crate::{
    backend::LocalBackend,
    lifecycle::{self, Cause, Effect, Event, Next, State},
    store::{PoolRecord, SandboxRecord},
    template::Furnishing,
};

/// How long the answer to a failed creation waits for the clean-up.
const CLEANUP_TIMEOUT: Duration = Duration::from_secs(5);

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
    /// A file or a command of its template failed.
    Furnishing(String),
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
    life: Arc<Life>,
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
            life: Arc::new(Life::new(
                jiff::Timestamp::UNIX_EPOCH,
                Duration::MAX / 4,
                None,
                Cause::Expired,
            )),
        };
        (keeper, ending, sender)
    }

    /// Asks for the end. The first cause counts.
    pub(super) fn end(&self, cause: Cause) -> watch::Receiver<Progress> {
        // Full or closed: an end is under way already.
        let _under_way = self.ends.try_send(cause);
        self.progress.clone()
    }

    /// What can be seen of it.
    pub(super) fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.clone()
    }

    /// When the sandbox ends by itself.
    pub(super) fn life(&self) -> Arc<Life> {
        Arc::clone(&self.life)
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
    /// What can be seen of a sandbox's keeper; none when nothing looks after it.
    pub(super) fn progress_of(&self, id: &SandboxId) -> Option<watch::Receiver<Progress>> {
        let keepers = self.shared.keepers.lock().unwrap_or_else(PoisonError::into_inner);
        keepers.get(id).map(|keeper| keeper.progress.clone())
    }

    /// Starts looking after a sandbox that stands in the store as live.
    pub(super) fn keep(
        &self,
        backend: Arc<LocalBackend>,
        subject: impl Into<Subject>,
        state: State,
    ) -> watch::Receiver<Progress> {
        self.keep_furnished(backend, subject, state, None)
    }

    /// The same for one that is given files and commands before anybody gets it.
    pub(super) fn keep_furnished(
        &self,
        backend: Arc<LocalBackend>,
        subject: impl Into<Subject>,
        state: State,
        furnishing: Option<Arc<Furnishing>>,
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
            life: Arc::new(subject.life()),
        };
        let life = keeper.life();
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
            life,
            furnishing,
            reason: OnceLock::new(),
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
                // Of one that goes on, what is counted is still to be stored.
                shared.meters.close(&id);
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

    fn life(&self) -> Life {
        let now = super::now();
        match self {
            Self::Owned(record) => {
                let idle = record.terms.idle_timeout_seconds.map(Duration::from_secs);
                let left = left(record.created_at, record.expires_at, now);
                Life::new(record.expires_at, left, idle, Cause::Expired)
            }
            Self::Pooled(member) => {
                let ends = super::pool::best_before(member);
                let left = left(member.created_at, ends, now);
                Life::new(ends, left, None, Cause::Retired)
            }
        }
    }
}

/// How much is left of a life. The clock is asked once, when a keeper begins; one that was set back since it began gives
/// it no more than the whole of it.
fn left(began: jiff::Timestamp, ends: jiff::Timestamp, now: jiff::Timestamp) -> Duration {
    Duration::try_from(ends.duration_since(now.max(began))).unwrap_or(Duration::ZERO)
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

#[cfg(test)]
mod tests {
    use jiff::{SignedDuration, Timestamp};

    use super::*;

    #[test]
    fn a_clock_that_is_set_back_makes_no_life_longer() {
        let began = Timestamp::UNIX_EPOCH + SignedDuration::from_hours(500_000);
        let after = |minutes: i64| began + SignedDuration::from_mins(minutes);
        let left = |minutes: i64| left(began, after(10), after(minutes)).as_secs();
        assert_eq!([left(0), left(4), left(10), left(11)], [600, 360, 0, 0]);
        assert_eq!(left(-9_000), 600);
    }
}
