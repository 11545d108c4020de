//! The second ClientHello. A server that answers the first with a HelloRetryRequest (RFC 8446 4.1.4) decides
//! by the second, which is sent in clear too. Owns: that no byte of the sandbox follows the first hello
//! until the server has spoken, and that a second hello names the same server.

use std::{io, time::Duration};

use sandgate_relay::copy::Traffic;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::{
    hello::{self, HANDSHAKE_RECORD, Reading},
    sniff::SNIFF_BYTES,
};

/// Time for the server's first bytes, and for the client's second hello.
const ANSWER_TIME: Duration = Duration::from_secs(60);
/// Record header, message header and version before the random of a ServerHello; the random.
const RANDOM: std::ops::Range<usize> = 11..43;
const SERVER_HELLO: u8 = 2;
/// SHA-256 of "HelloRetryRequest": the random that makes a ServerHello one.
const RETRY: [u8; 32] = [
    0xcf, 0x21, 0xad, 0x74, 0xe5, 0x9a, 0x61, 0x11, 0xbe, 0x1d, 0x8c, 0x02, 0x1e, 0x65, 0xb8, 0x91, 0xc2,
    0xa2, 0x11, 0x16, 0x7a, 0xbb, 0x8c, 0x5e, 0x07, 0x9e, 0x09, 0xe2, 0xc8, 0xa8, 0x33, 0x9c,
];
/// Records that may stand between the hellos: change_cipher_spec, alert, early data.
const OTHER_RECORDS: std::ops::RangeInclusive<u8> = 20..=23;
const RECORD_HEADER: usize = 5;

/// Why the flow cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum Unsettled {
    /// The server's side failed or ended.
    #[error("the server went away")]
    FarFailed,
    /// The server's side takes no byte.
    #[error("the server takes nothing")]
    FarTakesNothing,
    /// The client's side failed or ended.
    #[error("the client went away")]
    NearFailed,
    /// One of them said nothing.
    #[error("no answer during the TLS handshake")]
    TimedOut,
    /// The second hello is for another server.
    #[error("the second ClientHello names another server")]
    AnotherName,
    /// The second hello cannot be read.
    #[error("after a HelloRetryRequest: {0}")]
    Malformed(&'static str),
    /// More would have gone to the server than may.
    #[error("no more may go to this host")]
    Over,
}

/// Brings the server's first bytes to the client and, if they ask for a second hello, that one to the server
/// when it names the same server as the first. `behind` is what has come behind the first hello, which alone was sent.
/// Everything after that may be copied unread.
///
/// # Errors
/// See [`Unsettled`]. Nothing that must not pass has passed.
pub async fn settle<N, F>(
    near: &mut N,
    far: &mut F,
    behind: &[u8],
    name: Option<&str>,
    traffic: &Traffic,
) -> Result<(), Unsettled>
where
    N: AsyncRead + AsyncWrite + Unpin,
    F: AsyncRead + AsyncWrite + Unpin,
{
    let settling = async {
        let answer = first_answer(far).await.map_err(|_error| Unsettled::FarFailed)?;
        near.write_all(&answer)
            .await
            .map_err(|_error| Unsettled::NearFailed)?;
        traffic.add_down(answer.len());
        if is_retry(&answer) {
            second_hello(near, far, behind, name, traffic).await
        } else {
            send(far, behind, traffic).await
        }
    };
    tokio::time::timeout(ANSWER_TIME, settling)
        .await
        .map_err(|_elapsed| Unsettled::TimedOut)?
}

/// As much of the server's answer as tells what it is; less when it ends, or is no ServerHello.
async fn first_answer<F: AsyncRead + Unpin>(far: &mut F) -> io::Result<Vec<u8>> {
    let mut answer = Vec::with_capacity(1024);
    while answer.len() < RANDOM.end {
        if far.read_buf(&mut answer).await? == 0 {
            break;
        }
        let begins = |at: usize, byte: u8| answer.get(at).is_none_or(|found| *found == byte);
        if !begins(0, HANDSHAKE_RECORD) || !begins(RECORD_HEADER, SERVER_HELLO) {
            break;
        }
    }
    Ok(answer)
}

