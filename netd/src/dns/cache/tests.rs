use std::net::IpAddr;

use hickory_proto::{
    op::{Message, MessageType, ResponseCode},
    rr::{Name, RData, Record, rdata},
};
use tokio::net::UdpSocket;
use tokio_util::sync::CancellationToken;

use super::*;

struct Upstream {
    socket: UdpSocket,
    cache: Arc<Cache>,
}

impl Upstream {
    async fn new() -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").await.expect("bound");
        let tasks = Tasks::new(CancellationToken::new());
        let servers = Servers::new(vec![socket.local_addr().expect("bound")], tasks.clone());
        Self {
            socket,
            cache: Arc::new(Cache::new(servers, Metrics::default(), tasks)),
        }
    }

    /// Waits for one question and answers it.
    async fn answer(&self, code: ResponseCode, ttl: u32) {
        let mut buffer = [0; 512];
        let (length, from) = self.socket.recv_from(&mut buffer).await.expect("asked");
        let mut message = Message::from_vec(&buffer[..length]).expect("a query");
        message.metadata.message_type = MessageType::Response;
        message.metadata.response_code = code;
        let name = message.queries[0].name().clone();
        if code == ResponseCode::NoError {
            let data = RData::A(rdata::A::new(203, 0, 113, 1));
            message.add_answer(Record::from_rdata(name, ttl, data));
        } else {
            let start = rdata::SOA::new(Name::root(), Name::root(), 1, 2, 3, 4, ttl);
            message.add_authority(Record::from_rdata(name, 3600, RData::SOA(start)));
        }
        let bytes = message.to_vec().expect("written");
        self.socket.send_to(&bytes, from).await.expect("sent");
    }

    fn was_asked(&self) -> bool {
        self.socket.try_recv_from(&mut [0; 512]).is_ok()
    }
}

fn key(text: &str) -> Key {
    (DomainName::parse(text).expect("a name"), DnsType::A)
}

fn organisation(number: u8) -> OrgId {
    format!("org-{number}").parse().expect("an id")
}

fn known(cache: &Cache, id: &OrgId, key: &Key, now: Instant) -> Option<Duration> {
    match cache.look(id, key, now) {
        Known::Answer(_, left) => Some(left),
        Known::Soon(_) | Known::Nothing => None,
    }
}

#[tokio::test]
async fn an_answer_is_kept_as_long_as_it_lives_for_the_organisation_that_asked() {
    let upstream = Upstream::new().await;
    let (own, other, key) = (organisation(1), organisation(2), key("ok.test"));
    let soon = upstream.cache.ask(&own, key.clone()).expect("asked");
    let (found, ()) = tokio::join!(soon.found(), upstream.answer(ResponseCode::NoError, 20));
    assert_eq!(
        found.expect("found").addresses().next(),
        Some(IpAddr::from([203, 0, 113, 1]))
    );
    let now = Instant::now();
    let left = known(&upstream.cache, &own, &key, now).expect("kept");
    assert!(
        left <= Duration::from_secs(20) && left > Duration::from_secs(10),
        "{left:?}"
    );
    assert_eq!(
        known(&upstream.cache, &other, &key, now),
        None,
        "another organisation's"
    );
    assert_eq!(
        known(&upstream.cache, &own, &key, now + Duration::from_secs(20)),
        None
    );
    // The other one's question goes out, although the answer is known here.
    let soon = upstream.cache.ask(&other, key).expect("asked");
    let (found, ()) = tokio::join!(soon.found(), upstream.answer(ResponseCode::NoError, 20));
    assert!(found.is_some());
}

