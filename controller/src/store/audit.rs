//! The egress audit: a bounded log of what netd reported.

use jiff::Timestamp;
use sandgate_api::{
    audit::{AuditEvent, AuditVerdict},
    id::{OrgId, SandboxId},
};
use sqlx::{QueryBuilder, Row as _, Sqlite};

use super::{Store, StoreError, document, millis, to_document, to_stored};

/// Which records a caller wants.
#[derive(Debug, Clone, Default)]
pub struct AuditFilter {
    /// Of one sandbox.
    pub sandbox_id: Option<SandboxId>,
    /// For one name, lower case.
    pub host: Option<String>,
    /// With one of these verdicts; none: all.
    pub verdicts: &'static [AuditVerdict],
    /// Not before.
    pub since: Option<Timestamp>,
    /// Before.
    pub until: Option<Timestamp>,
    /// Older than this record.
    pub before: Option<i64>,
    /// How many to skip.
    pub offset: u32,
    /// At most so many.
    pub limit: u32,
}

/// A stored record.
#[derive(Debug, Clone, PartialEq)]
pub struct AuditRow {
    /// Its position.
    pub sequence: i64,
    /// As netd made it.
    pub event: AuditEvent,
}

impl Store {
    /// Stores records; those that are stored already are left as they are.
    ///
    /// # Errors
    /// When the database fails; then none is stored.
    pub async fn insert_audit(&self, events: &[AuditEvent]) -> Result<(), StoreError> {
        let mut transaction = self.write().await?;
        for event in events {
            sqlx::query(
                "INSERT INTO egress_audit (id, org_id, sandbox_id, time, verdict, host, document) \
                 VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING",
            )
            .bind(&event.id)
            .bind(event.org_id.as_str())
            .bind(event.sandbox_id.as_str())
            .bind(millis(event.time))
            .bind(event.verdict.as_str())
            .bind(&event.host)
            .bind(to_document("audit record", event)?)
            .execute(&mut *transaction)
            .await?;
        }
        transaction.commit().await?;
        Ok(())
    }

    /// A page of the organisation's records, newest first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn audit(&self, org_id: &OrgId, filter: &AuditFilter) -> Result<Vec<AuditRow>, StoreError> {
        let mut query =
            QueryBuilder::<Sqlite>::new("SELECT sequence, document FROM egress_audit WHERE org_id = ");
        query.push_bind(org_id.as_str().to_owned());
        if let Some(id) = &filter.sandbox_id {
            query.push(" AND sandbox_id = ").push_bind(id.as_str().to_owned());
        }
        if let Some(host) = &filter.host {
            query.push(" AND host = ").push_bind(host.clone());
        }
        if !filter.verdicts.is_empty() {
            query.push(" AND verdict IN (");
            let mut wanted = query.separated(", ");
            for verdict in filter.verdicts {
                wanted.push_bind(verdict.as_str());
            }
            query.push(")");
        }
        if let Some(since) = filter.since {
            query.push(" AND time >= ").push_bind(millis(since));
        }
        if let Some(until) = filter.until {
            query.push(" AND time < ").push_bind(millis(until));
        }
        if let Some(before) = filter.before {
            query.push(" AND sequence < ").push_bind(before);
        }
        query
            .push(" ORDER BY sequence DESC LIMIT ")
            .push_bind(filter.limit);
        query.push(" OFFSET ").push_bind(filter.offset);
        let rows = query.build().fetch_all(&self.readers).await?;
        rows.iter()
            .map(|row| {
                Ok(AuditRow {
                    sequence: row.try_get("sequence")?,
                    event: document("audit record", row.try_get("document")?)?,
                })
            })
            .collect()
    }

    /// Forgets the oldest records: those from before `before`, and those beyond the newest `keep`. At most
    /// `limit` at a time; returns how many.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn prune_audit(&self, before: Timestamp, keep: u64, limit: u32) -> Result<u64, StoreError> {
        // Records arrive in the order of time, give or take a queue: a record older than `before` behind a
        // younger one waits until that one is old enough too. That keeps the pruning at the table's end.
        let done = sqlx::query(
            "DELETE FROM egress_audit WHERE sequence IN ( \
               SELECT sequence FROM (SELECT sequence, time FROM egress_audit ORDER BY sequence LIMIT ?) \
               WHERE time < ? OR sequence <= (SELECT max(sequence) FROM egress_audit) - ?)",
        )
        .bind(limit)
        .bind(millis(before))
        .bind(to_stored(keep))
        .execute(&self.writer)
        .await?;
        Ok(done.rows_affected())
    }
}
