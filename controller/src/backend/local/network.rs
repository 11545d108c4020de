//! Network namespaces and veth pairs, by netlink from threads that are used for nothing else.
//!
//! `setns` changes one thread for good. So each piece of work gets a thread of its own that ends with it; a
//! worker of tokio never leaves the node's namespace. A netlink socket belongs for life to the namespace in which
//! it was opened, so that one thread can hold one socket in each of two namespaces.

use std::{
    collections::{BTreeSet, HashMap},
    fs::{self, File, OpenOptions},
    future::Future,
    io,
    net::{Ipv4Addr, Ipv6Addr},
    os::{fd::AsRawFd as _, unix::fs::OpenOptionsExt as _},
    path::Path,
};

use futures_util::TryStreamExt as _;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
};
use rtnetlink::{
    Handle, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder,
    packet_route::{
        address::AddressHeaderFlags,
        link::{InfoData, InfoVeth, LinkAttribute, LinkFlags, LinkMessage},
        route::{RouteAddress, RouteAttribute, RouteMessage, RouteScope, RouteType},
    },
};
use tokio::{runtime::Runtime, sync::oneshot};

use super::{disk, record::Record};

/// Name of the sandbox's end.
const INSIDE: &str = "eth0";
/// The sandbox's only neighbour and gateway. Sits on the router namespace's `lo`.
pub(super) const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// The same for IPv6.
const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0x5347, 1);
/// Ethernet address of every router end.
const GATEWAY_MAC: [u8; 6] = [0x02, 0x53, 0x47, 0x00, 0x00, 0x01];
/// `lo` is the first interface of every namespace.
const LOOPBACK_INDEX: u32 = 1;
/// What every fresh namespace is set to: any port may be listened on, as in every container.
const SETTINGS: [(&str, &str); 1] = [("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0")];
/// The same where the sandbox has no IPv6 address.
const WITHOUT_IPV6: [(&str, &str); 2] = [
    ("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1"),
    ("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1"),
];
/// The same where it has one: the kernel makes no address of its own, believes no router and asks for none. The rest
/// of what it would say by itself ends with the flag NOARP of the interface.
const WITH_IPV6: [(&str, &str); 8] = [
    ("/proc/sys/net/ipv6/conf/all/disable_ipv6", "0"),
    ("/proc/sys/net/ipv6/conf/default/disable_ipv6", "0"),
    ("/proc/sys/net/ipv6/conf/default/accept_ra", "0"),
    ("/proc/sys/net/ipv6/conf/default/accept_redirects", "0"),
    ("/proc/sys/net/ipv6/conf/default/autoconf", "0"),
    // IN6_ADDR_GEN_MODE_NONE of linux/if_link.h: no link-local address.
    ("/proc/sys/net/ipv6/conf/default/addr_gen_mode", "1"),
    ("/proc/sys/net/ipv6/conf/default/dad_transmits", "0"),
    ("/proc/sys/net/ipv6/conf/default/router_solicitations", "0"),
];
/// Where the kernel's settings of IPv6 are.
const IPV6: &str = "/proc/sys/net/ipv6";

/// Runs blocking work that may change its thread's namespace.
async fn on_own_thread<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let (sender, result) = oneshot::channel();
    std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        // A caller that is gone does not stop the work.
        let _unheard = sender.send(work());
    })?;
    result
        .await
        .map_err(|_gone| io::Error::other("the network thread panicked"))?
}

/// Runs netlink requests to their end on this thread.
fn netlink<T>(work: impl AsyncFnOnce(&Runtime) -> io::Result<T>) -> io::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()?;
    runtime.block_on(work(&runtime))
}

/// A netlink socket in this thread's present namespace. Keep the handle while answers are awaited: without it
/// the connection ends, and a listing with it, as if it were complete.
fn connect(runtime: &Runtime) -> io::Result<Handle> {
    let (connection, handle, _unsolicited) = rtnetlink::new_connection()?;
    drop(runtime.spawn(connection));
    Ok(handle)
}

fn enter(namespace: &File) -> io::Result<()> {
    Ok(setns(namespace, CloneFlags::CLONE_NEWNET)?)
}

/// Gives a failed request a name and makes its errno an [`io::Error`].
async fn asked<T>(what: &str, request: impl Future<Output = Result<T, rtnetlink::Error>>) -> io::Result<T> {
    request.await.map_err(|error| match error {
        rtnetlink::Error::NetlinkError(message) => {
            let error = message.to_io();
            io::Error::new(error.kind(), format!("{what}: {error}"))
        }
        error => io::Error::other(format!("{what}: {error}")),
    })
}

