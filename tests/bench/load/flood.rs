//! A client that takes all it can get, until it is told to end: the neighbour of the one that is measured.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    sync::Arc,
    thread,
    time::Duration,
};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::stream::{Connector, Target};

/// Pause of a thread whose connection was refused: what is beyond the limits is refused at once.
const PAUSE: Duration = Duration::from_millis(1);
const PATIENCE: Duration = Duration::from_secs(5);

/// Connections without end.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Flood {
    /// To what.
    pub(crate) target: Target,
    /// Threads that connect, ask and close.
    pub(crate) threads: usize,
    /// Connections that are opened and say nothing.
    pub(crate) silent: usize,
}

impl Flood {
    /// Begins; goes on as long as the process.
    pub(super) fn start(self) -> Result<()> {
        let to = SocketAddr::V4(self.target.to);
        let connector = Arc::new(Connector::new(self.target)?);
        for _ in 0..self.threads {
            let connector = Arc::clone(&connector);
            thread::spawn(move || {
                loop {
                    if once(&connector).is_err() {
                        thread::sleep(PAUSE);
                    }
                }
            });
        }
        if self.silent > 0 {
            thread::spawn(move || {
                loop {
                    // All of them are held until netd has closed the last one.
                    let held: Vec<TcpStream> = (0..self.silent)
                        .filter_map(|_| TcpStream::connect_timeout(&to, PATIENCE).ok())
                        .collect();
                    for mut stream in held {
                        stream.set_read_timeout(Some(PATIENCE * 2)).ok();
                        let _end = stream.read_exact(&mut [0]);
                    }
                    thread::sleep(PAUSE);
                }
            });
        }
        Ok(())
    }
}

fn once(connector: &Connector) -> Result<()> {
    let mut stream = connector.connect()?;
    stream.write_all(&connector.request("/", true))?;
    stream.flush()?;
    stream.read_to_end(&mut Vec::with_capacity(2048))?;
    Ok(())
}
