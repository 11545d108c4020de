//! Who did what by the API.

use jiff::Timestamp;
use sandgate_api::{
    id::{OrgId, SandboxId, UserId},
    rest::{Action, ActionOutcome, ActionSummary},
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sqlx::{QueryBuilder, Row as _, Sqlite, sqlite::SqliteRow};

use super::{Store, StoreError, document, millis, parse, timestamp, to_document, to_stored};

/// An action to be recorded.
#[derive(Debug, Clone)]
pub struct NewAction {
    /// Unique: storing it twice stores it once.
    pub id: String,
    /// Whose organisation it was done in.
    pub org_id: OrgId,
    /// By whom.
    pub user_id: Option<UserId>,
    /// What it was about.
    pub sandbox_id: Option<SandboxId>,
    /// When it began.
    pub time: Timestamp,
    /// What it was, for example `sandbox.create`.
    pub action: String,
    /// How it went.
    pub outcome: ActionOutcome,
    /// How long it took, in milliseconds.
    pub duration: u64,
    /// The rest.
    pub text: ActionText,
}

/// What nobody searches for.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ActionText {
    /// What it was done to.
    pub resource: String,
    /// How it was asked for.
    pub details: Map<String, Value>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error_message: Option<String>,
}

/// Which actions are wanted.
#[derive(Debug, Clone, Default)]
pub struct ActionFilter {
    /// About one sandbox.
    pub sandbox_id: Option<SandboxId>,
    /// By one user.
    pub user_id: Option<UserId>,
    /// Of one kind.
    pub action: Option<String>,
    /// With one outcome.
    pub outcome: Option<ActionOutcome>,
    /// Not before.
    pub since: Option<Timestamp>,
    /// Before.
    pub until: Option<Timestamp>,
    /// How many to skip.
    pub offset: u32,
    /// At most so many.
    pub limit: u32,
}

impl Store {
    /// Records actions. Those that are recorded already stay as they are.
    ///
    /// # Errors
    /// When the database fails; then none is recorded.
    pub async fn insert_actions(&self, actions: &[NewAction]) -> Result<(), StoreError> {
        let mut transaction = self.write_brief().await?;
        for new in actions {
            let sandbox_id = new.sandbox_id.as_ref().map_or("", SandboxId::as_str);
            sqlx::query(
                "INSERT INTO actions (id, org_id, user_id, sandbox_id, session_id, time, action, outcome, duration, \
                 document) VALUES (?, ?, ?, ?, \
                 coalesce((SELECT session_id FROM sandboxes WHERE id = ? AND org_id = ?), ''), ?, ?, ?, ?, ?) \
                 ON CONFLICT (id) DO NOTHING",
            )
            .bind(&new.id)
            .bind(new.org_id.as_str())
            .bind(new.user_id.as_ref().map(UserId::as_str))
            .bind(sandbox_id)
            .bind(sandbox_id)
            .bind(new.org_id.as_str())
            .bind(millis(new.time))
            .bind(&new.action)
            .bind(new.outcome.as_str())
            .bind(to_stored(new.duration))
            .bind(to_document("action", &new.text)?)
            .execute(&mut *transaction)
            .await?;
        }
        transaction.commit().await?;
        Ok(())
    }

