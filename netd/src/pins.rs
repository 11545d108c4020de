//! Which addresses a sandbox learned from netd's DNS, and under which names. Owns: the set of
//! (name, address) pairs of one sandbox, their age and their number. Pure: callers bring the time, keep
//! the kernel's set of addresses in step with what the methods return, and write the log ([`log`]).

pub mod log;
pub mod room;

use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
    time::Duration,
};

use lru::LruCache;
use sandgate_policy::DomainName;

use self::room::{Part, Room};

/// How long a pair counts after it was last answered or used.
pub const PIN_LIFETIME: Duration = Duration::from_secs(24 * 3600);
/// Pairs of one sandbox; past it the one least recently used makes room.
pub const PINS_MAX: usize = 4096;
/// A pair used again is written to the log again only when this much older than its last line.
const REFRESH_STEP: u64 = 3600;

/// Seconds since the machine was started, which nobody can set. (Pins need not be known after another start: no sandbox
/// is.)
pub type Seconds = u64;

/// The pairs of one sandbox.
#[derive(Debug)]
pub struct Pins {
    /// Least recently used last.
    pairs: LruCache<(DomainName, IpAddr), Ends>,
    names: HashMap<IpAddr, BTreeSet<DomainName>>,
    /// Counts them.
    part: Part,
    /// Addresses that flows use at this moment, with the number of these flows. They keep their last name.
    held: HashMap<IpAddr, usize>,
}

/// When a pair ends.
#[derive(Debug, Clone, Copy)]
struct Ends {
    at: Seconds,
    /// The same, as the log has it.
    logged: Seconds,
}

/// What pinning one pair changed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Pinned {
    /// The address had no name before: the kernel must learn it.
    pub is_new_address: bool,
    /// The pair is new, or its end moved enough to be written down.
    pub must_be_logged: bool,
    /// Addresses that lost their last name to make room: the kernel must forget them, before it learns the new one.
    pub evicted: Vec<IpAddr>,
}

impl Default for Pins {
    fn default() -> Self {
        Self::within(&Room::default())
    }
}

impl Pins {
    /// None, in a room that others use too.
    pub fn within(room: &Room) -> Self {
        Self {
            pairs: LruCache::unbounded(),
            names: HashMap::new(),
            part: room.part(),
            held: HashMap::new(),
        }
    }

    /// Remembers that `name` was answered with `address`, or was used with it.
    pub fn pin(&mut self, name: &DomainName, address: IpAddr, now: Seconds) -> Pinned {
        self.pin_until(name, address, now + PIN_LIFETIME.as_secs())
    }

    /// Remembers a pair until a given time, as the log has it.
    pub fn pin_until(&mut self, name: &DomainName, address: IpAddr, ends: Seconds) -> Pinned {
        let key = (name.clone(), address);
        if let Some(known) = self.pairs.get_mut(&key) {
            known.at = known.at.max(ends);
            let must_be_logged = ends > known.logged + REFRESH_STEP;
            if must_be_logged {
                known.logged = ends;
            }
            return Pinned {
                must_be_logged,
                ..Pinned::default()
            };
        }
        let is_new_address = !self.names.contains_key(&address);
        let mut evicted = Vec::new();
        while is_new_address && !self.part.take() {
            // Its assured ones are its own, so there is some.
            evicted.extend(self.free_address());
        }
        let both = Ends {
            at: ends,
            logged: ends,
        };
        self.pairs.put(key, both);
        self.names.entry(address).or_default().insert(name.clone());
        evicted.extend(self.make_room());
        Pinned {
            is_new_address,
            must_be_logged: true,
            evicted,
        }
    }

    /// Forgets one pair, without telling what becomes of the address: the kernel never learned it.
    pub fn unpin(&mut self, name: &DomainName, address: IpAddr) {
        self.pairs.pop(&(name.clone(), address));
        self.forget(name, address);
    }

    /// Nothing is pinned any more, and the kernel knows none of them: the names stay for records about what was, and their
    /// room is others'.
    pub fn retire(&mut self) {
        self.part.give_all();
    }

    /// A flow to `address` begins: until [`Self::release`] the address keeps a name, however many others are pinned
    /// and however long that takes.
    pub fn hold(&mut self, address: IpAddr) {
        *self.held.entry(address).or_default() += 1;
    }