#[tokio::test]
async fn one_question_is_asked_once_at_a_time_but_for_each_organisation() {
    let upstream = Upstream::new().await;
    let (own, other, key) = (organisation(1), organisation(2), key("ok.test"));
    let all: Vec<Turn> = (0..20)
        .map(|index| {
            let id = if index == 0 { &other } else { &own };
            upstream.cache.ask(id, key.clone()).expect("asked")
        })
        .collect();
    assert!(matches!(
        upstream.cache.look(&own, &key, Instant::now()),
        Known::Soon(_)
    ));
    let all = futures_util::future::join_all(all.into_iter().map(Turn::found));
    let serving = async {
        upstream.answer(ResponseCode::NoError, 20).await;
        upstream.answer(ResponseCode::NoError, 20).await;
    };
    let (all, ()) = tokio::join!(all, serving);
    assert!(all.iter().all(Option::is_some));
    assert!(!upstream.was_asked(), "two organisations, two questions");
    assert_eq!(upstream.cache.lock().asking, 0);
}

#[tokio::test]
async fn what_does_not_exist_is_remembered_as_long_as_its_zone_says() {
    let upstream = Upstream::new().await;
    let own = organisation(1);
    for (name, minimum, kept) in [
        ("short.test", 7, 7),
        ("long.test", 86_400, 30),
        ("never.test", 0, 0),
    ] {
        let key = key(name);
        let soon = upstream.cache.ask(&own, key.clone()).expect("asked");
        let (found, ()) = tokio::join!(soon.found(), upstream.answer(ResponseCode::NXDomain, minimum));
        let found = found.expect("an answer");
        assert!(!found.exists);
        assert_eq!(found.ttl, Duration::from_secs(kept), "{name}");
        assert_eq!(
            known(&upstream.cache, &own, &key, Instant::now()).is_some(),
            kept > 0,
            "{name}"
        );
    }
}

#[tokio::test]
async fn a_failure_is_told_and_not_kept() {
    let upstream = Upstream::new().await;
    let (own, key) = (organisation(1), key("ok.test"));
    let soon = upstream.cache.ask(&own, key.clone()).expect("asked");
    let (found, ()) = tokio::join!(soon.found(), upstream.answer(ResponseCode::ServFail, 20));
    assert!(found.is_none());
    assert!(matches!(
        upstream.cache.look(&own, &key, Instant::now()),
        Known::Nothing
    ));
}

#[tokio::test]
async fn one_organisations_open_questions_leave_room_for_another() {
    let upstream = Upstream::new().await;
    let (greedy, other) = (organisation(1), organisation(2));
    let open: Vec<_> = (0..=ASKING_MAX)
        .map(|index| upstream.cache.ask(&greedy, key(&format!("n{index}.test"))))
        .collect();
    assert!(open[..ASKING_MAX].iter().all(Option::is_some) && open[ASKING_MAX].is_none());
    assert!(upstream.cache.ask(&other, key("ok.test")).is_some());
}

#[test]
fn memory_is_bounded_for_each_and_for_all() {
    let mut state = State::default();
    let many = (0..=255).map(|last| IpAddr::from([203, 0, 113, last]));
    let found = Arc::new(Found::addresses_of(many, Duration::from_secs(60)));
    let until = Instant::now() + found.ttl;
    let weight = |state: &State| state.organisations.values().map(|one| one.weight).sum::<usize>();
    for id in 0..20 {
        let id = organisation(id);
        for index in 0..400 {
            state.keep(&id, &key(&format!("n{index}.test")), Arc::clone(&found), until);
        }
        assert!(state.organisations[&id].weight <= ORGANISATION_WEIGHT_MAX);
        assert!(
            state.organisations[&id].kept.peek(&key("n399.test")).is_some(),
            "the newest is kept"
        );
    }
    assert!(state.weight <= WEIGHT_MAX);
    assert_eq!(state.weight, weight(&state));
}

#[tokio::test]
async fn what_is_too_old_is_forgotten() {
    let upstream = Upstream::new().await;
    let own = organisation(1);
    let soon = upstream.cache.ask(&own, key("ok.test")).expect("asked");
    let (found, ()) = tokio::join!(soon.found(), upstream.answer(ResponseCode::NoError, 20));
    assert!(found.is_some());
    upstream.cache.sweep(Instant::now());
    assert_eq!(upstream.cache.lock().organisations.len(), 1);
    upstream.cache.sweep(Instant::now() + Duration::from_secs(21));
    let state = upstream.cache.lock();
    assert_eq!((state.organisations.len(), state.weight), (0, 0));
}
