//! A sandbox's files through the API: every verb, long ones, and ways out.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::Shutdown,
    time::Duration,
};

use harness::node::Process;
use serde_json::{Value, json};

use crate::machine::Machine;

/// Longest wait for what happens at once.
const SOON: Duration = Duration::from_secs(60);

/// Long enough that no program may hold it.
const LONG: usize = 1024 * 1024 * 1024;

/// How much more memory the controller may take while it passes such a file on, in KiB.
const ROOM: u64 = 64 * 1024;

pub(crate) fn files_are_moved_copied_found_and_removed(machine: &Machine) {
    let sandbox = machine.organization.sandbox(&json!({ "disk": "64Mi" }));
    let client = sandbox.client();
    let post = |verb: &str, body: Value| {
        client
            .post(&sandbox.path(&format!("/files/{verb}")))
            .json(&body)
            .send()
    };
    sandbox.write("/workspace/src/a.py", "print(1)");
    assert_eq!(
        post("mkdir", json!({ "path": "/workspace/x/y", "recursive": true })).ok()["success"],
        true
    );
    let copy = json!({ "source": "/workspace/src", "destination": "/workspace/x/y/src" });
    assert_eq!(post("copy", copy.clone()).ok()["success"], true);
    post("copy", copy).refused(409, "CONFLICT");
    let into = json!({ "source": "/workspace/src/a.py", "destination": "/tmp/other/b.py" });
    // From one file system to another.
    assert_eq!(post("move", into).ok()["success"], true);
    assert_eq!(sandbox.read("/tmp/other/b.py"), b"print(1)");
    sandbox.sh_ok("ln -s y/src /workspace/x/link");
    let found = post("glob", json!({ "pattern": "**/*.py" })).ok();
    let paths: Vec<&Value> = found["files"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|file| &file["path"])
        .collect();
    assert_eq!(paths, [&json!("/workspace/x/y/src/a.py")]);
    let list = client
        .get(&sandbox.path("/files/list?path=/workspace/x"))
        .send()
        .ok();
    assert_eq!(list["files"][0]["target"], "y/src", "{list}");
    post(
        "move",
        json!({ "source": "/workspace/absent", "destination": "/workspace/b" }),
    )
    .refused(404, "FILE_NOT_FOUND");
    let delete = |body: Value| client.delete(&sandbox.path("/files")).json(&body).send();
    delete(json!({ "path": "/workspace/x", "recursive": false })).refused(409, "CONFLICT");
    assert_eq!(
        delete(json!({ "path": "/workspace/x", "recursive": true })).ok()["success"],
        true
    );
    delete(json!({ "path": "/workspace/x", "recursive": true })).refused(404, "FILE_NOT_FOUND");
    delete(json!({ "path": "/usr/bin/env", "recursive": false })).refused(403, "FORBIDDEN");
    // A full disk is told as such, and leaves the old file.
    sandbox.write("/workspace/old", "old");
    let put = client
        .put(&sandbox.path("/files/raw?path=/workspace/old"))
        .raw(vec![0; 100 << 20])
        .send();
    let refused = put.refused(409, "CONFLICT");
    assert!(refused.to_string().contains("disk of 64Mi is full"), "{refused}");
    assert_eq!(sandbox.read("/workspace/old"), b"old");
    sandbox.stop();
}

pub(crate) fn no_path_shows_what_is_the_agents(machine: &Machine) {
    let sandbox = machine.organization.sandbox(&json!({}));
    sandbox.sh_ok(
        "cd /workspace && ln -s /proc/1/environ environ && ln -s /proc/self/mem mem && ln -s /proc/1/root root \
         && ln -s /proc/self/fd fd && mkfifo pipe && ln -s /dev/zero zero && ln -s /etc/passwd passwd",
    );
    let client = sandbox.client();
    for path in [
        "/workspace/environ",
        "/workspace/mem",
        "/workspace/root/etc/passwd",
        "/workspace/fd/0",
        "/workspace/pipe",
        "/workspace/zero",
        "/proc/1/environ",
        "/proc/self/maps",
        "/proc/thread-self/status",
        "/proc/kcore",
        "/dev/fd/1",
    ] {
        for verb in ["/files", "/files/raw", "/files/download"] {
            let answer = client.get(&sandbox.path(&format!("{verb}?path={path}"))).send();
            assert!(answer.status.is_client_error(), "{verb} {path}: {answer:?}");
        }
        let put = client
            .put(&sandbox.path(&format!("/files/raw?path={path}")))
            .raw("x")
            .send();
        assert!(put.status.is_client_error(), "{path}: {put:?}");
        let list = client
            .get(&sandbox.path(&format!("/files/list?path={path}")))
            .send();
        assert!(list.status.is_client_error(), "{path}: {list:?}");
    }
    // What is the sandbox's own stays to be had, through links, too.
    assert!(String::from_utf8_lossy(&sandbox.read("/workspace/passwd")).contains("root:"));
    sandbox.stop();
}

/// The most memory a process had so far, in KiB.
fn peak(process: &Process) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", process.pid)).expect("it runs");
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .expect("a peak");
    let number = line.trim().strip_suffix(" kB").expect("in kB");
    number.parse().expect("a number")
}

