//! Which addresses a sandbox learned from netd's DNS, and under which names. Owns: the set of
//! (name, address) pairs of one sandbox, their age and their number. Pure: callers bring the time, keep
//! the kernel's set of addresses in step with what the methods return, and write the log ([`log`]).

pub mod log;

use std::{
    collections::{BTreeSet, HashMap},
    net::Ipv4Addr,
    time::Duration,
};

use lru::LruCache;
use sandgate_policy::DomainName;

/// How long a pair counts after it was last answered or used.
pub const PIN_LIFETIME: Duration = Duration::from_secs(24 * 3600);
/// Pairs of one sandbox; past it the one least recently used makes room.
pub const PINS_MAX: usize = 4096;
/// A pair used again is written to the log again only when this much older than its last line.
const REFRESH_STEP: u64 = 3600;

/// Seconds since 1970.
pub type Seconds = u64;

/// The pairs of one sandbox.
#[derive(Debug)]
pub struct Pins {
    /// Least recently used last; the value is when the pair ends.
    pairs: LruCache<(DomainName, Ipv4Addr), Seconds>,
    names: HashMap<Ipv4Addr, BTreeSet<DomainName>>,
}

/// What pinning one pair changed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Pinned {
    /// The address had no name before: the kernel must learn it.
    pub is_new_address: bool,
    /// The pair is new, or its end moved enough to be written down.
    pub must_be_logged: bool,
    /// An address that lost its last name to make room: the kernel must forget it.
    pub evicted: Option<Ipv4Addr>,
}

impl Default for Pins {
    fn default() -> Self {
        Self {
            pairs: LruCache::unbounded(),
            names: HashMap::new(),
        }
    }
}

impl Pins {
    /// Remembers that `name` was answered with `address`, or was used with it.
    pub fn pin(&mut self, name: &DomainName, address: Ipv4Addr, now: Seconds) -> Pinned {
        self.pin_until(name, address, now + PIN_LIFETIME.as_secs())
    }

    /// Remembers a pair until a given time, as the log has it.
    pub fn pin_until(&mut self, name: &DomainName, address: Ipv4Addr, ends: Seconds) -> Pinned {
        let before = self.pairs.put((name.clone(), address), ends);
        let mut pinned = Pinned {
            must_be_logged: before.is_none_or(|before| ends > before + REFRESH_STEP),
            ..Pinned::default()
        };
        if !pinned.must_be_logged
            && let Some(before) = before
        {
            // Keeps the time that the log knows, so that small steps add up to one that is written.
            self.pairs.put((name.clone(), address), before);
        }
        let names = self.names.entry(address).or_default();
        pinned.is_new_address = names.is_empty();
        names.insert(name.clone());
        if self.pairs.len() > PINS_MAX
            && let Some(((name, address), _)) = self.pairs.pop_lru()
        {
            pinned.evicted = self.forget(&name, address);
        }
        pinned
    }

    /// Forgets one pair, without telling what becomes of the address: the kernel never learned it.
    pub fn unpin(&mut self, name: &DomainName, address: Ipv4Addr) {
        self.pairs.pop(&(name.clone(), address));
        self.forget(name, address);
    }

    /// The names under which the sandbox learned `address`.
    pub fn names(&self, address: Ipv4Addr, now: Seconds) -> Vec<DomainName> {
        let Some(names) = self.names.get(&address) else {
            return Vec::new();
        };
        let counts = |name: &&DomainName| {
            self.pairs
                .peek(&((*name).clone(), address))
                .is_some_and(|ends| *ends > now)
        };
        names.iter().filter(counts).cloned().collect()
    }

    /// Drops the pairs that ended or whose name `keep` no longer wants; returns the addresses that lost
    /// their last name.
    pub fn sweep(&mut self, now: Seconds, keep: impl Fn(&DomainName) -> bool) -> Vec<Ipv4Addr> {
        let gone: Vec<(DomainName, Ipv4Addr)> = self
            .pairs
            .iter()
            .filter(|((name, _), ends)| **ends <= now || !keep(name))
            .map(|(pair, _)| pair.clone())
            .collect();
        let mut unbound = Vec::new();
        for (name, address) in gone {
            self.pairs.pop(&(name.clone(), address));
            unbound.extend(self.forget(&name, address));
        }
        unbound
    }

