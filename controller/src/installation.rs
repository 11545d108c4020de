//! The installation's key: one secret file from which others are derived, so that none of them is stored.

use std::{
    fs,
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

use sandgate_api::id::SandboxId;
use sha2::{Digest as _, Sha256};

const LENGTH: usize = 32;

/// SHA-256's block, in bytes (RFC 2104 pads a key to it).
const BLOCK: usize = 64;

/// 256 random bits, made once per data directory.
#[derive(Clone)]
pub struct InstallationKey([u8; LENGTH]);

/// The key cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file cannot be read or made.
    #[error("the installation key {path}")]
    File {
        /// Where it should be.
        path: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The file is something else.
    #[error("{path} does not hold an installation key of {LENGTH} bytes")]
    Length {
        /// Where it is.
        path: String,
    },
    /// No random numbers.
    #[error("the system has no random numbers: {0}")]
    Random(getrandom::Error),
}

impl InstallationKey {
    /// Reads the key, making it if there is none. The file is never seen half written.
    ///
    /// # Errors
    /// When the file cannot be used; an existing one is never replaced.
    pub fn open(path: &Path) -> Result<Self, KeyError> {
        let failed = |source| KeyError::File {
            path: path.display().to_string(),
            source,
        };
        match fs::read(path) {
            Ok(bytes) => Self::from_bytes(&bytes, path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let mut key = [0; LENGTH];
                getrandom::fill(&mut key).map_err(KeyError::Random)?;
                let fresh = path.with_extension("new");
                let mut options = fs::OpenOptions::new();
                let mut file = options
                    .write(true)
                    .create(true)
                    .truncate(true)
                    .mode(0o600)
                    .open(&fresh)
                    .map_err(failed)?;
                file.write_all(&key)
                    .and_then(|()| file.sync_all())
                    .map_err(failed)?;
                // A link, and not a rename: it fails when somebody else made a key meanwhile.
                let linked = fs::hard_link(&fresh, path);
                fs::remove_file(&fresh).map_err(failed)?;
                match linked {
                    Ok(()) => Ok(Self(key)),
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Self::open(path),
                    Err(error) => Err(failed(error)),
                }
            }
            Err(error) => Err(failed(error)),
        }
    }

    fn from_bytes(bytes: &[u8], path: &Path) -> Result<Self, KeyError> {
        match <[u8; LENGTH]>::try_from(bytes) {
            Ok(key) => Ok(Self(key)),
            Err(_length) => Err(KeyError::Length {
                path: path.display().to_string(),
            }),
        }
    }

    /// The key with which the controller proves itself to a sandbox's agent: 64 hexadecimal digits.
    pub fn agent_key(&self, id: &SandboxId) -> String {
        hex::encode(self.derive(&format!("sandgate agent key 1 {id}")))
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
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn the_key_is_made_once_and_only_its_owner_reads_it() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("installation.key");
        let id = SandboxId::random();
        let first = InstallationKey::open(&path).expect("made").agent_key(&id);
        assert_eq!(InstallationKey::open(&path).expect("read").agent_key(&id), first);
        assert_eq!(
            fs::metadata(&path).expect("metadata").permissions().mode() & 0o777,
            0o600
        );
        assert_eq!(fs::read_dir(directory.path()).expect("listing").count(), 1);
    }

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

    #[test]
    fn a_damaged_file_is_refused_and_left_alone() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("installation.key");
        fs::write(&path, b"short").expect("written");
        assert!(matches!(
            InstallationKey::open(&path),
            Err(KeyError::Length { .. })
        ));
        assert_eq!(fs::read(&path).expect("read"), b"short");
    }
}
