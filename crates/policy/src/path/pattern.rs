//! Patterns for paths: literal segments, `*` for one segment, `**` for any number of them.

use std::{fmt, str::FromStr};

use super::{NormalPath, PathError};

/// Longest pattern in bytes.
const MAX_PATTERN: usize = 1024;
/// Segments of one pattern.
const MAX_SEGMENTS: usize = 64;

/// The text is not a pattern for paths.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PathPatternError {
    /// More than 1,024 bytes or 64 segments.
    #[error("is longer than 1024 bytes or 64 segments")]
    TooLong,
    /// `v*`, `*.json`, `***`.
    #[error("has a star that is not a whole segment: `*` stands for one segment, `**` for any number")]
    Star,
    /// `?`: queries are not matched.
    #[error("has a query, which is not looked at")]
    Query,
    /// `.` or `..`: no canonical path has one.
    #[error("has a dot segment, which no canonical path has")]
    Dots,
    /// Two slashes in a row.
    #[error("has an empty segment (two slashes in a row)")]
    Empty,
    /// What no path can be.
    #[error("{0}")]
    Path(#[from] PathError),
}

/// A pattern such as `/repos/**` or `/users/*/keys`. `*` is exactly one segment that is not empty, `**` is any number of
/// segments and none too: `/repos/**` is `/repos` and everything below it. Letters' case matters.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PathPattern(Vec<Piece>);

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Piece {
    Literal(String),
    One,
    Any,
}

impl PathPattern {
    /// Reads a pattern. Literal segments come out in the canonical form that paths have.
    ///
    /// # Errors
    ///
    /// [`PathPatternError`] where no path could match, or a star is not a whole segment.
    pub fn parse(text: &str) -> Result<Self, PathPatternError> {
        if text.len() > MAX_PATTERN {
            return Err(PathPatternError::TooLong);
        }
        let Some(rest) = text.strip_prefix('/') else {
            return Err(PathError::NotAbsolute.into());
        };
        if rest.contains('?') {
            return Err(PathPatternError::Query);
        }
        let count = rest.split('/').count();
        if count > MAX_SEGMENTS {
            return Err(PathPatternError::TooLong);
        }
        let pieces = rest.split('/').enumerate().map(|(index, piece)| match piece {
            "**" => Ok(Piece::Any),
            "*" => Ok(Piece::One),
            "." | ".." => Err(PathPatternError::Dots),
            "" if index + 1 < count => Err(PathPatternError::Empty),
            piece if piece.contains('*') => Err(PathPatternError::Star),
            piece => Ok(Piece::Literal(super::segment(piece)?)),
        });
        pieces.collect::<Result<_, PathPatternError>>().map(Self)
    }

    /// Whether the path is one of those meant.
    pub fn matches(&self, path: &NormalPath) -> bool {
        let segments = path.segments();
        let (mut piece, mut segment) = (0, 0);
        // Where to go on when it fails: behind the last `**`, which takes one segment more.
        let mut retry: Option<(usize, usize)> = None;
        while segment < segments.len() {
            let fits = match self.0.get(piece) {
                Some(Piece::Any) => {
                    retry = Some((piece, segment));
                    piece += 1;
                    continue;
                }
                Some(Piece::One) => !segments[segment].is_empty(),
                Some(Piece::Literal(text)) => text == segments[segment],
                None => false,
            };
            match (fits, &mut retry) {
                (true, _) => {
                    piece += 1;
                    segment += 1;
                }
                (false, Some((any, taken))) => {
                    *taken += 1;
                    segment = *taken;
                    piece = *any + 1;
                }
                (false, None) => return false,
            }
        }
        self.0[piece..].iter().all(|piece| *piece == Piece::Any)
    }
}

impl fmt::Display for PathPattern {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|piece| match piece {
            Piece::Literal(text) => write!(formatter, "/{text}"),
            Piece::One => formatter.write_str("/*"),
            Piece::Any => formatter.write_str("/**"),
        })
    }
}

impl FromStr for PathPattern {
    type Err = PathPatternError;

    fn from_str(text: &str) -> Result<Self, PathPatternError> {
        Self::parse(text)
    }
}
