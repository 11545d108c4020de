//! The egress audit: a bounded log of what netd reported.

use std::collections::{BTreeMap, HashSet, btree_map::Entry};

use futures_util::TryStreamExt as _;
use jiff::Timestamp;
use sandgate_api::{
    audit::{AlertKind, AuditEvent, AuditGap, AuditVerdict},
    id::{OrgId, SandboxId},
    rest::{AuditProblemKind, AuditVerification},
};
use sqlx::{QueryBuilder, Row as _, Sqlite, Transaction, sqlite::SqliteRow};

use tokio::sync::watch;

use super::{Store, StoreError, document, millis, to_document, to_stored};
use crate::chain::{Anchor, Chain, ChainKey, Columns, Head, Link, Mac, Place, Verifier};

/// How many records one statement stores: each statement is a way to the database's thread and back.
const TOGETHER: usize = 128;

/// Which records a caller wants.
#[derive(Debug, Clone, Default)]
pub struct AuditFilter {
    /// Of one sandbox.
    pub sandbox_id: Option<SandboxId>,
    /// For one name, lower case.
    pub host: Option<String>,
    /// With one of these verdicts; none: all.
    pub verdicts: &'static [AuditVerdict],
    /// Alerts of one of these kinds; none: all records.
    pub alerts: &'static [AlertKind],
    /// Not before.
    pub since: Option<Timestamp>,
    /// Before.
    pub until: Option<Timestamp>,
    /// Older than this record.
    pub before: Option<i64>,
    /// How many to skip.
    pub offset: u32,
    /// At most so many.
    pub limit: u32,
}

/// A stored record.
#[derive(Debug, Clone, PartialEq)]
pub struct AuditRow {
    /// Its position.
    pub sequence: i64,
    /// As netd made it.
    pub event: AuditEvent,
}

impl Store {
    /// Stores records, each bound to the one before it of the same organisation; those that are stored already are left
    /// as they are.
    ///
    /// # Errors
    /// When the database fails; then none is stored.
    pub async fn insert_audit(&self, key: &ChainKey, events: &[AuditEvent]) -> Result<(), StoreError> {
        let mut transaction = self.write().await?;
        let mut ends: BTreeMap<&OrgId, Place> = BTreeMap::new();
        let mut newest = None;
        for some in events.chunks(TOGETHER) {
            let mut stored = stored(&mut transaction, some).await?;
            let mut rows = Vec::with_capacity(some.len());
            for event in some {
                if !stored.insert(event.id.clone()) {
                    continue;
                }
                let end = match ends.entry(&event.org_id) {
                    Entry::Occupied(end) => end.into_mut(),
                    Entry::Vacant(vacant) => {
                        vacant.insert(continue_chain(&mut transaction, key, &event.org_id).await?)
                    }
                };
                let text = match &event.gap {
                    None => to_document("audit record", event)?,
                    Some(_) => to_document("audit record", &behind(event, end))?,
                };
                *end = key.next(&event.org_id, end, &text);
                rows.push((event, text, *end));
            }
            if rows.is_empty() {
                continue;
            }
            let mut insertion = QueryBuilder::<Sqlite>::new(
                "INSERT INTO egress_audit (id, org_id, sandbox_id, time, verdict, host, alert, document, epoch, position, mac) ",
            );
            insertion.push_values(rows, |mut row, (event, text, place)| {
                row.push_bind(&event.id)
                    .push_bind(event.org_id.as_str())
                    .push_bind(event.sandbox_id.as_str())
                    .push_bind(millis(event.time))
                    .push_bind(event.verdict.as_str())
                    .push_bind(&event.host)
                    .push_bind(event.alert.map(AlertKind::as_str))
                    .push_bind(text)
                    .push_bind(place.epoch)
                    .push_bind(place.position)
                    .push_bind(place.mac.to_vec());
            });
            // Of as many shapes as there are numbers of rows: not to be kept prepared.
            let done = insertion
                .build()
                .persistent(false)
                .execute(&mut *transaction)
                .await?;
            newest = Some(done.last_insert_rowid());
        }
        for (org_id, end) in ends {
            sqlx::query("UPDATE egress_audit_chains SET position = ?, mac = ? WHERE org_id = ?")
                .bind(end.position)
                .bind(end.mac.as_slice())
                .bind(org_id.as_str())
                .execute(&mut *transaction)
                .await?;
        }
        transaction.commit().await?;
        if let Some(newest) = newest {
            self.recorded
                .send_modify(|recorded| *recorded = newest.max(*recorded));
        }
        Ok(())
    }