/// Makes the sandbox's namespace and the veth pair, both ends down, no address. Returns the index of the router
/// end.
pub(super) async fn create(router: &Path, namespace: &Path, record: &Record) -> io::Result<u32> {
    let (router, namespace, record) = (router.to_owned(), namespace.to_owned(), record.clone());
    on_own_thread("sandbox-network", move || {
        let router = open_router(&router)?;
        netlink(async |runtime| {
            enter(&router)?;
            let outside = connect(runtime)?;
            unshare(CloneFlags::CLONE_NEWNET)?;
            keep(&namespace)?;
            let family: &[_] = match record.address6 {
                None => &WITHOUT_IPV6,
                Some(_) => &WITH_IPV6,
            };
            for (setting, value) in SETTINGS.iter().chain(family) {
                configure(setting, value)?;
            }
            let inside = File::open("/proc/thread-self/ns/net")?;
            let peer = LinkMessageBuilder::<LinkUnspec>::new()
                .name(INSIDE)
                .address(record.mac.to_vec())
                .setns_by_fd(inside.as_raw_fd())
                .build();
            let veth = LinkMessageBuilder::<LinkVeth>::new(&record.interface, INSIDE)
                .address(GATEWAY_MAC.to_vec())
                .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
                .build();
            asked("making the veth pair", outside.link().add(veth).execute()).await?;
            let index = index_of(&outside, &record.interface).await?;
            // The name has no room for the whole id.
            let alias = LinkUnspec::new_with_index(index)
                .alias(record.sandbox_id.as_str().to_owned())
                .build();
            asked("naming the veth pair", outside.link().set(alias).execute()).await?;
            Ok(index)
        })
    })
    .await
}

fn open_router(path: &Path) -> io::Result<File> {
    File::open(path).map_err(|error| {
        let message = format!(
            "the router namespace {} is not there: {error}; is netd running?",
            path.display()
        );
        io::Error::new(error.kind(), message)
    })
}

/// Binds this thread's namespace to a file, which keeps it alive.
fn keep(path: &Path) -> io::Result<()> {
    drop(
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o400)
            .open(path)?,
    );
    let none = None::<&str>;
    Ok(mount(
        Some("/proc/thread-self/ns/net"),
        path,
        none,
        MsFlags::MS_BIND,
        none,
    )?)
}

fn configure(setting: &str, value: &str) -> io::Result<()> {
    match fs::write(setting, value) {
        // A kernel without IPv6.
        Err(error) if error.kind() == io::ErrorKind::NotFound && setting.contains("/ipv6/") => Ok(()),
        Err(error) => Err(io::Error::new(error.kind(), format!("{setting}: {error}"))),
        Ok(()) => Ok(()),
    }
}

/// Gives the sandbox its address and routes and takes both ends up.
pub(super) async fn bring_up(router: &Path, namespace: &Path, record: &Record) -> io::Result<()> {
    let (router, namespace, record) = (router.to_owned(), namespace.to_owned(), record.clone());
    on_own_thread("sandbox-network", move || {
        let router = open_router(&router)?;
        let namespace = File::open(&namespace)?;
        netlink(async |runtime| {
            enter(&router)?;
            let outside = connect(runtime)?;
            if record.address6.is_some() {
                // Off by default in the router namespace.
                let settings = format!("{IPV6}/conf/{}", record.interface);
                configure(&format!("{settings}/addr_gen_mode"), "1")?;
                configure(&format!("{settings}/disable_ipv6"), "0")?;
            }
            enter(&namespace)?;
            let inside = connect(runtime)?;
            bring_up_inside(&inside, &record).await?;
            bring_up_outside(&outside, &record).await
        })
    })
    .await
}

async fn bring_up_inside(netlink: &Handle, record: &Record) -> io::Result<()> {
    let index = index_of(netlink, INSIDE).await?;
    take_up(netlink, LOOPBACK_INDEX).await?;
    let request = netlink.address().add(index, record.address.into(), 32);
    asked("adding the address", request.execute()).await?;
    if let Some(address) = record.address6 {
        // Every neighbour is known, so nobody needs to be asked; and the kernel joins no group of its own.
        let mut quiet = LinkUnspec::new_with_index(index).build();
        quiet.header.flags |= LinkFlags::Noarp;
        quiet.header.change_mask |= LinkFlags::Noarp;
        asked("silencing the interface", netlink.link().set(quiet).execute()).await?;
        let mut request = netlink.address().add(index, address.into(), 128);
        request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
        asked("adding the IPv6 address", request.execute()).await?;
    }
    take_up(netlink, index).await?;
    let gateway = netlink
        .neighbours()
        .add(index, GATEWAY.into())
        .link_layer_address(&GATEWAY_MAC);
    asked("adding the gateway", gateway.execute()).await?;
    let route = RouteMessageBuilder::<Ipv4Addr>::new()
        .gateway(GATEWAY)
        .output_interface(index)
        .onlink();
    let route = netlink.route().add(route.build()).execute();
    asked("adding the default route", route).await?;
    if record.address6.is_some() {
        let gateway = netlink
            .neighbours()
            .add(index, GATEWAY6.into())
            .link_layer_address(&GATEWAY_MAC);
        asked("adding the IPv6 gateway", gateway.execute()).await?;
        let route = RouteMessageBuilder::<Ipv6Addr>::new()
            .gateway(GATEWAY6)
            .output_interface(index)
            .onlink();
        let route = netlink.route().add(route.build()).execute();
        asked("adding the IPv6 default route", route).await?;
    }
    Ok(())
}

