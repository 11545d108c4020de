//! What makes the namespace a wall: sysctls, the gateway address, routing rules, and the nftables table that answers
//! refused packets. Run on a thread inside the namespace; idempotent.
//!
//! Forwarding is closed four times: the sysctls say no, the routing rules hold no route for a packet that came in
//! (only `local` ones), the forward chain drops, and the programs let nothing through without a mark. All of it holds
//! for both families. What may leave without netd is [`super::pass`]'s: two lines of each chain here, which mean
//! nothing without the rest.
//!
//! IPv6 is off but on `lo` and on the interfaces of sandboxes that have an address, where the controller turns it on;
//! those get no address of their own, so that the kernel has nothing to say there by itself.

use std::{fs, io, path::Path};

use netd_common::mark;

use super::{GATEWAY, GATEWAY6, RouterError, pass};
use crate::command;

/// Routing table whose only route delivers everything to the local host.
const LOCAL_TABLE: u32 = 133;

/// Settings without which the namespace does not refuse or redirect as promised.
const REQUIRED: &[(&str, &str)] = &[
    ("net/ipv4/ip_forward", "0"),
    ("net/ipv4/conf/all/forwarding", "0"),
    ("net/ipv4/conf/default/forwarding", "0"),
    // Redirected packets have sources and destinations that no route of ours knows.
    ("net/ipv4/conf/all/rp_filter", "0"),
    ("net/ipv4/conf/default/rp_filter", "0"),
    // A destination in 127/8 on the wire stays a martian.
    ("net/ipv4/conf/all/route_localnet", "0"),
    ("net/ipv4/conf/default/route_localnet", "0"),
    ("net/ipv4/conf/all/accept_redirects", "0"),
    ("net/ipv4/conf/default/accept_redirects", "0"),
    ("net/ipv4/conf/all/send_redirects", "0"),
    ("net/ipv4/conf/default/send_redirects", "0"),
    ("net/ipv4/conf/all/accept_source_route", "0"),
    ("net/ipv4/conf/default/accept_source_route", "0"),
    // Sockets of this namespace are handed to programs without privileges: none of them may take a port of ours, or one
    // that a sandbox asks for, while netd is away. (Those that the kernel chooses begin here, too.)
    ("net/ipv4/ip_unprivileged_port_start", "32768"),
    // All of them ([`super::EPHEMERAL_PORTS`]): the usual end leaves too few for the reserve of the controller.
    ("net/ipv4/ip_local_port_range", "32768\t65535"),
    // Answers that the kernel itself makes (RST, ICMP) carry the mark of what they answer; the program that guards the
    // way to the sandbox knows them by it.
    ("net/ipv4/fwmark_reflect", "1"),
    // The default limit of one ICMP error a second and destination would make most UDP refusals silent.
    ("net/ipv4/icmp_ratelimit", "0"),
];

/// The same for IPv6, where the kernel has it. Interfaces inherit `default` when they appear.
const REQUIRED6: &[(&str, &str)] = &[
    // `all` overwrites every interface, so it comes first, and only in a namespace where it was not yet so.
    ("net/ipv6/conf/all/disable_ipv6", "1"),
    ("net/ipv6/conf/default/disable_ipv6", "1"),
    ("net/ipv6/conf/lo/disable_ipv6", "0"),
    ("net/ipv6/conf/all/forwarding", "0"),
    ("net/ipv6/conf/default/forwarding", "0"),
    ("net/ipv6/conf/all/accept_ra", "0"),
    ("net/ipv6/conf/default/accept_ra", "0"),
    ("net/ipv6/conf/default/autoconf", "0"),
    // No link-local address, and so nothing that would have to be announced or asked for.
    ("net/ipv6/conf/default/addr_gen_mode", "1"),
    ("net/ipv6/conf/default/router_solicitations", "0"),
    ("net/ipv6/conf/default/dad_transmits", "0"),
    ("net/ipv6/conf/all/accept_redirects", "0"),
    ("net/ipv6/conf/default/accept_redirects", "0"),
    ("net/ipv6/conf/all/accept_source_route", "-1"),
    ("net/ipv6/conf/default/accept_source_route", "-1"),
    ("net/ipv6/fwmark_reflect", "1"),
    ("net/ipv6/icmp/ratelimit", "0"),
];

/// Settings that only make it faster or more robust; a kernel may lack them, or not have them per namespace.
const WISHED: &[(&str, &str)] = &[
    ("net/ipv4/icmp_msgs_per_sec", "100000"),
    ("net/ipv4/icmp_msgs_burst", "10000"),
    // The sandbox's end is one hop away, so nothing old can arrive late; and a SYN that reuses the four-tuple of a
    // socket in TIME_WAIT would not find our listener (it is bound to another address): each such connect loses a
    // retransmission, 10 ms on a new kernel, a second on an old one.
    ("net/ipv4/tcp_max_tw_buckets", "0"),
    // All sandboxes share a few listeners.
    ("net/core/somaxconn", "8192"),
    ("net/ipv4/tcp_max_syn_backlog", "8192"),
    ("net/ipv4/tcp_syncookies", "1"),
    ("net/ipv4/tcp_synack_retries", "2"),
    // A sandbox that takes nothing more keeps the port of a connection that has been closed on our side.
    ("net/ipv4/tcp_orphan_retries", "2"),
];

