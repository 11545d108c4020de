//! Secrets: their sealed values, where they may go, and which sandbox has which.
//!
//! A secret's `version` is the feed revision of its last change, so that it never repeats, not even when a
//! secret is deleted and made again. Whatever changes what a running sandbox has is on the feed in the same
//! transaction.

use jiff::Timestamp;
use sandgate_api::{
    credential::Binding,
    feed::Revision,
    id::{OrgId, SandboxId, SecretId},
    rest::EgressBinding,
};
use sqlx::{Row as _, Sqlite, SqliteConnection, Transaction, sqlite::SqliteRow};

use super::{
    Conflict, Store, StoreError, document, feed::next_revision, millis, parse, timestamp, to_document,
    to_revision, to_stored,
};
use crate::vault::{KEY_ID, Sealed};

/// Columns of a [`SecretRecord`] and its [`Sealed`] value, in every query that reads them.
macro_rules! columns {
    () => {
        "s.id, s.org_id, s.name, s.scope, s.egress, s.placeholder_prefix, s.version, s.key_id, \
         s.wrapped_key, s.ciphertext, s.created_at, s.updated_at"
    };
}

/// A secret to be stored.
#[derive(Debug, Clone)]
pub struct NewSecret {
    /// Its id.
    pub id: SecretId,
    /// Whose it is.
    pub org_id: OrgId,
    /// The environment variable it becomes.
    pub name: String,
    /// Always `sandbox`.
    pub scope: String,
    /// Where it may go; none for a plain environment variable.
    pub egress: Option<Vec<EgressBinding>>,
    /// What its placeholders begin with.
    pub placeholder_prefix: String,
    /// Its value.
    pub sealed: Sealed,
    /// When it was made.
    pub created_at: Timestamp,
}

/// What changes in a secret. What is absent stays.
#[derive(Debug, Clone, Default)]
pub struct SecretUpdate {
    /// The new value, and what new placeholders begin with.
    pub value: Option<(Sealed, String)>,
    /// The new bindings, or that there are none any more.
    pub egress: Option<Option<Vec<EgressBinding>>>,
}

/// A stored secret.
#[derive(Debug, Clone, PartialEq)]
pub struct SecretRecord {
    /// Its id.
    pub id: SecretId,
    /// Whose it is.
    pub org_id: OrgId,
    /// The environment variable it becomes.
    pub name: String,
    /// Always `sandbox`.
    pub scope: String,
    /// Where it may go; none for a plain environment variable.
    pub egress: Option<Vec<EgressBinding>>,
    /// What new placeholders begin with.
    pub placeholder_prefix: String,
    /// The feed revision of its last change.
    pub version: Revision,
    /// Its value.
    pub sealed: Sealed,
    /// When it was made.
    pub created_at: Timestamp,
    /// When it was changed.
    pub updated_at: Timestamp,
}

/// What a change of secrets did to running sandboxes.
#[derive(Debug, Clone, PartialEq)]
pub struct SecretChange {
    /// The revision that says so.
    pub revision: Revision,
    /// The sandboxes on the feed that it concerns.
    pub concerns: Vec<SandboxId>,
}

/// Which of the organisation's secrets a sandbox gets.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum SecretChoice {
    /// Every one there is.
    All,
    /// None.
    #[default]
    None,
    /// These.
    Named(Vec<String>),
}

/// A secret as a sandbox has it.
#[derive(Debug, Clone, PartialEq)]
pub struct SandboxSecret {
    /// The secret.
    pub secret: SecretRecord,
    /// What stands there in its place; the newest.
    pub placeholder: String,
}

impl Store {
    /// Stores a secret. No sandbox has it yet.
    ///
    /// # Errors
    /// [`Conflict::SecretExists`]; [`Conflict::TooManySecrets`] when the organisation has `limit` of them.
    pub async fn insert_secret(&self, new: &NewSecret, limit: u32) -> Result<SecretRecord, StoreError> {
        let mut transaction = self.write().await?;
        let present: i64 = sqlx::query_scalar("SELECT count(*) FROM secrets WHERE org_id = ?")
            .bind(new.org_id.as_str())
            .fetch_one(&mut *transaction)
            .await?;
        let revision = next_revision(&mut transaction).await?;
        let done = sqlx::query(
            "INSERT INTO secrets (id, org_id, name, scope, egress, placeholder_prefix, version, key_id, \
             wrapped_key, ciphertext, created_at, updated_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) \
             ON CONFLICT (org_id, name) DO NOTHING",
        )
        .bind(new.id.as_str())
        .bind(new.org_id.as_str())
        .bind(&new.name)
        .bind(&new.scope)
        .bind(egress_document(new.egress.as_ref())?)
        .bind(&new.placeholder_prefix)
        .bind(to_stored(revision))
        .bind(new.sealed.key_id.as_slice())
        .bind(&new.sealed.wrapped_key)
        .bind(&new.sealed.ciphertext)
        .bind(millis(new.created_at))
        .bind(millis(new.created_at))
        .execute(&mut *transaction)
        .await?;
        if done.rows_affected() != 1 {
            return Err(Conflict::SecretExists.into());
        }
        if present >= i64::from(limit) {
            return Err(Conflict::TooManySecrets { limit }.into());
        }
        self.commit_revision(transaction, revision).await?;
        Ok(SecretRecord {
            id: new.id.clone(),
            org_id: new.org_id.clone(),
            name: new.name.clone(),
            scope: new.scope.clone(),
            egress: new.egress.clone(),
            placeholder_prefix: new.placeholder_prefix.clone(),
            version: revision,
            sealed: new.sealed.clone(),
            created_at: new.created_at,
            updated_at: new.created_at,
        })
    }

