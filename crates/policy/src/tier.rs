//! One tier, compiled: the document as one ordered list of rules, and the walk through it.
//!
//! The walk exists twice, over the same list: [`Tier::judge`] for one flow, and [`Tier::kernel`] for all flows to an
//! address and a port, whatever names they show or are pinned for. The second must be what the first can answer.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::{
    address,
    dns::DnsBudget,
    document::{Action, FailureMode, Inside, Mode, Policy, Rule, RuleProtocol},
    kernel::KernelAction,
    names::{DomainName, DomainPattern, DomainSet},
    ports::{PortSet, PortSpan},
    reason::Reason,
};

/// A compiled document.
#[derive(Debug, Clone)]
pub(crate) struct Tier {
    pub(crate) rules: Vec<TierRule>,
    /// Where the mode allows what no rule mentions. `None`: nowhere.
    pub(crate) open: Option<PortSet>,
    pub(crate) failure_mode: FailureMode,
    pub(crate) dns: DnsBudget,
}

/// One entry of the ordered list.
#[derive(Debug, Clone)]
pub(crate) struct TierRule {
    origin: Origin,
    action: Action,
    protocol: RuleProtocol,
    domains: DomainSet,
    pub(crate) networks: Vec<IpNet>,
    pub(crate) ports: PortSet,
    inside: Inside,
}

/// What a rule is called in the audit.
#[derive(Debug, Clone)]
enum Origin {
    /// By its author, or by its place.
    Rule(String),
    /// By the list and the entry that matched.
    List(&'static str),
}

/// What decided: for [`Tier::label`].
#[derive(Debug, Clone, Copy)]
pub(crate) enum Cause {
    /// This entry of this rule.
    Rule { index: usize, entry: usize },
    /// The mode, because of its ports.
    Ports,
    /// The mode.
    Mode,
}

/// The name that a flow shows.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Claim<'a> {
    /// None, or none yet.
    Nothing,
    /// One that no document lists and for which nothing is pinned.
    Unlisted,
    /// This one.
    Name(&'a DomainName),
}

/// A flow as one tier sees it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View<'a> {
    pub(crate) address: IpAddr,
    pub(crate) port: u16,
    pub(crate) claim: Claim<'a>,
    pub(crate) bound: &'a [DomainName],
}

/// What one tier says to one flow.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Judgement {
    /// [`Reason::Allowed`], or why not.
    pub(crate) reason: Reason,
    pub(crate) cause: Cause,
}

impl Judgement {
    pub(crate) fn allowed(&self) -> bool {
        self.reason == Reason::Allowed
    }

    fn allow(cause: Cause) -> Self {
        Self {
            reason: Reason::Allowed,
            cause,
        }
    }

    pub(crate) fn deny(reason: Reason, cause: Cause) -> Self {
        Self { reason, cause }
    }
}

impl Tier {
    /// Flattens the document: `rules`, then the deny lists, then the allow lists, then the mode.
    pub(crate) fn compile(policy: &Policy) -> Self {
        let listed_ports = PortSet::new(policy.allowed_ports.iter().copied().map(PortSpan::one));
        let ordered = policy.rules.iter().enumerate().map(|(index, rule)| TierRule {
            origin: Origin::Rule(rule.name.clone().unwrap_or_else(|| format!("rules[{index}]"))),
            action: rule.action,
            protocol: rule.protocol,
            domains: DomainSet::new(&rule.domains),
            networks: rule.cidrs.clone(),
            ports: rule_ports(rule, &listed_ports),
            inside: rule.inside.clone(),
        });
        let list = |name, action, domains: &[DomainPattern], networks: &[IpNet]| TierRule {
            origin: Origin::List(name),
            action,
            protocol: RuleProtocol::Http,
            domains: DomainSet::new(domains),
            networks: networks.to_vec(),
            ports: match action {
                Action::Deny => PortSet::all(),
                Action::Allow => listed_ports.clone(),
            },
            inside: Inside::UNSEEN,
        };
        let lists = [
            list("denied_domains", Action::Deny, &policy.denied_domains, &[]),
            list("denied_cidrs", Action::Deny, &[], &policy.denied_cidrs),
            list("allowed_domains", Action::Allow, &policy.allowed_domains, &[]),
            list("allowed_cidrs", Action::Allow, &[], &policy.allowed_cidrs),
        ];
        let rules = ordered
            .chain(lists)
            .filter(|rule| !rule.domains.is_empty() || !rule.networks.is_empty());
        Self {
            rules: rules.collect(),
            open: match policy.mode {
                Mode::AllowAll | Mode::Denylist => Some(listed_ports.clone()),
                Mode::DenyAll | Mode::Allowlist => None,
            },
            failure_mode: policy.failure_mode,
            dns: policy.dns,
        }
    }

