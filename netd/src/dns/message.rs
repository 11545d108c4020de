//! DNS messages of sandboxes (RFC 1035, RFC 6891). Owns: reading a sandbox's query strictly, and building the answer
//! from parsed fields: no byte that was not asked for reaches the sandbox.

use std::time::Duration;

use hickory_proto::{
    op::{Edns, Message, OpCode, Query, ResponseCode},
    rr::{DNSClass, RData, Record, RecordType, rdata},
    serialize::binary::{BinDecodable as _, BinDecoder, BinEncodable as _},
};
use sandgate_policy::{DnsType, DomainName};

use super::{
    found::{Found, record_type},
    plain::{self, Plain, Writing},
};

/// Largest query that is read, in bytes. A name and an OPT record need far less.
pub const QUERY_MAX: usize = 1024;
/// Largest answer over UDP, whatever the client says (DNS flag day 2020).
pub const UDP_MAX: u16 = 1232;
/// Answers over UDP without EDNS (RFC 1035 4.2.1).
const UDP_PLAIN: u16 = 512;

/// Bytes of a record with an address of either family, at most.
const ADDRESS_RECORD: usize = 28;

/// What arrived from a sandbox.
#[derive(Debug)]
pub enum Received {
    /// A question to be answered.
    Question(Question),
    /// Not a proper question: answer with this and nothing else.
    Improper(Vec<u8>, ResponseCode),
    /// Not even that: no answer.
    Nothing,
}

/// One question of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    id: u16,
    recursion_desired: bool,
    /// Name, type and class, as they came.
    section: Vec<u8>,
    kind: RecordType,
    edns: bool,
    /// Bytes that an answer over UDP may have.
    pub payload: u16,
}

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// Records of a type that a policy may have answered.
    Records(DnsType),
    /// Service bindings, of which there are none here: they would hand out the keys of encrypted ClientHellos, and
    /// hints at QUIC.
    Withheld,
    /// Anything else.
    Other(RecordType),
}

/// Reads what a sandbox sent.
pub fn read(packet: &[u8]) -> Received {
    // The header: a response is never answered, else two resolvers could talk forever.
    if packet.len() < 12 || packet.len() > QUERY_MAX || packet[2] & 0x80 != 0 {
        return Received::Nothing;
    }
    match plain::read(packet) {
        Some(question) => Received::Question(question.into()),
        None => read_by_library(packet),
    }
}

/// The same of any form: what [`read`] must agree with. At least a header, as there.
pub fn read_by_library(packet: &[u8]) -> Received {
    if packet.len() < 12 {
        return Received::Nothing;
    }
    let id = u16::from_be_bytes([packet[0], packet[1]]);
    let improper = |code| {
        let mut message = Message::error_msg(id, OpCode::Query, code);
        if code.high() != 0 {
            // The upper half of such a code stands in an OPT record (RFC 6891, 6.1.3).
            message.set_edns(edns());
        }
        match message.to_vec() {
            Ok(answer) => Received::Improper(answer, code),
            Err(_) => Received::Nothing,
        }
    };
    let mut decoder = BinDecoder::new(packet);
    let Ok(message) = Message::read(&mut decoder) else {
        return improper(ResponseCode::FormErr);
    };
    if message.metadata.op_code != OpCode::Query {
        return improper(ResponseCode::NotImp);
    }
    let [query] = message.queries.as_slice() else {
        return improper(ResponseCode::FormErr);
    };
    let bare = message.answers.is_empty()
        && message.authorities.is_empty()
        && message.additionals.is_empty()
        && message.signature.is_none()
        && decoder.is_empty();
    if !bare {
        return improper(ResponseCode::FormErr);
    }
    let edns = message.edns.as_ref();
    if edns.is_some_and(|edns| edns.version() != 0) {
        return improper(ResponseCode::BADVERS);
    }
    if query.query_class() != DNSClass::IN {
        return improper(ResponseCode::Refused);
    }
    // As it was spelt.
    let Ok(section) = query.to_bytes() else {
        return improper(ResponseCode::FormErr);
    };
    let question = Plain {
        id,
        recursion_desired: message.metadata.recursion_desired,
        section,
        kind: query.query_type(),
        payload: edns.map(Edns::max_payload),
    };
    Received::Question(question.into())
}

impl From<Plain> for Question {
    fn from(plain: Plain) -> Self {
        let Plain {
            id,
            recursion_desired,
            section,
            kind,
            payload,
        } = plain;
        Self {
            id,
            recursion_desired,
            section,
            kind,
            edns: payload.is_some(),
            payload: payload.map_or(UDP_PLAIN, |payload| payload.clamp(UDP_PLAIN, UDP_MAX)),
        }
    }
}

impl Question {
    /// What is asked for.
    pub fn asked(&self) -> Asked {
        let asked = self.kind;
        if matches!(asked, RecordType::HTTPS | RecordType::SVCB) {
            return Asked::Withheld;
        }
        let known = DnsType::ALL.iter().find(|(_, kind)| record_type(*kind) == asked);
        known.map_or(Asked::Other(asked), |(_, kind)| Asked::Records(*kind))
    }

