//! Children that are real processes.

use std::{fs, path::Path};

use super::*;

/// A child that runs a line of shell. `become` is played by a script that leaves its own arguments out:
/// the death signal needs the real program, and is tested with it.
fn child(directory: &Path, line: &str) -> Child {
    let become_script = directory.join("become");
    fs::write(&become_script, "#!/bin/sh\nshift 4\nexec \"$@\"\n").expect("written");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(&become_script, mode).expect("executable");
    Child {
        name: "test",
        supervisor: become_script,
        program: PathBuf::from("/bin/sh"),
        arguments: vec!["-c".to_owned(), line.to_owned()],
        descriptors: Vec::new(),
        variables: vec![
            ("SANDGATE_TEST_DIRECTORY", directory.display().to_string()),
            ("SANDGATE_TEST_SECRET", "secret".to_owned()),
            ("SANDGATE_TEST_EMPTY", String::new()),
        ],
        inherits: |name| name != "HOME" && name != "SANDGATE_TEST_SECRET",
        user: None,
        store: None,
    }
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    for _ in 0..500 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("waited in vain: {what}");
}

fn lines(directory: &Path) -> usize {
    fs::read_to_string(directory.join("starts"))
        .unwrap_or_default()
        .lines()
        .count()
}

#[tokio::test]
async fn a_child_that_ends_is_started_again_until_it_is_stopped() {
    let directory = tempfile::tempdir().expect("a directory");
    let child = child(directory.path(), "echo x >> \"$SANDGATE_TEST_DIRECTORY/starts\"");
    let stop = CancellationToken::new();
    let (verdict, ()) = tokio::join!(child.supervise(&stop), async {
        until("three starts", || lines(directory.path()) >= 3).await;
        stop.cancel();
    });
    assert_eq!(verdict, Verdict::Stopped);
}

#[tokio::test]
async fn a_child_that_refuses_its_configuration_is_not_started_again() {
    let directory = tempfile::tempdir().expect("a directory");
    let child = child(
        directory.path(),
        "echo x >> \"$SANDGATE_TEST_DIRECTORY/starts\"; exit 64",
    );
    assert_eq!(
        child.supervise(&CancellationToken::new()).await,
        Verdict::Misconfigured
    );
    assert_eq!(lines(directory.path()), 1);
}

#[tokio::test]
async fn a_child_is_told_to_stop_and_awaited() {
    let directory = tempfile::tempdir().expect("a directory");
    let line = "trap 'sleep 0.2; echo x >> \"$SANDGATE_TEST_DIRECTORY/ended\"; exit 0' TERM; \
                echo x >> \"$SANDGATE_TEST_DIRECTORY/starts\"; while :; do sleep 0.05; done";
    let child = child(directory.path(), line);
    let stop = CancellationToken::new();
    let (verdict, ()) = tokio::join!(child.supervise(&stop), async {
        until("a start", || lines(directory.path()) == 1).await;
        stop.cancel();
    });
    assert_eq!(verdict, Verdict::Stopped);
    assert!(directory.path().join("ended").exists(), "it was not awaited");
}

#[tokio::test]
async fn a_child_inherits_what_it_is_given_and_not_what_is_kept() {
    let directory = tempfile::tempdir().expect("a directory");
    let (ours, theirs) = handover::pair().expect("a pair");
    let link = |descriptor: &OwnedFd| {
        let path = format!("/proc/self/fd/{}", descriptor.as_raw_fd());
        fs::read_link(path).expect("a descriptor").display().to_string()
    };
    let (kept, given) = (link(&ours), link(&theirs));
    let line = "readlink /proc/self/fd/$SANDGATE_TEST_FD > \"$SANDGATE_TEST_DIRECTORY/fd\"; \
                ls -l /proc/$$/fd > \"$SANDGATE_TEST_DIRECTORY/all\"; \
                echo \"[$HOME$SANDGATE_TEST_SECRET${SANDGATE_TEST_EMPTY-unset}]\" > \"$SANDGATE_TEST_DIRECTORY/home\"; exit 64";
    let mut child = child(directory.path(), line);
    child.descriptors.push(("SANDGATE_TEST_FD", theirs));
    child.supervise(&CancellationToken::new()).await;
    let read = |name: &str| {
        fs::read_to_string(directory.path().join(name))
            .expect(name)
            .trim()
            .to_owned()
    };
    assert_eq!(read("fd"), given);
    assert!(!read("all").contains(&kept), "{}", read("all"));
    assert_eq!(read("home"), "[unset]");
}

#[tokio::test]
async fn every_start_has_a_fresh_end_of_the_descriptor_store() {
    let directory = tempfile::tempdir().expect("a directory");
    // The end's number is named, the end is a socket, and each start has a fresh one.
    let line = "readlink /proc/self/fd/$SANDGATE_TEST_KEEP >> \"$SANDGATE_TEST_DIRECTORY/starts\"";
    let mut child = child(directory.path(), line);
    child.store = Some(("SANDGATE_TEST_KEEP", DescriptorStore::default()));
    let stop = CancellationToken::new();
    tokio::join!(child.supervise(&stop), async {
        until("three starts", || lines(directory.path()) >= 3).await;
        stop.cancel();
    });
    let starts = fs::read_to_string(directory.path().join("starts")).expect("starts");
    let ends: std::collections::BTreeSet<&str> = starts.lines().collect();
    assert_eq!(ends.len(), lines(directory.path()), "{starts}");
    assert!(ends.iter().all(|end| end.starts_with("socket:")), "{starts}");
}
