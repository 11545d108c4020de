//! What all sandboxes of a node may have pinned together, which is what the kernel's set of addresses holds. Owns: that
//! nobody's pins fail because of another's. Some addresses everybody has for himself; the rest is shared, and whoever finds
//! nothing left of it makes room among his own. Those who have more of it than others give back what is over.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::Relaxed},
};

use netd_common::limit;

/// Addresses that every sandbox may have, whatever the others do.
const ASSURED: usize = limit::BOUND / 2 / limit::ENDPOINTS;
/// Addresses that they may have together beside those.
const SHARED: usize = limit::BOUND / 2;
const _: () = assert!(
    ASSURED * limit::ENDPOINTS + SHARED <= limit::BOUND,
    "all of it fits"
);

/// The room of one node. Clones are the same room.
#[derive(Debug, Clone)]
pub struct Room(Arc<Counts>);

#[derive(Debug)]
struct Counts {
    assured: usize,
    shared: usize,
    /// So many of the shared are taken.
    taken: AtomicUsize,
    /// By so many sandboxes.
    takers: AtomicUsize,
}

/// What one sandbox has of it; given back when it is dropped.
#[derive(Debug)]
pub(super) struct Part {
    room: Room,
    addresses: usize,
}

impl Default for Room {
    fn default() -> Self {
        Self::of(ASSURED, SHARED)
    }
}

impl Room {
    /// A room of other sizes.
    pub(super) fn of(assured: usize, shared: usize) -> Self {
        Self(Arc::new(Counts {
            assured,
            shared,
            taken: AtomicUsize::new(0),
            takers: AtomicUsize::new(0),
        }))
    }

    /// A part of it, with nothing in it.
    pub(super) fn part(&self) -> Part {
        Part {
            room: self.clone(),
            addresses: 0,
        }
    }
}

impl Part {
    /// Takes one address more. False: there is no room.
    pub(super) fn take(&mut self) -> bool {
        let Counts {
            assured,
            shared,
            taken,
            takers,
        } = &*self.room.0;
        if self.addresses >= *assured {
            let another = |before| (before < *shared).then_some(before + 1);
            if taken.fetch_update(Relaxed, Relaxed, another).is_err() {
                return false;
            }
            if self.addresses == *assured {
                takers.fetch_add(1, Relaxed);
            }
        }
        self.addresses += 1;
        true
    }

    /// Gives one back, if it has any.
    pub(super) fn give(&mut self) {
        if self.addresses == 0 {
            return;
        }
        self.addresses -= 1;
        if self.addresses >= self.room.0.assured {
            self.room.0.taken.fetch_sub(1, Relaxed);
            if self.addresses == self.room.0.assured {
                self.room.0.takers.fetch_sub(1, Relaxed);
            }
        }
    }

    /// Gives all back.
    pub(super) fn give_all(&mut self) {
        while self.addresses > 0 {
            self.give();
        }
    }

    /// How many addresses it has too many: nearly all of the shared ones are taken, and of them it has more than an equal
    /// part.
    pub(super) fn excess(&self) -> usize {
        let counts = &*self.room.0;
        if counts.taken.load(Relaxed) < counts.shared - counts.shared / 16 {
            return 0;
        }
        // One part more than there are takers: whoever has none yet shall find some.
        let equal = counts.shared / (counts.takers.load(Relaxed) + 1);
        self.addresses.saturating_sub(counts.assured + equal)
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        self.give_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(part: &mut Part, most: usize) -> usize {
        (0..most).take_while(|_| part.take()).count()
    }

    #[test]
    fn everybody_has_the_assured_and_together_never_more_than_there_is() {
        let room = Room::of(4, 100);
        let mut hostile: Vec<Part> = (0..30).map(|_| room.part()).collect();
        let all: usize = hostile.iter_mut().map(|part| take(part, 1000)).sum();
        assert_eq!(all, 30 * 4 + 100);
        let mut late = room.part();
        assert_eq!(take(&mut late, 1000), 4);
        drop(hostile);
        assert_eq!(take(&mut late, 1000), 100);
        drop(late);
        assert_eq!(room.0.taken.load(Relaxed) + room.0.takers.load(Relaxed), 0);
    }

    #[test]
    fn who_has_more_than_others_gives_back_until_all_have_the_same() {
        let room = Room::of(4, 100);
        let mut first = room.part();
        assert_eq!(take(&mut first, 60), 60);
        assert_eq!(first.excess(), 0, "as long as there is enough for all");
        assert_eq!(take(&mut first, 60), 44);
        let mut parts = vec![first, room.part(), room.part()];
        for _ in 0..20 {
            for part in &mut parts {
                for _ in 0..part.excess() {
                    part.give();
                }
                take(part, 10);
            }
        }
        for part in &parts {
            assert!(part.addresses >= 4 + 20, "{}", part.addresses);
        }
    }
}
