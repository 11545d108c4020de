//! The namespace as a file: making it, finding it again, taking it away.

use std::{
    fs::{self, File},
    io,
    path::Path,
    thread,
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
    sys::statfs::fstatfs,
};

use super::RouterError;

/// `NSFS_MAGIC` of linux/magic.h: the file system of namespace files.
const NSFS_MAGIC: i64 = 0x6e73_6673;

fn failed<E: Into<io::Error>>(action: &'static str, path: &Path) -> impl FnOnce(E) -> RouterError {
    let path = path.to_owned();
    move |source| RouterError::File {
        action,
        path,
        source: source.into(),
    }
}

/// The namespace bound at `path`; `None` when nothing is bound there.
pub(super) fn adopt(path: &Path) -> Result<Option<File>, RouterError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed("open", path)(error)),
    };
    let kind = fstatfs(&file).map_err(failed("statfs", path))?.filesystem_type();
    Ok((kind.0 == NSFS_MAGIC).then_some(file))
}

/// Makes a network namespace and binds it at `path`.
pub(super) fn create(path: &Path) -> Result<File, RouterError> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(failed("create", parent))?;
    }
    drop(File::create(path).map_err(failed("create", path))?);
    on_thread_of_its_own(|| {
        mount(
            Some("/proc/thread-self/ns/net"),
            path,
            None::<&str>,
            MsFlags::MS_BIND,
            None::<&str>,
        )
        .map_err(failed("bind the namespace at", path))
    })?;
    File::open(path).map_err(failed("open", path))
}

/// Runs a closure on a thread in a network namespace of its own, which ends with the thread unless somebody holds it.
pub(super) fn on_thread_of_its_own<T: Send>(
    work: impl FnOnce() -> Result<T, RouterError> + Send,
) -> Result<T, RouterError> {
    thread::scope(|scope| {
        thread::Builder::new()
            .name("router-new".to_owned())
            .spawn_scoped(scope, || {
                // Only this thread leaves the process's namespace, and it ends here.
                unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| RouterError::Enter(errno.into()))?;
                work()
            })
            .map_err(RouterError::Enter)?
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Unbinds whatever is bound at `path` and removes the file.
pub(super) fn remove(path: &Path) -> Result<(), RouterError> {
    while adopt(path)?.is_some() {
        umount2(path, MntFlags::MNT_DETACH).map_err(failed("unmount", path))?;
    }
    match fs::remove_file(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(failed("remove", path)(error)),
    }
}
