//! Packets and Ethernet frames with every field free, and the socket that sends them as they are.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd as _, OwnedFd},
};

use nix::{
    ifaddrs::getifaddrs,
    net::if_::InterfaceFlags,
    sys::socket::{AddressFamily, LinkAddr, MsgFlags, SockFlag, SockType, sendto, socket},
};

/// Protocol numbers.
pub const TCP: u8 = 6;
/// See [`TCP`].
pub const UDP: u8 = 17;
/// The source port of everything here.
const PORT: u16 = 40_000;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;

/// The way out of the sandbox, as frames take it. Needs CAP_NET_RAW.
pub struct Wire {
    socket: OwnedFd,
    link: LinkAddr,
    own: [u8; 6],
    gateway: [u8; 6],
    /// The sandbox's own address.
    pub address: Ipv4Addr,
    /// The same of IPv6, where it has one that is not link-local.
    pub address6: Option<Ipv6Addr>,
}

/// An IP packet.
#[derive(Debug, Clone)]
pub struct Packet {
    /// Whose packet it says it is.
    pub source: IpAddr,
    /// Where it shall go.
    pub to: IpAddr,
    /// TCP, UDP or any.
    pub protocol: u8,
    /// The port that it shall go to, of TCP and UDP.
    pub port: u16,
    /// The flags of TCP.
    pub flags: u8,
    /// What follows the header of UDP or TCP, or that of IP for other protocols.
    pub data: Vec<u8>,
    /// Options of IPv4; a multiple of four.
    pub options: Vec<u8>,
    /// The field of IPv4 with fragment flags and offset.
    pub fragment: u16,
    /// Extension headers of IPv6: their number and what follows their first byte.
    pub extensions: Vec<(u8, Vec<u8>)>,
    /// TTL or hop limit.
    pub hops: u8,
}

impl Wire {
    /// Opens it.
    ///
    /// # Errors
    /// Without the right to, or where there is no Ethernet.
    pub fn open() -> io::Result<Self> {
        let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)?;
        let interfaces: Vec<_> = getifaddrs()?
            .filter(|entry| !entry.flags.contains(InterfaceFlags::IFF_LOOPBACK))
            .collect();
        let found = interfaces.iter().find_map(|entry| {
            let address = entry.address?.as_sockaddr_in()?.ip();
            Some((entry.interface_name.clone(), address))
        });
        let none = || io::Error::new(io::ErrorKind::NotFound, "no interface with an IPv4 address");
        let (name, address) = found.ok_or_else(none)?;
        let own = |entry: &&nix::ifaddrs::InterfaceAddress| entry.interface_name == name;
        let link = interfaces
            .iter()
            .filter(own)
            .find_map(|entry| entry.address?.as_link_addr().copied());
        let link = link.ok_or_else(none)?;
        let address6 = interfaces.iter().filter(own).find_map(|entry| {
            let address = entry.address?.as_sockaddr_in6()?.ip();
            (!address.is_unicast_link_local()).then_some(address)
        });
        Ok(Self {
            socket,
            own: link.addr().ok_or_else(none)?,
            gateway: gateway().ok_or_else(none)?,
            link,
            address,
            address6,
        })
    }

    /// Sends a packet in a frame of its own.
    ///
    /// # Errors
    /// When the kernel does not take it.
    pub fn send(&self, packet: &Packet) -> io::Result<()> {
        self.send_tagged(&[], packet)
    }

    /// The same with tags between the addresses and the packet's type.
    ///
    /// # Errors
    /// When the kernel does not take it.
    pub fn send_tagged(&self, tags: &[u8], packet: &Packet) -> io::Result<()> {
        let (kind, bytes) = packet.bytes();
        self.send_frame(tags, kind, &bytes)
    }

    /// Sends anything in a frame.
    ///
    /// # Errors
    /// When the kernel does not take it.
    pub fn send_frame(&self, tags: &[u8], kind: u16, bytes: &[u8]) -> io::Result<()> {
        let frame = [&self.gateway[..], &self.own, tags, &kind.to_be_bytes(), bytes].concat();
        sendto(self.socket.as_raw_fd(), &frame, &self.link, MsgFlags::empty())?;
        Ok(())
    }

    /// The sandbox's own Ethernet address.
    pub fn own(&self) -> [u8; 6] {
        self.own
    }
}

/// The Ethernet address of the default gateway.
fn gateway() -> Option<[u8; 6]> {
    let address = default_gateway()?.to_string();
    let table = fs::read_to_string("/proc/net/arp").ok()?;
    let line = table
        .lines()
        .find(|line| line.split_whitespace().next() == Some(&address))?;
    let mut bytes = [0; 6];
    for (byte, text) in bytes.iter_mut().zip(line.split_whitespace().nth(3)?.split(':')) {
        *byte = u8::from_str_radix(text, 16).ok()?;
    }
    Some(bytes)
}

