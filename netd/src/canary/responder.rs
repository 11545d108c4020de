//! Who answers the canary that leaves by the kernel: a network namespace without a name, behind the node's own as any
//! server of the internet is, but joined to it by a veth, so that no packet leaves the node.
//!
//! It has one documentation address (RFC 5737, RFC 3849) that differs between instances, and the node a route to it for
//! as long as this lives.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr},
    os::fd::AsRawFd as _,
    time::Duration,
};

use rtnetlink::{Handle, RouteMessageBuilder};
use socket2::{Domain, Socket, Type};

use super::endpoint::{
    ThrowawayError, blocking, enable_ipv6, index_of, ipv6, neighbour, netlink, new_namespace, on_thread_in,
    pair, remove, settle, settle6, system, up,
};
use crate::{
    router::pass::HOP6,
    uplink::{Names, written},
};

const MAC: [u8; 6] = [0x02, 0x53, 0x47, 0x04, 0x00, 0x01];
const NODE_MAC: [u8; 6] = [0x02, 0x53, 0x47, 0x04, 0x00, 0x02];
/// The responder's next hop; on no interface, only a static neighbour.
const HOP: Ipv4Addr = Ipv4Addr::new(169, 254, 83, 71);
/// Connections that wait to be answered.
const BACKLOG: i32 = 16;
/// Addresses that are tried: one may be in use.
const TRIES: u32 = 16;

/// The responder.
pub(super) struct Responder {
    namespace: File,
    interface: String,
    listener: Socket,
    /// Where it listens.
    pub(super) at: SocketAddr,
}

impl Responder {
    /// Makes it, listening on `port` of an address of one family. Call it in the node's own namespace.
    pub(super) fn make(
        names: &Names,
        port: u16,
        patience: Duration,
        by_ipv6: bool,
    ) -> Result<Self, ThrowawayError> {
        let namespace = new_namespace()?;
        let (inner, interface) = (namespace.as_raw_fd(), names.canary.clone());
        let address = blocking(async |handle| {
            let index = pair(handle, (&interface, NODE_MAC), inner, MAC).await?;
            let led = if by_ipv6 {
                lead6(&interface, names.number).map(IpAddr::V6)
            } else {
                up(handle, index).await?;
                lead(handle, index, names.number).await.map(IpAddr::V4)
            };
            if led.is_err() {
                remove(handle, index).await?;
            }
            led
        })?;
        let at = SocketAddr::new(address, port);
        let listener = on_thread_in(&namespace, || listen(at, patience));
        let responder = Self {
            namespace,
            interface,
            listener: match listener {
                Ok(Ok(listener)) => listener,
                Ok(Err(error)) | Err(error) => {
                    Self::unlink(&names.canary)?;
                    return Err(error);
                }
            },
            at,
        };
        // Its answers come in by this interface, and are forwarded.
        match fs::write(switch(&responder.interface, by_ipv6), "1") {
            Ok(()) => Ok(responder),
            // Of an older kernel: then the whole node forwards IPv6, or the uplink would not have it.
            Err(error) if by_ipv6 && error.kind() == io::ErrorKind::NotFound => Ok(responder),
            Err(error) => {
                responder.remove()?;
                Err(system("letting the responder's answers through")(error))
            }
        }
    }

    /// Answers connections with the word, but for those from the forbidden address, until [`Self::end`] or until there
    /// is none for a while: programs of the node may come first. Says from where the last came, or the forbidden one.
    pub(super) fn answer(&self, word: [u8; 16], not_from: IpAddr) -> io::Result<IpAddr> {
        let mut last = None;
        loop {
            let (stream, from) = match self.listener.accept() {
                Ok(accepted) => accepted,
                Err(error) => return last.ok_or(error),
            };
            let from = from
                .as_socket()
                .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?
                .ip();
            if from == not_from {
                return Ok(from);
            }
            last = Some(from);
            // Who has gone already was not the canary.
            let _gone = std::net::TcpStream::from(stream).write_all(&word);
        }
    }

    /// Nobody is answered any more.
    pub(super) fn end(&self) -> io::Result<()> {
        self.listener.shutdown(Shutdown::Both)
    }

    /// Removes everything.
    pub(super) fn remove(self) -> Result<(), ThrowawayError> {
        drop((self.listener, self.namespace));
        Self::unlink(&self.interface)
    }

    fn unlink(interface: &str) -> Result<(), ThrowawayError> {
        blocking(async |handle| {
            let index = index_of(handle, interface).await?;
            remove(handle, index).await
        })
    }
}

/// Leads an address to the responder that leads nowhere else.
async fn lead(handle: &Handle, index: u32, number: u32) -> Result<Ipv4Addr, ThrowawayError> {
    let mut refused = None;
    for attempt in 0..TRIES {
        // 192.0.2.1 to 192.0.2.254.
        let last = u8::try_from(number.wrapping_add(attempt) % 254 + 1).unwrap_or(1);
        let address = Ipv4Addr::new(192, 0, 2, last);
        let route = RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(address, 32)
            .output_interface(index)
            .build();
        match handle.route().add(route).execute().await {
            Ok(()) => {
                neighbour(handle, index, address, &MAC).await?;
                return Ok(address);
            }
            Err(error) => refused = Some(error),
        }
    }
    Err(refused.map_or_else(
        || system("the route to the responder")(io::ErrorKind::NotFound.into()),
        netlink("the route to the responder"),
    ))
}

/// The same by IPv6; sets the interface up.
fn lead6(interface: &str, number: u32) -> Result<Ipv6Addr, ThrowawayError> {
    enable_ipv6(interface)?;
    let mac = written(MAC);
    let mut refused = None;
    for attempt in 0..TRIES {
        // 2001:db8:5347::/96.
        let last = u128::from(number.wrapping_add(attempt));
        let address = Ipv6Addr::from_bits(0x2001_0db8_5347 << 80 | last);
        let led = ipv6(&format!(
            "link set {interface} up\n\
             route add {address}/128 dev {interface}\n\
             neighbour replace {address} lladdr {mac} dev {interface} nud permanent\n"
        ));
        match led {
            Ok(()) => return Ok(address),
            Err(error) => refused = Some(error),
        }
    }
    Err(refused.unwrap_or_else(|| system("the route to the responder")(io::ErrorKind::NotFound.into())))
}

/// What lets an interface's packets be forwarded.
fn switch(interface: &str, by_ipv6: bool) -> String {
    if by_ipv6 {
        format!("/proc/sys/net/ipv6/conf/{interface}/force_forwarding")
    } else {
        format!("/proc/sys/net/ipv4/conf/{interface}/forwarding")
    }
}

/// In the responder's namespace.
fn listen(at: SocketAddr, patience: Duration) -> Result<Socket, ThrowawayError> {
    match at.ip() {
        IpAddr::V4(address) => settle(address, HOP, NODE_MAC)?,
        IpAddr::V6(address) => settle6(address, HOP6, NODE_MAC)?,
    }
    let open = || -> io::Result<Socket> {
        let socket = Socket::new(Domain::for_address(at), Type::STREAM, None)?;
        socket.bind(&at.into())?;
        socket.listen(BACKLOG)?;
        // Of accept(2) too, see socket(7).
        socket.set_read_timeout(Some(patience))?;
        Ok(socket)
    };
    open().map_err(system("the responder's socket"))
}
