//! One tier, compiled: the document as one ordered list of rules, and the walk through it.
//!
//! The walk exists twice, over the same list: [`Tier::judge`] for one flow, and [`Tier::tcp`] for all flows to an
//! address and a port, whatever names they show or are pinned for. The second must be what the first can answer.
//! Neither walks the whole list: an index gives the rules that can match, and what the others leave behind for those
//! below them depends on the port alone.

mod index;
mod rule;

use std::{collections::HashMap, net::IpAddr, sync::Arc};

use ipnet::IpNet;

pub(crate) use self::index::NONE;
use self::{
    index::{AddressIndex, FirstByPort},
    rule::{Match, Origin, TierRule, rule_ports},
};
use crate::{
    address,
    dns::DnsBudget,
    document::{Action, Ech, Enforcement, FailureMode, Inside, Mode, Policy, Rule, RuleProtocol},
    kernel::KernelAction,
    names::{DomainIndex, DomainName, DomainPattern},
    ports::{PortSet, PortSpan},
    quota::Quotas,
    reason::Reason,
};

/// A compiled document.
#[derive(Debug, Clone)]
pub(crate) struct Tier {
    rules: Vec<TierRule>,
    /// The different sets of ports of the rules.
    port_sets: Vec<PortSet>,
    /// Where the mode allows what no rule mentions. `None`: nowhere.
    open: Option<PortSet>,
    /// Its denials are not carried out.
    pub(crate) is_audit: bool,
    pub(crate) failure_mode: FailureMode,
    pub(crate) ech: Ech,
    pub(crate) dns: DnsBudget,
    pub(crate) quotas: Quotas,
    addresses: AddressIndex,
    hosts: DomainIndex,
    /// Rules that deny every address of one family.
    everywhere: [Vec<u32>; 2],
    first: First,
}

/// For every port the first rule of some kind.
#[derive(Debug, Clone)]
struct First {
    /// That denies `*`.
    denies_all: FirstByPort,
    /// After which a flow that shows no name is refused: it denies names by what flows show, or looks into flows of
    /// names.
    reads_names: FirstByPort,
    /// After which an address that is pinned for no name is refused: it denies names by what they are pinned for.
    reads_pins: FirstByPort,
    /// That allows names.
    allows_names: FirstByPort,
    /// That denies IPv4 ranges.
    denies_ranges4: FirstByPort,
}

/// A rule that lists an address, as far as the kernel's answer depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Listed {
    pub(crate) rule: u32,
    pub(crate) ports: u32,
    pub(crate) action: Action,
    /// It is for UDP alone.
    pub(crate) is_udp: bool,
}

impl Listed {
    /// Whether it concerns UDP: a rule that denies does so for both transports, unless it is for UDP alone.
    fn concerns_udp(self) -> bool {
        self.is_udp || self.action == Action::Deny
    }

    /// What hides what, in [`Listed::without_hidden`].
    fn kind(self) -> u8 {
        match (self.is_udp, self.action) {
            (false, Action::Allow) => 1,
            (true, Action::Allow) => 2,
            (true, Action::Deny) => 4,
            (false, Action::Deny) => 8,
        }
    }

    /// Two lists as one, in order, without the rules to which nothing is left because one of the same ports stands
    /// before them.
    pub(crate) fn without_hidden(one: &[Self], two: &[Self]) -> Vec<Self> {
        let mut both: Vec<Self> = one.iter().chain(two).copied().collect();
        both.sort_unstable_by_key(|listed| listed.rule);
        let mut seen: HashMap<u32, u8> = HashMap::new();
        both.retain(|listed| {
            let above = seen.entry(listed.ports).or_default();
            let hidden = *above & (listed.kind() | 8) != 0;
            *above |= listed.kind();
            !hidden
        });
        both
    }
}

/// Some addresses as the kernel's answer sees them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place<'a> {
    /// The rules whose ranges hold them, in order.
    pub(crate) listed: &'a [Listed],
    /// They carry IPv4 addresses, which rules that deny IPv4 ranges may mean.
    pub(crate) wraps: bool,
}

