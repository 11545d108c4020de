//! What a sandbox may use: the resources a caller asks for, checked. Pure.
//!
//! Texts such as `500m` or `2Gi` are kept beside their meaning, because published clients get back what
//! they sent.

use std::{collections::BTreeMap, fmt, str::FromStr};

use sandgate_api::rest::Isolation;
use serde::{Deserialize, Serialize};

/// A resource text is not understood or out of range.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected {expected}")]
pub struct InvalidQuantity {
    /// What would be right, with its range.
    pub expected: &'static str,
}

/// Processor time: `2`, `0.5`, `500m`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpus {
    text: String,
    millis: u64,
}

impl Cpus {
    const EXPECTED: &'static str =
        "processors as text, for example \"2\", \"0.5\" or \"500m\", between \"50m\" and \"128\"";
    const RANGE: std::ops::RangeInclusive<u64> = 50..=128_000;

    /// In thousandths of a processor.
    pub fn millis(&self) -> u64 {
        self.millis
    }
}

impl FromStr for Cpus {
    type Err = InvalidQuantity;

    fn from_str(text: &str) -> Result<Self, InvalidQuantity> {
        let millis = match text.strip_suffix('m') {
            Some(digits) => whole(digits),
            None => decimal_millis(text),
        };
        match millis {
            Some(millis) if Self::RANGE.contains(&millis) => Ok(Self {
                text: text.to_owned(),
                millis,
            }),
            Some(_) | None => Err(InvalidQuantity {
                expected: Self::EXPECTED,
            }),
        }
    }
}

impl fmt::Display for Cpus {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.text)
    }
}

/// An amount of memory or disk: `2Gi`, `512Mi`, `1G`, `1073741824`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    text: String,
    bytes: u64,
}

const MEBI: u64 = 1 << 20;
const TEBI: u64 = 1 << 40;

impl Size {
    /// In bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// An amount of memory: 32Mi to 1Ti.
    ///
    /// # Errors
    /// When the text is not understood or out of range.
    pub fn memory(text: &str) -> Result<Self, InvalidQuantity> {
        const EXPECTED: &str =
            "memory as text, for example \"512Mi\" or \"2Gi\", between \"32Mi\" and \"1Ti\"";
        Self::within(text, 32 * MEBI..=TEBI).ok_or(InvalidQuantity { expected: EXPECTED })
    }

    /// A size of the writable layer: 16Mi to 1Ti.
    ///
    /// # Errors
    /// When the text is not understood or out of range.
    pub fn disk(text: &str) -> Result<Self, InvalidQuantity> {
        const EXPECTED: &str =
            "a size as text, for example \"512Mi\" or \"2Gi\", between \"16Mi\" and \"1Ti\"";
        Self::within(text, 16 * MEBI..=TEBI).ok_or(InvalidQuantity { expected: EXPECTED })
    }

    fn within(text: &str, range: std::ops::RangeInclusive<u64>) -> Option<Self> {
        const UNITS: [(&str, u64); 8] = [
            ("Ki", 1 << 10),
            ("Mi", MEBI),
            ("Gi", 1 << 30),
            ("Ti", TEBI),
            ("k", 1_000),
            ("M", 1_000_000),
            ("G", 1_000_000_000),
            ("T", 1_000_000_000_000),
        ];
        let (digits, unit) = UNITS
            .iter()
            .find_map(|(suffix, unit)| text.strip_suffix(suffix).map(|digits| (digits, *unit)))
            .unwrap_or((text, 1));
        // `1.5Gi`: thousandths are exact enough and keep floating point out of it.
        let bytes = match whole(digits) {
            Some(count) => count.checked_mul(unit)?,
            None if unit > 1 => decimal_millis(digits)?.checked_mul(unit)? / 1_000,
            None => return None,
        };
        range.contains(&bytes).then(|| Self {
            text: text.to_owned(),
            bytes,
        })
    }
}

