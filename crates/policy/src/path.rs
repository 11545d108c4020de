//! Paths of HTTP requests: one canonical form, made in one place, and the patterns that rules have for them.
//!
//! What is matched is what is forwarded. A text that two servers could read as two paths is refused, so that no server
//! sees another path than the one that was judged.

mod pattern;

use std::{fmt, fmt::Write as _};

pub use pattern::{PathPattern, PathPatternError};

/// Longest path and longest query, in bytes.
const MAX_TEXT: usize = 16 * 1024;

/// The text is not a path that can be judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// It does not begin with a slash: `*`, an absolute URI, nothing.
    #[error("does not begin with a slash")]
    NotAbsolute,
    /// More than 16 KiB of path or of query.
    #[error("is longer than 16 KiB")]
    TooLong,
    /// A space, a control character, `#`, or anything beyond ASCII.
    #[error("has a character that no request target has")]
    Character,
    /// `%` without two hexadecimal digits behind it.
    #[error("has a `%` without two hexadecimal digits")]
    Percent,
    /// `%2F`, `%5C` or a backslash: some servers read a slash there, others do not.
    #[error("has an encoded slash or a backslash")]
    HiddenSlash,
    /// `%00` to `%1F`, `%7F`.
    #[error("has an encoded control character")]
    Control,
    /// `%2e%2e`, `..;x`: some servers go up there, others do not.
    #[error("has a hidden dot segment")]
    HiddenDots,
    /// `%25` before two hexadecimal digits: a server that decodes twice reads another path.
    #[error("is percent-encoded twice")]
    Twice,
    /// It begins with two slashes, which reads as the name of a host.
    #[error("begins with two slashes")]
    Host,
}

/// The canonical path of a request: absolute, without dot segments, every unreserved character written plainly and
/// every other percent-encoding in upper case (RFC 3986, 6.2.2). Empty segments are kept.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NormalPath(String);

impl NormalPath {
    /// Splits a request target in origin form into the canonical path and the query, which is left as it is.
    ///
    /// # Errors
    ///
    /// [`PathError`] where the target is malformed or could be read in two ways.
    pub fn parse(target: &str) -> Result<(Self, Option<&str>), PathError> {
        let (path, query) = match target.split_once('?') {
            Some((path, query)) => (path, Some(query)),
            None => (target, None),
        };
        if path.len() > MAX_TEXT || query.is_some_and(|query| query.len() > MAX_TEXT) {
            return Err(PathError::TooLong);
        }
        let Some(rest) = path.strip_prefix('/') else {
            return Err(PathError::NotAbsolute);
        };
        if query.is_some_and(|query| !query.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'#')) {
            return Err(PathError::Character);
        }
        let mut segments: Vec<String> = Vec::new();
        let mut pieces = rest.split('/').peekable();
        while let Some(piece) = pieces.next() {
            let last = pieces.peek().is_none();
            match piece {
                "." => {}
                ".." => {
                    segments.pop();
                }
                piece => {
                    segments.push(segment(piece)?);
                    continue;
                }
            }
            // `/a/..` is the folder `/`, not a file (RFC 3986, 5.2.4).
            if last {
                segments.push(String::new());
            }
        }
        if matches!(segments.as_slice(), [first, _, ..] if first.is_empty()) {
            return Err(PathError::Host);
        }
        Ok((Self(format!("/{}", segments.join("/"))), query))
    }

    /// The canonical text; begins with one slash.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What stands between the slashes. The last is empty where the path ends in a slash.
    fn segments(&self) -> Vec<&str> {
        self.0[1..].split('/').collect()
    }
}

impl fmt::Display for NormalPath {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

/// Brings what stands between two slashes into the canonical form.
fn segment(piece: &str) -> Result<String, PathError> {
    let mut normal = String::with_capacity(piece.len());
    let mut rest = piece.as_bytes();
    while let [byte, after @ ..] = rest {
        rest = after;
        match *byte {
            b'\\' => return Err(PathError::HiddenSlash),
            b'%' => {
                let Some((byte, after)) = escaped(rest) else {
                    return Err(PathError::Percent);
                };
                rest = after;
                match byte {
                    b'/' | b'\\' => return Err(PathError::HiddenSlash),
                    0..0x20 | 0x7F => return Err(PathError::Control),
                    byte if unreserved(byte) => normal.push(char::from(byte)),
                    byte => encode(&mut normal, byte),
                }
            }
            // Not in the grammar of RFC 3986, and yet sent plainly by many clients.
            b'"' | b'<' | b'>' | b'^' | b'`' | b'{' | b'|' | b'}' => encode(&mut normal, *byte),
            b'#' => return Err(PathError::Character),
            byte if byte.is_ascii_graphic() => normal.push(char::from(byte)),
            _ => return Err(PathError::Character),
        }
    }
    // Looked for in what is forwarded: the digits may have been encoded themselves.
    let mut percents = normal.match_indices("%25");
    if percents.any(|(at, percent)| escaped(&normal.as_bytes()[at + percent.len()..]).is_some()) {
        return Err(PathError::Twice);
    }
    // Some servers cut parameters off a segment before they look for dots.
    let bare = normal.split_once(';').map_or(normal.as_str(), |(bare, _)| bare);
    let bare = bare.split_once("%3B").map_or(bare, |(bare, _)| bare);
    if matches!(bare, "." | "..") {
        return Err(PathError::HiddenDots);
    }
    Ok(normal)
}

/// The byte that two hexadecimal digits stand for, and what follows them.
fn escaped(text: &[u8]) -> Option<(u8, &[u8])> {
    let [high, low, rest @ ..] = text else {
        return None;
    };
    let digit = |byte: u8| {
        char::from(byte)
            .to_digit(16)
            .and_then(|digit| u8::try_from(digit).ok())
    };
    Some((digit(*high)? << 4 | digit(*low)?, rest))
}

fn unreserved(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~".contains(&byte)
}

fn encode(text: &mut String, byte: u8) {
    write!(text, "%{byte:02X}").expect("a String takes every text");
}

#[cfg(test)]
mod tests;
