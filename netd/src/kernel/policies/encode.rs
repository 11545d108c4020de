//! A table as the policy map holds it. The one place that knows the layout of its keys and values.

use std::slice;

use aws_lc_rs::digest::{Context, SHA256};
use aya::{Pod, maps::lpm_trie::Key};
use ipnet::Ipv6Net;
use netd_common::{POLICY_BITS, PolicyKey, PortRange, PortTable, action, limit, reason, wire6};
use sandgate_policy::{KernelAction, KernelTable, PrefixEntry};

use super::{DatapathError, PolicyContent};
use crate::kernel::{
    address::{in_one_space, ipv4_space},
    reasons,
};

/// An entry of the map.
pub(super) type Encoded = (Key<PolicyKey>, PortTable);

/// All entries, under id 0, in an order that depends on nothing but what they are.
pub(super) fn encode(table: &KernelTable) -> Result<Vec<Encoded>, DatapathError> {
    let mut encoded = table
        .entries
        .iter()
        .filter_map(|entry| in_one_space(entry.prefix).map(|prefix| (prefix, entry)))
        .map(|(prefix, entry)| ports(entry).map(|ports| (key(prefix), ports)))
        .collect::<Result<Vec<_>, _>>()?;
    // A range of IPv6 that holds all of IPv4 in the map's one space says nothing about it.
    let ipv4 = ipv4_space();
    let mut prefixes = table
        .entries
        .iter()
        .filter_map(|entry| in_one_space(entry.prefix));
    if prefixes
        .clone()
        .any(|prefix| prefix != ipv4 && prefix.contains(&ipv4))
        && !prefixes.any(|prefix| prefix == ipv4)
    {
        encoded.push((key(ipv4), PortTable::default()));
    }
    sort(&mut encoded);
    Ok(encoded)
}

/// The digest of entries of one id, whichever it is and in whichever order.
pub(super) fn digest_of(mut entries: Vec<Encoded>) -> PolicyContent {
    for (key, _) in &mut entries {
        *key = under(0, *key);
    }
    sort(&mut entries);
    sorted_digest(&entries)
}

/// The digest of what [`encode`] gives.
pub(super) fn sorted_digest(entries: &[Encoded]) -> PolicyContent {
    let mut context = Context::new(&SHA256);
    for (key, ports) in entries {
        context.update(bytes_of(key));
        context.update(bytes_of(ports));
    }
    let mut content = [0; 32];
    content.copy_from_slice(context.finish().as_ref());
    PolicyContent(content)
}

/// The key under another id.
pub(super) fn under(policy: u32, key: Key<PolicyKey>) -> Key<PolicyKey> {
    let data = PolicyKey { policy, ..key.data() };
    Key::new(key.prefix_len(), data)
}

/// The id that a key is under.
pub(super) fn id_of(key: &Key<PolicyKey>) -> u32 {
    key.data().policy
}

fn sort(entries: &mut [Encoded]) {
    entries.sort_unstable_by(|(one, _), (other, _)| bytes_of(one).cmp(bytes_of(other)));
}

fn key(prefix: Ipv6Net) -> Key<PolicyKey> {
    let data = PolicyKey {
        policy: 0,
        address: wire6(prefix.addr().octets()),
    };
    Key::new(POLICY_BITS + u32::from(prefix.prefix_len()), data)
}

fn ports(entry: &PrefixEntry) -> Result<PortTable, DatapathError> {
    if entry.ranges.len() > limit::RANGES {
        return Err(DatapathError::Table(format!(
            "{} port ranges for {}, at most {} fit",
            entry.ranges.len(),
            entry.prefix,
            limit::RANGES
        )));
    }
    let mut ports = PortTable::default();
    let code_of = |why| {
        reasons::to_code(why)
            .ok_or_else(|| DatapathError::Table(format!("{why} cannot be decided by address and port")))
    };
    for (slot, range) in ports.ranges.iter_mut().zip(&entry.ranges) {
        let (action, code) = match range.action {
            KernelAction::Deny(why) => (action::DENY, code_of(why)?),
            KernelAction::Audit(why) => (action::AUDIT, code_of(why)?),
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
            protocol: reasons::protocol_number(range.protocol),
            padding: 0,
        };
        ports.len += 1;
    }
    Ok(ports)
}

/// What the kernel sees of a key or value.
fn bytes_of<T: Pod>(value: &T) -> &[u8] {
    #[expect(unsafe_code, reason = "plain old data as its bytes")]
    // SAFETY: a value of its size; `Pod` types have no padding (netd-common tests it), so all bytes are initialised.
    unsafe {
        slice::from_raw_parts(std::ptr::from_ref(value).cast::<u8>(), size_of::<T>())
    }
}

#[cfg(test)]
mod tests {
    use sandgate_policy::Protocol;

    use super::*;

    fn entry(prefix: &str, ranges: &[(u16, u16, KernelAction)]) -> PrefixEntry {
        let range = |&(first, last, action)| sandgate_policy::PortRange {
            protocol: Protocol::Tcp,
            first,
            last,
            action,
        };
        PrefixEntry {
            prefix: prefix.parse().unwrap(),
            ranges: ranges.iter().map(range).collect(),
        }
    }

    fn content(entries: &[PrefixEntry]) -> PolicyContent {
        let entries = entries.to_vec();
        sorted_digest(&encode(&KernelTable { entries }).unwrap())
    }

    #[test]
    fn the_same_rules_are_one_content_in_any_order_and_under_any_id() {
        let (one, two) = (
            entry("203.0.113.0/24", &[(443, 443, KernelAction::Proxy)]),
            entry("0.0.0.0/0", &[]),
        );
        assert_eq!(
            content(&[one.clone(), two.clone()]),
            content(&[two.clone(), one.clone()])
        );
        let encoded = encode(&KernelTable {
            entries: vec![one, two],
        })
        .unwrap();
        let mut adopted: Vec<Encoded> = encoded
            .iter()
            .map(|(key, ports)| (under(7, *key), *ports))
            .collect();
        adopted.reverse();
        assert!(adopted.iter().all(|(key, _)| id_of(key) == 7));
        assert_eq!(digest_of(adopted), sorted_digest(&encoded));
    }

    #[test]
    fn any_difference_is_another_content() {
        let prefix = "203.0.113.0/24";
        let different = [
            vec![entry(prefix, &[(443, 443, KernelAction::Proxy)])],
            vec![entry(prefix, &[(443, 443, KernelAction::ProxyBound)])],
            vec![entry(prefix, &[(443, 444, KernelAction::Proxy)])],
            vec![entry(prefix, &[])],
            vec![entry("203.0.113.0/25", &[(443, 443, KernelAction::Proxy)])],
            vec![
                entry(prefix, &[(443, 443, KernelAction::Proxy)]),
                entry("0.0.0.0/0", &[]),
            ],
        ];
        for (index, one) in different.iter().enumerate() {
            for other in &different[index + 1..] {
                assert_ne!(content(one), content(other), "{one:?} and {other:?}");
            }
        }
    }

    #[test]
    fn too_many_ranges_are_refused() {
        let ranges: Vec<_> = (0..17)
            .map(|port| (port * 2, port * 2, KernelAction::Proxy))
            .collect();
        let entries = vec![entry("0.0.0.0/0", &ranges)];
        assert!(matches!(
            encode(&KernelTable { entries }),
            Err(DatapathError::Table(_))
        ));
    }
}
