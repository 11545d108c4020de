//! How many sandboxes are made before anybody asks for them, and when. Pure: time comes from the caller.
//!
//! Demand decides: the pool holds twice what was asked for lately and one more, up to its size. A controller that has
//! just started counts as fully asked for, so that the first callers find something. What is not taken grows old and
//! is not replaced beyond the demand. Members are made one at a time, and wait for a moment in which no creation is
//! under way, though not for ever: on a machine that is never idle the pool still fills.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// How far back creations count as demand.
const WINDOW: Duration = Duration::from_secs(300);
/// After the last creation, how long the machine is left to whoever asked for it.
const QUIET: Duration = Duration::from_millis(100);
/// Longest that a member which is wanted waits for such a moment.
const PATIENCE: Duration = Duration::from_secs(1);
/// After a member gave way, or found no room: how long the room is left to others.
const YIELDED: Duration = Duration::from_secs(30);
/// After a member could not be made: how long until the next attempt; doubled with each failure in a row.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// Longest such pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// What has been asked for and what came of making members.
#[derive(Debug)]
pub struct Demand {
    size: u32,
    started: Instant,
    /// Creations of the window, as far as they matter: at most `size` of them.
    asked: VecDeque<Instant>,
    /// Creations that are under way now.
    busy: u32,
    /// Since when a member is wanted.
    wanted: Option<Instant>,
    /// No member is begun before.
    not_before: Option<Instant>,
    failures: u32,
}

/// What to do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plan {
    /// Make a member.
    Make,
    /// Look again after this time, or when something changes.
    Wait(Duration),
    /// Look again when something changes.
    Rest,
}

impl Demand {
    /// A pool of at most `size` members.
    pub fn new(size: u32, now: Instant) -> Self {
        Self {
            size,
            started: now,
            asked: VecDeque::new(),
            busy: 0,
            wanted: None,
            not_before: None,
            failures: 0,
        }
    }

    /// A creation that the pool could serve has begun.
    pub fn began(&mut self, now: Instant) {
        self.busy += 1;
        while self.asked.len() >= usize::try_from(self.size).unwrap_or(usize::MAX).max(1) {
            self.asked.pop_front();
        }
        self.asked.push_back(now);
    }

    /// It has ended, one way or the other.
    pub fn ended(&mut self) {
        self.busy = self.busy.saturating_sub(1);
    }

    /// A member was made.
    pub fn made(&mut self) {
        self.failures = 0;
        self.wanted = None;
    }

    /// A member could not be made.
    pub fn failed(&mut self, now: Instant) {
        let pause = FIRST_PAUSE.saturating_mul(2_u32.saturating_pow(self.failures.min(16)));
        self.failures = self.failures.saturating_add(1);
        self.hold(now + pause.min(LONGEST_PAUSE));
    }

    /// A member gave way to a sandbox that somebody asked for, or found no room itself.
    pub fn yielded(&mut self, now: Instant) {
        self.hold(now + YIELDED);
    }

    fn hold(&mut self, until: Instant) {
        self.not_before = Some(self.not_before.map_or(until, |present| present.max(until)));
    }

    /// How many members there should be.
    pub fn target(&self, now: Instant) -> u32 {
        if now.duration_since(self.started) < WINDOW {
            return self.size;
        }
        let recent = self
            .asked
            .iter()
            .filter(|asked| now.duration_since(**asked) < WINDOW);
        let recent = u32::try_from(recent.count()).unwrap_or(u32::MAX);
        recent.saturating_mul(2).saturating_add(1).min(self.size)
    }

