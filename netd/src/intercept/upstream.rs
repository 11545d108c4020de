//! Connections to the server of a flow whose requests are read. Owns: that they lead to the address the sandbox chose,
//! by verified TLS where the client came by TLS, and which of them a request goes over. Never falls back to anything
//! weaker, never follows a redirect.

use std::{fs, path::Path, sync::Arc, time::Duration};

use http::{
    HeaderMap, HeaderValue, Method, Request, Response, Uri, Version,
    header::{COOKIE, HOST, TE},
    uri::{Authority, Scheme},
};
use http_body_util::{BodyExt as _, Empty};
use hyper::{
    body::{Body as _, Incoming},
    client::conn::{http1, http2},
};
use hyper_util::rt::TokioIo;
use rustls::{
    ClientConfig, RootCertStore,
    client::Resumption,
    pki_types::{CertificateDer, ServerName, pem::PemObject as _},
};
use sandgate_policy::Reason;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::{
    Body, CONNECTION_WINDOW, Channel, FlowTasks, HEADER_LIST_MAX, HTTP1_BUFFER, SEND_BUFFER, STREAM_WINDOW,
    Target, World,
    pool::{Connection, Epoch, Link, Pool},
};
use crate::egress::dial::NotDialled;

/// Where distributions keep the roots they trust, in the order in which they are looked for.
const SYSTEM_ROOTS: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];
/// Time for the server's half of the TLS handshake.
const HANDSHAKE_TIME: Duration = Duration::from_secs(15);
/// Connections of HTTP/1.1 that one flow has at once: its client may ask for more at once over HTTP/2.
const CONNECTIONS_MAX: usize = 8;
/// Time for a connection whose answer has just ended to be ready for the next.
const READY_TIME: Duration = Duration::from_millis(100);
/// How often a request is sent again that a closing connection gave back unsent.
const ATTEMPTS: usize = 3;

/// How servers are verified. Shared by all flows; holds no session of any.
pub struct UpstreamTls {
    either: Arc<ClientConfig>,
    http1: Arc<ClientConfig>,
}

/// Servers could not be verified.
#[derive(Debug, thiserror::Error)]
pub enum RootsError {
    /// A file that was named.
    #[error("{path}: {problem}")]
    File {
        /// Which.
        path: String,
        /// What is wrong with it.
        problem: String,
    },
    /// rustls says no.
    #[error("TLS cannot be used: {0}")]
    Tls(#[from] rustls::Error),
}

impl UpstreamTls {
    /// Verifies against the system's roots and those of `extra`, if it is given. Without any, no server is
    /// ever verified.
    ///
    /// # Errors
    /// When `extra` cannot be used.
    pub fn load(extra: Option<&Path>) -> Result<Self, RootsError> {
        let mut roots = RootCertStore::empty();
        let system = SYSTEM_ROOTS.iter().find_map(|path| fs::read(path).ok());
        for certificate in CertificateDer::pem_slice_iter(&system.unwrap_or_default()).flatten() {
            // What the system trusts and rustls cannot read is left out: it is then not trusted.
            if let Err(error) = roots.add(certificate) {
                tracing::debug!(%error, "a root of the system cannot be used");
            }
        }
        if let Some(path) = extra {
            let problem = |problem: String| RootsError::File {
                path: path.display().to_string(),
                problem,
            };
            let pem = fs::read(path).map_err(|error| problem(error.to_string()))?;
            let before = roots.len();
            for certificate in CertificateDer::pem_slice_iter(&pem) {
                let certificate = certificate.map_err(|error| problem(error.to_string()))?;
                roots
                    .add(certificate)
                    .map_err(|error| problem(error.to_string()))?;
            }
            if roots.len() == before {
                return Err(problem("holds no certificate".to_owned()));
            }
        }
        if roots.is_empty() {
            tracing::warn!("this node trusts no roots: no server of a flow that is read can be verified");
        }
        Self::trusting(roots)
    }

    /// Verifies against these roots.
    ///
    /// # Errors
    /// When the provider has no TLS 1.2 or later.
    pub fn trusting(roots: RootCertStore) -> Result<Self, RootsError> {
        let mut config = ClientConfig::builder_with_provider(super::provider())
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        // One tenant's sessions are not another's.
        config.resumption = Resumption::disabled();
        let mut http1 = config.clone();
        http1.alpn_protocols = vec![b"http/1.1".to_vec()];
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Self {
            either: Arc::new(config),
            http1: Arc::new(http1),
        })
    }
}

