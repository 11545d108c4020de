//! HTTP/1.1 to the controller over sockets that the control channel passes. Owns: one connection for the
//! feed, one for calls, and their limits. The controller is trusted, but a broken one must not exhaust us.

use std::{sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use futures_util::future::BoxFuture;
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{
    body::Incoming,
    client::conn::http1::{self, SendRequest},
};
use hyper_util::rt::TokioIo;
use sandgate_api::{
    credential::{CaLease, CaRequest, CredentialLease, CredentialRequest},
    feed::{FeedFrame, Revision},
};
use sandgate_daemon::tasks::Tasks;
use serde::{Serialize, de::DeserializeOwned};
use tokio::sync::Mutex;

use crate::{
    control::{Control, ControlError},
    intercept::leases::{Broker, BrokerError},
};

/// Time for the head of an answer.
const ANSWER_TIME: Duration = Duration::from_secs(5);
/// Time for a lease, connection and all: a request waits for it.
const LEASE_TIME: Duration = Duration::from_secs(3);
/// Longest frame, in bytes: a snapshot of thousands of sandboxes.
const FRAME_MAX: usize = 256 << 20;
/// Room for the frames to come that is kept after a longer one.
const KEPT: usize = 1 << 20;
/// Longest answer to a call.
const ANSWER_MAX: usize = 64 << 10;

/// The way to the controller.
pub struct Controller {
    control: Arc<Control>,
    tasks: Tasks,
    /// The connection of calls, kept between them.
    calls: Kept,
    /// The same for leases: requests wait for them, and must not wait for deliveries.
    leases: Kept,
}

type Kept = Mutex<Option<SendRequest<Full<Bytes>>>>;

/// A call or the feed failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No connection.
    #[error(transparent)]
    Control(#[from] ControlError),
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
    /// A lease that cannot be read.
    #[error("the controller's answer is no lease")]
    Lease,
    /// A frame that does not follow the one before.
    #[error("a frame of the feed does not follow what came before it; all of it is asked for anew")]
    OutOfOrder,
}

impl Controller {
    /// Talks over sockets passed by `control`.
    pub fn new(control: Arc<Control>, tasks: Tasks) -> Self {
        Self {
            control,
            tasks,
            calls: Mutex::new(None),
            leases: Mutex::new(None),
        }
    }

    /// Opens the feed.
    ///
    /// # Errors
    /// When the controller is away or answers otherwise.
    pub async fn frames(&self, node: &str, since: Option<Revision>) -> Result<Frames, ClientError> {
        let since = since
            .map(|revision| format!("&since={revision}"))
            .unwrap_or_default();
        let request = Request::get(format!("/feed?node={node}{since}"))
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
    pub async fn post<B: Serialize + Sync>(&self, path: &str, body: &B) -> Result<(), ClientError> {
        self.post_written(path, written(body)?).await
    }

    /// The same with a body that is JSON already.
    ///
    /// # Errors
    /// As [`Self::post`].
    pub async fn post_written(&self, path: &str, body: Bytes) -> Result<(), ClientError> {
        let (status, _) = self.call(&self.calls, path, body).await?;
        if status.is_success() {
            Ok(())
        } else {
            Err(ClientError::Status(status))
        }
    }

    /// Asks for a lease; nothing when the controller knows of none.
    async fn lease<B: Serialize + Sync, L: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<Option<L>, ClientError> {
        let body = written(body)?;
        let asking = async {
            match self.call(&self.leases, path, body.clone()).await {
                // The connection was an old one, of a controller that is no more.
                Err(ClientError::Http(_)) => self.call(&self.leases, path, body).await,
                asked => asked,
            }
        };
        let asked = tokio::time::timeout(LEASE_TIME, asking).await;
        let (status, answer) = asked.map_err(|_elapsed| ClientError::Silent)??;
        match status {
            StatusCode::NOT_FOUND => Ok(None),
            // What is wrong with it is not said: the words may be those of a value.
            status if status.is_success() => serde_json::from_slice(&answer)
                .map(Some)
                .map_err(|_unsayable| ClientError::Lease),
            status => Err(ClientError::Status(status)),
        }
    }

    async fn call(&self, kept: &Kept, path: &str, body: Bytes) -> Result<(StatusCode, Bytes), ClientError> {
        let request = Request::post(path)
            .header(header::HOST, "controller")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))?;
        let mut calls = kept.lock().await;
        // Taken out, so that a call that fails or is given up leaves no half-used connection behind.
        let mut sender = match calls.take().filter(|sender| !sender.is_closed()) {
            Some(sender) => sender,
            None => self.connect().await?,
        };
        let call = async {
            sender.ready().await?;
            let answer = sender.send_request(request).await?;
            let status = answer.status();
            // Read to its end, so that the connection can be used again.
            let rest = Limited::new(answer.into_body(), ANSWER_MAX).collect().await;
            Ok::<_, hyper::Error>((status, rest.ok().map(http_body_util::Collected::to_bytes)))
        };
        let (status, rest) = within(call).await??;
        if rest.is_some() {
            *calls = Some(sender);
        }
        Ok((status, rest.unwrap_or_default()))
    }

    async fn connect(&self) -> Result<SendRequest<Full<Bytes>>, ClientError> {
        let stream = self.control.open_feed().await?;
        let (sender, connection) = within(http1::handshake(TokioIo::new(stream))).await??;
        self.tasks.spawn("controller connection", async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection to the controller ended");
            }
        });
        Ok(sender)
    }
}

