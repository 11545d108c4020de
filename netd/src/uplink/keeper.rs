//! Keeps the uplink in use as long as it works, and only then. Owns: proving it with a canary, telling the programs,
//! and looking again whenever the node's firewall or routes change.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use futures_util::StreamExt as _;
use rtnetlink::MulticastGroup;
use sandgate_daemon::tasks::Tasks;
use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;

use super::{
    Place, Uplink, UplinkError, firewall,
    generation::{self, generation},
};
use crate::{canary, kernel::Datapath, router::pass};

/// Whether packets leave without netd; the reason why not.
pub type Passing = Result<(), String>;

/// How often the firewall's generation is asked for, besides what the kernel tells; and how often a canary flies at most
/// while the firewall keeps changing.
const LOOK: Duration = Duration::from_secs(1);
/// Everything is looked at this often, in case an announcement was lost.
const RELOOK: Duration = Duration::from_secs(30);
/// Announcements of routes come in bursts.
const SETTLED: Duration = Duration::from_millis(200);
/// After a failure it is tried again when something has changed, but not sooner than this: each time the node's
/// settings are changed and restored.
const PATIENCE: Duration = Duration::from_secs(30);

/// Canaries that are sent before the uplink is taken for broken: to take it away ends whatever leaves by it.
const FLIGHTS: u32 = 3;

/// The uplink in use.
pub struct Keeper {
    place: Result<Place, String>,
    uplink: Mutex<Option<Uplink>>,
    datapath: Arc<Datapath>,
    doubted: Notify,
}

/// What has changed on the node since the last look.
#[derive(Debug, Default, Clone, Copy)]
struct Changed {
    firewall: bool,
    routes: bool,
    /// Who stands first on the uplink.
    programs: bool,
}

impl Changed {
    fn any(self) -> bool {
        self.firewall || self.routes || self.programs
    }
}

impl Keeper {
    /// For an uplink that belongs there, or the reason why there shall be none.
    pub fn new(place: Result<Place, String>, datapath: Arc<Datapath>) -> Self {
        Self {
            place,
            uplink: Mutex::default(),
            datapath,
            doubted: Notify::new(),
        }
    }

    /// Has it proven anew: its program does not stand where it must, and the programs use it no more.
    pub fn doubt(&self) {
        self.doubted.notify_one();
    }

    /// Makes or adopts the uplink, sends a canary out over it, and has the programs use it if it returns. If it does
    /// not, nothing of the uplink is left. Blocking, a fraction of a second when all is well.
    pub fn prove(&self) -> Passing {
        let place = self.place.as_ref().map_err(Clone::clone)?;
        let mut uplink = self.uplink.lock().unwrap_or_else(PoisonError::into_inner);
        self.try_out(place, &mut uplink).inspect_err(|_| {
            *uplink = None;
            self.lower(place);
        })
    }

    fn try_out(&self, place: &Place, uplink: &mut Option<Uplink>) -> Passing {
        let told = |error: &dyn std::error::Error| error.to_string();
        let stood = uplink.is_some();
        let raised = match uplink.take() {
            Some(raised) => {
                raised.settle().map_err(|error| told(&error))?;
                raised
            }
            None => Uplink::raise(place.clone(), self.datapath.router()).map_err(|error| told(&error))?,
        };
        let raised = uplink.insert(raised);
        self.datapath
            .attach_uplink(&raised.kernel())
            .and_then(|()| self.datapath.set_uplink(Some(raised.kernel())))
            .map_err(|error| told(&error))?;
        let fly = || canary::pass(&self.datapath, place.sandboxes, raised.names());
        let mut flown = fly();
        for _ in 1..FLIGHTS {
            if flown.is_ok() {
                break;
            }
            // The firewall may have been changed under it.
            raised.settle().map_err(|error| told(&error))?;
            flown = fly();
        }
        match flown {
            Ok(()) => Ok(()),
            Err(error) if error.is_lost() => Err(format!("{error}; {}", firewall::blame(raised.names()))),
            // That nothing could be sent says nothing about the way.
            Err(error) if stood => {
                tracing::warn!(%error, "the kernel pass could not be proven again; it stays as it is");
                Ok(())
            }
            Err(error) => Err(error.to_string()),
        }
    }

    /// First the programs, so that nothing goes where nothing is.
    fn lower(&self, place: &Place) {
        if let Err(error) = self.datapath.set_uplink(None) {
            tracing::error!(%error, "the programs go on using an uplink that does not work");
        }
        let closed = pass::close(self.datapath.router()).map_err(UplinkError::from);
        if let Err(error) = Uplink::take_away(&place.run_dir).and(closed) {
            tracing::warn!(%error, "the uplink could not be taken away; it is tried again with the next netd");
        }
    }

