//! Sets of ports.

use std::fmt;

/// An inclusive range of ports as a document writes it: `443` or `8000-8080`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct PortSpan {
    pub(crate) first: u16,
    pub(crate) last: u16,
}

impl PortSpan {
    pub(crate) const ALL: Self = Self {
        first: 0,
        last: u16::MAX,
    };

    pub(crate) const fn one(port: u16) -> Self {
        Self {
            first: port,
            last: port,
        }
    }

    /// Reads `443` or `8000-8080`; digits only, ports from 1.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let span = Self {
            first: port(first)?,
            last: port(last)?,
        };
        (span.first <= span.last).then_some(span)
    }
}

fn port(text: &str) -> Option<u16> {
    let plain = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) && !text.starts_with('0');
    text.parse().ok().filter(|_| plain)
}

impl fmt::Display for PortSpan {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            write!(formatter, "{}", self.first)
        } else {
            write!(formatter, "{}-{}", self.first, self.last)
        }
    }
}

/// A set of ports: spans in order, disjoint, never touching.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub(crate) struct PortSet(Vec<PortSpan>);

impl PortSet {
    pub(crate) fn all() -> Self {
        Self(vec![PortSpan::ALL])
    }

    pub(crate) fn new(spans: impl IntoIterator<Item = PortSpan>) -> Self {
        let mut sorted: Vec<PortSpan> = spans.into_iter().collect();
        sorted.sort_unstable();
        let mut merged: Vec<PortSpan> = Vec::with_capacity(sorted.len());
        for span in sorted {
            match merged.last_mut() {
                Some(last) if u32::from(span.first) <= u32::from(last.last) + 1 => {
                    last.last = last.last.max(span.last);
                }
                Some(_) | None => merged.push(span),
            }
        }
        Self(merged)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn spans(&self) -> &[PortSpan] {
        &self.0
    }

    pub(crate) fn contains(&self, port: u16) -> bool {
        let after = self.0.partition_point(|span| span.first <= port);
        after > 0 && self.0[after - 1].last >= port
    }

    /// The ports that are in both.
    pub(crate) fn and(&self, other: &Self) -> Self {
        let mut common = Vec::new();
        let (mut ones, mut twos) = (self.0.iter().peekable(), other.0.iter().peekable());
        while let (Some(one), Some(two)) = (ones.peek(), twos.peek()) {
            let span = PortSpan {
                first: one.first.max(two.first),
                last: one.last.min(two.last),
            };
            if span.first <= span.last {
                common.push(span);
            }
            if one.last < two.last {
                ones.next();
            } else {
                twos.next();
            }
        }
        Self::new(common)
    }

    /// The ports that are in either.
    pub(crate) fn or(&self, other: &Self) -> Self {
        Self::new(self.0.iter().chain(&other.0).copied())
    }

    /// The ports of `self` that are not in `other`.
    pub(crate) fn without(&self, other: &Self) -> Self {
        self.and(&other.complement())
    }

    fn complement(&self) -> Self {
        let mut gaps = Vec::with_capacity(self.0.len() + 1);
        let mut next = Some(0);
        for span in &self.0 {
            if let Some(first) = next
                && first < span.first
            {
                gaps.push(PortSpan {
                    first,
                    last: span.first - 1,
                });
            }
            next = span.last.checked_add(1);
        }
        if let Some(first) = next {
            gaps.push(PortSpan {
                first,
                last: u16::MAX,
            });
        }
        Self(gaps)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_set() -> impl Strategy<Value = PortSet> {
        let edge = prop_oneof![
            Just(0),
            Just(1),
            Just(443),
            Just(u16::MAX - 1),
            Just(u16::MAX),
            any::<u16>()
        ];
        let span = (edge.clone(), edge).prop_map(|(a, b)| PortSpan {
            first: a.min(b),
            last: a.max(b),
        });
        proptest::collection::vec(span, 0..6).prop_map(PortSet::new)
    }

    #[test]
    fn spans_are_read_strictly() {
        assert_eq!(PortSpan::parse("443"), Some(PortSpan::one(443)));
        assert_eq!(
            PortSpan::parse("1-65535"),
            Some(PortSpan {
                first: 1,
                last: 65535
            })
        );
        for text in [
            "", "0", "65536", "443-", "-443", "9-8", "+443", " 443", "0443", "1-2-3", "https", "4４3",
        ] {
            assert_eq!(PortSpan::parse(text), None, "{text:?} was accepted");
        }
    }

    proptest! {
        #[test]
        fn set_operations_agree_with_membership(one in any_set(), two in any_set(), port in any::<u16>()) {
            let edges = one.spans().iter().chain(two.spans()).flat_map(|span| [span.first, span.last]);
            let near = edges.flat_map(|edge| [edge.saturating_sub(1), edge, edge.saturating_add(1)]);
            for port in near.chain([port]) {
                let (in_one, in_two) = (one.contains(port), two.contains(port));
                prop_assert_eq!(one.and(&two).contains(port), in_one && in_two);
                prop_assert_eq!(one.or(&two).contains(port), in_one || in_two);
                prop_assert_eq!(one.without(&two).contains(port), in_one && !in_two);
            }
            prop_assert!(one.without(&one).is_empty());
        }
    }
}
