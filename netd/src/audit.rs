//! The egress audit on its way from decision to controller. Owns: making records, putting equal denials
//! together, the bounded queue on disk, and what happens when it is full. Never decides about traffic beyond saying
//! whether a new flow could still be recorded. Never sees payload, queries or bodies.

pub mod delivery;
mod gather;
pub mod packets;
pub mod passed;
mod queue;
pub mod spool;

use std::{
    net::IpAddr,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use jiff::Timestamp;
use sandgate_api::{
    audit::{AlertKind, AuditEvent, AuditGap},
    id::{OrgId, SandboxId},
};
use sandgate_policy::{FailureMode, Reason};
use tokio::{sync::Notify, time::MissedTickBehavior};

use self::{
    gather::Gatherer,
    queue::Queue,
    spool::{Recovered, Spool},
};
use crate::{
    metrics::Metrics,
    sandbox::{Decision, Sandbox},
};

/// How long equal denials are put together before they become a record.
pub const GATHER_TIME: Duration = Duration::from_secs(1);

/// Where records wait for the controller.
pub struct Audit {
    metrics: Metrics,
    state: Mutex<State>,
    /// Told when there is something to deliver.
    filled: Notify,
}

struct State {
    queue: Queue,
    gatherer: Gatherer,
}

/// Whose records these are, and what happens when they cannot be kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    /// Which sandbox.
    pub sandbox_id: SandboxId,
    /// Its owner.
    pub org_id: OrgId,
    /// Whether flows go on when they cannot be recorded.
    pub mode: FailureMode,
}

impl Owner {
    /// The owner of a sandbox's records.
    pub fn of(sandbox: &Sandbox) -> Self {
        Self {
            sandbox_id: sandbox.id.clone(),
            org_id: sandbox.org_id(),
            mode: sandbox.failure_mode(),
        }
    }
}

/// What was tried, as far as it is known.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Attempt {
    /// `tls`, `https` (one request inside it), `http`, `tcp`, `udp`, `dns`, `icmp` or `ip`.
    pub protocol: &'static str,
    /// The name it was for.
    pub host: Option<String>,
    /// The destination's address.
    pub ip: Option<IpAddr>,
    /// The destination's port.
    pub port: Option<u16>,
    /// The method of a request that was read.
    pub method: Option<String>,
    /// Its path, without the query.
    pub path: Option<String>,
    /// The name of the secret that went into it.
    pub credential: Option<String>,
    /// What people should know besides, for example the error of an upstream connect.
    pub detail: Option<String>,
    /// What makes it an alert that its reason does not tell.
    pub alert: Option<AlertKind>,
}

/// What a flow that was admitted came to.
#[derive(Debug, Clone, Copy)]
pub struct Passed {
    /// When it began.
    pub began: Timestamp,
    /// How long it lasted.
    pub lasted: Duration,
    /// Bytes from the sandbox.
    pub up: u64,
    /// Bytes to the sandbox.
    pub down: u64,
}

impl Audit {
    /// Counts what it records in `metrics`, keeps it in the spool, and goes on with what the spool held.
    pub fn new(metrics: Metrics, (spool, left): (Spool, Recovered)) -> Self {
        let audit = Self {
            metrics,
            state: Mutex::new(State {
                queue: Queue::new(spool, left),
                gatherer: Gatherer::default(),
            }),
            filled: Notify::new(),
        };
        audit.filled.notify_one();
        audit
    }

    /// Bytes in the spool of records that wait.
    pub fn spooled(&self) -> u64 {
        self.lock().queue.bytes()
    }

    /// Records that wait to be delivered.
    pub fn waiting(&self) -> usize {
        self.lock().queue.len()
    }

    /// Records that a full queue gave up since netd began.
    pub fn lost(&self) -> u64 {
        self.lock().queue.lost()
    }

    /// Whether a new flow of this sandbox could be recorded, or need not be.
    pub fn has_room(&self, owner: &Owner) -> bool {
        match owner.mode {
            FailureMode::FailOpen => true,
            FailureMode::FailClosed => self.lock().queue.has_room(&owner.sandbox_id),
        }
    }

    /// Records a denial, carried out or not, put together with equal ones of the same second.
    pub fn deny(&self, owner: &Owner, decision: &Decision, attempt: Attempt, repeated: u64) {
        self.metrics
            .decided(attempt.protocol, decision.verdict(), decision.reason, repeated);
        self.lock().gatherer.add(
            owner.clone(),
            decision.clone(),
            attempt,
            repeated,
            Timestamp::now(),
        );
    }

