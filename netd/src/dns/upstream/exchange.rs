//! One question to one upstream resolver: over UDP from a port of its own, and over TCP where the answer is too long or
//! somebody may be guessing (RFC 5452).

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use sandgate_policy::{DnsType, DomainName};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpStream, UdpSocket},
};

use super::AttemptError;
use crate::dns::found::{Asking, Found, Reply, Unusable};

/// Answers over UDP are at most as long as the query allowed, plus what a careless server adds.
const UDP_BUFFER: usize = 4096;
/// Packets that are no answer, after which TCP decides.
const FOREIGN_MAX: usize = 16;

/// Asks `server`; waits without end.
pub(super) async fn ask(server: SocketAddr, name: &DomainName, kind: DnsType) -> Result<Found, AttemptError> {
    let query = Asking::new(random_id()?, name, kind).ok_or(AttemptError::Unwritable)?;
    match over_udp(server, &query).await {
        Ok(Reply::Found(found)) => Ok(found),
        Ok(Reply::Truncated) | Err(AttemptError::Unusable(Unusable::Foreign | Unusable::Respelt)) => {
            over_tcp(server, &query).await
        }
        Err(error) => Err(error),
    }
}

async fn over_udp(server: SocketAddr, query: &Asking) -> Result<Reply, AttemptError> {
    let any: IpAddr = match server {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    // A fresh socket per query: a random port, and connected, so that only this server is heard.
    let socket = UdpSocket::bind((any, 0)).await.map_err(AttemptError::Network)?;
    socket.connect(server).await.map_err(AttemptError::Network)?;
    socket.send(&query.packet).await.map_err(AttemptError::Network)?;
    let mut buffer = vec![0; UDP_BUFFER];
    for _ in 0..FOREIGN_MAX {
        let length = socket.recv(&mut buffer).await.map_err(AttemptError::Network)?;
        match query.read(&buffer[..length], true) {
            // Possibly somebody guessing: the real answer may still come.
            Err(Unusable::Foreign) => {}
            read => return Ok(read?),
        }
    }
    Err(Unusable::Foreign.into())
}

async fn over_tcp(server: SocketAddr, query: &Asking) -> Result<Found, AttemptError> {
    let exchange = async {
        let mut stream = TcpStream::connect(server).await?;
        let length = u16::try_from(query.packet.len()).map_err(io::Error::other)?;
        stream
            .write_all(&[&length.to_be_bytes(), query.packet.as_slice()].concat())
            .await?;
        let length = stream.read_u16().await?;
        let mut answer = vec![0; usize::from(length)];
        stream.read_exact(&mut answer).await?;
        Ok(answer)
    };
    let answer = exchange.await.map_err(AttemptError::Network)?;
    match query.read(&answer, false)? {
        Reply::Found(found) => Ok(found),
        Reply::Truncated => Err(Unusable::Foreign.into()),
    }
}

fn random_id() -> Result<u16, AttemptError> {
    let mut id = [0; 2];
    getrandom::fill(&mut id).map_err(|_no_entropy| AttemptError::Unwritable)?;
    Ok(u16::from_be_bytes(id))
}