/// A request did not get an answer.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// No connection.
    #[error("{0}")]
    Dial(#[from] NotDialled),
    /// The certificate does not hold, or TLS cannot be spoken.
    #[error("TLS with {name}: {problem}")]
    Tls {
        /// With whom.
        name: String,
        /// What rustls says.
        problem: String,
    },
    /// HTTP cannot be spoken.
    #[error("the server's HTTP is broken or ended early: {0}")]
    Http(#[from] hyper::Error),
}

impl UpstreamError {
    /// The reason for the record.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Dial(error) => error.reason(),
            Self::Tls { .. } => Reason::UpstreamTls,
            Self::Http(_) => Reason::UpstreamUnreachable,
        }
    }
}

/// What a flow has of connections.
pub(crate) struct Upstream {
    world: Arc<dyn World>,
    tls: Option<Arc<UpstreamTls>>,
    target: Target,
    tasks: FlowTasks,
    pool: Arc<Pool>,
    /// Of HTTP/2. Held while a connection is made, so that the first one tells the others what the server speaks.
    shared: tokio::sync::Mutex<Option<Connection>>,
    places: Arc<Semaphore>,
}

/// Where a connection goes when the answer on it has ended. Dropped before, the connection ends.
pub(crate) struct Home {
    back: Option<(Arc<Pool>, Target, Connection)>,
    /// Streams of HTTP/2 share one connection, whose own limits hold.
    _place: Option<OwnedSemaphorePermit>,
}

impl Home {
    /// The answer has ended well: the connection may be used again.
    pub(crate) fn go(self) {
        if let Some((pool, target, connection)) = self.back {
            pool.give(target, connection);
        }
    }
}

/// Over what a request goes.
enum Way {
    Own(Connection, Option<OwnedSemaphorePermit>),
    Shared {
        sender: http2::SendRequest<Body>,
        is_used: bool,
    },
}

/// What it takes to send a request again of which the server may have seen a part.
struct Again {
    method: Method,
    uri: Uri,
    headers: HeaderMap,
}

impl Again {
    /// Of a request that changes nothing and has no body (RFC 9110 9.2.2).
    fn of(request: &Request<Body>) -> Option<Self> {
        let repeatable = request.method().is_safe() && request.body().is_end_stream();
        repeatable.then(|| Self {
            method: request.method().clone(),
            uri: request.uri().clone(),
            headers: request.headers().clone(),
        })
    }

    fn request(self) -> Request<Body> {
        let body = Empty::new().map_err(|never| match never {}).boxed_unsync();
        let mut request = Request::new(body);
        *request.method_mut() = self.method;
        *request.uri_mut() = self.uri;
        *request.headers_mut() = self.headers;
        request
    }
}

impl Upstream {
    /// For a flow; `tls` says how its server is verified, where the client came by TLS.
    pub(crate) fn new(
        world: Arc<dyn World>,
        tls: Option<Arc<UpstreamTls>>,
        target: Target,
        tasks: FlowTasks,
    ) -> Self {
        // In clear a connection costs a packet there and back: none is kept that nobody uses.
        let pool = match target.channel {
            Channel::Tls => world.pool(),
            Channel::Clear | Channel::ClearHttp2 => Arc::default(),
        };
        Self {
            pool,
            world,
            tls,
            target,
            tasks,
            shared: tokio::sync::Mutex::new(None),
            places: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
        }
    }

