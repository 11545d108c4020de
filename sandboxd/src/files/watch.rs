//! What happens below a directory, as it happens.
//!
//! The kernel keeps a bounded number of events for a caller that reads slowly; what it had to drop is told as lost.

use std::{
    collections::{HashMap, HashSet},
    ffi::OsStr,
    io,
    mem::MaybeUninit,
    os::{
        fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::{Path, PathBuf},
    pin::pin,
    sync::atomic::{AtomicUsize, Ordering},
};

use rustix::{
    fs::{
        Dir, FileType, OFlags,
        inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags},
    },
    io::Errno,
};
use sandgate_api::agent::{AgentErrorCode, FileAction, FileChange, FileReply, MAX_FRAME, Reply};
use tokio::{
    io::AsyncReadExt as _,
    net::{TcpStream, unix::pipe},
};

use super::{
    Answer, Tree, refusal,
    tree::{below, checked},
};
use crate::wire::{self, Refusal};

/// Directories that are followed at once.
const MAX_WATCHES: usize = 16;
/// Directories below one of them.
const MAX_DIRECTORIES: usize = 2_000;
/// Changes in one frame.
const MAX_CHANGES: usize = 256;
/// Sum of the lengths of their paths. JSON may make six bytes of one.
const MAX_BYTES: usize = MAX_FRAME / 12;
/// Room for the kernel's events.
const EVENTS: usize = 16 * 1024;

static WATCHES: AtomicUsize = AtomicUsize::new(0);

/// One of the watches that there may be.
struct Turn;

impl Turn {
    fn take() -> Option<Self> {
        if WATCHES.fetch_add(1, Ordering::Relaxed) < MAX_WATCHES {
            return Some(Self);
        }
        WATCHES.fetch_sub(1, Ordering::Relaxed);
        None
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        WATCHES.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Tells what happens below a directory until the caller has heard enough.
pub(super) async fn watch(stream: &mut TcpStream, tree: &Tree, path: &str, recursive: bool) -> Answer {
    let Some(_turn) = Turn::take() else {
        let message = format!("{MAX_WATCHES} directories are followed already");
        return Ok(Err(Refusal::new(AgentErrorCode::Invalid, message)));
    };
    let (events, mut followed) = match Followed::begin(tree, path, recursive) {
        Ok(begun) => begun,
        Err(refusal) => return Ok(Err(refusal)),
    };
    // To the runtime it is like any descriptor from which something comes.
    let events = pipe::Receiver::from_owned_fd_unchecked(events)?;
    let (mut reader, mut writer) = stream.split();
    let partly = followed.partly;
    wire::reply(&mut writer, &Reply::Files(FileReply::Watching { partly })).await?;
    // A byte here is as much a breach as an end: this operation has nothing more to receive.
    let mut gone = pin!(reader.read_u8());
    loop {
        tokio::select! {
            biased;
            _end = &mut gone => return Ok(Ok(())),
            ready = events.readable() => ready?,
        }
        if !followed.read(events.as_fd())? {
            rest(&events);
            continue;
        }
        while !followed.changes.is_empty() || followed.lost {
            wire::reply(&mut writer, &followed.part()).await?;
        }
        if followed.is_gone {
            wire::reply(&mut writer, &Reply::Files(FileReply::Done)).await?;
            return Ok(Ok(()));
        }
    }
}

/// Lets the runtime see that nothing is there to be read. Should something be by now, it is no use to a room this small
/// and stays.
fn rest(events: &pipe::Receiver) {
    let _nothing = events.try_read(&mut [0]);
}

/// A directory that is followed, with those below it.
///
/// None of them is kept open: the kernel tells the end of a directory when nobody has it any more.
struct Followed<'a> {
    tree: &'a Tree,
    path: PathBuf,
    recursive: bool,
    /// By the kernel's number, the directories relative to the first one.
    directories: HashMap<i32, PathBuf>,
    changes: Vec<FileChange>,
    lost: bool,
    /// There are more directories than are followed.
    partly: bool,
    is_gone: bool,
}

impl<'a> Followed<'a> {
    fn begin(tree: &'a Tree, path: &str, recursive: bool) -> Result<(OwnedFd, Self), Refusal> {
        let path = checked(path)?;
        let fail = |error: io::Error| match error.raw_os_error().map(Errno::from_raw_os_error) {
            // The kernel's word for too many of these.
            Some(Errno::NOSPC | Errno::MFILE) => Refusal::new(
                AgentErrorCode::Invalid,
                format!("{}: too much is watched in this sandbox", path.display()),
            ),
            _ => refusal(&path, &error),
        };
        let events = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)
            .map_err(|error| fail(error.into()))?;
        let mut followed = Self {
            tree,
            path: path.clone(),
            recursive,
            directories: HashMap::new(),
            changes: Vec::new(),
            lost: false,
            partly: false,
            is_gone: false,
        };
        followed
            .follow(events.as_fd(), PathBuf::new(), None)
            .map_err(fail)?;
        Ok((events, followed))
    }

