//! What is in a directory, or below it; all of it, or what a pattern finds.

use std::{
    ffi::{CStr, OsStr},
    os::{fd::OwnedFd, unix::ffi::OsStrExt as _},
    path::{Path, PathBuf},
};

use globset::{GlobBuilder, GlobMatcher};
use rustix::fs::{AtFlags, Dir, FileType, Stat, readlinkat, statat};
use sandgate_api::agent::{AgentErrorCode, Entry, EntryKind, MAX_FRAME, Reply};
use tokio::net::TcpStream;

use super::{
    Answer, TURN, Tree, refusal,
    tree::{below, checked},
};
use crate::wire::{self, Refusal};

/// Sum of the lengths of texts after which a part of a listing is sent. JSON may make six bytes of one.
const LISTING_PART: usize = MAX_FRAME / 12;
/// Entries after which a part of a listing is sent.
const LISTING_ENTRIES: usize = 256;
/// Entries that a pattern is tried on. Beyond, the answer says that something may be missing.
const MAX_TRIED: usize = 1_000_000;
/// Sum of the lengths of the paths of directories that are still to be looked into, likewise.
const MAX_PENDING: usize = 16 * 1024 * 1024;

/// Sends what is in a directory.
pub(crate) async fn list(
    stream: &mut TcpStream,
    tree: &Tree,
    path: &str,
    recursive: bool,
    limit: u32,
) -> Answer {
    match Walk::begin(tree, path, recursive) {
        Ok(walk) => walk.send(stream, limit, None).await,
        Err(refusal) => Ok(Err(refusal)),
    }
}

/// Sends what a pattern finds below a directory.
pub(crate) async fn glob(
    stream: &mut TcpStream,
    tree: &Tree,
    base: &str,
    pattern: &str,
    limit: u32,
) -> Answer {
    let glob = GlobBuilder::new(pattern)
        .literal_separator(true)
        .backslash_escape(true)
        .build();
    let matcher = match glob {
        Ok(glob) => glob.compile_matcher(),
        Err(error) => {
            let message = format!("`{}`: {}", pattern.escape_debug(), error.kind());
            return Ok(Err(Refusal::new(AgentErrorCode::Invalid, message)));
        }
    };
    match Walk::begin(tree, base, true) {
        Ok(walk) => walk.send(stream, limit, Some(&matcher)).await,
        Err(refusal) => Ok(Err(refusal)),
    }
}

/// A walk from a directory downwards. Directories below are opened from the first one, and never through a link.
struct Walk {
    top: OwnedFd,
    path: PathBuf,
    recursive: bool,
    /// Relative to the first one.
    pending: Vec<PathBuf>,
    pending_bytes: usize,
}

/// A part of a listing that is not sent yet.
#[derive(Default)]
struct Part {
    entries: Vec<Entry>,
    bytes: usize,
}

impl Walk {
    fn begin(tree: &Tree, path: &str, recursive: bool) -> Result<Self, Refusal> {
        let path = checked(path)?;
        Ok(Self {
            top: tree.directory(&path)?,
            path,
            recursive,
            pending: vec![PathBuf::new()],
            pending_bytes: 0,
        })
    }

