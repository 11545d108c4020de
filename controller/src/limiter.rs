//! How many requests somebody may make: the generic cell rate algorithm, so many a second and so many at once.
//!
//! Pure: the time is the caller's. What is known of somebody is one number, forgotten when they may make as many at once
//! as ever; there are at most so many of those, and whoever comes when there is no room for another shares one with all
//! who come then.

use std::{
    collections::HashMap,
    hash::Hash,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

/// How many requests, and how many of them at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// In the long run.
    pub per_second: u32,
    /// At once, by somebody who was silent for a while.
    pub burst: u32,
}

/// What somebody may still do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allowance {
    /// At once, in the best case.
    pub limit: u32,
    /// At once, now.
    pub remaining: u32,
    /// Until it is the best case again.
    pub reset: Duration,
    /// This request was too much; the next one may come after so long.
    pub retry_after: Option<Duration>,
}

/// Where a connection comes from, as requests that name nobody are counted: an IPv4 address, or an IPv6 network of 64
/// bits, which is what one subscriber has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Peer(IpAddr);

impl Peer {
    /// The one behind an address.
    pub fn new(address: IpAddr) -> Self {
        Self(match address.to_canonical() {
            IpAddr::V4(address) => IpAddr::V4(address),
            IpAddr::V6(address) => {
                let network = u128::from(address) & !u128::from(u64::MAX);
                IpAddr::V6(Ipv6Addr::from(network))
            }
        })
    }

    /// Whoever it is.
    pub fn unknown() -> Self {
        Self(Ipv4Addr::UNSPECIFIED.into())
    }
}

/// What is known of everybody.
#[derive(Debug)]
pub struct Limiter<K> {
    rate: Rate,
    places: usize,
    /// When each would have made all their requests, had they come evenly.
    known: HashMap<K, Duration>,
    rest: Duration,
    swept: Duration,
}

/// How often those who may make as many as ever are looked for, when there is no room.
const SWEEP: Duration = Duration::from_secs(1);

impl Rate {
    /// `<a second>:<at once>`.
    ///
    /// # Errors
    /// Says what is expected.
    pub fn parse(text: &str) -> Result<Self, String> {
        let number = |text: &str| {
            text.parse::<u32>()
                .ok()
                .filter(|number| (1..=1_000_000).contains(number))
        };
        let parsed = text.split_once(':').and_then(|(per_second, burst)| {
            Some(Self {
                per_second: number(per_second)?,
                burst: number(burst)?,
            })
        });
        parsed.ok_or_else(|| {
            format!("expected `off`, or requests a second and at once, for example 500:5000, got `{text}`")
        })
    }

    fn interval(self) -> Duration {
        Duration::from_secs(1) / self.per_second
    }
}

impl<K: Eq + Hash + Clone> Limiter<K> {
    /// A limiter that knows at most so many.
    pub fn new(rate: Rate, places: usize) -> Self {
        Self {
            rate,
            places,
            known: HashMap::new(),
            rest: Duration::ZERO,
            swept: Duration::ZERO,
        }
    }

    /// Counts a request of somebody's at a time, which is one since the beginning and never goes back.
    pub fn count(&mut self, who: &K, now: Duration) -> Allowance {
        if self.known.len() >= self.places && !self.known.contains_key(who) && now >= self.swept + SWEEP {
            self.swept = now;
            self.known.retain(|_, done| *done > now);
        }
        let has_room = self.known.len() < self.places;
        let done = match self.known.get(who) {
            Some(done) => *done,
            None if has_room => now,
            None => self.rest,
        };
        let (interval, whole) = (self.rate.interval(), self.rate.interval() * self.rate.burst);
        let present = done.max(now);
        let next = present + interval;
        let refused = next
            .saturating_sub(whole)
            .checked_sub(now)
            .filter(|wait| !wait.is_zero());
        let done = if refused.is_some() { present } else { next };
        if refused.is_none() {
            match self.known.get_mut(who) {
                Some(known) => *known = done,
                None if has_room => drop(self.known.insert(who.clone(), done)),
                None => self.rest = done,
            }
        }
        let reset = done - now;
        let left = whole.saturating_sub(reset).as_nanos() / interval.as_nanos().max(1);
        Allowance {
            limit: self.rate.burst,
            remaining: u32::try_from(left).unwrap_or(u32::MAX),
            reset,
            retry_after: refused,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limiter(places: usize) -> Limiter<&'static str> {
        Limiter::new(
            Rate {
                per_second: 10,
                burst: 3,
            },
            places,
        )
    }

    fn at(millis: u64) -> Duration {
        Duration::from_secs(100) + Duration::from_millis(millis)
    }

    #[test]
    fn so_many_at_once_and_then_so_many_a_second() {
        let mut limiter = limiter(9);
        for left in [2, 1, 0] {
            let allowance = limiter.count(&"a", at(0));
            assert_eq!(
                (allowance.limit, allowance.remaining, allowance.retry_after),
                (3, left, None)
            );
        }
        let refused = limiter.count(&"a", at(0));
        assert_eq!(refused.retry_after, Some(Duration::from_millis(100)));
        assert_eq!(
            (refused.remaining, refused.reset),
            (0, Duration::from_millis(300))
        );
        // A refused request costs nothing, and nobody else pays for it.
        assert_eq!(
            limiter.count(&"a", at(99)).retry_after,
            Some(Duration::from_millis(1))
        );
        assert_eq!(limiter.count(&"b", at(99)).retry_after, None);
        assert_eq!(limiter.count(&"a", at(100)).retry_after, None);
        assert!(limiter.count(&"a", at(100)).retry_after.is_some());
        let rested = limiter.count(&"a", at(60_000));
        assert_eq!((rested.remaining, rested.reset), (2, Duration::from_millis(100)));
    }

    #[test]
    fn it_knows_only_so_many_and_the_others_share() {
        let mut limiter = limiter(2);
        assert_eq!(limiter.count(&"a", at(0)).remaining, 2);
        assert_eq!(limiter.count(&"b", at(0)).remaining, 2);
        assert_eq!(limiter.count(&"c", at(0)).remaining, 2);
        assert_eq!(limiter.count(&"d", at(0)).remaining, 1, "together with c");
        assert_eq!(
            limiter.count(&"a", at(0)).remaining,
            1,
            "those that are known are not affected"
        );
        assert_eq!(limiter.known.len(), 2);
        // Whoever may make as many as ever is forgotten.
        assert_eq!(limiter.count(&"e", at(5_000)).remaining, 2);
        assert_eq!(limiter.count(&"f", at(5_000)).remaining, 2);
        assert_eq!(limiter.known.len(), 2);
    }

    #[test]
    fn a_subscriber_is_one_peer() {
        let peer = |text: &str| Peer::new(text.parse().expect("an address"));
        assert_eq!(peer("2001:db8:1:2::1"), peer("2001:db8:1:2:ffff::9"));
        assert_ne!(peer("2001:db8:1:2::1"), peer("2001:db8:1:3::1"));
        assert_eq!(peer("::ffff:192.0.2.1"), peer("192.0.2.1"));
        assert_ne!(peer("192.0.2.1"), peer("192.0.2.2"));
    }

    #[test]
    fn a_rate_is_two_numbers() {
        assert_eq!(
            Rate::parse("500:5000"),
            Ok(Rate {
                per_second: 500,
                burst: 5_000
            })
        );
        for text in [
            "",
            "500",
            "0:1",
            "1:0",
            "1:",
            ":1",
            "a:b",
            "1:2:3",
            "-1:1",
            "1:1000001",
        ] {
            assert!(Rate::parse(text).is_err(), "{text:?}");
        }
    }
}