    /// What decided, in the words of the document.
    pub(crate) fn label(&self, cause: Cause) -> String {
        match cause {
            Cause::Rule { index, entry } => match &self.rules[index].origin {
                Origin::Rule(name) => name.clone(),
                Origin::List(name) => format!("{name}[{entry}]"),
            },
            Cause::Ports => "allowed_ports".to_owned(),
            Cause::Mode => "mode".to_owned(),
        }
    }

    /// What the rule that decided asks of what is inside the flow. `None`: no rule decided.
    pub(crate) fn inside(&self, cause: Cause) -> Option<&Inside> {
        match cause {
            Cause::Rule { index, .. } => Some(&self.rules[index].inside),
            Cause::Ports | Cause::Mode => None,
        }
    }

    /// Decides one flow.
    pub(crate) fn judge(&self, flow: &View<'_>) -> Judgement {
        let mut passed = Passed::default();
        for (index, rule) in self
            .rules
            .iter()
            .enumerate()
            .filter(|(_, rule)| rule.ports.contains(flow.port))
        {
            let cause = |entry| Cause::Rule { index, entry };
            match rule.action {
                Action::Deny => {
                    if let Some(entry) = rule.denies(flow) {
                        return Judgement::deny(Reason::DeniedByRule, cause(entry));
                    }
                    passed.deny(rule);
                }
                Action::Allow => {
                    match rule.allows(flow) {
                        // A rule above denies names, and this flow may be for one of them.
                        Match::Full(entry)
                            if passed.nameless_are_refused && matches!(flow.claim, Claim::Nothing) =>
                        {
                            return Judgement::deny(Reason::NoName, cause(entry));
                        }
                        Match::Full(entry) => return Judgement::allow(cause(entry)),
                        // What the rule asks of this name holds wherever the flow goes.
                        Match::Unbound(entry) if rule.inside.is_read() => {
                            return Judgement::deny(Reason::AddressNotBound, cause(entry));
                        }
                        Match::Unbound(entry) => {
                            passed.unbound.get_or_insert_with(|| cause(entry));
                        }
                        Match::None => {}
                    }
                    passed.allow(rule);
                }
            }
        }
        self.fall_through(flow, &passed)
    }

    /// The mode's answer: nothing in the list matched.
    fn fall_through(&self, flow: &View<'_>, passed: &Passed) -> Judgement {
        let (reason, cause) = match &self.open {
            Some(ports) if ports.contains(flow.port) => return passed.default_allow(flow),
            Some(_) => (Reason::PortDenied, Cause::Ports),
            None => (Reason::DefaultDeny, Cause::Mode),
        };
        if let Some(unbound) = passed.unbound {
            return Judgement::deny(Reason::AddressNotBound, unbound);
        }
        if !passed.named_allow {
            return Judgement::deny(reason, cause);
        }
        match flow.claim {
            Claim::Nothing => Judgement::deny(Reason::AddressNotBound, cause),
            Claim::Unlisted | Claim::Name(_) => Judgement::deny(Reason::NameDenied, cause),
        }
    }

