//! Connections to servers between two flows of one sandbox. Owns: that a connection serves one flow at a time, that it
//! is used again for the same server, address and way of speaking only, and not once other rules are in force than those
//! under which it was made. No two sandboxes share one. Only connections by TLS are worth it; a flow in clear has a
//! pool of its own, which ends with it.
//!
//! A flow takes connections out and gives them back; whatever it does not give back ends with it.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use hyper::client::conn::{http1, http2};
use tokio::time::Instant;
use tokio_util::sync::DropGuard;

use super::{Body, Target};

/// Connections of one sandbox that wait at once.
const IDLE_MAX: usize = 32;
/// How long one waits.
const IDLE_TIME: Duration = Duration::from_secs(60);
/// How long one has waited at most on which a request goes that cannot be sent again: servers close idle connections
/// after five seconds and more, and such a request could meet the close on its way.
const SURE_TIME: Duration = Duration::from_secs(4);

/// How requests go over a connection.
pub(crate) enum Link {
    /// One after another.
    One(http1::SendRequest<Body>),
    /// Beside each other.
    Many(http2::SendRequest<Body>),
}

impl Link {
    fn is_closed(&self) -> bool {
        match self {
            Self::One(sender) => sender.is_closed(),
            Self::Many(sender) => sender.is_closed(),
        }
    }
}

/// A connection to a server. It ends when this is dropped.
pub(crate) struct Connection {
    /// How requests go over it.
    pub(crate) link: Link,
    /// It has served a flow before.
    pub(crate) is_used: bool,
    made_under: Epoch,
    _end: DropGuard,
}

impl Connection {
    /// A new one, whose task ends when `end` is dropped.
    pub(crate) fn new(link: Link, made_under: Epoch, end: DropGuard) -> Self {
        Self {
            link,
            is_used: false,
            made_under,
            _end: end,
        }
    }
}

/// Which of the rules that a sandbox has had a connection was made under.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Epoch(u64);

/// The connections of one sandbox.
#[derive(Default)]
pub struct Pool(Mutex<State>);

#[derive(Default)]
struct State {
    epoch: Epoch,
    /// In the order in which they came.
    idle: Vec<Idle>,
    ended: bool,
}

struct Idle {
    target: Target,
    connection: Connection,
    since: Instant,
}

impl Pool {
    /// Under what a connection is made at this moment.
    pub(crate) fn epoch(&self) -> Epoch {
        self.lock().epoch
    }

    /// A connection to exactly this target: the one that came last. `is_sure` asks for one that the server has hardly
    /// closed meanwhile.
    pub(crate) fn take(&self, target: &Target, is_sure: bool) -> Option<Connection> {
        let limit = if is_sure { SURE_TIME } else { IDLE_TIME };
        let mut state = self.lock();
        loop {
            let fits = |idle: &Idle| idle.target == *target && idle.since.elapsed() < limit;
            let at = state.idle.iter().rposition(fits)?;
            let Idle { connection, .. } = state.idle.remove(at);
            if !connection.link.is_closed() {
                return Some(connection);
            }
        }
    }

    /// Takes a connection back on which nothing is under way.
    pub(crate) fn give(&self, target: Target, mut connection: Connection) {
        let mut state = self.lock();
        if state.ended || connection.made_under != state.epoch || connection.link.is_closed() {
            return;
        }
        connection.is_used = true;
        if state.idle.len() == IDLE_MAX {
            state.idle.remove(0);
        }
        state.idle.push(Idle {
            target,
            connection,
            since: Instant::now(),
        });
    }

    /// Ends what waits, and what is under way once its flow gives it back: other rules are in force.
    pub fn renew(&self) {
        let mut state = self.lock();
        state.epoch.0 += 1;
        state.idle.clear();
    }

    /// Ends what has waited too long.
    pub fn sweep(&self) {
        self.lock()
            .idle
            .retain(|idle| idle.since.elapsed() < IDLE_TIME && !idle.connection.link.is_closed());
    }

    /// Ends what waits, and takes nothing back any more.
    pub fn end(&self) {
        let mut state = self.lock();
        state.ended = true;
        state.idle.clear();
    }

    /// How many wait.
    #[cfg(test)]
    pub(crate) fn waiting(&self) -> usize {
        self.lock().idle.len()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
