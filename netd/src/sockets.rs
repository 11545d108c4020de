//! The sockets that face sandboxes, made inside the router namespace: transparent, so that a connection's
//! local address is the destination the sandbox chose, and marked, so that answers may go to the sandbox.
//! Owns their options; what is read from them belongs to [`crate::dns`] and [`crate::egress`].

mod destroy;

use std::{
    io,
    net::{Ipv4Addr, SocketAddrV4, TcpListener, UdpSocket},
    os::fd::AsFd,
};

use netd_common::mark;
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};

pub use destroy::destroy;

use crate::router::{GATEWAY, RouterError, RouterNamespace};

/// Where redirected TCP connections arrive. Nothing outside netd can address it.
const TCP: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 15001);
/// Where DNS arrives, over UDP and TCP.
const DNS: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 15053);
/// Where DNS answers over UDP leave: the port must be the one that the sandbox asked.
const DNS_ANSWERS: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 53);

const BACKLOG: i32 = 4096;
/// Bytes that the kernel may queue of DNS queries: enough for a burst of all sandboxes.
const DNS_QUEUE: usize = 4 << 20;

/// netd's sockets in the router namespace.
#[derive(Debug)]
pub struct Listeners {
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
            Ok(Self {
                tcp: listener(TCP).map_err(|source| SocketError::Make { what: "TCP", source })?,
                dns_udp: queries(DNS).map_err(|source| SocketError::Make {
                    what: "DNS over UDP",
                    source,
                })?,
                dns_tcp: listener(DNS).map_err(|source| SocketError::Make {
                    what: "DNS over TCP",
                    source,
                })?,
                dns_answers: datagrams(DNS_ANSWERS)
                    .map_err(|source| SocketError::Make {
                        what: "DNS answer",
                        source,
                    })?
                    .into(),
            })
        })?
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

fn listener(address: SocketAddrV4) -> io::Result<TcpListener> {
    let socket = transparent(Type::STREAM, Protocol::TCP)?;
    socket.set_tcp_nodelay(true)?;
    socket.set_keepalive(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

fn queries(address: SocketAddrV4) -> io::Result<UdpSocket> {
    let socket = datagrams(address)?;
    setsockopt(&socket.as_fd(), sockopt::Ipv4OrigDstAddr, &true)?;
    // Without the privilege to go over the limit the default must do.
    let _limited = socket.set_recv_buffer_size(DNS_QUEUE);
    Ok(socket.into())
}

fn datagrams(address: SocketAddrV4) -> io::Result<Socket> {
    let socket = transparent(Type::DGRAM, Protocol::UDP)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

fn transparent(kind: Type, protocol: Protocol) -> io::Result<Socket> {
    let socket = Socket::new(Domain::IPV4, kind.nonblocking(), Some(protocol))?;
    socket.set_reuse_address(true)?;
    socket.set_ip_transparent_v4(true)?;
    socket.set_mark(mark::NETD)?;
    Ok(socket)
}
