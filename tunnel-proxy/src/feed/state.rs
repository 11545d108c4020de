//! The last routes, on disk: written in one step, read at start, so that a tunnel-proxy that comes back before its
//! controller does serves what it served before. Of a token the file holds the digest.

use std::{
    fs, io,
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use sandgate_api::{feed::Revision, tunnel::Route};
use serde::{Deserialize, Serialize};

/// The state file.
#[derive(Debug, Clone)]
pub struct StateFile {
    path: PathBuf,
}

/// What is in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// Up to where the feed was followed.
    pub revision: Revision,
    /// Every route.
    pub routes: Vec<Route>,
}

impl StateFile {
    /// The file at `path`, which need not exist.
    pub fn at(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
        }
    }

    /// The routes as they were last saved; nothing when they never were, or cannot be read any more.
    ///
    /// # Errors
    /// When the file exists and cannot be opened.
    pub fn load(&self) -> io::Result<Option<Saved>> {
        let bytes = match fs::read(&self.path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        match serde_json::from_slice(&bytes) {
            Ok(saved) => Ok(Some(saved)),
            Err(error) => {
                // The controller's snapshot replaces it.
                tracing::warn!(%error, path = %self.path.display(), "the saved routes cannot be read, ignoring them");
                Ok(None)
            }
        }
    }

    /// Replaces the saved routes. They are not brought to the disk at once: after a crash of the machine the
    /// controller sends them anew.
    ///
    /// # Errors
    /// When they cannot be written; the earlier ones are still whole then.
    pub fn save(&self, saved: &Saved) -> io::Result<()> {
        let beside = self.path.with_extension("new");
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&beside)?;
        file.write_all(&serde_json::to_vec(saved)?)?;
        fs::rename(&beside, &self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_saved_is_loaded_and_what_is_torn_is_ignored() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("routes.json");
        let file = StateFile::at(&path);
        assert_eq!(file.load().expect("read"), None);
        let saved = Saved {
            revision: 3,
            routes: Vec::new(),
        };
        file.save(&saved).expect("saved");
        assert_eq!(file.load().expect("read"), Some(saved));
        fs::write(&path, b"{\"revision\":3,\"rou").expect("written");
        assert_eq!(file.load().expect("read"), None);
    }
}