    /// The name in its canonical form, if it has one.
    pub fn name(&self) -> Option<DomainName> {
        // Labels are bytes on the wire: only those that are plain text can be a name of a policy.
        let plain = |byte: &u8| byte.is_ascii_graphic() && *byte != b'.';
        let mut text = String::with_capacity(self.section.len());
        for label in plain::labels(&self.section) {
            if !label.iter().all(plain) {
                return None;
            }
            if !text.is_empty() {
                text.push('.');
            }
            text.push_str(std::str::from_utf8(label).ok()?);
        }
        DomainName::parse(&text).ok()
    }

    /// The asked name as text, for the audit record: never longer than a name, control characters escaped.
    pub fn display_name(&self) -> String {
        let mut name = self.query().name().to_ascii().to_ascii_lowercase();
        if name.len() > 1 && name.ends_with('.') {
            name.pop();
        }
        name.chars()
            .filter(|char| char.is_ascii_graphic())
            .take(255)
            .collect()
    }

    /// An answer without records.
    pub fn answer(&self, code: ResponseCode) -> Answer {
        Answer(Form::Plain(self.writing(code, 0)))
    }

    /// An answer with the aliases and those records of `found` that `keep` wants, to be kept for `ttl`.
    pub fn found(&self, found: &Found, ttl: Duration, keep: impl Fn(&RData) -> bool) -> Answer {
        let code = if found.exists {
            ResponseCode::NoError
        } else {
            ResponseCode::NXDomain
        };
        // Capped where it was found: it never exceeds a minute.
        let ttl = u32::try_from(ttl.as_secs()).unwrap_or(0);
        let addresses = match self.kind {
            RecordType::A | RecordType::AAAA => found.aliases.is_empty(),
            _ => false,
        };
        if addresses {
            let mut writing = self.writing(code, found.records.len() * ADDRESS_RECORD);
            for data in found.records.iter().filter(|data| keep(data)) {
                match data {
                    RData::A(address) => writing.add(self.kind, ttl, &address.0.octets()),
                    RData::AAAA(address) => writing.add(self.kind, ttl, &address.0.octets()),
                    _ => {}
                }
            }
            return Answer(Form::Plain(writing));
        }
        let mut message = self.response(code);
        let query = self.query();
        let mut owner = query.name();
        for target in &found.aliases {
            let data = RData::CNAME(rdata::CNAME(target.clone()));
            message.add_answer(Record::from_rdata(owner.clone(), ttl, data));
            owner = target;
        }
        for data in found.records.iter().filter(|data| keep(data)) {
            message.add_answer(Record::from_rdata(owner.clone(), ttl, data.clone()));
        }
        Answer(Form::Message(message))
    }

    fn writing(&self, code: ResponseCode, room: usize) -> Writing {
        let payload = self.edns.then_some(UDP_MAX);
        Writing::new(
            (self.id, self.recursion_desired),
            &self.section,
            code,
            payload,
            room,
        )
    }

    /// The question in the library's form.
    fn query(&self) -> Query {
        // It was read before.
        Query::from_bytes(&self.section).unwrap_or_default()
    }

    fn response(&self, code: ResponseCode) -> Message {
        let mut message = Message::response(self.id, OpCode::Query);
        message.metadata.recursion_desired = self.recursion_desired;
        message.metadata.recursion_available = true;
        message.metadata.response_code = code;
        message.add_query(self.query());
        if self.edns {
            message.set_edns(edns());
        }
        message
    }
}

fn edns() -> Edns {
    let mut edns = Edns::new();
    edns.set_max_payload(UDP_MAX);
    edns
}

/// An answer to a sandbox, not yet in bytes.
#[derive(Debug)]
pub struct Answer(Form);

#[derive(Debug)]
enum Form {
    /// Addresses of the name itself, or nothing.
    Plain(Writing),
    /// Anything.
    Message(Message),
}

impl Answer {
    /// The bytes, at most `limit` of them: records that do not fit are left out, and the answer says so. Nothing when
    /// the message cannot be written, which a parsed question does not bring about.
    pub fn encode(self, limit: usize) -> Option<Vec<u8>> {
        let mut message = match self.0 {
            Form::Plain(writing) => return writing.finish(limit),
            Form::Message(message) => message,
        };
        let mut bytes = message.to_vec().ok()?;
        while bytes.len() > limit {
            let count = message.answers.len();
            if count == 0 {
                return None;
            }
            // The records are of much the same size, so that this is seldom done more than once.
            message
                .answers
                .truncate((count * limit / bytes.len()).min(count - 1));
            message.metadata.truncation = true;
            bytes = message.to_vec().ok()?;
        }
        Some(bytes)
    }
}

#[cfg(test)]
mod tests;
