//! Waiting for something that happens in its own time.

use std::{
    thread,
    time::{Duration, Instant},
};

/// Asks `probe` every 20 ms until it gives something or `limit` is over.
pub fn within<T>(limit: Duration, mut probe: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(found) = probe() {
            return Some(found);
        }
        if Instant::now() >= deadline {
            return None;
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// As [`within`], but panics with `what` when the time is over.
pub fn until<T>(what: &str, limit: Duration, probe: impl FnMut() -> Option<T>) -> T {
    within(limit, probe).unwrap_or_else(|| panic!("not within {limit:?}: {what}"))
}
