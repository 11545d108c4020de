//! What a command changed below a directory: the directory is walked before and after it.
//!
//! A walk sees what is different at its end, whoever made it so, and needs no watch on every directory, of which the
//! node has few. It costs one `lstat` for each entry (a few µs) twice, and memory of the sandbox for each path, so
//! both are bounded; past the bound the answer says that something may be missing, and never tells of a file as
//! created or deleted only because one of the walks did not get to it.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use sandgate_api::agent::{Change, ChangeAction, Changes};

/// Entries looked at in one walk, directories among them.
const MAX_ENTRIES: usize = 20_000;
/// Sum of the lengths of the paths that one walk keeps, in bytes.
const MAX_PATHS: usize = 4 * 1024 * 1024;
/// Changes that are told.
const MAX_CHANGES: usize = 1_000;
/// Length of the told paths as JSON, in bytes. All must fit a frame.
const MAX_TOLD: usize = 128 * 1024;
/// Entries looked at before others have a turn at this process's only thread.
const AT_ONCE: usize = 64;

/// Files and symbolic links below a directory at one moment.
pub(crate) struct Snapshot {
    root: PathBuf,
    files: BTreeMap<PathBuf, Stamp>,
    /// Everything was seen.
    complete: bool,
}

/// What cannot stay the same when a file is changed: the kernel sets the time of the last change, and nobody else.
#[derive(PartialEq, Eq)]
struct Stamp {
    inode: u64,
    size: u64,
    changed: (i64, i64),
    modified: (i64, i64),
}

impl Snapshot {
    /// Walks the directory. One that is not there holds nothing.
    pub(crate) async fn take(root: &Path) -> Self {
        let mut snapshot = Self {
            root: root.to_owned(),
            files: BTreeMap::new(),
            complete: true,
        };
        let (mut seen, mut length) = (0, 0);
        let mut directories = vec![root.to_owned()];
        while let Some(directory) = directories.pop() {
            let entries = match fs::read_dir(&directory) {
                Ok(entries) => entries,
                Err(error) => {
                    snapshot.complete &= error.kind() == io::ErrorKind::NotFound;
                    continue;
                }
            };
            for entry in entries {
                let Ok(entry) = entry else {
                    snapshot.complete = false;
                    break;
                };
                seen += 1;
                if seen % AT_ONCE == 0 {
                    tokio::task::yield_now().await;
                }
                let path = entry.path();
                length += path.as_os_str().len();
                if seen > MAX_ENTRIES || length > MAX_PATHS {
                    snapshot.complete = false;
                    return snapshot;
                }
                // Gone meanwhile: as if it had never been.
                let Ok(metadata) = entry.metadata() else { continue };
                if metadata.is_dir() {
                    directories.push(path);
                    continue;
                }
                let stamp = Stamp {
                    inode: metadata.ino(),
                    size: metadata.size(),
                    changed: (metadata.ctime(), metadata.ctime_nsec()),
                    modified: (metadata.mtime(), metadata.mtime_nsec()),
                };
                snapshot.files.insert(path, stamp);
            }
        }
        snapshot
    }

    /// What has become different since.
    pub(crate) async fn changes(self) -> Changes {
        let after = Self::take(&self.root).await;
        let mut told = Told {
            changes: Changes {
                files: Vec::new(),
                truncated: !self.complete || !after.complete,
            },
            length: 0,
        };
        for (path, stamp) in &after.files {
            match self.files.get(path) {
                Some(before) if before == stamp => {}
                Some(_) => told.add(path, ChangeAction::Modified, stamp.size),
                None if self.complete => told.add(path, ChangeAction::Created, stamp.size),
                None => {}
            }
        }
        if after.complete {
            for path in self.files.keys().filter(|path| !after.files.contains_key(*path)) {
                told.add(path, ChangeAction::Deleted, 0);
            }
        }
        let mut changes = told.changes;
        changes.files.sort_by(|one, other| one.path.cmp(&other.path));
        changes
    }
}

struct Told {
    changes: Changes,
    length: usize,
}

impl Told {
    fn add(&mut self, path: &Path, action: ChangeAction, size: u64) {
        let path = path.to_string_lossy().into_owned();
        self.length += serde_json::to_string(&path).map_or(0, |json| json.len());
        if self.changes.files.len() >= MAX_CHANGES || self.length > MAX_TOLD {
            self.changes.truncated = true;
            return;
        }
        self.changes.files.push(Change { path, action, size });
    }
}
