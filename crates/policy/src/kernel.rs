//! The decision as a table: the longest prefix that contains the address, then the range that contains the port.
//!
//! Ordered rules and a longest-prefix look-up agree because every prefix that any rule mentions has an entry of its own,
//! which holds the answer of the whole list for the addresses that no longer prefix covers.

use std::{collections::BTreeSet, net::IpAddr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::{
    decide::Protocol, document::Policy, error::PolicyError, ports::PortSet, reason::Reason, tier::Tier,
};

/// Port ranges of one prefix.
pub const MAX_RANGES: usize = 16;
/// Prefixes of one sandbox.
pub const MAX_PREFIXES: usize = 512;

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
    /// Ordered by prefix, each once. Always one for 0.0.0.0/0 and one for ::/0; at most [`MAX_PREFIXES`].
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

/// What all tiers say together. The first tier that denies gives the reason.
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

/// Flattens the tiers. On the ports of `read` nothing passes without a look inside.
pub(crate) fn table(tiers: &[Tier], read: &PortSet) -> Result<KernelTable, Excess> {
    let networks = tiers
        .iter()
        .flat_map(|tier| &tier.rules)
        .flat_map(|rule| &rule.networks);
    let everywhere = [IpNet::V4(Ipv4Net::default()), IpNet::V6(Ipv6Net::default())];
    let prefixes: BTreeSet<IpNet> = networks.copied().chain(everywhere).collect();
    if prefixes.len() > MAX_PREFIXES {
        return Err(Excess::Prefixes(prefixes.len()));
    }
    let mut entries: Vec<PrefixEntry> = Vec::with_capacity(prefixes.len());
    // The entries that contain the prefix at hand, the longest last. The order of `IpNet` puts a prefix before those
    // inside it.
    let mut around: Vec<usize> = Vec::new();
    for prefix in prefixes {
        let ranges = ranges(tiers, prefix, read)?;
        while around
            .last()
            .is_some_and(|outer| !entries[*outer].prefix.contains(&prefix))
        {
            around.pop();
        }
        // The look-up finds the same in the entry around it.
        if around
            .last()
            .is_some_and(|outer| entries[*outer].ranges == ranges)
        {
            continue;
        }
        around.push(entries.len());
        entries.push(PrefixEntry { prefix, ranges });
    }
    Ok(KernelTable { entries })
}

fn ranges(tiers: &[Tier], prefix: IpNet, read: &PortSet) -> Result<Vec<PortRange>, Excess> {
    // A rule's range either contains the whole prefix or nothing of it that a longer entry does not cover.
    let concerns = |networks: &[IpNet]| networks.iter().any(|network| network.contains(&prefix));
    let matches: Vec<Vec<bool>> = tiers
        .iter()
        .map(|tier| tier.rules.iter().map(|rule| concerns(&rule.networks)).collect())
        .collect();
    let all_ports = tiers.iter().zip(&matches).flat_map(|(tier, matches)| {
        let rules = tier.rules.iter().zip(matches);
        let relevant = rules
            .filter(|(rule, listed)| **listed || rule.names_hosts())
            .map(|(rule, _)| &rule.ports);
        relevant.chain(&tier.open)
    });
    let edges = all_ports
        .chain([read])
        .flat_map(|ports| ports.spans())
        .flat_map(|span| [Some(span.first), span.last.checked_add(1)]);
    let starts: BTreeSet<u16> = edges.flatten().chain([0]).collect();

    let mut exact: Vec<PortRange> = Vec::new();
    let ends = starts.iter().skip(1).map(|next| next - 1).chain([u16::MAX]);
    for (first, last) in starts.iter().copied().zip(ends) {
        let answers = tiers
            .iter()
            .zip(&matches)
            .map(|(tier, matches)| tier.kernel(first, matches));
        let action = reading(strictest(answers), read.contains(first));
        match exact.last_mut() {
            Some(before) if before.action == action => before.last = last,
            Some(_) | None => exact.push(PortRange {
                protocol: Protocol::Tcp,
                first,
                last,
                action,
            }),
        }
    }
    // Reading more ports than needed costs time and denies nothing, so it never makes a policy too large.
    fit(exact.clone())
        .or_else(|| (!read.is_empty()).then(|| fit(read_all(exact))).flatten())
        .ok_or(Excess::Ranges(prefix))
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
fn fit(mut ranges: Vec<PortRange>) -> Option<Vec<PortRange>> {
    let implied = [
        |action: KernelAction| action == KernelAction::Deny(Reason::DefaultDeny),
        |action: KernelAction| action == KernelAction::Deny(Reason::PortDenied),
        |action: KernelAction| matches!(action, KernelAction::Deny(_)),
    ];
    for implied in implied {
        ranges.retain(|range| !implied(range.action));
        if ranges.len() <= MAX_RANGES {
            return Some(ranges);
        }
    }
    None
}

#[cfg(test)]
mod tests;
