//! The sandboxes of this node as netd enforces them: their rules, pins, live flows and limits. Owns: the one
//! lock per sandbox under which every decision is made, so that no flow is admitted by rules that are being
//! replaced, and the order in which kernel and user space learn of a change. Never does network I/O.

mod enforced;
mod index;
mod library;
mod quota;
mod rules;
pub(crate) mod spending;

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, SocketAddr, SocketAddrV4},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use nix::time::{ClockId, clock_gettime};
use sandgate_api::{
    feed::Endpoint,
    id::{OrgId, SandboxId},
};
use sandgate_policy::{DnsBudget, DomainName, FailureMode, Reason};
use tokio::sync::{Notify, Semaphore};
use tracing::Span;

use self::{enforced::Enforced, spending::Spending};
pub use self::{
    enforced::{Cut, CutReason, Facts, FirstLook, RequestFacts, Version},
    index::Sandboxes,
    library::Library,
    quota::Met,
    rules::{Decision, Judgement, Rules, RulesError},
    spending::{Host, OverQuota},
};
use crate::{
    dns::{budget::Budget, load::Load},
    intercept::{bindings::Bindings, leases::Leases, pool::Pool},
    kernel::{Datapath, DatapathError, EndpointHandle},
    pins::{PIN_LIFETIME, Seconds, log::PinLog, room::Room},
};

/// Connections of one sandbox through netd at once.
const FLOWS_MAX: usize = 512;
/// Of them, those that have not yet said whom they are for; each may hold 16 KiB.
const SNIFFS_MAX: usize = 128;
/// Of them, those whose requests are read; each holds two TLS sessions and some windows of data.
const INTERCEPTED_MAX: usize = 128;
/// DNS questions of one sandbox that are being answered at once.
const QUERIES_MAX: usize = 64;
/// DNS connections of one sandbox at once.
const DNS_STREAMS_MAX: usize = 8;
/// Connections into one sandbox that are being made at once, for the controller and for tunnels each.
const DIALS_MAX: usize = 64;
/// Addresses that the kernel half learns or forgets in one step; all others wait for it meanwhile.
const ADDRESSES_AT_ONCE: usize = 64;

/// One sandbox.
pub struct Sandbox {
    /// Which one.
    pub id: SandboxId,
    /// Where its packets come from.
    pub endpoint: Endpoint,
    /// The same, in the kernel's eyes.
    pub handle: EndpointHandle,
    /// What it may have of netd at once, so that its flood leaves others alone.
    pub limits: Limits,
    /// What it has on lease.
    pub leases: Leases,
    /// Connections to servers that wait for its next flow.
    pub upstreams: Arc<Pool>,
    /// What it has said by asking for names.
    dns_budget: Mutex<Budget>,
    /// The same as tiers in audit mode count it.
    dns_audited: Mutex<Budget>,
    /// What its answers have cost.
    dns_load: Mutex<Load>,
    /// What it has used of its quotas. Locked after the state.
    spending: Mutex<Spending>,
    state: Mutex<State>,
    /// Ports that tunnels lead to, never the agent's. Locked while a connection to one is admitted, so that none
    /// slips in while its port is taken away.
    tunnel_ports: Mutex<BTreeSet<u16>>,
    /// Told whenever a flow has ended.
    flow_ended: Notify,
    datapath: Arc<Datapath>,
}

/// Permits of one sandbox.
pub struct Limits {
    /// Connections.
    pub flows: Arc<Semaphore>,
    /// Connections being read.
    pub sniffs: Arc<Semaphore>,
    /// Connections whose requests are read.
    pub intercepted: Arc<Semaphore>,
    /// DNS questions.
    pub queries: Arc<Semaphore>,
    /// DNS connections.
    pub dns_streams: Arc<Semaphore>,
    /// Connections to its agent that are being made.
    pub agent_dials: Semaphore,
    /// Connections to its tunnels' ports that are being made: apart, so that those leave the agent reachable.
    pub tunnel_dials: Semaphore,
}

struct State {
    enforced: Enforced,
    /// None once the sandbox is gone: its file is deleted then, and must not come back.
    log: Option<PinLog>,
}

/// Leave to forward one flow. Only [`Sandbox::admit`] makes it; dropping it ends the flow in the books.
pub struct Admitted {
    sandbox: Arc<Sandbox>,
    flow: u64,
    /// Why it may go on.
    pub decision: Decision,
    /// Its requests must be read and judged one by one.
    pub intercept: bool,
    /// Cancelled when it no longer may.
    pub cut: Arc<Cut>,
}

