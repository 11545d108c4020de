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
}

/// An uplink that stands.
#[derive(Debug)]
pub struct Uplink {
    place: Place,
    names: Names,
    ifindex: u32,
    /// Whether IPv6 leaves by it.
    ipv6: bool,
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

impl Uplink {
    /// Makes the uplink, or adopts that of an earlier netd without a gap. Call it in the node's own namespace.
    ///
    /// # Errors
    /// When it cannot be; [`Self::take_away`] takes away what was made of it.
    pub fn raise(place: Place, router: &RouterNamespace) -> Result<Self, UplinkError> {
        let names = Names::of(&place.run_dir);
        link::refuse_clash(&names, &place)?;
        let ipv6 = place.sandboxes6.is_some() && forwarding::can_ipv6();
        link::make(&names, router)?;
        let uplink = Self {
            ifindex: router.run(|| link::index(pass::INTERFACE))??,
            ipv6,
            table: Mutex::default(),
            place,
            names,
        };
        uplink.settle()?;
        link::connect(&uplink.names, &uplink.place, uplink.ipv6)?;
        pass::open(router, names::HOST_MAC, uplink.ipv6)?;
        Ok(uplink)
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
        let mut ways = link::ways(&self.names)?;
        let plan = forwarding::plan(&self.place.run_dir, &self.names, &mut ways, self.ipv6)?;
        let text = firewall::ruleset(&self.names, &self.place, &ways, &plan.opened, firewall::held());
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
            ipv6: self.ipv6,
        }
    }

    /// What its parts are called.
    pub fn names(&self) -> &Names {
        &self.names
    }
}
