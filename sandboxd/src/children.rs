//! Every process that ends is reaped here, ours and the orphans that PID 1 inherits.

use std::{
    collections::HashMap,
    io,
    process::Child,
    sync::{Arc, Mutex, PoisonError},
};

use crate::mark::Mark;
use rustix::{
    io::Errno,
    process::{Pid, Signal, WaitOptions, kill_process_group, wait},
};
use sandgate_daemon::tasks::Tasks;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{Notify, oneshot},
};

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// It returned this status.
    Exited(i32),
    /// This signal killed it.
    Killed(i32),
}

impl Ended {
    /// As a shell reports it.
    pub fn exit_code(self) -> i32 {
        match self {
            Self::Exited(status) => status,
            Self::Killed(signal) => 128 + signal,
        }
    }
}

/// The children whose end somebody waits for. Clones share the same set.
#[derive(Debug, Clone)]
pub struct Children {
    waiting: Arc<Mutex<HashMap<Pid, oneshot::Sender<Ended>>>>,
    reaped: Arc<Notify>,
}

/// A child that leads its own process group.
#[derive(Debug)]
pub(crate) struct Leader {
    process: Pid,
    mark: Mark,
    children: Children,
}

impl Children {
    /// Starts reaping. Call once, before the first child.
    ///
    /// # Errors
    /// When SIGCHLD cannot be watched.
    pub fn start(tasks: &Tasks) -> io::Result<Self> {
        let mut ended = signal(SignalKind::child())?;
        let children = Self {
            waiting: Arc::default(),
            reaped: Arc::default(),
        };
        let reaper = children.clone();
        tasks.spawn("reaper", async move {
            loop {
                reaper.reap();
                if ended.recv().await.is_none() {
                    return;
                }
            }
        });
        Ok(children)
    }

    /// Takes over a child. Must follow its start without an await between, or it may be reaped unseen.
    pub(crate) fn adopt(&self, child: &Child, mark: Mark) -> (Leader, oneshot::Receiver<Ended>) {
        let process = Pid::from_child(child);
        let (sender, ended) = oneshot::channel();
        self.lock().insert(process, sender);
        (
            Leader {
                process,
                mark,
                children: self.clone(),
            },
            ended,
        )
    }

    /// Sends a signal to the group of every child that has not been reaped.
    pub(crate) fn signal_all(&self, signal: Signal) {
        for process in self.lock().keys() {
            let _gone = kill_process_group(*process, signal);
        }
    }

    /// Resolves when no process is left to wait for, orphans included.
    pub(crate) async fn all_gone(&self) {
        loop {
            let reaped = self.reaped.notified();
            if self.reap() {
                return;
            }
            reaped.await;
        }
    }

    /// Reaps what has ended. True when there is no child at all.
    fn reap(&self) -> bool {
        loop {
            let (process, status) = match wait(WaitOptions::NOHANG) {
                Ok(Some(reaped)) => reaped,
                Ok(None) => return false,
                Err(Errno::INTR) => continue,
                Err(_) => return true,
            };
            let ended = match (status.exit_status(), status.terminating_signal()) {
                (Some(status), _) => Ended::Exited(status),
                (None, Some(signal)) => Ended::Killed(signal),
                // Stops and continuations are not asked for.
                (None, None) => continue,
            };
            self.reaped.notify_waiters();
            if let Some(sender) = self.lock().remove(&process) {
                // A gone receiver no longer wants to know.
                let _unheard = sender.send(ended);
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Pid, oneshot::Sender<Ended>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Leader {
    /// The child's process id.
    pub(crate) fn process(&self) -> i32 {
        self.process.as_raw_nonzero().get()
    }

    /// Kills the child and everything that has not left its group. Does nothing once it has been reaped: its
    /// number may then belong to another.
    pub(crate) fn kill_group(&self) {
        if self.children.lock().contains_key(&self.process) {
            let _gone = kill_process_group(self.process, Signal::KILL);
        }
    }

    /// Sends a signal to the child's group. False once it has been reaped.
    pub(crate) fn signal_group(&self, signal: Signal) -> bool {
        self.children.lock().contains_key(&self.process) && kill_process_group(self.process, signal).is_ok()
    }

    /// Kills the child and everything that it started, wherever that went.
    pub(crate) fn kill_all(&self, tasks: &Tasks) {
        self.kill_group();
        tasks.spawn("kill", self.mark.kill_all());
    }
}