    /// A page of the organisation's records, newest first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn audit(&self, org_id: &OrgId, filter: &AuditFilter) -> Result<Vec<AuditRow>, StoreError> {
        let mut query = selection(org_id, filter);
        if let Some(before) = filter.before {
            query.push(" AND sequence < ").push_bind(before);
        }
        query
            .push(" ORDER BY sequence DESC LIMIT ")
            .push_bind(filter.limit);
        query.push(" OFFSET ").push_bind(filter.offset);
        let rows = query.build().fetch_all(&self.readers).await?;
        rows.iter().map(to_row).collect()
    }

    /// One of the organisation's records.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn audit_event(&self, org_id: &OrgId, id: &str) -> Result<Option<AuditEvent>, StoreError> {
        let row = sqlx::query("SELECT document FROM egress_audit WHERE id = ? AND org_id = ?")
            .bind(id)
            .bind(org_id.as_str())
            .fetch_optional(&self.readers)
            .await?;
        row.map(|row| document("audit record", row.try_get("document")?))
            .transpose()
    }

    /// The organisation's records behind a position, in the order in which they were stored.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn audit_after(
        &self,
        org_id: &OrgId,
        filter: &AuditFilter,
        after: i64,
    ) -> Result<Vec<AuditRow>, StoreError> {
        let mut query = selection(org_id, filter);
        query.push(" AND sequence > ").push_bind(after);
        query.push(" ORDER BY sequence LIMIT ").push_bind(filter.limit);
        let rows = query.build().fetch_all(&self.readers).await?;
        rows.iter().map(to_row).collect()
    }

    /// The position of the newest record of all.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn newest_audit(&self) -> Result<i64, StoreError> {
        let newest: Option<i64> = sqlx::query_scalar("SELECT max(sequence) FROM egress_audit")
            .fetch_one(&self.readers)
            .await?;
        Ok(newest.unwrap_or(0))
    }

    /// When the newest record of all was made.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn newest_audit_time(&self) -> Result<Option<Timestamp>, StoreError> {
        let newest: Option<i64> =
            sqlx::query_scalar("SELECT time FROM egress_audit ORDER BY sequence DESC LIMIT 1")
                .fetch_optional(&self.readers)
                .await?;
        Ok(newest.and_then(|time| Timestamp::from_millisecond(time).ok()))
    }

    /// Forgets the oldest records: those from before `before`, and those beyond the newest `keep`. At most
    /// `limit` at a time; returns how many. Each chain then begins behind the last of its records that is forgotten.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn prune_audit(
        &self,
        key: &ChainKey,
        before: Timestamp,
        keep: u64,
        limit: u32,
    ) -> Result<u64, StoreError> {
        let mut transaction = self.write().await?;
        let stored: i64 = sqlx::query_scalar("SELECT count(*) FROM egress_audit")
            .fetch_one(&mut *transaction)
            .await?;
        let excess = stored.saturating_sub(to_stored(keep));
        let oldest = sqlx::query(
            "SELECT org_id, sequence, id, sandbox_id, time, verdict, host, alert, document, epoch, position, mac \
             FROM egress_audit ORDER BY sequence LIMIT ?",
        )
        .bind(limit)
        .fetch_all(&mut *transaction)
        .await?;
        let mut links: Vec<(OrgId, Link)> = Vec::new();
        for (row, number) in oldest.iter().zip(1..) {
            let link = link(row)?;
            // Up to the first that stays: a chain has no holes. Records arrive in the order of time, give or take a
            // queue: a record older than `before` behind a younger one waits until that one is old enough too.
            if number > excess && link.columns.time >= millis(before) {
                break;
            }
            links.push((super::parse("organization", row.try_get("org_id")?)?, link));
        }
        let mut chains = BTreeMap::new();
        for (org_id, _) in &links {
            if !chains.contains_key(org_id) {
                chains.insert(org_id.clone(), chain(&mut transaction, org_id).await?);
            }
        }
        let Forgettable { last, anchors } = forgettable(key, &chains, &links);
        let Some(last) = last else {
            return Ok(0);
        };
        for (org_id, anchor) in anchors {
            sqlx::query(
                "UPDATE egress_audit_chains SET anchor_sequence = ?, anchor_position = ?, anchor_mac = ?, anchor_seal = ? \
                 WHERE org_id = ?",
            )
            .bind(anchor.sequence)
            .bind(anchor.place.position)
            .bind(anchor.place.mac.as_slice())
            .bind(key.seal(org_id, &anchor).as_slice())
            .bind(org_id.as_str())
            .execute(&mut *transaction)
            .await?;
        }
        let done = sqlx::query("DELETE FROM egress_audit WHERE sequence <= ?")
            .bind(last)
            .execute(&mut *transaction)
            .await?;
        transaction.commit().await?;
        Ok(done.rows_affected())
    }

    /// Changes when records are stored: the position of the newest.
    pub fn watch_audit(&self) -> watch::Receiver<i64> {
        self.recorded.subscribe()
    }

    /// Organisations that have records.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn audited_organizations(&self) -> Result<Vec<OrgId>, StoreError> {
        let ids: Vec<String> = sqlx::query_scalar(
            "SELECT org_id FROM egress_audit_chains UNION SELECT DISTINCT org_id FROM egress_audit ORDER BY org_id",
        )
        .fetch_all(&self.readers)
        .await?;
        ids.iter().map(|id| super::parse("organization", id)).collect()
    }

    /// What is known of the chains.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn audit_chains(&self) -> Result<Vec<(OrgId, Chain)>, StoreError> {
        let rows = sqlx::query("SELECT * FROM egress_audit_chains")
            .fetch_all(&self.readers)
            .await?;
        rows.iter()
            .map(|row| {
                let org_id = super::parse("organization", row.try_get("org_id")?)?;
                Ok((org_id, to_chain(row)?))
            })
            .collect()
    }

    /// The link of the record at a position, if there is one.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn audit_mac(&self, org_id: &OrgId, at: &Place) -> Result<Option<Mac>, StoreError> {
        let row = sqlx::query(
            "SELECT epoch, position, mac FROM egress_audit WHERE org_id = ? AND epoch = ? AND position = ?",
        )
        .bind(org_id.as_str())
        .bind(at.epoch)
        .bind(at.position)
        .fetch_optional(&self.readers)
        .await?;
        Ok(row
            .as_ref()
            .map(place)
            .transpose()?
            .flatten()
            .map(|place| place.mac))
    }

    /// Looks at every record of an organisation, as they all were at one moment. What is wrong is in the answer, and
    /// ends the search.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn verify_audit(
        &self,
        key: &ChainKey,
        org_id: &OrgId,
        head: Option<&Head>,
    ) -> Result<AuditVerification, StoreError> {
        // A transaction that reads sees one state of the database, whatever is stored or forgotten meanwhile.
        let mut transaction = self.readers.begin().await?;
        let chain = chain(&mut transaction, org_id).await?;
        let mut answer = AuditVerification {
            verified: false,
            records: 0,
            unchained: 0,
            epoch: chain.as_ref().map(|chain| chain.anchor.place.epoch),
            anchor: chain.as_ref().map(|chain| chain.anchor.place.position),
            position: None,
            mac: None,
            signed_at: head.map(|head| head.time),
            problem: None,
        };
        let mut verifier = match Verifier::new(key, org_id, chain, head) {
            Ok(verifier) => verifier,
            Err(problem) => {
                answer.problem = Some(problem);
                return Ok(answer);
            }
        };
        let mut rows = sqlx::query(
            "SELECT sequence, id, sandbox_id, time, verdict, host, alert, document, epoch, position, mac FROM egress_audit \
             WHERE org_id = ? ORDER BY sequence",
        )
        .bind(org_id.as_str())
        .fetch(&mut *transaction);
        let mut found = Ok(());
        while let Some(row) = rows.try_next().await? {
            found = verifier.look(&link(&row)?);
            if found.is_err() {
                break;
            }
        }
        drop(rows);
        answer.problem = found.and_then(|()| verifier.end()).err();
        answer.verified = answer.problem.is_none();
        (answer.records, answer.unchained) = (verifier.records, verifier.unchained);
        if let Some((_, at)) = verifier.range() {
            answer.position = Some(at.position);
            answer.mac = Some(hex::encode(at.mac));
        }
        if let (Some(problem), Some(epoch)) = (&mut answer.problem, answer.epoch)
            && problem.kind == AuditProblemKind::Removed
        {
            let elsewhere: i64 = sqlx::query_scalar(
                "SELECT count(*) FROM egress_audit WHERE org_id = ? AND epoch = ? AND position = ?",
            )
            .bind(org_id.as_str())
            .bind(epoch)
            .bind(problem.position)
            .fetch_one(&mut *transaction)
            .await?;
            if elsewhere > 0 {
                problem.kind = AuditProblemKind::Reordered;
                problem.message =
                    "the record at this position stands further down; this one comes after it".to_owned();
            }
        }
        Ok(answer)
    }
}

