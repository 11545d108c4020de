//! The warm pool: sandboxes that run before anybody asks for them, so that a creation need not wait for one.
//!
//! A member is nobody's: it stands in a table of its own that no tenant's query reads, on the feed under rules that
//! allow nothing, and nothing runs in it but the agent. A claim is one transaction of the store, so that each can be
//! taken once; it is usable when the node has acknowledged its owner's rules. Nothing comes back into the pool.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use jiff::{SignedDuration, Timestamp};
use sandgate_api::{
    id::{OrgId, SandboxId},
    rest::{Isolation, PoolStats},
};
use tokio::sync::{Notify, watch};

use super::{
    Service, ServiceError,
    keeper::{self, Keeper, Progress},
};
use crate::{
    backend::LocalBackend,
    config::{PoolConfig, SandboxDefaults},
    lifecycle::{Cause, State},
    pool::{Demand, Plan},
    spec::SandboxSpec,
    store::{Conflict, NewSandbox, PoolRecord, PoolStatus, SandboxRecord, StoreError},
};

/// How long a member waits to be taken. A newer one has what was changed meanwhile around it.
const LONGEST_WAIT: SignedDuration = SignedDuration::from_hours(1);

/// Longest wait for a member to give way.
const MAKE_ROOM: Duration = Duration::from_secs(10);

/// Largest environment, encoded, that an agent is given by a claim. A larger one is laid into the cradle: a sandbox
/// made for it has no such limit.
const LARGEST_CLAIM: usize = 128 * 1024;

/// Most organisations whose hits and misses are counted.
const MOST_COUNTS: usize = 10_000;

/// What is known of the pool. The store decides who takes a member; this knows whom to ask for.
pub(super) struct Pool {
    config: PoolConfig,
    state: Mutex<PoolState>,
    /// Told whenever there is something to plan.
    changed: Notify,
}

struct PoolState {
    demand: Demand,
    members: HashMap<SandboxId, Member>,
    counts: HashMap<OrgId, Counts>,
}

struct Member {
    record: PoolRecord,
    keeper: Keeper,
    /// Somebody is about to claim it.
    taken: bool,
}

#[derive(Debug, Default, Clone, Copy)]
struct Counts {
    hits: u64,
    misses: u64,
}

/// A creation is under way while this exists.
pub(super) struct Asking<'a>(&'a Pool);

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        self.0.lock().demand.ended();
        self.0.changed.notify_one();
    }
}

impl Pool {
    pub(super) fn new(config: PoolConfig) -> Self {
        let state = PoolState {
            demand: Demand::new(config.size, Instant::now()),
            members: HashMap::new(),
            counts: HashMap::new(),
        };
        Self {
            config,
            state: Mutex::new(state),
            changed: Notify::new(),
        }
    }

