//! Opens the far half of an admitted flow, from the node's own namespace. Owns: the last look at the
//! destination, which catches what became the node's own a moment ago. Dials only the address the sandbox
//! chose and netd admitted; resolves nothing.

use std::{
    net::{IpAddr, SocketAddr, SocketAddrV4},
    sync::Arc,
    time::Duration,
};

use futures_util::TryStreamExt as _;
use ipnet::Ipv4Net;
use rtnetlink::{RouteMessageBuilder, packet_route::route::RouteType};
use sandgate_daemon::tasks::Tasks;
use sandgate_policy::{Platform, Reason};
use sandgate_relay::dial::{self, DialError, Permitted};
use tokio::net::TcpStream;

use crate::{nodeaddr::NodeAddresses, sandbox::Admitted};

/// Time for the destination to answer.
const CONNECT_TIME: Duration = Duration::from_secs(10);

/// Opens connections to the world.
pub struct Dialer {
    platform: Arc<Platform>,
    node: NodeAddresses,
    sandboxes: Ipv4Net,
    routes: rtnetlink::Handle,
}

/// Why a flow has no far half.
#[derive(Debug, thiserror::Error)]
pub enum NotDialled {
    /// Nobody may reach the destination.
    #[error("{0} is an address of this node or its sandboxes")]
    Ours(SocketAddrV4),
    /// There is no way to it, or the routes could not be read.
    #[error("no route to {to}: {source}")]
    NoRoute {
        /// Where to.
        to: SocketAddrV4,
        /// What the kernel said.
        source: rtnetlink::Error,
    },
    /// The connection.
    #[error(transparent)]
    Dial(#[from] DialError),
}

impl NotDialled {
    /// The reason for the audit record.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Ours(_) | Self::Dial(DialError::Forbidden(_) | DialError::Local(_)) => {
                Reason::PlatformDenied
            }
            Self::NoRoute { .. } | Self::Dial(DialError::TimedOut { .. } | DialError::Connect { .. }) => {
                Reason::UpstreamUnreachable
            }
        }
    }
}

impl Dialer {
    /// A dialer with its own view of the node's routes.
    ///
    /// # Errors
    /// When the netlink socket cannot be opened.
    pub fn open(
        tasks: &Tasks,
        platform: Arc<Platform>,
        node: NodeAddresses,
        sandboxes: Ipv4Net,
    ) -> std::io::Result<Self> {
        let (connection, routes, _) = rtnetlink::new_connection()?;
        tasks.spawn("netlink routes", connection);
        Ok(Self {
            platform,
            node,
            sandboxes,
            routes,
        })
    }

    /// Connects to the destination of an admitted flow.
    ///
    /// # Errors
    /// See [`NotDialled`].
    pub async fn dial(&self, _leave: &Admitted, to: SocketAddrV4) -> Result<TcpStream, NotDialled> {
        let permitted = Permitted::check(&self.platform, SocketAddr::V4(to))?;
        if self.node.contains(*to.ip()) || self.sandboxes.contains(to.ip()) {
            return Err(NotDialled::Ours(to));
        }
        self.check_route(to).await?;
        Ok(dial::connect(permitted, CONNECT_TIME).await?)
    }

    /// The kernel's own opinion: only a unicast route leads off this node.
    async fn check_route(&self, to: SocketAddrV4) -> Result<(), NotDialled> {
        let asked = RouteMessageBuilder::<std::net::Ipv4Addr>::new()
            .destination_prefix(*to.ip(), 32)
            .build();
        let mut answers = Box::pin(self.routes.route().get(asked).execute());
        match answers
            .try_next()
            .await
            .map_err(|source| NotDialled::NoRoute { to, source })?
        {
            Some(route) if route.header.kind == RouteType::Unicast => Ok(()),
            Some(_) | None => Err(NotDialled::Ours(to)),
        }
    }
}

/// The peer's IPv4 address of an accepted connection.
pub(super) fn v4(address: SocketAddr) -> Option<SocketAddrV4> {
    match address.ip() {
        IpAddr::V4(ip) => Some(SocketAddrV4::new(ip, address.port())),
        IpAddr::V6(_) => None,
    }
}
