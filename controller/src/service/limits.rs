//! Limits of requests: by organisation for those that show a credential that works, by address for all others.

use std::{
    sync::{Mutex, PoisonError},
    time::Instant,
};

use sandgate_api::id::OrgId;

use super::{Caller, Service};
use crate::{
    config::Config,
    limiter::{Allowance, Limiter, Peer},
};

/// Organisations and addresses that are known at once. A tenth of a KiB each.
const PLACES: usize = 20_000;

/// What everybody did lately.
#[derive(Debug)]
pub(super) struct Limits {
    began: Instant,
    organizations: Option<Mutex<Limiter<OrgId>>>,
    peers: Option<Mutex<Limiter<Peer>>>,
}

impl Limits {
    pub(super) fn new(config: &Config) -> Self {
        Self {
            began: Instant::now(),
            organizations: config
                .rate_limit
                .map(|rate| Mutex::new(Limiter::new(rate, PLACES))),
            peers: config
                .peer_rate_limit
                .map(|rate| Mutex::new(Limiter::new(rate, PLACES))),
        }
    }
}

impl Service {
    /// Counts a request of somebody who was let in; none where there is no limit.
    pub fn count_caller(&self, caller: &Caller) -> Option<Allowance> {
        let limits = &self.shared.limits;
        let limiter = limits.organizations.as_ref()?;
        let mut limiter = limiter.lock().unwrap_or_else(PoisonError::into_inner);
        Some(limiter.count(caller.org_id(), limits.began.elapsed()))
    }

    /// Counts a request of somebody who was not; none where there is no limit.
    pub fn count_peer(&self, peer: &Peer) -> Option<Allowance> {
        let limits = &self.shared.limits;
        let mut limiter = limits
            .peers
            .as_ref()?
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        Some(limiter.count(peer, limits.began.elapsed()))
    }
}
