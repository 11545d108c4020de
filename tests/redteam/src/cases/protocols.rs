//! What is spoken beside TCP, and TCP as it is seldom spoken.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::{DATAGRAMS, at, by_address, by_datagram, by_name};
use crate::{
    attempt::{Attempts, End, Outcome, Wanted},
    case::{Case, Trace},
    wire::packet::checksum,
};

/// Longest wait for what should not come.
const LINGER: Duration = Duration::from_millis(300);
/// Data with the first segment (RFC 7413), `MSG_FASTOPEN` of send(2).
const FAST_OPEN: i32 = 0x2000_0000;
/// Attempts of a burst, of either kind.
const BURST: u16 = 100;
const UDP_LITE: i32 = 136;
const SCTP: i32 = 132;
const DCCP: i32 = 33;
const MULTIPATH: i32 = 262;

pub(super) const CASES: &[Case] = &[
    Case::new(
        "P01",
        [
            "datagrams to the attacker's host, also from ports of well-known services",
            "refused at once",
            "a datagram that is allowed by address and port",
        ],
        |attempts| {
            for port in [123, 443, 853, 5353, DATAGRAMS, 8080] {
                let to = at(attempts.world.evil.address, port);
                let outcome = attempts.udp(to, attempts.token.as_bytes());
                attempts.note(format!("UDP {to}"), &Wanted::Refusal, outcome);
            }
            for from in [53, 67, 443] {
                let to = at(attempts.world.evil.address, 8080);
                let outcome = from_port(attempts, from, to);
                attempts.note(format!("UDP {to} from port {from}"), &Wanted::NoAnswer, outcome);
            }
        },
        by_datagram,
    ),
    Case::new(
        "P02",
        [
            "QUIC to an allowed host: its name is encrypted under a key that anybody can derive, and connections move",
            "refused at once, so that clients fall back to TCP",
            "the same host by TCP",
        ],
        |attempts| {
            let to = at(attempts.world.ok.address, 443);
            for (what, first, version) in [
                ("Initial", 0xc3, [0, 0, 0, 1]),
                ("version negotiation", 0x80, [0, 0, 0, 0]),
                ("a reserved version", 0xc3, [0x1a, 0x2a, 0x3a, 0x4a]),
                ("a short header", 0x43, [1, 2, 3, 4]),
            ] {
                let mut packet = vec![first];
                packet.extend(version);
                packet.extend([8, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0]);
                packet.extend(attempts.token.as_bytes());
                packet.resize(1200, 0);
                let outcome = attempts.udp(to, &packet);
                attempts.note(format!("QUIC, {what}, to {to}"), &Wanted::Refusal, outcome);
            }
        },
        by_name,
    )
    .forbids(|world| vec![Trace::To(world.ok.address)]),
    Case::new(
        "P03",
        [
            "data in echo requests, by a raw socket and by the one that needs no right",
            "forbidden, or thrown away",
            "a datagram that is allowed",
        ],
        |attempts| {
            for (what, kind) in [("a raw socket", Type::RAW), ("a ping socket", Type::DGRAM)] {
                for to in [attempts.world.evil.address, attempts.world.open] {
                    let mut message = vec![8, 0, 0, 0, 0, 7, 0, 1];
                    message.extend(attempts.token.as_bytes());
                    let sum = checksum(&message);
                    message[2..4].copy_from_slice(&sum);
                    let outcome = other(attempts, kind, Protocol::ICMPV4.into(), at(to, 0), &message);
                    attempts.note(format!("an echo request to {to} by {what}"), &Wanted::NoAnswer, outcome);
                }
            }
        },
        by_datagram,
    )
    .forbids(|_| vec![Trace::Protocol(1)]),
    Case::new(
        "P04",
        [
            "transports that few filters know: UDP-Lite, SCTP, DCCP, multipath TCP",
            "forbidden, refused or thrown away",
            "TCP to an address that is allowed",
        ],
        |attempts| {
            let port = 443;
            for to in [attempts.world.evil.address, attempts.world.open] {
                let token = attempts.token.clone();
                let lite = other(attempts, Type::DGRAM, UDP_LITE, at(to, DATAGRAMS), token.as_bytes());
                attempts.note(format!("UDP-Lite to {to}"), &Wanted::NoAnswer, lite);
                for (what, protocol) in [("SCTP", SCTP), ("DCCP", DCCP)] {
                    let kind = if protocol == SCTP { Type::STREAM } else { Type::from(6) };
                    let outcome = connected(attempts, kind, protocol, at(to, port));
                    attempts.note(format!("{what} to {to}"), &Wanted::NoAnswer, outcome);
                }
            }
            let to = at(attempts.world.evil.address, port);
            let outcome = connected(attempts, Type::STREAM, MULTIPATH, to);
            attempts.note(format!("multipath TCP to {to}"), &Wanted::NoConnection, outcome);
        },
        by_address,
    )
    .forbids(|_| [132, 136, 33].map(Trace::Protocol).to_vec()),
    Case::new(
        "P05",
        [
            "data in the very first segment (TCP Fast Open)",
            "refused before there is a connection, and the data with it",
            "the same towards an address that is allowed",
        ],
        |attempts| {
            let world = attempts.world;
            for to in [at(world.evil.address, 443), at(world.evil.address, 8080), at(world.ok.address, 8443)] {
                let token = attempts.token.clone();
                let outcome = fast(attempts, to, token.as_bytes());
                attempts.note(format!("Fast Open to {to}"), &Wanted::NoConnection, outcome);
            }
        },
        |attempts| {
            let to = at(attempts.world.open, 443);
            let hello = super::marked(attempts, crate::wire::tls::Hello::default()).bytes();
            let outcome = fast(attempts, to, &hello);
            let wanted = Wanted::Answer(super::HANDSHAKE.to_owned());
            attempts.note(format!("Fast Open to {to}"), &wanted, outcome);
        },
    )
    .forbids(|world| vec![Trace::To(world.ok.address)]),
    Case::new(
        "P06",
        [
            "datagrams to everybody: broadcast, multicast DNS, LLMNR",
            "forbidden or thrown away",
            "a datagram to one address that is allowed",
        ],
        |attempts| {
            if !attempts.world.closed {
                return attempts.impossible("everybody is addressed in a closed world only");
            }
            for (to, port) in [
                (Ipv4Addr::BROADCAST, 67),
                (Ipv4Addr::BROADCAST, DATAGRAMS),
                (Ipv4Addr::new(224, 0, 0, 251), 5353),
                (Ipv4Addr::new(224, 0, 0, 252), 5355),
                (Ipv4Addr::new(239, 255, 255, 250), 1900),
            ] {
                let token = attempts.token.clone();
                let to = at(to.into(), port);
                let outcome = other(attempts, Type::DGRAM, Protocol::UDP.into(), to, token.as_bytes());
                attempts.note(format!("UDP {to}"), &Wanted::NoAnswer, outcome);
            }
        },
        by_datagram,
    ),
    Case::new(
        "P07",
        [
            "a burst of connections and datagrams, to see whether a guard lets go under load",
            "nothing gets out, and none waits in vain",
            "an allowed connection right after it",
        ],
        |attempts| {
            let evil = attempts.world.evil.address;
            for count in 0..BURST {
                let outcome = attempts.tcp(at(evil, 8000 + count), attempts.token.as_bytes());
                attempts.note(format!("TCP port {}", 8000 + count), &Wanted::NoConnection, outcome);
                let outcome = attempts.udp(at(evil, 9000 + count), attempts.token.as_bytes());
                attempts.note(format!("UDP port {}", 9000 + count), &Wanted::Refusal, outcome);
            }
        },
        by_address,
    ),
    Case::new(
        "P08",
        [
            "sockets of families that no network namespace holds: of virtual machines, of modems, of clusters",
            "none can be opened: they lead around every wall that is made of packets",
            "an ordinary connection",
        ],
        |attempts| {
            for (what, family, kind) in [
                ("AF_VSOCK", 40, Type::STREAM),
                ("AF_VSOCK", 40, Type::DGRAM),
                ("AF_QIPCRTR", 42, Type::DGRAM),
                ("AF_TIPC", 30, Type::DGRAM),
                ("AF_RDS", 21, Type::SEQPACKET),
                ("AF_BLUETOOTH", 31, Type::RAW),
                ("AF_NFC", 39, Type::SEQPACKET),
                ("AF_MCTP", 45, Type::DGRAM),
            ] {
                let started = Instant::now();
                // Opened and closed, and spoken to nobody: what answers there is not of the world.
                let outcome = match Socket::new(Domain::from(family), kind, None) {
                    Ok(_) => {
                        attempts.shown.push(format!("{OPENED}{what}"));
                        Outcome::of(End::Answered, true, started)
                    }
                    Err(error) => Outcome::of_error(&error, false, started),
                };
                attempts.note(what, &Wanted::NoAnswer, outcome);
            }
        },
        by_address,
    )
    .forbids(|_| vec![Trace::Told(OPENED)]),
    Case::new(
        "P09",
        [
            "the attacker's host from the very port of a conversation that is allowed, while that goes on",
            "refused: a conversation is both of its ends",
            "the conversation itself",
        ],
        |attempts| {
            let (open, evil) = (attempts.world.open, attempts.world.evil.address);
            let to = at(evil, DATAGRAMS);
            let outcome = from_the_port_of(attempts, Type::DGRAM, at(open, DATAGRAMS), to);
            attempts.note(format!("UDP {to}"), &Wanted::NoAnswer, outcome);
            for port in [443, 8080] {
                let to = at(evil, port);
                let outcome = from_the_port_of(attempts, Type::STREAM, at(open, 443), to);
                attempts.note(format!("TCP {to}"), &Wanted::NoConnection, outcome);
            }
        },
        by_datagram,
    ),
];

