//! Attempts to get out, made by a Python program inside the sandbox (or, for what an unprivileged program
//! cannot do, by the same program as root in the sandbox's network namespace).
//!
//! Their outcomes show that a refusal was immediate and what a client would see. Whether anything got out
//! is never taken from here: the world's capture and its servers say that.

use std::{net::IpAddr, time::Duration};

use anyhow::{Context as _, Result};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{namespace::Namespace, node::Node, sandbox::Sandbox, world::World};

/// The program.
const PROGRAM: &str = include_str!("probe.py");
/// Where it lies in the sandbox.
const PATH: &str = "/workspace/.probe/probe.py";
/// Where the world's CA lies in the sandbox.
pub const CA: &str = "/workspace/.probe/ca.pem";

/// A refusal is immediate. Well below what a hang takes ([`TIMEOUT`]), and long enough for a busy machine; that a
/// refused connection was not asked for twice is told by [`Outcome::repeated`].
pub const AT_ONCE: Duration = Duration::from_secs(6);
/// When the program gives up an attempt, where the attempt itself does not say.
pub const TIMEOUT: Duration = Duration::from_secs(10);

/// How an attempt ended.
#[derive(Debug, Clone, Deserialize)]
pub struct Outcome {
    /// `answered`, `refused`, `reset`, `closed`, `silent`, `timeout`, `unreachable`, `prohibited`, `denied`
    /// (the sandbox's own kernel said no), `no_name`, `tls`, `sent`.
    pub outcome: String,
    /// How long it took.
    pub ms: f64,
    /// What came back.
    #[serde(default)]
    pub data: String,
    /// The connection was established before it ended.
    #[serde(default)]
    pub connected: bool,
    /// Segments that TCP had sent again when a connection was not to be had: its first repetition comes after a second
    /// (RFC 6298 2), so none means that the answer to the first one decided.
    #[serde(default)]
    pub repeated: u32,
    /// Of DNS.
    #[serde(default)]
    pub rcode: Option<u8>,
    /// Of DNS.
    #[serde(default)]
    pub addresses: Vec<IpAddr>,
    /// Of DNS: the answer was cut.
    #[serde(default)]
    pub truncated: bool,
    /// Of DNS: bytes of the answer.
    #[serde(default)]
    pub size: usize,
    /// Of DNS: the lifetime of the last record, in seconds.
    #[serde(default)]
    pub ttl: Option<u32>,
    /// Of DNS: name, type and data of each record.
    #[serde(default)]
    pub records: Vec<(String, u16, String)>,
    /// Of several DNS questions on one connection: the answers, as they came.
    #[serde(default)]
    pub answers: Vec<Value>,
    /// The error as the program saw it.
    #[serde(default)]
    pub error: String,
}

impl Outcome {
    /// It was refused, and at once.
    #[track_caller]
    pub fn assert_refused(&self) {
        let refused = [
            "refused",
            "reset",
            "closed",
            "unreachable",
            "prohibited",
            "denied",
            "no_name",
        ];
        assert!(refused.contains(&self.outcome.as_str()), "not refused: {self:?}");
        self.assert_at_once();
    }

    /// It was refused before there was a connection: "never connected, then closed, where the address and
    /// port could decide".
    #[track_caller]
    pub fn assert_refused_at_connect(&self) {
        self.assert_refused();
        assert!(!self.connected, "connected first: {self:?}");
    }

    /// It took no longer than a refusal may.
    #[track_caller]
    pub fn assert_at_once(&self) {
        let soon = self.ms < AT_ONCE.as_secs_f64() * 1000.0;
        assert!(soon && self.repeated == 0, "not at once: {self:?}");
    }

    /// An answer came, and it contains `text`.
    #[track_caller]
    pub fn assert_answered(&self, text: &str) {
        assert_eq!(self.outcome, "answered", "{self:?}");
        assert!(self.data.contains(text), "`{text}` is not in {self:?}");
    }
}

/// Connects to `to:port`, sends `send`, waits for an answer.
pub fn tcp(to: impl ToString, port: u16, send: &str) -> Value {
    json!({ "kind": "tcp", "to": to.to_string(), "port": port, "send": send })
}

/// `GET /` by HTTPS: connects to `to` (an address or a name) and asks for `name`, also in the SNI.
pub fn https(to: impl ToString, name: &str) -> Value {
    json!({ "kind": "tls", "to": to.to_string(), "port": 443, "sni": name, "host": name })
}

/// A TLS handshake without SNI.
pub fn https_without_sni(to: impl ToString) -> Value {
    json!({ "kind": "tls", "to": to.to_string(), "port": 443, "sni": null, "host": "-" })
}

