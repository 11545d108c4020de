//! The local backend with a real runtime, real images, real limits. Needs root, runc and the default image
//! (`make setup`). No namespace made here has an uplink; no netd runs, so nothing filters the veths.

mod world {
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
        backend::{Isolation, LaunchMetrics, LaunchSpec, LocalBackend, LocalConfig},
    };
    use nix::{
        mount::{MntFlags, MsFlags, mount, umount2},
        sched::{CloneFlags, setns, unshare},
    };
    use sandgate_api::{
        agent::{AGENT_PORT, Command as AgentCommand, Exec},
        feed::Endpoint,
        id::SandboxId,
    };
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
        pub(super) folder: TempDir,
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
            let folder = tempfile::tempdir().unwrap();
            fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
            let run_dir = folder.path().join("run");
            make_router(&run_dir.join("netns/router")).unwrap();
            let config = LocalConfig {
                run_dir,
                data_dir: folder.path().join("data"),
                image_dir: std::env::var_os("SANDGATE_IMAGE_DIR")
                    .map_or_else(|| IMAGES.into(), PathBuf::from),
                image: "default".to_owned(),
                sandbox_cidr: "203.0.113.0/24".parse().unwrap(),
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
            // Also when a test failed: no mount may keep the scratch directory.
            let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
            let scratch = self.folder.path().to_string_lossy().into_owned();
            let mine: Vec<&str> = mounts
                .lines()
                .filter_map(|line| line.split(' ').nth(4))
                .filter(|path| path.starts_with(&scratch))
                .collect();
            for path in mine.into_iter().rev() {
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
}

use std::time::Duration;

use controller::{
    agent::AgentError,
    backend::{BackendError, LaunchSpec, LocalBackend, LocalConfig},
};
use sandgate_api::{
    agent::{AgentErrorCode, Command as AgentCommand, Exec},
    id::SandboxId,
};
use world::{MIB, World, can_run};

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_runs_commands_and_leaves_nothing() {
    if !can_run() {
        return;
    }
    let world = World::open().await;
    let spec = world.spec();
    let (_, metrics) = world.start(&spec).await;
    eprintln!("{metrics:?}");
    let outcome = world
        .sh(
            &spec,
            "echo $GREETING $HOME; id -u; python3 -c 'print(6*7)'; node -e 'console.log(7*6)'",
        )
        .await;
    assert_eq!(
        outcome.stdout, "hello /workspace\n1001\n42\n42\n",
        "{}",
        outcome.stderr
    );
    world.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_runs_inside_can_do_nothing_it_should_not() {
    if !can_run() {
        return;
    }
    let world = World::open().await;
    let spec = world.spec();
    world.start(&spec).await;
    // Each line prints what it found; the right column is what it must find.
    let facts = [
        ("grep CapEff /proc/self/status | cut -f2", "0000000000000000"),
        ("grep CapBnd /proc/self/status | cut -f2", "0000000000000000"),
        ("grep NoNewPrivs /proc/self/status | cut -f2", "1"),
        ("grep ^Seccomp: /proc/self/status | cut -f2", "2"),
        ("grep SigIgn /proc/self/status | cut -f2", "0000000000000000"),
        ("grep SigBlk /proc/self/status | cut -f2", "0000000000000000"),
        (
            "touch /x 2>&1 | grep -o 'Read-only file system'",
            "Read-only file system",
        ),
        (
            "touch /etc/hosts 2>&1 | grep -o 'Read-only file system\\|Permission denied'",
            "Permission denied",
        ),
        (
            "unshare -U true 2>&1 | grep -o 'Operation not permitted'",
            "Operation not permitted",
        ),
        (
            "unshare -n true 2>&1 | grep -o 'Operation not permitted'",
            "Operation not permitted",
        ),
        (
            "mount -t tmpfs x /tmp 2>&1 | grep -o 'permission denied\\|must be superuser\\|not permitted'",
            "must be superuser",
        ),
        (
            "sh -c 'echo 1 > /proc/sys/kernel/hostname' 2>&1 | grep -o 'Read-only file system\\|Permission denied'",
            "Read-only file system",
        ),
        ("head -c1 /proc/kcore | wc -c", "0"),
        ("cat /proc/interrupts | wc -c", "0"),
        ("stat -c %u:%g /workspace", "1001:1001"),
        ("stat -c %a /tmp", "1777"),
        ("id -u; id -g; id -G | tr -d '\\n'", "1001\n1001\n1001"),
        ("cat /proc/self/uid_map | tr -s ' ' | cut -d' ' -f2,4", "0 65536"),
        ("ls /proc | grep -c '^[0-9]'", "4"),
        ("ls -A /sys", ""),
        ("cat /proc/1/comm", "sandboxd"),
        ("readlink /proc/self/fd/0", "/dev/null"),
        ("hostname", spec.sandbox_id.as_str()),
        (
            "ls /dev | tr '\\n' ' '",
            "fd full null ptmx pts random shm stderr stdin stdout tty urandom zero ",
        ),
        ("ulimit -c", "0"),
        ("grep ^Groups /proc/self/status | tr -d '\\t '", "Groups:"),
        ("su -c id root < /dev/null > /dev/null 2>&1; echo $?", "1"),
        (
            "python3 -c 'import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW)' 2>&1 | tail -1",
            "PermissionError: [Errno 1] Operation not permitted",
        ),
        (
            "python3 -c 'import socket; socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)' 2>&1 | tail -1",
            "PermissionError: [Errno 1] Operation not permitted",
        ),
        (
            "python3 -c 'import socket; socket.socket(socket.AF_VSOCK)' 2>&1 | tail -1",
            "PermissionError: [Errno 1] Operation not permitted",
        ),
        // keyctl(KEYCTL_GET_KEYRING_ID), bpf, perf_event_open, userfaultfd, and clone3 on x86-64.
        (
            "python3 -c 'import ctypes; c = ctypes.CDLL(None, use_errno=True)\nfor n in (250, 321, 298, 323, 435): print(c.syscall(n, 0, 0, 0, 0, 0), ctypes.get_errno())'",
            "-1 1\n-1 1\n-1 1\n-1 1\n-1 38",
        ),
        // clone(CLONE_NEWUSER | SIGCHLD)
        (
            "python3 -c 'import ctypes; c = ctypes.CDLL(None, use_errno=True); print(c.syscall(56, 0x10000011, 0, 0, 0, 0), ctypes.get_errno())'",
            "-1 1",
        ),
        (
            "ip -o link 2>/dev/null | wc -l; cat /proc/net/dev | grep -c eth0",
            "0\n1",
        ),
        (
            "cat /proc/sys/net/ipv6/conf/all/disable_ipv6 2>/dev/null || echo 1",
            "1",
        ),
    ];
    let mut wrong = Vec::new();
    for (line, expected) in facts {
        let outcome = world.sh(&spec, line).await;
        if outcome.stdout.trim_end() != expected.trim_end() {
            wrong.push(format!("{line}\n  gives {outcome:?}\n  instead of {expected:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    world.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_key_is_nowhere_to_be_found() {
    if !can_run() {
        return;
    }
    let world = World::open().await;
    let spec = world.spec();
    let (_, _) = world.start(&spec).await;
    let unreadable = "for f in environ mem maps auxv fd/0; do \
        head -c 1 /proc/1/$f > /dev/null 2>&1 && echo readable $f; done; \
        ls /proc/1/cwd/ /proc/1/map_files > /dev/null 2>&1 && echo readable folders; \
        ls /proc/1/fd > /dev/null 2>&1 && echo readable fd; \
        tr '\\0' ' ' < /proc/1/cmdline; env | grep -i key; \
        python3 -c 'import ctypes; c = ctypes.CDLL(None, use_errno=True); print(c.ptrace(16, 1, 0, 0), ctypes.get_errno())'";
    let outcome = world.sh(&spec, unreadable).await;
    assert_eq!(
        outcome.stdout, "/usr/lib/sandgate/sandboxd -1 1\n",
        "{}",
        outcome.stderr
    );
    // And from the node, which may read everything: the agent keeps a digest only.
    let process = fs_pid(&world, &spec);
    let key = spec.agent_key.as_bytes();
    assert!(!memory_holds(process, key), "the key is in the agent's memory");
    assert!(
        memory_holds(process, b"sandboxd"),
        "the search finds nothing at all"
    );
    let on_disk = std::process::Command::new("grep")
        .args(["-r", "-l", &spec.agent_key])
        .arg(&world.config.run_dir)
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&on_disk.stdout), "");
    // Wrong keys are turned away.
    let stranger = LaunchSpec {
        agent_key: "0".repeat(64),
        ..spec.clone()
    };
    let refused = world.agent(&stranger).await.ping().await;
    assert!(
        matches!(
            &refused,
            Err(AgentError::Refused {
                code: AgentErrorCode::Unauthorized,
                ..
            })
        ),
        "{refused:?}"
    );
    world.agent(&spec).await.ping().await.unwrap();
    world.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_bite_and_only_the_one_that_reaches_them() {
    if !can_run() {
        return;
    }
    let world = World::open().await;
    let greedy = LaunchSpec {
        cpu_millis: 200,
        memory_bytes: 96 * MIB,
        pids: 32,
        ..world.spec()
    };
    let modest = world.spec();
    world.start(&greedy).await;
    world.start(&modest).await;

    // CPU: two busy processes for three seconds together get a fifth of one CPU.
    let busy = "import os, time\nend = time.time() + 3\nos.fork()\nwhile time.time() < end: pass\n\
        print(os.times().user + os.times().system, flush=True)";
    let spent: f64 = world
        .sh(&greedy, &format!("python3 -c '{busy}'"))
        .await
        .stdout
        .lines()
        .map(|line| line.parse::<f64>().unwrap())
        .sum();
    assert!(
        (0.3..1.0).contains(&spent),
        "{spent} s of CPU in 3 s at 200 thousandths"
    );

    // Processes: a bomb is stopped, the agent still answers, and the neighbour does not notice.
    let bomb = world
        .sh(&greedy, "for i in $(seq 200); do sleep 30 & done; wait")
        .await;
    assert!(
        bomb.stderr.contains("annot fork") || bomb.stderr.contains("temporarily unavailable"),
        "{bomb:?}"
    );
    world.agent(&greedy).await.ping().await.unwrap();
    assert_eq!(
        world
            .sh(
                &modest,
                "for i in $(seq 20); do sleep 0.1 & done; wait; echo done"
            )
            .await
            .stdout,
        "done\n"
    );
    world.backend.destroy(&greedy.sandbox_id).await.unwrap();
    world.start(&greedy).await;
    let forks = "import os, time\nwhile True:\n try: child = os.fork()\n except OSError: break\n \
        if child == 0:\n  time.sleep(60)\n  os._exit(0)\ntime.sleep(3)\nos.killpg(0, 9)";
    let filled = format!("exec python3 -c '{forks}'");
    let (bomb, full) = tokio::join!(world.sh(&greedy, &filled), async {
        tokio::time::sleep(Duration::from_secs(2)).await;
        world.try_exec(&greedy, shell("true")).await
    });
    assert!(
        matches!(
            full,
            Err(AgentError::Refused {
                code: AgentErrorCode::Internal,
                ..
            })
        ),
        "{full:?}"
    );
    assert_eq!(bomb.code, 137, "{bomb:?}");
    assert_eq!(world.sh(&greedy, "echo free").await.stdout, "free\n");

    // Memory: the hog dies, the agent and the neighbour live.
    let hog = world
        .sh(
            &greedy,
            "exec python3 -c 'x = bytearray(400 * 1024 * 1024); print(len(x))'",
        )
        .await;
    assert_eq!((hog.code, hog.stdout.as_str()), (137, ""), "{hog:?}");
    let shared = world
        .sh(&greedy, "head -c 90M /dev/zero > /dev/shm/x; echo $?")
        .await;
    assert_eq!(shared.stdout, "1\n", "{shared:?}");
    assert_eq!(
        world.sh(&greedy, "rm /dev/shm/x; echo alive").await.stdout,
        "alive\n"
    );
    assert_eq!(world.sh(&modest, "echo alive").await.stdout, "alive\n");
    world.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn full_disks_stay_inside_and_the_database_goes_on() {
    if !can_run() {
        return;
    }
    let world = World::open().await;
    let specs: Vec<LaunchSpec> = (0..3).map(|_| world.spec()).collect();
    for spec in &specs {
        world.start(spec).await;
    }
    // What a database does beside them: small synchronous writes on the same file system.
    let journal = world.config.data_dir.join("journal");
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let writer = std::thread::spawn({
        let stop = std::sync::Arc::clone(&stop);
        move || {
            let mut file = std::fs::File::create(journal)?;
            let mut rows = 0_u32;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                std::io::Write::write_all(&mut file, &[7; 4096])?;
                file.sync_data()?;
                rows += 1;
            }
            std::io::Result::Ok(rows)
        }
    });
    let fill = "cat /dev/zero > /workspace/full 2>/tmp/error; \
        for i in $(seq 100000); do touch /workspace/inode$i || break; done 2>/dev/null; \
        echo x > /tmp/more 2>&1; grep -o 'No space left on device' /tmp/error || stat -f -c %a /workspace";
    let (first, second) = tokio::join!(world.sh(&specs[0], fill), world.sh(&specs[1], fill));
    for outcome in [first, second] {
        assert!(
            outcome.stdout.contains("No space left on device") || outcome.stdout.trim() == "0",
            "{outcome:?}"
        );
    }
    let written = world
        .agent(&specs[0])
        .await
        .write_file("/workspace/late", None, vec![0; 65_536].into())
        .await;
    assert!(
        matches!(
            written,
            Err(AgentError::Refused {
                code: AgentErrorCode::NoSpace,
                ..
            })
        ),
        "{written:?}"
    );
    let neighbour = world
        .sh(
            &specs[2],
            "head -c 30M /dev/zero > /workspace/mine && sync && wc -c < /workspace/mine",
        )
        .await;
    assert_eq!(neighbour.stdout, "31457280\n", "{neighbour:?}");
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let rows = writer.join().unwrap().expect("the database's writes go on");
    assert!(rows > 10, "{rows} rows");
    // No layer is larger on the node than what was promised.
    for spec in &specs {
        let disk = world
            .config
            .data_dir
            .join(format!("sandboxes/{}/disk.ext4", spec.sandbox_id));
        let blocks = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(disk).unwrap()) * 512;
        assert!(blocks <= spec.disk_bytes + MIB, "{blocks}");
    }
    world.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn promises_that_would_not_fit_are_refused_and_leave_nothing() {
    if !can_run() {
        return;
    }
    let world = World::open().await;
    let file_system = nix::sys::statvfs::statvfs(&world.config.data_dir).unwrap();
    let free = file_system.blocks_available() * file_system.fragment_size();
    let most = LaunchSpec {
        disk_bytes: free - 2048 * MIB,
        ..world.spec()
    };
    // Nothing is written, so the file system itself would take both.
    world.backend.prepare(&most).await.unwrap();
    let second = world
        .backend
        .prepare(&LaunchSpec {
            disk_bytes: 4096 * MIB,
            ..world.spec()
        })
        .await;
    assert!(matches!(second, Err(BackendError::NoCapacity(_))), "{second:?}");
    assert_eq!(world.backend.inventory().await.unwrap().len(), 1);
    world.backend.destroy(&most.sandbox_id).await.unwrap();
    let third = world.spec();
    world.backend.prepare(&third).await.unwrap();
    let again = world.backend.prepare(&third).await;
    assert!(matches!(again, Err(BackendError::Exists(_))), "{again:?}");
    assert!(
        world.backend.endpoint(&third.sandbox_id).is_some(),
        "the refused one took the first one away"
    );
    world.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn half_made_sandboxes_are_found_and_taken_away() {
    if !can_run() {
        return;
    }
    let world = World::open().await;
    // Prepared, never launched.
    let prepared = world.spec();
    world.backend.prepare(&prepared).await.unwrap();
    // A launch that fails half-way: the runtime cannot use this name twice.
    let broken = world.spec();
    world.backend.prepare(&broken).await.unwrap();
    std::fs::create_dir_all(world.config.run_dir.join("runc").join(broken.sandbox_id.as_str())).unwrap();
    let launched = world.backend.launch(&broken).await;
    assert!(
        matches!(
            launched,
            Err(BackendError::Failed {
                step: "making the container",
                ..
            })
        ),
        "{launched:?}"
    );
    // No router: the failure takes away what was made before it.
    let router = world.config.run_dir.join("netns/router");
    let aside = world.config.run_dir.join("aside");
    std::fs::create_dir(&aside).unwrap();
    let lost = LocalBackend::open(LocalConfig {
        run_dir: aside,
        ..world.config.clone()
    })
    .await
    .unwrap();
    let refused = lost.prepare(&world.spec()).await;
    let Err(BackendError::Failed { message, .. }) = &refused else {
        panic!("{refused:?}")
    };
    assert!(message.contains("is netd running"), "{message}");
    assert!(lost.inventory().await.unwrap().iter().all(|found| !found.running));
    assert!(router.exists());
    // Traces of a sandbox nobody has a record of.
    let stray = SandboxId::random();
    std::fs::create_dir_all(world.config.data_dir.join("sandboxes").join(stray.as_str())).unwrap();

    let mut expected = vec![prepared.sandbox_id, broken.sandbox_id, stray];
    expected.sort();
    let found: Vec<SandboxId> = world
        .backend
        .inventory()
        .await
        .unwrap()
        .into_iter()
        .map(|found| found.sandbox_id)
        .collect();
    assert_eq!(found, expected);
    for id in &expected {
        world.backend.destroy(id).await.unwrap();
        world.backend.destroy(id).await.unwrap();
    }
    assert_eq!(world.traces(), Vec::<String>::new());
    world.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_later_process_adopts_what_runs_and_finds_what_died() {
    if !can_run() {
        return;
    }
    let world = World::open().await;
    let (kept, dead) = (world.spec(), world.spec());
    let (endpoint, _) = world.start(&kept).await;
    world.start(&dead).await;
    // The second one's PID 1 is killed while nobody looks.
    let pid = fs_pid(&world, &dead);
    let exit = world.backend.wait_exit(&dead.sandbox_id);
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    tokio::time::timeout(Duration::from_secs(5), exit)
        .await
        .expect("the end of PID 1 is noticed");

    let later = LocalBackend::open(world.config.clone()).await.unwrap();
    assert_eq!(later.endpoint(&kept.sandbox_id), Some(endpoint));
    for found in later.inventory().await.unwrap() {
        assert_eq!(found.running, found.sandbox_id == kept.sandbox_id, "{found:?}");
    }
    // The adopted one is watched, and its address is not given to anyone else.
    let waiting = later.wait_exit(&kept.sandbox_id);
    assert!(
        tokio::time::timeout(Duration::from_millis(200), waiting)
            .await
            .is_err()
    );
    let new = world.spec();
    assert_ne!(
        later.prepare(&new).await.unwrap().address,
        later.endpoint(&kept.sandbox_id).unwrap().address
    );
    assert_eq!(world.sh(&kept, "echo still here").await.stdout, "still here\n");
    let exit = later.wait_exit(&kept.sandbox_id);
    later.destroy(&kept.sandbox_id).await.unwrap();
    tokio::time::timeout(Duration::from_secs(5), exit)
        .await
        .expect("the end of PID 1 is noticed");
    for id in [&dead.sandbox_id, &new.sandbox_id] {
        later.destroy(id).await.unwrap();
    }
    assert_eq!(world.traces(), Vec::<String>::new());
    world.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_at_once() {
    if !can_run() {
        return;
    }
    let world = std::sync::Arc::new(World::open().await);
    let mut launches = tokio::task::JoinSet::new();
    for _ in 0..20 {
        let world = std::sync::Arc::clone(&world);
        launches.spawn(async move {
            let spec = world.spec();
            let begun = std::time::Instant::now();
            world.start(&spec).await;
            let took = begun.elapsed();
            let outcome = world
                .sh(&spec, "hostname; touch /workspace/here; ls /workspace")
                .await;
            assert_eq!(outcome.stdout, format!("{}\nhere\n", spec.sandbox_id));
            (spec, took)
        });
    }
    let mut all = launches.join_all().await;
    all.sort_by_key(|(_, took)| *took);
    eprintln!("20 at once: p50 {:?}, slowest {:?}", all[10].1, all[19].1);
    let ids: Vec<String> = ids_on_the_node(&world, all.iter().map(|(spec, _)| spec));
    let mut distinct = ids.clone();
    distinct.sort();
    distinct.dedup();
    assert_eq!(distinct.len(), 20, "{ids:?}");
    let mut ends = tokio::task::JoinSet::new();
    for (spec, _) in all {
        let world = std::sync::Arc::clone(&world);
        ends.spawn(async move { world.backend.destroy(&spec.sandbox_id).await.unwrap() });
    }
    ends.join_all().await;
    std::sync::Arc::into_inner(world).unwrap().close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_after_another() {
    if !can_run() {
        return;
    }
    let world = World::open().await;
    let mut times = Vec::new();
    for _ in 0..20 {
        let spec = world.spec();
        let begun = std::time::Instant::now();
        let (_, metrics) = world.start(&spec).await;
        times.push((begun.elapsed(), metrics));
        world.backend.destroy(&spec.sandbox_id).await.unwrap();
    }
    times.sort_by_key(|(total, _)| *total);
    eprintln!("create p50 {:?}, p95 {:?}", times[10], times[18].0);
    assert!(times[10].0 < Duration::from_secs(2), "{times:?}");
    world.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_cannot_is_told_so() {
    if !can_run() {
        return;
    }
    let world = World::open().await;
    let cases = [
        (
            LocalConfig {
                image: "absent".into(),
                ..world.config.clone()
            },
            "make setup",
        ),
        (
            LocalConfig {
                runtime: "/bin/false".into(),
                ..world.config.clone()
            },
            "cannot run sandboxes",
        ),
        (
            LocalConfig {
                sandboxd: "/absent".into(),
                ..world.config.clone()
            },
            "make build",
        ),
        (
            LocalConfig {
                sandbox_cidr: "203.0.113.0/30".parse().unwrap(),
                ..world.config.clone()
            },
            "between /16 and /28",
        ),
        (
            LocalConfig {
                run_dir: "relative".into(),
                ..world.config.clone()
            },
            "not an absolute path",
        ),
    ];
    for (config, expected) in cases {
        let refused = LocalBackend::open(config).await.unwrap_err().to_string();
        assert!(refused.contains(expected), "{refused}");
    }
    // An overlap with a route of this namespace: loopback's own is on every machine.
    let overlapping = LocalConfig {
        sandbox_cidr: "127.0.0.0/16".parse().unwrap(),
        ..world.config.clone()
    };
    let refused = LocalBackend::open(overlapping).await.unwrap_err().to_string();
    assert!(refused.contains("overlap the host's route"), "{refused}");
    for (field, spec) in [
        (
            "memory_bytes",
            LaunchSpec {
                memory_bytes: 1,
                ..world.spec()
            },
        ),
        (
            "cpu_millis",
            LaunchSpec {
                cpu_millis: 0,
                ..world.spec()
            },
        ),
        (
            "pids",
            LaunchSpec {
                pids: u64::MAX,
                ..world.spec()
            },
        ),
        (
            "disk_bytes",
            LaunchSpec {
                disk_bytes: 4096,
                ..world.spec()
            },
        ),
        (
            "agent_key",
            LaunchSpec {
                agent_key: "secret".into(),
                ..world.spec()
            },
        ),
        (
            "env",
            LaunchSpec {
                env: [("A=B".to_owned(), String::new())].into(),
                ..world.spec()
            },
        ),
    ] {
        let refused = world.backend.prepare(&spec).await;
        assert!(
            matches!(&refused, Err(BackendError::Invalid { field: named, .. }) if *named == field),
            "{refused:?}"
        );
    }
    world.close().await;
}

fn shell(line: &str) -> Exec {
    Exec {
        command: AgentCommand::Shell(line.to_owned()),
        env: Default::default(),
        working_dir: None,
        timeout_ms: Some(10_000),
    }
}

/// The sandbox's PID 1 on the node.
fn fs_pid(world: &World, spec: &LaunchSpec) -> i32 {
    let folder = world
        .config
        .run_dir
        .join("sandboxes")
        .join(spec.sandbox_id.as_str());
    std::fs::read_to_string(folder.join("pid"))
        .unwrap()
        .trim()
        .parse()
        .unwrap()
}

/// First user id on the node of each sandbox.
fn ids_on_the_node<'a>(world: &World, specs: impl Iterator<Item = &'a LaunchSpec>) -> Vec<String> {
    let map = |spec| std::fs::read_to_string(format!("/proc/{}/uid_map", fs_pid(world, spec))).unwrap();
    specs
        .map(|spec| map(spec).split_whitespace().nth(1).unwrap().to_owned())
        .collect()
}

/// Whether a process's writable memory holds some bytes.
fn memory_holds(process: i32, wanted: &[u8]) -> bool {
    use std::io::{Read as _, Seek as _};
    let maps = std::fs::read_to_string(format!("/proc/{process}/maps")).unwrap();
    let mut memory = std::fs::File::open(format!("/proc/{process}/mem")).unwrap();
    maps.lines().filter(|line| !line.contains("[v")).any(|line| {
        let (range, _) = line.split_once(' ').unwrap();
        let (first, last) = range.split_once('-').unwrap();
        let (first, last) = (
            u64::from_str_radix(first, 16).unwrap(),
            u64::from_str_radix(last, 16).unwrap(),
        );
        let mut bytes = Vec::new();
        memory.seek(std::io::SeekFrom::Start(first)).unwrap();
        let _partly = (&mut memory).take(last - first).read_to_end(&mut bytes);
        bytes.windows(wanted.len()).any(|window| window == wanted)
    })
}
