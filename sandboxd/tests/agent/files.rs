//! Files: written, read and listed.

use super::*;

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
