//! What sandboxes use: read every ten seconds, kept for half an hour, and added up in the store.
//!
//! Counters of control groups and interfaces only grow and belong to one sandbox, so what was used while no controller
//! looked is added when one looks again. Only memory times time is lost then.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use jiff::Timestamp;
use sandgate_api::{
    id::{OrgId, SandboxId},
    rest::{MetricsSummary, ResourceMetrics, Share, Traffic},
};
use tokio::time::Instant;

use super::{Service, ServiceError, Shared};
use crate::{
    backend::{LocalBackend, Reading},
    spec::SandboxSpec,
    store::{Amounts, SandboxRecord, Used, hour_of},
};

/// How often everything is read.
const INTERVAL: Duration = Duration::from_secs(10);

/// How many readings are kept of each sandbox: half an hour of them.
pub const KEPT: u32 = 180;

/// How many readings are added up before they are stored.
const STORING: u32 = 6;

/// Shortest time over which a use of processors is told: over less it says nothing.
const SHORTEST: Duration = Duration::from_millis(200);

/// What is known of the use of running sandboxes.
#[derive(Default)]
pub(super) struct Meters(Mutex<HashMap<SandboxId, Meter>>);

/// One sandbox's.
#[derive(Debug)]
struct Meter {
    org_id: OrgId,
    limits: Limits,
    last: Option<Taken>,
    ring: VecDeque<ResourceMetrics>,
    /// What of the counters is counted already.
    cpu_micros: u64,
    network_bytes: u64,
    /// What is counted and not stored yet, by the hour.
    pending: BTreeMap<i64, Amounts>,
}

#[derive(Debug, Clone, Copy)]
struct Limits {
    cpu_millis: u64,
    memory_bytes: u64,
    pids: u64,
}

#[derive(Debug, Clone, Copy)]
struct Taken {
    at: Instant,
    reading: Reading,
    /// Processors in use before it.
    cpu: f64,
}

impl Meters {
    fn lock(&self) -> MutexGuard<'_, HashMap<SandboxId, Meter>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The sandbox is gone, and what it used is stored or given back by [`Meters::take`].
    pub(super) fn close(&self, id: &SandboxId) {
        self.lock().remove(id);
    }

    fn note(&self, id: &SandboxId, reading: Reading) {
        if let Some(meter) = self.lock().get_mut(id) {
            meter.note(reading, Instant::now(), super::now());
        }
    }

    /// What is counted and not stored, of one sandbox or of all.
    fn take(&self, of: Option<&SandboxId>) -> Vec<Used> {
        let mut meters = self.lock();
        let wanted = meters
            .iter_mut()
            .filter(|(id, _)| of.is_none_or(|wanted| wanted == *id));
        wanted
            .flat_map(|(id, meter)| {
                let org_id = meter.org_id.clone();
                let pending = std::mem::take(&mut meter.pending);
                pending.into_iter().map(move |(hour, amounts)| Used {
                    org_id: org_id.clone(),
                    sandbox_id: id.clone(),
                    hour,
                    amounts,
                })
            })
            .collect()
    }

    /// It could not be stored.
    fn give_back(&self, used: Vec<Used>) {
        let mut meters = self.lock();
        for used in used {
            if let Some(meter) = meters.get_mut(&used.sandbox_id) {
                let pending = meter.pending.entry(used.hour).or_default();
                *pending = pending.plus(used.amounts);
            }
        }
    }
}

impl Meter {
    fn new(org_id: OrgId, spec: &SandboxSpec, stored: Amounts) -> Self {
        Self {
            org_id,
            limits: Limits {
                cpu_millis: spec.cpus.millis(),
                memory_bytes: spec.memory.bytes(),
                pids: spec.pids,
            },
            last: None,
            ring: VecDeque::new(),
            cpu_micros: stored.cpu_micros,
            network_bytes: stored.network_bytes,
            pending: BTreeMap::new(),
        }
    }

