//! The built programs, running on the node of a world as `controller up` starts them.
//!
//! `SANDGATE_BIN_DIR` says where they are (else the target directory is searched), `SANDGATE_TEST_LOG` names a
//! file for all they wrote.

use std::{
    env, fs,
    net::SocketAddr,
    os::unix::process::{CommandExt as _, ExitStatusExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    sched::{CloneFlags, setns},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::json;

use crate::{
    client::{Answer, Client, Heard},
    lock,
    namespace::Namespace,
    sandbox::Organization,
    wait,
    world::{RESOLVER, World},
};

mod traces;

pub use traces::Process;

/// Where the API listens, as nodes seldom share a network namespace.
const API: &str = "127.0.0.1:8080";
/// Longest wait for `ready`.
const START: Duration = Duration::from_secs(120);
/// Longest wait for the end of a program, or for the one that takes its place.
const REPLACED: Duration = Duration::from_secs(60);
/// Longest time that a process which is about to end is seen.
const MOMENT: Duration = Duration::from_secs(5);
/// The programs that run on a node outside sandboxes.
const PROGRAMS: [&str; 3] = ["controller", "netd", "tunnel-proxy"];
/// Lines of the log that a failure shows.
const SHOWN: usize = 60;

/// A node with Sandgate on it.
pub struct Node {
    world: Arc<World>,
    place: Arc<Namespace>,
    api: SocketAddr,
    binaries: PathBuf,
    instance: PathBuf,
    data: PathBuf,
    settings: Vec<(String, String)>,
    up: Mutex<Option<Child>>,
    was_started: AtomicBool,
    log: Arc<Mutex<Vec<String>>>,
    heard: Heard,
}

impl Node {
    /// Starts `controller up` with directories of its own and waits until it is ready.
    ///
    /// # Errors
    /// When it does not become ready; with what it wrote.
    pub fn start(world: &Arc<World>) -> Result<Self> {
        Self::start_with(world, &[])
    }

    /// The same with further environment variables.
    ///
    /// # Errors
    /// As [`Node::start`].
    pub fn start_with(world: &Arc<World>, settings: &[(&str, &str)]) -> Result<Self> {
        Self::start_in(world, world.place(), "", settings)
    }

    /// A further instance, called so, on the node or in a network namespace of its own there.
    ///
    /// # Errors
    /// As [`Node::start`].
    pub fn start_in(
        world: &Arc<World>,
        place: &Arc<Namespace>,
        name: &str,
        settings: &[(&str, &str)],
    ) -> Result<Self> {
        let node = Self::new(world, place, name, settings)?;
        node.start_again()?;
        Ok(node)
    }

    /// An instance with program files of its own, so that [`Node::upgrade`] concerns nobody else.
    ///
    /// # Errors
    /// As [`Node::start`].
    pub fn start_upgradable(world: &Arc<World>, settings: &[(&str, &str)]) -> Result<Self> {
        let mut node = Self::new(world, world.place(), "", settings)?;
        node.own_programs()?;
        node.start_again()?;
        Ok(node)
    }

    /// Gives an instance that is not started yet program files of its own.
    ///
    /// # Errors
    /// When they cannot be made.
    pub fn own_programs(&mut self) -> Result<()> {
        self.binaries = own_binaries(&self.world.directory().join("bin"))?;
        Ok(())
    }

    /// Where the programs lie that it runs.
    pub fn programs_dir(&self) -> &Path {
        &self.binaries
    }

    /// Changes a setting, for the next start.
    pub fn set(&mut self, name: &str, value: &str) {
        self.settings.push((name.to_owned(), value.to_owned()));
    }

    /// An instance that is not started yet.
    ///
    /// # Errors
    /// When its files cannot be made.
    pub fn new(
        world: &Arc<World>,
        place: &Arc<Namespace>,
        name: &str,
        settings: &[(&str, &str)],
    ) -> Result<Self> {
        // The last component names the instance: no two worlds may share it.
        let unique = world
            .directory()
            .file_name()
            .and_then(|name| name.to_str())
            .context("the world's directory")?;
        let instance = world.directory().join(format!("{unique}{name}"));
        let data = world.directory().join(format!("data{name}"));
        let binaries = binaries();
        let images = env::var("SANDGATE_IMAGE_DIR").unwrap_or_else(|_| "/var/lib/sandgate/images".to_owned());
        let authority = world.directory().join("authority.pem");
        fs::write(&authority, world.ca.pem())?;
        let mut all = vec![
            ("SANDGATE_DATA_DIR".to_owned(), data.display().to_string()),
            ("SANDGATE_RUN_DIR".to_owned(), instance.display().to_string()),
            ("SANDGATE_IMAGE_DIR".to_owned(), images),
            ("SANDGATE_API_ADDR".to_owned(), API.to_owned()),
            ("SANDGATE_REGISTRATION".to_owned(), "open".to_owned()),
            (
                "SANDGATE_UPSTREAM_CA_FILE".to_owned(),
                authority.display().to_string(),
            ),
            ("SANDGATE_DNS_UPSTREAM".to_owned(), format!("{RESOLVER}:53")),
            ("MAX_SANDBOXES_PER_ORG".to_owned(), "20".to_owned()),
            // The world has IPv6; those that are about it turn it on.
            ("SANDGATE_SANDBOX_CIDR6".to_owned(), "off".to_owned()),
            // What is promised must be free: the product's defaults want 2 GiB for every sandbox.
            ("SANDGATE_DEFAULT_DISK".to_owned(), "512Mi".to_owned()),
            ("SANDGATE_DISK_RESERVE".to_owned(), "256Mi".to_owned()),
        ];
        for variable in ["PATH", "HOME", "SANDGATE_LOG", "RUST_BACKTRACE"] {
            all.extend(env::var(variable).ok().map(|value| (variable.to_owned(), value)));
        }
        all.extend(
            settings
                .iter()
                .map(|&(name, value)| (name.to_owned(), value.to_owned())),
        );
        let api = settings.iter().find(|(name, _)| *name == "SANDGATE_API_ADDR");
        let api = api.map_or(API, |(_, address)| *address);
        Ok(Self {
            world: Arc::clone(world),
            place: Arc::clone(place),
            api: api.parse().context("the API's address")?,
            binaries,
            instance,
            data,
            settings: all,
            up: Mutex::new(None),
            was_started: AtomicBool::new(false),
            log: Arc::default(),
            heard: Heard::default(),
        })
    }

    /// The world it stands in.
    pub fn world(&self) -> &Arc<World> {
        &self.world
    }

    /// Starts `controller up` (again) and waits until it is ready.
    ///
    /// # Errors
    /// When it does not become ready; with what it wrote.
    pub fn start_again(&self) -> Result<()> {
        let lines = self.log_lines().len();
        self.was_started.store(true, Ordering::Relaxed);
        let mut command = self.command("controller", &["up"]);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = self
            .world
            .node()
            .run(move || command.spawn())
            .context("starting controller up")?;
        follow(child.stdout.take().context("a pipe")?, "out", &self.log);
        follow(child.stderr.take().context("a pipe")?, "err", &self.log);
        *lock(&self.up) = Some(child);
        let is_ready = |line: &String| {
            line.starts_with("out| ")
                && line
                    .split(|c: char| !c.is_alphanumeric())
                    .any(|word| word == "ready")
        };
        let ready = wait::within(START, || {
            if self.log_lines()[lines..].iter().any(is_ready) {
                return Some(true);
            }
            matches!(lock(&self.up).as_mut()?.try_wait(), Ok(Some(_))).then_some(false)
        });
        match ready {
            Some(true) => Ok(()),
            Some(false) => bail!("controller up ended before it was ready\n{}", self.report()),
            None => bail!("controller up was not ready after {START:?}\n{}", self.report()),
        }
    }

    /// Runs one of the built programs on the node to its end.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn run(&self, program: &str, arguments: &[&str]) -> Result<(ExitStatus, String)> {
        let mut command = self.command(program, arguments);
        let output = self.world.node().run(move || command.output())?;
        let text = [output.stdout, output.stderr].concat();
        Ok((output.status, String::from_utf8_lossy(&text).into_owned()))
    }

    fn command(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.binaries.join(program));
        command
            .args(arguments)
            .env_clear()
            .envs(self.settings.iter().map(|(name, value)| (name, value)));
        if !Arc::ptr_eq(&self.place, self.world.place()) {
            let network =
                fs::File::open(self.place.task().join("ns/net")).expect("the namespace's thread runs");
            // SAFETY: the closure makes one system call on a descriptor that it owns.
            #[expect(unsafe_code, reason = "a child enters a namespace between fork and exec")]
            unsafe {
                command.pre_exec(move || Ok(setns(&network, CloneFlags::CLONE_NEWNET)?));
            }
        }
        command
    }

    /// Puts another file in a program's place, as an upgrade does: the same bytes, a new inode.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn upgrade(&self, program: &str) -> Result<()> {
        let (file, fresh) = (
            self.binaries.join(program),
            self.binaries.join(format!("{program}.new")),
        );
        fs::copy(&file, &fresh)?;
        Ok(fs::rename(fresh, file)?)
    }

    /// The network namespace it stands in.
    pub fn place(&self) -> &Namespace {
        &self.place
    }

    /// The data directory.
    pub fn data_dir(&self) -> &Path {
        &self.data
    }

    /// Where the API listens.
    pub fn api(&self) -> SocketAddr {
        self.api
    }

    /// A caller of the API without key.
    pub fn client(&self) -> Client {
        Client::new(&self.place, self.api, &self.heard)
    }

    /// Registers an organisation.
    #[track_caller]
    pub fn register(&self, name: &str) -> Organization {
        let body = json!({
            "email": format!("{name}@example.org"), "organization_name": name, "first_name": "Ada", "last_name": "L",
        });
        let answer = self.client().post("/register").json(&body).send().ok();
        Organization::new(self.client(), &answer)
    }

    /// Ends `controller up` as an administrator would and gives how it ended.
    ///
    /// # Errors
    /// When it does not end within a minute.
    pub fn stop(&self) -> Result<ExitStatus> {
        self.end(Signal::SIGTERM, REPLACED)
    }

    /// Kills `controller up` and waits until it is gone.
    ///
    /// # Errors
    /// When it does not run.
    pub fn kill_up(&self) -> Result<ExitStatus> {
        self.end(Signal::SIGKILL, REPLACED)
    }

    fn end(&self, signal: Signal, limit: Duration) -> Result<ExitStatus> {
        let mut child = lock(&self.up).take().context("controller up does not run")?;
        kill(pid(child.id())?, signal)?;
        let status = wait::within(limit, || child.try_wait().ok().flatten());
        if status.is_none() {
            child.kill()?;
            child.wait()?;
        }
        status.with_context(|| format!("controller up did not end within {limit:?} of {signal}"))
    }

    /// Waits until a sandbox could be created (again).
    ///
    /// # Panics
    /// When that takes too long.
    pub fn wait_ready(&self) -> Duration {
        let started = Instant::now();
        wait::until("the node is ready", START, || {
            let answer = self.client().get("//ready").try_send().ok();
            answer.filter(|answer| answer.status.is_success())
        });
        started.elapsed()
    }

    /// Removes what the instance made, as `controller down` does.
    ///
    /// # Errors
    /// When it fails.
    pub fn down(&self) -> Result<()> {
        let (status, text) = self.run("controller", &["down"])?;
        ensure!(
            status.success(),
            "controller down: {status} (signal {:?})\n{text}",
            status.signal()
        );
        Ok(())
    }

    /// Kills a process of the node at once.
    ///
    /// # Errors
    /// When there is no such process.
    pub fn kill(&self, process: &Process) -> Result<()> {
        Ok(kill(pid(process.pid)?, Signal::SIGKILL)?)
    }

    /// netd's process.
    pub fn netd(&self) -> Option<Process> {
        self.programs()
            .into_iter()
            .find(|process| process.is("netd", None))
    }

    /// The controller's serving process.
    pub fn controller(&self) -> Option<Process> {
        self.programs()
            .into_iter()
            .find(|process| process.is("controller", Some("serve")))
    }

    /// tunnel-proxy's process.
    pub fn tunnel_proxy(&self) -> Option<Process> {
        self.programs()
            .into_iter()
            .find(|process| process.is("tunnel-proxy", None))
    }

    /// The instance's own programs.
    pub fn programs(&self) -> Vec<Process> {
        let mut mine = format!("SANDGATE_RUN_DIR={}", self.instance.display()).into_bytes();
        mine.push(0);
        let is_mine = |process: &Process| {
            let environment = fs::read(format!("/proc/{}/environ", process.pid)).unwrap_or_default();
            environment.windows(mine.len()).any(|window| window == mine)
        };
        let mut programs = self.processes();
        programs.retain(|process| PROGRAMS.iter().any(|name| process.is(name, None)) && is_mine(process));
        programs
    }

    /// Sends a process of the node a signal.
    ///
    /// # Errors
    /// When there is no such process.
    pub fn signal(&self, process: &Process, signal: Signal) -> Result<()> {
        Ok(kill(pid(process.pid)?, signal)?)
    }

    /// Kills a program and waits until another one has taken its place.
    ///
    /// # Panics
    /// When none does within a minute.
    pub fn replace(&self, find: impl Fn(&Self) -> Option<Process>) -> Duration {
        self.replace_by(find, Signal::SIGKILL)
    }

    /// The same by this signal.
    ///
    /// # Panics
    /// As [`Node::replace`].
    pub fn replace_by(&self, find: impl Fn(&Self) -> Option<Process>, signal: Signal) -> Duration {
        let old = find(self).expect("it runs");
        kill(pid(old.pid).expect("a number"), signal).expect("it runs");
        let started = Instant::now();
        wait::until("a new process instead of the ended one", REPLACED, || {
            find(self).filter(|new| new.pid != old.pid)
        });
        started.elapsed()
    }

    /// The number of `controller up`, as the node counts.
    pub fn supervisor(&self) -> Option<u32> {
        let mut programs = self.programs().into_iter();
        let up = programs.find(|process| process.is("controller", Some("up")))?;
        up.numbers.last().copied()
    }

    /// The run directory: its last component names the instance.
    pub fn run_dir(&self) -> &Path {
        &self.instance
    }

    /// Every line the programs have written, `out| ` or `err| ` before each.
    pub fn log_lines(&self) -> Vec<String> {
        lock(&self.log).clone()
    }

    /// Everything the API has answered to this node's clients.
    pub fn answers(&self) -> Vec<Answer> {
        lock(&self.heard).clone()
    }

    /// Forgets what was answered and logged so far, which would grow without end in a long run.
    pub fn forget(&self) {
        lock(&self.heard).clear();
        lock(&self.log).clear();
    }

    /// The traces, but for processes that end within a moment: they are not left behind.
    pub fn left_behind(&self) -> Vec<String> {
        let mut left = self.traces();
        wait::within(MOMENT, || {
            let may_end = !left.is_empty() && left.iter().all(|trace| trace.starts_with("process "));
            if may_end {
                left = self.traces();
            }
            (!may_end).then_some(())
        });
        left
    }

    /// The end of the log, for failures.
    pub fn report(&self) -> String {
        let lines = self.log_lines();
        let skipped = lines.len().saturating_sub(SHOWN);
        format!(
            "--- the node's log ({skipped} lines before)\n{}\n---",
            lines[skipped..].join("\n")
        )
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if !self.was_started.load(Ordering::Relaxed) {
            return;
        }
        let stopped = if lock(&self.up).is_some() {
            self.stop().map(|_| ())
        } else {
            Ok(())
        };
        let down = self.down();
        let left = self.left_behind();
        if let Some(file) = env::var_os("SANDGATE_TEST_LOG") {
            // Only for whoever looks for something in it.
            fs::write(file, self.log_lines().join("\n")).ok();
        }
        traces::remove_cgroups(&self.instance);
        // A second panic would end the test program before the world is cleaned.
        if !thread::panicking() {
            stopped.expect("controller up ends when asked");
            down.expect("controller down succeeds");
            assert!(left.is_empty(), "`controller down` left behind: {left:#?}");
        }
    }
}

