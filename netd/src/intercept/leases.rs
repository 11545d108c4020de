//! What one sandbox has on lease from the controller: the values of its secrets and its certificate authority.
//! Owns: that a value is used only while its lease lasts and only in the version the feed wants, and that the
//! controller is asked once, however many requests wait. In memory only.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::future::BoxFuture;
use sandgate_api::{
    credential::{CaLease, CaRequest, CredentialLease, CredentialRequest, LEASE_SECONDS, Sensitive},
    id::SandboxId,
};
use sandgate_relay::redact::{Needles, SecretNeedle};
use tokio::time::Instant;

use super::{
    authority::{Authority, AuthorityError},
    bindings::Bindings,
};

/// After this part of its time a lease is renewed when it is used.
const RENEWED_AFTER: Duration = Duration::from_secs(LEASE_SECONDS / 2);
/// Whoever asks within this time of a failure gets the same answer.
const FAILURE_HOLDS: Duration = Duration::from_secs(1);
/// Pause between attempts to renew a lease that still lasts.
const RENEWED_AGAIN: Duration = Duration::from_secs(5);

/// Who gives leases.
pub trait Broker: Send + Sync {
    /// The value of a secret; nothing when this sandbox has none of that name.
    fn credential(
        &self,
        request: CredentialRequest,
    ) -> BoxFuture<'_, Result<Option<CredentialLease>, BrokerError>>;
    /// A sandbox's authority; nothing when there is no such sandbox.
    fn authority(&self, request: CaRequest) -> BoxFuture<'_, Result<Option<CaLease>, BrokerError>>;
}

/// The broker did not answer.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct BrokerError(pub String);

/// There is no lease.
#[derive(Debug, thiserror::Error)]
pub enum Unavailable {
    /// The broker is away and the last lease has ended.
    #[error("the credential broker cannot be reached")]
    Unreachable,
    /// The broker says that there is none.
    #[error("the secret is gone")]
    Revoked,
    /// The broker gave an older version than the one in force.
    #[error("the credential broker has an older version")]
    Outdated,
    /// The authority cannot be used.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
}

/// A value on lease.
#[derive(Clone)]
pub struct Lease {
    /// The value.
    pub value: Arc<Sensitive>,
    version: u64,
    renew: Instant,
    ends: Instant,
}

impl fmt::Debug for Lease {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Lease(version {})", self.version)
    }
}

/// One sandbox's leases.
#[derive(Default)]
pub struct Leases {
    state: Mutex<State>,
    /// Held while the broker is asked.
    asking: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct State {
    values: HashMap<String, Lease>,
    /// As of the last look; nothing once a value came or went.
    needles: Option<Arc<Needles>>,
    authority: Option<Arc<Authority>>,
    failed: Option<Instant>,
    /// Nothing is kept any more.
    ended: bool,
}

impl Leases {
    /// The value of `secret` in `version` or a later one.
    ///
    /// # Errors
    /// See [`Unavailable`].
    pub async fn value(
        &self,
        broker: &dyn Broker,
        sandbox_id: &SandboxId,
        secret: &str,
        version: u64,
    ) -> Result<Lease, Unavailable> {
        if let Some(lease) = self.fresh(secret, version) {
            return Ok(lease);
        }
        let _turn = self.asking.lock().await;
        if let Some(lease) = self.fresh(secret, version) {
            return Ok(lease);
        }
        let now = Instant::now();
        if let Some(last) = self.last(secret, version, now)
            && self.has_failed_within(RENEWED_AGAIN, now)
        {
            return Ok(last);
        }
        if self.has_failed_within(FAILURE_HOLDS, now) {
            return Err(Unavailable::Unreachable);
        }
        let asked = CredentialRequest {
            sandbox_id: sandbox_id.clone(),
            secret: secret.to_owned(),
        };
        match broker.credential(asked).await {
            Ok(Some(given)) => {
                let lasts = Duration::from_secs(given.lease_seconds.min(LEASE_SECONDS));
                // Counted from before the question: never longer than the broker believes.
                let lease = Lease {
                    value: Arc::new(given.value),
                    version: given.version,
                    renew: now + RENEWED_AFTER.min(lasts / 2),
                    ends: now + lasts,
                };
                if lease.version < version {
                    return Err(Unavailable::Outdated);
                }
                let mut state = self.lock();
                if state.ended {
                    return Err(Unavailable::Revoked);
                }
                state.failed = None;
                let before = state.values.insert(secret.to_owned(), lease.clone());
                if before.is_none_or(|before| before.value != lease.value) {
                    state.needles = None;
                }
                Ok(lease)
            }
            Ok(None) => {
                let mut state = self.lock();
                state.values.remove(secret);
                state.needles = None;
                Err(Unavailable::Revoked)
            }
            Err(error) => {
                tracing::warn!(%error, sandbox_id = %sandbox_id, secret, "cannot renew the lease on a credential");
                self.lock().failed = Some(Instant::now());
                self.last(secret, version, Instant::now())
                    .ok_or(Unavailable::Unreachable)
            }
        }
    }