    /// Adds what was used since the reading before, and keeps this one.
    fn note(&mut self, reading: Reading, at: Instant, now: Timestamp) {
        let cpu_micros = u64::try_from(reading.cpu.as_micros()).unwrap_or(u64::MAX);
        let network_bytes = reading.sent_bytes.saturating_add(reading.received_bytes);
        let passed = self
            .last
            .map_or(Duration::ZERO, |last| at.saturating_duration_since(last.at));
        let millis = u64::try_from(passed.as_millis()).unwrap_or(u64::MAX);
        let amounts = Amounts {
            cpu_micros: cpu_micros.saturating_sub(self.cpu_micros),
            memory_kib_seconds: (reading.memory_bytes / 1024).saturating_mul(millis) / 1000,
            network_bytes: network_bytes.saturating_sub(self.network_bytes),
            creations: 0,
        };
        self.cpu_micros = self.cpu_micros.max(cpu_micros);
        self.network_bytes = self.network_bytes.max(network_bytes);
        if !amounts.is_nothing() {
            let pending = self.pending.entry(hour_of(now)).or_default();
            *pending = pending.plus(amounts);
        }
        let taken = self.taken(reading, at);
        self.last = Some(taken);
        if self.ring.len() >= usize::try_from(KEPT).unwrap_or(usize::MAX) {
            self.ring.pop_front();
        }
        self.ring.push_back(self.shown(taken, now));
    }

    fn taken(&self, reading: Reading, at: Instant) -> Taken {
        let cpu = self.last.map_or(0.0, |last| {
            let passed = at.saturating_duration_since(last.at);
            if passed < SHORTEST {
                return last.cpu;
            }
            reading.cpu.saturating_sub(last.reading.cpu).as_secs_f64() / passed.as_secs_f64()
        });
        Taken { at, reading, cpu }
    }

    fn shown(&self, taken: Taken, now: Timestamp) -> ResourceMetrics {
        let Taken { reading, cpu, .. } = taken;
        ResourceMetrics {
            timestamp: now,
            cpu: share(cpu, float(self.limits.cpu_millis) / 1000.0),
            memory: share(float(reading.memory_bytes), float(self.limits.memory_bytes)),
            storage: share(float(reading.disk_bytes), float(reading.disk_limit)),
            processes: share(float(reading.processes), float(self.limits.pids)),
            network: Traffic {
                sent: reading.sent_bytes,
                received: reading.received_bytes,
            },
        }
    }
}

fn share(usage: f64, limit: f64) -> Share {
    let percentage = if limit > 0.0 { usage / limit * 100.0 } else { 0.0 };
    Share {
        usage,
        limit,
        percentage: percentage.clamp(0.0, 100.0),
    }
}

#[expect(clippy::cast_precision_loss, reason = "a measurement needs no more")]
fn float(amount: u64) -> f64 {
    amount as f64
}

impl Shared {
    /// Begins to look at a sandbox that runs.
    pub(super) async fn begin_meter(&self, backend: &LocalBackend, record: &SandboxRecord) {
        let stored = match self.store.usage_of_sandbox(&record.id).await {
            Ok(stored) => stored,
            Err(error) => {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "what a sandbox has used cannot be read; it is not measured"
                );
                return;
            }
        };
        let meter = Meter::new(record.org_id.clone(), &record.spec, stored);
        self.meters.lock().insert(record.id.clone(), meter);
        if let Some(reading) = backend.reading(&record.id).await {
            self.meters.note(&record.id, reading);
        }
    }

    /// Looks at a sandbox for the last time, before it is taken away.
    pub(super) async fn last_reading(&self, backend: &LocalBackend, id: &SandboxId) {
        if let Some(reading) = backend.reading(id).await {
            self.meters.note(id, reading);
        }
        self.store_usage(Some(id)).await;
    }

    /// Stores what was counted. What cannot be is stored later.
    pub(super) async fn store_usage(&self, of: Option<&SandboxId>) {
        let used = self.meters.take(of);
        if used.is_empty() {
            return;
        }
        if let Err(error) = self.store.add_usage(&used).await {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "what sandboxes have used cannot be stored"
            );
            self.meters.give_back(used);
        }
    }
}

