//! One instance in a scratch directory, with a router namespace, and a way to talk to agents.

use std::{
    fs, io,
    net::SocketAddr,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
    time::Duration,
};

use controller::{
    agent::{Agent, AgentError, ExecEvent},
    authority::{Authority, FIRST_GENERATION},
    backend::{LaunchMetrics, LaunchSpec, LocalBackend, LocalConfig},
    installation::InstallationKey,
};
use jiff::Timestamp;
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
};
use sandgate_api::{
    agent::{AGENT_PORT, Command as AgentCommand, Exec},
    feed::Endpoint,
    id::SandboxId,
    rest::Isolation,
};
use sandgate_policy::Range6;
use tempfile::TempDir;

pub(super) const MIB: u64 = 1024 * 1024;
const IMAGES: &str = "/var/lib/sandgate/images";

/// How a command in a sandbox ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Outcome {
    pub(super) code: i32,
    pub(super) timed_out: bool,
    pub(super) stdout: String,
    pub(super) stderr: String,
}

pub(super) struct World {
    pub(super) folder: Scratch,
    pub(super) config: LocalConfig,
    pub(super) backend: LocalBackend,
}

/// Whether these tests can run. Loud about it when not; a failure where root was promised.
pub(super) fn can_run() -> bool {
    let root = nix::unistd::geteuid().is_root();
    assert!(
        root || std::env::var_os("REQUIRE_ROOT").is_none_or(|value| value != "1"),
        "REQUIRE_ROOT=1 without root"
    );
    if !root {
        eprintln!("SKIPPED: needs root (REQUIRE_ROOT=1 makes this a failure)");
    }
    root
}

impl World {
    pub(super) async fn open() -> Self {
        Self::open_with(Range6::Off).await
    }

    /// A world whose sandboxes may have IPv6.
    pub(super) async fn open_with(sandbox_cidr6: Range6) -> Self {
        let folder = Scratch(tempfile::tempdir().unwrap());
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let run_dir = folder.path().join("run");
        make_router(&run_dir.join("netns/router")).unwrap();
        let config = LocalConfig {
            run_dir,
            data_dir: folder.path().join("data"),
            image_dir: std::env::var_os("SANDGATE_IMAGE_DIR").map_or_else(|| IMAGES.into(), PathBuf::from),
            image: "default".to_owned(),
            sandbox_cidr: "203.0.113.0/24".parse().unwrap(),
            sandbox_cidr6,
            sandboxd: sandboxd(),
            runtime: "runc".into(),
            disk_reserve_bytes: 64 * MIB,
        };
        let backend = LocalBackend::open(config.clone()).await.unwrap();
        Self {
            folder,
            config,
            backend,
        }
    }

    pub(super) fn spec(&self) -> LaunchSpec {
        let half = || {
            SandboxId::random()
                .as_str()
                .trim_start_matches(SandboxId::PREFIX)
                .to_owned()
        };
        LaunchSpec {
            sandbox_id: SandboxId::random(),
            cpu_millis: 1000,
            memory_bytes: 256 * MIB,
            pids: 64,
            disk_bytes: 64 * MIB,
            env: [("GREETING".to_owned(), "hello".to_owned())].into(),
            agent_key: [half(), half(), half(), half()].concat(),
            ca_certificate: Some(authority().certificate().unwrap()),
            isolation: Isolation::Container,
        }
    }

    pub(super) async fn start(&self, spec: &LaunchSpec) -> (Endpoint, LaunchMetrics) {
        let endpoint = self.backend.prepare(spec).await.unwrap();
        let metrics = self.backend.launch(spec).await.unwrap();
        (endpoint, metrics)
    }

    pub(super) async fn agent(&self, spec: &LaunchSpec) -> Agent {
        let endpoint = self.backend.endpoint(&spec.sandbox_id).unwrap();
        let router = self.config.run_dir.join("netns/router");
        let stream = dial(router, SocketAddr::from((endpoint.address, AGENT_PORT)))
            .await
            .unwrap();
        Agent::new(stream, &spec.agent_key)
    }

