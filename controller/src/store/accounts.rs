//! Organisations, users and invitations.

use jiff::Timestamp;
use sandgate_api::{
    id::{InvitationId, OrgId, UserId},
    rest::{Invitation, Organization, Role, User},
};
use sqlx::{Row as _, Sqlite, Transaction, sqlite::SqliteRow};

use super::{Conflict, NewKey, Store, StoreError, keys, millis, parse, timestamp};

/// The plan of every organisation of an installation of one's own.
pub const PLAN: &str = "self-hosted";

/// A registration, checked.
#[derive(Debug, Clone)]
pub struct NewAccount {
    /// Lower case.
    pub email: String,
    /// Name of the organisation.
    pub organization: String,
    /// Of the person.
    pub first_name: Option<String>,
    /// Of the person.
    pub last_name: Option<String>,
    /// What they want to do.
    pub use_case: Option<String>,
}

/// An invitation to be stored.
#[derive(Clone)]
pub struct NewInvitation {
    /// Its public part.
    pub id: InvitationId,
    /// Where it leads to; none: the operator's, for a new organisation.
    pub org_id: Option<OrgId>,
    /// Lower case; none: whoever has it.
    pub email: Option<String>,
    /// Of whoever uses it.
    pub role: Role,
    /// SHA-256 of the whole token.
    pub hash: [u8; 32],
    /// When it was made.
    pub created_at: Timestamp,
    /// When it stops working.
    pub expires_at: Timestamp,
}

/// An invitation that was not used yet. Whether it has expired is for the caller to see.
#[derive(Debug, Clone)]
pub struct InvitationRecord {
    /// Where it leads to.
    pub org_id: Option<OrgId>,
    /// SHA-256 of the whole token.
    pub hash: Vec<u8>,
    /// What it says.
    pub invitation: Invitation,
}

impl Store {
    /// Makes an organisation, its owner (who is the key's user) and its first key, or nothing; uses up the
    /// invitation, if there is one. `slug` is extended by the organisation's id when it is taken. Answers the slug.
    ///
    /// # Errors
    /// [`Conflict::EmailTaken`], [`Conflict::InvitationUsed`].
    pub async fn register(
        &self,
        account: &NewAccount,
        slug: &str,
        key: &NewKey,
        invitation: Option<&InvitationId>,
        now: Timestamp,
    ) -> Result<String, StoreError> {
        let mut transaction = self.write().await?;
        use_up(&mut transaction, invitation).await?;
        let org_id: &OrgId = &key.org_id;
        let slug_taken: Option<i64> = sqlx::query_scalar("SELECT 1 FROM organizations WHERE slug = ?")
            .bind(slug)
            .fetch_optional(&mut *transaction)
            .await?;
        let slug = match slug_taken {
            None => slug.to_owned(),
            Some(_) => format!("{slug}-{}", org_id.as_str().trim_start_matches(OrgId::PREFIX)),
        };
        sqlx::query("INSERT INTO organizations (id, name, slug, created_at) VALUES (?, ?, ?, ?)")
            .bind(org_id.as_str())
            .bind(&account.organization)
            .bind(&slug)
            .bind(millis(now))
            .execute(&mut *transaction)
            .await?;
        insert_user(&mut transaction, account, Role::Owner, key, now).await?;
        transaction.commit().await?;
        Ok(slug)
    }

    /// Adds a user, who is the key's, with a first key; uses up the invitation, if there is one.
    ///
    /// # Errors
    /// [`Conflict::EmailTaken`], [`Conflict::InvitationUsed`], [`Conflict::TooManyUsers`].
    pub async fn add_user(
        &self,
        account: &NewAccount,
        role: Role,
        key: &NewKey,
        invitation: Option<&InvitationId>,
        limit: u32,
        now: Timestamp,
    ) -> Result<(), StoreError> {
        let mut transaction = self.write().await?;
        use_up(&mut transaction, invitation).await?;
        let present: i64 = sqlx::query_scalar("SELECT count(*) FROM users WHERE org_id = ?")
            .bind(key.org_id.as_str())
            .fetch_one(&mut *transaction)
            .await?;
        if present >= i64::from(limit) {
            return Err(Conflict::TooManyUsers { limit }.into());
        }
        insert_user(&mut transaction, account, role, key, now).await?;
        transaction.commit().await?;
        Ok(())
    }

