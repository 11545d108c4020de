//! The way through the router namespace for packets that need no look inside: from a sandbox's veth to the uplink,
//! and from the uplink to a sandbox's veth. Owns the routes, rules and sysctls of that way, and the lines of the
//! namespace's nftables table about it. The uplink itself, and all that lies behind it, is [`crate::uplink`]'s.
//!
//! A packet gets here only by the mark that the program at the sandbox's veth puts on it ([`mark::PASS`]), and what
//! comes back is judged by the program on its way to the sandbox. Nothing of it is tracked in this namespace.

use std::{fs, io, path::Path};

use netd_common::mark;

use super::{RouterError, RouterNamespace};
use crate::command;

/// Name of the uplink's end in the router namespace.
pub const INTERFACE: &str = "uplink";
/// The next hop in both directions: a link-local address that exists on no interface, only as a static neighbour.
pub const HOP: &str = "169.254.83.71";
/// The same for IPv6.
pub const HOP6: &str = "fe80::5347:2";

/// Routing table whose only route leads to the uplink.
const TABLE: u32 = 134;
/// Place of the first rule: after those of refused and redirected packets, before the one that prohibits the rest.
const PRIORITY: u32 = 44;

const FORWARDING4: &str = "/proc/sys/net/ipv4/conf";
const FORWARDING6: &str = "/proc/sys/net/ipv6/conf";

/// What the chain of arriving packets lets through: from sandboxes what is marked, and what the uplink brings. The
/// routing rules have the last word on both.
pub(super) fn prerouting() -> [String; 2] {
    [
        format!("meta mark {:#x} iifname != \"{INTERFACE}\" accept", mark::PASS),
        format!("iifname \"{INTERFACE}\" accept"),
    ]
}

/// What the chain of forwarded packets lets through.
pub(super) fn forward() -> [String; 2] {
    [
        format!("meta mark {:#x} oifname \"{INTERFACE}\" accept", mark::PASS),
        format!("iifname \"{INTERFACE}\" oifname != \"{INTERFACE}\" accept"),
    ]
}

/// Opens the way, for IPv6 too if that is asked for. The uplink must be there. Idempotent.
///
/// # Errors
/// When a setting is not taken. What was opened stays so until [`close`].
pub fn open(router: &RouterNamespace, peer_mac: [u8; 6], ipv6: bool) -> Result<(), RouterError> {
    router.run(|| {
        let peer = crate::uplink::written(peer_mac);
        command::run(
            &["ip", "-batch", "-"],
            &format!("link set {INTERFACE} addrgenmode none\nlink set {INTERFACE} up\n"),
        )?;
        let families = [("-4", HOP, true), ("-6", HOP6, ipv6)];
        for (family, hop, _) in families.into_iter().filter(|(.., wanted)| *wanted) {
            if family == "-6" {
                set(Path::new(FORWARDING6), INTERFACE, "disable_ipv6", "0")?;
            }
            let text = format!(
                "neighbour replace {hop} lladdr {peer} dev {INTERFACE} nud permanent\n\
                 route replace default via {hop} dev {INTERFACE} onlink table {TABLE}\n"
            );
            command::run(&["ip", family, "-batch", "-"], &text)?;
            rules(family)?;
        }
        // The namespace's own switch stays off: an interface forwards what it brings if its own is on.
        for_each_interface(Path::new(FORWARDING4), "forwarding", "1")?;
        if ipv6 {
            forward_ipv6()?;
        }
        Ok(())
    })?
}

/// Closes it: from here on the namespace forwards nothing.
///
/// # Errors
/// When a setting is not taken.
pub fn close(router: &RouterNamespace) -> Result<(), RouterError> {
    router.run(|| {
        for_each_interface(Path::new(FORWARDING4), "forwarding", "0")?;
        remove_rules("-4")?;
        close6()
    })?
}