fn written<B: Serialize>(body: &B) -> Result<Bytes, ClientError> {
    serde_json::to_vec(body)
        .map(Bytes::from)
        .map_err(ClientError::Body)
}

impl Broker for Controller {
    fn credential(
        &self,
        request: CredentialRequest,
    ) -> BoxFuture<'_, Result<Option<CredentialLease>, BrokerError>> {
        Box::pin(async move {
            let lease = self.lease("/feed/credential", &request).await;
            lease.map_err(|error| BrokerError(error.to_string()))
        })
    }

    fn authority(&self, request: CaRequest) -> BoxFuture<'_, Result<Option<CaLease>, BrokerError>> {
        Box::pin(async move {
            let lease = self.lease("/feed/ca", &request).await;
            lease.map_err(|error| BrokerError(error.to_string()))
        })
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
    /// The next frame, and its line as it came.
    ///
    /// # Errors
    /// When the feed ended or cannot be read.
    pub async fn next(&mut self) -> Result<(FeedFrame, Bytes), ClientError> {
        loop {
            if let Some(end) = self.buffer[self.seen..].iter().position(|byte| *byte == b'\n') {
                let line = self.buffer.split_to(self.seen + end + 1);
                self.seen = 0;
                if self.buffer.is_empty() && line.len() > KEPT {
                    self.buffer = BytesMut::new();
                }
                if line.trim_ascii().is_empty() {
                    continue;
                }
                let frame = serde_json::from_slice(&line).map_err(ClientError::Frame)?;
                return Ok((frame, line.freeze()));
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

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use sandgate_api::control::MAX_PACKET;
    use sandgate_daemon::handover::{self, Channel};
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::UnixStream,
    };
    use tokio_util::sync::CancellationToken;

    use super::*;

    /// Longest wait for what happens at once.
    const SOON: Duration = Duration::from_secs(60);

    /// A controller that says what it is told to, byte by byte.
    struct Scripted {
        channel: Channel,
    }

    impl Scripted {
        fn new() -> (Self, Controller) {
            let (ours, theirs): (OwnedFd, OwnedFd) = handover::pair().expect("a pair");
            let control = Control::new(theirs).expect("a channel");
            let tasks = Tasks::new(CancellationToken::new());
            let channel = Channel::from_fd(ours).expect("a channel");
            (Self { channel }, Controller::new(Arc::new(control), tasks))
        }

        /// Answers the next connection with these bytes and ends it. Gives what was asked.
        async fn answer(&self, bytes: &[u8]) -> String {
            let mut packet = [0; MAX_PACKET];
            let (_, socket) = self.channel.recv(&mut packet).await.expect("an opened feed");
            let stream = std::os::unix::net::UnixStream::from(socket.expect("a socket"));
            stream.set_nonblocking(true).expect("non-blocking");
            let mut stream = UnixStream::from_std(stream).expect("a stream");
            let mut asked = Vec::new();
            while !asked.ends_with(b"\r\n\r\n") {
                asked.push(stream.read_u8().await.expect("a request"));
            }
            stream.write_all(bytes).await.expect("written");
            String::from_utf8(asked).expect("text")
        }
    }

    fn script() -> (Vec<u8>, Vec<FeedFrame>) {
        let frames = vec![
            FeedFrame::Snapshot {
                revision: 3,
                sandboxes: Vec::new(),
            },
            FeedFrame::Heartbeat { revision: 3 },
            FeedFrame::Delta {
                since: Some(3),
                revision: 5,
                upserts: Vec::new(),
                removed: vec!["sandbox-1".parse().expect("an id")],
            },
        ];
        let mut bytes = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n".to_vec();
        for frame in &frames {
            let mut line = serde_json::to_vec(frame).expect("written");
            line.push(b'\n');
            // In two chunks, so that frames and chunks do not end together.
            let (head, tail) = line.split_at(line.len() / 2);
            for part in [head, tail] {
                bytes.extend(format!("{:x}\r\n", part.len()).bytes());
                bytes.extend(part);
                bytes.extend(b"\r\n");
            }
        }
        (bytes, frames)
    }

    #[tokio::test]
    async fn a_feed_that_is_cut_at_any_byte_gives_whole_frames_in_order_and_then_an_error() {
        let (scripted, controller) = Scripted::new();
        let (bytes, frames) = script();
        let mut seen = 0;
        for cut in 0..=bytes.len() {
            let following = async {
                let mut taken = Vec::new();
                let error = match controller.frames("local", Some(2)).await {
                    Ok(mut feed) => loop {
                        match feed.next().await {
                            Ok((frame, _line)) => taken.push(frame),
                            Err(error) => break error,
                        }
                    },
                    Err(error) => error,
                };
                (taken, error)
            };
            let both = async { tokio::join!(scripted.answer(&bytes[..cut]), following) };
            let (asked, (taken, error)) = tokio::time::timeout(SOON, both).await.expect("it ends");
            assert!(
                asked.starts_with("GET /feed?node=local&since=2 HTTP/1.1\r\n"),
                "{asked}"
            );
            assert_eq!(taken, frames[..taken.len()], "cut at {cut}");
            // The more was sent the more is taken.
            assert!(taken.len() >= seen, "cut at {cut}: {error}");
            seen = taken.len();
        }
        assert_eq!(seen, frames.len());
    }

    #[tokio::test]
    async fn an_answer_that_is_no_feed_gives_no_frame() {
        let (scripted, controller) = Scripted::new();
        let frame = "{\"snapshot\":{\"revision\":9,\"sandboxes\":[]}}\n";
        for answer in [
            format!(
                "HTTP/1.1 503 Service Unavailable\r\ncontent-length: {}\r\n\r\n{frame}",
                frame.len()
            ),
            format!(
                "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{}",
                frame.len(),
                frame.replace('}', "]")
            ),
            frame.to_owned(),
            "\0".repeat(4096),
        ] {
            let following = async {
                let mut feed = controller.frames("local", None).await?;
                feed.next().await
            };
            let both = async { tokio::join!(scripted.answer(answer.as_bytes()), following) };
            let (_, taken) = tokio::time::timeout(SOON, both).await.expect("it ends");
            assert!(taken.is_err(), "{answer:?}: {taken:?}");
        }
    }
}
