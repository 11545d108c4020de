//! PID 1 of a sandbox as the node sees it: a process that may end at any moment, and whose number may then
//! belong to another.

use std::{fs, io, os::fd::OwnedFd};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use tokio::io::{Interest, unix::AsyncFd};

/// A process, told from later ones of the same number by its start time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Process {
    number: i32,
    /// Clock ticks after boot (field 22 of proc_pid_stat(5)).
    started: u64,
}

impl Process {
    /// The process that has this number at present.
    pub(super) fn present(number: i32) -> io::Result<Self> {
        let (_, started) = stat(number)?;
        Ok(Self { number, started })
    }

    /// Whether it has not ended. A zombie has.
    pub(super) fn is_alive(self) -> bool {
        stat(self.number).is_ok_and(|(state, started)| started == self.started && !matches!(state, 'Z' | 'X'))
    }

    /// A descriptor of the process; none when it has ended.
    fn open(self) -> io::Result<Option<OwnedFd>> {
        let Some(number) = Pid::from_raw(self.number) else {
            return Ok(None);
        };
        let descriptor = match pidfd_open(number, PidfdFlags::empty()) {
            Ok(descriptor) => descriptor,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        // The start time read now belongs to the process of the descriptor, or that one has ended.
        Ok(self.is_alive().then_some(descriptor))
    }

    /// Kills it.
    pub(super) fn kill(self) -> io::Result<()> {
        match self
            .open()?
            .map(|descriptor| pidfd_send_signal(descriptor, Signal::KILL))
        {
            None | Some(Ok(()) | Err(rustix::io::Errno::SRCH)) => Ok(()),
            Some(Err(error)) => Err(error.into()),
        }
    }

    /// Resolves when it has ended.
    pub(super) async fn ended(self) -> io::Result<()> {
        if let Some(descriptor) = self.open()? {
            // SAFETY: the AsyncFd owns the descriptor, so that it stays open and the same for its life.
            #[expect(unsafe_code, reason = "tokio asks for a promise about the descriptor")]
            let descriptor = unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) }?;
            drop(descriptor.readable().await?);
        }
        Ok(())
    }
}

/// State and start time of a process. Its name may hold anything, spaces and parentheses included.
fn stat(number: i32) -> io::Result<(char, u64)> {
    let text = fs::read_to_string(format!("/proc/{number}/stat"))?;
    let fields = text
        .rsplit_once(") ")
        .map(|(_, rest)| rest.split(' ').collect::<Vec<_>>());
    let parsed = fields.and_then(|fields| {
        let state = fields.first()?.chars().next()?;
        // Field 22; the name was field 2.
        Some((state, fields.get(19)?.parse().ok()?))
    });
    parsed.ok_or_else(|| io::Error::other(format!("/proc/{number}/stat is not understood")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_ended_process_is_told_from_its_number() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::present(i32::try_from(child.id()).unwrap()).unwrap();
        assert!(process.is_alive());
        let later = Process {
            started: process.started + 1,
            ..process
        };
        assert!(!later.is_alive());
        later.kill().unwrap();
        assert!(process.is_alive(), "a process of another start time was killed");
        process.kill().unwrap();
        process.ended().await.unwrap();
        assert!(!process.is_alive());
        child.wait().unwrap();
    }
}