    /// Sends a request whose target is a path, and waits for the head of its answer.
    pub(crate) async fn send(
        &self,
        mut request: Request<Body>,
    ) -> Result<(Response<Incoming>, Home), UpstreamError> {
        let mut again = Again::of(&request);
        let mut attempt = 1;
        loop {
            // What cannot be sent again takes no connection that may be closing.
            let way = self.way(again.is_none()).await?;
            let (sent, is_used, home) = match way {
                Way::Shared { mut sender, is_used } => {
                    self.for_http2(&mut request);
                    let sent = sender.try_send_request(request).await;
                    (
                        sent,
                        is_used,
                        Home {
                            back: None,
                            _place: None,
                        },
                    )
                }
                Way::Own(mut connection, place) => {
                    let sent = match &mut connection.link {
                        Link::One(sender) => {
                            self.for_http1(&mut request);
                            sender.try_send_request(request).await
                        }
                        Link::Many(sender) => {
                            self.for_http2(&mut request);
                            sender.try_send_request(request).await
                        }
                    };
                    let is_used = connection.is_used;
                    let back = Some((Arc::clone(&self.pool), self.target.clone(), connection));
                    (sent, is_used, Home { back, _place: place })
                }
            };
            let mut error = match sent {
                Ok(answer) => return Ok((answer, home)),
                Err(error) => error,
            };
            drop(home);
            // Given back whole: the connection ended before a byte of it was sent. Else a server that closes a
            // connection it believes to be idle has perhaps seen it.
            request = match (error.take_message(), again.take()) {
                (Some(unsent), kept) if attempt < ATTEMPTS => {
                    again = kept;
                    unsent
                }
                (None, Some(kept)) if is_used => kept.request(),
                (Some(_), _) | (None, _) => return Err(error.into_error().into()),
            };
            attempt += 1;
        }
    }

    /// Sends a request on an own connection of HTTP/1.1, on which another protocol may follow.
    pub(crate) async fn send_upgrade(
        &self,
        mut request: Request<Body>,
    ) -> Result<(Response<Incoming>, Home), UpstreamError> {
        let place = self.place().await;
        let stream = self.world.dial().await?;
        let mut sender = match self.target.channel {
            Channel::Tls => {
                self.upgradable(self.secure(stream, |tls| &tls.http1).await?)
                    .await?
            }
            Channel::Clear | Channel::ClearHttp2 => self.upgradable(stream).await?,
        };
        self.for_http1(&mut request);
        let answer = sender.send_request(request).await?;
        Ok((
            answer,
            Home {
                back: None,
                _place: place,
            },
        ))
    }

    /// The flow has ended well: what it shared may serve another one.
    pub(crate) async fn give_back(&self) {
        if let Some(connection) = self.shared.lock().await.take() {
            self.pool.give(self.target.clone(), connection);
        }
    }

    /// A connection that is ready.
    async fn way(&self, is_sure: bool) -> Result<Way, UpstreamError> {
        if let Some(way) = shared(&mut *self.shared.lock().await).await {
            return Ok(way);
        }
        let place = self.place().await;
        while let Some(mut connection) = self.pool.take(&self.target, is_sure) {
            match &mut connection.link {
                Link::One(sender) => {
                    if let Ok(Ok(())) = tokio::time::timeout(READY_TIME, sender.ready()).await {
                        return Ok(Way::Own(connection, place));
                    }
                }
                Link::Many(_) => {
                    let mut slot = self.shared.lock().await;
                    // Another request of the flow may have been faster.
                    if slot.is_none() {
                        *slot = Some(connection);
                    }
                    if let Some(way) = shared(&mut slot).await {
                        return Ok(way);
                    }
                }
            }
        }
        let mut slot = self.shared.lock().await;
        if let Some(way) = shared(&mut slot).await {
            return Ok(way);
        }
        let epoch = self.pool.epoch();
        let stream = self.world.dial().await?;
        let connection = match self.target.channel {
            Channel::Tls => {
                let stream = self.secure(stream, |tls| &tls.either).await?;
                if stream.get_ref().1.alpn_protocol() == Some(b"h2") {
                    self.many(stream, epoch).await?
                } else {
                    drop(slot);
                    return Ok(Way::Own(self.one(stream, epoch).await?, place));
                }
            }
            Channel::Clear => {
                drop(slot);
                return Ok(Way::Own(self.one(stream, epoch).await?, place));
            }
            Channel::ClearHttp2 => self.many(stream, epoch).await?,
        };
        *slot = Some(connection);
        match shared(&mut slot).await {
            Some(way) => Ok(way),
            // It closed at once: the request fails on it, and says why.
            None => Ok(match slot.take() {
                Some(connection) => Way::Own(connection, None),
                None => Way::Own(self.one(self.world.dial().await?, epoch).await?, place),
            }),
        }
    }

    /// Waits for its turn among the connections of the flow.
    async fn place(&self) -> Option<OwnedSemaphorePermit> {
        // It is never closed.
        Arc::clone(&self.places).acquire_owned().await.ok()
    }

