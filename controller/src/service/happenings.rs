//! What happens to sandboxes, told to those who follow it.
//!
//! Whoever does something says so and goes on: one task stores what was said, many things in one transaction. What was
//! said in the last moment before a controller is killed is lost.

use std::{collections::VecDeque, time::Duration};

use sandgate_api::{
    id::{OrgId, SandboxId},
    rest::{EventDetails, EventKind, SandboxEvent},
};
use sandgate_daemon::tasks::Tasks;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::{Service, ServiceError};
use crate::{
    lifecycle::Cause,
    places::Place,
    store::{Happening, Store, StoreError},
};

/// Streams of events that one organisation may follow at once.
pub(super) const STREAMS: usize = 16;

/// What may wait to be stored. Beyond it, what happens is not told.
const WAITING: usize = 8_192;

/// Most that is stored together.
const TOGETHER: usize = 256;

/// How many events of an organisation are kept.
const KEPT: u32 = 10_000;

/// After how many events the old ones are forgotten.
const PRUNING: usize = 2_000;

/// Events that a stream reads at once.
const READ: u32 = 200;

/// After the end of everything else, how long what is said still is waited for.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// Before trying again what the store did not take.
const PAUSE: Duration = Duration::from_millis(500);

/// Where what happens is said.
#[derive(Debug, Clone)]
pub(super) struct Teller(mpsc::Sender<Happening>);

impl Teller {
    /// Begins to store what is said, until the tasks drain.
    pub(super) fn start(store: Store, tasks: &Tasks) -> Self {
        let (sender, receiver) = mpsc::channel(WAITING);
        let shutdown = tasks.shutdown();
        tasks.spawn("events", keep(store, receiver, shutdown));
        Self(sender)
    }

    /// Says what happened.
    pub(super) fn tell(
        &self,
        org_id: &OrgId,
        sandbox_id: &SandboxId,
        kind: EventKind,
        details: EventDetails,
    ) {
        let happening = Happening {
            org_id: org_id.clone(),
            sandbox_id: sandbox_id.clone(),
            kind,
            time: super::now(),
            details,
        };
        if self.0.try_send(happening).is_err() {
            tracing::warn!(%sandbox_id, kind = kind.as_str(), "an event is lost: more happens than can be stored");
        }
    }

    /// Says how a sandbox has ended.
    pub(super) fn tell_end(&self, org_id: &OrgId, sandbox_id: &SandboxId, cause: Cause, reason: &str) {
        let kind = match cause {
            Cause::Expired | Cause::Idle => EventKind::SandboxTimeout,
            Cause::Failed | Cause::Interrupted => EventKind::SandboxError,
            Cause::Stopped | Cause::Died | Cause::Lost | Cause::Abandoned | Cause::Retired => {
                EventKind::SandboxStopped
            }
        };
        let details = EventDetails {
            reason: Some(reason.to_owned()),
            ..EventDetails::default()
        };
        self.tell(org_id, sandbox_id, kind, details);
    }
}

async fn keep(store: Store, mut receiver: mpsc::Receiver<Happening>, shutdown: CancellationToken) {
    let mut stored = 0;
    let mut said = Vec::with_capacity(TOGETHER);
    loop {
        said.clear();
        let heard = if shutdown.is_cancelled() {
            let last = tokio::time::timeout(LAST_WORDS, receiver.recv_many(&mut said, TOGETHER));
            last.await.unwrap_or(0)
        } else {
            tokio::select! {
                heard = receiver.recv_many(&mut said, TOGETHER) => heard,
                () = shutdown.cancelled() => continue,
            }
        };
        if heard == 0 {
            return;
        }
        while let Err(error) = store.add_events(&said).await {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "events cannot be stored"
            );
            if shutdown.is_cancelled() {
                return;
            }
            tokio::time::sleep(PAUSE).await;
        }
        stored += heard;
        if stored >= PRUNING {
            stored = 0;
            if let Err(error) = store.prune_events(KEPT).await {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "old events cannot be forgotten"
                );
            }
        }
    }
}

/// A command whose beginning was told, and whose end will be.
#[derive(Debug)]
pub(super) struct Told {
    teller: Teller,
    org_id: OrgId,
    sandbox_id: SandboxId,
    command_id: String,
    is_over: bool,
}

