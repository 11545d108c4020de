//! Crafted frames of IPv6, ARP and ICMP.

use std::net::{Ipv4Addr, Ipv6Addr};

use crate::packet::{Frame, GATEWAY_MAC, ICMP, TCP, UDP};

pub(crate) const ICMP6: u8 = 58;
/// The gateway of every sandbox.
pub(crate) const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0x5347, 1);

/// One Ethernet frame with an IPv6 packet; every field can be made wrong.
#[derive(Debug, Clone)]
pub(crate) struct Frame6 {
    pub(crate) to_mac: [u8; 6],
    pub(crate) from_mac: [u8; 6],
    pub(crate) version: u8,
    pub(crate) payload_length: Option<u16>,
    pub(crate) next_header: u8,
    pub(crate) hops: u8,
    pub(crate) from: Ipv6Addr,
    pub(crate) to: Ipv6Addr,
    pub(crate) payload: Vec<u8>,
}

impl Frame6 {
    /// A packet from a sandbox.
    pub(crate) fn new(
        from: Ipv6Addr,
        from_mac: [u8; 6],
        to: Ipv6Addr,
        next_header: u8,
        payload: Vec<u8>,
    ) -> Self {
        Self {
            to_mac: GATEWAY_MAC,
            from_mac,
            version: 0x60,
            payload_length: None,
            next_header,
            hops: 64,
            from,
            to,
            payload,
        }
    }

    /// The same frame but for one change.
    pub(crate) fn but(&self, change: impl FnOnce(&mut Self)) -> Self {
        let mut other = self.clone();
        change(&mut other);
        other
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let length = u16::try_from(self.payload.len()).expect("a small packet");
        let mut frame = Vec::new();
        frame.extend(self.to_mac);
        frame.extend(self.from_mac);
        frame.extend([0x86, 0xdd, self.version, 0, 0, 0]);
        frame.extend(self.payload_length.unwrap_or(length).to_be_bytes());
        frame.extend([self.next_header, self.hops]);
        frame.extend(self.from.octets());
        frame.extend(self.to.octets());
        frame.extend(&self.payload);
        frame
    }
}

/// A TCP header.
pub(crate) fn segment(from_port: u16, to_port: u16, flags: u8) -> Vec<u8> {
    let mut header = Vec::new();
    header.extend(from_port.to_be_bytes());
    header.extend(to_port.to_be_bytes());
    header.extend([0; 8]);
    header.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    header
}

/// A UDP header and four bytes.
pub(crate) fn datagram(from_port: u16, to_port: u16) -> Vec<u8> {
    let mut header = Vec::new();
    header.extend(from_port.to_be_bytes());
    header.extend(to_port.to_be_bytes());
    header.extend([0, 12, 0, 0, 1, 2, 3, 4]);
    header
}

/// The transport of a packet: a segment, or a datagram that has no flags.
pub(crate) fn transport(protocol: u8, from_port: u16, to_port: u16, flags: u8) -> Vec<u8> {
    match protocol {
        TCP => segment(from_port, to_port, flags),
        UDP => datagram(from_port, to_port),
        _ => vec![8, 0, 0, 0, 0, 1, 0, 1],
    }
}

/// An ICMP error from a frame's addresses about a packet.
pub(crate) fn icmp4(outer: &Frame, kind: u8, code: u8, quoted: &Frame) -> Vec<u8> {
    let quoted = &quoted.bytes()[14..];
    let mut bytes = outer.but(|frame| frame.protocol = ICMP).bytes();
    bytes.truncate(34);
    bytes.extend([kind, code, 0, 0, 0, 0, 0x05, 0xdc]);
    bytes.extend(quoted);
    let length = u16::try_from(bytes.len() - 14).expect("a small packet");
    bytes[16..18].copy_from_slice(&length.to_be_bytes());
    bytes
}

/// The same in IPv6.
pub(crate) fn icmp6(outer: &Frame6, kind: u8, code: u8, quoted: &Frame6) -> Vec<u8> {
    let mut payload = vec![kind, code, 0, 0, 0, 0, 0x05, 0];
    payload.extend(&quoted.bytes()[14..]);
    outer
        .but(|frame| (frame.next_header, frame.payload) = (ICMP6, payload))
        .bytes()
}

/// An ARP request or reply.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arp {
    pub(crate) to_mac: [u8; 6],
    pub(crate) from_mac: [u8; 6],
    pub(crate) operation: u16,
    pub(crate) sender: ([u8; 6], Ipv4Addr),
    pub(crate) target: ([u8; 6], Ipv4Addr),
}

impl Arp {
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut frame = Vec::new();
        frame.extend(self.to_mac);
        frame.extend(self.from_mac);
        frame.extend([0x08, 0x06, 0, 1, 8, 0, 6, 4]);
        frame.extend(self.operation.to_be_bytes());
        for (mac, address) in [self.sender, self.target] {
            frame.extend(mac);
            frame.extend(address.octets());
        }
        frame
    }
}

/// A neighbour solicitation (135) or advertisement (136) with one option.
pub(crate) fn neighbour(kind: u8, target: Ipv6Addr, option: u8, mac: [u8; 6]) -> Vec<u8> {
    let mut message = vec![kind, 0, 0, 0, 0, 0, 0, 0];
    message.extend(target.octets());
    message.extend([option, 1]);
    message.extend(mac);
    message
}