    /// The sandbox's authority of `generation`.
    ///
    /// # Errors
    /// See [`Unavailable`].
    pub async fn authority(
        &self,
        broker: &dyn Broker,
        sandbox_id: &SandboxId,
        generation: u32,
    ) -> Result<Arc<Authority>, Unavailable> {
        let kept = || {
            let authority = self.lock().authority.clone();
            authority.filter(|authority| authority.generation >= generation)
        };
        if let Some(authority) = kept() {
            return Ok(authority);
        }
        let _turn = self.asking.lock().await;
        if let Some(authority) = kept() {
            return Ok(authority);
        }
        if self.has_failed_within(FAILURE_HOLDS, Instant::now()) {
            return Err(Unavailable::Unreachable);
        }
        let asked = CaRequest {
            sandbox_id: sandbox_id.clone(),
        };
        match broker.authority(asked).await {
            Ok(Some(lease)) if lease.generation < generation => Err(Unavailable::Outdated),
            Ok(Some(lease)) => {
                let authority = Arc::new(Authority::new(&lease, super::provider())?);
                let mut state = self.lock();
                if state.ended {
                    return Err(Unavailable::Revoked);
                }
                state.authority = Some(Arc::clone(&authority));
                Ok(authority)
            }
            Ok(None) => Err(Unavailable::Revoked),
            Err(error) => {
                tracing::warn!(%error, sandbox_id = %sandbox_id, "cannot get the lease on an authority");
                self.lock().failed = Some(Instant::now());
                Err(Unavailable::Unreachable)
            }
        }
    }

    /// Drops what new rules make void.
    pub fn retain(&self, bindings: &Bindings, generation: u32) {
        let mut state = self.lock();
        state.values.retain(|secret, lease| {
            bindings
                .version(secret)
                .is_some_and(|wanted| lease.version >= wanted)
        });
        state.needles = None;
        if state
            .authority
            .as_ref()
            .is_some_and(|authority| authority.generation < generation)
        {
            state.authority = None;
        }
        // What the controller knows is new: worth asking again at once.
        state.failed = None;
    }

    /// Drops everything, also what the broker is still to answer: the sandbox is gone.
    pub fn end(&self) {
        *self.lock() = State {
            ended: true,
            ..State::default()
        };
    }

    /// Drops values whose lease has ended.
    pub fn sweep(&self) {
        let now = Instant::now();
        let mut state = self.lock();
        let before = state.values.len();
        state.values.retain(|_, lease| lease.ends > now);
        if state.values.len() != before {
            state.needles = None;
        }
    }

    /// Every value that is on lease, compiled for looking: what must not reach the sandbox.
    pub fn needles(&self) -> Arc<Needles> {
        let mut state = self.lock();
        if let Some(needles) = &state.needles {
            return Arc::clone(needles);
        }
        let needle = |(name, lease): (&String, &Lease)| {
            SecretNeedle::new(name.as_str(), lease.value.expose().as_bytes())
        };
        let needles = Arc::new(Needles::new(state.values.iter().map(needle).collect()));
        state.needles = Some(Arc::clone(&needles));
        needles
    }

