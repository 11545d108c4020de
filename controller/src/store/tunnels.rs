//! Tunnels, and what tunnel-proxy must know of them.
//!
//! Both feeds take their revisions from one counter: opening or closing a tunnel changes what tunnel-proxy serves
//! and which ports the sandbox's node lets it reach, in one transaction and under one number.

use jiff::{SignedDuration, Timestamp};
use sandgate_api::{
    feed::Revision,
    id::{OrgId, SandboxId, TunnelId},
    tunnel::{Access, Listening, Route, TunnelFrame, TunnelProtocol},
};
use sqlx::{Row as _, Sqlite, SqliteConnection, Transaction, sqlite::SqliteRow};

use super::{
    Conflict, Store, StoreError,
    feed::{next_revision, position},
    millis, parse, timestamp, to_revision, to_stored,
};

/// How long the URL of an expired tunnel says so.
pub const EXPIRED_SHOWN: SignedDuration = SignedDuration::from_hours(1);

/// Columns of a [`TunnelRecord`], in every query that reads one.
macro_rules! columns {
    () => {
        "id, org_id, sandbox_id, port, protocol, token_hash, local_port, created_at, expires_at"
    };
}

/// A tunnel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TunnelRecord {
    /// Its id.
    pub id: TunnelId,
    /// Its owner.
    pub org_id: OrgId,
    /// Where it leads.
    pub sandbox_id: SandboxId,
    /// The TCP port inside.
    pub port: u16,
    /// What is spoken on it.
    pub protocol: TunnelProtocol,
    /// SHA-256 of the text that opens it; none for a public one.
    pub token_hash: Option<[u8; 32]>,
    /// The port on the loopback address that tunnel-proxy listens on for it.
    pub local_port: Option<u16>,
    /// When it was asked for.
    pub created_at: Timestamp,
    /// When it ends by itself.
    pub expires_at: Timestamp,
}

/// How many tunnels there may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TunnelLimits {
    /// Open ones of one sandbox.
    pub of_sandbox: u32,
    /// Open ones of one organisation.
    pub of_organization: u32,
    /// In all, with those that have expired and still say so: these give way.
    pub in_all: u32,
}

/// What the tunnel feed has to say since a revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TunnelChange {
    /// The frame to send.
    pub frame: TunnelFrame,
    /// The state's revision after it.
    pub revision: Revision,
}

impl Store {
    /// Opens a tunnel, on both feeds.
    ///
    /// # Errors
    /// [`Conflict::WrongState`] when the sandbox does not run; [`Conflict::TooManyTunnels`];
    /// [`Conflict::TooManyTunnelsOfOrganization`]; [`Conflict::NoTunnelLeft`].
    pub async fn open_tunnel(
        &self,
        tunnel: &TunnelRecord,
        limits: TunnelLimits,
    ) -> Result<Revision, StoreError> {
        let mut transaction = self.write().await?;
        let revision = next_revision(&mut transaction).await?;
        revise_sandbox(&mut transaction, &tunnel.sandbox_id, revision).await?;
        let running: Option<i64> =
            sqlx::query_scalar("SELECT 1 FROM sandboxes WHERE id = ? AND org_id = ? AND status = 'running'")
                .bind(tunnel.sandbox_id.as_str())
                .bind(tunnel.org_id.as_str())
                .fetch_optional(&mut *transaction)
                .await?;
        if running.is_none() {
            return Err(Conflict::WrongState.into());
        }
        let open: i64 =
            sqlx::query_scalar("SELECT count(*) FROM tunnels WHERE sandbox_id = ? AND expires_at > ?")
                .bind(tunnel.sandbox_id.as_str())
                .bind(millis(tunnel.created_at))
                .fetch_one(&mut *transaction)
                .await?;
        if open >= i64::from(limits.of_sandbox) {
            return Err(Conflict::TooManyTunnels {
                limit: limits.of_sandbox,
            }
            .into());
        }
        let open: i64 =
            sqlx::query_scalar("SELECT count(*) FROM tunnels WHERE org_id = ? AND expires_at > ?")
                .bind(tunnel.org_id.as_str())
                .bind(millis(tunnel.created_at))
                .fetch_one(&mut *transaction)
                .await?;
        if open >= i64::from(limits.of_organization) {
            return Err(Conflict::TooManyTunnelsOfOrganization {
                limit: limits.of_organization,
            }
            .into());
        }
        make_room(&mut transaction, tunnel.created_at, limits.in_all, revision).await?;
        sqlx::query(
            "INSERT INTO tunnels (id, org_id, sandbox_id, port, protocol, token_hash, feed_revision, created_at, \
             expires_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        )
        .bind(tunnel.id.as_str())
        .bind(tunnel.org_id.as_str())
        .bind(tunnel.sandbox_id.as_str())
        .bind(tunnel.port)
        .bind(tunnel.protocol.as_str())
        .bind(tunnel.token_hash.as_ref().map(<[u8; 32]>::as_slice))
        .bind(to_stored(revision))
        .bind(millis(tunnel.created_at))
        .bind(millis(tunnel.expires_at))
        .execute(&mut *transaction)
        .await?;
        self.commit_revision(transaction, revision).await?;
        Ok(revision)
    }

    /// Closes one of the organisation's tunnels, expired or not: the revision that says so, and where it led.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn close_tunnel(
        &self,
        org_id: &OrgId,
        id: &TunnelId,
    ) -> Result<Option<(Revision, SandboxId)>, StoreError> {
        let mut transaction = self.write().await?;
        let sandbox_id: Option<String> =
            sqlx::query_scalar("SELECT sandbox_id FROM tunnels WHERE id = ? AND org_id = ?")
                .bind(id.as_str())
                .bind(org_id.as_str())
                .fetch_optional(&mut *transaction)
                .await?;
        let Some(sandbox_id) = sandbox_id else {
            return Ok(None);
        };
        let sandbox_id: SandboxId = parse("sandbox id", &sandbox_id)?;
        let revision = next_revision(&mut transaction).await?;
        remove(&mut transaction, &[id.to_string()], revision).await?;
        revise_sandbox(&mut transaction, &sandbox_id, revision).await?;
        self.commit_revision(transaction, revision).await?;
        Ok(Some((revision, sandbox_id)))
    }

