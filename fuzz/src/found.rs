//! Answers of upstream resolvers, who may be anybody: what is taken from one is bounded, is about the question, and can
//! be given on.

use std::time::Duration;

use hickory_proto::{
    op::{Message, MessageType, OpCode, Query},
    rr::Name,
};
use netd::dns::{
    found::{Asking, RECORDS_MAX, Reply, TTL_MAX, record_type},
    message::{Received, UDP_MAX, read},
};
use sandgate_policy::{DnsType, DomainName};

const HEADER: usize = 12;
/// Most links of a chain of aliases.
const CHAIN_MAX: usize = 16;

pub(crate) fn check(data: &[u8]) {
    let [kind, flags, code, answers, authorities, rest @ ..] = data else {
        return;
    };
    let (_, kind) = DnsType::ALL[usize::from(*kind) % DnsType::ALL.len()];
    let name = DomainName::parse("www.ok.test").expect("a name");
    let asking = Asking::new(7, &name, kind).expect("a question");
    // Whoever does not repeat the question is not listened to: here everybody does.
    let section = &asking.packet[HEADER..asking.packet.len() - 11];
    let mut packet = vec![
        0,
        7,
        0x80 | flags & 0x7f,
        *code,
        0,
        1,
        0,
        *answers,
        0,
        *authorities,
        0,
        0,
    ];
    packet.extend_from_slice(section);
    packet.extend_from_slice(rest);
    let Ok(Reply::Found(found)) = asking.read(&packet, true) else {
        return;
    };
    assert!(found.ttl <= TTL_MAX);
    assert!(found.aliases.len() <= CHAIN_MAX && found.records.len() <= RECORDS_MAX);
    assert!(found.weight() < 1 << 20, "{} bytes are kept", found.weight());
    assert!(found.exists || found.records.is_empty());
    let wanted = record_type(kind);
    assert!(found.records.iter().all(|data| data.record_type() == wanted));

    let mut message = Message::new(9, MessageType::Query, OpCode::Query);
    message.add_query(Query::query(
        Name::from_ascii("www.ok.test.").expect("a name"),
        wanted,
    ));
    let Received::Question(question) = read(&message.to_vec().expect("written")) else {
        panic!("not a question")
    };
    for limit in [512, usize::from(UDP_MAX), usize::from(u16::MAX)] {
        let answer = question
            .found(&found, Duration::from_secs(20), |_| true)
            .encode(limit);
        // Aliases alone may be too many for the smallest.
        let Some(bytes) = answer else {
            panic!("nothing of {found:?} fits into {limit} bytes")
        };
        assert!(bytes.len() <= limit);
        let read = Message::from_vec(&bytes).expect("an answer");
        let all = found.aliases.len() + found.records.len();
        assert!(
            read.metadata.truncation || read.answers.len() == all,
            "records are missing"
        );
    }
}
