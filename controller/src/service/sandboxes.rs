//! Sandboxes: create, look at, list, stop, delete.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use jiff::{SignedDuration, Timestamp};
use sandgate_api::{
    id::{OrgId, SandboxId},
    rest::{EventDetails, EventKind, Sandbox, SandboxStatus, StartupMetrics},
};
use sandgate_policy::Policy;
use tokio::sync::watch;
use tracing::Span;

use super::{
    Service, ServiceError,
    keeper::{self, Failure, Progress},
    secrets::{clash, unbound, unbound_rule},
};
use crate::{
    authority::{Authority, FIRST_GENERATION},
    backend::LocalBackend,
    config::SandboxDefaults,
    lifecycle::{Cause, State},
    metrics::{Creating, Creation},
    spec::SandboxSpec,
    store::{AuthorityRecord, Conflict, NewSandbox, SandboxRecord, SecretChoice, StoreError},
    template::Furnishing,
    terms::Terms,
};

/// Fewest sandboxes that are looked at together for their notes.
const STEP: usize = 500;

/// How often they are, for one page.
const MOST_PAGES: u32 = 20;

/// How long a stop waits for the sandbox to be gone; it goes on without the caller.
const STOP_TIMEOUT: Duration = Duration::from_secs(20);

/// A sandbox to be created, checked.
#[derive(Debug, Clone)]
pub struct SandboxRequest {
    /// What it may use.
    pub spec: SandboxSpec,
    /// Its own egress policy.
    pub policy: Option<Policy>,
    /// Which of the organisation's secrets it gets.
    pub secrets: SecretChoice,
    /// What is asked for beside.
    pub terms: Terms,
    /// What is done in it before it is handed out.
    pub furnishing: Option<Arc<Furnishing>>,
}

/// A created sandbox.
#[derive(Debug, Clone)]
pub struct Started {
    /// As it is shown.
    pub sandbox: Sandbox,
}

/// A page of sandboxes.
#[derive(Debug, Clone)]
pub struct SandboxPage {
    /// Newest first.
    pub sandboxes: Vec<Sandbox>,
    /// Where the next page begins.
    pub next: Option<i64>,
}

/// A sandbox on its way up.
struct Kept {
    id: SandboxId,
    progress: watch::Receiver<Progress>,
    /// It was taken from the pool.
    warm: bool,
}

/// What came of a creation.
struct Made {
    record: SandboxRecord,
    settled: Option<Progress>,
    /// It was taken from the pool.
    warm: bool,
}

/// Takes a sandbox down when its creation is not awaited to the end.
struct Unwanted {
    service: Service,
    id: Option<SandboxId>,
}

impl Drop for Unwanted {
    fn drop(&mut self) {
        let Some(id) = self.id.take() else { return };
        tracing::info!(sandbox_id = %id, "the client went away during a creation");
        let keepers = &self.service.shared.keepers;
        let keepers = keepers.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(keeper) = keepers.get(&id) {
            drop(keeper.end(Cause::Abandoned));
        }
    }
}

impl Service {
    /// What a sandbox gets when it asks for nothing.
    pub fn sandbox_defaults(&self) -> &SandboxDefaults {
        &self.shared.config.sandbox
    }

    /// Creates a sandbox and waits until it can be used. Dropping the future takes it down again. With a session that
    /// has a live sandbox, that one is given instead.
    ///
    /// # Errors
    /// Quota, capacity, a node that is away; nothing is left then.
    pub async fn create_sandbox(
        &self,
        org_id: &OrgId,
        request: SandboxRequest,
    ) -> Result<Started, ServiceError> {
        match request.terms.session_key.clone() {
            Some(key) => self.sandbox_of_session(org_id, &key, request).await,
            None => self.new_sandbox(org_id, request).await,
        }
    }

    pub(super) async fn new_sandbox(
        &self,
        org_id: &OrgId,
        request: SandboxRequest,
    ) -> Result<Started, ServiceError> {
        let asked = Instant::now();
        let watched = Creating::new(self.shared.metrics.clone());
        let Made {
            record,
            settled,
            warm,
        } = match self.make_sandbox(org_id, request).await {
            Ok(made) => made,
            Err(error) => {
                watched.ended(refused(&error));
                return Err(error);
            }
        };
        watched.ended(settled.as_ref().map_or(Creation::Unavailable, outcome));
        let started = started(record, settled, (asked, warm))?;
        self.shared.pool.count(org_id, warm);
        if let Some(metrics) = &started.sandbox.startup_metrics {
            self.shared.metrics.started(&metrics.breakdown, metrics.total_ms);
        }
        Ok(started)
    }

