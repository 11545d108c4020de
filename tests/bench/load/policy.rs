//! How long a change of policy takes: until the API says that it is applied, and until a packet meets it.

use std::{
    fs::File,
    net::{SocketAddr, SocketAddrV4, TcpStream},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::sched::{CloneFlags, setns};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Access, api::Api, lifetime::milliseconds};

/// Between two attempts to connect: what the second figure is exact to.
const PACE: Duration = Duration::from_micros(250);
/// No change for this long is a failure.
const PATIENCE: Duration = Duration::from_secs(10);

/// Changes there and back.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Changes {
    /// The API.
    pub(crate) access: Access,
    /// Whose policy.
    pub(crate) sandbox: String,
    /// The sandbox's network namespace, as a file of the node.
    pub(crate) namespace: PathBuf,
    /// What only one of the two policies allows.
    pub(crate) target: SocketAddrV4,
    /// Allows it.
    pub(crate) open: Value,
    /// Does not.
    pub(crate) closed: Value,
    /// How often there and back.
    pub(crate) count: usize,
}

/// One change, in milliseconds from sending the request.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Change {
    /// It opened (else it closed).
    pub(crate) opened: bool,
    /// Until the answer.
    pub(crate) answered: f64,
    /// Until the first connection that ended the other way.
    pub(crate) seen: f64,
}

impl Changes {
    pub(super) fn measure(&self) -> Result<Vec<Change>> {
        let mut api = Api::connect(&self.access)?;
        self.put(&mut api, &self.closed)?;
        let over = Arc::new(AtomicBool::new(false));
        let (flips, seen) = mpsc::channel();
        let watcher = {
            let (over, namespace, target) = (Arc::clone(&over), self.namespace.clone(), self.target);
            thread::spawn(move || watch(&namespace, target, &over, &flips))
        };
        let mut changes = Vec::new();
        for number in 0..self.count * 2 {
            let opened = number % 2 == 0;
            // So that no change begins right after the attempt that saw the last one.
            thread::sleep(Duration::from_millis(5));
            let began = Instant::now();
            self.put(&mut api, if opened { &self.open } else { &self.closed })?;
            let answered = milliseconds(began);
            let (now, at): (bool, Instant) = seen
                .recv_timeout(PATIENCE)
                .context("the change was answered and never seen")?;
            ensure!(now == opened, "the connection went the wrong way");
            let seen = at.saturating_duration_since(began).as_secs_f64() * 1000.0;
            changes.push(Change {
                opened,
                answered,
                seen,
            });
        }
        over.store(true, Ordering::Relaxed);
        let ended = watcher.join();
        ended.map_err(|_panic| anyhow::anyhow!("the watcher died"))??;
        Ok(changes)
    }

    fn put(&self, api: &mut Api, policy: &Value) -> Result<()> {
        let path = format!("/sandbox/{}/network", self.sandbox);
        let answer = api.call("PUT", &path, policy)?;
        ensure!(answer["applied"] == true, "not applied: {answer}");
        Ok(())
    }
}

/// Connects again and again, and tells when that begins to succeed or to fail.
fn watch(
    namespace: &PathBuf,
    target: SocketAddrV4,
    over: &AtomicBool,
    flips: &mpsc::Sender<(bool, Instant)>,
) -> Result<()> {
    // Of this thread alone.
    setns(File::open(namespace)?, CloneFlags::CLONE_NEWNET)?;
    let mut open = false;
    while !over.load(Ordering::Relaxed) {
        let connected = TcpStream::connect_timeout(&SocketAddr::V4(target), Duration::from_secs(1)).is_ok();
        if connected != open {
            open = connected;
            if flips.send((open, Instant::now())).is_err() {
                return Ok(());
            }
        }
        thread::sleep(PACE);
    }
    Ok(())
}
