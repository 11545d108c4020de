use std::{net::IpAddr, time::Duration};

use hickory_proto::{op::MessageType, rr::Name};
use proptest::prelude::*;

use super::*;

fn query(name: &str, kind: RecordType) -> Message {
    let mut message = Message::new(7, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).expect("a name"), kind));
    message
}

fn question(message: &Message) -> Question {
    match read(&message.to_vec().expect("written")) {
        Received::Question(question) => question,
        other => panic!("{other:?}"),
    }
}

fn code(received: Received) -> ResponseCode {
    match received {
        Received::Improper(answer, code) => {
            let answer = Message::from_vec(&answer).expect("an answer");
            assert_eq!(
                (answer.metadata.id, answer.metadata.message_type),
                (7, MessageType::Response)
            );
            code
        }
        other => panic!("{other:?}"),
    }
}

fn name(text: &str) -> Name {
    Name::from_ascii(text).expect("a name")
}

#[test]
fn a_question_is_read_and_its_name_made_canonical() {
    let question = question(&query("OK.Test.", RecordType::A));
    assert_eq!(question.name().as_ref().map(DomainName::as_str), Some("ok.test"));
    assert_eq!(
        (question.asked(), question.payload),
        (Asked::Records(DnsType::A), 512)
    );
}

#[test]
fn the_answer_repeats_the_question_as_it_was_spelt() {
    let question = question(&query("oK.tESt.", RecordType::A));
    let answer = question
        .answer(ResponseCode::Refused)
        .encode(512)
        .expect("written");
    let message = Message::from_vec(&answer).expect("a message");
    assert_eq!(message.metadata.response_code, ResponseCode::Refused);
    assert!(message.queries[0].name().eq_case(&name("oK.tESt.")));
}

#[test]
fn what_is_not_one_plain_question_is_refused_without_a_look_at_its_name() {
    let mut two = query("ok.test.", RecordType::A);
    two.add_query(Query::query(name("evil.test."), RecordType::A));
    assert_eq!(code(read(&two.to_vec().expect("written"))), ResponseCode::FormErr);

    let mut none = query("ok.test.", RecordType::A);
    none.queries.clear();
    assert_eq!(
        code(read(&none.to_vec().expect("written"))),
        ResponseCode::FormErr
    );

    let mut carrying = query("ok.test.", RecordType::A);
    carrying.add_answer(Record::from_rdata(
        name("ok.test."),
        1,
        RData::A(rdata::A::new(203, 0, 113, 1)),
    ));
    assert_eq!(
        code(read(&carrying.to_vec().expect("written"))),
        ResponseCode::FormErr
    );

    let mut chaos = query("version.bind.", RecordType::TXT);
    chaos.queries[0].set_query_class(DNSClass::CH);
    assert_eq!(
        code(read(&chaos.to_vec().expect("written"))),
        ResponseCode::Refused
    );

    let mut update = query("ok.test.", RecordType::A);
    update.metadata.op_code = OpCode::Update;
    assert_ne!(
        code(read(&update.to_vec().expect("written"))),
        ResponseCode::NoError
    );

    let mut packet = query("ok.test.", RecordType::A).to_vec().expect("written");
    packet.truncate(15);
    assert_eq!(code(read(&packet)), ResponseCode::FormErr);
}

#[test]
fn a_response_is_never_answered() {
    let mut packet = query("ok.test.", RecordType::A).to_vec().expect("written");
    packet[2] |= 0x80;
    assert!(matches!(read(&packet), Received::Nothing));
    assert!(matches!(read(&packet[..11]), Received::Nothing));
    assert!(matches!(read(&[0; QUERY_MAX + 1]), Received::Nothing));
}

#[test]
fn a_name_that_is_not_text_has_no_canonical_form() {
    let mut odd = query("ok.test.", RecordType::A);
    let label = Name::from_labels([&b"ok\0evil"[..], b"test"]).expect("labels");
    odd.queries[0].set_name(label);
    assert_eq!(question(&odd).name(), None);
    assert!(question(&odd).display_name().is_ascii());
    let mut dotted = query("ok.test.", RecordType::A);
    dotted.queries[0].set_name(Name::from_labels([&b"ok.test"[..], b"evil"]).expect("labels"));
    assert_eq!(question(&dotted).name(), None);
}

