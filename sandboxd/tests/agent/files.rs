//! Files: written, read and listed.

use std::os::unix::ffi::OsStrExt as _;

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
    // The agent would read itself in /proc, where code of its uid may not.
    for path in ["/proc/self/environ", "/proc/1/mem", "/proc/version", "/dev/fd/0"] {
        let refused = agent.read(path, 10_000).unwrap_err();
        assert!(
            matches!(
                refused,
                AgentErrorCode::PermissionDenied | AgentErrorCode::Invalid
            ),
            "{path}: {refused:?}"
        );
    }
}

impl Agent {
    fn files(&self, request: FileRequest) -> Result<(), AgentErrorCode> {
        match self.ask(&Request::Files(request)).reply() {
            Reply::Files(FileReply::Done) => Ok(()),
            Reply::Error { code, message } => {
                assert!(!message.is_empty());
                Err(code)
            }
            other => panic!("{other:?}"),
        }
    }

    fn remove(&self, name: &str, recursive: bool) -> Result<(), AgentErrorCode> {
        let path = self.path(name);
        self.files(FileRequest::Remove { path, recursive })
    }

    fn rename(&self, source: &str, destination: &str) -> Result<(), AgentErrorCode> {
        let (source, destination) = (self.path(source), self.path(destination));
        self.files(FileRequest::Move { source, destination })
    }

    fn glob(&self, pattern: &str, limit: u32) -> Result<(Vec<String>, bool), AgentErrorCode> {
        let base = self.path("");
        let pattern = pattern.to_owned();
        let (entries, truncated) =
            self.entries(&Request::Files(FileRequest::Glob { base, pattern, limit }))?;
        let top = self.folder.path();
        let relative = |entry: Entry| {
            Path::new(&entry.path)
                .strip_prefix(top)
                .unwrap()
                .display()
                .to_string()
        };
        Ok((entries.into_iter().map(relative).collect(), truncated))
    }
}

#[test]
fn what_is_removed_is_gone_and_nothing_else() {
    let agent = Agent::start();
    fs::create_dir_all(agent.path("d/below/deep")).unwrap();
    fs::write(agent.path("d/below/file"), "x").unwrap();
    fs::write(agent.path("kept"), "x").unwrap();
    symlink(agent.path("kept"), agent.path("d/link")).unwrap();
    fs::create_dir(agent.path("other")).unwrap();
    fs::write(agent.path("other/kept"), "x").unwrap();
    symlink(agent.path("other"), agent.path("d/below/door")).unwrap();
    assert_eq!(agent.remove("d", false), Err(AgentErrorCode::NotEmpty));
    assert_eq!(agent.remove("absent", true), Err(AgentErrorCode::NotFound));
    assert_eq!(
        agent.remove("kept/below", true),
        Err(AgentErrorCode::NotDirectory)
    );
    assert_eq!(agent.remove("d/link", false), Ok(()));
    assert_eq!(agent.remove("d/below/deep", false), Ok(()), "an empty directory");
    assert_eq!(agent.remove("d", true), Ok(()));
    assert!(!Path::new(&agent.path("d")).exists());
    for name in ["kept", "other/kept"] {
        assert_eq!(fs::read(agent.path(name)).unwrap(), b"x", "removed behind a link");
    }
    let whole = |path: &str| {
        agent.files(FileRequest::Remove {
            path: path.to_owned(),
            recursive: true,
        })
    };
    assert_eq!(whole("/"), Err(AgentErrorCode::IsDirectory));
    assert_eq!(whole("/proc/self"), Err(AgentErrorCode::PermissionDenied));
    assert_eq!(whole("/proc"), Err(AgentErrorCode::Invalid), "a mount point");
}

#[test]
fn directories_are_made_and_things_are_moved() {
    let agent = Agent::start();
    let make = |name: &str, parents| {
        agent.files(FileRequest::MakeDirectory {
            path: agent.path(name),
            parents,
        })
    };
    assert_eq!(make("a/b/c", false), Err(AgentErrorCode::NotFound));
    assert_eq!(make("a/b/c", true), Ok(()));
    assert_eq!(make("a/b/c", true), Ok(()), "it is there already");
    assert_eq!(make("a/b/c", false), Err(AgentErrorCode::Exists));
    fs::write(agent.path("file"), "1").unwrap();
    assert_eq!(make("file", true), Err(AgentErrorCode::NotDirectory));
    assert_eq!(make("file/below", true), Err(AgentErrorCode::NotDirectory));

    assert_eq!(agent.rename("file", "new/place"), Ok(()));
    assert_eq!(fs::read(agent.path("new/place")).unwrap(), b"1");
    fs::write(agent.path("other"), "2").unwrap();
    assert_eq!(agent.rename("other", "new/place"), Ok(()), "a file is replaced");
    assert_eq!(fs::read(agent.path("new/place")).unwrap(), b"2");
    assert_eq!(agent.rename("new/place", "a"), Err(AgentErrorCode::IsDirectory));
    assert_eq!(agent.rename("new", "a"), Err(AgentErrorCode::NotEmpty));
    assert_eq!(agent.rename("a", "a/b/c/d"), Err(AgentErrorCode::Invalid));
    assert_eq!(agent.rename("absent", "x"), Err(AgentErrorCode::NotFound));
    assert_eq!(agent.rename("a", "b"), Ok(()));
    assert!(Path::new(&agent.path("b/b/c")).is_dir() && !Path::new(&agent.path("a")).exists());
    symlink("/etc", agent.path("link")).unwrap();
    assert_eq!(agent.rename("link", "moved"), Ok(()));
    assert_eq!(fs::read_link(agent.path("moved")).unwrap(), Path::new("/etc"));
}

#[test]
fn a_pattern_finds_what_it_says() {
    let agent = Agent::start();
    for name in ["a.py", "b.txt", "src/c.py", "src/deep/d.py", "src/deep/e.rs"] {
        fs::create_dir_all(Path::new(&agent.path(name)).parent().unwrap()).unwrap();
        fs::write(agent.path(name), "").unwrap();
    }
    symlink("src", agent.path("also")).unwrap();
    let odd = std::ffi::OsStr::from_bytes(b"no\xfftext.py");
    fs::write(agent.folder.path().join(odd), "").unwrap();
    let found = |pattern: &str| {
        let (found, truncated) = agent.glob(pattern, 100).unwrap();
        assert!(!truncated);
        found
    };
    assert_eq!(
        found("**/*.py"),
        ["a.py", "no\u{fffd}text.py", "src/c.py", "src/deep/d.py"]
    );
    assert_eq!(found("*.py"), ["a.py", "no\u{fffd}text.py"]);
    assert_eq!(found("src/*"), ["src/c.py", "src/deep"]);
    assert_eq!(found("src/**/[de].{py,rs}"), ["src/deep/d.py", "src/deep/e.rs"]);
    assert_eq!(found("nothing*"), Vec::<String>::new());
    assert_eq!(
        agent.glob("**/*", 3).map(|(found, more)| (found.len(), more)),
        Ok((3, true))
    );
    assert_eq!(agent.glob("[", 3), Err(AgentErrorCode::Invalid));
    let hostile = format!("{}x", "{a,b}*".repeat(300));
    assert!(agent.glob(&hostile, 3).is_ok_and(|(found, _)| found.is_empty()));
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
    let targets: Vec<_> = entries.iter().map(|entry| entry.target.as_deref()).collect();
    assert_eq!(targets, [None, None, Some("/")]);
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
