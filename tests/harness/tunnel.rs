//! A tunnel's URL as a client of the node uses it.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result};
use serde_json::json;

use crate::{node::Node, sandbox::Sandbox, world::World};

/// Longest wait for an answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// An open tunnel with a loopback port of its own.
pub struct Tunnel {
    /// Its id.
    pub id: String,
    address: SocketAddr,
    token: String,
    world: Arc<World>,
}

impl Tunnel {
    /// Opens one to a port of the sandbox.
    #[track_caller]
    pub fn open(node: &Node, sandbox: &Sandbox, port: u16) -> Self {
        let call = sandbox.client().post(&sandbox.path("/tunnels"));
        let created = call.json(&json!({ "port": port })).send().ok();
        let text = |field: &str| created[field].as_str().map(str::to_owned);
        let address =
            text("url").and_then(|url| url.strip_prefix("http://")?.strip_suffix('/')?.parse().ok());
        Self {
            id: text("tunnel_id").unwrap_or_else(|| panic!("no id in {created}")),
            address: address.unwrap_or_else(|| panic!("no loopback URL in {created}")),
            token: text("token").unwrap_or_else(|| panic!("no token in {created}")),
            world: Arc::clone(node.world()),
        }
    }

    /// A connection to its port.
    ///
    /// # Errors
    /// When nobody listens.
    pub fn connect(&self) -> Result<TcpStream> {
        let address = self.address;
        let stream = self.world.node().run(move || TcpStream::connect(address))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(stream)
    }

    /// Asks for `path` on a connection and gives the whole answer, head included.
    ///
    /// # Errors
    /// When the connection ends before an answer has come.
    pub fn ask(&self, mut stream: TcpStream, path: &str) -> Result<String> {
        let request = format!(
            "GET {path} HTTP/1.1\r\nhost: {}\r\nauthorization: Bearer {}\r\nconnection: close\r\n\r\n",
            self.address, self.token
        );
        stream.write_all(request.as_bytes()).context("asking")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).context("the answer")?;
        anyhow::ensure!(!answer.is_empty(), "closed without an answer");
        Ok(answer)
    }

    /// `GET path` on a connection of its own.
    ///
    /// # Errors
    /// As [`Tunnel::connect`] and [`Tunnel::ask`].
    pub fn get(&self, path: &str) -> Result<String> {
        self.ask(self.connect()?, path)
    }
}
