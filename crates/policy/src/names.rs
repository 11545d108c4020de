//! Names of hosts: one canonical form, made in one place.
//!
//! Every name that takes part in a decision (from a document, an SNI, a Host header or a DNS query) is a
//! [`DomainName`]. Two names are the same name exactly if their texts are equal; nothing compares raw text.

mod set;

use std::{fmt, net::IpAddr, str::FromStr};

use idna::uts46::{AsciiDenyList, DnsLength, Hyphens, Uts46};
use serde::{Deserialize, Serialize};

pub(crate) use set::{DomainIndex, DomainSet};

/// Longest name in characters of its canonical form, without the trailing dot (RFC 1035, 2.3.4).
const MAX_NAME: usize = 253;
/// Longest label (RFC 1035, 2.3.4).
const MAX_LABEL: usize = 63;
/// Longest text that is looked at: Unicode may shrink on its way to the canonical form, but not without end.
const MAX_TEXT: usize = 1024;

/// The text is not the name of a host, or not a pattern for one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Nothing there.
    #[error("is empty")]
    Empty,
    /// More than 253 characters.
    #[error("is longer than 253 characters")]
    TooLong,
    /// A label of more than 63 characters.
    #[error("has a label of more than 63 characters")]
    LabelTooLong,
    /// Two dots in a row, or one at the beginning.
    #[error("has an empty label (two dots in a row, or one at the beginning)")]
    EmptyLabel,
    /// A character that no host name has: space, NUL, slash, percent, at sign...
    #[error("has a character that is not allowed in a host name (letters, digits, `-`, `_` and dots are)")]
    Character,
    /// UTS-46 refuses it: bad punycode, an unassigned or forbidden code point, mixed directions.
    #[error("is not a valid internationalised name (UTS-46)")]
    Idna,
    /// An address, or a number that some resolvers read as an address.
    #[error("is an address, not a name")]
    Address,
    /// A star that is not the whole first label.
    #[error("has a wildcard in a place where none can be: only `*.example.org` and `*` alone are patterns")]
    Wildcard,
    /// `*.com`: everything below it belongs to someone else.
    #[error("is a wildcard over a public suffix: name the registered domain, as in `*.example.org`")]
    PublicSuffix,
}

/// The canonical name of a host: UTS-46 A-labels in lower case, without trailing dot, never an address.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DomainName(String);

impl DomainName {
    /// Brings `text` into the canonical form. One trailing dot is dropped.
    ///
    /// # Errors
    ///
    /// [`NameError`] says what a host name cannot have; nothing is repaired silently.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        if text.is_empty() {
            return Err(NameError::Empty);
        }
        if text.len() > MAX_TEXT {
            return Err(NameError::TooLong);
        }
        // Before UTS-46, which does not tell a forbidden character from a broken label.
        if text
            .bytes()
            .any(|byte| byte.is_ascii() && !host_byte(byte) && byte != b'.')
        {
            return Err(address_or(text, NameError::Character));
        }
        let ascii = Uts46::new()
            .to_ascii(
                text.as_bytes(),
                AsciiDenyList::URL,
                Hyphens::Allow,
                DnsLength::Ignore,
            )
            .map_err(|_unspecific| NameError::Idna)?;
        let name = ascii.strip_suffix('.').unwrap_or(&ascii);
        if name.is_empty() {
            return Err(NameError::Empty);
        }
        if name.len() > MAX_NAME {
            return Err(NameError::TooLong);
        }
        for label in name.split('.') {
            if label.is_empty() {
                return Err(NameError::EmptyLabel);
            }
            if label.len() > MAX_LABEL {
                return Err(NameError::LabelTooLong);
            }
            if !label
                .bytes()
                .all(|byte| host_byte(byte) && !byte.is_ascii_uppercase())
            {
                return Err(NameError::Character);
            }
        }
        if ends_in_a_number(name) {
            return Err(NameError::Address);
        }
        Ok(Self(name.to_owned()))
    }

    /// The canonical text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The part of the name that one owner registered below a public suffix, such as `example.org` of
    /// `a.b.example.org`; the whole name where it is a suffix itself. Suffixes of companies that give names to their
    /// customers do not count, as with wildcards: names below them share one zone.
    pub fn zone(&self) -> &str {
        let name = self.as_str();
        let mut suffix = psl::suffix(name.as_bytes());
        while let Some(found) = suffix
            && found.typ() == Some(psl::Type::Private)
        {
            let parent = found.as_bytes().iter().position(|byte| *byte == b'.');
            suffix = parent.and_then(|dot| psl::suffix(&found.as_bytes()[dot + 1..]));
        }
        let length = suffix.map_or(0, |suffix| suffix.as_bytes().len());
        let Some(head) = name.len().checked_sub(length + 1) else {
            return name;
        };
        name[..head].rfind('.').map_or(name, |dot| &name[dot + 1..])
    }

    /// Whether the name is one of the public tree: more than one label, and not below a zone that is reserved for
    /// local use (RFC 6761, 6762, 7686, 8375, 9476; `internal` by ICANN, and the zone of a cluster below `local`).
    /// A wildcard or a default that allows everything means public names; the others must be listed.
    pub(crate) fn is_public(&self) -> bool {
        let Some((rest, last)) = self.0.rsplit_once('.') else {
            return false;
        };
        let local = ["alt", "internal", "invalid", "local", "localhost", "onion"];
        let home = last == "arpa" && rest.rsplit('.').next() == Some("home");
        !home && !local.contains(&last)
    }
}

