//! Attempts that are refused, and how long each refusal takes to be felt.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, SocketAddrV4, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

/// No end for this long is a failure, never a figure.
const PATIENCE: Duration = Duration::from_secs(5);

/// Attempts one after another.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Refusals {
    /// To what.
    pub(crate) to: SocketAddrV4,
    /// What is said on the connection; nothing where it must not come about.
    pub(crate) said: Option<String>,
    /// How many.
    pub(crate) count: usize,
}

impl Refusals {
    /// Milliseconds from the attempt to its end.
    pub(super) fn measure(self) -> Result<Vec<f64>> {
        (0..self.count).map(|_| self.once()).collect()
    }

    fn once(&self) -> Result<f64> {
        let began = Instant::now();
        let connected = TcpStream::connect_timeout(&SocketAddr::V4(self.to), PATIENCE);
        match (&self.said, connected) {
            (None, connected) => {
                let refused = connected.err().map(|error| error.kind());
                ensure!(
                    refused == Some(std::io::ErrorKind::ConnectionRefused),
                    "{} was not refused: {refused:?}",
                    self.to
                );
            }
            (Some(said), connected) => {
                let mut stream = connected?;
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                stream.write_all(said.as_bytes())?;
                let mut byte = [0];
                match stream.read(&mut byte) {
                    Ok(0) => {}
                    Ok(_) => ensure!(byte == *b"\0", "{} was answered", self.to),
                    Err(error) => ensure!(
                        error.kind() == std::io::ErrorKind::ConnectionReset,
                        "{}: {error}",
                        self.to
                    ),
                }
            }
        }
        Ok(began.elapsed().as_secs_f64() * 1000.0)
    }
}
