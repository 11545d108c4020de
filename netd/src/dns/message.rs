//! DNS messages on the wire (RFC 1035, RFC 6891). Owns: reading a sandbox's query strictly, building the
//! query that goes upstream and the answer that comes back, all from parsed fields. No byte of a query that
//! is not its name and type leaves the node, no record that was not asked for reaches the sandbox.

use std::net::Ipv4Addr;

use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, Query, ResponseCode},
    rr::{DNSClass, Name, RData, Record, RecordType, rdata},
};
use sandgate_policy::DomainName;

/// Largest query that is read, in bytes. A name and an OPT record need far less.
pub const QUERY_MAX: usize = 1024;
/// Largest answer over UDP, whatever the client says (DNS flag day 2020).
pub const UDP_MAX: u16 = 1232;
/// Answers over UDP without EDNS (RFC 1035 4.2.1).
const UDP_PLAIN: u16 = 512;
/// Longest life of an answer in a client's cache, in seconds.
pub const TTL_MAX: u32 = 60;
/// Links of a CNAME chain that are followed.
const CHAIN_MAX: usize = 16;
/// Addresses of one answer that are used.
pub const ADDRESSES_MAX: usize = 64;

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
    query: Query,
    edns: bool,
    /// Bytes that an answer over UDP may have.
    pub payload: u16,
}

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// IPv4 addresses.
    Addresses,
    /// Something that exists, and of which there is nothing here: IPv6 addresses, service bindings.
    Withheld,
    /// Anything else.
    Other(RecordType),
}

/// What the upstream said about a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Upstream {
    /// The name exists; there may be no addresses.
    Exists(Resolved),
    /// It does not.
    NoSuchName(Resolved),
    /// The answer did not fit: ask again over TCP.
    Truncated,
}

/// Addresses of a name, and the way to them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Resolved {
    /// The chain of aliases, from the asked name on.
    aliases: Vec<(Name, Name, u32)>,
    /// The addresses at its end, with their time to live in seconds.
    pub addresses: Vec<(Ipv4Addr, u32)>,
}

impl Resolved {
    /// One address without aliases; `ttl` in seconds.
    pub fn address(address: Ipv4Addr, ttl: u32) -> Self {
        Self {
            aliases: Vec::new(),
            addresses: vec![(address, ttl)],
        }
    }
}

/// The upstream's packet is not an answer to what was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unusable {
    /// Not from this conversation: wait for another.
    #[error("not an answer to the question")]
    Foreign,
    /// The upstream did answer, and cannot help.
    #[error("the upstream answered {0}")]
    Failed(ResponseCode),
}

/// Reads what a sandbox sent.
pub fn read(packet: &[u8]) -> Received {
    // The header: a response is never answered, else two resolvers could talk forever.
    if packet.len() < 12 || packet.len() > QUERY_MAX || packet[2] & 0x80 != 0 {
        return Received::Nothing;
    }
    let id = u16::from_be_bytes([packet[0], packet[1]]);
    let improper = |code| match Message::error_msg(id, OpCode::Query, code).to_vec() {
        Ok(answer) => Received::Improper(answer, code),
        Err(_) => Received::Nothing,
    };
    let Ok(message) = Message::from_vec(packet) else {
        return improper(ResponseCode::FormErr);
    };
    if message.metadata.op_code != OpCode::Query {
        return improper(ResponseCode::NotImp);
    }
    let [query] = message.queries.as_slice() else {
        return improper(ResponseCode::FormErr);
    };
    if !message.answers.is_empty() || !message.authorities.is_empty() {
        return improper(ResponseCode::FormErr);
    }
    let edns = message.edns.as_ref();
    if edns.is_some_and(|edns| edns.version() != 0) {
        return improper(ResponseCode::BADVERS);
    }
    if query.query_class() != DNSClass::IN {
        return improper(ResponseCode::Refused);
    }
    Received::Question(Question {
        id,
        recursion_desired: message.metadata.recursion_desired,
        query: query.clone(),
        edns: edns.is_some(),
        payload: edns.map_or(UDP_PLAIN, |edns| edns.max_payload().clamp(UDP_PLAIN, UDP_MAX)),
    })
}

impl Question {
    /// What is asked for.
    pub fn asked(&self) -> Asked {
        match self.query.query_type() {
            RecordType::A => Asked::Addresses,
            RecordType::AAAA | RecordType::HTTPS | RecordType::SVCB => Asked::Withheld,
            other => Asked::Other(other),
        }
    }

    /// The name in its canonical form, if it has one.
    pub fn name(&self) -> Option<DomainName> {
        // Labels are bytes on the wire: only those that are plain text can be a name of a policy.
        let plain = |label: &[u8]| label.iter().all(|byte| byte.is_ascii_graphic() && *byte != b'.');
        if !self.query.name().iter().all(plain) {
            return None;
        }
        DomainName::parse(&self.query.name().to_ascii()).ok()
    }

