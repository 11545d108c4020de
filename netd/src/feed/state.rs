//! The last state that the controller wanted, on disk: written in one step, read at start, so that a netd
//! that comes back before its controller does enforces what it enforced before.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::node::Desired;

/// The state file.
#[derive(Debug, Clone)]
pub struct StateFile {
    path: PathBuf,
}

impl StateFile {
    /// The file at `path`, which need not exist.
    pub fn at(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
        }
    }

    /// The state as it was last saved; nothing when it never was, or cannot be read any more.
    ///
    /// # Errors
    /// When the file exists and cannot be opened.
    pub fn load(&self) -> io::Result<Option<Desired>> {
        let bytes = match fs::read(&self.path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        match serde_json::from_slice(&bytes) {
            Ok(state) => Ok(Some(state)),
            Err(error) => {
                // What is in the kernel stays in force; the controller's next snapshot replaces it.
                tracing::warn!(%error, path = %self.path.display(), "the saved state cannot be read, ignoring it");
                Ok(None)
            }
        }
    }

    /// Replaces the saved state.
    ///
    /// # Errors
    /// When it cannot be written. There is none then: an earlier one could allow what is forbidden since.
    pub fn save(&self, state: &Desired) -> io::Result<()> {
        let beside = self.path.with_extension("new");
        let saved = self.write(&beside, state);
        if saved.is_err() {
            for stale in [&self.path, &beside] {
                match fs::remove_file(stale) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        tracing::error!(%error, path = %stale.display(), "cannot remove a state that is out of date");
                    }
                    Ok(()) | Err(_) => {}
                }
            }
        }
        saved
    }

    fn write(&self, beside: &Path, state: &Desired) -> io::Result<()> {
        // Not forced to the disk, which a change of policy would wait for: what it describes is in the kernel, and
        // after a crash of the machine there is nothing of that. A crash of netd alone finds one file or the other.
        fs::write(beside, serde_json::to_vec(state)?)?;
        fs::rename(beside, &self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_saved_is_loaded_and_what_is_torn_is_ignored() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("state.json");
        let file = StateFile::at(&path);
        assert_eq!(file.load().expect("read"), None);
        let state = Desired {
            revision: Some(3),
            ..Desired::default()
        };
        file.save(&state).expect("saved");
        assert_eq!(file.load().expect("read"), Some(state));
        fs::write(&path, b"{\"revision\":3,\"sandb").expect("written");
        assert_eq!(file.load().expect("read"), None);
    }

    #[test]
    fn a_state_that_cannot_be_saved_leaves_no_earlier_one() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("state.json");
        let file = StateFile::at(&path);
        file.save(&Desired::default()).expect("saved");
        // Nothing can be written where a folder is.
        fs::create_dir(directory.path().join("state.new")).expect("made");
        file.save(&Desired::default()).expect_err("refused");
        assert_eq!(file.load().expect("read"), None);
    }
}
