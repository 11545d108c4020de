//! The kernel pass: one veth between the router namespace and the node's own, over which packets leave that need no
//! look inside. The only thing of netd's that touches the node's network settings.
//!
//! Owns what lies in the node's namespace: the veth's end and the route over it, the switches for forwarding, one
//! nftables table, and taking all of it away again. The way through the router namespace is [`crate::router::pass`]'s,
//! which packets take it the programs'. Whether it works is proven by a canary ([`crate::canary`]), never assumed.
//!
//! Everything is named after the run directory, so that instances in one namespace are apart. netd ends without taking
//! it away: open flows go on, and the next netd adopts it.

mod firewall;
mod forwarding;
mod generation;
mod keeper;
mod link;
mod names;
mod patience;

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use ipnet::{Ipv4Net, Ipv6Net};

pub use self::{
    firewall::blame,
    keeper::{Keeper, Passing},
    names::{Names, written},
};
use crate::{
    command::CommandError,
    kernel,
    router::{RouterError, RouterNamespace, pass},
};

/// Where an uplink belongs.
#[derive(Debug, Clone)]
pub struct Place {
    /// The instance's run directory, which names everything.
    pub run_dir: PathBuf,
    /// Addresses of its sandboxes.
    pub sandboxes: Ipv4Net,
    /// Their IPv6 addresses, if they have any.
    pub sandboxes6: Option<Ipv6Net>,
    /// Private ranges of IPv6 that the operator has opened, which may be on a link of the node's.
    pub opened6: Vec<Ipv6Net>,
}

/// An uplink that stands.
#[derive(Debug)]
pub struct Uplink {
    place: Place,
    names: Names,
    ifindex: u32,
    /// Whether IPv6 leaves by it; the reason why not.
    ipv6: Result<(), String>,
    /// What the table looks like when nobody has touched it, and what it was made for.
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    text: String,
    shown: String,
    /// Of the node's rules, when it was last seen to stand: what has changed since is seen by it.
    generation: Option<u32>,
}

