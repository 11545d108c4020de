//! One entry of a tier's list, and what of a flow it matches by itself.

use std::{
    net::IpAddr,
    sync::{Arc, LazyLock},
};

use ipnet::IpNet;

use super::{Claim, View, index::AddressIndex};
use crate::{
    address,
    document::{Action, Rule, RuleProtocol},
    names::DomainSet,
    ports::PortSet,
};

/// One entry of the ordered list.
#[derive(Debug, Clone)]
pub(crate) struct TierRule {
    pub(super) origin: Origin,
    /// The document's, or one that says what a list says.
    pub(super) rule: Arc<Rule>,
    /// Its domains, to be searched; none where it has none.
    domains: Option<Box<DomainSet>>,
    /// Of a long list of ranges: positions in it.
    index: Option<Box<AddressIndex>>,
    /// Which of the tier's sets of ports.
    pub(super) ports: u32,
}

/// What a rule is called in the audit.
#[derive(Debug, Clone, Copy)]
pub(super) enum Origin {
    /// By its author, or by its place among the rules, which is the same here as in the document.
    Rule,
    /// By the list and the entry that matched.
    List(&'static str),
}

/// How an allow rule matched; the number is the entry of its list.
pub(super) enum Match {
    /// By the address, by what it is pinned for, or by the name shown for which it is pinned.
    Full(usize),
    /// Only by the name shown.
    Unbound(usize),
    None,
}

impl TierRule {
    pub(super) fn new(origin: Origin, rule: Arc<Rule>, ports: u32) -> Self {
        let has_domains = !rule.domains.is_empty();
        let is_long = rule.cidrs.len() > 16;
        Self {
            origin,
            domains: has_domains.then(|| Box::new(DomainSet::new(&rule.domains))),
            index: is_long.then(|| Box::new(AddressIndex::new((0u32..).zip(&rule.cidrs)))),
            rule,
            ports,
        }
    }

    pub(super) fn action(&self) -> Action {
        self.rule.action
    }

    pub(super) fn protocol(&self) -> RuleProtocol {
        self.rule.protocol
    }

    pub(super) fn domains(&self) -> &DomainSet {
        static NONE: LazyLock<DomainSet> = LazyLock::new(DomainSet::default);
        self.domains.as_deref().unwrap_or(&NONE)
    }

    pub(super) fn denies(&self, flow: &View<'_>) -> Option<usize> {
        let shown = match flow.claim {
            Claim::Name(name) => self.domains().covering(name),
            Claim::Nothing | Claim::Unlisted => None,
        };
        let pinned = || match self.protocol() {
            RuleProtocol::Http | RuleProtocol::Udp => None,
            RuleProtocol::Tcp => flow.bound.iter().find_map(|name| self.domains().covering(name)),
        };
        let wrapped = || address::faces(flow.address).find_map(|face| self.lists(face));
        wrapped()
            .or_else(|| self.domains().any())
            .or(shown)
            .or_else(pinned)
    }

    pub(super) fn allows(&self, flow: &View<'_>) -> Match {
        if let Some(entry) = self.lists(address::canonical(flow.address)) {
            return Match::Full(entry);
        }
        match (self.protocol(), flow.claim) {
            (RuleProtocol::Tcp, _) => {
                let pinned = flow.bound.iter().find_map(|name| self.domains().opening(name));
                pinned.map_or(Match::None, Match::Full)
            }
            (RuleProtocol::Http, Claim::Name(name)) => match self.domains().opening(name) {
                Some(entry) if flow.bound.contains(name) => Match::Full(entry),
                Some(entry) => Match::Unbound(entry),
                None => Match::None,
            },
            (RuleProtocol::Http, Claim::Nothing | Claim::Unlisted) | (RuleProtocol::Udp, _) => Match::None,
        }
    }

    /// The first of its ranges that holds the address.
    pub(super) fn lists(&self, address: IpAddr) -> Option<usize> {
        match &self.index {
            Some(index) => index.containing(address).min().map(|position| position as usize),
            None => self
                .rule
                .cidrs
                .iter()
                .position(|network| network.contains(&address)),
        }
    }

    /// The entry that makes the rule concern every address of a family.
    pub(super) fn everywhere(&self, family: usize) -> Option<usize> {
        let of_family = |range: &IpNet| matches!((range, family), (IpNet::V4(_), 0) | (IpNet::V6(_), 1));
        let mut ranges = self.rule.cidrs.iter();
        ranges.position(|range| of_family(range) && range.prefix_len() == 0)
    }
}

/// A deny rule without ports concerns them all; an allow rule opens what the document opens.
pub(super) fn rule_ports(rule: &Rule, listed: &PortSet) -> PortSet {
    match (&rule.ports, rule.action) {
        (Some(spans), _) => PortSet::new(spans.iter().copied()),
        (None, Action::Deny) => PortSet::all(),
        (None, Action::Allow) => listed.clone(),
    }
}
