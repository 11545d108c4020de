//! The veth and the routes over it, in the node's namespace.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::PathBuf,
};

use ipnet::{IpNet, Ipv6Net};
use nix::net::if_::if_nametoindex;
use serde::Deserialize;

use super::{
    Place, UplinkError,
    names::{CANARY_PREFIX, HOST_MAC, Names, PREFIX, ROUTER_MAC, written},
    on_file,
};
use crate::{
    command,
    router::{
        RouterNamespace,
        pass::{self, HOP, HOP6},
    },
};

/// Longest alias that the kernel takes, in bytes (`IFALIASZ` of linux/if.h, its end included).
const ALIAS_MAX: usize = 255;

/// Longest prefix of IPv6 that is no range of a link.
const WIDE: u8 = 3;

/// An interface, as `ip -j link` prints it.
#[derive(Debug, Deserialize)]
pub(super) struct Link {
    ifindex: u32,
    pub(super) ifname: String,
    #[serde(default)]
    pub(super) ifalias: String,
    /// Index of its peer, which lies in another namespace.
    #[serde(default)]
    link_index: Option<u32>,
}

/// A route, as `ip -j route` prints it.
#[derive(Debug, Deserialize)]
struct Route {
    dst: String,
    #[serde(default)]
    dev: Option<String>,
    #[serde(default)]
    gateway: Option<String>,
    #[serde(default)]
    nexthops: Vec<NextHop>,
}

#[derive(Debug, Deserialize)]
struct NextHop {
    #[serde(default)]
    dev: Option<String>,
}

impl Route {
    fn devices(&self) -> impl Iterator<Item = &str> {
        let more = self.nexthops.iter().filter_map(|hop| hop.dev.as_deref());
        self.dev.as_deref().into_iter().chain(more)
    }

    /// Whether it leads further than the interface's own link.
    fn leads_on(&self) -> bool {
        // A tunnel has no gateway, and is the way to all that is public (2000::/3), or to a half of everything.
        let is_wide = prefix(&self.dst).is_some_and(|range| range.prefix_len() <= WIDE);
        self.dst == "default" || is_wide || self.gateway.is_some() || !self.nexthops.is_empty()
    }
}

/// The interfaces by which packets of sandboxes may leave the node, by family.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Ways {
    pub(super) ipv4: BTreeSet<String>,
    /// Those from which a route leads on: addresses on a link of the node's own are as public as any in IPv6, and are
    /// meant for the node and its neighbours.
    pub(super) ipv6: BTreeSet<String>,
    /// The others, and the private ranges on them that the operator has opened.
    pub(super) links6: BTreeMap<String, BTreeSet<Ipv6Net>>,
}

/// Makes the pair, or finds it.
pub(super) fn make(names: &Names, router: &RouterNamespace) -> Result<(), UplinkError> {
    if let Some(link) = find(&names.interface)? {
        if !names.own(&link.ifalias) {
            return Err(UplinkError::Clash(format!(
                "the interface {} belongs to somebody else ({})",
                names.interface, link.ifalias
            )));
        }
        let other_end = router.run(|| find(pass::INTERFACE))??;
        let paired = other_end.is_some_and(|other| {
            link.link_index == Some(other.ifindex) && other.link_index == Some(link.ifindex)
        });
        if paired {
            return Ok(());
        }
        remove(names)?;
    }
    if names.owner.len() > ALIAS_MAX {
        return Err(UplinkError::Clash(
            "the run directory's name is too long".to_owned(),
        ));
    }
    // One that lost its other end goes with it, so nothing of that name can be there.
    let (name, netns) = (&names.interface, router.path().display());
    let (host, inner) = (written(HOST_MAC), written(ROUTER_MAC));
    let interface = pass::INTERFACE;
    command::run(
        &[
            "ip",
            "link",
            "add",
            name,
            "address",
            &host,
            "type",
            "veth",
            "peer",
            "name",
            interface,
            "address",
            &inner,
            "netns",
            &netns.to_string(),
        ],
        "",
    )?;
    set_alias(name, &names.owner)
}

