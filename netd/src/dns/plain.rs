//! The form of nearly every question and answer, read and written byte by byte: one question, nothing beside it but an
//! empty OPT record, and addresses in return. Owns nothing but speed: what is of any other form is left to the library,
//! and what is of this one means the same to both (the tests compare them).

use hickory_proto::{op::ResponseCode, rr::RecordType};

/// Bytes of a message's header.
const HEADER: usize = 12;
/// Longest name on the wire (RFC 1035, 3.1).
const NAME_MAX: usize = 255;
/// An OPT record without options (RFC 6891, 6.1.2): its name, type, size, flags and no data.
const OPT: usize = 11;
const OPT_TYPE: [u8; 2] = [0, 41];
const IN: [u8; 2] = [0, 1];
/// A name that is the question's, which stands behind the header.
const SAME_NAME: [u8; 2] = [0xc0, 12];

/// One question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Plain {
    pub(super) id: u16,
    pub(super) recursion_desired: bool,
    /// Name, type and class as they came.
    pub(super) section: Vec<u8>,
    pub(super) kind: RecordType,
    /// Bytes that the client takes, if it says so.
    pub(super) payload: Option<u16>,
}

/// Reads a question, or leaves it to others.
pub(super) fn read(packet: &[u8]) -> Option<Plain> {
    let header = packet.first_chunk::<HEADER>()?;
    // A query, of the standard kind, with one question and at most one record beside it.
    if header[2] & 0xf8 != 0 || header[4..11] != [0, 1, 0, 0, 0, 0, 0] || header[11] > 1 {
        return None;
    }
    let mut end = HEADER;
    loop {
        let length = usize::from(*packet.get(end)?);
        end += 1 + length;
        if length > 63 || end - HEADER > NAME_MAX {
            return None;
        }
        if length == 0 {
            break;
        }
    }
    let section = packet.get(HEADER..end + 4)?;
    let (kind, class) = section[end - HEADER..].split_at(2);
    if class != IN {
        return None;
    }
    let payload = match (header[11], packet.get(end + 4..)?) {
        (0, []) => None,
        // Version 0, and no options.
        (1, [0, a, b, high, low, 0, 0, _, _, 0, 0]) if [*a, *b] == OPT_TYPE => {
            Some(u16::from_be_bytes([*high, *low]))
        }
        _ => return None,
    };
    Some(Plain {
        id: u16::from_be_bytes([header[0], header[1]]),
        recursion_desired: header[2] & 1 == 1,
        section: section.to_vec(),
        kind: RecordType::from(u16::from_be_bytes([kind[0], kind[1]])),
        payload,
    })
}

/// The labels of a section's name.
pub(super) fn labels(section: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = section;
    std::iter::from_fn(move || {
        let (length, behind) = rest.split_first()?;
        let length = usize::from(*length);
        if length == 0 || length > behind.len() {
            return None;
        }
        let (label, behind) = behind.split_at(length);
        rest = behind;
        Some(label)
    })
}

/// An answer on its way to bytes.
#[derive(Debug)]
pub(super) struct Writing {
    bytes: Vec<u8>,
    /// Records of one size.
    records: Vec<u8>,
    size: usize,
    /// What the sandbox is told that netd takes; nothing where it does not speak of such.
    payload: Option<u16>,
}

impl Writing {
    /// An answer to the question of a section, with this room for records.
    pub(super) fn new(
        (id, recursion_desired): (u16, bool),
        section: &[u8],
        code: ResponseCode,
        payload: Option<u16>,
        room: usize,
    ) -> Self {
        let mut bytes = Vec::with_capacity(HEADER + section.len() + room + OPT);
        bytes.extend(id.to_be_bytes());
        // A response, with recursion available.
        bytes.extend([0x80 | u8::from(recursion_desired), 0x80 | code.low()]);
        bytes.extend([0, 1, 0, 0, 0, 0, 0, u8::from(payload.is_some())]);
        bytes.extend_from_slice(section);
        Self {
            bytes,
            records: Vec::with_capacity(room),
            size: 1,
            payload,
        }
    }

    /// Adds a record of the question's name. All of one answer have data of the same length.
    pub(super) fn add(&mut self, kind: RecordType, ttl: u32, data: &[u8]) {
        let before = self.records.len();
        self.records.extend(SAME_NAME);
        self.records.extend(u16::from(kind).to_be_bytes());
        self.records.extend(IN);
        self.records.extend(ttl.to_be_bytes());
        self.records
            .extend(u16::try_from(data.len()).unwrap_or(u16::MAX).to_be_bytes());
        self.records.extend_from_slice(data);
        self.size = self.records.len() - before;
    }

    /// The bytes, at most `limit`: records that do not fit are left out, and the answer says so. Nothing when not even
    /// an answer without records fits.
    pub(super) fn finish(mut self, limit: usize) -> Option<Vec<u8>> {
        let opt = if self.payload.is_some() { OPT } else { 0 };
        let room = limit.checked_sub(self.bytes.len() + opt)?;
        let wanted = self.records.len() / self.size;
        let count = wanted.min(room / self.size);
        if count < wanted {
            self.bytes[2] |= 2;
        }
        let counted = u16::try_from(count).ok()?.to_be_bytes();
        self.bytes[6..8].copy_from_slice(&counted);
        self.bytes.extend_from_slice(&self.records[..count * self.size]);
        if let Some(payload) = self.payload {
            self.bytes.push(0);
            self.bytes.extend(OPT_TYPE);
            self.bytes.extend(payload.to_be_bytes());
            self.bytes.extend([0; 6]);
        }
        Some(self.bytes)
    }
}
