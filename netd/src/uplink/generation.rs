//! The generation of the node's nftables rules: a number that changes whenever anybody changes a rule.

use std::io;

use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

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
}
