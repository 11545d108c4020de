//! What exists on the node because of Sandgate: processes, mounts, control groups, loop devices, files.
//! Judged from outside, so that nothing is forgotten because the programs forgot it.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use super::Node;

/// Where control groups are mounted, in every version.
const CGROUPS: &str = "/sys/fs/cgroup";

/// A process of the node, as seen outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Its number outside.
    pub pid: u32,
    /// Its numbers in the namespaces it lives in, outermost first.
    pub numbers: Vec<u32>,
    /// Its arguments.
    pub command: Vec<String>,
    /// Its control groups, one line per hierarchy.
    pub cgroups: String,
}

impl Process {
    /// Its program and what it is told to do: `controller serve`.
    pub fn name(&self) -> String {
        let path = self.command.first().map(Path::new);
        let name = path
            .and_then(Path::file_name)
            .unwrap_or_default()
            .to_string_lossy();
        let argument = self.command.get(1).filter(|word| !word.starts_with('-'));
        argument.map_or_else(
            || name.clone().into_owned(),
            |argument| format!("{name} {argument}"),
        )
    }

    /// It runs this program, with this first argument if one is given.
    pub fn is(&self, program: &str, argument: Option<&str>) -> bool {
        let name = self.command.first().and_then(|path| Path::new(path).file_name());
        name.is_some_and(|name| name == program)
            && argument.is_none_or(|argument| self.command.get(1).is_some_and(|first| first == argument))
    }
}

impl Node {
    /// Every process of the node but its init (and what that waits for).
    pub fn processes(&self) -> Vec<Process> {
        let init = self.world().init_pid();
        // (pid, parent) of everything that runs.
        let all: Vec<(u32, u32)> = entries("/proc")
            .filter_map(|path| path.file_name()?.to_str()?.parse().ok())
            .filter_map(|pid: u32| Some((pid, status_field(pid, "PPid:")?.parse().ok()?)))
            .collect();
        let own = std::process::id();
        let mut family = BTreeSet::from([init]);
        loop {
            let before = family.len();
            family.extend(
                all.iter()
                    .filter(|(_, parent)| family.contains(parent))
                    .map(|(pid, _)| *pid)
                    .collect::<Vec<_>>(),
            );
            // Programs the harness itself starts on the node are its own children there.
            family.extend(
                all.iter()
                    .filter(|&&(pid, parent)| parent == own && self.lives_here(pid))
                    .map(|(pid, _)| *pid),
            );
            if family.len() == before {
                break;
            }
        }
        family.remove(&init);
        family
            .into_iter()
            .filter_map(read)
            .filter(|process| !process.is("sleep", Some("1000")))
            .collect()
    }

    fn lives_here(&self, pid: u32) -> bool {
        let space = |pid: u32| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
        space(pid).is_some() && space(pid) == space(self.world().init_pid())
    }

    /// The processes of one sandbox.
    pub fn processes_of(&self, sandbox: &str) -> Vec<Process> {
        let mut processes = self.processes();
        processes.retain(|process| process.cgroups.contains(sandbox));
        processes
    }

    /// What exists because of one sandbox: one line each.
    pub fn traces_of(&self, sandbox: &str) -> Vec<String> {
        let mut traces = self.traces();
        traces.retain(|trace| trace.contains(sandbox));
        traces.extend(
            self.processes_of(sandbox)
                .into_iter()
                .map(|process| format!("process {process:?}")),
        );
        traces.extend(
            files_named(self.world().directory(), sandbox)
                .into_iter()
                .map(|path| format!("file {}", path.display())),
        );
        traces
    }

