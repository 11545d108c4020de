//! A small client of the REST API: one kept connection, blocking, so that a latency is the API's.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::Access;

/// Longest wait for an answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connection to the API.
pub(crate) struct Api {
    stream: TcpStream,
    key: String,
    buffer: Vec<u8>,
}

impl Api {
    pub(super) fn connect(access: &Access) -> Result<Self> {
        let stream = TcpStream::connect(access.api)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self {
            stream,
            key: access.key.clone(),
            buffer: Vec::new(),
        })
    }

    /// One call below `/api/v1` that must succeed.
    pub(super) fn call(&mut self, method: &str, path: &str, body: &Value) -> Result<Value> {
        let body = body.to_string();
        let request = format!(
            "{method} /api/v1{path} HTTP/1.1\r\nHost: sandgate\r\nAuthorization: Bearer {}\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            self.key,
            body.len()
        );
        self.stream.write_all(request.as_bytes())?;
        let (status, answer) = self.answer().with_context(|| format!("{method} {path}"))?;
        ensure!(
            status.starts_with('2'),
            "{method} {path} answered {status}: {answer}"
        );
        Ok(answer)
    }

    fn answer(&mut self) -> Result<(String, Value)> {
        self.buffer.clear();
        loop {
            if let Some(end) = self.buffer.windows(4).position(|four| four == b"\r\n\r\n") {
                let head = String::from_utf8_lossy(&self.buffer[..end]).to_ascii_lowercase();
                let length = head
                    .lines()
                    .find_map(|line| line.strip_prefix("content-length: "));
                let length: usize = length.context("an answer without Content-Length")?.parse()?;
                while self.buffer.len() < end + 4 + length {
                    self.more()?;
                }
                let status = head.split(' ').nth(1).unwrap_or_default().to_owned();
                let body = serde_json::from_slice(&self.buffer[end + 4..])?;
                return Ok((status, body));
            }
            self.more()?;
        }
    }

    fn more(&mut self) -> Result<()> {
        let mut chunk = [0; 16 * 1024];
        let read = self.stream.read(&mut chunk)?;
        ensure!(read > 0, "closed in the middle of an answer");
        self.buffer.extend_from_slice(&chunk[..read]);
        Ok(())
    }
}
