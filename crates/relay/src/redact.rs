//! Masks secrets in what passes, whatever chunks it comes in.
//!
//! A [`Needles`] is compiled once from the secrets' values and finds each of them written plainly, percent-encoded,
//! with JSON escapes, in hexadecimal and in base64 of either alphabet at each of the three places where it may stand
//! in what was encoded; escapes may be mixed with each other and stand inside base64, and base64 and hexadecimal may be
//! folded into lines. A [`Redactor`] applies it to one stream.
//!
//! A mask is as long as what it hides. Nothing that may still turn out to be the beginning of a secret is given out, so
//! a stream is late by that much, and never by more than [`Needles::longest`] bytes.
//!
//! It never finds a secret that was changed otherwise (reversed, encrypted, compressed, taken apart), and values of
//! fewer than [`SHORTEST_ENCODED`] bytes only where they are written plainly or escaped.

mod program;
mod scan;

use std::{fmt, sync::Arc};

use bytes::{Bytes, BytesMut};
use http::HeaderMap;

use program::{Program, is_escape, programs};
use scan::{Found, Scanner};

/// The shortest value that is looked for in base64 and hexadecimal, in bytes: shorter ones occur by chance.
pub const SHORTEST_ENCODED: usize = 4;

/// A secret to look for. Its `Debug` shows the name alone.
#[derive(Clone)]
pub struct SecretNeedle {
    name: String,
    value: Vec<u8>,
}

impl SecretNeedle {
    /// The value of the secret called `name`, which the mask shows.
    pub fn new(name: impl Into<String>, value: impl Into<Vec<u8>>) -> Self {
        Self {
            name: name.into(),
            value: value.into(),
        }
    }
}

impl fmt::Debug for SecretNeedle {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("SecretNeedle")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

/// Secrets, compiled for looking. Its `Debug` shows their names alone.
pub struct Needles {
    names: Vec<String>,
    masks: Vec<Vec<u8>>,
    programs: Vec<Program>,
    /// For each byte, the programs that can begin with it.
    beginnings: Vec<Vec<usize>>,
    /// For each byte, the set of bytes that may follow where it begins one.
    pairs: Vec<ByteSet>,
    /// States of all programs.
    states: usize,
}

impl fmt::Debug for Needles {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Needles")
            .field("names", &self.names)
            .finish_non_exhaustive()
    }
}

impl Needles {
    /// Compiles the values; empty ones are left out. Costs some hundred bytes of memory for each byte of a value.
    pub fn new(secrets: Vec<SecretNeedle>) -> Self {
        let mut needles = Self {
            names: Vec::with_capacity(secrets.len()),
            masks: Vec::with_capacity(secrets.len()),
            programs: Vec::new(),
            beginnings: vec![Vec::new(); 256],
            pairs: vec![ByteSet::default(); 256],
            states: 0,
        };
        for SecretNeedle { name, value } in secrets {
            let index = needles.names.len();
            for program in programs(index, &value, &mut needles.states) {
                let second = ByteSet::of(|byte| program.may_go_on_with(byte));
                for byte in u8::MIN..=u8::MAX {
                    if program.begins_with(byte) {
                        needles.beginnings[usize::from(byte)].push(needles.programs.len());
                        needles.pairs[usize::from(byte)].join(second);
                    }
                }
                needles.programs.push(program);
            }
            needles.masks.push(mask(&name));
            needles.names.push(name);
        }
        for byte in (u8::MIN..=u8::MAX).filter(|byte| is_escape(*byte)) {
            needles.pairs[usize::from(byte)] = ByteSet::of(|_any| true);
        }
        needles
    }

    /// The first place in `text` where a secret may begin. Most of what passes is passed over here, at a look at
    /// two bytes each.
    fn next_beginning(&self, text: &[u8]) -> Option<usize> {
        let mut pairs = text.windows(2);
        let found = pairs.position(|pair| self.pairs[usize::from(pair[0])].holds(pair[1]));
        found.or_else(|| {
            // What follows the last byte is not known yet.
            let last = *text.last()?;
            let begins = is_escape(last) || !self.beginnings[usize::from(last)].is_empty();
            begins.then_some(text.len() - 1)
        })
    }

    /// Whether there is nothing to look for.
    pub fn is_empty(&self) -> bool {
        self.programs.is_empty()
    }

    /// The longest text that is taken for one of the secrets, and the most that a [`Redactor`] holds back, in bytes.
    pub fn longest(&self) -> usize {
        self.programs.iter().map(Program::longest).max().unwrap_or(0)
    }

    /// The name of a secret that stands in `text`.
    pub fn find(&self, text: &[u8]) -> Option<&str> {
        let found = self.scan(text);
        found.first().map(|found| self.names[found.needle].as_str())
    }

    /// `text` with every secret masked, and the names of those; `None` where there is none.
    pub fn redact(&self, text: &[u8]) -> Option<(Vec<u8>, Vec<&str>)> {
        let found = self.scan(text);
        if found.is_empty() {
            return None;
        }
        let mut masked = text.to_vec();
        let mut names: Vec<&str> = Vec::new();
        for found in &found {
            self.cover(found, 0, &mut masked);
            let name = self.names[found.needle].as_str();
            if !names.contains(&name) {
                names.push(name);
            }
        }
        Some((masked, names))
    }

