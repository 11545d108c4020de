//! The decision as a table: the longest prefix that contains the address, then the range that contains the port.
//!
//! Ordered rules and a longest-prefix look-up agree because every prefix that any rule mentions has an entry of its own,
//! which holds the answer of the whole list for the addresses that no longer prefix covers.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    rc::Rc,
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::{
    address,
    decide::Protocol,
    document::{Action, Policy},
    error::PolicyError,
    ports::PortSet,
    reason::Reason,
    tier::{Listed, Place, Tier},
};

/// Port ranges of one prefix.
pub const MAX_RANGES: usize = 16;
/// Different ranges that the tiers of one sandbox may list together.
pub const MAX_PREFIXES: usize = 16_384;

/// What the kernel does with a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KernelAction {
    /// Refuses it: no name could change that.
    Deny(Reason),
    /// Address and port alone allow it: it is forwarded without a look inside.
    Pass,
    /// A name decides: userland must look inside.
    Proxy,
    /// The same, and nothing is allowed unless the address is pinned by DNS for this sandbox; refused with
    /// [`Reason::AddressNotBound`] otherwise.
    ProxyBound,
    /// Forwarded without a look inside, and recorded as a denial with this reason that was not carried out: only
    /// tiers in audit mode deny it. Of TCP userland records such, so this stands for UDP alone.
    Audit(Reason),
}

/// The table of one sandbox, for TCP and UDP. The platform's denied ranges are not in it: they come before it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelTable {
    /// Ordered by prefix, each once. Always one for 0.0.0.0/0 and one for ::/0; beside these and the ranges of
    /// IPv6 that carry IPv4 addresses, at most [`MAX_PREFIXES`].
    pub entries: Vec<PrefixEntry>,
}

/// The answer for the addresses of one prefix that no longer prefix of the table contains.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PrefixEntry {
    /// The prefix.
    pub prefix: IpNet,
    /// Ordered by protocol and port, disjoint, at most [`MAX_RANGES`]. What lies between is denied: TCP with
    /// [`Reason::DefaultDeny`], UDP with [`Reason::ProtocolDenied`].
    pub ranges: Vec<PortRange>,
}

/// The action for some ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortRange {
    /// Whose ports.
    pub protocol: Protocol,
    /// The first port.
    pub first: u16,
    /// The last port, inclusive.
    pub last: u16,
    /// What to do.
    pub action: KernelAction,
}

impl KernelTable {
    /// Looks up as the kernel does.
    pub fn lookup(&self, address: IpAddr, protocol: Protocol, port: u16) -> KernelAction {
        let longest = self
            .entries
            .iter()
            .filter(|entry| entry.prefix.contains(&address))
            .max_by_key(|entry| entry.prefix.prefix_len());
        longest
            .and_then(|entry| {
                entry
                    .ranges
                    .iter()
                    .find(|range| range.protocol == protocol && (range.first..=range.last).contains(&port))
            })
            .map_or_else(|| KernelAction::Deny(unlisted(protocol)), |range| range.action)
    }
}

/// Why a port is denied that no range holds.
fn unlisted(protocol: Protocol) -> Reason {
    match protocol {
        Protocol::Tcp => Reason::DefaultDeny,
        Protocol::Udp => Reason::ProtocolDenied,
    }
}

/// The tiers do not fit into the kernel's table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Excess {
    Prefixes(usize),
    Ranges(IpNet),
}

