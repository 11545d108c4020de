//! What an upstream resolver is asked, and what is taken from its answer (RFC 1035, RFC 2308, RFC 5452). Owns: the
//! query, which holds nothing of the sandbox's but a name and a type, and the strict reading of the answer: only what
//! answers this very question, only records on the way from its name, only of its type.

use std::{net::IpAddr, time::Duration};

use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, Query, ResponseCode},
    rr::{DNSClass, Name, RData, Record, RecordType},
    serialize::binary::{BinDecodable as _, BinDecoder},
};
use sandgate_policy::{DnsType, DomainName};

use super::message::UDP_MAX;

/// Longest life of an answer here and in a client's cache.
pub const TTL_MAX: Duration = Duration::from_secs(60);
/// Longest life of the knowledge that there is nothing (RFC 2308, 5, allows hours; a name made a moment ago must work
/// soon).
const NEGATIVE_TTL_MAX: Duration = Duration::from_secs(30);
/// Links of a CNAME chain that are followed.
const CHAIN_MAX: usize = 16;
/// Records of one answer that are used.
pub const RECORDS_MAX: usize = 512;
/// Bytes that a kept answer takes besides its names and records.
const WEIGHT: usize = 192;

/// What an upstream said about one name and type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Whether the name exists, with or without records of the type.
    pub exists: bool,
    /// The chain of aliases that the asked name begins: the targets, in order.
    pub aliases: Vec<Name>,
    /// The records at its end.
    pub records: Vec<RData>,
    /// How long all of it may be kept.
    pub ttl: Duration,
}

/// One packet of an upstream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// The answer.
    Found(Found),
    /// The answer did not fit: ask again over TCP.
    Truncated,
}

/// The upstream's packet is not an answer to what was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unusable {
    /// Not from this conversation: wait for another.
    #[error("not an answer to the question")]
    Foreign,
    /// An answer to the question in other letters: from a server that changes them, or from somebody guessing.
    #[error("not an answer to the question as it was spelt")]
    Respelt,
    /// The upstream did answer, and cannot help.
    #[error("the upstream answered {0}")]
    Failed(ResponseCode),
    /// The aliases go round in a circle, or on and on.
    #[error("the aliases have no end")]
    Endless,
}

/// One query on its way.
#[derive(Debug, Clone)]
pub struct Asking {
    id: u16,
    name: Name,
    kind: RecordType,
    /// Its bytes.
    pub packet: Vec<u8>,
}

impl Found {
    /// Addresses of a name without aliases; `ttl` is how long they may be kept.
    pub fn addresses_of(addresses: impl IntoIterator<Item = IpAddr>, ttl: Duration) -> Self {
        let data = |address| match address {
            IpAddr::V4(address) => RData::A(address.into()),
            IpAddr::V6(address) => RData::AAAA(address.into()),
        };
        Self {
            exists: true,
            aliases: Vec::new(),
            records: addresses.into_iter().map(data).collect(),
            ttl,
        }
    }

    /// The addresses among the records.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.records.iter().filter_map(address)
    }

    /// Bytes of memory it takes, roughly and rather more.
    pub fn weight(&self) -> usize {
        let inner = |data: &RData| match data {
            RData::TXT(text) => text.txt_data.iter().map(|part| part.len() + 16).sum(),
            RData::CAA(caa) => caa.tag.len() + caa.value.len(),
            _ => 0,
        };
        let names: usize = self
            .aliases
            .iter()
            .map(|name| size_of::<Name>() + name.len())
            .sum();
        let records: usize = self
            .records
            .iter()
            .map(|data| size_of::<RData>() + inner(data))
            .sum();
        WEIGHT + names + records
    }
}

/// The address that a record holds.
pub fn address(data: &RData) -> Option<IpAddr> {
    match data {
        RData::A(address) => Some(IpAddr::V4(address.0)),
        RData::AAAA(address) => Some(IpAddr::V6(address.0)),
        _ => None,
    }
}

/// The type on the wire.
pub fn record_type(kind: DnsType) -> RecordType {
    match kind {
        DnsType::A => RecordType::A,
        DnsType::Aaaa => RecordType::AAAA,
        DnsType::Caa => RecordType::CAA,
        DnsType::Cname => RecordType::CNAME,
        DnsType::Mx => RecordType::MX,
        DnsType::Ns => RecordType::NS,
        DnsType::Ptr => RecordType::PTR,
        DnsType::Soa => RecordType::SOA,
        DnsType::Srv => RecordType::SRV,
        DnsType::Txt => RecordType::TXT,
    }
}

