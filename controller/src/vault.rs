//! Encryption of secrets at rest: each value under a key of its own, that key under the installation's
//! key-encryption key, both AES-256-GCM with associated data that names purpose, owner and secret.
//!
//! The key-encryption key is in no database: it comes from a file, from the environment, or from a file that
//! is made in the data directory. A value opens only in the place for which it was sealed, so that a row
//! copied to another organisation or name is worthless.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
};

use aws_lc_rs::{
    aead::{AES_256_GCM, Aad, NONCE_LEN, Nonce, RandomizedNonceKey},
    hkdf,
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use sandgate_api::{credential::Sensitive, id::OrgId};
use zeroize::Zeroizing;

use crate::keyfile::{self, KeyError, LENGTH};

/// The environment variable that may hold the key-encryption key: 64 hexadecimal digits, or base64.
pub const KEY_VARIABLE: &str = "SANDGATE_KEY";

/// The environment variable that may name its file.
pub const KEY_FILE_VARIABLE: &str = "SANDGATE_KEY_FILE";

/// Name of the file in the data directory that is made when neither is set.
pub const KEY_FILE: &str = "secrets.key";

/// Longest key file that is read, in bytes.
const LONGEST_FILE: u64 = 4096;

/// What the two keys of a secret are for; part of the associated data.
#[derive(Debug, Clone, Copy)]
enum Purpose {
    Key,
    Value,
}

/// A sealed value, as stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sealed {
    /// Which key-encryption key it needs.
    pub key_id: [u8; KEY_ID],
    /// The value's own key, sealed: nonce, ciphertext, tag.
    pub wrapped_key: Vec<u8>,
    /// The value, sealed: nonce, ciphertext, tag.
    pub ciphertext: Vec<u8>,
}

/// Bytes that tell key-encryption keys apart.
pub const KEY_ID: usize = 8;

/// Seals and opens.
pub struct Vault {
    key: RandomizedNonceKey,
    id: [u8; KEY_ID],
}

/// The key-encryption key cannot be used, or a value does not open.
#[derive(Debug, thiserror::Error)]
pub enum VaultError {
    /// The default file cannot be used.
    #[error(transparent)]
    File(#[from] KeyError),
    /// The configured file cannot be read.
    #[error("{KEY_FILE_VARIABLE}: {path} cannot be read: {why}")]
    Unreadable {
        /// Where it should be.
        path: String,
        /// Why not.
        why: String,
    },
    /// Neither form of a key.
    #[error("{0}: expected a key of {LENGTH} bytes as 64 hexadecimal digits or as base64")]
    Malformed(&'static str),
    /// Both places name a key.
    #[error("{KEY_VARIABLE} and {KEY_FILE_VARIABLE} are both set; use one")]
    Ambiguous,
    /// Another key, another owner, another name, or damage.
    #[error("a stored secret cannot be opened: it was sealed with another key or for another place")]
    NotOpened,
    /// The library refuses.
    #[error("encryption failed")]
    NotSealed,
}

impl fmt::Debug for Vault {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Vault")
            .field("id", &hex::encode(self.id))
            .finish()
    }
}

impl Vault {
    /// Takes the key-encryption key from `file`, or from `text` (of [`KEY_VARIABLE`]), or else from a file in
    /// the data directory that is made when there is none.
    ///
    /// # Errors
    /// When there is no usable key.
    pub fn open(file: Option<&Path>, text: Option<String>, data_dir: &Path) -> Result<Self, VaultError> {
        let text = text.map(Zeroizing::new).filter(|text| !text.is_empty());
        match (file, text) {
            (Some(_), Some(_)) => Err(VaultError::Ambiguous),
            (Some(file), None) => Self::new(&*read(file)?),
            (None, Some(text)) => Self::new(&*parse(text.trim()).ok_or(VaultError::Malformed(KEY_VARIABLE))?),
            (None, None) => Self::new(&Zeroizing::new(keyfile::open(&data_dir.join(KEY_FILE))?)),
        }
    }

    /// Uses this key.
    ///
    /// # Errors
    /// When the library refuses.
    pub fn new(key: &[u8; LENGTH]) -> Result<Self, VaultError> {
        let mut id = [0; LENGTH];
        hkdf::Salt::new(hkdf::HKDF_SHA256, b"sandgate key id 1")
            .extract(key)
            .expand(&[b"id"], hkdf::HKDF_SHA256)
            .and_then(|expanded| expanded.fill(&mut id))
            .map_err(|_unspecified| VaultError::NotSealed)?;
        let mut short = [0; KEY_ID];
        short.copy_from_slice(&id[..KEY_ID]);
        Ok(Self {
            key: RandomizedNonceKey::new(&AES_256_GCM, key).map_err(|_unspecified| VaultError::NotSealed)?,
            id: short,
        })
    }