/// Applies everything.
pub(super) fn apply() -> Result<(), RouterError> {
    let has_v6 = Path::new("/proc/sys/net/ipv6").exists();
    let required6 = if has_v6 { REQUIRED6 } else { &[] };
    for (name, value) in REQUIRED.iter().chain(required6) {
        set(name, value).map_err(|source| RouterError::Sysctl {
            name: (*name).to_owned(),
            value,
            source,
        })?;
    }
    for (name, value) in WISHED {
        if let Err(error) = set(name, value) {
            tracing::debug!(sysctl = name, value, %error, "not set in the router namespace");
        }
    }
    feed(&["nft", "-f", "-"], &ruleset())?;
    let ends = [
        ("-4", format!("{GATEWAY}/32"), "0.0.0.0/0"),
        ("-6", format!("{GATEWAY6}/128 nodad"), "::/0"),
    ];
    for (family, gateway, everywhere) in ends.iter().take(if has_v6 { 2 } else { 1 }) {
        addresses(family, gateway, everywhere)?;
        rules(family)?;
    }
    Ok(())
}

fn set(name: &str, value: &str) -> io::Result<()> {
    let path = format!("/proc/sys/{name}");
    // Writing some of them has side effects (forwarding resets others), so what is right already is left alone.
    if fs::read_to_string(&path)?.trim() == value {
        return Ok(());
    }
    fs::write(path, value)
}

/// The table, replaced in one transaction.
///
/// `prerouting` stands before any routing decision. Of what comes from sandboxes only packets for netd's sockets get
/// through; everything else is answered at once, also what no program has marked (a hang helps nobody).
///
/// `output` keeps the namespace's own sockets from each other: netd passes some of them on, and whoever holds one could
/// disconnect it and connect it to netd's listeners. Nothing here has a reason to speak to loopback.
fn ruleset() -> String {
    let (proxy, inbound) = (mark::PROXY, mark::INBOUND);
    let ([from_sandboxes, from_uplink], [out, back]) = (pass::prerouting(), pass::forward());
    format!(
        "table inet sandgate
delete table inet sandgate
table inet sandgate {{
  chain prerouting {{
    type filter hook prerouting priority raw; policy drop;
    iif lo drop
    meta mark {proxy:#x} accept
    meta mark {inbound:#x} accept
    {from_sandboxes}
    {from_uplink}
    meta l4proto tcp reject with tcp reset
    meta l4proto udp reject with icmpx admin-prohibited
  }}
  chain output {{
    type filter hook output priority raw; policy accept;
    oif lo drop
  }}
  chain forward {{
    type filter hook forward priority filter; policy drop;
    {out}
    {back}
  }}
}}
"
    )
}

/// Gives the namespace its gateway address, and the table of steered packets its only route.
fn addresses(family: &str, gateway: &str, everywhere: &str) -> Result<(), RouterError> {
    let commands = format!(
        "link set lo up\naddress replace {gateway} dev lo\nroute replace local {everywhere} dev lo table {LOCAL_TABLE}\n"
    );
    feed(&["ip", family, "-batch", "-"], &commands)
}

/// Which table a packet asks, by order. Packets that the namespace sends itself (`iif lo`) come first, so that the
/// mark that an answer reflects does not route it back to the local host.
fn rules(family: &str) -> Result<(), RouterError> {
    let wanted = [
        (10, "iif lo lookup local".to_owned()),
        (11, "iif lo lookup main".to_owned()),
        // Beneath the nftables table: should that be gone, a refused packet still has nowhere to go.
        (20, format!("fwmark {:#x} prohibit", mark::REFUSE)),
        (30, format!("fwmark {:#x} lookup {LOCAL_TABLE}", mark::PROXY)),
        (40, format!("fwmark {:#x} lookup local", mark::INBOUND)),
        (50, "prohibit".to_owned()),
    ];
    let present = output(&["ip", family, "rule", "show"])?;
    let missing: String = wanted
        .iter()
        .filter(|(priority, _)| {
            !present
                .lines()
                .any(|line| line.starts_with(&format!("{priority}:")))
        })
        .map(|(priority, rule)| format!("rule add priority {priority} {rule}\n"))
        .collect();
    if !missing.is_empty() {
        feed(&["ip", family, "-batch", "-"], &missing)?;
    }
    // The rule that the kernel made for local addresses, before all marks. Last, so that no moment is without it.
    if present.lines().any(|line| line.starts_with("0:")) {
        feed(&["ip", family, "-batch", "-"], "rule del priority 0\n")?;
    }
    Ok(())
}

/// Runs a command in this thread's namespace with `input` on its standard input.
fn feed(command: &[&str], input: &str) -> Result<(), RouterError> {
    command::run(command, input)?;
    Ok(())
}

fn output(command: &[&str]) -> Result<String, RouterError> {
    Ok(command::run(command, "")?)
}
