//! The real binary on loopback, with real processes, files and a client written from the protocol's description.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, its helpers too")]

use std::{
    fs,
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    os::unix::fs::{PermissionsExt as _, symlink},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use sandgate_api::agent::{
    AgentErrorCode, Claim, Command as Line, Entry, EntryKind, Exec, FrameHeader, FrameKind, HEADER_LENGTH,
    Hello, PROTOCOL_VERSION, Reply, Request,
};
use tempfile::TempDir;

const KEY: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

/// A running agent and a directory for its files. Killed and removed on drop.
struct Agent {
    process: Child,
    address: SocketAddr,
    folder: TempDir,
}

impl Agent {
    fn start() -> Self {
        // Free a moment ago; nobody else on this machine is given it so soon.
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let mut process = Command::new(env!("CARGO_BIN_EXE_sandboxd"))
            .args(["--listen", &address.to_string()])
            .env("FROM_THE_CONTAINER", "yes")
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let mut key = process.stdin.take().unwrap();
        key.write_all(KEY.as_bytes()).unwrap();
        let agent = Self {
            process,
            address,
            folder: tempfile::tempdir().unwrap(),
        };
        wait(|| TcpStream::connect(address).is_ok());
        agent
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    fn ask(&self, request: &Request) -> Connection {
        let mut connection = Connection::open(self.address);
        connection.hello(KEY, PROTOCOL_VERSION);
        connection.json(request);
        connection
    }

    fn exec(&self, exec: Exec) -> Connection {
        let working_dir = exec.working_dir.clone().or_else(|| Some(self.path("")));
        self.ask(&Request::Exec(Exec { working_dir, ..exec }))
    }

    fn claim(&self, env: &[(&str, &str)]) -> Reply {
        let env = env
            .iter()
            .map(|&(name, value)| (name.to_owned(), value.to_owned()));
        self.ask(&Request::Claim(Claim { env: env.collect() })).reply()
    }

    fn sh(&self, line: &str) -> Outcome {
        self.exec(shell(line)).outcome()
    }

    fn write(&self, path: &str, mode: Option<u32>, bytes: &[u8]) -> Reply {
        let size = bytes.len() as u64;
        let mut connection = self.ask(&Request::WriteFile {
            path: path.to_owned(),
            size,
            mode,
        });
        for part in bytes.chunks(100_000) {
            connection.send(FrameKind::Data, part);
        }
        connection.reply()
    }

    fn read(&self, path: &str, max_size: u64) -> Result<Vec<u8>, AgentErrorCode> {
        let mut connection = self.ask(&Request::ReadFile {
            path: path.to_owned(),
            max_size,
        });
        let size = match connection.reply() {
            Reply::File { size } => size,
            Reply::Error { code, .. } => return Err(code),
            other => panic!("{other:?}"),
        };
        let mut bytes = Vec::new();
        while (bytes.len() as u64) < size {
            let (kind, part) = connection.frame().unwrap();
            assert_eq!(kind, FrameKind::Data);
            bytes.extend(part);
        }
        assert!(connection.frame().is_err(), "more than announced");
        Ok(bytes)
    }

    fn list(&self, path: &str, recursive: bool, limit: u32) -> Result<(Vec<Entry>, bool), AgentErrorCode> {
        let mut connection = self.ask(&Request::List {
            path: path.to_owned(),
            recursive,
            limit,
        });
        let mut all = Vec::new();
        loop {
            match connection.reply() {
                Reply::Entries {
                    entries,
                    last,
                    truncated,
                } => {
                    all.extend(entries);
                    if last {
                        all.sort_by(|one, other| one.path.cmp(&other.path));
                        return Ok((all, truncated));
                    }
                }
                Reply::Error { code, .. } => return Err(code),
                other => panic!("{other:?}"),
            }
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // Asked to end, it takes its commands along; killed, it leaves them to this machine.
        let id = i32::try_from(self.process.id()).unwrap();
        let _gone = nix::sys::signal::kill(nix::unistd::Pid::from_raw(id), nix::sys::signal::Signal::SIGTERM);
        let _status = self.process.wait();
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Outcome {
    code: i32,
    timed_out: bool,
    stdout: String,
    stderr: String,
}

struct Connection(TcpStream);

impl Connection {
    fn open(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.set_nodelay(true).unwrap();
        Self(stream)
    }

    fn send(&mut self, kind: FrameKind, payload: &[u8]) {
        let header = FrameHeader {
            kind,
            length: payload.len(),
        }
        .encode();
        // A refusing agent may have closed; its answer is what counts.
        let _closed = self.0.write_all(&header).and_then(|()| self.0.write_all(payload));
    }

    fn json(&mut self, value: &impl serde::Serialize) {
        self.send(FrameKind::Json, &serde_json::to_vec(value).unwrap());
    }

    fn hello(&mut self, key: &str, protocol: u32) {
        self.json(&Hello {
            protocol,
            key: key.to_owned(),
        });
    }

    fn frame(&mut self) -> io::Result<(FrameKind, Vec<u8>)> {
        let mut header = [0; HEADER_LENGTH];
        self.0.read_exact(&mut header)?;
        let header = FrameHeader::decode(header).map_err(io::Error::other)?;
        let mut payload = vec![0; header.length];
        self.0.read_exact(&mut payload)?;
        Ok((header.kind, payload))
    }

    fn reply(&mut self) -> Reply {
        let (kind, payload) = self.frame().unwrap();
        assert_eq!(kind, FrameKind::Json);
        serde_json::from_slice(&payload).unwrap()
    }

    fn outcome(mut self) -> Outcome {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        loop {
            let (kind, payload) = self.frame().unwrap();
            match kind {
                FrameKind::Stdout => stdout.extend(payload),
                FrameKind::Stderr => stderr.extend(payload),
                FrameKind::Data => panic!("file bytes from a command"),
                FrameKind::Json => match serde_json::from_slice(&payload).unwrap() {
                    Reply::Exited {
                        exit_code, timed_out, ..
                    } => {
                        return Outcome {
                            code: exit_code,
                            timed_out,
                            stdout: String::from_utf8_lossy(&stdout).into_owned(),
                            stderr: String::from_utf8_lossy(&stderr).into_owned(),
                        };
                    }
                    other => panic!("{other:?}"),
                },
            }
        }
    }

    fn refusal(mut self) -> AgentErrorCode {
        match self.reply() {
            Reply::Error { code, .. } => code,
            other => panic!("{other:?}"),
        }
    }
}

fn shell(line: &str) -> Exec {
    Exec {
        command: Line::Shell(line.to_owned()),
        env: Default::default(),
        working_dir: None,
        timeout_ms: Some(15_000),
    }
}

fn argv(arguments: &[&str]) -> Exec {
    let arguments = arguments.iter().map(|&argument| argument.to_owned()).collect();
    Exec {
        command: Line::Argv(arguments),
        ..shell("")
    }
}

fn wait(mut until: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !until() {
        assert!(Instant::now() < deadline, "it did not happen in time");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn alive(process: &str) -> bool {
    fs::read_to_string(format!("/proc/{}/stat", process.trim())).is_ok_and(|stat| !stat.contains(") Z "))
}

#[test]
fn commands_end_as_a_shell_would_report_it() {
    let agent = Agent::start();
    let code = |line: &str| agent.sh(line).code;
    assert_eq!(code("true"), 0);
    assert_eq!(code("exit 7"), 7);
    assert_eq!(code("kill -KILL $$"), 128 + 9);
    assert_eq!(code("kill -TERM $$"), 128 + 15);
    assert_eq!(code("kill -34 $$"), 128 + 34);
    assert_eq!(code("no-such-program"), 127);
    assert_eq!(agent.exec(argv(&["no-such-program"])).outcome().code, 127);
    assert_eq!(agent.exec(argv(&["/etc/passwd"])).outcome().code, 126);
    assert_eq!(agent.exec(argv(&["/"])).outcome().code, 126);
    let echo = agent.exec(argv(&["echo", "a  b", "$HOME"])).outcome();
    assert_eq!(echo.stdout, "a  b $HOME\n");
}

#[test]
fn a_command_finds_itself_in_a_clean_place() {
    let agent = Agent::start();
    let environment = [("ADDED".to_owned(), "x=1\n".to_owned())].into();
    let exec = Exec {
        env: environment,
        ..shell("echo \"$FROM_THE_CONTAINER:$ADDED:\"; pwd; cat; umask")
    };
    let folder = fs::canonicalize(agent.folder.path()).unwrap();
    let expected = format!("yes:x=1\n:\n{}\n0022\n", folder.display());
    assert_eq!(agent.exec(exec).outcome().stdout, expected);
    let signals = agent
        .sh("grep -E 'SigBlk|SigIgn' /proc/self/status | cut -f2 | sort -u; ps -o sid=,pgid=,pid= -p $$");
    let lines: Vec<&str> = signals.stdout.lines().collect();
    assert_eq!(lines[0], "0000000000000000", "{signals:?}");
    let ids: Vec<&str> = lines[1].split_whitespace().collect();
    assert_eq!(
        (ids[0], ids[1]),
        (ids[2], ids[2]),
        "not the leader of its own session and group"
    );
    // The fourth is the listing's own.
    let open = agent.sh("ls /proc/self/fd | tr '\\n' ' '").stdout;
    assert_eq!(open, "0 1 2 3 ");
    let there = |directory: &str| {
        agent.exec(Exec {
            working_dir: Some(directory.to_owned()),
            ..shell("true")
        })
    };
    assert_eq!(there("/no/such").refusal(), AgentErrorCode::NotFound);
    assert_eq!(there("/etc/passwd").refusal(), AgentErrorCode::NotDirectory);
    assert_eq!(there("/tmp/../etc").refusal(), AgentErrorCode::Invalid);
    assert_eq!(there("relative").refusal(), AgentErrorCode::Invalid);
    let bad = Exec {
        env: [("A=B".to_owned(), String::new())].into(),
        ..shell("true")
    };
    assert_eq!(agent.exec(bad).refusal(), AgentErrorCode::Invalid);
    assert_eq!(agent.exec(argv(&[])).refusal(), AgentErrorCode::Invalid);
}

#[test]
fn output_comes_as_it_is_written_and_the_two_streams_apart() {
    let agent = Agent::start();
    let mut connection = agent.exec(shell("echo one; sleep 5; echo two"));
    let begun = Instant::now();
    assert_eq!(
        connection.frame().unwrap(),
        (FrameKind::Stdout, b"one\n".to_vec())
    );
    assert!(begun.elapsed() < Duration::from_secs(4));
    let both = agent.sh("echo out; echo err >&2");
    assert_eq!((both.stdout.as_str(), both.stderr.as_str()), ("out\n", "err\n"));
    let large =
        agent.sh("head -c 5000000 /dev/zero | tr '\\0' x; head -c 3000000 /dev/zero | tr '\\0' y >&2");
    assert_eq!((large.stdout.len(), large.stderr.len()), (5_000_000, 3_000_000));
}

#[test]
fn last_words_are_heard_when_many_commands_end_at_once() {
    let agent = Agent::start();
    std::thread::scope(|threads| {
        for caller in 0..8 {
            let agent = &agent;
            threads.spawn(move || {
                for turn in 0..150 {
                    let words = format!("{caller} {turn}");
                    let outcome = agent.exec(argv(&["/bin/echo", "-n", &words])).outcome();
                    assert_eq!((outcome.code, outcome.stdout), (0, words));
                }
            });
        }
    });
}

#[test]
fn a_caller_that_does_not_read_slows_the_command_down() {
    let agent = Agent::start();
    let counter = agent.path("count");
    let line = format!("while :; do head -c 65536 /dev/zero; echo x >> {counter}; done");
    let connection = agent.exec(shell(&line));
    let parts = || fs::metadata(&counter).map_or(0, |file| file.len() / 2);
    wait(|| {
        let before = parts();
        std::thread::sleep(Duration::from_millis(300));
        before > 0 && parts() == before
    });
    assert!(
        parts() * 65_536 < 64 * 1024 * 1024,
        "{} parts were taken from the command",
        parts()
    );
    // Others are served meanwhile.
    assert_eq!(agent.sh("echo free").stdout, "free\n");
    drop(connection);
}

#[test]
fn a_timeout_kills_the_whole_group_and_keeps_what_was_written() {
    let agent = Agent::start();
    let begun = Instant::now();
    let exec = Exec {
        timeout_ms: Some(500),
        ..shell("echo before; sleep 60 & echo $!; wait")
    };
    let outcome = agent.exec(exec).outcome();
    assert!(begun.elapsed() < Duration::from_secs(5));
    assert_eq!((outcome.code, outcome.timed_out), (124, true));
    let sleeper = outcome
        .stdout
        .strip_prefix("before\n")
        .expect("the output before the timeout");
    wait(|| !alive(sleeper));
}

#[test]
fn hanging_up_kills_the_whole_group() {
    let agent = Agent::start();
    for noisy in [false, true] {
        let work = if noisy { "yes" } else { "sleep 60" };
        let mut connection = agent.exec(shell(&format!("sleep 60 & echo $$ $!; {work}")));
        let (_, first) = connection.frame().unwrap();
        let text = String::from_utf8(first).unwrap();
        let processes: Vec<&str> = text.lines().next().unwrap().split(' ').collect();
        assert!(processes.iter().all(|process| alive(process)));
        drop(connection);
        wait(|| !processes.iter().any(|process| alive(process)));
    }
}

#[test]
fn what_stays_in_the_background_holds_nothing_up_and_may_go_on_writing() {
    let agent = Agent::start();
    let done = agent.path("done");
    let begun = Instant::now();
    let line = format!("(sleep 1; head -c 1000000 /dev/zero; echo $? > {done}) & echo started");
    let outcome = agent.sh(&line);
    assert_eq!((outcome.code, outcome.stdout.as_str()), (0, "started\n"));
    assert!(
        begun.elapsed() < Duration::from_millis(900),
        "{:?}",
        begun.elapsed()
    );
    wait(|| fs::read_to_string(&done).is_ok_and(|text| text == "0\n"));
}

#[test]
fn orphans_are_reaped() {
    let agent = Agent::start();
    let outcome = agent.sh("for i in 1 2 3 4 5; do (setsid sh -c 'sleep 0.2' &) ; done; echo ok");
    assert_eq!(outcome.stdout, "ok\n");
    let children = || {
        let output = Command::new("ps")
            .args(["--no-headers", "--ppid", &agent.process.id().to_string()])
            .output();
        String::from_utf8_lossy(&output.unwrap().stdout).lines().count()
    };
    wait(|| children() == 0);
}

#[test]
fn strangers_are_turned_away() {
    let agent = Agent::start();
    for (key, protocol) in [
        ("", PROTOCOL_VERSION),
        (&KEY[1..], PROTOCOL_VERSION),
        (KEY, PROTOCOL_VERSION + 1),
    ] {
        let mut connection = Connection::open(agent.address);
        connection.hello(key, protocol);
        connection.json(&Request::Ping);
        assert_eq!(connection.refusal(), AgentErrorCode::Unauthorized);
    }
    // A greeting without a key may not be long.
    let mut connection = Connection::open(agent.address);
    connection.send(FrameKind::Json, &[b' '; 10_000]);
    assert!(connection.frame().is_err());
    let mut connection = Connection::open(agent.address);
    connection.hello(KEY, PROTOCOL_VERSION);
    connection.json(&serde_json::json!({"op": "unheard_of"}));
    assert_eq!(connection.refusal(), AgentErrorCode::Invalid);
    let mut connection = Connection::open(agent.address);
    connection.0.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    assert!(connection.frame().is_err());
    assert_eq!(
        agent.ask(&Request::Ping).reply(),
        Reply::Pong {
            protocol: PROTOCOL_VERSION
        }
    );
}

#[test]
fn connections_are_counted() {
    let agent = Agent::start();
    let mut held: Vec<Connection> = (0..256).map(|_| Connection::open(agent.address)).collect();
    wait(|| {
        let mut extra = Connection::open(agent.address);
        matches!(extra.0.read(&mut [0]), Ok(0) | Err(_))
    });
    held.truncate(200);
    wait(|| {
        let mut connection = Connection::open(agent.address);
        connection.hello(KEY, PROTOCOL_VERSION);
        connection.json(&Request::Ping);
        connection.frame().is_ok()
    });
}

#[test]
fn the_key_is_in_no_place_that_others_can_read() {
    let agent = Agent::start();
    let process = format!("/proc/{}", agent.process.id());
    for file in ["environ", "cmdline"] {
        let text = fs::read(format!("{process}/{file}")).unwrap();
        assert!(
            !text.windows(KEY.len()).any(|window| window == KEY.as_bytes()),
            "{file}"
        );
    }
    assert_eq!(
        fs::read_link(format!("{process}/fd/0")).unwrap(),
        Path::new("/dev/null")
    );
    // A process that is not dumpable belongs to root, for /proc.
    let owner = std::os::unix::fs::MetadataExt::uid(&fs::metadata(format!("{process}/environ")).unwrap());
    assert_eq!(owner, 0);
    let status = fs::read_to_string(format!("{process}/status")).unwrap();
    assert!(status.contains("Threads:\t1\n"), "{status}");
    assert!(!agent.sh("env").stdout.contains(KEY));
}

#[test]
fn files_are_written_whole_or_not_at_all() {
    let agent = Agent::start();
    let path = agent.path("new/deep/file");
    let bytes: Vec<u8> = (0..1_000_000_u32).map(|number| (number % 251) as u8).collect();
    assert_eq!(
        agent.write(&path, None, &bytes),
        Reply::Written { size: 1_000_000 }
    );
    assert_eq!(fs::read(&path).unwrap(), bytes);
    let mode = |path: &str| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(&path), 0o644);
    assert_eq!(agent.write(&path, Some(0o4755), b"x"), Reply::Written { size: 1 });
    assert_eq!(mode(&path), 0o755, "set-user-id was granted");
    assert_eq!(agent.write(&path, None, b""), Reply::Written { size: 0 });
    assert_eq!(
        (mode(&path), fs::read(&path).unwrap().len()),
        (0o755, 0),
        "the old permissions stay"
    );
    // A caller that goes away in the middle leaves the old file and nothing beside it.
    fs::write(&path, "old").unwrap();
    let mut connection = agent.ask(&Request::WriteFile {
        path: path.clone(),
        size: 1000,
        mode: None,
    });
    connection.send(FrameKind::Data, &[1; 500]);
    drop(connection);
    let folder = agent.path("new/deep");
    wait(|| fs::read_dir(&folder).unwrap().count() == 1);
    assert_eq!(fs::read(&path).unwrap(), b"old");
    let mut connection = agent.ask(&Request::WriteFile {
        path: path.clone(),
        size: 3,
        mode: None,
    });
    connection.send(FrameKind::Data, b"four");
    assert_eq!(connection.refusal(), AgentErrorCode::Invalid);
    // Through a link, the file behind it is replaced.
    let link = agent.path("link");
    symlink(&path, &link).unwrap();
    assert_eq!(agent.write(&link, None, b"through"), Reply::Written { size: 7 });
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    assert_eq!(fs::read(&path).unwrap(), b"through");
}

#[test]
fn file_errors_have_names() {
    let agent = Agent::start();
    let code = |path: &str| match agent.write(path, None, b"x") {
        Reply::Error { code, message } => {
            assert!(!message.is_empty());
            code
        }
        other => panic!("{path}: {other:?}"),
    };
    fs::write(agent.path("file"), "x").unwrap();
    fs::create_dir(agent.path("folder")).unwrap();
    assert!(
        Command::new("mkfifo")
            .arg(agent.path("fifo"))
            .status()
            .unwrap()
            .success()
    );
    assert_eq!(code(&agent.path("folder")), AgentErrorCode::IsDirectory);
    assert_eq!(code(&agent.path("file/below")), AgentErrorCode::NotDirectory);
    assert_eq!(code(&agent.path("fifo")), AgentErrorCode::Invalid);
    assert_eq!(code("/"), AgentErrorCode::IsDirectory);
    assert_eq!(code("/dev/full"), AgentErrorCode::Invalid);
    assert_eq!(code(&agent.path(&"n".repeat(300))), AgentErrorCode::Invalid);
    for path in ["", "relative", "/tmp/../etc/x", "/..", "/a\0b"] {
        assert_eq!(code(path), AgentErrorCode::Invalid, "{path:?}");
        assert_eq!(agent.read(path, 10), Err(AgentErrorCode::Invalid), "{path:?}");
        assert_eq!(
            agent.list(path, false, 10),
            Err(AgentErrorCode::Invalid),
            "{path:?}"
        );
    }
    assert_eq!(
        agent.read(&agent.path("absent"), 10),
        Err(AgentErrorCode::NotFound)
    );
    assert_eq!(
        agent.read(&agent.path("folder"), 10),
        Err(AgentErrorCode::IsDirectory)
    );
    assert_eq!(agent.read(&agent.path("fifo"), 10), Err(AgentErrorCode::Invalid));
    assert_eq!(agent.read("/dev/zero", 10), Err(AgentErrorCode::Invalid));
    assert_eq!(agent.read(&agent.path("file"), 0), Err(AgentErrorCode::TooLarge));
    assert_eq!(
        agent.list(&agent.path("absent"), false, 10),
        Err(AgentErrorCode::NotFound)
    );
    assert_eq!(
        agent.list(&agent.path("file"), false, 10),
        Err(AgentErrorCode::NotDirectory)
    );
    // A full and a read-only file system, and one's own lack of rights, are tried in a real sandbox.
}

#[test]
fn files_are_read_as_they_are() {
    let agent = Agent::start();
    let bytes: Vec<u8> = (0..700_001_u32).map(|number| (number % 241) as u8).collect();
    fs::write(agent.path("large"), &bytes).unwrap();
    fs::write(agent.path("empty"), "").unwrap();
    assert_eq!(agent.read(&agent.path("large"), 700_001).unwrap(), bytes);
    assert_eq!(
        agent.read(&agent.path("large"), 700_000),
        Err(AgentErrorCode::TooLarge)
    );
    assert_eq!(agent.read(&agent.path("empty"), 0).unwrap(), b"");
    // The kernel's files say that they are empty.
    let version = agent.read("/proc/version", 10_000).unwrap();
    assert_eq!(version, fs::read("/proc/version").unwrap());
    assert_eq!(agent.read("/proc/version", 3), Err(AgentErrorCode::TooLarge));
}

#[test]
fn listings_say_what_is_there() {
    let agent = Agent::start();
    fs::create_dir_all(agent.path("d/below")).unwrap();
    fs::write(agent.path("d/below/deep"), "12345").unwrap();
    fs::write(agent.path("d/file"), "1").unwrap();
    symlink("/", agent.path("d/link")).unwrap();
    let (entries, truncated) = agent.list(&agent.path("d/"), false, 10).unwrap();
    assert!(!truncated);
    let found: Vec<(&str, EntryKind, u64)> = entries
        .iter()
        .map(|entry| (entry.name.as_str(), entry.kind, entry.size))
        .collect();
    let expected = [
        ("below", EntryKind::Directory, 0),
        ("file", EntryKind::File, 1),
        ("link", EntryKind::Symlink, 0),
    ];
    assert_eq!(found, expected);
    assert_eq!(entries[1].path, agent.path("d/file"));
    assert!(entries[1].modified > 1_600_000_000 && entries[1].mode == 0o644);
    let (all, _) = agent.list(&agent.path("d"), true, 10).unwrap();
    assert_eq!(all.len(), 4, "the link to / was followed: {all:?}");
    assert_eq!(agent.list(&agent.path("d"), true, 4).unwrap(), (all, false));
    let (some, truncated) = agent.list(&agent.path("d"), true, 3).unwrap();
    assert_eq!((some.len(), truncated), (3, true));
    // More than fits into one frame.
    fs::create_dir(agent.path("many")).unwrap();
    for number in 0..3000 {
        fs::write(agent.path(&format!("many/{number:0>200}")), "").unwrap();
    }
    let (many, truncated) = agent.list(&agent.path("many"), true, 5000).unwrap();
    assert_eq!((many.len(), truncated), (3000, false));
}

#[test]
fn sigterm_ends_everything() {
    let mut agent = Agent::start();
    let mut connection = agent.exec(shell("trap 'echo asked' TERM; echo $$; sleep 60 & wait"));
    let (_, process) = connection.frame().unwrap();
    let process = String::from_utf8(process).unwrap();
    let id = i32::try_from(agent.process.id()).unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(id), nix::sys::signal::Signal::SIGTERM).unwrap();
    let begun = Instant::now();
    assert!(agent.process.wait().unwrap().success());
    assert!(begun.elapsed() < Duration::from_secs(5));
    wait(|| !alive(&process));
}

#[test]
fn whoever_takes_a_sandbox_finds_their_variables_in_every_command() {
    let agent = Agent::start();
    assert!(matches!(agent.ask(&Request::Ping).reply(), Reply::Pong { .. }));
    let taken = agent.claim(&[("OWN", "mine"), ("FROM_THE_CONTAINER", "changed")]);
    assert!(matches!(taken, Reply::Pong { .. }), "{taken:?}");
    let line = "echo $OWN:$FROM_THE_CONTAINER:$ADDED";
    assert_eq!(agent.sh(line).stdout, "mine:changed:\n");
    let added = Exec {
        env: [("ADDED", "1"), ("OWN", "other")]
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into(),
        ..shell(line)
    };
    assert_eq!(agent.exec(added).outcome().stdout, "other:changed:1\n");
    assert_eq!(agent.sh(line).stdout, "mine:changed:\n");
    // Taken is taken.
    let again = agent.claim(&[("OWN", "theirs")]);
    assert!(
        matches!(
            again,
            Reply::Error {
                code: AgentErrorCode::Invalid,
                ..
            }
        ),
        "{again:?}"
    );
    assert_eq!(agent.sh(line).stdout, "mine:changed:\n");
}

#[test]
fn a_used_sandbox_cannot_be_taken() {
    for use_it in [
        |agent: &Agent| drop(agent.sh("true")),
        |agent: &Agent| drop(agent.write(&agent.path("file"), None, b"x")),
        |agent: &Agent| drop(agent.read("/etc/hostname", 10)),
        |agent: &Agent| drop(agent.list("/", false, 1)),
    ] {
        let agent = Agent::start();
        use_it(&agent);
        let late = agent.claim(&[("OWN", "mine")]);
        assert!(
            matches!(
                late,
                Reply::Error {
                    code: AgentErrorCode::Invalid,
                    ..
                }
            ),
            "{late:?}"
        );
        assert_eq!(agent.sh("echo $OWN").stdout, "\n");
    }
}
