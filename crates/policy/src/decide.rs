//! The decision over all tiers.

mod limits;

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use crate::{
    address,
    document::{Policy, Tls},
    error::PolicyError,
    kernel::{self, KernelAction, KernelTable},
    names::{DomainName, DomainPattern},
    platform::Platform,
    ports::{PortSet, PortSpan},
    quota,
    reason::Reason,
    request::RequestHead,
    tier::{Cause, Claim, Judgement, Listed, Place, Tier, View},
};

/// The transport of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP, other than DNS, which is the resolver's: allowed only by a rule for it.
    Udp,
}

/// A flow, as far as it is known.
#[derive(Debug, Clone, Copy)]
pub struct Flow<'a> {
    /// Its transport.
    pub protocol: Protocol,
    /// Its destination.
    pub to: SocketAddr,
    /// The name it shows: SNI or Host. `None`: it shows none, or nobody has looked yet.
    pub name: Option<&'a DomainName>,
    /// The names under which this sandbox got the destination's address from DNS.
    pub names_bound: &'a [DomainName],
}

/// The answer, and what it rests on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// Whether it passes.
    pub allowed: bool,
    /// [`Reason::Allowed`], or why not. Of what passes it is another where a tier in audit mode denies it: see
    /// [`Verdict::is_audited`].
    pub reason: Reason,
    /// The tier that decided, as an index into those given to [`SandboxPolicy::compile`]: the first that denies, or the
    /// last of those that allow. Tiers in audit mode come after those that enforce. `None`: the platform, or the default
    /// policy where no tier was given.
    pub tier: Option<usize>,
    /// What decided in this tier: the name of a rule, or its path such as `rules[0]` or `allowed_domains[2]`,
    /// `allowed_ports` or `mode`. `None`: the platform.
    pub rule: Option<String>,
    /// For a flow without name: `true` means look for one. If the flow is denied, a name can allow it; if it is allowed,
    /// it may go on unread should it show none, but under one that a secret is bound to it is intercepted, and under one
    /// that a tier in audit mode allows it is no denial to record. `false` means that the answer is final, and an
    /// allowed flow may be forwarded without a look inside. For a flow with a name: it is allowed because of the name.
    pub needs_name: bool,
    /// Whether an allowed flow must be read: a winning rule asks for it, or a secret is bound to its name and port.
    pub intercept: bool,
    /// The secrets whose bindings every request on an allowed flow must use, one for each winning rule that names one.
    /// Tiers in audit mode require none.
    pub credentials: Vec<String>,
}

impl Verdict {
    /// Whether it passes only because the tier that denies it is in audit mode; `reason`, `tier` and `rule` are those of
    /// the denial that is not carried out.
    pub fn is_audited(&self) -> bool {
        self.allowed && self.reason != Reason::Allowed
    }
}

/// Hosts and ports that one secret is bound to. It opens nothing: it makes flows that are allowed anyway be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BoundHost {
    /// The hosts.
    pub hosts: Vec<DomainPattern>,
    /// The ports.
    pub ports: Vec<u16>,
}

impl BoundHost {
    fn concerns(&self, name: &DomainName, port: u16) -> bool {
        self.ports.contains(&port) && self.hosts.iter().any(|host| host.matches(name))
    }
}

/// The compiled tiers of one sandbox.
#[derive(Debug, Clone)]
pub struct SandboxPolicy {
    platform: Platform,
    tiers: Vec<Tier>,
    /// The tiers as they are asked: those that enforce, then those in audit mode.
    order: Vec<usize>,
    /// How many tiers were given; the default policy stands in for none.
    given: usize,
    bindings: Vec<BoundHost>,
    /// The ports of all bindings; every port where flows are counted.
    read: PortSet,
}

impl SandboxPolicy {
    /// Compiles the tiers, the one of highest precedence first. None at all means [`Policy::default`].
    ///
    /// # Errors
    ///
    /// When the tiers together are more than the kernel's table holds, or one allows datagrams where another has a quota of
    /// flows. The field is one of the last tier's document.
    pub fn compile(platform: &Platform, tiers: &[(String, Policy)]) -> Result<Self, PolicyError> {
        Self::compile_with(platform, tiers, &[])
    }

    /// The same for a sandbox that holds placeholders of bound secrets. Bindings change no answer but
    /// [`Verdict::intercept`], and [`Verdict::needs_name`] with it; on their ports the kernel passes nothing unread.
    ///
    /// # Errors
    ///
    /// Those of [`SandboxPolicy::compile`], and never because of the bindings.
    pub fn compile_with(
        platform: &Platform,
        tiers: &[(String, Policy)],
        bindings: &[BoundHost],
    ) -> Result<Self, PolicyError> {
        Self::compile_with_table(platform, tiers, bindings).map(|(policy, _table)| policy)
    }

