//! How long a sandbox lives: extending it, pausing it, and the session that it stands for.

use std::{
    sync::{Arc, PoisonError},
    time::{Duration, Instant},
};

use jiff::{SignedDuration, Timestamp};
use sandgate_api::{
    id::{OrgId, SandboxId},
    rest::{Sandbox, SandboxLifetime, SandboxStatus},
};

use super::{
    SandboxRequest, Service, ServiceError, Started,
    keeper::{self, Life, Progress},
    sandboxes::shown,
};
use crate::{
    backend::LocalBackend,
    lifecycle::State,
    store::{Extension, Longer, SandboxRecord},
};

/// How long a creation waits for another one of its session.
const SESSION_TIMEOUT: Duration = Duration::from_secs(60);

/// Before looking again at a sandbox of the session that another controller makes, or that is just ending.
const SESSION_PAUSE: Duration = Duration::from_millis(50);

impl Service {
    /// Lets a running sandbox live longer.
    ///
    /// # Errors
    /// [`ServiceError::SandboxNotFound`]; a conflict when it does not run, or would live longer than any may.
    pub async fn extend_sandbox(
        &self,
        org_id: &OrgId,
        id: &SandboxId,
        additional_seconds: u64,
    ) -> Result<Sandbox, ServiceError> {
        let extended = self
            .live_longer(org_id, id, Longer::By(additional_seconds))
            .await?;
        if !extended {
            return Err(ServiceError::Conflict("the sandbox is just ending".to_owned()));
        }
        tracing::info!(target: "audit", org_id = %org_id, sandbox_id = %id, additional_seconds, "sandbox extended");
        self.sandbox(org_id, id).await
    }

    /// False: its end began in this moment.
    async fn live_longer(
        &self,
        org_id: &OrgId,
        id: &SandboxId,
        longer: Longer,
    ) -> Result<bool, ServiceError> {
        let most = self.shared.config.sandbox.max_lifetime_seconds;
        match self.shared.store.extend_sandbox(org_id, id, longer, most).await? {
            Extension::Until(expires_at) => {
                // Without a keeper nobody ends it before it is read from the store again.
                Ok(self.life(id).is_none_or(|life| life.extend_to(expires_at)))
            }
            Extension::Beyond(left) => Err(ServiceError::Conflict(format!(
                "a sandbox lives at most {most} seconds: this one can be extended by {left} seconds more"
            ))),
            Extension::NotRunning(status) => Err(ServiceError::Conflict(format!(
                "the sandbox is {}, not running",
                status.as_str()
            ))),
            Extension::Absent => Err(ServiceError::SandboxNotFound(id.to_string())),
        }
    }

    /// How much of its life a sandbox has used.
    ///
    /// # Errors
    /// [`ServiceError::SandboxNotFound`].
    pub async fn sandbox_lifetime(
        &self,
        org_id: &OrgId,
        id: &SandboxId,
    ) -> Result<SandboxLifetime, ServiceError> {
        let most = self.shared.config.sandbox.max_lifetime_seconds;
        Ok(lifetime(&self.record(org_id, id).await?, most, super::now()))
    }

    /// The live sandbox of a session, its lifetime begun anew, or a new one. Of any number of creations at once, one
    /// makes it and the others wait for it.
    ///
    /// # Errors
    /// As [`Service::create_sandbox`].
    pub(super) async fn sandbox_of_session(
        &self,
        org_id: &OrgId,
        key: &str,
        request: SandboxRequest,
    ) -> Result<Started, ServiceError> {
        let asked = Instant::now();
        while asked.elapsed() < SESSION_TIMEOUT {
            if let Some(id) = self.shared.store.sandbox_of_session(org_id, key).await? {
                match self.join(org_id, &id, request.spec.timeout_seconds).await? {
                    Some(sandbox) => return Ok(Started { sandbox }),
                    None => tokio::time::sleep(SESSION_PAUSE).await,
                }
                continue;
            }
            match self.new_sandbox(org_id, request.clone()).await {
                Err(error) => {
                    // Somebody else may have been a moment earlier.
                    if self.shared.store.sandbox_of_session(org_id, key).await?.is_none() {
                        return Err(error);
                    }
                }
                made => return made,
            }
        }
        Err(ServiceError::Unavailable(
            "the session's sandbox was not ready in time".to_owned(),
        ))
    }

    /// The sandbox of a session, when it can be used; none when it must be looked for again.
    async fn join(
        &self,
        org_id: &OrgId,
        id: &SandboxId,
        timeout_seconds: u64,
    ) -> Result<Option<Sandbox>, ServiceError> {
        let progress = {
            let keepers = self.shared.keepers.lock().unwrap_or_else(PoisonError::into_inner);
            keepers.get(id).map(keeper::Keeper::progress)
        };
        if let Some(progress) = progress {
            let settled = tokio::time::timeout(SESSION_TIMEOUT, keeper::settled(progress)).await;
            let is_running = matches!(
                settled,
                Ok(Some(Progress {
                    state: State::Running,
                    ..
                }))
            );
            if !is_running {
                return Ok(None);
            }
        }
        let longer = Longer::ToLast(timeout_seconds, super::now());
        match self.live_longer(org_id, id, longer).await {
            Ok(true) => {}
            Ok(false) | Err(ServiceError::Conflict(_) | ServiceError::SandboxNotFound(_)) => return Ok(None),
            Err(error) => return Err(error),
        }
        let Some(mut record) = self.shared.store.sandbox(org_id, id).await? else {
            return Ok(None);
        };
        if record.status != SandboxStatus::Running {
            return Ok(None);
        }
        if record.paused {
            self.set_paused(org_id, id, false).await?;
            record.paused = false;
        }
        let mut sandbox = shown(record, None);
        sandbox.reused = true;
        Ok(Some(sandbox))
    }

