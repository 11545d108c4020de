//! What nobody may reach, flattened for the kernel: its longest prefix must give the whole answer, so every distinct
//! prefix gets all exceptions that cover it. Both families are one space here, as in the map.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::{IpNet, Ipv6Net};
use netd_common::{PlatformEntry, PortSpan, limit};

use super::{DatapathError, address::in_one_space};

/// Ports of a prefix that the operator opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Opening {
    pub(super) prefix: Ipv6Net,
    pub(super) ports: PortSpan,
}

/// Where the answer comes from.
#[derive(Debug, Clone)]
pub(super) struct Ranges {
    /// Denied, but for the openings.
    pub(super) denied: Vec<Ipv6Net>,
    /// The operator's exceptions.
    pub(super) openings: Vec<Opening>,
    /// Denied without exception: addresses of sandboxes, for one never reaches another, and what the operator denies.
    pub(super) closed: Vec<Ipv6Net>,
}

impl Ranges {
    /// The kernel's entries. An address of the node is denied too, unless an exception names that very address: a
    /// range that happens to hold it was not meant to open the node.
    pub(super) fn flatten(
        &self,
        nodes: &BTreeSet<IpAddr>,
    ) -> Result<BTreeMap<Ipv6Net, PlatformEntry>, DatapathError> {
        let single = |address: &IpAddr| in_one_space(IpNet::from(address.to_canonical()));
        let nodes: BTreeSet<Ipv6Net> = nodes.iter().filter_map(single).collect();
        let prefixes: BTreeSet<Ipv6Net> = self
            .denied
            .iter()
            .chain(self.openings.iter().map(|opening| &opening.prefix))
            .chain(&self.closed)
            .chain(&nodes)
            .map(Ipv6Net::trunc)
            .collect();
        if prefixes.len() > limit::PLATFORM {
            return Err(DatapathError::Table(format!(
                "{} prefixes in the platform tier and its exceptions, at most {} fit",
                prefixes.len(),
                limit::PLATFORM
            )));
        }
        prefixes
            .into_iter()
            .map(|prefix| Ok((prefix, self.entry(prefix, nodes.contains(&prefix))?)))
            .collect()
    }

    fn entry(&self, prefix: Ipv6Net, is_node: bool) -> Result<PlatformEntry, DatapathError> {
        let is_closed = self.closed.iter().any(|range| range.contains(&prefix));
        let covered = self.denied.iter().any(|range| range.contains(&prefix));
        let mut entry = PlatformEntry {
            denied: u32::from(is_node || is_closed || covered),
            ..PlatformEntry::default()
        };
        if is_closed {
            return Ok(entry);
        }
        let opens = |opening: &&Opening| {
            let opened = opening.prefix.trunc();
            if is_node {
                opened == prefix
            } else {
                opened.contains(&prefix)
            }
        };
        let spans = merge(
            self.openings
                .iter()
                .filter(opens)
                .map(|opening| opening.ports)
                .collect(),
        );
        if spans.len() > limit::RANGES {
            return Err(DatapathError::Table(format!(
                "{} separate ranges of ports are opened for {prefix}, at most {} fit",
                spans.len(),
                limit::RANGES
            )));
        }
        for (slot, span) in entry.exceptions.iter_mut().zip(&spans) {
            *slot = *span;
            entry.len += 1;
        }
        Ok(entry)
    }
}

