//! What makes the audit tamper-evident: every record of an organisation is bound to the one before it by an HMAC, the
//! place where the chain begins is sealed, and its end is signed now and then and kept apart from the database.
//! Pure: [`crate::store`] keeps the chain, [`crate::ledger`] the signed heads.
//!
//! The key is the node's, derived from the installation's; it is in no database. With the database alone nobody can
//! edit, remove, insert or reorder a record without [`Verifier`] finding it; without the heads, the newest records could
//! still be cut off together with what says how many there are.

use aws_lc_rs::hmac;
use jiff::Timestamp;
use sandgate_api::{
    audit::AuditEvent,
    id::OrgId,
    rest::{AuditProblem, AuditProblemKind},
};
use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq as _;

use crate::{installation::InstallationKey, node::LOCAL_NODE};

/// An HMAC-SHA-256.
pub type Mac = [u8; 32];
/// Tells keys apart.
pub type KeyId = [u8; 8];

/// The key of all chains of a node.
#[derive(Debug, Clone)]
pub struct ChainKey {
    links: hmac::Key,
    seals: hmac::Key,
    id: KeyId,
}

/// A place in an organisation's chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Which chain: another one begins when the key is another one.
    pub epoch: i64,
    /// How many records, from the chain's beginning.
    pub position: i64,
    /// Of the record there.
    pub mac: Mac,
}

/// Where a chain begins: after this record, which is forgotten, or which none is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Anchor {
    /// The record.
    pub place: Place,
    /// Its position in the table.
    pub sequence: i64,
}

/// What is known of an organisation's chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// Whose key it needs.
    pub key_id: KeyId,
    /// Where it begins.
    pub anchor: Anchor,
    /// Proof of that.
    pub seal: Mac,
    /// Where it ends.
    pub end: Place,
}

/// The end of a chain at some time, signed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// Whose.
    pub org_id: OrgId,
    /// As of [`Place`].
    pub epoch: i64,
    /// As of [`Place`].
    pub position: i64,
    /// As of [`Place`], hexadecimal.
    pub mac: String,
    /// When it was signed.
    pub time: Timestamp,
    /// The signature, hexadecimal.
    pub seal: String,
}

/// A row of the audit.
#[derive(Debug, Clone)]
pub struct Link {
    /// Its position in the table.
    pub sequence: i64,
    /// Columns that repeat what the document says.
    pub columns: Columns,
    /// What was recorded.
    pub document: String,
    /// As of [`Place`]; nothing in a row that was never chained.
    pub place: Option<Place>,
}

/// Columns that repeat what a record's document says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Columns {
    /// The record's id.
    pub id: String,
    /// Whose sandbox.
    pub sandbox_id: String,
    /// In milliseconds.
    pub time: i64,
    /// In its word.
    pub verdict: String,
    /// The name.
    pub host: Option<String>,
    /// Why somebody should look at it, in its word.
    pub alert: Option<String>,
}

impl Columns {
    /// As they should be.
    pub fn of(event: &AuditEvent) -> Self {
        Self {
            id: event.id.clone(),
            sandbox_id: event.sandbox_id.as_str().to_owned(),
            time: event.time.as_millisecond(),
            verdict: event.verdict.as_str().to_owned(),
            host: event.host.clone(),
            alert: event.alert.map(|alert| alert.as_str().to_owned()),
        }
    }
}

impl ChainKey {
    /// The key of this node.
    pub fn new(installation: &InstallationKey) -> Self {
        let key = |purpose: &str| installation.expand(&format!("sandgate audit 1 {purpose} {LOCAL_NODE}"));
        let hmac_key = |purpose| hmac::Key::new(hmac::HMAC_SHA256, &key(purpose));
        let mut id = KeyId::default();
        let length = id.len();
        id.copy_from_slice(&key("id")[..length]);
        Self {
            links: hmac_key("links"),
            seals: hmac_key("seals"),
            id,
        }
    }

    /// Tells this key from others.
    pub fn id(&self) -> KeyId {
        self.id
    }

