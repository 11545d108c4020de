//! Old records are forgotten now and then. Owns: how long each kind is kept, and which clock is believed about it.

use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};

use super::Service;
use crate::store::{StoreError, hour_of};

/// How often old records are forgotten.
const INTERVAL: Duration = Duration::from_secs(600);

/// How long records of egress are kept.
const AUDIT_AGE: SignedDuration = SignedDuration::from_hours(30 * 24);

/// Most records of egress that are kept.
const AUDIT_RECORDS: u64 = 1_000_000;

/// Most records of what was done by the API that one organisation has. They are kept as long as those of egress.
const ACTIONS_EACH: u32 = 50_000;

/// How long ended sandboxes can be looked at.
const ENDED_AGE: SignedDuration = SignedDuration::from_hours(30 * 24);

/// How long it is known what was used.
const USAGE_AGE: SignedDuration = SignedDuration::from_hours(400 * 24);

/// Records forgotten in one transaction: the writer must not be held for long.
const STEP: u32 = 2_000;

/// How much further than time went a clock may have gone to be believed at once.
const TOLERANCE: SignedDuration = SignedDuration::from_hours(1);

/// How long one that went further must stand by it.
const PROBATION: Duration = Duration::from_secs(24 * 3600);

impl Service {
    /// Forgets old records, until the tasks drain.
    pub async fn retain(self) {
        let shutdown = self.shared.tasks.shutdown();
        // A clock that is ahead when this starts is not believed either: the newest record is the measure.
        let newest = self.shared.store.newest_audit_time().await.ok().flatten();
        let now = super::now();
        let mut calendar = Calendar::new(newest.map_or(now, |newest| newest.min(now)), Instant::now());
        loop {
            let now = calendar.believed(super::now(), Instant::now());
            if let Err(error) = self.forget_old(now).await {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "old records cannot be forgotten"
                );
            }
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(INTERVAL) => {}
            }
        }
    }

    async fn forget_old(&self, now: Timestamp) -> Result<(), StoreError> {
        let store = &self.shared.store;
        let oldest = now.saturating_sub(AUDIT_AGE).unwrap_or(Timestamp::MIN);
        let key = self.shared.ledger.key();
        while store.prune_audit(key, oldest, AUDIT_RECORDS, STEP).await? >= u64::from(STEP) {}
        while store.prune_actions(oldest, ACTIONS_EACH, STEP).await? > 0 {}
        let ended = now.saturating_sub(ENDED_AGE).unwrap_or(Timestamp::MIN);
        while store.prune_sandboxes(ended, STEP).await? >= u64::from(STEP) {}
        let oldest = now.saturating_sub(USAGE_AGE).unwrap_or(Timestamp::MIN);
        store.prune_usage(hour_of(oldest)).await?;
        store.prune_removals().await
    }
}

/// The clock, as far as it is believed. One that jumps ahead, be it for a moment, would make every record old, and what
/// is forgotten does not come back: so it is believed when it has stood by it for a day.
#[derive(Debug)]
struct Calendar {
    /// What was believed last, and when.
    wall: Timestamp,
    steady: Instant,
    /// Since when the clock is ahead of that.
    ahead: Option<Instant>,
}

impl Calendar {
    fn new(wall: Timestamp, steady: Instant) -> Self {
        Self {
            wall,
            steady,
            ahead: None,
        }
    }

    /// What time it is, where the clock says `wall` and the one that nobody can set `steady`.
    fn believed(&mut self, wall: Timestamp, steady: Instant) -> Timestamp {
        let passed = SignedDuration::try_from(steady.saturating_duration_since(self.steady));
        let passed = passed.unwrap_or(SignedDuration::MAX);
        let expected = self.wall.saturating_add(passed).unwrap_or(Timestamp::MAX);
        let latest = expected.saturating_add(TOLERANCE).unwrap_or(Timestamp::MAX);
        if wall > latest {
            let since = *self.ahead.get_or_insert(steady);
            if steady.saturating_duration_since(since) < PROBATION {
                return expected;
            }
            tracing::warn!(%wall, %expected, "the clock has been ahead for a day: it is believed");
        }
        // Set back, it makes nothing old.
        *self = Self::new(wall, steady);
        wall
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hours(hours: i64) -> SignedDuration {
        SignedDuration::from_hours(hours)
    }

    fn at(hours: u64) -> Duration {
        Duration::from_secs(hours * 3600)
    }

    #[test]
    fn a_clock_that_jumps_ahead_for_a_while_makes_nothing_old() {
        let (wall, steady) = (Timestamp::UNIX_EPOCH + hours(500_000), Instant::now());
        let mut calendar = Calendar::new(wall, steady);
        assert_eq!(
            calendar.believed(wall + hours(1), steady + at(1)),
            wall + hours(1)
        );
        // A year ahead, and right again before a day is over.
        for hour in [2, 3, 25] {
            let seen = calendar.believed(wall + hours(9_000), steady + at(hour));
            assert_eq!(seen, wall + hours(i64::try_from(hour).expect("small")));
        }
        assert_eq!(
            calendar.believed(wall + hours(25), steady + at(25)),
            wall + hours(25)
        );
        // The next time counts from its own beginning.
        let ahead = wall + hours(9_000);
        assert_eq!(calendar.believed(ahead, steady + at(26)), wall + hours(26));
        assert_eq!(calendar.believed(ahead, steady + at(49)), wall + hours(49));
        assert_eq!(calendar.believed(ahead, steady + at(50)), ahead);
        assert_eq!(
            calendar.believed(ahead + hours(1), steady + at(51)),
            ahead + hours(1)
        );
    }

    #[test]
    fn a_clock_that_is_set_back_is_believed_at_once() {
        let (wall, steady) = (Timestamp::UNIX_EPOCH + hours(500_000), Instant::now());
        let mut calendar = Calendar::new(wall, steady);
        let back = wall - hours(9_000);
        assert_eq!(calendar.believed(back, steady + at(1)), back);
        // And when it is mended, no record is older than it was: nothing is lost by waiting a day.
        assert_eq!(
            calendar.believed(wall + hours(2), steady + at(2)),
            back + hours(1)
        );
        assert_eq!(
            calendar.believed(wall + hours(26), steady + at(26)),
            wall + hours(26)
        );
    }
}
