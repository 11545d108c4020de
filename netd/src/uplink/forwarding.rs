//! The switches for forwarding, interface by interface. Owns: turning on those that are needed, remembering which were
//! off, and turning them off again, also for a netd that was killed.
//!
//! IPv4 asks the switch of the interface that a packet came in by (`net.ipv4.conf.*.forwarding`), so the uplink's and,
//! for the answers, those of the ways out are turned on, and not the node's. IPv6 asks the node's, or since Linux 6.17
//! that of the interface (`net.ipv6.conf.*.force_forwarding`); the node's is left alone, for it changes how the node
//! takes router advertisements.
//!
//! What was turned on is in a file of the run directory. Instances in one namespace share the switches: the one that
//! goes leaves those that it turned on to one that stays, by a note in the alias of that one's interface and by the rules
//! that guard them in that one's table.

use std::{
    collections::BTreeSet,
    fmt, fs, io,
    path::{Path, PathBuf},
    str::FromStr,
};

use serde::{Deserialize, Serialize};

use super::{
    UplinkError, firewall,
    link::{self, Ways},
    names::{Names, table_of},
    on_file,
};

const CONF: [(Family, &str); 2] = [
    (Family::V4, "/proc/sys/net/ipv4/conf"),
    (Family::V6, "/proc/sys/net/ipv6/conf"),
];

/// A family of addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// A switch that was off.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct Switch {
    pub(super) family: Family,
    pub(super) interface: String,
}

/// The file.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Kept {
    /// Boot and namespace: elsewhere it means nothing.
    world: String,
    switches: BTreeSet<Switch>,
}

impl fmt::Display for Switch {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = match self.family {
            Family::V4 => 4,
            Family::V6 => 6,
        };
        write!(formatter, "+{family}:{}", self.interface)
    }
}

impl FromStr for Switch {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (family, interface) = text
            .strip_prefix('+')
            .and_then(|rest| rest.split_once(':'))
            .ok_or(())?;
        let family = match family {
            "4" => Family::V4,
            "6" => Family::V6,
            _ => return Err(()),
        };
        let plain = !interface.is_empty() && !interface.contains('/') && interface.len() < libc::IFNAMSIZ;
        let interface = interface.to_owned();
        plain.then_some(Self { family, interface }).ok_or(())
    }
}

impl Switch {
    fn new(family: Family, interface: &str) -> Self {
        Self {
            family,
            interface: interface.to_owned(),
        }
    }

    fn path(&self) -> PathBuf {
        match self.family {
            Family::V4 => Path::new(CONF[0].1).join(&self.interface).join("forwarding"),
            Family::V6 => Path::new(CONF[1].1)
                .join(&self.interface)
                .join("force_forwarding"),
        }
    }

    /// None when there is no such interface.
    fn is_on(&self) -> Result<Option<bool>, UplinkError> {
        let path = self.path();
        match fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text.trim() == "1")),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(on_file("read", &path)(error)),
        }
    }

    fn turn(&self, on: bool) -> Result<(), UplinkError> {
        if self.is_on()?.is_none_or(|is_on| is_on == on) {
            return Ok(());
        }
        let path = self.path();
        fs::write(&path, if on { "1" } else { "0" }).map_err(on_file("write", &path))
    }
}

/// Whether this kernel can forward IPv6 without the node becoming another to its network.
pub(super) fn can_ipv6() -> bool {
    whole_node(Family::V6) || Path::new("/proc/sys/net/ipv6/conf/default/force_forwarding").exists()
}

/// Whether the node forwards on all interfaces: a router, and not by our doing.
fn whole_node(family: Family) -> bool {
    let (_, conf) = CONF[usize::from(family == Family::V6)];
    fs::read_to_string(Path::new(conf).join("all/forwarding")).is_ok_and(|text| text.trim() == "1")
}

/// What is to be turned on, and what that means for the ways.
#[derive(Debug)]
pub(super) struct Plan {
    /// Those that would be off without us.
    pub(super) opened: BTreeSet<Switch>,
    needed: Vec<Switch>,
}

/// Finds what these ways need, and notes what would be off without us; turns on nothing. Takes away those ways that
/// somebody has closed on a node that otherwise forwards. Idempotent.
pub(super) fn plan(run_dir: &Path, names: &Names, ways: &mut Ways, ipv6: bool) -> Result<Plan, UplinkError> {
    let before = remembered(run_dir, names)?;
    let mut opened = before.clone();
    // A node that has become a router keeps its switches, whatever we found.
    opened.retain(|switch| !whole_node(switch.family) && matches!(switch.is_on(), Ok(Some(_))));
    let mut needed = vec![Switch::new(Family::V4, &names.interface)];
    if whole_node(Family::V4) {
        ways.ipv4
            .retain(|interface| !matches!(Switch::new(Family::V4, interface).is_on(), Ok(Some(false))));
    }
    let wanted4 = ways.ipv4.iter().map(|interface| (Family::V4, interface));
    let wanted6 = ways.ipv6.iter().chain(ways.links6.keys());
    let wanted6 = wanted6.map(|interface| (Family::V6, interface));
    for (family, interface) in wanted4.chain(wanted6.filter(|_| ipv6 && !whole_node(Family::V6))) {
        let switch = Switch::new(family, interface);
        if switch.is_on()? == Some(false) {
            opened.insert(switch.clone());
        }
        needed.push(switch);
    }
    if ipv6 && !whole_node(Family::V6) {
        needed.push(Switch::new(Family::V6, &names.interface));
    }
    if opened != before {
        write(run_dir, &opened)?;
    }
    Ok(Plan { opened, needed })
}

