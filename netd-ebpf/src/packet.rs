//! Reading a packet: bounds-checked loads, and the fields that the programs judge by.

use netd_common::{Address, MAPPED, NO_ADDRESS, reason};

use crate::context::{TcContext, is_tagged};

pub const ETHERNET: usize = 14;
pub const IPV4: usize = 20;
pub const IPV6: usize = 40;
pub const TCP: usize = 20;
pub const UDP: usize = 8;

pub const ETHERTYPE_IPV4: u16 = 0x0800;
pub const ETHERTYPE_ARP: u16 = 0x0806;
pub const ETHERTYPE_IPV6: u16 = 0x86dd;
pub const PROTOCOL_ICMP: u8 = 1;
pub const PROTOCOL_TCP: u8 = 6;
pub const PROTOCOL_UDP: u8 = 17;
pub const PROTOCOL_ICMP6: u8 = 58;
/// Fragment header of IPv6.
const PROTOCOL_FRAGMENT: u8 = 44;

/// First byte of an IPv4 header without options.
pub const IPV4_PLAIN: u8 = 0x45;
/// "More fragments" and the offset: any of them set means a fragment.
const FRAGMENT_BITS: u16 = 0x3fff;

const TCP_FIN: u8 = 0x01;
const TCP_SYN: u8 = 0x02;
const TCP_RST: u8 = 0x04;
const TCP_ACK: u8 = 0x10;

/// Those that tell what a segment is for, the urgent flag included.
const TCP_MEANING: u8 = 0x37;
/// The combinations that connection tracking takes (`tcp_valid_flags` of nf_conntrack_proto_tcp.c), a bit for each:
/// what it does not take, it gives no other source address.
const TCP_SENSIBLE: u64 = 1 << 0x02 // SYN
    | 1 << 0x22 // SYN, URG
    | 1 << 0x12 // SYN, ACK
    | 1 << 0x04 // RST
    | 1 << 0x14 // RST, ACK
    | 1 << 0x11 // FIN, ACK
    | 1 << 0x31 // FIN, ACK, URG
    | 1 << 0x10 // ACK
    | 1 << 0x30; // ACK, URG

/// As far as any packet is read: an ICMPv6 error and the ports of the packet that it quotes.
const DEEPEST: u32 = (ETHERNET + IPV6 + 8 + IPV6 + 8) as u32;

/// What was read of a packet. Fields that were not reached are 0.
#[derive(Clone, Copy)]
pub struct Packet {
    pub source: Address,
    pub destination: Address,
    /// Host order.
    pub source_port: u16,
    /// Host order.
    pub destination_port: u16,
    /// Host order.
    pub ethertype: u16,
    pub protocol: u8,
    pub tcp_flags: u8,
}

/// What kind of packet it is, once the fields are read.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// TCP or UDP right behind the IP header, with all that is judged by.
    Transport,
    /// ICMP, or ICMPv6, right behind the IP header.
    Icmp,
    Arp,
    /// Dropped whoever sent it, for this reason.
    Unwanted(u8),
}

impl Packet {
    pub const EMPTY: Self = Self {
        source: NO_ADDRESS,
        destination: NO_ADDRESS,
        source_port: 0,
        destination_port: 0,
        ethertype: 0,
        protocol: 0,
        tcp_flags: 0,
    };

    #[inline(always)]
    pub fn is_ipv6(&self) -> bool {
        self.ethertype == ETHERTYPE_IPV6
    }

    #[inline(always)]
    pub fn is_tcp(&self) -> bool {
        self.protocol == PROTOCOL_TCP
    }

    /// A SYN that opens a connection.
    #[inline(always)]
    pub fn opens(&self) -> bool {
        self.tcp_flags & (TCP_SYN | TCP_ACK | TCP_FIN | TCP_RST) == TCP_SYN
    }

    #[inline(always)]
    pub fn finishes(&self) -> bool {
        self.tcp_flags & TCP_FIN != 0
    }

    #[inline(always)]
    pub fn resets(&self) -> bool {
        self.tcp_flags & TCP_RST != 0
    }