    /// A flow to `address` has ended.
    pub fn release(&mut self, address: IpAddr) {
        if let Some(flows) = self.held.get_mut(&address) {
            *flows -= 1;
            if *flows == 0 {
                self.held.remove(&address);
            }
        }
    }

    /// Whether the pair is pinned.
    pub fn contains(&self, name: &DomainName, address: IpAddr, now: Seconds) -> bool {
        self.pairs
            .peek(&(name.clone(), address))
            .is_some_and(|ends| ends.at > now)
    }

    /// The names under which the sandbox learned `address`.
    pub fn names(&self, address: IpAddr, now: Seconds) -> Vec<DomainName> {
        let Some(names) = self.names.get(&address) else {
            return Vec::new();
        };
        let counts = |name: &&DomainName| self.contains(name, address, now);
        names.iter().filter(counts).cloned().collect()
    }

    /// Drops the pairs that ended, unless a flow uses them, and those whose name `keep` no longer wants; returns the
    /// addresses that lost their last name.
    pub fn sweep(&mut self, now: Seconds, keep: impl Fn(&DomainName) -> bool) -> Vec<IpAddr> {
        let ended = |address: &IpAddr, ends: &Ends| ends.at <= now && !self.held.contains_key(address);
        let gone: Vec<(DomainName, IpAddr)> = self
            .pairs
            .iter()
            .filter(|((name, address), ends)| ended(address, ends) || !keep(name))
            .map(|(pair, _)| pair.clone())
            .collect();
        let mut unbound = Vec::new();
        for (name, address) in gone {
            self.pairs.pop(&(name.clone(), address));
            unbound.extend(self.forget(&name, address));
        }
        // Others find no room.
        for _ in 0..self.part.excess() {
            unbound.extend(self.free_address());
        }
        unbound
    }

    /// Every pair with its end, the one least recently used first.
    pub fn iter(&self) -> impl Iterator<Item = (&DomainName, IpAddr, Seconds)> {
        let pairs: Vec<_> = self.pairs.iter().collect();
        pairs
            .into_iter()
            .rev()
            .map(|((name, address), ends)| (name, *address, ends.at))
    }

    /// Every address that has a name.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
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

    /// Drops the pairs least recently used until an address has lost its last name; none that a flow uses, unless flows
    /// use all: they go on, and only new ones need the pin.
    fn free_address(&mut self) -> Option<IpAddr> {
        loop {
            let unused = self
                .pairs
                .iter()
                .rev()
                .find(|((_, address), _)| !self.held.contains_key(address));
            let oldest = unused.or_else(|| self.pairs.iter().next_back())?;
            let (name, address) = oldest.0.clone();
            self.pairs.pop(&(name.clone(), address));
            if let Some(freed) = self.forget(&name, address) {
                return Some(freed);
            }
        }
    }

    /// Drops the pair least recently used that is not the last name of an address in use. The search passes at most
    /// as many pairs as there are addresses in use.
    fn make_room(&mut self) -> Option<IpAddr> {
        if self.pairs.len() <= PINS_MAX {
            return None;
        }
        let is_spare = |address: &IpAddr| {
            !self.held.contains_key(address) || self.names.get(address).is_some_and(|names| names.len() > 1)
        };
        let oldest = self
            .pairs
            .iter()
            .rev()
            .find(|((_, address), _)| is_spare(address));
        let (name, address) = oldest?.0.clone();
        self.pairs.pop(&(name.clone(), address));
        self.forget(&name, address)
    }

