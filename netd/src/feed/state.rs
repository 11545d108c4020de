//! The last state that the controller wanted, on disk, so that a netd that comes back before its controller does
//! enforces what it enforced before: a snapshot, and below it the deltas since, a line each, as they came. A change of
//! one sandbox thus costs its own length, however many others there are. Written anew, in one step, when the deltas have
//! become longer than the snapshot.

use std::{
    fs::{self, File},
    io::{self, BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
};

use sandgate_api::feed::FeedFrame;

use crate::node::Desired;

/// Deltas of fewer bytes are never too long.
const DELTAS_MIN: u64 = 1 << 20;

/// The state file.
#[derive(Debug)]
pub struct StateFile {
    path: PathBuf,
    /// Open for appending; none before the first snapshot, and after a failure.
    file: Option<File>,
    /// Bytes of the snapshot.
    snapshot: u64,
    /// Bytes of the deltas.
    deltas: u64,
}

impl StateFile {
    /// The file at `path`, which need not exist.
    pub fn at(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            file: None,
            snapshot: 0,
            deltas: 0,
        }
    }

    /// The state as it was last saved; nothing when it never was, or cannot be read any more.
    ///
    /// # Errors
    /// When the file exists and cannot be read.
    pub fn load(&self) -> io::Result<Option<Desired>> {
        let file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut state: Option<Desired> = None;
        let (mut file, mut line) = (BufReader::new(file), Vec::new());
        while file.read_until(b'\n', &mut line)? > 0 {
            match (serde_json::from_slice(&line), state.take()) {
                (Ok(snapshot @ FeedFrame::Snapshot { .. }), _) => {
                    state = Some(Desired::default().after(snapshot));
                }
                (Ok(delta), Some(before)) => state = Some(before.after(delta)),
                // What is in the kernel stays in force; the controller's next snapshot replaces it.
                (Ok(_), None) => {
                    tracing::warn!(path = %self.path.display(), "the saved state has no beginning, ignoring it");
                    return Ok(None);
                }
                // The last line, when netd was killed or the disk full while it was written: never acknowledged.
                (Err(error), before) => {
                    tracing::warn!(%error, path = %self.path.display(), "the saved state ends in an unreadable line");
                    return Ok(before);
                }
            }
            line.clear();
        }
        Ok(state)
    }

    /// Adds a delta, whose line is as it came, to what was saved before; `state` is the state after it. Any other frame,
    /// or one after a failure, replaces all.
    ///
    /// # Errors
    /// As [`Self::save`].
    pub fn add(&mut self, line: &[u8], is_delta: bool, state: &Desired) -> io::Result<()> {
        // Taken out, so that a failure leaves no half line to write behind.
        let Some(mut file) = self.file.take().filter(|_| is_delta) else {
            return self.save(state);
        };
        let line = line.trim_ascii_end();
        if let Err(error) = file.write_all(&[line, b"\n"].concat()) {
            tracing::warn!(%error, path = %self.path.display(), "cannot add to the saved state; it is written anew");
            return self.save(state);
        }
        self.file = Some(file);
        self.deltas += u64::try_from(line.len()).unwrap_or(u64::MAX) + 1;
        Ok(())
    }

    /// Whether it has become worth writing it anew. Not part of a change, which would have to wait for it.
    pub fn is_long(&self) -> bool {
        self.file.is_some() && self.deltas > self.snapshot.max(DELTAS_MIN)
    }

    /// Replaces the saved state.
    ///
    /// # Errors
    /// When it cannot be written. There is none then: an earlier one could allow what is forbidden since.
    pub fn save(&mut self, state: &Desired) -> io::Result<()> {
        self.file = None;
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

    fn write(&mut self, beside: &Path, state: &Desired) -> io::Result<()> {
        let Some(snapshot) = state.snapshot() else {
            return Ok(());
        };
        let mut bytes = serde_json::to_vec(&snapshot)?;
        bytes.push(b'\n');
        // Not forced to the disk, which a change of policy would wait for: what it describes is in the kernel, and
        // after a crash of the machine there is nothing of that. A crash of netd alone finds one file or the other.
        fs::write(beside, &bytes)?;
        let file = File::options().append(true).open(beside)?;
        fs::rename(beside, &self.path)?;
        self.file = Some(file);
        (self.snapshot, self.deltas) = (u64::try_from(bytes.len()).unwrap_or(u64::MAX), 0);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(revision: u64) -> Desired {
        Desired {
            revision: Some(revision),
            ..Desired::default()
        }
    }

    fn delta(revision: u64) -> Vec<u8> {
        let delta = FeedFrame::Delta {
            since: None,
            revision,
            upserts: Vec::new(),
            removed: Vec::new(),
        };
        serde_json::to_vec(&delta).expect("written")
    }

    #[test]
    fn what_is_saved_is_loaded_and_what_is_torn_is_ignored() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("state.json");
        let mut file = StateFile::at(&path);
        assert_eq!(file.load().expect("read"), None);
        // A delta with nothing before it is saved as the whole state.
        file.add(&delta(3), true, &state(3)).expect("saved");
        assert_eq!(file.load().expect("read"), Some(state(3)));
        for revision in [4, 5] {
            file.add(&delta(revision), true, &state(revision)).expect("saved");
        }
        assert_eq!(StateFile::at(&path).load().expect("read"), Some(state(5)));
        let mut torn = fs::read(&path).expect("read");
        torn.extend_from_slice(b"{\"delta\":{\"revision\":6,\"ups");
        fs::write(&path, torn).expect("written");
        assert_eq!(file.load().expect("read"), Some(state(5)));
        fs::write(&path, b"{\"revision\":3,\"sandb").expect("written");
        assert_eq!(file.load().expect("read"), None);
        fs::write(&path, delta(7)).expect("written");
        assert_eq!(file.load().expect("read"), None);
    }

    #[test]
    fn deltas_that_have_become_long_are_folded_into_the_snapshot() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("state.json");
        let mut file = StateFile::at(&path);
        file.save(&state(1)).expect("saved");
        let size = || fs::metadata(&path).expect("there").len();
        let first = size();
        let mut revision = 1;
        while !file.is_long() {
            revision += 1;
            // Blanks are as good as sandboxes.
            let line = [vec![b' '; 100_000], delta(revision), b"\n".to_vec()].concat();
            file.add(&line, true, &state(revision)).expect("saved");
        }
        assert!(size() > DELTAS_MIN);
        assert_eq!(file.load().expect("read"), Some(state(revision)));
        file.save(&state(revision)).expect("saved");
        assert!(size() <= first + 1, "{} bytes", size());
        assert_eq!(file.load().expect("read"), Some(state(revision)));
    }

    #[test]
    fn a_state_that_cannot_be_saved_leaves_no_earlier_one() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("state.json");
        let mut file = StateFile::at(&path);
        file.save(&state(1)).expect("saved");
        // Nothing can be written where a folder is.
        fs::create_dir(directory.path().join("state.new")).expect("made");
        file.save(&state(2)).expect_err("refused");
        assert_eq!(file.load().expect("read"), None);
        assert!(!file.is_long());
        file.add(&delta(3), true, &state(3)).expect_err("refused");
        fs::remove_dir(directory.path().join("state.new")).expect("gone");
        file.add(&delta(4), true, &state(4)).expect("saved");
        assert_eq!(file.load().expect("read"), Some(state(4)));
    }
}