    /// The same with the kernel's table, which was made on the way and is not kept: a node has many policies, and what
    /// is in its kernel need not lie in its memory too.
    ///
    /// # Errors
    ///
    /// Those of [`SandboxPolicy::compile_with`].
    pub fn compile_with_table(
        platform: &Platform,
        tiers: &[(String, Policy)],
        bindings: &[BoundHost],
    ) -> Result<(Self, KernelTable), PolicyError> {
        let default = Policy::default();
        let policies: Vec<&Policy> = if tiers.is_empty() {
            vec![&default]
        } else {
            tiers.iter().map(|(_, policy)| policy).collect()
        };
        let together = |mut error: PolicyError| {
            if let [above @ .., (last, _)] = tiers
                && !above.is_empty()
            {
                let names: Vec<&str> = above.iter().map(|(name, _)| name.as_str()).collect();
                error.message = format!(
                    "{} (policy of {last}, together with {})",
                    error.message,
                    names.join(", ")
                );
            }
            error
        };
        quota::check(&policies).map_err(together)?;
        let compiled: Vec<Tier> = policies.iter().map(|policy| Tier::compile(policy)).collect();
        let read = if compiled.iter().any(|tier| tier.quotas.of_flows().is_some()) {
            PortSet::all()
        } else {
            let bound_ports = bindings.iter().flat_map(|binding| &binding.ports);
            PortSet::new(bound_ports.copied().map(PortSpan::one))
        };
        let table = kernel::table(&compiled, &read)
            .map_err(|excess| together(excess.of(policies.last().map_or(&default, |policy| *policy))))?;
        let mut order: Vec<usize> = (0..compiled.len()).collect();
        order.sort_by_key(|tier| compiled[*tier].is_audit);
        let policy = Self {
            order,
            platform: platform.clone(),
            tiers: compiled,
            given: tiers.len(),
            bindings: bindings.to_vec(),
            read,
        };
        Ok((policy, table))
    }

    /// Decides one flow. Ask without name first; see [`Verdict::needs_name`].
    pub fn decide(&self, flow: &Flow<'_>) -> Verdict {
        if self.platform.denies(flow.to) {
            return deny_flatly(Reason::PlatformDenied);
        }
        match (flow.protocol, flow.name) {
            (Protocol::Udp, _) => self.decide_udp(flow.to),
            (Protocol::Tcp, Some(name)) => self.decide_shown(flow, name),
            (Protocol::Tcp, None) => self.decide_nameless(flow),
        }
    }

    /// Decides one request on a flow that shows a name. What a winning rule's `http` list does not hold is denied, and
    /// the rules below it are not asked: the list narrows the rule, it never hands the flow on.
    pub fn decide_request(&self, flow: &Flow<'_>, request: &RequestHead<'_>) -> Verdict {
        let verdict = self.decide(flow);
        let (true, Some(name)) = (verdict.allowed, flow.name) else {
            return verdict;
        };
        let judgements = self.judge(flow, Claim::Name(name));
        let denied = self.order.iter().find_map(|tier| {
            let judgement = judgements[*tier];
            let inside = self.tiers[*tier].inside(judgement.cause);
            let inside = inside.filter(|inside| judgement.allowed() && !inside.http.is_empty())?;
            // An entry with the right method says more about what is wrong than one without.
            let mismatches: Option<Vec<Reason>> =
                inside.http.iter().map(|entry| entry.mismatch(request)).collect();
            let reason = if mismatches?.contains(&Reason::PathDenied) {
                Reason::PathDenied
            } else {
                Reason::MethodDenied
            };
            Some((*tier, Judgement::deny(reason, judgement.cause)))
        });
        match denied {
            Some((tier, judgement)) if !self.tiers[tier].is_audit => self.verdict(tier, judgement, false),
            // The flow itself is a denial already that is not carried out.
            Some(_) | None if verdict.is_audited() => verdict,
            Some((tier, judgement)) => Verdict {
                intercept: verdict.intercept,
                credentials: verdict.credentials,
                ..self.verdict(tier, judgement, verdict.needs_name)
            },
            None => verdict,
        }
    }

    fn decide_shown(&self, flow: &Flow<'_>, name: &DomainName) -> Verdict {
        let judgements = self.judge(flow, Claim::Name(name));
        let denied = self.first_denial(&judgements, Tiers::All);
        match denied {
            Some(tier) if !self.tiers[tier].is_audit => self.verdict(tier, judgements[tier], false),
            Some(_) | None => {
                let by_name = self
                    .first_denial(&self.judge(flow, Claim::Nothing), Tiers::All)
                    .is_some();
                let tier = denied.unwrap_or_else(|| self.last());
                let (intercept, credentials) = self.asked_inside(flow, name, &judgements);
                Verdict {
                    intercept,
                    credentials,
                    ..self.verdict(tier, judgements[tier], by_name)
                }
            }
        }
    }

