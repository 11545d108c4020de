//! API keys: only their hashes.

use std::collections::HashMap;

use jiff::Timestamp;
use sandgate_api::{
    id::{ApiKeyId, OrgId, UserId},
    rest::Role,
};
use sqlx::{Row as _, Sqlite, Transaction, sqlite::SqliteRow};

use super::{Conflict, Store, StoreError, document, millis, parse, timestamp, to_document};

/// Columns of a [`KeyRecord`], in every query that reads one.
macro_rules! columns {
    () => {
        "api_keys.id AS id, api_keys.org_id AS org_id, api_keys.user_id AS user_id, users.role AS role, name, prefix, \
         hash, scopes, api_keys.created_at AS created_at, expires_at, last_used_at"
    };
}

/// A key to be stored.
#[derive(Clone)]
pub struct NewKey {
    /// Its public part.
    pub id: ApiKeyId,
    /// Whose it is.
    pub org_id: OrgId,
    /// Whose it is.
    pub user_id: UserId,
    /// What it is for.
    pub name: String,
    /// The part that may be shown.
    pub prefix: String,
    /// SHA-256 of the whole key.
    pub hash: [u8; 32],
    /// What it may do.
    pub scopes: Vec<String>,
    /// When it stops working.
    pub expires_at: Option<Timestamp>,
}

/// A stored key that is not revoked.
#[derive(Clone)]
pub struct KeyRecord {
    /// Its public part.
    pub id: ApiKeyId,
    /// Whose it is.
    pub org_id: OrgId,
    /// Whose it is.
    pub user_id: UserId,
    /// What that user is at present.
    pub role: Role,
    /// What it is for.
    pub name: String,
    /// The part that may be shown.
    pub prefix: String,
    /// SHA-256 of the whole key.
    pub hash: Vec<u8>,
    /// What it may do.
    pub scopes: Vec<String>,
    /// When it was made.
    pub created_at: Timestamp,
    /// When it stops working.
    pub expires_at: Option<Timestamp>,
    /// As far as it was written down.
    pub last_used_at: Option<Timestamp>,
}

impl Store {
    /// Stores a key.
    ///
    /// # Errors
    /// [`Conflict::TooManyKeys`] when the organisation has `limit` keys that are not revoked.
    pub async fn insert_key(&self, key: &NewKey, limit: u32, now: Timestamp) -> Result<(), StoreError> {
        let mut transaction = self.write().await?;
        insert_within(&mut transaction, key, limit, now).await?;
        transaction.commit().await?;
        Ok(())
    }

    /// Stores a key in the place of another one of the same organisation, which works until `ends`, and not beyond
    /// its own end. False when that one is not there or revoked.
    ///
    /// # Errors
    /// [`Conflict::TooManyKeys`] when the organisation has `limit` keys beside those that end now.
    pub async fn rotate_key(
        &self,
        old: &ApiKeyId,
        ends: Timestamp,
        key: &NewKey,
        limit: u32,
        now: Timestamp,
    ) -> Result<bool, StoreError> {
        let mut transaction = self.write().await?;
        let done = sqlx::query(
            "UPDATE api_keys SET revoked_at = ?, expires_at = CASE WHEN expires_at < ? THEN expires_at ELSE ? END \
             WHERE id = ? AND org_id = ? AND revoked_at IS NULL",
        )
        .bind((ends <= now).then_some(millis(now)))
        .bind(millis(ends))
        .bind(millis(ends))
        .bind(old.as_str())
        .bind(key.org_id.as_str())
        .execute(&mut *transaction)
        .await?;
        if done.rows_affected() != 1 {
            return Ok(false);
        }
        insert_within(&mut transaction, key, limit, now).await?;
        transaction.commit().await?;
        Ok(true)
    }

