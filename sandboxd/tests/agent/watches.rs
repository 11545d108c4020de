//! What happens below a directory, as it happens.

use sandgate_api::agent::{FileAction, FileChange, FileReply, FileRequest};

use super::*;

/// Everything that was told so far.
struct Watched {
    connection: Connection,
    told: Vec<FileChange>,
    lost: bool,
}

impl Agent {
    fn watch(&self, name: &str, recursive: bool) -> Watched {
        let path = self.path(name);
        let mut connection = self.ask(&Request::Files(FileRequest::Watch { path, recursive }));
        assert_eq!(
            connection.reply(),
            Reply::Files(FileReply::Watching { partly: false })
        );
        Watched {
            connection,
            told: Vec::new(),
            lost: false,
        }
    }
}

impl Watched {
    /// Waits for a change. What was told before it is kept.
    fn hears(&mut self, action: FileAction, path: &str) {
        let is_it = |change: &FileChange| change.action == action && change.path == path;
        while !self.told.iter().any(is_it) {
            match self.connection.reply() {
                Reply::Files(FileReply::Changes { changes, lost }) => {
                    self.told.extend(changes);
                    self.lost |= lost;
                }
                other => panic!("{other:?}"),
            }
        }
    }

    fn of(&self, path: &str) -> Vec<FileAction> {
        let changes = self.told.iter().filter(|change| change.path == path);
        changes.map(|change| change.action).collect()
    }
}

#[test]
fn changes_are_told_also_below_directories_that_come_later() {
    let agent = Agent::start();
    fs::create_dir_all(agent.path("d/below")).unwrap();
    fs::create_dir(agent.path("other")).unwrap();
    let mut watched = agent.watch("d", true);
    let mut flat = agent.watch("d", false);
    fs::write(agent.path("d/below/file"), "1").unwrap();
    fs::create_dir_all(agent.path("d/new/deep")).unwrap();
    fs::write(agent.path("d/new/deep/file"), "2").unwrap();
    watched.hears(FileAction::Modified, &agent.path("d/below/file"));
    watched.hears(FileAction::Created, &agent.path("d/new/deep/file"));
    assert_eq!(
        watched.of(&agent.path("d/below/file")),
        [FileAction::Created, FileAction::Modified]
    );
    let new = watched
        .told
        .iter()
        .find(|change| change.path == agent.path("d/new"));
    assert!(new.unwrap().directory);
    // What is moved has another path, and is followed there only when that is below, too.
    fs::rename(agent.path("d/new"), agent.path("d/moved")).unwrap();
    watched.hears(FileAction::Deleted, &agent.path("d/new"));
    watched.hears(FileAction::Created, &agent.path("d/moved"));
    fs::write(agent.path("d/moved/deep/later"), "3").unwrap();
    watched.hears(FileAction::Created, &agent.path("d/moved/deep/later"));
    fs::rename(agent.path("d/moved"), agent.path("other/moved")).unwrap();
    watched.hears(FileAction::Deleted, &agent.path("d/moved"));
    fs::write(agent.path("other/moved/deep/unheard"), "4").unwrap();
    fs::remove_file(agent.path("d/below/file")).unwrap();
    watched.hears(FileAction::Deleted, &agent.path("d/below/file"));
    assert!(!watched.told.iter().any(|change| change.path.ends_with("unheard")));
    assert!(!watched.lost);
    flat.hears(FileAction::Deleted, &agent.path("d/moved"));
    assert!(
        flat.told.iter().all(|change| !change.path.contains("file")),
        "{:?}",
        flat.told
    );
    // The end of the directory is the end of the stream.
    fs::remove_dir_all(agent.path("d")).unwrap();
    loop {
        match watched.connection.reply() {
            Reply::Files(FileReply::Changes { .. }) => {}
            other => break assert_eq!(other, Reply::Files(FileReply::Done)),
        }
    }
}

#[test]
fn what_the_kernel_dropped_is_told_as_lost() {
    let agent = Agent::start();
    let queue: usize = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events")
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    fs::create_dir(agent.path("d")).unwrap();
    let mut watched = agent.watch("d", false);
    // Nobody reads meanwhile: frames fill the connection, and then events the kernel's queue.
    let name = |number: usize| agent.path(&format!("d/{number:0>200}"));
    let mut number = 0;
    let serves = |agent: &Agent| {
        agent.ask(&Request::Ping).reply()
            == Reply::Pong {
                protocol: PROTOCOL_VERSION,
            }
    };
    while number < 4 * queue {
        fs::write(name(number % 100), "").unwrap();
        fs::remove_file(name(number % 100)).unwrap();
        number += 1;
    }
    assert!(serves(&agent), "others are held up");
    while !watched.lost {
        match watched.connection.reply() {
            Reply::Files(FileReply::Changes { lost, .. }) => watched.lost |= lost,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn only_directories_are_watched_and_not_too_many_at_once() {
    let agent = Agent::start();
    fs::write(agent.path("file"), "").unwrap();
    let refused = |path: String| {
        let request = FileRequest::Watch {
            path,
            recursive: true,
        };
        agent.ask(&Request::Files(request)).refusal()
    };
    assert_eq!(refused(agent.path("file")), AgentErrorCode::NotDirectory);
    assert_eq!(refused(agent.path("absent")), AgentErrorCode::NotFound);
    assert_eq!(refused("/proc/self".to_owned()), AgentErrorCode::PermissionDenied);
    let watches: Vec<Watched> = (0..16).map(|_| agent.watch("", false)).collect();
    assert_eq!(refused(agent.path("")), AgentErrorCode::Invalid);
    drop(watches);
    // A place is free when the agent has noticed.
    wait(|| {
        let path = agent.path("");
        let request = FileRequest::Watch {
            path,
            recursive: false,
        };
        agent.ask(&Request::Files(request)).reply() == Reply::Files(FileReply::Watching { partly: false })
    });
}
