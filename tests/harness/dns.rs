//! The test internet's name servers. Every query they see is recorded: a query is a way out for data, so
//! one that should not have been asked is a leak. What they answer, and how badly they behave, is scripted by name.

mod serve;

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use hickory_proto::{
    op::{Message, ResponseCode},
    rr::{
        Name, RData, Record, RecordType,
        rdata::{A, AAAA, CNAME, SOA},
    },
};

/// Lifetime of an answer in seconds, where a name's manner does not say otherwise. Short, so that a test can change
/// what a name means.
const TTL: u32 = 1;
/// How long it may be remembered that there is nothing, in seconds.
const NEGATIVE_TTL: u32 = 1;
/// Aliases that are followed: enough for every chain a test writes, little enough for a loop.
const LINKS: usize = 24;

/// What a name stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// These addresses, of either family.
    Addresses(Vec<IpAddr>),
    /// One of these at a time, the next one after each period.
    Rotating(Vec<IpAddr>, Duration),
    /// Another name, whose records are added as far as they are known.
    Alias(String),
    /// Records of any type.
    Records(Vec<RData>),
}

/// How a name is answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manner {
    /// The lifetime of its records, in seconds.
    pub ttl: u32,
    /// Time before the answer leaves.
    pub delay: Duration,
    /// So many of the next queries are not answered at all.
    pub lost: usize,
    /// Nothing but this code.
    pub code: Option<ResponseCode>,
    /// What is sent before the answer, with the attacker's address in it.
    pub forged: Vec<Forgery>,
    /// The letters of the name come back in lower case, as some servers do it.
    pub lower: bool,
}

impl Default for Manner {
    fn default() -> Self {
        Self {
            ttl: TTL,
            delay: Duration::ZERO,
            lost: 0,
            code: None,
            forged: Vec::new(),
            lower: false,
        }
    }
}

/// An answer that is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Forgery {
    /// Another id.
    Id,
    /// Another name in the question.
    Question,
    /// The name in other letters.
    Letters,
    /// Right in all, but from another port of the server.
    Port,
    /// Right in all, but from another address.
    Address,
    /// No DNS at all.
    Junk,
}

/// How a whole server behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mood {
    /// It answers.
    Well,
    /// It takes every query and says nothing.
    Silent,
    /// It answers everything with this code.
    Failing(ResponseCode),
}

/// A query that reached the internet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Query {
    /// The name server that was asked.
    pub server: SocketAddr,
    /// Who asked it.
    pub from: SocketAddr,
    /// The name, lower case, without the final dot.
    pub name: String,
    /// The name as it was spelt.
    pub spelt: String,
    /// The record type.
    pub kind: RecordType,
    /// By TCP.
    pub tcp: bool,
    /// The query carried EDNS.
    pub edns: bool,
    /// The whole query.
    pub packet: Vec<u8>,
}

/// The zones and what was asked of them. All name servers of a world share one.
#[derive(Clone)]
pub struct Dns {
    shared: Arc<Mutex<Shared>>,
}

struct Shared {
    began: Instant,
    zones: HashMap<String, Answer>,
    manners: HashMap<String, Manner>,
    moods: HashMap<IpAddr, Mood>,
    queries: Vec<Query>,
}

impl Default for Dns {
    fn default() -> Self {
        Self {
            shared: Arc::new(Mutex::new(Shared {
                began: Instant::now(),
                zones: HashMap::new(),
                manners: HashMap::new(),
                moods: HashMap::new(),
                queries: Vec::new(),
            })),
        }
    }
}

/// What a server does with one query.
struct Reaction {
    answer: Message,
    manner: Manner,
}

impl Dns {
    /// From now on `name` (or every name below `x`, for `*.x`) means `answer`.
    pub fn set(&self, name: &str, answer: Answer) {
        self.lock().zones.insert(name.to_owned(), answer);
    }

    /// From now on `name` (or every name below `x`, for `*.x`) is answered so.
    pub fn behave(&self, name: &str, manner: Manner) {
        self.lock().manners.insert(name.to_owned(), manner);
    }

    /// From now on the server at `address` behaves so.
    pub fn feel(&self, address: impl Into<IpAddr>, mood: Mood) {
        self.lock().moods.insert(address.into(), mood);
    }

    /// The addresses that a name always stands for.
    pub fn addresses(&self, name: &str) -> Vec<IpAddr> {
        match self.lock().find(name) {
            Some(Answer::Addresses(addresses)) => addresses.clone(),
            Some(Answer::Alias(_) | Answer::Rotating(..) | Answer::Records(_)) | None => Vec::new(),
        }
    }

    /// Everything that was asked so far.
    pub fn queries(&self) -> Vec<Query> {
        self.lock().queries.clone()
    }