    /// A creation begins.
    pub(super) fn asked(&self) -> Option<Asking<'_>> {
        if !self.config.enabled {
            return None;
        }
        self.lock().demand.began(Instant::now());
        Some(Asking(self))
    }

    /// A creation has succeeded.
    pub(super) fn count(&self, org_id: &OrgId, hit: bool) {
        let mut state = self.lock();
        if !self.config.enabled || state.counts.len() >= MOST_COUNTS && !state.counts.contains_key(org_id) {
            return;
        }
        let counts = state.counts.entry(org_id.clone()).or_default();
        if hit {
            counts.hits += 1;
        } else {
            counts.misses += 1;
        }
    }

    pub(super) fn insert(&self, record: PoolRecord, keeper: Keeper) {
        let member = Member {
            keeper,
            taken: false,
            record,
        };
        let mut state = self.lock();
        state.members.insert(member.record.id.clone(), member);
    }

    pub(super) fn remove(&self, id: &SandboxId) {
        self.lock().members.remove(id);
        self.changed.notify_one();
    }

    /// The member that has waited longest, if one is ready. Nobody else gets it meanwhile.
    fn take(&self) -> Option<PoolRecord> {
        let mut state = self.lock();
        let ready = state.members.values_mut().filter(|member| member.is_ready());
        let member = ready.min_by_key(|member| member.record.created_at)?;
        member.taken = true;
        Some(member.record.clone())
    }

    fn give_back(&self, id: &SandboxId) {
        if let Some(member) = self.lock().members.get_mut(id) {
            member.taken = false;
        }
    }

    /// It is its owner's now.
    fn claimed(&self, id: &SandboxId) {
        if let Some(member) = self.lock().members.get(id) {
            member.keeper.release();
        }
    }

    /// Takes a member away for a sandbox that somebody asked for and that finds no room: so many bytes of disk are
    /// missing, or something else that every member holds one of. False when there is none, or when all of them
    /// together hold too little: whoever asks for more than there is takes nothing away from others.
    pub(super) async fn make_room(&self, missing: u64) -> bool {
        let ending = {
            let mut state = self.lock();
            // The youngest has had the least use.
            let free = || state.members.values().filter(|member| !member.taken);
            let held = free().fold(0_u64, |held, member| {
                held.saturating_add(member.record.spec.disk.bytes())
            });
            if missing > held {
                return false;
            }
            let youngest = free().max_by_key(|member| member.record.created_at);
            let ending = youngest.map(|member| {
                tracing::info!(sandbox_id = %member.record.id, "a sandbox of the pool makes room");
                member.keeper.end(Cause::Retired)
            });
            state.demand.yielded(Instant::now());
            ending
        };
        let Some(ending) = ending else { return false };
        tokio::time::timeout(MAKE_ROOM, keeper::gone(ending))
            .await
            .is_ok()
    }

    /// What is to be done now.
    fn plan(&self) -> Plan {
        let mut state = self.lock();
        let members = state.members.values().filter(|member| !member.taken).count();
        let members = u32::try_from(members).unwrap_or(u32::MAX);
        state.demand.plan(members, Instant::now())
    }

    fn stats(&self, org_id: &OrgId) -> PoolStats {
        let state = self.lock();
        let count = |fits: fn(&Member) -> bool| {
            let members = state.members.values().filter(|member| fits(member));
            u32::try_from(members.count()).unwrap_or(u32::MAX)
        };
        let ready = count(Member::is_ready);
        let creating = count(|member| matches!(member.keeper.state(), State::Creating { .. }));
        let counts = state.counts.get(org_id).copied().unwrap_or_default();
        let all = counts.hits + counts.misses;
        #[expect(clippy::cast_precision_loss, reason = "a rate needs no more")]
        let hit_rate = if all == 0 {
            0.0
        } else {
            counts.hits as f64 / all as f64
        };
        PoolStats {
            total: ready + creating,
            ready,
            creating,
            enabled: self.config.enabled,
            size: self.config.size,
            hits: counts.hits,
            misses: counts.misses,
            hit_rate,
        }
    }

    fn lock(&self) -> MutexGuard<'_, PoolState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Member {
    fn is_ready(&self) -> bool {
        !self.taken && self.keeper.state() == State::Running
    }
}

/// When a member has waited long enough.
pub(super) fn best_before(member: &PoolRecord) -> Timestamp {
    member
        .created_at
        .saturating_add(LONGEST_WAIT)
        .unwrap_or(Timestamp::MAX)
}

/// What every member is made with: what a sandbox gets that asks for nothing.
fn default_spec(defaults: &SandboxDefaults) -> SandboxSpec {
    SandboxSpec {
        cpus: defaults.cpus.clone(),
        memory: defaults.memory.clone(),
        disk: defaults.disk.clone(),
        pids: defaults.pids,
        timeout_seconds: defaults.timeout_seconds,
        env: std::collections::BTreeMap::new(),
        isolation: Isolation::Container,
    }
}

/// Whether a sandbox made with `made` can be given to somebody who asked for `wanted`. Lifetime and environment are
/// given by the claim.
fn fits(made: &SandboxSpec, wanted: &SandboxSpec) -> bool {
    made.same_resources(wanted)
        && serde_json::to_vec(&wanted.env).is_ok_and(|encoded| encoded.len() <= LARGEST_CLAIM)
}

