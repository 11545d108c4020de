//! Sandboxes on this machine, by an OCI runtime.
//!
//! A sandbox is made in steps, each in a file of its own below; its record on disk is written before the first
//! and removed after the last, so that whatever a killed process leaves is found by [`LocalBackend::inventory`].
//! Steps on one sandbox follow each other, and go on when their caller has gone; no lock that concerns more than
//! one sandbox is held over a step.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt::Display,
    fs,
    future::Future,
    io,
    os::{fd::OwnedFd, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use rustix::pipe::{PipeFlags, pipe_with};
use sandgate_api::{feed::Endpoint, id::SandboxId, rest::Isolation};
use sandgate_daemon::tasks::Tasks;
use tokio::{
    io::Interest,
    net::unix::pipe,
    sync::{OwnedMutexGuard, oneshot},
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use tracing::Span;

use self::{
    bundle::Plan,
    cgroup::{Cgroups, Limits},
    disk::Budget,
    layout::Layout,
    process::Process,
    record::{Addresses, Leases, NoLease, Record},
    runtime::OciRuntime,
};
use super::{BackendError, Found, LaunchMetrics, LaunchSpec, LocalConfig};

mod bundle;
mod cgroup;
mod disk;
mod layout;
mod loopdev;
mod network;
mod probe;
mod process;
mod record;
mod running;
mod runtime;
mod seccomp;
mod trust;

/// How long the agent may take to listen.
const AGENT: Duration = Duration::from_secs(10);
/// Least that a sandbox can start with.
const SMALLEST_MEMORY: u64 = 16 * 1024 * 1024;
/// The kernel's smallest quota is a millisecond of a tenth of a second.
const SMALLEST_CPU: u64 = 10;
/// The agent, a shell, and something for it to start.
const SMALLEST_PIDS: u64 = 8;
/// Longest environment, names and values together: the kernel's limit for arguments is 128 KiB per string.
const LONGEST_ENVIRONMENT: usize = 96 * 1024;

/// The local backend. Clones share everything.
#[derive(Debug, Clone)]
pub struct LocalBackend {
    shared: Arc<Shared>,
}

/// What was found out about the machine and the image.
#[derive(Debug)]
struct Machine {
    root: PathBuf,
    environment: BTreeMap<String, String>,
    cgroups: Cgroups,
    open_files: u64,
    badness: i32,
}

#[derive(Debug)]
struct Shared {
    config: LocalConfig,
    layout: Layout,
    machine: Machine,
    leases: Leases,
    budget: Budget,
    runtime: OciRuntime,
    /// One step at a time for each sandbox.
    turns: Mutex<HashMap<SandboxId, Arc<tokio::sync::Mutex<()>>>>,
    tasks: Tasks,
}

impl LocalBackend {
    /// Checks the machine by running something, and adopts the sandboxes that are still there.
    ///
    /// # Errors
    /// [`BackendError::Unusable`] with the reason.
    pub async fn open(config: LocalConfig) -> Result<Self, BackendError> {
        probe::check(&config).await?;
        let layout = Layout::new(&config.run_dir, &config.data_dir);
        let unusable = |error: io::Error| BackendError::Unusable(error.to_string());
        probe::make_folders(&layout).map_err(unusable)?;
        let machine = probe::machine(&config)?;
        // Before anything is made in them: another instance that goes takes the parent away when it is empty.
        machine
            .cgroups
            .make_parents(&layout.cgroups())
            .map_err(|error| BackendError::Unusable(format!("control groups: {error}")))?;
        probe::run(&layout, &config, &machine)
            .await
            .inspect_err(|_unusable| machine.cgroups.remove_parents(&layout.cgroups()))?;
        let addresses = Addresses {
            range: config.sandbox_cidr,
            range6: config.sandbox_cidr6.network(),
            gives6: probe::gives_ipv6(&config).await?,
        };
        let leases = Leases::open(&layout, addresses).map_err(unusable)?;
        let budget = Budget::open(&layout, config.disk_reserve_bytes).map_err(unusable)?;
        let runtime = runtime(&layout, &config);
        let tasks = Tasks::new(CancellationToken::new());
        let turns = Mutex::default();
        let shared = Shared {
            config,
            layout,
            machine,
            leases,
            budget,
            runtime,
            turns,
            tasks,
        };
        Ok(Self {
            shared: Arc::new(shared),
        })
    }

    /// Reserves disk and address, makes the namespace, the veth (down) and the writable layer.
    ///
    /// # Errors
    /// [`BackendError::NoCapacity`] when it does not fit. Nothing is left then, nor after any other failure.
    pub async fn prepare(&self, spec: &LaunchSpec) -> Result<Endpoint, BackendError> {
        check(spec)?;
        let spec = spec.clone();
        self.in_turn("prepare", &spec.sandbox_id.clone(), async move |shared: Arc<Shared>| {
            let record = shared.lease(&spec)?;
            let prepared = shared.prepare(&spec, record).await;
            if prepared.is_err()
                && let Err(error) = shared.destroy(&spec.sandbox_id).await
            {
                tracing::error!(sandbox = %spec.sandbox_id, %error, "a half-made sandbox could not be taken away");
            }
            prepared
        })
        .await
    }

    /// Brings the network up and starts the agent; returns once it listens.
    ///
    /// # Errors
    /// When a step fails; call [`LocalBackend::destroy`] then.
    pub async fn launch(&self, spec: &LaunchSpec) -> Result<LaunchMetrics, BackendError> {
        check(spec)?;
        let spec = spec.clone();
        self.in_turn(
            "launch",
            &spec.sandbox_id.clone(),
            async move |shared: Arc<Shared>| shared.launch(&spec).await,
        )
        .await
    }

    /// Takes away everything of this sandbox, however much of it exists. Idempotent.
    ///
    /// # Errors
    /// When something is left; calling it again goes on.
    pub async fn destroy(&self, id: &SandboxId) -> Result<(), BackendError> {
        let name = id.clone();
        self.in_turn("destroy", id, async move |shared: Arc<Shared>| {
            shared.destroy(&name).await
        })
        .await
    }

    /// Every sandbox of this instance that exists at least in part, by any trace that it can leave.
    ///
    /// # Errors
    /// When the kernel or the disk cannot be asked.
    pub async fn inventory(&self) -> Result<Vec<Found>, BackendError> {
        let failed = |error| failed("taking stock", error);
        let layout = &self.shared.layout;
        let mut names = BTreeSet::new();
        for folder in [
            layout.records(),
            layout.runtime_state(),
            layout.namespaces(),
            layout.mounts(),
            layout.layers(),
        ] {
            names.extend(entry_names(&folder).map_err(failed)?);
        }
        names.extend(
            self.shared
                .machine
                .cgroups
                .children(&layout.cgroups())
                .map_err(failed)?,
        );
        names.extend(disk::attached(layout).map_err(failed)?);
        names.extend(network::interfaces(&layout.router()).await.map_err(failed)?);
        // The router namespace, the probe and stray files have names that are no ids.
        let ids = names.iter().filter_map(|name| name.parse::<SandboxId>().ok());
        Ok(ids
            .map(|sandbox_id| {
                let known = self.shared.leases.get(&sandbox_id);
                let process = known.and_then(|known| known.record.process);
                Found {
                    sandbox_id,
                    running: process.is_some_and(Process::is_alive),
                }
            })
            .collect())
    }

    /// Resolves when the sandbox's PID 1 is gone; at once when there is none.
    pub fn wait_exit(&self, id: &SandboxId) -> impl Future<Output = ()> + Send + 'static {
        let process = self.shared.leases.get(id).and_then(|known| known.record.process);
        async move {
            let Some(process) = process else { return };
            while let Err(error) = process.ended().await {
                // Out of descriptors. Saying that it is gone would be wrong.
                tracing::warn!(%error, "a sandbox cannot be watched at the moment");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }

    /// What sandboxes are made from: another text means that one made now could differ from one made then.
    pub fn build(&self) -> String {
        let Shared { config, machine, .. } = &*self.shared;
        let stamp = |path: &Path| {
            fs::metadata(path).map_or_else(
                |error| error.kind().to_string(),
                |file| {
                    format!(
                        "{}:{}:{}.{}",
                        file.dev(),
                        file.ino(),
                        file.ctime(),
                        file.ctime_nsec()
                    )
                },
            )
        };
        let family = if self.shared.leases.gives6() {
            "ipv4+ipv6"
        } else {
            "ipv4"
        };
        format!(
            "{} {} {} {} {family}",
            env!("CARGO_PKG_VERSION"),
            config.image,
            stamp(&machine.root),
            stamp(&config.sandboxd)
        )
    }

    /// Where the sandbox is attached, from `prepare` (also of an earlier process) until `destroy`.
    pub fn endpoint(&self, id: &SandboxId) -> Option<Endpoint> {
        self.shared.leases.get(id)?.record.endpoint()
    }

    /// Removes what the instance has apart from its sandboxes. Call when the last one is destroyed.
    pub fn remove_instance(&self) {
        let Shared { layout, machine, .. } = &*self.shared;
        machine.cgroups.remove_parents(&layout.cgroups());
    }

    /// Runs a step that nobody can interrupt: after it has begun, a caller that goes away changes nothing.
    async fn in_turn<T, S, F>(&self, name: &'static str, id: &SandboxId, step: S) -> Result<T, BackendError>
    where
        T: Send + 'static,
        S: FnOnce(Arc<Shared>) -> F,
        F: Future<Output = Result<T, BackendError>> + Send + 'static,
    {
        let shared = Arc::clone(&self.shared);
        let turn = shared.turn(id).await;
        let work = step(Arc::clone(&shared));
        let id = id.clone();
        let (sender, result) = oneshot::channel();
        self.shared
            .tasks
            .spawn_within(name, &Span::current(), async move {
                let result = work.await;
                drop(turn);
                shared.forget_turn(&id);
                let _gone = sender.send(result);
            });
        result.await.map_err(|_gone| failed(name, "the step panicked"))?
    }
}

impl Shared {
    async fn turn(&self, id: &SandboxId) -> OwnedMutexGuard<()> {
        let turn = {
            let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(turns.entry(id.clone()).or_default())
        };
        turn.lock_owned().await
    }

    /// Drops the turn if nobody else waits for it.
    fn forget_turn(&self, id: &SandboxId) {
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        if turns.get(id).is_some_and(|turn| Arc::strong_count(turn) == 1) {
            turns.remove(id);
        }
    }

    /// Disk and address, or nothing.
    fn lease(&self, spec: &LaunchSpec) -> Result<Record, BackendError> {
        let id = &spec.sandbox_id;
        let record = self.leases.take(id).map_err(|reason| match reason {
            NoLease::Taken => BackendError::Exists(id.clone()),
            NoLease::Exhausted => BackendError::NoCapacity {
                message: format!("every sandbox address of {} is in use", self.config.sandbox_cidr),
                missing: 0,
            },
        })?;
        let promised = self.budget.promise(&self.layout, id.as_str(), spec.disk_bytes);
        let refusal = match promised {
            Ok(Ok(())) => return Ok(record),
            Ok(Err(overdrawn)) => BackendError::NoCapacity {
                message: format!(
                    "a disk of {} bytes is wanted and {} are left to promise",
                    overdrawn.wanted, overdrawn.left
                ),
                missing: overdrawn.wanted.saturating_sub(overdrawn.left),
            },
            Err(error) => failed("asking for free disk space", error),
        };
        self.leases.release(id);
        Err(refusal)
    }

    async fn prepare(&self, spec: &LaunchSpec, mut record: Record) -> Result<Endpoint, BackendError> {
        let layout = &self.layout;
        let id = &spec.sandbox_id;
        let name = id.as_str();
        let saved = record
            .save(layout)
            .and_then(|()| probe::save_cursor(&layout.cursor(), self.leases.cursor()));
        saved.map_err(|error| failed("writing the record", error))?;
        let (router, namespace) = (layout.router(), layout.namespace(name));
        let owner = record.id_outside(bundle::USER);
        let network = timed(network::create(&router, &namespace, &record));
        let disk = timed(disk::create(layout, name, spec.disk_bytes, owner));
        let ((network, network_time), (disk, disk_time)) = tokio::join!(network, disk);
        record.ifindex = network.map_err(|error| failed("making the network", error))?;
        disk.map_err(|error| failed("making the writable layer", error))?;
        record
            .save(layout)
            .map_err(|error| failed("writing the record", error))?;
        let endpoint = record
            .endpoint()
            .ok_or_else(|| failed("making the network", "no interface index"))?;
        self.leases.change(id, |known| {
            known.record = record;
            known.metrics.network = network_time;
            known.metrics.disk = disk_time;
        });
        Ok(endpoint)
    }

    async fn launch(&self, spec: &LaunchSpec) -> Result<LaunchMetrics, BackendError> {
        let id = &spec.sandbox_id;
        let name = id.as_str();
        let known = self.leases.get(id).filter(|known| known.record.ifindex != 0);
        let Some(known) = known else {
            return Err(BackendError::NotPrepared(id.clone()));
        };
        if known.record.process.is_some() {
            return Err(BackendError::Exists(id.clone()));
        }
        let (mut record, mut metrics) = (known.record, known.metrics);
        let folder = self.layout.record(name);
        let (key_reader, key_writer) =
            send_key(&spec.agent_key).map_err(|error| failed("the agent's key", error))?;
        let (router, namespace) = (self.layout.router(), self.layout.namespace(name));
        let network = timed(network::bring_up(&router, &namespace, &record));
        let create = timed(async {
            self.write_bundle(spec, &record)?;
            self.runtime.create(name, &folder, key_reader).await
        });
        let ((network, network_time), (create, create_time)) = tokio::join!(network, create);
        network.map_err(|error| failed("bringing the network up", error))?;
        let process = create
            .and_then(Process::present)
            .map_err(|error| failed("making the container", error))?;
        metrics.network += network_time;
        metrics.create = create_time;
        record.process = Some(process);
        record
            .save(&self.layout)
            .map_err(|error| failed("writing the record", error))?;
        self.leases.change(id, |known| known.record = record);
        let verified = self
            .machine
            .cgroups
            .verify(&self.layout.cgroup(name), limits(spec));
        verified.map_err(|error| failed("checking the limits", error))?;
        let (started, start_time) = timed(self.runtime.start(name, &folder)).await;
        started.map_err(|error| failed("starting the container", error))?;
        metrics.start = start_time;
        let (listening, agent_time) = timed(agent_listens(key_writer, process)).await;
        listening.map_err(|error| failed("starting the agent", error))?;
        metrics.agent = agent_time;
        self.leases.change(id, |known| known.metrics = metrics);
        Ok(metrics)
    }

    fn write_bundle(&self, spec: &LaunchSpec, record: &Record) -> io::Result<()> {
        let name = spec.sandbox_id.as_str();
        let mut environment = self.machine.environment.clone();
        let trust = spec.ca_certificate.as_deref().map(|certificate| {
            let bundles = trust::bundles(&self.machine.root);
            (certificate, bundles)
        });
        if let Some((_, bundles)) = &trust {
            environment.extend(trust::variables(bundles));
        }
        environment.extend(spec.env.clone());
        bundle::write(&Plan {
            name,
            root: &self.machine.root,
            bundle: &self.layout.record(name),
            layer: Some(&self.layout.mount(name)),
            namespace: Some(&self.layout.namespace(name)),
            agent: &self.config.sandboxd,
            command: Vec::new(),
            environment: &environment,
            trust,
            first_id: record.first_id,
            address: record.address,
            address6: record.address6,
            cgroup: &self.layout.cgroup(name),
            limits: limits(spec),
            limits_swap: self.machine.cgroups.limits_swap(),
            open_files: self.machine.open_files,
            badness: self.machine.badness,
        })
    }

    /// Every step tolerates that there is nothing to do. The record goes last.
    async fn destroy(&self, id: &SandboxId) -> Result<(), BackendError> {
        let name = id.as_str();
        let known = self.leases.get(id);
        if let Some(process) = known.and_then(|known| known.record.process) {
            process
                .kill()
                .map_err(|error| failed("killing the sandbox", error))?;
            // What is frozen does not even die.
            let thawed = self.machine.cgroups.thaw(&self.layout.cgroup(name));
            thawed.map_err(|error| failed("letting the sandbox go on", error))?;
            // Killing does not fail; the control group below kills again what does not end.
            let _slow = timeout(AGENT, process.ended()).await;
        }
        let deleted = self.runtime.delete(name).await;
        // Also what the runtime has lost sight of.
        let (cgroups, group) = (self.machine.cgroups.clone(), self.layout.cgroup(name));
        blocking("removing the control group", move || cgroups.destroy(&group)).await?;
        if let Err(error) = deleted {
            // With its processes gone there is nothing left that could keep it.
            tracing::warn!(sandbox = name, %error, "deleting the container a second time");
            self.runtime
                .delete(name)
                .await
                .map_err(|error| failed("deleting the container", error))?;
        }
        let (router, namespace) = (self.layout.router(), self.layout.namespace(name));
        let interface = Some(record::interface(id));
        let network = network::destroy(&router, &namespace, interface).await;
        network.map_err(|error| failed("removing the network", error))?;
        let (layout, layer) = (self.layout.clone(), name.to_owned());
        blocking("removing the writable layer", move || {
            disk::destroy(&layout, &layer)
        })
        .await?;
        let record = disk::remove(fs::remove_dir_all(self.layout.record(name)));
        record.map_err(|error| failed("removing the record", error))?;
        self.budget.release(name);
        self.leases.release(id);
        Ok(())
    }
}

fn runtime(layout: &Layout, config: &LocalConfig) -> OciRuntime {
    OciRuntime::new(&config.runtime, layout.runtime_state())
}

fn failed(step: &'static str, error: impl Display) -> BackendError {
    BackendError::Failed {
        step,
        message: error.to_string(),
    }
}

async fn blocking(
    step: &'static str,
    work: impl FnOnce() -> io::Result<()> + Send + 'static,
) -> Result<(), BackendError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(io::Error::other)
        .flatten()
        .map_err(|error| failed(step, error))
}

async fn timed<T>(work: impl Future<Output = T>) -> (T, Duration) {
    let begun = Instant::now();
    let result = work.await;
    (result, begun.elapsed())
}

fn limits(spec: &LaunchSpec) -> Limits {
    Limits {
        memory_bytes: spec.memory_bytes,
        cpu_millis: spec.cpu_millis,
        pids: spec.pids,
    }
}

fn check(spec: &LaunchSpec) -> Result<(), BackendError> {
    let invalid = |field, message: String| Err(BackendError::Invalid { field, message });
    match spec.isolation {
        Isolation::Container => {}
    }
    for (field, value, least) in [
        ("cpu_millis", spec.cpu_millis, SMALLEST_CPU),
        ("memory_bytes", spec.memory_bytes, SMALLEST_MEMORY),
        ("pids", spec.pids, SMALLEST_PIDS),
        ("disk_bytes", spec.disk_bytes, disk::SMALLEST),
    ] {
        if value < least || i64::try_from(value).is_err() {
            return invalid(field, format!("{value} is not at least {least}"));
        }
    }
    for (name, value) in &spec.env {
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            return invalid(
                "env",
                format!("`{}` is not an environment variable", name.escape_debug()),
            );
        }
    }
    let length: usize = spec
        .env
        .iter()
        .map(|(name, value)| name.len() + value.len() + 2)
        .sum();
    if length > LONGEST_ENVIRONMENT {
        return invalid(
            "env",
            format!("{length} bytes are over the limit of {LONGEST_ENVIRONMENT}"),
        );
    }
    if spec.agent_key.len() != 64 || !spec.agent_key.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return invalid("agent_key", "not 64 hexadecimal digits".to_owned());
    }
    Ok(())
}

/// A pipe with the key in it. The reading end is for the agent; the writing end tells when it was closed.
fn send_key(key: &str) -> io::Result<(OwnedFd, OwnedFd)> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
    // Far less than a pipe holds, so it is written at once and whole.
    let written = rustix::io::write(&writer, key.as_bytes())?;
    if written == key.len() {
        Ok((reader, writer))
    } else {
        Err(io::ErrorKind::WriteZero.into())
    }
}

/// Waits until the agent has closed the pipe of its key: it does so when it listens.
async fn agent_listens(key_writer: OwnedFd, process: Process) -> io::Result<()> {
    let pipe = pipe::Sender::from_owned_fd(key_writer)?;
    let closed = async { pipe.ready(Interest::ERROR).await.map(|_ready| ()) };
    let waited = timeout(AGENT, async {
        tokio::select! {
            biased;
            ended = process.ended() => ended.and_then(|()| Err(io::Error::other("it ended at once"))),
            closed = closed => closed,
        }
    });
    waited
        .await
        .map_err(|_elapsed| io::Error::other("it does not listen"))??;
    // The pipe is closed by an agent that has died, too.
    if process.is_alive() {
        Ok(())
    } else {
        Err(io::Error::other("it ended at once"))
    }
}

/// Names of what is in a folder.
fn entry_names(folder: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    entries
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect()
}
