//! Questions of DNS (RFC 1035) with every field free, and as much of answers as is needed.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The type of IPv4 addresses.
pub const A: u16 = 1;
/// The type of IPv6 addresses.
pub const AAAA: u16 = 28;

/// A question with everything that can hide something in it.
#[derive(Debug, Clone)]
pub struct Question<'a> {
    /// The name, its labels separated by dots.
    pub name: &'a [u8],
    /// The type.
    pub kind: u16,
    /// The class.
    pub class: u16,
    /// The flags of the header.
    pub flags: u16,
    /// How often the question is asked.
    pub count: u16,
    /// A further question.
    pub further: Option<&'a [u8]>,
    /// Options of EDNS: code and data.
    pub options: Vec<(u16, Vec<u8>)>,
    /// Bytes after the end.
    pub trailing: Vec<u8>,
}

/// What is read of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// It is one, and no question.
    pub is_response: bool,
    /// The response code.
    pub code: u8,
    /// The addresses in it.
    pub addresses: Vec<IpAddr>,
}

/// An ordinary question.
pub fn question(name: &[u8], kind: u16) -> Vec<u8> {
    Question::of(name, kind).bytes()
}

impl<'a> Question<'a> {
    /// An ordinary one, to be changed.
    pub fn of(name: &'a [u8], kind: u16) -> Self {
        Self {
            name,
            kind,
            class: 1,
            flags: 0x0100,
            count: 1,
            further: None,
            options: Vec::new(),
            trailing: Vec::new(),
        }
    }

    /// The message.
    pub fn bytes(&self) -> Vec<u8> {
        let count = self.count + u16::from(self.further.is_some());
        let additional = u16::from(!self.options.is_empty());
        let mut bytes = Vec::new();
        for field in [0x5247, self.flags, count, 0, 0, additional] {
            bytes.extend(field.to_be_bytes());
        }
        for name in std::iter::repeat_n(self.name, usize::from(self.count)).chain(self.further) {
            bytes.extend(labels(name));
            bytes.extend(self.kind.to_be_bytes());
            bytes.extend(self.class.to_be_bytes());
        }
        if additional == 1 {
            let mut data = Vec::new();
            for (code, value) in &self.options {
                data.extend(code.to_be_bytes());
                data.extend(short(value.len()));
                data.extend(value);
            }
            bytes.extend([0, 0, 41, 0x10, 0, 0, 0, 0, 0]);
            bytes.extend(short(data.len()));
            bytes.extend(data);
        }
        bytes.extend(&self.trailing);
        bytes
    }
}

fn short(length: usize) -> [u8; 2] {
    u16::try_from(length).unwrap_or(u16::MAX).to_be_bytes()
}

fn labels(name: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for label in name.split(|byte| *byte == b'.').filter(|label| !label.is_empty()) {
        bytes.push(u8::try_from(label.len()).unwrap_or(63));
        bytes.extend(label);
    }
    bytes.push(0);
    bytes
}

/// Reads an answer; nothing for what is none.
pub fn read(message: &[u8]) -> Option<Answer> {
    let field = |at: usize| Some(u16::from_be_bytes(message.get(at..at + 2)?.try_into().ok()?));
    let (flags, questions, answers) = (field(2)?, field(4)?, field(6)?);
    let mut at = 12;
    for _ in 0..questions {
        at = after_name(message, at)? + 4;
    }
    let mut addresses = Vec::new();
    for _ in 0..answers {
        at = after_name(message, at)?;
        let (kind, length) = (field(at)?, usize::from(field(at + 8)?));
        let data = message.get(at + 10..at + 10 + length)?;
        if let (A, Ok(bytes)) = (kind, <[u8; 4]>::try_from(data)) {
            addresses.push(Ipv4Addr::from(bytes).into());
        } else if let (AAAA, Ok(bytes)) = (kind, <[u8; 16]>::try_from(data)) {
            addresses.push(Ipv6Addr::from(bytes).into());
        }
        at += 10 + length;
    }
    Some(Answer {
        is_response: flags & 0x8000 != 0,
        code: flags.to_be_bytes()[1] & 15,
        addresses,
    })
}

fn after_name(message: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match *message.get(at)? {
            0 => return Some(at + 1),
            0xc0.. => return Some(at + 2),
            length => at += usize::from(length) + 1,
        }
    }
}
