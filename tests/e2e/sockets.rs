//! Commands over a WebSocket, processes that outlive their client, terminals, and sessions.

use std::{net::TcpStream, time::Duration};

use harness::{sandbox::Sandbox, wait};
use serde_json::{Value, json};
use tungstenite::{Message, WebSocket, client::IntoClientRequest as _};

use crate::machine::Machine;

/// Longest wait for what happens at once.
const SOON: Duration = Duration::from_secs(60);

/// An open WebSocket.
struct Socket(WebSocket<TcpStream>);

impl Socket {
    fn open(machine: &Machine, path: &str) -> Self {
        let stream = machine.organization.client.connect().expect("the API listens");
        stream.set_read_timeout(Some(SOON)).expect("a timeout");
        let between = if path.contains('?') { '&' } else { '?' };
        let url = format!("ws://api.test{path}{between}token={}", machine.organization.key);
        let request = url.into_client_request().expect("a request");
        let (socket, _answer) = tungstenite::client(request, stream).expect("a socket");
        Self(socket)
    }

    fn say(&mut self, message: impl Into<Message>) {
        self.0.send(message.into()).expect("sent");
    }

    /// The next text or bytes.
    fn hear(&mut self) -> Message {
        loop {
            let message = self.0.read().expect("a message");
            if message.is_text() || message.is_binary() {
                return message;
            }
        }
    }

    fn event(&mut self) -> Value {
        let message = self.hear();
        serde_json::from_str(message.to_text().expect("a text")).expect("JSON")
    }

    /// Bytes up to the first that end with this.
    fn bytes_until(&mut self, end: &str) -> String {
        let mut seen = String::new();
        while !seen.ends_with(end) {
            let message = self.hear();
            assert!(message.is_binary(), "{message} after {seen:?}");
            seen += &String::from_utf8_lossy(&message.into_data());
        }
        seen
    }
}

fn running(machine: &Machine, sandbox: &Sandbox, marker: &str) -> usize {
    let all = machine.node.processes_of(&sandbox.id);
    all.iter()
        .filter(|process| process.command.iter().any(|part| part == marker))
        .count()
}

pub(crate) fn commands_run_one_after_the_other_on_a_socket_and_end_with_it(machine: &Machine) {
    let sandbox = machine.organization.sandbox(&json!({}));
    let mut socket = Socket::open(machine, "/ws");
    let execute = |id: u32, command: &str| {
        json!({ "type": "execute", "sandboxId": sandbox.id, "command": command, "stream": true, "id": id })
            .to_string()
    };
    // All at once; each begins when the one before has ended.
    socket.say(execute(1, "sleep 0.3; echo one > order; echo out; exit 3"));
    socket.say(execute(2, "cat order; echo two >&2"));
    socket.say(json!({ "type": "execute", "sandbox_id": "sb-none", "command": "true" }).to_string());
    assert_eq!(
        socket.event(),
        json!({ "type": "stdout", "data": "out\n", "id": 1 })
    );
    let exit = socket.event();
    assert_eq!(
        (&exit["type"], &exit["code"], &exit["id"]),
        (&json!("exit"), &json!(3), &json!(1))
    );
    assert_eq!(socket.event(), json!({ "type": "done", "id": 1 }));
    let mut outputs = [socket.event(), socket.event()];
    outputs.sort_by_key(|event| event["type"].to_string());
    assert_eq!(outputs[0], json!({ "type": "stderr", "data": "two\n", "id": 2 }));
    assert_eq!(outputs[1], json!({ "type": "stdout", "data": "one\n", "id": 2 }));
    assert_eq!(socket.event()["code"], 0);
    assert_eq!(socket.event(), json!({ "type": "done", "id": 2 }));
    assert_eq!(socket.event()["type"], "error");
    assert_eq!(socket.event(), json!({ "type": "done" }));
    // More than anybody keeps, and all of it arrives.
    socket.say(execute(3, "head -c 3000000 /dev/zero | tr '\\0' x"));
    let mut length = 0;
    loop {
        let event = socket.event();
        match event["type"].as_str() {
            Some("stdout") => length += event["data"].as_str().expect("a text").len(),
            Some("exit") => break,
            _ => panic!("{event}"),
        }
    }
    assert_eq!(length, 3_000_000);
    assert_eq!(socket.event(), json!({ "type": "done", "id": 3 }));
    socket.say(execute(4, "(setsid sleep 7654 &) ; sleep 7654"));
    wait::until("the command runs", SOON, || {
        (running(machine, &sandbox, "7654") == 2).then_some(())
    });
    drop(socket);
    wait::until("the command ends with its socket", SOON, || {
        (running(machine, &sandbox, "7654") == 0).then_some(())
    });
    sandbox.stop();
}