    fn forget(&mut self, name: &DomainName, address: IpAddr) -> Option<IpAddr> {
        let names = self.names.get_mut(&address)?;
        names.remove(name);
        if !names.is_empty() {
            return None;
        }
        self.names.remove(&address);
        self.part.give();
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

    fn address(last: u8) -> IpAddr {
        match last % 2 {
            0 => [203, 0, 113, last].into(),
            _ => [0x2001, 0xdb8, 0, 0, 0, 0, 0, u16::from(last)].into(),
        }
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

    #[test]
    fn nobody_s_pins_fail_because_others_have_too_many() {
        let room = Room::of(4, 100);
        let mut all: Vec<Pins> = (0..40).map(|_| Pins::within(&room)).collect();
        let count = |all: &[Pins]| all.iter().map(|pins| pins.addresses().count()).sum::<usize>();
        let pin = |pins: &mut Pins, last: u8| {
            let text = name(&format!("n{last}.test"));
            let before: BTreeSet<IpAddr> = pins.addresses().collect();
            let pinned = pins.pin(&text, address(last), 0);
            assert!(pins.contains(&text, address(last), 1));
            let after: BTreeSet<IpAddr> = pins.addresses().collect();
            assert_eq!(pinned.is_new_address, !before.contains(&address(last)));
            assert_eq!(
                pinned.evicted,
                before.difference(&after).copied().collect::<Vec<_>>()
            );
        };
        for pins in &mut all[1..] {
            (0..50).for_each(|last| pin(pins, last));
        }
        (0..8).for_each(|last| pin(&mut all[0], last));
        assert_eq!(
            all[0].addresses().collect::<BTreeSet<_>>(),
            (4..8).map(address).collect()
        );
        assert_eq!(count(&all), 40 * 4 + 100);
        // Those with too many give some back.
        all.iter_mut()
            .for_each(|pins| assert!(pins.sweep(1, |_| true).len() < 50));
        (0..20).for_each(|last| pin(&mut all[0], last));
        assert_eq!(all[0].addresses().count(), 20);
        assert!(count(&all) <= 40 * 4 + 100);
    }

    #[test]
    fn who_is_gone_is_remembered_without_room() {
        let room = Room::of(2, 10);
        let mut gone = Pins::within(&room);
        (0..12).for_each(|last| drop(gone.pin(&name("gone.test"), address(last), 0)));
        gone.retire();
        assert_eq!(gone.names(address(3), 1), [name("gone.test")]);
        let mut next = Pins::within(&room);
        (0..12).for_each(|last| drop(next.pin(&name("next.test"), address(last), 0)));
        assert_eq!(next.addresses().count(), 12);
        assert_eq!(gone.sweep(1, |_| false).len(), 12);
        drop((gone, next));
        let mut last = Pins::within(&room);
        (0..30).for_each(|index| drop(last.pin(&name("last.test"), address(index), 0)));
        assert_eq!(last.addresses().count(), 12, "given back once");
    }

    #[test]
    fn what_a_flow_uses_is_neither_evicted_nor_too_old() {
        let mut pins = Pins::default();
        pins.pin(&name("used.test"), address(250), 0);
        pins.hold(address(250));
        pins.hold(address(250));
        pins.release(address(250));
        let mut unbound = Vec::new();
        for index in 0..2 * PINS_MAX {
            let last = u8::try_from(index % 200).expect("small");
            unbound.extend(
                pins.pin(&name(&format!("n{index}.test")), address(last), 1)
                    .evicted,
            );
        }
        assert_eq!(pins.len(), PINS_MAX);
        assert!(!unbound.contains(&address(250)));
        assert_eq!(pins.names(address(250), 2), [name("used.test")]);
        let week = 7 * PIN_LIFETIME.as_secs();
        assert!(!pins.sweep(week, |_| true).contains(&address(250)));
        pins.release(address(250));
        assert_eq!(pins.sweep(week, |_| true), [address(250)]);
        // What the policy takes away is gone, used or not.
        pins.pin(&name("used.test"), address(250), week);
        pins.hold(address(250));
        assert_eq!(pins.sweep(week, |_| false), [address(250)]);
    }

    #[test]
    fn a_held_address_gives_up_names_it_can_spare() {
        let mut pins = Pins::default();
        pins.hold(address(1));
        for index in 0..=PINS_MAX {
            let pinned = pins.pin(&name(&format!("n{index}.test")), address(1), 0);
            assert!(pinned.evicted.is_empty());
        }
        assert_eq!(pins.len(), PINS_MAX);
        assert!(!pins.contains(&name("n0.test"), address(1), 1));
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
                    prop_assert!(pinned.evicted.is_empty());
                }
                prop_assert_eq!(&kernel, &pins.addresses().collect::<BTreeSet<_>>());
            }
        }
    }
}
