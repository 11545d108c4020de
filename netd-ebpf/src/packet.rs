//! Reading a packet: bounds-checked loads, and the fields that the programs judge by.

use aya_ebpf::programs::TcContext;

pub const ETHERNET: usize = 14;
pub const IPV4: usize = 20;
const TCP: usize = 20;

pub const ETHERTYPE_IPV4: u16 = 0x0800;
pub const PROTOCOL_ICMP: u8 = 1;
pub const PROTOCOL_TCP: u8 = 6;
pub const PROTOCOL_UDP: u8 = 17;

/// First byte of an IPv4 header without options.
pub const IPV4_PLAIN: u8 = 0x45;
/// "More fragments" and the offset: any of them set means a fragment.
pub const FRAGMENT_BITS: u16 = 0x3fff;

const TCP_SYN: u8 = 0x02;
const TCP_RST: u8 = 0x04;
const TCP_ACK: u8 = 0x10;

/// What was read of a packet. Fields that were not reached are 0.
#[derive(Clone, Copy)]
pub struct Packet {
    /// As on the wire.
    pub source: u32,
    /// As on the wire.
    pub destination: u32,
    /// Host order.
    pub source_port: u16,
    /// Host order.
    pub destination_port: u16,
    /// Host order.
    pub ethertype: u16,
    pub protocol: u8,
    pub tcp_flags: u8,
}

impl Packet {
    pub const EMPTY: Self = Self {
        source: 0,
        destination: 0,
        source_port: 0,
        destination_port: 0,
        ethertype: 0,
        protocol: 0,
        tcp_flags: 0,
    };

    /// A SYN that opens a connection.
    #[inline(always)]
    pub fn opens(&self) -> bool {
        self.tcp_flags & (TCP_SYN | TCP_ACK) == TCP_SYN
    }

    #[inline(always)]
    pub fn resets(&self) -> bool {
        self.tcp_flags & TCP_RST != 0
    }

    /// Reads the ports, and TCP's flags, behind an IPv4 header without options. `None`: the packet is too short.
    #[inline(always)]
    pub fn read_ports(&mut self, ctx: &TcContext) -> Option<()> {
        self.source_port = u16::from_be(at(ctx, ETHERNET + IPV4)?);
        self.destination_port = u16::from_be(at(ctx, ETHERNET + IPV4 + 2)?);
        if self.protocol == PROTOCOL_TCP {
            self.tcp_flags = at(ctx, ETHERNET + IPV4 + 13)?;
        }
        Some(())
    }
}

/// Makes the headers readable: the first bytes of a packet may lie outside its linear part.
#[inline(always)]
pub fn linearize(ctx: &TcContext) {
    const HEADERS: u32 = (ETHERNET + IPV4 + TCP) as u32;
    if ctx.data() + HEADERS as usize > ctx.data_end() {
        // A packet shorter than that, or no memory: the loads below fail, and what cannot be read is dropped.
        let _unreadable = ctx.pull_data(core::cmp::min(ctx.len(), HEADERS));
    }
}

/// Loads a value at an offset; `None` beyond the packet's end.
#[inline(always)]
pub fn at<T: Copy>(ctx: &TcContext, offset: usize) -> Option<T> {
    let start = ctx.data() + offset;
    if start + size_of::<T>() > ctx.data_end() {
        return None;
    }
    // SAFETY: within the packet, as the verifier checks too; BPF loads need no alignment beyond what it also checks.
    Some(unsafe { core::ptr::read_volatile(start as *const T) })
}

/// Whether six bytes of the frame equal `mac`.
#[inline(always)]
pub fn mac_at(ctx: &TcContext, offset: usize, mac: &[u8; 6]) -> bool {
    let (Some(a), Some(b), Some(c)) =
        (at::<u16>(ctx, offset), at::<u16>(ctx, offset + 2), at::<u16>(ctx, offset + 4))
    else {
        return false;
    };
    a == u16::from_ne_bytes([mac[0], mac[1]])
        && b == u16::from_ne_bytes([mac[2], mac[3]])
        && c == u16::from_ne_bytes([mac[4], mac[5]])
}