    /// What exists because of the instance beyond files and its own programs: one line each.
    pub fn traces(&self) -> Vec<String> {
        let own = [self.run_dir(), self.data_dir()];
        let is_own = |path: &str| own.iter().any(|directory| Path::new(path).starts_with(directory));
        let mounts = fs::read_to_string(self.world().node().task().join("mountinfo")).unwrap_or_default();
        // The fifth field is the mount point.
        let points = mounts
            .lines()
            .filter_map(|line| line.split(' ').nth(4))
            .filter(|point| is_own(point));
        let mut traces: Vec<String> = points.map(|point| format!("mount {point}")).collect();
        for device in entries("/sys/block") {
            if let Ok(file) = fs::read_to_string(device.join("loop/backing_file"))
                && is_own(&file)
            {
                traces.push(format!("loop {} {}", device.display(), file.trim()));
            }
        }
        let instance = self
            .run_dir()
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or("?")
            .to_owned();
        traces.extend(
            cgroups_named(&format!("{instance}-"))
                .into_iter()
                .map(|path| format!("cgroup {}", path.display())),
        );
        // Sandboxes of another instance are its own affair.
        let is_foreign = |process: &Process| {
            process.cgroups.contains("/sandgate/") && !process.cgroups.contains(&format!("/{instance}-"))
        };
        let processes = self.processes().into_iter().filter(|process| {
            !super::PROGRAMS.iter().any(|name| process.is(name, None))
                && !is_foreign(process)
                && !is_commanded(process)
                && !is_gone(process)
        });
        traces.extend(processes.map(|process| format!("process {process:?}")));
        traces
    }
}

/// A running netd waits for it: it sets the network up and ends at once. Also that of another instance on the same node,
/// which looks whenever the node's firewall changes.
fn is_commanded(process: &Process) -> bool {
    let parent = status_field(process.pid, "PPid:").and_then(|number| number.parse().ok());
    ["ip", "nft", "tc"].iter().any(|name| process.is(name, None))
        && parent
            .and_then(read)
            .is_some_and(|parent| parent.is("netd", None))
}

/// It has ended since it was read: what was told of it may be true no more.
fn is_gone(process: &Process) -> bool {
    read(process.pid).is_none_or(|now| now.numbers != process.numbers)
}

/// Last resort of a teardown: control groups outlive their processes and have no owner.
pub(super) fn remove_cgroups(instance: &Path) {
    let Some(name) = instance.file_name().and_then(|name| name.to_str()) else {
        return;
    };
    let mut groups = cgroups_named(&format!("{name}-"));
    // The deepest first.
    groups.sort_by_key(|path| std::cmp::Reverse(path.components().count()));
    for group in groups {
        fs::remove_dir(group).ok();
    }
}

/// Control groups with `name` in their path.
fn cgroups_named(name: &str) -> Vec<PathBuf> {
    let mut found = files_named(Path::new(CGROUPS), name);
    found.retain(|path| path.is_dir());
    found
}

/// Files and directories below `root` with `name` in a component of their path below it.
fn files_named(root: &Path, name: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![(root.to_owned(), false)];
    while let Some((directory, inside)) = open.pop() {
        for path in entries(&directory) {
            let here = inside
                || path
                    .file_name()
                    .is_some_and(|file| file.to_string_lossy().contains(name));
            if here {
                found.push(path.clone());
            }
            if path.is_dir() && !path.is_symlink() {
                open.push((path, here));
            }
        }
    }
    found
}

fn entries(directory: impl AsRef<Path>) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(directory)
        .into_iter()
        .flatten()
        .filter_map(Result::ok)
        .map(|entry| entry.path())
}

fn status_field(pid: u32, field: &str) -> Option<String> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    Some(line.trim().to_owned())
}

/// `None` when it is gone or about to be.
fn read(pid: u32) -> Option<Process> {
    if status_field(pid, "State:")?.starts_with('Z') {
        return None;
    }
    let numbers = status_field(pid, "NSpid:")?
        .split_whitespace()
        .filter_map(|number| number.parse().ok())
        .collect();
    let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let command = command.split(|&byte| byte == 0).filter(|part| !part.is_empty());
    let command = command
        .map(|part| String::from_utf8_lossy(part).into_owned())
        .collect();
    let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    Some(Process {
        pid,
        numbers,
        command,
        cgroups,
    })
}
