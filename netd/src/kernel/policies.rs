//! Policies in the kernel. Each is immutable under an id of its own and known by what it says: endpoints with the same
//! rules share one id, so that a thousand sandboxes of one template cost one set of rules. A change takes the id of what
//! is wanted, writing it whole if nobody has it yet, and then switches the endpoint; an id that nobody uses is freed a
//! moment later, when no packet can still be looking at it.

use std::{
    collections::{BTreeMap, HashMap},
    time::{Duration, Instant},
};

use aya::maps::{LpmTrie, MapData, lpm_trie::Key};
use netd_common::{PolicyKey, PortTable, limit};
use sandgate_policy::KernelTable;

use self::encode::{Encoded, digest_of, encode, id_of, sorted_digest, under};
use super::{DatapathError, batch, error::on_map};

mod encode;

const MAP: &str = "POLICIES";
/// How long an old policy stays after the last switch. A program runs for microseconds.
const GRACE: Duration = Duration::from_millis(100);

/// What a policy says to the kernel, as a digest (SHA-256 of the encoded table): tenants choose what is digested, and
/// must not find two that look the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PolicyContent([u8; 32]);

/// The policy map.
pub(super) struct Policies {
    map: LpmTrie<MapData, PolicyKey, PortTable>,
    /// The same, for calls that `LpmTrie` does not have.
    raw: MapData,
    by_content: HashMap<PolicyContent, u32>,
    policies: HashMap<u32, Policy>,
}

/// One id.
struct Policy {
    /// Unknown of one that an earlier netd left in pieces; it is then shared no further.
    content: Option<PolicyContent>,
    /// All that is in the map under it.
    keys: Box<[Key<PolicyKey>]>,
    users: usize,
    /// Since when nobody uses it.
    idle: Option<Instant>,
}

impl Policies {
    pub(super) fn new(map: LpmTrie<MapData, PolicyKey, PortTable>, raw: MapData) -> Self {
        Self {
            map,
            raw,
            by_content: HashMap::new(),
            policies: HashMap::new(),
        }
    }

    /// An id with this content for one more user, if there is one.
    pub(super) fn share(&mut self, content: PolicyContent) -> Option<u32> {
        let id = *self.by_content.get(&content)?;
        let policy = self.policies.get_mut(&id)?;
        policy.users += 1;
        policy.idle = None;
        Some(id)
    }

    /// An id with this table for one more user; `fresh` gives one never used before, if it must be written. On failure
    /// nothing of it stays.
    pub(super) fn take(
        &mut self,
        table: &KernelTable,
        fresh: impl FnOnce() -> Result<u32, DatapathError>,
    ) -> Result<(u32, PolicyContent), DatapathError> {
        let entries = encode(table)?;
        let content = sorted_digest(&entries);
        // What allows nothing is what no policy at all says, and needs no room: denying is always possible.
        if entries.iter().all(|(_, ports)| *ports == PortTable::default()) {
            return Ok((0, content));
        }
        if let Some(id) = self.share(content) {
            return Ok((id, content));
        }
        let id = fresh()?;
        let (keys, values): (Vec<_>, Vec<_>) = entries
            .into_iter()
            .map(|(key, ports)| (under(id, key), ports))
            .unzip();
        self.write(&keys, &values)?;
        let policy = Policy {
            content: Some(content),
            keys: keys.into(),
            users: 1,
            idle: None,
        };
        self.policies.insert(id, policy);
        self.by_content.insert(content, id);
        Ok((id, content))
    }

    /// One user less. 0 is no policy, and fine.
    pub(super) fn release(&mut self, id: u32) {
        let Some(policy) = self.policies.get_mut(&id) else {
            return;
        };
        policy.users = policy.users.saturating_sub(1);
        if policy.users == 0 {
            policy.idle = Some(Instant::now());
        }
    }

