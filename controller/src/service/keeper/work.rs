//! What keepers do: an effect of the lifecycle each, and the event that it ends with.

use std::{
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use sandgate_api::{
    agent::{AGENT_PORT, Claim},
    feed::{Endpoint, Revision},
    id::SandboxId,
    rest::{EventDetails, EventKind},
};

use super::{Doing, Failure, Life, Made, Note, Outcome, Subject};
use crate::{
    agent::Agent,
    backend::{BackendError, LaunchSpec, LocalBackend},
    lifecycle::{Cause, Effect, Event},
    node::Enforcement,
    service::{Service, Shared, now, templates::FURNISHING},
    store::{StoreError, Withdrawal},
    template::Furnishing,
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

/// Longest pause between two attempts to take a sandbox away.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// What a keeper works with.
pub(super) struct Work {
    pub(super) shared: Arc<Shared>,
    pub(super) backend: Arc<LocalBackend>,
    pub(super) subject: Subject,
    pub(super) life: Arc<Life>,
    pub(super) furnishing: Option<Arc<Furnishing>>,
    /// Why it ends, when that can be said better than by the cause.
    pub(super) reason: OnceLock<String>,
}

impl Work {
    pub(super) fn begin(self: &Arc<Self>, effect: Effect, made: &Made) -> Doing {
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
            Effect::Furnish => Box::pin(async move { work.furnish().await }),
            Effect::RecordRunning => Box::pin(async move { work.record_running().await }),
            Effect::Watch => Box::pin(async move { work.watch().await }),
            Effect::Withdraw { failures } => Box::pin(async move { work.withdraw(failures).await }),
            Effect::Destroy { failures } => Box::pin(async move { work.destroy(failures).await }),
            Effect::RecordEnd { cause, failures } => {
                Box::pin(async move { work.record_end(cause, failures).await })
            }
        }
    }

    pub(super) fn id(&self) -> &SandboxId {
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

    async fn furnish(&self) -> Outcome {
        let (Subject::Owned(record), Some(furnishing)) = (&self.subject, &self.furnishing) else {
            return done();
        };
        let service = Service {
            shared: Arc::clone(&self.shared),
        };
        let furnishing = service.furnish(record, furnishing);
        let message = match tokio::time::timeout(FURNISHING, furnishing).await {
            Ok(Ok(())) => return done(),
            Ok(Err(message)) => message,
            Err(_elapsed) => format!(
                "the template's files and commands took longer than {} s",
                FURNISHING.as_secs()
            ),
        };
        tracing::info!(sandbox_id = %self.id(), "a template's files or commands failed");
        // The first one counts.
        let _told = self.reason.set(message.clone());
        failed(Failure::Furnishing(message))
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
            Ok(()) => {
                if let Subject::Owned(record) = &self.subject {
                    let details = EventDetails::default();
                    let teller = &self.shared.teller;
                    teller.tell(&record.org_id, &record.id, EventKind::SandboxReady, details);
                }
                done()
            }
            Err(error) => self.store_failed("record", &error),
        }
    }

    /// Ends with the sandbox's life, which is announced as an event of its own.
    async fn watch(&self) -> Outcome {
        if let Subject::Owned(record) = &self.subject {
            self.shared.begin_meter(&self.backend, record).await;
        }
        let cause = tokio::select! {
            () = self.backend.wait_exit(self.id()) => Cause::Died,
            cause = self.runs_out() => cause,
        };
        Outcome {
            event: Event::End(cause),
            note: Note::Nothing,
        }
    }

    /// Resolves when its lifetime is over, or nothing has happened in it for its idle timeout.
    async fn runs_out(&self) -> Cause {
        let mut before = None;
        loop {
            let due = self.life.due();
            if due.at > tokio::time::Instant::now() {
                if due.cause == Cause::Idle {
                    before = self.backend.reading(self.id()).await;
                }
                tokio::select! {
                    () = tokio::time::sleep_until(due.at) => {}
                    () = self.life.changed() => {}
                }
                continue;
            }
            if due.cause == Cause::Idle {
                // Nobody has asked for anything; what runs inside may have something to do all the same.
                let present = self.backend.reading(self.id()).await;
                let idle = self.idle_timeout();
                let is_idle = match (before, present) {
                    (Some(before), Some(present)) => present.is_idle_since(before, idle),
                    // Not known: it has its whole lifetime.
                    (_, _) => false,
                };
                if !is_idle {
                    self.life.touch();
                    continue;
                }
            }
            if self.life.lapse(due) {
                return due.cause;
            }
        }
    }

    fn idle_timeout(&self) -> Duration {
        let seconds = match &self.subject {
            Subject::Owned(record) => record.terms.idle_timeout_seconds,
            Subject::Pooled(_) => None,
        };
        seconds.map_or(Duration::MAX, Duration::from_secs)
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
        if failures == 0 && matches!(self.subject, Subject::Owned(_)) {
            self.shared.last_reading(&self.backend, self.id()).await;
        }
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
                let reason = Some(self.reason(cause));
                store.finish(self.id(), cause.status(), reason, now()).await
            }
            Subject::Pooled(_) => store.forget_pooled(self.id()).await,
        };
        match ended {
            Ok(()) => {
                if let Subject::Owned(record) = &self.subject {
                    let teller = &self.shared.teller;
                    teller.tell_end(&record.org_id, &record.id, cause, self.reason(cause));
                }
                done()
            }
            Err(error) => self.store_failed("record the end of", &error),
        }
    }

    fn reason(&self, cause: Cause) -> &str {
        match self.reason.get() {
            Some(reason) if cause == Cause::Failed => reason,
            Some(_) | None => cause.reason(),
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
