//! The last of what a process wrote, by position.

use std::collections::VecDeque;

use sandgate_api::agent::FrameKind;

/// Bytes kept of each process.
pub(super) const MAX_BYTES: usize = 512 * 1024;
/// Changes between the two outputs that are kept: each costs as much as a few bytes of output.
const MAX_RUNS: usize = 4096;

/// Both outputs in the order in which they came.
#[derive(Debug, Default)]
pub(super) struct Ring {
    bytes: VecDeque<u8>,
    /// Which output, and up to which position.
    runs: VecDeque<(FrameKind, u64)>,
    /// Position of the first byte that is kept.
    first: u64,
}

impl Ring {
    /// Position of the first byte that is kept.
    pub(super) fn first(&self) -> u64 {
        self.first
    }

    /// Position of the next byte that comes.
    pub(super) fn next(&self) -> u64 {
        self.first + length(self.bytes.len())
    }

    /// Adds to the end, and forgets at the beginning what goes over the bounds.
    pub(super) fn push(&mut self, kind: FrameKind, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        self.bytes.extend(bytes);
        let end = self.next();
        match self.runs.back_mut() {
            Some((last, until)) if *last == kind => *until = end,
            Some(_) | None => self.runs.push_back((kind, end)),
        }
        let mut keep_from = self.first + length(self.bytes.len().saturating_sub(MAX_BYTES));
        if self.runs.len() > MAX_RUNS
            && let Some((_, until)) = self.runs.get(self.runs.len() - MAX_RUNS - 1)
        {
            keep_from = keep_from.max(*until);
        }
        let forgotten = usize::try_from(keep_from - self.first).unwrap_or(usize::MAX);
        drop(self.bytes.drain(..forgotten.min(self.bytes.len())));
        self.first = keep_from;
        while self.runs.front().is_some_and(|(_, until)| *until <= keep_from) {
            let _forgotten = self.runs.pop_front();
        }
    }

    /// At most `most` bytes of one output from `position` on, or from the first that is kept: their position, the
    /// output, the bytes. None when there is nothing more.
    pub(super) fn read(&self, position: u64, most: usize) -> Option<(u64, FrameKind, Vec<u8>)> {
        let from = position.max(self.first);
        let run = self.runs.partition_point(|(_, until)| *until <= from);
        let (kind, until) = self.runs.get(run)?;
        let start = usize::try_from(from - self.first).ok()?;
        let end = usize::try_from(until - self.first)
            .ok()?
            .min(start.saturating_add(most));
        Some((from, *kind, self.bytes.range(start..end).copied().collect()))
    }
}

fn length(bytes: usize) -> u64 {
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_is_read_from_any_position() {
        let mut ring = Ring::default();
        ring.push(FrameKind::Stdout, b"ab");
        ring.push(FrameKind::Stdout, b"cd");
        ring.push(FrameKind::Stderr, b"ef");
        assert_eq!((ring.first(), ring.next()), (0, 6));
        assert_eq!(ring.read(0, 100), Some((0, FrameKind::Stdout, b"abcd".to_vec())));
        assert_eq!(ring.read(1, 2), Some((1, FrameKind::Stdout, b"bc".to_vec())));
        assert_eq!(ring.read(4, 100), Some((4, FrameKind::Stderr, b"ef".to_vec())));
        assert_eq!(ring.read(6, 100), None);
        assert_eq!(ring.read(7, 100), None);
    }

    #[test]
    fn what_goes_over_the_bound_is_forgotten_at_the_beginning() {
        let mut ring = Ring::default();
        ring.push(FrameKind::Stderr, b"gone");
        ring.push(FrameKind::Stdout, &vec![b'x'; MAX_BYTES]);
        assert_eq!((ring.first(), ring.next()), (4, 4 + length(MAX_BYTES)));
        assert_eq!(ring.read(0, 1), Some((4, FrameKind::Stdout, b"x".to_vec())));
        ring.push(FrameKind::Stdout, &vec![b'y'; 3 * MAX_BYTES]);
        assert_eq!(ring.bytes.len(), MAX_BYTES);
        assert_eq!(
            ring.read(0, 1),
            Some((ring.first(), FrameKind::Stdout, b"y".to_vec()))
        );
        assert_eq!(ring.runs.len(), 1);
    }

    #[test]
    fn outputs_that_take_turns_cost_no_more_than_others() {
        let mut ring = Ring::default();
        for _ in 0..3 * MAX_RUNS {
            ring.push(FrameKind::Stdout, b"o");
            ring.push(FrameKind::Stderr, b"e");
        }
        assert_eq!(ring.runs.len(), MAX_RUNS);
        assert_eq!(ring.bytes.len(), MAX_RUNS);
        assert_eq!(ring.next(), length(6 * MAX_RUNS));
        assert_eq!(
            ring.read(0, 10),
            Some((ring.first(), FrameKind::Stdout, b"o".to_vec()))
        );
    }
}
