//! The kernel half of enforcement: loads the programs of `netd-ebpf`, keeps their maps, and attaches them to the
//! router ends of sandbox veths.
//!
//! Everything is pinned below `{run_dir}/bpf`, so that the wall stands while netd does not, and the next netd adopts
//! it. Decides nothing: what is allowed comes from `sandgate-policy`, compiled to [`KernelTable`]s. All calls are
//! blocking system calls of microseconds, except [`Datapath::open`] (a fraction of a second) and
//! [`Datapath::set_policy`] with thousands of prefixes (milliseconds).

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    os::fd::BorrowedFd,
    path::PathBuf,
    time::Duration,
};

use ipnet::Ipv4Net;
use sandgate_api::feed::Endpoint;
use sandgate_policy::{KernelTable, Platform, Reason};

use crate::router::{RouterError, RouterNamespace};

/// Where the datapath lives.
#[derive(Debug, Clone)]
pub struct DatapathConfig {
    /// The instance's run directory: the router namespace and the pins are below it.
    pub run_dir: PathBuf,
    /// Addresses of local sandboxes; none of them may reach another.
    pub sandbox_cidr: Ipv4Net,
}

/// An attached endpoint. Stays valid until [`Datapath::detach`], also across restarts of netd.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct EndpointHandle {
    /// Identity in the kernel's maps and events. Never reused while the pins exist, never 0.
    pub ordinal: u32,
    /// Index of the router end of its veth.
    pub ifindex: u32,
}

/// A denied packet, or (`repeated` > 1) several of the same endpoint and reason that came too fast to be told apart:
/// those show the destination of the latest and no source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DenyEvent {
    /// Of the endpoint; 0 when the interface is unknown.
    pub ordinal: u32,
    /// Interface it came in through; 0 in an aggregate.
    pub ifindex: u32,
    /// IEEE 802 number: 0x0800 is IPv4, 0x86dd IPv6, 0x0806 ARP; 0 in an aggregate of unknown type.
    pub ethertype: u16,
    /// IP protocol number; 0 when it is not IPv4.
    pub protocol: u8,
    /// Unspecified when it is not IPv4, port 0 where there is none.
    pub src: SocketAddrV4,
    /// The same.
    pub dst: SocketAddrV4,
    /// Why. `upstream_unreachable` means: allowed, but netd was not listening at that moment.
    pub reason: Reason,
    /// How many packets this stands for; at least 1.
    pub repeated: u64,
    /// When, on the monotonic clock; for an aggregate, when it was read.
    pub monotonic: Duration,
}

/// Packets since the pins exist, summed over CPUs and endpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Given to netd's TCP listener or one of its connections.
    pub steered: u64,
    /// Given to netd's DNS sockets.
    pub dns: u64,
    /// Of connections that netd opened inward.
    pub inbound: u64,
    /// Refused at once.
    pub refused: u64,
    /// Dropped silently.
    pub dropped: u64,
    /// Of the refused: allowed, but netd was not listening.
    pub no_listener: u64,
    /// Let through to a sandbox.
    pub delivered: u64,
    /// Toward a sandbox, admitted by nothing, dropped.
    pub unadmitted: u64,
    /// Denials counted instead of sent as events of their own.
    pub suppressed: u64,
}

/// Why the kernel half could not do what was asked. Whatever failed is denied, not open.
#[derive(Debug, thiserror::Error)]
pub enum DatapathError {
    /// The router namespace.
    #[error(transparent)]
    Router(#[from] RouterError),
}

/// The kernel half. One per instance.
pub struct Datapath {
    router: RouterNamespace,
}

/// Reads denials. There should be one reader; several would share the events between them.
pub struct EventReader {}

impl EventReader {
    /// Waits up to `timeout` for denials and returns those there are, at most a few thousand at a time. Blocking:
    /// belongs on a thread of its own.
    pub fn next_batch(&mut self, timeout: Duration) -> Result<Vec<DenyEvent>, DatapathError> {
        unimplemented!("{timeout:?}")
    }
}

impl Datapath {
    /// Makes or adopts the router namespace, the bpffs, maps, programs and links, and writes the platform's ranges.
    pub fn open(config: &DatapathConfig, platform: &Platform) -> Result<Self, DatapathError> {
        unimplemented!("{config:?} {platform:?}")
    }

    /// The namespace of everything that faces sandboxes.
    pub fn router(&self) -> &RouterNamespace {
        &self.router
    }

    /// Gives the kernel netd's transparent sockets (made in the router namespace, bound, TCP ones listening). It
    /// forgets each when it is closed, and then refuses.
    pub fn set_listeners(
        &self,
        tcp: BorrowedFd<'_>,
        dns_udp: BorrowedFd<'_>,
        dns_tcp: BorrowedFd<'_>,
    ) -> Result<(), DatapathError> {
        unimplemented!("{tcp:?} {dns_udp:?} {dns_tcp:?}")
    }

    /// Attaches both programs to the endpoint's interface, denying everything until [`Self::set_policy`]. Idempotent:
    /// an endpoint that is attached already keeps its handle, policy and bound addresses.
    pub fn attach(&self, endpoint: &Endpoint) -> Result<EndpointHandle, DatapathError> {
        unimplemented!("{endpoint:?}")
    }

    /// Puts a new policy in force, in one step.
    pub fn set_policy(&self, endpoint: EndpointHandle, table: &KernelTable) -> Result<(), DatapathError> {
        unimplemented!("{endpoint:?} {table:?}")
    }

    /// Denies the endpoint and forgets everything about it. Not an error when it is gone already.
    pub fn detach(&self, endpoint: EndpointHandle) -> Result<(), DatapathError> {
        unimplemented!("{endpoint:?}")
    }

    /// Endpoints in force, with their addresses; after a restart the adopted ones.
    pub fn known(&self) -> Vec<(EndpointHandle, Ipv4Addr)> {
        unimplemented!()
    }

    /// Adds an address to those that DNS answers gave to the endpoint.
    pub fn bind_address(&self, endpoint: EndpointHandle, address: Ipv4Addr) -> Result<(), DatapathError> {
        unimplemented!("{endpoint:?} {address}")
    }

    /// Takes it away again: new connections to it are refused, open ones go on.
    pub fn unbind_address(&self, endpoint: EndpointHandle, address: Ipv4Addr) -> Result<(), DatapathError> {
        unimplemented!("{endpoint:?} {address}")
    }

    /// Admits one connection that netd is about to open from `local` to `sandbox_port`. Call before connecting.
    pub fn admit_inbound(
        &self,
        endpoint: EndpointHandle,
        sandbox_port: u16,
        local: SocketAddrV4,
    ) -> Result<(), DatapathError> {
        unimplemented!("{endpoint:?} {sandbox_port} {local}")
    }

    /// Ends the admission.
    pub fn revoke_inbound(
        &self,
        endpoint: EndpointHandle,
        sandbox_port: u16,
        local: SocketAddrV4,
    ) -> Result<(), DatapathError> {
        unimplemented!("{endpoint:?} {sandbox_port} {local}")
    }

    /// Replaces the set of this node's own addresses, which no sandbox may reach.
    pub fn set_node_addresses(&self, addresses: &[Ipv4Addr]) -> Result<(), DatapathError> {
        unimplemented!("{addresses:?}")
    }

    /// A reader of denials, also of those that happened while no netd ran.
    pub fn take_events(&self) -> Result<EventReader, DatapathError> {
        unimplemented!()
    }

    /// The counters.
    pub fn counters(&self) -> Result<Counters, DatapathError> {
        unimplemented!()
    }
}
