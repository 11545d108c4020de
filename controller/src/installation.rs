//! The installation's key: one secret file from which others are derived, so that none of them is stored.

use std::path::Path;

use aws_lc_rs::hkdf;
use sandgate_api::id::SandboxId;
use sha2::{Digest as _, Sha256};

use crate::keyfile::{self, KeyError, LENGTH};

/// SHA-256's block, in bytes (RFC 2104 pads a key to it).
const BLOCK: usize = 64;

/// 256 random bits, made once per data directory.
#[derive(Clone)]
pub struct InstallationKey([u8; LENGTH]);

impl InstallationKey {
    /// Reads the key, making it if there is none.
    ///
    /// # Errors
    /// When the file cannot be used; an existing one is never replaced.
    pub fn open(path: &Path) -> Result<Self, KeyError> {
        keyfile::open(path).map(Self)
    }

    /// The key with which the controller proves itself to a sandbox's agent: 64 hexadecimal digits.
    pub fn agent_key(&self, id: &SandboxId) -> String {
        hex::encode(self.derive(&format!("sandgate agent key 1 {id}")))
    }

    #[cfg(test)]
    pub(crate) fn from_key(key: [u8; LENGTH]) -> Self {
        Self(key)
    }

    /// HKDF-SHA-256 (RFC 5869) with a label that names purpose and owner.
    pub(crate) fn expand(&self, label: &str) -> [u8; 32] {
        let mut derived = [0; 32];
        let extracted = hkdf::Salt::new(hkdf::HKDF_SHA256, b"sandgate installation 1").extract(&self.0);
        extracted
            .expand(&[label.as_bytes()], hkdf::HKDF_SHA256)
            .and_then(|expanded| expanded.fill(&mut derived))
            .expect("one block of the hash is never too long to ask for");
        derived
    }

    /// HMAC-SHA-256 (RFC 2104) of a label that names purpose and owner.
    fn derive(&self, label: &str) -> [u8; 32] {
        let mut inner = [0x36; BLOCK];
        let mut outer = [0x5c; BLOCK];
        for (index, byte) in self.0.iter().enumerate() {
            inner[index] ^= byte;
            outer[index] ^= byte;
        }
        let digest = Sha256::new().chain_update(inner).chain_update(label).finalize();
        Sha256::new()
            .chain_update(outer)
            .chain_update(digest)
            .finalize()
            .into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sandbox_and_every_installation_has_its_own_agent_key() {
        let (one, other) = (InstallationKey([1; LENGTH]), InstallationKey([2; LENGTH]));
        let (left, right) = (SandboxId::random(), SandboxId::random());
        assert_eq!(one.agent_key(&left).len(), 64);
        assert_ne!(one.agent_key(&left), one.agent_key(&right));
        assert_ne!(one.agent_key(&left), other.agent_key(&left));
    }

    #[test]
    fn derivation_is_the_hmac_of_rfc_4231() {
        // Test case 2 of RFC 4231 has a 4-byte key; padded with zeroes to 32 bytes it is the same key.
        let mut key = [0; LENGTH];
        key[..4].copy_from_slice(b"Jefe");
        assert_eq!(
            hex::encode(InstallationKey(key).derive("what do ya want for nothing?")),
            "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
        );
    }
}