fn pid(number: u32) -> Result<Pid> {
    Ok(Pid::from_raw(i32::try_from(number)?))
}

/// The built programs under names of the instance's own, so that it can be upgraded without others noticing.
fn own_binaries(directory: &Path) -> Result<PathBuf> {
    let built = binaries();
    fs::create_dir_all(directory)?;
    for entry in fs::read_dir(&built)? {
        let path = entry?.path();
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default();
        let target = directory.join(name);
        if (PROGRAMS.contains(&name) || name == "sandboxd") && !target.exists() {
            // The same file where that can be: it is large.
            fs::hard_link(&path, &target).or_else(|_| fs::copy(&path, &target).map(|_bytes| ()))?;
        }
    }
    Ok(directory.to_owned())
}

/// Keeps what a program writes.
fn follow(stream: impl std::io::Read + Send + 'static, name: &'static str, log: &Arc<Mutex<Vec<String>>>) {
    let log = Arc::clone(log);
    thread::spawn(move || {
        let lines = std::io::BufRead::lines(std::io::BufReader::new(stream));
        for line in lines.map_while(Result::ok) {
            lock(&log).push(format!("{name}| {line}"));
        }
    });
}

/// The directory with the built programs.
///
/// # Panics
/// When they are not built.
pub fn binaries() -> PathBuf {
    let target = env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    let target = target.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target"));
    let candidates = match env::var_os("SANDGATE_BIN_DIR") {
        Some(directory) => vec![PathBuf::from(directory)],
        None => vec![target.join("release"), target.join("debug")],
    };
    let complete = |directory: &&PathBuf| {
        ["controller", "netd", "tunnel-proxy", "sandboxd"]
            .iter()
            .all(|name| directory.join(name).is_file())
    };
    let found = candidates.iter().find(complete).cloned();
    let found = found.unwrap_or_else(|| {
        panic!("controller, netd, tunnel-proxy and sandboxd are not in {candidates:?}: run `make build`")
    });
    fs::canonicalize(&found).unwrap_or(found)
}
