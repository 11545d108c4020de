//! The test internet's name servers. Every query they see is recorded: a query is a way out for data, so
//! one that should not have been asked is a leak.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use anyhow::{Context as _, Result};
use hickory_proto::{
    op::{Message, ResponseCode},
    rr::{
        Name, RData, Record, RecordType,
        rdata::{A, AAAA, CNAME, TXT},
    },
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, UdpSocket},
};

use crate::{namespace::Namespace, world::runtime};

/// Largest answer by UDP; longer ones are cut and asked again by TCP.
const UDP_LIMIT: usize = 512;
/// Lifetime of every answer, in seconds. Short, so that a test can change what a name means.
const TTL: u32 = 1;

/// What a name stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// These addresses, of either family.
    Addresses(Vec<IpAddr>),
    /// Another name, whose records are added as far as they are known.
    Alias(String),
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
    /// The record type.
    pub kind: RecordType,
    /// By TCP.
    pub tcp: bool,
    /// The query carried EDNS.
    pub edns: bool,
}

/// The zones and what was asked of them. All name servers of a world share one.
#[derive(Clone, Default)]
pub struct Dns {
    shared: Arc<Mutex<Shared>>,
}

#[derive(Default)]
struct Shared {
    zones: HashMap<String, Answer>,
    queries: Vec<Query>,
}

impl Dns {
    /// From now on `name` (or every name below `x`, for `*.x`) means `answer`.
    pub fn set(&self, name: &str, answer: Answer) {
        self.lock().zones.insert(name.to_owned(), answer);
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

    /// Answers on an address of the namespace, by UDP and TCP.
    pub(crate) fn serve(&self, internet: &Namespace, address: SocketAddr) -> Result<()> {
        let sockets = internet.run(move || {
            anyhow::Ok((
                std::net::UdpSocket::bind(address)?,
                std::net::TcpListener::bind(address)?,
            ))
        });
        let (udp, tcp) = sockets.with_context(|| format!("dns server on {address}"))?;
        udp.set_nonblocking(true)?;
        tcp.set_nonblocking(true)?;
        let _context = runtime().enter();
        let (udp, tcp) = (UdpSocket::from_std(udp)?, TcpListener::from_std(tcp)?);
        runtime().spawn(self.clone().serve_udp(udp, address));
        runtime().spawn(self.clone().serve_tcp(tcp, address));
        Ok(())
    }

    async fn serve_udp(self, socket: UdpSocket, server: SocketAddr) {
        let mut buffer = vec![0; 4096];
        while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
            let Some(answer) = self.answer(&buffer[..length], server, from, false) else {
                continue;
            };
            let bytes = answer.to_vec().expect("our own message encodes");
            let bytes = if bytes.len() <= UDP_LIMIT {
                bytes
            } else {
                answer.truncate().to_vec().expect("our own message encodes")
            };
            socket.send_to(&bytes, from).await.ok();
        }
    }

    async fn serve_tcp(self, listener: TcpListener, server: SocketAddr) {
        while let Ok((stream, from)) = listener.accept().await {
            runtime().spawn(self.clone().converse(stream, server, from));
        }
    }

    async fn converse(self, mut stream: TcpStream, server: SocketAddr, from: SocketAddr) {
        while let Ok(length) = stream.read_u16().await {
            let mut query = vec![0; usize::from(length)];
            if stream.read_exact(&mut query).await.is_err() {
                return;
            }
            let Some(answer) = self.answer(&query, server, from, true) else {
                return;
            };
            let bytes = answer.to_vec().expect("our own message encodes");
            let length = u16::try_from(bytes.len()).expect("zones are small");
            if stream.write_u16(length).await.is_err() || stream.write_all(&bytes).await.is_err() {
                return;
            }
        }
    }

    fn answer(&self, bytes: &[u8], server: SocketAddr, from: SocketAddr, tcp: bool) -> Option<Message> {
        let request = Message::from_vec(bytes).ok()?;
        let query = request.queries.first()?.clone();
        let name = query.name().to_lowercase().to_ascii();
        let name = name.trim_end_matches('.').to_owned();
        let kind = query.query_type();
        let mut shared = self.lock();
        shared.queries.push(Query {
            server,
            from,
            name: name.clone(),
            kind,
            tcp,
            edns: request.edns.is_some(),
        });

        let mut response = Message::response(request.metadata.id, request.metadata.op_code);
        response.metadata.recursion_desired = request.metadata.recursion_desired;
        response.metadata.recursion_available = true;
        response.add_query(query.clone());
        if shared.find(&name).is_none() {
            response.metadata.response_code = ResponseCode::NXDomain;
            return Some(response);
        }
        let mut owner = query.name().clone();
        let mut wanted = name;
        // Long enough for every chain a test writes, short enough for a loop.
        for _ in 0..12 {
            match shared.find(&wanted) {
                Some(Answer::Addresses(addresses)) => {
                    response.add_answers(addresses.iter().filter_map(|&address| {
                        let data = match (address, kind) {
                            (IpAddr::V4(address), RecordType::A) => RData::A(A(address)),
                            (IpAddr::V6(address), RecordType::AAAA) => RData::AAAA(AAAA(address)),
                            (IpAddr::V4(Ipv4Addr { .. }), RecordType::TXT) => {
                                RData::TXT(TXT::new(vec!["text of the test world".to_owned()]))
                            }
                            _ => return None,
                        };
                        Some(Record::from_rdata(owner.clone(), TTL, data))
                    }));
                    break;
                }
                Some(Answer::Alias(target)) => {
                    let name: Name = Name::from_ascii(format!("{target}.")).expect("zones hold valid names");
                    response.add_answer(Record::from_rdata(owner, TTL, RData::CNAME(CNAME(name.clone()))));
                    owner = name;
                    wanted.clone_from(target);
                }
                None => break,
            }
        }
        Some(response)
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared {
    fn find(&self, name: &str) -> Option<&Answer> {
        let below = || {
            name.match_indices('.')
                .find_map(|(dot, _)| self.zones.get(&format!("*{}", &name[dot..])))
        };
        self.zones.get(name).or_else(below)
    }
}