    /// The organisation's secrets, by name.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn secrets(&self, org_id: &OrgId) -> Result<Vec<SecretRecord>, StoreError> {
        let rows = sqlx::query(concat!(
            "SELECT ",
            columns!(),
            " FROM secrets s WHERE s.org_id = ? ORDER BY s.name"
        ))
        .bind(org_id.as_str())
        .fetch_all(&self.readers)
        .await?;
        rows.iter().map(record).collect()
    }

    /// The organisation's secret of this name.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn secret(&self, org_id: &OrgId, name: &str) -> Result<Option<SecretRecord>, StoreError> {
        let row = sqlx::query(concat!(
            "SELECT ",
            columns!(),
            " FROM secrets s WHERE s.org_id = ? AND s.name = ?"
        ))
        .bind(org_id.as_str())
        .bind(name)
        .fetch_optional(&self.readers)
        .await?;
        row.as_ref().map(record).transpose()
    }

    /// Changes a secret that is still at the version of `present`.
    ///
    /// # Errors
    /// [`Conflict::WrongState`] when it was changed or deleted meanwhile.
    pub async fn update_secret(
        &self,
        present: &SecretRecord,
        update: SecretUpdate,
        now: Timestamp,
    ) -> Result<(SecretRecord, SecretChange), StoreError> {
        let mut changed = present.clone();
        if let Some((sealed, prefix)) = update.value {
            changed.sealed = sealed;
            changed.placeholder_prefix = prefix;
        }
        if let Some(egress) = update.egress {
            changed.egress = egress;
        }
        changed.updated_at = now;
        let mut transaction = self.write().await?;
        changed.version = next_revision(&mut transaction).await?;
        let done = sqlx::query(
            "UPDATE secrets SET egress = ?, placeholder_prefix = ?, version = ?, key_id = ?, \
             wrapped_key = ?, ciphertext = ?, updated_at = ? WHERE id = ? AND version = ?",
        )
        .bind(egress_document(changed.egress.as_ref())?)
        .bind(&changed.placeholder_prefix)
        .bind(to_stored(changed.version))
        .bind(changed.sealed.key_id.as_slice())
        .bind(&changed.sealed.wrapped_key)
        .bind(&changed.sealed.ciphertext)
        .bind(millis(now))
        .bind(changed.id.as_str())
        .bind(to_stored(present.version))
        .execute(&mut *transaction)
        .await?;
        if done.rows_affected() != 1 {
            return Err(Conflict::WrongState.into());
        }
        let change = SecretChange {
            revision: changed.version,
            concerns: announce_holders(&mut transaction, &changed.id, changed.version).await?,
        };
        self.commit_revision(transaction, change.revision).await?;
        Ok((changed, change))
    }

    /// Deletes a secret: its value, and every placeholder that stands for it. None when there is none.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn delete_secret(
        &self,
        org_id: &OrgId,
        name: &str,
    ) -> Result<Option<SecretChange>, StoreError> {
        let mut transaction = self.write().await?;
        let id: Option<String> = sqlx::query_scalar("SELECT id FROM secrets WHERE org_id = ? AND name = ?")
            .bind(org_id.as_str())
            .bind(name)
            .fetch_optional(&mut *transaction)
            .await?;
        let Some(id) = id else { return Ok(None) };
        let id: SecretId = parse("secret id", &id)?;
        let revision = next_revision(&mut transaction).await?;
        let concerns = announce_holders(&mut transaction, &id, revision).await?;
        sqlx::query("DELETE FROM secrets WHERE id = ?")
            .bind(id.as_str())
            .execute(&mut *transaction)
            .await?;
        let change = SecretChange { revision, concerns };
        self.commit_revision(transaction, revision).await?;
        Ok(Some(change))
    }

    /// Gives a running sandbox secrets of its organisation; those it has already stay as they are. Whose
    /// sandbox it is must have been checked.
    ///
    /// # Errors
    /// [`Conflict::NoSuchSecret`]; [`Conflict::WrongState`] when the sandbox does not run.
    pub async fn inject_secrets(
        &self,
        id: &SandboxId,
        choice: &SecretChoice,
    ) -> Result<(Vec<String>, SecretChange), StoreError> {
        let mut transaction = self.write().await?;
        let row = sqlx::query(
            "SELECT org_id, endpoint IS NOT NULL AS on_feed FROM sandboxes \
             WHERE id = ? AND status = 'running'",
        )
        .bind(id.as_str())
        .fetch_optional(&mut *transaction)
        .await?;
        let Some(row) = row else {
            return Err(Conflict::WrongState.into());
        };
        let org_id: OrgId = parse("organisation id", row.try_get("org_id")?)?;
        let on_feed: bool = row.try_get("on_feed")?;
        let injected = give_secrets(&mut transaction, &org_id, id, choice).await?;
        let revision = next_revision(&mut transaction).await?;
        sqlx::query("UPDATE sandboxes SET feed_revision = ? WHERE id = ? AND endpoint IS NOT NULL")
            .bind(to_stored(revision))
            .bind(id.as_str())
            .execute(&mut *transaction)
            .await?;
        self.commit_revision(transaction, revision).await?;
        let concerns = if on_feed { vec![id.clone()] } else { Vec::new() };
        Ok((injected, SecretChange { revision, concerns }))
    }

    /// The secrets a sandbox has, by name.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn sandbox_secrets(&self, id: &SandboxId) -> Result<Vec<SandboxSecret>, StoreError> {
        let rows = sqlx::query(concat!(
            "SELECT ",
            columns!(),
            ", x.placeholder FROM sandbox_secrets x JOIN secrets s ON s.id = x.secret_id \
             WHERE x.sandbox_id = ? AND x.sequence = \
             (SELECT max(y.sequence) FROM sandbox_secrets y \
              WHERE y.sandbox_id = x.sandbox_id AND y.secret_id = x.secret_id) ORDER BY s.name"
        ))
        .bind(id.as_str())
        .fetch_all(&self.readers)
        .await?;
        rows.iter()
            .map(|row| {
                Ok(SandboxSecret {
                    secret: record(row)?,
                    placeholder: row.try_get("placeholder")?,
                })
            })
            .collect()
    }

    /// The bound secret of this name of a sandbox that is on the feed, for its node.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn bound_secret(&self, id: &SandboxId, name: &str) -> Result<Option<SecretRecord>, StoreError> {
        let row = sqlx::query(concat!(
            "SELECT ",
            columns!(),
            " FROM sandbox_secrets x JOIN secrets s ON s.id = x.secret_id \
             JOIN sandboxes b ON b.id = x.sandbox_id \
             WHERE b.id = ? AND b.endpoint IS NOT NULL AND s.name = ? AND s.egress IS NOT NULL LIMIT 1"
        ))
        .bind(id.as_str())
        .bind(name)
        .fetch_optional(&self.readers)
        .await?;
        row.as_ref().map(record).transpose()
    }

    /// Whether a secret needs another key-encryption key than this one.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn has_secret_of_another_key(&self, key_id: &[u8; KEY_ID]) -> Result<bool, StoreError> {
        Ok(
            sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM secrets WHERE key_id <> ?)")
                .bind(key_id.as_slice())
                .fetch_one(&self.readers)
                .await?,
        )
    }
}

