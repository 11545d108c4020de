//! The signed ends of the audit's chains, kept in a file beside the database and not in it: whoever cuts off the newest
//! records together with what the database says of their number contradicts the file. Signed every minute; a chain that
//! does not go on from its signed end is not signed again, so that the contradiction stays until somebody looks at it.

use std::{
    collections::BTreeMap,
    fs::{self, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use jiff::Timestamp;
use sandgate_api::{id::OrgId, rest::AuditVerification};

use crate::{
    chain::{Chain, ChainKey, Head, Place},
    installation::InstallationKey,
    places::Turns,
    store::{Store, StoreError},
};

/// Name of the file in the data directory.
const FILE: &str = "audit.heads";
/// Organisations whose records are read at once: each takes a connection to the database that others may want.
const VERIFYING: usize = 2;

/// What is needed to sign and to verify.
pub struct Ledger {
    store: Store,
    key: ChainKey,
    path: PathBuf,
    /// Reading all of an organisation's records.
    verifying: Turns,
}

/// The chains cannot be signed or verified.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The file of heads.
    #[error("{path}: {source}")]
    File {
        /// Where it is.
        path: String,
        /// What is wrong with it.
        source: io::Error,
    },
}

impl Ledger {
    /// Signs and verifies what is in the store.
    pub fn new(store: Store, installation: &InstallationKey, data_dir: &Path) -> Self {
        Self {
            store,
            key: ChainKey::new(installation),
            path: data_dir.join(FILE),
            verifying: Turns::new(VERIFYING),
        }
    }

    /// The key of the chains.
    pub fn key(&self) -> &ChainKey {
        &self.key
    }

    /// Looks at every record of an organisation.
    ///
    /// # Errors
    /// When the database or the file of heads cannot be read.
    pub async fn verify(&self, org_id: &OrgId) -> Result<AuditVerification, LedgerError> {
        let _turn = self.verifying.take(org_id).await;
        let heads = self.heads()?;
        Ok(self
            .store
            .verify_audit(&self.key, org_id, heads.get(org_id))
            .await?)
    }

    /// Organisations that have records, or should have.
    ///
    /// # Errors
    /// When the database or the file of heads cannot be read.
    pub async fn organizations(&self) -> Result<Vec<OrgId>, LedgerError> {
        let mut organizations = self.store.audited_organizations().await?;
        organizations.extend(self.heads()?.into_keys());
        organizations.sort_unstable();
        organizations.dedup();
        Ok(organizations)
    }

    /// Signs the ends of all chains that have grown.
    ///
    /// # Errors
    /// When the database or the file of heads cannot be read or written; then the heads are as they were.
    pub async fn sign(&self, now: Timestamp) -> Result<(), LedgerError> {
        let mut heads = self.heads()?;
        let mut any = false;
        for (org_id, chain) in self.store.audit_chains().await? {
            if chain.key_id != self.key.id() {
                continue;
            }
            if let Some(head) = heads.get(&org_id) {
                let signed = self.key.open(head);
                if signed == Some(chain.end) {
                    continue;
                }
                let goes_on = match signed {
                    Some(signed) => self.goes_on(&org_id, &chain, &signed).await?,
                    // Of another key; so is the chain before this one.
                    None => chain.end.epoch > head.epoch,
                };
                if !goes_on {
                    tracing::error!(
                        target: "audit", %org_id, signed = head.position, end = chain.end.position,
                        "the audit does not go on from its signed end: it was changed; verify it"
                    );
                    continue;
                }
            }
            let head = self.key.sign(&org_id, &chain.end, now);
            tracing::info!(
                target: "audit", %org_id, epoch = head.epoch, position = head.position, mac = head.mac,
                "the end of the audit is signed"
            );
            heads.insert(org_id, head);
            any = true;
        }
        match any {
            true => self.write(&heads).map_err(|source| self.failed(source)),
            false => Ok(()),
        }
    }

    /// Whether the record that was signed is where it was, as far as it is not forgotten.
    async fn goes_on(&self, org_id: &OrgId, chain: &Chain, signed: &Place) -> Result<bool, StoreError> {
        if signed.epoch != chain.end.epoch || signed.position > chain.end.position {
            return Ok(false);
        }
        if signed.position <= chain.anchor.place.position {
            return Ok(true);
        }
        Ok(self.store.audit_mac(org_id, signed).await? == Some(signed.mac))
    }

    fn heads(&self) -> Result<BTreeMap<OrgId, Head>, LedgerError> {
        let text = match fs::read_to_string(&self.path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
            Err(error) => return Err(self.failed(error)),
        };
        let heads = text.lines().map(serde_json::from_str::<Head>);
        heads
            .map(|head| head.map(|head| (head.org_id.clone(), head)))
            .collect::<Result<_, _>>()
            .map_err(|error| self.failed(error.into()))
    }

    /// In one step: there is always a whole file.
    fn write(&self, heads: &BTreeMap<OrgId, Head>) -> io::Result<()> {
        let mut text = Vec::new();
        for head in heads.values() {
            serde_json::to_writer(&mut text, head)?;
            text.push(b'\n');
        }
        let fresh = self.path.with_extension("new");
        let mut options = OpenOptions::new();
        let mut file = options
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&fresh)?;
        file.write_all(&text)?;
        file.sync_all()?;
        fs::rename(&fresh, &self.path)
    }

    fn failed(&self, source: io::Error) -> LedgerError {
        LedgerError::File {
            path: self.path.display().to_string(),
            source,
        }
    }
}

#[cfg(test)]
mod tests;
