//! What happened to sandboxes, in the order in which it was stored: the newest of each organisation.

use jiff::Timestamp;
use sandgate_api::{
    id::{OrgId, SandboxId},
    rest::{EventDetails, EventKind, SandboxEvent},
};
use sqlx::{Row as _, sqlite::SqliteRow};
use tokio::sync::watch;

use super::{Store, StoreError, document, millis, parse, timestamp, to_document};

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Happening {
    /// Whose sandbox.
    pub org_id: OrgId,
    /// Which one.
    pub sandbox_id: SandboxId,
    /// What.
    pub kind: EventKind,
    /// When.
    pub time: Timestamp,
    /// What else there is to say.
    pub details: EventDetails,
}

impl Store {
    /// Stores what happened, all of it or nothing, and tells those who follow.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn add_events(&self, happened: &[Happening]) -> Result<(), StoreError> {
        let mut transaction = self.write_brief().await?;
        let mut newest = 0;
        for Happening {
            org_id,
            sandbox_id,
            kind,
            time,
            details,
        } in happened
        {
            newest = sqlx::query(
                "INSERT INTO events (org_id, sandbox_id, kind, time, document) VALUES (?, ?, ?, ?, ?)",
            )
            .bind(org_id.as_str())
            .bind(sandbox_id.as_str())
            .bind(kind.as_str())
            .bind(millis(*time))
            .bind(to_document("event", details)?)
            .execute(&mut *transaction)
            .await?
            .last_insert_rowid();
        }
        transaction.commit().await?;
        self.happened.send_modify(|known| *known = newest.max(*known));
        Ok(())
    }

    /// The position of the newest event that was stored since the start; changes with each.
    pub fn watch_events(&self) -> watch::Receiver<i64> {
        self.happened.subscribe()
    }

    /// The position of the newest event of anybody; 0 when there is none.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn newest_event(&self) -> Result<i64, StoreError> {
        let newest: Option<i64> = sqlx::query_scalar("SELECT max(sequence) FROM events")
            .fetch_one(&self.readers)
            .await?;
        Ok(newest.unwrap_or(0))
    }

    /// An organisation's events behind a position, the oldest first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn events_after(
        &self,
        org_id: &OrgId,
        after: i64,
        limit: u32,
    ) -> Result<Vec<(i64, SandboxEvent)>, StoreError> {
        let rows = sqlx::query(
            "SELECT sequence, org_id, sandbox_id, kind, time, document FROM events \
             WHERE org_id = ? AND sequence > ? ORDER BY sequence LIMIT ?",
        )
        .bind(org_id.as_str())
        .bind(after)
        .bind(limit)
        .fetch_all(&self.readers)
        .await?;
        rows.iter().map(event).collect()
    }

    /// Forgets all but the newest `kept` events of each organisation, but for the newest of all: positions are never
    /// given out twice.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn prune_events(&self, kept: u32) -> Result<(), StoreError> {
        let crowded: Vec<String> =
            sqlx::query_scalar("SELECT org_id FROM events GROUP BY org_id HAVING count(*) > ?")
                .bind(kept)
                .fetch_all(&self.readers)
                .await?;
        for org_id in crowded {
            sqlx::query(
                "DELETE FROM events WHERE org_id = ? AND sequence <= \
                 (SELECT sequence FROM events WHERE org_id = ? ORDER BY sequence DESC LIMIT 1 OFFSET ?)",
            )
            .bind(&org_id)
            .bind(&org_id)
            .bind(kept)
            .execute(&self.writer)
            .await?;
        }
        Ok(())
    }
}

fn event(row: &SqliteRow) -> Result<(i64, SandboxEvent), StoreError> {
    let sequence: i64 = row.try_get("sequence")?;
    let kind: &str = row.try_get("kind")?;
    let kind = EventKind::ALL.iter().find(|known| known.as_str() == kind);
    let event = SandboxEvent {
        id: sequence.to_string(),
        kind: *kind.ok_or_else(|| StoreError::Corrupt {
            what: "event",
            why: "of an unknown kind".to_owned(),
        })?,
        timestamp: timestamp(row.try_get("time")?)?,
        org_id: parse("organisation id", row.try_get("org_id")?)?,
        sandbox_id: parse("sandbox id", row.try_get("sandbox_id")?)?,
        data: document("event", row.try_get("document")?)?,
    };
    Ok((sequence, event))
}
