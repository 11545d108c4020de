//! Tables, and the module's invariants over every reachable state.

use std::collections::{HashSet, VecDeque};

use super::*;

const CAUSES: [Cause; 9] = [
    Cause::Stopped,
    Cause::Expired,
    Cause::Idle,
    Cause::Died,
    Cause::Lost,
    Cause::Failed,
    Cause::Abandoned,
    Cause::Interrupted,
    Cause::Retired,
];

fn creating(phase: Phase) -> State {
    State::Creating { phase, doomed: None }
}

fn closing(phase: Closing, cause: Cause, failures: u32) -> State {
    State::Ending {
        phase,
        cause,
        failures,
    }
}

#[test]
fn a_sandbox_goes_up_and_down_step_by_step() {
    let table = [
        (
            Event::Done,
            creating(Phase::Announcing),
            Next::Begin(Effect::Announce),
        ),
        (
            Event::Done,
            creating(Phase::Enforcing),
            Next::Begin(Effect::AwaitEnforced),
        ),
        (
            Event::Done,
            creating(Phase::Launching),
            Next::Begin(Effect::Launch),
        ),
        (Event::Done, creating(Phase::Greeting), Next::Begin(Effect::Greet)),
        (
            Event::Done,
            creating(Phase::Furnishing),
            Next::Begin(Effect::Furnish),
        ),
        (
            Event::Done,
            creating(Phase::Recording),
            Next::Begin(Effect::RecordRunning),
        ),
        (Event::Done, State::Running, Next::Begin(Effect::Watch)),
        (
            Event::End(Cause::Expired),
            closing(Closing::Withdrawing, Cause::Expired, 0),
            Next::Begin(Effect::Withdraw { failures: 0 }),
        ),
        (
            Event::Done,
            closing(Closing::Destroying, Cause::Expired, 0),
            Next::Begin(Effect::Destroy { failures: 0 }),
        ),
        (
            Event::Failed,
            closing(Closing::Destroying, Cause::Expired, 1),
            Next::Begin(Effect::Destroy { failures: 1 }),
        ),
        (
            Event::Done,
            closing(Closing::Recording, Cause::Expired, 0),
            Next::Begin(Effect::RecordEnd {
                cause: Cause::Expired,
                failures: 0,
            }),
        ),
        (Event::Done, State::Ended(Cause::Expired), Next::Rest),
        (
            Event::End(Cause::Stopped),
            State::Ended(Cause::Expired),
            Next::Rest,
        ),
    ];
    let mut state = State::NEW;
    for (line, (event, expected, next)) in table.into_iter().enumerate() {
        assert_eq!(
            step(state, event),
            (expected, next),
            "line {line}: {state:?} and {event:?}"
        );
        state = expected;
    }
}

#[test]
fn one_that_was_taken_is_launched_no_second_time() {
    assert_eq!(State::CLAIMED.effect(), Some(Effect::Admit));
    let (furnishing, next) = step(State::CLAIMED, Event::Done);
    assert_eq!(next, Next::Begin(Effect::Furnish));
    let (recording, next) = step(furnishing, Event::Done);
    assert_eq!(next, Next::Begin(Effect::RecordRunning));
    assert_eq!(step(recording, Event::Done).0, State::Running);
    assert_eq!(
        step(State::CLAIMED, Event::Failed).0,
        State::ending(Cause::Failed)
    );
}

#[test]
fn a_failed_step_up_takes_everything_away() {
    for phase in [
        Phase::Preparing,
        Phase::Announcing,
        Phase::Enforcing,
        Phase::Launching,
        Phase::Greeting,
        Phase::Admitting,
        Phase::Furnishing,
        Phase::Recording,
    ] {
        let (state, next) = step(creating(phase), Event::Failed);
        assert_eq!(state, State::ending(Cause::Failed), "{phase:?}");
        assert_eq!(next, Next::Begin(Effect::Withdraw { failures: 0 }), "{phase:?}");
    }
}