    async fn send(mut self, stream: &mut TcpStream, limit: u32, wanted: Option<&GlobMatcher>) -> Answer {
        let (mut left, mut tried, mut truncated) = (limit, 0_usize, false);
        let mut part = Part::default();
        'walk: while let Some(relative) = self.pending.pop() {
            self.pending_bytes -= relative.as_os_str().len();
            let mut directory = match self.open(&relative) {
                Ok(directory) => directory,
                Err(error) if relative.as_os_str().is_empty() => return Ok(Err(refusal(&self.path, &error))),
                // Directories that may not be read stay listed, without what is in them.
                Err(_) => continue,
            };
            loop {
                tried += 1;
                if tried.is_multiple_of(TURN) {
                    tokio::task::yield_now().await;
                }
                // What disappears under the walk is not there.
                let Some(Ok(found)) = directory.read() else { break };
                let name = found.file_name();
                if matches!(name.to_bytes(), b"." | b"..") {
                    continue;
                }
                let inside = relative.join(OsStr::from_bytes(name.to_bytes()));
                if let Some(matcher) = wanted {
                    if tried >= MAX_TRIED {
                        truncated = true;
                        break 'walk;
                    }
                    if !matcher.is_match(&inside) {
                        if found.file_type() == FileType::Directory {
                            truncated |= !self.look_into(inside);
                        }
                        continue;
                    }
                }
                let Some(entry) = directory
                    .fd()
                    .ok()
                    .and_then(|fd| describe(fd, name, &self.path.join(&inside)))
                else {
                    continue;
                };
                if left == 0 {
                    truncated = true;
                    break 'walk;
                }
                left -= 1;
                if self.recursive && entry.kind == EntryKind::Directory {
                    truncated |= !self.look_into(inside);
                }
                part.add(entry);
                if part.is_full() {
                    part.flush(stream).await?;
                }
            }
        }
        let last = Reply::Entries {
            entries: part.entries,
            last: true,
            truncated,
        };
        wire::reply(stream, &last).await?;
        Ok(Ok(()))
    }

    fn open(&self, relative: &Path) -> std::io::Result<Dir> {
        if relative.as_os_str().is_empty() {
            return Ok(Dir::read_from(&self.top)?);
        }
        Ok(Dir::new(below(&self.top, relative)?)?)
    }

    /// Whether there was room to remember a directory.
    fn look_into(&mut self, relative: PathBuf) -> bool {
        let length = relative.as_os_str().len();
        if self.pending_bytes + length > MAX_PENDING {
            return false;
        }
        self.pending_bytes += length;
        self.pending.push(relative);
        true
    }
}

impl Part {
    fn add(&mut self, entry: Entry) {
        self.bytes += entry.name.len() + entry.path.len() + entry.target.as_ref().map_or(0, String::len);
        self.entries.push(entry);
    }

    fn is_full(&self) -> bool {
        self.bytes >= LISTING_PART || self.entries.len() >= LISTING_ENTRIES
    }

    async fn flush(&mut self, stream: &mut TcpStream) -> std::io::Result<()> {
        let entries = std::mem::take(self).entries;
        let part = Reply::Entries {
            entries,
            last: false,
            truncated: false,
        };
        wire::reply(stream, &part).await
    }
}

/// Describes what a name in a directory stands for. Bytes that are no text become U+FFFD.
fn describe(directory: std::os::fd::BorrowedFd<'_>, name: &CStr, path: &Path) -> Option<Entry> {
    let found = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW).ok()?;
    let kind = match FileType::from_raw_mode(found.st_mode) {
        FileType::RegularFile => EntryKind::File,
        FileType::Directory => EntryKind::Directory,
        FileType::Symlink => EntryKind::Symlink,
        _ => EntryKind::Other,
    };
    let target = match kind {
        EntryKind::Symlink => readlinkat(directory, name, Vec::new()).ok(),
        EntryKind::File | EntryKind::Directory | EntryKind::Other => None,
    };
    let size = match kind {
        EntryKind::File => u64::try_from(found.st_size).unwrap_or(0),
        EntryKind::Directory | EntryKind::Symlink | EntryKind::Other => 0,
    };
    Some(Entry {
        name: name.to_string_lossy().into_owned(),
        path: path.to_string_lossy().into_owned(),
        kind,
        size,
        modified: modified(&found),
        mode: found.st_mode & 0o7777,
        target: target.map(|target| target.to_string_lossy().into_owned()),
    })
}

/// Seconds since the epoch.
#[expect(clippy::useless_conversion, reason = "the type depends on the platform")]
fn modified(found: &Stat) -> i64 {
    i64::try_from(found.st_mtime).unwrap_or(0)
}