pub(crate) fn a_process_outlives_its_client_and_is_found_again(machine: &Machine) {
    let sandbox = machine.organization.sandbox(&json!({}));
    let started = sandbox
        .client()
        .post(&sandbox.path("/processes"))
        .json(&json!({ "command": "echo one; read line; echo \"<$line>\" >&2; exit 5", "env": { "A": "b" } }))
        .send()
        .ok();
    let id = started["process_id"].as_str().expect("an id").to_owned();
    let path = sandbox.path(&format!("/processes/{id}"));
    let mut events = sandbox
        .client()
        .get(&format!("{path}/output"))
        .header("accept", "text/event-stream")
        .events()
        .expect("a stream");
    assert_eq!(
        events.next(SOON),
        Some(json!({ "type": "stdout", "data": "one\n", "seq": 4 }))
    );
    drop(events);
    let written = sandbox
        .client()
        .post(&format!("{path}/stdin"))
        .json(&json!({ "data": "wörd\n" }))
        .send()
        .ok();
    assert_eq!(written, json!({ "success": true, "written": 6 }));
    let rest = sandbox
        .client()
        .get(&format!("{path}/output?since=4"))
        .header("accept", "text/event-stream")
        .events()
        .expect("a stream")
        .rest(SOON);
    assert_eq!(
        rest[0],
        json!({ "type": "stderr", "data": "<wörd>\n", "seq": 12 }),
        "{rest:?}"
    );
    assert_eq!(
        (&rest[1]["type"], &rest[1]["code"]),
        (&json!("exit"), &json!(5)),
        "{rest:?}"
    );
    let all = sandbox.client().get(&format!("{path}/output")).send().ok();
    assert_eq!(
        all["events"][0],
        json!({ "type": "stdout", "data": "one\n", "seq": 4 })
    );
    assert_eq!(all["next_seq"], 12, "{all}");
    let beyond = sandbox.client().get(&format!("{path}/output?since=13")).send();
    beyond.refused_field("since");
    let listed = sandbox.client().get(&sandbox.path("/processes")).send().ok();
    assert_eq!(listed["processes"][0]["exit_code"], 5, "{listed}");
    assert_eq!(listed["processes"][0]["running"], false, "{listed}");
    sandbox.client().delete(&path).send().ok();
    sandbox
        .client()
        .get(&format!("{path}/output"))
        .send()
        .refused(404, "NOT_FOUND");

    let sleeper = json!({ "command": ["sleep", "8765"] });
    let started = sandbox
        .client()
        .post(&sandbox.path("/processes"))
        .json(&sleeper)
        .send()
        .ok();
    wait::until("it runs", SOON, || {
        (running(machine, &sandbox, "8765") == 1).then_some(())
    });
    let pid = started["pid"].as_i64().expect("a number");
    let signal = sandbox.path(&format!("/processes/{pid}/signal"));
    sandbox
        .client()
        .post(&signal)
        .json(&json!({ "signal": "SIGTERM" }))
        .send()
        .ok();
    wait::until("it is gone", SOON, || {
        (running(machine, &sandbox, "8765") == 0).then_some(())
    });
    sandbox.stop();
}

