//! Who may speak to the agent, whose it is, and its end.

use super::*;

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
fn sigterm_ends_everything() {
    let mut agent = Agent::start();
    let mut connection = agent.exec(shell("trap 'echo asked' TERM; echo $$; sleep 60 & wait"));
    let (_, process) = connection.frame().unwrap();
    let process = String::from_utf8(process).unwrap();
    let id = i32::try_from(agent.process.id()).unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(id), nix::sys::signal::Signal::SIGTERM).unwrap();
    let begun = Instant::now();
    assert!(agent.process.wait().unwrap().success());
    // Not when the sleeper ends.
    assert!(begun.elapsed() < Duration::from_secs(50));
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
