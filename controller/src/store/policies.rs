//! Egress policies of organisations and sandboxes.

use jiff::Timestamp;
use sandgate_api::{
    feed::Revision,
    id::{OrgId, SandboxId},
};
use sandgate_policy::Policy;
use sqlx::{Row as _, Sqlite, Transaction, sqlite::SqliteRow};

use super::{
    Conflict, Store, StoreError, document, feed::next_revision, millis, parse, timestamp, to_document,
    to_revision, to_stored,
};

/// A policy as stored.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredPolicy {
    /// The document.
    pub policy: Policy,
    /// The feed revision of its last change.
    pub revision: Revision,
    /// When that was.
    pub updated_at: Timestamp,
}

/// What a change of a policy did.
#[derive(Debug, Clone, PartialEq)]
pub struct PolicyChange {
    /// The policy as it is stored.
    pub stored: StoredPolicy,
    /// The sandboxes on the feed that the change concerns.
    pub concerns: Vec<SandboxId>,
}

impl Store {
    /// The organisation's policy, if it ever set one.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn organization_policy(&self, org_id: &OrgId) -> Result<Option<StoredPolicy>, StoreError> {
        let row =
            sqlx::query("SELECT document, revision, updated_at FROM organization_policies WHERE org_id = ?")
                .bind(org_id.as_str())
                .fetch_optional(&self.readers)
                .await?;
        row.as_ref().map(stored).transpose()
    }

    /// The sandbox's own policy, if it has one. Whose sandbox it is must have been checked.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn sandbox_policy(&self, id: &SandboxId) -> Result<Option<StoredPolicy>, StoreError> {
        let row =
            sqlx::query("SELECT document, revision, updated_at FROM sandbox_policies WHERE sandbox_id = ?")
                .bind(id.as_str())
                .fetch_optional(&self.readers)
                .await?;
        row.as_ref().map(stored).transpose()
    }

    /// The policies of the organisation's live sandboxes that have one, to check a new tier against.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn live_sandbox_policies(
        &self,
        org_id: &OrgId,
    ) -> Result<Vec<(SandboxId, Policy)>, StoreError> {
        let rows = sqlx::query(
            "SELECT p.sandbox_id, p.document FROM sandbox_policies p JOIN sandboxes s ON s.id = p.sandbox_id \
             WHERE s.org_id = ? AND s.status IN ('creating', 'running', 'terminating')",
        )
        .bind(org_id.as_str())
        .fetch_all(&self.readers)
        .await?;
        rows.iter()
            .map(|row| {
                Ok((
                    parse("sandbox id", row.try_get("sandbox_id")?)?,
                    document("policy", row.try_get("document")?)?,
                ))
            })
            .collect()
    }

    /// Replaces the organisation's policy and puts every sandbox it governs on the feed again.
    ///
    /// # Errors
    /// [`Conflict::StaleRevision`] when `expected` is given and not the present revision (0: none yet).
    pub async fn set_organization_policy(
        &self,
        org_id: &OrgId,
        policy: &Policy,
        expected: Option<Revision>,
        now: Timestamp,
    ) -> Result<PolicyChange, StoreError> {
        let mut transaction = self.write().await?;
        let current: Option<i64> =
            sqlx::query_scalar("SELECT revision FROM organization_policies WHERE org_id = ?")
                .bind(org_id.as_str())
                .fetch_optional(&mut *transaction)
                .await?;
        refuse_stale(expected, current)?;
        let revision = next_revision(&mut transaction).await?;
        sqlx::query(
            "INSERT INTO organization_policies (org_id, document, revision, updated_at) VALUES (?, ?, ?, ?) \
             ON CONFLICT (org_id) DO UPDATE SET \
             document = excluded.document, revision = excluded.revision, updated_at = excluded.updated_at",
        )
        .bind(org_id.as_str())
        .bind(to_document("policy", policy)?)
        .bind(to_stored(revision))
        .bind(millis(now))
        .execute(&mut *transaction)
        .await?;
        let ids: Vec<String> = sqlx::query_scalar(
            "UPDATE sandboxes SET feed_revision = ? WHERE org_id = ? AND endpoint IS NOT NULL RETURNING id",
        )
        .bind(to_stored(revision))
        .bind(org_id.as_str())
        .fetch_all(&mut *transaction)
        .await?;
        let concerns = ids
            .iter()
            .map(|id| parse("sandbox id", id))
            .collect::<Result<_, _>>()?;
        self.commit_revision(transaction, revision).await?;
        Ok(PolicyChange {
            stored: StoredPolicy {
                policy: policy.clone(),
                revision,
                updated_at: now,
            },
            concerns,
        })
    }

    /// Replaces a sandbox's own policy. Whose sandbox it is must have been checked.
    ///
    /// # Errors
    /// [`Conflict::StaleRevision`] as above; [`Conflict::WrongState`] when the sandbox has ended.
    pub async fn set_sandbox_policy(
        &self,
        id: &SandboxId,
        policy: &Policy,
        expected: Option<Revision>,
        now: Timestamp,
    ) -> Result<PolicyChange, StoreError> {
        let mut transaction = self.write().await?;
        let current: Option<i64> =
            sqlx::query_scalar("SELECT revision FROM sandbox_policies WHERE sandbox_id = ?")
                .bind(id.as_str())
                .fetch_optional(&mut *transaction)
                .await?;
        refuse_stale(expected, current)?;
        let live: Option<bool> = sqlx::query_scalar(
            "SELECT endpoint IS NOT NULL FROM sandboxes WHERE id = ? AND status IN ('creating', 'running')",
        )
        .bind(id.as_str())
        .fetch_optional(&mut *transaction)
        .await?;
        let Some(on_feed) = live else {
            return Err(Conflict::WrongState.into());
        };
        let revision = put_sandbox_policy(&mut transaction, id, policy, now).await?;
        sqlx::query("UPDATE sandboxes SET feed_revision = ? WHERE id = ? AND endpoint IS NOT NULL")
            .bind(to_stored(revision))
            .bind(id.as_str())
            .execute(&mut *transaction)
            .await?;
        self.commit_revision(transaction, revision).await?;
        let concerns = if on_feed { vec![id.clone()] } else { Vec::new() };
        Ok(PolicyChange {
            stored: StoredPolicy {
                policy: policy.clone(),
                revision,
                updated_at: now,
            },
            concerns,
        })
    }
}

