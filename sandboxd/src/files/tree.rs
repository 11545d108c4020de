//! From a path to a descriptor, so that no name can lead further than it may.
//!
//! Code inside runs under this process's uid and can change every directory between two calls, so a path that was looked
//! at is worth nothing: what counts is the descriptor. Every path is resolved by openat2(2) from the sandbox's root:
//! `RESOLVE_IN_ROOT` holds `..` and absolute links below it, `RESOLVE_NO_MAGICLINKS` refuses `/proc/<pid>/fd`, `root`, `cwd`
//! and `exe`, and whatever lies on a `proc` file system is refused by its descriptor, whichever way it was reached.
//!
//! Why `/proc` as a whole: this process may read itself there although it is not dumpable (`/proc/self/mem`, `environ`,
//! `fd`, `maps`), which code of the same uid may not. A link from `/workspace` to `/proc/1/environ` would make the API show
//! it the agent's memory and descriptors, and let it write to what is the agent's alone. A command that wants `/proc` reads
//! it as itself.
//!
//! What is walked downwards (listing, removing, copying) is opened from the directory above it and never through a link.
//! What code inside can still bring about by being faster is that a call works on another of its own files, which it could
//! have done without the call.

use std::{
    ffi::{OsStr, OsString},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::{OsStrExt as _, OsStringExt as _},
    },
    path::{Component, Path, PathBuf},
};

use rustix::{
    fs::{
        AtFlags, FileType, Mode, OFlags, ResolveFlags, fstat, fstatfs, mkdirat, openat, openat2, readlinkat,
        statat,
    },
    io::Errno,
};
use sandgate_api::agent::AgentErrorCode;

use super::refusal;
use crate::wire::Refusal;

/// Links that are followed one after the other, as the kernel has it.
const MAX_LINKS: usize = 40;
/// Permission bits of a new directory, before the umask.
const NEW_DIRECTORY: Mode = Mode::from_raw_mode(0o777);

/// A directory below which every path stays: the sandbox's root.
#[derive(Debug)]
pub(crate) struct Tree {
    root: OwnedFd,
}

/// A name in a directory, whether or not something has it.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) parent: OwnedFd,
    pub(super) name: OsString,
}

impl Tree {
    /// The tree below a directory.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub(crate) fn at(root: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(root, flags, Mode::empty())?;
        Ok(Self { root })
    }

    /// Opens what has the path, through links.
    pub(super) fn resolve(&self, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let opened = match openat2(&self.root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
            Err(Errno::NOSYS) => walk(&self.root, path, flags)?,
            opened => opened?,
        };
        foreign(&opened)?;
        Ok(opened)
    }

    /// Opens a directory to be read and to work in.
    pub(super) fn directory(&self, path: &Path) -> Result<OwnedFd, Refusal> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        self.resolve(path, flags).map_err(|error| refusal(path, &error))
    }

    /// Opens a regular file for reading. What is no regular file is never opened for more than its name: a FIFO could wait
    /// for ever, and a device do something.
    pub(super) fn file(&self, path: &Path) -> Result<OwnedFd, Refusal> {
        let fail = |error: io::Error| refusal(path, &error);
        let named = self.resolve(path, OFlags::PATH).map_err(fail)?;
        regular(path, &named)?;
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
        let opened = self.resolve(path, flags).map_err(fail)?;
        // It may be another one by now.
        regular(path, &opened)?;
        Ok(opened)
    }

    /// The directory and the name that a path means. A link that has the name stays a link.
    pub(super) fn place(&self, path: &Path) -> Result<Place, Refusal> {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            let message = format!("{}: the root itself is not to be had", path.display());
            return Err(Refusal::new(AgentErrorCode::IsDirectory, message));
        };
        Ok(Place {
            parent: self.directory(parent).map_err(|error| Refusal {
                message: format!("{}: {}", path.display(), error.message),
                ..error
            })?,
            name: name.to_owned(),
        })
    }

    /// The same, through links, for what is to be replaced; the parents are made. A link that leads nowhere is followed to
    /// where its file would be.
    pub(super) fn place_behind(&self, path: &Path) -> Result<Place, Refusal> {
        let fail = |error: io::Error| refusal(path, &error);
        let mut current = path.to_owned();
        for _ in 0..MAX_LINKS {
            let (Some(above), Some(name)) = (current.parent(), current.file_name()) else {
                return Err(fail(Errno::ISDIR.into()));
            };
            let parent = self.made(above).map_err(fail)?;
            let is_link = match statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(found) => FileType::from_raw_mode(found.st_mode) == FileType::Symlink,
                Err(Errno::NOENT) => false,
                Err(error) => return Err(fail(error.into())),
            };
            if !is_link {
                let name = name.to_owned();
                return Ok(Place { parent, name });
            }
            let target = readlinkat(&parent, name, Vec::new()).map_err(|error| fail(error.into()))?;
            let target = OsString::from_vec(target.into_bytes());
            // Joined and not shortened: `..` after a link means the parent of what the link leads to.
            current = above.join(target);
        }
        Err(fail(Errno::LOOP.into()))
    }

    /// Opens a directory to work in, making it and its parents.
    pub(super) fn made(&self, path: &Path) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let mut missing: Vec<&OsStr> = Vec::new();
        let mut existing = path;
        let mut directory = loop {
            match self.resolve(existing, flags) {
                Ok(directory) => break directory,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
            let (Some(parent), Some(name)) = (existing.parent(), existing.file_name()) else {
                return Err(Errno::NOENT.into());
            };
            missing.push(name);
            existing = parent;
        };
        while let Some(name) = missing.pop() {
            match mkdirat(&directory, name, NEW_DIRECTORY) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
            directory = below(&directory, Path::new(name))?;
        }
        Ok(directory)
    }
}