    /// Every pair with its end, the one least recently used first.
    pub fn iter(&self) -> impl Iterator<Item = (&DomainName, Ipv4Addr, Seconds)> {
        let pairs: Vec<_> = self.pairs.iter().collect();
        pairs
            .into_iter()
            .rev()
            .map(|((name, address), ends)| (name, *address, *ends))
    }

    /// Every address that has a name.
    pub fn addresses(&self) -> impl Iterator<Item = Ipv4Addr> {
        self.names.keys().copied()
    }

    /// How many pairs there are.
    pub fn len(&self) -> usize {
        self.pairs.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.pairs.is_empty()
    }

    fn forget(&mut self, name: &DomainName, address: Ipv4Addr) -> Option<Ipv4Addr> {
        let names = self.names.get_mut(&address)?;
        names.remove(name);
        if !names.is_empty() {
            return None;
        }
        self.names.remove(&address);
        Some(address)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn name(text: &str) -> DomainName {
        DomainName::parse(text).expect("a name")
    }

    fn address(last: u8) -> Ipv4Addr {
        Ipv4Addr::new(203, 0, 113, last)
    }

    #[test]
    fn an_address_is_bound_with_its_first_name_and_unbound_with_its_last() {
        let mut pins = Pins::default();
        assert!(pins.pin(&name("a.test"), address(1), 0).is_new_address);
        assert!(!pins.pin(&name("b.test"), address(1), 0).is_new_address);
        assert_eq!(pins.names(address(1), 1), [name("a.test"), name("b.test")]);
        assert!(pins.sweep(1, |kept| *kept != name("a.test")).is_empty());
        assert_eq!(pins.sweep(1, |kept| *kept != name("b.test")), [address(1)]);
        assert!(pins.names(address(1), 1).is_empty());
    }

    #[test]
    fn a_pair_ends_a_day_after_its_last_use() {
        let day = PIN_LIFETIME.as_secs();
        let mut pins = Pins::default();
        pins.pin(&name("a.test"), address(1), 0);
        pins.pin(&name("a.test"), address(1), day - 10);
        assert_eq!(pins.names(address(1), day + 10), [name("a.test")]);
        assert!(pins.names(address(1), 2 * day).is_empty());
        assert_eq!(pins.sweep(2 * day, |_| true), [address(1)]);
        assert!(pins.is_empty());
    }

    #[test]
    fn frequent_use_is_logged_once_an_hour_and_still_counts() {
        let mut pins = Pins::default();
        assert!(pins.pin(&name("a.test"), address(1), 0).must_be_logged);
        let logged = (1..=7300)
            .filter(|now| pins.pin(&name("a.test"), address(1), *now).must_be_logged)
            .count();
        assert_eq!(logged, 2);
    }

    #[test]
    fn the_pair_least_recently_used_makes_room() {
        let mut pins = Pins::default();
        for index in 0..PINS_MAX {
            pins.pin(
                &name(&format!("n{index}.test")),
                address(u8::try_from(index % 200).expect("small")),
                0,
            );
        }
        pins.pin(&name("n0.test"), address(0), 1);
        pins.pin(&name("new.test"), address(201), 1);
        assert_eq!(pins.len(), PINS_MAX);
        assert!(pins.names(address(0), 2).contains(&name("n0.test")));
        assert!(!pins.names(address(1), 2).contains(&name("n1.test")));
    }

    proptest! {
        #[test]
        fn the_addresses_told_to_the_kernel_are_those_with_a_name(
            steps in proptest::collection::vec((0u8..4, 0u8..6, 0u64..50_000, any::<bool>()), 1..80)
        ) {
            let mut pins = Pins::default();
            let mut kernel = BTreeSet::new();
            let mut now = 0;
            for (label, last, passed, sweep) in steps {
                now += passed;
                if sweep {
                    let dropped = name(&format!("n{label}.test"));
                    for gone in pins.sweep(now, |kept| *kept != dropped) {
                        prop_assert!(kernel.remove(&gone));
                    }
                } else {
                    let pinned = pins.pin(&name(&format!("n{label}.test")), address(last), now);
                    prop_assert_eq!(pinned.is_new_address, kernel.insert(address(last)));
                    prop_assert_eq!(pinned.evicted, None);
                }
                prop_assert_eq!(&kernel, &pins.addresses().collect::<BTreeSet<_>>());
            }
        }
    }
}
