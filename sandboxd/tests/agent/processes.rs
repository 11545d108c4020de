//! Processes that outlive the connection that started them.

use sandgate_api::agent::{ProcessStatus, Start, TerminalSize};

use super::*;

impl Agent {
    fn launch(&self, exec: Exec, terminal: Option<TerminalSize>, attended: bool) -> Reply {
        let exec = Exec {
            working_dir: exec.working_dir.clone().or_else(|| Some(self.path(""))),
            ..exec
        };
        self.ask(&Request::Start(Start {
            exec,
            terminal,
            attended,
        }))
        .reply()
    }

    /// Starts a line and answers the process's id.
    fn started(&self, line: &str, terminal: Option<TerminalSize>, attended: bool) -> String {
        match self.launch(shell(line), terminal, attended) {
            Reply::Started { process_id, pid } => {
                assert!(pid > 1, "{pid}");
                process_id
            }
            other => panic!("{other:?}"),
        }
    }

    fn processes(&self) -> Vec<ProcessStatus> {
        match self.ask(&Request::Processes).reply() {
            Reply::Processes { processes } => processes,
            other => panic!("{other:?}"),
        }
    }

    fn status(&self, process: &str) -> ProcessStatus {
        let mut all = self.processes();
        all.retain(|status| status.process_id == process);
        all.pop().expect("the process")
    }

    fn follow(&self, process: &str, since: u64, wait: bool, input: bool) -> Connection {
        self.ask(&Request::Follow {
            process: process.to_owned(),
            since,
            wait,
            input,
        })
    }

    /// What there is from a position on: where it begins, the two outputs, and how it ended if it has.
    fn output(&self, process: &str, since: u64, wait: bool) -> Seen {
        let mut connection = self.follow(process, since, wait, false);
        let mut seen = Seen::default();
        while !connection.see(&mut seen) {}
        seen
    }

    fn input(&self, process: &str, bytes: &[u8], close: bool) -> Reply {
        let mut connection = self.ask(&Request::Input {
            process: process.to_owned(),
            size: bytes.len() as u64,
            close,
        });
        for part in bytes.chunks(100_000) {
            connection.send(FrameKind::Data, part);
        }
        connection.reply()
    }

    fn signal(&self, process: &str, signal: i32) -> Reply {
        let process = process.to_owned();
        self.ask(&Request::Signal { process, signal }).reply()
    }

    fn end(&self, process: &str) -> Reply {
        let process = process.to_owned();
        self.ask(&Request::Remove { process }).reply()
    }
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Seen {
    from: Vec<u64>,
    stdout: String,
    stderr: String,
    code: Option<i32>,
}

impl Connection {
    /// Takes one frame. True after the last.
    fn see(&mut self, seen: &mut Seen) -> bool {
        let (kind, payload) = self.frame().unwrap();
        let text = || String::from_utf8_lossy(&payload).into_owned();
        match kind {
            FrameKind::Stdout => seen.stdout += &text(),
            FrameKind::Stderr => seen.stderr += &text(),
            FrameKind::Data => panic!("file bytes from a process"),
            FrameKind::Json => match serde_json::from_slice(&payload).unwrap() {
                Reply::Output { from } => seen.from.push(from),
                Reply::Done => return true,
                Reply::Exited { exit_code, .. } => {
                    seen.code = Some(exit_code);
                    return true;
                }
                other => panic!("{other:?}"),
            },
        }
        false
    }

