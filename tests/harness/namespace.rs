//! A network namespace held by one thread, so that nothing of it needs a name or a file, and it goes away
//! with that thread even after a panic.
//!
//! Sockets and processes belong to the namespace in which they were made, whoever uses them afterwards.
//! So [`Namespace::run`] makes them here and everything else happens wherever it is convenient.

use std::{
    fs::File,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::mpsc,
    thread::{self, JoinHandle},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
};

type Job = Box<dyn FnOnce() + Send>;

/// A network namespace (and, on demand, a mount namespace) with the thread that lives in it.
pub struct Namespace {
    name: &'static str,
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    task: PathBuf,
}

impl Namespace {
    /// A fresh network namespace with nothing in it but its loopback interface, which is up.
    ///
    /// # Errors
    /// When the kernel refuses, in the first place for want of privilege.
    pub fn network(name: &'static str) -> Result<Self> {
        Self::make(name, || enter_new(CloneFlags::CLONE_NEWNET)).and_then(Self::with_loopback)
    }

    /// The same with a mount namespace of its own: what is mounted there is seen nowhere else, and is gone
    /// with the last process in it.
    ///
    /// # Errors
    /// As [`Namespace::network`].
    pub fn network_and_mounts(name: &'static str) -> Result<Self> {
        let flags = CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_FS;
        Self::make(name, move || enter_new(flags)).and_then(Self::with_loopback)
    }

    /// The network namespace that a file such as `/proc/<pid>/ns/net` stands for.
    ///
    /// # Errors
    /// When there is none (any more).
    pub fn join(name: &'static str, file: &Path) -> Result<Self> {
        let shown = file.display().to_string();
        let file = File::open(file).with_context(|| shown.clone())?;
        Self::make(name, move || setns(file, CloneFlags::CLONE_NEWNET).context(shown))
    }

    fn with_loopback(self) -> Result<Self> {
        self.ip("link set lo up")?;
        Ok(self)
    }

    fn make(name: &'static str, enter: impl FnOnce() -> Result<()> + Send + 'static) -> Result<Self> {
        let (jobs, queue) = mpsc::channel::<Job>();
        let (entered, task) = mpsc::channel();
        let thread = thread::Builder::new().name(name.to_owned()).spawn(move || {
            let result = enter().map(|()| {
                let (process, thread) = (std::process::id(), nix::unistd::gettid());
                PathBuf::from(format!("/proc/{process}/task/{thread}"))
            });
            let failed = result.is_err();
            if entered.send(result).is_err() || failed {
                return;
            }
            for job in queue {
                job();
            }
        })?;
        let task = task.recv().context("the namespace's thread died")??;
        Ok(Self {
            name,
            jobs: Some(jobs),
            thread: Some(thread),
            task,
        })
    }

    /// Runs `work` on the namespace's thread and returns what it returns; a panic travels too. Keep it
    /// short: others wait.
    pub fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let (answer, result) = mpsc::channel();
        let job = move || {
            // The receiver waits below, and a panic there is already on its way.
            answer.send(catch_unwind(AssertUnwindSafe(work))).ok();
        };
        self.jobs
            .as_ref()
            .expect("present until drop")
            .send(Box::new(job))
            .expect("the namespace's thread runs");
        match result.recv().expect("the namespace's thread answers") {
            Ok(value) => value,
            Err(panic) => resume_unwind(panic),
        }
    }

    /// Runs a program in the namespace to its end.
    ///
    /// # Errors
    /// When it cannot be started or fails; the message has what it wrote.
    pub fn command(&self, program: &str, arguments: &[&str]) -> Result<Output> {
        let shown = format!("{program} {}", arguments.join(" "));
        let mut command = Command::new(program);
        command.args(arguments);
        let output = self
            .run(move || command.output())
            .with_context(|| shown.clone())?;
        if !output.status.success() {
            bail!(
                "{shown} in {}: {} {}",
                self.name,
                output.status,
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(output)
    }

    /// `ip <line>` in the namespace, split at spaces; its standard output.
    ///
    /// # Errors
    /// As [`Namespace::command`].
    pub fn ip(&self, line: &str) -> Result<String> {
        let arguments: Vec<&str> = line.split_whitespace().collect();
        let output = self.command("ip", &arguments)?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Sets a sysctl of the namespace, given with slashes: `net/ipv4/ip_forward`.
    ///
    /// # Errors
    /// When the kernel has no such setting or refuses the value.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        let (path, value) = (format!("/proc/sys/{key}"), value.to_owned());
        // `/proc/sys/net` shows the namespace of whoever opens it.
        self.run(move || std::fs::write(&path, value).with_context(|| path))
    }

    /// `/proc/<process>/task/<thread>` of the namespace's thread as seen outside: its `ns/net` names the
    /// namespace and its `root` its mounts.
    pub fn task(&self) -> &Path {
        &self.task
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            // Its panics were handed to the callers of `run`.
            thread.join().ok();
        }
    }
}

fn enter_new(flags: CloneFlags) -> Result<()> {
    unshare(flags).context("a new namespace (root is required)")?;
    if flags.contains(CloneFlags::CLONE_NEWNS) {
        let nothing = None::<&str>;
        mount(
            nothing,
            "/",
            nothing,
            MsFlags::MS_REC | MsFlags::MS_PRIVATE,
            nothing,
        )
        .context("private mounts")?;
    }
    Ok(())
}