/// How it is told that a socket could be opened.
const OPENED: &str = "opened ";

/// Converses where it is allowed, and then tries another receiver from the same port.
fn from_the_port_of(attempts: &Attempts<'_>, kind: Type, allowed: SocketAddr, to: SocketAddr) -> Outcome {
    let started = Instant::now();
    let mut is_connected = false;
    let mut answer = || {
        let first = socket(attempts, kind, 0, allowed)?;
        first.set_reuse_address(true)?;
        first.connect_timeout(&allowed.into(), attempts.timeout())?;
        if kind == Type::DGRAM {
            // Without the token: it may arrive.
            first.send(b"an allowed conversation")?;
        }
        let second = socket(attempts, kind, 0, to)?;
        second.set_reuse_address(true)?;
        second.bind(&first.local_addr()?)?;
        second.connect_timeout(&to.into(), attempts.timeout())?;
        is_connected = kind == Type::STREAM;
        heard(&second, attempts.token.as_bytes(), &to.into())
    };
    let answer = answer();
    Outcome {
        connected: is_connected,
        ..told(answer, started)
    }
}

fn socket(attempts: &Attempts<'_>, kind: Type, protocol: i32, to: SocketAddr) -> io::Result<Socket> {
    attempts.permit(to.ip())?;
    let socket = Socket::new(Domain::for_address(to), kind, Some(protocol.into()))?;
    socket.set_read_timeout(Some(LINGER))?;
    socket.set_write_timeout(Some(attempts.timeout()))?;
    Ok(socket)
}

