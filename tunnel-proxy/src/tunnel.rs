//! One tunnel as it is served. Owns: what is under way on it, at most how much, and its end: whatever ends a tunnel
//! (its removal, its expiry, a change of what it is) cuts everything under way on it.

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
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
    expires_at: AtomicI64,
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

/// Something under way on a tunnel, until it is dropped.
pub struct Place {
    tunnel: Arc<Tunnel>,
    number: u64,
}

/// As many are under way as may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Full;

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
            expires_at: AtomicI64::new(route.expires_at.as_millisecond()),
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
        self.expires_at.store(when.as_millisecond(), Ordering::Relaxed);
    }

    /// Time until it expires; nothing when it has.
    pub fn lives_for(&self, now: Timestamp) -> Option<Duration> {
        let left = self.expires_at.load(Ordering::Relaxed) - now.as_millisecond();
        u64::try_from(left)
            .ok()
            .filter(|left| *left > 0)
            .map(Duration::from_millis)
    }

    /// Whether its time is over.
    pub fn is_expired(&self) -> bool {
        self.lives_for(Timestamp::now()).is_none()
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
