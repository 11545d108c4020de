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
const FRAGMENT_BITS: u16 = 0x3fff;

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

/// The Ethernet header and an IPv4 header without options, checked once: with a check for each field the compiler
/// makes code that mixes pointers and values, which the verifier refuses.
#[derive(Clone, Copy)]
pub struct Headers(usize);

impl Headers {
    /// `None`: the frame is shorter.
    #[inline(always)]
    pub fn of(ctx: &TcContext) -> Option<Self> {
        let start = ctx.data();
        (start + ETHERNET + IPV4 <= ctx.data_end()).then_some(Self(start))
    }

    #[inline(always)]
    fn load<T: Copy>(self, offset: usize) -> T {
        // SAFETY: every caller stays below the length that `of` checked, and the verifier checks that they do.
        unsafe { core::ptr::read_volatile((self.0 + offset) as *const T) }
    }

    #[inline(always)]
    pub fn ethertype(self) -> u16 {
        u16::from_be(self.load(12))
    }

    /// Version and header length.
    #[inline(always)]
    pub fn first_byte(self) -> u8 {
        self.load(ETHERNET)
    }

    /// Of the whole IPv4 packet.
    #[inline(always)]
    pub fn total_length(self) -> u16 {
        u16::from_be(self.load(ETHERNET + 2))
    }

    #[inline(always)]
    pub fn is_fragment(self) -> bool {
        u16::from_be(self.load(ETHERNET + 6)) & FRAGMENT_BITS != 0
    }

    #[inline(always)]
    pub fn protocol(self) -> u8 {
        self.load(ETHERNET + 9)
    }

    #[inline(always)]
    pub fn source(self) -> u32 {
        self.load(ETHERNET + 12)
    }

    #[inline(always)]
    pub fn destination(self) -> u32 {
        self.load(ETHERNET + 16)
    }

    #[inline(always)]
    pub fn is_to(self, mac: &[u8; 6]) -> bool {
        self.mac_is(0, mac)
    }

    #[inline(always)]
    pub fn is_from(self, mac: &[u8; 6]) -> bool {
        self.mac_is(6, mac)
    }

    #[inline(always)]
    fn mac_is(self, offset: usize, mac: &[u8; 6]) -> bool {
        let half = |index: usize| u16::from_ne_bytes([mac[index], mac[index + 1]]);
        let differences = (self.load::<u16>(offset) ^ half(0))
            | (self.load::<u16>(offset + 2) ^ half(2))
            | (self.load::<u16>(offset + 4) ^ half(4));
        differences == 0
    }
}
