//! Passing descriptors between processes over a `SOCK_SEQPACKET` socket pair (`unix(7)`, `SCM_RIGHTS`).
//!
//! One packet carries bytes and at most one descriptor. A supervisor makes a [`pair`] and lets each child
//! inherit an end, named by an environment variable ([`inherited`]).

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use tokio::io::{Interest, unix::AsyncFd};

/// Two connected ends. Both are closed on exec, so a child inherits one only if told to.
///
/// # Errors
/// When the process has no descriptors left.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?)
}

/// Takes over the descriptor whose number stands in the environment variable, if it is set.
///
/// Call it at most once per variable, before any thread could open descriptors of its own.
///
/// # Errors
/// When the variable holds no number, or the number is no open descriptor.
pub fn inherited(variable: &str) -> io::Result<Option<OwnedFd>> {
    let Ok(text) = std::env::var(variable) else {
        return Ok(None);
    };
    let number: i32 = text
        .parse()
        .ok()
        .filter(|number| *number > 2)
        .ok_or_else(|| invalid(format!("{variable}: `{text}` is no descriptor number above 2")))?;
    #[expect(
        unsafe_code,
        reason = "a descriptor inherited by number has no safe constructor"
    )]
    // SAFETY: the parent passed the number for us alone; nothing else in this process knows it. Whether it
    // is open is checked by the fcntl that follows, before anyone can use it.
    let descriptor = unsafe { OwnedFd::from_raw_fd(number) };
    match rustix::io::fcntl_setfd(&descriptor, rustix::io::FdFlags::CLOEXEC) {
        Ok(()) => Ok(Some(descriptor)),
        Err(error) => {
            // Closing a number that is not ours could hit somebody else's descriptor later.
            std::mem::forget(descriptor);
            Err(invalid(format!("{variable}: descriptor {number}: {error}")))
        }
    }
}

fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, message)
}

/// One end of a [`pair`], driven by tokio. Sending and receiving may run at the same time.
#[derive(Debug)]
pub struct Channel {
    socket: AsyncFd<OwnedFd>,
}

impl Channel {
    /// Wraps an end. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// When the descriptor cannot be made non-blocking or registered.
    pub fn from_fd(descriptor: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&descriptor, true)?;
        #[expect(
            unsafe_code,
            reason = "tokio asks for a promise that OwnedFd keeps by its type"
        )]
        // SAFETY: an `OwnedFd` stays the same open descriptor for as long as the `AsyncFd` holds it.
        let socket = unsafe { AsyncFd::register(descriptor) }?;
        Ok(Self { socket })
    }

    /// Sends one packet. Waits while the peer's queue is full.
    ///
    /// # Errors
    /// `EPIPE` when the peer is gone, `EMSGSIZE` when the packet is too large, `ETOOMANYREFS` when too many
    /// descriptors are under way.
    pub async fn send(&self, packet: &[u8], descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
        self.socket
            .async_io(Interest::WRITABLE, |socket| {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut ancillary = SendAncillaryBuffer::new(&mut space);
                let rights = descriptor.as_slice();
                if !rights.is_empty() {
                    let fits = ancillary.push(SendAncillaryMessage::ScmRights(rights));
                    debug_assert!(fits, "space for one descriptor was reserved");
                }
                sendmsg(
                    socket.as_fd(),
                    &[IoSlice::new(packet)],
                    &mut ancillary,
                    SendFlags::NOSIGNAL,
                )?;
                Ok(())
            })
            .await
    }

    /// Receives one packet into `buffer`: its length and the descriptor that came with it. A length of 0
    /// means that the peer is gone. Further descriptors in one packet are closed.
    ///
    /// # Errors
    /// `InvalidData` when the packet did not fit (it is lost), else what the socket says.
    pub async fn recv(&self, buffer: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
        self.socket
            .async_io(Interest::READABLE, |socket| {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
                let mut ancillary = RecvAncillaryBuffer::new(&mut space);
                let received = recvmsg(
                    socket.as_fd(),
                    &mut [IoSliceMut::new(buffer)],
                    &mut ancillary,
                    RecvFlags::CMSG_CLOEXEC,
                )?;
                let mut descriptor = None;
                for message in ancillary.drain() {
                    if let RecvAncillaryMessage::ScmRights(rights) = message {
                        for right in rights {
                            descriptor.get_or_insert(right);
                        }
                    }
                }
                if received.flags.contains(ReturnFlags::TRUNC) {
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidData,
                        "a packet was larger than the buffer",
                    ));
                }
                Ok((received.bytes, descriptor))
            })
            .await
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};

    use super::*;

    fn channels() -> (Channel, Channel) {
        let (left, right) = pair().expect("a socket pair");
        (
            Channel::from_fd(left).expect("left"),
            Channel::from_fd(right).expect("right"),
        )
    }

    #[tokio::test]
    async fn a_descriptor_arrives_and_works() {
        let (left, right) = channels();
        let (mut kept, sent) = std::os::unix::net::UnixStream::pair().expect("a stream pair");
        left.send(b"take this", Some(sent.as_fd())).await.expect("send");
        drop(sent);
        let mut buffer = [0; 64];
        let (length, descriptor) = right.recv(&mut buffer).await.expect("recv");
        assert_eq!(&buffer[..length], b"take this");
        let mut arrived = std::os::unix::net::UnixStream::from(descriptor.expect("a descriptor"));
        arrived.write_all(b"hello").expect("write");
        drop(arrived);
        let mut text = String::new();
        kept.read_to_string(&mut text).expect("read");
        assert_eq!(text, "hello");
    }

    #[tokio::test]
    async fn packets_keep_their_borders_and_order() {
        let (left, right) = channels();
        for packet in [b"one".as_slice(), b"two", b"three"] {
            left.send(packet, None).await.expect("send");
        }
        let mut buffer = [0; 64];
        for packet in [b"one".as_slice(), b"two", b"three"] {
            let (length, descriptor) = right.recv(&mut buffer).await.expect("recv");
            assert_eq!((&buffer[..length], descriptor.is_none()), (packet, true));
        }
    }

    #[tokio::test]
    async fn a_packet_that_does_not_fit_is_an_error_and_not_half_a_message() {
        let (left, right) = channels();
        left.send(&[7; 100], None).await.expect("send");
        let error = right.recv(&mut [0; 10]).await.expect_err("a truncated packet");
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    #[tokio::test]
    async fn a_peer_that_went_away_is_seen() {
        let (left, right) = channels();
        drop(left);
        let (length, descriptor) = right.recv(&mut [0; 8]).await.expect("recv");
        assert_eq!((length, descriptor.is_none()), (0, true));
    }
}
