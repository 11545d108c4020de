//! Puts equal denials together. Bounded: past a number of different denials of one sandbox the rest is
//! counted without its destination.

use std::collections::{BTreeMap, HashMap, btree_map::Entry};

use jiff::Timestamp;
use sandgate_api::id::SandboxId;

use super::{Attempt, Owner};
use crate::sandbox::Decision;

/// Different denials of one sandbox that are kept apart.
const DIFFERENT_MAX: usize = 256;
/// Longest host and detail kept, in characters.
const TEXT_MAX: usize = 255;

#[derive(Default)]
pub(super) struct Gatherer {
    sandboxes: HashMap<SandboxId, Denials>,
}

struct Denials {
    /// As of the last denial.
    owner: Owner,
    counts: BTreeMap<Key, Count>,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    decision: Decision,
    attempt: Attempt,
}

struct Count {
    first: Timestamp,
    repeated: u64,
}

/// Equal denials, put together.
pub(super) struct Gathered<'a> {
    pub(super) owner: &'a Owner,
    pub(super) decision: &'a Decision,
    pub(super) attempt: &'a Attempt,
    pub(super) first: Timestamp,
    pub(super) repeated: u64,
}

impl Gatherer {
    pub(super) fn add(
        &mut self,
        owner: Owner,
        decision: Decision,
        mut attempt: Attempt,
        repeated: u64,
        now: Timestamp,
    ) {
        cut(&mut attempt.host);
        cut(&mut attempt.detail);
        let denials = self
            .sandboxes
            .entry(owner.sandbox_id.clone())
            .or_insert_with(|| Denials {
                owner: owner.clone(),
                counts: BTreeMap::new(),
            });
        denials.owner = owner;
        let counts = &mut denials.counts;
        let mut key = Key { decision, attempt };
        if counts.len() >= DIFFERENT_MAX && !counts.contains_key(&key) {
            key.decision.rule = None;
            key.decision.tier = None;
            let detail = Some("several destinations".to_owned());
            key.attempt = Attempt {
                protocol: key.attempt.protocol,
                detail,
                alert: key.attempt.alert,
                ..Attempt::default()
            };
        }
        match counts.entry(key) {
            Entry::Occupied(mut entry) => {
                let count = entry.get_mut();
                count.repeated = count.repeated.saturating_add(repeated);
            }
            Entry::Vacant(entry) => {
                entry.insert(Count { first: now, repeated });
            }
        }
    }

    /// Shows every sum to `taken`, and forgets those for which it says yes.
    pub(super) fn drain(&mut self, mut taken: impl FnMut(&Gathered<'_>) -> bool) {
        for denials in self.sandboxes.values_mut() {
            let owner = &denials.owner;
            denials.counts.retain(|key, count| {
                !taken(&Gathered {
                    owner,
                    decision: &key.decision,
                    attempt: &key.attempt,
                    first: count.first,
                    repeated: count.repeated,
                })
            });
        }
        self.sandboxes.retain(|_, denials| !denials.counts.is_empty());
    }
}

fn cut(text: &mut Option<String>) {
    if let Some(text) = text
        && let Some((end, _)) = text.char_indices().nth(TEXT_MAX)
    {
        text.truncate(end);
    }
}
