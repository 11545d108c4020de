//! How much work the answers of one sandbox may make: names that somebody fills with hundreds of addresses, asked in turn,
//! would keep busy the tasks that answer everybody's questions. Pure: time comes from the caller.
//!
//! Nothing is cut: every address of an answer is pinned and given. What an answer costs is known only when it is given, so
//! the last one may cost more than is left; after it nothing is answered until that is made up for.

use std::time::{Duration, Instant};

/// What a record costs that is given out.
const GIVEN: u64 = 1;
/// What an address costs that was not pinned under the name: the books, the kernel, the log. So much more, because resolvers
/// that get a large answer ask for it a dozen times.
const PINNED: u64 = 64;
/// What a sandbox may spend at once: all the pins that it can have, twice.
const MOST: u64 = 2 * PINS_MAX * PINNED;
/// What it gets back in a second: a thousand new pins.
const A_SECOND: u64 = 1024 * PINNED;
const PINS_MAX: u64 = crate::pins::PINS_MAX as u64;

const MICROS: u64 = 1_000_000;

/// What one sandbox has spent.
#[derive(Debug, Default)]
pub struct Load {
    /// Beyond [`MOST`] too: a debt.
    spent: u64,
    /// Made up for until then.
    at: Option<Instant>,
}

impl Load {
    /// Whether an answer may be given; if so, its records are counted.
    pub fn give(&mut self, records: usize, now: Instant) -> bool {
        self.make_up(now);
        if self.spent >= MOST {
            return false;
        }
        self.spend(records, GIVEN);
        true
    }

    /// Addresses of the answer had to be pinned.
    pub fn pinned(&mut self, addresses: usize) {
        self.spend(addresses, PINNED);
    }

    fn spend(&mut self, count: usize, price: u64) {
        let count = u64::try_from(count).unwrap_or(u64::MAX);
        self.spent = self.spent.saturating_add(count.saturating_mul(price));
    }

    fn make_up(&mut self, now: Instant) {
        let Some(at) = self.at.filter(|_| self.spent > 0) else {
            self.at = Some(now);
            return;
        };
        let passed = now.saturating_duration_since(at).as_micros();
        let back = u64::try_from(passed).unwrap_or(u64::MAX).saturating_mul(A_SECOND) / MICROS;
        self.spent = self.spent.saturating_sub(back);
        // What is less than one is kept for the next time.
        self.at = Some(if self.spent == 0 {
            now
        } else {
            at + Duration::from_micros(back.saturating_mul(MICROS) / A_SECOND)
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers of `size` new addresses that are given in a row, at most `most`.
    fn given(load: &mut Load, size: usize, most: usize, now: Instant) -> usize {
        let answer = |_: &usize| {
            let gives = load.give(size, now);
            if gives {
                load.pinned(size);
            }
            gives
        };
        (0..most).take_while(answer).count()
    }

    #[test]
    fn large_answers_are_bounded_by_the_second_and_small_ones_are_not_noticed() {
        let (mut load, start) = (Load::default(), Instant::now());
        let first = given(&mut load, 500, 1000, start);
        assert!((15..=17).contains(&first), "{first}");
        assert!(!load.give(0, start), "nothing at all before it is made up for");
        // From then on a thousand new pins a second, however often it is asked.
        let mut later = 0;
        for step in 1..=10_000_u32 {
            later += given(&mut load, 500, 1000, start + step * Duration::from_millis(1));
        }
        assert!((19..=22).contains(&later), "{later}");
        // Who asks for what is pinned, or for one address at a time, may do so as often as the kernel lets it.
        let (mut known, mut single) = (Load::default(), Load::default());
        for step in 0..20_000_u32 {
            let now = start + step * Duration::from_micros(500);
            assert!(known.give(8, now));
            if step % 4 == 0 {
                assert!(single.give(1, now));
                single.pinned(1);
            }
        }
    }

    #[test]
    fn three_hundred_addresses_that_all_turn_every_four_seconds_are_never_too_many() {
        let (mut load, start) = (Load::default(), Instant::now());
        for turn in 0..1000_u32 {
            let now = start + turn * Duration::from_secs(4);
            assert_eq!(given(&mut load, 300, 10, now), 10);
        }
    }

    #[test]
    fn an_answer_of_any_size_costs_its_own_sandbox_alone_and_for_a_while() {
        let (mut load, start) = (Load::default(), Instant::now());
        assert!(load.give(usize::MAX, start));
        load.pinned(usize::MAX);
        assert!(!load.give(1, start + Duration::from_secs(60)));
        let mut load = Load::default();
        assert!(load.give(512, start));
        load.pinned(3 * 4096);
        assert!(!load.give(1, start + Duration::from_secs(3)));
        assert!(load.give(1, start + Duration::from_secs(9)));
        // Time that goes back gives nothing.
        assert!(load.give(1, start));
    }
}
