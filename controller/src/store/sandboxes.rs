//! Sandboxes: what was asked for, where they stand, and whether they are on the feed.
//!
//! A sandbox is on the feed from [`Store::announce`] until [`Store::withdraw`]. Both happen at most once in
//! its life.

use std::collections::BTreeMap;

use jiff::Timestamp;
use sandgate_api::{
    feed::{Endpoint, Revision},
    id::{OrgId, SandboxId},
    rest::SandboxStatus,
};
use sandgate_policy::Policy;
use sqlx::{Row as _, Sqlite, Transaction, sqlite::SqliteRow};

use super::{
    Conflict, SecretChoice, Store, StoreError, document, feed::next_revision, millis, parse,
    policies::put_sandbox_policy, secrets::give_secrets, timestamp, to_document, to_stored,
    tunnels::close_all, usage::count_creation,
};
use crate::{spec::SandboxSpec, terms::Terms};

/// Columns of a [`SandboxRecord`], in every query that reads one.
macro_rules! columns {
    () => {
        "sequence, id, org_id, session_id, status, status_reason, spec, created_at, expires_at, feed_revision, \
         ca_generation, ca_certificate, session_key, idle_timeout_seconds, metadata, template_id, paused"
    };
}

/// A sandbox to be stored.
#[derive(Debug, Clone)]
pub struct NewSandbox {
    /// Its id.
    pub id: SandboxId,
    /// Its owner.
    pub org_id: OrgId,
    /// What was asked for.
    pub spec: SandboxSpec,
    /// Its own egress policy.
    pub policy: Option<Policy>,
    /// Which of its organisation's secrets it gets.
    pub secrets: SecretChoice,
    /// Its certificate authority.
    pub authority: Option<AuthorityRecord>,
    /// What was asked for beside.
    pub terms: Terms,
    /// When it was asked for.
    pub created_at: Timestamp,
    /// When it ends by itself.
    pub expires_at: Timestamp,
}

/// A sandbox's certificate authority, as far as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuthorityRecord {
    /// From which its key is derived.
    pub generation: u32,
    /// PEM.
    pub certificate: String,
}

/// A stored sandbox.
#[derive(Debug, Clone, PartialEq)]
pub struct SandboxRecord {
    /// Position in the order of creation.
    pub sequence: i64,
    /// Its id.
    pub id: SandboxId,
    /// Its owner.
    pub org_id: OrgId,
    /// Required by published clients.
    pub session_id: String,
    /// Where it stands.
    pub status: SandboxStatus,
    /// Why it ended.
    pub status_reason: Option<String>,
    /// What was asked for.
    pub spec: SandboxSpec,
    /// When it was asked for.
    pub created_at: Timestamp,
    /// When it ends by itself.
    pub expires_at: Timestamp,
    /// The feed revision that speaks of it last; 0 when none does.
    pub feed_revision: Revision,
    /// Its certificate authority; none for sandboxes of earlier versions.
    pub authority: Option<AuthorityRecord>,
    /// What was asked for beside.
    pub terms: Terms,
    /// Its processes are frozen, or about to be.
    pub paused: bool,
}

