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

/// A query as clients send it, with some bytes changed.
fn packets() -> impl Strategy<Value = Vec<u8>> {
    let label = proptest::collection::vec(any::<u8>(), 1..12);
    let plain = "[a-zA-Z0-9_-]{1,9}".prop_map(String::into_bytes);
    let labels = proptest::collection::vec(prop_oneof![4 => plain, 1 => label], 0..5);
    let kind = prop_oneof![Just(1_u16), Just(28), Just(16), Just(65), any::<u16>()];
    let opt = proptest::option::of((any::<u16>(), any::<bool>()));
    let changes = proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 0..3);
    let head = (any::<u16>(), any::<bool>());
    (head, labels, kind, opt, changes, 0_usize..40).prop_map(|(head, labels, kind, opt, changes, cut)| {
        let ((id, desired), mut bytes) = (head, Vec::new());
        bytes.extend(id.to_be_bytes());
        bytes.extend([u8::from(desired), 0, 0, 1, 0, 0, 0, 0, 0, u8::from(opt.is_some())]);
        for label in labels {
            bytes.push(u8::try_from(label.len()).expect("short"));
            bytes.extend(label);
        }
        bytes.push(0);
        bytes.extend(kind.to_be_bytes());
        bytes.extend([0, 1]);
        if let Some((payload, has_option)) = opt {
            bytes.extend([0, 0, 41]);
            bytes.extend(payload.to_be_bytes());
            bytes.extend([0; 4]);
            bytes.extend(if has_option {
                &[0, 6, 0, 10, 0, 2, 7, 7][..]
            } else {
                &[0, 0]
            });
        }
        for (place, byte) in changes {
            let place = place.index(bytes.len());
            bytes[place] = byte;
        }
        // Seldom.
        bytes.truncate(bytes.len() - cut.saturating_sub(35));
        bytes
    })
}

fn addresses_of(answer: &Message) -> Vec<(RecordType, u32, Option<IpAddr>)> {
    let of = |record: &Record| {
        (
            record.record_type(),
            record.ttl,
            crate::dns::found::address(&record.data),
        )
    };
    answer.answers.iter().map(of).collect()
}

proptest! {
    #[test]
    fn what_is_read_byte_by_byte_means_what_the_library_reads(packet in packets()) {
        let plain = plain::read(&packet).map(Question::from);
        if let Some(plain) = plain {
            match read_by_library(&packet) {
                Received::Question(question) => {
                    let text = (plain.name(), plain.display_name());
                    prop_assert_eq!(text, (question.name(), question.display_name()));
                    prop_assert_eq!(plain, question);
                }
                other => return Err(TestCaseError::fail(format!("{other:?} is {plain:?}"))),
            }
        }
    }

    #[test]
    fn what_is_written_byte_by_byte_is_what_the_library_writes(
        labels in proptest::collection::vec("[a-zA-Z0-9]{1,20}", 1..6), edns in any::<bool>(), exists in any::<bool>(),
        four in any::<bool>(), numbers in proptest::collection::vec(any::<u32>(), 0..90), ttl in 0_u64..60,
        limit in 512_usize..1232,
    ) {
        let kind = if four { RecordType::A } else { RecordType::AAAA };
        let mut asked = query(&format!("{}.", labels.join(".")), kind);
        if edns {
            asked.set_edns(super::edns());
        }
        let question = question(&asked);
        let address = |number: &u32| -> IpAddr {
            if four { number.to_be_bytes().into() } else { std::net::Ipv6Addr::from(u128::from(*number) << 64).into() }
        };
        let ttl = Duration::from_secs(ttl);
        let found = Found { exists, ..Found::addresses_of(numbers.iter().map(address), ttl) };
        let plain = question.found(&found, ttl, |_| true).encode(limit).expect("written");
        prop_assert!(plain.len() <= limit);
        let mut message = question.response(if exists { ResponseCode::NoError } else { ResponseCode::NXDomain });
        for data in &found.records {
            let seconds = u32::try_from(ttl.as_secs()).expect("few");
            message.add_answer(Record::from_rdata(asked.queries[0].name().clone(), seconds, data.clone()));
        }
        let whole = message.to_vec().expect("written");
        if whole.len() <= limit {
            prop_assert_eq!(&plain, &whole);
        } else {
            let read = Message::from_vec(&plain).expect("a message");
            prop_assert!(read.metadata.truncation);
            let kept = addresses_of(&read);
            prop_assert_eq!(&kept[..], &addresses_of(&message)[..kept.len()]);
            let one_more = if four { 16 } else { 28 };
            prop_assert!(plain.len() + one_more > limit, "as many as fit");
        }
    }
}
