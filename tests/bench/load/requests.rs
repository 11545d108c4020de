//! Requests on connections that are kept: one thread drives all of them, so that the client costs little.

use std::{
    net::SocketAddrV4,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

/// Requests as fast as their answers come, on every connection.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Requests {
    /// Where to.
    pub(crate) to: SocketAddrV4,
    /// The Host field.
    pub(crate) host: String,
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

impl Requests {
    pub(super) fn measure(self) -> Result<Rate> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let request = format!("GET / HTTP/1.1\r\nHost: {}\r\n{}\r\n", self.host, self.headers);
        let from = Instant::now() + Duration::from_millis(self.warm_ms);
        let until = from + Duration::from_millis(self.count_ms);
        let all = (0..self.connections).map(|_| connection(self.to, request.as_bytes(), from, until));
        let all = runtime.block_on(futures_util::future::try_join_all(all))?;
        let mut latencies: Vec<f64> = all.into_iter().flatten().collect();
        ensure!(!latencies.is_empty(), "no answer came");
        latencies.sort_by(f64::total_cmp);
        let at = |part: usize| latencies[(latencies.len() - 1) * part / 100];
        Ok(Rate {
            per_second: latencies.len() as f64 * 1000.0 / self.count_ms as f64,
            p50_ms: at(50),
            p99_ms: at(99),
        })
    }
}

async fn connection(to: SocketAddrV4, request: &[u8], from: Instant, until: Instant) -> Result<Vec<f64>> {
    let mut stream = TcpStream::connect(to).await?;
    stream.set_nodelay(true)?;
    let mut latencies = Vec::new();
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let began = Instant::now();
        if began >= until {
            return Ok(latencies);
        }
        stream.write_all(request).await?;
        answer(&mut stream, &mut buffer).await?;
        if began >= from {
            latencies.push(began.elapsed().as_secs_f64() * 1000.0);
        }
    }
}

/// Reads one answer that has a Content-Length.
async fn answer(stream: &mut TcpStream, buffer: &mut [u8]) -> Result<()> {
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
            ensure!(head.starts_with("http/1.1 200 "), "{head}");
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
