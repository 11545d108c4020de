//! The routes in force. Owns: turning frames of the feed into tunnels, and finding a tunnel by its host or its id.
//! A route that does not make sense is not served, and said so.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::Duration,
};

use sandgate_api::{
    feed::Revision,
    id::{SandboxId, TunnelId},
    tunnel::{Route, TunnelError, TunnelFrame, TunnelProtocol},
};
use tokio::sync::Notify;

use crate::tunnel::{Moment, Tunnel};

/// Routes that are served at most.
const ROUTES_MAX: usize = 10_000;
/// Longest sleep between two looks for expired tunnels: the clock may be set meanwhile.
const LONGEST_SLEEP: Duration = Duration::from_secs(5);

/// The routes in force.
pub struct Table {
    inner: RwLock<Inner>,
    /// What is under way on one tunnel at most.
    each: usize,
    changed: Notify,
}

#[derive(Default)]
struct Inner {
    revision: Option<Revision>,
    by_id: HashMap<TunnelId, Served>,
    by_port: HashMap<(SandboxId, u16), Vec<Arc<Tunnel>>>,
    errors: HashMap<TunnelId, String>,
}

#[derive(Clone)]
struct Served {
    route: Route,
    tunnel: Arc<Tunnel>,
}

impl Table {
    /// No routes yet.
    pub fn new(each: usize) -> Self {
        Self {
            inner: RwLock::default(),
            each,
            changed: Notify::new(),
        }
    }

    /// Puts a frame in force. Returns the tunnels that are no more, which the caller closes.
    pub fn apply(&self, frame: TunnelFrame) -> Vec<Arc<Tunnel>> {
        let mut inner = self.write();
        let mut gone = Vec::new();
        match frame {
            TunnelFrame::Snapshot { revision, routes } => {
                let named: HashSet<TunnelId> = routes.iter().map(|route| route.tunnel_id.clone()).collect();
                let unnamed: Vec<TunnelId> = inner
                    .by_id
                    .keys()
                    .filter(|id| !named.contains(id))
                    .cloned()
                    .collect();
                inner.errors.clear();
                unnamed.iter().for_each(|id| gone.extend(inner.remove(id)));
                routes
                    .into_iter()
                    .for_each(|route| gone.extend(inner.upsert(route, self.each)));
                inner.revision = Some(revision);
            }
            TunnelFrame::Delta {
                revision,
                upserts,
                removed,
            } => {
                removed.iter().for_each(|id| gone.extend(inner.remove(id)));
                upserts
                    .into_iter()
                    .for_each(|route| gone.extend(inner.upsert(route, self.each)));
                inner.revision = Some(revision);
            }
            TunnelFrame::Heartbeat { .. } => {}
        }
        // From here on nobody finds them, and nothing new begins on them.
        gone.iter().for_each(|tunnel| tunnel.end().cancel());
        drop(inner);
        self.changed.notify_one();
        gone
    }

    /// Up to where the feed was followed.
    pub fn revision(&self) -> Option<Revision> {
        self.read().revision
    }

    /// Every route, to be saved.
    pub fn routes(&self) -> Vec<Route> {
        let inner = self.read();
        inner.by_id.values().map(|served| served.route.clone()).collect()
    }

    /// What is not served as asked.
    pub fn errors(&self) -> Vec<TunnelError> {
        let inner = self.read();
        let errors = inner.errors.iter().map(|(id, message)| TunnelError {
            tunnel_id: id.clone(),
            message: message.clone(),
        });
        errors.collect()
    }

    /// The tunnel.
    pub fn by_id(&self, id: &TunnelId) -> Option<Arc<Tunnel>> {
        let inner = self.read();
        inner.by_id.get(id).map(|served| Arc::clone(&served.tunnel))
    }

    /// The tunnels that a host name leads to: several when their tokens differ.
    pub fn by_host(&self, sandbox_id: SandboxId, port: u16) -> Vec<Arc<Tunnel>> {
        let mut tunnels = self.by_port(sandbox_id, port);
        // Bytes have no host.
        tunnels.retain(|tunnel| tunnel.protocol != TunnelProtocol::Tcp);
        tunnels
    }

    /// The tunnels to a port, whatever is spoken on them.
    pub fn by_port(&self, sandbox_id: SandboxId, port: u16) -> Vec<Arc<Tunnel>> {
        let inner = self.read();
        inner
            .by_port
            .get(&(sandbox_id, port))
            .cloned()
            .unwrap_or_default()
    }

    /// Every tunnel.
    pub fn all(&self) -> Vec<Arc<Tunnel>> {
        let inner = self.read();
        inner
            .by_id
            .values()
            .map(|served| Arc::clone(&served.tunnel))
            .collect()
    }