    /// Reads the headers.
    #[inline(always)]
    pub fn read(&mut self, ctx: &TcContext) -> Kind {
        let Some(ethernet) = Window::<ETHERNET>::of(ctx) else {
            return Kind::Unwanted(reason::MALFORMED);
        };
        self.ethertype = ethernet.half(12);
        if is_tagged(ctx) {
            return Kind::Unwanted(reason::PROTOCOL_DENIED);
        }
        match self.ethertype {
            ETHERTYPE_IPV4 => self.read4(ctx),
            ETHERTYPE_IPV6 => self.read6(ctx),
            ETHERTYPE_ARP => Kind::Arp,
            _ => Kind::Unwanted(reason::PROTOCOL_DENIED),
        }
    }

    #[inline(always)]
    fn read4(&mut self, ctx: &TcContext) -> Kind {
        let Some(header) = Window::<{ ETHERNET + IPV4 }>::of(ctx) else {
            return Kind::Unwanted(reason::MALFORMED);
        };
        self.protocol = header.byte(ETHERNET + 9);
        self.source = [0, 0, MAPPED, header.word(ETHERNET + 12)];
        self.destination = [0, 0, MAPPED, header.word(ETHERNET + 16)];
        let first = header.byte(ETHERNET);
        if first != IPV4_PLAIN {
            // Another version than the frame says is nonsense; options are only unwanted.
            let options = first >> 4 == 4 && first > IPV4_PLAIN;
            return Kind::Unwanted(if options {
                reason::PROTOCOL_DENIED
            } else {
                reason::MALFORMED
            });
        }
        if header.half(ETHERNET + 6) & FRAGMENT_BITS != 0 {
            return Kind::Unwanted(reason::FRAGMENT);
        }
        let shortest = match self.protocol {
            PROTOCOL_TCP => IPV4 + TCP,
            PROTOCOL_UDP => IPV4 + UDP,
            PROTOCOL_ICMP => return Kind::Icmp,
            _ => return Kind::Unwanted(reason::PROTOCOL_DENIED),
        };
        // What the length field does not cover, the stack cuts off: the ports must lie before that.
        let length = u32::from(header.half(ETHERNET + 2));
        if length < shortest as u32 || ETHERNET as u32 + length > ctx.len() {
            return Kind::Unwanted(reason::MALFORMED);
        }
        self.read_ports::<{ ETHERNET + IPV4 }>(ctx)
    }

    /// Of IPv6 only the fixed header: no honest packet of a sandbox needs another, and behind one the transport could
    /// be anywhere.
    #[inline(always)]
    fn read6(&mut self, ctx: &TcContext) -> Kind {
        pull(ctx, (ETHERNET + IPV6 + TCP) as u32);
        let Some(header) = Window::<{ ETHERNET + IPV6 }>::of(ctx) else {
            return Kind::Unwanted(reason::MALFORMED);
        };
        self.protocol = header.byte(ETHERNET + 6);
        self.source = header.address(ETHERNET + 8);
        self.destination = header.address(ETHERNET + 24);
        if header.byte(ETHERNET) >> 4 != 6 {
            return Kind::Unwanted(reason::MALFORMED);
        }
        // An IPv4 address in an IPv6 packet (RFC 4291, 2.5.5.2, is for sockets): it would be taken for IPv4 below.
        if is_mapped(&self.source) || is_mapped(&self.destination) {
            return Kind::Unwanted(reason::MALFORMED);
        }
        let shortest = match self.protocol {
            PROTOCOL_TCP => TCP,
            PROTOCOL_UDP => UDP,
            PROTOCOL_ICMP6 => return Kind::Icmp,
            PROTOCOL_FRAGMENT => return Kind::Unwanted(reason::FRAGMENT),
            _ => return Kind::Unwanted(reason::PROTOCOL_DENIED),
        };
        let length = u32::from(header.half(ETHERNET + 4));
        if length < shortest as u32 || (ETHERNET + IPV6) as u32 + length > ctx.len() {
            return Kind::Unwanted(reason::MALFORMED);
        }
        self.read_ports::<{ ETHERNET + IPV6 }>(ctx)
    }

