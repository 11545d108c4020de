//! How long a way out that failed is left alone: each try changes the node's settings and restores them. Pure: time comes
//! from the caller.

use std::time::{Duration, Instant};

/// Pause after the first failure.
const FIRST: Duration = Duration::from_secs(30);
/// It doubles with each failure in a row, at most so often: to eight minutes.
const DOUBLINGS: u32 = 4;

/// Of one family.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    /// In a row.
    failures: u32,
    since: Instant,
}

impl Patience {
    /// After a first try, which has failed or not.
    pub(super) fn new(worked: bool, now: Instant) -> Self {
        let failures = u32::from(!worked);
        Self { failures, since: now }
    }

    /// It was tried, and works.
    pub(super) fn worked(&mut self, now: Instant) {
        *self = Self::new(true, now);
    }

    /// It was tried in vain.
    pub(super) fn failed(&mut self, now: Instant) {
        self.failures = self.failures.saturating_add(1);
        self.since = now;
    }

    /// It could not even be tried.
    pub(super) fn impossible(&mut self, now: Instant) {
        self.since = now;
    }

    /// Whether it may be tried again.
    pub(super) fn is_over(&self, now: Instant) -> bool {
        let doublings = self.failures.saturating_sub(1).min(DOUBLINGS);
        now.saturating_duration_since(self.since) >= FIRST * (1 << doublings)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Seconds after which it may be tried again.
    fn pause(patience: &Patience, now: Instant) -> Option<u64> {
        (0..10_000).find(|seconds| patience.is_over(now + Duration::from_secs(*seconds)))
    }

    #[test]
    fn each_failure_in_a_row_doubles_the_pause_up_to_a_limit() {
        let now = Instant::now();
        let mut patience = Patience::new(false, now);
        let mut pauses = vec![pause(&patience, now)];
        for _ in 0..6 {
            patience.failed(now);
            pauses.push(pause(&patience, now));
        }
        assert_eq!(pauses, [30, 60, 120, 240, 480, 480, 480].map(Some));
        patience.impossible(now);
        assert_eq!(pause(&patience, now), Some(480), "neither better nor worse");
        patience.worked(now);
        patience.failed(now);
        assert_eq!(pause(&patience, now), Some(30));
        assert_eq!(pause(&Patience::new(true, now), now), Some(30));
    }
}
