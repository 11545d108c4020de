//! Every packet on the link between node and internet, as the internet's end sees it.
//!
//! This is the judge of what got out: an attacker's program may believe anything.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket},
    os::fd::{AsRawFd as _, OwnedFd},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::{
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, setsockopt, socket,
            sockopt::{RcvBufForce, ReceiveTimeout},
        },
        time::{TimeVal, TimeValLike as _},
    },
};

use crate::{lock, namespace::Namespace, wait};

/// `PACKET_OUTGOING` of packet(7).
const OUTGOING: u8 = 4;
/// Bytes of a frame that are looked at; the rest is counted, not kept.
const SNAPSHOT: usize = 2048;
/// Longest wait for a mark of its own.
const MARKED: Duration = Duration::from_secs(60);
/// Longer than it takes to send a segment again that was lost.
const REST: Duration = Duration::from_millis(400);
/// The port of the packets that mark a moment, on the gateway.
const MARK_PORT: u16 = 9;

/// Protocol numbers of IP.
pub mod protocol {
    /// Internet control messages.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// Control messages of IPv6.
    pub const ICMPV6: u8 = 58;
}

/// An IP packet on the link.
#[derive(Debug, Clone)]
pub struct Packet {
    /// When it was seen.
    pub at: Instant,
    /// The node sent it (else the internet did).
    pub from_node: bool,
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// IP protocol number.
    pub protocol: u8,
    /// Of TCP and UDP, else 0.
    pub source_port: u16,
    /// Of TCP and UDP, else 0.
    pub destination_port: u16,
    /// A TCP segment that asks for a connection.
    pub opens: bool,
    /// What follows the headers, its first 2 KiB.
    pub payload: Vec<u8>,
}

/// The recorder.
pub struct Capture {
    packets: Arc<Mutex<Vec<Packet>>>,
    node: Arc<Namespace>,
    gateway: Ipv4Addr,
    marks: AtomicU64,
}

/// A moment in the capture; the default is its beginning.
#[derive(Debug, Clone, Copy, Default)]
pub struct Mark(usize);

impl Capture {
    /// Records what passes `interface` (an index) of the internet. `gateway` is the internet's end of the
    /// link, to which the node can send.
    pub(crate) fn start(
        internet: &Namespace,
        interface: usize,
        node: Arc<Namespace>,
        gateway: Ipv4Addr,
    ) -> Result<Self> {
        let socket = internet.run(|| {
            socket(
                AddressFamily::Packet,
                SockType::Raw,
                SockFlag::SOCK_CLOEXEC,
                SockProtocol::EthAll,
            )
        });
        let socket = socket.context("a packet socket")?;
        // A burst must not be lost: a lost packet would be a leak unseen.
        setsockopt(&socket, RcvBufForce, &(32 << 20)).context("the capture's buffer")?;
        let packets = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::downgrade(&packets);
        // The socket keeps the namespace, so it must not outlive the capture: look up now and then.
        let pause = TimeVal::milliseconds(100);
        setsockopt(&socket, ReceiveTimeout, &pause).context("the capture's timeout")?;
        thread::Builder::new().name("capture".to_owned()).spawn(move || {
            record(&socket, interface, |packet| {
                let Some(seen) = seen.upgrade() else { return false };
                lock(&seen).extend(packet);
                true
            });
        })?;
        Ok(Self {
            packets,
            node,
            gateway,
            marks: AtomicU64::new(0),
        })
    }

    /// This moment: everything the node has sent until now comes before it.
    pub fn mark(&self) -> Mark {
        let text = format!("mark {}", self.marks.fetch_add(1, Ordering::Relaxed));
        let target = (self.gateway, MARK_PORT);
        let bytes = text.clone().into_bytes();
        self.node.run(move || {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).expect("a socket on the node");
            socket.send_to(&bytes, target).expect("the link is up");
        });
        wait::until("the capture sees its own mark", MARKED, || {
            lock(&self.packets)
                .iter()
                .position(|packet| packet.payload == text.as_bytes())
                .map(|index| Mark(index + 1))
        })
    }

    /// A moment before which the node has sent nothing for a while: what earlier connections still had to say is said.
    pub fn mark_at_rest(&self) -> Mark {
        wait::until("the node sends nothing", MARKED, || {
            let mark = self.mark();
            thread::sleep(REST);
            self.sent_since(mark).is_empty().then_some(mark)
        })
    }

    /// Everything the node sent up to this moment, which is then forgotten: for runs so long that it would not fit into
    /// memory. Marks made before mean nothing any more.
    pub fn take(&self) -> Vec<Packet> {
        let end = self.mark();
        let mut packets: Vec<Packet> = lock(&self.packets).drain(..end.0).collect();
        packets.retain(|packet| packet.from_node && !packet.is_housekeeping());
        packets
    }

    /// What the node sent since `mark`, up to this moment. Neighbour discovery and the like are left out.
    pub fn sent_since(&self, mark: Mark) -> Vec<Packet> {
        let end = self.mark();
        let packets = lock(&self.packets);
        packets[mark.0..end.0 - 1]
            .iter()
            .filter(|packet| packet.from_node && !packet.is_housekeeping())
            .cloned()
            .collect()
    }

    /// The same without segments of TCP that ask for no connection: an earlier one may be closed at any time.
    pub fn begun_since(&self, mark: Mark) -> Vec<Packet> {
        let mut packets = self.sent_since(mark);
        packets.retain(|packet| packet.opens || packet.protocol != protocol::TCP);
        packets
    }

    /// What the node sent to `address` since `mark`, up to this moment.
    pub fn sent_to(&self, address: impl Into<IpAddr>, mark: Mark) -> Vec<Packet> {
        let address = address.into();
        let mut packets = self.sent_since(mark);
        packets.retain(|packet| packet.destination == address);
        packets
    }

    /// Panics when the node sent anything to `address` since `mark`.
    #[track_caller]
    pub fn assert_nothing_to(&self, address: impl Into<IpAddr>, mark: Mark) {
        let address = address.into();
        let leaked = self.sent_to(address, mark);
        assert!(
            leaked.is_empty(),
            "packets to {address} left the node: {leaked:#?}"
        );
    }

    /// Panics unless the node sent something to `address` since `mark`: the positive twin.
    #[track_caller]
    pub fn assert_something_to(&self, address: impl Into<IpAddr>, mark: Mark) {
        let address = address.into();
        assert!(
            !self.sent_to(address, mark).is_empty(),
            "nothing left the node for {address}"
        );
    }
}