/// Sets the end up and leads the sandboxes' ranges to it. It gets no address: nothing can be said to it.
pub(super) fn connect(names: &Names, place: &Place, ipv6: bool) -> Result<(), UplinkError> {
    let (name, peer) = (&names.interface, written(ROUTER_MAC));
    command::run(
        &["ip", "-batch", "-"],
        &format!("link set {name} addrgenmode none\nlink set {name} up\n"),
    )?;
    let range6 = place.sandboxes6.filter(|_| ipv6).map(IpNet::from);
    for (family, hop, range) in [
        ("-4", HOP, Some(IpNet::from(place.sandboxes))),
        ("-6", HOP6, range6),
    ] {
        let Some(range) = range else { continue };
        if family == "-6" {
            let path = off_switch6(names);
            fs::write(&path, "0").map_err(on_file("write", &path))?;
        }
        let text = format!(
            "neighbour replace {hop} lladdr {peer} dev {name} nud permanent\n\
             route replace {range} via {hop} dev {name} onlink\n"
        );
        command::run(&["ip", family, "-batch", "-"], &text)?;
    }
    Ok(())
}

/// Takes IPv6 from the end, and with it the route to the sandboxes. Nothing to do is fine.
pub(super) fn disconnect6(names: &Names) -> Result<(), UplinkError> {
    let path = off_switch6(names);
    match fs::write(&path, "1") {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(on_file("write", &path)(error)),
        Ok(()) | Err(_) => Ok(()),
    }
}

fn off_switch6(names: &Names) -> PathBuf {
    PathBuf::from(format!(
        "/proc/sys/net/ipv6/conf/{}/disable_ipv6",
        names.interface
    ))
}

/// Removes both ends and with them the routes. Nothing to do is fine.
pub(super) fn remove(names: &Names) -> Result<(), UplinkError> {
    match find(&names.interface)? {
        Some(link) if names.own(&link.ifalias) => {
            command::run(&["ip", "link", "del", &names.interface], "")?;
            Ok(())
        }
        Some(_) | None => Ok(()),
    }
}

/// An interface's index in the calling thread's namespace.
pub(super) fn index(name: &str) -> Result<u32, UplinkError> {
    if_nametoindex(name).map_err(|errno| {
        UplinkError::Clash(format!(
            "there is no interface {name}: {}",
            io::Error::from(errno)
        ))
    })
}

/// The interface of that name.
pub(super) fn find(name: &str) -> Result<Option<Link>, UplinkError> {
    Ok(links()?.into_iter().find(|link| link.ifname == name))
}

/// The uplinks of other instances.
pub(super) fn others(names: &Names) -> Result<Vec<Link>, UplinkError> {
    let mut links = links()?;
    links.retain(|link| link.ifname.starts_with(PREFIX) && link.ifname != names.interface);
    Ok(links)
}

fn links() -> Result<Vec<Link>, UplinkError> {
    parsed(&command::run(&["ip", "-j", "link", "show"], "")?)
}

/// Replaces an interface's alias.
pub(super) fn set_alias(name: &str, alias: &str) -> Result<(), UplinkError> {
    command::run(&["ip", "link", "set", "dev", name, "alias", alias], "")?;
    Ok(())
}

/// Somebody else's route inside a range of sandboxes, or around it (but for a default), would lead answers elsewhere.
pub(super) fn refuse_clash(names: &Names, range: IpNet) -> Result<(), UplinkError> {
    let family = match range {
        IpNet::V4(_) => "-4",
        IpNet::V6(_) => "-6",
    };
    for route in routes(family)? {
        let Some(prefix) = prefix(&route.dst) else {
            continue;
        };
        let overlaps = prefix.prefix_len() > 0 && (prefix.contains(&range) || range.contains(&prefix));
        if let Some(device) = route
            .devices()
            .find(|device| overlaps && *device != names.interface)
        {
            return Err(UplinkError::Clash(format!(
                "the route {prefix} of interface {device} overlaps the sandboxes' range {range}"
            )));
        }
    }
    Ok(())
}

/// Every interface that a route leads to, but for loopback and what is ours; in IPv6 as [`Ways`] says.
pub(super) fn ways(names: &Names, opened6: &[Ipv6Net]) -> Result<Ways, UplinkError> {
    Ok(ways_of(names, (&routes("-4")?, &routes("-6")?), opened6))
}

fn ways_of(names: &Names, (four, six): (&[Route], &[Route]), opened6: &[Ipv6Net]) -> Ways {
    let foreign = |route: &Route| -> Vec<String> {
        let devices = route.devices().filter(|device| is_foreign(names, device));
        devices.map(str::to_owned).collect()
    };
    let ipv6: BTreeSet<String> = six
        .iter()
        .filter(|route| route.leads_on())
        .flat_map(foreign)
        .collect();
    let mut links6: BTreeMap<String, BTreeSet<Ipv6Net>> = BTreeMap::new();
    for route in six {
        let Some(IpNet::V6(on_link)) = prefix(&route.dst) else {
            continue;
        };
        let narrower = |opened: &Ipv6Net| {
            if opened.contains(&on_link) {
                Some(on_link)
            } else {
                on_link.contains(opened).then_some(*opened)
            }
        };
        let opened: BTreeSet<Ipv6Net> = opened6.iter().filter_map(narrower).collect();
        for device in foreign(route) {
            if !opened.is_empty() && !ipv6.contains(&device) {
                links6.entry(device).or_default().extend(&opened);
            }
        }
    }
    Ways {
        ipv4: four.iter().flat_map(foreign).collect(),
        ipv6,
        links6,
    }
}

