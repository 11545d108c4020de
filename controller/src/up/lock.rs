//! One instance per run directory and per data directory.

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    path::Path,
};

use anyhow::{Context as _, Result, bail};
use rustix::fs::{FlockOperation, flock};

use crate::config::Config;

/// Held for as long as this program runs; the kernel lets go of it whatever happens.
#[derive(Debug)]
pub struct InstanceLock {
    _run: File,
    _data: File,
}

impl InstanceLock {
    /// Takes both locks.
    ///
    /// # Errors
    /// When another instance has one of them.
    pub fn take(config: &Config) -> Result<Self> {
        Ok(Self {
            _run: lock("SANDGATE_RUN_DIR", &config.run_dir)?,
            _data: lock("SANDGATE_DATA_DIR", &config.data_dir)?,
        })
    }
}

fn lock(variable: &str, directory: &Path) -> Result<File> {
    let path = directory.join("lock");
    let mut file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .with_context(|| format!("{variable}: opening {}", path.display()))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let mut holder = String::new();
            // For the message only.
            let _unread = file.read_to_string(&mut holder);
            bail!(
                "{variable}: {} is in use by another instance (process {})",
                directory.display(),
                holder.trim()
            );
        }
        Err(error) => {
            return Err(io::Error::from(error)).context(format!("{variable}: locking {}", path.display()));
        }
    }
    file.set_len(0)
        .and_then(|()| writeln!(file, "{}", std::process::id()))
        .with_context(|| format!("{variable}: writing {}", path.display()))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_instance_is_refused_and_names_the_first() {
        let directory = tempfile::tempdir().expect("a directory");
        let held = lock("SANDGATE_RUN_DIR", directory.path()).expect("the first");
        let message = lock("SANDGATE_RUN_DIR", directory.path())
            .expect_err("the second")
            .to_string();
        assert!(message.contains("SANDGATE_RUN_DIR"), "{message}");
        assert!(message.contains(&std::process::id().to_string()), "{message}");
        drop(held);
        lock("SANDGATE_RUN_DIR", directory.path()).expect("after the first has ended");
    }
}