    /// Whose a key is, be it revoked or not; none when the organisation has none with this id.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn key_owner(
        &self,
        org_id: &OrgId,
        id: &ApiKeyId,
    ) -> Result<Option<(UserId, Role)>, StoreError> {
        let row = sqlx::query(
            "SELECT users.id AS user_id, users.role AS role FROM api_keys JOIN users ON users.id = api_keys.user_id \
             WHERE api_keys.id = ? AND api_keys.org_id = ?",
        )
        .bind(id.as_str())
        .bind(org_id.as_str())
        .fetch_optional(&self.readers)
        .await?;
        let Some(row) = row else { return Ok(None) };
        Ok(Some((
            parse("user id", row.try_get("user_id")?)?,
            parse("role", row.try_get("role")?)?,
        )))
    }

    /// The key with this id, unless it is revoked. Whether it has expired is for the caller to see.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn key(&self, id: &ApiKeyId) -> Result<Option<KeyRecord>, StoreError> {
        let row = sqlx::query(concat!(
            "SELECT ",
            columns!(),
            " FROM api_keys JOIN users ON users.id = api_keys.user_id WHERE api_keys.id = ? AND revoked_at IS NULL"
        ))
        .bind(id.as_str())
        .fetch_optional(&self.readers)
        .await?;
        row.as_ref().map(record).transpose()
    }

    /// The organisation's keys that are not revoked, oldest first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn keys(&self, org_id: &OrgId) -> Result<Vec<KeyRecord>, StoreError> {
        let rows = sqlx::query(concat!(
            "SELECT ",
            columns!(),
            " FROM api_keys JOIN users ON users.id = api_keys.user_id WHERE api_keys.org_id = ? AND revoked_at IS NULL \
             ORDER BY api_keys.created_at, api_keys.id"
        ))
        .bind(org_id.as_str())
        .fetch_all(&self.readers)
        .await?;
        rows.iter().map(record).collect()
    }

    /// Revokes a key: false when the organisation has none with this id. Revoking twice is no error.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn revoke_key(
        &self,
        org_id: &OrgId,
        id: &ApiKeyId,
        now: Timestamp,
    ) -> Result<bool, StoreError> {
        let done = sqlx::query(
            "UPDATE api_keys SET revoked_at = coalesce(revoked_at, ?) WHERE id = ? AND org_id = ?",
        )
        .bind(millis(now))
        .bind(id.as_str())
        .bind(org_id.as_str())
        .execute(&self.writer)
        .await?;
        Ok(done.rows_affected() == 1)
    }

    /// Remembers when keys were used last.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn touch_keys(&self, uses: &HashMap<ApiKeyId, Timestamp>) -> Result<(), StoreError> {
        let mut transaction = self.write_brief().await?;
        for (id, used) in uses {
            sqlx::query("UPDATE api_keys SET last_used_at = ? WHERE id = ?")
                .bind(millis(*used))
                .bind(id.as_str())
                .execute(&mut *transaction)
                .await?;
        }
        transaction.commit().await?;
        Ok(())
    }
}

/// Stores a key where the organisation has room for one. Of the revoked ones it keeps the newest.
async fn insert_within(
    transaction: &mut Transaction<'static, Sqlite>,
    key: &NewKey,
    limit: u32,
    now: Timestamp,
) -> Result<(), StoreError> {
    let present: i64 =
        sqlx::query_scalar("SELECT count(*) FROM api_keys WHERE org_id = ? AND revoked_at IS NULL")
            .bind(key.org_id.as_str())
            .fetch_one(&mut **transaction)
            .await?;
    if present >= i64::from(limit) {
        return Err(Conflict::TooManyKeys { limit }.into());
    }
    sqlx::query(
        "DELETE FROM api_keys WHERE org_id = ? AND revoked_at IS NOT NULL AND id NOT IN \
         (SELECT id FROM api_keys WHERE org_id = ? AND revoked_at IS NOT NULL ORDER BY revoked_at DESC, id LIMIT ?)",
    )
    .bind(key.org_id.as_str())
    .bind(key.org_id.as_str())
    .bind(i64::from(limit))
    .execute(&mut **transaction)
    .await?;
    insert(transaction, key, now).await
}

/// Stores a key as part of a larger transaction.
pub(super) async fn insert(
    transaction: &mut Transaction<'static, Sqlite>,
    key: &NewKey,
    now: Timestamp,
) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO api_keys (id, org_id, user_id, name, prefix, hash, scopes, created_at, expires_at) \
         VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
    )
    .bind(key.id.as_str())
    .bind(key.org_id.as_str())
    .bind(key.user_id.as_str())
    .bind(&key.name)
    .bind(&key.prefix)
    .bind(key.hash.as_slice())
    .bind(to_document("scopes", &key.scopes)?)
    .bind(millis(now))
    .bind(key.expires_at.map(millis))
    .execute(&mut **transaction)
    .await?;
    Ok(())
}

fn record(row: &SqliteRow) -> Result<KeyRecord, StoreError> {
    Ok(KeyRecord {
        id: parse("key id", row.try_get("id")?)?,
        org_id: parse("organisation id", row.try_get("org_id")?)?,
        user_id: parse("user id", row.try_get("user_id")?)?,
        role: parse("role", row.try_get("role")?)?,
        name: row.try_get("name")?,
        prefix: row.try_get("prefix")?,
        hash: row.try_get("hash")?,
        scopes: document("scopes", row.try_get("scopes")?)?,
        created_at: timestamp(row.try_get("created_at")?)?,
        expires_at: row
            .try_get::<Option<i64>, _>("expires_at")?
            .map(timestamp)
            .transpose()?,
        last_used_at: row
            .try_get::<Option<i64>, _>("last_used_at")?
            .map(timestamp)
            .transpose()?,
    })
}