    fn fresh(&self, secret: &str, version: u64) -> Option<Lease> {
        let now = Instant::now();
        let state = self.lock();
        let lease = state.values.get(secret)?;
        (lease.version >= version && now < lease.renew).then(|| lease.clone())
    }

    fn last(&self, secret: &str, version: u64, now: Instant) -> Option<Lease> {
        let state = self.lock();
        let lease = state.values.get(secret)?;
        (lease.version >= version && now < lease.ends).then(|| lease.clone())
    }

    fn has_failed_within(&self, time: Duration, now: Instant) -> bool {
        self.lock()
            .failed
            .is_some_and(|failed| now.duration_since(failed) < time)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    /// Counts questions; answers with a version, or not at all when it is 0.
    #[derive(Default)]
    struct Counting {
        version: AtomicU64,
        asked: AtomicU64,
    }

    impl Broker for Counting {
        fn credential(
            &self,
            _request: CredentialRequest,
        ) -> BoxFuture<'_, Result<Option<CredentialLease>, BrokerError>> {
            self.asked.fetch_add(1, Ordering::Relaxed);
            let version = self.version.load(Ordering::Relaxed);
            Box::pin(async move {
                if version == 0 {
                    return Err(BrokerError("away".to_owned()));
                }
                Ok(Some(CredentialLease {
                    value: Sensitive::new(format!("value-{version}")),
                    version,
                    lease_seconds: 60,
                }))
            })
        }

        fn authority(&self, _request: CaRequest) -> BoxFuture<'_, Result<Option<CaLease>, BrokerError>> {
            Box::pin(async { Ok(None) })
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_value_is_used_no_longer_than_its_lease() {
        let broker = Counting::default();
        broker.version.store(1, Ordering::Relaxed);
        let (leases, id) = (Leases::default(), SandboxId::random());
        let get = || leases.value(&broker, &id, "KEY", 1);
        assert_eq!(get().await.expect("leased").value.expose(), "value-1");
        get().await.expect("leased");
        assert_eq!(broker.asked.load(Ordering::Relaxed), 1, "asked again too early");

        broker.version.store(0, Ordering::Relaxed);
        tokio::time::advance(Duration::from_secs(50)).await;
        get().await.expect("the lease still lasts");
        assert_eq!(broker.asked.load(Ordering::Relaxed), 2, "not renewed");
        tokio::time::advance(Duration::from_secs(11)).await;
        assert!(matches!(get().await, Err(Unavailable::Unreachable)));
        assert!(leases.needles().find(b"value-1").is_some());
        leases.sweep();
        assert!(leases.needles().is_empty(), "kept after its lease");
    }

    #[tokio::test(start_paused = true)]
    async fn another_version_or_no_binding_voids_the_lease_at_once() {
        let broker = Counting::default();
        broker.version.store(1, Ordering::Relaxed);
        let (leases, id) = (Leases::default(), SandboxId::random());
        leases.value(&broker, &id, "KEY", 1).await.expect("leased");
        assert!(matches!(
            leases.value(&broker, &id, "KEY", 2).await,
            Err(Unavailable::Outdated)
        ));
        broker.version.store(2, Ordering::Relaxed);
        let lease = leases.value(&broker, &id, "KEY", 2).await.expect("leased");
        assert_eq!(lease.value.expose(), "value-2");
        leases.retain(&Bindings::default(), 0);
        assert!(leases.needles().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_on_lease_once_the_sandbox_is_gone() {
        let broker = Counting::default();
        broker.version.store(1, Ordering::Relaxed);
        let (leases, id) = (Leases::default(), SandboxId::random());
        leases.value(&broker, &id, "KEY", 1).await.expect("leased");
        assert!(leases.needles().find(b"value-1").is_some());
        leases.end();
        assert!(leases.needles().is_empty(), "kept after the sandbox");
        let late = leases.value(&broker, &id, "KEY", 1).await;
        assert!(matches!(late, Err(Unavailable::Revoked)), "leased anew");
        assert!(leases.needles().is_empty());
    }
}