async fn bring_up_outside(netlink: &Handle, record: &Record) -> io::Result<()> {
    let index = record.ifindex;
    take_up(netlink, index).await?;
    let sandbox = netlink
        .neighbours()
        .add(index, record.address.into())
        .link_layer_address(&record.mac);
    asked("adding the sandbox as a neighbour", sandbox.execute()).await?;
    let route = RouteMessageBuilder::<Ipv4Addr>::new()
        .destination_prefix(record.address, 32)
        .output_interface(index)
        .scope(RouteScope::Link);
    let route = netlink.route().add(route.build()).execute();
    asked("adding the route to the sandbox", route).await?;
    if let Some(address) = record.address6 {
        let sandbox = netlink
            .neighbours()
            .add(index, address.into())
            .link_layer_address(&record.mac);
        asked("adding the sandbox as an IPv6 neighbour", sandbox.execute()).await?;
        let route = RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(address, 128)
            .output_interface(index);
        let route = netlink.route().add(route.build()).execute();
        asked("adding the IPv6 route to the sandbox", route).await?;
    }
    Ok(())
}

async fn take_up(netlink: &Handle, index: u32) -> io::Result<()> {
    let up = LinkUnspec::new_with_index(index).up().build();
    asked("taking an interface up", netlink.link().set(up).execute()).await
}

async fn index_of(netlink: &Handle, name: &str) -> io::Result<u32> {
    let links = netlink.link().get().match_name(name).execute();
    let mut links = std::pin::pin!(links);
    match asked("looking an interface up", links.try_next()).await? {
        Some(link) => Ok(link.header.index),
        None => Err(io::Error::new(
            io::ErrorKind::NotFound,
            format!("no interface `{name}`"),
        )),
    }
}

/// Takes the veth pair and the namespace away, however much of them there is.
pub(super) async fn destroy(router: &Path, namespace: &Path, interface: Option<String>) -> io::Result<()> {
    let (router, namespace) = (router.to_owned(), namespace.to_owned());
    on_own_thread("sandbox-network", move || {
        match (File::open(&router), interface) {
            (Ok(router), Some(interface)) => delete_link(&router, &interface)?,
            (Err(error), _) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            // Without the router namespace its ends of the pairs are gone too.
            (_, _) => {}
        }
        disk::unmount(&namespace)?;
        disk::remove(fs::remove_file(&namespace))
    })
    .await
}

fn delete_link(router: &File, interface: &str) -> io::Result<()> {
    netlink(async |runtime| {
        // A file that no namespace is bound to: the router namespace is gone.
        if enter(router).is_err() {
            return Ok(());
        }
        let outside = connect(runtime)?;
        match index_of(&outside, interface).await {
            Ok(index) => asked("deleting the veth pair", outside.link().del(index).execute()).await,
            Err(error) if absent(&error) => Ok(()),
            Err(error) => Err(error),
        }
    })
}

/// RTM_GETLINK by name answers ENODEV.
fn absent(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.to_string().contains("No such device")
}