/// Gives a sandbox secrets as part of a larger transaction, with a fresh placeholder for each that it does
/// not have: the names of all that were chosen.
pub(super) async fn give_secrets(
    transaction: &mut Transaction<'static, Sqlite>,
    org_id: &OrgId,
    id: &SandboxId,
    choice: &SecretChoice,
) -> Result<Vec<String>, StoreError> {
    if *choice == SecretChoice::None {
        return Ok(Vec::new());
    }
    let rows: Vec<(String, String, String, bool)> = sqlx::query_as(
        "SELECT s.id, s.name, s.placeholder_prefix, EXISTS \
         (SELECT 1 FROM sandbox_secrets x WHERE x.secret_id = s.id AND x.sandbox_id = ?) \
         FROM secrets s WHERE s.org_id = ? ORDER BY s.name",
    )
    .bind(id.as_str())
    .bind(org_id.as_str())
    .fetch_all(&mut **transaction)
    .await?;
    if let SecretChoice::Named(names) = choice {
        let unknown = names
            .iter()
            .position(|name| !rows.iter().any(|(_, known, _, _)| known == name));
        if let Some(index) = unknown {
            return Err(Conflict::NoSuchSecret { index }.into());
        }
    }
    let mut given = Vec::new();
    for (secret_id, name, prefix, present) in rows {
        if let SecretChoice::Named(names) = choice
            && !names.contains(&name)
        {
            continue;
        }
        if !present {
            let placeholder = crate::placeholder::fresh(&prefix).map_err(StoreError::Random)?;
            sqlx::query("INSERT INTO sandbox_secrets (sandbox_id, secret_id, placeholder) VALUES (?, ?, ?)")
                .bind(id.as_str())
                .bind(&secret_id)
                .bind(placeholder)
                .execute(&mut **transaction)
                .await?;
        }
        given.push(name);
    }
    Ok(given)
}

