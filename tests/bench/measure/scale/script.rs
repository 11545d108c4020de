//! A real netd that follows a controller which says what it is told to. Owns: the process, the feed's connection, and
//! when each frame was sent and acknowledged.

use std::{
    collections::BTreeMap,
    fs,
    os::fd::{AsRawFd as _, OwnedFd},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, mpsc as results},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use harness::{namespace::Namespace, node::binaries, wait};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rustix::io::{FdFlags, fcntl_setfd};
use sandgate_api::{
    control::{CONTROL_FD_VARIABLE, MAX_PACKET},
    feed::{FeedAck, FeedFrame, FeedSandbox, Revision},
    id::SandboxId,
};
use sandgate_daemon::handover::{self, Channel};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::UnixStream,
    runtime::Runtime,
    sync::{Mutex, mpsc},
};

/// A frame that is not acknowledged for so long never will be: attaching a thousand endpoints takes a while.
const PATIENCE: Duration = Duration::from_secs(180);
/// Between heartbeats; netd waits for three of five seconds.
const HEARTBEAT: Duration = Duration::from_secs(4);

/// netd and its controller.
pub(crate) struct Script {
    netd: Child,
    _controller: Runtime,
    frames: mpsc::UnboundedSender<(Revision, Vec<u8>)>,
    acks: results::Receiver<(Instant, FeedAck)>,
    revision: Revision,
    log: PathBuf,
}

impl Script {
    /// Starts netd on a run directory, in a namespace without a way out. One that saved a state asks for what came
    /// after `revision`, which is nothing.
    pub(crate) fn start(run_dir: &Path, node: &Namespace, revision: Revision) -> Result<Self> {
        let (ours, theirs) = handover::pair()?;
        // Inherited by the one child that is started before it is closed.
        fcntl_setfd(&theirs, FdFlags::empty())?;
        let log = run_dir.join("netd.log");
        let written = fs::File::options().create(true).append(true).open(&log)?;
        let mut command = Command::new(binaries().join("netd"));
        command
            .env("SANDGATE_RUN_DIR", run_dir)
            .env("SANDGATE_DNS_UPSTREAM", "192.0.2.53:53")
            .env("SANDGATE_NETD_METRICS_ADDR", "off")
            .env(CONTROL_FD_VARIABLE, theirs.as_raw_fd().to_string())
            .stdin(Stdio::null())
            .stdout(written.try_clone()?)
            .stderr(written);
        let netd = node.run(move || command.spawn()).context("starting netd")?;
        drop(theirs);
        let controller = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let (frames, queue) = mpsc::unbounded_channel();
        let (told, acks) = results::channel();
        controller.spawn(async move {
            if let Err(error) = serve(ours, queue, told, revision).await {
                panic!("the scripted controller broke: {error:#}");
            }
        });
        Ok(Self {
            netd,
            _controller: controller,
            frames,
            acks,
            revision,
            log,
        })
    }

    /// The revision of the last frame.
    pub(crate) fn revision(&self) -> Revision {
        self.revision
    }

    /// Sends everything, and waits until it is in force.
    pub(crate) fn snapshot(&mut self, sandboxes: &BTreeMap<SandboxId, FeedSandbox>) -> Result<Duration> {
        let sandboxes = sandboxes.values().cloned().collect();
        self.send(|revision| FeedFrame::Snapshot { revision, sandboxes })
    }

    /// Sends new and changed sandboxes, and waits until they are in force.
    pub(crate) fn upsert(&mut self, upserts: Vec<FeedSandbox>) -> Result<Duration> {
        let since = Some(self.revision);
        self.send(|revision| FeedFrame::Delta {
            since,
            revision,
            upserts,
            removed: Vec::new(),
        })
    }

    fn send(&mut self, frame: impl FnOnce(Revision) -> FeedFrame) -> Result<Duration> {
        self.revision += 1;
        let mut line = serde_json::to_vec(&frame(self.revision))?;
        line.push(b'\n');
        let began = Instant::now();
        self.frames.send((self.revision, line))?;
        self.acknowledged(began)
    }

    /// When a netd that was started again said that all it had saved is in force.
    pub(crate) fn adopted(&self) -> Result<Instant> {
        let began = Instant::now();
        Ok(began + self.acknowledged(began)?)
    }

    /// Waits until all that was sent is in force.
    fn acknowledged(&self, began: Instant) -> Result<Duration> {
        loop {
            let Ok((at, ack)) = self.acks.recv_timeout(PATIENCE) else {
                bail!(
                    "netd does not acknowledge revision {}\n{}",
                    self.revision,
                    self.last_words()
                );
            };
            ensure!(ack.errors.is_empty(), "netd refuses: {:?}", ack.errors.first());
            if ack.revision >= self.revision && at >= began {
                return Ok(at.saturating_duration_since(began));
            }
        }
    }