    /// What to do while there are so many members, ready or on their way.
    pub fn plan(&mut self, members: u32, now: Instant) -> Plan {
        if members >= self.target(now) {
            self.wanted = None;
            return Plan::Rest;
        }
        if let Some(until) = self.not_before.filter(|until| now < *until) {
            return Plan::Wait(until - now);
        }
        let patience = PATIENCE.saturating_sub(now.duration_since(*self.wanted.get_or_insert(now)));
        let since_last = self.asked.back().map(|asked| now.duration_since(*asked));
        let quiet = QUIET.saturating_sub(since_last.unwrap_or(QUIET));
        let wait = if self.busy > 0 {
            patience
        } else {
            quiet.min(patience)
        };
        if wait.is_zero() {
            Plan::Make
        } else {
            Plan::Wait(wait)
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn after(start: Instant, millis: u64) -> Instant {
        start + Duration::from_millis(millis)
    }

    #[test]
    fn a_fresh_pool_is_filled_and_then_demand_decides() {
        let start = Instant::now();
        let mut demand = Demand::new(4, start);
        assert_eq!(demand.plan(0, start), Plan::Make);
        assert_eq!(demand.plan(3, start), Plan::Make);
        assert_eq!(demand.plan(4, start), Plan::Rest);
        let later = start + WINDOW;
        assert_eq!(demand.target(later), 1);
        demand.began(later);
        demand.ended();
        assert_eq!(demand.target(later), 3);
        demand.began(later);
        assert_eq!(demand.target(later), 4, "never over its size");
        assert_eq!(demand.target(later + WINDOW), 1);
    }

    #[test]
    fn a_creation_goes_first_but_not_for_ever() {
        let start = Instant::now();
        let mut demand = Demand::new(2, start);
        demand.began(start);
        assert_eq!(demand.plan(0, start), Plan::Wait(PATIENCE));
        demand.ended();
        assert_eq!(
            demand.plan(0, after(start, 40)),
            Plan::Wait(Duration::from_millis(60))
        );
        assert_eq!(demand.plan(0, after(start, 100)), Plan::Make);
        demand.made();
        demand.began(after(start, 200));
        assert_eq!(demand.plan(1, after(start, 200)), Plan::Wait(PATIENCE));
        demand.began(after(start, 900));
        assert_eq!(demand.plan(1, after(start, 1_200)), Plan::Make);
    }

    #[test]
    fn room_that_somebody_needed_is_left_alone() {
        let start = Instant::now();
        let mut demand = Demand::new(2, start);
        demand.yielded(start);
        demand.failed(start);
        assert_eq!(demand.plan(0, start), Plan::Wait(YIELDED));
        assert_eq!(demand.plan(0, start + YIELDED), Plan::Make);
    }

    #[test]
    fn failures_in_a_row_are_tried_again_more_and_more_slowly() {
        let start = Instant::now();
        let mut demand = Demand::new(1, start);
        demand.failed(start);
        assert_eq!(demand.plan(0, start), Plan::Wait(FIRST_PAUSE));
        demand.failed(start);
        assert_eq!(demand.plan(0, start), Plan::Wait(FIRST_PAUSE * 2));
        for _ in 0..100 {
            demand.failed(start);
        }
        assert_eq!(demand.plan(0, start), Plan::Wait(LONGEST_PAUSE));
        demand.made();
        demand.failed(start + LONGEST_PAUSE);
        assert_eq!(demand.plan(0, start + LONGEST_PAUSE), Plan::Wait(FIRST_PAUSE));
    }

    proptest! {
        #[test]
        fn there_are_never_more_than_its_size_and_the_wait_has_an_end(
            size in 1_u32..20,
            steps in proptest::collection::vec((0_u8..5, 0_u64..400_000), 0..60),
        ) {
            let start = Instant::now();
            let mut demand = Demand::new(size, start);
            let (mut now, mut members) = (start, 0_u32);
            for (what, millis) in steps {
                now = after(now, millis);
                match what {
                    0 => demand.began(now),
                    1 => demand.ended(),
                    2 => { demand.began(now); members = members.saturating_sub(1); }
                    3 => demand.failed(now),
                    _ => demand.yielded(now),
                }
                prop_assert!((1..=size).contains(&demand.target(now)));
                // Whatever happens, whoever follows the plan ends with a full pool.
                let (mut waits, mut at) = (0, now);
                let mut trial = members;
                loop {
                    match demand.plan(trial, at) {
                        Plan::Make => { trial += 1; demand.made(); }
                        Plan::Wait(wait) => { prop_assert!(!wait.is_zero()); at += wait; waits += 1; }
                        Plan::Rest => break,
                    }
                    prop_assert!(trial <= size && waits <= 2 * size + 2, "{} members, {} waits", trial, waits);
                }
                members = trial;
                now = at;
            }
        }
    }
}
