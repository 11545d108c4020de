//! Organisations and users.

use jiff::Timestamp;
use sandgate_api::id::{OrgId, UserId};

use super::{Conflict, NewKey, Store, StoreError, keys, millis};

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

/// What a registration made.
#[derive(Debug, Clone)]
pub struct Account {
    /// The organisation's unique name for URLs.
    pub slug: String,
    /// The first user.
    pub user_id: UserId,
}

impl Store {
    /// Makes an organisation, its owner and its first key, or nothing. `slug` is extended by the
    /// organisation's id when it is taken.
    ///
    /// # Errors
    /// [`Conflict::EmailTaken`].
    pub async fn register(
        &self,
        account: &NewAccount,
        slug: &str,
        key: &NewKey,
        now: Timestamp,
    ) -> Result<Account, StoreError> {
        let mut transaction = self.write().await?;
        let taken: Option<i64> = sqlx::query_scalar("SELECT 1 FROM users WHERE email = ?")
            .bind(&account.email)
            .fetch_optional(&mut *transaction)
            .await?;
        if taken.is_some() {
            return Err(Conflict::EmailTaken.into());
        }
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
        let user_id = UserId::random();
        sqlx::query(
            "INSERT INTO users (id, org_id, email, role, first_name, last_name, use_case, created_at) \
             VALUES (?, ?, ?, 'owner', ?, ?, ?, ?)",
        )
        .bind(user_id.as_str())
        .bind(org_id.as_str())
        .bind(&account.email)
        .bind(&account.first_name)
        .bind(&account.last_name)
        .bind(&account.use_case)
        .bind(millis(now))
        .execute(&mut *transaction)
        .await?;
        keys::insert(&mut transaction, key, now).await?;
        transaction.commit().await?;
        Ok(Account { slug, user_id })
    }
}
