//! The server that everything is measured against: HTTP/1.1, in clear and by TLS, one thread a connection.

use std::{
    fs,
    io::{self, Read, Write},
    net::{Ipv4Addr, SocketAddrV4, TcpListener},
    sync::Arc,
    thread,
};

use anyhow::{Context as _, Result};
use rustls::{
    ServerConfig, ServerConnection, StreamOwned,
    pki_types::{CertificateDer, PrivatePkcs8KeyDer},
};
use serde::{Deserialize, Serialize};

use super::Identity;

/// The path with an endless answer; every other path has [`BODY`] bytes.
pub(crate) const BULK: &str = "/bulk";
/// Bytes of an ordinary answer.
pub(super) const BODY: usize = 1024;
/// What the endless answer promises: more than anybody will read.
const ENDLESS: u64 = 1 << 42;
/// Bytes written at once.
const CHUNK: usize = 256 * 1024;
/// Connections that are served at once, on each port.
const THREADS: usize = 64;
/// Stack of a thread: the chunk is on the heap.
const STACK: usize = 256 * 1024;
/// Longest request.
const REQUEST: usize = 16 * 1024;

/// Where to serve what.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Origin {
    /// The address.
    pub(crate) address: Ipv4Addr,
    /// Ports in clear.
    pub(crate) plain: Vec<u16>,
    /// Ports by TLS.
    pub(crate) tls: Vec<u16>,
    /// Needed for these.
    pub(crate) identity: Option<Identity>,
}

impl Origin {
    /// Begins to serve.
    pub(super) fn start(self) -> Result<()> {
        let tls = self.identity.as_ref().map(configuration).transpose()?;
        let plain = self.plain.iter().map(|port| (*port, None));
        let secure = self.tls.iter().map(|port| (*port, tls.clone()));
        for (port, tls) in plain.chain(secure) {
            let address = SocketAddrV4::new(self.address, port);
            let listener = TcpListener::bind(address).with_context(|| address.to_string())?;
            let listener = Arc::new(listener);
            for _ in 0..THREADS {
                let (listener, tls) = (Arc::clone(&listener), tls.clone());
                thread::Builder::new().stack_size(STACK).spawn(move || {
                    loop {
                        // A client that breaks off is how a measurement ends.
                        accept(&listener, tls.as_ref()).ok();
                    }
                })?;
            }
        }
        Ok(())
    }
}

/// No resumption, so that every connection is a whole handshake, as a new client's is.
fn configuration(identity: &Identity) -> Result<Arc<ServerConfig>> {
    let certificate = CertificateDer::from(fs::read(&identity.certificate)?);
    let key = PrivatePkcs8KeyDer::from(fs::read(&identity.key)?);
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key.into())?;
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

fn accept(listener: &TcpListener, tls: Option<&Arc<ServerConfig>>) -> io::Result<()> {
    let (stream, _) = listener.accept()?;
    stream.set_nodelay(true)?;
    let Some(tls) = tls else { return converse(stream) };
    let connection = ServerConnection::new(Arc::clone(tls)).map_err(io::Error::other)?;
    let mut stream = StreamOwned::new(connection, stream);
    converse(&mut stream)?;
    stream.conn.send_close_notify();
    stream.flush()
}

fn converse(mut stream: impl Read + Write) -> io::Result<()> {
    let mut answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {BODY}\r\n\r\n").into_bytes();
    answer.resize(answer.len() + BODY, b'x');
    let mut buffer = [0; REQUEST];
    let mut filled = 0;
    loop {
        let head = loop {
            if let Some(end) = buffer[..filled].windows(4).position(|four| four == b"\r\n\r\n") {
                break end + 4;
            }
            let read = stream.read(&mut buffer[filled..])?;
            if read == 0 {
                return Ok(());
            }
            filled += read;
        };
        let text = String::from_utf8_lossy(&buffer[..head]).to_ascii_lowercase();
        if text.starts_with(&format!("get {BULK} ")) {
            return pour(stream);
        }
        stream.write_all(&answer)?;
        stream.flush()?;
        if text.contains("\r\nconnection: close") {
            return Ok(());
        }
        buffer.copy_within(head..filled, 0);
        filled -= head;
    }
}

fn pour(mut stream: impl Write) -> io::Result<()> {
    write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {ENDLESS}\r\n\r\n")?;
    let chunk = vec![b'x'; CHUNK];
    loop {
        stream.write_all(&chunk)?;
    }
}
