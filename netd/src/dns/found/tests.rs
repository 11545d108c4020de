use std::net::Ipv4Addr;

use hickory_proto::rr::rdata;
use proptest::prelude::*;

use super::*;

fn name(text: &str) -> Name {
    Name::from_ascii(text).expect("a name")
}

fn domain(text: &str) -> DomainName {
    DomainName::parse(text).expect("a name")
}

fn asking(kind: DnsType) -> Asking {
    Asking::new(9, &domain("ok.test"), kind).expect("written")
}

fn a(owner: &str, last: u8, ttl: u32) -> Record {
    let data = RData::A(rdata::A(Ipv4Addr::new(203, 0, 113, last)));
    Record::from_rdata(name(owner), ttl, data)
}

fn cname(owner: &str, target: &str) -> Record {
    Record::from_rdata(name(owner), 50, RData::CNAME(rdata::CNAME(name(target))))
}

fn reply(to: &Asking, code: ResponseCode, answers: Vec<Record>) -> Message {
    let mut message = Message::response(to.id, OpCode::Query);
    message.metadata.response_code = code;
    message.add_query(Query::query(to.name.clone(), to.kind));
    message.add_answers(answers);
    message
}

fn read(to: &Asking, message: &Message) -> Result<Reply, Unusable> {
    to.read(&message.to_vec().expect("written"), true)
}

fn found(kind: DnsType, answers: Vec<Record>) -> Result<Found, Unusable> {
    let asking = asking(kind);
    match read(&asking, &reply(&asking, ResponseCode::NoError, answers))? {
        Reply::Found(found) => Ok(found),
        Reply::Truncated => panic!("whole"),
    }
}

#[test]
fn nothing_but_name_and_type_goes_upstream() {
    let asking = asking(DnsType::A);
    let message = Message::from_vec(&asking.packet).expect("a message");
    assert_eq!(message.queries.len(), 1);
    assert_eq!(message.queries[0].name(), &name("ok.test."));
    assert_eq!(message.queries[0].query_type(), RecordType::A);
    assert!(!message.metadata.authentic_data && !message.metadata.checking_disabled);
    let edns = message.edns.expect("our own");
    assert!(!edns.flags().dnssec_ok && edns.version() == 0);
    assert_eq!(edns.max_payload(), UDP_MAX);
    // Header, name and type, and an OPT record without options: nothing else has room.
    assert_eq!(asking.packet.len(), 12 + 9 + 4 + 11);
    let spellings: std::collections::HashSet<Vec<u8>> = (0..200)
        .map(|_| {
            Asking::new(9, &domain("a-long-enough.test"), DnsType::A)
                .expect("written")
                .packet
        })
        .collect();
    assert!(spellings.len() > 100, "the letters' case is random");
}

#[test]
fn aliases_are_followed_and_strangers_left_out() {
    let found = found(
        DnsType::A,
        vec![
            a("stranger.test.", 66, 5),
            cname("ok.test.", "edge.cdn.test."),
            cname("Edge.CDN.test.", "pop.cdn.test."),
            a("pop.cdn.test.", 10, 300),
            a("pop.cdn.test.", 10, 300),
            a("pop.cdn.test.", 11, 20),
            a("ok.test.", 77, 5),
            Record::from_rdata(
                name("pop.cdn.test."),
                1,
                RData::TXT(rdata::TXT::new(vec!["x".to_owned()])),
            ),
        ],
    )
    .expect("an answer");
    assert_eq!(found.aliases, [name("edge.cdn.test."), name("pop.cdn.test.")]);
    let addresses: Vec<String> = found.addresses().map(|address| address.to_string()).collect();
    assert_eq!(addresses, ["203.0.113.10", "203.0.113.11"]);
    assert_eq!(found.ttl, Duration::from_secs(20));
}

#[test]
fn aliases_without_end_are_no_answer() {
    let circle = vec![cname("ok.test.", "b.test."), cname("b.test.", "ok.test.")];
    assert_eq!(found(DnsType::A, circle), Err(Unusable::Endless));
    let later = vec![
        cname("ok.test.", "b.test."),
        cname("b.test.", "c.test."),
        cname("c.test.", "b.test."),
    ];
    assert_eq!(found(DnsType::A, later), Err(Unusable::Endless));
    let own = vec![cname("ok.test.", "OK.test."), a("ok.test.", 1, 1)];
    assert_eq!(found(DnsType::A, own), Err(Unusable::Endless));
    let chain = |links: usize| {
        let mut records = vec![cname("ok.test.", "n1.test.")];
        records.extend((1..links).map(|at| cname(&format!("n{at}.test."), &format!("n{}.test.", at + 1))));
        records.push(a(&format!("n{links}.test."), 1, 1));
        found(DnsType::A, records).map(|found| found.records.len())
    };
    assert_eq!(
        (chain(CHAIN_MAX), chain(CHAIN_MAX + 1)),
        (Ok(1), Err(Unusable::Endless))
    );
}

#[test]
fn nobody_keeps_an_answer_longer_than_a_minute() {
    for (ttl, kept) in [(0, 0), (4, 4), (60, 60), (86_400, 60), (u32::MAX, 0)] {
        let found = found(DnsType::A, vec![a("ok.test.", 1, ttl)]).expect("an answer");
        assert_eq!(found.ttl, Duration::from_secs(kept), "{ttl}");
    }
}

