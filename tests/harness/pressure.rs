//! What a machine may run out of, for one program alone: room in a directory, and memory.

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, Result, bail};

use crate::{namespace::Namespace, node::Process, world::World};

/// Where control groups are mounted.
const CGROUPS: &str = "/sys/fs/cgroup";

/// A directory of the node with little room of its own.
pub struct Tight {
    place: Arc<Namespace>,
    directory: PathBuf,
    seen: PathBuf,
}

impl Tight {
    /// Puts a file system of `kib` KiB over a directory of the node, which is made.
    ///
    /// # Errors
    /// When it cannot be mounted.
    pub fn mount(world: &World, directory: &Path, kib: u64) -> Result<Self> {
        fs::create_dir_all(directory)?;
        let (options, shown) = (format!("size={kib}k,mode=700"), directory.display().to_string());
        world
            .node()
            .command("mount", &["-t", "tmpfs", "-o", &options, "tight", &shown])?;
        // The node's mounts are seen by nobody else.
        let root = world.node().task().join("root");
        Ok(Self {
            place: Arc::clone(world.place()),
            directory: directory.to_owned(),
            seen: root.join(directory.strip_prefix("/").unwrap_or(directory)),
        })
    }

    /// Takes what room there is.
    ///
    /// # Errors
    /// When there is no end to it.
    pub fn fill(&self) -> Result<()> {
        let mut file = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.filler())?;
        // Large pieces first, then what is left byte by byte.
        for size in [1 << 20, 4096, 1] {
            let piece = vec![b'x'; size];
            for _ in 0..100_000 {
                match file.write(&piece) {
                    Ok(_) => {}
                    Err(error) if error.kind() == std::io::ErrorKind::StorageFull => break,
                    Err(error) => return Err(error).context("filling a file system"),
                }
            }
        }
        match file.write(b"x") {
            Err(error) if error.kind() == std::io::ErrorKind::StorageFull => Ok(()),
            other => bail!("it is not full: {other:?}"),
        }
    }

    /// Gives the room back.
    ///
    /// # Errors
    /// When it was not taken.
    pub fn free(&self) -> Result<()> {
        Ok(fs::remove_file(self.filler())?)
    }

    /// A file in it, as seen from here.
    pub fn file(&self, name: &str) -> PathBuf {
        self.seen.join(name)
    }

    fn filler(&self) -> PathBuf {
        self.seen.join("filler")
    }
}

impl Drop for Tight {
    fn drop(&mut self) {
        // Detached: programs may still be about to leave it.
        let shown = self.directory.display().to_string();
        self.place.command("umount", &["--lazy", &shown]).ok();
    }
}

/// A control group in which memory is short.
pub struct Pinch {
    group: PathBuf,
    /// The files of version 1 are called otherwise.
    is_old: bool,
}

impl Pinch {
    /// Makes the group.
    ///
    /// # Errors
    /// When this machine has no memory controller that could be used.
    pub fn new(bytes: u64) -> Result<Self> {
        let old = Path::new(CGROUPS).join("memory");
        let is_old = old.is_dir();
        let parent = if is_old { old } else { PathBuf::from(CGROUPS) };
        let group = parent.join(format!("pinch-{}", std::process::id()));
        fs::create_dir_all(&group).with_context(|| group.display().to_string())?;
        let pinch = Self { group, is_old };
        let limit = if is_old {
            "memory.limit_in_bytes"
        } else {
            "memory.max"
        };
        pinch.write(limit, &bytes.to_string())?;
        Ok(pinch)
    }

    /// Has a process take what it needs from here on out of the group. What it has already counts elsewhere.
    ///
    /// # Errors
    /// When there is no such process.
    pub fn hold(&self, process: &Process) -> Result<()> {
        self.write("cgroup.procs", &process.pid.to_string())
    }

    /// How often the kernel has killed for want of memory.
    ///
    /// # Errors
    /// When it does not tell.
    pub fn kills(&self) -> Result<u64> {
        let file = if self.is_old {
            "memory.oom_control"
        } else {
            "memory.events"
        };
        let text = fs::read_to_string(self.group.join(file)).context(file)?;
        let kills = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        Ok(kills.context("no oom_kill")?.trim().parse()?)
    }

    fn write(&self, file: &str, value: &str) -> Result<()> {
        let path = self.group.join(file);
        fs::write(&path, value).with_context(|| format!("{value} into {}", path.display()))
    }
}

impl Drop for Pinch {
    fn drop(&mut self) {
        fs::remove_dir(&self.group).ok();
    }
}
