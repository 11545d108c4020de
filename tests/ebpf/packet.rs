//! Crafted frames.

use std::net::Ipv4Addr;

pub(crate) const GATEWAY_MAC: [u8; 6] = netd_common::GATEWAY_MAC;
pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const ICMP: u8 = 1;
pub(crate) const SYN: u8 = 0x02;
pub(crate) const ACK: u8 = 0x10;
pub(crate) const RST: u8 = 0x04;

/// One Ethernet frame with an IPv4 packet; every field can be made wrong.
#[derive(Debug, Clone)]
pub(crate) struct Frame {
    pub(crate) to_mac: [u8; 6],
    pub(crate) from_mac: [u8; 6],
    pub(crate) ethertype: u16,
    pub(crate) vlan: Option<u16>,
    pub(crate) version_and_length: u8,
    pub(crate) options: Vec<u8>,
    pub(crate) total_length: Option<u16>,
    pub(crate) fragment: u16,
    pub(crate) protocol: u8,
    pub(crate) from: Ipv4Addr,
    pub(crate) to: Ipv4Addr,
    pub(crate) from_port: u16,
    pub(crate) to_port: u16,
    pub(crate) flags: u8,
    pub(crate) cut_to: Option<usize>,
}

impl Frame {
    /// A SYN from a sandbox.
    pub(crate) fn tcp(from: Ipv4Addr, from_mac: [u8; 6], to: Ipv4Addr, to_port: u16) -> Self {
        Self {
            to_mac: GATEWAY_MAC,
            from_mac,
            ethertype: 0x0800,
            vlan: None,
            version_and_length: 0x45,
            options: Vec::new(),
            total_length: None,
            fragment: 0x4000,
            protocol: TCP,
            from,
            to,
            from_port: 40_000,
            to_port,
            flags: SYN,
            cut_to: None,
        }
    }

    pub(crate) fn udp(from: Ipv4Addr, from_mac: [u8; 6], to: Ipv4Addr, to_port: u16) -> Self {
        Self {
            protocol: UDP,
            flags: 0,
            ..Self::tcp(from, from_mac, to, to_port)
        }
    }

    /// The same frame but for one change.
    pub(crate) fn but(&self, change: impl FnOnce(&mut Self)) -> Self {
        let mut other = self.clone();
        change(&mut other);
        other
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut transport = Vec::new();
        transport.extend(self.from_port.to_be_bytes());
        transport.extend(self.to_port.to_be_bytes());
        match self.protocol {
            TCP => {
                transport.extend([0; 8]);
                transport.extend([0x50, self.flags, 0xff, 0xff, 0, 0, 0, 0]);
            }
            UDP => transport.extend([0, 12, 0, 0, 1, 2, 3, 4]),
            _ => transport = vec![8, 0, 0, 0, 0, 1, 0, 1],
        }
        let length = 20 + self.options.len() + transport.len();
        let length = self
            .total_length
            .unwrap_or_else(|| u16::try_from(length).expect("a small packet"));
        let mut frame = Vec::new();
        frame.extend(self.to_mac);
        frame.extend(self.from_mac);
        if let Some(tag) = self.vlan {
            frame.extend(0x8100_u16.to_be_bytes());
            frame.extend(tag.to_be_bytes());
        }
        frame.extend(self.ethertype.to_be_bytes());
        frame.extend([self.version_and_length, 0]);
        frame.extend(length.to_be_bytes());
        frame.extend([0, 1]);
        frame.extend(self.fragment.to_be_bytes());
        frame.extend([64, self.protocol, 0, 0]);
        frame.extend(self.from.octets());
        frame.extend(self.to.octets());
        frame.extend(&self.options);
        frame.extend(transport);
        if let Some(length) = self.cut_to {
            frame.truncate(length);
        }
        frame
    }
}