impl Service {
    /// Looks at every sandbox now and then, until the tasks drain.
    pub(super) async fn measure(self, backend: Arc<LocalBackend>) {
        let shutdown = self.shared.tasks.shutdown();
        let mut round = 0_u32;
        loop {
            let ended = tokio::select! {
                () = shutdown.cancelled() => true,
                () = tokio::time::sleep(INTERVAL) => false,
            };
            let ids: Vec<SandboxId> = self.shared.meters.lock().keys().cloned().collect();
            if !ids.is_empty() {
                match backend.readings(ids).await {
                    Ok(readings) => {
                        for (id, reading) in readings {
                            self.shared.meters.note(&id, reading);
                        }
                    }
                    Err(error) => tracing::warn!(%error, "sandboxes cannot be measured"),
                }
            }
            round = round.wrapping_add(1);
            if ended || round.is_multiple_of(STORING) {
                self.shared.store_usage(None).await;
            }
            if ended {
                return;
            }
        }
    }

    /// What a sandbox uses at this moment; none when it does not run.
    ///
    /// # Errors
    /// [`ServiceError::SandboxNotFound`].
    pub async fn sandbox_metrics(
        &self,
        org_id: &OrgId,
        id: &SandboxId,
    ) -> Result<Option<ResourceMetrics>, ServiceError> {
        self.record(org_id, id).await?;
        if !self.shared.meters.lock().contains_key(id) {
            return Ok(None);
        }
        let Some(reading) = self.backend()?.reading(id).await else {
            return Ok(None);
        };
        let meters = self.shared.meters.lock();
        let shown = meters.get(id).map(|meter| {
            let taken = meter.taken(reading, Instant::now());
            meter.shown(taken, super::now())
        });
        Ok(shown)
    }

    /// What a sandbox used lately, oldest first; at most so many readings.
    ///
    /// # Errors
    /// [`ServiceError::SandboxNotFound`].
    pub async fn sandbox_metrics_history(
        &self,
        org_id: &OrgId,
        id: &SandboxId,
        limit: u32,
    ) -> Result<Vec<ResourceMetrics>, ServiceError> {
        self.record(org_id, id).await?;
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        let meters = self.shared.meters.lock();
        let kept = meters.get(id).map(|meter| {
            let newest = meter.ring.iter().rev().take(limit);
            let mut newest: Vec<ResourceMetrics> = newest.cloned().collect();
            newest.reverse();
            newest
        });
        Ok(kept.unwrap_or_default())
    }

    /// What a sandbox used lately, in a few numbers; none when it does not run.
    ///
    /// # Errors
    /// [`ServiceError::SandboxNotFound`].
    pub async fn sandbox_metrics_summary(
        &self,
        org_id: &OrgId,
        id: &SandboxId,
    ) -> Result<Option<MetricsSummary>, ServiceError> {
        Ok(summary(&self.sandbox_metrics_history(org_id, id, KEPT).await?))
    }
}

type Pick = fn(&ResourceMetrics) -> f64;

const SUMMED: [(&str, Pick); 6] = [
    ("cpu", |metrics| metrics.cpu.usage),
    ("cpu_percentage", |metrics| metrics.cpu.percentage),
    ("memory", |metrics| metrics.memory.usage),
    ("memory_percentage", |metrics| metrics.memory.percentage),
    ("storage", |metrics| metrics.storage.usage),
    ("processes", |metrics| metrics.processes.usage),
];