    async fn secure(
        &self,
        stream: TcpStream,
        config: impl FnOnce(&UpstreamTls) -> &Arc<ClientConfig>,
    ) -> Result<TlsStream<TcpStream>, UpstreamError> {
        let name = self.target.host();
        let failed = |problem: String| UpstreamError::Tls {
            name: name.clone(),
            problem,
        };
        let Some(tls) = &self.tls else {
            return Err(failed("no way to verify it".to_owned()));
        };
        let server = ServerName::try_from(name.clone()).map_err(|error| failed(error.to_string()))?;
        let connecting = TlsConnector::from(Arc::clone(config(tls))).connect(server, stream);
        match tokio::time::timeout(HANDSHAKE_TIME, connecting).await {
            Ok(connected) => connected.map_err(|error| failed(error.to_string())),
            Err(_elapsed) => Err(failed("no answer during the handshake".to_owned())),
        }
    }

    /// A connection of HTTP/1.1 that the pool may have.
    async fn one<S>(&self, stream: S, epoch: Epoch) -> Result<Connection, UpstreamError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let mut builder = http1::Builder::new();
        builder.max_buf_size(HTTP1_BUFFER);
        let (mut sender, connection) = builder.handshake(TokioIo::new(stream)).await?;
        let end = self.tasks.apart();
        end.spawn("server connection", connection);
        let guard = end.drop_guard();
        sender.ready().await?;
        Ok(Connection::new(Link::One(sender), epoch, guard))
    }

    /// One of HTTP/2.
    async fn many<S>(&self, stream: S, epoch: Epoch) -> Result<Connection, UpstreamError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let end = self.tasks.apart();
        let mut builder = http2::Builder::new(end.clone());
        builder
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_send_buf_size(SEND_BUFFER)
            .max_header_list_size(HEADER_LIST_MAX);
        let (mut sender, connection) = builder.handshake(TokioIo::new(stream)).await?;
        end.spawn("server connection", connection);
        let guard = end.drop_guard();
        sender.ready().await?;
        Ok(Connection::new(Link::Many(sender), epoch, guard))
    }

    /// One of HTTP/1.1 that ends with the flow.
    async fn upgradable<S>(&self, stream: S) -> Result<http1::SendRequest<Body>, UpstreamError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let mut builder = http1::Builder::new();
        builder.max_buf_size(HTTP1_BUFFER);
        let (mut sender, connection) = builder.handshake(TokioIo::new(stream)).await?;
        self.tasks.spawn("server connection", connection.with_upgrades());
        sender.ready().await?;
        Ok(sender)
    }

    fn for_http1(&self, request: &mut Request<Body>) {
        *request.version_mut() = Version::HTTP_11;
        let path = request.uri().path_and_query().cloned();
        if let Some(path) = path {
            *request.uri_mut() = Uri::from(path);
        }
        let authority = HeaderValue::from_str(&self.target.authority());
        let headers = request.headers_mut();
        if let Ok(authority) = authority {
            headers.insert(HOST, authority);
        }
        headers.remove(TE);
        // HTTP/2 may cut the field into several (RFC 9113 8.2.3).
        let cookies: Vec<&[u8]> = headers
            .get_all(COOKIE)
            .iter()
            .map(HeaderValue::as_bytes)
            .collect();
        if cookies.len() > 1
            && let Ok(joined) = HeaderValue::from_bytes(&cookies.join(&b"; "[..]))
        {
            headers.insert(COOKIE, joined);
        }
    }

    fn for_http2(&self, request: &mut Request<Body>) {
        *request.version_mut() = Version::HTTP_2;
        request.headers_mut().remove(HOST);
        let mut parts = std::mem::take(request.uri_mut()).into_parts();
        parts.scheme = Some(match self.target.channel {
            Channel::Tls => Scheme::HTTPS,
            Channel::Clear | Channel::ClearHttp2 => Scheme::HTTP,
        });
        parts.authority = Authority::try_from(self.target.authority()).ok();
        if let Ok(uri) = Uri::from_parts(parts) {
            *request.uri_mut() = uri;
        }
    }
}

/// A way over the connection that the flow's requests share, if it still serves.
async fn shared(slot: &mut Option<Connection>) -> Option<Way> {
    let is_used = slot.as_ref()?.is_used;
    if let Some(Connection {
        link: Link::Many(sender),
        ..
    }) = slot
        && !sender.is_closed()
        && sender.ready().await.is_ok()
    {
        let sender = sender.clone();
        return Some(Way::Shared { sender, is_used });
    }
    *slot = None;
    None
}