    /// A tunnel that the organisation had, as long as its removal is remembered: the revision that says so, and
    /// where it led.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn closed_tunnel(
        &self,
        org_id: &OrgId,
        id: &TunnelId,
    ) -> Result<Option<(Revision, SandboxId)>, StoreError> {
        let closed: Option<(i64, String)> = sqlx::query_as(
            "SELECT revision, sandbox_id FROM tunnel_removals WHERE tunnel_id = ? AND org_id = ?",
        )
        .bind(id.as_str())
        .bind(org_id.as_str())
        .fetch_optional(&self.readers)
        .await?;
        closed
            .map(|(revision, sandbox_id)| Ok((to_revision(revision)?, parse("sandbox id", &sandbox_id)?)))
            .transpose()
    }

    /// The tunnel, if the organisation has it.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn tunnel(&self, org_id: &OrgId, id: &TunnelId) -> Result<Option<TunnelRecord>, StoreError> {
        let row = sqlx::query(concat!(
            "SELECT ",
            columns!(),
            " FROM tunnels WHERE id = ? AND org_id = ?"
        ))
        .bind(id.as_str())
        .bind(org_id.as_str())
        .fetch_optional(&self.readers)
        .await?;
        row.as_ref().map(record).transpose()
    }

    /// A sandbox's tunnels that have not expired, oldest first. Whose sandbox it is must have been checked.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn open_tunnels(
        &self,
        sandbox_id: &SandboxId,
        now: Timestamp,
    ) -> Result<Vec<TunnelRecord>, StoreError> {
        let rows = sqlx::query(concat!(
            "SELECT ",
            columns!(),
            " FROM tunnels WHERE sandbox_id = ? AND expires_at > ? ORDER BY sequence"
        ))
        .bind(sandbox_id.as_str())
        .bind(millis(now))
        .fetch_all(&self.readers)
        .await?;
        rows.iter().map(record).collect()
    }

    /// Remembers which loopback ports tunnel-proxy listens on, so that it gets the same ones again.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn note_local_ports(&self, listening: &[Listening]) -> Result<(), StoreError> {
        if listening.is_empty() {
            return Ok(());
        }
        let mut transaction = self.write().await?;
        for one in listening {
            sqlx::query("UPDATE tunnels SET local_port = ? WHERE id = ?")
                .bind(one.local_port)
                .bind(one.tunnel_id.as_str())
                .execute(&mut *transaction)
                .await?;
        }
        transaction.commit().await?;
        Ok(())
    }

    /// Takes the ports of tunnels that have expired off their nodes' feed, and forgets those that expired long ago.
    /// Gives the time at which there is more to do.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn retire_tunnels(&self, now: Timestamp) -> Result<Option<Timestamp>, StoreError> {
        let long_ago = now.saturating_sub(EXPIRED_SHOWN).unwrap_or(Timestamp::MIN);
        let due: i64 = sqlx::query_scalar(
            "SELECT count(*) FROM tunnels WHERE (expires_at <= ? AND retired = 0) OR expires_at <= ?",
        )
        .bind(millis(now))
        .bind(millis(long_ago))
        .fetch_one(&self.readers)
        .await?;
        if due > 0 {
            let mut transaction = self.write().await?;
            let revision = next_revision(&mut transaction).await?;
            let sandboxes: Vec<String> = sqlx::query_scalar(
                "UPDATE tunnels SET retired = 1 WHERE expires_at <= ? AND retired = 0 RETURNING sandbox_id",
            )
            .bind(millis(now))
            .fetch_all(&mut *transaction)
            .await?;
            for sandbox_id in sandboxes {
                revise_sandbox(&mut transaction, &parse("sandbox id", &sandbox_id)?, revision).await?;
            }
            let forgotten: Vec<String> = sqlx::query_scalar("SELECT id FROM tunnels WHERE expires_at <= ?")
                .bind(millis(long_ago))
                .fetch_all(&mut *transaction)
                .await?;
            remove(&mut transaction, &forgotten, revision).await?;
            self.commit_revision(transaction, revision).await?;
        }
        let next: Option<i64> = sqlx::query_scalar(
            "SELECT min(CASE retired WHEN 0 THEN expires_at ELSE expires_at + ? END) FROM tunnels",
        )
        .bind(i64::try_from(EXPIRED_SHOWN.as_millis()).unwrap_or(i64::MAX))
        .fetch_one(&self.writer)
        .await?;
        next.map(timestamp).transpose()
    }

    /// What changed since `since`, as one consistent reading: a snapshot when `since` is absent, from before the
    /// horizon or from the future, else a delta (possibly an empty one).
    ///
    /// # Errors
    /// When the database fails.
    pub async fn tunnels_since(&self, since: Option<Revision>) -> Result<TunnelChange, StoreError> {
        let mut transaction = self.readers.begin().await?;
        let (revision, since) = position(&mut transaction, since).await?;
        let upserts = routes_after(&mut transaction, since.unwrap_or(0)).await?;
        let frame = match since {
            None => TunnelFrame::Snapshot {
                revision,
                routes: upserts,
            },
            Some(since) => {
                let removed: Vec<String> = sqlx::query_scalar(
                    "SELECT tunnel_id FROM tunnel_removals WHERE revision > ? ORDER BY revision",
                )
                .bind(to_stored(since))
                .fetch_all(&mut *transaction)
                .await?;
                TunnelFrame::Delta {
                    revision,
                    upserts,
                    removed: removed
                        .iter()
                        .map(|id| parse("tunnel id", id))
                        .collect::<Result<_, _>>()?,
                }
            }
        };
        transaction.commit().await?;
        Ok(TunnelChange { frame, revision })
    }
}

