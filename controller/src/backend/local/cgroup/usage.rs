//! What a group has used.

use std::{fs, io, path::Path, time::Duration};

use super::{Cgroups, MOUNT, Version, read};

/// What a group has used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::backend::local) struct Usage {
    /// Processor time of all its processes since it was made, those that have ended included.
    pub(in crate::backend::local) cpu: Duration,
    /// Memory at present, without pages of files that nobody has used for a while.
    pub(in crate::backend::local) memory_bytes: u64,
    /// Processes and threads at present.
    pub(in crate::backend::local) processes: u64,
}

impl Cgroups {
    /// What the group has used.
    pub(in crate::backend::local) fn usage(&self, group: &Path) -> io::Result<Usage> {
        match &self.version {
            Version::Two => {
                let group = Path::new(MOUNT).join(group);
                let cpu = read(&group.join("cpu.stat"))?;
                let stat = read(&group.join("memory.stat"))?;
                Ok(Usage {
                    cpu: Duration::from_micros(field(&cpu, "usage_usec")?),
                    memory_bytes: whole(&group.join("memory.current"))?
                        .saturating_sub(field(&stat, "inactive_file")?),
                    processes: whole(&group.join("pids.current"))?,
                })
            }
            Version::One {
                memory,
                pids,
                accounting,
                ..
            } => {
                let memory = memory.join(group);
                let stat = fs::read_to_string(memory.join("memory.stat"))?;
                Ok(Usage {
                    cpu: Duration::from_nanos(whole(&accounting.join(group).join("cpuacct.usage"))?),
                    memory_bytes: whole(&memory.join("memory.usage_in_bytes"))?
                        .saturating_sub(field(&stat, "total_inactive_file")?),
                    processes: whole(&pids.join(group).join("pids.current"))?,
                })
            }
        }
    }
}

fn whole(path: &Path) -> io::Result<u64> {
    let text = read(path)?;
    text.parse()
        .map_err(|_other| io::Error::other(format!("{} has `{text}`", path.display())))
}

/// A line `name value` of a file of such lines.
fn field(text: &str, name: &str) -> io::Result<u64> {
    let mut lines = text.lines().filter_map(|line| line.split_once(' '));
    lines
        .find(|(found, _)| *found == name)
        .and_then(|(_, value)| value.parse().ok())
        .ok_or_else(|| io::Error::other(format!("no `{name}`")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_found_by_its_whole_name() {
        let text = "inactive_file 7\ntotal_inactive_file 9\ncache x\n";
        assert_eq!(field(text, "inactive_file").ok(), Some(7));
        assert_eq!(field(text, "total_inactive_file").ok(), Some(9));
        assert!(field(text, "file").is_err());
        assert!(field(text, "cache").is_err());
    }
}