    pub(super) async fn sh(&self, spec: &LaunchSpec, line: &str) -> Outcome {
        let exec = Exec {
            command: AgentCommand::Shell(line.to_owned()),
            env: Default::default(),
            working_dir: None,
            timeout_ms: Some(60_000),
            track: None,
        };
        self.try_exec(spec, exec).await.unwrap()
    }

    pub(super) async fn try_exec(&self, spec: &LaunchSpec, exec: Exec) -> Result<Outcome, AgentError> {
        let mut events = self.agent(spec).await.exec(exec).await?;
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        while let Some(event) = events.next().await {
            match event? {
                ExecEvent::Stdout(bytes) => stdout.extend_from_slice(&bytes),
                ExecEvent::Stderr(bytes) => stderr.extend_from_slice(&bytes),
                ExecEvent::Exited {
                    exit_code, timed_out, ..
                } => {
                    return Ok(Outcome {
                        code: exit_code,
                        timed_out,
                        stdout: String::from_utf8_lossy(&stdout).into_owned(),
                        stderr: String::from_utf8_lossy(&stderr).into_owned(),
                    });
                }
            }
        }
        panic!("the command's events ended without an exit");
    }

    /// Everything on this machine that carries the mark of this world.
    pub(super) fn traces(&self) -> Vec<String> {
        let scratch = self.folder.path().to_str().unwrap();
        let mut traces = Vec::new();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let router = self.config.run_dir.join("netns/router");
        traces.extend(
            mounts
                .lines()
                .filter(|line| line.contains(scratch) && !line.contains(router.to_str().unwrap()))
                .map(|line| format!("mount {line}")),
        );
        for entry in fs::read_dir("/sys/block").unwrap() {
            let backing = fs::read_to_string(entry.unwrap().path().join("loop/backing_file"));
            traces.extend(
                backing
                    .ok()
                    .filter(|file| file.contains(scratch))
                    .map(|file| format!("loop {file}")),
            );
        }
        for folder in [
            "run/sandboxes",
            "run/netns",
            "run/mnt",
            "run/runc",
            "data/sandboxes",
        ] {
            for entry in fs::read_dir(self.folder.path().join(folder)).unwrap() {
                let name = entry.unwrap().file_name();
                if name != "router" {
                    traces.push(format!("{folder}/{}", name.display()));
                }
            }
        }
        traces.extend(self.cgroups());
        let links = in_namespace(router, || {
            let output = Command::new("ip").args(["-o", "link"]).output()?;
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        });
        traces.extend(
            links
                .unwrap()
                .lines()
                .filter(|line| line.contains("sg"))
                .map(|line| format!("link {line}")),
        );
        traces
    }

    /// Control groups of this instance's sandboxes, in every hierarchy.
    pub(super) fn cgroups(&self) -> Vec<String> {
        let output = Command::new("find")
            .args(["/sys/fs/cgroup", "-name", "sandbox-*"])
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let mine = self.instance();
        text.lines()
            .filter(|line| line.contains(&mine))
            .map(|line| format!("cgroup {line}"))
            .collect()
    }

    /// The instance's part of a control group path.
    fn instance(&self) -> String {
        use sha2::Digest as _;
        let digest = sha2::Sha256::digest(self.config.run_dir.as_os_str().as_encoded_bytes());
        format!("/sandgate/run-{}/", &hex::encode(digest)[..8])
    }

    pub(super) async fn close(self) {
        for found in self.backend.inventory().await.unwrap() {
            self.backend.destroy(&found.sandbox_id).await.unwrap();
        }
        self.backend.remove_instance();
        assert_eq!(self.traces(), Vec::<String>::new());
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // Also when a test failed: nothing of it may stay on this machine.
        let backend = self.backend.clone();
        let cleaning = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                for found in backend.inventory().await.unwrap() {
                    backend.destroy(&found.sandbox_id).await.unwrap();
                }
                backend.remove_instance();
            });
        });
        if cleaning.join().is_err() {
            eprintln!("a failed test's sandboxes could not be taken away");
        }
    }
}