    /// Tells this key-encryption key from others, and says nothing else about it.
    pub fn key_id(&self) -> [u8; KEY_ID] {
        self.id
    }

    /// Seals a value for its place.
    ///
    /// # Errors
    /// When the library refuses, or has no random numbers.
    pub fn seal(&self, org_id: &OrgId, name: &str, value: &Sensitive) -> Result<Sealed, VaultError> {
        let mut own = Zeroizing::new([0; LENGTH]);
        getrandom::fill(&mut *own).map_err(|_none| VaultError::NotSealed)?;
        let own_key =
            RandomizedNonceKey::new(&AES_256_GCM, &*own).map_err(|_unspecified| VaultError::NotSealed)?;
        let wrapped_key = seal(&self.key, &place(Purpose::Key, org_id, name), &*own)?;
        let ciphertext = seal(
            &own_key,
            &place(Purpose::Value, org_id, name),
            value.expose().as_bytes(),
        )?;
        Ok(Sealed {
            key_id: self.id,
            wrapped_key,
            ciphertext,
        })
    }

    /// Opens a value that was sealed for this place.
    ///
    /// # Errors
    /// [`VaultError::NotOpened`].
    pub fn unseal(&self, org_id: &OrgId, name: &str, sealed: &Sealed) -> Result<Sensitive, VaultError> {
        let own = open(&self.key, &place(Purpose::Key, org_id, name), &sealed.wrapped_key)?;
        let own = RandomizedNonceKey::new(&AES_256_GCM, &own).map_err(|_length| VaultError::NotOpened)?;
        let value = open(&own, &place(Purpose::Value, org_id, name), &sealed.ciphertext)?;
        let text = std::str::from_utf8(&value).map_err(|_not_text| VaultError::NotOpened)?;
        Ok(Sensitive::new(text.to_owned()))
    }
}

/// Associated data. None of the parts can contain the NUL between them.
fn place(purpose: Purpose, org_id: &OrgId, name: &str) -> Vec<u8> {
    let purpose = match purpose {
        Purpose::Key => "key",
        Purpose::Value => "value",
    };
    format!("sandgate secret 1\0{purpose}\0{org_id}\0{name}").into_bytes()
}

fn seal(key: &RandomizedNonceKey, place: &[u8], plain: &[u8]) -> Result<Vec<u8>, VaultError> {
    // Encrypted in place: room for the tag, so that no copy of the plain text is left behind by growing.
    let mut text = Vec::with_capacity(plain.len() + AES_256_GCM.tag_len());
    text.extend_from_slice(plain);
    let nonce = key
        .seal_in_place_append_tag(Aad::from(place), &mut text)
        .map_err(|_unspecified| VaultError::NotSealed)?;
    Ok([nonce.as_ref().as_slice(), &text].concat())
}

fn open(key: &RandomizedNonceKey, place: &[u8], sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, VaultError> {
    let (nonce, text) = sealed.split_at_checked(NONCE_LEN).ok_or(VaultError::NotOpened)?;
    let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_length| VaultError::NotOpened)?;
    let mut text = Zeroizing::new(text.to_vec());
    let length = key
        .open_in_place(nonce, Aad::from(place), &mut text)
        .map_err(|_unspecified| VaultError::NotOpened)?
        .len();
    text.truncate(length);
    Ok(text)
}

/// A configured file: the key itself, or its text.
fn read(file: &Path) -> Result<Zeroizing<[u8; LENGTH]>, VaultError> {
    let unreadable = |why: String| VaultError::Unreadable {
        path: PathBuf::from(file).display().to_string(),
        why,
    };
    let length = fs::metadata(file)
        .map_err(|error| unreadable(error.to_string()))?
        .len();
    if length > LONGEST_FILE {
        return Err(VaultError::Malformed(KEY_FILE_VARIABLE));
    }
    let bytes = Zeroizing::new(fs::read(file).map_err(|error| unreadable(error.to_string()))?);
    if let Ok(key) = <[u8; LENGTH]>::try_from(bytes.as_slice()) {
        return Ok(Zeroizing::new(key));
    }
    std::str::from_utf8(&bytes)
        .ok()
        .and_then(|text| parse(text.trim()))
        .ok_or(VaultError::Malformed(KEY_FILE_VARIABLE))
}

fn parse(text: &str) -> Option<Zeroizing<[u8; LENGTH]>> {
    let bytes = Zeroizing::new(hex::decode(text).or_else(|_not_hex| STANDARD.decode(text)).ok()?);
    <[u8; LENGTH]>::try_from(bytes.as_slice())
        .ok()
        .map(Zeroizing::new)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    const VALUE: &str = "sk-ant-canary-0123456789";

    fn vault(byte: u8) -> Vault {
        Vault::new(&[byte; LENGTH]).expect("a vault")
    }

    fn org(text: &str) -> OrgId {
        text.parse().expect("an id")
    }

    fn sealed() -> Sealed {
        let value = Sensitive::new(VALUE.to_owned());
        vault(1).seal(&org("org-a"), "KEY", &value).expect("sealed")
    }

    #[test]
    fn a_value_opens_in_its_place() {
        let opened = vault(1).unseal(&org("org-a"), "KEY", &sealed()).expect("opened");
        assert_eq!(opened.expose(), VALUE);
    }

    #[test]
    fn a_value_opens_with_no_other_key_and_in_no_other_place() {
        let sealed = sealed();
        for (vault, org_id, name) in [
            (vault(2), "org-a", "KEY"),
            (vault(1), "org-b", "KEY"),
            (vault(1), "org-a", "OTHER"),
            (vault(1), "org-ak", "EY"),
        ] {
            assert!(
                matches!(
                    vault.unseal(&org(org_id), name, &sealed),
                    Err(VaultError::NotOpened)
                ),
                "{org_id} {name}"
            );
        }
        assert_ne!(vault(1).key_id(), vault(2).key_id());
        assert_eq!(vault(1).key_id(), sealed.key_id);
    }

    #[test]
    fn a_changed_bit_is_noticed_anywhere() {
        let sealed = sealed();
        for index in 0..sealed.ciphertext.len() {
            let mut changed = sealed.clone();
            changed.ciphertext[index] ^= 1;
            assert!(
                vault(1).unseal(&org("org-a"), "KEY", &changed).is_err(),
                "{index}"
            );
        }
        for index in 0..sealed.wrapped_key.len() {
            let mut changed = sealed.clone();
            changed.wrapped_key[index] ^= 1;
            assert!(
                vault(1).unseal(&org("org-a"), "KEY", &changed).is_err(),
                "{index}"
            );
        }
        for length in [0, 5, NONCE_LEN, NONCE_LEN + 3] {
            let mut cut = sealed.clone();
            cut.ciphertext.truncate(length);
            assert!(vault(1).unseal(&org("org-a"), "KEY", &cut).is_err(), "{length}");
        }
        // The two parts are sealed for different purposes, so they cannot stand for each other.
        let swapped = Sealed {
            key_id: sealed.key_id,
            wrapped_key: sealed.ciphertext.clone(),
            ciphertext: sealed.wrapped_key,
        };
        assert!(vault(1).unseal(&org("org-a"), "KEY", &swapped).is_err());
    }

    #[test]
    fn nothing_repeats_and_nothing_shows() {
        let (one, other) = (sealed(), sealed());
        assert_ne!(one.wrapped_key, other.wrapped_key);
        assert_ne!(one.ciphertext, other.ciphertext);
        let printed = format!("{one:?} {:?}", vault(1));
        assert!(!printed.contains("canary"));
        for part in [&one.wrapped_key, &one.ciphertext] {
            assert!(
                !part
                    .windows(8)
                    .any(|window| VALUE.as_bytes().windows(8).any(|own| own == window))
            );
        }
    }

    #[test]
    fn the_key_comes_from_a_file_or_the_environment_or_is_made() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("kek");
        let key = [7; LENGTH];
        let expected = Vault::new(&key).expect("a vault").key_id();
        for text in [hex::encode(key), STANDARD.encode(key)] {
            fs::write(&file, format!("{text}\n")).expect("written");
            let from_file = Vault::open(Some(&file), None, directory.path()).expect("a file");
            let from_text = Vault::open(None, Some(text.clone()), directory.path()).expect("a text");
            assert_eq!((from_file.key_id(), from_text.key_id()), (expected, expected));
        }
        fs::write(&file, key).expect("written");
        let raw = Vault::open(Some(&file), Some(String::new()), directory.path()).expect("raw bytes");
        assert_eq!(raw.key_id(), expected);
        let made = Vault::open(None, None, directory.path()).expect("made").key_id();
        assert_eq!(
            Vault::open(None, None, directory.path()).expect("read").key_id(),
            made
        );
        let mode = fs::metadata(directory.path().join(KEY_FILE))
            .expect("a file")
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_bad_key_is_refused_and_not_repeated() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("kek");
        fs::write(&file, "canary").expect("written");
        for (named, text) in [
            (Some(file.as_path()), None),
            (Some(Path::new("/nonexistent/kek")), None),
            (None, Some("canary".to_owned())),
            (None, Some("ab".repeat(31))),
            (Some(file.as_path()), Some("ab".repeat(32))),
        ] {
            let error = Vault::open(named, text, directory.path())
                .expect_err("refused")
                .to_string();
            assert!(!error.contains("canary") && !error.contains("abab"), "{error}");
        }
    }
}