impl fmt::Display for DomainName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl FromStr for DomainName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        Self::parse(text)
    }
}

impl TryFrom<String> for DomainName {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        Self::parse(&text)
    }
}

impl From<DomainName> for String {
    fn from(name: DomainName) -> Self {
        name.0
    }
}

/// What a document lists: a name, everything below a name, or every name.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum DomainPattern {
    /// This name and no other.
    Exact(DomainName),
    /// One or more labels below the name; not the name itself.
    Below(DomainName),
    /// Every name. In an allow rule: every public name.
    Any,
}

impl DomainPattern {
    /// Reads `x`, `*.x` or `*`.
    ///
    /// # Errors
    ///
    /// As [`DomainName::parse`]; a wildcard in another place or over a public suffix is refused too.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        if text == "*" {
            return Ok(Self::Any);
        }
        let (below, rest) = match text.strip_prefix("*.") {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        if rest.contains('*') {
            return Err(NameError::Wildcard);
        }
        let name = DomainName::parse(rest)?;
        if !below {
            return Ok(Self::Exact(name));
        }
        if is_public_suffix(&name) {
            return Err(NameError::PublicSuffix);
        }
        Ok(Self::Below(name))
    }

    /// Whether the name is one of those meant. Wildcards match at a label boundary only.
    pub fn matches(&self, name: &DomainName) -> bool {
        match self {
            Self::Exact(exact) => exact == name,
            Self::Below(apex) => name
                .0
                .strip_suffix(apex.as_str())
                .is_some_and(|head| head.len() > 1 && head.ends_with('.')),
            Self::Any => true,
        }
    }
}

impl fmt::Display for DomainPattern {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(name) => write!(formatter, "{name}"),
            Self::Below(apex) => write!(formatter, "*.{apex}"),
            Self::Any => formatter.write_str("*"),
        }
    }
}

impl FromStr for DomainPattern {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        Self::parse(text)
    }
}

/// Underscores are no host name characters by RFC 952, and yet occur in names that people must reach.
fn host_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_'
}

/// The last label decides (WHATWG URL, "ends in a number"): no public name ends so, and resolvers read `127.1`,
/// `0x7f.1` and `2130706433` as addresses.
fn ends_in_a_number(name: &str) -> bool {
    let last = name.rsplit('.').next().unwrap_or(name);
    let hexadecimal = last.strip_prefix("0x");
    last.bytes().all(|byte| byte.is_ascii_digit())
        || hexadecimal.is_some_and(|digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

fn address_or(text: &str, error: NameError) -> NameError {
    let bare = text
        .strip_prefix('[')
        .and_then(|text| text.strip_suffix(']'))
        .unwrap_or(text);
    let host = bare.split('/').next().unwrap_or(bare);
    if host.parse::<IpAddr>().is_ok() {
        NameError::Address
    } else {
        error
    }
}

/// Registries' suffixes (`com`, `co.uk`), zones of which every child is one (`kawasaki.jp`), and top-level names that
/// are on no list. Suffixes of companies that give names to their customers (`github.io`) are not meant: people allow
/// `*.githubusercontent.com` for good reasons.
fn is_public_suffix(name: &DomainName) -> bool {
    let is_suffix = |name: &str| match psl::suffix(name.as_bytes()) {
        Some(suffix) => suffix.as_bytes() == name.as_bytes() && suffix.typ() != Some(psl::Type::Private),
        None => true,
    };
    is_suffix(&name.0) || is_suffix(&format!("0.{name}"))
}

#[cfg(test)]
mod tests;