    async fn make_sandbox(&self, org_id: &OrgId, request: SandboxRequest) -> Result<Made, ServiceError> {
        let backend = self.backend()?;
        if !self.shared.node.state().ready {
            return Err(ServiceError::Unavailable(
                "the node that enforces egress is not ready".to_owned(),
            ));
        }
        if let Some(policy) = &request.policy {
            let organization = self.shared.store.organization_policy(org_id).await?;
            self.check_tiers(organization.as_ref().map(|stored| &stored.policy), Some(policy))
                .map_err(|error| super::policies::invalid("network", error))?;
            let bindings = self.chosen(org_id, &request.secrets).await?;
            if let Some(clash) = clash(policy, &bindings) {
                return Err(clash.of_policy("network"));
            }
            if let Some(rule) = unbound_rule(policy, &bindings) {
                return Err(unbound(rule, "network"));
            }
        }
        let asking = self.shared.pool.asked();
        let mut from_pool = asking.is_some();
        loop {
            let now = super::now();
            let lifetime = SignedDuration::try_from(Duration::from_secs(request.spec.timeout_seconds))
                .map_err(|error| ServiceError::Internal(error.to_string()))?;
            let id = SandboxId::random();
            let new = NewSandbox {
                authority: None,
                id,
                org_id: org_id.clone(),
                spec: request.spec.clone(),
                policy: request.policy.clone(),
                secrets: request.secrets.clone(),
                terms: request.terms.clone(),
                created_at: now,
                expires_at: now + lifetime,
            };
            let mut unwanted = Unwanted {
                service: self.clone(),
                id: None,
            };
            // The insertion and the keeper must not be separated by a client that goes away in between.
            let kept = self
                .insert_and_keep(Arc::clone(&backend), new, from_pool, request.furnishing.clone())
                .await?;
            Span::current().record("sandbox_id", tracing::field::display(&kept.id));
            self.shared.teller.tell(
                org_id,
                &kept.id,
                EventKind::SandboxCreated,
                EventDetails::default(),
            );
            unwanted.id = Some(kept.id.clone());
            let settled = keeper::settled(kept.progress).await;
            unwanted.id = None;
            if matches!(
                &settled,
                Some(Progress {
                    failure: Some(Failure::Stale),
                    ..
                })
            ) {
                // Nobody has heard of it; what is asked for can be made all the same.
                self.shared.store.mark_deleted(&kept.id, super::now()).await?;
                from_pool = false;
                continue;
            }
            return Ok(Made {
                record: self.record(org_id, &kept.id).await?,
                settled,
                warm: kept.warm,
            });
        }
    }

    pub(super) fn new_authority(
        &self,
        id: &SandboxId,
        now: Timestamp,
    ) -> Result<AuthorityRecord, ServiceError> {
        let certificate = Authority::derive(&self.shared.installation, id, FIRST_GENERATION, now)
            .and_then(|authority| authority.certificate())
            .map_err(|error| ServiceError::Internal(error.to_string()))?;
        Ok(AuthorityRecord {
            generation: FIRST_GENERATION,
            certificate,
        })
    }

    /// Takes one from the pool, or stores a new one to be made. Runs to its end also when the caller goes away.
    async fn insert_and_keep(
        &self,
        backend: Arc<LocalBackend>,
        new: NewSandbox,
        from_pool: bool,
        furnishing: Option<Arc<Furnishing>>,
    ) -> Result<Kept, ServiceError> {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let service = self.clone();
        let span = Span::current();
        self.shared
            .tasks
            .spawn_within("insert sandbox", &span, async move {
                let stored = service.claim_or_insert(new, from_pool).await;
                let kept = stored.map(|(record, warm)| {
                    let state = if warm { State::CLAIMED } else { State::NEW };
                    let id = record.id.clone();
                    let progress = service.keep_furnished(backend, record, state, furnishing);
                    Kept { id, progress, warm }
                });
                if let Err(Ok(kept)) = sender.send(kept) {
                    drop(Unwanted {
                        service,
                        id: Some(kept.id),
                    });
                }
            });
        match receiver.await {
            Ok(kept) => kept,
            Err(_stopped) => Err(ServiceError::Unavailable(
                "the controller is shutting down".to_owned(),
            )),
        }
    }

    /// The stored sandbox, and whether it runs already.
    async fn claim_or_insert(
        &self,
        mut new: NewSandbox,
        from_pool: bool,
    ) -> Result<(SandboxRecord, bool), ServiceError> {
        let limit = self.shared.config.sandbox.max_per_organization;
        if from_pool && let Some(record) = self.claim(&new, limit).await.map_err(unknown_secret)? {
            return Ok((record, true));
        }
        new.authority = Some(self.new_authority(&new.id, new.created_at)?);
        let inserted = self.shared.store.insert_sandbox(&new, limit).await;
        Ok((inserted.map_err(unknown_secret)?, false))
    }