/// Leave to forward one request. Only [`Admitted::admit_request`] makes it; dropping it ends the request in the
/// books. The flow of a request that new rules forbid is cut.
pub struct AdmittedRequest {
    sandbox: Arc<Sandbox>,
    flow: u64,
    request: u64,
    /// What the rules say of it.
    pub judgement: Judgement,
    /// The bindings that were in force when they did.
    pub bindings: Arc<Bindings>,
}

/// What the rules say about asking for a name.
#[derive(Debug)]
pub struct NameLeave {
    /// Whether it may be asked for.
    pub decision: Decision,
    /// Which types of records, and how much.
    pub dns: DnsBudget,
    /// Beyond what of it is recorded and answered all the same; `None` where no tier is in audit mode.
    pub dns_audited: Option<DnsBudget>,
    /// For whom.
    pub org_id: OrgId,
    /// Which rules say so.
    pub rules: Version,
}

/// An address could not be pinned.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// The rules no longer allow the name.
    #[error("the name is no longer allowed")]
    NotAllowed(Decision),
    /// The kernel's set did not take it.
    #[error("the kernel did not take the address: {0}")]
    Kernel(#[from] DatapathError),
    /// Those of an earlier netd could not be read.
    #[error("the pin log could not be read: {0}")]
    Log(#[source] io::Error),
}

impl Limits {
    /// How many connections are open.
    pub fn open_flows(&self) -> usize {
        FLOWS_MAX - self.flows.available_permits()
    }
}

impl Sandbox {
    /// A sandbox that is attached in the kernel. Its pins of an earlier netd are read back from the file, as far as there
    /// is room for them; the kernel is told of those whose names `rules` allow, and of no others.
    ///
    /// # Errors
    /// When the pins cannot be read or the kernel does not take them.
    pub fn open(
        id: SandboxId,
        (endpoint, handle): (Endpoint, EndpointHandle),
        rules: Rules,
        datapath: Arc<Datapath>,
        (pin_file, room): (&Path, &Room),
    ) -> Result<Self, PinError> {
        let now = seconds();
        let (log, mut pins) = PinLog::open(pin_file, now, room).map_err(PinError::Log)?;
        pins.sweep(now, |name| rules.judge_name(name).is_allowed());
        let kept: BTreeSet<IpAddr> = pins.addresses().map(|address| address.to_canonical()).collect();
        datapath.unbind_others(handle, &kept)?;
        for some in kept.into_iter().collect::<Vec<_>>().chunks(ADDRESSES_AT_ONCE) {
            datapath.exchange_addresses(handle, &[], some)?;
        }
        let limits = Limits {
            flows: Arc::new(Semaphore::new(FLOWS_MAX)),
            sniffs: Arc::new(Semaphore::new(SNIFFS_MAX)),
            intercepted: Arc::new(Semaphore::new(INTERCEPTED_MAX)),
            queries: Arc::new(Semaphore::new(QUERIES_MAX)),
            dns_streams: Arc::new(Semaphore::new(DNS_STREAMS_MAX)),
            agent_dials: Semaphore::new(DIALS_MAX),
            tunnel_dials: Semaphore::new(DIALS_MAX),
        };
        Ok(Self {
            id,
            endpoint,
            handle,
            limits,
            leases: Leases::default(),
            upstreams: Arc::default(),
            dns_budget: Mutex::default(),
            dns_audited: Mutex::default(),
            dns_load: Mutex::default(),
            spending: Mutex::new(Spending::new(&rules)),
            state: Mutex::new(State {
                enforced: Enforced::new(rules, pins),
                log: Some(log),
            }),
            tunnel_ports: Mutex::default(),
            flow_ended: Notify::new(),
            datapath,
        })
    }

    /// Puts the kernel's half of its rules in force for the first time.
    ///
    /// # Errors
    /// When the kernel does not take it; everything stays denied.
    pub fn install_rules(&self) -> Result<(), DatapathError> {
        let mut state = self.lock();
        state.enforced.rules_mut().install(&self.datapath, self.handle)
    }

    /// How many addresses it holds under a name.
    pub fn pins(&self) -> usize {
        self.lock().enforced.pins().len()
    }

    /// Around everything that is done for it, so that what is logged names it.
    pub fn span(&self) -> Span {
        tracing::info_span!(parent: None, "sandbox", sandbox_id = %self.id)
    }

    /// Its owner. A sandbox that was made in advance gets one later, once, together with the owner's rules.
    pub fn org_id(&self) -> OrgId {
        self.lock().enforced.rules().org_id().clone()
    }

    /// Whether flows go on when they cannot be recorded.
    pub fn failure_mode(&self) -> FailureMode {
        self.lock().enforced.rules().failure_mode()
    }

    /// What address and port alone say about a new flow.
    pub fn first_look(&self, to: SocketAddr) -> FirstLook {
        self.lock().enforced.first_look(to, seconds())
    }

    /// Judges a flow and, if it is allowed, enters it into the books in the same step.
    ///
    /// # Errors
    /// The decision against it.
    pub fn admit(self: &Arc<Self>, facts: Facts) -> Result<Admitted, Decision> {
        let mut state = self.lock();
        let now = seconds();
        let entered = state.enforced.admit(facts.clone(), now)?;
        // Only a pair that DNS made is prolonged: a name beside an address range was not looked up here.
        if let Some(name) = &facts.name
            && state.enforced.pins().contains(name, facts.to.ip(), now)
            && let Err(error) = state.pin(&self.datapath, self.handle, name, &[facts.to.ip()], now)
        {
            // The pair is still pinned as it was: only its life was not prolonged.
            tracing::warn!(sandbox_id = %self.id, %error, "cannot prolong a pin");
        }
        drop(state);
        Ok(Admitted {
            sandbox: Arc::clone(self),
            flow: entered.flow,
            decision: entered.judgement.decision,
            intercept: entered.judgement.intercept,
            cut: entered.cut,
        })
    }

    /// Whether it has an IPv6 address.
    pub fn has_ipv6(&self) -> bool {
        self.endpoint.address6.is_some()
    }

    /// What the rules say about asking for a name.
    pub fn ask_name(&self, name: &DomainName) -> NameLeave {
        let state = self.lock();
        let rules = state.enforced.rules();
        NameLeave {
            decision: rules.judge_name(name),
            dns: rules.dns(),
            dns_audited: rules.dns_audited(),
            org_id: rules.org_id().clone(),
            rules: state.enforced.version(),
        }
    }

    /// What it may ask of DNS, and beyond what of it is recorded.
    pub fn dns_limits(&self) -> (DnsBudget, Option<DnsBudget>) {
        let state = self.lock();
        let rules = state.enforced.rules();
        (rules.dns(), rules.dns_audited())
    }

    /// What it has said by asking for names.
    pub fn dns_budget(&self) -> MutexGuard<'_, Budget> {
        self.dns_budget.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The same as tiers in audit mode count it.
    pub fn dns_audited(&self) -> MutexGuard<'_, Budget> {
        self.dns_audited.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What its answers have cost.
    pub fn dns_load(&self) -> MutexGuard<'_, Load> {
        self.dns_load.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the tiers say about a question that breaks a budget as `breach` tells.
    pub fn judge_dns(&self, breach: impl Fn(&DnsBudget) -> Option<Reason>) -> Decision {
        self.lock().enforced.rules().judge_dns(breach)
    }

    /// What the rules say about a flow that hides its name in a form that is never sent for show.
    pub fn judge_ech(&self) -> Decision {
        self.lock().enforced.rules().judge_ech()
    }

    /// The decision that address and port alone lead to, for records about packets.
    pub fn judge_packet(&self, udp: bool, to: SocketAddr) -> Decision {
        self.lock().enforced.judge_packet(udp, to)
    }

    /// The name of an address, if it has exactly one: what a flow is for that nobody has read.
    pub fn only_name(&self, address: IpAddr) -> Option<String> {
        let mut state = self.lock();
        match state.enforced.pins().names(address, seconds()).as_slice() {
            [only] => Some(only.to_string()),
            _ => None,
        }
    }

    /// Remembers that `name` is about to be answered with `addresses`. Rules of the version allowed it, if one is given:
    /// they need not be asked again while they are in force. Gives how many of the pairs were new, or had to be written
    /// down again.
    ///
    /// # Errors
    /// When the name is no longer allowed, or an address could not be made usable; the answer must not go out.
    pub fn pin(
        &self,
        name: &DomainName,
        allowed_by: Option<Version>,
        addresses: &[IpAddr],
    ) -> Result<usize, PinError> {
        let mut state = self.lock();
        if allowed_by != Some(state.enforced.version()) || state.enforced.is_closed() {
            let decision = state.enforced.rules().judge_name(name);
            if !decision.is_allowed() || state.enforced.is_closed() {
                return Err(PinError::NotAllowed(decision));
            }
        }
        state.pin(&self.datapath, self.handle, name, addresses, seconds())
    }

    /// Puts new rules in force: the kernel first, then names, pins and flows in one step. Returns the flows
    /// that were cut and must be waited for ([`Self::gone`]).
    ///
    /// # Errors
    /// When the kernel does not take the rules. User space enforces them all the same.
    pub fn replace_rules(&self, mut rules: Rules) -> Result<Vec<u64>, DatapathError> {
        let written = rules.install(&self.datapath, self.handle);
        let mut state = self.lock();
        self.leases.retain(rules.bindings(), rules.generation());
        self.upstreams.renew();
        self.spending().follow(&rules);
        let replaced = state.enforced.replace(rules, seconds());
        state.forget(&self.datapath, self.handle, &self.id, &replaced.unbound);
        drop(state);
        written.map(|()| replaced.cut)
    }

    /// Replaces the ports that tunnels lead to. Connections to others are no longer admitted, also those that an
    /// earlier netd opened: their ends, netd's and the sandbox's, for whoever wants to destroy what is left of them.
    ///
    /// # Errors
    /// When the kernel does not take it; none is admitted anew.
    pub fn set_tunnel_ports(
        &self,
        ports: impl IntoIterator<Item = u16>,
    ) -> Result<Vec<(SocketAddrV4, SocketAddrV4)>, DatapathError> {
        let agent = self.endpoint.agent_port;
        let mut present = self.tunnel_ports.lock().unwrap_or_else(PoisonError::into_inner);
        *present = ports
            .into_iter()
            .filter(|port| *port != agent && *port != 0)
            .collect();
        let gone = self
            .datapath
            .revoke_inbound_ports(self.handle, |port| port == agent || present.contains(&port))?;
        let remote = |port| SocketAddrV4::new(self.endpoint.address, port);
        Ok(gone
            .into_iter()
            .map(|(port, local)| (local, remote(port)))
            .collect())
    }

    /// Whether a tunnel leads to this port.
    pub fn has_tunnel(&self, port: u16) -> bool {
        let present = self.tunnel_ports.lock().unwrap_or_else(PoisonError::into_inner);
        present.contains(&port)
    }

    /// Admits one connection to a port that a tunnel leads to, from netd's socket with this cookie. False: no tunnel
    /// leads there.
    ///
    /// # Errors
    /// When the kernel does not take it.
    pub fn admit_tunnel(&self, port: u16, local: SocketAddrV4, cookie: u64) -> Result<bool, DatapathError> {
        let present = self.tunnel_ports.lock().unwrap_or_else(PoisonError::into_inner);
        if !present.contains(&port) {
            return Ok(false);
        }
        self.datapath.admit_inbound(self.handle, port, local, cookie)?;
        Ok(true)
    }

    /// Which certificate authority it trusts.
    pub fn generation(&self) -> u32 {
        self.lock().enforced.rules().generation()
    }

    /// The secrets that are injected into its requests.
    pub fn bindings(&self) -> Arc<Bindings> {
        Arc::clone(self.lock().enforced.rules().bindings())
    }

    /// Cuts every flow, admits no more, and lets go of what it had: whoever still knows this sandbox, to name it in
    /// records, holds neither its file nor a value of its secrets.
    pub fn close(&self, reason: CutReason) -> Vec<u64> {
        let mut state = self.lock();
        state.log = None;
        let cut = state.enforced.close(&reason);
        drop(state);
        self.leases.end();
        self.upstreams.end();
        cut
    }

    /// After [`Self::close`], when the kernel knows it no more: others may pin as many addresses as it had.
    pub fn retire(&self) {
        self.lock().enforced.pins().retire();
    }

    /// Waits until the flows have really ended, at most `limit`.
    ///
    /// # Errors
    /// When some have not.
    pub async fn gone(&self, flows: &[u64], limit: Duration) -> Result<(), tokio::time::error::Elapsed> {
        let gone = async {
            loop {
                // Registered before looking, so that no end is missed.
                let ended = self.flow_ended.notified();
                if !self.lock().enforced.has_any(flows) {
                    return;
                }
                ended.await;
            }
        };
        tokio::time::timeout(limit, gone).await
    }

    /// Drops the pins that have ended.
    pub fn sweep_pins(&self) {
        let mut state = self.lock();
        let unbound = state.enforced.sweep_pins(seconds());
        state.forget(&self.datapath, self.handle, &self.id, &unbound);
        let State { enforced, log } = &mut *state;
        if let Some(log) = log {
            log.settle(enforced.pins());
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every method leaves the state whole before anything that can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Pins addresses to a name. What was pinned before a failure stays. Gives how many pairs were written down.
    fn pin(
        &mut self,
        datapath: &Datapath,
        handle: EndpointHandle,
        name: &DomainName,
        addresses: &[IpAddr],
        now: Seconds,
    ) -> Result<usize, PinError> {
        let pins = self.enforced.pins();
        let mut unlogged = Vec::new();
        let mut told = Ok(());
        for some in addresses.chunks(ADDRESSES_AT_ONCE) {
            let (mut old, mut new, mut written) = (Vec::new(), Vec::new(), Vec::new());
            for address in some {
                let pinned = pins.pin(name, *address, now);
                for evicted in pinned.evicted {
                    // One that was pinned a moment ago: the kernel does not know it yet.
                    match new.iter().position(|address| *address == evicted) {
                        Some(at) => drop(new.swap_remove(at)),
                        None => old.push(evicted),
                    }
                }
                if pinned.is_new_address {
                    new.push(*address);
                }
                if pinned.must_be_logged {
                    written.push(*address);
                }
            }
            if old.is_empty() && new.is_empty() {
                unlogged.append(&mut written);
                continue;
            }
            told = datapath.exchange_addresses(handle, &old, &new);
            if told.is_err() {
                for address in new {
                    pins.unpin(name, address);
                }
                break;
            }
            unlogged.append(&mut written);
        }
        if let Some(log) = &mut self.log {
            log.append(name, &unlogged, now + PIN_LIFETIME.as_secs(), pins);
        }
        told?;
        Ok(unlogged.len())
    }

    /// Brings kernel and log in step with pins that were dropped.
    fn forget(&mut self, datapath: &Datapath, handle: EndpointHandle, id: &SandboxId, unbound: &[IpAddr]) {
        if unbound.is_empty() {
            return;
        }
        for some in unbound.chunks(ADDRESSES_AT_ONCE) {
            // Left in the kernel they only bring the connection to netd, which refuses it.
            if let Err(error) = datapath.exchange_addresses(handle, some, &[]) {
                tracing::warn!(sandbox_id = %id, %error, "cannot unbind addresses in the kernel");
            }
        }
        if let Some(log) = &mut self.log {
            log.rewrite(self.enforced.pins());
        }
    }
}

impl Admitted {
    /// The sandbox whose flow it is.
    pub fn sandbox(&self) -> &Arc<Sandbox> {
        &self.sandbox
    }

    /// Judges a request on this flow by the rules in force and, if it is allowed, enters it into the books in the
    /// same step.
    ///
    /// # Errors
    /// The decision against it.
    pub fn admit_request(&self, facts: RequestFacts) -> Result<AdmittedRequest, Decision> {
        let mut state = self.sandbox.lock();
        let (request, judgement) = state.enforced.admit_request(self.flow, facts)?;
        Ok(AdmittedRequest {
            sandbox: Arc::clone(&self.sandbox),
            flow: self.flow,
            request,
            judgement,
            bindings: Arc::clone(state.enforced.rules().bindings()),
        })
    }
}

impl Drop for AdmittedRequest {
    fn drop(&mut self) {
        self.sandbox
            .lock()
            .enforced
            .leave_request(self.flow, self.request);
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.sandbox.lock().enforced.leave(self.flow);
        self.sandbox.flow_ended.notify_waiters();
    }
}

/// The age of the machine, asleep or not. Without that clock, which every kernel has, nothing counts any more.
fn seconds() -> Seconds {
    let age = clock_gettime(ClockId::CLOCK_BOOTTIME);
    age.map_or(Seconds::MAX / 2, |age| Duration::from(age).as_secs())
}
