//! Parameters of a request's query, read one by one. Unknown ones are not looked at: published clients send
//! some spellings twice.

use std::collections::{BTreeMap, HashMap};

use axum::extract::{FromRequestParts, Query};
use http::request::Parts;
use jiff::Timestamp;
use sandgate_api::error::ErrorCode;

use super::error::ApiError;

/// The query. The last of several values of one name counts.
#[derive(Debug, Default)]
pub(super) struct Parameters(HashMap<String, String>);

impl Parameters {
    pub(super) fn of(parts: &Parts) -> Result<Self, ApiError> {
        match Query::<Vec<(String, String)>>::try_from_uri(&parts.uri) {
            Ok(Query(pairs)) => Ok(Self(pairs.into_iter().collect())),
            Err(_malformed) => Err(ApiError::new(
                ErrorCode::ValidationError,
                "the query is malformed",
            )),
        }
    }

    /// A text; none when absent or empty.
    pub(super) fn text(&self, name: &str) -> Option<&str> {
        self.0
            .get(name)
            .map(String::as_str)
            .filter(|text| !text.is_empty())
    }

    /// Those whose names begin so, without that beginning.
    pub(super) fn below(&self, prefix: &str) -> BTreeMap<String, String> {
        let found = self.0.iter().filter_map(|(name, value)| {
            let name = name.strip_prefix(prefix)?;
            Some((name.to_owned(), value.clone()))
        });
        found.collect()
    }

    /// A whole number.
    pub(super) fn whole(
        &self,
        name: &str,
        range: std::ops::RangeInclusive<u32>,
    ) -> Result<Option<u32>, ApiError> {
        let Some(text) = self.text(name) else {
            return Ok(None);
        };
        match text.parse::<u32>() {
            Ok(number) if range.contains(&number) => Ok(Some(number)),
            Ok(_) | Err(_) => Err(ApiError::field(
                name,
                format!(
                    "expected a whole number between {} and {}",
                    range.start(),
                    range.end()
                ),
            )),
        }
    }

    /// A yes or no.
    pub(super) fn flag(&self, name: &str) -> Result<bool, ApiError> {
        match self.text(name) {
            None => Ok(false),
            Some("true" | "1" | "True") => Ok(true),
            Some("false" | "0" | "False") => Ok(false),
            Some(_) => Err(ApiError::field(name, "expected true or false")),
        }
    }

    /// A time: RFC 3339, or seconds since the epoch.
    pub(super) fn time(&self, name: &str) -> Result<Option<Timestamp>, ApiError> {
        let Some(text) = self.text(name) else {
            return Ok(None);
        };
        let parsed = match text.parse::<i64>() {
            Ok(seconds) => Timestamp::from_second(seconds).ok(),
            // A `+` that was not encoded arrives as a space.
            Err(_) => text.replace(' ', "+").parse().ok(),
        };
        match parsed {
            Some(time) => Ok(Some(time)),
            None => Err(ApiError::field(
                name,
                "expected a time, for example 2026-01-30T10:00:00Z",
            )),
        }
    }

    /// A position in a list, as an earlier answer gave it.
    pub(super) fn cursor(&self) -> Result<Option<i64>, ApiError> {
        let Some(text) = self.text("cursor") else {
            return Ok(None);
        };
        match text.parse::<i64>() {
            Ok(position) if position > 0 => Ok(Some(position)),
            Ok(_) | Err(_) => Err(ApiError::field(
                "cursor",
                "expected the next_cursor of an earlier answer",
            )),
        }
    }
}

impl<S: Sync> FromRequestParts<S> for Parameters {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, ApiError> {
        Self::of(parts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameters(query: &str) -> Parameters {
        let request = http::Request::builder()
            .uri(format!("/x?{query}"))
            .body(())
            .expect("a request");
        Parameters::of(&request.into_parts().0).expect("parameters")
    }

    #[test]
    fn parameters_are_read_one_by_one() {
        let given = parameters("limit=5&recursive=true&since=2026-01-30T10:00:00Z&a=1&a=2&empty=&cursor=9");
        assert_eq!(given.whole("limit", 1..=10).ok(), Some(Some(5)));
        assert_eq!(given.whole("absent", 1..=10).ok(), Some(None));
        assert_eq!(given.flag("recursive").ok(), Some(true));
        assert_eq!(given.text("a"), Some("2"));
        assert_eq!(given.text("empty"), None);
        assert_eq!(given.cursor().ok(), Some(Some(9)));
        let since = given.time("since").ok().flatten().expect("a time");
        assert_eq!(since.to_string(), "2026-01-30T10:00:00Z");
        let offset = parameters("since=2026-01-30T12:00:00+02:00")
            .time("since")
            .ok()
            .flatten();
        assert_eq!(offset, Some(since));
        assert_eq!(
            parameters("since=1769767200").time("since").ok().flatten(),
            Some(since)
        );
    }

    #[test]
    fn a_bad_parameter_is_refused() {
        for query in ["limit=0", "limit=11", "limit=-1", "limit=x", "limit=1.5"] {
            assert!(parameters(query).whole("limit", 1..=10).is_err(), "{query}");
        }
        assert!(parameters("recursive=maybe").flag("recursive").is_err());
        assert!(parameters("since=yesterday").time("since").is_err());
        for query in ["cursor=0", "cursor=-1", "cursor=x"] {
            assert!(parameters(query).cursor().is_err(), "{query}");
        }
    }
}
