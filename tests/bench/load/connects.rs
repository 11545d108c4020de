//! New connections: connect, one request, its answer, close, again.

use std::{
    io::{Read as _, Write as _},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow, ensure};
use serde::{Deserialize, Serialize};

use super::{
    Rate,
    stream::{Connector, Target},
};

/// New connections, one after the other on each of some threads.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Connects {
    /// To what.
    pub(crate) target: Target,
    /// Threads.
    pub(crate) threads: usize,
    /// How long, in milliseconds.
    pub(crate) count_ms: u64,
}

impl Connects {
    /// Connections of all threads together, and how long each took.
    pub(super) fn measure(self) -> Result<Rate> {
        let connector = Arc::new(Connector::new(self.target)?);
        once(&connector)?;
        let began = Instant::now();
        let end = began + Duration::from_millis(self.count_ms);
        let threads: Vec<_> = (0..self.threads)
            .map(|_| {
                let connector = Arc::clone(&connector);
                thread::spawn(move || -> Result<Vec<f64>> {
                    let mut took = Vec::new();
                    while took.is_empty() || Instant::now() < end {
                        let began = Instant::now();
                        once(&connector)?;
                        took.push(began.elapsed().as_secs_f64() * 1000.0);
                    }
                    Ok(took)
                })
            })
            .collect();
        let mut took = Vec::new();
        for thread in threads {
            took.extend(thread.join().map_err(|_panic| anyhow!("a client died"))??);
        }
        Rate::of(took, began.elapsed().as_secs_f64() * 1000.0)
    }
}

fn once(connector: &Connector) -> Result<()> {
    let mut stream = connector.connect()?;
    stream.write_all(&connector.request("/", true))?;
    stream.flush()?;
    let mut answer = Vec::with_capacity(2048);
    match stream.read_to_end(&mut answer) {
        Ok(_) => {}
        // Some close without a word of TLS; whether the answer is whole is seen below.
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {}
        Err(error) => return Err(error.into()),
    }
    ensure!(
        answer.starts_with(b"HTTP/1.1 200 ") && answer.len() > super::origin::BODY,
        "{:?}",
        String::from_utf8_lossy(&answer)
    );
    Ok(())
}