    /// netd's resident memory (`VmRSS` of proc_pid_status(5)), in MiB.
    pub(crate) fn resident(&self) -> Result<f64> {
        let path = format!("/proc/{}/status", self.netd.id());
        let text = fs::read_to_string(&path)?;
        let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kibibytes = line.and_then(|line| line.split_whitespace().next());
        let kibibytes: f64 = kibibytes
            .with_context(|| format!("no VmRSS in {path}"))?
            .parse()?;
        Ok(kibibytes / 1024.0)
    }

    fn last_words(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        if let Ok(number) = i32::try_from(self.netd.id()) {
            kill(Pid::from_raw(number), Signal::SIGTERM).ok();
        }
        let ended = wait::within(Duration::from_secs(10), || {
            self.netd.try_wait().ok().flatten().map(drop)
        });
        if ended.is_none() {
            self.netd.kill().ok();
            self.netd.wait().ok();
        }
    }
}

type Queue = Arc<Mutex<mpsc::UnboundedReceiver<(Revision, Vec<u8>)>>>;

/// Answers every connection that netd opens.
async fn serve(
    channel: OwnedFd,
    queue: mpsc::UnboundedReceiver<(Revision, Vec<u8>)>,
    told: results::Sender<(Instant, FeedAck)>,
    revision: Revision,
) -> Result<()> {
    let channel = Channel::from_fd(channel)?;
    let queue: Queue = Arc::new(Mutex::new(queue));
    let mut packet = vec![0; MAX_PACKET];
    loop {
        let (length, socket) = channel.recv(&mut packet).await?;
        let Some(socket) = socket else {
            if length == 0 {
                // netd has ended.
                return Ok(());
            }
            continue;
        };
        let stream = std::os::unix::net::UnixStream::from(socket);
        stream.set_nonblocking(true)?;
        let stream = UnixStream::from_std(stream)?;
        let (queue, told) = (Arc::clone(&queue), told.clone());
        #[expect(clippy::disallowed_methods, reason = "ends with its runtime")]
        tokio::spawn(async move {
            // An error is netd's end of the connection.
            let _ended = answer(BufReader::new(stream), queue, told, revision).await;
        });
    }
}

async fn answer(
    mut stream: BufReader<UnixStream>,
    queue: Queue,
    told: results::Sender<(Instant, FeedAck)>,
    revision: Revision,
) -> Result<()> {
    loop {
        let (mut head, mut length) = (String::new(), 0);
        loop {
            let mut line = String::new();
            ensure!(stream.read_line(&mut line).await? > 0, "closed");
            if line.trim().is_empty() {
                break;
            }
            if let Some((name, value)) = line.split_once(':')
                && name.eq_ignore_ascii_case("content-length")
            {
                length = value.trim().parse()?;
            }
            if head.is_empty() {
                head = line;
            }
        }
        let mut body = vec![0; length];
        stream.read_exact(&mut body).await?;
        if head.starts_with("GET /feed?") {
            return feed(stream, queue, head.contains("since="), revision).await;
        }
        if head.starts_with("POST /feed/ack") {
            let at = Instant::now();
            told.send((at, serde_json::from_slice(&body)?))?;
        }
        stream
            .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
            .await?;
    }
}

async fn feed(
    mut stream: BufReader<UnixStream>,
    queue: Queue,
    knows_some: bool,
    mut revision: Revision,
) -> Result<()> {
    let mut queue = queue.lock().await;
    stream
        .write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        .await?;
    if knows_some {
        let nothing = FeedFrame::Delta {
            since: Some(revision),
            revision,
            upserts: Vec::new(),
            removed: Vec::new(),
        };
        write(&mut stream, &line(&nothing)?).await?;
    }
    loop {
        let next = tokio::time::timeout(HEARTBEAT, queue.recv()).await;
        let bytes = match next {
            Ok(Some((at, bytes))) => {
                revision = at;
                bytes
            }
            Ok(None) => return Ok(()),
            Err(_elapsed) => line(&FeedFrame::Heartbeat { revision })?,
        };
        write(&mut stream, &bytes).await?;
    }
}

fn line(frame: &FeedFrame) -> Result<Vec<u8>> {
    let mut line = serde_json::to_vec(frame)?;
    line.push(b'\n');
    Ok(line)
}

async fn write(stream: &mut BufReader<UnixStream>, bytes: &[u8]) -> Result<()> {
    stream
        .write_all(format!("{:x}\r\n", bytes.len()).as_bytes())
        .await?;
    stream.write_all(bytes).await?;
    stream.write_all(b"\r\n").await?;
    Ok(stream.flush().await?)
}
