//! Connections that carry bytes, on the own port of a tunnel of protocol `tcp`. A public tunnel's bytes go on at once.
//! A private one takes `CONNECT` first (RFC 9110 9.3.6), with the token in `X-Tunnel-Token`, `Authorization: Bearer`
//! or `Proxy-Authorization` (bearer, or as the password that clients of HTTP proxies send). Whatever authority it
//! names, it leads to the tunnel's one port.

use std::{io, sync::Arc};

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use http_body_util::BodyExt as _;
use sandgate_relay::{
    copy::{End, both_ways},
    http1::{
        head::{Head, Reading, read_connect},
        strict::{HEAD_MAX, TOO_LONG, TOO_SLOW},
    },
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::{
    access::{Access, Verdict},
    account::{Account, Outcome, Spoken},
    answer::Problem,
    connection::Connection,
    tunnel::Tunnel,
};

const ESTABLISHED: &[u8] = b"HTTP/1.1 200 Connection established\r\n\r\n";

/// Serves one connection to its end.
pub async fn serve(connection: Arc<Connection>, mut near: TcpStream, tunnel: Arc<Tunnel>) {
    let request_id = uuid::Uuid::new_v4().to_string();
    let is_private = tunnel.access != Access::Public;
    let method = if is_private { "CONNECT" } else { "-" };
    let account = Account::open(&connection.proxy.metrics, request_id, Spoken::Tcp, method);
    account.concerns(&tunnel);
    let relaying = relay(&connection, &account, &mut near, &tunnel, is_private);
    let relayed = tokio::select! {
        relayed = relaying => relayed,
        () = connection.kill.cancelled() => {
            account.ends(Outcome::Cut);
            Err(Problem::Closed)
        }
    };
    let Err(problem) = relayed else {
        return;
    };
    account.refused(&problem);
    if is_private && !connection.resets.is_set() {
        // Whoever does not take it in time has its connection closed.
        let limit = connection.proxy.limits.header_timeout;
        let _gone = tokio::time::timeout(limit, say(&mut near, &account, &problem)).await;
    } else {
        // There are no words on such a connection.
        reset(&near);
    }
}

async fn relay(
    connection: &Connection,
    account: &Account,
    near: &mut TcpStream,
    tunnel: &Arc<Tunnel>,
    is_private: bool,
) -> Result<(), Problem> {
    if let Some(problem) = &connection.refusal {
        return Err(problem.clone());
    }
    let mut early = Vec::new();
    if is_private {
        let limit = connection.proxy.limits.header_timeout;
        let asked = tokio::time::timeout(limit, asked(near)).await;
        let (head, rest) = asked.map_err(|_elapsed| Problem::Malformed(TOO_SLOW))??;
        if !tunnel.is_open() {
            return Err(over(tunnel));
        }
        match tunnel.access.judge_connect(&fields(&head)) {
            Verdict::Allowed => {}
            Verdict::Missing => return Err(Problem::ProxyTokenMissing),
            Verdict::Wrong => return Err(Problem::TokenWrong),
        }
        early = rest;
    }
    if !tunnel.is_open() {
        return Err(over(tunnel));
    }
    let _place = tunnel
        .enter(connection.kill.clone())
        .map_err(|_full| Problem::TunnelFull)?;
    let copying = async {
        let mut far = connection
            .proxy
            .upstream
            .connect(tunnel)
            .await
            .map_err(|error| Problem::upstream(&error, tunnel.port))?;
        if is_private {
            account.answered(StatusCode::OK);
            if near.write_all(ESTABLISHED).await.is_err() {
                account.ends(Outcome::Abandoned);
                return Ok(());
            }
        }
        if far.write_all(&early).await.is_err() {
            account.ends(Outcome::Failed);
            return Ok(());
        }
        account.traffic.add_up(early.len());
        let idle = connection.proxy.limits.idle_timeout;
        let ended = both_ways(&mut *near, &mut far, idle, &account.traffic).await;
        account.ends(match ended {
            End::Closed | End::Idle | End::Over => Outcome::Served,
            End::NearFailed => Outcome::Abandoned,
            End::FarFailed => Outcome::Failed,
        });
        if ended != End::Closed {
            reset(near);
            reset(far.socket());
        }
        Ok(())
    };
    tokio::select! {
        copied = copying => copied,
        () = tunnel.end().cancelled() => {
            // Words would be taken for the program's.
            connection.resets.set();
            Err(over(tunnel))
        }
    }
}

/// Makes closing the connection an abort, not an end.
fn reset(stream: &TcpStream) {
    if let Err(error) = socket2::SockRef::from(stream).set_linger(Some(std::time::Duration::ZERO)) {
        tracing::debug!(%error, "cannot reset a connection, closing it");
    }
}

fn over(tunnel: &Tunnel) -> Problem {
    if tunnel.is_expired() {
        Problem::Expired
    } else {
        Problem::Closed
    }
}

/// Reads the head, and what the client sent after it already.
async fn asked(near: &mut TcpStream) -> Result<(Head, Vec<u8>), Problem> {
    let mut received = Vec::new();
    loop {
        match read_connect(&received) {
            Reading::Complete(head) => {
                let rest = received.split_off(head.length);
                return Ok((head, rest));
            }
            Reading::Malformed(why) => return Err(Problem::Malformed(why)),
            Reading::Incomplete if received.len() >= HEAD_MAX => return Err(Problem::Malformed(TOO_LONG)),
            Reading::Incomplete => {}
        }
        let gone = Problem::Malformed("it ends within its head");
        match near.read_buf(&mut received).await {
            Ok(1..) => {}
            Ok(0) | Err(_) => return Err(gone),
        }
    }
}

/// The fields that may carry the token.
fn fields(head: &Head) -> HeaderMap {
    let mut fields = HeaderMap::new();
    for name in ["authorization", "x-tunnel-token", "proxy-authorization"] {
        for value in head.values(name) {
            if let Ok(value) = HeaderValue::from_bytes(value) {
                fields.append(HeaderName::from_static(name), value);
            }
        }
    }
    fields
}

/// Writes a problem as an answer of HTTP/1.1.
async fn say(near: &mut TcpStream, account: &Account, problem: &Problem) -> io::Result<()> {
    let response = problem.answer(&account.request_id, false, true);
    let (parts, body) = response.into_parts();
    let body = body.collect().await.map_err(io::Error::other)?.to_bytes();
    let status = parts.status;
    let reason = status.canonical_reason().unwrap_or("Error");
    let mut text = format!("HTTP/1.1 {} {reason}\r\n", status.as_u16()).into_bytes();
    for (name, value) in &parts.headers {
        if *name != http::header::CONNECTION {
            text.extend_from_slice(format!("{name}: ").as_bytes());
            text.extend_from_slice(value.as_bytes());
            text.extend_from_slice(b"\r\n");
        }
    }
    let rest = format!(
        "x-request-id: {}\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        account.request_id,
        body.len()
    );
    text.extend_from_slice(rest.as_bytes());
    text.extend_from_slice(&body);
    near.write_all(&text).await?;
    near.shutdown().await?;
    // Closing with unread bytes would be a reset, which can overtake the answer.
    let mut rest = [0; 4096];
    let mut left: usize = 64 * 1024;
    while left > 0 {
        match near.read(&mut rest).await? {
            0 => break,
            length => left = left.saturating_sub(length),
        }
    }
    Ok(())
}
