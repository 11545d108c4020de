//! The feed's position and what a node must know.
//!
//! A removal is remembered, so that a node that was away for a while gets it as a delta. Old removals are
//! forgotten; a node that asks from before that point gets a snapshot.

use std::{collections::HashMap, sync::Arc};

use jiff::Timestamp;
use sandgate_api::{
    credential::Binding,
    feed::{FeedFrame, FeedSandbox, PolicyTier, Revision, TierName},
    id::SandboxId,
};
use sandgate_policy::Policy;
use sqlx::{Row as _, Sqlite, SqliteConnection, Transaction, sqlite::SqliteRow};

use super::{
    Store, StoreError, document, millis, parse, pool::pooled_after, secrets::bindings_after, to_revision,
    to_stored, tunnels::ports_after,
};

/// How many removals are kept for nodes that were away.
const KEPT_REMOVALS: i64 = 10_000;

/// What the feed has to say since a revision.
#[derive(Debug, Clone, PartialEq)]
pub struct FeedChange {
    /// The frame to send.
    pub frame: FeedFrame,
    /// The state's revision after it.
    pub revision: Revision,
}

impl Store {
    /// Begins a history. It starts at the clock and after all that is stored, so that whoever followed an
    /// earlier one gets a snapshot: that could have been of another database of the same machine, or have had
    /// commits that the machine lost with its power, whose numbers must not be given to others.
    pub(super) async fn open_feed(&self) -> Result<Revision, StoreError> {
        // Without a transaction the commit would come with the end of the statement, and nobody would hear of its
        // failure: a disk without room gave revisions that nobody could follow.
        let mut transaction = self.write().await?;
        let revision: i64 = sqlx::query_scalar(
            "INSERT INTO feed (one, revision, horizon) VALUES (1, ?1, ?1) ON CONFLICT DO UPDATE SET \
             revision = max(revision + 1, ?1), horizon = max(revision + 1, ?1) RETURNING revision",
        )
        .bind(millis(Timestamp::now()))
        .fetch_one(&mut *transaction)
        .await?;
        transaction.commit().await?;
        to_revision(revision)
    }

    /// What changed since `since`, as one consistent reading: a snapshot when `since` is absent, from
    /// before the horizon or from the future, else a delta (possibly an empty one).
    ///
    /// # Errors
    /// When the database fails.
    pub async fn feed_since(&self, since: Option<Revision>) -> Result<FeedChange, StoreError> {
        let mut transaction = self.readers.begin().await?;
        let (revision, known) = position(&mut transaction, since).await?;
        let frame = match known {
            None => FeedFrame::Snapshot {
                revision,
                sandboxes: attached_after(&mut transaction, 0).await?,
            },
            Some(since) => FeedFrame::Delta {
                since: Some(since),
                revision,
                upserts: attached_after(&mut transaction, since).await?,
                removed: removed_after(&mut transaction, since).await?,
            },
        };
        transaction.commit().await?;
        Ok(FeedChange { frame, revision })
    }

    /// Forgets the oldest removals.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn prune_removals(&self) -> Result<(), StoreError> {
        let mut transaction = self.write().await?;
        let cut: Option<i64> = sqlx::query_scalar(
            "SELECT max(revision) FROM \
             (SELECT * FROM (SELECT revision FROM feed_removals ORDER BY revision DESC LIMIT 1 OFFSET ?1) \
              UNION ALL \
              SELECT * FROM (SELECT revision FROM tunnel_removals ORDER BY revision DESC LIMIT 1 OFFSET ?1))",
        )
        .bind(KEPT_REMOVALS)
        .fetch_one(&mut *transaction)
        .await?;
        let Some(cut) = cut else { return Ok(()) };
        for removals in [
            "DELETE FROM feed_removals WHERE revision <= ?",
            "DELETE FROM tunnel_removals WHERE revision <= ?",
        ] {
            sqlx::query(removals).bind(cut).execute(&mut *transaction).await?;
        }
        sqlx::query("UPDATE feed SET horizon = max(horizon, ?)")
            .bind(cut)
            .execute(&mut *transaction)
            .await?;
        transaction.commit().await?;
        Ok(())
    }
}

/// Takes the next revision. Must be called in the transaction that makes the change.
pub(super) async fn next_revision(
    transaction: &mut Transaction<'static, Sqlite>,
) -> Result<Revision, StoreError> {
    let revision: i64 = sqlx::query_scalar("UPDATE feed SET revision = revision + 1 RETURNING revision")
        .fetch_one(&mut **transaction)
        .await?;
    to_revision(revision)
}

