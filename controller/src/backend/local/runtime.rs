//! The OCI runtime by its command line.

use std::{
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use serde::Deserialize;
use tokio::{io::AsyncReadExt as _, process::Command, time::timeout};

use super::disk::remove;

/// Longest time that one call of the runtime may take.
const LONGEST: Duration = Duration::from_secs(60);
/// Most that is read of the runtime's log.
const MOST_LOG: u64 = 64 * 1024;

/// The runtime.
#[derive(Debug, Clone)]
pub(super) struct OciRuntime {
    program: PathBuf,
    state: PathBuf,
}

/// One line of the runtime's log.
#[derive(Deserialize)]
struct LogLine {
    level: String,
    msg: String,
}

impl OciRuntime {
    pub(super) fn new(program: &Path, state: PathBuf) -> Self {
        Self {
            program: program.to_owned(),
            state,
        }
    }

    /// Makes the container, its PID 1 waiting. `input` becomes that process's standard input. Returns its
    /// number on the node.
    pub(super) async fn create(&self, name: &str, bundle: &Path, input: OwnedFd) -> io::Result<i32> {
        let pid_file = bundle.join("pid");
        let mut call = Call::new(self, "create", bundle.join("create.log"));
        call.command
            .arg("--bundle")
            .arg(bundle)
            .arg("--pid-file")
            .arg(&pid_file)
            .arg(name)
            .stdin(input);
        call.finish().await?;
        let number = fs::read_to_string(&pid_file)?;
        number
            .trim()
            .parse()
            .map_err(|_not_a_number| io::Error::other(format!("`{number}` is not a process id")))
    }

    /// Lets PID 1 go.
    pub(super) async fn start(&self, name: &str, bundle: &Path) -> io::Result<()> {
        let mut call = Call::new(self, "start", bundle.join("start.log"));
        call.command.arg(name);
        call.finish().await
    }

    /// Makes a container, runs it to its end, and takes it away.
    pub(super) async fn run_to_end(&self, name: &str, bundle: &Path) -> io::Result<()> {
        let mut call = Call::new(self, "run", bundle.join("run.log"));
        call.command.arg("--bundle").arg(bundle).arg(name);
        call.finish().await
    }

    /// Takes the container away, killing what runs in it. Absence is success.
    pub(super) async fn delete(&self, name: &str) -> io::Result<()> {
        let log = self.state.join(format!("{name}.log"));
        if !self.state.join(name).exists() {
            // The runtime may have gone on when an earlier controller was killed, and left this.
            return remove(fs::remove_file(log));
        }
        let mut call = Call::new(self, "delete", log.clone());
        call.command.arg("--force").arg(name);
        let deleted = call.finish().await;
        remove(fs::remove_file(log))?;
        deleted?;
        // A creation that was killed half-way leaves a folder that the runtime does not know how to read.
        remove(fs::remove_dir_all(self.state.join(name)))
    }
}

/// One call of the runtime.
struct Call {
    command: Command,
    program: PathBuf,
    log: PathBuf,
}

impl Call {
    fn new(runtime: &OciRuntime, verb: &str, log: PathBuf) -> Self {
        let mut command = Command::new(&runtime.program);
        command.arg("--root").arg(&runtime.state);
        command
            .arg("--log")
            .arg(&log)
            .args(["--log-format", "json"])
            .arg(verb);
        // Nothing of this process's environment concerns the runtime.
        command.env_clear().env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        );
        // A container keeps the standard streams of its creation open for life.
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true);
        Self {
            command,
            program: runtime.program.clone(),
            log,
        }
    }

    async fn finish(mut self) -> io::Result<()> {
        let status = timeout(LONGEST, self.command.status())
            .await
            .map_err(|_elapsed| io::Error::other("the runtime did not answer in time"))?
            .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", self.program.display())))?;
        if status.success() {
            return Ok(());
        }
        let message = last_error(&self.log).await.unwrap_or_else(|| status.to_string());
        Err(io::Error::other(format!("{}: {message}", self.program.display())))
    }
}

/// The last error that the runtime logged.
async fn last_error(log: &Path) -> Option<String> {
    let mut text = String::new();
    tokio::fs::File::open(log)
        .await
        .ok()?
        .take(MOST_LOG)
        .read_to_string(&mut text)
        .await
        .ok()?;
    let lines = text
        .lines()
        .rev()
        .filter_map(|line| serde_json::from_str::<LogLine>(line).ok());
    lines
        .into_iter()
        .find(|line| line.level == "error")
        .map(|line| line.msg)
}