    /// The organisation's actions, newest first, and how many there are in all pages.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn actions(
        &self,
        org_id: &OrgId,
        filter: &ActionFilter,
    ) -> Result<(Vec<Action>, u64), StoreError> {
        let mut query = selection(
            "SELECT id, user_id, sandbox_id, session_id, time, action, outcome, duration, document FROM actions \
             WHERE org_id = ",
            org_id,
            filter,
        );
        query
            .push(" ORDER BY sequence DESC LIMIT ")
            .push_bind(i64::from(filter.limit));
        query.push(" OFFSET ").push_bind(i64::from(filter.offset));
        let rows = query.build().fetch_all(&self.readers).await?;
        let actions = rows
            .iter()
            .map(|row| action(org_id, row))
            .collect::<Result<_, _>>()?;
        let mut count = selection("SELECT count(*) FROM actions WHERE org_id = ", org_id, filter);
        let total: i64 = count.build_query_scalar().fetch_one(&self.readers).await?;
        Ok((actions, u64::try_from(total).unwrap_or_default()))
    }

    /// What was done to one sandbox of the organisation, in numbers.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn action_summary(&self, org_id: &OrgId, id: &SandboxId) -> Result<ActionSummary, StoreError> {
        let rows = sqlx::query(
            "SELECT action, outcome, count(*) AS number, CAST(sum(duration) AS BIGINT) AS duration FROM actions \
             WHERE org_id = ? AND sandbox_id = ? GROUP BY action, outcome",
        )
        .bind(org_id.as_str())
        .bind(id.as_str())
        .fetch_all(&self.readers)
        .await?;
        let mut summary = ActionSummary::default();
        for row in rows {
            let number = u64::try_from(row.try_get::<i64, _>("number")?).unwrap_or_default();
            summary.total_events += number;
            summary.duration += u64::try_from(row.try_get::<i64, _>("duration")?).unwrap_or_default();
            if row.try_get::<&str, _>("outcome")? != ActionOutcome::Success.as_str() {
                summary.errors += number;
            }
            match row.try_get::<&str, _>("action")? {
                "command.execute" => summary.commands_executed += number,
                "file.write" => summary.files_written += number,
                "file.read" => summary.files_read += number,
                "secret.inject" | "secret.access" => summary.secrets_accessed += number,
                _ => {}
            }
        }
        Ok(summary)
    }

    /// Forgets actions from before `oldest`, and, of each organisation, all but the newest `each`: at most `step` at a
    /// time of either. Answers how many it forgot.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn prune_actions(&self, oldest: Timestamp, each: u32, step: u32) -> Result<u64, StoreError> {
        let done = sqlx::query(
            "DELETE FROM actions WHERE sequence IN (SELECT sequence FROM actions WHERE time < ? LIMIT ?)",
        )
        .bind(millis(oldest))
        .bind(i64::from(step))
        .execute(&self.writer)
        .await?;
        let mut forgotten = done.rows_affected();
        let crowded: Vec<String> =
            sqlx::query_scalar("SELECT org_id FROM actions GROUP BY org_id HAVING count(*) > ?")
                .bind(i64::from(each))
                .fetch_all(&self.readers)
                .await?;
        for org_id in crowded {
            let done = sqlx::query(
                "DELETE FROM actions WHERE sequence IN \
                 (SELECT sequence FROM actions WHERE org_id = ? ORDER BY sequence DESC LIMIT ? OFFSET ?)",
            )
            .bind(org_id)
            .bind(i64::from(step))
            .bind(i64::from(each))
            .execute(&self.writer)
            .await?;
            forgotten += done.rows_affected();
        }
        Ok(forgotten)
    }
}

fn selection(what: &'static str, org_id: &OrgId, filter: &ActionFilter) -> QueryBuilder<Sqlite> {
    let mut query = QueryBuilder::<Sqlite>::new(what);
    query.push_bind(org_id.as_str().to_owned());
    if let Some(sandbox_id) = &filter.sandbox_id {
        query
            .push(" AND sandbox_id = ")
            .push_bind(sandbox_id.as_str().to_owned());
    }
    if let Some(user_id) = &filter.user_id {
        query
            .push(" AND user_id = ")
            .push_bind(user_id.as_str().to_owned());
    }
    if let Some(action) = &filter.action {
        query.push(" AND action = ").push_bind(action.clone());
    }
    if let Some(outcome) = filter.outcome {
        query.push(" AND outcome = ").push_bind(outcome.as_str());
    }
    if let Some(since) = filter.since {
        query.push(" AND time >= ").push_bind(millis(since));
    }
    if let Some(until) = filter.until {
        query.push(" AND time < ").push_bind(millis(until));
    }
    query
}

fn action(org_id: &OrgId, row: &SqliteRow) -> Result<Action, StoreError> {
    let text: ActionText = document("action", row.try_get("document")?)?;
    Ok(Action {
        id: row.try_get("id")?,
        timestamp: timestamp(row.try_get("time")?)?,
        sandbox_id: row.try_get("sandbox_id")?,
        org_id: org_id.clone(),
        user_id: row
            .try_get::<Option<&str>, _>("user_id")?
            .map(|id| parse("user id", id))
            .transpose()?,
        session_id: row.try_get("session_id")?,
        action: row.try_get("action")?,
        resource: text.resource,
        details: text.details,
        outcome: parse("outcome", row.try_get("outcome")?)?,
        error_message: text.error_message,
        duration: u64::try_from(row.try_get::<i64, _>("duration")?).unwrap_or_default(),
    })
}
