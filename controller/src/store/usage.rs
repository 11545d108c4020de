//! What sandboxes have used, by the hour.

use std::ops::Range;

use jiff::Timestamp;
use sandgate_api::id::{OrgId, SandboxId};
use sqlx::{Row as _, Sqlite, Transaction, sqlite::SqliteRow};

use super::{Store, StoreError, millis, parse, to_stored};

/// Milliseconds of an hour.
const HOUR: i64 = 3_600_000;

/// Which hour since the epoch this is.
pub fn hour_of(time: Timestamp) -> i64 {
    millis(time).div_euclid(HOUR)
}

/// How much of everything.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Amounts {
    /// Processor time, in microseconds.
    pub cpu_micros: u64,
    /// Memory times time: kibibytes for a second.
    pub memory_kib_seconds: u64,
    /// Sent and received.
    pub network_bytes: u64,
    /// Sandboxes made.
    pub creations: u64,
}

impl Amounts {
    /// Nothing at all.
    pub fn is_nothing(self) -> bool {
        self == Self::default()
    }

    /// Both together.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            cpu_micros: self.cpu_micros.saturating_add(other.cpu_micros),
            memory_kib_seconds: self.memory_kib_seconds.saturating_add(other.memory_kib_seconds),
            network_bytes: self.network_bytes.saturating_add(other.network_bytes),
            creations: self.creations.saturating_add(other.creations),
        }
    }
}

/// What a sandbox used in an hour, beside what is stored of it already.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Used {
    /// Its owner.
    pub org_id: OrgId,
    /// Which one.
    pub sandbox_id: SandboxId,
    /// See [`hour_of`].
    pub hour: i64,
    /// How much.
    pub amounts: Amounts,
}

impl Store {
    /// Adds what sandboxes have used, all of it or nothing.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn add_usage(&self, used: &[Used]) -> Result<(), StoreError> {
        let mut transaction = self.write_brief().await?;
        for Used {
            org_id,
            sandbox_id,
            hour,
            amounts,
        } in used
        {
            sqlx::query(
                "INSERT INTO usage (sandbox_id, hour, org_id, cpu_micros, memory_kib_seconds, network_bytes, \
                 creations) VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (sandbox_id, hour) DO UPDATE SET \
                 cpu_micros = usage.cpu_micros + excluded.cpu_micros, \
                 memory_kib_seconds = usage.memory_kib_seconds + excluded.memory_kib_seconds, \
                 network_bytes = usage.network_bytes + excluded.network_bytes, \
                 creations = usage.creations + excluded.creations",
            )
            .bind(sandbox_id.as_str())
            .bind(hour)
            .bind(org_id.as_str())
            .bind(to_stored(amounts.cpu_micros))
            .bind(to_stored(amounts.memory_kib_seconds))
            .bind(to_stored(amounts.network_bytes))
            .bind(to_stored(amounts.creations))
            .execute(&mut *transaction)
            .await?;
        }
        Ok(transaction.commit().await?)
    }

    /// What is stored of one sandbox in all.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn usage_of_sandbox(&self, id: &SandboxId) -> Result<Amounts, StoreError> {
        let row = sqlx::query(
            "SELECT CAST(coalesce(sum(cpu_micros), 0) AS BIGINT) AS cpu, \
             CAST(coalesce(sum(memory_kib_seconds), 0) AS BIGINT) AS memory, \
             CAST(coalesce(sum(network_bytes), 0) AS BIGINT) AS network, \
             CAST(coalesce(sum(creations), 0) AS BIGINT) AS creations FROM usage WHERE sandbox_id = ?",
        )
        .bind(id.as_str())
        .fetch_one(&self.writer)
        .await?;
        amounts(&row)
    }

    /// What an organisation used in each of these hours in which it used anything, in their order.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn usage_by_hour(
        &self,
        org_id: &OrgId,
        hours: Range<i64>,
    ) -> Result<Vec<(i64, Amounts)>, StoreError> {
        let rows = sqlx::query(
            "SELECT hour, CAST(sum(cpu_micros) AS BIGINT) AS cpu, \
             CAST(sum(memory_kib_seconds) AS BIGINT) AS memory, \
             CAST(sum(network_bytes) AS BIGINT) AS network, CAST(sum(creations) AS BIGINT) AS creations \
             FROM usage WHERE org_id = ? AND hour >= ? AND hour < ? GROUP BY hour ORDER BY hour",
        )
        .bind(org_id.as_str())
        .bind(hours.start)
        .bind(hours.end)
        .fetch_all(&self.readers)
        .await?;
        rows.iter()
            .map(|row| Ok((row.try_get("hour")?, amounts(row)?)))
            .collect()
    }

    /// What an organisation's sandboxes used in these hours, the one with the most processor time first; at most
    /// `limit`.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn usage_by_sandbox(
        &self,
        org_id: &OrgId,
        hours: Range<i64>,
        limit: u32,
    ) -> Result<Vec<(SandboxId, Amounts)>, StoreError> {
        let rows = sqlx::query(
            "SELECT sandbox_id, CAST(sum(cpu_micros) AS BIGINT) AS cpu, \
             CAST(sum(memory_kib_seconds) AS BIGINT) AS memory, \
             CAST(sum(network_bytes) AS BIGINT) AS network, CAST(sum(creations) AS BIGINT) AS creations \
             FROM usage WHERE org_id = ? AND hour >= ? AND hour < ? GROUP BY sandbox_id \
             ORDER BY cpu DESC, sandbox_id LIMIT ?",
        )
        .bind(org_id.as_str())
        .bind(hours.start)
        .bind(hours.end)
        .bind(limit)
        .fetch_all(&self.readers)
        .await?;
        rows.iter()
            .map(|row| Ok((parse("sandbox id", row.try_get("sandbox_id")?)?, amounts(row)?)))
            .collect()
    }

    /// Forgets what was used before this hour.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn prune_usage(&self, before: i64) -> Result<(), StoreError> {
        sqlx::query("DELETE FROM usage WHERE hour < ?")
            .bind(before)
            .execute(&self.writer)
            .await?;
        Ok(())
    }
}

/// A sandbox was made, as part of a larger transaction.
pub(super) async fn count_creation(
    transaction: &mut Transaction<'static, Sqlite>,
    id: &SandboxId,
) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO usage (sandbox_id, hour, org_id, creations) \
         SELECT id, created_at / ?, org_id, 1 FROM sandboxes WHERE id = ? \
         ON CONFLICT (sandbox_id, hour) DO UPDATE SET creations = usage.creations + excluded.creations",
    )
    .bind(HOUR)
    .bind(id.as_str())
    .execute(&mut **transaction)
    .await?;
    Ok(())
}

fn amounts(row: &SqliteRow) -> Result<Amounts, StoreError> {
    let amount = |column: &str| -> Result<u64, StoreError> {
        Ok(u64::try_from(row.try_get::<i64, _>(column)?).unwrap_or(0))
    };
    Ok(Amounts {
        cpu_micros: amount("cpu")?,
        memory_kib_seconds: amount("memory")?,
        network_bytes: amount("network")?,
        creations: amount("creations")?,
    })
}
