//! The name servers' sockets: UDP and TCP on an address of the internet, and the two from which forgeries come.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
};

use anyhow::{Context as _, Result};
use hickory_proto::{
    op::Message,
    rr::{Name, RData, Record, rdata::A},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, UdpSocket},
};

use super::{Dns, Forgery, Reaction};
use crate::{namespace::Namespace, world::runtime};

/// Largest answer by UDP; longer ones are cut and asked again by TCP.
const UDP_LIMIT: usize = 512;
/// Where a forgery would lead: the attacker's address.
const TRAP: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 66);
/// From where forgeries of [`Forgery::Address`] come.
const STRANGER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 254);
/// Added to a server's port: from there those of [`Forgery::Port`] come.
const OTHER_PORT: u16 = 1000;

/// A server's sockets.
struct Sockets {
    own: UdpSocket,
    other_port: UdpSocket,
    /// Not on every server: only one can have the address.
    stranger: Option<UdpSocket>,
}

impl Dns {
    /// Answers on an address of the namespace, by UDP and TCP.
    pub(crate) fn serve(&self, internet: &Namespace, address: SocketAddr) -> Result<()> {
        let sockets = internet.run(move || {
            let udp = |address: SocketAddr| {
                let socket = std::net::UdpSocket::bind(address)?;
                socket.set_nonblocking(true)?;
                anyhow::Ok(socket)
            };
            let tcp = std::net::TcpListener::bind(address)?;
            tcp.set_nonblocking(true)?;
            let other = SocketAddr::new(address.ip(), address.port() + OTHER_PORT);
            anyhow::Ok((
                udp(address)?,
                udp(other)?,
                udp((STRANGER, address.port()).into()).ok(),
                tcp,
            ))
        });
        let (own, other_port, stranger, tcp) = sockets.with_context(|| format!("dns server on {address}"))?;
        let _context = runtime().enter();
        let sockets = Sockets {
            own: UdpSocket::from_std(own)?,
            other_port: UdpSocket::from_std(other_port)?,
            stranger: stranger.map(UdpSocket::from_std).transpose()?,
        };
        runtime().spawn(self.clone().serve_udp(Arc::new(sockets), address));
        runtime().spawn(self.clone().serve_tcp(TcpListener::from_std(tcp)?, address));
        Ok(())
    }

    async fn serve_udp(self, sockets: Arc<Sockets>, server: SocketAddr) {
        let mut buffer = vec![0; 4096];
        while let Ok((length, from)) = sockets.own.recv_from(&mut buffer).await {
            let Some(reaction) = self.react(&buffer[..length], server, from, false) else {
                continue;
            };
            if reaction.manner.delay.is_zero() {
                sockets.send(&reaction, from).await;
            } else {
                let sockets = Arc::clone(&sockets);
                runtime().spawn(async move {
                    tokio::time::sleep(reaction.manner.delay).await;
                    sockets.send(&reaction, from).await;
                });
            }
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
            let Some(Reaction { answer, manner }) = self.react(&query, server, from, true) else {
                return;
            };
            tokio::time::sleep(manner.delay).await;
            let bytes = encode(&answer);
            let length = u16::try_from(bytes.len()).expect("zones are small");
            if stream.write_u16(length).await.is_err() || stream.write_all(&bytes).await.is_err() {
                return;
            }
        }
    }
}

impl Sockets {
    async fn send(&self, reaction: &Reaction, to: SocketAddr) {
        for forgery in &reaction.manner.forged {
            let (socket, bytes) = match forgery {
                Forgery::Port => (Some(&self.other_port), forge(*forgery, &reaction.answer)),
                Forgery::Address => (self.stranger.as_ref(), forge(*forgery, &reaction.answer)),
                Forgery::Id | Forgery::Question | Forgery::Letters | Forgery::Junk => {
                    (Some(&self.own), forge(*forgery, &reaction.answer))
                }
            };
            if let Some(socket) = socket {
                socket.send_to(&bytes, to).await.ok();
            }
        }
        let bytes = encode(&reaction.answer);
        let bytes = if bytes.len() <= UDP_LIMIT {
            bytes
        } else {
            encode(&reaction.answer.truncate())
        };
        self.own.send_to(&bytes, to).await.ok();
    }
}

/// The bytes of an answer that leads to the attacker.
fn forge(forgery: Forgery, answer: &Message) -> Vec<u8> {
    let mut message = answer.clone();
    let name = message.queries[0].name().clone();
    message.answers = vec![Record::from_rdata(name.clone(), 3600, RData::A(A(TRAP)))];
    match forgery {
        Forgery::Id => message.metadata.id ^= 0x5555,
        Forgery::Question => {
            let other = Name::from_ascii("evil.test.").expect("a name");
            message.queries[0].set_name(other.clone());
            message.answers[0].name = other;
        }
        Forgery::Letters => {
            let flipped: Vec<Vec<u8>> = name
                .iter()
                .map(|label| {
                    let flip = |byte: &u8| {
                        if byte.is_ascii_alphabetic() {
                            byte ^ 0x20
                        } else {
                            *byte
                        }
                    };
                    label.iter().map(flip).collect()
                })
                .collect();
            let other = Name::from_labels(flipped.iter().map(Vec::as_slice)).expect("a name");
            message.queries[0].set_name(other);
        }
        Forgery::Port | Forgery::Address => {}
        Forgery::Junk => return b"junk that is no message of any kind".to_vec(),
    }
    encode(&message)
}

fn encode(message: &Message) -> Vec<u8> {
    message.to_vec().expect("our own message encodes")
}
