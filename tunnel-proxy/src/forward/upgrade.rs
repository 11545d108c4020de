//! Requests of HTTP/1.1 that go on as another protocol (RFC 9110 7.8), WebSocket above all. Owns: both halves of the
//! connection after the agreement.

use std::sync::Arc;

use http::{
    HeaderValue, Request, Response, StatusCode, Version,
    header::{CONNECTION, UPGRADE},
};
use http_body_util::{BodyExt as _, Empty};
use hyper::{body::Incoming, upgrade::OnUpgrade};
use hyper_util::rt::TokioIo;
use sandgate_relay::copy::{End, both_ways};

use super::{
    body::Body,
    headers::{to_client, upgrade_to},
};
use crate::{
    account::{Account, Outcome},
    connection::Connection,
    tunnel::Tunnel,
};

/// The protocols that a request asks to go on as. Agrees with [`sandgate_relay::http1::head::Head::asks_for_upgrade`].
pub fn asked<B>(request: &Request<B>) -> Option<HeaderValue> {
    let headers = request.headers();
    let tokens = |name| {
        headers
            .get_all(name)
            .iter()
            .flat_map(|value| value.as_bytes().split(|byte| *byte == b','))
            .map(|token| token.trim_ascii().to_ascii_lowercase())
    };
    let asks = tokens(CONNECTION).any(|token| token == b"upgrade");
    let is_http2 = |token: Vec<u8>| token.starts_with(b"h2") || token.starts_with(b"http/");
    if request.version() != Version::HTTP_11
        || !asks
        || !headers.contains_key(UPGRADE)
        || tokens(UPGRADE).any(is_http2)
    {
        return None;
    }
    let lines: Vec<&[u8]> = headers
        .get_all(UPGRADE)
        .iter()
        .map(HeaderValue::as_bytes)
        .collect();
    HeaderValue::from_bytes(&lines.join(&b", "[..])).ok()
}

/// Passes the agreement on, and then everything that follows it.
pub fn agree(
    connection: &Arc<Connection>,
    tunnel: &Arc<Tunnel>,
    account: &Arc<Account>,
    near: OnUpgrade,
    mut answer: Response<Incoming>,
    host: &str,
) -> Response<Body> {
    let far = hyper::upgrade::on(&mut answer);
    let (mut parts, _) = answer.into_parts();
    let protocol = parts.headers.get(UPGRADE).cloned();
    to_client(&mut parts.headers, host);
    upgrade_to(
        &mut parts.headers,
        protocol.unwrap_or(HeaderValue::from_static("websocket")),
    );
    parts.version = Version::HTTP_11;
    parts.status = StatusCode::SWITCHING_PROTOCOLS;
    let (connection, tunnel, account) = (Arc::clone(connection), Arc::clone(tunnel), Arc::clone(account));
    let tasks = connection.proxy.tasks.clone();
    tasks.spawn("upgraded connection", async move {
        let copying = async {
            let (near, far) = match tokio::try_join!(near, far) {
                Ok(halves) => halves,
                Err(error) => {
                    tracing::debug!(%error, "the protocol could not be changed");
                    account.ends(Outcome::Failed);
                    return;
                }
            };
            let idle = connection.proxy.limits.idle_timeout;
            let ended = both_ways(TokioIo::new(near), TokioIo::new(far), idle, &account.traffic).await;
            account.ends(match ended {
                End::Closed | End::Idle | End::Over => Outcome::Upgraded,
                End::NearFailed => Outcome::Abandoned,
                End::FarFailed => Outcome::Failed,
            });
        };
        tokio::select! {
            () = copying => {}
            () = tunnel.end().cancelled() => {
                connection.resets.set();
                account.ends(Outcome::Cut);
            }
            () = connection.kill.cancelled() => account.ends(Outcome::Cut),
        }
    });
    let body = Empty::new().map_err(|never| match never {}).boxed_unsync();
    Response::from_parts(parts, body)
}

#[cfg(test)]
mod tests {
    use sandgate_relay::http1::head::{Reading, read};

    use super::*;

    /// Two that disagree would leave a connection hanging, or take bytes of one protocol for the other's.
    #[test]
    fn the_filter_in_front_agrees_on_who_asks_for_an_upgrade() {
        for (version, fields) in [
            ("1.1", "Connection: upgrade\r\nUpgrade: websocket\r\n"),
            (
                "1.1",
                "Connection: keep-alive,  UPGRADE\r\nUpgrade: a/1\r\nUpgrade: b\r\n",
            ),
            (
                "1.1",
                "Connection: keep-alive\r\nConnection: upgrade\r\nUpgrade:\r\n",
            ),
            ("1.1", "Connection: upgrade\r\nUpgrade: ,h2c\r\n"),
            (
                "1.1",
                "Connection: upgrade\r\nUpgrade: websocket\r\nUpgrade: HTTP/2.0\r\n",
            ),
            ("1.1", "Connection: upgrade\r\n"),
            ("1.1", "Connection: upgrades\r\nUpgrade: websocket\r\n"),
            ("1.1", "Upgrade: websocket\r\n"),
            ("1.0", "Connection: upgrade\r\nUpgrade: websocket\r\n"),
        ] {
            let text = format!("GET / HTTP/{version}\r\nHost: a.test\r\n{fields}\r\n");
            let Reading::Complete(head) = read(text.as_bytes()) else {
                panic!("{text}")
            };
            let mut request = Request::get("/");
            for line in fields.lines() {
                let (name, value) = line.split_once(':').expect("a field");
                request = request.header(name, value.trim());
            }
            let is_new = version == "1.1";
            let version = if is_new {
                Version::HTTP_11
            } else {
                Version::HTTP_10
            };
            let request = request.version(version).body(()).expect("a request");
            assert_eq!(asked(&request).is_some(), head.asks_for_upgrade(), "{text}");
        }
    }
}
