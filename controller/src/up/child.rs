//! One child: started, restarted when it ends, stopped with its supervisor.

use std::{
    io,
    os::fd::{AsRawFd as _, OwnedFd},
    path::PathBuf,
    process::{ExitStatus, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use tokio::process::Command;
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
    /// Variables that it does not get to see.
    pub(super) withheld: &'static [&'static str],
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
                Ok(mut process) => {
                    tracing::debug!(child = self.name, pid = process.id(), "started");
                    let ended = tokio::select! {
                        biased;
                        () = stop.cancelled() => None,
                        ended = process.wait() => Some(ended),
                    };
                    match ended {
                        None => {
                            self.stop(process).await;
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

    fn start(&self) -> io::Result<tokio::process::Child> {
        let mut command = Command::new(&self.supervisor);
        command
            .arg("become")
            .arg("--parent")
            .arg(std::process::id().to_string())
            .arg("--");
        command.arg(&self.program).args(&self.arguments);
        for name in self.withheld {
            command.env_remove(name);
        }
        command.envs(self.variables.iter().map(|(name, value)| (*name, value)));
        // Copies that are not closed on exec exist only until the child is there. Nothing else is started
        // meanwhile: this is the only thread.
        let mut copies = Vec::with_capacity(self.descriptors.len());
        for (variable, descriptor) in &self.descriptors {
            let copy = rustix::io::dup(descriptor)?;
            command.env(variable, copy.as_raw_fd().to_string());
            copies.push(copy);
        }
        // A process group of its own: an interrupt from the keyboard reaches the supervisor, which stops its
        // children in order.
        let started = command
            .process_group(0)
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .spawn();
        drop(copies);
        started
    }

    async fn stop(&self, mut process: tokio::process::Child) {
        let pid = process
            .id()
            .and_then(|id| i32::try_from(id).ok())
            .and_then(Pid::from_raw);
        if let Some(pid) = pid
            && let Err(error) = kill_process(pid, Signal::TERM)
        {
            tracing::warn!(child = self.name, %error, "could not be told to stop");
        }
        match tokio::time::timeout(STOP_TIMEOUT, process.wait()).await {
            Ok(_ended) => tracing::debug!(child = self.name, "stopped"),
            Err(_elapsed) => {
                tracing::warn!(child = self.name, "did not stop in time and is killed");
                if let Err(error) = process.kill().await {
                    tracing::error!(child = self.name, %error, "could not be killed");
                }
            }
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
