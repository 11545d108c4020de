//! The decision over all tiers.

use std::net::SocketAddr;

use crate::{
    address,
    document::{FailureMode, Policy},
    error::PolicyError,
    kernel::{self, KernelAction, KernelTable},
    names::DomainName,
    platform::Platform,
    reason::Reason,
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
    /// For a flow without name: `true` means that it is denied as it is and a name can allow it, so look for one;
    /// `false` means that the answer is final, and an allowed flow may be forwarded without a look inside. For a flow
    /// with a name: it is allowed because of the name.
    pub needs_name: bool,
}

/// The compiled tiers of one sandbox.
#[derive(Debug, Clone)]
pub struct SandboxPolicy {
    platform: Platform,
    tiers: Vec<Tier>,
    /// How many tiers were given; the default policy stands in for none.
    given: usize,
    table: KernelTable,
}

impl SandboxPolicy {
    /// Compiles the tiers, the one of highest precedence first. None at all means [`Policy::default`].
    ///
    /// # Errors
    ///
    /// When the tiers together are more than the kernel's table holds. The field is one of the last tier's document.
    pub fn compile(platform: &Platform, tiers: &[(String, Policy)]) -> Result<Self, PolicyError> {
        let default = Policy::default();
        let policies: Vec<&Policy> = if tiers.is_empty() {
            vec![&default]
        } else {
            tiers.iter().map(|(_, policy)| policy).collect()
        };
        let compiled: Vec<Tier> = policies.iter().map(|policy| Tier::compile(policy)).collect();
        let table = kernel::table(&compiled).map_err(|excess| {
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
        Ok(Self {
            platform: platform.clone(),
            tiers: compiled,
            given: tiers.len(),
            table,
        })
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

    fn decide_shown(&self, flow: &Flow<'_>, name: &DomainName) -> Verdict {
        let judgements = self.judge(flow, Claim::Name(name));
        match judgements.iter().position(|judgement| !judgement.allowed()) {
            Some(tier) => self.verdict(tier, judgements[tier], false),
            None => {
                let nameless = self.judge(flow, Claim::Nothing);
                let by_name = !nameless.iter().all(Judgement::allowed);
                self.verdict(self.tiers.len() - 1, judgements[self.tiers.len() - 1], by_name)
            }
        }
    }

    fn decide_nameless(&self, flow: &Flow<'_>) -> Verdict {
        let judgements = self.judge(flow, Claim::Nothing);
        let Some(first) = judgements.iter().position(|judgement| !judgement.allowed()) else {
            return self.verdict(self.tiers.len() - 1, judgements[self.tiers.len() - 1], false);
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
        let mut common: Option<crate::ports::PortSet> = None;
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
    /// says. The table may give [`Reason::DefaultDeny`] where this gives a finer reason.
    pub fn decide_address_port(&self, to: SocketAddr) -> KernelAction {
        if self.platform.denies(to) {
            return KernelAction::Deny(Reason::PlatformDenied);
        }
        let address = address::canonical(to.ip());
        kernel::strictest(self.tiers.iter().map(|tier| tier.kernel_at(address, to.port())))
    }

    /// The table for the kernel: TCP over IPv4, without the platform's ranges.
    pub fn kernel_table(&self) -> KernelTable {
        self.table.clone()
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
    }
}

#[cfg(test)]
mod tests;