impl Excess {
    /// The error for `policy`, which is the one that made the tiers too large.
    pub(crate) fn of(self, policy: &Policy) -> PolicyError {
        let ruled: usize = policy.rules.iter().map(|rule| rule.cidrs.len()).sum();
        match self {
            Self::Prefixes(count) => {
                let lists = [
                    (policy.allowed_cidrs.len(), "allowed_cidrs"),
                    (policy.denied_cidrs.len(), "denied_cidrs"),
                    (ruled, "rules"),
                ];
                let field = lists.into_iter().max().map_or("rules", |(_, field)| field);
                let message = format!(
                    "all tiers together list {count} different ranges; the limit for one sandbox is {MAX_PREFIXES}"
                );
                PolicyError::new(field, message)
            }
            Self::Ranges(prefix) => {
                let field = if policy.rules.is_empty() {
                    "allowed_ports"
                } else {
                    "rules"
                };
                let message = format!(
                    "the ports open to {prefix} fall into too many separate ranges; the limit is {MAX_RANGES} \
                     (neighbouring ports count as one)"
                );
                PolicyError::new(field, message)
            }
        }
    }
}

/// What all tiers say together. The first tier that denies gives the reason; of what only tiers in audit mode deny, the
/// first of them does.
pub(crate) fn strictest(actions: impl Iterator<Item = KernelAction>) -> KernelAction {
    let mut strictest = KernelAction::Pass;
    for action in actions {
        strictest = match (strictest, action) {
            (KernelAction::Deny(reason), _) | (_, KernelAction::Deny(reason)) => KernelAction::Deny(reason),
            (KernelAction::ProxyBound, _) | (_, KernelAction::ProxyBound) => KernelAction::ProxyBound,
            (KernelAction::Proxy, _) | (_, KernelAction::Proxy) => KernelAction::Proxy,
            (KernelAction::Audit(reason), _) | (_, KernelAction::Audit(reason)) => {
                KernelAction::Audit(reason)
            }
            (KernelAction::Pass, KernelAction::Pass) => KernelAction::Pass,
        };
    }
    strictest
}

/// What the tiers say of TCP to a port; `place` is that of each tier.
pub(crate) fn tcp<'a>(
    tiers: &[Tier],
    port: u16,
    place: impl Fn(usize) -> Place<'a>,
    read: &PortSet,
) -> KernelAction {
    let answers = tiers.iter().enumerate().map(|(index, tier)| {
        let action = tier.tcp(port, place(index));
        match action {
            // Userland records what would have been denied.
            KernelAction::Deny(_) | KernelAction::ProxyBound if tier.is_audit => KernelAction::Proxy,
            KernelAction::Deny(_)
            | KernelAction::ProxyBound
            | KernelAction::Proxy
            | KernelAction::Audit(_)
            | KernelAction::Pass => action,
        }
    });
    reading(strictest(answers), read.contains(port))
}

/// What the tiers say of UDP, given what each says: nothing, or what its first rule for it does. UDP that no rule of
/// any tier mentions is nobody's denial that a tier in audit mode could suspend.
pub(crate) fn udp(answers: &[(Option<Action>, &Tier)]) -> KernelAction {
    if answers.iter().all(|(answer, _)| answer.is_none()) {
        return KernelAction::Deny(Reason::ProtocolDenied);
    }
    strictest(answers.iter().map(|(answer, tier)| {
        let denied = |reason| {
            if tier.is_audit {
                KernelAction::Audit(reason)
            } else {
                KernelAction::Deny(reason)
            }
        };
        match answer {
            Some(Action::Allow) => KernelAction::Pass,
            Some(Action::Deny) => denied(Reason::DeniedByRule),
            None => denied(Reason::ProtocolDenied),
        }
    }))
}

/// Flattens the tiers. On the ports of `read` nothing passes without a look inside.
pub(crate) fn table(tiers: &[Tier], read: &PortSet) -> Result<KernelTable, Excess> {
    Flattening::new(tiers, read)?.run()
}

/// The work of [`table`]: one pass over all prefixes in order, in which the rules that list each are those of the
/// prefix around it and its own. Prefixes for which the same rules count share one answer.
struct Flattening<'a> {
    tiers: &'a [Tier],
    read: &'a PortSet,
    /// Of each tier.
    thresholds: Vec<Vec<u32>>,
    /// Every prefix once, with what each tier lists for itself there.
    prefixes: BTreeMap<IpNet, Vec<(usize, Vec<Listed>)>>,
    /// Answers, by what they depend on.
    known: HashMap<Vec<u32>, Rc<[PortRange]>>,
}

