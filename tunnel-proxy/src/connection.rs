//! One connection of a client. Owns: which HTTP it speaks, its limits of time, and its end: by itself, with its tunnel,
//! by silence, or with the program.

use std::{
    convert::Infallible,
    io,
    net::IpAddr,
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use hyper::{
    rt::Executor,
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use sandgate_api::tunnel::TunnelProtocol;
use sandgate_relay::{
    copy::Activity,
    http1::strict::{Notes, Strict, Upgrades},
};
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tokio_util::sync::CancellationToken;

use crate::{
    answer::Problem,
    app::Proxy,
    forward::{self, Http1},
    metrics::Open,
    raw,
    tunnel::Tunnel,
    upstream::{CONNECTION_WINDOW, HEADER_LIST_MAX, SEND_BUFFER, STREAM_WINDOW},
};

/// How long a connection may wait for its next request. Published clients keep connections for 120 s.
const KEEP_ALIVE: Duration = Duration::from_secs(150);
/// The same, in times for a head, as long as nothing on the connection was allowed: one to begin the first request in,
/// one for its head.
const STRANGER_HEAD_TIMES: u32 = 2;
/// How long a client that has closed its half may wait in silence: it may be gone altogether, which cannot be told.
const HALF_CLOSED: Duration = Duration::from_secs(60);
/// Longest sleep between two looks at the time.
const LOOK: Duration = Duration::from_secs(15);
/// Time for answers under way on a connection whose tunnel has ended.
const LAST_WORDS: Duration = Duration::from_millis(150);
/// Silence after which TCP asks whether the client is still there.
const PROBE_AFTER: Duration = Duration::from_secs(60);
/// Requests at once on one connection of HTTP/2.
const STREAMS_MAX: u32 = 128;
const HTTP1_BUFFER: usize = 128 * 1024;
const HEADERS_MAX: usize = 100;
/// How a connection of HTTP/2 begins (RFC 9113 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Where a client came in.
#[derive(Debug, Clone)]
pub enum Entrance {
    /// The listener of all tunnels: the host says which one.
    Shared,
    /// The tunnel's own port: the host says nothing.
    Own(Arc<Tunnel>),
}

/// One connection.
pub struct Connection {
    /// What it is served from.
    pub proxy: Arc<Proxy>,
    /// Where it came in.
    pub entrance: Entrance,
    /// Who it is.
    pub peer: IpAddr,
    /// What every request on it is answered.
    pub refusal: Option<Problem>,
    /// Cancelled when it must break off.
    pub kill: CancellationToken,
    /// Whether its end is a reset.
    pub resets: Resets,
    /// When bytes last moved.
    activity: Activity,
    /// When a request last began or ended.
    requests: Activity,
    under_way: AtomicUsize,
    half_closed: AtomicBool,
    /// A tunnel has let a request on it through.
    is_allowed: AtomicBool,
    /// Of HTTP/2: cancelled when it takes no new requests.
    dismissed: CancellationToken,
    /// The tunnel of its entrance had ended when it came.
    was_over: bool,
    /// Its place among all connections.
    _place: Box<dyn Send + Sync>,
    _open: Open,
}

/// Makes closing a connection a reset: the client learns that this was no ordinary end.
#[derive(Debug, Clone, Default)]
pub struct Resets(Arc<AtomicBool>);

impl Resets {
    /// From here on.
    pub fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether it is.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// A request under way on a connection.
pub struct UnderWay {
    connection: Arc<Connection>,
    /// Of HTTP/1.1.
    notes: Option<Arc<Notes>>,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.connection.asked();
        self.connection.under_way.fetch_sub(1, Ordering::Relaxed);
        if let Some(notes) = &self.notes {
            notes.answer_ended();
        }
    }
}

impl Connection {
    /// A connection that holds `place` as long as anything of it lives.
    pub fn new(
        proxy: Arc<Proxy>,
        entrance: Entrance,
        peer: IpAddr,
        refusal: Option<Problem>,
        place: impl Send + Sync + 'static,
    ) -> Arc<Self> {
        let was_over = match &entrance {
            Entrance::Own(tunnel) => !tunnel.is_open(),
            Entrance::Shared => false,
        };
        Arc::new(Self {
            _open: proxy.metrics.connection(),
            proxy,
            entrance,
            peer,
            refusal,
            kill: CancellationToken::new(),
            resets: Resets::default(),
            activity: Activity::default(),
            requests: Activity::default(),
            under_way: AtomicUsize::new(0),
            half_closed: AtomicBool::new(false),
            is_allowed: AtomicBool::new(false),
            dismissed: CancellationToken::new(),
            was_over,
            _place: Box::new(place),
        })
    }

    /// Counts a request until the guard is dropped.
    pub fn begin(self: &Arc<Self>, notes: Option<Arc<Notes>>) -> UnderWay {
        self.under_way.fetch_add(1, Ordering::Relaxed);
        self.asked();
        UnderWay {
            connection: Arc::clone(self),
            notes,
        }
    }

    /// A tunnel lets a request on it through: from here on it may wait for more.
    pub fn allow(&self) {
        self.is_allowed.store(true, Ordering::Relaxed);
    }

    /// Whether one has.
    pub fn is_allowed(&self) -> bool {
        self.is_allowed.load(Ordering::Relaxed)
    }

    /// Takes no new requests (GOAWAY, RFC 9113 6.8), and ends after what is under way.
    pub fn dismiss(&self) {
        self.dismissed.cancel();
    }

    /// A request begins or ends. One more from a stranger that was told to go does not buy it time: GOAWAY takes
    /// effect only when the client has answered a PING.
    fn asked(&self) {
        if self.is_allowed() || !self.dismissed.is_cancelled() {
            self.requests.touch();
        }
    }

    /// Serves it to its end.
    pub async fn serve(self: Arc<Self>, stream: TcpStream) {
        let socket = SockRef::from(&stream);
        // Without them it is slower, or a vanished client is noticed later.
        drop(socket.set_tcp_nodelay(true));
        let probes = TcpKeepalive::new()
            .with_time(PROBE_AFTER)
            .with_interval(PROBE_AFTER / 4);
        drop(socket.set_tcp_keepalive(&probes));
        if let Entrance::Own(tunnel) = &self.entrance
            && tunnel.protocol == TunnelProtocol::Tcp
        {
            let tunnel = Arc::clone(tunnel);
            return raw::serve(self, stream, tunnel).await;
        }
        let mut near = Near {
            received: Vec::new(),
            at: 0,
            stream,
            connection: Arc::clone(&self),
        };
        let limit = self.proxy.limits.header_timeout;
        let spoken = tokio::select! {
            spoken = tokio::time::timeout(limit, near.sniff()) => spoken,
            () = self.ended() => return,
        };
        match spoken {
            Ok(Ok(true)) => self.serve_http2(near).await,
            Ok(Ok(false)) => self.serve_http1(near).await,
            // It said nothing, or nothing whole.
            Ok(Err(_)) | Err(_) => {}
        }
    }

    async fn serve_http1(self: Arc<Self>, near: Near) {
        let notes = Arc::new(Notes::default());
        let ordinals = AtomicU64::new(0);
        let connection = Arc::clone(&self);
        let kept = Arc::clone(&notes);
        let service = service_fn(move |request| {
            let connection = Arc::clone(&connection);
            let http1 = Http1 {
                // Requests of one connection begin one after another.
                ordinal: ordinals.fetch_add(1, Ordering::Relaxed),
                notes: Arc::clone(&kept),
            };
            async move { Ok::<_, Infallible>(forward::answer(connection, request, Some(http1)).await) }
        });
        let strict = Strict::new(near, notes)
            .with_upgrades(Upgrades::Any)
            .with_half_close()
            .with_head_time(self.proxy.limits.header_timeout);
        let mut builder = http1::Builder::new();
        builder
            // The filter in front keeps that time; between requests it is kept here.
            .header_read_timeout(None)
            .max_headers(HEADERS_MAX + 1)
            .max_buf_size(HTTP1_BUFFER);
        let serving = builder
            .serve_connection(TokioIo::new(strict), service)
            .with_upgrades();
        self.drive(serving, |serving| serving.graceful_shutdown()).await;
    }

    async fn serve_http2(self: Arc<Self>, near: Near) {
        let connection = Arc::clone(&self);
        let service = service_fn(move |request| {
            let connection = Arc::clone(&connection);
            async move { Ok::<_, Infallible>(forward::answer(connection, request, None).await) }
        });
        let mut builder = http2::Builder::new(Streams(Arc::clone(&self)));
        builder
            .timer(TokioTimer::new())
            .keep_alive_interval(PROBE_AFTER)
            .max_concurrent_streams(STREAMS_MAX)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_send_buf_size(SEND_BUFFER)
            .max_header_list_size(HEADER_LIST_MAX);
        let serving = builder.serve_connection(TokioIo::new(near), service);
        self.drive(serving, |serving| serving.graceful_shutdown()).await;
    }

    /// Runs a connection to its end; `finish` has it end after what is under way.
    async fn drive<C>(&self, serving: C, finish: impl FnOnce(Pin<&mut C>))
    where
        C: Future<Output = Result<(), hyper::Error>>,
    {
        let mut serving = pin!(serving);
        let graceful = tokio::select! {
            ended = serving.as_mut() => return self.log(ended),
            () = self.kill.cancelled() => return self.resets.set(),
            () = self.overdue() => return self.resets.set(),
            () = self.proxy.tasks.shutdown().cancelled_owned() => None,
            () = self.dismissed.cancelled() => None,
            () = self.ended() => Some(LAST_WORDS),
        };
        finish(serving.as_mut());
        let last = async {
            match graceful {
                Some(time) => tokio::time::sleep(time).await,
                None => {
                    self.ended().await;
                    tokio::time::sleep(LAST_WORDS).await;
                }
            }
        };
        tokio::select! {
            ended = serving.as_mut() => self.log(ended),
            () = self.kill.cancelled() => self.resets.set(),
            () = self.overdue() => self.resets.set(),
            () = last => self.resets.set(),
        }
    }

    fn log(&self, ended: Result<(), hyper::Error>) {
        if let Err(error) = ended {
            tracing::debug!(peer = %self.peer, %error, "a connection ended early");
        }
    }

    /// The tunnel whose own port it came in by has ended.
    pub async fn ended(&self) {
        match &self.entrance {
            Entrance::Own(tunnel) if !self.was_over => tunnel.end().cancelled().await,
            // Whoever comes too late is served, to be told so.
            Entrance::Own(_) | Entrance::Shared => std::future::pending().await,
        }
    }

    /// How long it may wait for its next request: whoever was let in nowhere yet takes a place from others.
    fn keep_alive(&self) -> Duration {
        if self.is_allowed() {
            KEEP_ALIVE
        } else {
            let stranger = self
                .proxy
                .limits
                .header_timeout
                .saturating_mul(STRANGER_HEAD_TIMES);
            KEEP_ALIVE.min(stranger)
        }
    }

    /// Nothing has happened for too long.
    async fn overdue(&self) {
        loop {
            let (silent, limit) = if self.under_way.load(Ordering::Relaxed) == 0 {
                (self.requests.since(), self.keep_alive())
            } else if self.half_closed.load(Ordering::Relaxed) {
                (self.activity.since(), HALF_CLOSED)
            } else {
                (self.activity.since(), self.proxy.limits.idle_timeout)
            };
            let Some(left) = limit.checked_sub(silent).filter(|left| !left.is_zero()) else {
                return;
            };
            let look = LOOK.min(self.proxy.limits.idle_timeout);
            tokio::time::sleep(left.min(look)).await;
        }
    }
}

/// Runs the streams of a connection of HTTP/2, which end with it.
#[derive(Clone)]
struct Streams(Arc<Connection>);

impl<F> Executor<F> for Streams
where
    F: Future + Send + 'static,
{
    fn execute(&self, task: F) {
        let kill = self.0.kill.clone();
        self.0.proxy.tasks.spawn("stream", async move {
            tokio::select! {
                _output = task => {}
                () = kill.cancelled() => {}
            }
        });
    }
}

/// The client's bytes: what was read to tell the protocols apart comes first.
struct Near {
    received: Vec<u8>,
    at: usize,
    stream: TcpStream,
    connection: Arc<Connection>,
}

impl Near {
    /// Reads until it is clear whether this is HTTP/2.
    async fn sniff(&mut self) -> io::Result<bool> {
        loop {
            if self.received.len() >= PREFACE.len() || !PREFACE.starts_with(&self.received) {
                return Ok(self.received.starts_with(PREFACE));
            }
            if self.stream.read_buf(&mut self.received).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.connection.activity.touch();
        }
    }
}

impl AsyncRead for Near {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.at < this.received.len() {
            let rest = &this.received[this.at..];
            let length = rest.len().min(buf.remaining());
            buf.put_slice(&rest[..length]);
            this.at += length;
            if this.at == this.received.len() {
                this.received = Vec::new();
                this.at = 0;
            }
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        ready!(Pin::new(&mut this.stream).poll_read(cx, buf))?;
        this.connection.activity.touch();
        if buf.filled().len() == before && buf.remaining() > 0 {
            this.connection.half_closed.store(true, Ordering::Relaxed);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Near {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.stream).poll_write(cx, bytes))?;
        self.connection.activity.touch();
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.stream).poll_write_vectored(cx, slices))?;
        self.connection.activity.touch();
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.connection.resets.is_set() {
            // An orderly end would say that this was all.
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl Drop for Near {
    fn drop(&mut self) {
        if self.connection.resets.is_set()
            && let Err(error) = SockRef::from(&self.stream).set_linger(Some(Duration::ZERO))
        {
            tracing::debug!(%error, "cannot reset a connection, closing it");
        }
    }
}
