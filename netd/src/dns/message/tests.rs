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

fn a(owner: &str, last: u8, ttl: u32) -> Record {
    Record::from_rdata(
        name(owner),
        ttl,
        RData::A(rdata::A(Ipv4Addr::new(203, 0, 113, last))),
    )
}

fn cname(owner: &str, target: &str) -> Record {
    Record::from_rdata(name(owner), 3600, RData::CNAME(rdata::CNAME(name(target))))
}

fn reply(id: u16, code: ResponseCode, answers: Vec<Record>) -> Vec<u8> {
    let mut message = Message::response(id, OpCode::Query);
    message.metadata.response_code = code;
    message.add_query(Query::query(name("ok.test."), RecordType::A));
    message.add_answers(answers);
    message.to_vec().expect("written")
}

fn resolved(answers: Vec<Record>) -> Resolved {
    match read_upstream(&reply(9, ResponseCode::NoError, answers), 9, &name("ok.test.")) {
        Ok(Upstream::Exists(resolved)) => resolved,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_question_is_read_and_its_name_made_canonical() {
    let question = question(&query("OK.Test.", RecordType::A));
    assert_eq!(question.name().as_ref().map(DomainName::as_str), Some("ok.test"));
    assert_eq!((question.asked(), question.payload), (Asked::Addresses, 512));
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
    carrying.add_answer(a("ok.test.", 1, 1));
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
    let packet = reply(7, ResponseCode::NoError, Vec::new());
    assert!(matches!(read(&packet), Received::Nothing));
    assert!(matches!(read(&packet[..11]), Received::Nothing));
    assert!(matches!(read(&[0; QUERY_MAX + 1]), Received::Nothing));
}

#[test]
fn nothing_but_name_and_type_goes_upstream() {
    let mut asked = query("OK.test.", RecordType::A);
    let mut edns = Edns::new();
    edns.set_max_payload(4096).set_dnssec_ok(true);
    edns.options_mut()
        .insert(rdata::opt::EdnsOption::Unknown(65001, b"covert".to_vec()));
    asked.set_edns(edns);
    asked.metadata.authentic_data = true;
    asked.metadata.checking_disabled = true;
    let question = question(&asked);
    assert_eq!(question.payload, UDP_MAX);
    let (packet, _) = upstream_query(0x1234, &question.name().expect("a name")).expect("written");
    let same = upstream_query(0x1234, &DomainName::parse("ok.test").expect("a name"))
        .expect("written")
        .0;
    assert_eq!(packet, same);
    assert!(!packet.windows(6).any(|window| window == b"covert"));
    let message = Message::from_vec(&packet).expect("a message");
    assert!(!message.metadata.authentic_data && !message.metadata.checking_disabled);
    assert_eq!(message.edns.map(|edns| edns.flags().dnssec_ok), Some(false));
}

#[test]
fn aliases_are_followed_and_strangers_left_out() {
    let resolved = resolved(vec![
        a("stranger.test.", 66, 5),
        cname("ok.test.", "edge.cdn.test."),
        cname("edge.cdn.test.", "pop.cdn.test."),
        a("pop.cdn.test.", 10, 300),
        a("pop.cdn.test.", 10, 300),
        a("pop.cdn.test.", 11, 20),
        a("ok.test.", 77, 5),
    ]);
    assert_eq!(resolved.aliases.len(), 2);
    let addresses: Vec<u8> = resolved
        .addresses
        .iter()
        .map(|(address, _)| address.octets()[3])
        .collect();
    assert_eq!(addresses, [10, 11]);

    let question = question(&query("ok.test.", RecordType::A));
    let answer = question
        .resolved(&resolved, &[Ipv4Addr::new(203, 0, 113, 11)])
        .encode(512)
        .expect("written");
    let message = Message::from_vec(&answer).expect("a message");
    assert_eq!(message.answers.len(), 3);
    assert_eq!(message.answers[2].name, name("pop.cdn.test."));
    assert!(message.answers.iter().all(|record| record.ttl <= TTL_MAX));
    assert_eq!(message.answers[2].ttl, 20);
}

#[test]
fn a_circle_of_aliases_ends() {
    let resolved = resolved(vec![cname("ok.test.", "b.test."), cname("b.test.", "ok.test.")]);
    assert_eq!((resolved.aliases.len(), resolved.addresses.len()), (CHAIN_MAX, 0));
}

#[test]
fn only_the_answer_to_this_very_question_counts() {
    let good = reply(9, ResponseCode::NoError, vec![a("ok.test.", 1, 1)]);
    let ok = name("ok.test.");
    assert!(read_upstream(&good, 9, &ok).is_ok());
    assert_eq!(read_upstream(&good, 10, &ok), Err(Unusable::Foreign));
    assert_eq!(
        read_upstream(&good, 9, &name("evil.test.")),
        Err(Unusable::Foreign)
    );
    assert_eq!(read_upstream(&good[..20], 9, &ok), Err(Unusable::Foreign));
    let failed = reply(9, ResponseCode::ServFail, Vec::new());
    assert_eq!(
        read_upstream(&failed, 9, &ok),
        Err(Unusable::Failed(ResponseCode::ServFail))
    );
    let (own_query, _) = upstream_query(9, &DomainName::parse("ok.test").expect("a name")).expect("written");
    assert_eq!(read_upstream(&own_query, 9, &ok), Err(Unusable::Foreign));
}

#[test]
fn an_answer_that_does_not_fit_says_so_and_fits() {
    let answers = (0..64).map(|last| a("ok.test.", last, 30)).collect();
    let resolved = resolved(answers);
    let kept: Vec<Ipv4Addr> = resolved.addresses.iter().map(|(address, _)| *address).collect();
    let answer = question(&query("ok.test.", RecordType::A)).resolved(&resolved, &kept);
    let short = answer.encode(512).expect("written");
    assert!(short.len() <= 512);
    let message = Message::from_vec(&short).expect("a message");
    assert!(message.metadata.truncation && message.answers.is_empty());
    let whole = Message::from_vec(&answer.encode(65_535).expect("written")).expect("a message");
    assert_eq!(whole.answers.len(), 64);
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

proptest! {
    #[test]
    fn no_packet_can_panic_the_readers(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        if let Received::Question(question) = read(&bytes) {
            question.name();
            question.display_name();
            question.answer(ResponseCode::Refused).encode(512);
        }
        read_upstream(&bytes, 1, &name("ok.test.")).ok();
    }

    #[test]
    fn a_damaged_query_is_read_or_refused(at in 0usize..40, to in any::<u8>()) {
        let mut packet = query("ok.test.", RecordType::A).to_vec().expect("written");
        let at = at % packet.len();
        packet[at] = to;
        read(&packet);
    }
}
