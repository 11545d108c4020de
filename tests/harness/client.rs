//! The REST API, spoken from the node itself (the API listens on its loopback address).

use std::{
    net::{SocketAddr, TcpStream},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use serde_json::Value;

use crate::{namespace::Namespace, world::runtime};

/// Longest wait for an answer: above every deadline the API itself keeps.
const PATIENCE: Duration = Duration::from_secs(60);

/// Every answer, for whoever looks for something in them later.
pub type Heard = Arc<Mutex<Vec<Answer>>>;

/// A caller of the API, with or without a key.
#[derive(Clone)]
pub struct Client {
    place: Arc<Namespace>,
    api: SocketAddr,
    heard: Heard,
    key: Option<String>,
}

/// A request in the making.
pub struct Call<'a> {
    client: &'a Client,
    method: Method,
    path: String,
    headers: Vec<(&'static str, String)>,
    body: Bytes,
}

/// An answer of the API.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Method and path of the request.
    pub asked: String,
    /// The status.
    pub status: StatusCode,
    /// The headers.
    pub headers: HeaderMap,
    /// The whole body.
    pub body: Bytes,
    /// From the connect to the last byte.
    pub took: Duration,
}

/// An open stream of server-sent events.
pub struct Events {
    body: Incoming,
    buffer: String,
    // The connection ends with the stream: that is how a client cancels.
    connection: tokio::task::JoinHandle<()>,
}

impl Client {
    pub(crate) fn new(place: &Arc<Namespace>, api: SocketAddr, heard: &Heard) -> Self {
        Self {
            place: Arc::clone(place),
            api,
            heard: Arc::clone(heard),
            key: None,
        }
    }

    /// The same caller with another key.
    pub fn with_key(&self, key: &str) -> Self {
        Self {
            key: Some(key.to_owned()),
            ..self.clone()
        }
    }

    /// A caller without key.
    pub fn without_key(&self) -> Self {
        Self {
            key: None,
            ..self.clone()
        }
    }

    /// `GET /api/v1<path>`.
    pub fn get(&self, path: &str) -> Call<'_> {
        self.call(Method::GET, path)
    }

    /// `POST /api/v1<path>`.
    pub fn post(&self, path: &str) -> Call<'_> {
        self.call(Method::POST, path)
    }

    /// `PUT /api/v1<path>`.
    pub fn put(&self, path: &str) -> Call<'_> {
        self.call(Method::PUT, path)
    }

    /// `PATCH /api/v1<path>`.
    pub fn patch(&self, path: &str) -> Call<'_> {
        self.call(Method::PATCH, path)
    }

    /// `DELETE /api/v1<path>`.
    pub fn delete(&self, path: &str) -> Call<'_> {
        self.call(Method::DELETE, path)
    }

    /// Any method below `/api/v1`, or from the root when the path begins with `//`.
    pub fn call(&self, method: Method, path: &str) -> Call<'_> {
        let path = path
            .strip_prefix('/')
            .filter(|path| path.starts_with('/'))
            .map_or_else(|| format!("/api/v1{path}"), str::to_owned);
        let key = self
            .key
            .as_ref()
            .map(|key| ("authorization", format!("Bearer {key}")));
        Call {
            client: self,
            method,
            path,
            headers: key.into_iter().collect(),
            body: Bytes::new(),
        }
    }

    /// A plain connection to the API.
    ///
    /// # Errors
    /// When nobody listens.
    pub fn connect(&self) -> Result<TcpStream> {
        let api = self.api;
        let stream = self.place.run(move || TcpStream::connect(api));
        stream.with_context(|| format!("connecting to the API on {api}"))
    }
}