    /// An organisation.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn organization(&self, org_id: &OrgId) -> Result<Option<Organization>, StoreError> {
        let row = sqlx::query("SELECT name, slug FROM organizations WHERE id = ?")
            .bind(org_id.as_str())
            .fetch_optional(&self.readers)
            .await?;
        let Some(row) = row else { return Ok(None) };
        Ok(Some(Organization {
            id: org_id.clone(),
            name: row.try_get("name")?,
            slug: row.try_get("slug")?,
            plan: PLAN.to_owned(),
        }))
    }

    /// The organisation's users, oldest first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn users(&self, org_id: &OrgId) -> Result<Vec<User>, StoreError> {
        let rows = sqlx::query(
            "SELECT id, email, role, first_name, last_name, created_at FROM users WHERE org_id = ? \
             ORDER BY created_at, id",
        )
        .bind(org_id.as_str())
        .fetch_all(&self.readers)
        .await?;
        rows.iter().map(user).collect()
    }

    /// One of the organisation's users.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn user(&self, org_id: &OrgId, id: &UserId) -> Result<Option<User>, StoreError> {
        let row = sqlx::query(
            "SELECT id, email, role, first_name, last_name, created_at FROM users WHERE id = ? AND org_id = ?",
        )
        .bind(id.as_str())
        .bind(org_id.as_str())
        .fetch_optional(&self.readers)
        .await?;
        row.as_ref().map(user).transpose()
    }

    /// Gives a user, who is `was`, another role. False when the organisation has no such user in that role.
    ///
    /// # Errors
    /// [`Conflict::LastOwner`].
    pub async fn change_role(
        &self,
        org_id: &OrgId,
        id: &UserId,
        was: Role,
        role: Role,
    ) -> Result<bool, StoreError> {
        let mut transaction = self.write().await?;
        let done = sqlx::query("UPDATE users SET role = ? WHERE id = ? AND org_id = ? AND role = ?")
            .bind(role.as_str())
            .bind(id.as_str())
            .bind(org_id.as_str())
            .bind(was.as_str())
            .execute(&mut *transaction)
            .await?;
        has_owner(&mut transaction, org_id).await?;
        transaction.commit().await?;
        Ok(done.rows_affected() == 1)
    }

    /// Removes a user, who is `was`, and the user's keys. False when the organisation has no such user in that role.
    ///
    /// # Errors
    /// [`Conflict::LastOwner`].
    pub async fn remove_user(&self, org_id: &OrgId, id: &UserId, was: Role) -> Result<bool, StoreError> {
        let mut transaction = self.write().await?;
        let present: Option<i64> =
            sqlx::query_scalar("SELECT 1 FROM users WHERE id = ? AND org_id = ? AND role = ?")
                .bind(id.as_str())
                .bind(org_id.as_str())
                .bind(was.as_str())
                .fetch_optional(&mut *transaction)
                .await?;
        if present.is_none() {
            return Ok(false);
        }
        for statement in [
            "DELETE FROM api_keys WHERE user_id = ?",
            "DELETE FROM users WHERE id = ?",
        ] {
            sqlx::query(statement)
                .bind(id.as_str())
                .execute(&mut *transaction)
                .await?;
        }
        has_owner(&mut transaction, org_id).await?;
        transaction.commit().await?;
        Ok(true)
    }

    /// Stores an invitation, and forgets those that have expired.
    ///
    /// # Errors
    /// [`Conflict::TooManyInvitations`].
    pub async fn invite(&self, new: &NewInvitation, limit: u32) -> Result<(), StoreError> {
        let mut transaction = self.write().await?;
        sqlx::query("DELETE FROM invitations WHERE expires_at <= ?")
            .bind(millis(new.created_at))
            .execute(&mut *transaction)
            .await?;
        let present: i64 =
            sqlx::query_scalar("SELECT count(*) FROM invitations WHERE coalesce(org_id, '') = ?")
                .bind(new.org_id.as_ref().map_or("", OrgId::as_str))
                .fetch_one(&mut *transaction)
                .await?;
        if present >= i64::from(limit) {
            return Err(Conflict::TooManyInvitations { limit }.into());
        }
        sqlx::query(
            "INSERT INTO invitations (id, org_id, email, role, hash, created_at, expires_at) \
             VALUES (?, ?, ?, ?, ?, ?, ?)",
        )
        .bind(new.id.as_str())
        .bind(new.org_id.as_ref().map(OrgId::as_str))
        .bind(&new.email)
        .bind(new.role.as_str())
        .bind(new.hash.as_slice())
        .bind(millis(new.created_at))
        .bind(millis(new.expires_at))
        .execute(&mut *transaction)
        .await?;
        transaction.commit().await?;
        Ok(())
    }

    /// The invitation with this id.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn invitation(&self, id: &InvitationId) -> Result<Option<InvitationRecord>, StoreError> {
        let row = sqlx::query(
            "SELECT id, org_id, email, role, hash, created_at, expires_at FROM invitations WHERE id = ?",
        )
        .bind(id.as_str())
        .fetch_optional(&self.readers)
        .await?;
        row.as_ref().map(invitation).transpose()
    }

    /// The organisation's invitations that still work, oldest first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn invitations(&self, org_id: &OrgId, now: Timestamp) -> Result<Vec<Invitation>, StoreError> {
        let rows = sqlx::query(
            "SELECT id, org_id, email, role, hash, created_at, expires_at FROM invitations \
             WHERE org_id = ? AND expires_at > ? ORDER BY created_at, id",
        )
        .bind(org_id.as_str())
        .bind(millis(now))
        .fetch_all(&self.readers)
        .await?;
        rows.iter().map(|row| Ok(invitation(row)?.invitation)).collect()
    }

    /// Takes an invitation back. False when the organisation has none with this id.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn withdraw_invitation(&self, org_id: &OrgId, id: &InvitationId) -> Result<bool, StoreError> {
        let done = sqlx::query("DELETE FROM invitations WHERE id = ? AND org_id = ?")
            .bind(id.as_str())
            .bind(org_id.as_str())
            .execute(&self.writer)
            .await?;
        Ok(done.rows_affected() == 1)
    }
}

