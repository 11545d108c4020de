//! Reads a stream as all spellings at once.
//!
//! A reading is a beginning and a number of conditions met. It waits at the place where its next character must begin;
//! a character is one byte or an escape of up to [`LONGEST_ESCAPE`] bytes, so readings wait at no more than that many
//! places behind the one at hand.

use std::ops::Range;

use super::{
    Needles,
    program::{Step, is_escape},
};
use crate::headers::hex_byte;

/// `\u0041`.
const LONGEST_ESCAPE: u64 = 6;
/// Places at which readings may wait: a power of two, more than [`LONGEST_ESCAPE`].
const PLACES: usize = 8;

/// A secret from `start` to `end` in the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) needle: usize,
    pub(super) start: u64,
    pub(super) end: u64,
}

#[derive(Clone, Copy)]
struct Reading {
    program: usize,
    met: usize,
    start: u64,
}

/// Readings whose next character begins at `at`.
#[derive(Default)]
struct Place {
    at: u64,
    readings: Vec<Reading>,
}

/// The readings of one stream.
#[derive(Default)]
pub(super) struct Scanner {
    places: [Place; PLACES],
    /// For each state, the last place where a reading in it waits: one is enough.
    waits: Vec<u64>,
    /// Up to here something may be under way.
    busy_until: u64,
    /// Up to here an escape may be under way.
    escape_until: u64,
}

impl Scanner {
    /// Reads `text`, which begins at `base` in the stream, from its byte `from` on. What came before `from` was read
    /// already, and holds everything that [`Scanner::undecided`] counted.
    pub(super) fn scan(
        &mut self,
        needles: &Needles,
        text: &[u8],
        base: u64,
        from: usize,
        found: &mut Vec<Found>,
    ) {
        let mut index = from;
        while index < text.len() {
            if base + index as u64 >= self.busy_until {
                match needles.next_beginning(&text[index..]) {
                    Some(skipped) => index += skipped,
                    None => return,
                }
            }
            self.read_byte(needles, text, base, index, found);
            index += 1;
        }
    }

    fn read_byte(&mut self, needles: &Needles, text: &[u8], base: u64, index: usize, found: &mut Vec<Found>) {
        let end = base + index as u64 + 1;
        let mut next = std::mem::take(&mut self.places[slot(end)].readings);
        next.clear();
        if is_escape(text[index]) {
            self.escape_until = end + LONGEST_ESCAPE;
        }
        if end < self.escape_until {
            // The longest first, so that of two readings in one state the one that began first is met first.
            for length in [6, 4, 3, 2] {
                let written = (index + 1).checked_sub(length).map(|first| &text[first..=index]);
                if let Some(character) = written.and_then(escape) {
                    let mut buffer = [0; 4];
                    let character = character.encode(&mut buffer);
                    let begun = &needles.beginnings[usize::from(character[0])];
                    let start = end - length as u64;
                    self.read_character(
                        needles,
                        character,
                        start..end,
                        begun.iter().copied(),
                        &mut next,
                        found,
                    );
                }
            }
        }
        let character = &text[index..=index];
        let after = text.get(index + 1).copied();
        let begun = needles.beginnings[usize::from(text[index])]
            .iter()
            .copied()
            .filter(|program| after.is_none_or(|after| needles.programs[*program].may_go_on_with(after)));
        self.read_character(needles, character, end - 1..end, begun, &mut next, found);
        // What waits further back goes on only with an escape that is under way.
        self.busy_until = if next.is_empty() {
            self.escape_until
        } else {
            self.escape_until.max(end + LONGEST_ESCAPE)
        };
        self.places[slot(end)] = Place {
            at: end,
            readings: next,
        };
    }

    /// Lets the readings that wait where the character begins go on, and those begin that `begun` names.
    fn read_character(
        &mut self,
        needles: &Needles,
        character: &[u8],
        at: Range<u64>,
        begun: impl Iterator<Item = usize>,
        next: &mut Vec<Reading>,
        found: &mut Vec<Found>,
    ) {
        let place = &self.places[slot(at.start)];
        let waiting = if place.at == at.start {
            place.readings.as_slice()
        } else {
            &[]
        };
        let begun = begun.map(|program| Reading {
            program,
            met: 0,
            start: at.start,
        });
        for reading in waiting.iter().copied().chain(begun) {
            let program = &needles.programs[reading.program];
            match program.step(reading.met, character) {
                Step::Done => found.push(Found {
                    needle: program.needle,
                    start: reading.start,
                    end: at.end,
                }),
                Step::On(met) if at.end - reading.start <= program.longest() as u64 => {
                    let reading = Reading { met, ..reading };
                    enqueue(&mut self.waits, needles, next, reading, at.end);
                }
                Step::On(_) | Step::Dead => {}
            }
        }
    }