/// One prefix of the way from the outermost to the one at hand.
struct Level {
    prefix: IpNet,
    /// The rules of each tier that list it or a prefix around it, without those that are hidden.
    listed: Vec<Rc<[Listed]>>,
    ranges: Rc<[PortRange]>,
}

impl<'a> Flattening<'a> {
    fn new(tiers: &'a [Tier], read: &'a PortSet) -> Result<Self, Excess> {
        let mut prefixes: BTreeMap<IpNet, Vec<(usize, Vec<Listed>)>> = BTreeMap::new();
        for (index, tier) in tiers.iter().enumerate() {
            for (prefix, listed) in tier.ranges() {
                prefixes
                    .entry(prefix)
                    .or_default()
                    .push((index, listed.collect()));
            }
        }
        let everywhere = [IpNet::V4(Ipv4Net::default()), IpNet::V6(Ipv6Net::default())];
        let fixed = everywhere.into_iter().chain(address::WRAPPING.map(IpNet::V6));
        let listed = prefixes.len();
        for prefix in fixed {
            prefixes.entry(prefix).or_default();
        }
        if listed > MAX_PREFIXES {
            return Err(Excess::Prefixes(listed));
        }
        Ok(Self {
            tiers,
            read,
            thresholds: tiers.iter().map(Tier::thresholds).collect(),
            prefixes,
            known: HashMap::new(),
        })
    }

    fn run(mut self) -> Result<KernelTable, Excess> {
        let mut entries: Vec<PrefixEntry> = Vec::with_capacity(self.prefixes.len());
        let mut around: Vec<Level> = Vec::new();
        for (prefix, own) in std::mem::take(&mut self.prefixes) {
            while around.last().is_some_and(|outer| !outer.prefix.contains(&prefix)) {
                around.pop();
            }
            let outer = around.last();
            let nothing = || vec![Rc::from([]); self.tiers.len()];
            let mut listed = outer.map_or_else(nothing, |outer| outer.listed.clone());
            for (tier, own) in own {
                listed[tier] = Listed::without_hidden(&listed[tier], &own).into();
            }
            let ranges = self.ranges(prefix, &listed)?;
            // The look-up finds the same in the entry around it.
            if outer.is_none_or(|outer| outer.ranges != ranges) {
                entries.push(PrefixEntry {
                    prefix,
                    ranges: ranges.to_vec(),
                });
            }
            around.push(Level {
                prefix,
                listed,
                ranges,
            });
        }
        Ok(KernelTable { entries })
    }

    fn ranges(&mut self, prefix: IpNet, listed: &[Rc<[Listed]>]) -> Result<Rc<[PortRange]>, Excess> {
        let wraps = address::wraps(&prefix);
        let key = self.key(wraps, listed);
        if let Some(known) = self.known.get(&key) {
            return Ok(Rc::clone(known));
        }
        let ranges: Rc<[PortRange]> = self.exact(wraps, listed).ok_or(Excess::Ranges(prefix))?.into();
        self.known.insert(key, Rc::clone(&ranges));
        Ok(ranges)
    }

    /// All that the answer depends on.
    fn key(&self, wraps: bool, listed: &[Rc<[Listed]>]) -> Vec<u32> {
        let mut key = vec![u32::from(wraps)];
        for (listed, thresholds) in listed.iter().zip(&self.thresholds) {
            key.push(u32::try_from(listed.len()).expect("documents are smaller"));
            for listed in listed.iter() {
                let kind = u32::from(listed.is_udp) << 1 | u32::from(listed.action == Action::Deny);
                key.extend([Tier::rank(listed.rule, thresholds), listed.ports, kind]);
            }
        }
        key
    }