    /// Waits until tunnels expire; returns them, for the caller to close.
    pub async fn next_expired(&self) -> Vec<Arc<Tunnel>> {
        loop {
            let now = Moment::now();
            let mut expired = Vec::new();
            let mut sleep = LONGEST_SLEEP;
            for tunnel in self.all() {
                match tunnel.lives_for(now) {
                    Some(left) => sleep = sleep.min(left),
                    None if !tunnel.end().is_cancelled() => expired.push(tunnel),
                    None => {}
                }
            }
            if !expired.is_empty() {
                return expired;
            }
            tokio::select! {
                () = tokio::time::sleep(sleep) => {}
                () = self.changed.notified() => {}
            }
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, Inner> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Inner> {
        self.inner.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn upsert(&mut self, route: Route, each: usize) -> Option<Arc<Tunnel>> {
        let id = route.tunnel_id.clone();
        self.errors.remove(&id);
        if let Some(served) = self.by_id.get_mut(&id)
            && served.tunnel.serves(&route)
        {
            served.tunnel.expire_at(route.expires_at);
            served.route = route;
            return None;
        }
        let gone = self.remove(&id);
        if self.by_id.len() >= ROUTES_MAX {
            self.errors
                .insert(id, format!("more than {ROUTES_MAX} tunnels are open"));
            return gone;
        }
        match Tunnel::new(&route, each) {
            Ok(tunnel) => {
                let tunnel = Arc::new(tunnel);
                let port = (route.sandbox_id.clone(), route.port);
                self.by_port.entry(port).or_default().push(Arc::clone(&tunnel));
                self.by_id.insert(id, Served { route, tunnel });
            }
            Err(error) => {
                tracing::warn!(tunnel_id = %id, %error, "a tunnel is not served");
                self.errors.insert(id, error.to_string());
            }
        }
        gone
    }

    fn remove(&mut self, id: &TunnelId) -> Option<Arc<Tunnel>> {
        self.errors.remove(id);
        let Served { tunnel, .. } = self.by_id.remove(id)?;
        let port = (tunnel.sandbox_id.clone(), tunnel.port);
        if let Some(others) = self.by_port.get_mut(&port) {
            others.retain(|other| other.id != *id);
            if others.is_empty() {
                self.by_port.remove(&port);
            }
        }
        Some(tunnel)
    }
}

#[cfg(test)]
mod tests {
    use jiff::{Timestamp, ToSpan as _};
    use sandgate_api::tunnel::Access;

    use super::*;

    fn route(id: &str, port: u16) -> Route {
        Route {
            tunnel_id: id.parse().expect("an id"),
            sandbox_id: "sandbox-0a".parse().expect("an id"),
            port,
            protocol: TunnelProtocol::Http,
            access: Access::Public,
            expires_at: Timestamp::now() + 1.hour(),
            local_port: None,
        }
    }

    fn snapshot(routes: Vec<Route>) -> TunnelFrame {
        TunnelFrame::Snapshot { revision: 1, routes }
    }

    fn by_host(table: &Table, port: u16) -> Vec<String> {
        let found = table.by_host("sandbox-0a".parse().expect("an id"), port);
        found.iter().map(|tunnel| tunnel.id.to_string()).collect()
    }

    #[tokio::test]
    async fn what_a_snapshot_does_not_name_is_gone_and_the_rest_goes_on() {
        let table = Table::new(4);
        assert!(
            table
                .apply(snapshot(vec![route("tunnel-1", 80), route("tunnel-2", 81)]))
                .is_empty()
        );
        let first = table.by_id(&"tunnel-1".parse().expect("an id")).expect("served");
        let mut moved = route("tunnel-1", 80);
        moved.local_port = Some(40_000);
        moved.expires_at = Timestamp::now() + 2.hours();
        let gone = table.apply(snapshot(vec![moved.clone()]));
        assert_eq!(gone.len(), 1);
        assert_eq!(gone[0].id.as_str(), "tunnel-2");
        assert!(gone[0].end().is_cancelled() && !first.end().is_cancelled());
        let left = first.lives_for(Moment::now()).expect("it lives");
        assert!(left > Duration::from_secs(90 * 60), "{left:?}");
        assert_eq!(by_host(&table, 80), ["tunnel-1"]);
        assert!(by_host(&table, 81).is_empty());
        assert_eq!(table.routes(), [moved]);
    }

    #[tokio::test]
    async fn a_tunnel_that_changes_what_it_is_ends_and_begins_anew() {
        let table = Table::new(4);
        table.apply(snapshot(vec![route("tunnel-1", 80)]));
        let mut changed = route("tunnel-1", 80);
        changed.access = Access::Token {
            sha256: "00".repeat(32),
        };
        let gone = table.apply(TunnelFrame::Delta {
            revision: 2,
            upserts: vec![changed],
            removed: vec![],
        });
        assert_eq!(gone.len(), 1);
        assert_eq!(by_host(&table, 80), ["tunnel-1"]);
        assert_eq!(table.revision(), Some(2));
        let gone = table.apply(TunnelFrame::Delta {
            revision: 3,
            upserts: vec![],
            removed: vec!["tunnel-1".parse().expect("an id")],
        });
        assert_eq!(gone.len(), 1);
        assert!(by_host(&table, 80).is_empty());
    }

    #[tokio::test]
    async fn what_makes_no_sense_is_not_served_and_is_said() {
        let table = Table::new(4);
        let mut broken = route("tunnel-1", 80);
        broken.access = Access::Token {
            sha256: "no digest".to_owned(),
        };
        table.apply(snapshot(vec![broken]));
        assert!(by_host(&table, 80).is_empty());
        assert_eq!(table.errors().len(), 1);
        table.apply(snapshot(vec![route("tunnel-1", 80)]));
        assert!(table.errors().is_empty());
    }

    #[tokio::test]
    async fn a_tunnel_expires_and_bytes_have_no_host() {
        let table = Table::new(4);
        let mut short = route("tunnel-1", 80);
        short.expires_at = Timestamp::now() + 150.milliseconds();
        short.protocol = TunnelProtocol::Tcp;
        table.apply(snapshot(vec![short, route("tunnel-2", 81)]));
        assert!(by_host(&table, 80).is_empty());
        let expired = tokio::time::timeout(Duration::from_secs(5), table.next_expired());
        let expired = expired.await.expect("in time");
        assert_eq!(expired.len(), 1);
        assert!(!expired[0].is_open());
        expired[0].close().await;
        let more = tokio::time::timeout(Duration::from_millis(300), table.next_expired()).await;
        assert!(more.is_err(), "it expired twice");
    }
}
