//! A WebSocket (RFC 6455) that says which `Authorization` the request had, and then sends every text back.

use aws_lc_rs::digest;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, upgrade::OnUpgrade};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use super::{Body, Heard};
use crate::world::runtime;

/// RFC 6455, section 1.3.
const GUID: &str = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
const TEXT: u8 = 0x1;
const CLOSE: u8 = 0x8;
const FIN: u8 = 0x80;

/// Whether the request is for a WebSocket.
pub(super) fn wanted(request: &Request<Incoming>) -> bool {
    let upgrade = request.headers().get(header::UPGRADE);
    upgrade.is_some_and(|upgrade| upgrade.as_bytes().eq_ignore_ascii_case(b"websocket"))
}

/// Answers it, and converses once the connection has changed hands.
pub(super) fn open(upgrade: OnUpgrade, heard: &Heard) -> Response<Body> {
    let key = heard.all("sec-websocket-key").concat();
    let accept = digest::digest(
        &digest::SHA1_FOR_LEGACY_USE_ONLY,
        format!("{key}{GUID}").as_bytes(),
    );
    let greeting = format!(
        "authorization {} extensions [{}]",
        heard.all("authorization").join(", "),
        heard.all("sec-websocket-extensions").join(", ")
    );
    runtime().spawn(async move {
        if let Ok(stream) = upgrade.await {
            // The peer may go away whenever it likes.
            converse(TokioIo::new(stream), greeting).await.ok();
        }
    });
    let mut response = Response::new(Full::new(Bytes::new()).boxed_unsync());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let mut headers = HeaderMap::new();
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    let accept = HeaderValue::from_str(&STANDARD.encode(accept)).expect("base64 fits a header");
    headers.insert(header::SEC_WEBSOCKET_ACCEPT, accept);
    *response.headers_mut() = headers;
    response
}

async fn converse(mut stream: impl AsyncRead + AsyncWrite + Unpin, greeting: String) -> std::io::Result<()> {
    send(&mut stream, TEXT, greeting.as_bytes()).await?;
    loop {
        let mut head = [0; 2];
        stream.read_exact(&mut head).await?;
        let length = match head[1] & 0x7f {
            126 => usize::from(stream.read_u16().await?),
            127 => usize::try_from(stream.read_u64().await?).unwrap_or(usize::MAX),
            short => usize::from(short),
        };
        if length > 1 << 20 {
            return Ok(());
        }
        let mut mask = [0; 4];
        stream.read_exact(&mut mask).await?;
        let mut payload = vec![0; length];
        stream.read_exact(&mut payload).await?;
        for (byte, mask) in payload.iter_mut().zip(mask.iter().cycle()) {
            *byte ^= mask;
        }
        let code = head[0] & 0x0f;
        send(&mut stream, code, &payload).await?;
        if code == CLOSE {
            return Ok(());
        }
    }
}

async fn send(stream: &mut (impl AsyncWrite + Unpin), code: u8, payload: &[u8]) -> std::io::Result<()> {
    let mut frame = vec![FIN | code];
    match u16::try_from(payload.len()) {
        Ok(length @ ..=125) => frame.push(length.to_be_bytes()[1]),
        Ok(length) => {
            frame.push(126);
            frame.extend(length.to_be_bytes());
        }
        Err(_) => {
            frame.push(127);
            frame.extend((payload.len() as u64).to_be_bytes());
        }
    }
    frame.extend(payload);
    stream.write_all(&frame).await?;
    stream.flush().await
}