/// `GET /` by plain HTTP on port 80.
pub fn http(to: impl ToString, host: &str) -> Value {
    let request = format!("GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    tcp(to, 80, &request)
}

/// A datagram.
pub fn udp(to: impl ToString, port: u16) -> Value {
    json!({ "kind": "udp", "to": to.to_string(), "port": port, "send": "canary" })
}

/// A DNS query for an address record, to a given server.
pub fn dns(server: impl ToString, name: &str) -> Value {
    json!({ "kind": "dns", "to": server.to_string(), "port": 53, "name": name, "type": 1, "tcp": false })
}

/// DNS queries for address records, to a given server, all at once on one connection.
pub fn dns_stream(server: impl ToString, names: &[String]) -> Value {
    json!({ "kind": "dns_stream", "to": server.to_string(), "port": 53, "names": names, "type": 1, "timeout": 15.0 })
}

/// What the sandbox's own resolver says.
pub fn lookup(name: &str) -> Value {
    json!({ "kind": "lookup", "name": name })
}

/// The same attempt with other members.
#[must_use]
pub fn with(mut attempt: Value, changes: Value) -> Value {
    let members = attempt.as_object_mut().expect("an attempt is an object");
    let Value::Object(changes) = changes else {
        panic!("changes are an object")
    };
    members.extend(changes);
    attempt
}

/// The files that the program is made of, as the API takes them.
pub fn installation(world: &World) -> Value {
    let file = |path: &str, content: &[u8]| json!({ "path": path, "content": STANDARD.encode(content) });
    json!({ "files": [file(PATH, PROGRAM.as_bytes()), file(CA, world.ca.pem().as_bytes())] })
}

/// The command that makes attempts one after the other, as the API takes it.
pub fn execution(attempts: &[Value]) -> Value {
    json!({ "command": ["python3", PATH, Value::from(attempts).to_string()], "timeout": 55_000 })
}

/// What the program wrote about its attempts.
///
/// # Errors
/// When it wrote something else.
pub fn parse(lines: &str) -> Result<Vec<Outcome>> {
    let outcomes = lines
        .lines()
        .map(|line| serde_json::from_str(line).with_context(|| line.to_owned()));
    outcomes.collect()
}

/// Attempts from a sandbox.
pub struct Probe<'a> {
    sandbox: &'a Sandbox,
}

impl<'a> Probe<'a> {
    /// Installs the program in the sandbox.
    #[track_caller]
    pub fn install(sandbox: &'a Sandbox, world: &World) -> Self {
        let call = sandbox.client().post(&sandbox.path("/files"));
        call.json(&installation(world)).send().ok();
        Self { sandbox }
    }

    /// Makes one attempt.
    #[track_caller]
    pub fn try_one(&self, attempt: &Value) -> Outcome {
        let mut outcomes = self.try_all(std::slice::from_ref(attempt));
        outcomes.remove(0)
    }

    /// Makes attempts one after the other.
    #[track_caller]
    pub fn try_all(&self, attempts: &[Value]) -> Vec<Outcome> {
        let output = self.sandbox.execute(&execution(attempts));
        assert_eq!(output.exit_code, 0, "the probe failed: {output:?}");
        whole(parse(&output.stdout), attempts)
    }

    /// The shell line that makes attempts in an endless loop, a line of JSON each.
    pub fn loop_line(attempts: &[Value], pause_ms: u64) -> String {
        let quoted = Value::from(attempts).to_string().replace('"', "\\\"");
        format!("exec python3 {PATH} --loop {pause_ms} \"{quoted}\"")
    }
}

/// Makes attempts as root in the sandbox's network namespace: what code could do that had broken out of its
/// user but not of its namespace.
#[track_caller]
pub fn as_root(node: &Node, sandbox: &Sandbox, attempts: &[Value]) -> Vec<Outcome> {
    whole(try_as_root(node, &sandbox.id, attempts), attempts)
}

/// The same where the sandbox may end meanwhile.
///
/// # Errors
/// When it has.
pub fn try_as_root(node: &Node, sandbox: &str, attempts: &[Value]) -> Result<Vec<Outcome>> {
    let processes = node.processes_of(sandbox);
    let inside = processes
        .iter()
        .find(|process| process.numbers.last() == Some(&1));
    let inside = inside.with_context(|| format!("{sandbox} has no first process among {processes:?}"))?;
    let file = format!("/proc/{}/ns/net", inside.pid);
    let namespace = Namespace::join("attacker", file.as_ref())?;
    let program = node.world().directory().join("probe.py");
    // In one step: another attacker may be reading it.
    let fresh = tempfile::NamedTempFile::new_in(node.world().directory())?;
    std::fs::write(fresh.path(), PROGRAM)?;
    fresh.persist(&program)?;
    let input = Value::from(attempts).to_string();
    let output = namespace.command("python3", &[&program.display().to_string(), &input])?;
    parse(&String::from_utf8_lossy(&output.stdout))
}

#[track_caller]
fn whole(outcomes: Result<Vec<Outcome>>, attempts: &[Value]) -> Vec<Outcome> {
    let outcomes = outcomes.unwrap_or_else(|error| panic!("{error:#}"));
    assert_eq!(
        outcomes.len(),
        attempts.len(),
        "attempts without outcome: {outcomes:?}"
    );
    outcomes
}
