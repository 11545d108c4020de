//! One tunnel as it is served. Owns: what is under way on it, at most how much, and its end: whatever ends a tunnel
//! (its removal, its expiry, a change of what it is) cuts everything under way on it.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use jiff::Timestamp;
use sandgate_api::{
    id::{SandboxId, TunnelId},
    tunnel::{Route, TunnelProtocol},
};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::{
    access::{Access, NoDigest},
    upstream::Pool,
};

/// Time for what is under way to end by itself once it was told to: to say why, rather than break off.
const POLITE: Duration = Duration::from_millis(200);
/// Time for connections that were told to break off.
const FORCED: Duration = Duration::from_millis(500);

/// One tunnel.
pub struct Tunnel {
    /// Which one.
    pub id: TunnelId,
    /// Where it leads.
    pub sandbox_id: SandboxId,
    /// The TCP port inside.
    pub port: u16,
    /// What is spoken on it.
    pub protocol: TunnelProtocol,
    /// Who may use it.
    pub access: Access,
    /// Connections to the sandbox that may be used again, on this tunnel only.
    pub pool: Pool,
    expiry: Mutex<Expiry>,
    end: CancellationToken,
    most: usize,
    under_way: Mutex<UnderWay>,
    emptied: Notify,
}

#[derive(Default)]
struct UnderWay {
    next: u64,
    /// What breaks off the connection that each belongs to.
    entries: HashMap<u64, CancellationToken>,
}

/// One moment, by the clock on the wall and by one that nobody can set.
#[derive(Debug, Clone, Copy)]
pub struct Moment {
    wall: Timestamp,
    steady: Instant,
}

/// When a tunnel ends: when the clock on the wall says so, and after the time that it was given in any case, so that a
/// clock that is set back does not keep it open.
#[derive(Debug)]
struct Expiry {
    at: Timestamp,
    /// None: later than can be told.
    deadline: Option<Instant>,
}

/// Something under way on a tunnel, until it is dropped.
pub struct Place {
    tunnel: Arc<Tunnel>,
    number: u64,
}

/// As many are under way as may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Full;

impl Moment {
    /// This one.
    pub fn now() -> Self {
        Self {
            wall: Timestamp::now(),
            steady: Instant::now(),
        }
    }
}

impl Expiry {
    fn new(at: Timestamp, now: Moment) -> Self {
        let deadline = now.steady.checked_add(until(at, now.wall));
        Self { at, deadline }
    }

    fn left(&self, now: Moment) -> Option<Duration> {
        let by_wall = until(self.at, now.wall);
        let steady = self
            .deadline
            .map(|deadline| deadline.saturating_duration_since(now.steady));
        Some(steady.map_or(by_wall, |left| left.min(by_wall))).filter(|left| !left.is_zero())
    }
}

/// Nothing when it is past.
fn until(when: Timestamp, now: Timestamp) -> Duration {
    Duration::try_from(when.duration_since(now)).unwrap_or(Duration::ZERO)
}

impl Tunnel {
    /// A tunnel on which at most `most` requests and connections are under way at once.
    ///
    /// # Errors
    /// When nobody could use it.
    pub fn new(route: &Route, most: usize) -> Result<Self, NoDigest> {
        Ok(Self {
            id: route.tunnel_id.clone(),
            sandbox_id: route.sandbox_id.clone(),
            port: route.port,
            protocol: route.protocol,
            access: Access::try_from(&route.access)?,
            pool: Pool::default(),
            expiry: Mutex::new(Expiry::new(route.expires_at, Moment::now())),
            end: CancellationToken::new(),
            most,
            under_way: Mutex::default(),
            emptied: Notify::new(),
        })
    }

    /// Whether a route is this tunnel, but perhaps for its expiry.
    pub fn serves(&self, route: &Route) -> bool {
        !self.end.is_cancelled()
            && self.sandbox_id == route.sandbox_id
            && self.port == route.port
            && self.protocol == route.protocol
            && Access::try_from(&route.access).as_ref() == Ok(&self.access)
    }

    /// Moves the expiry.
    pub fn expire_at(&self, when: Timestamp) {
        let mut expiry = self.expiry();
        // Heard again, it is still what it was: the clock may have been set since.
        if expiry.at != when {
            *expiry = Expiry::new(when, Moment::now());
        }
    }

    /// Time until it expires; nothing when it has.
    pub fn lives_for(&self, now: Moment) -> Option<Duration> {
        self.expiry().left(now)
    }