#[test]
fn only_the_answer_to_this_very_question_counts() {
    let asking = asking(DnsType::A);
    let good = || reply(&asking, ResponseCode::NoError, vec![a("ok.test.", 1, 1)]);
    assert!(read(&asking, &good()).is_ok());
    type Spoil = fn(&mut Message);
    let spoilt: [Spoil; 8] = [
        |message| message.metadata.id ^= 1,
        |message| message.metadata.message_type = MessageType::Query,
        |message| message.metadata.op_code = OpCode::Status,
        |message| message.queries.clear(),
        |message| {
            let again = message.queries[0].clone();
            message.add_query(again);
        },
        |message| {
            message.queries[0].set_name(name("evil.test."));
        },
        |message| {
            message.queries[0].set_query_type(RecordType::AAAA);
        },
        |message| {
            message.queries[0].set_query_class(DNSClass::CH);
        },
    ];
    for (index, spoil) in spoilt.iter().enumerate() {
        let mut message = good();
        spoil(&mut message);
        assert_eq!(read(&asking, &message), Err(Unusable::Foreign), "{index}");
    }
    let mut bytes = good().to_vec().expect("written");
    assert_eq!(asking.read(&bytes[..20], true), Err(Unusable::Foreign));
    bytes.push(0);
    assert_eq!(asking.read(&bytes, true), Err(Unusable::Foreign));
    assert_eq!(asking.read(&asking.packet, true), Err(Unusable::Foreign));
    let failed = reply(&asking, ResponseCode::ServFail, Vec::new());
    assert_eq!(
        read(&asking, &failed),
        Err(Unusable::Failed(ResponseCode::ServFail))
    );
}

#[test]
fn other_letters_are_noticed() {
    let asking = asking(DnsType::A);
    let mut other = reply(&asking, ResponseCode::NoError, vec![a("ok.test.", 1, 1)]);
    let flipped: Vec<Vec<u8>> = asking
        .name
        .iter()
        .map(|label| label.iter().map(|byte| byte ^ 0x20).collect())
        .collect();
    let flipped = Name::from_labels(flipped.iter().map(Vec::as_slice)).expect("a name");
    other.queries[0].set_name(flipped);
    let bytes = other.to_vec().expect("written");
    assert_eq!(asking.read(&bytes, true), Err(Unusable::Respelt));
    assert!(asking.read(&bytes, false).is_ok());
}

#[test]
fn each_type_brings_its_own_records() {
    let owner = name("ok.test.");
    let of = |data| Record::from_rdata(owner.clone(), 30, data);
    let all = || {
        vec![
            a("ok.test.", 1, 30),
            of(RData::AAAA(rdata::AAAA::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1))),
            of(RData::MX(rdata::MX::new(10, name("mail.test.")))),
            of(RData::TXT(rdata::TXT::new(vec!["text".to_owned()]))),
            of(RData::SRV(rdata::SRV::new(1, 2, 443, name("host.test.")))),
            of(RData::NS(rdata::NS(name("ns.test.")))),
            of(RData::PTR(rdata::PTR(name("host.test.")))),
        ]
    };
    for kind in [
        DnsType::A,
        DnsType::Aaaa,
        DnsType::Mx,
        DnsType::Txt,
        DnsType::Srv,
        DnsType::Ns,
        DnsType::Ptr,
    ] {
        let found = found(kind, all()).expect("an answer");
        assert_eq!(found.records.len(), 1, "{kind:?}");
        assert_eq!(found.records[0].record_type(), record_type(kind));
        assert!(found.weight() > WEIGHT);
    }
    let alias = found(DnsType::Cname, vec![cname("ok.test.", "other.test.")]).expect("an answer");
    assert_eq!((alias.records.len(), alias.aliases.len()), (1, 0));
}

#[test]
fn an_answer_has_an_end() {
    let many = (0..2000_u16).map(|index| {
        let [high, low] = index.to_be_bytes();
        let data = RData::A(rdata::A::new(198, 51, high, low));
        Record::from_rdata(name("ok.test."), 30, data)
    });
    assert_eq!(
        found(DnsType::A, many.collect())
            .expect("an answer")
            .records
            .len(),
        RECORDS_MAX
    );
}

proptest! {
    #[test]
    fn no_packet_can_panic_the_reader(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(asking(DnsType::A).read(&bytes, true).is_err());
    }

    #[test]
    fn a_damaged_answer_is_read_or_left(at in 0usize..400, to in any::<u8>(), spelt: bool) {
        let asking = asking(DnsType::A);
        let mut answers = vec![cname("ok.test.", "edge.cdn.test."), cname("edge.cdn.test.", "pop.cdn.test.")];
        answers.extend((0..20).map(|last| a("pop.cdn.test.", last, 30)));
        let mut bytes = reply(&asking, ResponseCode::NoError, answers).to_vec().expect("written");
        let at = at % bytes.len();
        bytes[at] = to;
        if let Ok(Reply::Found(found)) = asking.read(&bytes, spelt) {
            prop_assert!(found.records.len() <= 20 && found.aliases.len() <= 2 && found.ttl <= TTL_MAX);
        }
    }
}
