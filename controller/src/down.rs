//! `controller down`: nothing of this instance is left but its database and its images.

use std::{
    fs,
    os::unix::ffi::OsStringExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use jiff::Timestamp;
use rustix::mount::{UnmountFlags, unmount};

use crate::{app, backend::LocalBackend, config::Config, lifecycle::Cause, store::Store, up::InstanceLock};

/// Takes every sandbox away, then what netd left: the uplink and what it changed in the node's network, the router
/// namespace, the pins that kept its programs in the kernel, and the routes of tunnels.
///
/// # Errors
/// When the instance runs, or something could not be taken away; calling it again goes on.
pub fn run(config: Config) -> Result<()> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "`controller down` must run as root"
    );
    if !config.run_dir.exists() && !config.data_dir.exists() {
        return Ok(());
    }
    app::make_directory(&config.run_dir)?;
    app::make_directory(&config.data_dir)?;
    let _locks = InstanceLock::take(&config)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("starting")?;
    runtime.block_on(take_sandboxes_away(&config))?;
    take_uplink_away(&config)?;
    for mount_point in mounts_below(&config.run_dir)? {
        unmount(&mount_point, UnmountFlags::DETACH)
            .with_context(|| format!("unmounting {}", mount_point.display()))?;
    }
    for name in ["netns", "bpf", "netd", "tunnel-proxy"] {
        let path = config.run_dir.join(name);
        match fs::remove_dir_all(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("removing {}", path.display()));
            }
            Ok(()) | Err(_) => {}
        }
    }
    tracing::info!(run_dir = %config.run_dir.display(), "everything of this instance is taken away");
    Ok(())
}

/// What netd made or changed in the node's own network. While the router namespace stands, for that is where the other
/// end is.
fn take_uplink_away(config: &Config) -> Result<()> {
    if !config.run_dir.join("netd").exists() {
        return Ok(());
    }
    let netd = app::beside("netd")?;
    let done = Command::new(&netd)
        .arg("--remove-uplink")
        .arg("--run-dir")
        .arg(&config.run_dir)
        .output()
        .with_context(|| format!("running {}", netd.display()))?;
    ensure!(
        done.status.success(),
        "the node's network is not as it was: {}",
        String::from_utf8_lossy(&done.stderr).trim()
    );
    Ok(())
}

async fn take_sandboxes_away(config: &Config) -> Result<()> {
    let backend = LocalBackend::open(app::local_config(config)?)
        .await
        .context("opening the backend")?;
    for found in backend.inventory().await.context("looking for sandboxes")? {
        tracing::info!(sandbox_id = %found.sandbox_id, "taking a sandbox away");
        backend
            .destroy(&found.sandbox_id)
            .await
            .with_context(|| format!("taking {} away", found.sandbox_id))?;
    }
    backend.remove_instance();
    if config.database.exists() {
        let store = app::open_store(&config.database).await?;
        close_records(&store)
            .await
            .context("recording the end of sandboxes")?;
        store.close().await;
    }
    Ok(())
}

async fn close_records(store: &Store) -> Result<()> {
    let cause = Cause::Stopped;
    for record in store.live_sandboxes().await? {
        store.withdraw(&record.id).await?;
        store
            .finish(&record.id, cause.status(), Some(cause.reason()), Timestamp::now())
            .await?;
    }
    for member in store.pooled().await? {
        store.withdraw_pooled(&member.id).await?;
        store.forget_pooled(&member.id).await?;
    }
    Ok(())
}

/// Mount points below a directory, the deepest and latest first.
fn mounts_below(directory: &Path) -> Result<Vec<PathBuf>> {
    let table = fs::read_to_string("/proc/self/mountinfo").context("reading the mount table")?;
    let mut mounts: Vec<PathBuf> = table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(unescaped)
        .filter(|mount_point| mount_point != directory && mount_point.starts_with(directory))
        .collect();
    mounts.reverse();
    Ok(mounts)
}

/// The kernel writes space, tab, newline and backslash as three octal digits (proc_pid_mountinfo(5)).
fn unescaped(text: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        if let (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', after @ ..]) = (first, tail) {
            bytes.push((a - b'0') * 64 + (b - b'0') * 8 + (c - b'0'));
            rest = after;
        } else {
            bytes.push(*first);
            rest = tail;
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_point_is_read_as_the_kernel_writes_it() {
        for (written, meant) in [
            ("/run/sandgate/bpf", "/run/sandgate/bpf"),
            ("/a\\040b", "/a b"),
            ("/a\\134b", "/a\\b"),
            ("/a\\9", "/a\\9"),
        ] {
            assert_eq!(unescaped(written), Path::new(meant), "{written}");
        }
    }

    #[test]
    fn only_what_is_below_is_found() {
        assert!(
            mounts_below(Path::new("/"))
                .expect("mounts")
                .iter()
                .all(|path| path != Path::new("/"))
        );
        assert!(mounts_below(Path::new("/pro")).expect("mounts").is_empty());
        assert!(!mounts_below(Path::new("/")).expect("mounts").is_empty());
    }
}