/// Closes it for IPv6 alone.
///
/// # Errors
/// When a setting is not taken.
pub fn close_ipv6(router: &RouterNamespace) -> Result<(), RouterError> {
    router.run(close6)?
}

fn close6() -> Result<(), RouterError> {
    let base = Path::new(FORWARDING6);
    if !base.exists() {
        return Ok(());
    }
    remove_rules("-6")?;
    set(base, "all", "forwarding", "0")?;
    if base.join("default/force_forwarding").exists() {
        for_each_interface(base, "force_forwarding", "0")?;
    }
    if base.join(INTERFACE).exists() {
        set(base, INTERFACE, "disable_ipv6", "1")?;
    }
    Ok(())
}

/// `prohibit` stands beneath: should the table be empty, a packet has nowhere to go.
fn wanted() -> [(u32, String); 3] {
    [
        (PRIORITY, format!("fwmark {:#x} lookup {TABLE}", mark::PASS)),
        (PRIORITY + 1, format!("fwmark {:#x} prohibit", mark::PASS)),
        // The main table has the routes to sandboxes, and not one more.
        (PRIORITY + 2, format!("iif {INTERFACE} lookup main")),
    ]
}

fn rules(family: &str) -> Result<(), RouterError> {
    let present = present(family)?;
    let missing: String = wanted()
        .iter()
        .filter(|(priority, _)| !present.contains(priority))
        .map(|(priority, rule)| format!("rule add priority {priority} {rule}\n"))
        .collect();
    if !missing.is_empty() {
        command::run(&["ip", family, "-batch", "-"], &missing)?;
    }
    Ok(())
}

fn remove_rules(family: &str) -> Result<(), RouterError> {
    let present = present(family)?;
    let text: String = wanted()
        .iter()
        .filter(|(priority, _)| present.contains(priority))
        .map(|(priority, _)| format!("rule del priority {priority}\n"))
        .collect();
    if !text.is_empty() {
        command::run(&["ip", family, "-batch", "-"], &text)?;
    }
    Ok(())
}

fn present(family: &str) -> Result<Vec<u32>, RouterError> {
    let shown = command::run(&["ip", family, "rule", "show"], "")?;
    Ok(shown
        .lines()
        .filter_map(|line| line.split_once(':')?.0.parse().ok())
        .collect())
}

/// Where the kernel has the switch of a single interface (`force_forwarding`, since Linux 6.17), that; else that of the
/// whole namespace, in which the chain of forwarded packets lets nothing else through.
fn forward_ipv6() -> Result<(), RouterError> {
    let base = Path::new(FORWARDING6);
    if base.join("default/force_forwarding").exists() {
        for_each_interface(base, "force_forwarding", "1")
    } else {
        set(base, "all", "forwarding", "1")
    }
}

/// Sets it for those that are there and those that will come (`default`).
fn for_each_interface(base: &Path, name: &str, value: &'static str) -> Result<(), RouterError> {
    set(base, "default", name, value)?;
    let entries = fs::read_dir(base).map_err(failed(base, value))?;
    for entry in entries {
        let entry = entry.map_err(failed(base, value))?;
        let interface = entry.file_name();
        let interface = interface.to_string_lossy();
        if interface == "all" || interface == "default" {
            continue;
        }
        match set(base, &interface, name, value) {
            // One that went away meanwhile.
            Err(_) if !entry.path().exists() => {}
            outcome => outcome?,
        }
    }
    Ok(())
}

fn set(base: &Path, interface: &str, name: &str, value: &'static str) -> Result<(), RouterError> {
    let path = base.join(interface).join(name);
    if fs::read_to_string(&path).map_err(failed(&path, value))?.trim() == value {
        return Ok(());
    }
    fs::write(&path, value).map_err(failed(&path, value))
}

fn failed(path: &Path, value: &'static str) -> impl FnOnce(io::Error) -> RouterError {
    let name = path.display().to_string();
    move |source| RouterError::Sysctl { name, value, source }
}