/// The default gateway of IPv4.
pub fn default_gateway() -> Option<Ipv4Addr> {
    let table = fs::read_to_string("/proc/net/route").ok()?;
    let gateway = table.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let is_default = fields.get(1) == Some(&"00000000") && fields.get(2) != Some(&"00000000");
        is_default.then(|| u32::from_str_radix(fields[2], 16).ok())?
    })?;
    // The table shows it as the machine has it in memory.
    Some(Ipv4Addr::from(gateway.to_ne_bytes()))
}

impl Packet {
    /// A datagram with something in it.
    pub fn datagram(source: impl Into<IpAddr>, to: IpAddr, port: u16, data: &str) -> Self {
        Self {
            source: source.into(),
            to,
            protocol: UDP,
            port,
            flags: 2,
            data: data.as_bytes().to_vec(),
            options: Vec::new(),
            fragment: 0,
            extensions: Vec::new(),
            hops: 64,
        }
    }

    /// The ether type, and the packet with its checksums.
    fn bytes(&self) -> (u16, Vec<u8>) {
        let body = self.body();
        match (self.source, self.to) {
            (IpAddr::V4(source), IpAddr::V4(to)) => (IPV4, self.ipv4(source, to, &body)),
            (source, to) => (IPV6, self.ipv6(as_ipv6(source), as_ipv6(to), body)),
        }
    }

    fn ipv4(&self, source: Ipv4Addr, to: Ipv4Addr, body: &[u8]) -> Vec<u8> {
        let words = u8::try_from(5 + self.options.len() / 4).unwrap_or(15);
        let length = u16::try_from(20 + self.options.len() + body.len()).unwrap_or(u16::MAX);
        let mut header = vec![0x40 | words, 0];
        header.extend(length.to_be_bytes());
        header.extend([0, 7]);
        header.extend(self.fragment.to_be_bytes());
        header.extend([self.hops, self.protocol, 0, 0]);
        header.extend(source.octets());
        header.extend(to.octets());
        header.extend(&self.options);
        let sum = checksum(&header);
        header[10..12].copy_from_slice(&sum);
        [&header, body].concat()
    }

    fn ipv6(&self, source: Ipv6Addr, to: Ipv6Addr, mut body: Vec<u8>) -> Vec<u8> {
        let mut first = self.protocol;
        for (number, rest) in self.extensions.iter().rev() {
            body = [&[first][..], rest, &body].concat();
            first = *number;
        }
        let mut header = vec![0x60, 0, 0, 0];
        header.extend(u16::try_from(body.len()).unwrap_or(u16::MAX).to_be_bytes());
        header.extend([first, self.hops]);
        header.extend(source.octets());
        header.extend(to.octets());
        [header, body].concat()
    }

    /// What follows the header of IP.
    fn body(&self) -> Vec<u8> {
        let ports = [PORT.to_be_bytes(), self.port.to_be_bytes()].concat();
        let (mut body, sum_at) = match self.protocol {
            UDP => {
                let length = u16::try_from(8 + self.data.len())
                    .unwrap_or(u16::MAX)
                    .to_be_bytes();
                ([&ports[..], &length, &[0, 0], &self.data].concat(), 6)
            }
            TCP => {
                let rest = [0, 0, 0, 1, 0, 0, 0, 0, 0x50, self.flags, 4, 0, 0, 0, 0, 0];
                ([&ports[..], &rest, &self.data].concat(), 16)
            }
            // The checksum of ICMPv6 covers the addresses too.
            58 => (self.data.clone(), 2),
            _ => return self.data.clone(),
        };
        let mut pseudo = match (self.source, self.to) {
            (IpAddr::V4(source), IpAddr::V4(to)) => [source.octets(), to.octets()].concat(),
            (source, to) => [as_ipv6(source).octets(), as_ipv6(to).octets()].concat(),
        };
        pseudo.extend(u32::try_from(body.len()).unwrap_or(0).to_be_bytes());
        pseudo.extend([0, 0, 0, self.protocol]);
        pseudo.extend(&body);
        let sum = checksum(&pseudo);
        if let Some(field) = body.get_mut(sum_at..sum_at + 2) {
            field.copy_from_slice(&sum);
        }
        body
    }
}

fn as_ipv6(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    }
}

/// RFC 1071.
pub fn checksum(bytes: &[u8]) -> [u8; 2] {
    let mut total: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)))
        .sum();
    while total >> 16 != 0 {
        total = (total & 0xffff) + (total >> 16);
    }
    let [_, _, high, low] = (!total).to_be_bytes();
    [high, low]
}