/// The bindings of the sandboxes that are on the feed since a revision, in the order of their secrets' names.
pub(super) async fn bindings_after(
    connection: &mut SqliteConnection,
    since: Revision,
) -> Result<Vec<(SandboxId, Binding)>, StoreError> {
    let rows = sqlx::query(
        "SELECT x.sandbox_id, s.name, s.version, s.egress, \
         json_group_array(x.placeholder ORDER BY x.sequence) AS placeholders \
         FROM sandbox_secrets x JOIN secrets s ON s.id = x.secret_id JOIN sandboxes b ON b.id = x.sandbox_id \
         WHERE b.endpoint IS NOT NULL AND b.feed_revision > ? AND s.egress IS NOT NULL \
         GROUP BY x.sandbox_id, s.id ORDER BY x.sandbox_id, s.name",
    )
    .bind(to_stored(since))
    .fetch_all(connection)
    .await?;
    let mut bindings = Vec::new();
    for row in &rows {
        let sandbox_id: SandboxId = parse("sandbox id", row.try_get("sandbox_id")?)?;
        let placeholders: Vec<String> = document("list of placeholders", row.try_get("placeholders")?)?;
        let version = to_revision(row.try_get("version")?)?;
        for egress in document::<Vec<EgressBinding>>("binding", row.try_get("egress")?)? {
            let binding = Binding {
                secret: row.try_get("name")?,
                version,
                hosts: egress.hosts,
                ports: egress.ports,
                methods: egress.methods,
                paths: egress.paths,
                inject: egress.inject,
                strip_client_auth: egress.strip_client_auth,
                placeholders: placeholders.clone(),
            };
            bindings.push((sandbox_id.clone(), binding));
        }
    }
    Ok(bindings)
}

/// Puts every sandbox that has the secret on the feed again.
async fn announce_holders(
    transaction: &mut Transaction<'static, Sqlite>,
    id: &SecretId,
    revision: Revision,
) -> Result<Vec<SandboxId>, StoreError> {
    let ids: Vec<String> = sqlx::query_scalar(
        "UPDATE sandboxes SET feed_revision = ? WHERE endpoint IS NOT NULL \
         AND id IN (SELECT sandbox_id FROM sandbox_secrets WHERE secret_id = ?) RETURNING id",
    )
    .bind(to_stored(revision))
    .bind(id.as_str())
    .fetch_all(&mut **transaction)
    .await?;
    ids.iter().map(|id| parse("sandbox id", id)).collect()
}

fn egress_document(egress: Option<&Vec<EgressBinding>>) -> Result<Option<String>, StoreError> {
    egress.map(|egress| to_document("binding", egress)).transpose()
}

fn record(row: &SqliteRow) -> Result<SecretRecord, StoreError> {
    let egress: Option<&str> = row.try_get("egress")?;
    let key_id: Vec<u8> = row.try_get("key_id")?;
    let key_id = <[u8; KEY_ID]>::try_from(key_id).map_err(|_length| StoreError::Corrupt {
        what: "key id",
        why: "it has another length".to_owned(),
    })?;
    Ok(SecretRecord {
        id: parse("secret id", row.try_get("id")?)?,
        org_id: parse("organisation id", row.try_get("org_id")?)?,
        name: row.try_get("name")?,
        scope: row.try_get("scope")?,
        egress: egress.map(|egress| document("binding", egress)).transpose()?,
        placeholder_prefix: row.try_get("placeholder_prefix")?,
        version: to_revision(row.try_get("version")?)?,
        sealed: Sealed {
            key_id,
            wrapped_key: row.try_get("wrapped_key")?,
            ciphertext: row.try_get("ciphertext")?,
        },
        created_at: timestamp(row.try_get("created_at")?)?,
        updated_at: timestamp(row.try_get("updated_at")?)?,
    })
}