    /// Reads until the standard output ends with this.
    fn see_until(&mut self, seen: &mut Seen, end: &str) {
        while !seen.stdout.ends_with(end) {
            assert!(!self.see(seen), "{seen:?}");
        }
    }
}

fn is_refused(reply: &Reply, expected: AgentErrorCode) -> bool {
    matches!(reply, Reply::Error { code, .. } if *code == expected)
}

#[test]
fn a_process_goes_on_without_its_caller_and_its_output_is_read_again() {
    let agent = Agent::start();
    let go = agent.path("go");
    let line =
        format!("echo one; while [ ! -e {go} ]; do sleep 0.05; done; printf two; echo three >&2; exit 7");
    let process = agent.started(&line, None, false);
    let mut first = agent.follow(&process, 0, true, false);
    let mut seen = Seen::default();
    first.see_until(&mut seen, "one\n");
    drop(first);
    let status = agent.status(&process);
    assert_eq!((status.ended, status.first, status.next), (None, 0, 4));
    assert_eq!(status.command, line[..200.min(line.len())]);
    // Nothing more at the moment.
    let now = agent.output(&process, 4, false);
    assert_eq!((now.from, now.stdout.as_str(), now.code), (vec![4], "", None));
    fs::write(&go, "").unwrap();
    let rest = agent.output(&process, 4, true);
    assert_eq!(
        (rest.stdout.as_str(), rest.stderr.as_str(), rest.code),
        ("two", "three\n", Some(7))
    );
    assert_eq!(rest.from, [4]);
    // From the middle, after its end, by its number.
    let number = status.pid.to_string();
    let again = agent.output(&number, 2, true);
    assert_eq!(
        (again.stdout.as_str(), again.stderr.as_str(), again.code),
        ("e\ntwo", "three\n", Some(7))
    );
    let end = agent.status(&process).ended.expect("an end");
    assert_eq!(end.exit_code, 7);
    assert_eq!(
        agent.follow(&process, 1000, true, false).refusal(),
        AgentErrorCode::Invalid
    );
    assert_eq!(agent.end(&process), Reply::Done);
    assert_eq!(
        agent.follow(&process, 0, true, false).refusal(),
        AgentErrorCode::NotFound
    );
    assert_eq!(agent.processes(), []);
}

#[test]
fn output_that_is_too_much_is_forgotten_at_the_beginning_and_said_to_be() {
    let agent = Agent::start();
    let process = agent.started("seq 1 1000000", None, false);
    // All of it was written, and nobody read: a process is never held up.
    wait(|| agent.status(&process).ended.is_some());
    let status = agent.status(&process);
    assert_eq!(status.next, 6_888_896);
    assert!(status.first > 6_000_000, "{status:?}");
    let seen = agent.output(&process, 0, true);
    assert_eq!(seen.from, [status.first]);
    assert_eq!(seen.stdout.len() as u64, status.next - status.first);
    assert!(seen.stdout.ends_with("\n999999\n1000000\n"));
}

#[test]
fn a_process_reads_what_is_written_to_it() {
    let agent = Agent::start();
    let process = agent.started(
        "while read -r line; do echo \"<$line>\"; done; echo end",
        None,
        false,
    );
    assert_eq!(
        agent.input(&process, b"a b\nhalf", false),
        Reply::Written { size: 8 }
    );
    assert_eq!(
        agent.input(&process, b" done\n", true),
        Reply::Written { size: 6 }
    );
    let seen = agent.output(&process, 0, true);
    assert_eq!(
        (seen.stdout.as_str(), seen.code),
        ("<a b>\n<half done>\nend\n", Some(0))
    );
    assert!(is_refused(
        &agent.input(&process, b"more", false),
        AgentErrorCode::Invalid
    ));
    // By a follower, much of it, byte for byte.
    let process = agent.started("head -c 3000000 | sha256sum", None, false);
    let mut connection = agent.follow(&process, 0, true, true);
    let part = vec![b'x'; 100_000];
    for _ in 0..30 {
        connection.send(FrameKind::Data, &part);
    }
    let mut seen = Seen::default();
    while !connection.see(&mut seen) {}
    let whole = agent
        .sh("head -c 3000000 /dev/zero | tr '\\0' x | sha256sum")
        .stdout;
    assert_eq!((seen.stdout, seen.code), (whole, Some(0)));
    // Who may not type and does is cut off, and the process goes on.
    let process = agent.started("cat", None, false);
    let mut connection = agent.follow(&process, 0, true, false);
    connection.send(FrameKind::Data, b"x");
    while connection.frame().is_ok() {}
    assert_eq!(agent.input(&process, b"y", true), Reply::Written { size: 1 });
    assert_eq!(agent.output(&process, 0, true).stdout, "y");
}

#[test]
fn a_terminal_is_one() {
    let agent = Agent::start();
    let size = TerminalSize {
        rows: 33,
        columns: 99,
    };
    let line = "test -t 0 && test -t 1 && test -t 2 && echo terminal; echo $TERM; stty size; \
                while read -r word; do echo \"<$word>\"; stty size; done";
    let process = agent.started(line, Some(size), false);
    let mut connection = agent.follow(&process, 0, true, true);
    let mut seen = Seen::default();
    connection.see_until(&mut seen, "terminal\r\nxterm-256color\r\n33 99\r\n");
    connection.json(&TerminalSize {
        rows: 10,
        columns: 20,
    });
    connection.send(FrameKind::Data, b"word\r");
    connection.see_until(&mut seen, "<word>\r\n10 20\r\n");
    let resize = Request::Resize {
        process,
        size: TerminalSize {
            rows: 11,
            columns: 21,
        },
    };
    assert_eq!(agent.ask(&resize).reply(), Reply::Done);
    connection.send(FrameKind::Data, b"next\r");
    connection.see_until(&mut seen, "<next>\r\n11 21\r\n");
    // Ctrl-C is a signal to what runs in the foreground.
    connection.send(FrameKind::Data, &[3]);
    while !connection.see(&mut seen) {}
    assert_eq!(seen.code, Some(128 + 2), "{seen:?}");
}

#[test]
fn the_last_words_of_a_terminal_are_kept() {
    let agent = Agent::start();
    let size = TerminalSize {
        rows: 24,
        columns: 80,
    };
    for _ in 0..20 {
        let process = agent.started("seq 1 2000; echo last", Some(size), false);
        let seen = agent.output(&process, 0, true);
        assert!(
            seen.stdout.ends_with("\r\n2000\r\nlast\r\n"),
            "{:?}",
            &seen.stdout[seen.stdout.len() - 20..]
        );
        assert_eq!(agent.end(&process), Reply::Done);
    }
}

#[test]
fn signals_reach_the_whole_group_and_removal_everything() {
    let agent = Agent::start();
    let told = agent.path("told");
    let line = format!("sleep 600 & echo $! > {told}; wait");
    let process = agent.started(&line, None, false);
    let child = wait_for(|| fs::read_to_string(&told).ok().filter(|text| text.ends_with('\n')));
    assert!(is_refused(&agent.signal(&process, 0), AgentErrorCode::Invalid));
    assert!(is_refused(&agent.signal(&process, 999), AgentErrorCode::Invalid));
    assert_eq!(agent.signal(&process, 15), Reply::Done);
    assert_eq!(agent.output(&process, 0, true).code, Some(128 + 15));
    wait(|| !alive(&child));
    assert!(is_refused(&agent.signal(&process, 15), AgentErrorCode::Invalid));

    fs::remove_file(&told).unwrap();
    let stray = format!("(setsid sh -c 'echo $$ > {told}; exec sleep 600' &); sleep 600");
    let process = agent.started(&stray, None, false);
    let child = wait_for(|| fs::read_to_string(&told).ok().filter(|text| text.ends_with('\n')));
    assert_eq!(agent.end(&process), Reply::Done);
    wait(|| !alive(&child));
    assert!(is_refused(&agent.end(&process), AgentErrorCode::NotFound));
}

#[test]
fn an_attended_process_ends_with_the_last_of_its_followers() {
    let agent = Agent::start();
    let process = agent.started("echo here; sleep 600", None, true);
    let (mut one, mut other) = (
        agent.follow(&process, 0, true, false),
        agent.follow(&process, 0, true, false),
    );
    let mut seen = Seen::default();
    one.see_until(&mut seen, "here\n");
    let mut seen = Seen::default();
    other.see_until(&mut seen, "here\n");
    drop(one);
    // Looking is not following.
    assert_eq!(agent.output(&process, 0, false).code, None);
    drop(other);
    wait(|| {
        agent
            .status(&process)
            .ended
            .is_some_and(|end| end.exit_code == 137)
    });
}

#[test]
fn there_are_only_so_many_and_ended_ones_make_room() {
    let agent = Agent::start();
    let ended = agent.started("true", None, false);
    wait(|| agent.status(&ended).ended.is_some());
    for _ in 0..32 {
        agent.started("sleep 600", None, false);
    }
    let processes = agent.processes();
    assert_eq!(processes.len(), 32);
    assert!(processes.iter().all(|status| status.process_id != ended));
    let refused = agent.launch(shell("true"), None, false);
    assert!(is_refused(&refused, AgentErrorCode::Invalid), "{refused:?}");
    assert_eq!(agent.end(&processes[0].process_id), Reply::Done);
    agent.started("true", None, false);
}

#[test]
fn what_cannot_be_started_leaves_nothing() {
    let agent = Agent::start();
    for exec in [
        argv(&["no-such-program"]),
        argv(&[]),
        Exec {
            working_dir: Some("relative".to_owned()),
            ..shell("true")
        },
    ] {
        let refused = agent.launch(exec, None, false);
        assert!(is_refused(&refused, AgentErrorCode::Invalid), "{refused:?}");
    }
    assert_eq!(agent.processes(), []);
}