#[test]
fn what_is_being_made_is_awaited_and_what_is_awaited_is_given_up() {
    for (phase, given_up) in [
        (Phase::Preparing, false),
        (Phase::Announcing, false),
        (Phase::Enforcing, true),
        (Phase::Launching, false),
        (Phase::Greeting, true),
        (Phase::Admitting, true),
        (Phase::Recording, false),
    ] {
        let (state, next) = step(creating(phase), Event::End(Cause::Abandoned));
        if given_up {
            assert_eq!(state, State::ending(Cause::Abandoned), "{phase:?}");
            continue;
        }
        assert_eq!(next, Next::Continue, "{phase:?}");
        for event in [Event::Done, Event::Failed] {
            assert_eq!(
                step(state, event).0,
                State::ending(Cause::Abandoned),
                "{phase:?} then {event:?}"
            );
        }
    }
}

#[test]
fn the_first_cause_stays() {
    let (doomed, _) = step(State::NEW, Event::End(Cause::Abandoned));
    let (doomed, _) = step(doomed, Event::End(Cause::Stopped));
    assert_eq!(step(doomed, Event::Done).0, State::ending(Cause::Abandoned));
    let ending = State::ending(Cause::Died);
    assert_eq!(step(ending, Event::End(Cause::Stopped)), (ending, Next::Continue));
}

#[test]
fn every_cause_leaves_a_status_that_published_clients_know() {
    for cause in CAUSES {
        assert!(!cause.status().is_live(), "{cause:?}");
        assert!(!cause.reason().is_empty(), "{cause:?}");
    }
}

/// What a path has done so far; part of the search's node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
struct History {
    enforced: bool,
    withdrawn: bool,
    destroyed: bool,
}

#[test]
fn the_order_holds_on_every_path() {
    let mut events = vec![Event::Done, Event::Failed];
    events.extend(CAUSES.map(Event::End));
    let mut starts = vec![State::NEW, State::Running, State::CLAIMED, State::ADOPTED];
    starts.extend(CAUSES.map(State::ending));
    let mut queue: VecDeque<(State, History)> = starts
        .into_iter()
        // A sandbox that runs was enforced by an earlier controller.
        .map(|state| (state, History { enforced: [State::Running, State::ADOPTED].contains(&state), ..History::default() }))
        .collect();
    let mut seen: HashSet<(State, History)> = queue.iter().copied().collect();
    let mut ended = 0;
    while let Some((state, history)) = queue.pop_front() {
        match state.effect() {
            Some(
                Effect::Launch | Effect::Greet | Effect::Furnish | Effect::RecordRunning | Effect::Watch,
            ) => {
                assert!(history.enforced, "{state:?} before the node acknowledged");
            }
            Some(Effect::Destroy { .. }) => assert!(history.withdrawn, "{state:?} before it left the feed"),
            Some(Effect::RecordEnd { .. }) => assert!(history.destroyed, "{state:?} before it was destroyed"),
            Some(
                Effect::Prepare
                | Effect::Announce
                | Effect::AwaitEnforced
                | Effect::Admit
                | Effect::Withdraw { .. },
            ) => {}
            None => {
                assert!(history.destroyed, "{state:?} with something left");
                ended += 1;
            }
        }
        for event in &events {
            let mut history = history;
            if *event == Event::Done {
                match state.effect() {
                    Some(Effect::AwaitEnforced | Effect::Admit) => history.enforced = true,
                    Some(Effect::Withdraw { .. }) => history.withdrawn = true,
                    Some(Effect::Destroy { .. }) => history.destroyed = true,
                    Some(_) | None => {}
                }
            }
            let (next, _) = step(state, *event);
            let bounded = !matches!(next, State::Ending { failures: 3.., .. });
            if bounded && seen.insert((next, history)) {
                queue.push_back((next, history));
            }
        }
    }
    assert!(ended > 0, "no path ends");
    assert!(seen.len() > 50, "the search saw only {} states", seen.len());
}