impl Call<'_> {
    /// With this JSON body.
    #[must_use]
    pub fn json(self, body: &Value) -> Self {
        self.header("content-type", "application/json")
            .raw(body.to_string())
    }

    /// With exactly this body.
    #[must_use]
    pub fn raw(mut self, body: impl Into<Bytes>) -> Self {
        self.body = body.into();
        self
    }

    /// With this header.
    #[must_use]
    pub fn header(mut self, name: &'static str, value: &str) -> Self {
        self.headers.push((name, value.to_owned()));
        self
    }

    /// Sends it and reads the whole answer.
    ///
    /// # Panics
    /// When there is no answer; use [`Call::try_send`] where that is part of the test.
    #[track_caller]
    pub fn send(self) -> Answer {
        let asked = format!("{} {}", self.method, self.path);
        self.try_send()
            .unwrap_or_else(|error| panic!("{asked}: {error:#}"))
    }

    /// Sends it and reads the whole answer.
    ///
    /// # Errors
    /// When there is no (whole) answer.
    pub fn try_send(self) -> Result<Answer> {
        let (asked, started) = (format!("{} {}", self.method, self.path), Instant::now());
        let heard = Arc::clone(&self.client.heard);
        let (response, connection) = self.open()?;
        let (parts, body) = response.into_parts();
        let body = runtime().block_on(async { tokio::time::timeout(PATIENCE, body.collect()).await });
        connection.abort();
        let body = body
            .context("the body did not end")?
            .context("reading the body")?
            .to_bytes();
        let answer = Answer {
            asked,
            status: parts.status,
            headers: parts.headers,
            body,
            took: started.elapsed(),
        };
        let mut heard = heard.lock().unwrap_or_else(PoisonError::into_inner);
        heard.push(answer.clone());
        Ok(answer)
    }

    /// Sends it and leaves the answer open.
    ///
    /// # Errors
    /// When the answer is no event stream.
    pub fn events(self) -> Result<Events> {
        let (response, connection) = self.open()?;
        let kind = response
            .headers()
            .get("content-type")
            .and_then(|kind| kind.to_str().ok())
            .unwrap_or("none");
        anyhow::ensure!(
            kind.starts_with("text/event-stream"),
            "{} with content type {kind}",
            response.status()
        );
        Ok(Events {
            body: response.into_body(),
            buffer: String::new(),
            connection,
        })
    }

    fn open(self) -> Result<(http::Response<Incoming>, tokio::task::JoinHandle<()>)> {
        let stream = self.client.connect()?;
        stream.set_nonblocking(true)?;
        let mut request = Request::builder()
            .method(self.method)
            .uri(&self.path)
            .header("host", "sandgate");
        for (name, value) in &self.headers {
            request = request.header(*name, value);
        }
        let request = request.body(Full::new(self.body))?;
        runtime().block_on(async {
            let stream = tokio::net::TcpStream::from_std(stream)?;
            let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
            let connection = runtime().spawn(async move {
                // What goes wrong here is seen by whoever reads the answer.
                connection.await.ok();
            });
            let response = tokio::time::timeout(PATIENCE, sender.send_request(request)).await;
            Ok((
                response.context("no answer in time")?.context("no answer")?,
                connection,
            ))
        })
    }
}

impl Answer {
    /// The body as JSON.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error} in {self:?}"))
    }

    /// The JSON object of a success.
    #[track_caller]
    pub fn ok(&self) -> Value {
        assert!(
            self.status.is_success(),
            "{} answered {}: {}",
            self.asked,
            self.status,
            self.text()
        );
        let value = self.json();
        assert!(
            value.is_object(),
            "{} answered something else than an object: {value}",
            self.asked
        );
        value
    }

    /// Checks that this is a refusal in the documented envelope and gives its inside.
    #[track_caller]
    pub fn refused(&self, status: u16, code: &str) -> Value {
        assert_eq!(
            self.status.as_u16(),
            status,
            "{} answered {}",
            self.asked,
            self.text()
        );
        let envelope = self.json();
        let error = &envelope["error"];
        assert_eq!(error["code"], code, "{} answered {envelope}", self.asked);
        assert!(
            error["message"]
                .as_str()
                .is_some_and(|message| !message.is_empty()),
            "no message in {envelope}"
        );
        let id = self.headers.get("x-request-id").and_then(|id| id.to_str().ok());
        assert!(id.is_some(), "{} has no x-request-id", self.asked);
        if let Some(body) = error.get("request_id") {
            assert_eq!(body.as_str(), id, "two request ids in {envelope}");
        }
        error.clone()
    }

    /// Checks that this is a 400 about `field`.
    #[track_caller]
    pub fn refused_field(&self, field: &str) {
        let error = self.refused(400, "VALIDATION_ERROR");
        assert_eq!(
            error["details"]["field"], field,
            "{} blames another field: {error}",
            self.asked
        );
        let message = error["message"].as_str().unwrap_or_default();
        assert!(
            message.contains(field),
            "{} does not name `{field}`: {message}",
            self.asked
        );
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

impl Events {
    /// The next event's data as JSON; `None` at the end of the stream.
    ///
    /// # Panics
    /// When nothing comes for `limit`, or what comes is no event of the contract.
    #[track_caller]
    pub fn next(&mut self, limit: Duration) -> Option<Value> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(end) = self.buffer.find("\n\n") {
                let block: String = self.buffer.drain(..end + 2).collect();
                if let Some(data) = data_of(&block) {
                    return Some(
                        serde_json::from_str(data).unwrap_or_else(|error| panic!("{error} in {block:?}")),
                    );
                }
                continue;
            }
            let rest = deadline.saturating_duration_since(Instant::now());
            let frame = runtime().block_on(async { tokio::time::timeout(rest, self.body.frame()).await });
            let frame = frame.unwrap_or_else(|_| panic!("no event within {limit:?}"));
            let bytes = frame?.ok()?.into_data().unwrap_or_default();
            self.buffer.push_str(&String::from_utf8_lossy(&bytes));
        }
    }

    /// Every event to the end.
    #[track_caller]
    pub fn rest(&mut self, limit: Duration) -> Vec<Value> {
        std::iter::from_fn(|| self.next(limit)).collect()
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

/// The data of one event, or `None` for a comment. Published clients read single lines that begin with
/// exactly `data: `.
#[track_caller]
fn data_of(block: &str) -> Option<&str> {
    let lines: Vec<&str> = block.lines().filter(|line| line.starts_with("data")).collect();
    assert!(lines.len() <= 1, "an event of several lines: {block:?}");
    lines.first().map(|line| {
        line.strip_prefix("data: ")
            .unwrap_or_else(|| panic!("clients skip {line:?}"))
    })
}
