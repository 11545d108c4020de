//! What a command changed.

use sandgate_api::agent::ChangeAction;

use super::*;

impl Agent {
    /// What a line changes below the agent's folder: paths without the folder, and whether something is missing.
    fn changes(&self, line: &str) -> (Vec<(String, ChangeAction, u64)>, bool) {
        let exec = Exec {
            track: Some(self.path("")),
            ..shell(line)
        };
        let outcome = self.exec(exec).outcome();
        assert_eq!(outcome.code, 0, "{outcome:?}");
        let changes = outcome.changes.expect("changes");
        let inside = self.path("");
        let files = changes.files.into_iter().map(|change| {
            let path = change
                .path
                .strip_prefix(&inside)
                .expect("below the folder")
                .trim_start_matches('/')
                .to_owned();
            (path, change.action, change.size)
        });
        (files.collect(), changes.truncated)
    }
}

#[test]
fn every_way_of_changing_a_file_is_seen() {
    let agent = Agent::start();
    let prepare = "mkdir -p old/deep; for name in same longer touched rewritten replaced gone away; do echo abc > old/deep/$name; done; ln -s same old/link";
    assert_eq!(agent.sh(prepare).code, 0);
    let line = "cd old/deep; echo d >> longer; touch -d 2001-01-01 touched; \
                printf xyz > rewritten; touch -r same rewritten; \
                echo abc > new && mv new replaced; rm gone; mv away moved; \
                mkdir -p fresh/er; printf 12345 > fresh/er/file; cat same > /dev/null; \
                echo x > passing; rm passing; ln -sfn deep ../link";
    let (changes, truncated) = agent.changes(line);
    let expected = [
        ("old/deep/away", ChangeAction::Deleted, 0),
        ("old/deep/fresh/er/file", ChangeAction::Created, 5),
        ("old/deep/gone", ChangeAction::Deleted, 0),
        ("old/deep/longer", ChangeAction::Modified, 6),
        ("old/deep/moved", ChangeAction::Created, 4),
        ("old/deep/replaced", ChangeAction::Modified, 4),
        ("old/deep/rewritten", ChangeAction::Modified, 3),
        ("old/deep/touched", ChangeAction::Modified, 4),
        ("old/link", ChangeAction::Modified, 4),
    ];
    let expected: Vec<_> = expected
        .map(|(path, action, size)| (path.to_owned(), action, size))
        .into();
    assert_eq!(changes, expected);
    assert!(!truncated);
    assert_eq!(agent.changes("cat old/deep/same"), (Vec::new(), false));
    assert_eq!(agent.sh("true").changes, None, "nobody asked");
}

#[test]
fn what_is_too_much_is_said_to_be_and_never_guessed() {
    let agent = Agent::start();
    let (changes, truncated) = agent.changes("seq -f 'new-%04g' 1 1500 | xargs touch");
    assert!(truncated);
    assert!(!changes.is_empty() && changes.len() <= 1000, "{}", changes.len());
    assert!(
        changes
            .iter()
            .all(|(_, action, _)| *action == ChangeAction::Created)
    );
    // More than is looked at: what the first walk did not get to is not new, what the second does not is not gone.
    assert_eq!(agent.sh("mkdir many; cd many; seq 1 20000 | xargs touch").code, 0);
    let told = |line: &str| {
        let (changes, truncated) = agent.changes(line);
        assert!(truncated);
        for (path, action, _) in &changes {
            let exists = Path::new(&agent.path(path)).exists();
            assert_eq!(exists, *action != ChangeAction::Deleted, "{path}");
        }
        changes
    };
    let fewer = told("cd many; seq 1 10000 | xargs rm; touch again");
    assert!(
        fewer
            .iter()
            .all(|(_, action, _)| *action == ChangeAction::Deleted),
        "{:?}",
        fewer.first()
    );
    let more = told("mkdir more; cd more; seq 1 20000 | xargs touch; rm ../new-*");
    assert!(
        more.iter().all(|(_, action, _)| *action == ChangeAction::Created),
        "{:?}",
        more.first()
    );
}

#[test]
fn a_folder_that_cannot_be_tracked_is_refused() {
    let agent = Agent::start();
    let track = |folder: &str| Exec {
        track: Some(folder.to_owned()),
        ..shell("true")
    };
    assert_eq!(agent.exec(track("relative")).refusal(), AgentErrorCode::Invalid);
    assert_eq!(
        agent.exec(track("/tmp/../etc")).refusal(),
        AgentErrorCode::Invalid
    );
    let missing = agent.exec(track(&agent.path("no/such"))).outcome();
    assert_eq!(missing.changes, Some(Changes::default()));
    let not_started = Exec {
        command: Line::Argv(vec!["no-such-program".to_owned()]),
        ..track(&agent.path(""))
    };
    assert_eq!(
        agent.exec(not_started).outcome().changes,
        Some(Changes::default())
    );
}