/// What decided: for [`Tier::label`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cause {
    /// This entry of this rule.
    Rule { index: u32, entry: usize },
    /// This field of the document.
    Field(&'static str),
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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
        let mut sets = PortSets::default();
        let mut rules: Vec<TierRule> = Vec::with_capacity(policy.rules.len() + 4);
        for rule in &policy.rules {
            let ports = sets.add(rule_ports(rule, &listed_ports));
            rules.push(TierRule::new(Origin::Rule, Arc::clone(rule), ports));
        }
        let none = Arc::default();
        let mut list = |name, action, domains: &Arc<[DomainPattern]>, networks: &[IpNet]| {
            if domains.is_empty() && networks.is_empty() {
                return;
            }
            let rule = Rule {
                name: None,
                action,
                protocol: RuleProtocol::Http,
                domains: Arc::clone(domains),
                cidrs: networks.into(),
                ports: None,
                inside: Inside::unseen(),
            };
            let ports = sets.add(rule_ports(&rule, &listed_ports));
            rules.push(TierRule::new(Origin::List(name), Arc::new(rule), ports));
        };
        list("denied_domains", Action::Deny, &policy.denied_domains, &[]);
        list("denied_cidrs", Action::Deny, &none, &policy.denied_cidrs);
        list("allowed_domains", Action::Allow, &policy.allowed_domains, &[]);
        list("allowed_cidrs", Action::Allow, &none, &policy.allowed_cidrs);

        let port_sets = sets.sets;
        let ranges = numbered(&rules)
            .flat_map(|(index, rule)| rule.rule.cidrs.iter().map(move |network| (index, network)));
        let covering = |families: fn(&IpNet) -> bool| {
            let all = |rule: &TierRule| {
                let mut ranges = rule.rule.cidrs.iter();
                ranges.any(|range| range.prefix_len() == 0 && families(range))
            };
            let denying = numbered(&rules).filter(|(_, rule)| {
                rule.action() == Action::Deny && rule.protocol() != RuleProtocol::Udp && all(rule)
            });
            denying.map(|(index, _)| index).collect()
        };
        Self {
            addresses: AddressIndex::new(ranges),
            hosts: DomainIndex::new(rules.iter().map(TierRule::domains)),
            everywhere: [
                covering(|range| matches!(range, IpNet::V4(_))),
                covering(|range| matches!(range, IpNet::V6(_))),
            ],
            first: First::of(&rules, &port_sets),
            rules,
            port_sets,
            open: match policy.mode {
                Mode::AllowAll | Mode::Denylist => Some(listed_ports),
                Mode::DenyAll | Mode::Allowlist => None,
            },
            is_audit: policy.enforcement == Enforcement::Audit,
            failure_mode: policy.failure_mode,
            ech: policy.ech,
            dns: policy.dns,
            quotas: policy.quotas,
        }
    }

    /// The rule's ports.
    fn ports(&self, rule: &TierRule) -> &PortSet {
        &self.port_sets[rule.ports as usize]
    }

    /// Every range that rules list, in the order of `IpNet`, and those rules.
    pub(crate) fn ranges(&self) -> impl Iterator<Item = (IpNet, impl Iterator<Item = Listed>)> {
        let ranges = self.addresses.iter();
        ranges.map(|(range, rules)| (range, rules.iter().map(|rule| self.listed(*rule))))
    }

    fn listed(&self, index: u32) -> Listed {
        let rule = &self.rules[index as usize];
        Listed {
            rule: index,
            ports: rule.ports,
            action: rule.action(),
            is_udp: rule.protocol() == RuleProtocol::Udp,
        }
    }

    /// What decided, in the words of the document.
    pub(crate) fn label(&self, cause: Cause) -> String {
        match cause {
            Cause::Rule { index, entry } => {
                let rule = &self.rules[index as usize];
                match (rule.origin, &rule.rule.name) {
                    (Origin::List(name), _) => format!("{name}[{entry}]"),
                    (Origin::Rule, Some(name)) => name.to_string(),
                    (Origin::Rule, None) => format!("rules[{index}]"),
                }
            }
            Cause::Field(name) => name.to_owned(),
            Cause::Ports => "allowed_ports".to_owned(),
            Cause::Mode => "mode".to_owned(),
        }
    }

    /// What the rule that decided asks of what is inside the flow. `None`: no rule decided.
    pub(crate) fn inside(&self, cause: Cause) -> Option<&Inside> {
        match cause {
            Cause::Rule { index, .. } => Some(&self.rules[index as usize].rule.inside),
            Cause::Field(_) | Cause::Ports | Cause::Mode => None,
        }
    }

    /// Decides one TCP flow.
    pub(crate) fn judge(&self, flow: &View<'_>) -> Judgement {
        self.judge_by(flow, &self.candidates(flow))
    }

    /// Decides by the rules given, in ascending order: all that can match the flow must be among them.
    pub(crate) fn judge_by(&self, flow: &View<'_>, rules: &[u32]) -> Judgement {
        let mut unbound = None;
        for &index in rules {
            let rule = &self.rules[index as usize];
            if rule.protocol() == RuleProtocol::Udp || !self.ports(rule).contains(flow.port) {
                continue;
            }
            let cause = |entry| Cause::Rule { index, entry };
            match rule.action() {
                Action::Deny => {
                    if let Some(entry) = rule.denies(flow) {
                        return Judgement::deny(Reason::DeniedByRule, cause(entry));
                    }
                }
                Action::Allow => match rule.allows(flow) {
                    // A rule above denies names, and this flow may be for one of them.
                    Match::Full(entry)
                        if matches!(flow.claim, Claim::Nothing)
                            && self.first.reads_names.at(flow.port) < index =>
                    {
                        return Judgement::deny(Reason::NoName, cause(entry));
                    }
                    Match::Full(entry) => return Judgement::allow(cause(entry)),
                    // What the rule asks of this name holds wherever the flow goes.
                    Match::Unbound(entry) if rule.rule.inside.is_read() => {
                        return Judgement::deny(Reason::AddressNotBound, cause(entry));
                    }
                    Match::Unbound(entry) => {
                        unbound.get_or_insert_with(|| cause(entry));
                    }
                    Match::None => {}
                },
            }
        }
        self.fall_through(flow, unbound)
    }

    /// The rules that can match the flow, in ascending order.
    fn candidates(&self, flow: &View<'_>) -> Vec<u32> {
        let faces = address::faces(flow.address);
        let mut found: Vec<u32> = faces.flat_map(|face| self.addresses.containing(face)).collect();
        found.extend_from_slice(self.hosts.any());
        let shown = match flow.claim {
            Claim::Name(name) => Some(name),
            Claim::Nothing | Claim::Unlisted => None,
        };
        for name in flow.bound.iter().chain(shown) {
            self.hosts
                .listing(name, |rule| self.rules[rule as usize].domains(), &mut found);
        }
        found.sort_unstable();
        found.dedup();
        found
    }

    /// The mode's answer: nothing in the list matched.
    fn fall_through(&self, flow: &View<'_>, unbound: Option<Cause>) -> Judgement {
        let (reason, cause) = match &self.open {
            Some(ports) if ports.contains(flow.port) => return self.default_allow(flow),
            Some(_) => (Reason::PortDenied, Cause::Ports),
            None => (Reason::DefaultDeny, Cause::Mode),
        };
        if let Some(unbound) = unbound {
            return Judgement::deny(Reason::AddressNotBound, unbound);
        }
        if self.first.allows_names.at(flow.port) == NONE {
            return Judgement::deny(reason, cause);
        }
        match flow.claim {
            Claim::Nothing => Judgement::deny(Reason::AddressNotBound, cause),
            Claim::Unlisted | Claim::Name(_) => Judgement::deny(Reason::NameDenied, cause),
        }
    }

    /// A mode that allows everything does so for names that were asked for, wherever the list denies any.
    fn default_allow(&self, flow: &View<'_>) -> Judgement {
        let reads_names = self.first.reads_names.at(flow.port) != NONE;
        let reads_pins = self.first.reads_pins.at(flow.port) != NONE;
        let pinned = match flow.claim {
            Claim::Nothing if reads_names => return Judgement::deny(Reason::NoName, Cause::Mode),
            Claim::Name(name) if reads_names => flow.bound.contains(name),
            Claim::Unlisted if reads_names => false,
            Claim::Nothing | Claim::Name(_) | Claim::Unlisted => !reads_pins || !flow.bound.is_empty(),
        };
        if !pinned {
            return Judgement::deny(Reason::AddressNotBound, Cause::Mode);
        }
        Judgement::allow(Cause::Mode)
    }

    /// Decides a UDP flow, which has no name. `None`: no rule mentions it.
    pub(crate) fn judge_udp(&self, address: IpAddr, port: u16) -> Option<Judgement> {
        let mut found: Vec<u32> = address::faces(address)
            .flat_map(|face| self.addresses.containing(face))
            .chain(self.hosts.any().iter().copied())
            .collect();
        found.sort_unstable();
        found.into_iter().find_map(|index| {
            let rule = &self.rules[index as usize];
            if !self.listed(index).concerns_udp() || !self.ports(rule).contains(port) {
                return None;
            }
            let mut faces = address::faces(address);
            let entry = faces
                .find_map(|face| rule.lists(face))
                .or_else(|| rule.domains().any())?;
            let cause = Cause::Rule { index, entry };
            Some(match rule.action() {
                Action::Allow => Judgement::allow(cause),
                Action::Deny => Judgement::deny(Reason::DeniedByRule, cause),
            })
        })
    }

    /// The rules whose ranges hold the address, in ascending order.
    pub(crate) fn listing(&self, address: IpAddr) -> Vec<Listed> {
        let mut found: Vec<u32> = self.addresses.containing(address).collect();
        found.sort_unstable();
        found.dedup();
        found.into_iter().map(|rule| self.listed(rule)).collect()
    }

    /// What [`Tier::judge`] can answer for addresses of this place and a port, over all names shown and pinned.
    pub(crate) fn tcp(&self, port: u16, place: Place<'_>) -> KernelAction {
        let listed = place.listed.iter().filter(|listed| !listed.is_udp);
        let listed = self.first_of(listed, port);
        let denies_all = self.first.denies_all.at(port);
        let (at, action) = match listed {
            Some(listed) if listed.rule < denies_all => (listed.rule, Some(listed.action)),
            Some(_) | None if denies_all != NONE => (denies_all, Some(Action::Deny)),
            Some(_) | None => (NONE, None),
        };
        let refuse = |reason| {
            if self.first.allows_names.at(port) < at {
                KernelAction::ProxyBound
            } else {
                KernelAction::Deny(reason)
            }
        };
        let names_matter = self.first.reads_names.at(port) < at || self.first.reads_pins.at(port) < at;
        let may_be_denied = place.wraps && self.first.denies_ranges4.at(port) < at;
        match (action, &self.open) {
            (Some(Action::Deny), _) => refuse(Reason::DeniedByRule),
            (Some(Action::Allow), _) if names_matter || may_be_denied => KernelAction::Proxy,
            (Some(Action::Allow), _) => KernelAction::Pass,
            (None, Some(ports)) if ports.contains(port) => {
                if names_matter {
                    KernelAction::ProxyBound
                } else if may_be_denied {
                    KernelAction::Proxy
                } else {
                    KernelAction::Pass
                }
            }
            (None, Some(_)) => refuse(Reason::PortDenied),
            (None, None) => refuse(Reason::DefaultDeny),
        }
    }

    /// What [`Tier::judge_udp`] answers for addresses of this place, which carry no IPv4 addresses, and a port.
    pub(crate) fn udp(&self, port: u16, listed: &[Listed]) -> Option<Action> {
        let listed = self.first_of(listed.iter().filter(|listed| listed.concerns_udp()), port);
        let denies_all = self.first.denies_all.at(port);
        match listed {
            Some(listed) if listed.rule < denies_all => Some(listed.action),
            Some(_) | None => (denies_all != NONE).then_some(Action::Deny),
        }
    }

    fn first_of<'a>(&self, mut listed: impl Iterator<Item = &'a Listed>, port: u16) -> Option<Listed> {
        listed
            .find(|listed| self.port_sets[listed.ports as usize].contains(port))
            .copied()
    }

    /// Where the kernel's answer for such addresses may change.
    pub(crate) fn edges(&self, listed: &[Listed]) -> impl Iterator<Item = u16> {
        let sets = listed.iter().map(|listed| &self.port_sets[listed.ports as usize]);
        let spans = sets.chain(&self.open).flat_map(|ports| ports.spans());
        let spans = spans.flat_map(|span| [Some(span.first), span.last.checked_add(1)]);
        spans.flatten().chain(self.first.edges())
    }

    /// Where among the rules that matter to others the rule stands: the kernel's answer depends on nothing else of its
    /// place. The thresholds are those of [`Tier::thresholds`].
    pub(crate) fn rank(rule: u32, thresholds: &[u32]) -> u32 {
        u32::try_from(thresholds.partition_point(|threshold| *threshold < rule))
            .expect("documents are smaller")
    }

    /// Rules on whose order with others the kernel's answer depends, ascending.
    pub(crate) fn thresholds(&self) -> Vec<u32> {
        let mut rules: Vec<u32> = self
            .first
            .all()
            .into_iter()
            .flat_map(FirstByPort::rules)
            .collect();
        rules.sort_unstable();
        rules.dedup();
        rules
    }

    /// The ports on which some flow under `name` may be allowed, to IPv4 and to IPv6 addresses, and the first entry that
    /// allows or the last that denies.
    pub(crate) fn open_to(&self, name: &DomainName) -> ([PortSet; 2], Judgement) {
        let mut undecided = [PortSet::all(), PortSet::all()];
        let mut open = [PortSet::default(), PortSet::default()];
        let mut allowed = None;
        let mut denied = None;
        let mut candidates = self.hosts.any().to_vec();
        self.hosts
            .listing(name, |rule| self.rules[rule as usize].domains(), &mut candidates);
        candidates.extend(self.everywhere.iter().flatten());
        candidates.sort_unstable();
        candidates.dedup();
        for index in candidates {
            let rule = &self.rules[index as usize];
            if rule.protocol() == RuleProtocol::Udp {
                continue;
            }
            let named = match rule.action() {
                Action::Deny => rule.domains().covering(name),
                Action::Allow => rule.domains().opening(name),
            };
            for (family, (undecided, open)) in undecided.iter_mut().zip(&mut open).enumerate() {
                let everywhere = || {
                    let holds = self.everywhere[family].binary_search(&index).is_ok();
                    holds.then(|| rule.everywhere(family)).flatten()
                };
                let Some(entry) = named.or_else(everywhere) else {
                    continue;
                };
                let ports = self.ports(rule).and(undecided);
                if ports.is_empty() {
                    continue;
                }
                *undecided = undecided.without(&ports);
                let cause = Cause::Rule { index, entry };
                match rule.action() {
                    Action::Deny => denied = Some(cause),
                    Action::Allow => {
                        allowed.get_or_insert(cause);
                        *open = open.or(&ports);
                    }
                }
            }
        }
        if let Some(ports) = &self.open
            && name.is_public()
        {
            for (undecided, open) in undecided.iter().zip(&mut open) {
                let ports = ports.and(undecided);
                if !ports.is_empty() {
                    allowed.get_or_insert(Cause::Mode);
                }
                *open = open.or(&ports);
            }
        }
        let judgement = match (allowed, denied) {
            (Some(cause), _) => Judgement::allow(cause),
            (None, Some(cause)) => Judgement::deny(Reason::DeniedByRule, cause),
            (None, None) => Judgement::deny(Reason::NameDenied, Cause::Mode),
        };
        (open, judgement)
    }
}

