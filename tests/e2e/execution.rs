//! Commands and files in a sandbox, and the limits around them.

use std::time::Duration;

use harness::wait;
use serde_json::json;

use crate::machine::Machine;

/// Longest wait for what happens at once.
const SOON: Duration = Duration::from_secs(60);

pub(crate) fn a_stream_brings_output_as_it_comes_and_ends_with_done(machine: &Machine) {
    let sandbox = machine.organization.sandbox(&json!({}));
    // It goes on when the first line has been seen, and not before.
    let command = "echo one; while [ ! -e seen ]; do sleep 0.05; done; echo two >&2; printf 'a\\342\\200\\250b\\n'; exit 7";
    let call = sandbox
        .client()
        .post(&sandbox.path("/execute"))
        .json(&json!({ "command": command, "stream": true }));
    let mut events = call.events().expect("an event stream");
    assert_eq!(
        events.next(SOON),
        Some(json!({ "type": "stdout", "data": "one\n" }))
    );
    sandbox.write("/workspace/seen", "");
    let rest = events.rest(SOON);
    let kinds: Vec<_> = rest
        .iter()
        .map(|event| event["type"].as_str().unwrap_or("?"))
        .collect();
    assert!(kinds.ends_with(&["exit", "done"]), "{rest:?}");
    assert!(
        rest.contains(&json!({ "type": "stderr", "data": "two\n" })),
        "{rest:?}"
    );
    assert!(
        rest.contains(&json!({ "type": "stdout", "data": "a\u{2028}b\n" })),
        "{rest:?}"
    );
    assert!(
        rest.iter()
            .any(|event| event["type"] == "exit" && event["code"] == 7),
        "{rest:?}"
    );
    sandbox.stop();
}

pub(crate) fn a_disconnect_cancels_the_command(machine: &Machine) {
    let sandbox = machine.organization.sandbox(&json!({}));
    let running = |marker: &str| {
        sandbox
            .sh(&format!("pgrep -f '[{}]{}'", &marker[..1], &marker[1..]))
            .exit_code
            == 0
    };
    let has_pgrep = sandbox.sh("command -v pgrep").exit_code == 0;
    let processes = |marker: &str| {
        let all = machine.node.processes_of(&sandbox.id);
        all.iter()
            .filter(|process| process.command.iter().any(|part| part == marker))
            .count()
    };
    // Streamed, then buffered: both end with their client.
    let body = json!({ "command": "(setsid sleep 4321 &) ; sleep 4321", "stream": true });
    let events = sandbox
        .client()
        .post(&sandbox.path("/execute"))
        .json(&body)
        .events()
        .expect("a stream");
    wait::until("the command runs", SOON, || {
        (processes("4321") == 2).then_some(())
    });
    drop(events);
    wait::until("the streamed command is cancelled", SOON, || {
        (processes("4321") == 0).then_some(())
    });

    let mut stream = sandbox.client().connect().expect("the API listens");
    let body = json!({ "command": "sleep 5432" }).to_string();
    let head = format!(
        "POST /api/v1{} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        sandbox.path("/execute"),
        machine.organization.key,
        body.len(),
    );
    std::io::Write::write_all(&mut stream, head.as_bytes()).expect("sent");
    wait::until("the command runs", SOON, || (processes("5432") > 0).then_some(()));
    drop(stream);
    wait::until("the buffered command is cancelled", SOON, || {
        (processes("5432") == 0).then_some(())
    });
    assert!(!has_pgrep || !running("5432"));
    sandbox.stop();
}

pub(crate) fn a_command_out_of_time_is_ended_with_everything_it_started(machine: &Machine) {
    let sandbox = machine.organization.sandbox(&json!({}));
    let output = sandbox
        .execute(&json!({ "command": "echo before; sleep 6543 & sleep 6543; echo after", "timeout": 3_000 }));
    assert_eq!(output.exit_code, 124, "{output:?}");
    assert_eq!(output.answer["timed_out"], true, "{output:?}");
    assert_eq!(output.stdout, "before\n");
    wait::until("its child is gone", SOON, || {
        let all = machine.node.processes_of(&sandbox.id);
        (!all
            .iter()
            .any(|process| process.command.iter().any(|part| part == "6543")))
        .then_some(())
    });
    sandbox.stop();
}