/// Whether a route of IPv6 leads off the node's own links.
pub(super) fn leads_on6(names: &Names) -> Result<bool, UplinkError> {
    let leads = |route: &Route| route.leads_on() && route.devices().any(|device| is_foreign(names, device));
    Ok(routes("-6")?.iter().any(leads))
}

/// Neither loopback nor an instance's.
fn is_foreign(names: &Names, device: &str) -> bool {
    device != "lo"
        && device != names.interface
        && !device.starts_with(PREFIX)
        && !device.starts_with(CANARY_PREFIX)
}

fn routes(family: &str) -> Result<Vec<Route>, UplinkError> {
    let all = [
        "ip", "-j", family, "route", "show", "table", "all", "type", "unicast",
    ];
    parsed(&command::run(&all, "")?)
}

fn prefix(text: &str) -> Option<IpNet> {
    match text.parse::<IpNet>() {
        Ok(prefix) => Some(prefix),
        Err(_) => text.parse::<std::net::IpAddr>().ok().map(IpNet::from),
    }
}

fn parsed<T: for<'de> Deserialize<'de>>(text: &str) -> Result<Vec<T>, UplinkError> {
    // Of nothing it prints nothing.
    if text.trim().is_empty() {
        return Ok(Vec::new());
    }
    serde_json::from_str(text).map_err(|source| UplinkError::Printed {
        program: "ip",
        source,
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn read(printed: &str) -> Vec<Route> {
        parsed(printed).expect("routes")
    }

    #[test]
    fn by_ipv6_a_way_is_what_leads_on_and_a_link_only_where_the_operator_opened_it() {
        let names = Names::of(Path::new("/run/sandgate"));
        let own = format!(
            r#"{{"dst":"fd53::/64","gateway":"fe80::1","dev":"{}"}}"#,
            names.interface
        );
        let four = read(
            r#"[{"dst":"default","gateway":"192.0.2.1","dev":"eth0"},{"dst":"10.0.0.0/8","dev":"eth1"}]"#,
        );
        let six = read(&format!(
            r#"[{own},{{"dst":"default","gateway":"fe80::1","dev":"eth0"}},
                {{"dst":"2001:db8:1::/64","dev":"eth0"}},{{"dst":"2001:db8:2::/64","dev":"eth1"}},
                {{"dst":"fd00:5::/64","dev":"eth1"}},{{"dst":"fe80::/64","dev":"eth1"}},
                {{"dst":"2001:db8:3::/64","gateway":"2001:db8:2::1","dev":"eth2"}},
                {{"dst":"2001:db8:4::/64","dev":"eth3"}},{{"dst":"2000::/3","dev":"tun0"}},
                {{"dst":"2001:db8:5::/64","nexthops":[{{"gateway":"fe80::5","dev":"eth4"}}]}},
                {{"dst":"::1","dev":"lo"}}]"#
        ));
        let set = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<BTreeSet<_>>();
        let ways = ways_of(&names, (&four, &six), &[]);
        assert_eq!(ways.ipv4, set(&["eth0", "eth1"]));
        assert_eq!(ways.ipv6, set(&["eth0", "eth2", "eth4", "tun0"]));
        assert!(ways.links6.is_empty(), "{ways:?}");
        for (opened, there) in [("fd00::/8", "fd00:5::/64"), ("fd00:5::7/128", "fd00:5::7/128")] {
            let opened: Ipv6Net = opened.parse().expect("a range");
            let ways = ways_of(&names, (&four, &six), &[opened]);
            let there: Ipv6Net = there.parse().expect("a range");
            let expected = BTreeMap::from([("eth1".to_owned(), BTreeSet::from([there]))]);
            assert_eq!(ways.links6, expected, "{opened}");
            assert_eq!(ways.ipv6, set(&["eth0", "eth2", "eth4", "tun0"]));
        }
        let beside: Ipv6Net = "fd00:6::/64".parse().expect("a range");
        assert!(ways_of(&names, (&four, &six), &[beside]).links6.is_empty());
    }
}