impl Service {
    /// How the pool is, and what it was worth to an organisation.
    pub fn pool_stats(&self, org_id: &OrgId) -> PoolStats {
        self.shared.pool.stats(org_id)
    }

    /// Takes a member for a sandbox of this kind; none when none fits or is ready.
    ///
    /// # Errors
    /// What a creation from nothing would meet as well; the member is ready for others then.
    pub(super) async fn claim(
        &self,
        wanted: &NewSandbox,
        limit: u32,
    ) -> Result<Option<SandboxRecord>, StoreError> {
        let pool = &self.shared.pool;
        if !fits(&default_spec(&self.shared.config.sandbox), &wanted.spec) {
            return Ok(None);
        }
        while let Some(member) = pool.take() {
            let id = member.id.clone();
            let sandbox = NewSandbox {
                id: member.id,
                authority: Some(member.authority),
                ..wanted.clone()
            };
            match self.shared.store.claim_pooled(&sandbox, limit).await {
                Ok(record) => {
                    pool.claimed(&id);
                    return Ok(Some(record));
                }
                // It has begun to end in this moment: its keeper sees to it.
                Err(StoreError::Conflict(Conflict::WrongState)) => {}
                Err(error) => {
                    pool.give_back(&id);
                    return Err(error);
                }
            }
        }
        Ok(None)
    }

    /// Goes on with the members that an earlier controller made: those that are what would be made today, and whose
    /// first process lives, are asked whether they answer; the others are taken away.
    pub(super) fn adopt_pooled(
        &self,
        backend: &Arc<LocalBackend>,
        members: Vec<PoolRecord>,
        mut running: impl FnMut(&SandboxId) -> Option<bool>,
    ) {
        let wanted = default_spec(&self.shared.config.sandbox);
        let config = self.shared.pool.config;
        let mut room = if config.enabled { config.size } else { 0 };
        for member in members {
            let alive = running(&member.id);
            let is_current = member.spec.same_resources(&wanted) && member.build == backend.build();
            let state = match (member.status, alive) {
                (PoolStatus::Ready, Some(true)) if is_current && room > 0 => {
                    room -= 1;
                    State::ADOPTED
                }
                (PoolStatus::Ready, Some(true)) => State::ending(Cause::Retired),
                (PoolStatus::Ready, Some(false)) => State::ending(Cause::Died),
                (PoolStatus::Ready, None) => State::ending(Cause::Lost),
                (PoolStatus::Creating, _) => State::ending(Cause::Interrupted),
                (PoolStatus::Ending, _) => State::ending(Cause::Retired),
            };
            tracing::info!(sandbox_id = %member.id, ?alive, ?state, "of the pool, after a restart");
            drop(self.keep(Arc::clone(backend), member, state));
        }
    }