pub(crate) fn exit_codes_are_real(machine: &Machine) {
    let sandbox = machine
        .organization
        .sandbox(&json!({ "env": { "A": "sandbox", "B": "sandbox" } }));
    for (command, code) in [
        ("exit 3", 3),
        ("kill -9 $$", 137),
        ("no-such-program-at-all", 127),
        ("true", 0),
    ] {
        assert_eq!(sandbox.sh(command).exit_code, code, "{command}");
    }
    let argv = sandbox.execute(&json!({ "command": ["printf", "%s|", "a b", "$HOME", "*"] }));
    assert_eq!(argv.stdout, "a b|$HOME|*|");
    let placed = sandbox.execute(&json!({ "command": "pwd; echo $A $B $C", "working_dir": "/tmp", "env": { "B": "call", "C": "call" } }));
    assert_eq!(placed.stdout, "/tmp\nsandbox call call\n");
    assert_eq!(sandbox.sh_ok("pwd"), "/workspace");
    let line = "mkdir -p made; echo abc > made/file; echo kept > /tmp/elsewhere";
    let tracked = sandbox.execute(&json!({ "command": line, "track_files": true }));
    let change = json!([{ "path": "/workspace/made/file", "action": "created", "size_bytes": 4 }]);
    assert_eq!(tracked.answer["files_changed"], change, "{tracked:?}");
    assert_eq!(tracked.answer["files_changed_truncated"], false);
    assert!(tracked.answer["duration_ms"].is_u64(), "{tracked:?}");
    // Orphans are reaped by the first process, and output is bounded.
    sandbox.sh_ok("for i in 1 2 3 4 5; do (setsid sh -c 'exit 0' &); done");
    wait::until("orphans are reaped", SOON, || {
        let zombies = sandbox.sh_ok("cat /proc/[0-9]*/stat | awk '$3 == \"Z\"' | wc -l");
        (zombies == "0").then_some(())
    });
    let flood = sandbox.sh("head -c 50000000 /dev/zero | tr '\\0' x");
    assert_eq!(
        flood.answer["output_truncated"],
        true,
        "{} bytes came",
        flood.stdout.len()
    );
    let binary = sandbox.sh("printf '\\377\\376ok'");
    assert!(binary.stdout.ends_with("ok"), "{:?}", binary.stdout);
    sandbox.stop();
}

pub(crate) fn files_of_any_bytes_survive_the_way(machine: &Machine) {
    let sandbox = machine.organization.sandbox(&json!({}));
    let bytes: Vec<u8> = (0..=255).cycle().take(3_000_000).collect();
    sandbox.write("/workspace/deep/er/bytes", &bytes);
    assert!(
        sandbox.read("/workspace/deep/er/bytes") == bytes,
        "the file changed on its way"
    );
    assert_eq!(sandbox.sh_ok("stat -c %s /workspace/deep/er/bytes"), "3000000");
    sandbox.write("/workspace/empty", "");
    assert_eq!(sandbox.read("/workspace/empty"), b"");
    // Base64 as a command line writes it, with line ends.
    let wrapped = json!({ "files": [{ "path": "/workspace/wrapped", "content": "aGVs\nbG8=\n" }] });
    sandbox
        .client()
        .post(&sandbox.path("/files"))
        .json(&wrapped)
        .send()
        .ok();
    assert_eq!(sandbox.read("/workspace/wrapped"), b"hello");
    let get = |path: &str| {
        sandbox
            .client()
            .get(&sandbox.path(&format!("/files?path={path}")))
            .send()
    };
    get("/workspace/missing").refused(404, "FILE_NOT_FOUND");
    let directory = get("/workspace/deep");
    assert!(directory.status.is_client_error(), "{directory:?}");
    // A name that leads out leads to what the sandbox itself could read, never to the node's files.
    sandbox.sh_ok("ln -s /etc/passwd /workspace/link");
    assert!(String::from_utf8_lossy(&sandbox.read("/workspace/link")).contains("root:"));
    let recursive = sandbox
        .client()
        .get(&sandbox.path("/files/list?path=/workspace&recursive=true"))
        .send()
        .ok();
    let entries = recursive["files"].as_array().expect("a list");
    let file = entries
        .iter()
        .find(|entry| entry["path"] == "/workspace/deep/er/bytes");
    let file = file.unwrap_or_else(|| panic!("not listed: {recursive}"));
    assert_eq!(
        (&file["type"], &file["size"]),
        (&json!("file"), &json!(3_000_000))
    );
    assert!(file["modified_at"].is_string(), "{file}");
    sandbox.stop();
}

