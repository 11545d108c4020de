//! Places of something dear, given out by organisation, so that none takes them all. Owns the counting; what a place is
//! for, and whether one waits for it, is the caller's.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use sandgate_api::id::OrgId;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Places that an organisation has or has not.
#[derive(Debug, Clone)]
pub struct Places {
    each: usize,
    taken: Arc<Mutex<BTreeMap<OrgId, usize>>>,
}

/// A place, free again when it is dropped.
#[derive(Debug)]
pub struct Place {
    places: Places,
    org_id: OrgId,
}

impl Places {
    /// So many for each organisation.
    pub fn new(each: usize) -> Self {
        Self {
            each,
            taken: Arc::default(),
        }
    }

    /// How many each organisation has.
    pub fn each(&self) -> usize {
        self.each
    }

    /// One of the organisation's places; none when all are taken.
    pub fn take(&self, org_id: &OrgId) -> Option<Place> {
        let mut taken = self.taken();
        let count = taken.entry(org_id.clone()).or_default();
        if *count >= self.each {
            return None;
        }
        *count += 1;
        drop(taken);
        Some(Place {
            places: self.clone(),
            org_id: org_id.clone(),
        })
    }

    fn taken(&self) -> MutexGuard<'_, BTreeMap<OrgId, usize>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.taken();
        let left = taken.get_mut(&self.org_id).map(|count| {
            *count = count.saturating_sub(1);
            *count
        });
        if left == Some(0) {
            taken.remove(&self.org_id);
        }
    }
}

/// Turns at what an organisation does one at a time, and all together a few.
#[derive(Debug)]
pub struct Turns {
    all: Arc<Semaphore>,
    each: Mutex<BTreeMap<OrgId, Arc<Semaphore>>>,
}

/// A turn, over when it is dropped.
#[derive(Debug)]
pub struct Turn {
    _own: Option<OwnedSemaphorePermit>,
    _of_all: Option<OwnedSemaphorePermit>,
}

impl Turns {
    /// So many organisations at once.
    pub fn new(at_once: usize) -> Self {
        Self {
            all: Arc::new(Semaphore::new(at_once)),
            each: Mutex::default(),
        }
    }

    /// Waits for the organisation's turn. It waits for those of its own first, so that however many they are they hold
    /// one place of all.
    pub async fn take(&self, org_id: &OrgId) -> Turn {
        let own = {
            let mut each = self.each.lock().unwrap_or_else(PoisonError::into_inner);
            // Those that nobody has or waits for.
            each.retain(|_, own| Arc::strong_count(own) > 1);
            let own = each.entry(org_id.clone());
            Arc::clone(own.or_insert_with(|| Arc::new(Semaphore::new(1))))
        };
        // Never closed: without a turn it is not worse than without the limit.
        Turn {
            _own: own.acquire_owned().await.ok(),
            _of_all: Arc::clone(&self.all).acquire_owned().await.ok(),
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    fn org(number: u32) -> OrgId {
        format!("org-{number}").parse().expect("an id")
    }

    #[test]
    fn one_that_has_all_its_places_takes_none_of_anothers() {
        let places = Places::new(2);
        let held: Vec<_> = (0..2).map(|_| places.take(&org(1)).expect("a place")).collect();
        assert!(places.take(&org(1)).is_none());
        let other = places.take(&org(2)).expect("a place of its own");
        drop(held);
        assert!(places.take(&org(1)).is_some());
        drop(other);
        assert!(
            places.taken().is_empty(),
            "nothing is kept of those that have none"
        );
    }

    #[tokio::test]
    async fn one_that_waits_for_itself_keeps_nobody_else_waiting() {
        let turns = Turns::new(2);
        let [one, two, three, four] = [1, 2, 3, 4].map(org);
        let first = turns.take(&one).await;
        let mut waiting = Box::pin(turns.take(&one));
        let mut more = Box::pin(turns.take(&one));
        assert!(waiting.as_mut().now_or_never().is_none());
        assert!(more.as_mut().now_or_never().is_none());
        let other = turns.take(&two).now_or_never().expect("its turn at once");
        let mut third = Box::pin(turns.take(&three));
        assert!(third.as_mut().now_or_never().is_none(), "two at once are all");
        drop(other);
        let third = third.await;
        drop(first);
        let second = waiting.await;
        assert!(more.as_mut().now_or_never().is_none());
        drop((second, third));
        drop(more.await);
        drop(turns.take(&four).await);
        assert_eq!(turns.each.lock().expect("unharmed").len(), 1);
    }
}
