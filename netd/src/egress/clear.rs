//! Forwards exactly one HTTP/1.x request in clear, and its answer. Owns: that nothing follows the judged
//! request on the same connection. The answer passes untouched.

use std::{pin::pin, time::Duration};

use sandgate_relay::{
    copy::{Activity, CHUNK, Traffic},
    http1::{body::Body, head::Head},
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Why forwarding ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The answer went through to its end.
    Closed,
    /// Nothing moved for the idle limit.
    Idle,
    /// The sandbox's side failed, or ended within its request.
    NearFailed,
    /// The server's side failed.
    FarFailed,
    /// The request's body broke its framing.
    Malformed,
}

/// How long a client that still sends may take to notice that its answer is complete.
const LINGER: Duration = Duration::from_secs(1);

/// Sends the request of `head` to `far`, with the body that `begun` and then `near` hold, and the answer to
/// `near`. Whatever the client sends after the request is not read to its end and goes nowhere.
pub async fn one_request<N, F>(
    near: N,
    far: F,
    head: &Head,
    begun: &[u8],
    idle: Duration,
    traffic: &Traffic,
) -> End
where
    N: AsyncRead + AsyncWrite + Unpin,
    F: AsyncRead + AsyncWrite + Unpin,
{
    let (mut near_read, mut near_write) = tokio::io::split(near);
    let (mut far_read, mut far_write) = tokio::io::split(far);
    let active = Activity::default();

    let up = async {
        let end = request(&mut near_read, &mut far_write, head, begun, &active, traffic).await;
        match end {
            // The request is through: from here on only the answer counts.
            Ok(()) => std::future::pending::<End>().await,
            Err(end) => end,
        }
    };
    let down = async {
        let mut chunk = vec![0; CHUNK];
        loop {
            let Ok(length) = far_read.read(&mut chunk).await else {
                return End::FarFailed;
            };
            active.touch();
            if length == 0 {
                break;
            }
            if near_write.write_all(&chunk[..length]).await.is_err() {
                return End::NearFailed;
            }
            active.touch();
            traffic.add_down(length);
        }
        if near_write.shutdown().await.is_err() {
            End::NearFailed
        } else {
            End::Closed
        }
    };
    let end = {
        let (up, down) = (pin!(up), pin!(down));
        tokio::select! {
            end = up => end,
            end = down => end,
            () = active.silence(idle) => End::Idle,
        }
    };
    if end == End::Closed {
        linger(&mut near_read).await;
    }
    end
}

async fn request<N, F>(
    near: &mut N,
    far: &mut F,
    head: &Head,
    begun: &[u8],
    active: &Activity,
    traffic: &Traffic,
) -> Result<(), End>
where
    N: AsyncRead + Unpin,
    F: AsyncWrite + Unpin,
{
    let mut body = Body::new(head.framing);
    let mut out = head.encode();
    body.push(begun, &mut out).map_err(|_broken| End::Malformed)?;
    let mut chunk = vec![0; CHUNK];
    loop {
        far.write_all(&out).await.map_err(|_error| End::FarFailed)?;
        active.touch();
        traffic.add_up(out.len());
        if body.is_done() {
            return Ok(());
        }
        out.clear();
        while out.is_empty() && !body.is_done() {
            let length = near.read(&mut chunk).await.map_err(|_error| End::NearFailed)?;
            if length == 0 {
                return Err(End::NearFailed);
            }
            active.touch();
            body.push(&chunk[..length], &mut out)
                .map_err(|_broken| End::Malformed)?;
        }
    }
}

