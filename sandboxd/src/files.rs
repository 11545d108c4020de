//! Files for the controller: write whole, read whole, list.
//!
//! Calls here block this process's only thread for the length of one file system call, never longer: what is
//! not a regular file is not opened for reading or writing, because a FIFO could block for ever.

use std::{
    fs::{self, File, OpenOptions, Permissions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Component, Path, PathBuf},
    process,
    sync::atomic::{AtomicU64, Ordering},
};

use rustix::{fs::OFlags, io::Errno};
use sandgate_api::agent::{AgentErrorCode, Entry, EntryKind, FrameKind, MAX_FRAME, Reply};
use tokio::net::TcpStream;

use crate::wire::{self, Refusal};

/// Bytes of a file in one frame.
const PART: usize = 64 * 1024;
/// Most that is read of a file that says it is empty: those of `/proc` do.
const MAX_UNSIZED: u64 = 4 * 1024 * 1024;
/// Sum of name and path lengths after which a part of a listing is sent. JSON may make six bytes of one.
const LISTING_PART: usize = MAX_FRAME / 12;
/// Entries after which a part of a listing is sent.
const LISTING_ENTRIES: usize = 256;
/// Permission bits of a new file.
const DEFAULT_MODE: u32 = 0o644;

/// The outer error ends the connection, the inner one is told to the caller.
type Answer = io::Result<Result<(), Refusal>>;

/// Checks a path: absolute, no `..`.
fn checked(path: &str) -> Result<PathBuf, Refusal> {
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

/// Checks that a path is a directory in which a command can run.
pub(crate) fn directory(path: &str) -> Result<PathBuf, Refusal> {
    let clean = checked(path)?;
    match fs::metadata(&clean) {
        Ok(metadata) if metadata.is_dir() => Ok(clean),
        Ok(_) => Err(Refusal::new(
            AgentErrorCode::NotDirectory,
            format!("{path}: not a directory"),
        )),
        Err(error) => Err(refusal(path, &error)),
    }
}

/// The word for what the file system said.
pub(crate) fn code(error: &io::Error) -> AgentErrorCode {
    let Some(errno) = error.raw_os_error().map(Errno::from_raw_os_error) else {
        return AgentErrorCode::Internal;
    };
    match errno {
        Errno::NOENT => AgentErrorCode::NotFound,
        Errno::ISDIR => AgentErrorCode::IsDirectory,
        // Of a parent that is there and no directory.
        Errno::NOTDIR | Errno::EXIST => AgentErrorCode::NotDirectory,
        Errno::ACCESS | Errno::PERM | Errno::ROFS => AgentErrorCode::PermissionDenied,
        Errno::NOSPC | Errno::DQUOT => AgentErrorCode::NoSpace,
        Errno::FBIG => AgentErrorCode::TooLarge,
        Errno::NAMETOOLONG | Errno::LOOP | Errno::INVAL => AgentErrorCode::Invalid,
        _ => AgentErrorCode::Internal,
    }
}

fn refusal(path: &str, error: &io::Error) -> Refusal {
    Refusal::new(code(error), format!("{path}: {error}"))
}

/// Writes a file of `size` bytes that follow as data frames: beside the old one, then in its place.
pub(crate) async fn write(stream: &mut TcpStream, path: &str, size: u64, mode: Option<u32>) -> Answer {
    let mut replacement = match checked(path).and_then(|target| Replacement::begin(target, path, mode)) {
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
        if let Err(error) = replacement.file.write_all(&part) {
            return Ok(Err(refusal(path, &error)));
        }
        left -= length;
    }
    if let Err(error) = replacement.finish() {
        return Ok(Err(refusal(path, &error)));
    }
    wire::reply(stream, &Reply::Written { size }).await?;
    Ok(Ok(()))
}

/// A file in the making. Dropped unfinished, it is removed and the old one is untouched.
struct Replacement {
    file: File,
    temporary: PathBuf,
    target: PathBuf,
    mode: u32,
    finished: bool,
}

impl Replacement {
    fn begin(target: PathBuf, path: &str, mode: Option<u32>) -> Result<Self, Refusal> {
        static SERIAL: AtomicU64 = AtomicU64::new(0);
        let fail = |error: io::Error| refusal(path, &error);
        // Through a symbolic link the file behind it is replaced, as any editor does.
        let target = fs::canonicalize(&target).unwrap_or(target);
        let old = fs::symlink_metadata(&target).ok();
        let mode = match old.map(|old| (old.file_type(), old.mode())) {
            Some((kind, _)) if kind.is_dir() => return Err(fail(Errno::ISDIR.into())),
            Some((kind, old_mode)) if kind.is_file() => mode.unwrap_or(old_mode),
            // A dangling link is replaced by the file itself.
            Some((kind, _)) if kind.is_symlink() => mode.unwrap_or(DEFAULT_MODE),
            Some(_) => {
                return Err(Refusal::new(
                    AgentErrorCode::Invalid,
                    format!("{path}: not a regular file"),
                ));
            }
            None => mode.unwrap_or(DEFAULT_MODE),
        };
        let (Some(parent), Some(_name)) = (target.parent(), target.file_name()) else {
            return Err(fail(Errno::ISDIR.into()));
        };
        fs::create_dir_all(parent).map_err(fail)?;
        // Not derived from the target's name, which may be as long as a name can be.
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let temporary = parent.join(format!(".sandgate-{}-{serial}", process::id()));
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)
            .map_err(fail)?;
        Ok(Self {
            file,
            temporary,
            target,
            mode: mode & 0o777,
            finished: false,
        })
    }

    fn finish(&mut self) -> io::Result<()> {
        self.file.set_permissions(Permissions::from_mode(self.mode))?;
        fs::rename(&self.temporary, &self.target)?;
        self.finished = true;
        Ok(())
    }
}