impl Store {
    /// How many sandboxes stand where, of all organisations, without those that were deleted. Every status is
    /// there, also with 0.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn count_sandboxes(&self) -> Result<Vec<(SandboxStatus, i64)>, StoreError> {
        let rows = sqlx::query(
            "SELECT status, count(*) AS count FROM sandboxes WHERE deleted_at IS NULL GROUP BY status",
        )
        .fetch_all(&self.readers)
        .await?;
        let mut counts: Vec<(SandboxStatus, i64)> =
            SandboxStatus::ALL.iter().map(|status| (*status, 0)).collect();
        for row in rows {
            let stored: String = row.try_get("status")?;
            for (status, count) in &mut counts {
                if status.as_str() == stored {
                    *count = row.try_get("count")?;
                }
            }
        }
        Ok(counts)
    }

    /// Stores a new sandbox as `creating`.
    ///
    /// # Errors
    /// [`Conflict::QuotaReached`] when the organisation has `limit` live sandboxes;
    /// [`Conflict::SessionTaken`]; [`Conflict::NoSuchSecret`].
    pub async fn insert_sandbox(
        &self,
        sandbox: &NewSandbox,
        limit: u32,
    ) -> Result<SandboxRecord, StoreError> {
        let mut transaction = self.write_brief().await?;
        let record = insert_row(&mut transaction, sandbox, limit, None).await?;
        self.commit_revision(transaction, record.feed_revision).await?;
        Ok(SandboxRecord {
            feed_revision: 0,
            ..record
        })
    }

    /// The organisation's sandbox with this id, unless it was deleted.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn sandbox(&self, org_id: &OrgId, id: &SandboxId) -> Result<Option<SandboxRecord>, StoreError> {
        let row = sqlx::query(concat!(
            "SELECT ",
            columns!(),
            " FROM sandboxes WHERE id = ? AND org_id = ? AND deleted_at IS NULL"
        ))
        .bind(id.as_str())
        .bind(org_id.as_str())
        .fetch_optional(&self.readers)
        .await?;
        row.as_ref().map(record).transpose()
    }

    /// Whether the organisation ever had this sandbox, deleted or not.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn had_sandbox(&self, org_id: &OrgId, id: &SandboxId) -> Result<bool, StoreError> {
        let row: Option<i64> = sqlx::query_scalar("SELECT 1 FROM sandboxes WHERE id = ? AND org_id = ?")
            .bind(id.as_str())
            .bind(org_id.as_str())
            .fetch_optional(&self.readers)
            .await?;
        Ok(row.is_some())
    }

    /// A page of the organisation's sandboxes, newest first: the live ones, or all that are not deleted.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn sandboxes(
        &self,
        org_id: &OrgId,
        with_ended: bool,
        before: Option<i64>,
        limit: u32,
    ) -> Result<Vec<SandboxRecord>, StoreError> {
        let rows = sqlx::query(concat!(
            "SELECT ",
            columns!(),
            " FROM sandboxes WHERE org_id = ? AND deleted_at IS NULL AND sequence < ? \
             AND (? OR status IN ('creating', 'running', 'terminating')) ORDER BY sequence DESC LIMIT ?"
        ))
        .bind(org_id.as_str())
        .bind(before.unwrap_or(i64::MAX))
        .bind(with_ended)
        .bind(limit)
        .fetch_all(&self.readers)
        .await?;
        rows.iter().map(record).collect()
    }

    /// The sandbox with this id while it is on the feed, whosever it is, for its node.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn sandbox_on_feed(&self, id: &SandboxId) -> Result<Option<SandboxRecord>, StoreError> {
        let row = sqlx::query(concat!(
            "SELECT ",
            columns!(),
            " FROM sandboxes WHERE id = ? AND endpoint IS NOT NULL"
        ))
        .bind(id.as_str())
        .fetch_optional(&self.readers)
        .await?;
        row.as_ref().map(record).transpose()
    }

    /// Every live sandbox of every organisation: what a restarted controller must look after.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn live_sandboxes(&self) -> Result<Vec<SandboxRecord>, StoreError> {
        let rows = sqlx::query(concat!(
            "SELECT ",
            columns!(),
            " FROM sandboxes WHERE status IN ('creating', 'running', 'terminating') ORDER BY sequence"
        ))
        .fetch_all(&self.writer)
        .await?;
        rows.iter().map(record).collect()
    }

    /// Puts a sandbox on the feed.
    ///
    /// # Errors
    /// [`Conflict::WrongState`] when it is not `creating`.
    pub async fn announce(&self, id: &SandboxId, endpoint: &Endpoint) -> Result<Revision, StoreError> {
        let mut transaction = self.write_brief().await?;
        let revision = next_revision(&mut transaction).await?;
        let done = sqlx::query(
            "UPDATE sandboxes SET endpoint = ?, feed_revision = ? WHERE id = ? AND status = 'creating'",
        )
        .bind(to_document("endpoint", endpoint)?)
        .bind(to_stored(revision))
        .bind(id.as_str())
        .execute(&mut *transaction)
        .await?;
        if done.rows_affected() != 1 {
            return Err(Conflict::WrongState.into());
        }
        self.commit_revision(transaction, revision).await?;
        Ok(revision)
    }

    /// The sandbox can be used.
    ///
    /// # Errors
    /// [`Conflict::WrongState`] when it is not `creating`.
    pub async fn mark_running(&self, id: &SandboxId) -> Result<(), StoreError> {
        let mut transaction = self.write_brief().await?;
        let done =
            sqlx::query("UPDATE sandboxes SET status = 'running' WHERE id = ? AND status = 'creating'")
                .bind(id.as_str())
                .execute(&mut *transaction)
                .await?;
        if done.rows_affected() != 1 {
            return Err(Conflict::WrongState.into());
        }
        count_creation(&mut transaction, id).await?;
        Ok(transaction.commit().await?)
    }

    /// Marks a live sandbox `terminating`, closes its tunnels and takes it off the feed: the revision that says so, if it was
    /// on it.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn withdraw(&self, id: &SandboxId) -> Result<Option<Revision>, StoreError> {
        let mut transaction = self.write_brief().await?;
        let on_feed: Option<bool> = sqlx::query_scalar(
            "SELECT endpoint IS NOT NULL FROM sandboxes \
             WHERE id = ? AND status IN ('creating', 'running', 'terminating')",
        )
        .bind(id.as_str())
        .fetch_optional(&mut *transaction)
        .await?;
        sqlx::query(
            "UPDATE sandboxes SET status = 'terminating' WHERE id = ? AND status IN ('creating', 'running')",
        )
        .bind(id.as_str())
        .execute(&mut *transaction)
        .await?;
        if on_feed != Some(true) {
            transaction.commit().await?;
            return Ok(None);
        }
        let revision = next_revision(&mut transaction).await?;
        close_all(&mut transaction, id, revision).await?;
        sqlx::query("UPDATE sandboxes SET endpoint = NULL, feed_revision = ? WHERE id = ?")
            .bind(to_stored(revision))
            .bind(id.as_str())
            .execute(&mut *transaction)
            .await?;
        sqlx::query("INSERT OR REPLACE INTO feed_removals (sandbox_id, revision) VALUES (?, ?)")
            .bind(id.as_str())
            .bind(to_stored(revision))
            .execute(&mut *transaction)
            .await?;
        self.commit_revision(transaction, revision).await?;
        Ok(Some(revision))
    }

    /// The sandbox is gone. `status` must be one of those that are not live.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn finish(
        &self,
        id: &SandboxId,
        status: SandboxStatus,
        reason: Option<&str>,
        now: Timestamp,
    ) -> Result<(), StoreError> {
        debug_assert!(!status.is_live(), "a sandbox cannot finish as {status:?}");
        let mut transaction = self.write_brief().await?;
        sqlx::query(
            "UPDATE sandboxes SET status = ?, status_reason = ?, ended_at = ? \
             WHERE id = ? AND status = 'terminating'",
        )
        .bind(status.as_str())
        .bind(reason)
        .bind(millis(now))
        .bind(id.as_str())
        .execute(&mut *transaction)
        .await?;
        Ok(transaction.commit().await?)
    }

    /// Hides an ended sandbox from everybody.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn mark_deleted(&self, id: &SandboxId, now: Timestamp) -> Result<(), StoreError> {
        sqlx::query("UPDATE sandboxes SET deleted_at = coalesce(deleted_at, ?) WHERE id = ?")
            .bind(millis(now))
            .bind(id.as_str())
            .execute(&self.writer)
            .await?;
        Ok(())
    }

    /// Forgets sandboxes that ended before `before`; at most `limit` at a time. Returns how many.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn prune_sandboxes(&self, before: Timestamp, limit: u32) -> Result<u64, StoreError> {
        let done = sqlx::query(
            "DELETE FROM sandboxes WHERE sequence IN \
             (SELECT sequence FROM sandboxes WHERE ended_at IS NOT NULL AND ended_at < ? LIMIT ?)",
        )
        .bind(millis(before))
        .bind(limit)
        .execute(&self.writer)
        .await?;
        Ok(done.rows_affected())
    }
}

