//! The indexed walk against the plain one, rule after rule.

use proptest::prelude::*;

use super::*;
use crate::random::{ALL, Parts, any_policy, destinations, names, pins};

/// What the rules that did not match leave behind for those below.
#[derive(Default)]
struct Passed {
    nameless_are_refused: bool,
    unpinned_are_refused: bool,
    named_allow: bool,
    unbound: Option<Cause>,
}

impl Passed {
    fn add(&mut self, rule: &TierRule) {
        match rule.action() {
            Action::Deny if !rule.domains().is_empty() => match rule.protocol() {
                RuleProtocol::Http => self.nameless_are_refused = true,
                RuleProtocol::Tcp => self.unpinned_are_refused = true,
                RuleProtocol::Udp => {}
            },
            Action::Deny => {}
            Action::Allow => {
                self.named_allow |= !rule.domains().is_empty();
                self.nameless_are_refused |= rule.rule.inside.is_read();
            }
        }
    }
}

/// [`Tier::judge`], said plainly.
fn walk(tier: &Tier, flow: &View<'_>) -> Judgement {
    let mut passed = Passed::default();
    let rules = numbered(&tier.rules)
        .filter(|(_, rule)| rule.protocol() != RuleProtocol::Udp && tier.ports(rule).contains(flow.port));
    for (index, rule) in rules {
        let cause = |entry| Cause::Rule { index, entry };
        match rule.action() {
            Action::Deny => {
                if let Some(entry) = rule.denies(flow) {
                    return Judgement::deny(Reason::DeniedByRule, cause(entry));
                }
            }
            Action::Allow => match rule.allows(flow) {
                Match::Full(entry) if passed.nameless_are_refused && matches!(flow.claim, Claim::Nothing) => {
                    return Judgement::deny(Reason::NoName, cause(entry));
                }
                Match::Full(entry) => return Judgement::allow(cause(entry)),
                Match::Unbound(entry) if rule.rule.inside.is_read() => {
                    return Judgement::deny(Reason::AddressNotBound, cause(entry));
                }
                Match::Unbound(entry) => {
                    passed.unbound.get_or_insert_with(|| cause(entry));
                }
                Match::None => {}
            },
        }
        passed.add(rule);
    }
    let (reason, cause) = match &tier.open {
        Some(ports) if ports.contains(flow.port) => {
            let pinned = match flow.claim {
                Claim::Nothing if passed.nameless_are_refused => {
                    return Judgement::deny(Reason::NoName, Cause::Mode);
                }
                Claim::Name(name) if passed.nameless_are_refused => flow.bound.contains(name),
                Claim::Unlisted if passed.nameless_are_refused => false,
                Claim::Nothing | Claim::Name(_) | Claim::Unlisted => {
                    !passed.unpinned_are_refused || !flow.bound.is_empty()
                }
            };
            return if pinned {
                Judgement::allow(Cause::Mode)
            } else {
                Judgement::deny(Reason::AddressNotBound, Cause::Mode)
            };
        }
        Some(_) => (Reason::PortDenied, Cause::Ports),
        None => (Reason::DefaultDeny, Cause::Mode),
    };
    match (passed.unbound, passed.named_allow, flow.claim) {
        (Some(unbound), _, _) => Judgement::deny(Reason::AddressNotBound, unbound),
        (None, false, _) => Judgement::deny(reason, cause),
        (None, true, Claim::Nothing) => Judgement::deny(Reason::AddressNotBound, cause),
        (None, true, Claim::Unlisted | Claim::Name(_)) => Judgement::deny(Reason::NameDenied, cause),
    }
}

/// [`Tier::open_to`], said plainly.
fn walk_open(tier: &Tier, name: &DomainName) -> [PortSet; 2] {
    [0, 1].map(|family| {
        let mut open = PortSet::default();
        let mut undecided = PortSet::all();
        for rule in tier
            .rules
            .iter()
            .filter(|rule| rule.protocol() != RuleProtocol::Udp)
        {
            let concerns = match rule.action() {
                Action::Deny => rule.domains().covering(name).is_some() || rule.everywhere(family).is_some(),
                Action::Allow => rule.domains().opening(name).is_some(),
            };
            if !concerns {
                continue;
            }
            if rule.action() == Action::Allow {
                open = open.or(&tier.ports(rule).and(&undecided));
            }
            undecided = undecided.without(tier.ports(rule));
        }
        if let Some(ports) = &tier.open
            && name.is_public()
        {
            open = open.or(&ports.and(&undecided));
        }
        open
    })
}

/// [`Tier::judge_udp`], said plainly.
fn walk_udp(tier: &Tier, address: IpAddr, port: u16) -> Option<Action> {
    let listing = |rule: &&TierRule| {
        let ranges =
            address::faces(address).any(|face| rule.rule.cidrs.iter().any(|range| range.contains(&face)));
        let is_udp = rule.protocol() == RuleProtocol::Udp || rule.action() == Action::Deny;
        is_udp && tier.ports(rule).contains(port) && (ranges || rule.domains().any().is_some())
    };
    tier.rules.iter().find(listing).map(|rule| rule.action())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn the_index_changes_no_answer(policy in any_policy(Parts { audit: true, ..ALL }), pinned in 0usize..32) {
        let tier = Tier::compile(&policy);
        let (names, bound) = (names(), &pins()[pinned]);
        let claims: Vec<Claim<'_>> =
            names.iter().map(Claim::Name).chain([Claim::Nothing, Claim::Unlisted]).collect();
        for (address, port) in destinations() {
            for claim in &claims {
                let view = View { address, port, claim: *claim, bound };
                let context = format!("{view:?}");
                prop_assert_eq!(tier.judge(&view), walk(&tier, &view), "{}", context);
            }
            let udp = tier.judge_udp(address, port).map(|judgement| judgement.allowed());
            prop_assert_eq!(udp, walk_udp(&tier, address, port).map(|action| action == Action::Allow));
        }
        for name in &names {
            let (open, judgement) = tier.open_to(name);
            prop_assert_eq!(&open, &walk_open(&tier, name));
            prop_assert_eq!(judgement.allowed(), !open.iter().all(PortSet::is_empty));
        }
    }

    #[test]
    fn a_rule_is_hidden_only_where_it_could_change_nothing(policy in any_policy(ALL)) {
        let tier = Tier::compile(&policy);
        for (address, port) in destinations() {
            let all = tier.listing(address);
            let (one, two) = all.split_at(all.len() / 2);
            let left = Listed::without_hidden(one, two);
            prop_assert_eq!(tier.udp(port, &left), tier.udp(port, &all));
            for wraps in [false, true] {
                let of = |listed| tier.tcp(port, Place { listed, wraps });
                prop_assert_eq!(of(&left), of(&all));
            }
        }
    }
}
