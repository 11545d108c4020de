//! Datagrams in both directions, several with one system call. Owns: that an answer leaves from the address that was
//! asked, whichever that was.

use std::{
    io::{self, IoSlice, IoSliceMut},
    net::{IpAddr, SocketAddr, SocketAddrV4, SocketAddrV6},
    os::fd::AsRawFd as _,
};

use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, MultiHeaders, RecvMsg, SockaddrIn, SockaddrIn6,
    SockaddrStorage, recvmmsg, sendmmsg, sendmsg,
};
use tokio::net::UdpSocket;

use super::message::QUERY_MAX;

/// Datagrams of one call, at most.
const MOST: usize = 32;

/// Who asked, and what address it was that they asked.
#[derive(Debug, Clone, Copy)]
pub(super) struct Way {
    pub(super) from: SocketAddr,
    pub(super) asked: IpAddr,
    /// The sandbox's interface: a link-local address is asked by way of it, and means nothing without it.
    pub(super) interface: u32,
}

/// Room for what one call brings.
pub(super) struct Buffers {
    bytes: Vec<[u8; QUERY_MAX + 1]>,
    /// How many the next call asks for: as many as seem to come, for each costs something.
    next: usize,
}

impl Buffers {
    pub(super) fn new() -> Self {
        Self {
            bytes: vec![[0; QUERY_MAX + 1]; MOST],
            next: 1,
        }
    }

    /// The first bytes of the one at `index`.
    pub(super) fn get(&self, index: usize, length: usize) -> &[u8] {
        &self.bytes[index][..length]
    }
}

/// Takes what is there: lengths, and where each came from and went to; no way when it came without one.
pub(super) fn receive(socket: &UdpSocket, buffers: &mut Buffers) -> io::Result<Vec<(usize, Option<Way>)>> {
    let wanted = buffers.next;
    // Should nothing be there.
    buffers.next = 1;
    let space = nix::cmsg_space!(libc::sockaddr_in6);
    let mut headers = MultiHeaders::<SockaddrStorage>::preallocate(wanted, Some(space));
    let mut parts: Vec<[IoSliceMut<'_>; 1]> = buffers
        .bytes
        .iter_mut()
        .take(wanted)
        .map(|buffer| [IoSliceMut::new(buffer)])
        .collect();
    let received = recvmmsg(
        socket.as_raw_fd(),
        &mut headers,
        parts.iter_mut(),
        MsgFlags::MSG_DONTWAIT,
        None,
    )?;
    let taken: Vec<_> = received.map(|message| (message.bytes, way(&message))).collect();
    if taken.len() == wanted {
        buffers.next = (2 * wanted).min(MOST);
    }
    Ok(taken)
}

fn way(message: &RecvMsg<'_, '_, SockaddrStorage>) -> Option<Way> {
    let asked = message.cmsgs().ok()?.find_map(|message| match message {
        ControlMessageOwned::Ipv4OrigDstAddr(address) => Some(IpAddr::V4(SockaddrIn::from(address).ip())),
        ControlMessageOwned::Ipv6OrigDstAddr(address) => Some(IpAddr::V6(SockaddrIn6::from(address).ip())),
        _ => None,
    })?;
    let address = message.address?;
    let v4 = address
        .as_sockaddr_in()
        .map(|v4| SocketAddr::V4(SocketAddrV4::from(*v4)));
    let from = v4.or_else(|| {
        address
            .as_sockaddr_in6()
            .map(|v6| SocketAddr::V6(SocketAddrV6::from(*v6)))
    })?;
    Some(Way {
        from,
        asked,
        interface: 0,
    })
}

/// Sends one answer.
pub(super) fn send(socket: &UdpSocket, bytes: &[u8], way: Way) -> io::Result<()> {
    with_source(way, |control| {
        let to = SockaddrStorage::from(way.from);
        let parts = [IoSlice::new(bytes)];
        sendmsg(
            socket.as_raw_fd(),
            &parts,
            &[control],
            MsgFlags::MSG_DONTWAIT,
            Some(&to),
        )?;
        Ok(())
    })
}

/// Sends the first of several answers, and with it those behind it that leave from the same address. Tells how many were
/// sent: at least one.
pub(super) fn send_some(socket: &UdpSocket, answers: &[(Vec<u8>, Way)]) -> io::Result<usize> {
    let Some((bytes, first)) = answers.first() else {
        return Ok(0);
    };
    let source = |way: &Way| (way.asked, if way.asked.is_ipv6() { way.interface } else { 0 });
    let alike = answers.iter().take(MOST);
    let count = alike.take_while(|(_, way)| source(way) == source(first)).count();
    if count < 2 {
        return send(socket, bytes, *first).map(|()| 1);
    }
    let alike = &answers[..count];
    with_source(*first, |control| {
        let to: Vec<Option<SockaddrStorage>> = alike
            .iter()
            .map(|(_, way)| Some(SockaddrStorage::from(way.from)))
            .collect();
        let parts: Vec<[IoSlice<'_>; 1]> = alike.iter().map(|(bytes, _)| [IoSlice::new(bytes)]).collect();
        // Exactly as long as what it is filled with.
        let space = match control {
            ControlMessage::Ipv6PacketInfo(_) => nix::cmsg_space!(libc::in6_pktinfo),
            _ => nix::cmsg_space!(libc::in_pktinfo),
        };
        let mut headers = MultiHeaders::preallocate(count, Some(space));
        let sent = sendmmsg(
            socket.as_raw_fd(),
            &mut headers,
            &parts,
            to,
            [control],
            MsgFlags::MSG_DONTWAIT,
        )?;
        Ok(sent.count())
    })
}

/// Works with what makes an answer leave from the address that was asked.
fn with_source<T>(way: Way, work: impl FnOnce(ControlMessage<'_>) -> T) -> T {
    match way.asked {
        IpAddr::V4(asked) => work(ControlMessage::Ipv4PacketInfo(&libc::in_pktinfo {
            ipi_ifindex: 0,
            ipi_spec_dst: libc::in_addr {
                s_addr: u32::from(asked).to_be(),
            },
            ipi_addr: libc::in_addr { s_addr: 0 },
        })),
        IpAddr::V6(asked) => work(ControlMessage::Ipv6PacketInfo(&libc::in6_pktinfo {
            ipi6_ifindex: way.interface,
            ipi6_addr: libc::in6_addr {
                s6_addr: asked.octets(),
            },
        })),
    }
}