/// Opens a directory below another one without following any link.
pub(super) fn below(directory: impl AsFd, path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let opened = match openat2(&directory, path, flags, Mode::empty(), resolve) {
        Err(Errno::NOSYS) => {
            let mut opened = None::<OwnedFd>;
            for component in path.components() {
                let Component::Normal(name) = component else {
                    return Err(Errno::INVAL.into());
                };
                let next = match &opened {
                    Some(above) => openat(above, name, flags, Mode::empty())?,
                    None => openat(&directory, name, flags, Mode::empty())?,
                };
                opened = Some(next);
            }
            opened.ok_or(Errno::INVAL)?
        }
        opened => opened?,
    };
    foreign(&opened)?;
    Ok(opened)
}

/// What openat2 does, step by step, for a kernel that lacks it (gVisor's): the same rules, a descriptor at a time.
pub(super) fn walk(root: &OwnedFd, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
    let step = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    // The way down from the root, so that `..` is a step back on it and never the kernel's idea of a parent.
    let mut way: Vec<(OsString, OwnedFd)> = Vec::new();
    let mut left: Vec<OsString> = components(path);
    let mut links = 0;
    while let Some(name) = left.pop() {
        if name == ".." {
            way.pop();
            continue;
        }
        let above = way.last().map_or(root, |(_, above)| above);
        let next = openat(above, name.as_os_str(), step, Mode::empty())?;
        foreign(&next)?;
        if FileType::from_raw_mode(fstat(&next)?.st_mode) != FileType::Symlink {
            way.push((name, next));
            continue;
        }
        links += 1;
        if links > MAX_LINKS {
            return Err(Errno::LOOP.into());
        }
        let target = OsString::from_vec(readlinkat(&next, "", Vec::new())?.into_bytes());
        if target.as_bytes().starts_with(b"/") {
            way.clear();
        }
        left.extend(components(Path::new(&target)));
    }
    let flags = flags | OFlags::CLOEXEC;
    let Some((name, found)) = way.pop() else {
        return Ok(openat(root, ".", flags, Mode::empty())?);
    };
    if flags.contains(OFlags::PATH) {
        return Ok(found);
    }
    if flags.contains(OFlags::DIRECTORY) {
        return Ok(openat(&found, ".", flags, Mode::empty())?);
    }
    // A last component that became a link meanwhile is refused.
    let above = way.last().map_or(root, |(_, above)| above);
    Ok(openat(above, name, flags | OFlags::NOFOLLOW, Mode::empty())?)
}

/// The names of a path, the last first.
fn components(path: &Path) -> Vec<OsString> {
    let names = path.components().filter_map(|component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some(OsString::from("..")),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    });
    let mut names: Vec<OsString> = names.collect();
    names.reverse();
    names
}

/// Refuses what lies on a `proc` file system.
fn foreign(opened: &OwnedFd) -> io::Result<()> {
    if fstatfs(opened)?.f_type == rustix::fs::PROC_SUPER_MAGIC {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "the files of /proc are not to be had from outside; a command can read them",
        ));
    }
    Ok(())
}

fn regular(path: &Path, opened: &OwnedFd) -> Result<(), Refusal> {
    let found = fstat(opened).map_err(|error| refusal(path, &error.into()))?;
    match FileType::from_raw_mode(found.st_mode) {
        FileType::RegularFile => Ok(()),
        FileType::Directory => Err(refusal(path, &Errno::ISDIR.into())),
        _ => Err(Refusal::new(
            AgentErrorCode::Invalid,
            format!("{}: not a regular file", path.display()),
        )),
    }
}

/// Checks a path: absolute, no `..`.
pub(crate) fn checked(path: &str) -> Result<PathBuf, Refusal> {
    let refuse = |message: &str| {
        Err(Refusal::new(
            AgentErrorCode::Invalid,
            format!("`{}`: {message}", path.escape_debug()),
        ))
    };
    if !path.starts_with('/') {
        return refuse("not an absolute path");
    }
    if path.contains('\0') {
        return refuse("a path holds no NUL");
    }
    let mut clean = PathBuf::new();
    for component in Path::new(path).components() {
        match component {
            Component::ParentDir => return refuse("`..` is not allowed in a path"),
            Component::RootDir | Component::Normal(_) => clean.push(component),
            Component::CurDir | Component::Prefix(_) => {}
        }
    }
    Ok(clean)
}