    /// One sandbox.
    ///
    /// # Errors
    /// [`ServiceError::SandboxNotFound`].
    pub async fn sandbox(&self, org_id: &OrgId, id: &SandboxId) -> Result<Sandbox, ServiceError> {
        Ok(shown(self.record(org_id, id).await?, None))
    }

    /// A page of the organisation's sandboxes: the live ones, or also those that have ended; only those with all of
    /// these notes. A page may be short, or empty, when few of very many have them; `next` goes on then.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn sandboxes(
        &self,
        org_id: &OrgId,
        with_ended: bool,
        before: Option<i64>,
        limit: u32,
        metadata: &BTreeMap<String, String>,
    ) -> Result<SandboxPage, ServiceError> {
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        let (mut sandboxes, mut at) = (Vec::new(), before);
        for _ in 0..MOST_PAGES {
            let left = limit.saturating_sub(sandboxes.len());
            // Few of many may be wanted.
            let step = if metadata.is_empty() { left } else { STEP };
            let asked = u32::try_from(step).unwrap_or(u32::MAX);
            let records = self.shared.store.sandboxes(org_id, with_ended, at, asked).await?;
            let is_last = records.len() < step;
            for record in records {
                if sandboxes.len() == limit {
                    return Ok(SandboxPage { sandboxes, next: at });
                }
                at = Some(record.sequence);
                let noted = &record.terms.metadata;
                if metadata
                    .iter()
                    .all(|(name, value)| noted.get(name) == Some(value))
                {
                    sandboxes.push(shown(record, None));
                }
            }
            if is_last {
                return Ok(SandboxPage {
                    sandboxes,
                    next: None,
                });
            }
            if sandboxes.len() == limit {
                break;
            }
        }
        Ok(SandboxPage { sandboxes, next: at })
    }

    /// Takes a sandbox down. Doing it again is no error.
    ///
    /// # Errors
    /// [`ServiceError::SandboxNotFound`] when the organisation never had it.
    pub async fn stop_sandbox(&self, org_id: &OrgId, id: &SandboxId) -> Result<(), ServiceError> {
        let Some(record) = self.shared.store.sandbox(org_id, id).await? else {
            return self.was_deleted(org_id, id).await;
        };
        self.take_down(&record).await
    }

    /// Takes a sandbox down and forgets it. Doing it again is no error.
    ///
    /// # Errors
    /// [`ServiceError::SandboxNotFound`] when the organisation never had it.
    pub async fn delete_sandbox(&self, org_id: &OrgId, id: &SandboxId) -> Result<(), ServiceError> {
        let Some(record) = self.shared.store.sandbox(org_id, id).await? else {
            return self.was_deleted(org_id, id).await;
        };
        self.take_down(&record).await?;
        Ok(self.shared.store.mark_deleted(id, super::now()).await?)
    }

    async fn was_deleted(&self, org_id: &OrgId, id: &SandboxId) -> Result<(), ServiceError> {
        if self.shared.store.had_sandbox(org_id, id).await? {
            return Ok(());
        }
        Err(ServiceError::SandboxNotFound(id.to_string()))
    }

    async fn take_down(&self, record: &SandboxRecord) -> Result<(), ServiceError> {
        if !record.status.is_live() {
            return Ok(());
        }
        // Without the backend nobody looks after it yet.
        self.backend()?;
        if tokio::time::timeout(STOP_TIMEOUT, self.end(&record.id, Cause::Stopped))
            .await
            .is_err()
        {
            tracing::warn!(sandbox_id = %record.id, "a sandbox takes long to end; it goes on");
        }
        // Whoever looked after it may have left with this controller, and done nothing: the next one finds it running,
        // and must not find it deleted.
        let left = self.shared.store.sandbox(&record.org_id, &record.id).await?;
        if left.is_some_and(|left| left.status == SandboxStatus::Running) {
            return Err(ServiceError::Unavailable(
                "the controller is ending, and the sandbox goes on until it is asked again".to_owned(),
            ));
        }
        Ok(())
    }

    /// The stored sandbox.
    pub(super) async fn record(&self, org_id: &OrgId, id: &SandboxId) -> Result<SandboxRecord, ServiceError> {
        self.shared
            .store
            .sandbox(org_id, id)
            .await?
            .ok_or_else(|| ServiceError::SandboxNotFound(id.to_string()))
    }

    /// The stored sandbox, which must be one that can be used, and is now: it is not idle.
    pub(super) async fn running(
        &self,
        org_id: &OrgId,
        id: &SandboxId,
    ) -> Result<SandboxRecord, ServiceError> {
        let record = self.record(org_id, id).await?;
        match record.status {
            SandboxStatus::Running if record.paused => Err(ServiceError::Conflict(
                "the sandbox is paused; resume it first".to_owned(),
            )),
            SandboxStatus::Running => {
                if let Some(life) = self.life(id) {
                    life.touch();
                }
                Ok(record)
            }
            SandboxStatus::Creating
            | SandboxStatus::Terminating
            | SandboxStatus::Terminated
            | SandboxStatus::Error => Err(ServiceError::Conflict(format!(
                "the sandbox is {}, not running",
                record.status.as_str()
            ))),
        }
    }
}

