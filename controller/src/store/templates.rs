//! Templates of organisations.

use jiff::Timestamp;
use sandgate_api::id::OrgId;
use sqlx::Row as _;

use super::{Conflict, Store, StoreError, document, millis, to_document};
use crate::template::Template;

impl Store {
    /// An organisation's templates with their ids, the oldest first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn templates(&self, org_id: &OrgId) -> Result<Vec<(String, Template)>, StoreError> {
        let rows = sqlx::query("SELECT id, document FROM templates WHERE org_id = ? ORDER BY created_at, id")
            .bind(org_id.as_str())
            .fetch_all(&self.readers)
            .await?;
        rows.iter()
            .map(|row| {
                Ok((
                    row.try_get("id")?,
                    document("template", row.try_get("document")?)?,
                ))
            })
            .collect()
    }

    /// One of an organisation's templates.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn template(&self, org_id: &OrgId, id: &str) -> Result<Option<Template>, StoreError> {
        let stored: Option<String> =
            sqlx::query_scalar("SELECT document FROM templates WHERE org_id = ? AND id = ?")
                .bind(org_id.as_str())
                .bind(id)
                .fetch_optional(&self.readers)
                .await?;
        stored.map(|text| document("template", &text)).transpose()
    }

    /// Stores a new template.
    ///
    /// # Errors
    /// [`Conflict::TooManyTemplates`].
    pub async fn insert_template(
        &self,
        org_id: &OrgId,
        id: &str,
        template: &Template,
        now: Timestamp,
        limit: u32,
    ) -> Result<(), StoreError> {
        let mut transaction = self.write().await?;
        let count: i64 = sqlx::query_scalar("SELECT count(*) FROM templates WHERE org_id = ?")
            .bind(org_id.as_str())
            .fetch_one(&mut *transaction)
            .await?;
        if count >= i64::from(limit) {
            return Err(Conflict::TooManyTemplates { limit }.into());
        }
        sqlx::query(
            "INSERT INTO templates (id, org_id, document, created_at, updated_at) VALUES (?, ?, ?, ?, ?)",
        )
        .bind(id)
        .bind(org_id.as_str())
        .bind(to_document("template", template)?)
        .bind(millis(now))
        .bind(millis(now))
        .execute(&mut *transaction)
        .await?;
        Ok(transaction.commit().await?)
    }

    /// Replaces a template. False: there is none.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn replace_template(
        &self,
        org_id: &OrgId,
        id: &str,
        template: &Template,
        now: Timestamp,
    ) -> Result<bool, StoreError> {
        let done =
            sqlx::query("UPDATE templates SET document = ?, updated_at = ? WHERE org_id = ? AND id = ?")
                .bind(to_document("template", template)?)
                .bind(millis(now))
                .bind(org_id.as_str())
                .bind(id)
                .execute(&self.writer)
                .await?;
        Ok(done.rows_affected() == 1)
    }

    /// Deletes a template. False: there is none. Sandboxes made from it stay as they are.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn delete_template(&self, org_id: &OrgId, id: &str) -> Result<bool, StoreError> {
        let done = sqlx::query("DELETE FROM templates WHERE org_id = ? AND id = ?")
            .bind(org_id.as_str())
            .bind(id)
            .execute(&self.writer)
            .await?;
        Ok(done.rows_affected() == 1)
    }
}
