//! Stopping every process of a group where it stands, and letting them go on.

use std::{
    fs, io,
    path::Path,
    thread::sleep,
    time::{Duration, Instant},
};

use super::{Cgroups, MOUNT, Version, read};

/// How long the kernel may take: a process is frozen when it leaves the kernel, which one that waits for a disk does late.
const FREEZING: Duration = Duration::from_secs(10);

/// How long before looking again.
const STEP: Duration = Duration::from_millis(2);

impl Cgroups {
    /// Freezes every process of the group, and those that come; returns when all stand still.
    pub(in crate::backend::local) fn freeze(&self, group: &Path) -> io::Result<()> {
        let frozen = match &self.version {
            Version::Two => {
                let group = Path::new(MOUNT).join(group);
                fs::write(group.join("cgroup.freeze"), "1")?;
                wait(|| {
                    Ok(read(&group.join("cgroup.events"))?
                        .lines()
                        .any(|line| line == "frozen 1"))
                })
            }
            Version::One { freezer: None, .. } => {
                return Err(io::Error::other(
                    "there is no control group hierarchy with the `freezer` controller",
                ));
            }
            Version::One {
                freezer: Some(freezer),
                ..
            } => {
                let state = freezer.join(group).join("freezer.state");
                wait(|| {
                    // Again and again: a process that forks meanwhile leaves the group half frozen.
                    fs::write(&state, "FROZEN")?;
                    Ok(read(&state)? == "FROZEN")
                })
            }
        };
        // Half of it standing still is worse than nothing.
        frozen.inspect_err(|_late| drop(self.thaw(group)))
    }

    /// Lets them go on. Doing it again is no error, nor is a group that is gone.
    pub(in crate::backend::local) fn thaw(&self, group: &Path) -> io::Result<()> {
        let (file, word) = match &self.version {
            Version::Two => (Path::new(MOUNT).join(group).join("cgroup.freeze"), "0"),
            Version::One { freezer: None, .. } => return Ok(()),
            Version::One {
                freezer: Some(freezer),
                ..
            } => (freezer.join(group).join("freezer.state"), "THAWED"),
        };
        match fs::write(&file, word) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io::Error::new(
                error.kind(),
                format!("{}: {error}", file.display()),
            )),
            Ok(()) | Err(_) => Ok(()),
        }
    }
}

fn wait(is_done: impl Fn() -> io::Result<bool>) -> io::Result<()> {
    let deadline = Instant::now() + FREEZING;
    while !is_done()? {
        if Instant::now() > deadline {
            return Err(io::Error::other("the processes do not stand still"));
        }
        sleep(STEP);
    }
    Ok(())
}
