//! Whether a frame may be put in force: only one that follows what is in force already. Pure.
//!
//! A connection carries its frames in order, and a controller numbers what it commits. Something between the two, or a
//! fault of either, could still lose, repeat or swap frames, and then what is enforced would be a state that nobody
//! ever wanted: a policy that was tightened open again, or a sandbox that is gone back. So what does not follow is
//! taken for nothing, and the whole state is asked for.

use sandgate_api::feed::{FeedFrame, Revision};

/// The frames of one connection, as far as they have come.
#[derive(Debug)]
pub(super) struct Sequence {
    /// What is in force, as far as it counts here.
    position: Option<Revision>,
    /// Nothing has come yet.
    is_fresh: bool,
}

impl Sequence {
    /// A connection that asked for everything after `since`, or for all.
    pub(super) fn after(since: Option<Revision>) -> Self {
        Self {
            position: since,
            is_fresh: true,
        }
    }

    /// Whether the frame follows, and if so takes note of it.
    pub(super) fn takes(&mut self, frame: &FeedFrame) -> bool {
        let is_fresh = std::mem::replace(&mut self.is_fresh, false);
        let (follows, position) = match frame {
            // The first one says where a history stands that may be another than the last: a controller begins a new
            // one with each start, at the clock, which may have been set back.
            FeedFrame::Snapshot { revision, .. } => (
                is_fresh || self.position.is_some_and(|ours| ours < *revision),
                *revision,
            ),
            // There may be nothing new in it.
            FeedFrame::Delta { since, revision, .. } => {
                let follows = self.position.is_some_and(|ours| {
                    since.map_or(is_fresh || ours < *revision, |since| since == ours) && ours <= *revision
                });
                (follows, *revision)
            }
            FeedFrame::Heartbeat { revision } => (self.position == Some(*revision), *revision),
        };
        if follows {
            self.position = Some(position);
        }
        follows
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use sandgate_api::feed::{Endpoint, FeedSandbox};

    use super::*;
    use crate::node::Desired;

    fn sandbox(number: u8, rules: u8) -> FeedSandbox {
        FeedSandbox {
            sandbox_id: format!("sandbox-{number}").parse().expect("an id"),
            org_id: "org-1".parse().expect("an id"),
            endpoint: Endpoint {
                ifindex: u32::from(number) + 1,
                interface: format!("sg{number}"),
                address: [10, 213, 0, number + 1].into(),
                address6: None,
                mac: [2, 83, 71, 1, 0, number],
                agent_port: 9111,
            },
            tiers: Vec::new(),
            bindings: Vec::new(),
            ca_generation: 0,
            // Stands for its rules.
            tunnel_ports: vec![u16::from(rules) + 1],
        }
    }

    /// What a controller committed: the state after each step, and the frames that lead there from one before.
    struct History {
        states: Vec<Desired>,
        base: Revision,
    }

    impl History {
        fn of(steps: &[(u8, Option<u8>)], base: Revision) -> Self {
            let mut state = Desired {
                revision: Some(base),
                ..Desired::default()
            };
            let mut states = vec![state.clone()];
            for (number, rules) in steps {
                let one = sandbox(*number, rules.unwrap_or(0));
                match rules {
                    Some(_) => drop(state.sandboxes.insert(one.sandbox_id.clone(), one)),
                    None => drop(state.sandboxes.remove(&one.sandbox_id)),
                }
                state.revision = state.revision.map(|revision| revision + 1);
                states.push(state.clone());
            }
            Self { states, base }
        }

        fn at(&self, revision: Revision) -> Option<&Desired> {
            let index = revision.checked_sub(self.base)?;
            self.states.get(usize::try_from(index).ok()?)
        }

        fn snapshot(&self, at: usize) -> FeedFrame {
            FeedFrame::Snapshot {
                revision: self.base + at as u64,
                sandboxes: self.states[at].sandboxes.values().cloned().collect(),
            }
        }

        fn delta(&self, from: usize, to: usize) -> FeedFrame {
            let (before, after) = (&self.states[from], &self.states[to]);
            let is_new = |sandbox: &&FeedSandbox| before.sandboxes.get(&sandbox.sandbox_id) != Some(*sandbox);
            let is_gone = |id: &&sandgate_api::id::SandboxId| !after.sandboxes.contains_key(*id);
            FeedFrame::Delta {
                since: Some(self.base + from as u64),
                revision: self.base + to as u64,
                upserts: after.sandboxes.values().filter(is_new).cloned().collect(),
                removed: before.sandboxes.keys().filter(is_gone).cloned().collect(),
            }
        }

        /// The frames of one connection, with a heartbeat after each.
        fn connection(&self, since: Option<Revision>, stops: &[usize]) -> Vec<FeedFrame> {
            let last = self.states.len() - 1;
            let mut stops: Vec<usize> = stops.iter().map(|stop| stop % (last + 1)).collect();
            stops.sort_unstable();
            stops.dedup();
            stops.push(last);
            let known = since.and_then(|since| usize::try_from(since.checked_sub(self.base)?).ok());
            let mut at = match known.filter(|known| *known <= last) {
                Some(known) => known,
                None => stops.remove(0),
            };
            let mut frames = vec![match known.filter(|known| *known <= last) {
                Some(known) => self.delta(known, known),
                None => self.snapshot(at),
            }];
            for stop in stops {
                if stop > at {
                    frames.push(self.delta(at, stop));
                    at = stop;
                }
                frames.push(FeedFrame::Heartbeat {
                    revision: self.base + at as u64,
                });
            }
            frames
        }
    }

    /// What is done to a stream of frames on its way.
    #[derive(Debug, Clone)]
    enum Harm {
        Lose(usize),
        Repeat(usize, usize),
        Swap(usize, usize),
        Cut(usize),
    }

    fn harms() -> impl Strategy<Value = Vec<Harm>> {
        let harm = prop_oneof![
            (0..20usize).prop_map(Harm::Lose),
            (0..20usize, 0..20usize).prop_map(|(from, to)| Harm::Repeat(from, to)),
            (0..20usize, 0..20usize).prop_map(|(one, other)| Harm::Swap(one, other)),
            (0..20usize).prop_map(Harm::Cut),
        ];
        proptest::collection::vec(harm, 0..4)
    }

    fn harmed(mut frames: Vec<FeedFrame>, harms: &[Harm]) -> Vec<FeedFrame> {
        for harm in harms {
            if frames.is_empty() {
                return frames;
            }
            let count = frames.len();
            match *harm {
                Harm::Lose(at) => drop(frames.remove(at % count)),
                Harm::Repeat(from, to) => frames.insert(to % (count + 1), frames[from % count].clone()),
                Harm::Swap(one, other) => frames.swap(one % count, other % count),
                Harm::Cut(at) => frames.truncate(at % count),
            }
        }
        frames
    }

    proptest! {
        #[test]
        fn whatever_becomes_of_the_frames_the_state_is_one_that_was_wanted_and_never_an_earlier_one(
            steps in proptest::collection::vec((0u8..4, proptest::option::of(0u8..3)), 1..8),
            connections in proptest::collection::vec(
                (proptest::collection::vec(0usize..8, 0..5), harms()), 1..6
            ),
        ) {
            let history = History::of(&steps, 1000);
            let (mut state, mut anew) = (Desired::default(), false);
            for (stops, harms) in connections {
                let since = state.revision.filter(|_| !anew);
                let mut sequence = Sequence::after(since);
                for (index, frame) in harmed(history.connection(since, &stops), &harms).into_iter().enumerate() {
                    anew = !sequence.takes(&frame);
                    if anew {
                        break;
                    }
                    let next = state.clone().after(frame.clone());
                    // Only the first snapshot may say that history is another one.
                    let may_go_back = index == 0 && matches!(frame, FeedFrame::Snapshot { .. });
                    prop_assert!(may_go_back || next.revision >= state.revision);
                    state = next;
                    let revision = state.revision.expect("a frame was taken");
                    prop_assert_eq!(Some(&state), history.at(revision));
                }
            }
            // Left alone it arrives.
            for _ in 0..2 {
                let since = state.revision.filter(|_| !anew);
                let mut sequence = Sequence::after(since);
                for frame in history.connection(since, &[]) {
                    anew = !sequence.takes(&frame);
                    prop_assert!(!anew);
                    state = state.after(frame);
                }
            }
            prop_assert_eq!(&state, history.states.last().expect("it has a beginning"));
        }
    }

    #[test]
    fn a_history_that_begins_anew_at_an_earlier_clock_is_taken() {
        let (late, early) = (
            History::of(&[(1, Some(1))], 5000),
            History::of(&[(2, Some(2))], 100),
        );
        let mut sequence = Sequence::after(Some(5001));
        assert!(sequence.takes(&early.snapshot(0)));
        assert!(sequence.takes(&early.delta(0, 1)));
        assert!(!sequence.takes(&late.delta(0, 1)));
    }

    #[test]
    fn a_heartbeat_tells_of_a_frame_that_was_lost() {
        let history = History::of(&[(1, Some(1)), (1, Some(2))], 7);
        let mut sequence = Sequence::after(None);
        assert!(sequence.takes(&history.snapshot(0)));
        assert!(sequence.takes(&FeedFrame::Heartbeat { revision: 7 }));
        assert!(!sequence.takes(&FeedFrame::Heartbeat { revision: 8 }));
    }

    #[test]
    fn a_delta_without_anything_before_it_is_nothing() {
        let history = History::of(&[(1, Some(1))], 7);
        assert!(!Sequence::after(None).takes(&history.delta(0, 1)));
        assert!(!Sequence::after(None).takes(&FeedFrame::Heartbeat { revision: 7 }));
        assert!(!Sequence::after(Some(8)).takes(&history.delta(0, 1)));
    }
}