impl Told {
    pub(super) fn begin(teller: &Teller, org_id: &OrgId, sandbox_id: &SandboxId) -> Self {
        let told = Self {
            teller: teller.clone(),
            org_id: org_id.clone(),
            sandbox_id: sandbox_id.clone(),
            command_id: uuid::Uuid::new_v4().to_string(),
            is_over: false,
        };
        told.tell(EventKind::CommandStarted, EventDetails::default());
        told
    }

    /// It has ended by itself, or its time was up.
    pub(super) fn ended(&mut self, exit_code: i32, timed_out: bool, duration_ms: u64) {
        let kind = if exit_code == 0 && !timed_out {
            EventKind::CommandCompleted
        } else {
            EventKind::CommandFailed
        };
        let details = EventDetails {
            exit_code: Some(exit_code),
            timed_out: Some(timed_out),
            duration_ms: Some(duration_ms),
            ..EventDetails::default()
        };
        self.over(kind, details);
    }

    /// Nobody knows how it ended.
    pub(super) fn lost(&mut self, reason: &str) {
        let details = EventDetails {
            reason: Some(reason.to_owned()),
            ..EventDetails::default()
        };
        self.over(EventKind::CommandFailed, details);
    }

    fn over(&mut self, kind: EventKind, details: EventDetails) {
        if !self.is_over {
            self.is_over = true;
            self.tell(kind, details);
        }
    }

    fn tell(&self, kind: EventKind, details: EventDetails) {
        let details = EventDetails {
            command_id: Some(self.command_id.clone()),
            ..details
        };
        self.teller.tell(&self.org_id, &self.sandbox_id, kind, details);
    }
}

impl Drop for Told {
    fn drop(&mut self) {
        self.lost("it was ended with the request that began it");
    }
}

impl Service {
    /// Follows what happens to the organisation's sandboxes: from behind a position, else from now on.
    ///
    /// # Errors
    /// When the organisation follows as many streams as it may, or the store fails.
    pub async fn follow_events(&self, org_id: &OrgId, after: Option<i64>) -> Result<Events, ServiceError> {
        let streams = &self.shared.event_streams;
        let place = streams.take(org_id).ok_or_else(|| {
            ServiceError::TooMany(format!(
                "this organization follows {} streams of events at the moment, and that is as many as it may; close \
                 one first",
                streams.each()
            ))
        })?;
        let store = self.shared.store.clone();
        let happened = store.watch_events();
        let at = match after {
            Some(after) => after,
            None => store.newest_event().await?,
        };
        Ok(Events {
            happened,
            at,
            org_id: org_id.clone(),
            read: VecDeque::new(),
            end: self.shared.tasks.shutdown(),
            store,
            _place: place,
        })
    }
}

/// Events as they are stored, none left out and none twice.
pub struct Events {
    store: Store,
    happened: watch::Receiver<i64>,
    /// The last one that was read.
    at: i64,
    org_id: OrgId,
    read: VecDeque<(i64, SandboxEvent)>,
    end: CancellationToken,
    /// Among the organisation's streams.
    _place: Place,
}

impl Events {
    /// The next event and its position; none when the controller ends, or the store fails.
    pub async fn next(&mut self) -> Option<(i64, SandboxEvent)> {
        loop {
            if let Some(event) = self.read.pop_front() {
                return Some(event);
            }
            self.happened.mark_unchanged();
            match self.read_on().await {
                Ok(read) => self.read = read.into(),
                Err(error) => {
                    tracing::error!(error = &error as &dyn std::error::Error, "events cannot be read");
                    return None;
                }
            }
            if !self.read.is_empty() {
                continue;
            }
            tokio::select! {
                changed = self.happened.changed() => changed.ok()?,
                () = self.end.cancelled() => return None,
            }
        }
    }

    async fn read_on(&mut self) -> Result<Vec<(i64, SandboxEvent)>, StoreError> {
        let read = self.store.events_after(&self.org_id, self.at, READ).await?;
        self.at = read.last().map_or(self.at, |(position, _)| *position);
        Ok(read)
    }
}
