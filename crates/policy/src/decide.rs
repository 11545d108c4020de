//! The decision over all tiers.

use std::net::SocketAddr;

use crate::{
    address,
    dns::DnsBudget,
    document::{FailureMode, Policy, Tls},
    error::PolicyError,
    kernel::{self, KernelAction, KernelTable},
    names::{DomainName, DomainPattern},
    platform::Platform,
    ports::{PortSet, PortSpan},
    reason::Reason,
    request::RequestHead,
    tier::{Claim, Judgement, Tier, View},
};

/// The transport of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP, other than DNS to netd's resolver: no rule of this version can allow it.
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
    /// [`Reason::Allowed`], or why not.
    pub reason: Reason,
    /// The tier that decided, as an index into those given to [`SandboxPolicy::compile`]: the first that denies, or the
    /// last of those that allow. `None`: the platform, or the default policy where no tier was given.
    pub tier: Option<usize>,
    /// What decided in this tier: the name of a rule, or its path such as `rules[0]` or `allowed_domains[2]`,
    /// `allowed_ports` or `mode`. `None`: the platform.
    pub rule: Option<String>,
    /// For a flow without name: `true` means look for one. If the flow is denied, a name can allow it; if it is allowed,
    /// it may go on unread should it show none, but under one that a secret is bound to it is intercepted. `false` means
    /// that the answer is final, and an allowed flow may be forwarded without a look inside. For a flow with a name: it
    /// is allowed because of the name.
    pub needs_name: bool,
    /// Whether an allowed flow must be read: a winning rule asks for it, or a secret is bound to its name and port.
    pub intercept: bool,
    /// The secrets whose bindings every request on an allowed flow must use, one for each winning rule that names one.
    pub credentials: Vec<String>,
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
    /// How many tiers were given; the default policy stands in for none.
    given: usize,
    bindings: Vec<BoundHost>,
    /// The ports of all bindings.
    read: PortSet,
}

