//! The sandbox's key: read once, and from then on known only by its digest.
//!
//! Code inside runs under the same uid. Should it ever read this process's memory, it finds a SHA-256 digest,
//! from which the key does not follow.

use std::{hint::black_box, io, os::fd::AsFd};

use nix::{errno::Errno, unistd::read};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

/// Length of a key in hexadecimal digits.
const KEY_LENGTH: usize = 64;

/// What a caller's key is compared with.
#[derive(Clone)]
pub struct Key {
    digest: [u8; 32],
}

impl Key {
    /// Reads the 64 hexadecimal digits and wipes them.
    ///
    /// Reads the descriptor itself: the standard library's standard input has a buffer, and would keep them.
    ///
    /// # Errors
    /// When fewer come, or something else.
    pub fn take(source: impl AsFd) -> io::Result<Self> {
        let mut text = [0_u8; KEY_LENGTH];
        let read = fill(source, &mut text);
        let hexadecimal = text.iter().all(u8::is_ascii_hexdigit);
        let digest = Sha256::digest(text).into();
        wipe(&mut text);
        read?;
        if !hexadecimal {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "not 64 hexadecimal digits",
            ));
        }
        Ok(Self { digest })
    }

    /// Whether `candidate` is the key. Takes the same time for every wrong one. Wipes it.
    pub fn matches(&self, candidate: String) -> bool {
        let mut candidate = candidate.into_bytes();
        let digest: [u8; 32] = Sha256::digest(&candidate).into();
        wipe(&mut candidate);
        digest.ct_eq(&self.digest).into()
    }
}

fn fill(source: impl AsFd, bytes: &mut [u8]) -> io::Result<()> {
    let mut filled = 0;
    while filled < bytes.len() {
        match read(source.as_fd(), &mut bytes[filled..]) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => filled += count,
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Overwrites bytes that must not stay in memory.
pub(crate) fn wipe(bytes: &mut [u8]) {
    bytes.fill(0);
    // Keeps the compiler from leaving out writes that nobody reads.
    black_box(bytes);
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Write as _};

    use super::*;

    const TEXT: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

    fn take(text: &str) -> io::Result<Key> {
        let mut file = tempfile::NamedTempFile::new()?;
        file.write_all(text.as_bytes())?;
        Key::take(File::open(file.path())?)
    }

    #[test]
    fn only_the_key_matches() {
        let key = take(TEXT).unwrap();
        assert!(key.matches(TEXT.to_owned()));
        for wrong in [
            String::new(),
            TEXT[1..].to_owned(),
            TEXT.to_uppercase(),
            format!("{TEXT}0"),
        ] {
            assert!(!key.matches(wrong.clone()), "{wrong} was taken for the key");
        }
    }

    #[test]
    fn a_short_or_foreign_text_is_no_key() {
        assert!(take(&TEXT[1..]).is_err());
        assert!(take(&TEXT.replace('0', "g")).is_err());
    }
}