/// Writes a sandbox's policy as part of a larger transaction.
pub(super) async fn put_sandbox_policy(
    transaction: &mut Transaction<'static, Sqlite>,
    id: &SandboxId,
    policy: &Policy,
    now: Timestamp,
) -> Result<Revision, StoreError> {
    let revision = next_revision(transaction).await?;
    sqlx::query(
        "INSERT INTO sandbox_policies (sandbox_id, document, revision, updated_at) VALUES (?, ?, ?, ?) \
         ON CONFLICT (sandbox_id) DO UPDATE SET \
         document = excluded.document, revision = excluded.revision, updated_at = excluded.updated_at",
    )
    .bind(id.as_str())
    .bind(to_document("policy", policy)?)
    .bind(to_stored(revision))
    .bind(millis(now))
    .execute(&mut **transaction)
    .await?;
    Ok(revision)
}

fn refuse_stale(expected: Option<Revision>, current: Option<i64>) -> Result<(), StoreError> {
    let current = to_revision(current.unwrap_or(0))?;
    match expected {
        Some(expected) if expected != current => Err(Conflict::StaleRevision { current }.into()),
        Some(_) | None => Ok(()),
    }
}

fn stored(row: &SqliteRow) -> Result<StoredPolicy, StoreError> {
    Ok(StoredPolicy {
        policy: document("policy", row.try_get("document")?)?,
        revision: to_revision(row.try_get("revision")?)?,
        updated_at: timestamp(row.try_get("updated_at")?)?,
    })
}