impl Drop for Replacement {
    fn drop(&mut self) {
        if !self.finished {
            // Code inside may have been faster.
            let _gone = fs::remove_file(&self.temporary);
        }
    }
}

/// Sends a file.
pub(crate) async fn read(stream: &mut TcpStream, path: &str, max_size: u64) -> Answer {
    let opened = checked(path).and_then(|clean| open(&clean).map_err(|error| refusal(path, &error)));
    let (mut file, size) = match opened {
        Ok((file, Some(size))) => (file, size),
        Ok((_, None)) => {
            return Ok(Err(Refusal::new(
                AgentErrorCode::Invalid,
                format!("{path}: not a regular file"),
            )));
        }
        Err(refusal) => return Ok(Err(refusal)),
    };
    let too_large = || {
        let message = format!("{path}: larger than {max_size} bytes");
        Ok(Err(Refusal::new(AgentErrorCode::TooLarge, message)))
    };
    if size > max_size {
        return too_large();
    }
    let mut buffer = Vec::new();
    if size == 0 {
        let most = max_size.min(MAX_UNSIZED);
        if let Err(error) = (&mut file).take(most + 1).read_to_end(&mut buffer) {
            return Ok(Err(refusal(path, &error)));
        }
        let size = u64::try_from(buffer.len()).unwrap_or(u64::MAX);
        if size > most {
            return too_large();
        }
        wire::reply(stream, &Reply::File { size }).await?;
        for part in buffer.chunks(PART) {
            wire::data(stream, part).await?;
        }
        return Ok(Ok(()));
    }
    wire::reply(stream, &Reply::File { size }).await?;
    buffer.resize(PART, 0);
    let mut left = size;
    while left > 0 {
        let most = usize::try_from(left).unwrap_or(PART).min(PART);
        // A file that shrinks meanwhile cannot be told in this protocol; the connection breaks off.
        let read = file.read(&mut buffer[..most])?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        wire::data(stream, &buffer[..read]).await?;
        left -= u64::try_from(read).unwrap_or(u64::MAX).min(left);
    }
    Ok(Ok(()))
}

/// Opens a file for reading without ever waiting for a writer. No size: it is not a regular file.
fn open(path: &Path) -> io::Result<(File, Option<u64>)> {
    let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits();
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags.cast_signed())
        .open(path)?;
    let metadata = file.metadata()?;
    if metadata.is_dir() {
        return Err(Errno::ISDIR.into());
    }
    let size = metadata.is_file().then_some(metadata.len());
    Ok((file, size))
}

/// Sends what is in a directory.
pub(crate) async fn list(stream: &mut TcpStream, path: &str, recursive: bool, limit: u32) -> Answer {
    let top = match checked(path).and_then(|top| match fs::read_dir(&top) {
        Ok(entries) => Ok((top, entries)),
        Err(error) => Err(refusal(path, &error)),
    }) {
        Ok((_, entries)) => entries,
        Err(refusal) => return Ok(Err(refusal)),
    };
    let mut left = limit;
    let mut current = top;
    let mut directories = Vec::new();
    let mut entries = Vec::new();
    let mut bytes = 0;
    let truncated = 'walk: loop {
        for entry in &mut current {
            // What disappears under the walk is not there.
            let Some((entry, below)) = entry.ok().and_then(|entry| describe(&entry)) else {
                continue;
            };
            if left == 0 {
                break 'walk true;
            }
            left -= 1;
            bytes += entry.name.len() + entry.path.len();
            entries.push(entry);
            directories.extend(below.filter(|_| recursive));
            if bytes >= LISTING_PART || entries.len() >= LISTING_ENTRIES {
                let part = std::mem::take(&mut entries);
                wire::reply(
                    stream,
                    &Reply::Entries {
                        entries: part,
                        last: false,
                        truncated: false,
                    },
                )
                .await?;
                bytes = 0;
            }
        }
        current = loop {
            let Some(below) = directories.pop() else {
                break 'walk false;
            };
            // Directories that may not be read stay listed, without what is in them.
            if let Ok(entries) = fs::read_dir(below) {
                break entries;
            }
        };
        tokio::task::yield_now().await;
    };
    wire::reply(
        stream,
        &Reply::Entries {
            entries,
            last: true,
            truncated,
        },
    )
    .await?;
    Ok(Ok(()))
}

/// Describes an entry; for a directory also says where to go on.
fn describe(entry: &fs::DirEntry) -> Option<(Entry, Option<PathBuf>)> {
    let metadata = entry.metadata().ok()?;
    let path = entry.path();
    let file_type = metadata.file_type();
    let kind = if file_type.is_file() {
        EntryKind::File
    } else if file_type.is_dir() {
        EntryKind::Directory
    } else if file_type.is_symlink() {
        EntryKind::Symlink
    } else {
        debug_assert!(
            file_type.is_fifo()
                || file_type.is_socket()
                || file_type.is_char_device()
                || file_type.is_block_device()
        );
        EntryKind::Other
    };
    let described = Entry {
        name: entry.file_name().to_string_lossy().into_owned(),
        path: path.to_string_lossy().into_owned(),
        kind,
        size: if file_type.is_file() { metadata.len() } else { 0 },
        modified: metadata.mtime(),
        mode: metadata.mode() & 0o7777,
    };
    let below = (kind == EntryKind::Directory).then_some(path);
    Some((described, below))
}
