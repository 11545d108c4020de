//! What can be asked of a sandbox that runs, and done to it: its use of the machine, freezing and thawing.

use std::{collections::HashMap, io, path::Path, sync::Arc};

use nix::sys::statvfs::statvfs;
use sandgate_api::id::SandboxId;

use super::{LocalBackend, Shared, blocking, failed, network};
use crate::backend::{BackendError, Reading};

impl LocalBackend {
    /// What a sandbox has used; none when it is not there, or cannot be asked.
    pub async fn reading(&self, id: &SandboxId) -> Option<Reading> {
        let index = self.shared.leases.get(id)?.record.ifindex;
        let traffic = network::traffic(&self.shared.layout.router(), Some(index)).await;
        let traffic = traffic.inspect_err(|error| {
            tracing::debug!(sandbox_id = %id, %error, "a sandbox's traffic is not known");
        });
        let (shared, id) = (Arc::clone(&self.shared), id.clone());
        let counted = traffic.ok()?.remove(&index)?;
        tokio::task::spawn_blocking(move || shared.reading(&id, counted))
            .await
            .ok()?
            .ok()
    }

    /// What these sandboxes have used, of those that can be asked.
    ///
    /// # Errors
    /// When the kernel does not say what crossed their interfaces.
    pub async fn readings(&self, ids: Vec<SandboxId>) -> Result<HashMap<SandboxId, Reading>, BackendError> {
        let mut traffic = network::traffic(&self.shared.layout.router(), None)
            .await
            .map_err(|error| failed("reading interfaces", error))?;
        let shared = Arc::clone(&self.shared);
        let read = tokio::task::spawn_blocking(move || {
            let found = ids.into_iter().filter_map(|id| {
                let index = shared.leases.get(&id)?.record.ifindex;
                let reading = shared.reading(&id, traffic.remove(&index)?).ok()?;
                Some((id, reading))
            });
            found.collect()
        });
        read.await
            .map_err(|error| failed("reading control groups", error))
    }

    /// Stops every process of a sandbox where it stands; returns when all do.
    ///
    /// # Errors
    /// When they do not. They go on then.
    pub async fn freeze(&self, id: &SandboxId) -> Result<(), BackendError> {
        let group = self.shared.layout.cgroup(id.as_str());
        self.in_turn("freeze", id, async move |shared: Arc<Shared>| {
            let cgroups = shared.machine.cgroups.clone();
            blocking("freezing the sandbox", move || cgroups.freeze(&group)).await
        })
        .await
    }

    /// Lets them go on. Doing it again is no error.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub async fn thaw(&self, id: &SandboxId) -> Result<(), BackendError> {
        let group = self.shared.layout.cgroup(id.as_str());
        self.in_turn("thaw", id, async move |shared: Arc<Shared>| {
            let cgroups = shared.machine.cgroups.clone();
            blocking("letting the sandbox go on", move || cgroups.thaw(&group)).await
        })
        .await
    }
}

impl Shared {
    fn reading(&self, id: &SandboxId, (sent, received): (u64, u64)) -> io::Result<Reading> {
        let usage = self.machine.cgroups.usage(&self.layout.cgroup(id.as_str()))?;
        let (disk_bytes, disk_limit) = filled(&self.layout.mount(id.as_str()))?;
        Ok(Reading {
            cpu: usage.cpu,
            memory_bytes: usage.memory_bytes,
            processes: usage.processes,
            disk_bytes,
            disk_limit,
            sent_bytes: sent,
            received_bytes: received,
        })
    }
}

/// How much of a file system is used, and how much there is, in bytes.
fn filled(mount_point: &Path) -> io::Result<(u64, u64)> {
    let stat = statvfs(mount_point)?;
    let (all, free) = (stat.blocks(), stat.blocks_free());
    let size = stat.fragment_size();
    Ok((
        all.saturating_sub(free).saturating_mul(size),
        all.saturating_mul(size),
    ))
}