/// The scratch directory. Dropped after the backend; no mount may keep it.
pub(super) struct Scratch(TempDir);

impl Scratch {
    pub(super) fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let scratch = self.path().to_string_lossy().into_owned();
        let targets = mounts.lines().filter_map(|line| line.split(' ').nth(4));
        let mut mine: Vec<&str> = targets.filter(|path| path.starts_with(&scratch)).collect();
        mine.reverse();
        for path in mine {
            let _gone = umount2(path, MntFlags::MNT_DETACH);
        }
    }
}

fn make_router(path: &Path) -> io::Result<()> {
    fs::create_dir_all(path.parent().unwrap())?;
    fs::write(path, "")?;
    let path = path.to_owned();
    std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET)?;
        mount(
            Some("/proc/thread-self/ns/net"),
            &path,
            None::<&str>,
            MsFlags::MS_BIND,
            None::<&str>,
        )?;
        fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1")?;
        for arguments in [
            ["link", "set", "lo", "up"].as_slice(),
            &["addr", "add", "169.254.1.1/32", "dev", "lo"],
        ] {
            assert!(Command::new("ip").args(arguments).status()?.success());
        }
        Ok(())
    })
    .join()
    .unwrap()
}

pub(super) fn in_namespace<T: Send + 'static>(
    namespace: PathBuf,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    std::thread::spawn(move || {
        setns(fs::File::open(namespace)?, CloneFlags::CLONE_NEWNET)?;
        work()
    })
    .join()
    .unwrap()
}

async fn dial(router: PathBuf, address: SocketAddr) -> io::Result<tokio::net::TcpStream> {
    let stream = tokio::task::spawn_blocking(move || {
        in_namespace(router, move || {
            std::net::TcpStream::connect_timeout(&address, Duration::from_secs(5))
        })
    })
    .await
    .unwrap()?;
    stream.set_nonblocking(true)?;
    tokio::net::TcpStream::from_std(stream)
}

/// The static agent: named by SANDGATE_TEST_SANDBOXD, or built here.
fn sandboxd() -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    let built = BUILT.get_or_init(|| {
        if let Some(named) = std::env::var_os("SANDGATE_TEST_SANDBOXD") {
            return named.into();
        }
        let triple = format!("{}-unknown-linux-musl", std::env::consts::ARCH);
        // .../<target>/<profile>/deps/<this test>
        let target = std::env::current_exe()
            .unwrap()
            .ancestors()
            .nth(3)
            .unwrap()
            .to_owned();
        let status = Command::new(env!("CARGO"))
            .args([
                "build",
                "--release",
                "-p",
                "sandboxd",
                "--target",
                &triple,
                "--target-dir",
            ])
            .arg(&target)
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .status()
            .unwrap();
        assert!(status.success(), "sandboxd does not build");
        target.join(triple).join("release/sandboxd")
    });
    built.clone()
}

/// The sandbox's PID 1 on the node.
pub(super) fn process_of(world: &World, spec: &LaunchSpec) -> i32 {
    let folder = world
        .config
        .run_dir
        .join("sandboxes")
        .join(spec.sandbox_id.as_str());
    fs::read_to_string(folder.join("pid"))
        .unwrap()
        .trim()
        .parse()
        .unwrap()
}

/// A real one, of an installation that is gone.
pub(super) fn authority() -> Authority {
    let folder = tempfile::tempdir().unwrap();
    let key = InstallationKey::open(&folder.path().join("installation.key")).unwrap();
    let id = SandboxId::random();
    Authority::derive(&key, &id, FIRST_GENERATION, Timestamp::now()).unwrap()
}
