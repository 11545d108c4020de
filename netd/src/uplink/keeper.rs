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
    patience::Patience,
};
use crate::{
    canary::{self, CanaryError},
    kernel::{Datapath, DatapathError},
    router::pass,
};

/// Whether packets leave without netd, by family; the reason why not. IPv6 never does where IPv4 does not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Passing {
    /// IPv4.
    pub ipv4: Result<(), String>,
    /// IPv6.
    pub ipv6: Result<(), String>,
}

impl Passing {
    /// Nothing does, for one reason.
    pub fn nothing(reason: String) -> Self {
        Self {
            ipv4: Err(reason.clone()),
            ipv6: Err(reason),
        }
    }
}

/// How often the firewall's generation is asked for, besides what the kernel tells; and how often a canary flies at most
/// while the firewall keeps changing.
const LOOK: Duration = Duration::from_secs(1);
/// Everything is looked at this often, in case an announcement was lost.
const RELOOK: Duration = Duration::from_secs(30);
/// Announcements of routes come in bursts.
const SETTLED: Duration = Duration::from_millis(200);

/// Canaries that are sent before the uplink is taken for broken: to take it away ends whatever leaves by it.
const FLIGHTS: u32 = 3;

/// The uplink in use.
pub struct Keeper {
    place: Result<Place, String>,
    uplink: Mutex<Option<Uplink>>,
    datapath: Arc<Datapath>,
    doubted: Notify,
}