async fn use_up(
    transaction: &mut Transaction<'static, Sqlite>,
    invitation: Option<&InvitationId>,
) -> Result<(), StoreError> {
    let Some(id) = invitation else { return Ok(()) };
    let done = sqlx::query("DELETE FROM invitations WHERE id = ?")
        .bind(id.as_str())
        .execute(&mut **transaction)
        .await?;
    if done.rows_affected() != 1 {
        return Err(Conflict::InvitationUsed.into());
    }
    Ok(())
}

async fn insert_user(
    transaction: &mut Transaction<'static, Sqlite>,
    account: &NewAccount,
    role: Role,
    key: &NewKey,
    now: Timestamp,
) -> Result<(), StoreError> {
    let taken: Option<i64> = sqlx::query_scalar("SELECT 1 FROM users WHERE email = ?")
        .bind(&account.email)
        .fetch_optional(&mut **transaction)
        .await?;
    if taken.is_some() {
        return Err(Conflict::EmailTaken.into());
    }
    sqlx::query(
        "INSERT INTO users (id, org_id, email, role, first_name, last_name, use_case, created_at) \
         VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
    )
    .bind(key.user_id.as_str())
    .bind(key.org_id.as_str())
    .bind(&account.email)
    .bind(role.as_str())
    .bind(&account.first_name)
    .bind(&account.last_name)
    .bind(&account.use_case)
    .bind(millis(now))
    .execute(&mut **transaction)
    .await?;
    keys::insert(transaction, key, now).await
}

async fn has_owner(transaction: &mut Transaction<'static, Sqlite>, org_id: &OrgId) -> Result<(), StoreError> {
    let owners: i64 = sqlx::query_scalar("SELECT count(*) FROM users WHERE org_id = ? AND role = ?")
        .bind(org_id.as_str())
        .bind(Role::Owner.as_str())
        .fetch_one(&mut **transaction)
        .await?;
    if owners == 0 {
        return Err(Conflict::LastOwner.into());
    }
    Ok(())
}

fn user(row: &SqliteRow) -> Result<User, StoreError> {
    Ok(User {
        id: parse("user id", row.try_get("id")?)?,
        email: row.try_get("email")?,
        role: parse("role", row.try_get("role")?)?,
        first_name: row.try_get("first_name")?,
        last_name: row.try_get("last_name")?,
        created_at: Some(timestamp(row.try_get("created_at")?)?),
    })
}

fn invitation(row: &SqliteRow) -> Result<InvitationRecord, StoreError> {
    Ok(InvitationRecord {
        org_id: row
            .try_get::<Option<&str>, _>("org_id")?
            .map(|id| parse("organisation id", id))
            .transpose()?,
        hash: row.try_get("hash")?,
        invitation: Invitation {
            id: parse("invitation id", row.try_get("id")?)?,
            role: parse("role", row.try_get("role")?)?,
            email: row.try_get("email")?,
            expires_at: timestamp(row.try_get("expires_at")?)?,
            created_at: timestamp(row.try_get("created_at")?)?,
        },
    })
}
