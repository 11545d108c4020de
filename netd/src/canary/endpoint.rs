//! The canary's endpoint: a network namespace without a name and a veth into the router namespace, made as
//! the local runtime makes a sandbox's.

use std::{
    fs::File,
    io,
    net::{IpAddr, Ipv4Addr},
    os::fd::AsRawFd as _,
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

use crate::router::{GATEWAY, RouterError, RouterNamespace};

const ROUTER_END: &str = "sgcanary";
pub(super) const INNER_END: &str = "eth0";
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
}

pub(super) fn system(what: &'static str) -> impl Fn(io::Error) -> ThrowawayError {
    move |error| ThrowawayError::System(what, error)
}

pub(super) fn netlink(what: &'static str) -> impl Fn(rtnetlink::Error) -> ThrowawayError {
    move |error| ThrowawayError::Netlink(what, error)
}

impl Throwaway {
    /// Makes namespace and veth, both ends down.
    pub(super) fn make(router: &RouterNamespace, address: Ipv4Addr) -> Result<Self, ThrowawayError> {
        let namespace = new_namespace()?;
        let inner = namespace.as_raw_fd();
        let ifindex = router.run(|| {
            blocking(async |handle| {
                // One that an earlier netd left behind.
                if let Ok(index) = index_of(handle, ROUTER_END).await {
                    handle
                        .link()
                        .del(index)
                        .execute()
                        .await
                        .map_err(netlink("removing an old canary"))?;
                }
                let peer = LinkMessageBuilder::<LinkUnspec>::new()
                    .name(INNER_END)
                    .address(MAC.to_vec())
                    .setns_by_fd(inner)
                    .build();
                let pair = LinkVeth::new(ROUTER_END, INNER_END)
                    .address(netd_common::GATEWAY_MAC.to_vec())
                    .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
                    .build();
                handle
                    .link()
                    .add(pair)
                    .execute()
                    .await
                    .map_err(netlink("making its interfaces"))?;
                index_of(handle, ROUTER_END).await
            })
        })??;
        let interface = ROUTER_END.to_owned();
        let endpoint = Endpoint {
            ifindex,
            interface,
            address,
            address6: None,
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
        let address = self.endpoint.address;
        self.inside(|| {
            std::fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1")
                .or_else(|error| {
                    if error.kind() == io::ErrorKind::NotFound {
                        Ok(())
                    } else {
                        Err(error)
                    }
                })
                .map_err(system("switching IPv6 off"))?;
            blocking(async |handle| {
                let index = index_of(handle, INNER_END).await?;
                let addresses = handle.address();
                addresses
                    .add(index, IpAddr::V4(address), 32)
                    .execute()
                    .await
                    .map_err(netlink("its address"))?;
                up(handle, index).await?;
                neighbour(handle, index, GATEWAY, &netd_common::GATEWAY_MAC).await?;
                let route = RouteMessageBuilder::<Ipv4Addr>::new()
                    .gateway(GATEWAY)
                    .output_interface(index)
                    .onlink()
                    .build();
                handle
                    .route()
                    .add(route)
                    .execute()
                    .await
                    .map_err(netlink("its route"))
            })
        })??;
        let index = self.endpoint.ifindex;
        router.run(|| {
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
        router.run(|| {
            blocking(async |handle| {
                handle
                    .link()
                    .del(index)
                    .execute()
                    .await
                    .map_err(netlink("removing its interfaces"))
            })
        })?
    }
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