    fn exact(&self, wraps: bool, listed: &[Rc<[Listed]>]) -> Option<Vec<PortRange>> {
        let edges = self
            .tiers
            .iter()
            .zip(listed)
            .flat_map(|(tier, listed)| tier.edges(listed));
        let read = self.read.spans().iter();
        let read = read
            .flat_map(|span| [Some(span.first), span.last.checked_add(1)])
            .flatten();
        let mut starts: Vec<u16> = edges.chain(read).chain([0]).collect();
        starts.sort_unstable();
        starts.dedup();
        let place = |tier: usize| Place {
            listed: &listed[tier],
            wraps,
        };
        let tcp = stretches(Protocol::Tcp, &starts, |port| {
            tcp(self.tiers, port, place, self.read)
        });
        let udp = stretches(Protocol::Udp, &starts, |port| {
            if wraps {
                return KernelAction::Deny(Reason::ProtocolDenied);
            }
            let answers = self.tiers.iter().zip(listed);
            let answers: Vec<_> = answers
                .map(|(tier, listed)| (tier.udp(port, listed), tier))
                .collect();
            udp(&answers)
        });
        // Reading more ports than needed costs time and denies nothing, so it never makes a policy too large.
        fit(tcp.clone(), &udp).or_else(|| {
            let widened = (!self.read.is_empty()).then(|| read_all(tcp));
            widened.and_then(|tcp| fit(tcp, &udp))
        })
    }
}

/// The answers for all ports, given where they may change.
fn stretches(protocol: Protocol, starts: &[u16], answer: impl Fn(u16) -> KernelAction) -> Vec<PortRange> {
    let mut exact: Vec<PortRange> = Vec::new();
    let ends = starts.iter().skip(1).map(|next| next - 1).chain([u16::MAX]);
    for (first, last) in starts.iter().copied().zip(ends) {
        let action = answer(first);
        match exact.last_mut() {
            Some(before) if before.action == action => before.last = last,
            Some(_) | None => exact.push(PortRange {
                protocol,
                first,
                last,
                action,
            }),
        }
    }
    exact
}

/// What passes is read where someone must look inside.
pub(crate) fn reading(action: KernelAction, read: bool) -> KernelAction {
    match action {
        KernelAction::Pass if read => KernelAction::Proxy,
        KernelAction::Pass
        | KernelAction::Proxy
        | KernelAction::ProxyBound
        | KernelAction::Audit(_)
        | KernelAction::Deny(_) => action,
    }
}

fn read_all(ranges: Vec<PortRange>) -> Vec<PortRange> {
    let mut merged: Vec<PortRange> = Vec::with_capacity(ranges.len());
    for range in ranges {
        let action = reading(range.action, true);
        match merged.last_mut() {
            Some(before) if before.action == action => before.last = range.last,
            Some(_) | None => merged.push(PortRange { action, ..range }),
        }
    }
    merged
}

/// Leaves out what the table says anyway, and gives up the finer reasons of denials before giving up.
fn fit(mut tcp: Vec<PortRange>, udp: &[PortRange]) -> Option<Vec<PortRange>> {
    let mut udp = udp.to_vec();
    udp.retain(|range| range.action != KernelAction::Deny(unlisted(Protocol::Udp)));
    let implied = [
        |action: KernelAction| action == KernelAction::Deny(unlisted(Protocol::Tcp)),
        |action: KernelAction| action == KernelAction::Deny(Reason::PortDenied),
        |action: KernelAction| matches!(action, KernelAction::Deny(_)),
    ];
    for (round, implied) in implied.iter().enumerate() {
        tcp.retain(|range| !implied(range.action));
        if round > 0 {
            udp.retain(|range| !matches!(range.action, KernelAction::Deny(_)));
        }
        if tcp.len() + udp.len() <= MAX_RANGES {
            tcp.append(&mut udp);
            return Some(tcp);
        }
    }
    None
}

#[cfg(test)]
mod tests;
