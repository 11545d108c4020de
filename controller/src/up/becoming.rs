//! `controller become`: the first thing every child is.
//!
//! It ties itself to its parent's life and then becomes the program it is to be, as another user where asked.
//! A death signal survives `execve` (`prctl(2)`, PR_SET_PDEATHSIG), so the program itself needs to know
//! nothing of it; a change of credentials clears it, so it comes after that.

use std::{
    ffi::{CString, OsStr, OsString},
    os::{
        fd::OwnedFd,
        unix::ffi::{OsStrExt as _, OsStringExt as _},
    },
};

use anyhow::{Context as _, Result, ensure};
use nix::unistd::{Gid, Uid, fexecve, setgroups, setresgid, setresuid};
use rustix::{
    fs::{Mode, OFlags},
    process::{Pid, Signal, getppid, set_parent_process_death_signal},
    thread::{
        CapabilitySet, CapabilitySets, capability_is_in_bounding_set, clear_ambient_capability_set,
        remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
    },
};

/// Numbers above every capability that a kernel of today knows (`capabilities(7)`); those it does not know are
/// skipped.
const CAPABILITIES: u32 = 64;

/// What to become.
#[derive(Debug, clap::Args)]
pub struct Become {
    /// The parent's process id.
    #[arg(long)]
    parent: i32,
    /// User and group id to take on, giving up every capability and every other group.
    #[arg(long)]
    user: Option<u32>,
    /// The program and its arguments.
    #[arg(last = true, required = true)]
    program: Vec<OsString>,
}

impl Become {
    /// Comes back only when it fails.
    pub fn run(self) -> anyhow::Error {
        let Some(program) = self.program.first().cloned() else {
            return anyhow::anyhow!("no program to become");
        };
        match self.try_run(&program) {
            Ok(never) => match never {},
            Err(error) => error.context(format!("becoming {}", program.display())),
        }
    }

    fn try_run(self, program: &OsStr) -> Result<std::convert::Infallible> {
        // Before the user changes: the program may lie where the new one cannot go.
        let file =
            rustix::fs::open(program, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).context("opening it")?;
        if let Some(user) = self.user {
            become_user(user)?;
        }
        set_parent_process_death_signal(Some(Signal::KILL))
            .context("asking for the parent's death signal")?;
        // The parent may have died before the signal was asked for.
        let parent = getppid().map(Pid::as_raw_nonzero).map(std::num::NonZero::get);
        ensure!(parent == Some(self.parent), "the parent is gone");
        execute(&file, self.program)
    }
}

/// Nothing of what root may is left afterwards, and no `execve` brings it back.
fn become_user(id: u32) -> Result<()> {
    ensure!(id != 0, "user 0 gives nothing up");
    for number in 0..CAPABILITIES {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        if capability_is_in_bounding_set(capability).unwrap_or(false) {
            remove_capability_from_bounding_set(capability)
                .with_context(|| format!("taking capability {number} from the bounding set"))?;
        }
    }
    clear_ambient_capability_set().context("clearing the ambient capabilities")?;
    let (uid, gid) = (Uid::from_raw(id), Gid::from_raw(id));
    setgroups(&[]).context("leaving every group")?;
    setresgid(gid, gid, gid).context("changing the group")?;
    setresuid(uid, uid, uid).context("changing the user")?;
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, none).context("giving up the capabilities")?;
    set_no_new_privs(true).context("forbidding new privileges")
}

fn execute(file: &OwnedFd, arguments: Vec<OsString>) -> Result<std::convert::Infallible> {
    let arguments = arguments
        .into_iter()
        .map(|argument| CString::new(argument.into_vec()))
        .collect::<Result<Vec<_>, _>>()
        .context("an argument with a null byte")?;
    let mut environment = Vec::new();
    for (name, value) in std::env::vars_os() {
        let entry = [name.as_bytes(), b"=", value.as_bytes()].concat();
        environment.push(CString::new(entry).context("a variable with a null byte")?);
    }
    Ok(fexecve(file, &arguments, &environment)?)
}