    /// Follows a directory and, if that is wanted, those below it. `told`: what is found in it is new, unless it is among
    /// these.
    fn follow(
        &mut self,
        events: BorrowedFd<'_>,
        first: PathBuf,
        told: Option<&HashSet<PathBuf>>,
    ) -> io::Result<()> {
        let mut pending = vec![first];
        while let Some(relative) = pending.pop() {
            let is_top = relative.as_os_str().is_empty();
            if self.directories.len() >= MAX_DIRECTORIES {
                self.partly = true;
                self.lost |= told.is_some();
                return Ok(());
            }
            let followed = self.follow_one(events, &relative);
            let directory = match followed {
                Ok(directory) => directory,
                Err(error) if is_top => return Err(error),
                // Gone already, or not to be read. Out of watches it is to be told.
                Err(error) => {
                    let errno = error.raw_os_error().map(Errno::from_raw_os_error);
                    self.partly |= errno == Some(Errno::NOSPC);
                    self.lost |= told.is_some() && errno == Some(Errno::NOSPC);
                    continue;
                }
            };
            if !self.recursive {
                return Ok(());
            }
            for found in Dir::new(directory)? {
                let Ok(found) = found else { break };
                let name = found.file_name().to_bytes();
                if matches!(name, b"." | b"..") {
                    continue;
                }
                let inside = relative.join(OsStr::from_bytes(name));
                let is_directory = found.file_type() == FileType::Directory;
                if let Some(told) = told
                    && !told.contains(&inside)
                {
                    self.tell(FileAction::Created, &inside, is_directory);
                }
                if is_directory {
                    pending.push(inside);
                }
            }
        }
        Ok(())
    }

    fn follow_one(&mut self, events: BorrowedFd<'_>, relative: &Path) -> io::Result<OwnedFd> {
        let top = self
            .tree
            .resolve(&self.path, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let directory = if relative.as_os_str().is_empty() {
            top
        } else {
            below(&top, relative)?
        };
        let mut wanted = WatchFlags::CREATE
            | WatchFlags::DELETE
            | WatchFlags::MODIFY
            | WatchFlags::MOVED_FROM
            | WatchFlags::MOVED_TO
            | WatchFlags::ONLYDIR;
        if relative.as_os_str().is_empty() {
            wanted |= WatchFlags::DELETE_SELF | WatchFlags::MOVE_SELF;
        }
        // By the descriptor, so that it is this directory whatever has its path by now.
        let by_descriptor = format!("/proc/self/fd/{}", directory.as_fd().as_raw_fd());
        let number = inotify::add_watch(events, by_descriptor, wanted)?;
        self.directories.insert(number, relative.to_owned());
        Ok(directory)
    }

    /// Takes what has happened. Whether there was anything.
    fn read(&mut self, events: BorrowedFd<'_>) -> io::Result<bool> {
        let mut room = [MaybeUninit::uninit(); EVENTS];
        let mut reader = Reader::new(events, &mut room);
        let mut made = Vec::new();
        let mut any = false;
        loop {
            // Only what one call gives: the rest is there when this has been told.
            if any && reader.is_buffer_empty() {
                break;
            }
            let event = match reader.next() {
                Ok(event) => event,
                Err(Errno::AGAIN | Errno::INTR) => break,
                Err(error) => return Err(error.into()),
            };
            any = true;
            let flags = event.events();
            if flags.contains(ReadFlags::QUEUE_OVERFLOW) {
                self.lost = true;
                continue;
            }
            if flags.contains(ReadFlags::IGNORED) {
                let forgotten = self.directories.remove(&event.wd());
                self.is_gone |= forgotten.is_some_and(|path| path.as_os_str().is_empty());
                continue;
            }
            let Some(directory) = self.directories.get(&event.wd()) else {
                continue;
            };
            if flags.intersects(ReadFlags::DELETE_SELF | ReadFlags::MOVE_SELF) {
                self.is_gone |= directory.as_os_str().is_empty();
                continue;
            }
            let Some(name) = event.file_name() else { continue };
            let path = directory.join(OsStr::from_bytes(name.to_bytes()));
            let is_directory = flags.contains(ReadFlags::ISDIR);
            let action = if flags.intersects(ReadFlags::CREATE | ReadFlags::MOVED_TO) {
                FileAction::Created
            } else if flags.intersects(ReadFlags::DELETE | ReadFlags::MOVED_FROM) {
                FileAction::Deleted
            } else {
                FileAction::Modified
            };
            self.tell(action, &path, is_directory);
            if is_directory && self.recursive {
                match action {
                    FileAction::Created => made.push(path),
                    // What is below it has another path, or none.
                    FileAction::Deleted => self.forget(events, &path),
                    FileAction::Modified => {}
                }
            }
        }
        for path in made {
            let told: HashSet<PathBuf> = self.told();
            self.follow(events, path, Some(&told))?;
        }
        Ok(any)
    }

    /// The paths that are about to be told as new.
    fn told(&self) -> HashSet<PathBuf> {
        let relative = |change: &FileChange| {
            Path::new(&change.path)
                .strip_prefix(&self.path)
                .ok()
                .map(Path::to_owned)
        };
        self.changes.iter().filter_map(relative).collect()
    }

    fn forget(&mut self, events: BorrowedFd<'_>, gone: &Path) {
        let numbers: Vec<i32> = self
            .directories
            .iter()
            .filter(|(_, path)| path.starts_with(gone))
            .map(|(number, _)| *number)
            .collect();
        for number in numbers {
            self.directories.remove(&number);
            // The kernel may have been faster.
            let _gone = inotify::remove_watch(events, number);
        }
    }

    fn tell(&mut self, action: FileAction, relative: &Path, directory: bool) {
        let path = self.path.join(relative).to_string_lossy().into_owned();
        let change = FileChange {
            action,
            path,
            directory,
        };
        // A file that is written in many steps changed once.
        if self.changes.last() != Some(&change) {
            self.changes.push(change);
        }
    }

    /// The next frame of what is to be told.
    fn part(&mut self) -> Reply {
        let mut bytes = 0;
        let fits = |change: &&FileChange| {
            bytes += change.path.len();
            bytes <= MAX_BYTES
        };
        let count = self
            .changes
            .iter()
            .take(MAX_CHANGES)
            .take_while(fits)
            .count()
            .max(1);
        let changes = self.changes.drain(..count.min(self.changes.len())).collect();
        let lost = std::mem::take(&mut self.lost);
        Reply::Files(FileReply::Changes { changes, lost })
    }
}
