//! Reads the beginning of a flow to learn whom it is for. Owns: the limits of that reading (16 KiB, 5 s).
//! Sends nothing: what was read is handed on, to be sent to the destination once the flow is admitted.

use std::{io, time::Duration};

use sandgate_relay::http1::head::{self, Head};
use tokio::io::{AsyncRead, AsyncReadExt};

use super::hello::{self, ClientHello};

/// Bytes within which a flow must have said whom it is for.
pub const SNIFF_BYTES: usize = 16 * 1024;
/// Time within which it must have.
pub const SNIFF_TIME: Duration = Duration::from_secs(5);

const FIRST_READ: usize = 2 * 1024;
const HTTP2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The beginning of a flow.
#[derive(Debug, PartialEq, Eq)]
pub struct Beginning {
    /// Every byte read so far.
    pub received: Vec<u8>,
    /// What they mean.
    pub protocol: Spoken,
}

/// What a flow speaks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Spoken {
    /// TLS, with its ClientHello.
    Tls(ClientHello),
    /// HTTP/1.x in clear, with its first request's head.
    Http(Head),
    /// HTTP/2 in clear: whom it is for, its requests say.
    Http2,
    /// Something else, or nothing in time; the word says what, for the audit record.
    Unreadable(&'static str),
}

/// Reads until the flow has said whom it is for, or a limit is reached.
///
/// # Errors
/// When the connection fails.
pub async fn sniff<R: AsyncRead + Unpin>(stream: &mut R) -> io::Result<Beginning> {
    let mut received = Vec::with_capacity(FIRST_READ);
    let reading = async {
        loop {
            if received.len() == received.capacity() {
                received.reserve_exact(SNIFF_BYTES - received.len());
            }
            let room = (received.capacity().min(SNIFF_BYTES) - received.len()) as u64;
            if (&mut *stream).take(room).read_buf(&mut received).await? == 0 {
                return io::Result::Ok(Spoken::Unreadable("closed before it said whom it is for"));
            }
            if let Some(spoken) = read(&received) {
                return Ok(spoken);
            }
            if received.len() >= SNIFF_BYTES {
                return Ok(Spoken::Unreadable("16 KiB without saying whom it is for"));
            }
        }
    };
    let protocol = match tokio::time::timeout(SNIFF_TIME, reading).await {
        Ok(read) => read?,
        Err(_elapsed) => Spoken::Unreadable("5 s without saying whom it is for"),
    };
    Ok(Beginning { received, protocol })
}

/// What `received` means, or nothing while more bytes are needed.
pub fn read(received: &[u8]) -> Option<Spoken> {
    if *received.first()? == hello::HANDSHAKE_RECORD {
        return match hello::read(received) {
            hello::Reading::Incomplete => None,
            hello::Reading::Malformed(why) => Some(Spoken::Unreadable(why)),
            hello::Reading::Complete(hello) => Some(Spoken::Tls(hello)),
        };
    }
    // RFC 9113 3.4. No request line of HTTP/1.x begins with all of it.
    if received.starts_with(HTTP2_PREFACE) {
        return Some(Spoken::Http2);
    }
    if HTTP2_PREFACE.starts_with(received) {
        return None;
    }
    match head::read_for(received, "http") {
        head::Reading::Incomplete => None,
        head::Reading::Malformed(why) => Some(Spoken::Unreadable(why)),
        head::Reading::Complete(head) => Some(Spoken::Http(head)),
    }
}

#[cfg(test)]
mod tests {
    use tokio::{io::AsyncWriteExt, time::Instant};

    use super::*;
    use crate::egress::hello::tests::{client_hello, large_client_hello};

    #[tokio::test]
    async fn every_segmentation_yields_the_name_and_every_byte() {
        let hello = client_hello("ok.test");
        for piece in 1..=hello.len() {
            let (mut client, mut inside) = tokio::io::duplex(piece);
            let sent = hello.clone();
            let (beginning, written) = tokio::join!(sniff(&mut inside), client.write_all(&sent));
            written.expect("written");
            let beginning = beginning.expect("read");
            assert_eq!(beginning.received, hello);
            let Spoken::Tls(read) = beginning.protocol else {
                panic!("{:?}", beginning.protocol)
            };
            assert_eq!(read.server_name.as_deref(), Some("ok.test"));
        }
    }

