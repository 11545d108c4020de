//! What code inside can see and do.

use crate::world::{World, can_run, process_of};
use controller::{agent::AgentError, backend::LaunchSpec};
use sandgate_api::agent::AgentErrorCode;

#[tokio::test(flavor = "multi_thread")]
async fn what_runs_inside_can_do_nothing_it_should_not() {
    if !can_run() {
        return;
    }
    let world = World::open().await;
    let spec = world.spec();
    world.start(&spec).await;
    // Each line prints what it found; the right column is what it must find.
    let facts = [
        ("grep CapEff /proc/self/status | cut -f2", "0000000000000000"),
        ("grep CapBnd /proc/self/status | cut -f2", "0000000000000000"),
        ("grep NoNewPrivs /proc/self/status | cut -f2", "1"),
        ("grep ^Seccomp: /proc/self/status | cut -f2", "2"),
        ("grep SigIgn /proc/self/status | cut -f2", "0000000000000000"),
        ("grep SigBlk /proc/self/status | cut -f2", "0000000000000000"),
        (
            "touch /x 2>&1 | grep -o 'Read-only file system'",
            "Read-only file system",
        ),
        (
            "touch /etc/hosts 2>&1 | grep -o 'Read-only file system\\|Permission denied'",
            "Permission denied",
        ),
        (
            "unshare -U true 2>&1 | grep -o 'Operation not permitted'",
            "Operation not permitted",
        ),
        (
            "unshare -n true 2>&1 | grep -o 'Operation not permitted'",
            "Operation not permitted",
        ),
        (
            "mount -t tmpfs x /tmp 2>&1 | grep -o 'permission denied\\|must be superuser\\|not permitted'",
            "must be superuser",
        ),
        (
            "sh -c 'echo 1 > /proc/sys/kernel/hostname' 2>&1 | grep -o 'Read-only file system\\|Permission denied'",
            "Read-only file system",
        ),
        ("head -c1 /proc/kcore | wc -c", "0"),
        ("cat /proc/interrupts | wc -c", "0"),
        ("stat -c %u:%g /workspace", "1001:1001"),
        ("stat -c %a /tmp", "1777"),
        ("id -u; id -g; id -G | tr -d '\\n'", "1001\n1001\n1001"),
        ("cat /proc/self/uid_map | tr -s ' ' | cut -d' ' -f2,4", "0 65536"),
        (
            "exec python3 -c 'import os\nprint(sorted(open(f\"/proc/{p}/comm\").read() for p in os.listdir(\"/proc\") if p.isdigit()))'",
            "['python3\\n', 'sandboxd\\n']",
        ),
        ("ls -A /sys", ""),
        ("cat /proc/1/comm", "sandboxd"),
        ("readlink /proc/self/fd/0", "/dev/null"),
        ("hostname", spec.sandbox_id.as_str()),
        (
            "ls /dev | tr '\\n' ' '",
            "fd full null ptmx pts random shm stderr stdin stdout tty urandom zero ",
        ),
        ("ulimit -c", "0"),
        ("grep ^Groups /proc/self/status | tr -d '\\t '", "Groups:"),
        ("su -c id root < /dev/null > /dev/null 2>&1; echo $?", "1"),
        (
            "python3 -c 'import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW)' 2>&1 | tail -1",
            "PermissionError: [Errno 1] Operation not permitted",
        ),
        (
            "python3 -c 'import socket; socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)' 2>&1 | tail -1",
            "PermissionError: [Errno 1] Operation not permitted",
        ),
        (
            "python3 -c 'import socket; socket.socket(socket.AF_VSOCK)' 2>&1 | tail -1",
            "PermissionError: [Errno 1] Operation not permitted",
        ),
        // keyctl(KEYCTL_GET_KEYRING_ID), bpf, perf_event_open, userfaultfd, and clone3 on x86-64.
        (
            "python3 -c 'import ctypes; c = ctypes.CDLL(None, use_errno=True)\nfor n in (250, 321, 298, 323, 435): print(c.syscall(n, 0, 0, 0, 0, 0), ctypes.get_errno())'",
            "-1 1\n-1 1\n-1 1\n-1 1\n-1 38",
        ),
        // clone(CLONE_NEWUSER | SIGCHLD)
        (
            "python3 -c 'import ctypes; c = ctypes.CDLL(None, use_errno=True); print(c.syscall(56, 0x10000011, 0, 0, 0, 0), ctypes.get_errno())'",
            "-1 1",
        ),
        (
            "ip -o link 2>/dev/null | wc -l; cat /proc/net/dev | grep -c eth0",
            "0\n1",
        ),
        (
            "cat /proc/sys/net/ipv6/conf/all/disable_ipv6 2>/dev/null || echo 1",
            "1",
        ),
    ];
    let mut wrong = Vec::new();
    for (line, expected) in facts {
        let outcome = world.sh(&spec, line).await;
        if outcome.stdout.trim_end() != expected.trim_end() {
            wrong.push(format!("{line}\n  gives {outcome:?}\n  instead of {expected:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // The agent has no more rights than the code it serves.
    let denied = |error: AgentError| {
        matches!(
            error,
            AgentError::Refused {
                code: AgentErrorCode::PermissionDenied,
                ..
            }
        )
    };
    for path in ["/x", "/etc/hosts", "/usr/lib/sandgate/sandboxd"] {
        let written = world
            .agent(&spec)
            .await
            .write_file(path, None, vec![0].into())
            .await;
        assert!(denied(written.unwrap_err()), "{path} was written");
    }
    for path in ["/etc/shadow", "/proc/1/environ"] {
        assert!(
            denied(
                world
                    .agent(&spec)
                    .await
                    .read_file(path, 1 << 20)
                    .await
                    .unwrap_err()
            ),
            "{path} was read"
        );
    }
    world.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_key_is_nowhere_to_be_found() {
    if !can_run() {
        return;
    }
    let world = World::open().await;
    let spec = world.spec();
    let (_, _) = world.start(&spec).await;
    let unreadable = "for f in environ mem maps auxv fd/0; do \
        head -c 1 /proc/1/$f > /dev/null 2>&1 && echo readable $f; done; \
        ls /proc/1/cwd/ /proc/1/map_files > /dev/null 2>&1 && echo readable folders; \
        ls /proc/1/fd > /dev/null 2>&1 && echo readable fd; \
        tr '\\0' ' ' < /proc/1/cmdline; env | grep -i key; \
        python3 -c 'import ctypes; c = ctypes.CDLL(None, use_errno=True); print(c.ptrace(16, 1, 0, 0), ctypes.get_errno())'";
    let outcome = world.sh(&spec, unreadable).await;
    assert_eq!(
        outcome.stdout, "/usr/lib/sandgate/sandboxd -1 1\n",
        "{}",
        outcome.stderr
    );
    // And from the node, which may read everything: the agent keeps a digest only.
    let process = process_of(&world, &spec);
    let key = spec.agent_key.as_bytes();
    assert!(!memory_holds(process, key), "the key is in the agent's memory");
    assert!(
        memory_holds(process, b"sandboxd"),
        "the search finds nothing at all"
    );
    let on_disk = std::process::Command::new("grep")
        .args(["-r", "-l", &spec.agent_key])
        .arg(&world.config.run_dir)
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&on_disk.stdout), "");
    // Wrong keys are turned away.
    let stranger = LaunchSpec {
        agent_key: "0".repeat(64),
        ..spec.clone()
    };
    let refused = world.agent(&stranger).await.ping().await;
    assert!(
        matches!(
            &refused,
            Err(AgentError::Refused {
                code: AgentErrorCode::Unauthorized,
                ..
            })
        ),
        "{refused:?}"
    );
    world.agent(&spec).await.ping().await.unwrap();
    world.close().await;
}

/// Whether a process's writable memory holds some bytes.
fn memory_holds(process: i32, wanted: &[u8]) -> bool {
    use std::io::{Read as _, Seek as _};
    let maps = std::fs::read_to_string(format!("/proc/{process}/maps")).unwrap();
    let mut memory = std::fs::File::open(format!("/proc/{process}/mem")).unwrap();
    maps.lines().filter(|line| !line.contains("[v")).any(|line| {
        let (range, _) = line.split_once(' ').unwrap();
        let (first, last) = range.split_once('-').unwrap();
        let (first, last) = (
            u64::from_str_radix(first, 16).unwrap(),
            u64::from_str_radix(last, 16).unwrap(),
        );
        let mut bytes = Vec::new();
        memory.seek(std::io::SeekFrom::Start(first)).unwrap();
        let _partly = (&mut memory).take(last - first).read_to_end(&mut bytes);
        bytes.windows(wanted.len()).any(|window| window == wanted)
    })
}
