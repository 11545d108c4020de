//! Requests on connections that are kept: one thread drives all of them, so that the client costs little.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;

use super::stream::{Connector, Target};

/// Requests as fast as their answers come, on every connection.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Requests {
    /// Where to.
    pub(crate) target: Target,
    /// The Host field.
    pub(crate) host: String,
    /// The path.
    pub(crate) path: String,
    /// The status of every answer.
    pub(crate) status: u16,
    /// Further header lines, each with its line end.
    pub(crate) headers: String,
    /// Connections.
    pub(crate) connections: usize,
    /// Before counting begins, in milliseconds.
    pub(crate) warm_ms: u64,
    /// While counting, in milliseconds.
    pub(crate) count_ms: u64,
}

/// What was measured.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Rate {
    /// Requests a second of all connections together.
    pub(crate) per_second: f64,
    /// Median of their latencies, in milliseconds.
    pub(crate) p50_ms: f64,
    /// 99th percentile of their latencies, in milliseconds.
    pub(crate) p99_ms: f64,
}

impl Rate {
    /// Of latencies in milliseconds, which is not empty, within so many milliseconds.
    pub(super) fn of(mut latencies: Vec<f64>, count_ms: f64) -> Result<Self> {
        ensure!(!latencies.is_empty(), "no answer came");
        latencies.sort_by(f64::total_cmp);
        let at = |part: usize| latencies[(latencies.len() - 1) * part / 100];
        Ok(Self {
            per_second: latencies.len() as f64 * 1000.0 / count_ms,
            p50_ms: at(50),
            p99_ms: at(99),
        })
    }
}

impl Requests {
    pub(super) fn measure(self) -> Result<Rate> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let connector = Connector::new(self.target.clone())?;
        let all = runtime.block_on(async {
            // Every connection stands before the first is counted: handshakes are no part of it.
            let mut streams = Vec::new();
            for _ in 0..self.connections {
                streams.push(connect(&connector, &self.target).await?);
            }
            let from = Instant::now() + Duration::from_millis(self.warm_ms);
            let until = from + Duration::from_millis(self.count_ms);
            let all = streams
                .into_iter()
                .map(|stream| self.connection(stream, from, until));
            futures_util::future::try_join_all(all).await
        })?;
        Rate::of(all.into_iter().flatten().collect(), self.count_ms as f64)
    }

    async fn connection(&self, mut stream: Boxed, from: Instant, until: Instant) -> Result<Vec<f64>> {
        let Self {
            path, host, headers, ..
        } = self;
        let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n{headers}\r\n");
        let mut latencies = Vec::new();
        let mut buffer = vec![0; 16 * 1024];
        loop {
            let began = Instant::now();
            if began >= until && !latencies.is_empty() {
                return Ok(latencies);
            }
            stream.write_all(request.as_bytes()).await?;
            stream.flush().await?;
            answer(&mut stream, &mut buffer, self.status).await?;
            if began >= from {
                latencies.push(began.elapsed().as_secs_f64() * 1000.0);
            }
        }
    }
}

trait Both: AsyncRead + AsyncWrite + Unpin {}
impl<T: AsyncRead + AsyncWrite + Unpin> Both for T {}
type Boxed = Box<dyn Both>;

async fn connect(connector: &Connector, target: &Target) -> Result<Boxed> {
    let stream = TcpStream::connect(target.to).await?;
    stream.set_nodelay(true)?;
    let Some((config, name)) = connector.tls() else {
        return Ok(Box::new(stream));
    };
    Ok(Box::new(TlsConnector::from(config).connect(name, stream).await?))
}

/// Reads one answer that has a Content-Length.
async fn answer(stream: &mut Boxed, buffer: &mut [u8], status: u16) -> Result<()> {
    let mut filled = 0;
    let mut wanted = None;
    loop {
        let read = stream.read(&mut buffer[filled..]).await?;
        ensure!(read > 0, "closed in the middle of an answer");
        filled += read;
        if wanted.is_none()
            && let Some(end) = buffer[..filled].windows(4).position(|four| four == b"\r\n\r\n")
        {
            let head = String::from_utf8_lossy(&buffer[..end]).to_ascii_lowercase();
            ensure!(head.starts_with(&format!("http/1.1 {status} ")), "{head}");
            let length = head
                .lines()
                .find_map(|line| line.strip_prefix("content-length: "));
            let length: usize = length.context("no Content-Length")?.parse()?;
            wanted = Some(end + 4 + length);
        }
        match wanted {
            Some(wanted) if filled == wanted => return Ok(()),
            Some(wanted) if filled > wanted => bail!("more than one answer"),
            Some(_) | None => {}
        }
    }
}