    /// Takes over what an earlier netd left: `users` says how many endpoints have each id. What none has is removed.
    pub(super) fn adopt(&mut self, users: &BTreeMap<u32, usize>) -> Result<(), DatapathError> {
        let mut unused = Vec::new();
        // All of one id lie side by side in the trie, so that the values of one at a time are in memory.
        let mut group: Vec<(Key<PolicyKey>, PortTable)> = Vec::new();
        let mut keys = self.map.keys();
        loop {
            let key = keys.next().transpose().map_err(on_map("list", MAP))?;
            let before = group.first().map(|(first, _)| id_of(first));
            if let Some(done) = before
                && before != key.as_ref().map(id_of)
            {
                let adopted = adopted(std::mem::take(&mut group), users.get(&done).copied().unwrap_or(0));
                match self.policies.get_mut(&done) {
                    // In pieces, against all that is known of tries: kept, and shared no further.
                    Some(known) => {
                        let more = known.keys.iter().chain(&adopted.keys).copied().collect();
                        (known.keys, known.content) = (more, None);
                    }
                    None => {
                        self.policies.insert(done, adopted);
                    }
                }
            }
            let Some(key) = key else { break };
            if users.contains_key(&id_of(&key)) {
                let value = self.map.get(&key, 0).map_err(on_map("read", MAP))?;
                group.push((key, value));
            } else {
                unused.push(key);
            }
        }
        for (id, policy) in &self.policies {
            if let Some(content) = policy.content {
                self.by_content.insert(content, *id);
            }
        }
        self.remove(&unused)
    }

    /// How many ids there are, and prefixes under them.
    pub(super) fn size(&self) -> (usize, usize) {
        let prefixes = self.policies.values().map(|policy| policy.keys.len()).sum();
        (self.policies.len(), prefixes)
    }

    /// Frees those whose grace period is over. Not part of a change, which would have to wait for it.
    pub(super) fn sweep(&mut self) -> Result<(), DatapathError> {
        self.free(GRACE)
    }

    /// Frees those that nobody has used for so long.
    fn free(&mut self, grace: Duration) -> Result<(), DatapathError> {
        let due = |policy: &Policy| policy.idle.is_some_and(|since| since.elapsed() >= grace);
        let ids: Vec<u32> = self
            .policies
            .iter()
            .filter(|(_, policy)| due(policy))
            .map(|(id, _)| *id)
            .collect();
        for id in ids {
            let Some(policy) = self.policies.get(&id) else {
                continue;
            };
            // Known until all of it is gone, so that a failure is tried again; not to be shared any more.
            if let Some(content) = policy.content
                && self.by_content.get(&content) == Some(&id)
            {
                self.by_content.remove(&content);
            }
            batch::remove(&self.raw, &policy.keys).map_err(on_map("remove from", MAP))?;
            self.policies.remove(&id);
        }
        Ok(())
    }

    /// All or nothing.
    fn write(&mut self, keys: &[Key<PolicyKey>], values: &[PortTable]) -> Result<(), DatapathError> {
        let Err(stopped) = batch::insert(&self.raw, keys, values) else {
            return Ok(());
        };
        self.remove(&keys[..stopped.done])?;
        if !is_full(&stopped) {
            return Err(on_map("write", MAP)(stopped));
        }
        // What waits to be freed may make room.
        self.free(GRACE)?;
        let Err(stopped) = batch::insert(&self.raw, keys, values) else {
            return Ok(());
        };
        self.remove(&keys[..stopped.done])?;
        if !is_full(&stopped) {
            return Err(on_map("write", MAP)(stopped));
        }
        Err(DatapathError::PoliciesFull {
            wanted: keys.len(),
            present: self.size().1,
            limit: limit::PREFIXES,
        })
    }

    fn remove(&self, keys: &[Key<PolicyKey>]) -> Result<(), DatapathError> {
        batch::remove(&self.raw, keys).map_err(on_map("remove from", MAP))
    }
}

impl Drop for Policies {
    fn drop(&mut self) {
        // What stays behind is found unused and removed by the next adoption.
        if let Err(error) = self.free(Duration::ZERO) {
            tracing::debug!(%error, "old policies not freed");
        }
    }
}

fn is_full(stopped: &batch::Stopped) -> bool {
    stopped.source.raw_os_error() == Some(libc::ENOSPC)
}

fn adopted(entries: Vec<Encoded>, users: usize) -> Policy {
    Policy {
        keys: entries.iter().map(|(key, _)| *key).collect(),
        content: Some(digest_of(entries)),
        users,
        idle: None,
    }
}