    /// What [`Tier::judge`] can answer for this address and port, over all names shown and pinned.
    pub(crate) fn kernel_at(&self, address: IpAddr, port: u16) -> KernelAction {
        let listed: Vec<bool> = self.rules.iter().map(|rule| rule.concerns(address)).collect();
        self.kernel(port, &listed)
    }

    /// The same; `listed` says for each rule whether its ranges contain the address.
    pub(crate) fn kernel(&self, port: u16, listed: &[bool]) -> KernelAction {
        let mut passed = Passed::default();
        let refuse = |passed: &Passed, reason| {
            if passed.named_allow {
                KernelAction::ProxyBound
            } else {
                KernelAction::Deny(reason)
            }
        };
        let rules = self.rules.iter().zip(listed);
        for (rule, listed) in rules.filter(|(rule, _)| rule.ports.contains(port)) {
            match rule.action {
                Action::Deny if *listed || rule.domains.any().is_some() => {
                    return refuse(&passed, Reason::DeniedByRule);
                }
                Action::Deny => passed.deny(rule),
                Action::Allow if *listed => {
                    let names_matter = passed.nameless_are_refused || passed.unpinned_are_refused;
                    return if names_matter {
                        KernelAction::Proxy
                    } else {
                        KernelAction::Pass
                    };
                }
                Action::Allow => passed.allow(rule),
            }
        }
        match &self.open {
            Some(ports) if ports.contains(port) => {
                let names_matter = passed.nameless_are_refused || passed.unpinned_are_refused;
                if names_matter {
                    KernelAction::ProxyBound
                } else {
                    KernelAction::Pass
                }
            }
            Some(_) => refuse(&passed, Reason::PortDenied),
            None => refuse(&passed, Reason::DefaultDeny),
        }
    }

    /// The ports on which some flow under `name` may be allowed, and the first entry that allows or the last that
    /// denies.
    pub(crate) fn open_to(&self, name: &DomainName) -> (PortSet, Judgement) {
        let mut undecided = PortSet::all();
        let mut open = PortSet::default();
        let mut allowed = None;
        let mut denied = None;
        for (index, rule) in self.rules.iter().enumerate() {
            let matched = match rule.action {
                Action::Deny => rule.domains.covering(name).or_else(|| rule.everywhere()),
                Action::Allow => rule.domains.opening(name),
            };
            let Some(entry) = matched else { continue };
            let ports = rule.ports.and(&undecided);
            if ports.is_empty() {
                continue;
            }
            undecided = undecided.without(&ports);
            match rule.action {
                Action::Deny => denied = Some(Cause::Rule { index, entry }),
                Action::Allow => {
                    allowed.get_or_insert(Cause::Rule { index, entry });
                    open = open.or(&ports);
                }
            }
        }
        if let Some(ports) = &self.open
            && name.is_public()
        {
            let ports = ports.and(&undecided);
            if !ports.is_empty() {
                allowed.get_or_insert(Cause::Mode);
            }
            open = open.or(&ports);
        }
        let judgement = match (allowed, denied) {
            (Some(cause), _) => Judgement::allow(cause),
            (None, Some(cause)) => Judgement::deny(Reason::DeniedByRule, cause),
            (None, None) => Judgement::deny(Reason::NameDenied, Cause::Mode),
        };
        (open, judgement)
    }
}

/// A deny rule without ports concerns them all; an allow rule opens what the document opens.
fn rule_ports(rule: &Rule, listed: &PortSet) -> PortSet {
    match (&rule.ports, rule.action) {
        (Some(spans), _) => PortSet::new(spans.iter().copied()),
        (None, Action::Deny) => PortSet::all(),
        (None, Action::Allow) => listed.clone(),
    }
}

/// What the rules that did not match leave behind for those below.
#[derive(Debug, Default)]
struct Passed {
    /// An `http` rule denies names, or looks into flows of theirs: who shows none may be one of them.
    nameless_are_refused: bool,
    /// A `tcp` rule denies names: an address that is pinned for none may be one of theirs.
    unpinned_are_refused: bool,
    /// A rule allows names.
    named_allow: bool,
    /// A rule allows the name shown, but the address is not pinned for it.
    unbound: Option<Cause>,
}

