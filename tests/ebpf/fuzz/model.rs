//! What becomes of a packet, said a second time: over the bytes of the frame, from the design and not from the programs,
//! for the fuzz to compare with. Of a packet with several faults it does not say which one is reported.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use netd_common::mark;
use sandgate_policy::{KernelAction, Protocol, Reason};

use crate::{
    packet::{GATEWAY_MAC, ICMP, TCP, UDP},
    packet6::{GATEWAY6, ICMP6},
};

const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);

/// A flow that the kernel forwards, of one endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct FlowId {
    pub(crate) protocol: u8,
    pub(crate) sandbox_port: u16,
    pub(crate) remote: SocketAddr,
}

/// All that decides about the packets of one endpoint.
pub(crate) struct Model<'a> {
    pub(crate) mac: [u8; 6],
    pub(crate) address: Ipv4Addr,
    pub(crate) address6: Option<Ipv6Addr>,
    /// The policy, without the platform.
    pub(crate) ruled: &'a dyn Fn(Protocol, SocketAddr) -> KernelAction,
    /// The platform with its exceptions, for one address.
    pub(crate) platform: &'a dyn Fn(SocketAddr) -> bool,
    /// Denied single addresses and ranges besides: the node's and the sandboxes'.
    pub(crate) private: &'a dyn Fn(SocketAddr) -> bool,
    pub(crate) bound: &'a BTreeSet<IpAddr>,
    /// netd's end and the sandbox's port of connections that netd opened inward.
    pub(crate) inward: &'a BTreeSet<(SocketAddr, u16)>,
    pub(crate) uplink: bool,
    /// Whether a new flow may leave by the uplink.
    pub(crate) new_flows: bool,
}

/// Flows of one endpoint; false: cut.
pub(crate) type Flows = BTreeMap<FlowId, bool>;

