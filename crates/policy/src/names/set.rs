//! Many patterns, one look-up per label of the name instead of one per pattern.

use std::collections::HashMap;

use super::{DomainName, DomainPattern};

/// Patterns of one rule. Answers with the position of the first pattern that matches.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct DomainSet {
    any: Option<usize>,
    exact: HashMap<String, usize>,
    below: HashMap<String, usize>,
}

impl DomainSet {
    pub(crate) fn new(patterns: &[DomainPattern]) -> Self {
        let mut set = Self::default();
        for (position, pattern) in patterns.iter().enumerate() {
            match pattern {
                DomainPattern::Any => {
                    set.any.get_or_insert(position);
                }
                DomainPattern::Exact(name) => {
                    set.exact.entry(name.as_str().to_owned()).or_insert(position);
                }
                DomainPattern::Below(apex) => {
                    set.below.entry(apex.as_str().to_owned()).or_insert(position);
                }
            }
        }
        set
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.any.is_none() && self.exact.is_empty() && self.below.is_empty()
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
        let text = name.as_str();
        let parents = text.match_indices('.').map(|(dot, _)| &text[dot + 1..]);
        let below = parents.filter_map(|parent| self.below.get(parent)).min();
        [self.exact.get(text), below].into_iter().flatten().min().copied()
    }
}