    /// What was asked under `name` or below it.
    pub fn queries_for(&self, name: &str) -> Vec<Query> {
        let below = format!(".{name}");
        let mut queries = self.queries();
        queries.retain(|query| query.name == name || query.name.ends_with(&below));
        queries
    }

    /// What the server does with a query; nothing: it says nothing.
    fn react(&self, bytes: &[u8], server: SocketAddr, from: SocketAddr, tcp: bool) -> Option<Reaction> {
        let request = Message::from_vec(bytes).ok()?;
        let query = request.queries.first()?.clone();
        let name = query.name().to_lowercase().to_ascii();
        let name = name.trim_end_matches('.').to_owned();
        let mut shared = self.lock();
        shared.queries.push(Query {
            server,
            from,
            name: name.clone(),
            spelt: query.name().to_ascii(),
            kind: query.query_type(),
            tcp,
            edns: request.edns.is_some(),
            packet: bytes.to_vec(),
        });
        let mood = shared.moods.get(&server.ip()).copied().unwrap_or(Mood::Well);
        let mut response = Message::response(request.metadata.id, request.metadata.op_code);
        response.metadata.recursion_desired = request.metadata.recursion_desired;
        response.metadata.recursion_available = true;
        response.add_query(query);
        let failing = match mood {
            Mood::Well => None,
            Mood::Silent => return None,
            Mood::Failing(code) => Some(code),
        };
        let manner = match find_mut(&mut shared.manners, &name) {
            Some(manner) if manner.lost > 0 => {
                manner.lost -= 1;
                return None;
            }
            Some(manner) => manner.clone(),
            None => Manner::default(),
        };
        match failing.or(manner.code) {
            Some(code) => response.metadata.response_code = code,
            None => shared.fill(&mut response, name, manner.ttl),
        }
        if manner.lower {
            let lower = response.queries[0].name().to_lowercase();
            response.queries[0].set_name(lower);
        }
        Some(Reaction {
            answer: response,
            manner,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared {
    /// Adds what `name` stands for.
    fn fill(&self, response: &mut Message, name: String, ttl: u32) {
        let query = response.queries[0].clone();
        let kind = query.query_type();
        if self.find(&name).is_none() {
            response.metadata.response_code = ResponseCode::NXDomain;
        }
        let mut owner = query.name().clone();
        let mut wanted = name;
        for _ in 0..LINKS {
            match self.find(&wanted) {
                Some(Answer::Alias(target)) => {
                    let name: Name = Name::from_ascii(format!("{target}.")).expect("zones hold valid names");
                    let data = RData::CNAME(CNAME(name.clone()));
                    response.add_answer(Record::from_rdata(owner, ttl, data));
                    owner = name;
                    wanted.clone_from(target);
                }
                Some(answer) => {
                    let fitting = self
                        .records(answer)
                        .into_iter()
                        .filter(|data| data.record_type() == kind);
                    response.add_answers(fitting.map(|data| Record::from_rdata(owner.clone(), ttl, data)));
                    break;
                }
                None => break,
            }
        }
        if response.answers.is_empty() {
            let zone = SOA::new(Name::root(), Name::root(), 1, 3600, 600, 86_400, NEGATIVE_TTL);
            response.add_authority(Record::from_rdata(owner, 3600, RData::SOA(zone)));
        }
    }

    fn records(&self, answer: &Answer) -> Vec<RData> {
        let data = |address: IpAddr| match address {
            IpAddr::V4(address) => RData::A(A(address)),
            IpAddr::V6(address) => RData::AAAA(AAAA(address)),
        };
        match answer {
            Answer::Addresses(addresses) => addresses.iter().copied().map(data).collect(),
            Answer::Rotating(addresses, period) => {
                let turn = self.began.elapsed().as_millis() / period.as_millis();
                let turn = usize::try_from(turn).unwrap_or(0) % addresses.len();
                vec![data(addresses[turn])]
            }
            Answer::Records(records) => records.clone(),
            Answer::Alias(_) => Vec::new(),
        }
    }

    fn find(&self, name: &str) -> Option<&Answer> {
        key_of(&self.zones, name).and_then(|key| self.zones.get(&key))
    }
}

fn find_mut<'a, T>(map: &'a mut HashMap<String, T>, name: &str) -> Option<&'a mut T> {
    let key = key_of(map, name)?;
    map.get_mut(&key)
}

/// The entry for a name: its own, or that of the nearest wildcard above.
fn key_of<T>(map: &HashMap<String, T>, name: &str) -> Option<String> {
    if map.contains_key(name) {
        return Some(name.to_owned());
    }
    name.match_indices('.').find_map(|(dot, _)| {
        let key = format!("*{}", &name[dot..]);
        map.contains_key(&key).then_some(key)
    })
}
