//! One spelling of one secret, as a row of conditions on characters.

use super::SHORTEST_ENCODED;

/// A spelling. The characters are those that remain when escapes are resolved.
pub(super) struct Program {
    /// The secret.
    pub(super) needle: usize,
    /// Number of its first state among those of all programs.
    pub(super) first_state: usize,
    classes: Vec<Class>,
    /// Whether line breaks and blanks may stand between the characters.
    folds: bool,
}

/// What one character may be.
enum Class {
    Byte(u8),
    /// A hexadecimal digit of this value.
    Digit(u8),
    /// One of the base64 characters whose bits are set.
    Sextets(u64),
}

/// What becomes of a reading after one more character.
pub(super) enum Step {
    /// It goes on, with this many conditions met.
    On(usize),
    /// All conditions are met.
    Done,
    /// It was none.
    Dead,
}

/// The spellings of a value; `states` counts their conditions.
pub(super) fn programs(needle: usize, value: &[u8], states: &mut usize) -> Vec<Program> {
    let mut spellings = Vec::new();
    if !value.is_empty() {
        spellings.push((plain(value), false));
    }
    if value.len() >= SHORTEST_ENCODED {
        spellings.push((hexadecimal(value), true));
        spellings.extend((0..3).map(|before| (base64(value, before), true)));
    }
    let numbered = spellings.into_iter().map(|(classes, folds)| {
        let first_state = *states;
        *states += classes.len();
        Program {
            needle,
            first_state,
            classes,
            folds,
        }
    });
    numbered.collect()
}

fn plain(value: &[u8]) -> Vec<Class> {
    value.iter().copied().map(Class::Byte).collect()
}

fn hexadecimal(value: &[u8]) -> Vec<Class> {
    let digits = value.iter().flat_map(|byte| [byte >> 4, byte & 0xF]);
    digits.map(Class::Digit).collect()
}

/// Base64 of something in which `before` bytes (modulo three) stand before the value. The characters at both ends may
/// hold bits of the neighbours too, which can be anything.
fn base64(value: &[u8], before: usize) -> Vec<Class> {
    let bits = before * 8..(before + value.len()) * 8;
    let bit = |index: usize| {
        let index = index - bits.start;
        value[index / 8] >> (7 - index % 8) & 1
    };
    let characters = bits.start / 6..bits.end.div_ceil(6);
    let class = |character: usize| {
        let agrees = |sextet: &u8| {
            (0..6).all(|place| {
                let index = character * 6 + place;
                !bits.contains(&index) || sextet >> (5 - place) & 1 == bit(index)
            })
        };
        let sextets = (0u8..64).filter(agrees);
        Class::Sextets(sextets.fold(0, |set, sextet| set | 1 << sextet))
    };
    characters.map(class).collect()
}

impl Class {
    fn takes(&self, byte: u8) -> bool {
        match self {
            // A form writes a blank as a plus.
            Self::Byte(b' ') => byte == b' ' || byte == b'+',
            Self::Byte(expected) => byte == *expected,
            Self::Digit(digit) => char::from(byte).to_digit(16) == Some(u32::from(*digit)),
            Self::Sextets(set) => sextet(byte).is_some_and(|sextet| set >> sextet & 1 == 1),
        }
    }
}

/// The first byte of every escape.
pub(super) fn is_escape(byte: u8) -> bool {
    matches!(byte, b'%' | b'\\')
}

/// What may stand between characters where lines are folded.
fn is_fold(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\r' | b'\n')
}

/// The value of a base64 character, of the plain and of the URL-safe alphabet.
fn sextet(byte: u8) -> Option<u8> {
    match byte {
        b'A'..=b'Z' => Some(byte - b'A'),
        b'a'..=b'z' => Some(byte - b'a' + 26),
        b'0'..=b'9' => Some(byte - b'0' + 52),
        b'+' | b'-' => Some(62),
        b'/' | b'_' => Some(63),
        _ => None,
    }
}

impl Program {
    /// Whether the first character may be this one.
    pub(super) fn begins_with(&self, byte: u8) -> bool {
        self.classes.first().is_some_and(|class| class.takes(byte))
    }

    /// Whether a text that begins with one plain character may go on like this. A yes may be wrong.
    pub(super) fn may_go_on_with(&self, byte: u8) -> bool {
        let second = self.classes.get(1);
        is_escape(byte) || (self.folds && is_fold(byte)) || second.is_none_or(|class| class.takes(byte))
    }

    /// The longest text that is read as this spelling, in bytes: every character escaped, and some lines folded.
    pub(super) fn longest(&self) -> usize {
        self.classes.len() * 8 + 64
    }

    /// Reads the bytes of one character (more than one where it is beyond ASCII) after `met` conditions.
    pub(super) fn step(&self, met: usize, character: &[u8]) -> Step {
        if self.folds && met > 0 && matches!(character, [byte] if is_fold(*byte)) {
            return Step::On(met);
        }
        let mut met = met;
        for byte in character {
            match self.classes.get(met) {
                Some(class) if class.takes(*byte) => met += 1,
                Some(_) | None => return Step::Dead,
            }
        }
        if met == self.classes.len() {
            Step::Done
        } else {
            Step::On(met)
        }
    }
}
