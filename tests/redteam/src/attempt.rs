//! One attempt, how it ended as a client feels it, and what it should have felt.
//!
//! Nothing here says whether bytes got out. Every attempt has a deadline, and none is made towards an address that the
//! world does not permit.

use std::{
    io::{self, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket},
    thread,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use crate::{
    wire::dns,
    world::{World, is_private},
};

/// Most bytes that are read of an answer.
const READ: usize = 64 * 1024;
/// Most characters of an answer that are told.
const TOLD: usize = 400;
/// An answer is over when nothing came for so long.
const QUIET: Duration = Duration::from_millis(300);
/// Between the pieces of a message that is sent in pieces.
const PAUSE: Duration = Duration::from_millis(2);
/// Most attempts of one part of a case.
const MOST: usize = 400;

/// How an attempt ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// Something came back.
    Answered,
    /// There was no connection, and the other side (or what stands in front of it) said so.
    Refused,
    /// A connection was broken off.
    Reset,
    /// A connection was closed without a word.
    Closed,
    /// Nothing came until the deadline.
    Silent,
    /// The sandbox's own kernel, or its lack of a route, forbade it.
    Forbidden,
    /// It was sent; nobody answers such things.
    Sent,
}

/// What came of an attempt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// How it ended.
    pub end: End,
    /// There was a connection before it ended.
    pub connected: bool,
    /// From its start, in milliseconds.
    pub ms: u64,
    /// The beginning of what came back, one character a byte.
    #[serde(default)]
    pub data: String,
    /// Of DNS: the response code.
    #[serde(default)]
    pub code: Option<u8>,
    /// Of DNS: the addresses in the answer.
    #[serde(default)]
    pub addresses: Vec<IpAddr>,
    /// The error, as the program saw it.
    #[serde(default)]
    pub error: String,
}

/// What an attempt should feel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// Refused at once, before there was a connection.
    NoConnection,
    /// Refused at once, at the latest after what was sent had been read.
    Refusal,
    /// An HTTP status that refuses, or an end without an answer.
    HttpRefusal,
    /// REFUSED, NXDOMAIN, SERVFAIL, NOTIMP or FORMERR, and no address.
    NoName,
    /// Anything but an answer: what is thrown away without a word.
    NoAnswer,
    /// Whatever: only the world outside tells.
    Anything,
    /// An answer with this in it.
    Answer(String),
    /// An answer of DNS with this address and no other.
    Address(IpAddr),
    /// An answer of DNS with this address among others.
    Among(IpAddr),
}

/// An attempt as it is told outside.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Attempt {
    /// What was tried.
    pub what: String,
    /// What it should have felt.
    pub wanted: String,
    /// It felt that.
    pub as_wanted: bool,
    /// What it felt.
    pub outcome: Outcome,
}

/// The attempts of one part of a case.
pub struct Attempts<'a> {
    /// The world around.
    pub world: &'a World,
    /// Stands in all that this part sends.
    pub token: String,
    /// What was tried so far.
    pub made: Vec<Attempt>,
    /// What lies around in the sandbox, for those outside to look through.
    pub shown: Vec<String>,
    /// Why the rest could not be tried.
    pub not_possible: Option<String>,
}

impl Outcome {
    /// An end and nothing else.
    pub fn of(end: End, connected: bool, started: Instant) -> Self {
        Self {
            end,
            connected,
            ms: u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
            data: String::new(),
            code: None,
            addresses: Vec::new(),
            error: String::new(),
        }
    }

    /// How an error ended it.
    pub fn of_error(error: &io::Error, connected: bool, started: Instant) -> Self {
        let end = match error.kind() {
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => End::Silent,
            io::ErrorKind::ConnectionRefused => End::Refused,
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionAborted => {
                if connected {
                    End::Reset
                } else {
                    End::Refused
                }
            }
            // ICMP's administratively prohibited comes as "no route to host" or "permission denied".
            io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => End::Refused,
            _ => End::Forbidden,
        };
        Self {
            error: error.to_string(),
            ..Self::of(end, connected, started)
        }
    }

    fn with_data(mut self, bytes: &[u8]) -> Self {
        self.data = bytes.iter().take(TOLD).copied().map(char::from).collect();
        self
    }
}

impl Wanted {
    /// Whether an outcome is what is wanted.
    pub fn fits(&self, outcome: &Outcome) -> bool {
        let refused = matches!(
            outcome.end,
            End::Refused | End::Reset | End::Closed | End::Forbidden
        );
        match self {
            Self::NoConnection => refused && !outcome.connected,
            Self::Refusal => refused,
            Self::HttpRefusal => refused || outcome.end == End::Answered && refuses(&outcome.data),
            Self::NoName => outcome.addresses.is_empty() && (refused || matches!(outcome.code, Some(1..=5))),
            Self::NoAnswer => outcome.end != End::Answered,
            Self::Anything => true,
            Self::Answer(text) => outcome.end == End::Answered && outcome.data.contains(text.as_str()),
            Self::Address(address) => outcome.addresses == [*address],
            Self::Among(address) => outcome.addresses.contains(address),
        }
    }

