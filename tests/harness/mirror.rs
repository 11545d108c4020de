//! HTTPS servers of the test internet that look closely: they keep every request whole, in HTTP/1.1 and HTTP/2,
//! and can be told to answer with any bytes in any pieces.
//!
//! | path | answer |
//! |---|---|
//! | one given to [`Mirror::script`] | what was given |
//! | `/headers` | `{"headers": {name: value}}` |
//! | `/bearer` | `{"authenticated": true, "token": …}`, or 401 without a bearer token |
//! | `/redirect/<status>?<target>` | a redirect to the target |
//! | `/events` | ten server-sent events 100 ms apart, each with the request's `Authorization` |
//! | `/socket` | a WebSocket: says the request's `Authorization`, then echoes |
//! | `/<name>.git/…` | a Git repository, see [`Mirror::repositories`] |
//! | any other | the request as JSON: `method`, `path`, `version`, `headers` (a list of pairs), `body` |

use std::{
    collections::HashMap,
    convert::Infallible,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    body::{Frame, Incoming},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use rustls::ServerConfig;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::mpsc,
};
use tokio_rustls::TlsAcceptor;

use crate::{lock, namespace::Namespace, world::runtime};

mod git;
mod socket;

pub use git::Repositories;

/// Largest body of a request that is kept.
const BODY: usize = 4 << 20;

type Body = UnsyncBoxBody<Bytes, Infallible>;

/// A request as it arrived.
#[derive(Debug, Clone)]
pub struct Heard {
    /// The server's address.
    pub server: SocketAddr,
    /// Counts the connections to all mirrors of the world.
    pub connection: usize,
    /// The name in the TLS ClientHello; `None` in clear.
    pub sni: Option<String>,
    /// `HTTP/1.1` or `HTTP/2.0`.
    pub version: String,
    /// The method.
    pub method: String,
    /// `:authority` or `Host`.
    pub authority: String,
    /// Path and query.
    pub target: String,
    /// The headers in order, names in lower case.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: Bytes,
    /// When its head had arrived.
    pub at: Instant,
}

impl Heard {
    /// Every value of a header.
    pub fn all(&self, name: &str) -> Vec<&str> {
        let fits = self.headers.iter().filter(|(header, _)| header == name);
        fits.map(|(_, value)| value.as_str()).collect()
    }

    /// All of it as text, for whoever looks for something in it.
    pub fn text(&self) -> String {
        format!("{self:?} {}", String::from_utf8_lossy(&self.body))
    }
}

/// An answer to be given.
#[derive(Debug, Clone)]
pub struct Script {
    /// Its status.
    pub status: u16,
    /// Its headers. With a `content-length` it is sent so, else chunked.
    pub headers: Vec<(String, String)>,
    /// Its body, each piece a chunk and a write of its own.
    pub pieces: Vec<Bytes>,
    /// Sent after the body.
    pub trailers: Vec<(String, String)>,
}

impl Default for Script {
    fn default() -> Self {
        Self {
            status: 200,
            headers: Vec::new(),
            pieces: Vec::new(),
            trailers: Vec::new(),
        }
    }
}

/// All mirrors of a world.
#[derive(Clone, Default)]
pub struct Mirror {
    heard: Arc<Mutex<Vec<Heard>>>,
    scripts: Arc<Mutex<HashMap<String, Script>>>,
    repositories: Arc<Mutex<Option<Repositories>>>,
    connections: Arc<AtomicUsize>,
}

impl Mirror {
    /// Every request so far, oldest first.
    pub fn heard(&self) -> Vec<Heard> {
        lock(&self.heard).clone()
    }

    /// The requests whose path begins so.
    pub fn heard_below(&self, path: &str) -> Vec<Heard> {
        let mut heard = self.heard();
        heard.retain(|request| request.target.starts_with(path));
        heard
    }

    /// The one request whose path begins so.
    #[track_caller]
    pub fn only(&self, path: &str) -> Heard {
        let mut heard = self.heard_below(path);
        assert_eq!(heard.len(), 1, "requests below {path}: {heard:#?}");
        heard.remove(0)
    }