    /// The beginning of a chain behind what the table holds of the organisation up to `sequence`; 0 where that is nothing.
    pub fn begin(&self, org_id: &OrgId, epoch: i64, sequence: i64) -> Chain {
        let mac = self.mac(&self.links, "beginning", org_id, &[epoch, 0], &[]);
        let place = Place {
            epoch,
            position: 0,
            mac,
        };
        let anchor = Anchor { place, sequence };
        Chain {
            key_id: self.id,
            anchor,
            seal: self.seal(org_id, &anchor),
            end: place,
        }
    }

    /// Binds a record to what is before it.
    pub fn next(&self, org_id: &OrgId, before: &Place, document: &str) -> Place {
        let position = before.position + 1;
        let parts = [before.mac.as_slice(), document.as_bytes()];
        Place {
            epoch: before.epoch,
            position,
            mac: self.mac(&self.links, "record", org_id, &[before.epoch, position], &parts),
        }
    }

    /// Proof of where a chain begins.
    pub fn seal(&self, org_id: &OrgId, anchor: &Anchor) -> Mac {
        let numbers = [anchor.place.epoch, anchor.place.position, anchor.sequence];
        self.mac(&self.seals, "anchor", org_id, &numbers, &[&anchor.place.mac])
    }

    /// Signs where a chain ends.
    pub fn sign(&self, org_id: &OrgId, end: &Place, time: Timestamp) -> Head {
        Head {
            org_id: org_id.clone(),
            epoch: end.epoch,
            position: end.position,
            mac: hex::encode(end.mac),
            time,
            seal: hex::encode(self.signature(org_id, end, time)),
        }
    }

    /// What a head says, if it is signed with this key.
    pub fn open(&self, head: &Head) -> Option<Place> {
        let mac = Mac::try_from(hex::decode(&head.mac).ok()?).ok()?;
        let end = Place {
            epoch: head.epoch,
            position: head.position,
            mac,
        };
        let expected = self.signature(&head.org_id, &end, head.time);
        same(&expected, &hex::decode(&head.seal).ok()?).then_some(end)
    }

    fn signature(&self, org_id: &OrgId, end: &Place, time: Timestamp) -> Mac {
        let numbers = [end.epoch, end.position, time.as_millisecond()];
        self.mac(&self.seals, "head", org_id, &numbers, &[&end.mac])
    }

    /// Nothing in it can be read in two ways: no purpose and no id contains a NUL, the numbers of a purpose are always
    /// as many, and so are all parts but the last.
    fn mac(&self, key: &hmac::Key, purpose: &str, org_id: &OrgId, numbers: &[i64], parts: &[&[u8]]) -> Mac {
        let mut context = hmac::Context::with_key(key);
        context.update(purpose.as_bytes());
        context.update(b"\0");
        context.update(org_id.as_str().as_bytes());
        context.update(b"\0");
        for number in numbers {
            context.update(&number.to_be_bytes());
        }
        for part in parts {
            context.update(part);
        }
        let mut mac = Mac::default();
        mac.copy_from_slice(context.sign().as_ref());
        mac
    }
}

fn same(one: &[u8], other: &[u8]) -> bool {
    one.ct_eq(other).into()
}

/// Looks at an organisation's records one by one, in the table's order, until one is wrong.
pub struct Verifier<'a> {
    key: &'a ChainKey,
    org_id: &'a OrgId,
    chain: Option<Chain>,
    /// The last record that is right.
    at: Option<Place>,
    /// The place that the signed head names.
    head: Option<Place>,
    /// Records that are right.
    pub records: u64,
    /// Records from before the chain.
    pub unchained: u64,
}