#[test]
fn what_hides_behind_a_question_makes_it_improper() {
    let mut trailing = query("ok.test.", RecordType::A).to_vec().expect("written");
    trailing.extend(b"covert");
    assert_eq!(code(read(&trailing)), ResponseCode::FormErr);

    let mut more = query("ok.test.", RecordType::A);
    more.add_additional(Record::from_rdata(
        name("x.test."),
        1,
        RData::A(rdata::A::new(1, 2, 3, 4)),
    ));
    assert_eq!(
        code(read(&more.to_vec().expect("written"))),
        ResponseCode::FormErr
    );

    let mut newer = query("ok.test.", RecordType::A);
    let mut edns = Edns::new();
    edns.set_version(1);
    newer.set_edns(edns);
    let Received::Improper(answer, _) = read(&newer.to_vec().expect("written")) else {
        panic!("a version that nobody knows");
    };
    let answer = Message::from_vec(&answer).expect("an answer");
    assert_eq!(u16::from(answer.metadata.response_code), 16, "BADVERS");
}

#[test]
fn types_are_those_of_policies_withheld_or_refused() {
    for (kind, asked) in [
        (RecordType::A, Asked::Records(DnsType::A)),
        (RecordType::AAAA, Asked::Records(DnsType::Aaaa)),
        (RecordType::TXT, Asked::Records(DnsType::Txt)),
        (RecordType::HTTPS, Asked::Withheld),
        (RecordType::SVCB, Asked::Withheld),
        (RecordType::ANY, Asked::Other(RecordType::ANY)),
        (RecordType::NULL, Asked::Other(RecordType::NULL)),
        (RecordType::AXFR, Asked::Other(RecordType::AXFR)),
        (
            RecordType::Unknown(65_280),
            Asked::Other(RecordType::Unknown(65_280)),
        ),
    ] {
        assert_eq!(question(&query("ok.test.", kind)).asked(), asked, "{kind}");
    }
}

fn many(count: u8) -> Found {
    Found::addresses_of(
        (0..count).map(|last| IpAddr::from([203, 0, 113, last])),
        Duration::from_secs(30),
    )
}

#[test]
fn only_what_is_kept_is_given_and_no_longer_than_it_lives() {
    let mut found = many(3);
    found.aliases = vec![name("edge.cdn.test."), name("pop.cdn.test.")];
    let kept = RData::A(rdata::A::new(203, 0, 113, 1));
    let answer =
        question(&query("ok.test.", RecordType::A))
            .found(&found, Duration::from_millis(19_900), |data| *data == kept);
    let message = Message::from_vec(&answer.encode(512).expect("written")).expect("a message");
    let given: Vec<String> = message
        .answers
        .iter()
        .map(|record| format!("{} {} {}", record.name, record.ttl, record.data))
        .collect();
    let expected = [
        "ok.test. 19 edge.cdn.test.",
        "edge.cdn.test. 19 pop.cdn.test.",
        "pop.cdn.test. 19 203.0.113.1",
    ];
    assert_eq!(given, expected);
}

#[test]
fn an_answer_that_does_not_fit_says_so_and_brings_what_fits() {
    let answer = || question(&query("ok.test.", RecordType::A)).found(&many(200), Duration::ZERO, |_| true);
    for limit in [512, 1232] {
        let short = answer().encode(limit).expect("written");
        assert!(
            short.len() <= limit && short.len() > limit / 2,
            "{} of {limit}",
            short.len()
        );
        let message = Message::from_vec(&short).expect("a message");
        assert!(message.metadata.truncation && !message.answers.is_empty());
    }
    let whole = Message::from_vec(&answer().encode(65_535).expect("written")).expect("a message");
    assert_eq!((whole.answers.len(), whole.metadata.truncation), (200, false));
}

proptest! {
    #[test]
    fn no_packet_can_panic_the_reader_and_every_answer_fits(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        if let Received::Question(question) = read(&bytes) {
            question.name();
            question.display_name();
            let bytes = question.found(&many(200), Duration::ZERO, |_| true).encode(usize::from(question.payload));
            prop_assert!(bytes.is_some_and(|bytes| bytes.len() <= usize::from(question.payload)));
        }
    }

    #[test]
    fn a_damaged_query_is_read_or_refused(at in 0usize..40, to in any::<u8>()) {
        let mut packet = query("ok.test.", RecordType::A).to_vec().expect("written");
        let at = at % packet.len();
        packet[at] = to;
        match read(&packet) {
            Received::Question(question) => drop(question.name()),
            Received::Improper(answer, _) => prop_assert!(Message::from_vec(&answer).is_ok()),
            Received::Nothing => prop_assert!(at == 2),
        }
    }
}
