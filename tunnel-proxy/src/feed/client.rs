//! HTTP/1.1 to the controller over sockets that the control channel passes. Owns: one connection for the feed, one for
//! acknowledgements, and their limits. The controller is trusted, but a broken one must not exhaust us.

use std::{
    io,
    os::{fd::AsFd as _, unix::net::UnixStream as StdUnixStream},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{
    body::Incoming,
    client::conn::http1::{self, SendRequest},
};
use hyper_util::rt::TokioIo;
use sandgate_api::{control::Open, feed::Revision, tunnel::TunnelFrame};
use sandgate_daemon::{handover::Channel, tasks::Tasks};
use serde::Serialize;
use tokio::net::UnixStream;

/// How long a full channel may keep us waiting: the controller is away then.
const SEND_TIME: Duration = Duration::from_secs(2);
/// Time for the head of an answer.
const ANSWER_TIME: Duration = Duration::from_secs(5);
/// Longest frame, in bytes: a snapshot of thousands of routes.
const FRAME_MAX: usize = 64 << 20;
/// Longest answer to a call.
const ANSWER_MAX: usize = 64 << 10;

/// The way to the controller.
#[derive(Debug)]
pub struct Controller {
    channel: Channel,
    tasks: Tasks,
    /// The connection of calls, kept between them.
    calls: Option<SendRequest<Full<Bytes>>>,
}

/// A call or the feed failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No connection.
    #[error("cannot open a connection to the controller: {0}")]
    Open(#[source] io::Error),
    /// HTTP.
    #[error("talking to the controller: {0}")]
    Http(#[from] hyper::Error),
    /// The request.
    #[error("the request cannot be made: {0}")]
    Request(#[from] http::Error),
    /// Its body.
    #[error("the request cannot be written: {0}")]
    Body(#[source] serde_json::Error),
    /// The controller says no.
    #[error("the controller answered {0}")]
    Status(StatusCode),
    /// No answer, or no heartbeat.
    #[error("the controller is silent")]
    Silent,
    /// The feed ended.
    #[error("the controller ended the feed")]
    Ended,
    /// A frame that cannot be read.
    #[error("a frame of the feed cannot be read: {0}")]
    Frame(#[source] serde_json::Error),
    /// A frame without an end.
    #[error("a frame of the feed is over {FRAME_MAX} bytes")]
    TooLong,
    /// A delta is missing.
    #[error("the controller is at a later revision than the frames it sent")]
    Behind,
}

impl Controller {
    /// Talks over sockets passed by the channel.
    pub fn new(channel: Channel, tasks: Tasks) -> Self {
        Self {
            channel,
            tasks,
            calls: None,
        }
    }

    /// Opens the feed.
    ///
    /// # Errors
    /// When the controller is away or answers otherwise.
    pub async fn frames(&self, since: Option<Revision>) -> Result<Frames, ClientError> {
        let since = since
            .map(|revision| format!("?since={revision}"))
            .unwrap_or_default();
        let request = Request::get(format!("/tunnels/feed{since}"))
            .header(header::HOST, "controller")
            .body(Full::new(Bytes::new()))?;
        let mut sender = self.connect().await?;
        let answer = within(sender.send_request(request)).await??;
        if answer.status() != StatusCode::OK {
            return Err(ClientError::Status(answer.status()));
        }
        Ok(Frames {
            body: answer.into_body(),
            buffer: BytesMut::new(),
            seen: 0,
            _sender: sender,
        })
    }

    /// Makes one call with a JSON body. Any 2xx is success.
    ///
    /// # Errors
    /// When the controller is away or says no.
    pub async fn post<B: Serialize + Sync>(&mut self, path: &str, body: &B) -> Result<(), ClientError> {
        let body = serde_json::to_vec(body).map_err(ClientError::Body)?;
        let request = Request::post(path)
            .header(header::HOST, "controller")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))?;
        // Taken out, so that a call that fails or is given up leaves no half-used connection behind.
        let mut sender = match self.calls.take().filter(|sender| !sender.is_closed()) {
            Some(sender) => sender,
            None => self.connect().await?,
        };
        let call = async {
            sender.ready().await?;
            let answer = sender.send_request(request).await?;
            let status = answer.status();
            // Read to its end, so that the connection can be used again.
            let rest = Limited::new(answer.into_body(), ANSWER_MAX).collect().await;
            Ok::<_, hyper::Error>((status, rest.is_ok()))
        };
        let (status, is_read) = within(call).await??;
        if is_read {
            self.calls = Some(sender);
        }
        if status.is_success() {
            Ok(())
        } else {
            Err(ClientError::Status(status))
        }
    }

    async fn connect(&self) -> Result<SendRequest<Full<Bytes>>, ClientError> {
        let (ours, theirs) = StdUnixStream::pair().map_err(ClientError::Open)?;
        ours.set_nonblocking(true).map_err(ClientError::Open)?;
        let packet = serde_json::to_vec(&Open::Feed).map_err(ClientError::Body)?;
        let sending = self.channel.send(&packet, Some(theirs.as_fd()));
        match tokio::time::timeout(SEND_TIME, sending).await {
            Ok(sent) => sent.map_err(ClientError::Open)?,
            Err(_elapsed) => return Err(ClientError::Silent),
        }
        let stream = UnixStream::from_std(ours).map_err(ClientError::Open)?;
        let (sender, connection) = within(http1::handshake(TokioIo::new(stream))).await??;
        self.tasks.spawn("controller connection", async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection to the controller ended");
            }
        });
        Ok(sender)
    }
}

async fn within<F: Future>(future: F) -> Result<F::Output, ClientError> {
    tokio::time::timeout(ANSWER_TIME, future)
        .await
        .map_err(|_elapsed| ClientError::Silent)
}

/// The frames of one feed connection.
pub struct Frames {
    body: Incoming,
    buffer: BytesMut,
    /// Bytes of the buffer that hold no line end.
    seen: usize,
    /// The connection lives as long as this does.
    _sender: SendRequest<Full<Bytes>>,
}

impl Frames {
    /// The next frame.
    ///
    /// # Errors
    /// When the feed ended or cannot be read.
    pub async fn next(&mut self) -> Result<TunnelFrame, ClientError> {
        loop {
            if let Some(end) = self.buffer[self.seen..].iter().position(|byte| *byte == b'\n') {
                let line = self.buffer.split_to(self.seen + end + 1);
                self.seen = 0;
                if line.trim_ascii().is_empty() {
                    continue;
                }
                return serde_json::from_slice(&line).map_err(ClientError::Frame);
            }
            self.seen = self.buffer.len();
            if self.seen > FRAME_MAX {
                return Err(ClientError::TooLong);
            }
            let frame = self.body.frame().await.ok_or(ClientError::Ended)??;
            if let Ok(data) = frame.into_data() {
                self.buffer.extend_from_slice(&data);
            }
        }
    }
}
