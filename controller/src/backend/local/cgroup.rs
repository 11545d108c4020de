//! Control groups: which kind this machine has, whether limits are really set, and taking them away.
//!
//! The runtime makes them. On a hybrid machine (version 1 hierarchies beside an empty version 2) the version 1
//! hierarchies hold the controllers.

use std::{
    fs, io,
    path::{Path, PathBuf},
    thread::sleep,
    time::{Duration, Instant},
};

use nix::{
    sys::{
        signal::{Signal, kill},
        statfs::{CGROUP2_SUPER_MAGIC, statfs},
    },
    unistd::{Pid, SysconfVar, sysconf},
};

mod freezer;
mod usage;

const MOUNT: &str = "/sys/fs/cgroup";
/// How long killed processes may take to leave their group.
const EMPTY: Duration = Duration::from_secs(10);
/// How often the groups' parents are tried to be made while other instances take them away.
const PARENT_ATTEMPTS: u32 = 16;
/// The CPU quota's period, in microseconds.
pub(super) const PERIOD: u64 = 100_000;

/// The machine's control groups.
#[derive(Debug, Clone)]
pub(super) struct Cgroups {
    version: Version,
    /// Every hierarchy's mount point.
    hierarchies: Vec<PathBuf>,
}

#[derive(Debug, Clone)]
enum Version {
    /// One hierarchy.
    Two,
    /// The hierarchies of the controllers that count.
    One {
        memory: PathBuf,
        cpu: PathBuf,
        pids: PathBuf,
        /// Of processor time that was used.
        accounting: PathBuf,
        /// Without it, nothing can be paused.
        freezer: Option<PathBuf>,
    },
}

/// What must be set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Limits {
    pub(super) memory_bytes: u64,
    pub(super) cpu_millis: u64,
    pub(super) pids: u64,
}

impl Limits {
    /// CPU time in microseconds per [`PERIOD`].
    pub(super) fn quota(self) -> u64 {
        self.cpu_millis.saturating_mul(PERIOD) / 1000
    }
}

impl Cgroups {
    /// Looks at what is mounted.
    pub(super) fn detect() -> io::Result<Self> {
        if statfs(MOUNT)?.filesystem_type() == CGROUP2_SUPER_MAGIC {
            return Ok(Self {
                version: Version::Two,
                hierarchies: vec![MOUNT.into()],
            });
        }
        let mounts = hierarchies(&fs::read_to_string("/proc/self/mountinfo")?);
        let with = |controller: &str| {
            let found = mounts
                .iter()
                .find(|(_, options)| options.iter().any(|option| option == controller));
            found.map(|(path, _)| path.clone()).ok_or_else(|| {
                io::Error::other(format!(
                    "no control group hierarchy with the `{controller}` controller"
                ))
            })
        };
        let version = Version::One {
            memory: with("memory")?,
            cpu: with("cpu")?,
            pids: with("pids")?,
            accounting: with("cpuacct")?,
            freezer: with("freezer").ok(),
        };
        Ok(Self {
            version,
            hierarchies: mounts.into_iter().map(|(path, _)| path).collect(),
        })
    }

    /// Whether memory and swap are limited together (version 1 knows no swap limit without accounting).
    pub(super) fn limits_swap(&self) -> bool {
        match &self.version {
            Version::Two => true,
            Version::One { memory, .. } => memory.join("memory.memsw.limit_in_bytes").exists(),
        }
    }

    /// Checks that the kernel has the limits: a runtime that leaves one out must not go unnoticed.
    pub(super) fn verify(&self, group: &Path, limits: Limits) -> io::Result<()> {
        let (memory, cpu, pids) = match &self.version {
            Version::Two => {
                let group = Path::new(MOUNT).join(group);
                let cpu = read(&group.join("cpu.max"))?;
                let quota = cpu.split(' ').next().unwrap_or_default().to_owned();
                (
                    read(&group.join("memory.max"))?,
                    quota,
                    read(&group.join("pids.max"))?,
                )
            }
            Version::One {
                memory, cpu, pids, ..
            } => (
                read(&memory.join(group).join("memory.limit_in_bytes"))?,
                read(&cpu.join(group).join("cpu.cfs_quota_us"))?,
                read(&pids.join(group).join("pids.max"))?,
            ),
        };
        // The kernel rounds memory down to pages.
        let page = sysconf(SysconfVar::PAGE_SIZE)?
            .and_then(|size| size.try_into().ok())
            .unwrap_or(4096_u64);
        let wanted = [limits.memory_bytes / page * page, limits.quota(), limits.pids];
        for (name, wanted, found) in [
            ("memory", wanted[0], memory),
            ("CPU", wanted[1], cpu),
            ("process", wanted[2], pids),
        ] {
            if found.parse() != Ok(wanted) {
                return Err(io::Error::other(format!(
                    "the {name} limit is `{found}` instead of {wanted}"
                )));
            }
        }
        Ok(())
    }

