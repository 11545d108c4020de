//! Ends connections whose descriptors others hold, by their four-tuples (`SOCK_DESTROY` of `sock_diag(7)`): their
//! holders read ECONNABORTED at once, instead of waiting for packets that nobody lets through any more.

use std::{
    io,
    net::SocketAddrV4,
    os::fd::{AsRawFd as _, OwnedFd},
};

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};

use crate::router::RouterNamespace;

/// `SOCK_DESTROY` of `linux/sock_diag.h`.
const SOCK_DESTROY: u16 = 21;
/// `NLM_F_REQUEST | NLM_F_ACK` of `linux/netlink.h`.
const FLAGS: u16 = 0x1 | 0x4;
/// `AF_INET` and `IPPROTO_TCP`.
const INET: u8 = 2;
const TCP: u8 = 6;
/// `struct nlmsghdr`.
const HEADER: usize = 16;
/// `struct inet_diag_req_v2`.
const REQUEST: usize = 56;
const LENGTH: usize = HEADER + REQUEST;

/// Destroys the TCP connections of the router namespace with these ends, local and remote. One that is gone is no
/// error. Blocking.
///
/// # Errors
/// The first refusal, for example of a kernel without CONFIG_INET_DIAG_DESTROY. The others are tried all the same.
pub fn destroy(router: &RouterNamespace, pairs: &[(SocketAddrV4, SocketAddrV4)]) -> io::Result<()> {
    if pairs.is_empty() {
        return Ok(());
    }
    router.run(|| destroy_here(pairs)).map_err(io::Error::other)?
}

fn destroy_here(pairs: &[(SocketAddrV4, SocketAddrV4)]) -> io::Result<()> {
    let diag = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkSockDiag,
    )?;
    let mut outcome = Ok(());
    for (local, remote) in pairs {
        let destroyed = destroy_one(&diag, *local, *remote);
        outcome = outcome.and(destroyed);
    }
    outcome
}

fn destroy_one(diag: &OwnedFd, local: SocketAddrV4, remote: SocketAddrV4) -> io::Result<()> {
    send(diag.as_raw_fd(), &message(local, remote), MsgFlags::empty())?;
    // The kernel answers before `send` returns.
    let mut answer = [0; 256];
    let length = recv(diag.as_raw_fd(), &mut answer, MsgFlags::MSG_DONTWAIT)?;
    let error = answer[..length]
        .get(HEADER..HEADER + 4)
        .and_then(|bytes| bytes.try_into().ok())
        .map(i32::from_ne_bytes)
        .ok_or(io::ErrorKind::InvalidData)?;
    match error {
        0 => Ok(()),
        error if -error == libc::ENOENT => Ok(()),
        error => Err(io::Error::from_raw_os_error(-error)),
    }
}

fn message(local: SocketAddrV4, remote: SocketAddrV4) -> [u8; LENGTH] {
    let mut message = [0; LENGTH];
    let mut put = |at: usize, bytes: &[u8]| message[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &u32::try_from(LENGTH).unwrap_or(u32::MAX).to_ne_bytes());
    put(4, &SOCK_DESTROY.to_ne_bytes());
    put(6, &FLAGS.to_ne_bytes());
    // sdiag_family, sdiag_protocol; idiag_states at 4: any.
    put(HEADER, &[INET, TCP]);
    put(HEADER + 4, &u32::MAX.to_ne_bytes());
    // struct inet_diag_sockid: ports and addresses in network order, an interface, and no cookie asked for.
    let id = HEADER + 8;
    put(id, &local.port().to_be_bytes());
    put(id + 2, &remote.port().to_be_bytes());
    put(id + 4, &local.ip().octets());
    put(id + 20, &remote.ip().octets());
    put(id + 40, &[0xff; 8]);
    message
}

#[cfg(test)]
mod tests {
    use std::{
        io::Read as _,
        net::{SocketAddr, TcpListener, TcpStream},
    };

    use super::*;

    #[test]
    fn a_connection_is_ended_whoever_holds_it() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
        let address = listener.local_addr().expect("an address");
        let mut kept = TcpStream::connect(address).expect("connected");
        let mut other = TcpStream::connect(address).expect("connected");
        let (SocketAddr::V4(local), SocketAddr::V4(remote)) = (kept.local_addr().expect("local"), address)
        else {
            panic!("not IPv4")
        };
        destroy_here(&[(local, remote), (local, remote)]).expect("destroyed, and once is enough");
        let error = kept.read(&mut [0; 1]).expect_err("it has ended");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
        other.set_nonblocking(true).expect("non-blocking");
        let error = other.read(&mut [0; 1]).expect_err("nothing to read");
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "another one goes on");
    }
}