/// What may be forgotten.
struct Forgettable<'a> {
    /// Up to this record.
    last: Option<i64>,
    /// Where chains begin then.
    anchors: BTreeMap<&'a OrgId, Anchor>,
}

/// The records before the first that is not what was recorded: what shows that somebody changed the audit stays, so that
/// waiting, or making records look old, is no way to be rid of it.
fn forgettable<'a>(
    key: &'a ChainKey,
    chains: &BTreeMap<OrgId, Option<Chain>>,
    links: &'a [(OrgId, Link)],
) -> Forgettable<'a> {
    let mut found = Forgettable {
        last: None,
        anchors: BTreeMap::new(),
    };
    let mut verifiers: BTreeMap<&OrgId, Verifier<'a>> = BTreeMap::new();
    for (org_id, link) in links {
        let looked = match verifiers.entry(org_id) {
            Entry::Occupied(verifier) => Ok(verifier.into_mut()),
            Entry::Vacant(vacant) => {
                let chain = chains.get(org_id).cloned().flatten();
                Verifier::new(key, org_id, chain, None).map(|verifier| vacant.insert(verifier))
            }
        };
        let looked = looked.and_then(|verifier| verifier.look(link).map(|()| verifier));
        match looked {
            Ok(verifier) => {
                found.last = Some(link.sequence);
                if let (1.., Some((_, place))) = (verifier.records, verifier.range()) {
                    let sequence = link.sequence;
                    found.anchors.insert(org_id, Anchor { place, sequence });
                }
            }
            Err(problem) => {
                tracing::error!(
                    target: "audit", %org_id, position = problem.position, event_id = problem.event_id, problem.message,
                    "the audit was changed: nothing from here on is forgotten; verify it"
                );
                break;
            }
        }
    }
    found
}