/// What a creation that never began is counted as.
fn refused(error: &ServiceError) -> Creation {
    match error {
        ServiceError::Invalid { .. }
        | ServiceError::Unauthorized(_)
        | ServiceError::Forbidden(_)
        | ServiceError::SandboxNotFound(_)
        | ServiceError::FileNotFound(_)
        | ServiceError::NotFound(_)
        | ServiceError::Conflict(_)
        | ServiceError::Stale { .. }
        | ServiceError::TooLarge(_) => Creation::Invalid,
        ServiceError::Quota(_) | ServiceError::TooMany(_) => Creation::Quota,
        ServiceError::Unavailable(_) => Creation::Unavailable,
        ServiceError::Store(_) | ServiceError::Internal(_) => Creation::Failed,
    }
}

/// What one that began is counted as.
fn outcome(progress: &Progress) -> Creation {
    if progress.state == State::Running {
        return Creation::Created;
    }
    match &progress.failure {
        Some(Failure::NoCapacity(_)) => Creation::NoCapacity,
        Some(Failure::Invalid { .. } | Failure::Furnishing(_)) => Creation::Invalid,
        Some(Failure::NotEnforceable(_)) => Creation::NotEnforceable,
        Some(Failure::NodeSilent) => Creation::NodeSilent,
        Some(Failure::Stale | Failure::Internal) => Creation::Failed,
        None => Creation::Stopped,
    }
}

/// Which secret is not there is a field of the creation.
fn unknown_secret(error: StoreError) -> ServiceError {
    match error {
        StoreError::Conflict(Conflict::NoSuchSecret { index }) => ServiceError::Invalid {
            field: format!("secrets[{index}]"),
            message: "there is no secret of this name".to_owned(),
        },
        other => other.into(),
    }
}

fn started(
    record: SandboxRecord,
    settled: Option<Progress>,
    (asked, warm): (Instant, bool),
) -> Result<Started, ServiceError> {
    let Some(progress) = settled else {
        return Err(ServiceError::Unavailable(
            "the controller is shutting down".to_owned(),
        ));
    };
    if progress.state == State::Running {
        let breakdown = progress.breakdown;
        let metrics = StartupMetrics {
            total_ms: u64::try_from(asked.elapsed().as_millis()).unwrap_or(u64::MAX),
            pod_creation_ms: breakdown.prepare_ms + breakdown.enforce_ms + breakdown.launch_ms,
            pod_ready_ms: breakdown.agent_ms,
            warm,
            breakdown,
        };
        return Ok(Started {
            sandbox: shown(record, Some(metrics)),
        });
    }
    Err(match progress.failure {
        Some(Failure::NoCapacity(message)) => ServiceError::Conflict(format!("no capacity: {message}")),
        Some(Failure::Invalid { field, message }) => ServiceError::Invalid {
            field: field.to_owned(),
            message,
        },
        Some(Failure::Furnishing(message)) => ServiceError::Conflict(format!(
            "the sandbox could not be made from its template: {message}"
        )),
        Some(Failure::NotEnforceable(message)) => {
            ServiceError::Conflict(format!("the node cannot enforce the policy: {message}"))
        }
        Some(Failure::NodeSilent) => {
            ServiceError::Unavailable("the node did not acknowledge the sandbox's policy in time".to_owned())
        }
        Some(Failure::Stale | Failure::Internal) => {
            ServiceError::Internal("the sandbox could not be created".to_owned())
        }
        None => ServiceError::Conflict("the sandbox was stopped while it was being created".to_owned()),
    })
}

pub(super) fn shown(record: SandboxRecord, startup_metrics: Option<StartupMetrics>) -> Sandbox {
    Sandbox {
        sandbox_id: record.id,
        org_id: record.org_id,
        session_id: record.session_id,
        status: record.status,
        status_reason: record.status_reason,
        pod_ip: None,
        created_at: record.created_at,
        expires_at: record.expires_at,
        cpus: record.spec.cpus.to_string(),
        memory: record.spec.memory.to_string(),
        disk: record.spec.disk.to_string(),
        pids: record.spec.pids,
        isolation: record.spec.isolation,
        timeout_seconds: record.spec.timeout_seconds,
        paused: record.paused,
        reused: false,
        session_key: record.terms.session_key,
        idle_timeout_seconds: record.terms.idle_timeout_seconds,
        template_id: record.terms.template_id,
        metadata: record.terms.metadata,
        startup_metrics,
    }
}
