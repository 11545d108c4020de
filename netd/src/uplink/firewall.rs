//! The nftables table of the uplink in the node's namespace: what comes from sandboxes leaves the node or is refused,
//! what leaves has the node's address, and the node does not become a router for anybody else.

use std::{collections::BTreeSet, fs, net::IpAddr};

use ipnet::IpNet;
use netd_common::limit;
use serde_json::Value;

use super::{
    Place, UplinkError,
    forwarding::{Family, Switch},
    link::Ways,
    names::{Names, PREFIX},
};
use crate::{canary, command};

const ENDPOINTS: usize = limit::ENDPOINTS;

/// Seconds of silence after which connection tracking forgets a connection of a sandbox: no longer than the programs
/// remember it, else one sandbox could fill what the whole node has.
const TIMEOUTS: &str = "established : 7440, close_wait : 60, last_ack : 10, time_wait : 10, close : 5";
/// What one sandbox may hold of the entries that the node has for connections: of all families together.
const SHARE: u64 = 64;
/// Entries of a node that does not say how many it has: the least of the kernel's defaults.
const UNSAID: u64 = 65_536;

/// Where the chain of forwarded packets stands.
const FORWARD: &str = "type filter hook forward priority filter; policy accept;";

/// How many connections of one sandbox may be tracked at the same time, of both families together.
pub(super) fn held() -> u64 {
    let most = fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_max")
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(UNSAID);
    (most / SHARE).clamp(1, limit::FLOWS_PER_ENDPOINT)
}

/// The table, replaced in one transaction.
///
/// `prerouting` stands before any decision of the node's: whatever is the node's own at this very moment (a lookup in
/// its routes, not in a copy of them) is refused. The node's own NAT comes after it, so `input` and `forward` refuse
/// what was given another destination since. `forward` knows where the uplink may lead to, and drops what connection
/// tracking has no place for: it would leave under the sandbox's own address. On interfaces that forward only because
/// we turned that on, nothing else is forwarded. `output` keeps the node's own programs from the sandboxes, but for
/// errors about what the sandboxes sent.
pub(super) fn ruleset(
    names: &Names,
    place: &Place,
    ways: &Ways,
    opened: &BTreeSet<Switch>,
    (ipv6, held): (bool, u64),
) -> String {
    let (table, uplink) = (&names.table, &names.interface);
    let range4 = IpNet::from(place.sandboxes);
    let ranges: Vec<(&str, IpNet, &BTreeSet<String>)> = [
        ("ip", Some(range4), &ways.ipv4),
        (
            "ip6",
            place.sandboxes6.filter(|_| ipv6).map(IpNet::from),
            &ways.ipv6,
        ),
    ]
    .into_iter()
    .filter_map(|(family, range, ways)| Some((family, range?, ways)))
    .collect();
    let sources: String = ranges
        .iter()
        .map(|(family, range, _)| format!("    {family} saddr {range} fib daddr type unicast accept\n"))
        .collect();
    let responder = &names.canary;
    let mut leave = String::new();
    let mut masquerade = String::new();
    for (family, range, on) in &ranges {
        let canary = match range {
            IpNet::V4(_) => IpAddr::V4(canary::address(place.sandboxes)),
            IpNet::V6(range) => IpAddr::V6(canary::address6(place.sandboxes, *range)),
        };
        leave.push_str(&format!(
            "    iifname \"{uplink}\" {family} saddr {canary} oifname \"{responder}\" jump pass\n"
        ));
        for way in *on {
            leave.push_str(&format!(
                "    iifname \"{uplink}\" {family} saddr {range} oifname \"{way}\" jump pass\n"
            ));
        }
        // What is only on a link is not the internet, and private: the operator's exceptions are all there is.
        let on_links = ways.links6.iter().filter(|_| matches!(range, IpNet::V6(_)));
        for (link, opened) in on_links.flat_map(|(link, opened)| opened.iter().map(move |it| (link, it))) {
            leave.push_str(&format!(
                "    iifname \"{uplink}\" {family} saddr {range} {family} daddr {opened} oifname \"{link}\" jump pass\n"
            ));
        }
        masquerade.push_str(&format!(
            "    {family} saddr {range} oifname != \"{PREFIX}*\" masquerade\n"
        ));
    }
    let guarded: String = opened
        .iter()
        .map(|switch| format!("    {}\n", guard(switch)))
        .collect();
    // Counted apart, for the two addresses have nothing in common.
    let held = (held / u64::try_from(ranges.len()).unwrap_or(u64::MAX)).max(1);
    let held: String = ranges
        .iter()
        .map(|(family, ..)| {
            format!("    iifname \"{uplink}\" ct state new add @held_{family} {{ {family} saddr ct count over {held} }} goto refuse\n")
        })
        .collect();
    format!(
        "table inet {table}
delete table inet {table}
table inet {table} {{
  ct timeout patience4 {{
    protocol tcp; l3proto ip; policy = {{ {TIMEOUTS} }};
  }}
  ct timeout patience6 {{
    protocol tcp; l3proto ip6; policy = {{ {TIMEOUTS} }};
  }}
  set held_ip {{ type ipv4_addr; size {ENDPOINTS}; flags dynamic; }}
  set held_ip6 {{ type ipv6_addr; size {ENDPOINTS}; flags dynamic; }}
  chain refuse {{
    meta l4proto tcp reject with tcp reset
    reject with icmpx admin-prohibited
  }}
  chain arrived {{
{sources}    goto refuse
  }}
  chain pass {{
    tcp flags & (syn | rst) == syn tcp option maxseg size set rt mtu
    accept
  }}
  chain prerouting {{
    type filter hook prerouting priority raw; policy accept;
    iifname \"{uplink}\" goto arrived
  }}
  chain tracked {{
    type filter hook prerouting priority mangle; policy accept;
    iifname \"{uplink}\" meta nfproto ipv4 meta l4proto tcp ct timeout set \"patience4\"
    iifname \"{uplink}\" meta nfproto ipv6 meta l4proto tcp ct timeout set \"patience6\"
  }}
  chain input {{
    type filter hook input priority filter; policy accept;
    iifname \"{uplink}\" goto refuse
  }}
  chain forward {{
    {FORWARD}
    iifname \"{uplink}\" ct state invalid,untracked drop
    iifname \"{uplink}\" ct status dnat goto refuse
{held}{leave}    iifname \"{uplink}\" goto refuse
    oifname \"{uplink}\" ct state established,related jump pass
    oifname \"{uplink}\" drop
{guarded}  }}
  chain output {{
    type filter hook output priority filter; policy accept;
    oifname \"{uplink}\" meta l4proto {{ icmp, ipv6-icmp }} accept
    oifname \"{uplink}\" tcp flags & rst == rst accept
    oifname \"{uplink}\" drop
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
{masquerade}  }}
}}
"
    )
}

