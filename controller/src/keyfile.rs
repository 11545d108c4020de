//! Files that hold one key of 256 random bits.

use std::{
    fs,
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

/// Bytes of a key.
pub const LENGTH: usize = 32;

/// A key cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file cannot be read or made.
    #[error("the key file {path}")]
    File {
        /// Where it should be.
        path: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The file is something else.
    #[error("{path} does not hold a key of {LENGTH} bytes")]
    Length {
        /// Where it is.
        path: String,
    },
    /// No random numbers.
    #[error("the system has no random numbers: {0}")]
    Random(getrandom::Error),
}

/// Reads a key, making it if there is none. The file is never seen half written.
///
/// # Errors
/// When the file cannot be used; an existing one is never replaced.
pub fn open(path: &Path) -> Result<[u8; LENGTH], KeyError> {
    let failed = |source| KeyError::File {
        path: path.display().to_string(),
        source,
    };
    match fs::read(path) {
        Ok(bytes) => <[u8; LENGTH]>::try_from(bytes).map_err(|_length| KeyError::Length {
            path: path.display().to_string(),
        }),
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
                Ok(()) => Ok(key),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => open(path),
                Err(error) => Err(failed(error)),
            }
        }
        Err(error) => Err(failed(error)),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_key_is_made_once_and_only_its_owner_reads_it() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("installation.key");
        let first = open(&path).expect("made");
        assert_eq!(open(&path).expect("read"), first);
        assert_ne!(first, [0; LENGTH]);
        assert_eq!(
            fs::metadata(&path).expect("metadata").permissions().mode() & 0o777,
            0o600
        );
        assert_eq!(fs::read_dir(directory.path()).expect("listing").count(), 1);
    }

    #[test]
    fn a_damaged_file_is_refused_and_left_alone() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("installation.key");
        fs::write(&path, b"short").expect("written");
        assert!(matches!(open(&path), Err(KeyError::Length { .. })));
        assert_eq!(fs::read(&path).expect("read"), b"short");
    }
}
