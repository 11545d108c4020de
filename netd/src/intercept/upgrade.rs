//! Exchanges that go on as WebSocket (RFC 6455) over HTTP/1.1. Owns: both halves of the connection after the
//! agreement, until either side ends. What the server sends is searched for values like any answer.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue, Response, StatusCode,
    header::{CONNECTION, UPGRADE},
};
use http_body_util::{BodyExt as _, Empty};
use hyper::{
    body::Incoming,
    upgrade::{OnUpgrade, Upgraded},
};
use hyper_util::rt::TokioIo;
use sandgate_relay::{
    copy::CHUNK,
    headers,
    redact::Needles,
    websocket::{ServerFrames, WebSocketError},
};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use super::{Body, Flow, World, account::Account, answer::Refusal, response::mask};

/// Time that is left to one half when the other has ended.
const LINGER: Duration = Duration::from_secs(30);

/// Whether a request asks for WebSocket. Agrees with [`sandgate_relay::http1::head::Head::asks_for_websocket`].
pub(super) fn is_asked(headers: &HeaderMap) -> bool {
    let lists = |name, token: &str| {
        headers
            .get_all(name)
            .iter()
            .flat_map(|value| value.as_bytes().split(|byte| *byte == b','))
            .any(|found| found.trim_ascii().eq_ignore_ascii_case(token.as_bytes()))
    };
    lists(CONNECTION, "upgrade") && lists(UPGRADE, "websocket")
}

/// Asks the next hop for the same; what the client said about its own hop is gone already.
pub(super) fn ask_again(headers: &mut HeaderMap) {
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
}

/// Passes the agreement on and then everything that follows it.
pub(super) fn agree(
    flow: &Arc<Flow>,
    account: &Arc<Account>,
    near: OnUpgrade,
    mut answer: Response<Incoming>,
    needles: Arc<Needles>,
) -> Result<Response<Body>, Refusal> {
    account.note("went on as WebSocket".to_owned());
    let far = hyper::upgrade::on(&mut answer);
    let (mut parts, _) = answer.into_parts();
    headers::strip_hop_by_hop(&mut parts.headers);
    headers::strip_alt_svc(&mut parts.headers);
    mask(account, &needles, &mut parts.headers);
    ask_again(&mut parts.headers);
    let (account, world) = (Arc::clone(account), Arc::clone(&flow.world));
    flow.tasks.spawn_upgrade(async move {
        match tokio::try_join!(near, far) {
            Ok((near, far)) => both_ways((near, far), &account, &*world, needles).await,
            Err(error) => account.note(format!("the protocol could not be changed: {error}")),
        }
    });
    let body = Empty::new().map_err(|never| match never {}).boxed_unsync();
    let mut response = Response::from_parts(parts, body);
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    Ok(response)
}

async fn both_ways(
    (near, far): (Upgraded, Upgraded),
    account: &Account,
    world: &dyn World,
    needles: Arc<Needles>,
) {
    let (mut near_read, mut near_write) = tokio::io::split(TokioIo::new(near));
    let (mut far_read, mut far_write) = tokio::io::split(TokioIo::new(far));
    let up = copy(&mut near_read, &mut far_write, |bytes| {
        if let Err(over) = world.spend(bytes.len()) {
            account.cut(over.decision, over.detail);
            return Err(None);
        }
        account.add_up(bytes.len());
        Ok(bytes)
    });
    let mut frames = (!needles.is_empty()).then(|| ServerFrames::new(needles));
    let down = async {
        let ended = copy(&mut far_read, &mut near_write, |bytes| {
            account.add_down(bytes.len());
            match &mut frames {
                Some(frames) if bytes.is_empty() => Ok(frames.finish()),
                Some(frames) => frames.push(bytes).map_err(Some),
                None => Ok(bytes),
            }
        })
        .await;
        if let Some(frames) = &frames {
            frames.hits().for_each(|name| account.echoed(name));
        }
        ended
    };
    let (mut up, mut down) = (std::pin::pin!(up), std::pin::pin!(down));
    tokio::select! {
        ended = &mut up => {
            if ended.is_ok() {
                // Whatever still comes has this long; then both halves close.
                let _elapsed = tokio::time::timeout(LINGER, down).await;
            }
        }
        ended = &mut down => match ended {
            Ok(()) => { let _elapsed = tokio::time::timeout(LINGER, up).await; }
            Err(Some(error)) => account.note(format!("closed: {error}")),
            Err(None) => {}
        }
    }
}

/// Copies through `change`, which gets an empty chunk at the end. Fails without a reason when a side fails, or `change`
/// has told it already.
async fn copy<R, W>(
    from: &mut R,
    to: &mut W,
    mut change: impl FnMut(Bytes) -> Result<Bytes, Option<WebSocketError>>,
) -> Result<(), Option<WebSocketError>>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let mut chunk = vec![0; CHUNK];
    loop {
        let length = from.read(&mut chunk).await.map_err(|_error| None)?;
        let out = change(Bytes::copy_from_slice(&chunk[..length]))?;
        to.write_all(&out).await.map_err(|_error| None)?;
        to.flush().await.map_err(|_error| None)?;
        if length == 0 {
            return to.shutdown().await.map_err(|_error| None);
        }
    }
}
