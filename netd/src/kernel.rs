//! The kernel half of enforcement: loads the programs of `netd-ebpf`, keeps their maps, and attaches them to the
//! router ends of sandbox veths.
//!
//! Everything is pinned below `{run_dir}/bpf`, so that the wall stands while netd does not, and the next netd adopts
//! it. Decides nothing: what is allowed comes from `sandgate-policy`, compiled to [`KernelTable`]s. All calls are
//! blocking system calls of microseconds, except [`Datapath::open`] (a fraction of a second) and
//! [`Datapath::set_policy`] with thousands of prefixes (milliseconds).

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4},
    os::fd::BorrowedFd,
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use aya::{TestRun as _, TestRunOptions, TestRunResult};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use netd_common::{NO_ADDRESS, PortSpan, mapped, wire6};
use sandgate_api::feed::Endpoint;
use sandgate_policy::{KernelTable, Platform, Protocol, Reason};

use self::{
    address::in_one_space,
    events::SharedSweep,
    flows::Flows,
    pins::Pins,
    platform::{Opening, Ranges},
    programs::{Means, Programs},
    tables::Tables,
};
pub use self::{
    error::DatapathError,
    events::EventReader,
    features::prove,
    policies::PolicyContent,
    programs::Guarded,
    uplink::{Proven, Uplink},
};
use crate::router::RouterNamespace;

mod address;
mod batch;
mod error;
mod events;
mod features;
mod flows;
mod pins;
mod platform;
mod policies;
mod programs;
mod reasons;
mod tables;
mod uplink;

/// Where the datapath lives.
#[derive(Debug, Clone)]
pub struct DatapathConfig {
    /// The instance's run directory: the router namespace and the pins are below it.
    pub run_dir: PathBuf,
    /// Addresses of local sandboxes; none of them may reach another.
    pub sandbox_cidr: Ipv4Net,
    /// Their IPv6 addresses, if they have any.
    pub sandbox_cidr6: Option<Ipv6Net>,
    /// How the programs hang on interfaces.
    pub attach: Attach,
}

/// By what means the programs hang on interfaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attach {
    /// By TCX links where the kernel has them, else by clsact filters.
    Auto,
    /// By TCX links (Linux 6.6), or not at all.
    Tcx,
    /// By filters of the `clsact` queueing discipline, as on a kernel before 6.6.
    Clsact,
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
    /// IP protocol number; 0 when it is neither IPv4 nor IPv6.
    pub protocol: u8,
    /// Unspecified when it is neither IPv4 nor IPv6, port 0 where there is none.
    pub src: SocketAddr,
    /// The same.
    pub dst: SocketAddr,
    /// Why. `upstream_unreachable` means: allowed, but netd was not listening at that moment.
    pub reason: Reason,
    /// True: it was let through, for only tiers in audit mode deny it.
    pub audit: bool,
    /// How many packets this stands for; at least 1.
    pub repeated: u64,
    /// When, on the monotonic clock; for an aggregate, when it was read.
    pub monotonic: Duration,
}

/// Why a flow that the kernel forwarded has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FlowEnd {
    /// Both sides have sent a FIN.
    Closed,
    /// One side has sent a reset.
    Reset,
    /// Nothing was seen for longer than such a flow may be silent.
    Idle,
    /// The endpoint was detached.
    EndpointGone,
    /// A packet of it met a policy that no longer allows it.
    PolicyTightened,
}

/// A flow that the kernel forwarded without netd, after its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EndedFlow {
    /// Whose. It may be detached already.
    pub endpoint: EndpointHandle,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// The sandbox's end.
    pub src: SocketAddr,
    /// The other end.
    pub dst: SocketAddr,
    /// When it began, on the monotonic clock.
    pub began: Duration,
    /// From its first packet to its last.
    pub lasted: Duration,
    /// Bytes of the frames from the sandbox.
    pub up: u64,
    /// Bytes of the frames to the sandbox.
    pub down: u64,
    /// How it ended.
    pub why: FlowEnd,
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
    /// Forwarded to the uplink.
    pub passed: u64,
    /// Of flows that are forwarded: back from the uplink, and let through to the sandbox.
    pub returned: u64,
}