fn is_retry(answer: &[u8]) -> bool {
    answer.first() == Some(&HANDSHAKE_RECORD)
        && answer.get(RECORD_HEADER) == Some(&SERVER_HELLO)
        && answer.get(RANDOM) == Some(&RETRY)
}

async fn second_hello<N, F>(
    near: &mut N,
    far: &mut F,
    behind: &[u8],
    name: Option<&str>,
    traffic: &Traffic,
) -> Result<(), Unsettled>
where
    N: AsyncRead + Unpin,
    F: AsyncWrite + Unpin,
{
    let mut received = Vec::with_capacity(2048);
    received.extend_from_slice(behind);
    loop {
        while let Some(length) = other_record(&received)? {
            let record: Vec<u8> = received.drain(..length).collect();
            send(far, &record, traffic).await?;
        }
        if received.first() == Some(&HANDSHAKE_RECORD) {
            match hello::read(&received) {
                Reading::Incomplete => {}
                Reading::Malformed(why) => return Err(Unsettled::Malformed(why)),
                Reading::Complete(hello) => {
                    let same = match (hello.server_name.as_deref(), name) {
                        (Some(second), Some(first)) => second.eq_ignore_ascii_case(first),
                        (None, None) => true,
                        (Some(_), None) | (None, Some(_)) => false,
                    };
                    return if same {
                        send(far, &received, traffic).await
                    } else {
                        Err(Unsettled::AnotherName)
                    };
                }
            }
        }
        // Early data may fill whole records, and those went on above: this bounds one record or hello.
        if received.len() > SNIFF_BYTES + RECORD_HEADER + 256 {
            return Err(Unsettled::Malformed("a second hello over 16 KiB"));
        }
        let read = near.read_buf(&mut received).await;
        if read.map_err(|_error| Unsettled::NearFailed)? == 0 {
            return Err(Unsettled::NearFailed);
        }
    }
}

/// The length of the record that `received` begins with, if it is there in whole and is not a handshake one.
fn other_record(received: &[u8]) -> Result<Option<usize>, Unsettled> {
    let [kind, _, _, high, low, ..] = received else {
        return Ok(None);
    };
    if *kind == HANDSHAKE_RECORD {
        return Ok(None);
    }
    if !OTHER_RECORDS.contains(kind) {
        return Err(Unsettled::Malformed("not a TLS record"));
    }
    let length = RECORD_HEADER + usize::from(u16::from_be_bytes([*high, *low]));
    Ok((received.len() >= length).then_some(length))
}