impl Asking {
    /// The query for the records of `name`, its letters in random case (0x20: an answer must repeat them, which a
    /// guesser cannot). Nothing when `name` cannot be written.
    pub fn new(id: u16, name: &DomainName, kind: DnsType) -> Option<Self> {
        let mut name = Name::from_ascii(name.as_str()).ok()?;
        name.set_fqdn(true);
        name.randomize_label_case();
        let kind = record_type(kind);
        let mut message = Message::new(id, MessageType::Query, OpCode::Query);
        message.metadata.recursion_desired = true;
        message.add_query(Query::query(name.clone(), kind));
        let mut edns = Edns::new();
        edns.set_max_payload(UDP_MAX);
        message.set_edns(edns);
        Some(Self {
            id,
            packet: message.to_vec().ok()?,
            name,
            kind,
        })
    }

    /// Reads what came back. `spelt` demands the letters as they were sent.
    ///
    /// # Errors
    /// When it is no answer to the query, or a failure.
    pub fn read(&self, packet: &[u8], spelt: bool) -> Result<Reply, Unusable> {
        let mut decoder = BinDecoder::new(packet);
        let message = Message::read(&mut decoder).map_err(|_broken| Unusable::Foreign)?;
        let [query] = message.queries.as_slice() else {
            return Err(Unusable::Foreign);
        };
        let fits = message.metadata.id == self.id
            && message.metadata.message_type == MessageType::Response
            && message.metadata.op_code == OpCode::Query
            && *query.name() == self.name
            && query.query_type() == self.kind
            && query.query_class() == DNSClass::IN
            && decoder.is_empty();
        if !fits {
            return Err(Unusable::Foreign);
        }
        if spelt && !query.name().eq_case(&self.name) {
            return Err(Unusable::Respelt);
        }
        if message.metadata.truncation {
            return Ok(Reply::Truncated);
        }
        match message.metadata.response_code {
            ResponseCode::NoError => self.follow(&message, true).map(Reply::Found),
            ResponseCode::NXDomain => self.follow(&message, false).map(Reply::Found),
            failed => Err(Unusable::Failed(failed)),
        }
    }

    /// Follows the aliases to the records. What does not lie on the way is left out.
    fn follow(&self, message: &Message, exists: bool) -> Result<Found, Unusable> {
        let mut owner = &self.name;
        let mut ttl = TTL_MAX;
        let mut aliases: Vec<&Name> = Vec::new();
        let of = |owner: &Name, record: &Record| record.name == *owner && record.dns_class == DNSClass::IN;
        let alias = |owner: &Name| {
            let own = message.answers.iter().filter(|record| of(owner, record));
            own.filter(|_| self.kind != RecordType::CNAME)
                .find_map(|record| match &record.data {
                    RData::CNAME(target) => Some((&target.0, record.ttl)),
                    _ => None,
                })
        };
        while let Some((target, life)) = alias(owner) {
            if aliases.len() == CHAIN_MAX || *target == self.name || aliases.contains(&target) {
                return Err(Unusable::Endless);
            }
            ttl = ttl.min(seconds(life));
            aliases.push(target);
            owner = target;
        }
        let mut records: Vec<RData> = Vec::new();
        let fitting = message
            .answers
            .iter()
            .filter(|record| of(owner, record) && record.record_type() == self.kind);
        for record in fitting.take(RECORDS_MAX) {
            ttl = ttl.min(seconds(record.ttl));
            if is_whole(&record.data) {
                records.push(record.data.clone());
            }
        }
        if let [first, ..] = records.as_slice()
            && address(first).is_some()
        {
            // A set (RFC 2181, 5): an address that is listed twice is one.
            let mut seen = std::collections::HashSet::new();
            records.retain(|data| seen.insert(address(data)));
        }
        if records.is_empty() {
            ttl = ttl.min(negative(&message.authorities));
        }
        Ok(Found {
            exists: exists || !records.is_empty(),
            aliases: aliases.into_iter().cloned().collect(),
            records,
            ttl,
        })
    }
}

/// A record with data in it: one without is part of an update (RFC 2136), never of an answer.
fn is_whole(data: &RData) -> bool {
    !matches!(data, RData::Update0(_))
}

/// How long it may be remembered that there is nothing: as the zone says, else not at all (RFC 2308, 5).
fn negative(authorities: &[Record]) -> Duration {
    let start = authorities.iter().find_map(|record| match &record.data {
        RData::SOA(start) => Some(start.minimum.min(record.ttl)),
        _ => None,
    });
    start.map_or(Duration::ZERO, seconds).min(NEGATIVE_TTL_MAX)
}

/// A time to live; with the highest bit it means none (RFC 2181, 8).
fn seconds(ttl: u32) -> Duration {
    if ttl > i32::MAX.unsigned_abs() {
        Duration::ZERO
    } else {
        Duration::from_secs(u64::from(ttl))
    }
}

#[cfg(test)]
mod tests;
