//! Finding everything that a command started, also what has left its process group and lost its parents.
//!
//! A process cannot shed its resource limits: they pass through fork, exec and setsid, and an unprivileged process can
//! only lower them. One limit that is of no use in a sandbox, on the time that a process with real-time priority may
//! run without a pause, is set to a number of the command's own, larger than any time. The processes of the command
//! are those with this number. Whoever lowers it deliberately escapes, and gains what every process started in the
//! background has anyway: it lives until the sandbox ends.

use std::{
    fs,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use rustix::process::{
    Pid, PidfdFlags, Resource, Rlimit, Signal, getpid, pidfd_open, pidfd_send_signal, setrlimit,
};

/// Marks count down from here, in microseconds: 146,000 years.
const HIGHEST: u64 = 1 << 62;
/// Bits of a mark that count commands. Above them is the process that started them: agents side by side, as in tests,
/// do not take each other's for their own.
const COMMANDS: u32 = 32;
/// The line of `/proc/<process>/limits` that shows the mark.
const LINE: &str = "Max realtime timeout";
/// How often the processes are looked through. What forks faster than it is killed is stopped by the sandbox's limit
/// of processes, and then killed.
const ROUNDS: u32 = 200;
/// Between two rounds: the killed take a moment to be gone.
const PAUSE: Duration = Duration::from_millis(10);
/// Processes looked at before others have a turn at this process's only thread.
const AT_ONCE: usize = 32;

static LAST: AtomicU64 = AtomicU64::new(0);

/// What the processes of one command have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mark(u64);

impl Mark {
    /// One that no process has.
    pub(crate) fn fresh() -> Self {
        let starter = u64::from(std::process::id()) << COMMANDS;
        Self(HIGHEST - starter - LAST.fetch_add(1, Ordering::Relaxed))
    }

    /// Puts it on the calling process and all that it will start. Without a mark only the process group is known.
    pub(crate) fn put_on_this_process(self) {
        let limit = Rlimit {
            current: Some(self.0),
            maximum: Some(self.0),
        };
        let _unmarked = setrlimit(Resource::Rttime, limit);
    }

    /// Kills every process that has it, until none is left.
    pub(crate) async fn kill_all(self) {
        for _ in 0..ROUNDS {
            if !self.kill_some().await {
                return;
            }
            tokio::time::sleep(PAUSE).await;
        }
        tracing::warn!("processes of a cancelled command are still there");
    }

    /// One look at all processes. False when none had the mark.
    async fn kill_some(self) -> bool {
        let Ok(processes) = fs::read_dir("/proc") else {
            return false;
        };
        let mut found = false;
        for (index, entry) in processes.flatten().enumerate() {
            if index % AT_ONCE == AT_ONCE - 1 {
                tokio::task::yield_now().await;
            }
            let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
            let Some(process) = number.and_then(Pid::from_raw) else {
                continue;
            };
            if process == getpid() || !self.is_on(process) {
                continue;
            }
            // The number may be another's by now: the descriptor stays with one process, which is looked at again.
            if let Ok(descriptor) = pidfd_open(process, PidfdFlags::empty())
                && self.is_on(process)
            {
                found |= pidfd_send_signal(&descriptor, Signal::KILL).is_ok();
            }
        }
        found
    }

    fn is_on(self, process: Pid) -> bool {
        let limits = fs::read_to_string(format!("/proc/{}/limits", process.as_raw_nonzero()));
        limits.is_ok_and(|limits| of(&limits) == Some(self))
    }
}

/// The mark that a process's limits show.
fn of(limits: &str) -> Option<Mark> {
    let line = limits.lines().find_map(|line| line.strip_prefix(LINE))?;
    line.split_whitespace().nth(1)?.parse().ok().map(Mark)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_read_from_the_hard_limit() {
        let limits = "Limit                     Soft Limit           Hard Limit           Units     \n\
                      Max realtime priority     0                    0                    \n\
                      Max realtime timeout      4611686018427387900  4611686018427387901  us        \n";
        assert_eq!(of(limits), Some(Mark(4_611_686_018_427_387_901)));
        assert_eq!(
            of("Max realtime timeout      unlimited            unlimited            us"),
            None
        );
        assert_eq!(of(""), None);
    }

    #[test]
    fn no_two_commands_have_the_same() {
        assert_ne!(Mark::fresh(), Mark::fresh());
    }
}
