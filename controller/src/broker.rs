//! What a node gets on demand: values of bound secrets, and authorities' keys. The only place outside of
//! commands' environments where a value leaves the vault.

use std::sync::Arc;

use sandgate_api::{
    credential::{CaLease, CaRequest, CredentialLease, CredentialRequest, LEASE_SECONDS},
    id::SandboxId,
};

use crate::{
    authority::{Authority, AuthorityError},
    chain::ChainKey,
    installation::InstallationKey,
    store::{Store, StoreError},
    vault::{Vault, VaultError},
};

/// Gives leases. Clones share it.
#[derive(Clone)]
pub struct Broker {
    store: Store,
    vault: Arc<Vault>,
    installation: InstallationKey,
    chain: ChainKey,
}

/// No lease can be given at the moment. Holds nothing of any value.
#[derive(Debug, thiserror::Error)]
pub enum BrokerError {
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The value does not open.
    #[error(transparent)]
    Vault(#[from] VaultError),
    /// The authority cannot be derived.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
}

impl Broker {
    /// Puts it together.
    pub fn new(store: Store, vault: Arc<Vault>, installation: InstallationKey) -> Self {
        Self {
            store,
            vault,
            chain: ChainKey::new(&installation),
            installation,
        }
    }

    /// What binds the node's audit records to each other.
    pub fn chain(&self) -> &ChainKey {
        &self.chain
    }

    /// A lease on the value of a secret that is bound and given to the sandbox; none otherwise.
    ///
    /// # Errors
    /// When the database fails or the value does not open.
    pub async fn credential(
        &self,
        request: &CredentialRequest,
    ) -> Result<Option<CredentialLease>, BrokerError> {
        let CredentialRequest { sandbox_id, secret } = request;
        let Some(record) = self.store.bound_secret(sandbox_id, secret).await? else {
            return Ok(None);
        };
        tracing::debug!(target: "audit", %sandbox_id, secret, version = record.version, "value leased to the node");
        Ok(Some(CredentialLease {
            value: self.vault.unseal(&record.org_id, &record.name, &record.sealed)?,
            version: record.version,
            lease_seconds: LEASE_SECONDS,
        }))
    }

    /// The certificate authority of a sandbox that is on the feed; none otherwise.
    ///
    /// # Errors
    /// When the database fails or the key cannot be derived.
    pub async fn authority(&self, request: &CaRequest) -> Result<Option<CaLease>, BrokerError> {
        let id: &SandboxId = &request.sandbox_id;
        let Some(record) = self.store.sandbox_on_feed(id).await? else {
            return Ok(None);
        };
        let Some(stored) = record.authority else {
            return Ok(None);
        };
        let authority = Authority::derive(&self.installation, id, stored.generation, record.created_at)?;
        Ok(Some(CaLease {
            certificate_pem: stored.certificate,
            key_pem: authority.key(),
            generation: stored.generation,
        }))
    }
}