    /// Whether its time is over.
    pub fn is_expired(&self) -> bool {
        self.lives_for(Moment::now()).is_none()
    }

    /// Whether it lets anything through.
    pub fn is_open(&self) -> bool {
        !self.end.is_cancelled() && !self.is_expired()
    }

    /// Cancelled when it lets nothing through any more.
    pub fn end(&self) -> &CancellationToken {
        &self.end
    }

    /// Takes a place among what is under way; `breaks` is cancelled when the connection must break off.
    ///
    /// # Errors
    /// When there is none.
    pub fn enter(self: &Arc<Self>, breaks: CancellationToken) -> Result<Place, Full> {
        let mut under_way = self.lock();
        if under_way.entries.len() >= self.most {
            return Err(Full);
        }
        let number = under_way.next;
        under_way.next += 1;
        under_way.entries.insert(number, breaks);
        drop(under_way);
        Ok(Place {
            tunnel: Arc::clone(self),
            number,
        })
    }

    /// Lets nothing through any more, and waits until nothing is under way. Takes well under a second.
    pub async fn close(&self) {
        self.end.cancel();
        self.pool.clear();
        if tokio::time::timeout(POLITE, self.emptied()).await.is_ok() {
            return;
        }
        let left: Vec<CancellationToken> = self.lock().entries.values().cloned().collect();
        left.iter().for_each(CancellationToken::cancel);
        if tokio::time::timeout(FORCED, self.emptied()).await.is_err() {
            let left = self.lock().entries.len();
            tracing::error!(tunnel_id = %self.id, left, "connections of a closed tunnel do not end");
        }
    }

    /// How many are under way.
    pub fn under_way(&self) -> usize {
        self.lock().entries.len()
    }

    async fn emptied(&self) {
        loop {
            let notified = self.emptied.notified();
            if self.lock().entries.is_empty() {
                return;
            }
            notified.await;
        }
    }

    fn expiry(&self) -> MutexGuard<'_, Expiry> {
        self.expiry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, UnderWay> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Tunnel {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Tunnel")
            .field("id", &self.id)
            .field("sandbox_id", &self.sandbox_id)
            .field("port", &self.port)
            .finish_non_exhaustive()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut under_way = self.tunnel.lock();
        under_way.entries.remove(&self.number);
        let is_empty = under_way.entries.is_empty();
        drop(under_way);
        if is_empty {
            self.tunnel.emptied.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use jiff::SignedDuration;

    use super::*;

    #[test]
    fn a_clock_that_is_set_back_gives_no_tunnel_more_time() {
        let began = Moment::now();
        let later = |seconds: u64, wall: i64| Moment {
            wall: began.wall + SignedDuration::from_secs(wall),
            steady: began.steady + Duration::from_secs(seconds),
        };
        let expiry = Expiry::new(began.wall + SignedDuration::from_secs(60), began);
        assert_eq!(expiry.left(later(20, 20)), Some(Duration::from_secs(40)));
        assert_eq!(expiry.left(later(20, -3600)), Some(Duration::from_secs(40)));
        assert_eq!(expiry.left(later(60, -3600)), None);
        // The clock on the wall is the one that its owner was told.
        assert_eq!(expiry.left(later(1, 60)), None);
        assert_eq!(expiry.left(later(30, 50)), Some(Duration::from_secs(10)));
    }

    #[test]
    fn what_is_heard_again_begins_no_new_time() {
        let began = Moment::now();
        let at = began.wall + SignedDuration::from_secs(60);
        let route = Route {
            tunnel_id: "tunnel-1".parse().expect("an id"),
            sandbox_id: "sandbox-0a".parse().expect("an id"),
            port: 80,
            protocol: TunnelProtocol::Http,
            access: sandgate_api::tunnel::Access::Public,
            expires_at: at,
            local_port: None,
        };
        let tunnel = Tunnel::new(&route, 1).expect("a tunnel");
        // Made while the clock was an hour ahead.
        *tunnel.expiry() = Expiry {
            at,
            deadline: Some(began.steady + Duration::from_secs(5)),
        };
        tunnel.expire_at(at);
        assert!(
            tunnel
                .lives_for(began)
                .is_some_and(|left| left <= Duration::from_secs(5))
        );
        tunnel.expire_at(at + SignedDuration::from_secs(3600));
        assert!(
            tunnel
                .lives_for(began)
                .is_some_and(|left| left > Duration::from_secs(3600))
        );
    }
}