impl SandboxPolicy {
    /// Compiles the tiers, the one of highest precedence first. None at all means [`Policy::default`].
    ///
    /// # Errors
    ///
    /// When the tiers together are more than the kernel's table holds. The field is one of the last tier's document.
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
        let compiled: Vec<Tier> = policies.iter().map(|policy| Tier::compile(policy)).collect();
        let bound_ports = bindings.iter().flat_map(|binding| &binding.ports);
        let read = PortSet::new(bound_ports.copied().map(PortSpan::one));
        let table = kernel::table(&compiled, &read).map_err(|excess| {
            let mut error = excess.of(policies.last().map_or(&default, |policy| *policy));
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
        })?;
        let policy = Self {
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
        match flow.protocol {
            Protocol::Udp => deny_flatly(Reason::ProtocolDenied),
            Protocol::Tcp => match flow.name {
                Some(name) => self.decide_shown(flow, name),
                None => self.decide_nameless(flow),
            },
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
        for (tier, judgement) in judgements.iter().enumerate() {
            let inside = self.tiers[tier].inside(judgement.cause);
            let Some(inside) = inside.filter(|inside| !inside.http.is_empty()) else {
                continue;
            };
            // An entry with the right method says more about what is wrong than one without.
            let mismatches: Option<Vec<Reason>> =
                inside.http.iter().map(|entry| entry.mismatch(request)).collect();
            if let Some(mismatches) = mismatches {
                let path = mismatches.contains(&Reason::PathDenied);
                let reason = if path {
                    Reason::PathDenied
                } else {
                    Reason::MethodDenied
                };
                return self.verdict(tier, Judgement::deny(reason, judgement.cause), false);
            }
        }
        verdict
    }

    fn decide_shown(&self, flow: &Flow<'_>, name: &DomainName) -> Verdict {
        let judgements = self.judge(flow, Claim::Name(name));
        match judgements.iter().position(|judgement| !judgement.allowed()) {
            Some(tier) => self.verdict(tier, judgements[tier], false),
            None => {
                let nameless = self.judge(flow, Claim::Nothing);
                let by_name = !nameless.iter().all(Judgement::allowed);
                let last = self.tiers.len() - 1;
                let (intercept, credentials) = self.asked_inside(flow, name, &judgements);
                Verdict {
                    intercept,
                    credentials,
                    ..self.verdict(last, judgements[last], by_name)
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
            .filter_map(|(tier, judgement)| tier.inside(judgement.cause))
            .collect();
        let spliced = winning.iter().any(|inside| inside.tls == Tls::Splice);
        let is_bound = !spliced && flow.names_bound.contains(name) && self.holds(name, flow.to.port());
        let mut credentials: Vec<String> = winning
            .iter()
            .filter_map(|inside| inside.credential.clone())
            .collect();
        credentials.sort_unstable();
        credentials.dedup();
        let read = winning.iter().any(|inside| inside.is_read());
        (read || is_bound, credentials)
    }

    /// Whether a secret is bound to the name and the port.
    fn holds(&self, name: &DomainName, port: u16) -> bool {
        self.bindings.iter().any(|binding| binding.concerns(name, port))
    }

    fn decide_nameless(&self, flow: &Flow<'_>) -> Verdict {
        let judgements = self.judge(flow, Claim::Nothing);
        let Some(first) = judgements.iter().position(|judgement| !judgement.allowed()) else {
            let last = self.tiers.len() - 1;
            let port = flow.to.port();
            let may_be_bound = flow.names_bound.iter().any(|name| {
                self.holds(name, port) && self.judge(flow, Claim::Name(name)).iter().all(Judgement::allowed)
            });
            return self.verdict(last, judgements[last], may_be_bound);
        };
        // A name can help only if all tiers allow the flow under it.
        let mut claims = [Claim::Unlisted]
            .into_iter()
            .chain(flow.names_bound.iter().map(Claim::Name));
        if claims.any(|claim| self.judge(flow, claim).iter().all(Judgement::allowed)) {
            let judgement = Judgement {
                reason: Reason::NoName,
                ..judgements[first]
            };
            return self.verdict(first, judgement, true);
        }
        // The tier that denies whatever the names are says more than one that lacks a name.
        let address = address::canonical(flow.to.ip());
        let flat = |tier: &Tier| matches!(tier.kernel_at(address, flow.to.port()), KernelAction::Deny(_));
        if let Some(tier) = self.tiers.iter().position(flat) {
            return self.verdict(tier, judgements[tier], false);
        }
        let settled = |judgement: &Judgement| !judgement.allowed() && judgement.reason != Reason::NoName;
        match judgements.iter().position(settled) {
            Some(tier) => self.verdict(tier, judgements[tier], false),
            None => {
                let judgement = Judgement {
                    reason: Reason::AddressNotBound,
                    ..judgements[first]
                };
                self.verdict(first, judgement, false)
            }
        }
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

    /// Decides a DNS query: whether any flow under this name may be allowed, on any port. Allow rules by address open
    /// no name, and a mode that allows everything opens public names only.
    pub fn decide_name(&self, name: &DomainName) -> Verdict {
        let mut common: Option<PortSet> = None;
        let mut last = None;
        for (index, tier) in self.tiers.iter().enumerate() {
            let (open, judgement) = tier.open_to(name);
            if !judgement.allowed() {
                return self.verdict(index, judgement, false);
            }
            let both = common.map_or_else(|| open.clone(), |common| common.and(&open));
            if both.is_empty() {
                // Each tier allows the name, and no port is open to it in all of them.
                let judgement = Judgement {
                    reason: Reason::PortDenied,
                    ..judgement
                };
                return self.verdict(index, judgement, false);
            }
            common = Some(both);
            last = Some((index, judgement));
        }
        match last {
            Some((index, judgement)) => self.verdict(index, judgement, false),
            None => deny_flatly(Reason::DefaultDeny),
        }
    }

    /// What the kernel does for a destination: the platform's ranges first, then what [`SandboxPolicy::kernel_table`]
    /// says. The table may give [`Reason::DefaultDeny`] where this gives a finer reason, and [`KernelAction::Proxy`] where
    /// bindings on many ports would make it too large.
    pub fn decide_address_port(&self, to: SocketAddr) -> KernelAction {
        if self.platform.denies(to) {
            return KernelAction::Deny(Reason::PlatformDenied);
        }
        let address = address::canonical(to.ip());
        let strictest = kernel::strictest(self.tiers.iter().map(|tier| tier.kernel_at(address, to.port())));
        kernel::reading(strictest, self.read.contains(to.port()))
    }

    /// The table for the kernel, without the platform's ranges. Computed anew each time.
    ///
    /// # Panics
    ///
    /// Never: it fitted when the tiers were compiled.
    pub fn kernel_table(&self) -> KernelTable {
        kernel::table(&self.tiers, &self.read).unwrap_or_else(|excess| unreachable!("{excess:?}"))
    }

    /// What may be asked of DNS: of each limit the strictest of all tiers that enforce, and no limit where none does.
    pub fn dns(&self) -> DnsBudget {
        let budgets = self.tiers.iter().map(|tier| tier.dns);
        budgets.fold(DnsBudget::UNLIMITED, DnsBudget::strictest)
    }

    /// The strictest of the tiers' modes.
    pub fn failure_mode(&self) -> FailureMode {
        let open = |tier: &Tier| tier.failure_mode == FailureMode::FailOpen;
        if self.tiers.iter().all(open) {
            FailureMode::FailOpen
        } else {
            FailureMode::FailClosed
        }
    }

    fn verdict(&self, tier: usize, judgement: Judgement, needs_name: bool) -> Verdict {
        Verdict {
            allowed: judgement.allowed(),
            reason: judgement.reason,
            tier: Some(tier).filter(|tier| *tier < self.given),
            rule: Some(self.tiers[tier].label(judgement.cause)),
            needs_name,
            intercept: false,
            credentials: Vec::new(),
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