/// Why there is no uplink.
#[derive(Debug, thiserror::Error)]
pub enum UplinkError {
    /// The router namespace.
    #[error(transparent)]
    Router(#[from] RouterError),
    /// A program that sets the network up.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// What a program printed cannot be read.
    #[error("`{program}` printed what cannot be read: {source}")]
    Printed {
        /// Which one.
        program: &'static str,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// A file or a setting of the kernel.
    #[error("cannot {action} {}: {source}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Somebody else has what it needs.
    #[error("{0}")]
    Clash(String),
}

pub(crate) fn on_file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> UplinkError {
    let path = path.to_owned();
    move |source| UplinkError::File { action, path, source }
}

/// Whether IPv6 could leave a node as it is; the reason why not.
fn ipv6_of(names: &Names, place: &Place) -> Result<(), String> {
    let Some(range) = place.sandboxes6 else {
        return Err("SANDGATE_SANDBOX_CIDR6 is off".to_owned());
    };
    if !forwarding::can_ipv6() {
        return Err(
            "this kernel forwards IPv6 on all interfaces or on none (before Linux 6.17), and here on none"
                .to_owned(),
        );
    }
    let told = |error: UplinkError| error.to_string();
    if !link::leads_on6(names).map_err(told)? {
        return Err("no route of the node leads anywhere by IPv6".to_owned());
    }
    link::refuse_clash(names, range.into()).map_err(told)
}

impl Uplink {
    /// Makes the uplink, or adopts that of an earlier netd without a gap. Call it in the node's own namespace.
    ///
    /// # Errors
    /// When it cannot be; [`Self::take_away`] takes away what was made of it.
    pub fn raise(place: Place, router: &RouterNamespace) -> Result<Self, UplinkError> {
        let names = Names::of(&place.run_dir);
        link::refuse_clash(&names, place.sandboxes.into())?;
        link::make(&names, router)?;
        let mut uplink = Self {
            ifindex: router.run(|| link::index(pass::INTERFACE))??,
            ipv6: ipv6_of(&names, &place),
            table: Mutex::default(),
            place,
            names,
        };
        if uplink.ipv6.is_ok() {
            match uplink.build(router) {
                Ok(()) => return Ok(uplink),
                Err(error) => uplink.ipv6 = Err(error.to_string()),
            }
        }
        // IPv4 does not depend on it.
        uplink.build(router)?;
        uplink.close_ipv6(router)?;
        Ok(uplink)
    }

    fn build(&self, router: &RouterNamespace) -> Result<(), UplinkError> {
        let ipv6 = self.ipv6.is_ok();
        self.settle()?;
        link::connect(&self.names, &self.place, ipv6)?;
        pass::open(router, names::HOST_MAC, ipv6)?;
        Ok(())
    }

    /// Whether IPv6 leaves by it; the reason why not.
    pub fn ipv6(&self) -> Result<(), String> {
        self.ipv6.clone()
    }

    /// Whether IPv6 could leave by it as the node is; the reason why not.
    pub fn could_ipv6(&self) -> Result<(), String> {
        ipv6_of(&self.names, &self.place)
    }

    /// Has IPv6 leave by it too.
    ///
    /// # Errors
    /// When it cannot; what was made of it stays until [`Self::lower_ipv6`].
    pub fn raise_ipv6(&mut self, router: &RouterNamespace) -> Result<(), UplinkError> {
        self.ipv6 = Ok(());
        self.build(router)
    }

    /// Has IPv6 leave by it no more, for this reason, and restores what was changed for it. After the programs were told.
    ///
    /// # Errors
    /// When something stays.
    pub fn lower_ipv6(&mut self, reason: String, router: &RouterNamespace) -> Result<(), UplinkError> {
        self.ipv6 = Err(reason);
        self.close_ipv6(router)
    }

    /// The table last: it guards the switches as long as they are on.
    fn close_ipv6(&self, router: &RouterNamespace) -> Result<(), UplinkError> {
        forwarding::restore6(&self.place.run_dir, &self.names)?;
        link::disconnect6(&self.names)?;
        pass::close_ipv6(router)?;
        self.settle().map(drop)
    }

    /// Takes away whatever an earlier netd with this run directory left in the node's namespace, and restores the
    /// settings that it changed. Nothing to do is fine.
    ///
    /// # Errors
    /// When something stays; calling it again goes on.
    pub fn take_away(run_dir: &Path) -> Result<(), UplinkError> {
        let names = Names::of(run_dir);
        // Closed first, so that nothing is forwarded past a table that is gone.
        forwarding::restore(run_dir, &names)?;
        link::remove(&names)?;
        firewall::remove(&names)
    }

    /// Brings everything in line with the node as it is: its interfaces, its routes, and its firewall, which may have
    /// been loaded anew. True when something had to be mended.
    ///
    /// # Errors
    /// When that is not possible; the uplink is not to be used then.
    pub fn settle(&self) -> Result<bool, UplinkError> {
        let mut ways = link::ways(&self.names, &self.place.opened6)?;
        let ipv6 = self.ipv6.is_ok();
        let plan = forwarding::plan(&self.place.run_dir, &self.names, &mut ways, ipv6)?;
        let bounds = (ipv6, firewall::held());
        let text = firewall::ruleset(&self.names, &self.place, &ways, &plan.opened, bounds);
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let generation = generation::generation().ok();
        let stands =
            table.text == text && firewall::shown(&self.names).is_ok_and(|shown| shown == table.shown);
        if stands {
            table.generation = generation;
        } else {
            firewall::load(&text)?;
            let generation = generation::generation().ok();
            *table = Table {
                text,
                shown: firewall::shown(&self.names)?,
                generation,
            };
        }
        // The table first: nothing is forwarded before it refuses what must not be.
        forwarding::turn_on(&plan)?;
        Ok(!stands)
    }

    /// The generation of the node's firewall when [`Self::settle`] last saw that all is in line.
    pub(crate) fn generation(&self) -> Option<u32> {
        let table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        table.generation
    }

    /// For the programs.
    pub fn kernel(&self) -> kernel::Uplink {
        kernel::Uplink {
            ifindex: self.ifindex,
            peer_mac: names::HOST_MAC,
            ipv6: self.ipv6.is_ok(),
        }
    }

    /// What its parts are called.
    pub fn names(&self) -> &Names {
        &self.names
    }
}