    /// Connections so far.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    /// From now on requests for this path are answered so.
    pub fn script(&self, path: &str, script: Script) {
        lock(&self.scripts).insert(path.to_owned(), script);
    }

    /// From now on Git repositories are served, to whoever has the password.
    pub fn repositories(&self, repositories: Repositories) {
        *lock(&self.repositories) = Some(repositories);
    }

    /// Serves HTTP (or HTTPS, with `tls`) on an address of the namespace.
    pub(crate) fn serve(
        &self,
        internet: &Namespace,
        address: SocketAddr,
        tls: Option<Arc<ServerConfig>>,
    ) -> Result<()> {
        let listener = internet.run(move || std::net::TcpListener::bind(address));
        let listener = listener.with_context(|| format!("mirror on {address}"))?;
        listener.set_nonblocking(true)?;
        let _context = runtime().enter();
        let listener = TcpListener::from_std(listener)?;
        let mirror = self.clone();
        runtime().spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (mirror, tls) = (mirror.clone(), tls.clone());
                runtime().spawn(async move { mirror.converse(stream, tls, address).await });
            }
        });
        Ok(())
    }

    async fn converse(&self, stream: TcpStream, tls: Option<Arc<ServerConfig>>, server: SocketAddr) {
        stream.set_nodelay(true).ok();
        let connection = self.connections.fetch_add(1, Ordering::Relaxed);
        // A client that breaks off is no failure of the server.
        let Some(tls) = tls else {
            return self.http(stream, server, connection, None).await;
        };
        let Ok(stream) = TlsAcceptor::from(tls).accept(stream).await else {
            return;
        };
        let sni = stream.get_ref().1.server_name().map(str::to_owned);
        self.http(stream, server, connection, sni).await;
    }

    async fn http(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        server: SocketAddr,
        connection: usize,
        sni: Option<String>,
    ) {
        let mirror = self.clone();
        let service = service_fn(move |request| {
            let (mirror, sni) = (mirror.clone(), sni.clone());
            async move { mirror.answer(request, server, connection, sni).await }
        });
        let builder = auto::Builder::new(TokioExecutor::new());
        let io = TokioIo::new(stream);
        builder.serve_connection_with_upgrades(io, service).await.ok();
    }

    async fn answer(
        &self,
        mut request: Request<Incoming>,
        server: SocketAddr,
        connection: usize,
        sni: Option<String>,
    ) -> Result<Response<Body>, Infallible> {
        let at = Instant::now();
        let upgrade = socket::wanted(&request).then(|| hyper::upgrade::on(&mut request));
        let (parts, body) = request.into_parts();
        let body = if upgrade.is_some() {
            Bytes::new()
        } else {
            let collected = Limited::new(body, BODY).collect().await;
            collected
                .map(http_body_util::Collected::to_bytes)
                .unwrap_or_default()
        };
        let headers: Vec<(String, String)> = parts
            .headers
            .iter()
            .map(|(name, value)| {
                (
                    name.to_string(),
                    String::from_utf8_lossy(value.as_bytes()).into_owned(),
                )
            })
            .collect();
        let host = parts
            .headers
            .get(header::HOST)
            .and_then(|host| host.to_str().ok());
        let authority = parts.uri.authority().map(ToString::to_string);
        let heard = Heard {
            server,
            connection,
            sni,
            version: format!("{:?}", parts.version),
            method: parts.method.to_string(),
            authority: authority.or_else(|| host.map(str::to_owned)).unwrap_or_default(),
            target: parts
                .uri
                .path_and_query()
                .map(ToString::to_string)
                .unwrap_or_default(),
            headers,
            body,
            at,
        };
        lock(&self.heard).push(heard.clone());
        let path = parts.uri.path();
        let script = lock(&self.scripts).get(path).cloned();
        if let Some(script) = script {
            return Ok(play(script));
        }
        if let Some(upgrade) = upgrade {
            return Ok(socket::open(upgrade, &heard));
        }
        let repositories = lock(&self.repositories).clone();
        if let Some(repositories) = repositories.filter(|_| path.contains(".git/")) {
            return Ok(repositories.answer(&heard).await);
        }
        Ok(respond(path, &heard))
    }
}