    /// How many bytes at the end of `text` may be the beginning of a secret.
    pub(super) fn undecided(&self, text: &[u8], base: u64) -> usize {
        let end = base + text.len() as u64;
        let mut first = end;
        for (behind, at) in (0..LONGEST_ESCAPE).map(|behind| (behind, end.saturating_sub(behind))) {
            let behind = usize::try_from(behind).unwrap_or(usize::MAX);
            if behind > text.len() || (behind > 0 && !is_open_escape(&text[text.len() - behind..])) {
                continue;
            }
            // The escape may also be the first character of a secret.
            first = first.min(at);
            let place = &self.places[slot(at)];
            if place.at == at {
                let starts = place.readings.iter().map(|reading| reading.start);
                first = first.min(starts.min().unwrap_or(at));
            }
        }
        usize::try_from(end - first).unwrap_or(usize::MAX).min(text.len())
    }

    /// Drops every reading: what follows does not belong to what came before.
    pub(super) fn forget(&mut self) {
        for place in &mut self.places {
            place.readings.clear();
        }
        self.busy_until = 0;
        self.escape_until = 0;
    }
}

fn slot(at: u64) -> usize {
    usize::try_from(at % PLACES as u64).expect("less than PLACES")
}

/// Lets `reading` wait at `at`, unless one in the same state does that began no later.
fn enqueue(waits: &mut Vec<u64>, needles: &Needles, next: &mut Vec<Reading>, reading: Reading, at: u64) {
    if waits.is_empty() {
        waits.resize(needles.states, 0);
    }
    let state = &mut waits[needles.programs[reading.program].first_state + reading.met];
    if *state != at {
        *state = at;
        next.push(reading);
        return;
    }
    let same = next
        .iter_mut()
        .find(|other| (other.program, other.met) == (reading.program, reading.met));
    if let Some(other) = same {
        other.start = other.start.min(reading.start);
    }
}

/// A character, resolved.
enum Character {
    Byte(u8),
    Unicode(char),
}

impl Character {
    fn encode(self, buffer: &mut [u8; 4]) -> &[u8] {
        match self {
            Self::Byte(byte) => {
                buffer[0] = byte;
                &buffer[..1]
            }
            Self::Unicode(character) => character.encode_utf8(buffer).as_bytes(),
        }
    }
}

/// Reads the whole of `written` as one escape.
fn escape(written: &[u8]) -> Option<Character> {
    match *written {
        [b'\\', byte] => short_escape(byte).map(Character::Byte),
        [b'%', high, low] | [b'\\', b'x', high, low] => hex_byte(high, low).map(Character::Byte),
        [b'\\', b'u', a, b, c, d] => {
            let code = u32::from(u16::from_be_bytes([hex_byte(a, b)?, hex_byte(c, d)?]));
            char::from_u32(code).map(Character::Unicode)
        }
        _ => None,
    }
}

/// JSON's, and the quote of other languages.
fn short_escape(byte: u8) -> Option<u8> {
    match byte {
        b'"' | b'\\' | b'/' | b'\'' => Some(byte),
        b'n' => Some(b'\n'),
        b'r' => Some(b'\r'),
        b't' => Some(b'\t'),
        b'b' => Some(8),
        b'f' => Some(12),
        _ => None,
    }
}

/// Whether more bytes could make one character of `written`.
fn is_open_escape(written: &[u8]) -> bool {
    let (digits, missing) = match written {
        [b'%', digits @ ..] => (digits, 2),
        [b'\\'] => return true,
        [b'\\', b'x', digits @ ..] => (digits, 2),
        [b'\\', b'u', digits @ ..] => (digits, 4),
        _ => return false,
    };
    digits.len() < missing && digits.iter().all(u8::is_ascii_hexdigit)
}
