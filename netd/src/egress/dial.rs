//! Opens the far half of an admitted flow, from the node's own namespace. Owns: the last look at the
//! destination, which catches what became the node's own a moment ago. Dials only the address the sandbox
//! chose and netd admitted; resolves nothing.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use ipnet::IpNet;
use rtnetlink::packet_route::route::RouteType;
use sandgate_policy::{Platform, Reason, faces};
use sandgate_relay::dial::{self, DialError, Permitted};
use tokio::net::TcpStream;

use super::route::Routes;
use crate::{nodeaddr::NodeAddresses, sandbox::Admitted};

/// Time for the destination to answer.
const CONNECT_TIME: Duration = Duration::from_secs(10);

/// Opens connections to the world.
pub struct Dialer {
    platform: Arc<Platform>,
    node: NodeAddresses,
    /// Addresses of sandboxes, of either family.
    sandboxes: Vec<IpNet>,
    routes: Routes,
}

/// Why a flow has no far half.
#[derive(Debug, thiserror::Error)]
pub enum NotDialled {
    /// Nobody may reach the destination.
    #[error("{0} is an address of this node or its sandboxes")]
    Ours(SocketAddr),
    /// An IPv4 address in the clothes of IPv6: sockets understand it, and no packet should bear it (RFC 4291 2.5.5.2).
    #[error("{0} is an IPv4 address written as one of IPv6")]
    Mapped(SocketAddr),
    /// There is no way to it, or the routes could not be read.
    #[error("no route to {to}: {source}")]
    NoRoute {
        /// Where to.
        to: SocketAddr,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The connection.
    #[error(transparent)]
    Dial(#[from] DialError),
}

impl NotDialled {
    /// The reason for the audit record.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Ours(_) | Self::Mapped(_) | Self::Dial(DialError::Forbidden(_) | DialError::Local(_)) => {
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
        platform: Arc<Platform>,
        node: NodeAddresses,
        sandboxes: Vec<IpNet>,
    ) -> std::io::Result<Self> {
        Ok(Self {
            platform,
            node,
            sandboxes,
            routes: Routes::open()?,
        })
    }

    /// Connects to the destination of an admitted flow.
    ///
    /// # Errors
    /// See [`NotDialled`].
    pub async fn dial(&self, _leave: &Admitted, to: SocketAddr) -> Result<TcpStream, NotDialled> {
        let permitted = self.check(to)?;
        // The kernel's own opinion: only a unicast route leads off this node.
        match self.routes.kind(to.ip()) {
            Ok(RouteType::Unicast) => Ok(dial::connect(permitted, CONNECT_TIME).await?),
            Ok(_) => Err(NotDialled::Ours(to)),
            Err(source) => Err(NotDialled::NoRoute { to, source }),
        }
    }

    /// What is known without asking the kernel.
    fn check(&self, to: SocketAddr) -> Result<Permitted, NotDialled> {
        let permitted = Permitted::check(&self.platform, to)?;
        // The route would be looked up in one family and taken in the other.
        if to.ip().to_canonical() != to.ip() {
            return Err(NotDialled::Mapped(to));
        }
        let is_ours = |face: IpAddr| {
            self.node.contains(face) || self.sandboxes.iter().any(|range| range.contains(&face))
        };
        if faces(to.ip()).any(is_ours) {
            return Err(NotDialled::Ours(to));
        }
        Ok(permitted)
    }
}

#[cfg(test)]
mod tests {
    use sandgate_policy::PrivateException;

    use super::*;

    #[test]
    fn an_address_is_dialled_under_one_face_and_never_a_sandbox() {
        let opened = PrivateException::parse_list("10.0.0.0/8:*,[fd00::]/8:*").expect("exceptions");
        let sandboxes = ["10.213.0.0/16", "fd53:4700::/64"].map(|range| range.parse().expect("a range"));
        let platform = Arc::new(Platform::new(opened));
        let dialer = Dialer::open(platform, NodeAddresses::default(), sandboxes.to_vec()).expect("a socket");
        let check = |to: &str| dialer.check(to.parse().expect("an address"));
        for to in [
            "203.0.113.10:443",
            "[2001:db8::10]:443",
            "10.0.0.5:443",
            "[fd00::5]:443",
        ] {
            assert!(check(to).is_ok(), "{to}");
        }
        // Sandboxes, whatever the operator opened: 10.213.0.7 also by NAT64 and 6to4.
        for to in [
            "10.213.0.7:443",
            "[fd53:4700::7]:443",
            "[64:ff9b::ad5:7]:443",
            "[2002:ad5:7::1]:443",
        ] {
            assert!(check(to).is_err(), "{to}");
        }
        assert!(matches!(
            check("[::ffff:203.0.113.10]:443"),
            Err(NotDialled::Mapped(_))
        ));
        assert!(matches!(check("[fe80::1]:443"), Err(NotDialled::Dial(_))));
    }
}