/// Where a sandbox is attached already, and the revision that says whose it is now.
pub(super) struct Attached {
    pub(super) endpoint: String,
    pub(super) revision: Revision,
}

/// Stores a sandbox with its policy and its secrets as part of a larger transaction. The record's feed revision
/// is the last one that was taken.
pub(super) async fn insert_row(
    transaction: &mut Transaction<'static, Sqlite>,
    sandbox: &NewSandbox,
    limit: u32,
    attached: Option<Attached>,
) -> Result<SandboxRecord, StoreError> {
    let live: i64 = sqlx::query_scalar(
        "SELECT count(*) FROM sandboxes \
         WHERE org_id = ? AND status IN ('creating', 'running', 'terminating')",
    )
    .bind(sandbox.org_id.as_str())
    .fetch_one(&mut **transaction)
    .await?;
    if live >= i64::from(limit) {
        return Err(Conflict::QuotaReached { limit }.into());
    }
    let terms = &sandbox.terms;
    if let Some(key) = &terms.session_key {
        let taken: i64 = sqlx::query_scalar(
            "SELECT count(*) FROM sandboxes WHERE org_id = ? AND session_key = ? AND status IN ('creating', 'running')",
        )
        .bind(sandbox.org_id.as_str())
        .bind(key)
        .fetch_one(&mut **transaction)
        .await?;
        if taken > 0 {
            return Err(Conflict::SessionTaken.into());
        }
    }
    let metadata = if terms.metadata.is_empty() {
        None
    } else {
        Some(to_document("metadata", &terms.metadata)?)
    };
    let session_id = sandbox.id.as_str().replacen(SandboxId::PREFIX, "session-", 1);
    let mut feed_revision = attached.as_ref().map_or(0, |attached| attached.revision);
    let sequence = sqlx::query(
        "INSERT INTO sandboxes (id, org_id, session_id, status, spec, created_at, expires_at, \
         ca_generation, ca_certificate, endpoint, feed_revision, session_key, idle_timeout_seconds, metadata, \
         template_id) VALUES (?, ?, ?, 'creating', ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    )
    .bind(sandbox.id.as_str())
    .bind(sandbox.org_id.as_str())
    .bind(&session_id)
    .bind(to_document("spec", &sandbox.spec)?)
    .bind(millis(sandbox.created_at))
    .bind(millis(sandbox.expires_at))
    .bind(
        sandbox
            .authority
            .as_ref()
            .map_or(0, |authority| authority.generation),
    )
    .bind(sandbox.authority.as_ref().map(|authority| &authority.certificate))
    .bind(attached.as_ref().map(|attached| &attached.endpoint))
    .bind(to_stored(feed_revision))
    .bind(&terms.session_key)
    .bind(terms.idle_timeout_seconds.map(to_stored))
    .bind(metadata)
    .bind(&terms.template_id)
    .execute(&mut **transaction)
    .await?
    .last_insert_rowid();
    if let Some(policy) = &sandbox.policy {
        feed_revision = put_sandbox_policy(transaction, &sandbox.id, policy, sandbox.created_at).await?;
        if attached.is_some() {
            sqlx::query("UPDATE sandboxes SET feed_revision = ? WHERE id = ?")
                .bind(to_stored(feed_revision))
                .bind(sandbox.id.as_str())
                .execute(&mut **transaction)
                .await?;
        }
    }
    give_secrets(transaction, &sandbox.org_id, &sandbox.id, &sandbox.secrets).await?;
    Ok(SandboxRecord {
        sequence,
        id: sandbox.id.clone(),
        org_id: sandbox.org_id.clone(),
        session_id,
        status: SandboxStatus::Creating,
        status_reason: None,
        spec: sandbox.spec.clone(),
        created_at: sandbox.created_at,
        expires_at: sandbox.expires_at,
        feed_revision,
        authority: sandbox.authority.clone(),
        terms: terms.clone(),
        paused: false,
    })
}

fn record(row: &SqliteRow) -> Result<SandboxRecord, StoreError> {
    Ok(SandboxRecord {
        sequence: row.try_get("sequence")?,
        id: parse("sandbox id", row.try_get("id")?)?,
        org_id: parse("organisation id", row.try_get("org_id")?)?,
        session_id: row.try_get("session_id")?,
        status: status(row.try_get("status")?)?,
        status_reason: row.try_get("status_reason")?,
        spec: document("spec", row.try_get("spec")?)?,
        created_at: timestamp(row.try_get("created_at")?)?,
        expires_at: timestamp(row.try_get("expires_at")?)?,
        feed_revision: super::to_revision(row.try_get("feed_revision")?)?,
        authority: match row.try_get::<Option<String>, _>("ca_certificate")? {
            Some(certificate) => Some(AuthorityRecord {
                generation: row.try_get("ca_generation")?,
                certificate,
            }),
            None => None,
        },
        terms: Terms {
            session_key: row.try_get("session_key")?,
            idle_timeout_seconds: row
                .try_get::<Option<i64>, _>("idle_timeout_seconds")?
                .and_then(|seconds| u64::try_from(seconds).ok()),
            metadata: match row.try_get::<Option<String>, _>("metadata")? {
                Some(text) => document("metadata", &text)?,
                None => BTreeMap::new(),
            },
            template_id: row.try_get("template_id")?,
        },
        paused: row.try_get::<i64, _>("paused")? != 0,
    })
}

pub(super) fn status(text: &str) -> Result<SandboxStatus, StoreError> {
    serde_json::from_value(serde_json::Value::from(text)).map_err(|error| StoreError::Corrupt {
        what: "status",
        why: error.to_string(),
    })
}
