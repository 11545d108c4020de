//! What keepers do: an effect of the lifecycle each, and the event that it ends with.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use sandgate_api::{
    agent::{AGENT_PORT, Claim},
    feed::{Endpoint, Revision},
    id::SandboxId,
};

use super::{Doing, Failure, Made, Note, Outcome, Subject};
use crate::{
    agent::Agent,
    backend::{BackendError, LaunchSpec, LocalBackend},
    lifecycle::{Cause, Effect, Event},
    node::Enforcement,
    service::{Shared, now, pool},
    store::{StoreError, Withdrawal},
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
        let (began, ends, cause) = match &self.subject {
            Subject::Owned(record) => (record.created_at, record.expires_at, Cause::Expired),
            Subject::Pooled(member) => (member.created_at, pool::best_before(member), Cause::Retired),
        };
        let left = left(began, ends, now());
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
                store.finish(self.id(), cause.status(), reason, now()).await
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

/// How much is left of a life. The clock is asked once, when it begins or a controller adopts it; one that was set back
/// since it began gives it no more than the whole of it.
fn left(began: Timestamp, ends: Timestamp, now: Timestamp) -> Duration {
    Duration::try_from(ends.duration_since(now.max(began))).unwrap_or(Duration::ZERO)
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

#[cfg(test)]
mod tests {
    use jiff::SignedDuration;

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
