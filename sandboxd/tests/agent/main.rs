//! The real binary on loopback, with real processes, files and a client written from the protocol's description.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, its helpers too")]

mod access;
mod changes;
mod commands;
mod files;
mod processes;
mod transfers;
mod watches;

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
    AgentErrorCode, Changes, Claim, Command as Line, Entry, EntryKind, Exec, FileReply, FileRequest,
    FrameHeader, FrameKind, HEADER_LENGTH, Hello, PROTOCOL_VERSION, Reply, Request,
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
        wait_for(Self::try_start)
    }

    /// `None` when somebody else was given the port that was free a moment ago.
    fn try_start() -> Option<Self> {
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let mut process = Command::new(env!("CARGO_BIN_EXE_sandboxd"))
            .args(["--listen", &address.to_string()])
            .env("FROM_THE_CONTAINER", "yes")
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let mut key = process.stdin.take().unwrap();
        key.write_all(KEY.as_bytes()).unwrap();
        let mut agent = Self {
            process,
            address,
            folder: tempfile::tempdir().unwrap(),
        };
        // A connection to nobody may come from the very port that it goes to, and then it is with itself.
        let is_heard =
            || TcpStream::connect(address).is_ok_and(|stream| stream.local_addr().unwrap() != address);
        let listens = wait_for(|| match agent.process.try_wait().unwrap() {
            Some(_ended) => Some(false),
            None => is_heard().then_some(true),
        });
        listens.then_some(agent)
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
        self.entries(&Request::List {
            path: path.to_owned(),
            recursive,
            limit,
        })
    }

    fn entries(&self, request: &Request) -> Result<(Vec<Entry>, bool), AgentErrorCode> {
        let mut connection = self.ask(request);
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
    changes: Option<Changes>,
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
                        exit_code,
                        timed_out,
                        changes,
                        ..
                    } => {
                        return Outcome {
                            code: exit_code,
                            timed_out,
                            stdout: String::from_utf8_lossy(&stdout).into_owned(),
                            stderr: String::from_utf8_lossy(&stderr).into_owned(),
                            changes,
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
        track: None,
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
    wait_for(|| until().then_some(()));
}

fn wait_for<T>(mut found: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(found) = found() {
            return found;
        }
        assert!(Instant::now() < deadline, "it did not happen in time");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn alive(process: &str) -> bool {
    fs::read_to_string(format!("/proc/{}/stat", process.trim())).is_ok_and(|stat| !stat.contains(") Z "))
}
