//! The sockets that face sandboxes, made inside the router namespace: transparent, so that a connection's
//! local address is the destination the sandbox chose, and marked, so that answers may go to the sandbox.
//! Owns their options; what is read from them belongs to [`crate::dns`] and [`crate::egress`].

mod destroy;

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, TcpListener, UdpSocket},
    os::fd::{AsFd, BorrowedFd},
};

use netd_common::{listener as place, mark};
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};

pub use destroy::destroy;

use crate::router::{GATEWAY, RouterError, RouterNamespace};

/// Port where redirected TCP connections arrive, on loopback: nothing outside netd can address it.
const TCP: u16 = 15001;
/// Where DNS arrives, over UDP and TCP.
const DNS: u16 = 15053;
/// Where DNS answers over UDP leave: the port must be the one that the sandbox asked.
const DNS_ANSWERS: u16 = 53;

const BACKLOG: i32 = 4096;
/// Bytes that the kernel may queue of DNS queries: enough for a burst of all sandboxes.
const DNS_QUEUE: usize = 4 << 20;

/// netd's sockets in the router namespace.
#[derive(Debug)]
pub struct Listeners {
    /// Those for IPv4.
    pub v4: Family,
    /// Those for IPv6; none on a kernel without it.
    pub v6: Option<Family>,
}

/// netd's sockets for one family of addresses.
#[derive(Debug)]
pub struct Family {
    /// Takes redirected TCP connections.
    pub tcp: TcpListener,
    /// Takes DNS queries and tells the address they were sent to.
    pub dns_udp: UdpSocket,
    /// Takes DNS connections.
    pub dns_tcp: TcpListener,
    /// Sends DNS answers from any address, port 53.
    pub dns_answers: UdpSocket,
}

/// A socket could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The namespace could not be entered.
    #[error(transparent)]
    Router(#[from] RouterError),
    /// The socket itself.
    #[error("cannot make the {what} socket in the router namespace: {source}")]
    Make {
        /// Which one.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

impl Listeners {
    /// Makes all of them.
    ///
    /// # Errors
    /// When the namespace cannot be entered or a socket cannot be made.
    pub fn open(router: &RouterNamespace) -> Result<Self, SocketError> {
        router.run(|| {
            let v6 = match Family::open(Ipv6Addr::LOCALHOST.into()) {
                Ok(sockets) => Some(sockets),
                Err(SocketError::Make { source, .. })
                    if source.raw_os_error() == Some(libc::EAFNOSUPPORT) =>
                {
                    None
                }
                Err(error) => return Err(error),
            };
            Ok(Self {
                v4: Family::open(Ipv4Addr::LOCALHOST.into())?,
                v6,
            })
        })?
    }

    /// Those that take packets, each with its index of [`netd_common::listener`].
    pub fn indexed(&self) -> Vec<(u32, BorrowedFd<'_>)> {
        let v4 = [
            (place::TCP, self.v4.tcp.as_fd()),
            (place::DNS_UDP, self.v4.dns_udp.as_fd()),
            (place::DNS_TCP, self.v4.dns_tcp.as_fd()),
        ];
        let v6 = self.v6.as_ref().map(|v6| {
            [
                (place::TCP6, v6.tcp.as_fd()),
                (place::DNS_UDP6, v6.dns_udp.as_fd()),
                (place::DNS_TCP6, v6.dns_tcp.as_fd()),
            ]
        });
        v4.into_iter().chain(v6.into_iter().flatten()).collect()
    }
}

impl Family {
    /// Makes them in this thread's namespace, for the family of `loopback`.
    fn open(loopback: IpAddr) -> Result<Self, SocketError> {
        let at = |port| SocketAddr::new(loopback, port);
        let failed = |what| move |source| SocketError::Make { what, source };
        Ok(Self {
            tcp: listener(at(TCP)).map_err(failed("TCP"))?,
            dns_udp: queries(at(DNS)).map_err(failed("DNS over UDP"))?,
            dns_tcp: listener(at(DNS)).map_err(failed("DNS over TCP"))?,
            dns_answers: datagrams(at(DNS_ANSWERS)).map_err(failed("DNS answer"))?.into(),
        })
    }
}

/// A TCP socket in the router namespace, bound to a free port of the gateway address, not yet connected:
/// the port must be known, and admitted, before the first packet.
///
/// # Errors
/// When the namespace cannot be entered or no port is free.
pub fn inward(router: &RouterNamespace) -> Result<(Socket, SocketAddrV4), SocketError> {
    let make = || -> io::Result<(Socket, SocketAddrV4)> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
        socket.set_tcp_nodelay(true)?;
        socket.set_keepalive(true)?;
        socket.bind(&SocketAddrV4::new(GATEWAY, 0).into())?;
        let local = socket
            .local_addr()?
            .as_socket_ipv4()
            .ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok((socket, local))
    };
    router.run(make)?.map_err(|source| SocketError::Make {
        what: "inward",
        source,
    })
}

fn listener(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = transparent(address, Type::STREAM, Protocol::TCP)?;
    socket.set_tcp_nodelay(true)?;
    socket.set_keepalive(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

fn queries(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = datagrams(address)?;
    match address {
        SocketAddr::V4(_) => setsockopt(&socket.as_fd(), sockopt::Ipv4OrigDstAddr, &true)?,
        SocketAddr::V6(_) => setsockopt(&socket.as_fd(), sockopt::Ipv6OrigDstAddr, &true)?,
    }
    // Without the privilege to go over the limit the default must do.
    let _limited = socket.set_recv_buffer_size(DNS_QUEUE);
    Ok(socket.into())
}

fn datagrams(address: SocketAddr) -> io::Result<Socket> {
    let socket = transparent(address, Type::DGRAM, Protocol::UDP)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

fn transparent(address: SocketAddr, kind: Type, protocol: Protocol) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), kind.nonblocking(), Some(protocol))?;
    socket.set_reuse_address(true)?;
    match address {
        SocketAddr::V4(_) => socket.set_ip_transparent_v4(true)?,
        SocketAddr::V6(_) => {
            socket.set_only_v6(true)?;
            socket.set_ip_transparent_v6(true)?;
        }
    }
    socket.set_mark(mark::NETD)?;
    Ok(socket)
}