fn respond(path: &str, heard: &Heard) -> Response<Body> {
    if let Some(status) = path.strip_prefix("/redirect/") {
        let target = heard.target.split_once('?').map_or("/", |(_, target)| target);
        let mut response = Response::new(full("elsewhere\n"));
        *response.status_mut() = status.parse().unwrap_or(StatusCode::FOUND);
        let target = HeaderValue::from_str(target).unwrap_or(HeaderValue::from_static("/"));
        response.headers_mut().insert(header::LOCATION, target);
        return response;
    }
    match path {
        "/events" => events(heard.all("authorization").join(", ")),
        "/bearer" => {
            let sent = heard.all("authorization").concat();
            if let Some(token) = sent.strip_prefix("Bearer ") {
                return as_json(&json!({ "authenticated": true, "token": token }));
            }
            let mut response = Response::new(full(""));
            *response.status_mut() = StatusCode::UNAUTHORIZED;
            response
        }
        "/headers" => {
            let headers: HashMap<_, _> = heard.headers.iter().cloned().collect();
            as_json(&json!({ "headers": headers }))
        }
        _ => as_json(&json!({
            "method": heard.method, "path": heard.target, "version": heard.version, "headers": heard.headers,
            "body": String::from_utf8_lossy(&heard.body),
        })),
    }
}

fn as_json(value: &Value) -> Response<Body> {
    let mut response = Response::new(full(format!("{value}\n")));
    let json = HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, json);
    response
}

fn full(text: impl Into<Bytes>) -> Body {
    Full::new(text.into()).boxed_unsync()
}

fn headers(pairs: &[(String, String)]) -> HeaderMap {
    let pairs = pairs.iter().filter_map(|(name, value)| {
        let name = HeaderName::from_bytes(name.as_bytes()).ok()?;
        Some((name, HeaderValue::from_bytes(value.as_bytes()).ok()?))
    });
    let mut map = HeaderMap::new();
    for (name, value) in pairs {
        map.append(name, value);
    }
    map
}

/// A body whose pieces are sent one after the other with a pause between them.
fn in_pieces(pieces: Vec<Bytes>, trailers: Option<HeaderMap>, pause: Duration) -> Body {
    let (frames, body) = mpsc::channel::<Result<Frame<Bytes>, Infallible>>(1);
    runtime().spawn(async move {
        for piece in pieces {
            if frames.send(Ok(Frame::data(piece))).await.is_err() {
                return;
            }
            tokio::time::sleep(pause).await;
        }
        if let Some(trailers) = trailers {
            frames.send(Ok(Frame::trailers(trailers))).await.ok();
        }
    });
    let frames = futures_util::stream::unfold(body, |mut body| async move {
        let frame = body.recv().await?;
        Some((frame, body))
    });
    StreamBody::new(frames).boxed_unsync()
}

fn play(script: Script) -> Response<Body> {
    let trailers = (!script.trailers.is_empty()).then(|| headers(&script.trailers));
    let mut response = Response::new(in_pieces(script.pieces, trailers, Duration::from_millis(1)));
    *response.status_mut() = StatusCode::from_u16(script.status).unwrap_or(StatusCode::IM_A_TEAPOT);
    *response.headers_mut() = headers(&script.headers);
    for (name, _) in &script.trailers {
        if let Ok(name) = HeaderValue::from_str(name) {
            // HTTP/1.1 sends only trailers that were announced.
            response.headers_mut().append(header::TRAILER, name);
        }
    }
    response
}

fn events(authorization: String) -> Response<Body> {
    let pieces =
        (0..10).map(|number| Bytes::from(format!("id: {number}\ndata: {number} {authorization}\n\n")));
    let mut response = Response::new(in_pieces(pieces.collect(), None, Duration::from_millis(100)));
    let kind = HeaderValue::from_static("text/event-stream");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}
