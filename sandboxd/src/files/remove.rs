//! Removing, also of a directory with everything in it.

use std::{
    ffi::{CString, OsStr},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use rustix::{
    fs::{AtFlags, Dir, FileType, StatxAttributes, StatxFlags, renameat, statat, statx, unlinkat},
    io::Errno,
};
use sandgate_api::agent::AgentErrorCode;

use super::{
    Caller, TURN, Tree, refusal,
    tree::{Place, below, checked},
    with_fresh_name,
};
use crate::wire::Refusal;

/// Directories open at once. What lies deeper is moved up to the first one before it is removed, so that code inside
/// cannot use up descriptors by nesting.
const MAX_DEPTH: usize = 32;
/// How often a directory that was emptied and is not empty is emptied again: code inside may write to it meanwhile.
const MAX_ROUNDS: usize = 1_000;

/// Removes what has the path; never what is behind a link.
pub(super) async fn remove(tree: &Tree, path: &str, recursive: bool, caller: &Caller) -> Result<(), Refusal> {
    let clean = checked(path)?;
    let fail = |error: Errno| refusal(&clean, &error.into());
    let Place { parent, name } = tree.place(&clean)?;
    let found = statat(&parent, &name, AtFlags::SYMLINK_NOFOLLOW).map_err(fail)?;
    if FileType::from_raw_mode(found.st_mode) != FileType::Directory {
        return unlinkat(&parent, &name, AtFlags::empty()).map_err(fail);
    }
    if is_mount_point(&parent, &name) {
        let message = format!(
            "{}: a mount point stays; what is in it can be removed",
            clean.display()
        );
        return Err(Refusal::new(AgentErrorCode::Invalid, message));
    }
    let removed = unlinkat(&parent, &name, AtFlags::REMOVEDIR);
    if !recursive || removed != Err(Errno::NOTEMPTY) {
        return removed.map_err(fail);
    }
    let emptied = remove_directory(&parent, &name, caller).await;
    emptied.map_err(|error| refusal(&clean, &error))
}

fn is_mount_point(parent: &OwnedFd, name: &OsStr) -> bool {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    statx(parent, name, flags, StatxFlags::TYPE)
        .is_ok_and(|found| found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

/// A directory that is being emptied.
struct Level {
    /// Its name in the level above.
    name: CString,
    directory: OwnedFd,
    entries: Dir,
    rounds: usize,
}

impl Level {
    fn open(above: impl AsFd, name: CString) -> io::Result<Self> {
        let directory = below(above, Path::new(OsStr::from_bytes(name.as_bytes())))?;
        Ok(Self {
            entries: Dir::read_from(&directory)?,
            directory,
            name,
            rounds: 0,
        })
    }
}

/// Removes a directory and everything in it. Each is opened from the one above it and not through a link, so nothing but
/// what hangs below the first one goes, whatever is moved about meanwhile.
pub(super) async fn remove_directory(parent: impl AsFd, name: &OsStr, caller: &Caller) -> io::Result<()> {
    let name = CString::new(name.as_bytes())?;
    let mut levels = vec![Level::open(&parent, name)?];
    let mut steps = 0_usize;
    while let Some(depth) = levels.len().checked_sub(1) {
        steps += 1;
        if steps.is_multiple_of(TURN) {
            caller.turn().await?;
        }
        let level = &mut levels[depth];
        let Some(entry) = level.entries.read() else {
            if leave(&mut levels, parent.as_fd())? {
                continue;
            }
            return Ok(());
        };
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        match unlinkat(&level.directory, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => continue,
            // A directory; which of the two depends on the file system.
            Err(Errno::ISDIR | Errno::PERM) => {}
            Err(error) => return Err(error.into()),
        }
        match unlinkat(&level.directory, name, AtFlags::REMOVEDIR) {
            // What became something else meanwhile is met again: the directory it is in is not empty.
            Ok(()) | Err(Errno::NOENT | Errno::NOTDIR) => continue,
            Err(Errno::NOTEMPTY) => {}
            Err(error) => return Err(error.into()),
        }
        let name = name.to_owned();
        if levels.len() < MAX_DEPTH {
            match Level::open(&levels[depth].directory, name) {
                Ok(next) => levels.push(next),
                Err(error) if is_change(&error) => {}
                Err(error) => return Err(error),
            }
        } else {
            let (first, last) = (&levels[0].directory, &levels[depth].directory);
            with_fresh_name(|fresh| renameat(last, name.as_c_str(), first, fresh))?;
            // Not somebody else's doing.
            levels[0].rounds = 0;
        }
    }
    Ok(())
}

/// Whether a name that was a directory's a moment ago is not any more.
fn is_change(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw_os_error);
    matches!(errno, Some(Errno::NOENT | Errno::NOTDIR | Errno::LOOP))
}

/// Removes the last level, which has been read to its end. Whether there is another one above it, or it is not done.
fn leave(levels: &mut Vec<Level>, parent: impl AsFd) -> io::Result<bool> {
    let Some(mut level) = levels.pop() else {
        return Ok(false);
    };
    let removed = match levels.last() {
        Some(above) => unlinkat(&above.directory, level.name.as_c_str(), AtFlags::REMOVEDIR),
        None => unlinkat(parent, level.name.as_c_str(), AtFlags::REMOVEDIR),
    };
    match removed {
        Ok(()) | Err(Errno::NOENT) => Ok(!levels.is_empty()),
        // Something else has its name by now.
        Err(Errno::NOTDIR) if !levels.is_empty() => Ok(true),
        Err(Errno::NOTEMPTY) if level.rounds < MAX_ROUNDS => {
            level.rounds += 1;
            level.entries = Dir::read_from(&level.directory)?;
            levels.push(level);
            Ok(true)
        }
        Err(error) => Err(error.into()),
    }
}
