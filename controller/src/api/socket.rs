//! WebSockets: who opens one, how much fits into one, and a client that does not read.
//!
//! A socket's credential may stand in the query, because a browser can add no header; so it proves nothing about the
//! page that opened it, and the `Origin` is not looked at. The query is in no log.

use std::time::Duration;

use axum::extract::{
    FromRequestParts,
    ws::{CloseFrame, Message, Utf8Bytes, WebSocket, WebSocketUpgrade, close_code},
};
use http::request::Parts;
use sandgate_api::error::ErrorCode;

use super::{auth::Authenticated, error::ApiError};
use crate::service::{Caller, Service, Socket};

/// Largest message of a client, in bytes: a command with its environment.
const MAX_MESSAGE: usize = 256 * 1024;

/// Between two pings.
pub(super) const PING: Duration = Duration::from_secs(10);

/// How long a client may read nothing while something is to be said.
const STALL: Duration = Duration::from_secs(120);

/// A WebSocket that somebody with a good credential wants to open.
pub(super) struct Opening {
    pub(super) caller: Caller,
    place: Socket,
    upgrade: WebSocketUpgrade,
}

/// An open WebSocket.
pub(super) struct Line {
    socket: WebSocket,
    place: Socket,
}

/// The client is gone, reads nothing, or the controller ends.
pub(super) struct HungUp;

impl FromRequestParts<Service> for Opening {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, service: &Service) -> Result<Self, ApiError> {
        let Authenticated(caller) = Authenticated::from_request_parts(parts, service).await?;
        let upgrade = WebSocketUpgrade::from_request_parts(parts, service)
            .await
            .map_err(|_other| {
                ApiError::new(
                    ErrorCode::ValidationError,
                    "this endpoint is a WebSocket: the request is no upgrade to one",
                )
            })?;
        let place = service.socket(caller.org_id())?;
        Ok(Self {
            caller,
            place,
            upgrade,
        })
    }
}

impl Opening {
    /// Answers 101 and goes on with the socket.
    pub(super) fn accept<F>(self, serve: impl FnOnce(Line) -> F + Send + 'static) -> axum::response::Response
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let Self { place, upgrade, .. } = self;
        upgrade
            .max_message_size(MAX_MESSAGE)
            .max_frame_size(MAX_MESSAGE)
            // Everything is flushed at once: what is not taken waits here, and nowhere else.
            .write_buffer_size(0)
            .on_upgrade(move |socket| serve(Line { socket, place }))
    }
}

impl Line {
    /// The next text or bytes. Pings are answered on the way. Can be dropped and called again.
    pub(super) async fn receive(&mut self) -> Result<Message, HungUp> {
        loop {
            let received = tokio::select! {
                () = self.place.ended() => return Err(HungUp),
                received = self.socket.recv() => received,
            };
            match received {
                Some(Ok(message @ (Message::Text(_) | Message::Binary(_)))) => return Ok(message),
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                Some(Ok(Message::Close(_)) | Err(_)) | None => return Err(HungUp),
            }
        }
    }

    /// Says something, as fast as the client reads.
    pub(super) async fn send(&mut self, message: Message) -> Result<(), HungUp> {
        let sent = tokio::select! {
            () = self.place.ended() => return Err(HungUp),
            sent = tokio::time::timeout(STALL, self.socket.send(message)) => sent,
        };
        match sent {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(HungUp),
        }
    }

    /// Says JSON.
    pub(super) async fn tell(&mut self, json: String) -> Result<(), HungUp> {
        self.send(Message::Text(json.into())).await
    }

    /// Asks whether the client is there.
    pub(super) async fn ping(&mut self) -> Result<(), HungUp> {
        self.send(Message::Ping(bytes::Bytes::new())).await
    }

    /// Says why it ends, to a client that may be gone.
    pub(super) async fn close(&mut self, reason: &'static str) {
        let frame = CloseFrame {
            code: close_code::NORMAL,
            reason: Utf8Bytes::from_static(reason),
        };
        let _gone = self.send(Message::Close(Some(frame))).await;
    }
}