/// Records that a filter wants, without their order and number.
fn selection(org_id: &OrgId, filter: &AuditFilter) -> QueryBuilder<Sqlite> {
    let mut query =
        QueryBuilder::<Sqlite>::new("SELECT sequence, document FROM egress_audit WHERE org_id = ");
    query.push_bind(org_id.as_str().to_owned());
    if let Some(id) = &filter.sandbox_id {
        query.push(" AND sandbox_id = ").push_bind(id.as_str().to_owned());
    }
    if let Some(host) = &filter.host {
        query.push(" AND host = ").push_bind(host.clone());
    }
    if !filter.verdicts.is_empty() {
        query.push(" AND verdict IN (");
        let mut wanted = query.separated(", ");
        for verdict in filter.verdicts {
            wanted.push_bind(verdict.as_str());
        }
        query.push(")");
    }
    if !filter.alerts.is_empty() {
        query.push(" AND alert IN (");
        let mut wanted = query.separated(", ");
        for alert in filter.alerts {
            wanted.push_bind(alert.as_str());
        }
        query.push(")");
    }
    if let Some(since) = filter.since {
        query.push(" AND time >= ").push_bind(millis(since));
    }
    if let Some(until) = filter.until {
        query.push(" AND time < ").push_bind(millis(until));
    }
    query
}

fn to_row(row: &SqliteRow) -> Result<AuditRow, StoreError> {
    Ok(AuditRow {
        sequence: row.try_get("sequence")?,
        event: document("audit record", row.try_get("document")?)?,
    })
}

/// A gap with what the chain ends with before it: what came before is then in the record itself, for whoever has only that.
fn behind(gap: &AuditEvent, end: &Place) -> AuditEvent {
    AuditEvent {
        gap: Some(AuditGap {
            position: Some(end.position),
            mac: Some(hex::encode(end.mac)),
        }),
        ..gap.clone()
    }
}