/// Ends every tunnel of a sandbox that is taken off the feed.
pub(super) async fn close_all(
    transaction: &mut Transaction<'static, Sqlite>,
    sandbox_id: &SandboxId,
    revision: Revision,
) -> Result<(), StoreError> {
    let ids: Vec<String> = sqlx::query_scalar("SELECT id FROM tunnels WHERE sandbox_id = ?")
        .bind(sandbox_id.as_str())
        .fetch_all(&mut **transaction)
        .await?;
    remove(transaction, &ids, revision).await
}

/// The ports that tunnels lead to, of every sandbox that changed.
pub(super) async fn ports_after(
    connection: &mut SqliteConnection,
    since: Revision,
) -> Result<Vec<(SandboxId, u16)>, StoreError> {
    let rows: Vec<(String, u16)> = sqlx::query_as(
        "SELECT DISTINCT t.sandbox_id, t.port FROM tunnels t JOIN sandboxes s ON s.id = t.sandbox_id \
         WHERE t.retired = 0 AND s.endpoint IS NOT NULL AND s.feed_revision > ? ORDER BY t.port",
    )
    .bind(to_stored(since))
    .fetch_all(connection)
    .await?;
    rows.into_iter()
        .map(|(id, port)| Ok((parse("sandbox id", &id)?, port)))
        .collect()
}