    /// Reads the ports, and TCP's flags, at an offset.
    #[inline(always)]
    fn read_ports<const AT: usize>(&mut self, ctx: &TcContext) -> Kind {
        let ports: Option<[u16; 2]> = at(ctx, AT);
        let Some([source, destination]) = ports else {
            return Kind::Unwanted(reason::MALFORMED);
        };
        self.source_port = u16::from_be(source);
        self.destination_port = u16::from_be(destination);
        if self.protocol == PROTOCOL_TCP {
            let Some(flags) = at::<u8>(ctx, AT + 13) else {
                return Kind::Unwanted(reason::MALFORMED);
            };
            self.tcp_flags = flags;
            if TCP_SENSIBLE >> (flags & TCP_MEANING) & 1 == 0 {
                return Kind::Unwanted(reason::MALFORMED);
            }
        }
        Kind::Transport
    }
}

/// Makes the headers of IPv4 readable: the first bytes of a packet may lie outside its linear part.
#[inline(always)]
pub fn linearize(ctx: &TcContext) {
    pull(ctx, (ETHERNET + IPV4 + TCP) as u32);
}

/// Makes all readable that any packet is read of.
#[inline(always)]
pub fn linearize_deep(ctx: &TcContext) {
    pull(ctx, DEEPEST);
}

/// Makes the first `needed` bytes readable, and what else may be needed with them.
#[inline(always)]
fn pull(ctx: &TcContext, needed: u32) {
    if ctx.data() + needed as usize > ctx.data_end() {
        // A packet shorter than that, or no memory: the loads fail, and what cannot be read is dropped.
        let _unreadable = ctx.pull_data(core::cmp::min(ctx.len(), DEEPEST));
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

/// The first bytes of the frame, checked once: with a check for each field the compiler makes code that mixes pointers
/// and values, which the verifier refuses. Worth nothing after the packet was changed or pulled.
#[derive(Clone, Copy)]
pub struct Window<const LENGTH: usize>(usize);

impl<const LENGTH: usize> Window<LENGTH> {
    /// `None`: the frame is shorter.
    #[inline(always)]
    pub fn of(ctx: &TcContext) -> Option<Self> {
        let start = ctx.data();
        (start + LENGTH <= ctx.data_end()).then_some(Self(start))
    }

    #[inline(always)]
    fn load<T: Copy>(self, offset: usize) -> T {
        // SAFETY: every caller stays below the length that `of` checked, and the verifier checks that they do.
        unsafe { core::ptr::read_volatile((self.0 + offset) as *const T) }
    }

    #[inline(always)]
    pub fn byte(self, offset: usize) -> u8 {
        self.load(offset)
    }

    /// In host order.
    #[inline(always)]
    pub fn half(self, offset: usize) -> u16 {
        u16::from_be(self.load(offset))
    }

    /// As on the wire.
    #[inline(always)]
    pub fn word(self, offset: usize) -> u32 {
        self.load(offset)
    }

    #[inline(always)]
    pub fn address(self, offset: usize) -> Address {
        [
            self.word(offset),
            self.word(offset + 4),
            self.word(offset + 8),
            self.word(offset + 12),
        ]
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
    pub fn mac_is(self, offset: usize, mac: &[u8; 6]) -> bool {
        let half = |index: usize| u16::from_ne_bytes([mac[index], mac[index + 1]]);
        let differences = (self.load::<u16>(offset) ^ half(0))
            | (self.load::<u16>(offset + 2) ^ half(2))
            | (self.load::<u16>(offset + 4) ^ half(4));
        differences == 0
    }
}

/// Equality without a call of memcmp, which there is not.
#[inline(always)]
pub fn same(one: &Address, other: &Address) -> bool {
    (one[0] ^ other[0]) | (one[1] ^ other[1]) | (one[2] ^ other[2]) | (one[3] ^ other[3]) == 0
}

#[inline(always)]
pub fn is_mapped(address: &Address) -> bool {
    address[0] | address[1] | (address[2] ^ MAPPED) == 0
}