/// Sandbox ids that interfaces in the router namespace belong to.
pub(super) async fn interfaces(router: &Path) -> io::Result<Vec<String>> {
    let router = router.to_owned();
    on_own_thread("router-links", move || {
        let router = match File::open(&router) {
            Ok(router) => router,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        netlink(async |runtime| {
            if enter(&router).is_err() {
                return Ok(Vec::new());
            }
            let outside = connect(runtime)?;
            let links = outside.link().get().execute();
            let mut links = std::pin::pin!(links);
            let mut owners = Vec::new();
            while let Some(link) = asked("listing interfaces", links.try_next()).await? {
                owners.extend(alias(link));
            }
            Ok(owners)
        })
    })
    .await
}

/// What crossed interfaces of the router namespace, by their indices: bytes that their sandboxes sent, and received. Of
/// one interface, or of all.
pub(super) async fn traffic(router: &Path, index: Option<u32>) -> io::Result<HashMap<u32, (u64, u64)>> {
    let router = router.to_owned();
    on_own_thread("router-traffic", move || {
        let router = open_router(&router)?;
        netlink(async |runtime| {
            enter(&router)?;
            let outside = connect(runtime)?;
            let asking = outside.link().get();
            let links = match index {
                Some(index) => asking.match_index(index),
                None => asking,
            }
            .execute();
            let mut links = std::pin::pin!(links);
            let mut found = HashMap::new();
            while let Some(link) = asked("counting traffic", links.try_next()).await? {
                let counted = link.attributes.iter().find_map(|attribute| match attribute {
                    // What a sandbox sends arrives at the router's end.
                    LinkAttribute::Stats64(counted) => Some((counted.rx_bytes, counted.tx_bytes)),
                    _ => None,
                });
                found.extend(counted.map(|counted| (link.header.index, counted)));
            }
            Ok(found)
        })
    })
    .await
}

/// Indices of the uplinks of all instances.
async fn uplinks(host: &Handle) -> io::Result<BTreeSet<u32>> {
    let links = host.link().get().execute();
    let mut links = std::pin::pin!(links);
    let mut found = BTreeSet::new();
    while let Some(link) = asked("listing interfaces", links.try_next()).await? {
        let is_uplink = link
            .attributes
            .iter()
            .any(|attribute| matches!(attribute, LinkAttribute::IfName(name) if name.starts_with(UPLINKS)));
        if is_uplink {
            found.insert(link.header.index);
        }
    }
    Ok(found)
}

fn alias(link: LinkMessage) -> Option<String> {
    link.attributes.into_iter().find_map(|attribute| match attribute {
        LinkAttribute::IfAlias(alias) => Some(alias),
        _ => None,
    })
}

/// How the interfaces begin over which netd's kernel pass leads the sandboxes' own ranges (netd/src/uplink).
const UPLINKS: &str = "sgup";

/// Whether this kernel has IPv6.
pub(super) fn has_ipv6() -> bool {
    Path::new(IPV6).exists()
}

/// Whether this process's namespace has an IPv6 default route that leads somewhere.
pub(super) async fn has_default_route6() -> io::Result<bool> {
    if !has_ipv6() {
        return Ok(false);
    }
    let all = RouteMessageBuilder::<Ipv6Addr>::new().build();
    let leads_out = |route: &RouteMessage| {
        route.header.destination_prefix_length == 0 && route.header.kind == RouteType::Unicast
    };
    Ok(routes(all).await?.iter().any(leads_out))
}

/// A route of this process's namespace that overlaps `range`, if there is one. Default routes do not count.
pub(super) async fn overlapping_route(range: IpNet) -> io::Result<Option<IpNet>> {
    let all = match range {
        IpNet::V4(_) => RouteMessageBuilder::<Ipv4Addr>::new().build(),
        IpNet::V6(_) => RouteMessageBuilder::<Ipv6Addr>::new().build(),
    };
    let routes = routes(all).await?;
    let clash = routes
        .iter()
        .filter_map(prefix)
        .find(|prefix| prefix.prefix_len() > 0 && (prefix.contains(&range) || range.contains(prefix)));
    Ok(clash)
}

/// The destination of a route.
fn prefix(route: &RouteMessage) -> Option<IpNet> {
    let length = route.header.destination_prefix_length;
    route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(address)) => {
            Ipv4Net::new(*address, length).ok().map(IpNet::V4)
        }
        RouteAttribute::Destination(RouteAddress::Inet6(address)) => {
            Ipv6Net::new(*address, length).ok().map(IpNet::V6)
        }
        _ => None,
    })
}

/// The routes of this process's namespace, of the family that is asked for, but for those over uplinks: our own leads
/// here, and netd does without one where another instance has the range.
async fn routes(asked_for: RouteMessage) -> io::Result<Vec<RouteMessage>> {
    on_own_thread("host-routes", move || {
        netlink(async |runtime| {
            let host = connect(runtime)?;
            let uplinks = uplinks(&host).await?;
            let listed = host.route().get(asked_for).execute();
            let mut routes: Vec<RouteMessage> = asked("listing routes", listed.try_collect()).await?;
            routes.retain(|route| {
                let over_uplink =
                    |attribute: &RouteAttribute| matches!(attribute, RouteAttribute::Oif(index) if uplinks.contains(index));
                !route.attributes.iter().any(over_uplink)
            });
            Ok(routes)
        })
    })
    .await
}
