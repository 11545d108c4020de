//! `controller become`: the first thing every child is.
//!
//! It ties itself to its parent's life and then becomes the program it is to be. A death signal survives
//! `execve` (`prctl(2)`, PR_SET_PDEATHSIG), so the program itself needs to know nothing of it.

use std::{ffi::OsString, os::unix::process::CommandExt as _, process::Command};

use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};

/// What to become.
#[derive(Debug, clap::Args)]
pub struct Become {
    /// The parent's process id.
    #[arg(long)]
    parent: i32,
    /// The program and its arguments.
    #[arg(last = true, required = true)]
    program: Vec<OsString>,
}

impl Become {
    /// Comes back only when it fails.
    pub fn run(self) -> anyhow::Error {
        if let Err(error) = set_parent_process_death_signal(Some(Signal::KILL)) {
            return anyhow::Error::new(error).context("asking for the parent's death signal");
        }
        // The parent may have died before the signal was asked for.
        if getppid().map(Pid::as_raw_nonzero).map(std::num::NonZero::get) != Some(self.parent) {
            return anyhow::anyhow!("the parent is gone");
        }
        let [program, arguments @ ..] = self.program.as_slice() else {
            return anyhow::anyhow!("no program to become");
        };
        let error = Command::new(program).args(arguments).exec();
        anyhow::Error::new(error).context(format!("becoming {}", program.display()))
    }
}
