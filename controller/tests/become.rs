//! What is left to a child that becomes another user. Needs root.

#![expect(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test fails by panicking and says why"
)]

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    process::{Command, Output},
};

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    let required = std::env::var_os("REQUIRE_ROOT").is_some_and(|value| value != "0");
    assert!(root || !required, "REQUIRE_ROOT is set, and this is not root");
    if !root {
        eprintln!("skipped: not root");
    }
    root
}

fn become_with(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_controller"))
        .args(["become", "--parent", &std::process::id().to_string()])
        .args(arguments)
        .output()
        .unwrap()
}

#[test]
fn another_user_has_no_capability_no_group_and_no_way_back() {
    if !is_root() {
        return;
    }
    // Below a directory that only root may enter, as a checkout in /root is.
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o700)).unwrap();
    let program = directory.path().join("cat");
    fs::copy("/bin/cat", &program).unwrap();
    let program = program.to_str().unwrap();
    let output = become_with(&["--user", "60742", "--", program, "/proc/self/status"]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{output:?}");
    let line = |name: &str| {
        let found = text.lines().find_map(|line| line.strip_prefix(name));
        found
            .unwrap_or_else(|| panic!("{name}: {text}"))
            .split_whitespace()
            .collect::<Vec<_>>()
    };
    assert_eq!(line("Uid:"), ["60742"; 4]);
    assert_eq!(line("Gid:"), ["60742"; 4]);
    assert_eq!(line("Groups:"), [""; 0]);
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        assert_eq!(line(set), ["0000000000000000"], "{set}");
    }
    assert_eq!(line("NoNewPrivs:"), ["1"]);
}

#[test]
fn nobody_becomes_root_this_way_and_a_lost_parent_is_noticed() {
    if !is_root() {
        return;
    }
    let output = become_with(&["--user", "0", "--", "/bin/true"]);
    assert!(!output.status.success(), "{output:?}");
    let output = Command::new(env!("CARGO_BIN_EXE_controller"))
        .args(["become", "--parent", "1", "--", "/bin/true"])
        .output()
        .unwrap();
    assert!(!output.status.success(), "{output:?}");
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("parent is gone"),
        "{output:?}"
    );
}