    /// As it arrives in segments of a network, whatever the browser put in.
    #[tokio::test]
    async fn a_hello_of_post_quantum_size_is_read_and_one_over_sixteen_kibibytes_is_not() {
        for (length, is_read) in [
            (1501, true),
            (1900, true),
            (SNIFF_BYTES - 1, true),
            (SNIFF_BYTES, true),
            (SNIFF_BYTES + 1, false),
        ] {
            let (mut client, mut inside) = tokio::io::duplex(1460);
            let hello = large_client_hello("ok.test", length);
            let reading = async {
                let beginning = sniff(&mut inside).await.expect("no failure");
                drop(inside);
                beginning
            };
            // Of the one that is too long the last byte is not taken.
            let (beginning, _written) = tokio::join!(reading, client.write_all(&hello));
            assert_eq!(beginning.received, hello[..length.min(SNIFF_BYTES)]);
            match beginning.protocol {
                Spoken::Tls(read) => {
                    assert_eq!((read.server_name.as_deref(), is_read), (Some("ok.test"), true))
                }
                Spoken::Unreadable(why) => assert!(!is_read && why.starts_with("16 KiB"), "{length}: {why}"),
                Spoken::Http(_) | Spoken::Http2 => panic!("it is TLS"),
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn silence_and_trickle_end_after_five_seconds() {
        let began = Instant::now();
        let (mut client, mut inside) = tokio::io::duplex(64);
        let trickle = async {
            for byte in client_hello("ok.test") {
                tokio::time::sleep(Duration::from_secs(1)).await;
                if client.write_all(&[byte]).await.is_err() {
                    return;
                }
            }
        };
        let beginning = tokio::select! {
            beginning = sniff(&mut inside) => beginning.expect("no failure"),
            () = trickle => panic!("the trickle was read to its end"),
        };
        assert!(matches!(beginning.protocol, Spoken::Unreadable(_)));
        assert_eq!(began.elapsed(), SNIFF_TIME);
    }

    #[tokio::test]
    async fn an_endless_head_ends_after_sixteen_kibibytes() {
        let (mut client, mut inside) = tokio::io::duplex(1 << 20);
        client.write_all(b"GET / HTTP/1.1\r\nX: ").await.expect("written");
        client.write_all(&vec![b'x'; 1 << 19]).await.expect("written");
        let beginning = sniff(&mut inside).await.expect("no failure");
        assert_eq!(beginning.received.len(), SNIFF_BYTES);
        assert!(matches!(beginning.protocol, Spoken::Unreadable(_)));
    }

    #[tokio::test]
    async fn http2_in_clear_is_known_by_its_preface_and_by_nothing_less() {
        for piece in 1..=HTTP2_PREFACE.len() {
            let (mut client, mut inside) = tokio::io::duplex(piece);
            let (beginning, written) = tokio::join!(sniff(&mut inside), client.write_all(HTTP2_PREFACE));
            written.expect("written");
            let beginning = beginning.expect("read");
            assert_eq!(
                (beginning.protocol, beginning.received),
                (Spoken::Http2, HTTP2_PREFACE.to_vec())
            );
        }
        assert_eq!(read(b"P"), None);
        let almost = read(b"PRI * HTTP/2.0\r\n\r\nXX");
        assert!(matches!(almost, Some(Spoken::Unreadable(_))), "{almost:?}");
        assert!(matches!(
            read(b"POST / HTTP/1.1\r\nHost: ok.test\r\n\r\n"),
            Some(Spoken::Http(_))
        ));
    }

    #[tokio::test]
    async fn junk_is_refused_at_its_first_byte_and_an_early_end_at_once() {
        let beginning = sniff(&mut &b"\x00"[..]).await.expect("no failure");
        assert!(matches!(beginning.protocol, Spoken::Unreadable(_)));
        let beginning = sniff(&mut &client_hello("ok.test")[..30])
            .await
            .expect("no failure");
        assert!(matches!(beginning.protocol, Spoken::Unreadable(_)));
    }
}
