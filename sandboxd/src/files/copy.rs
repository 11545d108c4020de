//! Copying, and moving, which is copying where two file systems meet.

use std::{
    ffi::{CString, OsStr},
    fs::File,
    io::{self, Read as _},
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use rustix::{
    fs::{
        AtFlags, Dir, FileType, Mode, OFlags, RenameFlags, Stat, fchmod, fstat, mkdirat, openat, readlinkat,
        renameat, renameat_with, statat, symlinkat, unlinkat,
    },
    io::Errno,
};
use sandgate_api::agent::AgentErrorCode;

use super::{
    Caller, TURN, Tree, refusal,
    remove::remove_directory,
    tree::{Place, below, checked},
    with_fresh_name,
    write::Replacement,
};
use crate::wire::Refusal;

/// Bytes that are copied before others have a turn.
const PIECE: u64 = 4 * 1024 * 1024;
/// Deepest nesting that is copied: each level holds two descriptors.
const MAX_DEPTH: usize = 128;
/// Permission bits of a directory while it is filled.
const PRIVATE: Mode = Mode::from_raw_mode(0o700);

/// Copies a file, or a directory with everything in it, which shows when it is whole.
pub(super) async fn copy(
    tree: &Tree,
    source: &str,
    destination: &str,
    caller: &Caller,
) -> Result<(), Refusal> {
    let (source, target) = (checked(source)?, checked(destination)?);
    match tree.file(&source) {
        Ok(file) => {
            let mode = fstat(&file)
                .map_err(|error| refusal(&source, &error.into()))?
                .st_mode;
            copy_file(tree, file.into(), mode, &target, caller).await
        }
        Err(refused) if refused.code == AgentErrorCode::IsDirectory => {
            let from = tree.directory(&source)?;
            let to = free(tree, &target)?;
            copy_directory(&from, &to, caller)
                .await
                .map_err(|error| of_copy(&target, error))
        }
        Err(refused) => Err(refused),
    }
}

/// Gives what has a path another one; a link is moved itself.
pub(super) async fn rename(
    tree: &Tree,
    source: &str,
    destination: &str,
    caller: &Caller,
) -> Result<(), Refusal> {
    let (source, target) = (checked(source)?, checked(destination)?);
    let from = tree.place(&source)?;
    let of_source = |error: Errno| refusal(&source, &error.into());
    let of_target = |error: io::Error| refusal(&target, &error);
    let found = statat(&from.parent, &from.name, AtFlags::SYMLINK_NOFOLLOW).map_err(of_source)?;
    let to = place_made(tree, &target)?;
    match renameat(&from.parent, &from.name, &to.parent, &to.name) {
        Err(Errno::XDEV) => {}
        renamed => return renamed.map_err(|error| of_target(error.into())),
    }
    match FileType::from_raw_mode(found.st_mode) {
        FileType::RegularFile => {
            let file = open_regular(&from.parent, &from.name).map_err(of_source)?;
            copy_file(tree, file, found.st_mode, &target, caller).await?;
        }
        FileType::Symlink => {
            let link = readlinkat(&from.parent, &from.name, Vec::new()).map_err(of_source)?;
            let (fresh, ()) =
                with_fresh_name(|fresh| symlinkat(&link, &to.parent, fresh)).map_err(of_target)?;
            renameat(&to.parent, &fresh, &to.parent, &to.name).map_err(|error| of_target(error.into()))?;
        }
        FileType::Directory => {
            let directory =
                below(&from.parent, Path::new(&from.name)).map_err(|error| refusal(&source, &error))?;
            copy_directory(&directory, &free(tree, &target)?, caller)
                .await
                .map_err(|error| of_copy(&target, error))?;
            let removed = remove_directory(&from.parent, &from.name, caller).await;
            return removed.map_err(|error| refusal(&source, &error));
        }
        _ => {
            let message = format!(
                "{}: only a file, link or directory can be moved there",
                source.display()
            );
            return Err(Refusal::new(AgentErrorCode::Invalid, message));
        }
    }
    unlinkat(&from.parent, &from.name, AtFlags::empty()).map_err(of_source)
}

/// A path whose parents are made.
fn place_made(tree: &Tree, path: &Path) -> Result<Place, Refusal> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(refusal(path, &Errno::EXIST.into()));
    };
    let name = name.to_owned();
    let parent = tree.made(parent).map_err(|error| refusal(path, &error))?;
    Ok(Place { parent, name })
}

/// The same of a path that nothing has.
fn free(tree: &Tree, path: &Path) -> Result<Place, Refusal> {
    let place = place_made(tree, path)?;
    match statat(&place.parent, &place.name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => Ok(place),
        Ok(_) => Err(refusal(path, &Errno::EXIST.into())),
        Err(error) => Err(refusal(path, &error.into())),
    }
}

async fn copy_file(
    tree: &Tree,
    from: File,
    mode: u32,
    target: &Path,
    caller: &Caller,
) -> Result<(), Refusal> {
    let to = Replacement::begin(tree, target, Some(mode))?;
    transfer(&from, to.file(), caller)
        .await
        .map_err(|error| refusal(target, &error))?;
    to.finish()
}

