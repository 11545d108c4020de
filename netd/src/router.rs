//! The router namespace: a network namespace of the instance's own, in which netd's listeners and the router ends of
//! all sandbox veths live, so that no host firewall, route or sysctl can disturb them.
//!
//! Owns its creation, adoption and settings (sysctls, addresses, rules, the nftables table that refuses). Never
//! touches the namespace it is started in, and forwards nothing by itself: a packet is for a local socket or it is
//! refused, but for those that [`pass`] sends to the uplink.

use std::{
    fs::File,
    io,
    net::{Ipv4Addr, Ipv6Addr},
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
    thread,
};

use nix::sched::{CloneFlags, setns};

use crate::command::CommandError;

mod namespace;
pub mod pass;
mod settings;

/// Address of the router in every sandbox's eyes; on `lo` of the router namespace.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(
    netd_common::GATEWAY[0],
    netd_common::GATEWAY[1],
    netd_common::GATEWAY[2],
    netd_common::GATEWAY[3],
);

/// The same for IPv6.
pub const GATEWAY6: Ipv6Addr = Ipv6Addr::from_octets(netd_common::GATEWAY6);

/// How many ports the kernel chooses from in the router namespace: all that [`settings`] leaves to it. Every connection
/// into a sandbox holds one.
pub const EPHEMERAL_PORTS: usize = 65_536 - 32_768;

/// Why the router namespace could not be made, entered or set up.
#[derive(Debug, thiserror::Error)]
pub enum RouterError {
    /// A file system operation on the namespace's file.
    #[error("{action} {}: {source}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A thread could not be started or put into the namespace.
    #[error("cannot enter the router namespace: {0}")]
    Enter(#[source] io::Error),
    /// A sysctl that enforcement rests on could not be set.
    #[error("cannot set {name} to {value} in the router namespace: {source}")]
    Sysctl {
        /// Path below /proc/sys.
        name: String,
        /// Wanted value.
        value: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// A command (`nft`, `ip`) failed.
    #[error("in the router namespace: {0}")]
    Command(#[from] CommandError),
}

/// A handle on the router namespace. Closing it destroys nothing: the namespace stays by its file.
#[derive(Debug)]
pub struct RouterNamespace {
    file: File,
    path: PathBuf,
}

impl RouterNamespace {
    /// Adopts the namespace bound at `{run_dir}/netns/router`, or makes it, and applies every setting. Idempotent.
    pub fn open(run_dir: &Path) -> Result<Self, RouterError> {
        let path = run_dir.join("netns").join("router");
        let file = match namespace::adopt(&path)? {
            Some(file) => file,
            None => namespace::create(&path)?,
        };
        let router = Self { file, path };
        router.run(settings::apply)??;
        Ok(router)
    }

    /// Removes the namespace bound below `run_dir`, if there is one. What still lives in it (sockets of other
    /// processes) keeps it until it is gone too. For `controller down` and tests.
    pub fn remove(run_dir: &Path) -> Result<(), RouterError> {
        namespace::remove(&run_dir.join("netns").join("router"))
    }

    /// Makes such a namespace for as long as the call lasts and runs a closure inside it: can it be had?
    ///
    /// # Errors
    /// When it cannot be made, or a setting is not taken.
    pub fn try_out<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T, RouterError> {
        namespace::on_thread_of_its_own(|| {
            settings::apply()?;
            Ok(work())
        })
    }

    /// Where the namespace is bound.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Runs a closure on a thread inside the namespace and returns its result. Sockets it makes stay in the namespace
    /// wherever they are used, and so do processes it starts. Blocks until the closure is done.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, RouterError> {
        thread::scope(|scope| {
            thread::Builder::new()
                .name("router".to_owned())
                .spawn_scoped(scope, || {
                    self.enter()?;
                    Ok(work())
                })
                .map_err(RouterError::Enter)?
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Moves the calling thread into the namespace for good. For threads that serve sockets there.
    pub fn enter(&self) -> Result<(), RouterError> {
        setns(&self.file, CloneFlags::CLONE_NEWNET).map_err(|errno| RouterError::Enter(errno.into()))
    }
}

impl AsFd for RouterNamespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
