//! What must survive: accounts, keys, sandboxes, policies, secrets (sealed), tunnels, the feed's position, the egress audit, usage, events.
//!
//! Owns the SQL. Knows no HTTP, and decides nothing but what must be decided inside a transaction: quota,
//! stale revisions, and the feed revision itself, which is assigned while the writer's lock is held, so
//! that revisions become visible in the order of their numbers and no consumer can miss one.
//!
//! SQLite in WAL mode: one connection writes, a few read beside it. A commit is on the disk before it counts, but
//! for what one sandbox goes through ([`Store::write_brief`]): no sandbox outlives its machine, so that it is enough
//! if such a commit outlives this process. Whatever is committed after it takes it along.

mod accounts;
mod actions;
mod audit;
mod feed;
mod happenings;
mod keys;
mod policies;
mod pool;
#[cfg(test)]
pub(crate) mod samples;
mod sandboxes;
mod secrets;
mod templates;
mod terms;
mod tunnels;
mod usage;

use std::{path::Path, time::Duration};

use jiff::Timestamp;
use sandgate_api::feed::Revision;
use sqlx::{
    Sqlite, SqlitePool, Transaction,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};
use tokio::sync::watch;

pub use accounts::{InvitationRecord, NewAccount, NewInvitation, PLAN};
pub use actions::{ActionFilter, ActionText, NewAction};
pub use audit::{AuditFilter, AuditRow};
pub use feed::FeedChange;
pub use happenings::Happening;
pub use keys::{KeyRecord, NewKey};
pub use policies::{PolicyChange, StoredPolicy};
pub use pool::{PoolRecord, PoolStatus, Withdrawal};
pub use sandboxes::{AuthorityRecord, NewSandbox, SandboxRecord};
pub use secrets::{NewSecret, SandboxSecret, SecretChange, SecretChoice, SecretRecord, SecretUpdate};
pub use terms::{Extension, Longer};
pub use tunnels::{EXPIRED_SHOWN, TunnelChange, TunnelLimits, TunnelRecord};
pub use usage::{Amounts, Used, hour_of};

/// Connections that read beside the writer.
const READERS: u32 = 4;

/// How long a statement waits for another process (`controller down`) to let go of the database.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);

/// The database.
#[derive(Debug, Clone)]
pub struct Store {
    writer: SqlitePool,
    readers: SqlitePool,
    revision: watch::Sender<Revision>,
    /// The newest audit record that was stored since the start.
    recorded: watch::Sender<i64>,
    /// The newest event that was stored since the start.
    happened: watch::Sender<i64>,
}

