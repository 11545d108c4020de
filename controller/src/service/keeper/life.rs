//! When a running sandbox ends by itself, and what puts that off. Owns the clockwork; what counts as use is decided by
//! whoever calls.
//!
//! The wall clock is asked once, when a keeper begins: one that is set back makes no life longer, and what is added
//! later is added to the clock that nobody sets.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use jiff::Timestamp;
use tokio::{sync::Notify, time::Instant};

use crate::lifecycle::Cause;

/// The end of a sandbox that runs. Shared by its keeper and by those who use it.
#[derive(Debug)]
pub(in crate::service) struct Life {
    state: Mutex<State>,
    /// Told when the end may come at another time than before.
    changed: Notify,
    /// What ends it at its deadline.
    cause: Cause,
    idle: Option<Duration>,
    /// Whoever freezes it or lets it go on does so alone.
    pub(in crate::service) freezing: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
struct State {
    /// As stored.
    expires_at: Timestamp,
    /// The same, on the steady clock.
    deadline: Instant,
    /// When it was used last.
    used: Instant,
    /// Uses under way.
    busy: usize,
    paused: bool,
    /// The end has begun.
    over: bool,
}

/// A use under way: a sandbox is not idle while there is one.
#[derive(Debug)]
pub(in crate::service) struct Use(Arc<Life>);

impl Drop for Use {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.busy = state.busy.saturating_sub(1);
        state.used = Instant::now();
        drop(state);
        self.0.changed.notify_one();
    }
}

/// What ends a life next, if nothing puts it off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Due {
    pub(super) at: Instant,
    pub(super) cause: Cause,
}

impl Life {
    /// A life that has `left` until `expires_at`.
    pub(super) fn new(expires_at: Timestamp, left: Duration, idle: Option<Duration>, cause: Cause) -> Self {
        let now = Instant::now();
        Self {
            state: Mutex::new(State {
                expires_at,
                deadline: now + left,
                used: now,
                busy: 0,
                paused: false,
                over: false,
            }),
            changed: Notify::new(),
            cause,
            idle,
            freezing: tokio::sync::Mutex::default(),
        }
    }

    /// It was used.
    pub(in crate::service) fn touch(&self) {
        self.lock().used = Instant::now();
    }

    /// It is in use for as long as the answer lives.
    pub(in crate::service) fn begin_use(self: &Arc<Self>) -> Use {
        self.lock().busy += 1;
        Use(Arc::clone(self))
    }

    /// It lives until then, if that is later than before. False: its end has begun.
    pub(in crate::service) fn extend_to(&self, expires_at: Timestamp) -> bool {
        let mut state = self.lock();
        if state.over {
            return false;
        }
        let longer = Duration::try_from(expires_at.duration_since(state.expires_at)).unwrap_or_default();
        if !longer.is_zero() {
            state.expires_at = expires_at;
            state.deadline += longer;
        }
        state.used = Instant::now();
        drop(state);
        self.changed.notify_one();
        true
    }

    /// Its processes are frozen, or go on. What is frozen is not idle; its lifetime goes on.
    pub(in crate::service) fn set_paused(&self, paused: bool) {
        let mut state = self.lock();
        state.paused = paused;
        state.used = Instant::now();
        drop(state);
        self.changed.notify_one();
    }

    /// What ends it next.
    pub(super) fn due(&self) -> Due {
        self.lock().due(self.cause, self.idle)
    }

    /// Begins the end, if what was due is due still.
    pub(super) fn lapse(&self, due: Due) -> bool {
        let mut state = self.lock();
        let is_due = state.due(self.cause, self.idle).at <= due.at;
        state.over |= is_due;
        is_due
    }

    /// Resolves when the end may come at another time than before.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn due(&self, cause: Cause, idle: Option<Duration>) -> Due {
        let deadline = Due {
            at: self.deadline,
            cause,
        };
        let Some(idle) = idle.filter(|_| self.busy == 0 && !self.paused) else {
            return deadline;
        };
        let at = self.used + idle;
        if at < self.deadline {
            Due {
                at,
                cause: Cause::Idle,
            }
        } else {
            deadline
        }
    }
}

#[cfg(test)]
mod tests {
    use jiff::SignedDuration;

    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    fn life(idle: Option<Duration>) -> (Arc<Life>, Timestamp) {
        let end = Timestamp::UNIX_EPOCH + SignedDuration::from_hours(500_000);
        (Arc::new(Life::new(end, 10 * MINUTE, idle, Cause::Expired)), end)
    }

    #[test]
    fn what_is_added_puts_the_end_off_and_is_never_taken_back() {
        let (life, end) = life(None);
        let first = life.due();
        assert_eq!(first.cause, Cause::Expired);
        assert!(life.extend_to(end + SignedDuration::from_mins(5)));
        assert_eq!(life.due().at, first.at + 5 * MINUTE);
        assert!(life.extend_to(end), "an earlier end changes nothing");
        assert_eq!(life.due().at, first.at + 5 * MINUTE);
        assert!(!life.lapse(first), "it is not due any more");
        assert!(life.lapse(life.due()));
        assert!(!life.extend_to(end + SignedDuration::from_hours(1)), "too late");
    }

    #[test]
    fn one_that_nobody_uses_ends_earlier_and_one_in_use_does_not() {
        let (life, _end) = life(Some(MINUTE));
        let idle = life.due();
        assert_eq!(idle.cause, Cause::Idle);
        let (first, second) = (life.begin_use(), life.begin_use());
        assert_eq!(life.due().cause, Cause::Expired);
        drop(first);
        assert_eq!(life.due().cause, Cause::Expired, "one use goes on");
        drop(second);
        let after = life.due();
        assert_eq!(after.cause, Cause::Idle);
        assert!(after.at >= idle.at);
        assert!(!life.lapse(idle) || after.at == idle.at);
    }

    #[test]
    fn what_is_frozen_is_not_idle_and_its_lifetime_goes_on() {
        let (life, _end) = life(Some(MINUTE));
        let idle = life.due();
        life.set_paused(true);
        let frozen = life.due();
        assert_eq!(frozen.cause, Cause::Expired);
        life.set_paused(false);
        let after = life.due();
        assert_eq!(after.cause, Cause::Idle);
        assert!(after.at >= idle.at, "it has a whole timeout again");
        assert!(after.at < frozen.at);
    }

    #[test]
    fn an_idle_timeout_longer_than_the_life_changes_nothing() {
        let (life, _end) = life(Some(60 * MINUTE));
        assert_eq!(life.due().cause, Cause::Expired);
    }
}