/// A datagram from a port of one's choice.
fn from_port(attempts: &Attempts<'_>, from: u16, to: SocketAddr) -> Outcome {
    let started = Instant::now();
    let answer = || {
        let socket = socket(attempts, Type::DGRAM, Protocol::UDP.into(), to)?;
        socket.bind(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, from)).into())?;
        socket.connect(&to.into())?;
        heard(&socket, attempts.token.as_bytes(), &to.into())
    };
    told(answer(), started)
}

/// One message of any protocol without connections.
fn other(attempts: &Attempts<'_>, kind: Type, protocol: i32, to: SocketAddr, message: &[u8]) -> Outcome {
    let started = Instant::now();
    let answer = || {
        let socket = socket(attempts, kind, protocol, to)?;
        if to.ip() == Ipv4Addr::BROADCAST {
            socket.set_broadcast(true)?;
        }
        heard(&socket, message, &to.into())
    };
    told(answer(), started)
}

fn heard(socket: &Socket, message: &[u8], to: &SockAddr) -> io::Result<usize> {
    if socket.peer_addr().is_ok() {
        socket.send(message)?;
    } else {
        socket.send_to(message, to)?;
    }
    let mut buffer = [std::mem::MaybeUninit::uninit(); 2048];
    socket.recv(&mut buffer)
}

fn told(answer: io::Result<usize>, started: Instant) -> Outcome {
    match answer {
        Ok(_) => Outcome::of(End::Answered, false, started),
        Err(error) => Outcome::of_error(&error, false, started),
    }
}

/// A connection of any protocol.
fn connected(attempts: &Attempts<'_>, kind: Type, protocol: i32, to: SocketAddr) -> Outcome {
    let started = Instant::now();
    let socket = match socket(attempts, kind, protocol, to) {
        Ok(socket) => socket,
        Err(error) => return Outcome::of_error(&error, false, started),
    };
    match socket.connect_timeout(&to.into(), attempts.timeout().min(LINGER * 10)) {
        Ok(()) => {
            // It is the connection that is judged.
            socket.send(attempts.token.as_bytes()).ok();
            Outcome::of(End::Answered, true, started)
        }
        Err(error) => Outcome::of_error(&error, false, started),
    }
}

/// A connection whose first segment has data.
fn fast(attempts: &Attempts<'_>, to: SocketAddr, data: &[u8]) -> Outcome {
    let started = Instant::now();
    let mut is_connected = false;
    let mut answer = || {
        let socket = socket(attempts, Type::STREAM, Protocol::TCP.into(), to)?;
        socket.set_read_timeout(Some(attempts.timeout()))?;
        socket.send_to_with_flags(data, &to.into(), FAST_OPEN)?;
        is_connected = socket.peer_addr().is_ok();
        let mut stream: std::net::TcpStream = socket.into();
        let mut bytes = [0; 2048];
        let length = io::Read::read(&mut stream, &mut bytes)?;
        Ok(bytes[..length].to_vec())
    };
    match answer() {
        Ok(bytes) if bytes.is_empty() => Outcome::of(End::Closed, is_connected, started),
        Ok(bytes) => Outcome {
            data: bytes.iter().take(64).copied().map(char::from).collect(),
            ..Outcome::of(End::Answered, true, started)
        },
        // Where the first segment waits for the connection, its refusal is told by the first read.
        Err(error) => Outcome::of_error(&error, false, started),
    }
}
