//! What was measured, and what may be said of it: medians, spreads, ratios. Pure.
//!
//! A ratio is taken within each round, between two figures measured one right after the other. When the
//! ratios of the rounds lie on both sides of 1, nothing is said but "equal".

use serde::{Deserialize, Serialize};

/// One benchmark's figures.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Outcome {
    /// Its name on the command line.
    pub(crate) name: String,
    /// When and of what.
    pub(crate) run: String,
    /// Its tables.
    pub(crate) tables: Vec<Table>,
}

/// Figures that belong together.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Table {
    /// What they are.
    pub(crate) title: String,
    /// In what.
    pub(crate) unit: String,
    /// Of what kind.
    pub(crate) kind: Kind,
    /// The figures.
    pub(crate) rows: Vec<Row>,
}

/// What a figure is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Kind {
    /// One figure a round, of which more is better.
    Rate,
    /// One figure a round, of which less is better.
    Cost,
    /// Many times a round, of which percentiles are told.
    Latency,
}

/// One thing that was measured.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Row {
    /// What.
    pub(crate) name: String,
    /// The row of the same table that it is compared with.
    pub(crate) peer: Option<String>,
    /// The figures of each round.
    pub(crate) rounds: Vec<Vec<f64>>,
}

/// A median and what it lies between.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Spread {
    /// The middle.
    pub(crate) median: f64,
    /// The least.
    pub(crate) least: f64,
    /// The most.
    pub(crate) most: f64,
}

impl Table {
    /// A table of the given rows, each with its peer, and no figures.
    pub(crate) fn new(title: &str, unit: &str, kind: Kind, rows: &[(&str, Option<&str>)]) -> Self {
        let rows = rows.iter().map(|&(name, peer)| Row {
            name: name.to_owned(),
            peer: peer.map(str::to_owned),
            rounds: Vec::new(),
        });
        Self {
            title: title.to_owned(),
            unit: unit.to_owned(),
            kind,
            rows: rows.collect(),
        }
    }

    /// Adds a round's figures to a row.
    ///
    /// # Panics
    /// When there is no such row.
    pub(crate) fn add(&mut self, name: &str, figures: Vec<f64>) {
        let row = self.rows.iter_mut().find(|row| row.name == name);
        row.unwrap_or_else(|| panic!("no row {name}"))
            .rounds
            .push(figures);
    }

    /// The ratios of a row to its peer, round by round.
    pub(crate) fn ratio(&self, row: &Row) -> Option<Spread> {
        let peer = self
            .rows
            .iter()
            .find(|other| Some(&other.name) == row.peer.as_ref())?;
        let rounds = row.rounds.iter().zip(&peer.rounds);
        let ratios: Vec<f64> = rounds.map(|(own, other)| median(own) / median(other)).collect();
        (!ratios.is_empty()).then(|| Spread::of(&ratios))
    }
}

impl Row {
    /// The rounds' medians.
    pub(crate) fn spread(&self) -> Spread {
        let medians: Vec<f64> = self.rounds.iter().map(|round| median(round)).collect();
        Spread::of(&medians)
    }

    /// All figures of all rounds, in order.
    pub(crate) fn all(&self) -> Vec<f64> {
        let mut all: Vec<f64> = self.rounds.iter().flatten().copied().collect();
        all.sort_by(f64::total_cmp);
        all
    }
}

impl Spread {
    fn of(figures: &[f64]) -> Self {
        Self {
            median: median(figures),
            least: figures.iter().copied().fold(f64::INFINITY, f64::min),
            most: figures.iter().copied().fold(f64::NEG_INFINITY, f64::max),
        }
    }

    /// As a ratio: whether 1 lies inside.
    pub(crate) fn is_equal(&self) -> bool {
        (self.least..=self.most).contains(&1.0)
    }
}

/// The middle of some figures.
pub(crate) fn median(figures: &[f64]) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        length if length % 2 == 1 => sorted[middle],
        _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

/// The figure that `percent` of the sorted figures do not pass (nearest rank).
pub(crate) fn percentile(sorted: &[f64], percent: usize) -> f64 {
    let rank = (sorted.len() * percent).div_ceil(100);
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}
