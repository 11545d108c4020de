//! The canary's endpoint: a network namespace without a name and a veth into the router namespace, made as
//! the local runtime makes a sandbox's.

use std::{
    fs::{self, File},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd as _, RawFd},
    thread,
};

use futures_util::TryStreamExt as _;
use nix::sched::{CloneFlags, setns, unshare};
use rtnetlink::{
    Handle, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder,
    packet_route::{
        link::{InfoData, InfoVeth},
        neighbour::NeighbourState,
    },
};
use sandgate_api::feed::Endpoint;

use crate::{
    command::{self, CommandError},
    router::{GATEWAY, GATEWAY6, RouterError, RouterNamespace},
    uplink::written,
};

const ROUTER_END: &str = "sgcanary";
const INNER_END: &str = "eth0";
const MAC: [u8; 6] = [0x02, 0x53, 0x47, 0x02, 0x00, 0x01];

/// The endpoint.
pub(super) struct Throwaway {
    namespace: File,
    endpoint: Endpoint,
}

/// It could not be made, used or removed.
#[derive(Debug, thiserror::Error)]
pub enum ThrowawayError {
    /// The router namespace.
    #[error(transparent)]
    Router(#[from] RouterError),
    /// A namespace or thread.
    #[error("{0}: {1}")]
    System(&'static str, #[source] io::Error),
    /// An interface, address, route or neighbour.
    #[error("{0}: {1}")]
    Netlink(&'static str, #[source] rtnetlink::Error),
    /// The same, of IPv6.
    #[error(transparent)]
    Command(#[from] CommandError),
}

pub(super) fn system(what: &'static str) -> impl Fn(io::Error) -> ThrowawayError {
    move |error| ThrowawayError::System(what, error)
}

pub(super) fn netlink(what: &'static str) -> impl Fn(rtnetlink::Error) -> ThrowawayError {
    move |error| ThrowawayError::Netlink(what, error)
}

impl Throwaway {
    /// Makes namespace and veth, both ends down.
    pub(super) fn make(
        router: &RouterNamespace,
        address: Ipv4Addr,
        address6: Option<Ipv6Addr>,
    ) -> Result<Self, ThrowawayError> {
        let namespace = new_namespace()?;
        let inner = namespace.as_raw_fd();
        let outer = (ROUTER_END, netd_common::GATEWAY_MAC);
        let ifindex = router.run(|| blocking(async |handle| pair(handle, outer, inner, MAC).await))??;
        let interface = ROUTER_END.to_owned();
        let endpoint = Endpoint {
            ifindex,
            interface,
            address,
            address6,
            mac: MAC,
            agent_port: 1,
        };
        Ok(Self { namespace, endpoint })
    }

    pub(super) fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Gives both ends what a sandbox's have: address, route, neighbour, up.
    pub(super) fn connect_up(&self, router: &RouterNamespace) -> Result<(), ThrowawayError> {
        let (address, address6) = (self.endpoint.address, self.endpoint.address6);
        self.inside(|| {
            switch_ipv6("all", address6.is_some())?;
            if let Some(address) = address6 {
                settle6(address, &GATEWAY6.to_string(), netd_common::GATEWAY_MAC)?;
            }
            settle(address, GATEWAY, netd_common::GATEWAY_MAC)
        })??;
        let index = self.endpoint.ifindex;
        router.run(|| {
            if let Some(address) = address6 {
                let inner = written(MAC);
                enable_ipv6(ROUTER_END)?;
                ipv6(&format!(
                    "link set {ROUTER_END} up\n\
                     neighbour replace {address} lladdr {inner} dev {ROUTER_END} nud permanent\n\
                     route add {address}/128 dev {ROUTER_END}\n"
                ))?;
            }
            blocking(async |handle| {
                up(handle, index).await?;
                neighbour(handle, index, address, &MAC).await?;
                let route = RouteMessageBuilder::<Ipv4Addr>::new()
                    .destination_prefix(address, 32)
                    .output_interface(index)
                    .build();
                handle
                    .route()
                    .add(route)
                    .execute()
                    .await
                    .map_err(netlink("the route to it"))
            })
        })?
    }

    /// Runs a closure inside the namespace.
    pub(super) fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, ThrowawayError> {
        on_thread_in(&self.namespace, work)
    }

    /// Removes everything.
    pub(super) fn remove(self, router: &RouterNamespace) -> Result<(), ThrowawayError> {
        let index = self.endpoint.ifindex;
        router.run(|| blocking(async |handle| remove(handle, index).await))?
    }
}

/// Makes a pair of interfaces, one here and one inside a namespace, in the place of a pair that an earlier netd left
/// behind. Gives the index of the one here.
pub(super) async fn pair(
    handle: &Handle,
    (outer, outer_mac): (&str, [u8; 6]),
    inside: RawFd,
    inner_mac: [u8; 6],
) -> Result<u32, ThrowawayError> {
    if let Ok(index) = index_of(handle, outer).await {
        remove(handle, index).await?;
    }
    let peer = LinkMessageBuilder::<LinkUnspec>::new()
        .name(INNER_END)
        .address(inner_mac.to_vec())
        .setns_by_fd(inside)
        .build();
    let pair = LinkVeth::new(outer, INNER_END)
        .address(outer_mac.to_vec())
        .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
        .build();
    let made = handle.link().add(pair).execute().await;
    made.map_err(netlink("making its interfaces"))?;
    index_of(handle, outer).await
}

/// Removes a pair by either end.
pub(super) async fn remove(handle: &Handle, index: u32) -> Result<(), ThrowawayError> {
    let removed = handle.link().del(index).execute().await;
    removed.map_err(netlink("removing its interfaces"))
}

/// Gives the inner end its address and the way to everything: by a next hop that is known beforehand. In its namespace.
pub(super) fn settle(address: Ipv4Addr, hop: Ipv4Addr, hop_mac: [u8; 6]) -> Result<(), ThrowawayError> {
    blocking(async |handle| {
        let index = index_of(handle, INNER_END).await?;
        let added = handle
            .address()
            .add(index, IpAddr::V4(address), 32)
            .execute()
            .await;
        added.map_err(netlink("its address"))?;
        up(handle, index).await?;
        neighbour(handle, index, hop, &hop_mac).await?;
        let route = RouteMessageBuilder::<Ipv4Addr>::new()
            .gateway(hop)
            .output_interface(index)
            .onlink()
            .build();
        let added = handle.route().add(route).execute().await;
        added.map_err(netlink("its route"))
    })
}

/// The same of IPv6.
pub(super) fn settle6(address: Ipv6Addr, hop: &str, hop_mac: [u8; 6]) -> Result<(), ThrowawayError> {
    let mac = written(hop_mac);
    enable_ipv6(INNER_END)?;
    ipv6(&format!(
        "link set {INNER_END} up\n\
         address add {address}/128 dev {INNER_END} nodad\n\
         neighbour replace {hop} lladdr {mac} dev {INNER_END} nud permanent\n\
         route add default via {hop} dev {INNER_END} onlink\n"
    ))
}

/// Gives an interface of the calling thread's namespace IPv6, without an address of the kernel's own.
pub(super) fn enable_ipv6(interface: &str) -> Result<(), ThrowawayError> {
    let path = format!("/proc/sys/net/ipv6/conf/{interface}/addr_gen_mode");
    // IN6_ADDR_GEN_MODE_NONE of linux/if_link.h.
    fs::write(path, "1").map_err(system("keeping an interface without an address"))?;
    switch_ipv6(interface, true)
}

/// Turns IPv6 on or off, where the kernel has it.
fn switch_ipv6(interface: &str, on: bool) -> Result<(), ThrowawayError> {
    let path = format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6");
    match fs::write(path, if on { "0" } else { "1" }) {
        Err(error) if on || error.kind() != io::ErrorKind::NotFound => {
            Err(system("switching IPv6 on or off")(error))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Runs lines of `ip -6` in the calling thread's namespace.
pub(super) fn ipv6(lines: &str) -> Result<(), ThrowawayError> {
    command::run(&["ip", "-6", "-batch", "-"], lines)?;
    Ok(())
}

pub(super) fn new_namespace() -> Result<File, ThrowawayError> {
    on_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET).map_err(io::Error::from)?;
        File::open("/proc/thread-self/ns/net")
    })
}

/// Runs a closure inside a namespace.
pub(super) fn on_thread_in<T: Send>(
    namespace: &File,
    work: impl FnOnce() -> T + Send,
) -> Result<T, ThrowawayError> {
    on_thread(|| {
        setns(namespace, CloneFlags::CLONE_NEWNET).map_err(io::Error::from)?;
        Ok(work())
    })
}

/// Runs a closure on a thread that may change its namespace, because it ends afterwards.
fn on_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> Result<T, ThrowawayError> {
    thread::scope(|scope| {
        let thread = thread::Builder::new()
            .name("canary".to_owned())
            .spawn_scoped(scope, work)
            .map_err(system("a thread"))?;
        let outcome = thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        outcome.map_err(system("its network namespace"))
    })
}

/// Runs netlink calls in the calling thread's namespace.
pub(super) fn blocking<T>(
    calls: impl AsyncFnOnce(&Handle) -> Result<T, ThrowawayError>,
) -> Result<T, ThrowawayError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(system("a runtime"))?;
    runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(system("a netlink socket"))?;
        tokio::select! {
            outcome = calls(&handle) => outcome,
            () = connection => Err(system("a netlink socket")(io::ErrorKind::BrokenPipe.into())),
        }
    })
}

pub(super) async fn index_of(handle: &Handle, name: &str) -> Result<u32, ThrowawayError> {
    let mut found = Box::pin(handle.link().get().match_name(name.to_owned()).execute());
    match found
        .try_next()
        .await
        .map_err(netlink("looking for an interface"))?
    {
        Some(link) => Ok(link.header.index),
        None => Err(system("looking for an interface")(io::ErrorKind::NotFound.into())),
    }
}

pub(super) async fn up(handle: &Handle, index: u32) -> Result<(), ThrowawayError> {
    let message = LinkMessageBuilder::<LinkUnspec>::new().index(index).up().build();
    handle
        .link()
        .set(message)
        .execute()
        .await
        .map_err(netlink("setting an interface up"))
}

pub(super) async fn neighbour(
    handle: &Handle,
    index: u32,
    address: Ipv4Addr,
    mac: &[u8; 6],
) -> Result<(), ThrowawayError> {
    handle
        .neighbours()
        .add(index, IpAddr::V4(address))
        .link_layer_address(mac)
        .state(NeighbourState::Permanent)
        .replace()
        .execute()
        .await
        .map_err(netlink("a neighbour"))
}
