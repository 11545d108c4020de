//! Lifetimes, sessions and pauses of sandboxes that are stored already.

use jiff::{SignedDuration, Timestamp};
use sandgate_api::{
    id::{OrgId, SandboxId},
    rest::SandboxStatus,
};
use sqlx::Row as _;

use super::{Store, StoreError, millis, sandboxes::status, timestamp};

/// How much longer a sandbox shall live.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Longer {
    /// So many seconds more, or not at all.
    By(u64),
    /// At least so many seconds from this time on, as far as that goes.
    ToLast(u64, Timestamp),
}

/// What came of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extension {
    /// It ends at this time.
    Until(Timestamp),
    /// Only so many seconds more are possible.
    Beyond(u64),
    /// It does not run.
    NotRunning(SandboxStatus),
    /// There is none.
    Absent,
}

impl Store {
    /// The live sandbox of a session, if there is one.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn sandbox_of_session(
        &self,
        org_id: &OrgId,
        key: &str,
    ) -> Result<Option<SandboxId>, StoreError> {
        let id: Option<String> = sqlx::query_scalar(
            "SELECT id FROM sandboxes WHERE org_id = ? AND session_key = ? AND status IN ('creating', 'running')",
        )
        .bind(org_id.as_str())
        .bind(key)
        .fetch_optional(&self.readers)
        .await?;
        id.as_deref().map(|id| super::parse("sandbox id", id)).transpose()
    }

    /// Lets a running sandbox live longer, in all at most `most` seconds.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn extend_sandbox(
        &self,
        org_id: &OrgId,
        id: &SandboxId,
        longer: Longer,
        most: u64,
    ) -> Result<Extension, StoreError> {
        let mut transaction = self.write().await?;
        let row = sqlx::query(
            "SELECT status, created_at, expires_at FROM sandboxes \
             WHERE id = ? AND org_id = ? AND deleted_at IS NULL",
        )
        .bind(id.as_str())
        .bind(org_id.as_str())
        .fetch_optional(&mut *transaction)
        .await?;
        let Some(row) = row else {
            return Ok(Extension::Absent);
        };
        let status = status(row.try_get("status")?)?;
        if status != SandboxStatus::Running {
            return Ok(Extension::NotRunning(status));
        }
        let expires_at = timestamp(row.try_get("expires_at")?)?;
        let latest = after(timestamp(row.try_get("created_at")?)?, most);
        let wanted = match longer {
            Longer::By(seconds) => {
                let wanted = after(expires_at, seconds);
                if wanted > latest {
                    let left = latest.duration_since(expires_at).as_secs();
                    return Ok(Extension::Beyond(u64::try_from(left).unwrap_or(0)));
                }
                wanted
            }
            Longer::ToLast(seconds, from) => after(from, seconds).min(latest).max(expires_at),
        };
        sqlx::query("UPDATE sandboxes SET expires_at = ? WHERE id = ?")
            .bind(millis(wanted))
            .bind(id.as_str())
            .execute(&mut *transaction)
            .await?;
        transaction.commit().await?;
        Ok(Extension::Until(wanted))
    }

    /// Notes whether a running sandbox is paused. False when it does not run.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn mark_paused(&self, id: &SandboxId, paused: bool) -> Result<bool, StoreError> {
        let mut transaction = self.write_brief().await?;
        let done = sqlx::query("UPDATE sandboxes SET paused = ? WHERE id = ? AND status = 'running'")
            .bind(i64::from(paused))
            .bind(id.as_str())
            .execute(&mut *transaction)
            .await?;
        transaction.commit().await?;
        Ok(done.rows_affected() == 1)
    }
}

fn after(from: Timestamp, seconds: u64) -> Timestamp {
    let longer = SignedDuration::from_secs(i64::try_from(seconds).unwrap_or(i64::MAX));
    from.saturating_add(longer).unwrap_or(Timestamp::MAX)
}
