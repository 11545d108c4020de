//! One child: started, restarted when it ends, stopped with its supervisor.

use std::{
    io,
    os::fd::{AsRawFd as _, OwnedFd},
    path::PathBuf,
    pin::{Pin, pin},
    process::{ExitStatus, Stdio},
    time::{Duration, Instant},
};

use rustix::{
    io::FdFlags,
    process::{Pid, Signal, kill_process},
};
use sandgate_daemon::{
    handover::{self, Channel},
    keep::DescriptorStore,
};
use tokio::process::{Child as Process, Command};
use tokio_util::sync::CancellationToken;

use crate::config::EXIT_USAGE;

/// Pause before the first restart; doubled by each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// Longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// A child that ran for so long is thought to be well again.
const WELL_AFTER: Duration = Duration::from_secs(30);

/// How long a child may take to end after SIGTERM.
const STOP_TIMEOUT: Duration = Duration::from_secs(12);

/// How long after a child's end its last packets may take to be read.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// A program to be kept running.
pub(super) struct Child {
    pub(super) name: &'static str,
    /// The program that becomes `program`: [`super::Become`].
    pub(super) supervisor: PathBuf,
    pub(super) program: PathBuf,
    pub(super) arguments: Vec<String>,
    /// Passed down, named by environment variables. Kept open here, for the next start.
    pub(super) descriptors: Vec<(&'static str, OwnedFd)>,
    pub(super) variables: Vec<(&'static str, String)>,
    /// Which variables of the supervisor it gets to see.
    pub(super) inherits: fn(&str) -> bool,
    /// The user that it becomes, with no capability left; else it stays what the supervisor is.
    pub(super) user: Option<u32>,
    /// Keeps its listening sockets from one start to the next; with the variable that names its end.
    pub(super) store: Option<(&'static str, DescriptorStore)>,
}

/// Why a child is not kept running any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It was stopped.
    Stopped,
    /// It refused its configuration, which another start would not change.
    Misconfigured,
}

impl Child {
    /// Keeps the child running until `stop`, and then waits for its end.
    pub(super) async fn supervise(&self, stop: &CancellationToken) -> Verdict {
        let mut pause = FIRST_PAUSE;
        loop {
            let began = Instant::now();
            match self.start() {
                Ok((process, channel)) => {
                    let pid = process.id();
                    tracing::debug!(child = self.name, pid, "started");
                    let mut running = pin!(self.run(process, channel));
                    let ended = tokio::select! {
                        biased;
                        () = stop.cancelled() => None,
                        ended = &mut running => Some(ended),
                    };
                    match ended {
                        None => {
                            self.stop(pid, running).await;
                            return Verdict::Stopped;
                        }
                        Some(Ok(status)) if status.code() == Some(i32::from(EXIT_USAGE)) => {
                            tracing::error!(child = self.name, "refused its configuration");
                            return Verdict::Misconfigured;
                        }
                        Some(ended) => self.report(ended),
                    }
                }
                Err(error) => tracing::error!(child = self.name, %error, "could not be started"),
            }
            if began.elapsed() >= WELL_AFTER {
                pause = FIRST_PAUSE;
            }
            tokio::select! {
                () = stop.cancelled() => return Verdict::Stopped,
                () = tokio::time::sleep(pause) => {}
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    fn start(&self) -> io::Result<(Process, Option<Channel>)> {
        let mut command = Command::new(&self.supervisor);
        command
            .arg("become")
            .arg("--parent")
            .arg(std::process::id().to_string());
        if let Some(user) = self.user {
            command.arg("--user").arg(user.to_string());
        }
        command.arg("--").arg(&self.program).args(&self.arguments);
        // An empty variable counts as unset, for every program alike.
        let seen = std::env::vars_os()
            .filter(|(name, value)| !value.is_empty() && name.to_str().is_some_and(self.inherits));
        command.env_clear().envs(seen);
        let given = self
            .variables
            .iter()
            .filter(|(name, value)| !value.is_empty() && (self.inherits)(name));
        command.envs(given.map(|(name, value)| (*name, value)));
        // Copies that are not closed on exec exist only until the child is there. Nothing else is started
        // meanwhile: this is the only thread.
        let mut copies = Vec::with_capacity(self.descriptors.len() + 1);
        for (variable, descriptor) in &self.descriptors {
            let copy = rustix::io::dup(descriptor)?;
            command.env(variable, copy.as_raw_fd().to_string());
            copies.push(copy);
        }
        let mut channel = None;
        if let Some((variable, _)) = &self.store {
            let (ours, theirs) = handover::pair()?;
            rustix::io::fcntl_setfd(&theirs, FdFlags::empty())?;
            command.env(variable, theirs.as_raw_fd().to_string());
            copies.push(theirs);
            channel = Some(Channel::from_fd(ours)?);
        }
        // A process group of its own: an interrupt from the keyboard reaches the supervisor, which stops its
        // children in order.
        let started = command
            .process_group(0)
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .spawn();
        drop(copies);
        Ok((started?, channel))
    }

    /// Until the child has ended, and what it last sent to the descriptor store is done.
    async fn run(&self, mut process: Process, channel: Option<Channel>) -> io::Result<ExitStatus> {
        let (Some(channel), Some((_, store))) = (channel, &self.store) else {
            return process.wait().await;
        };
        let mut kept = pin!(store.serve(&channel));
        tokio::select! {
            ended = process.wait() => {
                // It closed its end by ending; only somebody who inherited it could keep this waiting.
                drop(tokio::time::timeout(LAST_WORDS, kept).await);
                ended
            }
            () = &mut kept => process.wait().await,
        }
    }

    async fn stop(
        &self,
        pid: Option<u32>,
        mut running: Pin<&mut impl Future<Output = io::Result<ExitStatus>>>,
    ) {
        let pid = pid.and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        self.signal(pid, Signal::TERM);
        match tokio::time::timeout(STOP_TIMEOUT, &mut running).await {
            Ok(_ended) => tracing::debug!(child = self.name, "stopped"),
            Err(_elapsed) => {
                tracing::warn!(child = self.name, "did not stop in time and is killed");
                self.signal(pid, Signal::KILL);
                if let Err(error) = running.await {
                    tracing::error!(child = self.name, %error, "was lost");
                }
            }
        }
    }

    /// The process is not reaped before the future of [`Self::run`] has ended, so the id is still its own.
    fn signal(&self, pid: Option<Pid>, signal: Signal) {
        if let Some(pid) = pid
            && let Err(error) = kill_process(pid, signal)
        {
            tracing::warn!(child = self.name, ?signal, %error, "could not be signalled");
        }
    }

    fn report(&self, ended: io::Result<ExitStatus>) {
        match ended {
            Ok(status) => tracing::error!(child = self.name, %status, "ended; it is started again"),
            Err(error) => tracing::error!(child = self.name, %error, "was lost; it is started again"),
        }
    }
}

#[cfg(test)]
mod tests;
