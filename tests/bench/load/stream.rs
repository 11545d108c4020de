//! Connections to the origin, in clear or by TLS, and how fast one or several of them bring bytes.

use std::{
    io::{self, Read, Write},
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream, UdpSocket},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, StreamOwned,
    client::Resumption,
    pki_types::{CertificateDer, ServerName, pem::PemObject as _},
};
use serde::{Deserialize, Serialize};

use super::BULK;

/// No answer for this long is a failure, never a figure.
const PATIENCE: Duration = Duration::from_secs(5);
/// Bytes read at once.
const CHUNK: usize = 256 * 1024;

/// What to connect to.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Target {
    /// The address.
    pub(crate) to: SocketAddrV4,
    /// By TLS.
    pub(crate) tls: Option<Secure>,
}

/// What a TLS client knows.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Secure {
    /// The server's name.
    pub(crate) name: String,
    /// A file with the authorities it trusts, PEM.
    pub(crate) authorities: PathBuf,
    /// A name server to ask for the name first: netd lets a flow pass only to an address that was the answer.
    pub(crate) resolver: Option<Ipv4Addr>,
}

/// Reading an endless answer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Bulk {
    /// From where.
    pub(crate) target: Target,
    /// Connections at once.
    pub(crate) flows: usize,
    /// Before counting begins, in milliseconds.
    pub(crate) warm_ms: u64,
    /// While counting, in milliseconds.
    pub(crate) count_ms: u64,
}

/// A client that is ready to connect.
pub(super) struct Connector {
    target: Target,
    tls: Option<(Arc<ClientConfig>, ServerName<'static>)>,
}

/// A connection of either kind.
pub(super) enum Stream {
    Plain(TcpStream),
    Tls(Box<StreamOwned<ClientConnection, TcpStream>>),
}

impl Connector {
    pub(super) fn new(target: Target) -> Result<Self> {
        let tls = target.tls.as_ref().map(configure).transpose()?;
        Ok(Self { target, tls })
    }

    /// With what TLS begins.
    pub(super) fn tls(&self) -> Option<(Arc<ClientConfig>, ServerName<'static>)> {
        self.tls.clone()
    }

    /// The request for a path.
    pub(super) fn request(&self, path: &str, close: bool) -> Vec<u8> {
        let host = match &self.target.tls {
            Some(secure) if self.target.to.port() == 443 => secure.name.clone(),
            Some(secure) => format!("{}:{}", secure.name, self.target.to.port()),
            None => self.target.to.ip().to_string(),
        };
        let close = if close { "Connection: close\r\n" } else { "" };
        format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n{close}\r\n").into_bytes()
    }

    pub(super) fn connect(&self) -> Result<Stream> {
        let to = SocketAddr::V4(self.target.to);
        let stream = TcpStream::connect_timeout(&to, PATIENCE).with_context(|| to.to_string())?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let Some((config, name)) = &self.tls else {
            return Ok(Stream::Plain(stream));
        };
        let connection = ClientConnection::new(Arc::clone(config), name.clone())?;
        Ok(Stream::Tls(Box::new(StreamOwned::new(connection, stream))))
    }
}

/// Every connection a whole handshake, as a new client's is.
fn configure(secure: &Secure) -> Result<(Arc<ClientConfig>, ServerName<'static>)> {
    if let Some(resolver) = secure.resolver {
        resolve(resolver, &secure.name)?;
    }
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(&secure.authorities)? {
        // A system's bundle may hold what rustls does not read; the one that counts is missed later if at all.
        roots.add(certificate?).ok();
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.resumption = Resumption::disabled();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok((Arc::new(config), ServerName::try_from(secure.name.clone())?))
}

/// Asks for the name's address (RFC 1035) and waits for the answer.
fn resolve(server: Ipv4Addr, name: &str) -> Result<()> {
    let mut query = vec![0x5a, 0x5a, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        query.push(u8::try_from(label.len())?);
        query.extend(label.as_bytes());
    }
    query.extend([0, 0, 1, 0, 1]);
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.send_to(&query, (server, 53))?;
    let mut answer = [0; 512];
    let (length, _) = socket.recv_from(&mut answer).context("no DNS answer")?;
    let found = length > 12 && answer[3] & 0x0f == 0 && answer[6..8] != [0, 0];
    ensure!(found, "{name} was not resolved: {:x?}", &answer[..length]);
    Ok(())
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.read(buffer),
            Self::Tls(stream) => stream.read(buffer),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.write(bytes),
            Self::Tls(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(stream) => stream.flush(),
            Self::Tls(stream) => stream.flush(),
        }
    }
}

impl Bulk {
    /// Bits a second of all flows together.
    pub(super) fn measure(self) -> Result<f64> {
        let connector = Arc::new(Connector::new(self.target)?);
        let (bytes, over) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let mut flows = Vec::new();
        for _ in 0..self.flows {
            let mut stream = connector.connect()?;
            stream.write_all(&connector.request(BULK, false))?;
            let (bytes, over) = (Arc::clone(&bytes), Arc::clone(&over));
            flows.push(thread::spawn(move || -> io::Result<()> {
                let mut chunk = vec![0; CHUNK];
                while !over.load(Ordering::Relaxed) {
                    let read = stream.read(&mut chunk)?;
                    if read == 0 {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                    bytes.fetch_add(read as u64, Ordering::Relaxed);
                }
                Ok(())
            }));
        }
        thread::sleep(Duration::from_millis(self.warm_ms));
        let (began, before) = (Instant::now(), bytes.load(Ordering::Relaxed));
        thread::sleep(Duration::from_millis(self.count_ms));
        // On a machine that is busy with something else nothing may have come yet.
        while bytes.load(Ordering::Relaxed) == before && began.elapsed() < PATIENCE {
            thread::sleep(Duration::from_millis(10));
        }
        let (took, moved) = (began.elapsed(), bytes.load(Ordering::Relaxed) - before);
        over.store(true, Ordering::Relaxed);
        for flow in flows {
            let ended = flow.join();
            ended.map_err(|_panic| anyhow::anyhow!("a reader died"))??;
        }
        ensure!(moved > 0, "nothing came");
        Ok(moved as f64 * 8.0 / took.as_secs_f64())
    }
}