/// Which of these records are stored already.
async fn stored(
    transaction: &mut Transaction<'static, Sqlite>,
    events: &[AuditEvent],
) -> Result<HashSet<String>, StoreError> {
    let mut query = QueryBuilder::<Sqlite>::new("SELECT id FROM egress_audit WHERE id IN (");
    let mut ids = query.separated(", ");
    for event in events {
        ids.push_bind(&event.id);
    }
    query.push(")");
    let stored = query.build_query_scalar().persistent(false);
    let stored = stored.fetch_all(&mut **transaction).await?;
    Ok(stored.into_iter().collect())
}

/// Where the organisation's chain ends; begun, if there is none for this key.
async fn continue_chain(
    transaction: &mut Transaction<'static, Sqlite>,
    key: &ChainKey,
    org_id: &OrgId,
) -> Result<Place, StoreError> {
    let known = chain(transaction, org_id).await?;
    if let Some(chain) = known.as_ref().filter(|chain| chain.key_id == key.id()) {
        return Ok(chain.end);
    }
    let epoch = known.map_or(1, |chain| chain.end.epoch + 1);
    let newest: Option<i64> = sqlx::query_scalar("SELECT max(sequence) FROM egress_audit WHERE org_id = ?")
        .bind(org_id.as_str())
        .fetch_one(&mut **transaction)
        .await?;
    let chain = key.begin(org_id, epoch, newest.unwrap_or(0));
    let (anchor, end) = (&chain.anchor, chain.end);
    sqlx::query(
        "INSERT OR REPLACE INTO egress_audit_chains (org_id, epoch, key_id, anchor_sequence, anchor_position, \
         anchor_mac, anchor_seal, position, mac) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
    )
    .bind(org_id.as_str())
    .bind(epoch)
    .bind(chain.key_id.as_slice())
    .bind(anchor.sequence)
    .bind(anchor.place.position)
    .bind(anchor.place.mac.as_slice())
    .bind(chain.seal.as_slice())
    .bind(end.position)
    .bind(end.mac.as_slice())
    .execute(&mut **transaction)
    .await?;
    Ok(end)
}

async fn chain(
    transaction: &mut Transaction<'static, Sqlite>,
    org_id: &OrgId,
) -> Result<Option<Chain>, StoreError> {
    let row = sqlx::query("SELECT * FROM egress_audit_chains WHERE org_id = ?")
        .bind(org_id.as_str())
        .fetch_optional(&mut **transaction)
        .await?;
    row.as_ref().map(to_chain).transpose()
}

fn to_chain(row: &SqliteRow) -> Result<Chain, StoreError> {
    let epoch = row.try_get("epoch")?;
    Ok(Chain {
        key_id: bytes(row, "key_id")?,
        anchor: Anchor {
            place: Place {
                epoch,
                position: row.try_get("anchor_position")?,
                mac: bytes(row, "anchor_mac")?,
            },
            sequence: row.try_get("anchor_sequence")?,
        },
        seal: bytes(row, "anchor_seal")?,
        end: Place {
            epoch,
            position: row.try_get("position")?,
            mac: bytes(row, "mac")?,
        },
    })
}

fn link(row: &SqliteRow) -> Result<Link, StoreError> {
    Ok(Link {
        sequence: row.try_get("sequence")?,
        columns: Columns {
            id: row.try_get("id")?,
            sandbox_id: row.try_get("sandbox_id")?,
            time: row.try_get("time")?,
            verdict: row.try_get("verdict")?,
            host: row.try_get("host")?,
            alert: row.try_get("alert")?,
        },
        document: row.try_get("document")?,
        place: place(row)?,
    })
}

/// Where a row says that it stands in its chain.
fn place(row: &SqliteRow) -> Result<Option<Place>, StoreError> {
    let (epoch, position): (Option<i64>, Option<i64>) = (row.try_get("epoch")?, row.try_get("position")?);
    let mac: Option<Vec<u8>> = row.try_get("mac")?;
    Ok(epoch.zip(position).map(|(epoch, position)| Place {
        epoch,
        position,
        // One of another length is a wrong one, and nothing else.
        mac: mac.and_then(|mac| Mac::try_from(mac).ok()).unwrap_or_default(),
    }))
}

/// As for links: bytes of another length are wrong ones.
fn bytes<const N: usize>(row: &SqliteRow, column: &str) -> Result<[u8; N], StoreError> {
    let bytes: Vec<u8> = row.try_get(column)?;
    Ok(<[u8; N]>::try_from(bytes).unwrap_or([0; N]))
}