/// The store did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The request does not fit what is stored. The caller's doing; nothing was changed.
    #[error(transparent)]
    Conflict(#[from] Conflict),
    /// The database failed.
    #[error("the database failed")]
    Failed(#[from] sqlx::Error),
    /// The schema could not be brought up to date.
    #[error("the database's schema could not be brought up to date")]
    Migrate(#[from] sqlx::migrate::MigrateError),
    /// A row holds what this version cannot read.
    #[error("a stored {what} cannot be read: {why}")]
    Corrupt {
        /// What it is.
        what: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// No random numbers for a placeholder.
    #[error("the system has no random numbers: {0}")]
    Random(getrandom::Error),
}

/// Why a request does not fit what is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Conflict {
    /// Somebody registered with this address.
    #[error("the e-mail address is registered already")]
    EmailTaken,
    /// The organisation has as many sandboxes as it may have.
    #[error("the organisation has reached its limit of {limit} sandboxes")]
    QuotaReached {
        /// The limit.
        limit: u32,
    },
    /// The session has a live sandbox.
    #[error("the session has a sandbox already")]
    SessionTaken,
    /// The organisation has as many keys as it may have.
    #[error("the organisation has reached its limit of {limit} API keys")]
    TooManyKeys {
        /// The limit.
        limit: u32,
    },
    /// The organisation has as many users as it may have.
    #[error("the organisation has reached its limit of {limit} users")]
    TooManyUsers {
        /// The limit.
        limit: u32,
    },
    /// There are as many open invitations as there may be.
    #[error("there are {limit} invitations that were not used yet, and that is as many as there may be")]
    TooManyInvitations {
        /// The limit.
        limit: u32,
    },
    /// The invitation was used by somebody else meanwhile.
    #[error("the invitation was used already")]
    InvitationUsed,
    /// Nobody would be left who can manage the organisation.
    #[error("an organisation has at least one owner: make somebody else an owner first")]
    LastOwner,
    /// The policy was changed since the caller read it.
    #[error("the policy is at revision {current}")]
    StaleRevision {
        /// The revision it has.
        current: Revision,
    },
    /// The organisation has a secret of this name.
    #[error("there is a secret of this name already")]
    SecretExists,
    /// The organisation has as many templates as it may have.
    #[error("the organisation has reached its limit of {limit} templates")]
    TooManyTemplates {
        /// The limit.
        limit: u32,
    },
    /// The organisation has as many secrets as it may have.
    #[error("the organisation has reached its limit of {limit} secrets")]
    TooManySecrets {
        /// The limit.
        limit: u32,
    },
    /// The organisation has no such secret.
    #[error("there is no secret of this name")]
    NoSuchSecret {
        /// Which of those named.
        index: usize,
    },
    /// The sandbox has as many tunnels as it may have.
    #[error("the sandbox has reached its limit of {limit} tunnels")]
    TooManyTunnels {
        /// The limit.
        limit: u32,
    },
    /// The organisation has as many tunnels as it may have.
    #[error("the organisation has reached its limit of {limit} tunnels")]
    TooManyTunnelsOfOrganization {
        /// The limit.
        limit: u32,
    },
    /// There are as many tunnels as there can be.
    #[error("there are as many tunnels as this installation can serve")]
    NoTunnelLeft,
    /// The sandbox is not in a state in which this can be done.
    #[error("the sandbox is no longer in the expected state")]
    WrongState,
}

impl Store {
    /// Opens the database file, making it if it does not exist, and brings its schema up to date.
    ///
    /// # Errors
    /// When the file cannot be opened or was written by a later version.
    pub async fn open(path: &Path) -> Result<Self, StoreError> {
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(BUSY_TIMEOUT)
            .foreign_keys(true);
        let writer = SqlitePoolOptions::new()
            .max_connections(1)
            .before_acquire(|connection, _age| {
                Box::pin(async move {
                    // Whatever the last transaction was content with.
                    sqlx::query("PRAGMA synchronous = FULL")
                        .execute(connection)
                        .await?;
                    Ok(true)
                })
            })
            .connect_with(options.clone())
            .await?;
        sqlx::migrate!("migrations/sqlite").run(&writer).await?;
        let readers = SqlitePoolOptions::new()
            .max_connections(READERS)
            .connect_with(options.read_only(true))
            .await?;
        let (revision, _) = watch::channel(0);
        let store = Self {
            writer,
            readers,
            revision,
            recorded: watch::channel(0).0,
            happened: watch::channel(0).0,
        };
        let current = store.open_feed().await?;
        store.revision.send_replace(current);
        Ok(store)
    }

    /// Opens the database to look at it, while a controller may be using it.
    ///
    /// # Errors
    /// When the file is not there or cannot be read.
    pub async fn look_at(path: &Path) -> Result<Self, StoreError> {
        let options = SqliteConnectOptions::new()
            .filename(path)
            .read_only(true)
            .busy_timeout(BUSY_TIMEOUT);
        let readers = SqlitePoolOptions::new()
            .max_connections(READERS)
            .connect_with(options)
            .await?;
        Ok(Self {
            writer: readers.clone(),
            readers,
            revision: watch::channel(0).0,
            recorded: watch::channel(0).0,
            happened: watch::channel(0).0,
        })
    }

    /// The feed's revision, as of the last commit; changes when a commit changes it.
    pub fn watch_revision(&self) -> watch::Receiver<Revision> {
        self.revision.subscribe()
    }

    /// Whether the database answers.
    ///
    /// # Errors
    /// When it does not.
    pub async fn check(&self) -> Result<(), StoreError> {
        let _one: i64 = sqlx::query_scalar("SELECT 1").fetch_one(&self.readers).await?;
        Ok(())
    }

    /// Closes every connection; the write-ahead log is folded into the database.
    pub async fn close(&self) {
        self.readers.close().await;
        self.writer.close().await;
    }

    /// A transaction that holds the writer's lock from its first statement on.
    async fn write(&self) -> Result<Transaction<'static, Sqlite>, StoreError> {
        Ok(self.writer.begin_with("BEGIN IMMEDIATE").await?)
    }

    /// The same for what one sandbox goes through. The commit survives the end of this process, but not that of
    /// the machine, and so is spared a wait for the disk (SQLite: `PRAGMA synchronous = NORMAL`).
    async fn write_brief(&self) -> Result<Transaction<'static, Sqlite>, StoreError> {
        let begin = "PRAGMA synchronous = NORMAL; BEGIN IMMEDIATE";
        Ok(self.writer.begin_with(begin).await?)
    }

    /// Commits, and tells those who follow the feed.
    async fn commit_revision(
        &self,
        transaction: Transaction<'static, Sqlite>,
        revision: Revision,
    ) -> Result<(), StoreError> {
        transaction.commit().await?;
        self.revision.send_if_modified(|current| {
            let newer = revision > *current;
            *current = (*current).max(revision);
            newer
        });
        Ok(())
    }
}

/// Milliseconds since the epoch, as stored.
fn millis(time: Timestamp) -> i64 {
    time.as_millisecond()
}

fn timestamp(millis: i64) -> Result<Timestamp, StoreError> {
    Timestamp::from_millisecond(millis).map_err(|error| StoreError::Corrupt {
        what: "time",
        why: error.to_string(),
    })
}

fn parse<T>(what: &'static str, text: &str) -> Result<T, StoreError>
where
    T: std::str::FromStr<Err: std::fmt::Display>,
{
    text.parse().map_err(|error: T::Err| StoreError::Corrupt {
        what,
        why: error.to_string(),
    })
}

fn document<T: serde::de::DeserializeOwned>(what: &'static str, text: &str) -> Result<T, StoreError> {
    serde_json::from_str(text).map_err(|error| StoreError::Corrupt {
        what,
        why: error.to_string(),
    })
}

fn to_document<T: serde::Serialize>(what: &'static str, value: &T) -> Result<String, StoreError> {
    serde_json::to_string(value).map_err(|error| StoreError::Corrupt {
        what,
        why: error.to_string(),
    })
}

fn to_revision(stored: i64) -> Result<Revision, StoreError> {
    Revision::try_from(stored).map_err(|error| StoreError::Corrupt {
        what: "revision",
        why: error.to_string(),
    })
}

/// Whole numbers are stored signed; a revision or count beyond that range cannot come into being.
fn to_stored(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests;