    /// Records a flow that was admitted, however it ended, or a request inside it. Returns the record's id.
    pub fn flow(&self, owner: &Owner, decision: &Decision, attempt: Attempt, passed: Passed) -> String {
        self.metrics
            .decided(attempt.protocol, decision.verdict(), decision.reason, 1);
        self.begun(owner, decision, attempt, passed)
    }

    /// Records that a flow was admitted which will be recorded again when it ends, and is counted then. Returns
    /// the record's id.
    pub fn begun(&self, owner: &Owner, decision: &Decision, attempt: Attempt, passed: Passed) -> String {
        let event = event(owner, decision, attempt, passed, 1);
        let id = event.id.clone();
        self.lock().queue.push(owner.mode, event);
        self.filled.notify_one();
        id
    }

    /// Turns gathered denials into records every [`GATHER_TIME`], until dropped.
    pub async fn gather(&self) {
        let mut ticks = tokio::time::interval(GATHER_TIME);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            self.settle();
            self.sync().await;
        }
    }

    /// Forces what was recorded so far to the disk.
    pub async fn sync(&self) {
        let files = self.lock().queue.unsynced();
        if files.is_empty() {
            return;
        }
        let syncing = move || files.iter().try_for_each(|file| file.sync_data());
        match tokio::task::spawn_blocking(syncing).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!(%error, "the audit's spool cannot be forced to the disk"),
            Err(_panic) => tracing::error!("forcing the audit's spool to the disk broke"),
        }
    }

    /// Turns the denials gathered so far into records.
    pub fn settle(&self) {
        let mut state = self.lock();
        let State { queue, gatherer } = &mut *state;
        let mut any = false;
        gatherer.drain(|gathered| {
            let owner = &gathered.owner;
            if owner.mode == FailureMode::FailClosed && !queue.has_room(&owner.sandbox_id) {
                // Stays where it is and goes on counting: nothing is lost, and nothing grows.
                return false;
            }
            let passed = Passed {
                began: gathered.first,
                lasted: Duration::ZERO,
                up: 0,
                down: 0,
            };
            let attempt = gathered.attempt.clone();
            queue.push(
                owner.mode,
                event(owner, gathered.decision, attempt, passed, gathered.repeated),
            );
            any = true;
            true
        });
        queue.settle();
        drop(state);
        if any {
            self.filled.notify_one();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn event(owner: &Owner, decision: &Decision, attempt: Attempt, passed: Passed, repeated: u64) -> AuditEvent {
    let event = AuditEvent {
        id: uuid::Uuid::now_v7().to_string(),
        time: passed.began,
        org_id: owner.org_id.clone(),
        sandbox_id: owner.sandbox_id.clone(),
        verdict: decision.verdict(),
        reason: decision.reason,
        tier: decision.tier,
        rule: decision.rule.clone(),
        protocol: attempt.protocol.to_owned(),
        host: attempt.host,
        ip: attempt.ip,
        port: attempt.port,
        method: attempt.method,
        path: attempt.path,
        credential: attempt.credential,
        bytes_up: passed.up,
        bytes_down: passed.down,
        duration_ms: u64::try_from(passed.lasted.as_millis()).unwrap_or(u64::MAX),
        repeated,
        detail: attempt.detail,
        gap: None,
        alert: attempt.alert,
    };
    tracing::info!(
        target: "audit",
        sandbox_id = %event.sandbox_id,
        verdict = event.verdict.as_str(),
        reason = event.reason.as_str(),
        rule = event.rule,
        protocol = event.protocol,
        host = event.host,
        ip = event.ip.map(tracing::field::display),
        port = event.port,
        method = event.method,
        path = event.path,
        credential = event.credential,
        bytes_up = event.bytes_up,
        bytes_down = event.bytes_down,
        duration_ms = event.duration_ms,
        repeated = event.repeated,
    );
    event
}

/// The record that stands for others which found no room.
fn gap(sandbox_id: &SandboxId, org_id: &OrgId, lost: u64) -> AuditEvent {
    let owner = Owner {
        sandbox_id: sandbox_id.clone(),
        org_id: org_id.clone(),
        mode: FailureMode::FailOpen,
    };
    let attempt = Attempt {
        protocol: "ip",
        detail: Some(format!(
            "{lost} attempts have no record: there was no room for more, and the oldest were given up"
        )),
        alert: Some(AlertKind::AuditFull),
        ..Attempt::default()
    };
    let passed = Passed {
        began: Timestamp::now(),
        lasted: Duration::ZERO,
        up: 0,
        down: 0,
    };
    AuditEvent {
        gap: Some(AuditGap::default()),
        ..event(&owner, &Decision::of(Reason::Quota), attempt, passed, lost)
    }
}

#[cfg(test)]
mod tests;