impl First {
    fn of(rules: &[TierRule], port_sets: &[PortSet]) -> Self {
        let by = |matter: &dyn Fn(&TierRule) -> bool| {
            let those =
                numbered(rules).filter(|(_, rule)| rule.protocol() != RuleProtocol::Udp && matter(rule));
            FirstByPort::new(those.map(|(index, rule)| (index, rule.ports)), port_sets)
        };
        let denies_names = |rule: &TierRule, protocol| {
            rule.action() == Action::Deny && rule.protocol() == protocol && !rule.domains().is_empty()
        };
        // It allows less than the name, so it denies the rest, like a rule that denies the name.
        let reads = |rule: &TierRule| rule.action() == Action::Allow && rule.rule.inside.is_read();
        Self {
            denies_all: by(&|rule| rule.action() == Action::Deny && rule.domains().any().is_some()),
            reads_names: by(&|rule| denies_names(rule, RuleProtocol::Http) || reads(rule)),
            reads_pins: by(&|rule| denies_names(rule, RuleProtocol::Tcp)),
            allows_names: by(&|rule| rule.action() == Action::Allow && !rule.domains().is_empty()),
            denies_ranges4: by(&|rule| {
                let mut ranges = rule.rule.cidrs.iter();
                rule.action() == Action::Deny && ranges.any(|range| matches!(range, IpNet::V4(_)))
            }),
        }
    }

    fn all(&self) -> [&FirstByPort; 5] {
        let Self {
            denies_all,
            reads_names,
            reads_pins,
            allows_names,
            denies_ranges4,
        } = self;
        [denies_all, reads_names, reads_pins, allows_names, denies_ranges4]
    }

    fn edges(&self) -> impl Iterator<Item = u16> {
        self.all().into_iter().flat_map(FirstByPort::edges)
    }
}

/// Different sets of ports, each once.
#[derive(Default)]
struct PortSets {
    sets: Vec<PortSet>,
    known: HashMap<PortSet, u32>,
}

impl PortSets {
    fn add(&mut self, set: PortSet) -> u32 {
        let next = u32::try_from(self.sets.len()).expect("documents are smaller");
        *self.known.entry(set).or_insert_with_key(|set| {
            self.sets.push(set.clone());
            next
        })
    }
}

fn numbered(rules: &[TierRule]) -> impl Iterator<Item = (u32, &TierRule)> {
    (0u32..).zip(rules)
}

#[cfg(test)]
mod tests;