    fn text(&self) -> String {
        match self {
            Self::NoConnection => "refused before there is a connection".to_owned(),
            Self::Refusal => "refused, not left waiting".to_owned(),
            Self::HttpRefusal => "refused by a status or an end".to_owned(),
            Self::NoName => "no such name, or refused".to_owned(),
            Self::NoAnswer => "no answer".to_owned(),
            Self::Anything => "anything".to_owned(),
            Self::Answer(text) => format!("an answer with {text:?}"),
            Self::Address(address) => format!("{address} and no other address"),
            Self::Among(address) => format!("{address} among the addresses"),
        }
    }
}

/// The first status is one that refuses, and no further answer follows it; by HTTP/2, an end of stream or connection.
fn refuses(answer: &str) -> bool {
    let statuses: Vec<&str> = answer.matches("HTTP/1.").collect();
    let refusals = [
        "400", "403", "405", "408", "413", "414", "417", "421", "426", "431", "501", "505",
    ];
    let status = answer.get(9..12).unwrap_or_default();
    statuses.len() == 1 && refusals.contains(&status)
}

impl<'a> Attempts<'a> {
    /// None yet.
    pub fn new(world: &'a World, token: String) -> Self {
        Self {
            world,
            token,
            made: Vec::new(),
            shown: Vec::new(),
            not_possible: None,
        }
    }

    /// Keeps what came of an attempt.
    pub fn note(&mut self, what: impl Into<String>, wanted: &Wanted, outcome: Outcome) -> Outcome {
        if self.made.len() < MOST {
            self.made.push(Attempt {
                what: what.into(),
                wanted: wanted.text(),
                as_wanted: wanted.fits(&outcome),
                outcome: outcome.clone(),
            });
        }
        outcome
    }

    /// What remains of this part cannot be tried here.
    pub fn impossible(&mut self, why: impl Into<String>) {
        self.not_possible = Some(why.into());
    }

    /// Longest wait for an answer.
    pub fn timeout(&self) -> Duration {
        Duration::from_millis(self.world.timeout_ms)
    }

    /// The same for an answer on which nothing depends.
    fn patience(&self) -> Duration {
        let most = self.world.timeout_ms;
        Duration::from_millis(self.world.patience_ms.unwrap_or(most).min(most))
    }

    /// Connects, sends, and reads what comes.
    pub fn tcp(&self, to: SocketAddr, bytes: &[u8]) -> Outcome {
        self.tcp_in_pieces(to, &[bytes])
    }

    /// The same, with a pause between the pieces.
    pub fn tcp_in_pieces(&self, to: SocketAddr, pieces: &[&[u8]]) -> Outcome {
        self.tcp_for(to, pieces, self.patience())
    }

    /// The same, and waits for the answer in any case: its coming says that who listens there has been reached.
    pub fn tcp_until_answered(&self, to: SocketAddr, bytes: &[u8]) -> Outcome {
        self.tcp_for(to, &[bytes], self.timeout())
    }

    fn tcp_for(&self, to: SocketAddr, pieces: &[&[u8]], patience: Duration) -> Outcome {
        let started = Instant::now();
        match self.connect(to) {
            Ok(mut stream) => converse(&mut stream, pieces, patience, started).0,
            Err(error) => Outcome::of_error(&error, false, started),
        }
    }

    /// A connection that goes on: sends `first`, and then what `then` makes of the answer.
    pub fn tcp_in_turns(&self, to: SocketAddr, first: &[u8], then: impl FnOnce(&[u8]) -> Vec<u8>) -> Outcome {
        let started = Instant::now();
        let mut stream = match self.connect(to) {
            Ok(stream) => stream,
            Err(error) => return Outcome::of_error(&error, false, started),
        };
        let (outcome, answer) = converse(&mut stream, &[first], self.timeout(), started);
        if outcome.end != End::Answered {
            return outcome;
        }
        converse(&mut stream, &[&then(&answer)], self.patience(), started).0
    }

