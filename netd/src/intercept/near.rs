//! The client's half of a flow that is read, as one stream. Owns: that what the sniffer read comes first, the
//! count of bytes on the wire, and how the connection closes (in order, or by a reset).

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use sandgate_relay::copy::{Activity, Traffic};
use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tokio_util::sync::CancellationToken;

/// What is known of a flow's connection while others hold its stream.
#[derive(Debug, Default)]
pub struct Meter {
    /// Bytes on the wire, as TLS made them.
    pub traffic: Traffic,
    /// When something last moved.
    pub activity: Activity,
    resets: AtomicBool,
    half_closed: CancellationToken,
}

impl Meter {
    /// From here on closing is a reset: the client learns that this was no ordinary end.
    pub fn reset(&self) {
        self.resets.store(true, Ordering::Relaxed);
    }

    /// Waits until the client has closed its half.
    pub async fn half_closed(&self) {
        self.half_closed.cancelled().await;
    }
}

/// The client's half.
#[derive(Debug)]
pub struct Near {
    received: Vec<u8>,
    at: usize,
    stream: TcpStream,
    meter: Arc<Meter>,
}

impl Near {
    /// A stream that begins with `received`.
    pub fn new(stream: TcpStream, received: Vec<u8>, meter: Arc<Meter>) -> Self {
        Self {
            received,
            at: 0,
            stream,
            meter,
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
            this.meter.traffic.add_up(length);
            if this.at == this.received.len() {
                this.received = Vec::new();
                this.at = 0;
            }
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        std::task::ready!(Pin::new(&mut this.stream).poll_read(cx, buf))?;
        let length = buf.filled().len() - before;
        if length == 0 && buf.remaining() > 0 {
            this.meter.half_closed.cancel();
        }
        this.meter.traffic.add_up(length);
        this.meter.activity.touch();
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Near {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = std::task::ready!(Pin::new(&mut self.stream).poll_write(cx, bytes))?;
        self.meter.traffic.add_down(written);
        self.meter.activity.touch();
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl Drop for Near {
    fn drop(&mut self) {
        if self.meter.resets.load(Ordering::Relaxed)
            && let Err(error) = SockRef::from(&self.stream).set_linger(Some(Duration::ZERO))
        {
            tracing::debug!(%error, "cannot reset a connection, closing it");
        }
    }
}
