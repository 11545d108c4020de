//! HTTP and HTTPS servers of the test internet. They record the SNI of every TLS connection, every request,
//! and how long connections live.
//!
//! | path | answer |
//! |---|---|
//! | `/drip` | a line every 50 ms until the peer goes away |
//! | `/bytes/<n>` | `n` bytes |
//! | `POST` to any | the body |
//! | any other | `hello from <host> at <address>` |

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use http::{Method, Request, Response, header::HOST};
use http_body_util::{BodyExt as _, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    body::{Frame, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use rustls::ServerConfig;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::mpsc,
};
use tokio_rustls::LazyConfigAcceptor;

use crate::{namespace::Namespace, world::runtime};

/// One connection to a web server.
#[derive(Debug, Clone)]
pub struct Visit {
    /// The server's address.
    pub server: SocketAddr,
    /// The client's address.
    pub from: SocketAddr,
    /// The name in the TLS ClientHello.
    pub sni: Option<String>,
    /// A TLS handshake was completed (never so on a plain port).
    pub handshake: bool,
    /// `METHOD host path`, in order.
    pub requests: Vec<String>,
    /// The connection is over.
    pub closed: bool,
}

/// What the web servers of a world saw.
#[derive(Clone, Default)]
pub struct Web {
    visits: Arc<Mutex<Vec<Visit>>>,
}

impl Web {
    /// Every connection so far, oldest first.
    pub fn visits(&self) -> Vec<Visit> {
        self.lock().clone()
    }

    /// Connections with a request for `host` so far.
    pub fn visits_for(&self, host: &str) -> Vec<Visit> {
        let mut visits = self.visits();
        visits.retain(|visit| {
            visit
                .requests
                .iter()
                .any(|request| request.split(' ').nth(1) == Some(host))
        });
        visits
    }

    /// Serves HTTP (or HTTPS, with `tls`) on an address of the namespace.
    pub(crate) fn serve(
        &self,
        internet: &Namespace,
        address: SocketAddr,
        tls: Option<Arc<ServerConfig>>,
    ) -> Result<()> {
        let listener = internet.run(move || std::net::TcpListener::bind(address));
        let listener = listener.with_context(|| format!("web server on {address}"))?;
        listener.set_nonblocking(true)?;
        let _context = runtime().enter();
        let listener = TcpListener::from_std(listener)?;
        let web = self.clone();
        runtime().spawn(async move {
            while let Ok((stream, from)) = listener.accept().await {
                let index = {
                    let mut visits = web.lock();
                    let requests = Vec::new();
                    visits.push(Visit {
                        server: address,
                        from,
                        sni: None,
                        handshake: false,
                        requests,
                        closed: false,
                    });
                    visits.len() - 1
                };
                let (web, tls) = (web.clone(), tls.clone());
                runtime().spawn(async move {
                    web.converse(stream, tls, index, address).await;
                    web.lock()[index].closed = true;
                });
            }
        });
        Ok(())
    }

    async fn converse(
        &self,
        stream: TcpStream,
        tls: Option<Arc<ServerConfig>>,
        index: usize,
        address: SocketAddr,
    ) {
        stream.set_nodelay(true).ok();
        let Some(tls) = tls else {
            return self.http(stream, index, address).await;
        };
        let hello = tokio::time::timeout(
            Duration::from_secs(30),
            LazyConfigAcceptor::new(rustls::server::Acceptor::default(), stream),
        );
        let Ok(Ok(hello)) = hello.await else { return };
        self.lock()[index].sni = hello.client_hello().server_name().map(str::to_owned);
        let Ok(stream) = hello.into_stream(tls).await else {
            return;
        };
        self.lock()[index].handshake = true;
        self.http(stream, index, address).await;
    }

    async fn http(&self, stream: impl AsyncRead + AsyncWrite + Unpin, index: usize, address: SocketAddr) {
        let service = service_fn(|request| self.answer(request, index, address));
        // A client that breaks off is no failure of the server.
        http1::Builder::new()
            .serve_connection(TokioIo::new(stream), service)
            .await
            .ok();
    }

    async fn answer(
        &self,
        request: Request<Incoming>,
        index: usize,
        address: SocketAddr,
    ) -> Result<Response<UnsyncBoxBody<Bytes, Infallible>>, Infallible> {
        let header = request
            .headers()
            .get(HOST)
            .and_then(|host| host.to_str().ok())
            .unwrap_or("-");
        let host = request.uri().host().unwrap_or(header).to_owned();
        let path = request.uri().path().to_owned();
        self.lock()[index]
            .requests
            .push(format!("{} {host} {path}", request.method()));
        let body = if request.method() == Method::POST {
            let bytes = request.into_body().collect().await.map(|body| body.to_bytes());
            Full::new(bytes.unwrap_or_default()).boxed_unsync()
        } else if path == "/drip" {
            drip()
        } else if let Some(length) = path.strip_prefix("/bytes/").and_then(|text| text.parse().ok()) {
            Full::new(Bytes::from(vec![b'x'; length])).boxed_unsync()
        } else {
            Full::new(Bytes::from(format!("hello from {host} at {}\n", address.ip()))).boxed_unsync()
        };
        Ok(Response::new(body))
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Visit>> {
        self.visits.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn drip() -> UnsyncBoxBody<Bytes, Infallible> {
    let (lines, body) = mpsc::channel(1);
    runtime().spawn(async move {
        while lines
            .send(Ok(Frame::data(Bytes::from_static(b"drip\n"))))
            .await
            .is_ok()
        {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    StreamBody::new(Receiver(body)).boxed_unsync()
}

/// A channel as a stream of body frames.
struct Receiver(mpsc::Receiver<Result<Frame<Bytes>, Infallible>>);

impl futures_util::Stream for Receiver {
    type Item = Result<Frame<Bytes>, Infallible>;

    fn poll_next(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        self.0.poll_recv(context)
    }
}