impl fmt::Display for Size {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.text)
    }
}

/// Decimal digits only, at most 15 of them: no sign, no space.
fn whole(digits: &str) -> Option<u64> {
    let plain = (1..=15).contains(&digits.len()) && digits.bytes().all(|byte| byte.is_ascii_digit());
    plain.then(|| digits.parse().ok()).flatten()
}

/// A decimal number with up to three places, in thousandths.
fn decimal_millis(text: &str) -> Option<u64> {
    let Some((units, places)) = text.split_once('.') else {
        return whole(text)?.checked_mul(1_000);
    };
    if places.len() > 3 {
        return None;
    }
    let thousandths = whole(places)? * 10_u64.pow(3 - u32::try_from(places.len()).ok()?);
    whole(units)?.checked_mul(1_000)?.checked_add(thousandths)
}

/// Shortest and longest life of a sandbox, in seconds.
pub const LIFETIME_SECONDS: std::ops::RangeInclusive<u64> = 60..=86_400;

/// Fewest and most processes of a sandbox.
pub const PIDS: std::ops::RangeInclusive<u64> = 16..=32_768;

/// Most environment variables of a sandbox or a command.
pub const MAX_VARIABLES: usize = 256;

/// Longest environment of a sandbox or a command, in bytes: names and values together.
pub const MAX_ENVIRONMENT: usize = 96 * 1024;

/// The environment of a sandbox or a command is not acceptable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidEnvironment {
    /// A name is not one that every shell understands.
    #[error("`{0}` is not a variable name (letters, digits and `_`, not beginning with a digit)")]
    Name(String),
    /// A value cannot be passed to a program.
    #[error("the value of `{0}` contains a NUL character")]
    Value(String),
    /// Too many variables.
    #[error("at most {MAX_VARIABLES} variables are possible")]
    TooMany,
    /// Too long.
    #[error("names and values together may have at most {MAX_ENVIRONMENT} bytes")]
    TooLong,
}

/// Checks an environment.
///
/// # Errors
/// Names the variable that is wrong.
pub fn check_environment(variables: &BTreeMap<String, String>) -> Result<(), InvalidEnvironment> {
    if variables.len() > MAX_VARIABLES {
        return Err(InvalidEnvironment::TooMany);
    }
    let mut length = 0;
    for (name, value) in variables {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
        if name.is_empty() || name.as_bytes()[0].is_ascii_digit() || !name.bytes().all(plain) {
            return Err(InvalidEnvironment::Name(name.chars().take(80).collect()));
        }
        if value.contains('\0') {
            return Err(InvalidEnvironment::Value(name.clone()));
        }
        length += name.len() + value.len() + 2;
    }
    if length > MAX_ENVIRONMENT {
        Err(InvalidEnvironment::TooLong)
    } else {
        Ok(())
    }
}

/// What a sandbox may use, as stored.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxSpec {
    /// Processor time.
    pub cpus: Cpus,
    /// Memory.
    pub memory: Size,
    /// Size of the writable layer.
    pub disk: Size,
    /// Most processes and threads at once.
    pub pids: u64,
    /// Lifetime.
    pub timeout_seconds: u64,
    /// Environment of everything that runs inside.
    pub env: BTreeMap<String, String>,
    /// How strongly it is isolated.
    pub isolation: Isolation,
}

impl SandboxSpec {
    /// Whether a sandbox made with the one could serve as one made with the other, but for its environment and its
    /// lifetime.
    pub fn same_resources(&self, other: &Self) -> bool {
        let Self {
            cpus,
            memory,
            disk,
            pids,
            timeout_seconds: _,
            env: _,
            isolation,
        } = self;
        cpus.millis == other.cpus.millis
            && memory.bytes == other.memory.bytes
            && disk.bytes == other.disk.bytes
            && *pids == other.pids
            && *isolation == other.isolation
    }
}

