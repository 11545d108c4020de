//! The egress audit, as it is asked for.

use std::{collections::VecDeque, time::Duration};

use sandgate_api::{
    audit::AuditVerdict,
    id::OrgId,
    rest::{AuditDecision, AuditPage, AuditRecord, AuditVerification},
};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{Service, ServiceError};
use crate::{
    ledger::LedgerError,
    places::Place,
    store::{AuditFilter, AuditRow, Store, StoreError},
};

/// Records that a stream reads at once.
const READ: u32 = 200;

/// Streams of records that one organisation may follow at once: each asks the store anew for every record of anybody.
pub(super) const STREAMS: usize = 16;

/// How often the ends of the audit's chains are signed.
const SIGNING: Duration = Duration::from_secs(60);

impl Service {
    /// A page of the organisation's records, newest first.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn audit(&self, org_id: &OrgId, filter: &AuditFilter) -> Result<AuditPage, ServiceError> {
        let rows = self.shared.store.audit(org_id, filter).await?;
        let full = rows.len() >= usize::try_from(filter.limit).unwrap_or(usize::MAX);
        let next_cursor = rows.last().map(|row| row.sequence.to_string()).filter(|_| full);
        Ok(AuditPage {
            events: rows.into_iter().map(record).collect(),
            next_cursor,
        })
    }

    /// Follows the organisation's records: from behind a position, else from now on or, if the filter says since when,
    /// from the oldest.
    ///
    /// # Errors
    /// When the organisation follows as many already as it may, or the store fails.
    pub async fn follow_audit(
        &self,
        org_id: &OrgId,
        filter: AuditFilter,
        after: Option<i64>,
    ) -> Result<Trail, ServiceError> {
        let streams = &self.shared.streams;
        let place = streams.take(org_id).ok_or_else(|| {
            ServiceError::TooMany(format!(
                "this organization follows {} streams of audit records at the moment, and that is as many as it may; \
                 close one first",
                streams.each()
            ))
        })?;
        let store = self.shared.store.clone();
        let recorded = store.watch_audit();
        let at = match (after, filter.since) {
            (Some(after), _) => after,
            (None, Some(_)) => 0,
            (None, None) => store.newest_audit().await?,
        };
        Ok(Trail {
            recorded,
            at,
            org_id: org_id.clone(),
            filter: AuditFilter {
                limit: READ,
                ..filter
            },
            read: VecDeque::new(),
            end: self.shared.tasks.shutdown(),
            store,
            _place: place,
        })
    }

    /// Looks at every record of the organisation that is still kept.
    ///
    /// # Errors
    /// When they cannot be read.
    pub async fn verify_audit(&self, org_id: &OrgId) -> Result<AuditVerification, ServiceError> {
        let verification = self.shared.ledger.verify(org_id).await?;
        if let Some(problem) = &verification.problem {
            tracing::error!(target: "audit", %org_id, position = problem.position, event_id = problem.event_id, problem.message, "the audit was changed");
        }
        Ok(verification)
    }

    /// Signs the ends of the audit's chains now and then, and once more when the tasks drain.
    pub async fn sign_audit(self) {
        let shutdown = self.shared.tasks.shutdown();
        loop {
            let ended = tokio::select! {
                () = shutdown.cancelled() => true,
                () = tokio::time::sleep(SIGNING) => false,
            };
            if let Err(error) = self.shared.ledger.sign(super::now()).await {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "the audit cannot be signed"
                );
            }
            if ended {
                return;
            }
        }
    }
}

/// Records as they are stored, none left out and none twice.
pub struct Trail {
    store: Store,
    recorded: watch::Receiver<i64>,
    /// The last one that was read.
    at: i64,
    org_id: OrgId,
    filter: AuditFilter,
    read: VecDeque<AuditRow>,
    end: CancellationToken,
    /// Among the organisation's streams.
    _place: Place,
}

impl Trail {
    /// The next record and its position; none when the controller ends, or the store fails.
    pub async fn next(&mut self) -> Option<(i64, AuditRecord)> {
        loop {
            if let Some(row) = self.read.pop_front() {
                return Some((row.sequence, record(row)));
            }
            self.recorded.mark_unchanged();
            match self.read_on().await {
                Ok(rows) => self.read = rows.into(),
                Err(error) => {
                    tracing::error!(
                        error = &error as &dyn std::error::Error,
                        "the audit cannot be read"
                    );
                    return None;
                }
            }
            if !self.read.is_empty() {
                continue;
            }
            tokio::select! {
                changed = self.recorded.changed() => changed.ok()?,
                () = self.end.cancelled() => return None,
            }
        }
    }
}

impl Trail {
    /// Reads on from where it is, and moves past what the filter does not want.
    async fn read_on(&mut self) -> Result<Vec<AuditRow>, StoreError> {
        // Before the look: whatever is stored up to here, the look sees.
        let newest = self.store.newest_audit().await?;
        let rows = self
            .store
            .audit_after(&self.org_id, &self.filter, self.at)
            .await?;
        let is_all = rows.len() < READ as usize;
        let last = rows.last().map_or(self.at, |row| row.sequence);
        self.at = if is_all { last.max(newest) } else { last };
        Ok(rows)
    }
}

impl From<LedgerError> for ServiceError {
    fn from(error: LedgerError) -> Self {
        match error {
            LedgerError::Store(error) => Self::from(error),
            LedgerError::File { .. } => {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "the signed heads of the audit"
                );
                Self::Internal("the signed ends of the audit cannot be read".to_owned())
            }
        }
    }
}

fn record(row: AuditRow) -> AuditRecord {
    let event = row.event;
    AuditRecord {
        timestamp: event.time,
        decision: match event.verdict {
            AuditVerdict::Allow => AuditDecision::Allow,
            AuditVerdict::Deny | AuditVerdict::Audit => AuditDecision::Deny,
        },
        enforced: event.verdict != AuditVerdict::Audit,
        bytes: event.bytes_up.saturating_add(event.bytes_down),
        event,
    }
}