/// The kernel half. One per instance; a lock in the run directory keeps a second one out.
pub struct Datapath {
    router: RouterNamespace,
    pins: Pins,
    ranges: Ranges,
    sweep: SharedSweep,
    state: Mutex<State>,
    /// Apart: nothing else waits while they are looked through. Locked without `state`.
    flows: Mutex<Flows>,
}

impl Datapath {
    /// In so many calls [`Self::ended_flows`] has looked at every flow there can be.
    pub const FLOW_LOOKS: usize = flows::LOOKS;

    /// Makes or adopts the router namespace, the bpffs, maps, programs and links, and writes the platform's ranges.
    /// Endpoints of an earlier netd stay in force under their last policies.
    pub fn open(config: &DatapathConfig, platform: &Platform) -> Result<Self, DatapathError> {
        let pins = Pins::open(&config.run_dir)?;
        let router = RouterNamespace::open(&config.run_dir)?;
        if !pins.adoptable() {
            pins.discard_maps()?;
        }
        features::check()?;
        let means = router.run(|| Means::here(config.attach))??;
        tracing::info!(means = means.name(), "how the programs hang on interfaces");
        let mut programs = Programs::load(&pins, means)?;
        let sweep = SharedSweep::open(&pins)?;
        let mut tables = Tables::open(&pins)?;
        features::check_batches(&pins.map("POLICIES")?)?;
        let flows = Flows::open(&pins)?;
        let ranges = Ranges {
            denied: always_denied(),
            openings: openings(platform),
            closed: [
                Some(IpNet::V4(config.sandbox_cidr)),
                config.sandbox_cidr6.map(IpNet::V6),
            ]
            .into_iter()
            .flatten()
            .chain(platform.own().ranges().iter().copied())
            .filter_map(in_one_space)
            .collect(),
        };
        tables.write_platform(&ranges.flatten(&BTreeSet::new())?, true)?;
        if !sweep.lock().has(0) {
            sweep.lock().add(0)?;
        }
        tables.add_throttle(0)?;
        // Only now, with maps that say what they must, do the programs of an earlier netd give way.
        let attached = programs.adopt(&router, &pins)?;
        let datapath = Self {
            router,
            pins,
            ranges,
            sweep,
            state: Mutex::new(State { programs, tables }),
            flows: Mutex::new(flows),
        };
        datapath.tidy(&attached)?;
        datapath.state().tables.complete()?;
        Ok(datapath)
    }

    /// The namespace of everything that faces sandboxes.
    pub fn router(&self) -> &RouterNamespace {
        &self.router
    }

