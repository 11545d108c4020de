//! New connections: connect, one request, its answer, close, again.

use std::{
    io::{Read as _, Write as _},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow, ensure};
use serde::{Deserialize, Serialize};

use super::stream::{Connector, Target};

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
    /// Connections a second of all threads together.
    pub(super) fn measure(self) -> Result<f64> {
        let connector = Arc::new(Connector::new(self.target)?);
        once(&connector)?;
        let began = Instant::now();
        let end = began + Duration::from_millis(self.count_ms);
        let threads: Vec<_> = (0..self.threads)
            .map(|_| {
                let connector = Arc::clone(&connector);
                thread::spawn(move || -> Result<u32> {
                    let mut count = 0;
                    while Instant::now() < end {
                        once(&connector)?;
                        count += 1;
                    }
                    Ok(count)
                })
            })
            .collect();
        let mut count = 0;
        for thread in threads {
            count += thread.join().map_err(|_panic| anyhow!("a client died"))??;
        }
        Ok(f64::from(count) / began.elapsed().as_secs_f64())
    }
}

fn once(connector: &Connector) -> Result<()> {
    let mut stream = connector.connect()?;
    stream.write_all(&connector.request("/", true))?;
    stream.flush()?;
    let mut answer = Vec::with_capacity(2048);
    stream.read_to_end(&mut answer)?;
    ensure!(
        answer.starts_with(b"HTTP/1.1 200 ") && answer.len() > super::origin::BODY,
        "{:?}",
        String::from_utf8_lossy(&answer)
    );
    Ok(())
}
