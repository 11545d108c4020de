//! Questions of sandboxes: the fast reader means what the library means, every answer fits and is one, and a name means
//! the same in a question as in a policy.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use hickory_proto::{
    op::{Message, MessageType, ResponseCode},
    rr::{Record, RecordType},
    serialize::binary::BinDecodable as _,
};
use netd::dns::{
    found::Found,
    message::{Asked, QUERY_MAX, Question, Received, UDP_MAX, read, read_by_library},
};
use sandgate_policy::{DnsType, DomainName};

pub(crate) fn check(data: &[u8]) {
    let received = read(data);
    if data.len() < 12 || data.len() > QUERY_MAX || data[2] & 0x80 != 0 {
        assert!(matches!(received, Received::Nothing), "{received:?}");
        return;
    }
    match (received, read_by_library(data)) {
        (Received::Question(question), Received::Question(library)) => {
            assert_eq!(question, library);
            asked(data, &question);
        }
        (Received::Improper(one, code), Received::Improper(other, same)) => {
            assert_eq!((&one, code), (&other, same));
            let answer = Message::from_vec(&one).expect("a message");
            assert_eq!(answer.metadata.id.to_be_bytes(), data[..2]);
            assert_eq!(answer.metadata.message_type, MessageType::Response);
            assert!(
                answer.answers.is_empty() && one.len() <= 64,
                "more than was asked for"
            );
        }
        (received, library) => panic!("{received:?} is {library:?}"),
    }
}

fn asked(data: &[u8], question: &Question) {
    let message = Message::from_bytes(data).expect("the library has read it");
    let query = &message.queries[0];
    assert!((512..=UDP_MAX).contains(&question.payload));
    assert!(question.display_name().len() <= 255);
    let labels: Vec<&[u8]> = query.name().iter().collect();
    let is_text = |label: &&[u8]| label.iter().all(|byte| byte.is_ascii_graphic() && *byte != b'.');
    let text = String::from_utf8_lossy(&labels.join(&b'.')).into_owned();
    let in_text = DomainName::parse(&text)
        .ok()
        .filter(|_| labels.iter().all(is_text));
    assert_eq!(question.name(), in_text, "another name in text");
    let is_address = matches!(question.asked(), Asked::Records(DnsType::A | DnsType::Aaaa));
    let four = query.query_type() != RecordType::AAAA;
    let addresses = (0..40_u8).map(|last| -> IpAddr {
        if four {
            Ipv4Addr::new(203, 0, 113, last).into()
        } else {
            Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, last.into()).into()
        }
    });
    let found = Found::addresses_of(addresses, Duration::from_secs(20));
    let limit = usize::from(question.payload);
    for answer in [
        question.answer(ResponseCode::Refused),
        question.answer(ResponseCode::NXDomain),
        question.found(&found, Duration::from_secs(20), |_| true),
    ] {
        let bytes = answer.encode(limit).expect("it can be written");
        assert!(bytes.len() <= limit);
        let read = Message::from_bytes(&bytes).expect("an answer");
        assert_eq!(read.metadata.id, message.metadata.id);
        assert_eq!(read.metadata.message_type, MessageType::Response);
        assert_eq!(
            read.metadata.recursion_desired,
            message.metadata.recursion_desired
        );
        let [repeated] = read.queries.as_slice() else {
            panic!("not one question: {read:?}")
        };
        assert!(repeated.name().eq_case(query.name()), "another spelling");
        assert_eq!(
            (repeated.query_type(), repeated.query_class()),
            (query.query_type(), query.query_class())
        );
        assert_eq!(read.edns.is_some(), message.edns.is_some());
        if is_address {
            let fits =
                |record: &Record| record.name == *query.name() && record.record_type() == query.query_type();
            assert!(read.answers.iter().all(fits), "{read:?}");
        }
    }
}