impl Passed {
    fn deny(&mut self, rule: &TierRule) {
        if rule.domains.is_empty() {
            return;
        }
        match rule.protocol {
            RuleProtocol::Http => self.nameless_are_refused = true,
            RuleProtocol::Tcp => self.unpinned_are_refused = true,
        }
    }

    fn allow(&mut self, rule: &TierRule) {
        self.named_allow |= !rule.domains.is_empty();
        // It allows less than the name, so it denies the rest, like a rule that denies the name.
        self.nameless_are_refused |= rule.inside.is_read();
    }

    /// A mode that allows everything does so for names that were asked for, wherever the list denies any.
    fn default_allow(&self, flow: &View<'_>) -> Judgement {
        let pinned = match flow.claim {
            Claim::Nothing if self.nameless_are_refused => {
                return Judgement::deny(Reason::NoName, Cause::Mode);
            }
            Claim::Name(name) if self.nameless_are_refused => flow.bound.contains(name),
            Claim::Unlisted if self.nameless_are_refused => false,
            Claim::Nothing | Claim::Name(_) | Claim::Unlisted => {
                !self.unpinned_are_refused || !flow.bound.is_empty()
            }
        };
        if !pinned {
            return Judgement::deny(Reason::AddressNotBound, Cause::Mode);
        }
        Judgement::allow(Cause::Mode)
    }
}

/// How an allow rule matched; the number is the entry of its list.
enum Match {
    /// By the address, by what it is pinned for, or by the name shown for which it is pinned.
    Full(usize),
    /// Only by the name shown.
    Unbound(usize),
    None,
}

impl TierRule {
    fn denies(&self, flow: &View<'_>) -> Option<usize> {
        let shown = match flow.claim {
            Claim::Name(name) => self.domains.covering(name),
            Claim::Nothing | Claim::Unlisted => None,
        };
        let pinned = || match self.protocol {
            RuleProtocol::Http => None,
            RuleProtocol::Tcp => flow.bound.iter().find_map(|name| self.domains.covering(name)),
        };
        let wrapped = || address::faces(flow.address).find_map(|face| self.lists(face));
        wrapped().or_else(|| self.domains.any()).or(shown).or_else(pinned)
    }

    fn allows(&self, flow: &View<'_>) -> Match {
        if let Some(entry) = self.lists(address::canonical(flow.address)) {
            return Match::Full(entry);
        }
        match (self.protocol, flow.claim) {
            (RuleProtocol::Tcp, _) => {
                let pinned = flow.bound.iter().find_map(|name| self.domains.opening(name));
                pinned.map_or(Match::None, Match::Full)
            }
            (RuleProtocol::Http, Claim::Name(name)) => match self.domains.opening(name) {
                Some(entry) if flow.bound.contains(name) => Match::Full(entry),
                Some(entry) => Match::Unbound(entry),
                None => Match::None,
            },
            (RuleProtocol::Http, Claim::Nothing | Claim::Unlisted) => Match::None,
        }
    }

    fn lists(&self, address: IpAddr) -> Option<usize> {
        self.networks
            .iter()
            .position(|network| network.contains(&address))
    }

    /// Whether the rule concerns flows for their names.
    pub(crate) fn names_hosts(&self) -> bool {
        !self.domains.is_empty()
    }

    /// Whether the rule's ranges contain the address.
    fn concerns(&self, address: IpAddr) -> bool {
        match self.action {
            Action::Deny => address::faces(address).any(|face| self.lists(face).is_some()),
            Action::Allow => self.lists(address::canonical(address)).is_some(),
        }
    }

    /// The entry that makes the rule concern every IPv4 address.
    fn everywhere(&self) -> Option<usize> {
        self.networks
            .iter()
            .position(|network| matches!(network, IpNet::V4(range) if range.prefix_len() == 0))
    }
}