/// What came of trying IPv6.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tried {
    /// It was not.
    Not,
    /// The node cannot have it as it is.
    Impossible,
    /// A canary flew, or what it needs could not be made.
    Yes,
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

    /// Makes or adopts the uplink, sends a canary of each family out over it, and has the programs use it for the
    /// families whose canary returns: until then nobody's packets leave by it but the canary's, or it was in use before.
    /// If that of IPv4 does not return, nothing of the uplink is left. Blocking, a fraction of a second when all is well.
    pub fn prove(&self) -> Passing {
        self.prove_again(false, true).0
    }

    /// The same for an uplink by which IPv6 may have `stood` so far; `again` if it shall be tried where it did not.
    fn prove_again(&self, stood: bool, again: bool) -> (Passing, Tried) {
        let place = match &self.place {
            Ok(place) => place,
            Err(reason) => return (Passing::nothing(reason.clone()), Tried::Not),
        };
        let mut uplink = self.uplink.lock().unwrap_or_else(PoisonError::into_inner);
        match self.try_out(place, &mut uplink) {
            Ok(raised) => {
                let (ipv6, tried) = self.try_ipv6(place, raised, stood, again);
                (Passing { ipv4: Ok(()), ipv6 }, tried)
            }
            Err(reason) => {
                *uplink = None;
                self.lower(place);
                (Passing::nothing(reason), Tried::Not)
            }
        }
    }

    fn try_out<'uplink>(
        &self,
        place: &Place,
        uplink: &'uplink mut Option<Uplink>,
    ) -> Result<&'uplink mut Uplink, String> {
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
        let refused = |error: DatapathError| {
            if matches!(error, DatapathError::NotFirst { .. }) {
                // What stands before ours goes with the uplink: the next one may do, whatever else changes or does not.
                self.doubt();
            }
            told(&error)
        };
        let proven = self.datapath.prepare_uplink(&raised.kernel()).map_err(refused)?;
        match self.fly(place, raised, false)? {
            Ok(()) => {
                let opened = self.datapath.open_uplink(&raised.kernel(), false);
                opened.map_err(refused)?;
                Ok(raised)
            }
            Err(error) if error.is_lost() => Err(format!("{error}; {}", firewall::blame(raised.names()))),
            // That nothing could be sent says nothing about the way.
            Err(error) if stood && proven.ipv4 => {
                tracing::warn!(%error, "the kernel pass could not be proven again; it stays as it is");
                Ok(raised)
            }
            Err(error) => Err(error.to_string()),
        }
    }

    /// What the canaries said; an error when the uplink cannot be held in line with the node meanwhile.
    fn fly(&self, place: &Place, uplink: &Uplink, ipv6: bool) -> Result<Result<(), CanaryError>, String> {
        let fly = || canary::pass(&self.datapath, place, uplink.names(), ipv6);
        let mut flown = fly();
        for _ in 1..FLIGHTS {
            if flown.is_ok() {
                break;
            }
            // The firewall may have been changed under it.
            uplink.settle().map_err(|error| error.to_string())?;
            flown = fly();
        }
        Ok(flown)
    }

    /// Has IPv6 leave by an uplink that works, if it can; else takes away what was made for it.
    fn try_ipv6(
        &self,
        place: &Place,
        uplink: &mut Uplink,
        stood: bool,
        again: bool,
    ) -> (Result<(), String>, Tried) {
        let (outcome, tried) = match uplink.could_ipv6() {
            // Nothing was made for it.
            Err(reason) if uplink.ipv6().is_err() => {
                let tried = if again { Tried::Impossible } else { Tried::Not };
                return (Err(reason), tried);
            }
            Err(reason) => (Err(reason), Tried::Impossible),
            Ok(()) if uplink.ipv6().is_err() && !again => return (uplink.ipv6(), Tried::Not),
            Ok(()) => (self.fly_ipv6(place, uplink, stood), Tried::Yes),
        };
        if let Err(reason) = &outcome {
            self.lower_ipv6(uplink, reason);
        }
        (outcome, tried)
    }

    fn fly_ipv6(&self, place: &Place, uplink: &mut Uplink, stood: bool) -> Result<(), String> {
        let told = |error: &dyn std::error::Error| error.to_string();
        if uplink.ipv6().is_err() {
            let raised = uplink.raise_ipv6(self.datapath.router());
            raised.map_err(|error| told(&error))?;
        }
        match self.fly(place, uplink, true)? {
            Ok(()) => {
                let opened = self.datapath.open_uplink(&uplink.kernel(), true);
                opened.map_err(|error| told(&error))
            }
            Err(error) if error.is_lost() => Err(format!("{error}; {}", firewall::blame(uplink.names()))),
            Err(error) if stood => {
                tracing::warn!(%error, "the kernel pass of IPv6 could not be proven again; it stays as it is");
                Ok(())
            }
            Err(error) => Err(error.to_string()),
        }
    }

    /// First the programs, as below.
    fn lower_ipv6(&self, uplink: &mut Uplink, reason: &str) {
        if let Err(error) = self.datapath.close_uplink6() {
            tracing::error!(%error, "the programs go on using an uplink for IPv6 that does not work");
        }
        if let Err(error) = uplink.lower_ipv6(reason.to_owned(), self.datapath.router()) {
            tracing::warn!(%error, "what was made for IPv6 could not be taken away; it goes with the uplink");
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
        // For IPv6 where IPv4 works: whether something has changed since it was tried.
        let mut pending6 = false;
        let mut patience = Patience::new(passing.ipv4.is_ok(), looked);
        let mut patience6 = Patience::new(passing.ipv6.is_ok(), looked);
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
            pending6 |= pending.any();
            let since = looked.elapsed();
            let due = if passing.ipv4.is_ok() {
                pending.programs || pending.routes || pending.firewall && since >= LOOK || since >= RELOOK
            } else {
                pending.any() && patience.is_over(Instant::now())
            };
            let again = passing.ipv6.is_err() && pending6 && patience6.is_over(Instant::now());
            let due6 = again && passing.ipv4.is_ok();
            if !due && !due6 {
                continue;
            }
            let (keeper, was) = (Arc::clone(&self), passing.clone());
            let looking = tokio::task::spawn_blocking(move || keeper.look(was, pending, again));
            let (found, tried6) = looking
                .await
                .unwrap_or_else(|error| (Passing::nothing(error.to_string()), Tried::Not));
            pending = Changed {
                // What is not ours went with the uplink that it hung on: the next one may do.
                programs: pending.programs && found.ipv4.is_err(),
                ..Changed::default()
            };
            let now = Instant::now();
            match found.ipv4 {
                Ok(()) => patience.worked(now),
                Err(_) => patience.failed(now),
            }
            match (&found.ipv6, tried6) {
                (Ok(()), _) => patience6.worked(now),
                (Err(_), Tried::Yes) => patience6.failed(now),
                (Err(_), Tried::Impossible) => patience6.impossible(now),
                (Err(_), Tried::Not) => {}
            }
            if tried6 != Tried::Not || passing.ipv6.is_ok() {
                pending6 = false;
            }
            if found.ipv4.is_err() || again {
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
        if passing.ipv4.is_err() || generation().ok() == self.in_line() {
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

    /// A canary flies where something may have changed on its way; one of IPv6 too where that works, or shall be tried
    /// `again`.
    fn look(&self, was: Passing, changed: Changed, again: bool) -> (Passing, Tried) {
        let stood = was.ipv6.is_ok();
        if let (Ok(place), Ok(())) = (&self.place, &was.ipv4)
            && !changed.firewall
            && !changed.programs
        {
            let mut uplink = self.uplink.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(uplink) = uplink.as_mut()
                && matches!(uplink.settle(), Ok(false))
            {
                if stood && uplink.could_ipv6().is_ok() {
                    return (was, Tried::Not);
                }
                let (ipv6, tried) = self.try_ipv6(place, uplink, stood, again);
                return (Passing { ipv6, ..was }, tried);
            }
        }
        self.prove_again(stood, again || was.ipv4.is_err())
    }
}

/// Says it in the log.
fn tell(passing: &Passing) {
    match (&passing.ipv4, &passing.ipv6) {
        (Ok(()), Ok(())) => {
            tracing::info!("the kernel pass is on: what needs no look inside leaves without netd");
        }
        (Ok(()), Err(reason)) => tracing::info!(
            %reason,
            "the kernel pass is on for IPv4; all TCP of IPv6 goes through netd, rules for UDP of IPv6 are not taken"
        ),
        (Err(reason), _) => tracing::warn!(
            %reason,
            "the kernel pass is off; all TCP goes through netd, rules for UDP are not taken"
        ),
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