impl<'a> Verifier<'a> {
    /// Begins at the chain's anchor.
    ///
    /// # Errors
    /// When the anchor or the head is wrong already.
    pub fn new(
        key: &'a ChainKey,
        org_id: &'a OrgId,
        chain: Option<Chain>,
        head: Option<&Head>,
    ) -> Result<Self, AuditProblem> {
        let place = match head {
            Some(head) => match key.open(head) {
                Some(place) => Some(place),
                None => {
                    return Err(problem(
                        AuditProblemKind::Head,
                        None,
                        None,
                        "the signed head is not signed with this node's key",
                    ));
                }
            },
            None => None,
        };
        if let Some(chain) = &chain
            && (chain.key_id != key.id || !same(&key.seal(org_id, &chain.anchor), &chain.seal))
        {
            let message =
                "the place where the chain begins is not the one that was sealed with this node's key";
            return Err(problem(
                AuditProblemKind::Anchor,
                Some(chain.anchor.place.position),
                None,
                message,
            ));
        }
        if let Some(head) = place {
            let end = chain.as_ref().map(|chain| chain.end);
            if end.is_none_or(|end| end.epoch != head.epoch || end.position < head.position) {
                let message = format!(
                    "there were {} records when the head was signed, and now the chain ends before",
                    head.position
                );
                let missing = end
                    .filter(|end| end.epoch == head.epoch)
                    .map_or(1, |end| end.position + 1);
                return Err(problem(AuditProblemKind::Cut, Some(missing), None, message));
            }
        }
        Ok(Self {
            key,
            org_id,
            at: chain.as_ref().map(|chain| chain.anchor.place),
            chain,
            head: place,
            records: 0,
            unchained: 0,
        })
    }

    /// Looks at the next record.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn look(&mut self, link: &Link) -> Result<(), AuditProblem> {
        let id = || Some(link.columns.id.clone());
        let (Some(chain), Some(before)) = (&self.chain, &self.at) else {
            self.unchained += 1;
            return Ok(());
        };
        let expected = before.position + 1;
        if link.sequence <= chain.anchor.sequence {
            // Where nothing stood when the chain began, nothing can stand before it.
            if chain.anchor.place.position > 0 || chain.anchor.sequence == 0 {
                let message = "this record stands before the place where the chain begins";
                return Err(problem(AuditProblemKind::Inserted, None, id(), message));
            }
            self.unchained += 1;
            return Ok(());
        }
        let Some(place) = link.place.filter(|place| place.epoch == before.epoch) else {
            let message = "this record is not part of the chain";
            return Err(problem(AuditProblemKind::Inserted, Some(expected), id(), message));
        };
        if place.position != expected {
            // Whether the missing one stands elsewhere, the caller knows.
            let (kind, message) = if place.position > expected {
                (
                    AuditProblemKind::Removed,
                    "the record at this position is missing; this one comes after it",
                )
            } else {
                (AuditProblemKind::Reordered, "this record belongs further up")
            };
            return Err(problem(kind, Some(expected), id(), message));
        }
        let right = self.key.next(self.org_id, before, &link.document);
        if !same(&right.mac, &place.mac) {
            let message = "this record is not what was recorded at this position";
            return Err(problem(AuditProblemKind::Edited, Some(expected), id(), message));
        }
        let columns = serde_json::from_str(&link.document).map(|event: AuditEvent| Columns::of(&event));
        if columns.is_ok_and(|columns| columns != link.columns) {
            let message = "a column of this record does not say what was recorded";
            return Err(problem(AuditProblemKind::Edited, Some(expected), id(), message));
        }
        if let Some(head) = self.head.filter(|head| head.position == expected)
            && !same(&head.mac, &right.mac)
        {
            let message = "this record is not the one that the head was signed for";
            return Err(problem(AuditProblemKind::Head, Some(expected), id(), message));
        }
        self.at = Some(right);
        self.records += 1;
        Ok(())
    }

    /// There are no more.
    ///
    /// # Errors
    /// When there should be.
    pub fn end(&self) -> Result<(), AuditProblem> {
        let (Some(chain), Some(at)) = (&self.chain, &self.at) else {
            return Ok(());
        };
        let (there, end) = (at.position, chain.end.position);
        if there < end {
            let message = format!("the chain ends at position {end}, and no record stands there");
            return Err(problem(AuditProblemKind::Cut, Some(there + 1), None, message));
        }
        if there > end || !same(&at.mac, &chain.end.mac) {
            let message = "the end of the chain is not where it was left";
            return Err(problem(AuditProblemKind::Anchor, Some(end), None, message));
        }
        Ok(())
    }

    /// Where it begins and has come to.
    pub fn range(&self) -> Option<(Place, Place)> {
        Some((self.chain.as_ref()?.anchor.place, self.at?))
    }
}

fn problem(
    kind: AuditProblemKind,
    position: Option<i64>,
    event_id: Option<String>,
    message: impl Into<String>,
) -> AuditProblem {
    AuditProblem {
        kind,
        position,
        event_id,
        message: message.into(),
    }
}