fn summary(history: &[ResourceMetrics]) -> Option<MetricsSummary> {
    let (first, last) = (history.first()?, history.last()?);
    let mut summary = MetricsSummary {
        avg: BTreeMap::new(),
        max: BTreeMap::new(),
        min: BTreeMap::new(),
        duration: u64::try_from(last.timestamp.duration_since(first.timestamp).as_secs()).unwrap_or(0),
    };
    for (name, pick) in SUMMED {
        let (mut sum, mut most, mut least, mut count) = (0.0, f64::MIN, f64::MAX, 0.0);
        for value in history.iter().map(pick) {
            sum += value;
            count += 1.0;
            most = f64::max(most, value);
            least = f64::min(least, value);
        }
        summary.avg.insert(name.to_owned(), sum / count);
        summary.max.insert(name.to_owned(), most);
        summary.min.insert(name.to_owned(), least);
    }
    Some(summary)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::samples;

    fn reading(cpu_millis: u64, memory_bytes: u64, sent_bytes: u64) -> Reading {
        Reading {
            cpu: Duration::from_millis(cpu_millis),
            memory_bytes,
            processes: 4,
            disk_bytes: 256 << 20,
            disk_limit: 1 << 30,
            sent_bytes,
            received_bytes: 0,
        }
    }

    fn meter(stored: Amounts) -> Meter {
        let sandbox = samples::sandbox(&OrgId::random(), None);
        Meter::new(sandbox.org_id, &sandbox.spec, stored)
    }

    #[test]
    fn what_was_used_between_two_readings_is_counted_once() {
        let (begun, now) = (Instant::now(), Timestamp::UNIX_EPOCH);
        let mut meter = meter(Amounts::default());
        meter.note(reading(100, 2048, 10), begun, now);
        meter.note(reading(600, 2048, 30), begun + Duration::from_secs(10), now);
        meter.note(reading(600, 4096, 30), begun + Duration::from_secs(20), now);
        let expected = Amounts {
            cpu_micros: 600_000,
            memory_kib_seconds: 20 + 40,
            network_bytes: 30,
            creations: 0,
        };
        assert_eq!(meter.pending, BTreeMap::from([(0, expected)]));
        let shares: Vec<f64> = meter.ring.iter().map(|metrics| metrics.cpu.usage).collect();
        assert_eq!(shares, [0.0, 0.05, 0.0]);
        // Of half a processor, which is its limit.
        assert!((meter.ring[1].cpu.percentage - 10.0).abs() < 1e-9);
        assert!((meter.ring[1].storage.percentage - 25.0).abs() < 1e-9);
    }

    #[test]
    fn what_an_earlier_controller_has_stored_is_not_counted_again() {
        let stored = Amounts {
            cpu_micros: 500_000,
            network_bytes: 20,
            ..Amounts::default()
        };
        let mut meter = meter(stored);
        let later = Timestamp::UNIX_EPOCH + jiff::SignedDuration::from_hours(3);
        meter.note(reading(700, 2048, 25), Instant::now(), later);
        let expected = Amounts {
            cpu_micros: 200_000,
            network_bytes: 5,
            ..Amounts::default()
        };
        assert_eq!(meter.pending, BTreeMap::from([(3, expected)]));
    }

    #[test]
    fn a_history_has_an_end_and_a_summary_its_extremes() {
        let begun = Instant::now();
        let mut meter = meter(Amounts::default());
        for round in 0..u64::from(KEPT) + 7 {
            let at = begun + Duration::from_secs(10 * round);
            let seconds = i64::try_from(10 * round).expect("small");
            let now = Timestamp::UNIX_EPOCH + jiff::SignedDuration::from_secs(seconds);
            meter.note(reading(0, 1024 * round, 0), at, now);
        }
        assert_eq!(meter.ring.len(), 180);
        let summary = summary(meter.ring.make_contiguous()).expect("a summary");
        assert_eq!(summary.duration, 1790);
        assert_eq!(
            (summary.min["memory"], summary.max["memory"]),
            (7.0 * 1024.0, 186.0 * 1024.0)
        );
        assert!((summary.avg["memory"] - 96.5 * 1024.0).abs() < 1e-6);
        assert_eq!(super::summary(&[]), None);
    }

    #[test]
    fn what_cannot_be_stored_is_stored_later() {
        let meters = Meters::default();
        let id = SandboxId::random();
        meters.lock().insert(id.clone(), meter(Amounts::default()));
        meters.note(&id, reading(100, 0, 0));
        let used = meters.take(None);
        assert_eq!(used.len(), 1);
        assert!(meters.take(Some(&id)).is_empty());
        meters.give_back(used.clone());
        assert_eq!(meters.take(Some(&id)), used);
        meters.close(&id);
        meters.give_back(used);
        assert!(
            meters.take(None).is_empty(),
            "nothing is kept of one that is gone"
        );
    }
}
