//! Files for the controller.
//!
//! Calls here block this process's only thread for the length of one file system call, never longer: what is not a regular
//! file is not opened for reading or writing, because a FIFO could block for ever, and long work lets others have a turn.
//! How a path becomes a descriptor, and why it leads no further than it may, is said in [`tree`].

mod copy;
mod listing;
mod read;
mod remove;
mod tree;
mod watch;
mod write;

#[cfg(test)]
mod tests;

use std::{
    ffi::OsString,
    fs, io,
    path::{Path, PathBuf},
    pin::pin,
    process,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

use rustix::io::Errno;
use sandgate_api::agent::{AgentErrorCode, FileReply, FileRequest, Reply};
use tokio::{io::AsyncReadExt as _, net::TcpStream};

pub(crate) use listing::list;
pub(crate) use read::read;
pub(crate) use tree::{Tree, checked};
pub(crate) use write::write;

use crate::wire::{self, Refusal};

/// The outer error ends the connection, the inner one is told to the caller.
type Answer = io::Result<Result<(), Refusal>>;

/// Steps of long work after which others have a turn.
const TURN: usize = 64;

/// Does one piece of work on files.
pub(crate) async fn serve(stream: &mut TcpStream, tree: &Tree, request: FileRequest) -> Answer {
    let caller = Caller::default();
    let done = match request {
        FileRequest::Glob { base, pattern, limit } => {
            return listing::glob(stream, tree, &base, &pattern, limit).await;
        }
        FileRequest::Open { path } => return read::open(stream, tree, &path).await,
        FileRequest::Watch { path, recursive } => return watch::watch(stream, tree, &path, recursive).await,
        FileRequest::Upload { path, size, mode } => {
            return write::upload(stream, tree, &path, size, mode).await;
        }
        FileRequest::Remove { path, recursive } => {
            let work = remove::remove(tree, &path, recursive, &caller);
            caller.waits(stream, work).await?
        }
        FileRequest::MakeDirectory { path, parents } => write::make_directory(tree, &path, parents),
        FileRequest::Move { source, destination } => {
            let work = copy::rename(tree, &source, &destination, &caller);
            caller.waits(stream, work).await?
        }
        FileRequest::Copy { source, destination } => {
            let work = copy::copy(tree, &source, &destination, &caller);
            caller.waits(stream, work).await?
        }
    };
    if let Err(refusal) = done {
        return Ok(Err(refusal));
    }
    wire::reply(stream, &Reply::Files(FileReply::Done)).await?;
    Ok(Ok(()))
}

/// Whether anybody still waits for what is being done.
#[derive(Debug, Default)]
struct Caller {
    gone: AtomicBool,
}

impl Caller {
    /// Lets others have a turn.
    ///
    /// # Errors
    /// When the caller is gone: what is half done is to be undone.
    async fn turn(&self) -> io::Result<()> {
        tokio::task::yield_now().await;
        if self.gone.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        Ok(())
    }

    /// Works until it is done, or, once the peer of this connection is gone, until it has noticed.
    async fn waits<T>(&self, stream: &mut TcpStream, work: impl Future<Output = T>) -> io::Result<T> {
        let mut work = pin!(work);
        tokio::select! {
            biased;
            done = &mut work => return Ok(done),
            // A byte here is as much a breach as an end: this operation has nothing more to receive.
            _end = stream.read_u8() => self.gone.store(true, Ordering::Relaxed),
        }
        let _unheard = work.await;
        Err(io::ErrorKind::ConnectionAborted.into())
    }
}

/// Checks that a path is a directory in which a command can run. No border: a command can go wherever it likes.
pub(crate) fn directory(path: &str) -> Result<PathBuf, Refusal> {
    let clean = checked(path)?;
    match fs::metadata(&clean) {
        Ok(metadata) if metadata.is_dir() => Ok(clean),
        Ok(_) => Err(Refusal::new(
            AgentErrorCode::NotDirectory,
            format!("{path}: not a directory"),
        )),
        Err(error) => Err(refusal(&clean, &error)),
    }
}

/// The word for what the file system said.
pub(crate) fn code(error: &io::Error) -> AgentErrorCode {
    let Some(errno) = error.raw_os_error().map(Errno::from_raw_os_error) else {
        return match error.kind() {
            io::ErrorKind::PermissionDenied => AgentErrorCode::PermissionDenied,
            _ => AgentErrorCode::Internal,
        };
    };
    match errno {
        Errno::NOENT => AgentErrorCode::NotFound,
        Errno::ISDIR => AgentErrorCode::IsDirectory,
        Errno::NOTDIR => AgentErrorCode::NotDirectory,
        Errno::EXIST => AgentErrorCode::Exists,
        Errno::NOTEMPTY => AgentErrorCode::NotEmpty,
        Errno::ACCESS | Errno::PERM | Errno::ROFS => AgentErrorCode::PermissionDenied,
        Errno::NOSPC | Errno::DQUOT => AgentErrorCode::NoSpace,
        Errno::FBIG => AgentErrorCode::TooLarge,
        Errno::NAMETOOLONG | Errno::LOOP | Errno::INVAL | Errno::BUSY => AgentErrorCode::Invalid,
        _ => AgentErrorCode::Internal,
    }
}

fn refusal(path: &Path, error: &io::Error) -> Refusal {
    Refusal::new(code(error), format!("{}: {error}", path.display()))
}

/// A name that nothing has yet, as far as code inside does not try: then the next one.
///
/// Not derived from another name, which may be as long as a name can be.
fn fresh_name() -> OsString {
    static SERIAL: AtomicU64 = AtomicU64::new(0);
    let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
    format!(".sandgate-{}-{serial}", process::id()).into()
}

/// Does something with fresh names until one is free.
fn with_fresh_name<T>(attempt: impl Fn(&OsString) -> rustix::io::Result<T>) -> io::Result<(OsString, T)> {
    for _ in 0..TURN {
        let name = fresh_name();
        match attempt(&name) {
            Ok(made) => return Ok((name, made)),
            Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(Errno::EXIST.into())
}
