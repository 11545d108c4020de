//! Named, supervised tasks with one drain for all of them.

use std::{future::Future, time::Duration};

use tokio::task::JoinHandle;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{Instrument as _, Span};

/// Where a program's tasks live. Clones share the same set.
#[derive(Debug, Clone)]
pub struct Tasks {
    tracker: TaskTracker,
    soft: CancellationToken,
    hard: CancellationToken,
}

/// Some tasks did not end in time and were stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forced {
    /// How many were still running at the deadline.
    pub tasks: usize,
}

impl Tasks {
    /// An empty set that starts draining when `shutdown` is cancelled.
    pub fn new(shutdown: CancellationToken) -> Self {
        Self {
            tracker: TaskTracker::new(),
            soft: shutdown,
            hard: CancellationToken::new(),
        }
    }

    /// Cancelled when tasks should come to an end by themselves.
    pub fn shutdown(&self) -> CancellationToken {
        self.soft.clone()
    }

    /// Runs a task until it ends or the drain's deadline passes. A panic is logged with the task's name.
    pub fn spawn<F>(&self, name: &'static str, task: F) -> JoinHandle<()>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.spawn_within(name, &Span::none(), task)
    }

    /// The same as a part of `span`: what the task logs carries the span's fields.
    #[expect(clippy::disallowed_methods, reason = "this is the one place that spawns")]
    pub fn spawn_within<F>(&self, name: &'static str, span: &Span, task: F) -> JoinHandle<()>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let hard = self.hard.clone();
        let guard = PanicLog(name);
        let watched = async move {
            let _guard = guard;
            tokio::select! {
                () = task => {}
                () = hard.cancelled() => {}
            }
        };
        tokio::spawn(
            self.tracker
                .track_future(watched.instrument(tracing::info_span!(parent: span, "task", task = name))),
        )
    }

    /// Waits until every task has ended; those still running after `deadline` are stopped.
    ///
    /// # Errors
    /// When some had to be stopped.
    pub async fn drain(&self, deadline: Duration) -> Result<(), Forced> {
        self.soft.cancel();
        self.tracker.close();
        if tokio::time::timeout(deadline, self.tracker.wait()).await.is_ok() {
            return Ok(());
        }
        let forced = Forced {
            tasks: self.tracker.len(),
        };
        self.hard.cancel();
        self.tracker.wait().await;
        Err(forced)
    }
}

/// Says which task panicked: the panic message itself names only a line.
struct PanicLog(&'static str);

impl Drop for PanicLog {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tracing::error!(task = self.0, "a task panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_task_that_listens_drains_softly() {
        let tasks = Tasks::new(CancellationToken::new());
        let shutdown = tasks.shutdown();
        tasks.spawn("listens", async move { shutdown.cancelled().await });
        assert_eq!(tasks.drain(Duration::from_secs(5)).await, Ok(()));
    }

    #[tokio::test]
    async fn a_deaf_task_is_stopped_at_the_deadline() {
        let tasks = Tasks::new(CancellationToken::new());
        tasks.spawn("deaf", std::future::pending());
        assert_eq!(
            tasks.drain(Duration::from_millis(20)).await,
            Err(Forced { tasks: 1 })
        );
    }
}