    /// What the winning rules of all tiers and the bindings ask of what is inside the flow.
    fn asked_inside(
        &self,
        flow: &Flow<'_>,
        name: &DomainName,
        judgements: &[Judgement],
    ) -> (bool, Vec<String>) {
        let winning: Vec<_> = self
            .tiers
            .iter()
            .zip(judgements)
            .filter(|(_, judgement)| judgement.allowed())
            .filter_map(|(tier, judgement)| Some((tier, tier.inside(judgement.cause)?)))
            .collect();
        let spliced = winning.iter().any(|(_, inside)| inside.tls == Tls::Splice);
        let is_bound = !spliced && flow.names_bound.contains(name) && self.holds(name, flow.to.port());
        let mut credentials: Vec<String> = winning
            .iter()
            .filter(|(tier, _)| !tier.is_audit)
            .filter_map(|(_, inside)| inside.credential.clone())
            .collect();
        credentials.sort_unstable();
        credentials.dedup();
        let read = winning.iter().any(|(_, inside)| inside.is_read());
        (read || is_bound, credentials)
    }

    /// Whether a secret is bound to the name and the port.
    fn holds(&self, name: &DomainName, port: u16) -> bool {
        self.bindings.iter().any(|binding| binding.concerns(name, port))
    }

    fn decide_nameless(&self, flow: &Flow<'_>) -> Verdict {
        let judgements = self.judge(flow, Claim::Nothing);
        if let Some(denied) = self.nameless_denial(flow, &judgements, Tiers::Enforcing) {
            return denied;
        }
        let port = flow.to.port();
        let may_be_bound = flow
            .names_bound
            .iter()
            .any(|name| self.holds(name, port) && self.passes(flow, Claim::Name(name), Tiers::Enforcing));
        match self.nameless_denial(flow, &judgements, Tiers::All) {
            Some(audited) => Verdict {
                needs_name: audited.needs_name || may_be_bound,
                ..audited
            },
            None => self.verdict(self.last(), judgements[self.last()], may_be_bound),
        }
    }

    /// Why some of these tiers deny a flow that shows no name, and whether one could help. None: they allow it.
    fn nameless_denial(&self, flow: &Flow<'_>, judgements: &[Judgement], which: Tiers) -> Option<Verdict> {
        let first = self.first_denial(judgements, which)?;
        // A name can help only if all tiers allow the flow under it.
        let mut claims = [Claim::Unlisted]
            .into_iter()
            .chain(flow.names_bound.iter().map(Claim::Name));
        if claims.any(|claim| self.passes(flow, claim, which)) {
            let judgement = Judgement {
                reason: Reason::NoName,
                ..judgements[first]
            };
            return Some(self.verdict(first, judgement, true));
        }
        // The tier that denies whatever the names are says more than one that lacks a name.
        let flat = |tier: &usize| {
            let tier = &self.tiers[*tier];
            let place = Listing::of(tier, flow.to.ip());
            matches!(tier.tcp(flow.to.port(), place.place()), KernelAction::Deny(_))
        };
        if let Some(tier) = self.counted(which).find(flat) {
            return Some(self.verdict(tier, judgements[tier], false));
        }
        let settled = |tier: &usize| {
            let judgement = judgements[*tier];
            !judgement.allowed() && judgement.reason != Reason::NoName
        };
        Some(match self.counted(which).find(settled) {
            Some(tier) => self.verdict(tier, judgements[tier], false),
            None => {
                let judgement = Judgement {
                    reason: Reason::AddressNotBound,
                    ..judgements[first]
                };
                self.verdict(first, judgement, false)
            }
        })
    }

    fn decide_udp(&self, to: SocketAddr) -> Verdict {
        let address = address::canonical(to.ip());
        let nobody = || deny_flatly(Reason::ProtocolDenied);
        // No kernel would look for an IPv4 address inside: nothing is forwarded unread to where it might lead.
        if address::wraps(&IpNet::from(address)) {
            return nobody();
        }
        let answers: Vec<_> = self
            .tiers
            .iter()
            .map(|tier| tier.judge_udp(address, to.port()))
            .collect();
        if answers.iter().all(Option::is_none) {
            return nobody();
        }
        let unmentioned = Judgement::deny(Reason::ProtocolDenied, Cause::Mode);
        let judgements: Vec<Judgement> = answers
            .into_iter()
            .map(|answer| answer.unwrap_or(unmentioned))
            .collect();
        let tier = self
            .first_denial(&judgements, Tiers::All)
            .unwrap_or_else(|| self.last());
        self.verdict(tier, judgements[tier], false)
    }

    fn judge(&self, flow: &Flow<'_>, claim: Claim<'_>) -> Vec<Judgement> {
        let view = View {
            address: flow.to.ip(),
            port: flow.to.port(),
            claim,
            bound: flow.names_bound,
        };
        self.tiers.iter().map(|tier| tier.judge(&view)).collect()
    }