    /// Gives the kernel netd's transparent sockets (made in the router namespace, bound, TCP ones listening), each
    /// under its index of [`netd_common::listener`]. It forgets each when it is closed, and then refuses.
    pub fn set_listeners(&self, sockets: &[(u32, BorrowedFd<'_>)]) -> Result<(), DatapathError> {
        let mut state = self.state();
        for (index, socket) in sockets {
            state.tables.set_listener(*index, *socket)?;
        }
        Ok(())
    }

    /// Attaches both programs to the endpoint's interface, denying everything until [`Self::set_policy`]. Idempotent:
    /// an endpoint that is attached already keeps its handle, policy and bound addresses.
    pub fn attach(&self, endpoint: &Endpoint) -> Result<EndpointHandle, DatapathError> {
        let mut state = self.state();
        let State { programs, tables } = &mut *state;
        let addresses = (
            mapped(endpoint.address.octets()),
            endpoint
                .address6
                .map_or(NO_ADDRESS, |address| wire6(address.octets())),
        );
        if let Some(known) = tables.endpoint(endpoint.ifindex) {
            let same = (known.address, known.address6) == addresses && known.mac == endpoint.mac;
            // Another endpoint, or another interface under a reused index: nothing of the old one may pass to it. The
            // programs stay where they are: the kernel lets go of a link some time after its pin, and until then
            // takes no other.
            if !same || !programs.hold(&self.router, &self.pins, endpoint.ifindex)? {
                self.disown(tables, endpoint.ifindex)?;
            }
        }
        let both = [
            Some(IpAddr::V4(endpoint.address)),
            endpoint.address6.map(IpAddr::V6),
        ];
        for address in both.into_iter().flatten() {
            let Some(other) = tables.owner(address).filter(|other| *other != endpoint.ifindex) else {
                continue;
            };
            if programs.hold(&self.router, &self.pins, other)? {
                return Err(DatapathError::AddressInUse {
                    address,
                    ifindex: other,
                });
            }
            self.forget(tables, other)?;
        }
        programs.attach(&self.router, &self.pins, &endpoint.interface, endpoint.ifindex)?;
        if let Some(known) = tables.endpoint(endpoint.ifindex) {
            return Ok(EndpointHandle {
                ordinal: known.ordinal,
                ifindex: endpoint.ifindex,
            });
        }
        let ordinal = tables.next_ordinal()?;
        self.sweep.lock().add(ordinal)?;
        tables.add_throttle(ordinal)?;
        tables.add_endpoint(endpoint.ifindex, ordinal, addresses, endpoint.mac)?;
        Ok(EndpointHandle {
            ordinal,
            ifindex: endpoint.ifindex,
        })
    }

    /// Puts a new policy in force, in one step. Endpoints with the same table share it. Gives the name under which
    /// [`Self::share_policy`] finds it.
    ///
    /// # Errors
    /// When the kernel does not take it, for example because there is no room; the policy of before stays in force.
    pub fn set_policy(
        &self,
        endpoint: EndpointHandle,
        table: &KernelTable,
    ) -> Result<PolicyContent, DatapathError> {
        self.state().tables.set_policy(endpoint, table)
    }

    /// The same with a table that some endpoint has, or had a moment ago. False: none has.
    ///
    /// # Errors
    /// As [`Self::set_policy`].
    pub fn share_policy(
        &self,
        endpoint: EndpointHandle,
        content: PolicyContent,
    ) -> Result<bool, DatapathError> {
        self.state().tables.share_policy(endpoint, content)
    }

    /// How many different policies are in the kernel, those that wait to be freed included, and how many prefixes they
    /// have together.
    pub fn policies(&self) -> (usize, usize) {
        self.state().tables.policies()
    }

    /// Denies the endpoint and forgets everything about it. Not an error when it is gone already.
    pub fn detach(&self, endpoint: EndpointHandle) -> Result<(), DatapathError> {
        let mut state = self.state();
        match state.tables.check(endpoint) {
            Ok(_) => self.forget(&mut state.tables, endpoint.ifindex),
            Err(DatapathError::Detached { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Endpoints in force, with their addresses; after a restart the adopted ones.
    pub fn known(&self) -> Vec<(EndpointHandle, Ipv4Addr)> {
        self.state().tables.known()
    }

    /// Adds an address to those that DNS answers gave to the endpoint.
    pub fn bind_address(&self, endpoint: EndpointHandle, address: IpAddr) -> Result<(), DatapathError> {
        self.state().tables.bind_all(endpoint, &[address])
    }

    /// Takes it away again: new connections to it are refused, open ones go on.
    pub fn unbind_address(&self, endpoint: EndpointHandle, address: IpAddr) -> Result<(), DatapathError> {
        self.state().tables.unbind_all(endpoint, &[address])
    }

    /// Takes some away and then adds others, in one step for whoever else waits for the kernel half: a few dozen at a time.
    ///
    /// # Errors
    /// When the kernel does not take the new ones; none of them is left then.
    pub fn exchange_addresses(
        &self,
        endpoint: EndpointHandle,
        old: &[IpAddr],
        new: &[IpAddr],
    ) -> Result<(), DatapathError> {
        let mut state = self.state();
        state.tables.unbind_all(endpoint, old)?;
        state.tables.bind_all(endpoint, new)
    }

    /// The same for all that DNS answers gave to the endpoint, but for these.
    pub fn unbind_others(
        &self,
        endpoint: EndpointHandle,
        keep: &BTreeSet<IpAddr>,
    ) -> Result<(), DatapathError> {
        self.state().tables.unbind_others(endpoint, keep)
    }

    /// Admits one connection that netd is about to open from `local` to `sandbox_port`, by the socket with this
    /// cookie (`SO_COOKIE` of `socket(7)`). Call before connecting.
    pub fn admit_inbound(
        &self,
        endpoint: EndpointHandle,
        sandbox_port: u16,
        local: SocketAddrV4,
        cookie: u64,
    ) -> Result<(), DatapathError> {
        self.state().tables.admit(endpoint, sandbox_port, local, cookie)
    }

    /// Ends every admission to ports of the endpoint that are not to be kept, also those of an earlier netd. Gives the
    /// sandbox's port and netd's end of each: nothing flows on these connections from here on.
    pub fn revoke_inbound_ports(
        &self,
        endpoint: EndpointHandle,
        keep: impl Fn(u16) -> bool,
    ) -> Result<Vec<(u16, SocketAddrV4)>, DatapathError> {
        self.state().tables.revoke_ports(endpoint, keep)
    }

    /// Ends the admission.
    pub fn revoke_inbound(
        &self,
        endpoint: EndpointHandle,
        sandbox_port: u16,
        local: SocketAddrV4,
    ) -> Result<(), DatapathError> {
        self.state().tables.revoke(endpoint, sandbox_port, local)
    }

    /// Every admission in force, those of an earlier netd included: endpoint, local and sandbox end.
    pub fn admissions(&self) -> Vec<(EndpointHandle, SocketAddrV4, SocketAddrV4)> {
        self.state().tables.admissions()
    }

    /// Replaces the set of this node's own addresses, which no sandbox may reach (unless an operator's exception names
    /// that very address).
    pub fn set_node_addresses(&self, addresses: &[IpAddr]) -> Result<(), DatapathError> {
        let entries = self.ranges.flatten(&addresses.iter().copied().collect())?;
        self.state().tables.write_platform(&entries, false)
    }

    /// Says whether the kernel may forward new flows of the endpoint; it may at first. Holds from the next packet on, and
    /// for the next netd until that says otherwise. Flows that are open go on.
    ///
    /// # Errors
    /// [`DatapathError::Detached`] when there is no such endpoint; others when the kernel does not take it, and what was
    /// said before stays.
    pub fn allow_new_flows(&self, endpoint: EndpointHandle, allowed: bool) -> Result<(), DatapathError> {
        self.state().tables.allow_new_flows(endpoint, allowed)
    }

    /// Flows that the kernel forwarded and that have ended since the last calls, each once. Call it every second. Of
    /// hundreds of thousands it looks at a part each time.
    pub fn ended_flows(&self) -> Result<Vec<EndedFlow>, DatapathError> {
        let living = self.state().tables.living()?;
        self.flows().ended(&living)
    }

    /// A reader of denials, also of those that happened while no netd ran.
    pub fn take_events(&self) -> Result<EventReader, DatapathError> {
        EventReader::open(&self.pins, self.sweep.clone())
    }

    /// Looks whether our programs still come first on the endpoints' interfaces and the uplink's, as only they may end a
    /// packet's way past them. Where they do not they are put first again. Where that fails an endpoint's interface is set
    /// down, and there is no uplink from here on. Gives the interfaces on which they were not. Call it every few seconds.
    ///
    /// # Errors
    /// When it could not be looked at.
    pub fn guard(&self) -> Result<Vec<Guarded>, DatapathError> {
        let mut state = self.state();
        let State { programs, tables } = &mut *state;
        let interfaces: Vec<u32> = tables
            .known()
            .into_iter()
            .map(|(handle, _)| handle.ifindex)
            .collect();
        let uplink = Some(tables.uplink()?.ifindex).filter(|ifindex| *ifindex != 0);
        let found = programs.guard(&self.router, &self.pins, &interfaces, uplink)?;
        if found
            .iter()
            .any(|guarded| guarded.uplink && guarded.outcome.is_err())
        {
            tables.set_uplink(netd_common::Uplink::default())?;
        }
        Ok(found)
    }

    /// Frees what was replaced a while ago. Call it every few seconds.
    pub fn sweep(&self) -> Result<(), DatapathError> {
        self.state().tables.sweep()
    }

    /// The counters.
    pub fn counters(&self) -> Result<Counters, DatapathError> {
        self.state().tables.counters()
    }

    /// Runs a program (`from_sandbox` or `to_sandbox`) on a crafted packet, without sending anything. For tests and
    /// benchmarks: the kernel's answer has the program's verdict and the mean time of a run.
    pub fn test_run(
        &self,
        program: &'static str,
        run: TestRunOptions<'_>,
    ) -> Result<TestRunResult, DatapathError> {
        let mut state = self.state();
        let program_of = state.programs.program(program)?;
        self.router
            .run(|| program_of.test_run(run))?
            .map_err(error::on_program("run", program))
    }

    /// Removes what a dead netd could not: endpoints without links, and policies that none uses.
    fn tidy(&self, attached: &[u32]) -> Result<(), DatapathError> {
        let mut state = self.state();
        for (handle, _) in state.tables.known() {
            if !attached.contains(&handle.ifindex) {
                self.forget(&mut state.tables, handle.ifindex)?;
            }
        }
        state.tables.tidy()?;
        let living = state.tables.living()?;
        drop(state);
        self.flows().recount(&living)
    }

    /// First the endpoint, so that everything is denied from here on; then what belongs to it.
    fn forget(&self, tables: &mut Tables, ifindex: u32) -> Result<(), DatapathError> {
        let disowned = self.disown(tables, ifindex);
        Programs::detach(&self.router, &self.pins, ifindex)?;
        disowned
    }

    /// The same, but leaves the programs where they are.
    fn disown(&self, tables: &mut Tables, ifindex: u32) -> Result<(), DatapathError> {
        let ordinal = tables.remove_endpoint(ifindex)?;
        tables.purge(ordinal)?;
        self.sweep.lock().remove(ordinal)
    }

    fn flows(&self) -> MutexGuard<'_, Flows> {
        // Its place is good anywhere.
        self.flows.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // The maps are the truth, and every call leaves them denying or complete.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct State {
    programs: Programs,
    tables: Tables,
}

/// What nobody may reach unless it is opened.
fn always_denied() -> Vec<Ipv6Net> {
    let ipv4 = sandgate_policy::always_denied4().iter().copied().map(IpNet::V4);
    let ipv6 = sandgate_policy::always_denied6().iter().copied().map(IpNet::V6);
    ipv4.chain(ipv6).filter_map(in_one_space).collect()
}

/// The operator's exceptions.
fn openings(platform: &Platform) -> Vec<Opening> {
    platform
        .exceptions()
        .iter()
        .filter_map(|exception| {
            let (first, last) = exception.port().map_or((0, u16::MAX), |port| (port, port));
            Some(Opening {
                prefix: in_one_space(exception.network())?,
                ports: PortSpan { first, last },
            })
        })
        .collect()
}

/// Tasks share it.
const _: fn() = || {
    fn shared<T: Send + Sync>() {}
    shared::<Datapath>();
};
