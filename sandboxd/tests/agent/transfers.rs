//! Files of any length, in both directions, in parts and broken off.

use sandgate_api::agent::{FilePart, FileReply, FileRequest, OpenedFile};

use super::*;

/// Long enough that it does not fit into what an agent may hold.
const LONG: u64 = 160 * 1024 * 1024;
/// How much more memory an agent may take while it transfers, in KiB.
const ROOM: u64 = 16 * 1024;

impl Agent {
    fn upload(&self, path: &str, size: Option<u64>) -> Connection {
        self.ask(&Request::Files(FileRequest::Upload {
            path: path.to_owned(),
            size,
            mode: None,
        }))
    }

    fn open(&self, path: &str) -> (Connection, OpenedFile) {
        let path = path.to_owned();
        let mut connection = self.ask(&Request::Files(FileRequest::Open { path }));
        match connection.reply() {
            Reply::Files(FileReply::Opened(file)) => (connection, file),
            other => panic!("{other:?}"),
        }
    }

    fn part(&self, path: &str, offset: u64, length: u64) -> Vec<u8> {
        let (mut connection, _) = self.open(path);
        connection.json(&FilePart { offset, length });
        let mut bytes = Vec::new();
        while (bytes.len() as u64) < length {
            let (kind, part) = connection.frame().unwrap();
            assert_eq!(kind, FrameKind::Data);
            bytes.extend(part);
        }
        assert!(connection.frame().is_err(), "more than was asked for");
        bytes
    }

    /// The most memory it had so far, in KiB.
    fn peak(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process.id())).unwrap();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:"))
            .unwrap();
        line.trim().strip_suffix(" kB").unwrap().parse().unwrap()
    }
}

#[test]
fn a_file_comes_without_a_length_and_shows_when_it_is_whole() {
    let agent = Agent::start();
    let path = agent.path("new/file");
    let mut connection = agent.upload(&path, None);
    for _ in 0..10 {
        connection.send(FrameKind::Data, &[7; 1000]);
    }
    // It is being written: beside its path, not at it.
    wait(|| fs::read_dir(agent.path("new")).is_ok_and(|found| found.count() == 1));
    assert!(!Path::new(&path).exists());
    connection.send(FrameKind::Data, &[]);
    assert_eq!(connection.reply(), Reply::Written { size: 10_000 });
    assert_eq!(fs::read(&path).unwrap(), vec![7; 10_000]);
    let empty = agent.path("empty");
    let mut connection = agent.upload(&empty, Some(0));
    connection.send(FrameKind::Data, &[]);
    assert_eq!(connection.reply(), Reply::Written { size: 0 });
    assert_eq!(fs::read(&empty).unwrap(), b"");
}

#[test]
fn a_file_that_breaks_off_or_is_not_as_announced_leaves_no_trace() {
    let agent = Agent::start();
    let path = agent.path("file");
    fs::write(&path, "old").unwrap();
    let mut connection = agent.upload(&path, None);
    connection.send(FrameKind::Data, &[1; 500]);
    wait(|| fs::read_dir(agent.folder.path()).unwrap().count() == 2);
    drop(connection);
    wait(|| fs::read_dir(agent.folder.path()).unwrap().count() == 1);
    for (announced, sent) in [(3, 4), (3, 2)] {
        let mut connection = agent.upload(&path, Some(announced));
        connection.send(FrameKind::Data, &vec![1; sent]);
        connection.send(FrameKind::Data, &[]);
        assert_eq!(connection.refusal(), AgentErrorCode::Invalid);
    }
    let mut connection = agent.upload(&path, None);
    connection.send(FrameKind::Json, b"{}");
    assert_eq!(connection.refusal(), AgentErrorCode::Invalid);
    assert_eq!(
        agent.upload(&agent.path(""), None).refusal(),
        AgentErrorCode::IsDirectory
    );
    assert_eq!(
        agent.upload("/proc/self/comm", None).refusal(),
        AgentErrorCode::PermissionDenied
    );
    assert_eq!(fs::read(&path).unwrap(), b"old");
    assert_eq!(fs::read_dir(agent.folder.path()).unwrap().count(), 1);
}

#[test]
fn a_part_of_a_file_is_that_part() {
    let agent = Agent::start();
    let path = agent.path("file");
    let bytes: Vec<u8> = (0..300_000_u32).map(|number| (number % 251) as u8).collect();
    fs::write(&path, &bytes).unwrap();
    assert_eq!(agent.part(&path, 0, 300_000), bytes);
    assert_eq!(agent.part(&path, 299_999, 1), bytes[299_999..]);
    assert_eq!(agent.part(&path, 100_000, 150_000), bytes[100_000..250_000]);
    assert_eq!(agent.part(&path, 300_000, 0), b"");
    for (offset, length) in [(300_000, 1), (0, 300_001), (u64::MAX, 1), (1, u64::MAX)] {
        let (mut connection, _) = agent.open(&path);
        connection.json(&FilePart { offset, length });
        assert_eq!(connection.refusal(), AgentErrorCode::Invalid, "{offset} {length}");
    }
    let (mut connection, _) = agent.open(&path);
    connection.json(&Request::Ping);
    assert_eq!(connection.refusal(), AgentErrorCode::Invalid);
    // What was opened stays what it is when another file takes its path, and the other one has another version.
    let (mut connection, old) = agent.open(&path);
    assert_eq!(old, agent.open(&path).1);
    assert_eq!(
        agent.write(&path, None, &[0; 300_000]),
        Reply::Written { size: 300_000 }
    );
    connection.json(&FilePart {
        offset: 5,
        length: 10,
    });
    assert_eq!(connection.frame().unwrap().1, bytes[5..15]);
    let new = agent.open(&path).1;
    assert_eq!(new.size, old.size);
    assert_ne!(new.version, old.version);
}

#[test]
fn a_long_file_takes_no_memory_in_either_direction() {
    let agent = Agent::start();
    let path = agent.path("long");
    let before = agent.peak();
    let mut connection = agent.upload(&path, None);
    let part = vec![9; 64 * 1024];
    for _ in 0..LONG / part.len() as u64 {
        connection.send(FrameKind::Data, &part);
    }
    connection.send(FrameKind::Data, &[]);
    assert_eq!(connection.reply(), Reply::Written { size: LONG });
    assert_eq!(fs::metadata(&path).unwrap().len(), LONG);
    // A caller that does not read holds its own transfer up, and nothing else.
    let (mut slow, _) = agent.open(&path);
    slow.json(&FilePart {
        offset: 0,
        length: LONG,
    });
    assert_eq!(
        agent.ask(&Request::Ping).reply(),
        Reply::Pong {
            protocol: PROTOCOL_VERSION
        }
    );
    let (mut connection, _) = agent.open(&path);
    connection.json(&FilePart {
        offset: 0,
        length: LONG,
    });
    let mut left = LONG;
    while left > 0 {
        let (kind, part) = connection.frame().unwrap();
        assert_eq!(kind, FrameKind::Data);
        left -= part.len() as u64;
    }
    drop(slow);
    let after = agent.peak();
    assert!(after < before + ROOM, "{before} KiB became {after} KiB");
}
