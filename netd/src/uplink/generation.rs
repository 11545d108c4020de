//! The generation of the node's nftables rules: a number that changes whenever anybody changes a rule, and the kernel's
//! word that somebody has.

use std::io;

use rtnetlink::sys::{
    AsyncSocket as _, AsyncSocketExt as _, Socket, SocketAddr, TokioSocket, protocols::NETLINK_NETFILTER,
};
use tokio::sync::mpsc::{self, error::TrySendError};

/// `NFNLGRP_NFTABLES` of linux/netfilter/nfnetlink.h.
const GROUP: u32 = 7;

/// `NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETGEN` of linux/netfilter/nfnetlink.h and nf_tables.h.
const GET: u16 = 10 << 8 | 16;
/// `NLM_F_REQUEST` of linux/netlink.h.
const REQUEST: u16 = 1;
/// Of `struct nlmsghdr` and `struct nfgenmsg`.
const HEADERS: usize = 16 + 4;
/// `NFTA_GEN_ID`, a number in network order.
const ID: u16 = 1;
/// Longest answer.
const ANSWER: usize = 4096;

/// Asks for it in the calling thread's network namespace.
pub(super) fn generation() -> io::Result<u32> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    // To the kernel, and from nobody else.
    socket.connect(&SocketAddr::new(0, 0))?;
    let mut question = Vec::with_capacity(HEADERS);
    question.extend_from_slice(&20_u32.to_ne_bytes());
    question.extend_from_slice(&GET.to_ne_bytes());
    question.extend_from_slice(&REQUEST.to_ne_bytes());
    // Sequence and port, then family, version and resource: all zero.
    question.resize(HEADERS, 0);
    socket.send(&question, 0)?;
    let mut answer = Vec::with_capacity(ANSWER);
    socket.recv(&mut answer, libc::MSG_DONTWAIT)?;
    attribute(&answer).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Listens for changes in the calling thread's network namespace.
pub(super) fn listen() -> io::Result<TokioSocket> {
    let mut socket = TokioSocket::new(NETLINK_NETFILTER)?;
    socket.socket_mut().bind_auto()?;
    socket.socket_ref().add_membership(GROUP)?;
    Ok(socket)
}

/// Passes a word on for whatever is heard, until nobody listens any more or the kernel says no more.
pub(super) async fn follow(socket: TokioSocket, news: mpsc::Sender<()>) -> io::Result<()> {
    let mut heard = Vec::with_capacity(ANSWER);
    loop {
        heard.clear();
        match socket.recv(&mut heard).await {
            Ok(()) => {}
            // Too many to be told one by one.
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
            Err(error) => return Err(error),
        }
        // Full means: there is news already.
        if let Err(TrySendError::Closed(())) = news.try_send(()) {
            return Ok(());
        }
    }
}

fn attribute(answer: &[u8]) -> Option<u32> {
    let mut rest = answer.get(HEADERS..)?;
    loop {
        let length = usize::from(u16::from_ne_bytes(rest.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(rest.get(2..4)?.try_into().ok()?);
        if kind == ID {
            return Some(u32::from_be_bytes(rest.get(4..8)?.try_into().ok()?));
        }
        rest = rest.get(length.max(4).next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_is_found_behind_others() {
        let mut answer = vec![0; HEADERS];
        answer.extend_from_slice(&[6, 0, 3, 0, b'x', 0, 0, 0]);
        answer.extend_from_slice(&[8, 0, 1, 0, 0, 0, 1, 2]);
        assert_eq!(attribute(&answer), Some(258));
        assert_eq!(attribute(&answer[..HEADERS + 8]), None);
        assert_eq!(attribute(&[]), None);
    }

    #[test]
    fn the_kernel_knows_it() {
        if rustix::process::geteuid().is_root() {
            assert!(generation().is_ok());
        }
    }

    #[tokio::test]
    async fn a_change_is_told_at_once() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        // Of this thread alone.
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("a namespace");
        let (news, mut heard) = mpsc::channel(1);
        let socket = listen().expect("a socket");
        let before = generation().expect("a number");
        crate::command::run(&["nft", "-f", "-"], "add table inet one\n").expect("a table");
        tokio::select! {
            ended = follow(socket, news) => panic!("{ended:?}"),
            told = heard.recv() => assert_eq!(told, Some(())),
        }
        assert_ne!(generation().expect("a number"), before);
    }
}
