//! Asks the node's upstream resolvers, from the node's own namespace. Owns: which server is asked when, over
//! what, and for how long. Asks only what it is given: the decision whether to ask is made before.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use hickory_proto::rr::Name;
use sandgate_policy::DomainName;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
    time::Instant,
};

use super::message::{self, Unusable, Upstream};

/// Time for one name, over all servers and attempts. Below the timeout of the resolver library inside.
const TOTAL: Duration = Duration::from_millis(4500);
/// Time for one server before the next is asked.
const ATTEMPT: Duration = Duration::from_millis(1200);
const ROUNDS: usize = 2;
/// Answers over UDP are at most as long as the query allowed, plus what a careless server adds.
const UDP_BUFFER: usize = 4096;

/// The upstream resolvers, in the order in which they are asked.
#[derive(Debug, Clone)]
pub struct Servers {
    servers: Vec<SocketAddr>,
}

/// No upstream helped.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// All of them failed or were silent; this is the last failure.
    #[error("no DNS upstream answered: {0}")]
    Unanswered(#[source] AttemptError),
    /// There are none.
    #[error("there is no DNS upstream")]
    NoServer,
    /// The name or an id could not be made into a query.
    #[error("the query could not be made")]
    Unwritable,
}

/// One server did not help.
#[derive(Debug, thiserror::Error)]
pub enum AttemptError {
    /// The network.
    #[error("{0}")]
    Network(#[source] io::Error),
    /// Silence.
    #[error("no answer in time")]
    TimedOut,
    /// It answered with a failure, or over TCP with something else.
    #[error(transparent)]
    Unusable(Unusable),
}

impl Servers {
    /// Asks these servers.
    pub fn new(servers: Vec<SocketAddr>) -> Self {
        Self { servers }
    }

    /// The addresses of `name` as the first server that can answer has them.
    ///
    /// # Errors
    /// When none answers in time.
    pub async fn resolve(&self, name: &DomainName) -> Result<Upstream, UpstreamError> {
        let deadline = Instant::now() + TOTAL;
        let mut failed = None;
        for server in self.servers.iter().cycle().take(self.servers.len() * ROUNDS) {
            let until = deadline.min(Instant::now() + ATTEMPT);
            let id = random_id()?;
            let (packet, asked) = message::upstream_query(id, name).ok_or(UpstreamError::Unwritable)?;
            let query = Query {
                server: *server,
                id,
                packet: &packet,
                name: &asked,
            };
            match tokio::time::timeout_at(until, query.ask()).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(error)) => failed = Some(error),
                Err(_elapsed) => failed = Some(AttemptError::TimedOut),
            }
            tracing::debug!(%server, error = failed.as_ref().map(tracing::field::display), "DNS upstream failed");
            if Instant::now() >= deadline {
                break;
            }
        }
        Err(failed.map_or(UpstreamError::NoServer, UpstreamError::Unanswered))
    }
}

struct Query<'a> {
    server: SocketAddr,
    id: u16,
    packet: &'a [u8],
    name: &'a Name,
}

impl Query<'_> {
    async fn ask(&self) -> Result<Upstream, AttemptError> {
        match self.over_udp().await? {
            Upstream::Truncated => self.over_tcp().await,
            answer @ (Upstream::Exists(_) | Upstream::NoSuchName(_)) => Ok(answer),
        }
    }

    async fn over_udp(&self) -> Result<Upstream, AttemptError> {
        let any: IpAddr = match self.server {
            SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        // A fresh socket per query: a random port, and connected, so that only this server is heard.
        let socket = UdpSocket::bind((any, 0)).await.map_err(AttemptError::Network)?;
        socket.connect(self.server).await.map_err(AttemptError::Network)?;
        socket.send(self.packet).await.map_err(AttemptError::Network)?;
        let mut buffer = vec![0; UDP_BUFFER];
        loop {
            let length = socket.recv(&mut buffer).await.map_err(AttemptError::Network)?;
            match message::read_upstream(&buffer[..length], self.id, self.name) {
                Ok(answer) => return Ok(answer),
                // Possibly somebody guessing: the real answer may still come.
                Err(Unusable::Foreign) => {}
                Err(failed @ Unusable::Failed(_)) => return Err(AttemptError::Unusable(failed)),
            }
        }
    }

    async fn over_tcp(&self) -> Result<Upstream, AttemptError> {
        let exchange = async {
            let mut stream = TcpStream::connect(self.server).await?;
            let length = u16::try_from(self.packet.len()).map_err(io::Error::other)?;
            stream
                .write_all(&[&length.to_be_bytes(), self.packet].concat())
                .await?;
            let length = stream.read_u16().await?;
            let mut answer = vec![0; usize::from(length)];
            stream.read_exact(&mut answer).await?;
            Ok(answer)
        };
        let answer = exchange.await.map_err(AttemptError::Network)?;
        match message::read_upstream(&answer, self.id, self.name).map_err(AttemptError::Unusable)? {
            Upstream::Truncated => Err(AttemptError::Unusable(Unusable::Foreign)),
            answer @ (Upstream::Exists(_) | Upstream::NoSuchName(_)) => Ok(answer),
        }
    }
}