/// What else comes in by an interface that forwards only because we turned that on goes nowhere.
fn guard(switch: &Switch) -> String {
    let family = match switch.family {
        Family::V4 => "ipv4",
        Family::V6 => "ipv6",
    };
    let interface = &switch.interface;
    format!("meta nfproto {family} iifname \"{interface}\" oifname != \"{PREFIX}*\" drop")
}

/// Has another instance's table guard switches that are left to it, until that instance loads its table anew with them;
/// also when its netd does not run, or its table is gone.
pub(super) fn entrust(heir: &str, switches: &BTreeSet<Switch>) -> Result<(), UplinkError> {
    let rules: String = switches
        .iter()
        .map(|switch| format!("add rule inet {heir} forward {}\n", guard(switch)))
        .collect();
    load(&format!(
        "add table inet {heir}\nadd chain inet {heir} forward {{ {FORWARD} }}\n{rules}"
    ))
}

pub(super) fn load(text: &str) -> Result<(), UplinkError> {
    command::run(&["nft", "-f", "-"], text)?;
    Ok(())
}

/// The table as the kernel has it, without what packets put into it.
pub(super) fn shown(names: &Names) -> Result<String, UplinkError> {
    Ok(command::run(
        &["nft", "-s", "-t", "list", "table", "inet", &names.table],
        "",
    )?)
}

/// Removes the table. Nothing to do is fine.
pub(super) fn remove(names: &Names) -> Result<(), UplinkError> {
    let table = &names.table;
    if shown(names).is_err() {
        return Ok(());
    }
    load(&format!("delete table inet {table}\n"))
}

/// Whose rules may have kept a forwarded packet: the chains of other tables at the hooks that it passes, those first
/// that drop by default.
pub fn blame(names: &Names) -> String {
    match command::run(&["nft", "-j", "list", "ruleset"], "") {
        Ok(text) => {
            let listed: Value = serde_json::from_str(&text).unwrap_or_default();
            match suspects(&listed, &names.table).as_slice() {
                [] => "no other firewall was found in nftables".to_owned(),
                all => all.join("; "),
            }
        }
        Err(error) => error.to_string(),
    }
}