    /// The asked name as text, for the audit record: never longer than a name, control characters escaped.
    pub fn display_name(&self) -> String {
        let mut name = self.query.name().to_ascii().to_ascii_lowercase();
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
        Answer {
            message: self.response(code),
        }
    }

    /// An answer with the aliases and those addresses of `resolved` that `kept` names.
    pub fn resolved(&self, resolved: &Resolved, kept: &[Ipv4Addr]) -> Answer {
        let mut message = self.response(ResponseCode::NoError);
        let mut owner = self.query.name().clone();
        for (alias, target, ttl) in &resolved.aliases {
            message.add_answer(record(
                alias.clone(),
                *ttl,
                RData::CNAME(rdata::CNAME(target.clone())),
            ));
            owner = target.clone();
        }
        for (address, ttl) in resolved
            .addresses
            .iter()
            .filter(|(address, _)| kept.contains(address))
        {
            message.add_answer(record(owner.clone(), *ttl, RData::A(rdata::A(*address))));
        }
        Answer { message }
    }

    fn response(&self, code: ResponseCode) -> Message {
        let mut message = Message::response(self.id, OpCode::Query);
        message.metadata.recursion_desired = self.recursion_desired;
        message.metadata.recursion_available = true;
        message.metadata.response_code = code;
        message.add_query(self.query.clone());
        if self.edns {
            let mut edns = Edns::new();
            edns.set_max_payload(UDP_MAX);
            message.set_edns(edns);
        }
        message
    }
}

/// An answer to a sandbox, not yet in bytes.
#[derive(Debug)]
pub struct Answer {
    message: Message,
}

impl Answer {
    /// The bytes, at most `limit` of them: what does not fit is left out and said to be missing.
    /// Nothing when the message cannot be written, which a parsed question does not bring about.
    pub fn encode(&self, limit: usize) -> Option<Vec<u8>> {
        let whole = self.message.to_vec().ok()?;
        if whole.len() <= limit {
            return Some(whole);
        }
        self.message.truncate().to_vec().ok()
    }
}

fn record(name: Name, ttl: u32, data: RData) -> Record {
    Record::from_rdata(name, ttl.min(TTL_MAX), data)
}

/// The query that asks an upstream for the addresses of `name`. Nothing when `name` cannot be written.
pub fn upstream_query(id: u16, name: &DomainName) -> Option<(Vec<u8>, Name)> {
    let mut name = Name::from_ascii(name.as_str()).ok()?;
    name.set_fqdn(true);
    let mut message = Message::new(id, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(name.clone(), RecordType::A));
    let mut edns = Edns::new();
    edns.set_max_payload(UDP_MAX);
    message.set_edns(edns);
    Some((message.to_vec().ok()?, name))
}

/// Reads an upstream's answer to the query with `id` for `name`.
///
/// # Errors
/// When it is no answer to that query, or a failure.
pub fn read_upstream(packet: &[u8], id: u16, name: &Name) -> Result<Upstream, Unusable> {
    let message = Message::from_vec(packet).map_err(|_broken| Unusable::Foreign)?;
    let [query] = message.queries.as_slice() else {
        return Err(Unusable::Foreign);
    };
    let fits = message.metadata.id == id
        && message.metadata.message_type == MessageType::Response
        && message.metadata.op_code == OpCode::Query
        && query.name() == name
        && query.query_type() == RecordType::A
        && query.query_class() == DNSClass::IN;
    if !fits {
        return Err(Unusable::Foreign);
    }
    if message.metadata.truncation {
        return Ok(Upstream::Truncated);
    }
    match message.metadata.response_code {
        ResponseCode::NoError => Ok(Upstream::Exists(follow(&message.answers, name))),
        ResponseCode::NXDomain => Ok(Upstream::NoSuchName(follow(&message.answers, name))),
        failed => Err(Unusable::Failed(failed)),
    }
}

/// Follows the aliases from `name` to its addresses. Records that do not lie on the way are left out.
fn follow(answers: &[Record], name: &Name) -> Resolved {
    let mut resolved = Resolved::default();
    let mut owner = name.clone();
    let of = |owner: &Name, record: &Record| record.name == *owner && record.dns_class == DNSClass::IN;
    while resolved.aliases.len() < CHAIN_MAX {
        let target = answers
            .iter()
            .filter(|record| of(&owner, record))
            .find_map(|record| match &record.data {
                RData::CNAME(target) => Some((target.0.clone(), record.ttl)),
                _ => None,
            });
        let Some((target, ttl)) = target else { break };
        resolved.aliases.push((owner, target.clone(), ttl));
        owner = target;
    }
    for record in answers.iter().filter(|record| of(&owner, record)) {
        if let RData::A(address) = &record.data
            && resolved.addresses.len() < ADDRESSES_MAX
            && !resolved.addresses.iter().any(|(known, _)| *known == address.0)
        {
            resolved.addresses.push((address.0, record.ttl));
        }
    }
    resolved
}

#[cfg(test)]
mod tests;