    /// Kills everything in the group and removes it.
    pub(super) fn destroy(&self, group: &Path) -> io::Result<()> {
        self.thaw(group)?;
        let deadline = Instant::now() + EMPTY;
        for hierarchy in &self.hierarchies {
            let group = hierarchy.join(group);
            while let Err(error) = fs::remove_dir(&group) {
                match error.raw_os_error() {
                    Some(libc::ENOENT) => break,
                    Some(libc::EBUSY) if Instant::now() < deadline => {}
                    _ => return Err(error),
                }
                kill_members(&group)?;
                sleep(Duration::from_millis(2));
            }
        }
        Ok(())
    }

    /// Names of the groups below `parent`.
    pub(super) fn children(&self, parent: &Path) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for hierarchy in &self.hierarchies {
            let entries = match fs::read_dir(hierarchy.join(parent)) {
                Ok(entries) => entries,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            for entry in entries {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    names.push(entry.file_name().to_string_lossy().into_owned());
                }
            }
        }
        names.sort();
        names.dedup();
        Ok(names)
    }

    /// Makes the parents of an instance's groups in every hierarchy. They stay for as long as the instance exists, so
    /// that the topmost, which all instances share, is never empty while one of them makes something in it.
    pub(super) fn make_parents(&self, parent: &Path) -> io::Result<()> {
        for hierarchy in &self.hierarchies {
            let group = hierarchy.join(parent);
            let mut attempts = 0;
            while let Err(error) = fs::create_dir_all(&group) {
                // Another instance has removed the shared parent between the two steps.
                if error.kind() != io::ErrorKind::NotFound || attempts == PARENT_ATTEMPTS {
                    let message = format!("making {}: {error}", group.display());
                    return Err(io::Error::new(error.kind(), message));
                }
                attempts += 1;
            }
        }
        Ok(())
    }

    /// Removes the empty parents of an instance's groups. Those still in use stay.
    pub(super) fn remove_parents(&self, parent: &Path) {
        for hierarchy in &self.hierarchies {
            for level in parent.ancestors().filter(|level| !level.as_os_str().is_empty()) {
                let _in_use = fs::remove_dir(hierarchy.join(level));
            }
        }
    }
}

fn kill_members(group: &Path) -> io::Result<()> {
    // Version 2 kills them all at once, also those being forked.
    if fs::write(group.join("cgroup.kill"), "1").is_ok() {
        return Ok(());
    }
    let members = match fs::read_to_string(group.join("cgroup.procs")) {
        Ok(members) => members,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for process in members
        .lines()
        .filter_map(|line| line.parse().ok())
        .filter(|process| *process > 1)
    {
        // Gone meanwhile is what was wanted.
        let _gone = kill(Pid::from_raw(process), Signal::SIGKILL);
    }
    Ok(())
}

fn read(path: &Path) -> io::Result<String> {
    let text = fs::read_to_string(path)
        .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
    Ok(text.trim().to_owned())
}

/// Mount points of control groups with their file system's options (proc_pid_mountinfo(5)).
fn hierarchies(mountinfo: &str) -> Vec<(PathBuf, Vec<String>)> {
    let mounts = mountinfo.lines().filter_map(|line| {
        let (mount, file_system) = line.split_once(" - ")?;
        let mut file_system = file_system.split(' ');
        let kind = file_system.next()?;
        if kind != "cgroup" && kind != "cgroup2" {
            return None;
        }
        let options = file_system.nth(1)?.split(',').map(str::to_owned).collect();
        Some((PathBuf::from(mount.split(' ').nth(4)?), options))
    });
    mounts.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hybrid_machines_hierarchies_are_found() {
        let mountinfo = "\
24 1 0:22 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
30 24 0:28 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct
31 24 0:29 / /sys/fs/cgroup/memory rw,nosuid - cgroup cgroup rw,memory
32 24 0:30 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate
";
        let found = hierarchies(mountinfo);
        assert_eq!(found.len(), 3);
        assert_eq!(found[0].0, Path::new("/sys/fs/cgroup/cpu,cpuacct"));
        assert!(found[0].1.contains(&"cpu".to_owned()));
    }

    #[test]
    fn a_quota_is_a_share_of_the_period() {
        let limits = Limits {
            memory_bytes: 0,
            cpu_millis: 1500,
            pids: 0,
        };
        assert_eq!(limits.quota(), 150_000);
    }
}