async fn send<F: AsyncWrite + Unpin>(far: &mut F, bytes: &[u8], traffic: &Traffic) -> Result<(), Unsettled> {
    if !traffic.may_send(bytes.len()) {
        return Err(Unsettled::Over);
    }
    far.write_all(bytes)
        .await
        .map_err(|_error| Unsettled::FarFailed)?;
    traffic.add_up(bytes.len());
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::egress::hello::tests::client_hello;

    const CIPHER_CHANGE: [u8; 6] = [20, 3, 3, 0, 1, 1];

    fn server_hello(random: [u8; 32]) -> Vec<u8> {
        let body = [&[3, 3][..], &random, &[0, 0x13, 0x01, 0, 0, 0]].concat();
        let length = u8::try_from(body.len()).expect("short");
        let message = [&[SERVER_HELLO, 0, 0, length][..], &body].concat();
        [&[HANDSHAKE_RECORD, 3, 3, 0, length + 4][..], &message].concat()
    }

    /// A server's wish for a second hello.
    pub(in crate::egress) fn retry_request() -> Vec<u8> {
        server_hello(RETRY)
    }

    /// What becomes of a flow for `ok.test`, and what its server and client saw.
    async fn settled(answer: &[u8], then: &[u8]) -> (Result<(), Unsettled>, Vec<u8>, Vec<u8>) {
        settled_with(&[], answer, then).await
    }

    /// The same when something has come with the first hello.
    async fn settled_with(
        behind: &[u8],
        answer: &[u8],
        then: &[u8],
    ) -> (Result<(), Unsettled>, Vec<u8>, Vec<u8>) {
        let (mut client, mut near) = tokio::io::duplex(1 << 16);
        let (mut server, mut far) = tokio::io::duplex(1 << 16);
        server.write_all(answer).await.expect("written");
        client.write_all(then).await.expect("written");
        client.shutdown().await.expect("closed");
        let traffic = Traffic::default();
        let outcome = settle(&mut near, &mut far, behind, Some("ok.test"), &traffic).await;
        drop((near, far));
        let (mut at_server, mut at_client) = (Vec::new(), Vec::new());
        server.read_to_end(&mut at_server).await.expect("read");
        client.read_to_end(&mut at_client).await.expect("read");
        assert_eq!(traffic.up(), at_server.len() as u64);
        (outcome, at_server, at_client)
    }

    #[tokio::test]
    async fn a_second_hello_for_the_same_server_goes_on() {
        let answer = server_hello(RETRY);
        let second = [&CIPHER_CHANGE[..], &client_hello("OK.test")].concat();
        let (outcome, at_server, at_client) = settled(&answer, &second).await;
        outcome.expect("settled");
        assert_eq!(at_server, second);
        assert_eq!(at_client, answer);
    }

    #[tokio::test]
    async fn a_second_hello_for_another_server_never_arrives() {
        let second = [&CIPHER_CHANGE[..], &client_hello("evil.test")].concat();
        let (outcome, at_server, _) = settled(&server_hello(RETRY), &second).await;
        assert!(matches!(outcome, Err(Unsettled::AnotherName)), "{outcome:?}");
        assert_eq!(at_server, CIPHER_CHANGE);
        let (outcome, at_server, _) = settled(&server_hello(RETRY), b"junk that is no TLS").await;
        assert!(matches!(outcome, Err(Unsettled::Malformed(_))), "{outcome:?}");
        assert!(at_server.is_empty());
    }

    #[tokio::test]
    async fn a_second_hello_that_came_with_the_first_is_read_like_any() {
        let answer = server_hello(RETRY);
        for (name, passes) in [("ok.test", true), ("evil.test", false)] {
            let second = [&CIPHER_CHANGE[..], &client_hello(name)].concat();
            for cut in 0..=second.len() {
                let (behind, then) = second.split_at(cut);
                let (outcome, at_server, _) = settled_with(behind, &answer, then).await;
                if passes {
                    outcome.expect("settled");
                    assert_eq!(at_server, second, "cut at {cut}");
                } else {
                    assert!(
                        matches!(outcome, Err(Unsettled::AnotherName)),
                        "cut at {cut}: {outcome:?}"
                    );
                    assert_eq!(at_server, CIPHER_CHANGE, "cut at {cut}");
                }
            }
        }
    }

    #[tokio::test]
    async fn early_data_that_came_with_the_hello_goes_on_when_the_server_has_spoken() {
        let early = [23, 3, 3, 0, 3, 1, 2, 3];
        let (outcome, at_server, at_client) = settled_with(&early, &server_hello([7; 32]), &[]).await;
        outcome.expect("settled");
        assert_eq!((at_server, at_client), (early.to_vec(), server_hello([7; 32])));
    }

    #[tokio::test]
    async fn without_a_retry_nothing_more_is_read() {
        for answer in [
            server_hello([7; 32]),
            vec![21, 3, 3, 0, 2, 2, 40],
            b"220 mail".to_vec(),
        ] {
            let (outcome, at_server, at_client) = settled(&answer, &client_hello("evil.test")).await;
            outcome.expect("settled");
            assert!(at_server.is_empty());
            assert_eq!(at_client, answer);
        }
    }

    #[test]
    fn the_sign_of_a_retry_is_the_one_of_the_standard() {
        // RFC 8446 4.1.3.
        assert_eq!((RETRY[0], RETRY[31]), (0xcf, 0x9c));
        assert!(is_retry(&server_hello(RETRY)));
        assert!(!is_retry(&server_hello(RETRY)[..42]));
    }
}
