//! What a sandbox's owner asks for beside resources: its session, when it is given up, what is noted about it. Pure.

use std::collections::BTreeMap;

/// Shortest and longest idle timeout of a sandbox, in seconds.
pub const IDLE_SECONDS: std::ops::RangeInclusive<u64> = 10..=86_400;

/// Longest session key, in characters.
pub const MAX_SESSION_KEY: usize = 128;

/// Most notes about one sandbox.
pub const MAX_METADATA: usize = 32;

/// Longest name of a note, in characters.
pub const MAX_METADATA_NAME: usize = 64;

/// Longest note, in bytes.
pub const MAX_METADATA_VALUE: usize = 512;

/// What a sandbox's owner asks for beside resources.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Terms {
    /// Creations of the same key give the same sandbox for as long as it lives.
    pub session_key: Option<String>,
    /// It ends when nothing has happened in it for so long, in seconds.
    pub idle_timeout_seconds: Option<u64>,
    /// Notes of its owner, which mean nothing here.
    pub metadata: BTreeMap<String, String>,
    /// What it was made from.
    pub template_id: Option<String>,
}

/// What is wrong with a session key; none when nothing is.
pub fn wrong_session_key(key: &str) -> Option<String> {
    let is_plain = !key.trim().is_empty() && !key.chars().any(char::is_control);
    let fits = key.chars().count() <= MAX_SESSION_KEY;
    (!is_plain || !fits).then(|| {
        format!(
            "expected 1 to {MAX_SESSION_KEY} characters, not only spaces and none of them a control character"
        )
    })
}

/// Which note is wrong, and why; none when all are acceptable.
pub fn wrong_metadata(metadata: &BTreeMap<String, String>) -> Option<(Option<&str>, String)> {
    if metadata.len() > MAX_METADATA {
        return Some((None, format!("at most {MAX_METADATA} entries are possible")));
    }
    metadata.iter().find_map(|(name, value)| {
        let is_name =
            |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.' | b'/' | b':');
        if name.is_empty() || name.len() > MAX_METADATA_NAME || !name.bytes().all(is_name) {
            let message = format!(
                "a name has 1 to {MAX_METADATA_NAME} characters, each a letter of ASCII, a digit or one of `_-./:`"
            );
            return Some((None, message));
        }
        if value.len() > MAX_METADATA_VALUE || value.contains('\0') {
            let message = format!("expected at most {MAX_METADATA_VALUE} bytes without a NUL character");
            return Some((Some(name.as_str()), message));
        }
        None
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_key_is_a_short_text() {
        for key in ["a", "user 7/thread 9", "Ä", &"x".repeat(MAX_SESSION_KEY)] {
            assert_eq!(wrong_session_key(key), None, "{key:?}");
        }
        for key in ["", " ", "a\nb", "\0", &"x".repeat(MAX_SESSION_KEY + 1)] {
            assert!(wrong_session_key(key).is_some(), "{key:?}");
        }
    }

    #[test]
    fn notes_are_bounded_in_every_direction() {
        let one = |name: &str, value: &str| BTreeMap::from([(name.to_owned(), value.to_owned())]);
        let long = "x".repeat(MAX_METADATA_NAME + 1);
        for name in ["", "a b", "ä", "a\0", &long] {
            assert!(wrong_metadata(&one(name, "v")).is_some(), "{name:?}");
        }
        let value = "x".repeat(MAX_METADATA_VALUE);
        assert_eq!(wrong_metadata(&one("team.example/owner", &value)), None);
        let wrong = one("a", &format!("{value}x"));
        assert_eq!(wrong_metadata(&wrong).and_then(|(name, _)| name), Some("a"));
        let many: BTreeMap<String, String> = (0..=MAX_METADATA)
            .map(|number| (format!("n{number}"), String::new()))
            .collect();
        assert!(wrong_metadata(&many).is_some());
    }
}
