//! The attack suite with its judge: `tests/redteam` attacks from inside a sandbox, and what left is read from the
//! capture at the world's edge and from the world's servers.
//!
//! | group | what is attacked |
//! |---|---|
//! | `redteam` | a sandbox of ours, or of the system that `REDTEAM_ADAPTER` starts: every case must pass |
//! | `unfenced` | a network namespace without any wall: every attack must be seen, and every twin must pass |
//!
//! `REDTEAM_OUT` names a directory for the scorecard as text, JSON and HTML.

use std::process::ExitCode;

use anyhow::Result;
use harness::{
    cases,
    suite::{Fixture, Suite},
};
use redteam::{evidence::Verdict, scorecard::Scorecard};

use crate::{
    around::Around,
    judging::judge_all,
    system::{Adapter, Ours, System, Unfenced},
};

mod around;
mod judging;
mod system;

fn main() -> ExitCode {
    Suite::from_arguments()
        .group("redteam", cases![every_attack_fails_and_every_twin_passes])
        .group(
            "unfenced",
            cases![
                without_a_wall_every_attack_is_seen_and_every_twin_passes,
                a_sandbox_without_any_network_does_not_score,
                addresses_of_others_are_refused,
            ],
        )
        .finish()
}

/// What is attacked, in a world.
struct Fenced {
    // Stopped before its world goes.
    system: Box<dyn System>,
    around: Around,
}

impl Fixture for Fenced {
    fn start() -> Result<Self> {
        let around = Around::build()?;
        let system: Box<dyn System> =
            match std::env::var_os("REDTEAM_ADAPTER").filter(|path| !path.is_empty()) {
                Some(adapter) => Box::new(Adapter::start(&around, adapter.into())?),
                None => Box::new(Ours::start(&around)?),
            };
        Ok(Self { system, around })
    }

    fn report(&self) -> String {
        self.system.report()
    }
}

/// A world and no wall in it.
struct Bare {
    system: Unfenced,
    around: Around,
}

impl Fixture for Bare {
    fn start() -> Result<Self> {
        let around = Around::build()?;
        let system = Unfenced::start(&around)?;
        Ok(Self { system, around })
    }
}

fn every_attack_fails_and_every_twin_passes(fenced: &Fenced) {
    let scorecard = judge_all(&fenced.around, fenced.system.as_ref());
    show(&scorecard);
    assert!(scorecard.is_green(), "{}", scorecard.text());
}

#[expect(
    clippy::print_stdout,
    reason = "the scorecard is what whoever runs this wants to see"
)]
fn show(scorecard: &Scorecard) {
    println!("{}", scorecard.text());
    let Some(directory) = std::env::var_os("REDTEAM_OUT").filter(|path| !path.is_empty()) else {
        return;
    };
    let directory = std::path::PathBuf::from(directory);
    std::fs::create_dir_all(&directory).expect("a directory for the scorecard");
    let json = scorecard.json().expect("a scorecard is JSON");
    for (name, content) in [
        ("scorecard.txt", scorecard.text()),
        ("scorecard.json", json),
        ("scorecard.html", scorecard.html()),
    ] {
        std::fs::write(directory.join(name), content).expect("the directory is writable");
    }
    println!("the scorecard is in {}", directory.display());
}

fn without_a_wall_every_attack_is_seen_and_every_twin_passes(bare: &Bare) {
    let scorecard = judge_all(&bare.around, &bare.system);
    let unseen: Vec<_> = scorecard
        .cases
        .iter()
        .filter(|case| case.verdict != Verdict::Leak && (case.id != "P08" || has_sockets_without_namespace()))
        .map(|case| (&case.id, case.verdict, &case.why))
        .collect();
    assert!(unseen.is_empty(), "attacks that nobody saw: {unseen:#?}");
    let blocked: Vec<_> = scorecard
        .cases
        .iter()
        .filter(|case| !case.missing.is_empty())
        .map(|case| (&case.id, &case.missing))
        .collect();
    assert!(blocked.is_empty(), "twins that did not pass: {blocked:#?}");
    assert!(!scorecard.is_green());
    let html = scorecard.html();
    let leaks = scorecard
        .cases
        .iter()
        .filter(|case| case.verdict == Verdict::Leak);
    assert_eq!(html.matches(">LEAK").count(), leaks.count(), "{html}");
}

/// Whether this kernel has any of the families of case P08; not every one has.
fn has_sockets_without_namespace() -> bool {
    [40, 42, 30, 21, 31].into_iter().any(|family| {
        [
            socket2::Type::STREAM,
            socket2::Type::DGRAM,
            socket2::Type::SEQPACKET,
        ]
        .into_iter()
        .any(|kind| socket2::Socket::new(socket2::Domain::from(family), kind, None).is_ok())
    })
}

fn a_sandbox_without_any_network_does_not_score(bare: &Bare) {
    let alone = bare.system.without_network().expect("a namespace");
    let scorecard = judge_all(&bare.around, &alone);
    let passed: Vec<_> = scorecard
        .cases
        .iter()
        .filter(|case| case.verdict == Verdict::Pass)
        .map(|case| &case.id)
        .collect();
    assert!(passed.is_empty() && !scorecard.is_green(), "{}", scorecard.text());
    // What is found in the sandbox itself needs no network.
    let found = ["S01", "P08"];
    let leaked = scorecard
        .cases
        .iter()
        .find(|case| case.verdict == Verdict::Leak && !found.contains(&case.id.as_str()));
    assert!(leaked.is_none(), "{leaked:#?}");
}

fn addresses_of_others_are_refused(bare: &Bare) {
    let mark = bare.around.world.capture().mark();
    for (field, address) in [
        ("/evil/address", "8.8.8.8"),
        ("/open", "1.1.1.1"),
        ("/node", "9.9.9.9:80"),
    ] {
        let mut told = bare.around.told(None);
        *told.pointer_mut(field).expect("a field of the world") = address.into();
        let answer = bare
            .system
            .run(&["run", &told.to_string()])
            .expect_err("refused")
            .to_string();
        assert!(answer.contains("documentation range"), "{field}: {answer}");
    }
    let sent = bare.around.world.capture().sent_since(mark);
    assert!(sent.is_empty(), "{sent:#?}");
}
