//! Connections to the server of an intercepted flow. Owns: that they are verified TLS to the address the sandbox
//! chose, and their reuse within the flow. Never falls back to anything weaker, never follows a redirect.

use std::{
    fs,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use http::{
    HeaderValue, Request, Response, Uri, Version,
    header::{COOKIE, HOST, TE},
    uri::{Authority, Scheme},
};
use hyper::{
    body::Incoming,
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
    net::TcpStream,
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::{
    Body, CONNECTION_WINDOW, FlowTasks, HEADER_LIST_MAX, HTTP1_BUFFER, SEND_BUFFER, STREAM_WINDOW, Target,
    World,
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

/// The connections of one flow.
pub(crate) struct Upstream {
    world: Arc<dyn World>,
    tls: Arc<UpstreamTls>,
    target: Target,
    tasks: FlowTasks,
    /// Of HTTP/1.1, between two requests.
    idle: Idle,
    /// Held while a connection is made, so that the first one tells the others what the server speaks.
    shared: tokio::sync::Mutex<Option<http2::SendRequest<Body>>>,
    places: Arc<Semaphore>,
}

type Idle = Arc<Mutex<Vec<http1::SendRequest<Body>>>>;

enum Link {
    One(http1::SendRequest<Body>),
    Many(http2::SendRequest<Body>),
}

/// Where a connection goes when the answer on it has ended.
pub(crate) struct Home {
    back: Option<(Idle, http1::SendRequest<Body>)>,
    /// Streams of HTTP/2 share one connection, whose own limits hold.
    _place: Option<OwnedSemaphorePermit>,
}

impl Home {
    /// The answer has ended well: the connection may be used again.
    pub(crate) fn go(self) {
        if let Some((idle, sender)) = self.back
            && !sender.is_closed()
        {
            idle.lock().unwrap_or_else(PoisonError::into_inner).push(sender);
        }
    }
}

impl Upstream {
    pub(crate) fn new(
        world: Arc<dyn World>,
        tls: Arc<UpstreamTls>,
        target: Target,
        tasks: FlowTasks,
    ) -> Self {
        Self {
            world,
            tls,
            target,
            tasks,
            idle: Arc::default(),
            shared: tokio::sync::Mutex::new(None),
            places: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
        }
    }

    /// Sends a request whose target is a path, and waits for the head of its answer.
    pub(crate) async fn send(
        &self,
        mut request: Request<Body>,
    ) -> Result<(Response<Incoming>, Home), UpstreamError> {
        let mut attempt = 1;
        loop {
            let (place, link) = self.link().await?;
            let (sent, back) = match link {
                Link::Many(mut sender) => {
                    self.for_http2(&mut request);
                    (sender.try_send_request(request).await, None)
                }
                Link::One(mut sender) => {
                    self.for_http1(&mut request);
                    (sender.try_send_request(request).await, Some(sender))
                }
            };
            match sent {
                Ok(answer) => {
                    let back = back.map(|sender| (Arc::clone(&self.idle), sender));
                    return Ok((answer, Home { back, _place: place }));
                }
                // Given back whole: the connection ended before a byte of it was sent.
                Err(mut error) => match error.take_message() {
                    Some(unsent) if attempt < ATTEMPTS => {
                        attempt += 1;
                        request = unsent;
                    }
                    Some(_) | None => return Err(error.into_error().into()),
                },
            }
        }
    }

    /// Sends a request on an own connection of HTTP/1.1, on which another protocol may follow.
    pub(crate) async fn send_upgrade(
        &self,
        mut request: Request<Body>,
    ) -> Result<(Response<Incoming>, Home), UpstreamError> {
        let place = self.place().await;
        let mut sender = self.http1(self.connect(&self.tls.http1).await?).await?;
        self.for_http1(&mut request);
        let answer = sender.send_request(request).await?;
        let back = Some((Arc::clone(&self.idle), sender));
        Ok((answer, Home { back, _place: place }))
    }

    /// A connection that is ready, and the place it takes.
    async fn link(&self) -> Result<(Option<OwnedSemaphorePermit>, Link), UpstreamError> {
        let mut shared = self.shared.lock().await;
        if let Some(sender) = &mut *shared {
            if !sender.is_closed() && sender.ready().await.is_ok() {
                return Ok((None, Link::Many(sender.clone())));
            }
            *shared = None;
        }
        drop(shared);
        let place = self.place().await;
        while let Some(mut sender) = self.idle() {
            if let Ok(Ok(())) = tokio::time::timeout(READY_TIME, sender.ready()).await {
                return Ok((place, Link::One(sender)));
            }
        }
        let mut shared = self.shared.lock().await;
        if let Some(sender) = shared.as_ref().filter(|sender| !sender.is_closed()) {
            return Ok((None, Link::Many(sender.clone())));
        }
        let stream = self.connect(&self.tls.either).await?;
        if stream.get_ref().1.alpn_protocol() != Some(b"h2") {
            drop(shared);
            return Ok((place, Link::One(self.http1(stream).await?)));
        }
        let mut builder = http2::Builder::new(self.tasks.clone());
        builder
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_send_buf_size(SEND_BUFFER)
            .max_header_list_size(HEADER_LIST_MAX);
        let (mut sender, connection) = builder.handshake(TokioIo::new(stream)).await?;
        self.tasks.spawn("server connection", connection);
        sender.ready().await?;
        *shared = Some(sender.clone());
        Ok((None, Link::Many(sender)))
    }

    /// Waits for its turn among the connections of the flow.
    async fn place(&self) -> Option<OwnedSemaphorePermit> {
        // It is never closed.
        Arc::clone(&self.places).acquire_owned().await.ok()
    }

    fn idle(&self) -> Option<http1::SendRequest<Body>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }

    async fn connect(&self, config: &Arc<ClientConfig>) -> Result<TlsStream<TcpStream>, UpstreamError> {
        let stream = self.world.dial().await?;
        let name = self.target.name.as_str();
        let failed = |problem: String| UpstreamError::Tls {
            name: name.to_owned(),
            problem,
        };
        let server = ServerName::try_from(name.to_owned()).map_err(|error| failed(error.to_string()))?;
        let connecting = TlsConnector::from(Arc::clone(config)).connect(server, stream);
        match tokio::time::timeout(HANDSHAKE_TIME, connecting).await {
            Ok(connected) => connected.map_err(|error| failed(error.to_string())),
            Err(_elapsed) => Err(failed("no answer during the handshake".to_owned())),
        }
    }

    async fn http1(&self, stream: TlsStream<TcpStream>) -> Result<http1::SendRequest<Body>, UpstreamError> {
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
        parts.scheme = Some(Scheme::HTTPS);
        parts.authority = Authority::try_from(self.target.authority()).ok();
        if let Ok(uri) = Uri::from_parts(parts) {
            *request.uri_mut() = uri;
        }
    }
}