pub(crate) fn a_terminal_is_typed_on_resized_and_come_back_to(machine: &Machine) {
    let sandbox = machine.organization.sandbox(&json!({}));
    let command = "stty size; while read -r word; do echo \"<$word>\"; stty size; done";
    let started = sandbox
        .client()
        .post(&sandbox.path("/processes"))
        .json(&json!({ "command": command, "pty": { "rows": 30, "cols": 100 } }))
        .send()
        .ok();
    let id = started["process_id"].as_str().expect("an id");
    let place = format!("/api/v1{}?process_id={id}", sandbox.path("/terminal"));
    let mut terminal = Socket::open(machine, &place);
    assert_eq!(
        terminal.event(),
        json!({ "type": "attached", "process_id": id, "seq": 0 })
    );
    terminal.bytes_until("30 100\r\n");
    terminal.say(json!({ "type": "resize", "rows": 20, "cols": 60 }).to_string());
    terminal.say(Message::binary(b"word\r".to_vec()));
    terminal.bytes_until("<word>\r\n20 60\r\n");
    drop(terminal);
    let mut terminal = Socket::open(machine, &place);
    assert_eq!(terminal.event()["type"], "attached");
    let replayed = terminal.bytes_until("<word>\r\n20 60\r\n");
    assert!(replayed.starts_with("30 100\r\n"), "{replayed:?}");
    // Ctrl-C.
    terminal.say(Message::binary(vec![3]));
    let exit = loop {
        let message = terminal.hear();
        if message.is_text() {
            break serde_json::from_str::<Value>(message.to_text().expect("a text")).expect("JSON");
        }
    };
    assert_eq!(
        (&exit["type"], &exit["code"]),
        (&json!("exit"), &json!(130)),
        "{exit}"
    );
    // A shell of its own ends with the socket.
    let mut shell = Socket::open(machine, &format!("/api/v1{}", sandbox.path("/terminal")));
    assert_eq!(shell.event()["type"], "attached");
    let prompt = shell.hear();
    assert!(prompt.is_binary(), "{prompt}");
    shell.say(Message::binary(b"sleep 9876\r".to_vec()));
    wait::until("it runs", SOON, || {
        (running(machine, &sandbox, "9876") == 1).then_some(())
    });
    drop(shell);
    wait::until("it is gone", SOON, || {
        (running(machine, &sandbox, "9876") == 0).then_some(())
    });
    sandbox.stop();
}

pub(crate) fn a_session_keeps_its_state_and_is_interrupted(machine: &Machine) {
    let sandbox = machine.organization.sandbox(&json!({}));
    let sessions = sandbox.path("/repl/sessions");
    let post = |path: &str, body: &Value| sandbox.client().post(path).json(body).send();
    let began = post(&sessions, &json!({ "language": "python" })).ok();
    let session = format!("{sessions}/{}", began["session_id"].as_str().expect("an id"));
    let run = |code: &str| post(&format!("{session}/execute"), &json!({ "code": code })).ok();
    let first = run("x = 41\nprint('é', x)");
    assert_eq!(
        (&first["output"], &first["error"]),
        (&json!("é 41\n"), &json!("")),
        "{first}"
    );
    assert_eq!(first["execution_count"], 1, "{first}");
    assert_eq!(run("x + 1")["output"], "42\n");
    let failed = run("1 / 0");
    assert!(
        failed["error"]
            .as_str()
            .expect("a text")
            .ends_with("ZeroDivisionError: division by zero\n"),
        "{failed}"
    );
    let endless = json!({ "code": "while True: pass", "timeout_ms": 500 });
    let ended = post(&format!("{session}/execute"), &endless).ok();
    assert_eq!(ended["timed_out"], true, "{ended}");
    assert!(
        ended["error"]
            .as_str()
            .expect("a text")
            .contains("KeyboardInterrupt"),
        "{ended}"
    );
    std::thread::scope(|threads| {
        let sleeping = threads.spawn(|| run("open('begun', 'w').close()\nimport time\ntime.sleep(600)"));
        wait::until("it runs", SOON, || {
            (sandbox.sh("test -e begun").exit_code == 0).then_some(())
        });
        let interrupted = post(&format!("{session}/interrupt"), &Value::Null).ok();
        assert_eq!(interrupted, json!({ "success": true, "status": "idle" }));
        let slept = sleeping.join().expect("an answer");
        assert!(
            slept["error"]
                .as_str()
                .expect("a text")
                .contains("KeyboardInterrupt"),
            "{slept}"
        );
    });
    // More than is kept of a process's output, and all the state is there.
    let much = run("print('x' * 3000000); x");
    assert!(
        much["output"].as_str().expect("a text").ends_with("xxx\n41\n"),
        "{}",
        much["error"]
    );
    sandbox.client().delete(&session).send().ok();
    post(&format!("{session}/execute"), &json!({ "code": "x" })).refused(404, "NOT_FOUND");
    post(&sessions, &json!({ "language": "cobol" })).refused_field("language");
    for (language, code, output) in [
        ("bash", "y=5; echo $((y + 1))", "6\n"),
        ("node", "var y = 5; y + 1", "6\n"),
    ] {
        if sandbox.sh(&format!("command -v {language}")).exit_code != 0 {
            post(&sessions, &json!({ "language": language })).refused_field("language");
            continue;
        }
        let began = post(&sessions, &json!({ "language": language })).ok();
        let id = began["session_id"].as_str().expect("an id");
        let ran = post(&format!("{sessions}/{id}/execute"), &json!({ "code": code })).ok();
        assert_eq!(ran["output"], output, "{ran}");
    }
    sandbox.stop();
}
