//! What a sandbox may ask of DNS, beside the names that its rules open: types, and how much of it.

use serde::{Deserialize, Serialize};

macro_rules! types {
    ($($(#[doc = $doc:literal])+ $name:ident = $text:literal,)+) => {
        /// A type of DNS records that a policy may have answered. HTTPS and SVCB are not among them: they would hand out
        /// the keys of encrypted ClientHellos, and hints at QUIC.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        pub enum DnsType {
            $($(#[doc = $doc])+ #[serde(rename = $text)] $name,)+
        }

        impl DnsType {
            /// Every type, as documents spell them.
            pub const ALL: &'static [(&'static str, Self)] = &[$(($text, Self::$name),)+];

            /// The words alone.
            pub(crate) const WORDS: &'static [&'static str] = &[$($text,)+];

            /// As documents and zone files spell it (RFC 1035, 5.1).
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)+
                }
            }
        }
    };
}

types! {
    /// IPv4 addresses (RFC 1035, 3.4.1).
    A = "A",
    /// IPv6 addresses (RFC 3596).
    Aaaa = "AAAA",
    /// Who may issue certificates (RFC 8659).
    Caa = "CAA",
    /// Another name for a name (RFC 1035, 3.3.1).
    Cname = "CNAME",
    /// Mail servers (RFC 1035, 3.3.9).
    Mx = "MX",
    /// Name servers (RFC 1035, 3.3.11).
    Ns = "NS",
    /// The names of addresses (RFC 1035, 3.3.12).
    Ptr = "PTR",
    /// The start of a zone (RFC 1035, 3.3.13).
    Soa = "SOA",
    /// Where services are (RFC 2782).
    Srv = "SRV",
    /// Any text (RFC 1035, 3.3.14).
    Txt = "TXT",
}

/// A set of [`DnsType`]s.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DnsTypes(u16);

impl DnsTypes {
    /// Every type there is.
    pub const ALL: Self = Self((1 << DnsType::ALL.len()) - 1);

    /// Whether the type is one of them.
    pub const fn contains(self, kind: DnsType) -> bool {
        self.0 >> kind as u16 & 1 == 1
    }

    /// Those of the set, in the order of [`DnsType::ALL`].
    pub fn iter(self) -> impl Iterator<Item = DnsType> {
        let all = DnsType::ALL.iter().map(|(_, kind)| *kind);
        all.filter(move |kind| self.contains(*kind))
    }

    /// Those that are in both.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

impl FromIterator<DnsType> for DnsTypes {
    fn from_iter<I: IntoIterator<Item = DnsType>>(kinds: I) -> Self {
        Self(kinds.into_iter().fold(0, |set, kind| set | 1 << kind as u16))
    }
}

/// What a sandbox may ask of DNS. Rates are per registrable zone ([`crate::DomainName::zone`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DnsBudget {
    /// Types that are answered.
    pub types: DnsTypes,
    /// Different names in a minute.
    pub unique_names_per_minute: u32,
    /// Bytes of all names that the upstream is asked for in a minute, each counted as often as that is done. What the
    /// node knows already costs nothing.
    pub query_bytes_per_minute: u32,
    /// Longest label in bytes.
    pub label_max: u8,
    /// Longest name in bytes of its canonical text, which has no dot at its end.
    pub name_max: u8,
}

impl Default for DnsBudget {
    /// In force where a document says nothing.
    fn default() -> Self {
        Self {
            types: [DnsType::A, DnsType::Aaaa].into_iter().collect(),
            unique_names_per_minute: 60,
            query_bytes_per_minute: 8192,
            label_max: 40,
            name_max: 128,
        }
    }
}

impl DnsBudget {
    /// Nothing but what DNS itself limits (RFC 1035, 2.3.4): in force where no tier enforces anything.
    pub const UNLIMITED: Self = Self {
        types: DnsTypes::ALL,
        unique_names_per_minute: u32::MAX,
        query_bytes_per_minute: u32::MAX,
        label_max: 63,
        name_max: 253,
    };

    /// Of each limit the lower one, of the types those that both have.
    #[must_use]
    pub fn strictest(self, other: Self) -> Self {
        Self {
            types: self.types.and(other.types),
            unique_names_per_minute: self.unique_names_per_minute.min(other.unique_names_per_minute),
            query_bytes_per_minute: self.query_bytes_per_minute.min(other.query_bytes_per_minute),
            label_max: self.label_max.min(other.label_max),
            name_max: self.name_max.min(other.name_max),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_strictest_budget_has_the_least_of_everything() {
        let one = DnsBudget {
            types: [DnsType::A, DnsType::Txt].into_iter().collect(),
            unique_names_per_minute: 5,
            label_max: 63,
            ..DnsBudget::default()
        };
        let strictest = one.strictest(DnsBudget::default());
        assert_eq!(strictest.types.iter().collect::<Vec<_>>(), [DnsType::A]);
        assert_eq!((strictest.unique_names_per_minute, strictest.label_max), (5, 40));
        assert_eq!(
            DnsBudget::default().strictest(DnsBudget::UNLIMITED),
            DnsBudget::default()
        );
        assert_eq!(DnsTypes::ALL.iter().count(), DnsType::ALL.len());
    }
}
