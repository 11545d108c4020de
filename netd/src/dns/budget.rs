//! How much a sandbox may say by asking for names (its policy's `dns`). Owns: what was spent in the minute that runs,
//! for each registrable zone, and which refusals have been told. Pure: time comes from the caller.
//!
//! What counts is what can carry something out: every different name, and the bytes of names that are really asked
//! upstream. A name that the cache answers costs no bytes, however often a client looks it up.

use std::{
    collections::{HashMap, HashSet},
    hash::{BuildHasher as _, RandomState},
    time::{Duration, Instant},
};

use sandgate_policy::{DnsBudget, DomainName};

/// What the limits are for.
const WINDOW: Duration = Duration::from_secs(60);
/// Zones that are told apart in a window. More are refused.
const ZONES_MAX: usize = 4096;
/// Names that are remembered in a window where the policy allows no zone more. More are refused.
const NAMES_MAX: usize = 16_384;

/// What one sandbox spent.
#[derive(Debug, Default)]
pub struct Budget {
    hasher: RandomState,
    window: Option<Window>,
    /// Counts the windows.
    number: u64,
    /// Zones in which something was refused.
    over: HashMap<String, Over>,
}

#[derive(Debug)]
struct Window {
    ends: Instant,
    zones: HashMap<u64, Spent>,
    names: HashSet<u64>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Spent {
    names: u32,
    bytes: u32,
}

#[derive(Debug)]
struct Over {
    /// The window in which the last report was made.
    told: u64,
    /// Refusals since then.
    untold: u64,
    last: Refused,
}

/// Which limit was reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// `label_max`.
    Label,
    /// `name_max`.
    Name,
    /// `unique_names_per_minute`.
    Names,
    /// `query_bytes_per_minute`.
    Bytes,
    /// More zones or names than are remembered.
    Memory,
}

/// A name that was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// The name.
    pub name: String,
    /// Why.
    pub limit: Limit,
}

/// What the audit is to be told: refusals of one zone, at most once a window.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The zone.
    pub zone: String,
    /// The refusal that made it be told.
    pub last: Refused,
    /// How many there were since the last report.
    pub count: u64,
}

/// No. With a report when it is due.
#[derive(Debug, PartialEq, Eq)]
pub struct OverBudget(pub Option<Report>);

impl Limit {
    /// The limit in the policy's words, with its value.
    pub fn describe(self, limits: &DnsBudget) -> String {
        match self {
            Self::Label => format!("label_max is {}", limits.label_max),
            Self::Name => format!("name_max is {}", limits.name_max),
            Self::Names => format!("unique_names_per_minute is {}", limits.unique_names_per_minute),
            Self::Bytes => format!("query_bytes_per_minute is {}", limits.query_bytes_per_minute),
            Self::Memory => format!("more than {NAMES_MAX} names or {ZONES_MAX} zones in a minute"),
        }
    }

    /// Whether a tier's budget is one that made the limit what it is.
    pub fn is_of(self, limits: &DnsBudget, tier: &DnsBudget) -> bool {
        match self {
            Self::Label => tier.label_max == limits.label_max,
            Self::Name => tier.name_max == limits.name_max,
            Self::Names => tier.unique_names_per_minute == limits.unique_names_per_minute,
            Self::Bytes => tier.query_bytes_per_minute == limits.query_bytes_per_minute,
            Self::Memory => false,
        }
    }
}

