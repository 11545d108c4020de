//! Sandboxes that nobody has asked for yet. On the feed they are nobody's and may do nothing.
//!
//! A member leaves this table in one of two ways, each a single transaction that can happen once: somebody claims
//! it, or its end begins.

use std::sync::Arc;

use jiff::Timestamp;
use sandgate_api::{
    feed::{Endpoint, FeedSandbox, PolicyTier, Revision, TierName},
    id::{OrgId, SandboxId},
};
use sandgate_policy::Policy;
use sqlx::{Row as _, SqliteConnection, sqlite::SqliteRow};

use super::{
    AuthorityRecord, Conflict, NewSandbox, SandboxRecord, Store, StoreError, document,
    feed::next_revision,
    millis, parse,
    sandboxes::{Attached, insert_row},
    timestamp, to_document, to_stored,
};
use crate::spec::SandboxSpec;

/// A sandbox that is made in advance.
#[derive(Debug, Clone, PartialEq)]
pub struct PoolRecord {
    /// Its id, which it keeps.
    pub id: SandboxId,
    /// Where it stands.
    pub status: PoolStatus,
    /// What it is made with.
    pub spec: SandboxSpec,
    /// What it is made from, see [`crate::backend::LocalBackend::build`].
    pub build: String,
    /// When its making began.
    pub created_at: Timestamp,
    /// Its certificate authority.
    pub authority: AuthorityRecord,
}

/// Where a member of the pool stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PoolStatus {
    /// It is being made.
    Creating,
    /// It can be claimed.
    Ready,
    /// It is being taken away.
    Ending,
}

impl PoolStatus {
    fn as_str(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Ready => "ready",
            Self::Ending => "ending",
        }
    }
}

/// What came of the wish to end a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Withdrawal {
    /// It ends; the revision that says so, if it was on the feed.
    Ending(Option<Revision>),
    /// It is somebody's sandbox now.
    Claimed,
}

impl Store {
    /// Stores a member that is about to be made.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn insert_pooled(&self, member: &PoolRecord) -> Result<(), StoreError> {
        let mut transaction = self.write_brief().await?;
        sqlx::query(
            "INSERT INTO pool (id, status, spec, build, created_at, ca_generation, ca_certificate) \
             VALUES (?, ?, ?, ?, ?, ?, ?)",
        )
        .bind(member.id.as_str())
        .bind(member.status.as_str())
        .bind(to_document("spec", &member.spec)?)
        .bind(&member.build)
        .bind(millis(member.created_at))
        .bind(member.authority.generation)
        .bind(&member.authority.certificate)
        .execute(&mut *transaction)
        .await?;
        Ok(transaction.commit().await?)
    }

    /// Every member, the oldest first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn pooled(&self) -> Result<Vec<PoolRecord>, StoreError> {
        let rows = sqlx::query(
            "SELECT id, status, spec, build, created_at, ca_generation, ca_certificate FROM pool \
             ORDER BY created_at, id",
        )
        .fetch_all(&self.writer)
        .await?;
        rows.iter().map(record).collect()
    }

    /// Puts a member on the feed, where it is denied everything.
    ///
    /// # Errors
    /// [`Conflict::WrongState`] when it is not being made.
    pub async fn announce_pooled(&self, id: &SandboxId, endpoint: &Endpoint) -> Result<Revision, StoreError> {
        let mut transaction = self.write_brief().await?;
        let revision = next_revision(&mut transaction).await?;
        let done = sqlx::query(
            "UPDATE pool SET endpoint = ?, feed_revision = ? WHERE id = ? AND status = 'creating'",
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

    /// The member can be claimed.
    ///
    /// # Errors
    /// [`Conflict::WrongState`] when it is ending.
    pub async fn mark_pooled_ready(&self, id: &SandboxId) -> Result<(), StoreError> {
        let mut transaction = self.write_brief().await?;
        let done = sqlx::query(
            "UPDATE pool SET status = 'ready' WHERE id = ? AND status IN ('creating', 'ready') \
             AND endpoint IS NOT NULL",
        )
        .bind(id.as_str())
        .execute(&mut *transaction)
        .await?;
        if done.rows_affected() == 1 {
            Ok(transaction.commit().await?)
        } else {
            Err(Conflict::WrongState.into())
        }
    }

    /// Makes a member somebody's sandbox: its id, its endpoint and its authority stay, everything else is that
    /// of `sandbox`. It is `creating` until the node has acknowledged the revision in the record.
    ///
    /// # Errors
    /// As [`Store::insert_sandbox`]; [`Conflict::WrongState`] when the member is not ready, or not any more.
    pub async fn claim_pooled(&self, sandbox: &NewSandbox, limit: u32) -> Result<SandboxRecord, StoreError> {
        let mut transaction = self.write_brief().await?;
        let endpoint: Option<String> =
            sqlx::query_scalar("DELETE FROM pool WHERE id = ? AND status = 'ready' RETURNING endpoint")
                .bind(sandbox.id.as_str())
                .fetch_optional(&mut *transaction)
                .await?
                .flatten();
        let Some(endpoint) = endpoint else {
            return Err(Conflict::WrongState.into());
        };
        let revision = next_revision(&mut transaction).await?;
        let attached = Attached { endpoint, revision };
        let record = insert_row(&mut transaction, sandbox, limit, Some(attached)).await?;
        self.commit_revision(transaction, record.feed_revision).await?;
        Ok(record)
    }

    /// Takes a member off the feed and begins its end, unless it was claimed.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn withdraw_pooled(&self, id: &SandboxId) -> Result<Withdrawal, StoreError> {
        let mut transaction = self.write_brief().await?;
        let on_feed: Option<bool> = sqlx::query_scalar("SELECT endpoint IS NOT NULL FROM pool WHERE id = ?")
            .bind(id.as_str())
            .fetch_optional(&mut *transaction)
            .await?;
        let Some(on_feed) = on_feed else {
            return Ok(Withdrawal::Claimed);
        };
        sqlx::query("UPDATE pool SET status = 'ending', endpoint = NULL WHERE id = ?")
            .bind(id.as_str())
            .execute(&mut *transaction)
            .await?;
        if !on_feed {
            transaction.commit().await?;
            return Ok(Withdrawal::Ending(None));
        }
        let revision = next_revision(&mut transaction).await?;
        sqlx::query("INSERT OR REPLACE INTO feed_removals (sandbox_id, revision) VALUES (?, ?)")
            .bind(id.as_str())
            .bind(to_stored(revision))
            .execute(&mut *transaction)
            .await?;
        self.commit_revision(transaction, revision).await?;
        Ok(Withdrawal::Ending(Some(revision)))
    }

    /// Forgets a member that is gone.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn forget_pooled(&self, id: &SandboxId) -> Result<(), StoreError> {
        let mut transaction = self.write_brief().await?;
        sqlx::query("DELETE FROM pool WHERE id = ? AND status = 'ending'")
            .bind(id.as_str())
            .execute(&mut *transaction)
            .await?;
        Ok(transaction.commit().await?)
    }
}

