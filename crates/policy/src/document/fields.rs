//! Reads fields of a JSON object strictly, and says what was expected where.

use std::{fmt::Write as _, ops::RangeInclusive};

use serde_json::{Map, Value};

use super::table::Field;
use crate::error::PolicyError;

/// Longest piece of the caller's own text in a message.
const MAX_QUOTE: usize = 60;

/// An object of the document and where it stands.
pub(super) struct Fields<'a> {
    path: String,
    object: &'a Map<String, Value>,
    known: &'static [Field],
}

impl<'a> Fields<'a> {
    /// Takes `value` for an object that has no other fields than `known`.
    pub(super) fn of(value: &'a Value, path: String, known: &'static [Field]) -> Result<Self, PolicyError> {
        let Value::Object(object) = value else {
            return Err(expected(path, "an object", value));
        };
        let fields = Self { path, object, known };
        let known = || known.iter().map(|field| field.name);
        match object
            .keys()
            .find(|name| known().all(|known| known != name.as_str()))
        {
            Some(unknown) => {
                let mut message = "unknown field".to_owned();
                if let Some(meant) = known().find(|name| resembles(name, unknown)) {
                    write!(message, "; did you mean `{meant}`?").expect("a String takes every text");
                }
                Err(PolicyError::new(fields.path(&cut(unknown)), message))
            }
            None => Ok(fields),
        }
    }

    /// The path of a field of this object.
    pub(super) fn path(&self, name: &str) -> String {
        if self.path.is_empty() {
            name.to_owned()
        } else {
            format!("{}.{name}", self.path)
        }
    }

    /// The field as it stands.
    pub(super) fn get(&self, name: &str) -> Option<&'a Value> {
        debug_assert!(
            self.known.iter().any(|field| field.name == name),
            "`{name}` is read, and not in the table"
        );
        self.object.get(name)
    }

    /// Refuses the field because of what it says together with others.
    pub(super) fn refuse<T>(&self, name: &str, message: impl Into<String>) -> Result<T, PolicyError> {
        Err(PolicyError::new(self.path(name), message))
    }

    /// One of the words of a closed set.
    pub(super) fn word<T: Copy>(&self, name: &str, words: &[(&str, T)]) -> Result<Option<T>, PolicyError> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        let known = words.iter().find(|(word, _)| value.as_str() == Some(word));
        match known {
            Some((_, meaning)) => Ok(Some(*meaning)),
            None => {
                let words: Vec<String> = words.iter().map(|(word, _)| format!("\"{word}\"")).collect();
                let expectation = match words.as_slice() {
                    [only] => only.clone(),
                    words => format!("one of {}", words.join(", ")),
                };
                Err(expected(self.path(name), &expectation, value))
            }
        }
    }

    /// A list with every item read by `item`, or `None` where there is no such field.
    pub(super) fn list<T>(
        &self,
        name: &str,
        limit: usize,
        item: impl Fn(String, &'a Value) -> Result<T, PolicyError>,
    ) -> Result<Option<Vec<T>>, PolicyError> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        let path = self.path(name);
        let Value::Array(values) = value else {
            return Err(expected(path, "a list", value));
        };
        if values.len() > limit {
            let message = format!("has {} entries; the limit is {limit}", values.len());
            return Err(PolicyError::new(path, message));
        }
        let items = values
            .iter()
            .enumerate()
            .map(|(index, value)| item(format!("{path}[{index}]"), value));
        items.collect::<Result<Vec<T>, PolicyError>>().map(Some)
    }

    /// A whole number within `range`.
    pub(super) fn whole(&self, name: &str, range: RangeInclusive<u64>) -> Result<Option<u64>, PolicyError> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        match value.as_u64().filter(|number| range.contains(number)) {
            Some(number) => Ok(Some(number)),
            None => {
                let expectation = format!("a whole number from {} to {}", range.start(), range.end());
                Err(expected(self.path(name), &expectation, value))
            }
        }
    }
}

/// `expected X, got Y`.
pub(super) fn expected(path: String, expectation: &str, found: &Value) -> PolicyError {
    PolicyError::new(path, format!("expected {expectation}, got {}", quote(found)))
}

/// A value of the caller's, short enough for a message.
pub(super) fn quote(value: &Value) -> String {
    match value {
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "an object".to_owned(),
        Value::String(text) => Value::from(cut(text)).to_string(),
        Value::Null | Value::Bool(_) | Value::Number(_) => cut(&value.to_string()),
    }
}

fn cut(text: &str) -> String {
    match text.char_indices().nth(MAX_QUOTE) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// Whether two field names differ by case, dashes or at most two letters put in, left out or changed.
fn resembles(known: &str, unknown: &str) -> bool {
    if unknown.len() > known.len() + 2 {
        return false;
    }
    let (known, unknown): (Vec<u8>, Vec<u8>) = (plain(known), plain(unknown));
    let mut row: Vec<usize> = (0..=unknown.len()).collect();
    for (index, expected) in known.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = index + 1;
        for (column, found) in unknown.iter().enumerate() {
            let change = diagonal + usize::from(expected != found);
            diagonal = row[column + 1];
            row[column + 1] = change.min(diagonal + 1).min(row[column] + 1);
        }
    }
    row[unknown.len()] <= 2 && unknown.len() > 2
}

fn plain(name: &str) -> Vec<u8> {
    name.bytes()
        .filter(|byte| byte.is_ascii_alphanumeric())
        .map(|byte| byte.to_ascii_lowercase())
        .collect()
}