/// Leaves the environment's values out: users put secrets there.
impl fmt::Debug for SandboxSpec {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("SandboxSpec")
            .field("cpus", &self.cpus.text)
            .field("memory", &self.memory.text)
            .field("disk", &self.disk.text)
            .field("pids", &self.pids)
            .field("timeout_seconds", &self.timeout_seconds)
            .field("env", &self.env.keys().collect::<Vec<_>>())
            .field("isolation", &self.isolation)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_are_read_as_people_write_them() {
        let cases = [
            ("2", Some(2_000)),
            ("1", Some(1_000)),
            ("0.5", Some(500)),
            ("1.25", Some(1_250)),
            ("500m", Some(500)),
            ("50m", Some(50)),
            ("128", Some(128_000)),
            ("49m", None),
            ("129", None),
            ("0", None),
            ("", None),
            ("m", None),
            ("-1", None),
            ("+1", None),
            (" 1", None),
            ("1 ", None),
            ("1e3", None),
            ("1.", None),
            (".5", None),
            ("1.0001", None),
            ("0.5m", None),
            ("2Gi", None),
            ("١", None),
            ("99999999999999999999999", None),
        ];
        for (text, millis) in cases {
            assert_eq!(
                text.parse::<Cpus>().ok().map(|cpus| cpus.millis()),
                millis,
                "{text:?}"
            );
        }
    }

    #[test]
    fn memory_is_read_as_people_write_it() {
        let cases = [
            ("2Gi", Some(2 << 30)),
            ("512Mi", Some(512 << 20)),
            ("1.5Gi", Some(3 << 29)),
            ("1G", Some(1_000_000_000)),
            ("1073741824", Some(1 << 30)),
            ("32Mi", Some(32 << 20)),
            ("1Ti", Some(1 << 40)),
            ("31Mi", None),
            ("2Ti", None),
            ("0", None),
            ("", None),
            ("Gi", None),
            ("-2Gi", None),
            ("2 Gi", None),
            ("2gi", None),
            ("2GiB", None),
            ("1.5", None),
            ("999999999999999Ti", None),
        ];
        for (text, bytes) in cases {
            assert_eq!(
                Size::memory(text).ok().map(|size| size.bytes()),
                bytes,
                "{text:?}"
            );
        }
        assert_eq!(Size::disk("16Mi").map(|size| size.bytes()), Ok(16 << 20));
        assert!(Size::disk("15Mi").is_err());
    }

    #[test]
    fn a_text_comes_back_as_it_was_sent() {
        for text in ["2", "500m", "0.5"] {
            assert_eq!(
                text.parse::<Cpus>().map(|cpus| cpus.to_string()).as_deref(),
                Ok(text)
            );
        }
        assert_eq!(
            Size::memory("1.5Gi").map(|size| size.to_string()).as_deref(),
            Ok("1.5Gi")
        );
    }

    #[test]
    fn an_environment_has_only_names_a_shell_understands() {
        let one = |name: &str, value: &str| {
            check_environment(&BTreeMap::from([(name.to_owned(), value.to_owned())]))
        };
        assert_eq!(one("PATH", "/bin"), Ok(()));
        assert_eq!(one("_x9", ""), Ok(()));
        for name in ["", "9x", "A-B", "A=B", "A B", "É", "A\0"] {
            assert!(
                matches!(one(name, ""), Err(InvalidEnvironment::Name(_))),
                "{name:?}"
            );
        }
        assert_eq!(one("A", "x\0"), Err(InvalidEnvironment::Value("A".to_owned())));
        assert_eq!(
            one("A", &"x".repeat(MAX_ENVIRONMENT)),
            Err(InvalidEnvironment::TooLong)
        );
        let many = (0..=MAX_VARIABLES)
            .map(|number| (format!("V{number}"), String::new()))
            .collect();
        assert_eq!(check_environment(&many), Err(InvalidEnvironment::TooMany));
    }
}
