//! The egress audit, as it is asked for.

use sandgate_api::{
    audit::AuditVerdict,
    id::OrgId,
    rest::{AuditDecision, AuditPage, AuditRecord},
};

use super::{Service, ServiceError};
use crate::store::{AuditFilter, AuditRow};

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