/// Turns on what a plan needs. After the table stands that guards it.
pub(super) fn turn_on(plan: &Plan) -> Result<(), UplinkError> {
    plan.needed.iter().try_for_each(|switch| switch.turn(true))
}

/// Turns off what was, or leaves it to another instance, and forgets it.
pub(super) fn restore(run_dir: &Path, names: &Names) -> Result<(), UplinkError> {
    give_back(names, &remembered(run_dir, names)?)?;
    match fs::remove_file(file(run_dir)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(on_file("remove", &file(run_dir))(error))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

/// The same with the switches of IPv6 alone, for an uplink that stays.
pub(super) fn restore6(run_dir: &Path, names: &Names) -> Result<(), UplinkError> {
    let (six, rest): (BTreeSet<_>, BTreeSet<_>) = remembered(run_dir, names)?
        .into_iter()
        .partition(|switch| switch.family == Family::V6);
    if !six.is_empty() {
        give_back(names, &six)?;
        write(run_dir, &rest)?;
        // What others left to it is in the file from here on, but for these.
        if let Some(own) = link::find(&names.interface)?
            && names.own(&own.ifalias)
            && own.ifalias != names.owner
        {
            link::set_alias(&names.interface, &names.owner)?;
        }
    }
    Switch::new(Family::V6, &names.interface).turn(false)
}

fn give_back(names: &Names, switches: &BTreeSet<Switch>) -> Result<(), UplinkError> {
    let heir = if switches.is_empty() {
        None
    } else {
        link::others(names)?.into_iter().next()
    };
    let Some(heir) = heir else {
        let off = switches.iter().filter(|switch| !whole_node(switch.family));
        return off.into_iter().try_for_each(|switch| switch.turn(false));
    };
    let known: BTreeSet<Switch> = inherited(&heir.ifalias);
    let more: String = switches
        .difference(&known)
        .map(|switch| format!(" {switch}"))
        .collect();
    link::set_alias(&heir.ifname, &format!("{}{more}", heir.ifalias))?;
    // Before our own table goes: the heir hears of it only afterwards, if its netd runs at all.
    firewall::entrust(&table_of(&heir.ifname), switches)
}

/// What this instance answers for: what it turned on, and what others left to it.
fn remembered(run_dir: &Path, names: &Names) -> Result<BTreeSet<Switch>, UplinkError> {
    let path = file(run_dir);
    let mut switches = match fs::read(&path) {
        // A file that cannot be read is of a netd that was killed while it wrote: nothing was turned on by then.
        Ok(bytes) => match serde_json::from_slice::<Kept>(&bytes) {
            Ok(kept) if kept.world == world()? => kept.switches,
            Ok(_) | Err(_) => BTreeSet::new(),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => BTreeSet::new(),
        Err(error) => return Err(on_file("read", &path)(error)),
    };
    if let Some(own) = link::find(&names.interface)?
        && names.own(&own.ifalias)
    {
        switches.extend(inherited(&own.ifalias));
    }
    Ok(switches)
}

fn inherited(alias: &str) -> BTreeSet<Switch> {
    alias.split(' ').filter_map(|word| word.parse().ok()).collect()
}

fn write(run_dir: &Path, switches: &BTreeSet<Switch>) -> Result<(), UplinkError> {
    let kept = Kept {
        world: world()?,
        switches: switches.clone(),
    };
    let (path, new) = (file(run_dir), file(run_dir).with_extension("new"));
    let bytes = serde_json::to_vec(&kept).map_err(|source| UplinkError::Printed {
        program: "netd",
        source,
    })?;
    fs::write(&new, bytes).map_err(on_file("write", &new))?;
    fs::rename(&new, &path).map_err(on_file("write", &path))
}

fn file(run_dir: &Path) -> PathBuf {
    run_dir.join("netd/uplink.json")
}

fn world() -> Result<String, UplinkError> {
    let (boot, namespace) = (
        Path::new("/proc/sys/kernel/random/boot_id"),
        Path::new("/proc/thread-self/ns/net"),
    );
    let id = fs::read_to_string(boot).map_err(on_file("read", boot))?;
    let inside = fs::read_link(namespace).map_err(on_file("read", namespace))?;
    Ok(format!("{} {}", id.trim(), inside.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_to_another_instance_is_read_as_it_was_written() {
        let switches = [(Family::V4, "eth0"), (Family::V6, "wlan0")].map(|(family, interface)| Switch {
            family,
            interface: interface.to_owned(),
        });
        let alias = format!("sandgate /run/a b {} {}", switches[0], switches[1]);
        assert_eq!(inherited(&alias), BTreeSet::from(switches));
        for foreign in [
            "sandgate /run/a",
            "+4",
            "+5:eth0",
            "+4:",
            "+4:../../all",
            "+4:a_name_of_too_many",
        ] {
            assert_eq!(inherited(foreign), BTreeSet::new(), "{foreign}");
        }
    }
}