impl Budget {
    /// A question for `name`: counts it among the names of its zone.
    ///
    /// # Errors
    /// When the name is too long, or one too many.
    pub fn name(&mut self, limits: &DnsBudget, name: &DomainName, now: Instant) -> Result<(), OverBudget> {
        let text = name.as_str();
        if text
            .split('.')
            .any(|label| label.len() > usize::from(limits.label_max))
        {
            return Err(self.refuse(name, Limit::Label, now));
        }
        if text.len() > usize::from(limits.name_max) {
            return Err(self.refuse(name, Limit::Name, now));
        }
        let hash = self.hasher.hash_one(text);
        if self.window(now).names.contains(&hash) {
            return Ok(());
        }
        let zone = self.hasher.hash_one((name.zone(), "zone"));
        let window = self.window(now);
        let names_max = NAMES_MAX.max(usize::try_from(limits.unique_names_per_minute).unwrap_or(NAMES_MAX));
        let spent = window.zones.get(&zone).copied();
        let limit = if spent.is_some_and(|spent| spent.names >= limits.unique_names_per_minute) {
            Some(Limit::Names)
        } else if window.names.len() >= names_max.min(10 * NAMES_MAX)
            || spent.is_none() && window.zones.len() >= ZONES_MAX
        {
            Some(Limit::Memory)
        } else {
            None
        };
        if let Some(limit) = limit {
            return Err(self.refuse(name, limit, now));
        }
        window.names.insert(hash);
        window.zones.entry(zone).or_default().names += 1;
        Ok(())
    }

    /// The question is about to be asked upstream: counts the name's bytes.
    ///
    /// # Errors
    /// When that is too much.
    pub fn bytes(&mut self, limits: &DnsBudget, name: &DomainName, now: Instant) -> Result<(), OverBudget> {
        let zone = self.hasher.hash_one((name.zone(), "zone"));
        let bytes = u32::try_from(name.as_str().len()).unwrap_or(u32::MAX);
        let spent = self.window(now).zones.entry(zone).or_default();
        match spent.bytes.checked_add(bytes) {
            Some(sum) if sum <= limits.query_bytes_per_minute => {
                spent.bytes = sum;
                Ok(())
            }
            Some(_) | None => Err(self.refuse(name, Limit::Bytes, now)),
        }
    }

    /// Forgets a window that is over, and gives the refusals that no report has told yet.
    pub fn sweep(&mut self, now: Instant) -> Vec<Report> {
        if self.window.as_ref().is_some_and(|window| window.ends <= now) {
            self.window = None;
        }
        let number = self.number + u64::from(self.window.is_none());
        let mut reports = Vec::new();
        self.over.retain(|zone, over| {
            if over.told >= number {
                return true;
            }
            if over.untold > 0 {
                reports.push(Report {
                    zone: zone.clone(),
                    last: over.last.clone(),
                    count: over.untold,
                });
            }
            false
        });
        reports
    }

    fn window(&mut self, now: Instant) -> &mut Window {
        if self.window.as_ref().is_some_and(|window| window.ends <= now) {
            self.window = None;
        }
        self.window.get_or_insert_with(|| {
            self.number += 1;
            Window {
                ends: now + WINDOW,
                zones: HashMap::new(),
                names: HashSet::new(),
            }
        })
    }