/// The feeds' revision, and `since` if what happened after it is known.
pub(super) async fn position(
    connection: &mut SqliteConnection,
    since: Option<Revision>,
) -> Result<(Revision, Option<Revision>), StoreError> {
    let (revision, horizon): (i64, i64) = sqlx::query_as("SELECT revision, horizon FROM feed")
        .fetch_one(connection)
        .await?;
    let (revision, horizon) = (to_revision(revision)?, to_revision(horizon)?);
    Ok((
        revision,
        since.filter(|since| (horizon..=revision).contains(since)),
    ))
}

async fn attached_after(
    connection: &mut SqliteConnection,
    since: Revision,
) -> Result<Vec<FeedSandbox>, StoreError> {
    let mut bindings: HashMap<SandboxId, Vec<Binding>> = HashMap::new();
    for (id, binding) in bindings_after(connection, since).await? {
        bindings.entry(id).or_default().push(binding);
    }
    let mut ports: HashMap<SandboxId, Vec<u16>> = HashMap::new();
    for (id, port) in ports_after(connection, since).await? {
        ports.entry(id).or_default().push(port);
    }
    let mut policies = Policies::default();
    // Apart from the sandboxes: thousands may have one.
    let organizations: Vec<(String, String)> = sqlx::query_as(
        "SELECT org_id, document FROM organization_policies WHERE org_id IN \
         (SELECT org_id FROM sandboxes WHERE endpoint IS NOT NULL AND feed_revision > ?)",
    )
    .bind(to_stored(since))
    .fetch_all(&mut *connection)
    .await?;
    let organizations = organizations
        .into_iter()
        .map(|(org_id, text)| Ok((org_id, policies.read(&text)?)))
        .collect::<Result<HashMap<_, _>, StoreError>>()?;
    let rows = sqlx::query(
        "SELECT s.id, s.org_id, s.endpoint, s.ca_generation, p.document AS sandbox \
         FROM sandboxes s \
         LEFT JOIN sandbox_policies p ON p.sandbox_id = s.id \
         WHERE s.endpoint IS NOT NULL AND s.feed_revision > ? ORDER BY s.feed_revision",
    )
    .bind(to_stored(since))
    .fetch_all(&mut *connection)
    .await?;
    let mut attached = rows
        .iter()
        .map(|row| {
            let mut sandbox = feed_sandbox(row, &organizations, &mut policies)?;
            sandbox.tunnel_ports = ports.remove(&sandbox.sandbox_id).unwrap_or_default();
            sandbox.bindings = bindings.remove(&sandbox.sandbox_id).unwrap_or_default();
            Ok(sandbox)
        })
        .collect::<Result<Vec<_>, StoreError>>()?;
    attached.extend(pooled_after(connection, since).await?);
    Ok(attached)
}

async fn removed_after(
    connection: &mut SqliteConnection,
    since: Revision,
) -> Result<Vec<SandboxId>, StoreError> {
    let ids: Vec<String> =
        sqlx::query_scalar("SELECT sandbox_id FROM feed_removals WHERE revision > ? ORDER BY revision")
            .bind(to_stored(since))
            .fetch_all(connection)
            .await?;
    ids.iter().map(|id| parse("sandbox id", id)).collect()
}

/// Documents by their texts: each is read once, and whoever has the same text shares it.
#[derive(Default)]
struct Policies(HashMap<String, Arc<Policy>>);

impl Policies {
    fn read(&mut self, text: &str) -> Result<Arc<Policy>, StoreError> {
        if let Some(policy) = self.0.get(text) {
            return Ok(Arc::clone(policy));
        }
        let policy = Arc::new(document("policy", text)?);
        self.0.insert(text.to_owned(), Arc::clone(&policy));
        Ok(policy)
    }
}

fn feed_sandbox(
    row: &SqliteRow,
    organizations: &HashMap<String, Arc<Policy>>,
    policies: &mut Policies,
) -> Result<FeedSandbox, StoreError> {
    let mut tiers = Vec::new();
    if let Some(policy) = organizations.get(row.try_get::<&str, _>("org_id")?) {
        tiers.push(PolicyTier {
            tier: TierName::Organization,
            policy: Arc::clone(policy),
        });
    }
    if let Some(text) = row.try_get::<Option<&str>, _>("sandbox")? {
        tiers.push(PolicyTier {
            tier: TierName::Sandbox,
            policy: policies.read(text)?,
        });
    }
    Ok(FeedSandbox {
        sandbox_id: parse("sandbox id", row.try_get("id")?)?,
        org_id: parse("organisation id", row.try_get("org_id")?)?,
        endpoint: document("endpoint", row.try_get("endpoint")?)?,
        tiers,
        bindings: Vec::new(),
        ca_generation: row.try_get("ca_generation")?,
        tunnel_ports: Vec::new(),
    })
}
