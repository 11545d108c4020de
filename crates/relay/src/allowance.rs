//! How many bytes may go one way, over all streams that share it.
//!
//! Owns: that the sum never passes the limit. Who sends takes before it writes, all or nothing, so that two streams at once
//! cannot both have the last bytes.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

/// Where there is no limit.
pub const UNLIMITED: u64 = u64::MAX;

/// Bytes that went, and how many may.
#[derive(Debug)]
pub struct Allowance {
    used: AtomicU64,
    /// Shared, so that another limit counts for what is under way.
    limit: Arc<AtomicU64>,
}

impl Allowance {
    /// One of which nothing is used.
    pub fn within(limit: Arc<AtomicU64>) -> Self {
        Self {
            used: AtomicU64::new(0),
            limit,
        }
    }

    /// Takes so many bytes. False: they would be too many, and none is taken.
    #[must_use]
    pub fn take(&self, bytes: usize) -> bool {
        let limit = self.limit.load(Ordering::Relaxed);
        // usize is at most 64 bits wide on every supported target.
        let more = |used: u64| used.checked_add(bytes as u64).filter(|sum| *sum <= limit);
        self.used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, more)
            .is_ok()
    }

    /// Bytes that were taken.
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_or_nothing_is_taken_and_a_new_limit_counts_at_once() {
        let limit = Arc::new(AtomicU64::new(10));
        let allowance = Allowance::within(Arc::clone(&limit));
        assert!(allowance.take(7));
        assert!(!allowance.take(4), "more than is left");
        assert!(allowance.take(3));
        assert!(!allowance.take(1));
        limit.store(11, Ordering::Relaxed);
        assert!(allowance.take(1));
        limit.store(5, Ordering::Relaxed);
        assert!(!allowance.take(1));
        limit.store(UNLIMITED, Ordering::Relaxed);
        assert!(allowance.take(1 << 20));
        assert_eq!(allowance.used(), (1 << 20) + 11);
    }

    #[test]
    fn streams_at_once_never_have_more_than_the_limit_together() {
        let allowance = Allowance::within(Arc::new(AtomicU64::new(10_000)));
        let taken = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..1000 {
                        if allowance.take(7) {
                            taken.fetch_add(7, Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        assert_eq!(taken.load(Ordering::Relaxed), 10_000 / 7 * 7);
        assert_eq!(allowance.used(), 10_000 / 7 * 7);
    }
}