    fn refuse(&mut self, name: &DomainName, limit: Limit, now: Instant) -> OverBudget {
        self.window(now);
        let number = self.number;
        let refused = || Refused {
            name: name.as_str().to_owned(),
            limit,
        };
        // Past this many zones the rest is told as one.
        let zone = if self.over.len() < ZONES_MAX || self.over.contains_key(name.zone()) {
            name.zone()
        } else {
            ""
        };
        let Some(over) = self.over.get_mut(zone) else {
            let over = Over {
                told: number,
                untold: 0,
                last: refused(),
            };
            let report = Report {
                zone: zone.to_owned(),
                last: over.last.clone(),
                count: 1,
            };
            self.over.insert(zone.to_owned(), over);
            return OverBudget(Some(report));
        };
        over.untold += 1;
        over.last = refused();
        if over.told == number {
            return OverBudget(None);
        }
        over.told = number;
        let report = Report {
            zone: zone.to_owned(),
            last: over.last.clone(),
            count: std::mem::take(&mut over.untold),
        };
        OverBudget(Some(report))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> DomainName {
        DomainName::parse(text).expect("a name")
    }

    fn limits() -> DnsBudget {
        DnsBudget {
            unique_names_per_minute: 3,
            query_bytes_per_minute: 40,
            label_max: 10,
            name_max: 30,
            ..DnsBudget::default()
        }
    }

    fn refused(outcome: Result<(), OverBudget>) -> Option<Limit> {
        let told = outcome.expect_err("refused").0;
        told.map(|report| report.last.limit)
    }

    #[test]
    fn names_are_counted_once_and_by_zone() {
        let (mut budget, limits, now) = (Budget::default(), limits(), Instant::now());
        for text in [
            "a.wild.test",
            "b.wild.test",
            "wild.test",
            "a.wild.test",
            "a.other.test",
        ] {
            assert_eq!(budget.name(&limits, &name(text), now), Ok(()), "{text}");
        }
        assert_eq!(
            refused(budget.name(&limits, &name("c.wild.test"), now)),
            Some(Limit::Names)
        );
        assert_eq!(
            refused(budget.name(&limits, &name("d.wild.test"), now)),
            None,
            "told once"
        );
        assert_eq!(
            budget.name(&limits, &name("b.wild.test"), now),
            Ok(()),
            "a known name"
        );
        assert_eq!(
            budget.name(&limits, &name("b.other.test"), now),
            Ok(()),
            "another zone"
        );
        assert_eq!(budget.name(&limits, &name("c.wild.test"), now + WINDOW), Ok(()));
    }

    #[test]
    fn bytes_are_those_that_are_asked_upstream() {
        let (mut budget, limits, now) = (Budget::default(), limits(), Instant::now());
        let text = name("a.wild.test");
        for _ in 0..3 {
            assert_eq!(budget.bytes(&limits, &text, now), Ok(()));
        }
        assert_eq!(refused(budget.bytes(&limits, &text, now)), Some(Limit::Bytes));
        assert_eq!(
            budget.name(&limits, &text, now),
            Ok(()),
            "the cache may still answer"
        );
        assert_eq!(budget.bytes(&limits, &text, now + WINDOW), Ok(()));
    }

    #[test]
    fn long_labels_and_names_are_refused() {
        let (mut budget, limits, now) = (Budget::default(), limits(), Instant::now());
        assert_eq!(
            refused(budget.name(&limits, &name("elevenchars.x.test"), now)),
            Some(Limit::Label)
        );
        let long = name("tenletters.tenletters.some.test");
        assert_eq!(refused(budget.name(&limits, &long, now)), Some(Limit::Name));
        assert_eq!(budget.name(&limits, &name("tenletters.some.test"), now), Ok(()));
    }

    #[test]
    fn every_refusal_is_told_once_and_a_zone_at_most_once_a_window() {
        let (mut budget, limits, start) = (Budget::default(), limits(), Instant::now());
        let (mut told, mut attempts) = (Vec::new(), 0);
        for window in 0..3_u32 {
            let now = start + window * WINDOW;
            let before = told.len();
            for index in 0..20 {
                let outcome = budget.name(&limits, &name(&format!("n{index}.wild.test")), now);
                if let Err(OverBudget(report)) = outcome {
                    attempts += 1;
                    told.extend(report);
                }
            }
            assert_eq!(told.len(), before + 1, "window {window}");
            assert!(budget.sweep(now).is_empty(), "not twice in a window");
        }
        let last = budget.sweep(start + 3 * WINDOW);
        assert_eq!(last.len(), 1);
        told.extend(last);
        assert_eq!(told.iter().map(|report| report.count).sum::<u64>(), attempts);
        assert!(budget.over.is_empty() && budget.window.is_none());
        assert!(budget.sweep(start + 9 * WINDOW).is_empty());
    }

    #[test]
    fn what_is_remembered_is_bounded_whatever_is_asked() {
        let (mut budget, limits, now) = (Budget::default(), limits(), Instant::now());
        for index in 0..3 * ZONES_MAX {
            for label in ["a", "b", "c", "d"] {
                // Whether it is refused is not the question here.
                let _outcome = budget.name(&limits, &name(&format!("{label}.z{index}.test")), now);
            }
        }
        let window = budget.window.as_ref().expect("it runs");
        assert!(window.zones.len() <= ZONES_MAX && window.names.len() <= NAMES_MAX);
        assert!(budget.over.len() <= ZONES_MAX + 1);
        let fresh = name("fresh.zone.test");
        assert!(budget.name(&limits, &fresh, now).is_err());
        assert_eq!(budget.name(&limits, &fresh, now + WINDOW), Ok(()));
    }
}
