//! Requests of HTTP/1.1 that go on as another protocol (RFC 9110 7.8), WebSocket above all. Owns: both halves of the
//! connection after the agreement.

use std::sync::Arc;

use http::{
    HeaderMap, HeaderValue, Response, StatusCode, Version,
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
pub fn asked(headers: &HeaderMap) -> Option<HeaderValue> {
    let tokens = |name| {
        headers
            .get_all(name)
            .iter()
            .flat_map(|value| value.as_bytes().split(|byte| *byte == b','))
            .map(|token| token.trim_ascii().to_ascii_lowercase())
    };
    let asks = tokens(CONNECTION).any(|token| token == b"upgrade");
    let is_http2 = |token: Vec<u8>| token.starts_with(b"h2") || token.starts_with(b"http/");
    if !asks || !headers.contains_key(UPGRADE) || tokens(UPGRADE).any(is_http2) {
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
                End::Closed | End::Idle => Outcome::Upgraded,
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