/// Joins spans that overlap or touch.
fn merge(mut spans: Vec<PortSpan>) -> Vec<PortSpan> {
    spans.sort_unstable_by_key(|span| (span.first, span.last));
    let mut merged: Vec<PortSpan> = Vec::new();
    for span in spans {
        match merged.last_mut() {
            Some(last) if u32::from(span.first) <= u32::from(last.last) + 1 => {
                last.last = last.last.max(span.last)
            }
            Some(_) | None => merged.push(span),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> Ipv6Net {
        in_one_space(text.parse().unwrap()).unwrap()
    }

    fn opening(prefix: &str, first: u16, last: u16) -> Opening {
        Opening {
            prefix: net(prefix),
            ports: PortSpan { first, last },
        }
    }

    fn ranges(openings: Vec<Opening>) -> Ranges {
        Ranges {
            denied: vec![net("10.0.0.0/8"), net("127.0.0.0/8"), net("fc00::/7")],
            openings,
            closed: vec![
                net("10.213.0.0/16"),
                net("fd53:4700::/64"),
                net("198.51.100.0/24"),
            ],
        }
    }

    /// What the kernel's longest prefix says.
    fn denies(entries: &BTreeMap<Ipv6Net, PlatformEntry>, address: &str, port: u16) -> bool {
        let address = in_one_space(IpNet::from(address.parse::<IpAddr>().unwrap())).unwrap();
        let longest = entries
            .iter()
            .filter(|(prefix, _)| prefix.contains(&address))
            .max_by_key(|(p, _)| p.prefix_len());
        longest.is_some_and(|(_, entry)| {
            let open = &entry.exceptions[..entry.len as usize];
            entry.denied == 1 && !open.iter().any(|span| (span.first..=span.last).contains(&port))
        })
    }

    #[test]
    fn exceptions_open_their_pairs_only_also_when_nested() {
        let openings = vec![opening("10.0.0.5/32", 443, 443), opening("10.0.0.0/24", 80, 80)];
        let entries = ranges(openings).flatten(&BTreeSet::new()).unwrap();
        assert!(!denies(&entries, "10.0.0.5", 443));
        assert!(!denies(&entries, "10.0.0.5", 80));
        assert!(!denies(&entries, "10.0.0.6", 80));
        assert!(denies(&entries, "10.0.0.6", 443));
        assert!(denies(&entries, "10.0.1.5", 80));
        assert!(!denies(&entries, "203.0.113.1", 443));
    }

    #[test]
    fn sandboxes_and_what_the_operator_denies_cannot_be_opened() {
        let openings = vec![
            opening("10.0.0.0/8", 0, u16::MAX),
            opening("10.213.0.9/32", 0, u16::MAX),
        ];
        let entries = ranges(openings).flatten(&BTreeSet::new()).unwrap();
        assert!(denies(&entries, "10.213.0.9", 443));
        assert!(denies(&entries, "10.213.1.1", 1));
        assert!(denies(&entries, "198.51.100.9", 443));
        assert!(!denies(&entries, "198.51.101.9", 443));
        assert!(!denies(&entries, "10.1.1.1", 443));
        let entries = ranges(vec![opening("fd00::/8", 0, u16::MAX)])
            .flatten(&BTreeSet::new())
            .unwrap();
        assert!(denies(&entries, "fd53:4700::9", 443));
        assert!(!denies(&entries, "fd53:4701::9", 443));
        assert!(denies(&entries, "fc00::9", 443));
    }

    #[test]
    fn a_node_is_opened_only_by_its_own_address() {
        let nodes = BTreeSet::from([
            "10.1.0.4".parse().unwrap(),
            "203.0.113.9".parse().unwrap(),
            "2001:db8::9".parse().unwrap(),
        ]);
        let entries = ranges(vec![opening("10.1.0.0/16", 0, u16::MAX)])
            .flatten(&nodes)
            .unwrap();
        assert!(denies(&entries, "10.1.0.4", 22));
        assert!(denies(&entries, "203.0.113.9", 443));
        assert!(!denies(&entries, "203.0.113.8", 443));
        assert!(denies(&entries, "2001:db8::9", 443));
        assert!(!denies(&entries, "2001:db8::8", 443));
        assert!(!denies(&entries, "10.1.0.5", 22));
        let entries = ranges(vec![opening("10.1.0.4/32", 22, 22)])
            .flatten(&nodes)
            .unwrap();
        assert!(!denies(&entries, "10.1.0.4", 22));
        assert!(denies(&entries, "10.1.0.4", 23));
    }

    #[test]
    fn touching_spans_share_a_slot_and_too_many_are_refused() {
        let touching = (0..40).map(|port| opening("10.0.0.5/32", port, port)).collect();
        assert_eq!(
            ranges(touching).flatten(&BTreeSet::new()).unwrap()[&net("10.0.0.5/32")].len,
            1
        );
        let apart = (0..40)
            .map(|port| opening("10.0.0.5/32", port * 2, port * 2))
            .collect();
        assert!(ranges(apart).flatten(&BTreeSet::new()).is_err());
    }
}