    /// Looks after it until `end`, and tells `changed` whenever it begins or ceases to work. `passing` is what
    /// [`Self::prove`] has said.
    pub async fn keep(
        self: Arc<Self>,
        mut passing: Passing,
        changed: impl Fn(Passing),
        tasks: &Tasks,
        end: CancellationToken,
    ) {
        tell(&passing);
        if self.place.is_err() {
            return;
        }
        let (mut routes, mut firewall) = (watch_routes(tasks), watch_firewall(tasks));
        let (mut seen, mut looked) = (self.in_line(), Instant::now());
        let mut pending = Changed::default();
        loop {
            tokio::select! {
                () = end.cancelled() => return,
                () = tokio::time::sleep(LOOK) => {}
                () = self.doubted.notified() => pending.programs = true,
                Some(()) = firewall.recv() => self.rearm(&passing).await,
                Some(()) = routes.recv() => {
                    tokio::time::sleep(SETTLED).await;
                    while routes.try_recv().is_ok() {}
                    pending.routes = true;
                }
            }
            pending.firewall |= generation().ok() != seen;
            let since = looked.elapsed();
            let due = if passing.is_ok() {
                pending.programs || pending.routes || pending.firewall && since >= LOOK || since >= RELOOK
            } else {
                pending.any() && since >= PATIENCE
            };
            if !due {
                continue;
            }
            let (keeper, was) = (Arc::clone(&self), passing.clone());
            let looking = tokio::task::spawn_blocking(move || keeper.look(was, pending));
            let found = looking.await.unwrap_or_else(|error| Err(error.to_string()));
            pending = Changed {
                // What is not ours went with the uplink that it hung on: the next one may do.
                programs: pending.programs && found.is_err(),
                ..Changed::default()
            };
            if found.is_err() {
                // What we ourselves have just changed is no news.
                tokio::time::sleep(SETTLED).await;
                while routes.try_recv().is_ok() {}
            }
            (seen, looked) = (self.in_line(), Instant::now());
            if found != passing {
                passing = found;
                tell(&passing);
                changed(passing.clone());
            }
        }
    }

    /// The generation of the node's firewall when the uplink was last seen to be in line with it; without an uplink,
    /// that of this moment.
    fn in_line(&self) -> Option<u32> {
        let uplink = self.uplink.lock().unwrap_or_else(PoisonError::into_inner);
        match uplink.as_ref() {
            Some(uplink) => uplink.generation(),
            None => generation().ok(),
        }
    }

    /// Loads the uplink's table again if somebody has taken it away, without waiting for the next look: what passes until
    /// then is not masqueraded, and the node forwards what it should not.
    async fn rearm(self: &Arc<Self>, passing: &Passing) {
        if passing.is_err() || generation().ok() == self.in_line() {
            return;
        }
        let keeper = Arc::clone(self);
        let settling = tokio::task::spawn_blocking(move || {
            let uplink = keeper.uplink.lock().unwrap_or_else(PoisonError::into_inner);
            uplink.as_ref().map(Uplink::settle)
        });
        match settling.await {
            Ok(Some(Ok(true))) => {
                tracing::warn!("the node's firewall was changed under the uplink; its table stands again");
            }
            Ok(Some(Ok(false)) | None) => {}
            // The look that follows takes the uplink down if it cannot be mended.
            Ok(Some(Err(error))) => tracing::warn!(%error, "the uplink is not in line with the node"),
            Err(_panic) => tracing::error!("looking after the uplink broke"),
        }
    }

    /// A canary flies where something may have changed on its way.
    fn look(&self, was: Passing, changed: Changed) -> Passing {
        if was.is_ok() && !changed.firewall && !changed.programs {
            let uplink = self.uplink.lock().unwrap_or_else(PoisonError::into_inner);
            let settled = uplink.as_ref().map(Uplink::settle);
            if matches!(settled, Some(Ok(false))) {
                return was;
            }
        }
        self.prove()
    }
}

/// Says it in the log.
fn tell(passing: &Passing) {
    match passing {
        Ok(()) => tracing::info!("the kernel pass is on: what needs no look inside leaves without netd"),
        Err(reason) => {
            tracing::warn!(%reason, "the kernel pass is off; all TCP goes through netd, rules for UDP are not taken")
        }
    }
}

/// A word whenever routes or interfaces of the node change.
fn watch_routes(tasks: &Tasks) -> mpsc::Receiver<()> {
    let (news, heard) = mpsc::channel(16);
    let groups = [
        MulticastGroup::Link,
        MulticastGroup::Ipv4Route,
        MulticastGroup::Ipv6Route,
    ];
    match rtnetlink::new_multicast_connection(&groups) {
        Ok((connection, handle, mut announcements)) => {
            tasks.spawn("netlink routes", connection);
            tasks.spawn("routes", async move {
                // It keeps the connection open.
                let _handle = handle;
                while announcements.next().await.is_some() {
                    // Full means: there is news already.
                    if let Err(mpsc::error::TrySendError::Closed(())) = news.try_send(()) {
                        return;
                    }
                }
            });
        }
        Err(error) => tracing::warn!(%error, "the node's routes are looked at only now and then"),
    }
    heard
}

/// A word whenever a rule of the node's firewall changes.
fn watch_firewall(tasks: &Tasks) -> mpsc::Receiver<()> {
    let (news, heard) = mpsc::channel(1);
    match generation::listen() {
        Ok(socket) => {
            tasks.spawn("firewall", async move {
                if let Err(error) = generation::follow(socket, news).await {
                    tracing::warn!(%error, "the node's firewall is looked at only every second");
                }
            });
        }
        Err(error) => tracing::warn!(%error, "the node's firewall is looked at only every second"),
    }
    heard
}