/// What becomes of a packet from the sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fate {
    /// For one of these reasons.
    Dropped(BTreeSet<&'static str>),
    /// For one of these reasons.
    Refused(BTreeSet<&'static str>),
    Inward,
    Neighbour,
    /// Out. The flow that begins with it, and the reason in audit mode.
    Left(Option<(FlowId, Option<Reason>)>),
}

/// A packet that can be judged.
#[derive(Debug, Clone, Copy)]
struct Transport {
    from: SocketAddr,
    to: SocketAddr,
    protocol: u8,
    flags: u8,
}

impl Transport {
    fn opens(&self) -> bool {
        self.protocol == TCP && self.flags & 0x17 == 0x02
    }

    fn is_tcp(&self) -> bool {
        self.protocol == TCP
    }
}

enum Body {
    Transport(Transport),
    Icmp(IpAddr, IpAddr),
    Arp,
    None,
}

fn half(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn v4(bytes: &[u8], at: usize) -> IpAddr {
    let octets: [u8; 4] = bytes[at..at + 4].try_into().expect("four bytes");
    IpAddr::from(octets)
}

fn v6(bytes: &[u8], at: usize) -> IpAddr {
    let octets: [u8; 16] = bytes[at..at + 16].try_into().expect("sixteen bytes");
    IpAddr::from(octets)
}

/// Whether a segment may bear these flags: it opens, resets, finishes or goes on, and only one of these; all but the
/// first segment and a reset acknowledge; what is urgent is neither an answer to an opening nor a reset.
fn is_sensible(flags: u8) -> bool {
    let [finishes, opens, resets, _, acknowledges, urgent] =
        [0, 1, 2, 3, 4, 5].map(|bit| flags >> bit & 1 == 1);
    match (opens, resets, finishes) {
        (true, false, false) => !(acknowledges && urgent),
        (false, true, false) => !urgent,
        (false, false, _) => acknowledges,
        (true, true, _) | (true, _, true) | (_, true, true) => false,
    }
}

impl Model<'_> {
    fn own(&self, like: IpAddr) -> Option<IpAddr> {
        match like {
            IpAddr::V4(_) => Some(self.address.into()),
            IpAddr::V6(_) => self.address6.map(IpAddr::V6),
        }
    }

    /// What is in a frame, and all that is wrong with it whoever sent it.
    fn open(&self, frame: &[u8]) -> (Body, Option<IpAddr>, BTreeSet<&'static str>) {
        let mut faults = BTreeSet::new();
        let (mut source, mut body) = (None, Body::None);
        let malformed = Reason::Malformed.as_str();
        let unwanted = Reason::ProtocolDenied.as_str();
        match half(frame, 12) {
            0x0800 if frame.len() < 34 => {
                faults.insert(malformed);
            }
            0x0800 => {
                let (from, to, protocol) = (v4(frame, 26), v4(frame, 30), frame[23]);
                source = Some(from);
                if frame[14] != 0x45 {
                    let options = frame[14] >> 4 == 4 && frame[14] & 15 > 5;
                    faults.insert(if options { unwanted } else { malformed });
                }
                if half(frame, 20) & 0x3fff != 0 {
                    faults.insert(Reason::Fragment.as_str());
                }
                if protocol == ICMP {
                    body = Body::Icmp(from, to);
                } else {
                    let whole = usize::from(half(frame, 16));
                    body = self.transport(frame, 34, (from, to), protocol, whole as isize - 20, &mut faults);
                }
            }
            0x86dd if frame.len() < 54 => {
                faults.insert(malformed);
                if self.address6.is_none() {
                    faults.insert(unwanted);
                }
            }
            0x86dd => {
                let (from, to, protocol) = (v6(frame, 22), v6(frame, 38), frame[20]);
                source = Some(from);
                let carried = |address: IpAddr| address.to_canonical().is_ipv4();
                if frame[14] >> 4 != 6 || carried(from) || carried(to) {
                    faults.insert(malformed);
                }
                if self.address6.is_none() {
                    faults.insert(unwanted);
                }
                if protocol == 44 {
                    faults.insert(Reason::Fragment.as_str());
                } else if protocol == ICMP6 {
                    body = Body::Icmp(from, to);
                } else {
                    let length = half(frame, 18) as isize;
                    body = self.transport(frame, 54, (from, to), protocol, length, &mut faults);
                }
            }
            0x0806 => body = Body::Arp,
            _ => {
                faults.insert(unwanted);
            }
        }
        (body, source, faults)
    }

    fn transport(
        &self,
        frame: &[u8],
        at: usize,
        (from, to): (IpAddr, IpAddr),
        protocol: u8,
        length: isize,
        faults: &mut BTreeSet<&'static str>,
    ) -> Body {
        let shortest = match protocol {
            TCP => 20,
            UDP => 8,
            _ => {
                faults.insert(Reason::ProtocolDenied.as_str());
                return Body::None;
            }
        };
        if length < shortest as isize || frame.len() as isize - (at as isize) < length {
            faults.insert(Reason::Malformed.as_str());
        }
        if frame.len() < at + shortest {
            return Body::None;
        }
        if protocol == TCP && !is_sensible(frame[at + 13]) {
            faults.insert(Reason::Malformed.as_str());
        }
        Body::Transport(Transport {
            from: SocketAddr::new(from, half(frame, at)),
            to: SocketAddr::new(to, half(frame, at + 2)),
            protocol,
            flags: if protocol == TCP { frame[at + 13] } else { 0 },
        })
    }

    /// A packet from the sandbox.
    pub(crate) fn out(&self, frame: &[u8], flows: &mut Flows) -> Fate {
        let (body, source, mut faults) = self.open(frame);
        let unwanted = Reason::ProtocolDenied.as_str();
        if frame[6..12] != self.mac {
            faults.insert(Reason::SpoofedSource.as_str());
        }
        if source.is_some_and(|source| self.own(source) != Some(source)) {
            faults.insert(Reason::SpoofedSource.as_str());
        }
        if let Body::Arp = body {
            return if faults.is_empty() && self.asks_by_arp(frame) {
                Fate::Neighbour
            } else {
                faults.insert(unwanted);
                Fate::Dropped(faults)
            };
        }
        if let Body::Icmp(_, to) = body {
            if faults.is_empty() && self.solicits(frame) {
                return Fate::Neighbour;
            }
            let about = self
                .error_about(frame, false)
                .filter(|flow| flow.remote.ip() == to);
            let wanted = about.is_some_and(|flow| flows.get(&flow) == Some(&true) && self.may_have(&flow));
            return if faults.is_empty() && frame[..6] == GATEWAY_MAC && self.uplink && wanted {
                Fate::Left(None)
            } else {
                faults.insert(unwanted);
                Fate::Dropped(faults)
            };
        }
        if frame[..6] != GATEWAY_MAC {
            faults.insert(unwanted);
        }
        match body {
            Body::Transport(packet) if faults.is_empty() => self.judge(&packet, flows),
            Body::Transport(_) | Body::Icmp(..) | Body::Arp | Body::None => Fate::Dropped(faults),
        }
    }

    fn judge(&self, packet: &Transport, flows: &mut Flows) -> Fate {
        let refused =
            |reasons: &[Reason]| Fate::Refused(reasons.iter().map(|reason| reason.as_str()).collect());
        let unheard = || refused(&[Reason::UpstreamUnreachable]);
        if packet.is_tcp() && !packet.opens() && self.inward.contains(&(packet.to, packet.from.port())) {
            return Fate::Inward;
        }
        let link_local = matches!(packet.to.ip(), IpAddr::V6(address) if address.is_unicast_link_local());
        let self_test = packet.is_tcp() && packet.to == SocketAddr::from((GATEWAY, 443));
        if packet.to.port() == 53 && !link_local || self_test {
            return unheard();
        }
        let flow = FlowId {
            protocol: packet.protocol,
            sandbox_port: packet.from.port(),
            remote: packet.to,
        };
        let fate = if self.forbidden(packet.to) {
            refused(&[Reason::PlatformDenied])
        } else {
            match (self.rule(packet.protocol, packet.to), packet.is_tcp()) {
                // The table may say no more than that nothing allows it.
                (KernelAction::Deny(reason), true) => refused(&[reason, Reason::DefaultDeny]),
                (KernelAction::Deny(reason), false) => refused(&[reason, Reason::ProtocolDenied]),
                (KernelAction::Proxy | KernelAction::ProxyBound, false) => refused(&[Reason::ProtocolDenied]),
                (KernelAction::Proxy, true) => unheard(),
                (KernelAction::ProxyBound, true) if self.bound.contains(&packet.to.ip()) => unheard(),
                (KernelAction::ProxyBound, true) => refused(&[Reason::AddressNotBound]),
                (KernelAction::Pass | KernelAction::Audit(_), true) if !self.uplink => unheard(),
                (KernelAction::Pass | KernelAction::Audit(_), false) if !self.uplink => {
                    refused(&[Reason::ProtocolDenied])
                }
                (action @ (KernelAction::Pass | KernelAction::Audit(_)), tcp) => {
                    match flows.get(&flow) {
                        Some(true) => Fate::Left(None),
                        _ if tcp && !packet.opens() => refused(&[Reason::ProtocolDenied]),
                        // Not yet collected.
                        Some(false) => refused(&[Reason::Quota]),
                        None if !self.new_flows => refused(&[Reason::Quota]),
                        None => {
                            flows.insert(flow, true);
                            let audit = match action {
                                KernelAction::Audit(reason) => Some(reason),
                                _ => None,
                            };
                            Fate::Left(Some((flow, audit)))
                        }
                    }
                }
            }
        };
        if let (Fate::Refused(_), false, Some(alive)) = (&fate, packet.opens(), flows.get_mut(&flow)) {
            *alive = false;
        }
        fate
    }

    /// Whether a packet reaches the sandbox. `returned`: it came through the uplink.
    pub(crate) fn into(&self, frame: &[u8], marked: u32, returned: bool, flows: &mut Flows) -> bool {
        let (body, _, faults) = self.open(frame);
        if !faults.is_empty() {
            return false;
        }
        let returned = returned && self.uplink;
        match body {
            Body::None => false,
            Body::Arp => self.answers_by_arp(frame),
            Body::Icmp(from, to) => {
                if self.own(to) != Some(to) {
                    return false;
                }
                if returned {
                    let about = self.error_about(frame, true);
                    return about.is_some_and(|flow| flows.get(&flow) == Some(&true) && self.may_have(&flow));
                }
                let (at, unreachable) = if to.is_ipv4() { (34, 3) } else { (54, 1) };
                let refusal = marked == mark::REFUSE && frame.get(at) == Some(&unreachable);
                refusal || self.advertises(frame, from)
            }
            Body::Transport(packet) => {
                if self.own(packet.to.ip()) != Some(packet.to.ip()) {
                    return false;
                }
                if returned {
                    return self.returns(&packet, flows);
                }
                if !packet.is_tcp() {
                    return marked == mark::NETD && packet.from.port() == 53;
                }
                let reset = packet.flags & 4 != 0;
                let answer = [mark::NETD, mark::PROXY].contains(&marked) && !packet.opens();
                answer
                    || marked == mark::REFUSE && reset
                    || !packet.opens() && self.inward.contains(&(packet.from, packet.to.port()))
            }
        }
    }

    /// What two neighbours on the uplink need to find each other, which is left to the stack.
    pub(crate) fn is_for_stack(&self, frame: &[u8]) -> bool {
        let (body, _, faults) = self.open(frame);
        let discovery = || half(frame, 12) == 0x86dd && matches!(frame.get(54), Some(135 | 136));
        match body {
            Body::Arp => true,
            Body::Icmp(..) => faults.is_empty() && discovery(),
            Body::Transport(_) | Body::None => false,
        }
    }

    /// A packet that came through the uplink.
    fn returns(&self, packet: &Transport, flows: &mut Flows) -> bool {
        let flow = FlowId {
            protocol: packet.protocol,
            sandbox_port: packet.to.port(),
            remote: packet.from,
        };
        if packet.opens() || flows.get(&flow) != Some(&true) {
            return false;
        }
        let allowed = self.may_have(&flow);
        flows.insert(flow, allowed);
        allowed
    }

    fn rule(&self, protocol: u8, to: SocketAddr) -> KernelAction {
        let protocol = if protocol == TCP {
            Protocol::Tcp
        } else {
            Protocol::Udp
        };
        (self.ruled)(protocol, to)
    }

    fn may_have(&self, flow: &FlowId) -> bool {
        let action = self.rule(flow.protocol, flow.remote);
        !self.forbidden(flow.remote) && matches!(action, KernelAction::Pass | KernelAction::Audit(_))
    }

    /// Whether the platform forbids it, under any address that can be taken out of it.
    fn forbidden(&self, to: SocketAddr) -> bool {
        (self.platform)(to)
            || faces(to.ip())
                .into_iter()
                .any(|face| (self.private)(SocketAddr::new(face, to.port())))
    }

    /// RFC 826, of the sandbox itself, for the gateway.
    fn asks_by_arp(&self, frame: &[u8]) -> bool {
        let mut wanted = vec![0, 1, 8, 0, 6, 4, 0, 1];
        wanted.extend(self.mac);
        wanted.extend(self.address.octets());
        let to_whom = frame[..6] == GATEWAY_MAC || frame[..6] == [0xff; 6];
        to_whom && frame.len() >= 42 && frame[14..32] == wanted && frame[38..42] == GATEWAY.octets()
    }

    fn answers_by_arp(&self, frame: &[u8]) -> bool {
        let mut wanted = vec![0, 1, 8, 0, 6, 4, 0, 2];
        wanted.extend(GATEWAY_MAC);
        wanted.extend(GATEWAY.octets());
        wanted.extend(self.mac);
        wanted.extend(self.address.octets());
        frame[..6] == self.mac && frame.len() >= 42 && frame[14..42] == wanted
    }

    /// RFC 4861: 32 bytes with one option, which nobody has forwarded.
    fn is_neighbour(frame: &[u8], kind: u8, option: u8, mac: [u8; 6]) -> bool {
        frame.len() >= 86
            && half(frame, 12) == 0x86dd
            && half(frame, 18) == 32
            && frame[21] == 255
            && frame[54..56] == [kind, 0]
            && frame[62..78] == GATEWAY6.octets()
            && frame[78..80] == [option, 1]
            && frame[80..86] == mac
    }

    fn solicits(&self, frame: &[u8]) -> bool {
        let all: Ipv6Addr = "ff02::1:ff47:1".parse().expect("an address");
        let alone = frame[..6] == GATEWAY_MAC && frame.get(38..54) == Some(&GATEWAY6.octets());
        let group = frame[..6] == [0x33, 0x33, 0xff, 0x47, 0, 1] && frame.get(38..54) == Some(&all.octets());
        (alone || group) && Self::is_neighbour(frame, 135, 1, self.mac)
    }

    fn advertises(&self, frame: &[u8], from: IpAddr) -> bool {
        from == IpAddr::from(GATEWAY6) && Self::is_neighbour(frame, 136, 2, GATEWAY_MAC)
    }

    /// The flow that an ICMP error is about: to the sandbox any error, from it "too big" and "port unreachable".
    fn error_about(&self, frame: &[u8], inward: bool) -> Option<FlowId> {
        let ipv4 = half(frame, 12) == 0x0800;
        let at = if ipv4 { 34 } else { 54 };
        let inner = at + 8;
        let ports = inner + if ipv4 { 20 } else { 40 };
        if frame.len() < ports + 4 {
            return None;
        }
        let length = if ipv4 {
            usize::from(half(frame, 16))
        } else {
            40 + usize::from(half(frame, 18))
        };
        let whole = length >= ports + 8 - 14 && length + 14 <= frame.len() && (inward || length <= 1280);
        let (kind, code) = (frame[at], frame[at + 1]);
        let wanted = match (ipv4, inward) {
            (true, true) => [3, 11, 12].contains(&kind),
            (false, true) => (1..=4).contains(&kind),
            (true, false) => kind == 3 && [3, 4].contains(&code),
            (false, false) => kind == 2 || kind == 1 && code == 4,
        };
        let plain = if ipv4 {
            frame[inner] == 0x45 && half(frame, inner + 6) & 0x1fff == 0
        } else {
            frame[inner] >> 4 == 6
        };
        if !whole || !wanted || !plain {
            return None;
        }
        let (from, to, protocol) = if ipv4 {
            (v4(frame, inner + 12), v4(frame, inner + 16), frame[inner + 9])
        } else {
            (v6(frame, inner + 8), v6(frame, inner + 24), frame[inner + 6])
        };
        let (from, to) = (
            SocketAddr::new(from, half(frame, ports)),
            SocketAddr::new(to, half(frame, ports + 2)),
        );
        let (sandbox, remote) = if inward { (from, to) } else { (to, from) };
        let ours = self.own(sandbox.ip()) == Some(sandbox.ip()) && [TCP, UDP].contains(&protocol);
        ours.then_some(FlowId {
            protocol,
            sandbox_port: sandbox.port(),
            remote,
        })
    }
}

/// The address and those it carries (RFC 4291, 2765, 6052, 3056, 4380).
pub(crate) fn faces(address: IpAddr) -> Vec<IpAddr> {
    let IpAddr::V6(outer) = address else {
        return vec![address];
    };
    let bytes = outer.octets();
    let at = |start: usize| v4(&bytes, start);
    let mut faces = vec![address];
    if bytes[..12] == [0; 12]
        || bytes[..12] == [0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0]
        || bytes[..12] == [0, 0x64, 0xff, 0x9b, 0, 0, 0, 0, 0, 0, 0, 0]
    {
        faces.push(at(12));
    }
    if bytes[..2] == [0x20, 0x02] {
        faces.push(at(2));
    }
    if bytes[..4] == [0x20, 1, 0, 0] {
        faces.push(at(4));
        faces.push(IpAddr::from([!bytes[12], !bytes[13], !bytes[14], !bytes[15]]));
    }
    faces
}