pub(crate) fn a_long_file_goes_in_and_out_at_constant_memory(machine: &Machine) {
    let sandbox = machine
        .organization
        .sandbox(&json!({ "disk": "1280Mi", "memory": "128Mi" }));
    let controller = machine.node.controller().expect("a controller");
    // What an ordinary transfer takes is there before.
    sandbox.write("/workspace/warm", vec![1; 1 << 20]);
    let before = peak(&controller);
    let head = |request: &str, more: &str| {
        format!(
            "{request} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nConnection: close\r\n{more}\r\n",
            machine.organization.key
        )
    };
    let raw = format!("/api/v1{}", sandbox.path("/files/raw?path=/workspace/long"));
    let mut stream = sandbox.client().connect().expect("the API listens");
    let length = format!("Content-Length: {LONG}\r\n");
    stream
        .write_all(head(&format!("PUT {raw}"), &length).as_bytes())
        .expect("sent");
    let part: Vec<u8> = (0..=255).cycle().take(1 << 20).collect();
    for _ in 0..LONG / part.len() {
        stream.write_all(&part).expect("sent");
    }
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert_eq!(sandbox.sh_ok("stat -c %s /workspace/long"), LONG.to_string());
    let mut stream = sandbox.client().connect().expect("the API listens");
    stream
        .write_all(head(&format!("GET {raw}"), "").as_bytes())
        .expect("sent");
    let (mut room, mut received) = (vec![0; 1 << 20], 0);
    loop {
        let read = stream.read(&mut room).expect("it goes on");
        if read == 0 {
            break;
        }
        received += read;
    }
    assert!((LONG..LONG + 4096).contains(&received), "{received} bytes");
    let after = peak(&controller);
    assert!(
        after < before + ROOM,
        "the controller's {before} KiB became {after} KiB"
    );
    // One range, and what breaks off on its way in.
    let get = sandbox
        .client()
        .get(&sandbox.path("/files/raw?path=/workspace/long"));
    let range = get.header("range", "bytes=65535-65537").send();
    assert_eq!(
        (range.status.as_u16(), range.body.as_ref()),
        (206, &[255, 0, 1][..])
    );
    assert_eq!(
        range.headers["content-range"],
        format!("bytes 65535-65537/{LONG}").as_str()
    );
    let get = sandbox
        .client()
        .get(&sandbox.path("/files/raw?path=/workspace/long"));
    let beyond = get.header("range", &format!("bytes={LONG}-")).send();
    beyond.refused(416, "RANGE_NOT_SATISFIABLE");
    let mut stream = sandbox.client().connect().expect("the API listens");
    let put = format!(
        "PUT /api/v1{}",
        sandbox.path("/files/raw?path=/workspace/broken/off")
    );
    stream
        .write_all(head(&put, "Content-Length: 1000000\r\n").as_bytes())
        .expect("sent");
    stream.write_all(&part[..500_000]).expect("sent");
    harness::wait::until("the file is begun", SOON, || {
        (sandbox.sh("ls -A /workspace/broken | grep -q .").exit_code == 0).then_some(())
    });
    assert_ne!(sandbox.sh("test -e /workspace/broken/off").exit_code, 0);
    stream.shutdown(Shutdown::Both).expect("gone");
    harness::wait::until("what was begun is gone", SOON, || {
        (sandbox.sh_ok("ls -A /workspace/broken").is_empty()).then_some(())
    });
    sandbox.stop();
}

pub(crate) fn a_form_is_stored_and_a_directory_followed(machine: &Machine) {
    let sandbox = machine.organization.sandbox(&json!({}));
    let client = sandbox.client();
    let mut events = client
        .get(&sandbox.path("/files/watch?path=/workspace"))
        .events()
        .expect("a stream");
    assert_eq!(
        events.next(SOON),
        Some(json!({ "type": "watching", "path": "/workspace", "partly": false }))
    );
    let form = "--b\r\nContent-Disposition: form-data; name=\"f\"; filename=\"one.txt\"\r\n\r\n1\r\n\
                --b\r\nContent-Disposition: form-data; name=\"f\"; filename=\"d/two.txt\"\r\n\r\n22\r\n--b--\r\n";
    let upload = client
        .post(&sandbox.path("/files/upload?path=/workspace/in"))
        .header("content-type", "multipart/form-data; boundary=b")
        .raw(form)
        .send()
        .ok();
    let expected = json!([
        { "path": "/workspace/in/one.txt", "size": 1 }, { "path": "/workspace/in/d/two.txt", "size": 2 }
    ]);
    assert_eq!(upload["files"], expected);
    let created = json!({ "type": "created", "path": "/workspace/in/d/two.txt", "directory": false });
    let mut heard = Vec::new();
    while !heard.contains(&created) {
        heard.push(
            events
                .next(SOON)
                .unwrap_or_else(|| panic!("it ended after {heard:?}")),
        );
    }
    sandbox.stop();
    let rest = events.rest(SOON);
    assert_eq!(rest.last(), Some(&json!({ "type": "done" })), "{rest:?}");
}