fn random_id() -> Result<u16, UpstreamError> {
    let mut id = [0; 2];
    getrandom::fill(&mut id).map_err(|_no_entropy| UpstreamError::Unwritable)?;
    Ok(u16::from_be_bytes(id))
}

#[cfg(test)]
mod tests {
    use hickory_proto::{
        op::{Message, MessageType},
        rr::{RData, Record, rdata},
    };
    use tokio::net::TcpListener;

    use super::*;

    fn answer(packet: &[u8], addresses: u8) -> Message {
        let mut message = Message::from_vec(packet).expect("a query");
        message.metadata.message_type = MessageType::Response;
        let name = message.queries[0].name().clone();
        for last in 0..addresses {
            let data = RData::A(rdata::A(Ipv4Addr::new(203, 0, 113, last)));
            message.add_answer(Record::from_rdata(name.clone(), 30, data));
        }
        message
    }

    async fn found(servers: Vec<SocketAddr>) -> usize {
        match Servers::new(servers)
            .resolve(&DomainName::parse("ok.test").expect("a name"))
            .await
        {
            Ok(Upstream::Exists(resolved)) => resolved.addresses.len(),
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn a_silent_server_is_passed_over_and_a_forged_answer_ignored() {
        let silent = UdpSocket::bind("127.0.0.1:0").await.expect("bound");
        let server = UdpSocket::bind("127.0.0.1:0").await.expect("bound");
        let servers = vec![
            silent.local_addr().expect("bound"),
            server.local_addr().expect("bound"),
        ];
        let serving = async {
            let mut buffer = [0; 512];
            let (length, from) = server.recv_from(&mut buffer).await.expect("asked");
            let mut forged = answer(&buffer[..length], 9);
            forged.metadata.id ^= 1;
            server
                .send_to(&forged.to_vec().expect("written"), from)
                .await
                .expect("sent");
            let real = answer(&buffer[..length], 1).to_vec().expect("written");
            server.send_to(&real, from).await.expect("sent");
        };
        assert_eq!(tokio::join!(found(servers), serving).0, 1);
    }

    #[tokio::test]
    async fn a_truncated_answer_is_asked_for_again_over_tcp() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let address = listener.local_addr().expect("bound");
        let server = UdpSocket::bind(address).await.expect("bound");
        let serving = async {
            let mut buffer = [0; 512];
            let (length, from) = server.recv_from(&mut buffer).await.expect("asked");
            let mut short = answer(&buffer[..length], 0);
            short.metadata.truncation = true;
            server
                .send_to(&short.to_vec().expect("written"), from)
                .await
                .expect("sent");
            let (mut stream, _) = listener.accept().await.expect("accepted");
            let mut query = vec![0; usize::from(stream.read_u16().await.expect("length"))];
            stream.read_exact(&mut query).await.expect("query");
            let whole = answer(&query, 60).to_vec().expect("written");
            stream
                .write_u16(u16::try_from(whole.len()).expect("short"))
                .await
                .expect("sent");
            stream.write_all(&whole).await.expect("sent");
        };
        assert_eq!(tokio::join!(found(vec![address]), serving).0, 60);
    }
}
