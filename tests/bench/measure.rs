//! The benchmarks. Each measures its variants one right after the other, round by round.

pub(crate) mod create;
pub(crate) mod dns;
pub(crate) mod execute;
pub(crate) mod manners;
pub(crate) mod memory;
pub(crate) mod policy;
pub(crate) mod program;
pub(crate) mod read;
pub(crate) mod relay;
pub(crate) mod scale;
pub(crate) mod tunnel;
pub(crate) mod verdicts;

/// How much is measured.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Effort {
    /// Rounds, interleaved.
    pub(crate) rounds: usize,
    /// One figure of throughput, in milliseconds.
    pub(crate) count_ms: u64,
    /// Divides how often single things are done in a round.
    pub(crate) divisor: usize,
    /// Also on nodes of their own, each of which takes seconds to start and to stop.
    pub(crate) more_nodes: bool,
}

impl Effort {
    /// What RESULTS.md is made of.
    pub(crate) const FULL: Self = Self {
        rounds: 5,
        count_ms: 800,
        divisor: 1,
        more_nodes: true,
    };
    /// Only to see that everything works.
    pub(crate) const SMOKE: Self = Self {
        rounds: 1,
        count_ms: 50,
        divisor: 20,
        more_nodes: false,
    };

    /// So many times, or fewer.
    pub(crate) fn times(self, full: usize) -> usize {
        full.div_ceil(self.divisor)
    }
}