    /// Keeps the pool as full as it should be, until the tasks drain.
    pub(super) async fn fill_pool(self, backend: Arc<LocalBackend>) {
        let pool = &self.shared.pool;
        if !pool.config.enabled {
            return;
        }
        let shutdown = self.shared.tasks.shutdown();
        let mut node = self.shared.node.watch();
        loop {
            // Told once for any number of changes, also for those since the last look.
            let changed = pool.changed.notified();
            let plan = if node.borrow_and_update().ready {
                pool.plan()
            } else {
                Plan::Rest
            };
            let pause = match plan {
                Plan::Make => {
                    tokio::select! {
                        () = shutdown.cancelled() => return,
                        () = self.make_member(&backend) => {}
                    }
                    continue;
                }
                Plan::Wait(pause) => pause,
                // Demand fades without anybody saying so.
                Plan::Rest => Duration::from_secs(60),
            };
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = changed => {}
                ready = node.changed() => if ready.is_err() { return },
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// Makes one member, and learns from how that went.
    async fn make_member(&self, backend: &Arc<LocalBackend>) {
        let pool = &self.shared.pool;
        let made = match self.begin_member(backend).await {
            Ok(progress) => keeper::settled(progress).await,
            Err(error) => {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "a sandbox of the pool cannot be begun"
                );
                None
            }
        };
        let mut state = pool.lock();
        let now = Instant::now();
        match made {
            Some(Progress {
                state: State::Running,
                ..
            }) => state.demand.made(),
            Some(Progress {
                failure: Some(keeper::Failure::NoCapacity(_)),
                ..
            }) => state.demand.yielded(now),
            Some(_) | None => state.demand.failed(now),
        }
    }

    async fn begin_member(
        &self,
        backend: &Arc<LocalBackend>,
    ) -> Result<watch::Receiver<Progress>, ServiceError> {
        let id = SandboxId::random();
        let now = super::now();
        let member = PoolRecord {
            status: PoolStatus::Creating,
            spec: default_spec(&self.shared.config.sandbox),
            build: backend.build(),
            created_at: now,
            authority: self.new_authority(&id, now)?,
            id,
        };
        self.shared.store.insert_pooled(&member).await?;
        Ok(self.keep(Arc::clone(backend), member, State::NEW))
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;

    use super::*;
    use crate::{
        config::{Config, Settings},
        spec::Size,
        store::AuthorityRecord,
    };

    /// A pool with a member that runs and holds a disk of a gibibyte, and what its keeper is asked for.
    fn pool_of_one() -> (Pool, SandboxId, mpsc::Receiver<Cause>, watch::Sender<Progress>) {
        let config = Config::new(&Settings::default()).expect("defaults");
        let pool = Pool::new(PoolConfig {
            enabled: true,
            size: 1,
        });
        let mut spec = default_spec(&config.sandbox);
        spec.disk = Size::disk("1Gi").expect("disk");
        let record = PoolRecord {
            id: SandboxId::random(),
            status: PoolStatus::Ready,
            spec,
            build: "1".to_owned(),
            created_at: Timestamp::now(),
            authority: AuthorityRecord {
                generation: 1,
                certificate: "PEM".to_owned(),
            },
        };
        let id = record.id.clone();
        let (keeper, ending, progress) = Keeper::without_task(State::Running);
        pool.insert(record, keeper);
        (pool, id, ending, progress)
    }

    #[tokio::test]
    async fn who_asks_for_more_than_members_hold_takes_none_of_them() {
        let (pool, id, mut ending, progress) = pool_of_one();
        assert!(!pool.make_room((1 << 30) + 1).await);
        assert!(ending.try_recv().is_err(), "it was left alone");

        let (has_room, cause) = tokio::join!(pool.make_room(1 << 30), async {
            let cause = ending.recv().await;
            progress.send_modify(|progress| progress.state = State::Ended(Cause::Retired));
            cause
        });
        assert!(has_room);
        assert_eq!(cause, Some(Cause::Retired));

        pool.remove(&id);
        assert!(!pool.make_room(0).await, "none is left");
    }

    #[test]
    fn only_who_asks_for_what_is_there_gets_it() {
        let config = Config::new(&Settings::default()).expect("defaults");
        let made = default_spec(&config.sandbox);
        let mut wanted = made.clone();
        wanted.timeout_seconds = 86_400;
        wanted.env.insert("A".to_owned(), "b".to_owned());
        assert!(fits(&made, &wanted));
        // The same in other words.
        wanted.cpus = "2000m".parse().expect("cpus");
        wanted.memory = Size::memory("2048Mi").expect("memory");
        assert!(fits(&made, &wanted));
        let other = |change: fn(&mut SandboxSpec)| {
            let mut wanted = made.clone();
            change(&mut wanted);
            wanted
        };
        for wanted in [
            other(|spec| spec.cpus = "1".parse().expect("cpus")),
            other(|spec| spec.memory = Size::memory("1Gi").expect("memory")),
            other(|spec| spec.disk = Size::disk("1Gi").expect("disk")),
            other(|spec| spec.pids += 1),
            // Six bytes each on the way to the agent.
            other(|spec| drop(spec.env.insert("A".to_owned(), "\u{1}".repeat(40_000)))),
        ] {
            assert!(!fits(&made, &wanted), "{wanted:?}");
        }
    }
}