/// The members on the feed since a revision.
pub(super) async fn pooled_after(
    connection: &mut SqliteConnection,
    since: Revision,
) -> Result<Vec<FeedSandbox>, StoreError> {
    let rows = sqlx::query(
        "SELECT id, endpoint, ca_generation FROM pool WHERE endpoint IS NOT NULL AND feed_revision > ? \
         ORDER BY feed_revision",
    )
    .bind(to_stored(since))
    .fetch_all(connection)
    .await?;
    let nothing = serde_json::json!({ "mode": "deny_all" });
    let nothing = Policy::parse(&nothing).map_err(|error| StoreError::Corrupt {
        what: "policy",
        why: error.to_string(),
    })?;
    let nothing = Arc::new(nothing);
    rows.iter().map(|row| feed_sandbox(row, &nothing)).collect()
}

fn feed_sandbox(row: &SqliteRow, nothing: &Arc<Policy>) -> Result<FeedSandbox, StoreError> {
    Ok(FeedSandbox {
        sandbox_id: parse("sandbox id", row.try_get("id")?)?,
        org_id: OrgId::nobody(),
        endpoint: document("endpoint", row.try_get("endpoint")?)?,
        tiers: vec![PolicyTier {
            tier: TierName::Platform,
            policy: Arc::clone(nothing),
        }],
        bindings: Vec::new(),
        ca_generation: row.try_get("ca_generation")?,
        tunnel_ports: Vec::new(),
    })
}

fn record(row: &SqliteRow) -> Result<PoolRecord, StoreError> {
    let status = match row.try_get("status")? {
        "creating" => PoolStatus::Creating,
        "ready" => PoolStatus::Ready,
        "ending" => PoolStatus::Ending,
        other => {
            return Err(StoreError::Corrupt {
                what: "status",
                why: format!("`{other}`"),
            });
        }
    };
    Ok(PoolRecord {
        id: parse("sandbox id", row.try_get("id")?)?,
        status,
        spec: document("spec", row.try_get("spec")?)?,
        build: row.try_get("build")?,
        created_at: timestamp(row.try_get("created_at")?)?,
        authority: AuthorityRecord {
            generation: row.try_get("ca_generation")?,
            certificate: row.try_get("ca_certificate")?,
        },
    })
}
