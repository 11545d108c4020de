//! Writable layers: a sparse ext4 image of a promised size, loop-mounted.
//!
//! The sizes are a budget. A loop image on a full file system corrupts itself and takes everything else on that
//! file system with it, so no more is ever promised than could be written at once beside the reserve.

use std::{
    collections::HashMap,
    ffi::OsStr,
    fs::{self, File, OpenOptions, Permissions},
    io,
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, chown},
    path::{Path, PathBuf},
    process::Stdio,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
};
use tokio::{process::Command, time::timeout};

use super::{layout::Layout, loopdev};

/// Smallest layer: ext4's own tables and something to write.
pub(super) const SMALLEST: u64 = 16 * 1024 * 1024;
/// Longest time that making a file system may take.
const FORMAT: Duration = Duration::from_secs(60);
/// How long the kernel may take to let go of a loop device after its last mount.
const RELEASE: Duration = Duration::from_secs(5);
/// Directories of a layer, and their permission bits.
const FOLDERS: [(&str, u32); 2] = [("workspace", 0o755), ("tmp", 0o1777)];

/// How much was promised to whom.
#[derive(Debug)]
pub(super) struct Budget {
    reserve: u64,
    promised: Mutex<HashMap<String, u64>>,
}

/// The promise would not fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Overdrawn {
    pub(super) wanted: u64,
    pub(super) left: u64,
}

impl Budget {
    /// A budget that keeps `reserve` bytes for others, with what layers of earlier processes were promised.
    pub(super) fn open(layout: &Layout, reserve: u64) -> io::Result<Self> {
        let mut promised = HashMap::new();
        for entry in fs::read_dir(layout.layers())? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if let Ok(disk) = fs::metadata(layout.disk(&name)) {
                promised.insert(name, disk.len());
            }
        }
        Ok(Self {
            reserve,
            promised: Mutex::new(promised),
        })
    }

    /// Promises `bytes` to `name`, if they could all be written beside all that is promised already.
    pub(super) fn promise(
        &self,
        layout: &Layout,
        name: &str,
        bytes: u64,
    ) -> io::Result<Result<(), Overdrawn>> {
        let mut promised = self.promised.lock().unwrap_or_else(PoisonError::into_inner);
        let file_system = rustix::fs::statvfs(layout.layers())?;
        let available = file_system.f_bavail.saturating_mul(file_system.f_frsize);
        // What a layer has written is gone from `available` already.
        let outstanding: u64 = promised
            .iter()
            .map(|(name, bytes)| {
                let written = fs::metadata(layout.disk(name)).map_or(0, |disk| disk.blocks() * 512);
                bytes.saturating_sub(written)
            })
            .sum();
        let left = available.saturating_sub(outstanding).saturating_sub(self.reserve);
        if bytes > left {
            return Ok(Err(Overdrawn { wanted: bytes, left }));
        }
        promised.insert(name.to_owned(), bytes);
        Ok(Ok(()))
    }

    /// Takes a promise back.
    pub(super) fn release(&self, name: &str) {
        self.promised
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(name);
    }
}

/// Makes the layer of `bytes` and mounts it, with folders that belong to `owner` (user and group).
pub(super) async fn create(layout: &Layout, name: &str, bytes: u64, owner: u32) -> io::Result<()> {
    let disk = layout.disk(name);
    let mount_point = layout.mount(name);
    fs::create_dir_all(layout.layer(name))?;
    fs::set_permissions(layout.layer(name), Permissions::from_mode(0o700))?;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&disk)?;
    file.set_len(bytes)?;
    format(&disk).await?;
    // Attaching and mounting wait for the kernel, not for other processes; still not on a worker of tokio.
    tokio::task::spawn_blocking(move || mount_layer(&file, &mount_point, owner))
        .await
        .map_err(io::Error::other)?
}

/// Makes an empty ext4 of pages: the loop device has blocks of that size. No journal: a layer does not outlive a crash of its machine, and a journal would be
/// written over and over in a space that somebody else could use. No discard, no zeroing: the file is new.
async fn format(disk: &Path) -> io::Result<()> {
    let mut command = Command::new("mkfs.ext4");
    command.args([
        "-q",
        "-F",
        "-b",
        "4096",
        "-m",
        "0",
        "-i",
        "8192",
        "-O",
        "^has_journal,^resize_inode",
    ]);
    command.args(["-E", "lazy_itable_init=1,nodiscard"]).arg(disk);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let output = timeout(FORMAT, command.output()).await??;
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(format!(
        "mkfs.ext4: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    )))
}

fn mount_layer(file: &File, mount_point: &Path, owner: u32) -> io::Result<()> {
    fs::create_dir_all(mount_point)?;
    let device = loopdev::LoopDevice::attach(file)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOATIME;
    // The kernel would write zeroes over inode tables that are zero already, and so fill the sparse file.
    mount(
        Some(device.path()),
        mount_point,
        Some("ext4"),
        flags,
        Some("noinit_itable"),
    )?;
    fs::set_permissions(mount_point, Permissions::from_mode(0o711))?;
    for (folder, mode) in FOLDERS {
        let folder = mount_point.join(folder);
        fs::create_dir(&folder)?;
        chown(&folder, Some(owner), Some(owner))?;
        fs::set_permissions(&folder, Permissions::from_mode(mode))?;
    }
    Ok(())
}

/// Takes the layer away, however much of it there is.
pub(super) fn destroy(layout: &Layout, name: &str) -> io::Result<()> {
    unmount(&layout.mount(name))?;
    remove(fs::remove_dir(layout.mount(name)))?;
    release_loop(&layout.layer(name))?;
    remove(fs::remove_dir_all(layout.layer(name)))
}

/// Unmounts until nothing is mounted there.
pub(super) fn unmount(target: &Path) -> io::Result<()> {
    loop {
        match umount2(target, MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            // A container that is being made holds a copy for a moment.
            Err(Errno::EBUSY) => umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)?,
            Err(error) => return Err(error.into()),
        }
    }
}

/// Waits until no loop device has a file below `folder`, and detaches those that do not do it by themselves.
fn release_loop(folder: &Path) -> io::Result<()> {
    let deadline = Instant::now() + RELEASE;
    let mut asked = false;
    loop {
        let attached = loopdev::attached_below(folder)?;
        let Some((device, _)) = attached.first() else {
            return Ok(());
        };
        if Instant::now() > deadline {
            return Err(io::Error::other(format!(
                "{} is still attached",
                device.display()
            )));
        }
        if !asked {
            for (device, _) in &attached {
                // A device that has just detached by itself is no longer there to be asked.
                let _detached = loopdev::detach(device);
            }
            asked = true;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Absence is what was wanted.
pub(super) fn remove(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// The layers that have a loop device.
pub(super) fn attached(layout: &Layout) -> io::Result<Vec<String>> {
    let layers = layout.layers();
    let names = loopdev::attached_below(&layers)?
        .into_iter()
        .filter_map(|(_, file): (PathBuf, PathBuf)| {
            let name = file.strip_prefix(&layers).ok()?.components().next()?;
            Some(AsRef::<OsStr>::as_ref(&name).to_string_lossy().into_owned())
        });
    Ok(names.collect())
}
