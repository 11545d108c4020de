//! Many patterns, one look-up per label of the name instead of one per pattern.

use std::{cmp::Ordering, sync::Arc};

use super::{DomainName, DomainPattern};

/// Patterns of one rule. Answers with the position of the first pattern that matches.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct DomainSet {
    patterns: Arc<[DomainPattern]>,
    any: Option<usize>,
    /// Positions of all patterns but `*`, in the order of their keys.
    sorted: Box<[u32]>,
}

/// A pattern other than `*`, as it is searched for: names and what is below them apart, each by text.
type Key<'a> = (bool, &'a str);

fn key(pattern: &DomainPattern) -> Option<Key<'_>> {
    match pattern {
        DomainPattern::Exact(name) => Some((false, name.as_str())),
        DomainPattern::Below(apex) => Some((true, apex.as_str())),
        DomainPattern::Any => None,
    }
}

/// What a name is searched under: itself, and everything that it is below.
fn searched(name: &DomainName) -> impl Iterator<Item = Key<'_>> {
    let text = name.as_str();
    let parents = text.match_indices('.').map(|(dot, _)| (true, &text[dot + 1..]));
    [(false, text)].into_iter().chain(parents)
}

impl DomainSet {
    pub(crate) fn new(patterns: &Arc<[DomainPattern]>) -> Self {
        let mut sorted: Vec<u32> = positions(patterns)
            .filter(|(_, pattern)| **pattern != DomainPattern::Any)
            .map(|(position, _)| position)
            .collect();
        sorted.sort_by(|one, two| key(&patterns[*one as usize]).cmp(&key(&patterns[*two as usize])));
        Self {
            any: patterns.iter().position(|pattern| *pattern == DomainPattern::Any),
            patterns: Arc::clone(patterns),
            sorted: sorted.into(),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.patterns.is_empty()
    }

    /// Position of `*`, if it is listed.
    pub(crate) fn any(&self) -> Option<usize> {
        self.any
    }

    /// The first pattern that names `name`, `*` taken as every name there is: what a deny rule means.
    pub(crate) fn covering(&self, name: &DomainName) -> Option<usize> {
        [self.any, self.listed(name)].into_iter().flatten().min()
    }

    /// The same with `*` taken as every public name: what an allow rule means.
    pub(crate) fn opening(&self, name: &DomainName) -> Option<usize> {
        [self.any.filter(|_| name.is_public()), self.listed(name)]
            .into_iter()
            .flatten()
            .min()
    }

    fn listed(&self, name: &DomainName) -> Option<usize> {
        let first = |wanted: Key<'_>| {
            let found = self
                .sorted
                .partition_point(|position| key(&self.patterns[*position as usize]) < Some(wanted));
            let position = *self.sorted.get(found)? as usize;
            (key(&self.patterns[position]) == Some(wanted)).then_some(position)
        };
        if self.sorted.is_empty() {
            return None;
        }
        searched(name).filter_map(first).min()
    }
}

fn positions<T>(items: &[T]) -> impl Iterator<Item = (u32, &T)> {
    (0u32..).zip(items)
}

/// The same over many rules: which of them list a name.
#[derive(Debug, Clone, Default)]
pub(crate) struct DomainIndex {
    /// A rule and a position in its set, in the order of the patterns' keys.
    sorted: Vec<(u32, u32)>,
    /// Rules that list `*`, ascending.
    any: Vec<u32>,
}

impl DomainIndex {
    /// Indexes the sets of rules, in their order.
    pub(crate) fn new<'a>(sets: impl Iterator<Item = &'a DomainSet> + Clone) -> Self {
        let listed = positions_of(sets.clone())
            .flat_map(|(rule, set)| set.sorted.iter().map(move |position| (rule, *position)));
        let mut sorted: Vec<(u32, u32)> = listed.collect();
        let sets_by_rule: Vec<&DomainSet> = sets.clone().collect();
        sorted.sort_unstable_by(|one, two| {
            let key = |(rule, position): &(u32, u32)| {
                key(&sets_by_rule[*rule as usize].patterns[*position as usize])
            };
            key(one).cmp(&key(two)).then(one.cmp(two))
        });
        let any = positions_of(sets).filter(|(_, set)| set.any.is_some());
        Self {
            sorted,
            any: any.map(|(rule, _)| rule).collect(),
        }
    }

    /// Rules that list `*`.
    pub(crate) fn any(&self) -> &[u32] {
        &self.any
    }

    /// Rules that list `name` other than by `*`, in no order, perhaps more than once. `sets` gives the set of a rule.
    pub(crate) fn listing<'a>(
        &self,
        name: &DomainName,
        sets: impl Fn(u32) -> &'a DomainSet,
        found: &mut Vec<u32>,
    ) {
        if self.sorted.is_empty() {
            return;
        }
        for wanted in searched(name) {
            let compare = |(rule, position): &(u32, u32)| -> Ordering {
                key(&sets(*rule).patterns[*position as usize]).cmp(&Some(wanted))
            };
            let begin = self.sorted.partition_point(|entry| compare(entry).is_lt());
            let equal = self.sorted[begin..]
                .iter()
                .take_while(|entry| compare(entry).is_eq());
            found.extend(equal.map(|(rule, _)| *rule));
        }
    }
}

fn positions_of<'a>(sets: impl Iterator<Item = &'a DomainSet>) -> impl Iterator<Item = (u32, &'a DomainSet)> {
    (0u32..).zip(sets)
}
