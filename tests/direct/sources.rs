//! Rules about the text of the sources.

use std::{fs, path::PathBuf, process::Command};

/// No source file is longer.
const LINES: usize = 800;

/// Where `unsafe` may be: beginnings of paths.
const UNSAFE: [&str; 12] = [
    "crates/daemon/src/handover.rs",
    "crates/netd-common/",
    "netd-ebpf/",
    "netd/src/kernel",
    "netd/src/memory.rs",
    "netd/src/router",
    "netd/src/sockets.rs",
    "controller/src/backend/",
    "sandboxd/src/init.rs",
    "tests/bench/load/sockmap.rs",
    "tests/harness/bpf.rs",
    "tests/harness/node.rs",
];

/// Names that say nothing.
const EMPTY: [&str; 8] = [
    "common", "utils", "util", "helpers", "misc", "types", "models", "mod",
];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Path and text of every source file under version control.
fn sources() -> Vec<(String, String)> {
    let listed = Command::new("git")
        .arg("-C")
        .arg(root())
        .args(["ls-files", "-z", "--", "*.rs", "*.sh", "*.py"])
        .output();
    let listed = listed.ok().filter(|output| output.status.success());
    let paths = match listed {
        Some(output) => String::from_utf8(output.stdout).expect("paths are UTF-8"),
        // An unpacked archive has no history, but the same files.
        None => walk(),
    };
    let read = |path: &str| {
        fs::read_to_string(root().join(path))
            .ok()
            .map(|text| (path.to_owned(), text))
    };
    let sources: Vec<_> = paths
        .split('\0')
        .filter(|path| !path.is_empty())
        .filter_map(read)
        .collect();
    assert!(sources.len() > 50, "only {} sources were found", sources.len());
    sources
}

fn walk() -> String {
    let places = [
        "controller",
        "crates",
        "deploy",
        "fuzz",
        "netd",
        "netd-ebpf",
        "sandboxd",
        "tests",
        "tunnel-proxy",
    ];
    let mut open: Vec<PathBuf> = places.iter().map(PathBuf::from).collect();
    let mut paths = String::new();
    while let Some(path) = open.pop() {
        if let Ok(entries) = fs::read_dir(root().join(&path)) {
            open.extend(
                entries
                    .filter_map(Result::ok)
                    .map(|entry| path.join(entry.file_name())),
            );
        } else if path
            .extension()
            .is_some_and(|end| end == "rs" || end == "sh" || end == "py")
        {
            paths.push_str(&format!("{}\0", path.display()));
        }
    }
    paths
}

fn rust() -> impl Iterator<Item = (String, String)> {
    sources().into_iter().filter(|(path, _)| path.ends_with(".rs"))
}

#[test]
fn no_file_is_too_long() {
    let long: Vec<_> = sources()
        .into_iter()
        .map(|(path, text)| (path, text.lines().count()))
        .filter(|(_, lines)| *lines > LINES)
        .collect();
    assert!(long.is_empty(), "longer than {LINES} lines: {long:?}");
}

#[test]
fn lints_are_excepted_with_a_reason_or_not_at_all() {
    // Not written in one piece, or this file would find itself.
    let (bare, inner) = (concat!("#[", "allow("), concat!("#![", "allow("));
    for (path, text) in rust() {
        assert!(
            !text.contains(bare) && !text.contains(inner),
            "{path}: use #[expect(…, reason = …)]"
        );
    }
}

#[test]
fn modules_are_named_for_what_they_hold() {
    for (path, _) in rust() {
        let parts: Vec<&str> = path.trim_end_matches(".rs").split('/').collect();
        let empty = parts.iter().find(|part| EMPTY.contains(part));
        assert!(
            empty.is_none(),
            "{path}: `{}` says nothing",
            empty.expect("checked")
        );
    }
}

#[test]
fn unsafe_code_is_where_it_is_expected_and_says_why_it_is_sound() {
    let keyword = concat!("unsafe", " {");
    for (path, text) in rust() {
        if !text.contains(keyword) {
            continue;
        }
        assert!(
            UNSAFE.iter().any(|place| path.starts_with(place)),
            "{path} has unsafe code"
        );
        let lines: Vec<&str> = text.lines().collect();
        for (number, line) in lines
            .iter()
            .enumerate()
            .filter(|(_, line)| line.contains(keyword))
        {
            let before = lines[number.saturating_sub(8)..=number]
                .iter()
                .any(|line| line.contains("SAFETY:"));
            assert!(before, "{path}:{}: no SAFETY comment before {line}", number + 1);
        }
    }
}

#[test]
fn every_module_says_what_it_owns() {
    for (path, text) in rust() {
        let documented = text
            .lines()
            .find(|line| !line.is_empty() && !line.starts_with("#!["))
            .is_some_and(|line| line.starts_with("//!"));
        // Tests of one file stand beside it and need no introduction.
        assert!(
            documented || path.ends_with("/tests.rs"),
            "{path} begins without a module comment"
        );
    }
}

#[test]
fn nothing_is_left_unfinished() {
    let words = [
        concat!("TO", "DO"),
        concat!("FIX", "ME"),
        concat!("XX", "X:"),
        concat!("unimplemented", "!("),
        concat!("to", "do!("),
    ];
    for (path, text) in sources() {
        for word in words {
            assert!(!text.contains(word), "{path} contains {word}");
        }
    }
}