/// Copies as many bytes as a file has now: one that grows faster than it is copied would have no end.
async fn transfer(from: &File, to: &File, caller: &Caller) -> io::Result<()> {
    let mut left = from.metadata()?.len();
    while left > 0 {
        // The kernel does it where it can.
        let copied = io::copy(&mut from.take(left.min(PIECE)), &mut &*to)?;
        if copied == 0 {
            return Ok(());
        }
        left -= copied.min(left);
        caller.turn().await?;
    }
    Ok(())
}

/// Opens a regular file by its name, and nothing else.
fn open_regular(parent: impl AsFd, name: impl rustix::path::Arg) -> rustix::io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = openat(parent, name, flags, Mode::empty())?;
    if FileType::from_raw_mode(fstat(&file)?.st_mode) == FileType::RegularFile {
        Ok(file.into())
    } else {
        Err(Errno::INVAL)
    }
}

/// Why a directory was not copied.
enum Failed {
    Io(io::Error),
    Unlike(&'static str),
}

impl<E: Into<io::Error>> From<E> for Failed {
    fn from(error: E) -> Self {
        Self::Io(error.into())
    }
}

fn of_copy(target: &Path, failed: Failed) -> Refusal {
    match failed {
        Failed::Io(error) => refusal(target, &error),
        Failed::Unlike(what) => {
            Refusal::new(AgentErrorCode::Invalid, format!("{}: {what}", target.display()))
        }
    }
}

/// A directory that is being copied.
struct Level {
    from: OwnedFd,
    entries: Dir,
    to: OwnedFd,
    mode: Mode,
}

impl Level {
    fn begin(from: OwnedFd, parent: impl AsFd, name: impl rustix::path::Arg + Copy) -> Result<Self, Failed> {
        let mode = Mode::from_raw_mode(fstat(&from)?.st_mode & 0o777);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(Self {
            to: openat(parent, name, flags, Mode::empty())?,
            entries: Dir::read_from(&from)?,
            from,
            mode,
        })
    }
}

/// Copies a directory to a place that nothing has: under a fresh name beside it, and then there.
async fn copy_directory(from: &OwnedFd, to: &Place, caller: &Caller) -> Result<(), Failed> {
    let (fresh, ()) = with_fresh_name(|fresh| mkdirat(&to.parent, fresh, PRIVATE))?;
    let copied = fill(from, &to.parent, &fresh, caller).await;
    let put = copied.and_then(|()| {
        let flags = RenameFlags::NOREPLACE;
        Ok(renameat_with(&to.parent, &fresh, &to.parent, &to.name, flags)?)
    });
    if put.is_err() {
        // Why it was not copied says more than why it cannot be removed.
        let _kept = remove_directory(&to.parent, &fresh, &Caller::default()).await;
    }
    put
}

async fn fill(from: &OwnedFd, parent: &OwnedFd, name: &OsStr, caller: &Caller) -> Result<(), Failed> {
    let first = Level::begin(from.try_clone()?, parent, name)?;
    let copy = identity(&fstat(&first.to)?);
    let mut levels = vec![first];
    let mut steps = 0_usize;
    while let Some(level) = levels.last_mut() {
        steps += 1;
        if steps.is_multiple_of(TURN) {
            caller.turn().await?;
        }
        let Some(entry) = level.entries.read() else {
            fchmod(&level.to, level.mode)?;
            levels.pop();
            continue;
        };
        let entry = entry?;
        let name: CString = entry.file_name().to_owned();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let found = statat(&level.from, name.as_c_str(), AtFlags::SYMLINK_NOFOLLOW)?;
        match FileType::from_raw_mode(found.st_mode) {
            FileType::RegularFile => {
                let file = open_regular(&level.from, name.as_c_str())?;
                let flags =
                    OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let mode = Mode::from_raw_mode(found.st_mode & 0o777);
                let to = File::from(openat(
                    &level.to,
                    name.as_c_str(),
                    flags,
                    Mode::from_raw_mode(0o600),
                )?);
                transfer(&file, &to, caller).await?;
                fchmod(&to, mode)?;
            }
            FileType::Symlink => {
                let link = readlinkat(&level.from, name.as_c_str(), Vec::new())?;
                symlinkat(&link, &level.to, name.as_c_str())?;
            }
            FileType::Directory => {
                if identity(&found) == copy {
                    return Err(Failed::Unlike("a directory cannot be copied into itself"));
                }
                if levels.len() >= MAX_DEPTH {
                    return Err(Failed::Unlike("directories are nested too deep to be copied"));
                }
                let Some(level) = levels.last() else { break };
                let inner = below(&level.from, Path::new(OsStr::from_bytes(name.to_bytes())))?;
                mkdirat(&level.to, name.as_c_str(), PRIVATE)?;
                let next = Level::begin(inner, &level.to, name.as_c_str())?;
                levels.push(next);
            }
            _ => return Err(Failed::Unlike("sockets, FIFOs and devices are not copied")),
        }
    }
    Ok(())
}

fn identity(found: &Stat) -> (u64, u64) {
    (found.st_dev, found.st_ino)
}