    fn passes(&self, flow: &Flow<'_>, claim: Claim<'_>, which: Tiers) -> bool {
        self.first_denial(&self.judge(flow, claim), which).is_none()
    }

    /// The tiers that count, in the order in which they are asked.
    fn counted(&self, which: Tiers) -> impl Iterator<Item = usize> {
        let tiers = self.order.iter().copied();
        tiers.filter(move |tier| which == Tiers::All || !self.tiers[*tier].is_audit)
    }

    fn first_denial(&self, judgements: &[Judgement], which: Tiers) -> Option<usize> {
        self.counted(which).find(|tier| !judgements[*tier].allowed())
    }

    /// The tier that is asked last.
    fn last(&self) -> usize {
        *self
            .order
            .last()
            .expect("where no tier is given the default policy stands in")
    }

    /// Decides a DNS query: whether any flow under this name may be allowed, on any port. Allow rules by address open
    /// no name, and a mode that allows everything opens public names only.
    pub fn decide_name(&self, name: &DomainName) -> Verdict {
        let mut common = [PortSet::all(), PortSet::all()];
        let mut answer = None;
        for &tier in &self.order {
            let (open, mut judgement) = self.tiers[tier].open_to(name);
            for (common, open) in common.iter_mut().zip(&open) {
                *common = common.and(open);
            }
            if judgement.allowed() && common.iter().all(PortSet::is_empty) {
                // Each tier allows the name, and no port is open to it in all of them.
                judgement.reason = Reason::PortDenied;
            }
            answer = Some((tier, judgement));
            if !judgement.allowed() {
                break;
            }
        }
        match answer {
            Some((tier, judgement)) => self.verdict(tier, judgement, false),
            None => deny_flatly(Reason::DefaultDeny),
        }
    }

    /// What the kernel does for a destination: the platform's ranges first, then what [`SandboxPolicy::kernel_table`]
    /// says. The table may give a coarser reason of a denial, and [`KernelAction::Proxy`] where bindings on many ports
    /// would make it too large.
    pub fn decide_address_port(&self, protocol: Protocol, to: SocketAddr) -> KernelAction {
        if self.platform.denies(to) {
            return KernelAction::Deny(Reason::PlatformDenied);
        }
        let address = address::canonical(to.ip());
        let listings: Vec<Listing> = self.tiers.iter().map(|tier| Listing::of(tier, address)).collect();
        match protocol {
            Protocol::Tcp => kernel::tcp(&self.tiers, to.port(), |tier| listings[tier].place(), &self.read),
            Protocol::Udp if address::wraps(&IpNet::from(address)) => {
                KernelAction::Deny(Reason::ProtocolDenied)
            }
            Protocol::Udp => {
                let answers = self.tiers.iter().zip(&listings);
                let answers: Vec<_> = answers
                    .map(|(tier, listing)| (tier.udp(to.port(), &listing.listed), tier))
                    .collect();
                kernel::udp(&answers)
            }
        }
    }

    /// The table for the kernel, without the platform's ranges. Computed anew each time.
    ///
    /// # Panics
    ///
    /// Never: it fitted when the tiers were compiled.
    pub fn kernel_table(&self) -> KernelTable {
        kernel::table(&self.tiers, &self.read).unwrap_or_else(|excess| unreachable!("{excess:?}"))
    }

    fn verdict(&self, tier: usize, judgement: Judgement, needs_name: bool) -> Verdict {
        Verdict {
            allowed: judgement.allowed() || self.tiers[tier].is_audit,
            reason: judgement.reason,
            tier: Some(tier).filter(|tier| *tier < self.given),
            rule: Some(self.tiers[tier].label(judgement.cause)),
            needs_name,
            intercept: false,
            credentials: Vec::new(),
        }
    }
}

/// Which tiers count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tiers {
    /// Those whose denials are carried out.
    Enforcing,
    /// All of them.
    All,
}

/// The rules of one tier that list an address.
struct Listing {
    listed: Vec<Listed>,
    wraps: bool,
}

impl Listing {
    fn of(tier: &Tier, address: IpAddr) -> Self {
        let address = address::canonical(address);
        Self {
            listed: tier.listing(address),
            wraps: address::wraps(&IpNet::from(address)),
        }
    }

    fn place(&self) -> Place<'_> {
        Place {
            listed: &self.listed,
            wraps: self.wraps,
        }
    }
}

/// The platform's answer.
fn deny_flatly(reason: Reason) -> Verdict {
    Verdict {
        allowed: false,
        reason,
        tier: None,
        rule: None,
        needs_name: false,
        intercept: false,
        credentials: Vec::new(),
    }
}

#[cfg(test)]
mod tests;