    fn connect(&self, to: SocketAddr) -> io::Result<TcpStream> {
        self.permit(to.ip())?;
        let stream = TcpStream::connect_timeout(&to, self.timeout())?;
        stream.set_read_timeout(Some(self.timeout()))?;
        stream.set_write_timeout(Some(self.timeout()))?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    /// A datagram, and what comes back.
    pub fn udp(&self, to: SocketAddr, bytes: &[u8]) -> Outcome {
        let started = Instant::now();
        match self.exchange(to, bytes, self.patience()) {
            Ok(answer) => Outcome::of(End::Answered, false, started).with_data(&answer),
            Err(error) => Outcome::of_error(&error, false, started),
        }
    }

    fn exchange(&self, to: SocketAddr, bytes: &[u8], patience: Duration) -> io::Result<Vec<u8>> {
        self.permit(to.ip())?;
        let any: IpAddr = if to.is_ipv4() {
            Ipv4Addr::UNSPECIFIED.into()
        } else {
            Ipv6Addr::UNSPECIFIED.into()
        };
        let socket = UdpSocket::bind((any, 0))?;
        socket.set_read_timeout(Some(patience))?;
        socket.connect(to)?;
        socket.send(bytes)?;
        let mut buffer = vec![0; READ];
        let length = socket.recv(&mut buffer)?;
        buffer.truncate(length);
        Ok(buffer)
    }

    /// A message of DNS by UDP, and what comes back.
    pub fn dns(&self, server: SocketAddr, message: &[u8]) -> Outcome {
        let started = Instant::now();
        answered(self.exchange(server, message, self.patience()), message, started)
    }

    /// The same by TCP.
    pub fn dns_by_tcp(&self, server: SocketAddr, message: &[u8]) -> Outcome {
        let started = Instant::now();
        let mut stream = match self.connect(server) {
            Ok(stream) => stream,
            Err(error) => return Outcome::of_error(&error, false, started),
        };
        let mut answer = || {
            stream.set_read_timeout(Some(self.patience()))?;
            let length = u16::try_from(message.len()).unwrap_or(u16::MAX);
            stream.write_all(&[&length.to_be_bytes(), message].concat())?;
            let mut length = [0; 2];
            stream.read_exact(&mut length)?;
            let mut answer = vec![0; usize::from(u16::from_be_bytes(length))];
            stream.read_exact(&mut answer)?;
            Ok(answer)
        };
        answered(answer(), message, started)
    }

    /// Asks the sandbox's own resolver for the addresses of a name, and waits for the answer in any case.
    pub fn resolve(&self, name: &str) -> Outcome {
        let (started, question) = (Instant::now(), dns::question(name.as_bytes(), dns::A));
        answered(
            self.exchange(self.resolver(), &question, self.timeout()),
            &question,
            started,
        )
    }

    /// The sandbox's own resolver.
    pub fn resolver(&self) -> SocketAddr {
        let configured = || {
            let text = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
            let lines = text.lines().filter_map(|line| line.strip_prefix("nameserver"));
            lines.filter_map(|rest| rest.trim().parse().ok()).next()
        };
        let address = self.world.resolver.or_else(configured);
        SocketAddr::new(address.unwrap_or(self.world.evil.address), 53)
    }

    /// Whether it may be sent to.
    ///
    /// # Errors
    /// When the world does not permit it.
    pub fn permit(&self, address: IpAddr) -> io::Result<()> {
        // The sandbox's resolver is where its file says, often at a private address, and is sent nothing but questions.
        if self.world.permits(address) || is_private(address) && address == self.resolver().ip() {
            return Ok(());
        }
        Err(io::Error::other(format!(
            "{address} is not an address that attacks are sent to"
        )))
    }
}

/// What an exchange of DNS came to.
fn answered(answer: io::Result<Vec<u8>>, question: &[u8], started: Instant) -> Outcome {
    let answer = match answer {
        Ok(answer) => answer,
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            return Outcome::of(End::Closed, true, started);
        }
        Err(error) => return Outcome::of_error(&error, false, started),
    };
    let outcome = Outcome::of(End::Answered, false, started).with_data(&answer);
    match dns::read(&answer) {
        Some(read) if answer.get(..2) == question.get(..2) && read.is_response => Outcome {
            code: Some(read.code),
            addresses: read.addresses,
            ..outcome
        },
        Some(_) | None => outcome,
    }
}

/// Sends the pieces and reads until the end, or until nothing comes any more.
fn converse(
    stream: &mut TcpStream,
    pieces: &[&[u8]],
    patience: Duration,
    started: Instant,
) -> (Outcome, Vec<u8>) {
    let mut received = Vec::new();
    let mut failed = stream.set_read_timeout(Some(patience)).err();
    for (index, piece) in pieces.iter().enumerate() {
        if index > 0 {
            thread::sleep(PAUSE);
        }
        if let Err(error) = stream.write_all(piece) {
            failed = Some(error);
            break;
        }
    }
    // What was answered before it was broken off is an answer.
    let mut buffer = vec![0; READ];
    while received.len() < READ {
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => {
                received.extend_from_slice(&buffer[..length]);
                // Only on a socket that is gone, and then the next read tells.
                stream.set_read_timeout(Some(QUIET.min(patience))).ok();
            }
            Err(error) => {
                failed.get_or_insert(error);
                break;
            }
        }
    }
    let outcome = if !received.is_empty() {
        Outcome::of(End::Answered, true, started).with_data(&received)
    } else if let Some(error) = failed {
        Outcome::of_error(&error, true, started)
    } else {
        Outcome::of(End::Closed, true, started)
    };
    (outcome, received)
}
