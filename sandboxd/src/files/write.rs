//! Files written whole or not at all, and directories.

use std::{
    ffi::OsString,
    fs::{File, Permissions},
    io::{self, Write as _},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::PermissionsExt as _,
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, FileType, Mode, OFlags, mkdirat, openat, renameat, statat, unlinkat},
    io::Errno,
};
use sandgate_api::agent::{AgentErrorCode, FrameKind, MAX_FRAME, Reply};
use tokio::net::TcpStream;

use super::{
    Answer, Tree, refusal,
    tree::{Place, checked},
    with_fresh_name,
};
use crate::wire::{self, Refusal};

/// Permission bits of a new file.
const DEFAULT_MODE: u32 = 0o644;
/// Permission bits of a new directory, before the umask.
const NEW_DIRECTORY: Mode = Mode::from_raw_mode(0o777);

/// Writes a file of `size` bytes that follow as data frames: beside the old one, then in its place.
pub(crate) async fn write(
    stream: &mut TcpStream,
    tree: &Tree,
    path: &str,
    size: u64,
    mode: Option<u32>,
) -> Answer {
    let begun = checked(path).and_then(|target| Replacement::begin(tree, &target, mode));
    let mut replacement = match begun {
        Ok(replacement) => replacement,
        Err(refusal) => return Ok(Err(refusal)),
    };
    let mut left = size;
    while left > 0 {
        let (kind, part) = wire::receive(stream, MAX_FRAME).await?;
        let length = u64::try_from(part.len()).unwrap_or(u64::MAX);
        if kind != FrameKind::Data || length == 0 || length > left {
            let message = format!("{path}: more or less than the announced {size} bytes");
            return Ok(Err(Refusal::new(AgentErrorCode::Invalid, message)));
        }
        if let Err(refusal) = replacement.write(&part) {
            return Ok(Err(refusal));
        }
        left -= length;
    }
    if let Err(refusal) = replacement.finish() {
        return Ok(Err(refusal));
    }
    wire::reply(stream, &Reply::Written { size }).await?;
    Ok(Ok(()))
}

/// Writes a file whose bytes come as they come, until an empty frame says that it is whole.
pub(super) async fn upload(
    stream: &mut TcpStream,
    tree: &Tree,
    path: &str,
    size: Option<u64>,
    mode: Option<u32>,
) -> Answer {
    let begun = checked(path).and_then(|target| Replacement::begin(tree, &target, mode));
    let mut replacement = match begun {
        Ok(replacement) => replacement,
        Err(refusal) => return Ok(Err(refusal)),
    };
    let mut written = 0_u64;
    loop {
        // A caller that goes away before the empty frame leaves the old file as it was.
        let (kind, part) = wire::receive(stream, MAX_FRAME).await?;
        written = written.saturating_add(u64::try_from(part.len()).unwrap_or(u64::MAX));
        let ends = part.is_empty();
        let fits = size.is_none_or(|size| if ends { written == size } else { written <= size });
        if kind != FrameKind::Data || !fits {
            let message = format!("{path}: more or less than the announced bytes");
            return Ok(Err(Refusal::new(AgentErrorCode::Invalid, message)));
        }
        if ends {
            break;
        }
        if let Err(refusal) = replacement.write(&part) {
            return Ok(Err(refusal));
        }
    }
    if let Err(refusal) = replacement.finish() {
        return Ok(Err(refusal));
    }
    wire::reply(stream, &Reply::Written { size: written }).await?;
    Ok(Ok(()))
}

/// A file in the making. Dropped unfinished, it is removed and the old one is untouched.
pub(super) struct Replacement {
    file: File,
    parent: OwnedFd,
    temporary: OsString,
    name: OsString,
    mode: u32,
    /// As errors name it.
    path: PathBuf,
    finished: bool,
}

impl Replacement {
    /// Begins a file. Through a symbolic link the file behind it is replaced, as any editor does. Without a mode the old
    /// file's stays.
    pub(super) fn begin(tree: &Tree, path: &Path, mode: Option<u32>) -> Result<Self, Refusal> {
        let fail = |error: Errno| refusal(path, &error.into());
        let Place { parent, name } = tree.place_behind(path)?;
        let mode = match statat(&parent, &name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(old) => match FileType::from_raw_mode(old.st_mode) {
                FileType::RegularFile => mode.unwrap_or(old.st_mode),
                FileType::Directory => return Err(fail(Errno::ISDIR)),
                // A link that came since the place was looked for is replaced itself.
                FileType::Symlink => mode.unwrap_or(DEFAULT_MODE),
                _ => {
                    return Err(Refusal::new(
                        AgentErrorCode::Invalid,
                        format!("{}: not a regular file", path.display()),
                    ));
                }
            },
            Err(Errno::NOENT) => mode.unwrap_or(DEFAULT_MODE),
            Err(error) => return Err(fail(error)),
        };
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let (temporary, file) =
            with_fresh_name(|name| openat(&parent, name, flags, Mode::from_raw_mode(0o600)))
                .map_err(|error| refusal(path, &error))?;
        Ok(Self {
            file: file.into(),
            parent,
            temporary,
            name,
            mode: mode & 0o777,
            path: path.to_owned(),
            finished: false,
        })
    }

    /// Adds bytes at its end.
    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), Refusal> {
        let written = self.file.write_all(bytes);
        written.map_err(|error| refusal(&self.path, &error))
    }

    /// The file itself, for the kernel to write to.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Puts it in its place.
    pub(super) fn finish(mut self) -> Result<(), Refusal> {
        let put = || -> io::Result<()> {
            self.file.set_permissions(Permissions::from_mode(self.mode))?;
            renameat(&self.parent, &self.temporary, &self.parent, &self.name)?;
            Ok(())
        };
        put().map_err(|error| refusal(&self.path, &error))?;
        self.finished = true;
        Ok(())
    }
}

impl Drop for Replacement {
    fn drop(&mut self) {
        if !self.finished {
            // Code inside may have been faster.
            let _gone = unlinkat(self.parent.as_fd(), &self.temporary, AtFlags::empty());
        }
    }
}

/// Makes a directory.
pub(super) fn make_directory(tree: &Tree, path: &str, parents: bool) -> Result<(), Refusal> {
    let clean = checked(path)?;
    if parents {
        let made = tree.made(&clean).map(drop);
        return made.map_err(|error| refusal(&clean, &error));
    }
    let Place { parent, name } = match tree.place(&clean) {
        Ok(place) => place,
        // The root is there.
        Err(_) if clean.parent().is_none() => return Err(refusal(&clean, &Errno::EXIST.into())),
        Err(refusal) => return Err(refusal),
    };
    mkdirat(&parent, &name, NEW_DIRECTORY).map_err(|error| refusal(&clean, &error.into()))
}