    fn scan(&self, text: &[u8]) -> Vec<Found> {
        let mut found = Vec::new();
        Scanner::default().scan(self, text, 0, 0, &mut found);
        found
    }

    /// Writes the mask of `found` over `text`, which begins at `base` in the stream.
    fn cover(&self, found: &Found, base: u64, text: &mut [u8]) {
        let mask = &self.masks[found.needle];
        for (index, byte) in text.iter_mut().enumerate() {
            let at = base + index as u64;
            if at >= found.end {
                break;
            }
            if let Some(offset) = at.checked_sub(found.start) {
                let offset = usize::try_from(offset).unwrap_or(usize::MAX);
                *byte = mask.get(offset).copied().unwrap_or(b'*');
            }
        }
    }
}

/// Some bytes.
#[derive(Debug, Clone, Copy, Default)]
struct ByteSet([u64; 4]);

impl ByteSet {
    fn of(holds: impl Fn(u8) -> bool) -> Self {
        let mut set = Self::default();
        for byte in (u8::MIN..=u8::MAX).filter(|byte| holds(*byte)) {
            set.0[usize::from(byte >> 6)] |= 1 << (byte & 63);
        }
        set
    }

    fn join(&mut self, other: Self) {
        for (word, more) in self.0.iter_mut().zip(other.0) {
            *word |= more;
        }
    }

    fn holds(&self, byte: u8) -> bool {
        self.0[usize::from(byte >> 6)] >> (byte & 63) & 1 == 1
    }
}

/// What stands in place of a secret, before it is cut or filled up with stars.
fn mask(name: &str) -> Vec<u8> {
    let plain = |character: char| {
        if character.is_ascii_alphanumeric() || "-_.".contains(character) {
            character
        } else {
            '_'
        }
    };
    let name: String = name.chars().map(plain).collect();
    format!("[redacted:{name}]").into_bytes()
}

/// Masks secrets in the values of all fields, and returns the names of those found.
pub fn redact_headers(needles: &Needles, headers: &mut HeaderMap) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for value in headers.values_mut() {
        let Some((masked, found)) = needles.redact(value.as_bytes()) else {
            continue;
        };
        for name in found {
            if !names.iter().any(|known| known == name) {
                names.push(name.to_owned());
            }
        }
        // A mask is visible ASCII, so what was a value still is one.
        let masked = http::HeaderValue::from_bytes(&masked);
        *value = masked.unwrap_or(const { http::HeaderValue::from_static("[redacted]") });
    }
    names
}

/// Masks secrets in one stream. What comes out is as long as what went in. Its `Debug` shows none of the stream.
pub struct Redactor {
    needles: Arc<Needles>,
    scanner: Scanner,
    /// Came in and was not given out.
    held: Bytes,
    /// Where `held` begins in the stream.
    base: u64,
    /// Secrets that reach into `held`.
    pending: Vec<Found>,
    hits: Vec<u64>,
}

impl fmt::Debug for Redactor {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Redactor")
            .field("needles", &self.needles)
            .field("given", &self.base)
            .field("held", &self.held.len())
            .finish_non_exhaustive()
    }
}

impl Redactor {
    /// For a stream from its beginning.
    pub fn new(needles: Arc<Needles>) -> Self {
        Self {
            scanner: Scanner::default(),
            held: Bytes::new(),
            base: 0,
            pending: Vec::new(),
            hits: vec![0; needles.names.len()],
            needles,
        }
    }

    /// Takes the next chunk; returns what can be given out, which may be nothing.
    #[must_use]
    pub fn push(&mut self, chunk: Bytes) -> Bytes {
        if self.needles.is_empty() {
            return chunk;
        }
        let seen = self.held.len();
        let text = if seen == 0 {
            chunk
        } else {
            let mut text = BytesMut::with_capacity(seen + chunk.len());
            text.extend_from_slice(&self.held);
            text.extend_from_slice(&chunk);
            text.freeze()
        };
        let known = self.pending.len();
        self.scanner
            .scan(&self.needles, &text, self.base, seen, &mut self.pending);
        for found in &self.pending[known..] {
            self.hits[found.needle] += 1;
        }
        let undecided = self.scanner.undecided(&text, self.base);
        let decided = text.len() - undecided;
        // A copy, so that a few bytes do not keep a large chunk in memory.
        self.held = Bytes::copy_from_slice(&text[decided..]);
        self.give(text.slice(..decided))
    }

    /// Returns what was held back: the stream has ended. What is pushed afterwards belongs to a new one.
    #[must_use]
    pub fn finish(&mut self) -> Bytes {
        self.scanner.forget();
        let rest = std::mem::take(&mut self.held);
        self.give(rest)
    }

    /// How often each secret was found so far, without those never found.
    pub fn hits(&self) -> impl Iterator<Item = (&str, u64)> {
        let names = self.needles.names.iter().map(String::as_str);
        names.zip(self.hits.iter().copied()).filter(|(_, hits)| *hits > 0)
    }

    fn give(&mut self, text: Bytes) -> Bytes {
        let base = self.base;
        self.base += text.len() as u64;
        if self.pending.is_empty() {
            return text;
        }
        let mut masked = BytesMut::from(text);
        for found in &self.pending {
            self.needles.cover(found, base, &mut masked);
        }
        let end = self.base;
        self.pending.retain(|found| found.end > end);
        masked.freeze()
    }
}

#[cfg(test)]
mod tests;
