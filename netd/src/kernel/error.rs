//! What can go wrong in the kernel half.

use std::{io, net::IpAddr, path::PathBuf};

use aya::{
    EbpfError,
    maps::MapError,
    pin::PinError,
    programs::{ProgramError, links::LinkError},
};

use crate::router::RouterError;

/// Why the kernel half could not do what was asked. Whatever failed is denied, not open.
#[derive(Debug, thiserror::Error)]
pub enum DatapathError {
    /// The router namespace.
    #[error(transparent)]
    Router(#[from] RouterError),
    /// The kernel cannot carry the wall.
    #[error("this kernel cannot run Sandgate: {0}")]
    Unsupported(String),
    /// Another netd uses the run directory.
    #[error("another netd is running with {} (it holds the lock)", path.display())]
    Busy {
        /// The lock's file.
        path: PathBuf,
    },
    /// A file operation.
    #[error("cannot {action}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// A file operation below the run directory.
    #[error("cannot {action} {}: {source}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The object could not be loaded.
    #[error("cannot load the kernel programs: {0}")]
    Load(#[source] Box<EbpfError>),
    /// A program could not be loaded or attached.
    #[error("cannot {action} program {program}: {source}")]
    Program {
        /// What was tried.
        action: &'static str,
        /// Which program.
        program: &'static str,
        /// What the kernel said.
        source: Box<ProgramError>,
    },
    /// A link is not of the kind it must be.
    #[error("the link of program {program}: {source}")]
    Link {
        /// Which program.
        program: &'static str,
        /// What is wrong.
        source: Box<LinkError>,
    },
    /// The object has no such program or map: netd and the object are of different builds.
    #[error("the kernel object has no {0}")]
    Absent(&'static str),
    /// A link could not be pinned.
    #[error("cannot pin {}: {source}", path.display())]
    Pin {
        /// Where.
        path: PathBuf,
        /// What the kernel said.
        source: Box<PinError>,
    },
    /// A map operation.
    #[error("cannot {action} map {map}: {source}")]
    Map {
        /// What was tried.
        action: &'static str,
        /// Which map.
        map: &'static str,
        /// What the kernel said.
        source: Box<MapError>,
    },
    /// The announced interface is not the one in the router namespace.
    #[error("interface {name} has index {found:?} in the router namespace, announced was {announced}")]
    Interface {
        /// The announced name.
        name: String,
        /// The announced index.
        announced: u32,
        /// The index of that name; `None`: there is no such interface.
        found: Option<u32>,
    },
    /// Another program stands before ours on the interface.
    #[error("{program} is not the first program of interface {name}")]
    NotFirst {
        /// Which of ours.
        program: &'static str,
        /// The interface.
        name: String,
    },
    /// The uplink is not, or no longer, the one that the programs were told of.
    #[error("the uplink was taken out of use")]
    UplinkGone,
    /// The address belongs to another endpoint that is alive.
    #[error("address {address} is in use by interface {ifindex}")]
    AddressInUse {
        /// The address.
        address: IpAddr,
        /// Whose.
        ifindex: u32,
    },
    /// The handle is of an endpoint that was detached.
    #[error("endpoint {ordinal} on interface {ifindex} is not attached")]
    Detached {
        /// Of the handle.
        ordinal: u32,
        /// Of the handle.
        ifindex: u32,
    },
    /// There is no room for another policy.
    #[error(
        "the policy does not fit: its {wanted} prefixes would be beside {present} of other policies, and a node holds \
         {limit}"
    )]
    PoliciesFull {
        /// Prefixes of the policy.
        wanted: usize,
        /// Prefixes of all others.
        present: usize,
        /// How many fit.
        limit: usize,
    },
    /// The table cannot be put into the kernel.
    #[error("a policy that the kernel cannot hold: {0}")]
    Table(String),
}

/// Turns an error of a map call into ours.
pub(super) fn on_map<E: Into<MapError>>(
    action: &'static str,
    map: &'static str,
) -> impl FnOnce(E) -> DatapathError {
    move |source| DatapathError::Map {
        action,
        map,
        source: Box::new(source.into()),
    }
}

/// Turns an error of a program call into ours.
pub(super) fn on_program<E: Into<ProgramError>>(
    action: &'static str,
    program: &'static str,
) -> impl FnOnce(E) -> DatapathError {
    move |source| DatapathError::Program {
        action,
        program,
        source: Box::new(source.into()),
    }
}

/// Turns an error of a file operation into ours.
pub(super) fn on_file<E: Into<io::Error>>(
    action: &'static str,
    path: &std::path::Path,
) -> impl FnOnce(E) -> DatapathError {
    let path = path.to_owned();
    move |source| DatapathError::File {
        action,
        path,
        source: source.into(),
    }
}
