//! Which rules of a long list can concern a flow, found without walking the list.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::ports::PortSet;

/// Stands for no rule: behind every rule there is.
pub(crate) const NONE: u32 = u32::MAX;

/// Prefixes, and the rules that list each.
#[derive(Debug, Clone, Default)]
pub(crate) struct AddressIndex {
    /// In the order of `IpNet`, which puts a prefix before those inside it; each once.
    prefixes: Vec<Prefix>,
    /// Rules, in the order of their prefixes, ascending for each.
    rules: Vec<u32>,
}

#[derive(Debug, Clone)]
struct Prefix {
    network: IpNet,
    /// The next larger prefix around this one, or [`NONE`].
    parent: u32,
    /// Where its rules end in `rules`; they begin where those of the prefix before end.
    end: u32,
}

impl AddressIndex {
    /// Indexes ranges of rules.
    pub(crate) fn new<'a>(ranges: impl Iterator<Item = (u32, &'a IpNet)>) -> Self {
        let mut listed: Vec<(IpNet, u32)> = ranges.map(|(rule, network)| (network.trunc(), rule)).collect();
        listed.sort_unstable();
        listed.dedup();
        let mut index = Self::default();
        let mut around: Vec<u32> = Vec::new();
        for (network, rule) in listed {
            if index.prefixes.last().is_none_or(|last| last.network != network) {
                while let Some(outer) = around.last()
                    && !index.prefixes[*outer as usize].network.contains(&network)
                {
                    around.pop();
                }
                let parent = around.last().copied().unwrap_or(NONE);
                around.push(length(&index.prefixes));
                let end = length(&index.rules);
                index.prefixes.push(Prefix { network, parent, end });
            }
            index.rules.push(rule);
            if let Some(last) = index.prefixes.last_mut() {
                last.end += 1;
            }
        }
        index.prefixes.shrink_to_fit();
        index.rules.shrink_to_fit();
        index
    }

    /// Rules of every prefix that contains the address, in no order, perhaps more than once.
    pub(crate) fn containing(&self, address: IpAddr) -> impl Iterator<Item = u32> {
        let alone = IpNet::from(address);
        let after = self.prefixes.partition_point(|prefix| prefix.network <= alone);
        // Whatever contains the address is the last prefix that begins before it, or around that one.
        let mut next = after.checked_sub(1);
        let around = std::iter::from_fn(move || {
            let here = next?;
            let parent = self.prefixes[here].parent;
            next = (parent != NONE).then_some(parent as usize);
            Some(here)
        });
        around
            .filter(move |here| self.prefixes[*here].network.contains(&address))
            .flat_map(|here| self.rules_at(here))
            .copied()
    }

    /// Every prefix, in the order of `IpNet`, with its rules, ascending.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (IpNet, &[u32])> {
        let prefixes = self.prefixes.iter().enumerate();
        prefixes.map(|(here, prefix)| (prefix.network, self.rules_at(here)))
    }

    fn rules_at(&self, here: usize) -> &[u32] {
        let before = here.checked_sub(1);
        let begin = before.map_or(0, |before| self.prefixes[before].end as usize);
        &self.rules[begin..self.prefixes[here].end as usize]
    }
}

fn length<T>(items: &[T]) -> u32 {
    u32::try_from(items.len()).expect("documents are smaller")
}

/// For every port the first of some rules.
#[derive(Debug, Clone)]
pub(crate) struct FirstByPort {
    /// Where a stretch of ports begins, and the rule, or [`NONE`]; the first stretch begins at 0.
    stretches: Vec<(u16, u32)>,
}

impl FirstByPort {
    /// Of these rules, given in ascending order with the identity of their ports; `sets` has the ports themselves.
    pub(crate) fn new(rules: impl Iterator<Item = (u32, u32)>, sets: &[PortSet]) -> Self {
        let mut seen = vec![false; sets.len()];
        let mut covered = PortSet::default();
        let mut stretches: Vec<(u16, u32)> = Vec::new();
        for (rule, ports) in rules {
            if std::mem::replace(&mut seen[ports as usize], true) {
                continue;
            }
            let ports = &sets[ports as usize];
            let fresh = ports.without(&covered);
            stretches.extend(fresh.spans().iter().map(|span| (span.first, rule)));
            covered = covered.or(ports);
        }
        let gaps = PortSet::all().without(&covered);
        stretches.extend(gaps.spans().iter().map(|span| (span.first, NONE)));
        stretches.sort_unstable();
        Self { stretches }
    }

    /// The first rule for the port, or [`NONE`].
    pub(crate) fn at(&self, port: u16) -> u32 {
        let after = self.stretches.partition_point(|(first, _)| *first <= port);
        after
            .checked_sub(1)
            .map_or(NONE, |stretch| self.stretches[stretch].1)
    }

    /// Where the answer may change.
    pub(crate) fn edges(&self) -> impl Iterator<Item = u16> {
        self.stretches.iter().map(|(first, _)| *first)
    }

    /// Every rule that is an answer.
    pub(crate) fn rules(&self) -> impl Iterator<Item = u32> {
        let rules = self.stretches.iter().map(|(_, rule)| *rule);
        rules.filter(|rule| *rule != NONE)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ports::PortSpan;

    fn any_network() -> impl Strategy<Value = IpNet> {
        let four = (any::<[u8; 4]>(), 0u8..=32).prop_map(|(bytes, length)| {
            let bytes = bytes.map(|byte| byte & 0xc1);
            IpNet::new(IpAddr::from(bytes), length).expect("a length").trunc()
        });
        let six = (any::<[u8; 16]>(), 0u8..=128).prop_map(|(bytes, length)| {
            let bytes = bytes.map(|byte| byte & 0x81);
            IpNet::new(IpAddr::from(bytes), length).expect("a length").trunc()
        });
        prop_oneof![four, six]
    }

    proptest! {
        #[test]
        fn the_index_finds_what_the_list_holds(
            ranges in proptest::collection::vec(any_network(), 0..40), other in any_network(),
        ) {
            let index = AddressIndex::new((0u32..).zip(&ranges));
            for address in ranges.iter().chain([&other]).flat_map(|range| [range.addr(), range.broadcast()]) {
                let mut found: Vec<u32> = index.containing(address).collect();
                found.sort_unstable();
                let listed = (0u32..).zip(&ranges).filter(|(_, range)| range.contains(&address));
                prop_assert_eq!(found, listed.map(|(rule, _)| rule).collect::<Vec<_>>());
            }
        }

        #[test]
        fn the_first_rule_of_each_port_is_the_first(
            rules in proptest::collection::vec((1u16..60, 1u16..60), 0..12),
        ) {
            let sets: Vec<PortSet> = rules
                .iter()
                .map(|(one, two)| PortSet::new([PortSpan { first: *one.min(two), last: *one.max(two) }]))
                .collect();
            let first = FirstByPort::new((0..length(&rules)).map(|rule| (rule, rule)), &sets);
            for port in 0..70 {
                let listed = sets.iter().position(|ports| ports.contains(port));
                let listed = listed.map_or(NONE, |rule| u32::try_from(rule).expect("few"));
                prop_assert_eq!(first.at(port), listed);
            }
        }
    }
}