/// Answers a request that was refused, and closes.
pub async fn refuse_in_words<N: AsyncRead + AsyncWrite + Unpin>(
    near: &mut N,
    reason: &str,
    rule: Option<&str>,
) {
    let body = serde_json::json!({
        "code": "egress_refused",
        "reason": reason,
        "message": "the rules of this sandbox do not allow this request",
        "rule": rule,
    })
    .to_string();
    let answer = format!(
        "HTTP/1.1 403 Forbidden\r\nContent-Type: application/json\r\nCache-Control: no-store\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    // Who does not read it in time misses it.
    let written = async { near.write_all(answer.as_bytes()).await.is_ok() && near.shutdown().await.is_ok() };
    if tokio::time::timeout(LINGER, written).await == Ok(true) {
        linger(near).await;
    }
}

/// Reads away what a client still sends, so that closing does not destroy the answer on its way to it.
async fn linger<N: AsyncRead + Unpin>(near: &mut N) {
    let mut chunk = vec![0; CHUNK];
    let drained = async { while matches!(near.read(&mut chunk).await, Ok(1..)) {} };
    // Either way the connection is closed next.
    let _elapsed = tokio::time::timeout(LINGER, drained).await;
}

#[cfg(test)]
mod tests {
    use tokio::io::DuplexStream;

    use super::*;
    use sandgate_relay::http1::head::{self, Reading};

    const IDLE: Duration = Duration::from_secs(60);

    struct Forwarded {
        end: End,
        at_server: Vec<u8>,
        at_client: Vec<u8>,
    }

    /// Forwards what a client sends in `pieces`; the server answers once it has seen `enough` bytes.
    async fn forward(pieces: &[&[u8]], enough: usize, answer: &[u8]) -> Forwarded {
        let (mut client, near) = tokio::io::duplex(1 << 16);
        let (mut server, far) = tokio::io::duplex(1 << 16);
        let Reading::Complete(head) = head::read(pieces[0]) else {
            panic!("not a head")
        };
        for piece in &pieces[1..] {
            client.write_all(piece).await.expect("written");
        }
        let traffic = Traffic::default();
        let begun = &pieces[0][head.length..];
        let serving = async {
            let mut seen = Vec::new();
            while seen.len() < enough {
                if server.read_buf(&mut seen).await.expect("read") == 0 {
                    return seen;
                }
            }
            server.write_all(answer).await.expect("written");
            server.shutdown().await.expect("closed");
            rest(&mut server, &mut seen).await;
            seen
        };
        let asking = async {
            let mut seen = Vec::new();
            rest(&mut client, &mut seen).await;
            seen
        };
        let forwarding = async { one_request(near, far, &head, begun, IDLE, &traffic).await };
        let (end, at_server, at_client) = tokio::join!(forwarding, serving, asking);
        assert_eq!(traffic.down(), at_client.len() as u64);
        Forwarded {
            end,
            at_server,
            at_client,
        }
    }

    async fn rest(stream: &mut DuplexStream, seen: &mut Vec<u8>) {
        while matches!(stream.read_buf(seen).await, Ok(1..)) {}
    }

    #[tokio::test(start_paused = true)]
    async fn a_pipelined_second_request_never_reaches_the_server() {
        let request = b"GET /a HTTP/1.1\r\nHost: ok.test\r\n\r\nGET /b HTTP/1.1\r\nHost: evil.test\r\n\r\n";
        let sent = b"GET /a HTTP/1.1\r\nHost: ok.test\r\nConnection: close\r\n\r\n";
        let more = b"GET /c HTTP/1.1\r\nHost: evil.test\r\n\r\n";
        let forwarded = forward(&[request, more], sent.len(), b"HTTP/1.1 200 OK\r\n\r\nhi").await;
        assert_eq!(forwarded.end, End::Closed);
        assert_eq!(forwarded.at_server, sent);
        assert_eq!(forwarded.at_client, b"HTTP/1.1 200 OK\r\n\r\nhi");
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_goes_through_in_whole_and_no_further() {
        let head = b"POST / HTTP/1.1\r\nHost: ok.test\r\nContent-Length: 6\r\n\r\nab";
        let sent =
            b"POST / HTTP/1.1\r\nHost: ok.test\r\nContent-Length: 6\r\nConnection: close\r\n\r\nabcdef";
        let forwarded = forward(
            &[head, b"cd", b"efGET / HTTP/1.1\r\n"],
            sent.len(),
            b"HTTP/1.1 204\r\n\r\n",
        )
        .await;
        assert_eq!(forwarded.end, End::Closed);
        assert_eq!(forwarded.at_server, sent);
    }

    #[tokio::test(start_paused = true)]
    async fn a_broken_body_ends_the_flow() {
        let head = b"POST / HTTP/1.1\r\nHost: ok.test\r\nTransfer-Encoding: chunked\r\n\r\n";
        let forwarded = forward(&[head, b"zz\r\n"], usize::MAX, b"").await;
        assert_eq!(forwarded.end, End::Malformed);
    }
}
