//! Policies in the kernel. Each is immutable under an id of its own: a change writes a new one whole, then switches
//! the endpoint to it, and the old one is freed a moment later, when no packet can still be looking at it.

use std::time::{Duration, Instant};

use aya::maps::{LpmTrie, MapData, lpm_trie::Key};
use ipnet::{IpNet, Ipv4Net};
use netd_common::{POLICY_BITS, PolicyKey, PortRange, PortTable, action, limit, reason, wire};
use sandgate_policy::{KernelAction, KernelTable, PrefixEntry, Protocol};

use super::{DatapathError, error::on_map, events::is_missing, reasons};

const MAP: &str = "POLICIES";
/// How long an old policy stays after the switch. A program runs for microseconds.
const GRACE: Duration = Duration::from_millis(100);

/// The policy map.
pub(super) struct Policies {
    map: LpmTrie<MapData, PolicyKey, PortTable>,
    retired: Vec<(Instant, Vec<Key<PolicyKey>>)>,
}

impl Policies {
    pub(super) fn new(map: LpmTrie<MapData, PolicyKey, PortTable>) -> Self {
        Self {
            map,
            retired: Vec::new(),
        }
    }

    /// Writes a policy under a fresh id. On failure nothing of it stays.
    pub(super) fn write(
        &mut self,
        id: u32,
        table: &KernelTable,
    ) -> Result<Vec<Key<PolicyKey>>, DatapathError> {
        self.free(false)?;
        let entries: Vec<_> = table
            .entries
            .iter()
            .filter_map(|entry| match entry.prefix {
                IpNet::V4(prefix) => Some(encode(id, prefix, entry)),
                // Every IPv6 frame is dropped.
                IpNet::V6(_) => None,
            })
            .collect::<Result<_, _>>()?;
        let mut written = Vec::with_capacity(entries.len());
        for (key, ports) in entries {
            if let Err(error) = self.map.insert(&key, ports, 0) {
                self.remove(&written)?;
                return Err(on_map("write", MAP)(error));
            }
            written.push(key);
        }
        Ok(written)
    }

    /// Frees a policy that no endpoint uses any more, after the grace period.
    pub(super) fn retire(&mut self, keys: Vec<Key<PolicyKey>>) -> Result<(), DatapathError> {
        self.retired.push((Instant::now(), keys));
        self.free(false)
    }

    /// Keys by policy of everything in the map, for adoption.
    pub(super) fn keys(&self) -> Result<Vec<Key<PolicyKey>>, DatapathError> {
        self.map
            .keys()
            .collect::<Result<_, _>>()
            .map_err(on_map("list", MAP))
    }

    /// Removes entries at once.
    pub(super) fn remove(&mut self, keys: &[Key<PolicyKey>]) -> Result<(), DatapathError> {
        for key in keys {
            match self.map.remove(key) {
                Err(error) if !is_missing(&error) => return Err(on_map("remove from", MAP)(error)),
                Ok(()) | Err(_) => {}
            }
        }
        Ok(())
    }

    /// Frees those whose grace period is over.
    pub(super) fn sweep(&mut self) -> Result<(), DatapathError> {
        self.free(false)
    }

    fn free(&mut self, all: bool) -> Result<(), DatapathError> {
        let due = |since: &Instant| all || since.elapsed() >= GRACE;
        let (free, keep) = std::mem::take(&mut self.retired)
            .into_iter()
            .partition(|(since, _)| due(since));
        self.retired = keep;
        let free: Vec<(Instant, Vec<Key<PolicyKey>>)> = free;
        free.iter().try_for_each(|(_, keys)| self.remove(keys))
    }
}

impl Drop for Policies {
    fn drop(&mut self) {
        // What stays behind is found unused and removed by the next adoption.
        if let Err(error) = self.free(true) {
            tracing::debug!(%error, "old policies not freed");
        }
    }
}

fn encode(
    id: u32,
    prefix: Ipv4Net,
    entry: &PrefixEntry,
) -> Result<(Key<PolicyKey>, PortTable), DatapathError> {
    if entry.ranges.len() > limit::RANGES {
        return Err(DatapathError::Table(format!(
            "{} port ranges for {}, at most {} fit",
            entry.ranges.len(),
            entry.prefix,
            limit::RANGES
        )));
    }
    let mut ports = PortTable::default();
    let tcp = entry
        .ranges
        .iter()
        .filter(|range| range.protocol == Protocol::Tcp);
    for (slot, range) in ports.ranges.iter_mut().zip(tcp) {
        let (action, code) = match range.action {
            KernelAction::Deny(why) | KernelAction::Audit(why) => (
                action::DENY,
                reasons::to_code(why).ok_or_else(|| {
                    DatapathError::Table(format!("{why} cannot be decided by address and port"))
                })?,
            ),
            KernelAction::Pass => (action::PASS, 0),
            KernelAction::Proxy => (action::PROXY, 0),
            KernelAction::ProxyBound => (action::PROXY_BOUND, 0),
        };
        debug_assert!(usize::from(code) < reason::COUNT);
        *slot = PortRange {
            first: range.first,
            last: range.last,
            action,
            reason: code,
            padding: 0,
        };
        ports.len += 1;
    }
    let address = wire(prefix.trunc().addr().octets());
    let length = POLICY_BITS + u32::from(prefix.prefix_len());
    Ok((Key::new(length, PolicyKey { policy: id, address }), ports))
}