fn suspects(listed: &Value, own: &str) -> Vec<String> {
    let objects = listed["nftables"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    let chains = objects.iter().filter_map(|object| object.get("chain"));
    let mut found: Vec<(bool, String)> = chains
        .filter_map(|chain| {
            let text = |key: &str| chain[key].as_str();
            let (family, table, name, hook) = (text("family")?, text("table")?, text("name")?, text("hook")?);
            if table == own || !matches!(hook, "prerouting" | "forward" | "postrouting") {
                return None;
            }
            let drops = text("policy") == Some("drop");
            let by_default = if drops { " drops by default" } else { "" };
            Some((
                drops,
                format!(
                    "the chain `{family} {table} {name}` of the node's firewall, at hook {hook},{by_default}"
                ),
            ))
        })
        .map(|(drops, text)| (drops, text.trim_end_matches(',').to_owned()))
        .collect();
    found.sort_by_key(|(drops, _)| !drops);
    found.into_iter().map(|(_, text)| text).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;

    #[test]
    fn the_table_bounds_what_a_sandbox_holds_and_refuses_before_it_lets_leave() {
        let names = Names::of(Path::new("/run/sandgate"));
        let place = Place {
            run_dir: "/run/sandgate".into(),
            sandboxes: "10.213.0.0/16".parse().unwrap(),
            sandboxes6: Some("fd53:4700::/32".parse().unwrap()),
            opened6: Vec::new(),
        };
        let way = BTreeSet::from(["eth0".to_owned()]);
        let opened = ["fd00:5::/64", "fd00:6::7/128"].map(|range| range.parse().unwrap());
        let ways = Ways {
            ipv4: way.clone(),
            ipv6: way,
            links6: [("eth1".to_owned(), opened.into())].into(),
        };
        let text = ruleset(&names, &place, &ways, &BTreeSet::new(), (true, 4096));
        let at = |part: &str| text.find(part).unwrap_or_else(|| panic!("no `{part}` in {text}"));
        let leaves = at("oifname \"eth0\" jump pass");
        for before in [
            "ct state invalid,untracked drop",
            "ct status dnat goto refuse",
            // One sandbox has both addresses, and its share once.
            "add @held_ip { ip saddr ct count over 2048 } goto refuse",
            "add @held_ip6 { ip6 saddr ct count over 2048 } goto refuse",
        ] {
            assert!(at(before) < leaves, "{before}: {text}");
        }
        // Nobody but this instance's own canary meets who answers it.
        let canary = format!("ip saddr 10.213.255.255 oifname \"{}\" jump pass", names.canary);
        at(&canary);
        let canary6 = format!("ip6 saddr fd53:4700::ffff oifname \"{}\" jump pass", names.canary);
        at(&canary6);
        assert_eq!(text.matches("\"sgcn").count(), 2, "{text}");
        // To a link from which nothing leads on goes what the operator has opened there.
        assert_eq!(text.matches("oifname \"eth1\"").count(), 2, "{text}");
        for opened in ["fd00:5::/64", "fd00:6::7/128"] {
            at(&format!(
                "ip6 saddr fd53:4700::/32 ip6 daddr {opened} oifname \"eth1\" jump pass"
            ));
        }
        // Where IPv6 does not pass, nothing of it is let through, and the share is that of IPv4.
        let without = ruleset(&names, &place, &ways, &BTreeSet::new(), (false, 4096));
        assert!(
            !without.contains("ip6 saddr") && !without.contains("eth1"),
            "{without}"
        );
        assert!(
            without.contains("add @held_ip { ip saddr ct count over 4096 } goto refuse"),
            "{without}"
        );
    }

    #[test]
    fn who_drops_by_default_is_named_first() {
        let listed = json!({ "nftables": [
            { "metainfo": {} },
            { "chain": { "family": "inet", "table": "sandgate_1", "name": "forward", "hook": "forward", "policy": "accept" } },
            { "chain": { "family": "ip", "table": "nat", "name": "POSTROUTING", "hook": "postrouting", "policy": "accept" } },
            { "chain": { "family": "inet", "table": "filter", "name": "input", "hook": "input", "policy": "drop" } },
            { "chain": { "family": "inet", "table": "filter", "name": "forward", "hook": "forward", "policy": "drop" } },
            { "chain": { "family": "inet", "table": "filter", "name": "other" } },
        ]});
        assert_eq!(
            suspects(&listed, "sandgate_1"),
            [
                "the chain `inet filter forward` of the node's firewall, at hook forward, drops by default",
                "the chain `ip nat POSTROUTING` of the node's firewall, at hook postrouting",
            ]
        );
        assert!(suspects(&json!({}), "sandgate_1").is_empty());
    }
}
