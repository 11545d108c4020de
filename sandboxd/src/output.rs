//! What a process writes: the reading end of a pipe, or a terminal.

use std::{
    io,
    os::fd::OwnedFd,
    sync::atomic::{AtomicUsize, Ordering},
};

use rustix::io::{ioctl_fionbio, ioctl_fionread};
use sandgate_api::agent::FrameKind;
use sandgate_daemon::tasks::Tasks;
use tokio::net::unix::pipe;

/// Pipes of background processes that are kept open and emptied. Beyond, a pipe is closed, and its writer
/// gets SIGPIPE.
const MAX_DRAINS: usize = 256;

static DRAINS: AtomicUsize = AtomicUsize::new(0);

/// Where a process writes to.
#[derive(Debug)]
pub(crate) struct Output {
    /// Which of its two outputs.
    pub(crate) kind: FrameKind,
    /// None after the end.
    descriptor: Option<pipe::Receiver>,
}

impl Output {
    /// Takes over our end of it.
    ///
    /// # Errors
    /// When it cannot be watched.
    pub(crate) fn new(kind: FrameKind, descriptor: OwnedFd) -> io::Result<Self> {
        ioctl_fionbio(&descriptor, true)?;
        // A terminal is no pipe, and is read in the same way.
        let descriptor = Some(pipe::Receiver::from_owned_fd_unchecked(descriptor)?);
        Ok(Self { kind, descriptor })
    }

    /// Resolves when there is something to read, or the end; never when it has ended.
    pub(crate) async fn readable(&self) {
        match &self.descriptor {
            // An error shows again when reading.
            Some(descriptor) => drop(descriptor.readable().await),
            None => std::future::pending().await,
        }
    }

    /// Reads what is there. Forgets the descriptor at its end.
    pub(crate) fn read(&mut self, buffer: &mut [u8]) -> usize {
        let Some(descriptor) = &self.descriptor else {
            return 0;
        };
        match descriptor.try_read(buffer) {
            Ok(0) => self.descriptor = None,
            Ok(read) => return read,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // A terminal that nobody holds any more ends so, too.
            Err(_) => self.descriptor = None,
        }
        0
    }

    /// Takes what is there, whether or not the runtime has been told of it yet: where two commands end at the same
    /// moment, the second is reaped with the first, before the news of its last words.
    pub(crate) fn take(&self, buffer: &mut [u8]) -> usize {
        let read = self
            .descriptor
            .as_ref()
            .map(|descriptor| rustix::io::read(descriptor, buffer));
        read.and_then(Result::ok).unwrap_or(0)
    }

    /// How many bytes are in the pipe at this moment.
    pub(crate) fn waiting(&self) -> usize {
        let waiting = self
            .descriptor
            .as_ref()
            .and_then(|descriptor| ioctl_fionread(descriptor).ok());
        waiting.and_then(|bytes| usize::try_from(bytes).ok()).unwrap_or(0)
    }

    /// Reads and forgets what background processes still write, until the last of them ends.
    pub(crate) fn keep_empty(mut self, tasks: &Tasks) {
        if self.descriptor.is_none() {
            return;
        }
        if DRAINS.fetch_add(1, Ordering::Relaxed) >= MAX_DRAINS {
            DRAINS.fetch_sub(1, Ordering::Relaxed);
            return;
        }
        tasks.spawn("drain", async move {
            let mut buffer = vec![0; 4096];
            while self.descriptor.is_some() {
                self.readable().await;
                let _forgotten = self.read(&mut buffer);
            }
            DRAINS.fetch_sub(1, Ordering::Relaxed);
        });
    }
}
