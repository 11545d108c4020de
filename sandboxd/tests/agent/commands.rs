//! Commands: their place, their output, their end.

use super::*;

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
    // It goes on when the first line has been seen, and not before.
    let seen = agent.path("seen");
    let line = format!("echo one; while [ ! -e {seen} ]; do sleep 0.05; done; echo two");
    let mut connection = agent.exec(shell(&line));
    for words in ["one\n", "two\n"] {
        assert_eq!(
            connection.frame().unwrap(),
            (FrameKind::Stdout, words.as_bytes().to_vec())
        );
        fs::write(&seen, "").unwrap();
    }
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
        timeout_ms: Some(3000),
        ..shell("echo before; sleep 60 & echo $!; wait")
    };
    let outcome = agent.exec(exec).outcome();
    // Not when the sleeper ends.
    assert!(begun.elapsed() < Duration::from_secs(50));
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
    // It goes on writing when the command's end has been heard, and not before.
    let (heard, done) = (agent.path("heard"), agent.path("done"));
    let line = format!(
        "(while [ ! -e {heard} ]; do sleep 0.05; done; head -c 1000000 /dev/zero; echo $? > {done}) & echo started"
    );
    let outcome = agent.sh(&line);
    assert_eq!((outcome.code, outcome.stdout.as_str()), (0, "started\n"));
    fs::write(&heard, "").unwrap();
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

/// A line that starts what leaves its group, its session, its parents and its environment, and tells its process.
fn stray(told: &str) -> String {
    format!("env -i /bin/sh -c '(setsid /bin/sh -c \"echo \\$\\$ > {told}; exec sleep 600\" &)'")
}

#[test]
fn what_left_the_group_ends_with_its_command_when_that_is_cancelled() {
    let agent = Agent::start();
    let told = agent.path("stray");
    let stray_of = |what: &str| {
        let process = wait_for(|| fs::read_to_string(&told).ok().filter(|text| text.ends_with('\n')));
        fs::remove_file(&told).unwrap();
        assert!(alive(&process), "{what}");
        process
    };
    let connection = agent.exec(shell(&format!("{}; sleep 600", stray(&told))));
    let hung_up = stray_of("hanging up");
    // Another command's stray, which nobody cancels.
    assert_eq!(agent.sh(&stray(&told)).code, 0);
    let other = stray_of("another's");
    drop(connection);
    wait(|| !alive(&hung_up));

    let exec = Exec {
        timeout_ms: Some(6000),
        ..shell(&format!("{}; sleep 600", stray(&told)))
    };
    let outcome = agent.exec(exec).outcome();
    assert_eq!((outcome.code, outcome.timed_out), (124, true));
    let process = wait_for(|| fs::read_to_string(&told).ok().filter(|text| text.ends_with('\n')));
    wait(|| !alive(&process));
    assert!(alive(&other), "a command that nobody cancelled has lost its own");
    let _gone = Command::new("kill").args(["-KILL", other.trim()]).status();
}
