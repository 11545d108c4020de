//! Finds a sandbox by id, by source address and by the kernel's ordinal.

use std::{
    collections::{HashMap, VecDeque},
    net::IpAddr,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::{Duration, Instant},
};

use sandgate_api::id::SandboxId;

use super::Sandbox;
use crate::audit::passed;

/// Sandboxes that are gone, kept so that what the kernel reports late still finds its owner: denials, which are read several
/// times a second, and flows that have ended, which on a busy node are found one after the other.
const DEPARTED_MAX: usize = 1024;
/// How long they are kept.
const DEPARTED_TIME: Duration = Duration::from_secs(30);
const _: () = assert!(
    DEPARTED_TIME.as_secs() >= 3 * passed::ALL_FOUND.as_secs(),
    "a record of each flow finds its owner, also where looking takes three times as long"
);

/// Every sandbox of this node.
#[derive(Default)]
pub struct Sandboxes {
    index: RwLock<Index>,
}

#[derive(Default)]
struct Index {
    by_id: HashMap<SandboxId, Arc<Sandbox>>,
    by_address: HashMap<IpAddr, Arc<Sandbox>>,
    /// Present and departed ones: ordinals are never used again.
    by_ordinal: HashMap<u32, Arc<Sandbox>>,
    /// The one that left first in front.
    departed: VecDeque<(Instant, u32)>,
}

impl Index {
    /// Forgets departed ones of whom nothing more is expected, and the oldest of more than `most`.
    fn forget_departed(&mut self, most: usize) {
        while let Some((left, ordinal)) = self.departed.front()
            && (left.elapsed() >= DEPARTED_TIME || self.departed.len() > most)
        {
            self.by_ordinal.remove(ordinal);
            self.departed.pop_front();
        }
    }
}

impl Sandboxes {
    /// Adds a sandbox.
    pub fn insert(&self, sandbox: Arc<Sandbox>) {
        let mut index = self.write();
        for address in addresses(&sandbox) {
            index.by_address.insert(address, Arc::clone(&sandbox));
        }
        index
            .by_ordinal
            .insert(sandbox.handle.ordinal, Arc::clone(&sandbox));
        index.by_id.insert(sandbox.id.clone(), sandbox);
    }

    /// Takes a sandbox out. Its addresses mean nobody from here on.
    pub fn remove(&self, id: &SandboxId) -> Option<Arc<Sandbox>> {
        let mut index = self.write();
        let sandbox = index.by_id.remove(id)?;
        for address in addresses(&sandbox) {
            index.by_address.remove(&address);
        }
        index.departed.push_back((Instant::now(), sandbox.handle.ordinal));
        index.forget_departed(DEPARTED_MAX);
        Some(sandbox)
    }

    /// Forgets sandboxes that have been gone for a while.
    pub fn sweep(&self) {
        self.write().forget_departed(DEPARTED_MAX);
    }

    /// By id.
    pub fn get(&self, id: &SandboxId) -> Option<Arc<Sandbox>> {
        self.read().by_id.get(id).cloned()
    }

    /// By source address, which the kernel has checked.
    pub fn by_address(&self, address: impl Into<IpAddr>) -> Option<Arc<Sandbox>> {
        self.read().by_address.get(&address.into()).cloned()
    }

    /// By the kernel's ordinal, including sandboxes that are just gone.
    pub fn by_ordinal(&self, ordinal: u32) -> Option<Arc<Sandbox>> {
        self.read().by_ordinal.get(&ordinal).cloned()
    }

    /// All of them.
    pub fn all(&self) -> Vec<Arc<Sandbox>> {
        self.read().by_id.values().cloned().collect()
    }

    fn read(&self) -> RwLockReadGuard<'_, Index> {
        self.index.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Index> {
        self.index.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where its packets come from.
fn addresses(sandbox: &Sandbox) -> impl Iterator<Item = IpAddr> {
    let endpoint = &sandbox.endpoint;
    let second = endpoint.address6.map(IpAddr::V6);
    std::iter::once(IpAddr::V4(endpoint.address)).chain(second)
}