/// Expired tunnels give way to a new one, the longest expired first.
async fn make_room(
    transaction: &mut Transaction<'static, Sqlite>,
    now: Timestamp,
    limit: u32,
    revision: Revision,
) -> Result<(), StoreError> {
    let present: i64 = sqlx::query_scalar("SELECT count(*) FROM tunnels")
        .fetch_one(&mut **transaction)
        .await?;
    let above = present + 1 - i64::from(limit);
    if above <= 0 {
        return Ok(());
    }
    let expired: Vec<String> = sqlx::query_scalar(
        "SELECT id FROM tunnels WHERE retired = 1 AND expires_at <= ? ORDER BY expires_at LIMIT ?",
    )
    .bind(millis(now))
    .bind(above)
    .fetch_all(&mut **transaction)
    .await?;
    if i64::try_from(expired.len()).unwrap_or(i64::MAX) < above {
        return Err(Conflict::NoTunnelLeft.into());
    }
    remove(transaction, &expired, revision).await
}

async fn remove(
    transaction: &mut Transaction<'static, Sqlite>,
    ids: &[String],
    revision: Revision,
) -> Result<(), StoreError> {
    for id in ids {
        sqlx::query(
            "INSERT OR REPLACE INTO tunnel_removals (tunnel_id, revision, org_id, sandbox_id) \
             SELECT id, ?, org_id, sandbox_id FROM tunnels WHERE id = ?",
        )
        .bind(to_stored(revision))
        .bind(id)
        .execute(&mut **transaction)
        .await?;
        sqlx::query("DELETE FROM tunnels WHERE id = ?")
            .bind(id)
            .execute(&mut **transaction)
            .await?;
    }
    Ok(())
}

/// Puts a sandbox that is on its node's feed there again.
async fn revise_sandbox(
    transaction: &mut Transaction<'static, Sqlite>,
    id: &SandboxId,
    revision: Revision,
) -> Result<(), StoreError> {
    sqlx::query("UPDATE sandboxes SET feed_revision = ? WHERE id = ? AND endpoint IS NOT NULL")
        .bind(to_stored(revision))
        .bind(id.as_str())
        .execute(&mut **transaction)
        .await?;
    Ok(())
}

async fn routes_after(connection: &mut SqliteConnection, since: Revision) -> Result<Vec<Route>, StoreError> {
    let rows = sqlx::query(concat!(
        "SELECT ",
        columns!(),
        " FROM tunnels WHERE feed_revision > ? ORDER BY feed_revision"
    ))
    .bind(to_stored(since))
    .fetch_all(connection)
    .await?;
    rows.iter().map(|row| Ok(route(record(row)?))).collect()
}

fn route(tunnel: TunnelRecord) -> Route {
    Route {
        tunnel_id: tunnel.id,
        sandbox_id: tunnel.sandbox_id,
        port: tunnel.port,
        protocol: tunnel.protocol,
        access: match tunnel.token_hash {
            None => Access::Public,
            Some(hash) => Access::Token {
                sha256: hex::encode(hash),
            },
        },
        expires_at: tunnel.expires_at,
        local_port: tunnel.local_port,
    }
}

fn record(row: &SqliteRow) -> Result<TunnelRecord, StoreError> {
    let corrupt = |what, why: String| StoreError::Corrupt { what, why };
    let token_hash = match row.try_get::<Option<&[u8]>, _>("token_hash")? {
        None => None,
        Some(bytes) => Some(
            <[u8; 32]>::try_from(bytes).map_err(|error| corrupt("digest of a token", error.to_string()))?,
        ),
    };
    let protocol = serde_json::Value::from(row.try_get::<&str, _>("protocol")?);
    Ok(TunnelRecord {
        id: parse("tunnel id", row.try_get("id")?)?,
        org_id: parse("organisation id", row.try_get("org_id")?)?,
        sandbox_id: parse("sandbox id", row.try_get("sandbox_id")?)?,
        port: row.try_get("port")?,
        protocol: serde_json::from_value(protocol).map_err(|error| corrupt("protocol", error.to_string()))?,
        token_hash,
        local_port: row.try_get("local_port")?,
        created_at: timestamp(row.try_get("created_at")?)?,
        expires_at: timestamp(row.try_get("expires_at")?)?,
    })
}