    /// Stops every process of a running sandbox where it stands: it uses no processor, keeps its memory and its files, and
    /// its lifetime goes on. Doing it again is no error.
    ///
    /// # Errors
    /// [`ServiceError::SandboxNotFound`]; a conflict when it does not run, or cannot be paused here.
    pub async fn pause_sandbox(&self, org_id: &OrgId, id: &SandboxId) -> Result<Sandbox, ServiceError> {
        self.set_paused(org_id, id, true).await?;
        self.sandbox(org_id, id).await
    }

    /// Lets a paused sandbox go on. Doing it again is no error.
    ///
    /// # Errors
    /// [`ServiceError::SandboxNotFound`]; a conflict when it does not run.
    pub async fn resume_sandbox(&self, org_id: &OrgId, id: &SandboxId) -> Result<Sandbox, ServiceError> {
        self.set_paused(org_id, id, false).await?;
        self.sandbox(org_id, id).await
    }

    /// Runs to its end also when the caller goes away: what is stored and what is so must not differ.
    async fn set_paused(&self, org_id: &OrgId, id: &SandboxId, paused: bool) -> Result<(), ServiceError> {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let (service, org_id, id) = (self.clone(), org_id.clone(), id.clone());
        self.shared.tasks.spawn("pause sandbox", async move {
            let done = service.pause_or_resume(&org_id, &id, paused).await;
            // Nobody may be waiting any more.
            let _unheard = sender.send(done);
        });
        receiver.await.unwrap_or_else(|_stopped| {
            Err(ServiceError::Unavailable(
                "the controller is shutting down".to_owned(),
            ))
        })
    }

    async fn pause_or_resume(
        &self,
        org_id: &OrgId,
        id: &SandboxId,
        paused: bool,
    ) -> Result<(), ServiceError> {
        self.record(org_id, id).await?;
        let backend = self.backend()?;
        let ending = || ServiceError::Conflict("the sandbox does not run".to_owned());
        let life = self.life(id).ok_or_else(ending)?;
        let _alone = life.freezing.lock().await;
        let record = self.record(org_id, id).await?;
        if record.status != SandboxStatus::Running {
            return Err(ending());
        }
        if record.paused == paused {
            return Ok(());
        }
        let store = &self.shared.store;
        let cannot = |error| {
            tracing::error!(sandbox_id = %id, paused, %error, "a sandbox cannot be paused or resumed");
            ServiceError::Conflict(format!("the sandbox cannot be paused or resumed: {error}"))
        };
        // A controller that is killed half-way leaves one that is stored as paused, which the next one pauses.
        if paused {
            if !store.mark_paused(id, true).await? {
                return Err(ending());
            }
            if let Err(error) = backend.freeze(id).await {
                store.mark_paused(id, false).await?;
                return Err(cannot(error));
            }
        } else {
            backend.thaw(id).await.map_err(cannot)?;
            if !store.mark_paused(id, false).await? {
                return Err(ending());
            }
        }
        life.set_paused(paused);
        tracing::info!(target: "audit", org_id = %org_id, sandbox_id = %id, paused, "sandbox paused or resumed");
        Ok(())
    }

    /// Pauses what was paused when an earlier controller ended. What cannot be goes on.
    pub(super) async fn pause_again(&self, backend: &LocalBackend, id: &SandboxId) {
        let Some(life) = self.life(id) else { return };
        life.set_paused(true);
        let Err(error) = backend.freeze(id).await else {
            return;
        };
        tracing::error!(sandbox_id = %id, %error, "a paused sandbox cannot be paused again: it goes on");
        life.set_paused(false);
        if let Err(error) = self.shared.store.mark_paused(id, false).await {
            tracing::error!(sandbox_id = %id, error = &error as &dyn std::error::Error, "the store failed");
        }
    }

    /// The life of a sandbox that somebody looks after here.
    pub(super) fn life(&self, id: &SandboxId) -> Option<Arc<Life>> {
        let keepers = self.shared.keepers.lock().unwrap_or_else(PoisonError::into_inner);
        keepers.get(id).map(keeper::Keeper::life)
    }
}

fn lifetime(record: &SandboxRecord, max_lifetime_seconds: u64, now: Timestamp) -> SandboxLifetime {
    let longest = SignedDuration::from_secs(i64::try_from(max_lifetime_seconds).unwrap_or(i64::MAX));
    let max_expires_at = record
        .created_at
        .saturating_add(longest)
        .unwrap_or(Timestamp::MAX)
        // What was promised before the limit was lowered is kept.
        .max(record.expires_at);
    let seconds = |duration: SignedDuration| u64::try_from(duration.as_secs()).unwrap_or(0);
    let used = now.min(record.expires_at).duration_since(record.created_at);
    let whole = record.expires_at.duration_since(record.created_at);
    let percent = if whole.is_positive() {
        used.as_secs_f64() / whole.as_secs_f64() * 100.0
    } else {
        100.0
    };
    SandboxLifetime {
        sandbox_id: record.id.clone(),
        status: record.status,
        status_reason: record.status_reason.clone(),
        paused: record.paused,
        expires_at: record.expires_at,
        max_expires_at,
        max_lifetime_seconds,
        remaining_extend_seconds: seconds(max_expires_at.duration_since(record.expires_at)),
        lifetime_used_seconds: seconds(used),
        lifetime_used_percent: percent.clamp(0.0, 100.0),
    }
}
