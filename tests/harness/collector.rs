//! Servers that take whatever comes and remember it: the attacker's machines, and listeners on addresses
//! that nothing may ever reach.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use anyhow::{Context as _, Result};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, UdpSocket},
    task::JoinHandle,
};

use crate::{lock, namespace::Namespace, world::runtime};

/// Most bytes that are remembered of one arrival.
const KEEP: usize = 64 * 1024;

/// What one TCP connection or one datagram brought.
#[derive(Debug, Clone)]
pub struct Arrival {
    /// Who sent it.
    pub from: SocketAddr,
    /// The first 64 KiB of it.
    pub bytes: Vec<u8>,
    /// The peer has closed the connection (always so for a datagram).
    pub closed: bool,
}

/// A TCP or UDP port that accepts everything. TCP connections are greeted with `banner`, and every byte is
/// echoed; datagrams are echoed too.
pub struct Collector {
    /// Where it listens.
    pub address: SocketAddr,
    arrivals: Arc<Mutex<Vec<Arrival>>>,
    task: JoinHandle<()>,
}

impl Collector {
    /// Listens for TCP connections on an address of the namespace.
    ///
    /// # Errors
    /// When the address is taken.
    pub fn tcp(namespace: &Namespace, address: SocketAddr, banner: &'static str) -> Result<Self> {
        let listener = namespace
            .run(move || std::net::TcpListener::bind(address))
            .with_context(|| format!("tcp {address}"))?;
        listener.set_nonblocking(true)?;
        let arrivals = Arc::new(Mutex::new(Vec::new()));
        let _context = runtime().enter();
        let listener = TcpListener::from_std(listener)?;
        let seen = Arc::clone(&arrivals);
        let task = runtime().spawn(async move {
            while let Ok((stream, from)) = listener.accept().await {
                let index = {
                    let mut seen = lock(&seen);
                    seen.push(Arrival {
                        from,
                        bytes: Vec::new(),
                        closed: false,
                    });
                    seen.len() - 1
                };
                runtime().spawn(echo(stream, banner, Arc::clone(&seen), index));
            }
        });
        Ok(Self {
            address,
            arrivals,
            task,
        })
    }

    /// Receives datagrams on an address of the namespace.
    ///
    /// # Errors
    /// When the address is taken.
    pub fn udp(namespace: &Namespace, address: SocketAddr) -> Result<Self> {
        let socket = namespace
            .run(move || std::net::UdpSocket::bind(address))
            .with_context(|| format!("udp {address}"))?;
        socket.set_nonblocking(true)?;
        let arrivals = Arc::new(Mutex::new(Vec::new()));
        let _context = runtime().enter();
        let socket = UdpSocket::from_std(socket)?;
        let seen = Arc::clone(&arrivals);
        let task = runtime().spawn(async move {
            let mut buffer = vec![0; KEEP];
            while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
                lock(&seen).push(Arrival {
                    from,
                    bytes: buffer[..length].to_vec(),
                    closed: true,
                });
                socket.send_to(&buffer[..length], from).await.ok();
            }
        });
        Ok(Self {
            address,
            arrivals,
            task,
        })
    }

    /// Everything that has arrived so far.
    pub fn arrivals(&self) -> Vec<Arrival> {
        lock(&self.arrivals).clone()
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn echo(mut stream: TcpStream, banner: &'static str, seen: Arc<Mutex<Vec<Arrival>>>, index: usize) {
    let mut buffer = vec![0; 16 * 1024];
    let mut alive = stream.write_all(banner.as_bytes()).await.is_ok();
    while alive {
        // A connection may outlive its test; none may outlive the suite.
        let read = tokio::time::timeout(Duration::from_secs(300), stream.read(&mut buffer)).await;
        let Ok(Ok(length @ 1..)) = read else { break };
        {
            let mut seen = lock(&seen);
            let room = KEEP.saturating_sub(seen[index].bytes.len()).min(length);
            seen[index].bytes.extend_from_slice(&buffer[..room]);
        }
        alive = stream.write_all(&buffer[..length]).await.is_ok();
    }
    lock(&seen)[index].closed = true;
}