pub(crate) fn the_sandbox_is_locked_down(machine: &Machine) {
    let sandbox = machine.organization.sandbox(&json!({}));
    assert_eq!(sandbox.sh_ok("id -u"), "1001");
    let status = sandbox.sh_ok("cat /proc/self/status");
    let field = |name: &str| {
        status
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .unwrap_or("missing")
            .trim()
            .to_owned()
    };
    for capabilities in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        assert_eq!(field(capabilities), "0000000000000000", "{capabilities}");
    }
    assert_eq!(
        (field("NoNewPrivs:"), field("Seccomp:")),
        ("1".to_owned(), "2".to_owned())
    );
    for (command, why) in [
        ("touch /x", "Read-only"),
        ("touch /usr/bin/x", "Read-only"),
        ("unshare -U true", "Operation not permitted"),
        ("echo 1 > /proc/sys/kernel/panic", "Read-only"),
        ("mount -t tmpfs none /tmp", ""),
        ("cat /proc/kcore | head -c 1 | grep -q .", ""),
    ] {
        let output = sandbox.sh(command);
        assert!(
            output.exit_code != 0 && output.stderr.contains(why),
            "{command}: {output:?}"
        );
    }
    sandbox.sh_ok("touch /workspace/a /tmp/b && echo x > /dev/null");
    let first = sandbox.sh_ok("tr '\\0' ' ' < /proc/1/cmdline");
    assert!(first.contains("sandboxd"), "{first}");
    assert_ne!(
        sandbox.sh("cat /proc/1/environ").exit_code,
        0,
        "the first process can be read"
    );
    assert_ne!(sandbox.sh("kill -9 1; kill -0 1 && exit 5").exit_code, 0);
    assert_eq!(sandbox.status(), "running");
    // Every sandbox has users of its own: the node sees another number.
    let uid = machine
        .node
        .processes_of(&sandbox.id)
        .into_iter()
        .filter_map(|process| {
            let status = std::fs::read_to_string(format!("/proc/{}/status", process.pid)).ok()?;
            status.lines().find_map(|line| {
                line.strip_prefix("Uid:")?
                    .split_whitespace()
                    .next()?
                    .parse::<u32>()
                    .ok()
            })
        });
    assert!(
        uid.min().is_some_and(|lowest| lowest > 65_535),
        "it runs as a user of the node"
    );
    let other = machine.organization.sandbox(&json!({}));
    let seen = other
        .sh_ok("ls /proc | grep -c '^[0-9]'")
        .parse::<u32>()
        .expect("a number");
    assert!(seen < 10, "{seen} processes are visible");
    other.stop();
    sandbox.stop();
}

pub(crate) fn limits_bite_inside_and_only_there(machine: &Machine) {
    let body = json!({ "memory": "256Mi", "cpus": "500m", "pids": 64, "disk": "64Mi" });
    let sandbox = machine.organization.sandbox(&body);
    let hog = sandbox.sh("python3 -c 'x = bytearray(600 << 20); print(len(x))'");
    assert_ne!(hog.exit_code, 0, "{hog:?}");
    assert_eq!(sandbox.status(), "running", "the hog took the sandbox with it");
    let forks = "python3 -c '
import os, signal
made = []
try:
    while len(made) < 300:
        child = os.fork()
        if child == 0:
            signal.pause()
        made.append(child)
except OSError as error:
    print(len(made), error.errno)
for child in made:
    os.kill(child, signal.SIGKILL)
    os.wait()
'";
    let forks = sandbox.sh_ok(forks);
    let (made, errno) = forks
        .split_once(' ')
        .unwrap_or_else(|| panic!("no limit: {forks}"));
    assert!(
        made.parse::<u32>().is_ok_and(|made| made < 64) && errno == "11",
        "{forks}"
    );
    let fill = sandbox.sh("dd if=/dev/zero of=/workspace/fill bs=1M count=200");
    assert!(
        fill.exit_code != 0 && fill.stderr.contains("No space left"),
        "{fill:?}"
    );
    sandbox.sh_ok("rm /workspace/fill && echo ok > /workspace/again");
    let spin = "python3 -c '
import time
end, start = time.monotonic() + 2, time.process_time()
while time.monotonic() < end: pass
print((time.process_time() - start) / 2)
'";
    let share: f64 = sandbox.sh_ok(spin).parse().expect("a number");
    assert!(share < 0.7, "it got {share} of a processor instead of a half");
    sandbox.stop();
}

pub(crate) fn full_disks_harm_nobody_else(machine: &Machine) {
    let body = json!({ "disk": "64Mi" });
    let sandboxes: Vec<_> = (0..4).map(|_| machine.organization.sandbox(&body)).collect();
    // All at once, while every call is written to the database.
    let fill = json!({ "command": "cat /dev/zero > /workspace/fill; cat /dev/zero > /tmp/fill; df /workspace | tail -1" });
    std::thread::scope(|scope| {
        for sandbox in &sandboxes {
            scope.spawn(|| {
                let full = sandbox.execute(&fill);
                assert!(full.stderr.contains("No space left"), "{full:?}");
            });
        }
        for index in 0..20 {
            let policy = json!({ "mode": "denylist", "denied_domains": [format!("n{index}.test")] });
            machine.organization.set_egress(&policy);
        }
    });
    machine.organization.set_egress(&json!({ "mode": "allow_all" }));
    for sandbox in &sandboxes {
        assert_eq!(sandbox.status(), "running");
        sandbox.sh_ok("rm /workspace/fill && echo fine > /workspace/again && cat /workspace/again");
        sandbox.stop();
    }
    // A promise that the machine cannot keep is refused, not made.
    let refused = machine
        .organization
        .client
        .post("/sandbox/create")
        .json(&json!({ "disk": "900Gi" }))
        .send();
    refused.refused(409, "CONFLICT");
}