impl Packet {
    /// Neighbour and router discovery, multicast reports and marks: no one's traffic.
    fn is_housekeeping(&self) -> bool {
        self.destination.is_multicast()
            || self.protocol == protocol::ICMPV6 && matches!(self.payload.first(), Some(133..=137))
            || self.protocol == protocol::UDP
                && self.destination_port == MARK_PORT
                && self.payload.starts_with(b"mark ")
    }
}

/// Reads until `keep` has enough. It is also asked when there was nothing for a while.
fn record(socket: &OwnedFd, interface: usize, mut keep: impl FnMut(Option<Packet>) -> bool) {
    let mut buffer = [0; SNAPSHOT];
    loop {
        let packet = match recvfrom::<LinkAddr>(socket.as_raw_fd(), &mut buffer) {
            Ok((length, Some(from))) if from.ifindex() == interface => {
                parse(&buffer[..length.min(SNAPSHOT)], from.pkttype() != OUTGOING)
            }
            Ok(_) | Err(Errno::EINTR | Errno::ENETDOWN | Errno::EAGAIN) => None,
            Err(_) => return,
        };
        if !keep(packet) {
            return;
        }
    }
}

/// Reads an Ethernet frame; `None` for what is not IP.
fn parse(frame: &[u8], from_node: bool) -> Option<Packet> {
    let ether_type = u16::from_be_bytes(frame.get(12..14)?.try_into().ok()?);
    let ip = frame.get(14..)?;
    let (source, destination, protocol, rest): (IpAddr, IpAddr, u8, &[u8]) = match ether_type {
        0x0800 => {
            let header = usize::from(ip.first()? & 0x0f) * 4;
            let address = |at: usize| Some(Ipv4Addr::from(<[u8; 4]>::try_from(ip.get(at..at + 4)?).ok()?));
            let total = usize::from(u16::from_be_bytes(ip.get(2..4)?.try_into().ok()?));
            // Ethernet pads short packets.
            let end = total.clamp(header, ip.len().max(header));
            (
                address(12)?.into(),
                address(16)?.into(),
                *ip.get(9)?,
                ip.get(header..end)?,
            )
        }
        0x86dd => {
            let address = |at: usize| Some(Ipv6Addr::from(<[u8; 16]>::try_from(ip.get(at..at + 16)?).ok()?));
            let (protocol, rest) = upper_layer(*ip.get(6)?, ip.get(40..)?);
            (address(8)?.into(), address(24)?.into(), protocol, rest)
        }
        _ => return None,
    };
    let port = |at: usize| {
        rest.get(at..at + 2)
            .map_or(0, |bytes| u16::from_be_bytes([bytes[0], bytes[1]]))
    };
    let (source_port, destination_port, opens, payload) = match protocol {
        protocol::TCP => {
            let header = rest.get(12).map_or(20, |byte| usize::from(byte >> 4) * 4);
            let flags = rest.get(13).copied().unwrap_or(0);
            (
                port(0),
                port(2),
                flags & 0x12 == 0x02,
                rest.get(header..).unwrap_or(&[]),
            )
        }
        protocol::UDP => (port(0), port(2), false, rest.get(8..).unwrap_or(&[])),
        _ => (0, 0, false, rest),
    };
    let payload = payload.to_vec();
    Some(Packet {
        at: Instant::now(),
        from_node,
        source,
        destination,
        protocol,
        source_port,
        destination_port,
        opens,
        payload,
    })
}

/// What follows the extension headers of IPv6 (RFC 8200 4). A later fragment, which has nothing to follow, is told as
/// protocol 44.
fn upper_layer(mut protocol: u8, mut rest: &[u8]) -> (u8, &[u8]) {
    const HOP_BY_HOP: u8 = 0;
    const ROUTING: u8 = 43;
    const FRAGMENT: u8 = 44;
    const AUTHENTICATION: u8 = 51;
    const DESTINATION: u8 = 60;
    while let (
        &[next, length, high, low, ..],
        HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION,
    ) = (rest, protocol)
    {
        let size = match protocol {
            FRAGMENT if u16::from_be_bytes([high, low]) >> 3 != 0 => break,
            FRAGMENT => 8,
            AUTHENTICATION => (usize::from(length) + 2) * 4,
            _ => (usize::from(length) + 1) * 8,
        };
        let Some(after) = rest.get(size..) else { break };
        (protocol, rest) = (next, after);
    }
    (protocol, rest)
}
