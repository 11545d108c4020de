//! Reads the head of one HTTP/1.x request (RFC 9112), strictly, and writes it again from the parsed parts. Owns: request line, fields, the framing of the body. What two parsers could read in two
//! ways is malformed: a proxy and a server that disagree are a hole.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use sandgate_policy::DomainName;

/// What the bytes received so far are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reading {
    /// A head so far; more bytes are needed.
    Incomplete,
    /// Not HTTP/1.x, or broken, or not served in clear; the word says what, for the audit record.
    Malformed(&'static str),
    /// The whole head.
    Complete(Head),
}

/// One request's head.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    method: String,
    target: String,
    minor: u8,
    fields: Vec<(String, Vec<u8>)>,
    /// Whom the request is for.
    pub host: Host,
    /// How long the body is.
    pub framing: Framing,
    /// Bytes of the buffer that the head takes.
    pub length: usize,
}

/// The Host field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    /// A name, or nothing when the field held an address.
    pub name: Option<DomainName>,
    /// The address, when the field held one.
    pub address: Option<IpAddr>,
    /// The port, when the field held one.
    pub port: Option<u16>,
}

/// How the end of a request's body is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// There is no body.
    Nothing,
    /// This many bytes.
    Length(u64),
    /// Chunks, up to the one of size zero.
    Chunked,
}

const FIELDS_MAX: usize = 100;
/// Longest method, in bytes.
const METHOD_MAX: usize = 32;
/// Fields that a Connection field (RFC 9110 7.6.1) must not name: without them the message means something else.
const NEVER_HOP_BY_HOP: [&str; 3] = ["host", "content-length", "transfer-encoding"];

/// Reads the beginning of a connection. May be called again with more bytes any number of times.
pub fn read(received: &[u8]) -> Reading {
    read_either(received, Wanted::Request)
}

/// The same where a target may also be an absolute URI of this scheme (RFC 9112 3.2.2), `http` or `https`. It must name
/// what the Host field names, letter by letter but for their case; [`Head::target`] is its path.
pub fn read_for(received: &[u8], scheme: &'static str) -> Reading {
    read_either(received, Wanted::Scheme(scheme))
}

/// The same where nothing but `CONNECT` is served (RFC 9110 9.3.6): its target is an authority, and it has no body.
pub fn read_connect(received: &[u8]) -> Reading {
    read_either(received, Wanted::Connect)
}

fn read_either(received: &[u8], wanted: Wanted) -> Reading {
    match try_read(received, wanted) {
        Ok(Some(head)) => Reading::Complete(head),
        Ok(None) => Reading::Incomplete,
        Err(broken) => Reading::Malformed(broken),
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Request,
    /// Also with an absolute URI of this scheme as its target.
    Scheme(&'static str),
    Connect,
}

impl Head {
    /// The method.
    pub fn method(&self) -> &str {
        &self.method
    }

    /// The request target: a path with its query, or `*`.
    pub fn target(&self) -> &str {
        &self.target
    }

    /// Every field's value.
    pub fn field_values(&self) -> impl Iterator<Item = &[u8]> {
        self.fields.iter().map(|(_, value)| value.as_slice())
    }

    /// The same request for another target.
    #[must_use]
    pub fn with_target(self, target: String) -> Self {
        Self { target, ..self }
    }

    /// Whether it asks to go on as WebSocket (RFC 6455 4.1).
    pub fn asks_for_websocket(&self) -> bool {
        let lists = |name, token: &str| self.values(name).flat_map(tokens).any(|found| found == token);
        lists("connection", "upgrade") && lists("upgrade", "websocket")
    }

    /// Whether it asks to go on as some other protocol (RFC 9110 7.8). HTTP/2 does not count: it would carry
    /// further requests past whoever judges them.
    pub fn asks_for_upgrade(&self) -> bool {
        let offers: Vec<String> = self.values("upgrade").flat_map(tokens).collect();
        let is_http2 = |offer: &String| offer.starts_with("h2") || offer.starts_with("http/");
        let asks = self
            .values("connection")
            .flat_map(tokens)
            .any(|found| found == "upgrade");
        asks && self.minor == 1 && !offers.is_empty() && !offers.iter().any(is_http2)
    }

    /// The values of one field, by its name in lower case.
    pub fn values<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a [u8]> {
        values(&self.fields, name)
    }
}

fn try_read(received: &[u8], wanted: Wanted) -> Result<Option<Head>, &'static str> {
    let mut rest = received;
    let Some(line) = next_line(&mut rest)? else {
        return started_well(received).map(|()| None);
    };
    let Line {
        method,
        target,
        authority,
        minor,
    } = request_line(line, wanted)?;
    let mut fields = Vec::new();
    loop {
        let Some(line) = next_line(&mut rest)? else {
            return Ok(None);
        };
        if line.is_empty() {
            break;
        }
        if fields.len() == FIELDS_MAX {
            return Err("more than 100 fields");
        }
        fields.push(field(line)?);
    }
    for token in values(&fields, "connection").flat_map(tokens) {
        if NEVER_HOP_BY_HOP.contains(&token.as_str()) {
            return Err("a Connection field that names a field of the message");
        }
    }
    let framing = framing(&fields, minor)?;
    let host = host(&fields)?;
    if let Some(authority) = authority
        && !values(&fields, "host").any(|said| said.eq_ignore_ascii_case(authority.as_bytes()))
    {
        return Err("a target for another host than the Host field");
    }
    Ok(Some(Head {
        method,
        target,
        minor,
        fields,
        host,
        framing,
        length: received.len() - rest.len(),
    }))
}

/// Refuses at the first wrong byte what cannot become a request line.
fn started_well(received: &[u8]) -> Result<(), &'static str> {
    match received.iter().position(|byte| *byte == b' ') {
        None if received.len() > METHOD_MAX => Err("not a request"),
        None if received.iter().all(|byte| is_token(*byte)) => Ok(()),
        Some(at) if (1..=METHOD_MAX).contains(&at) && received[..at].iter().all(|byte| is_token(*byte)) => {
            Ok(())
        }
        None | Some(_) => Err("not a request"),
    }
}

/// The next line without its CRLF, or nothing when it is not there in whole.
fn next_line<'a>(rest: &mut &'a [u8]) -> Result<Option<&'a [u8]>, &'static str> {
    let Some(end) = rest.iter().position(|byte| matches!(byte, b'\r' | b'\n')) else {
        return Ok(None);
    };
    match &rest[end..] {
        [b'\r'] => Ok(None),
        [b'\r', b'\n', ..] => {
            let line = &rest[..end];
            *rest = &rest[end + 2..];
            Ok(Some(line))
        }
        _ => Err("a bare CR or LF"),
    }
}

struct Line {
    method: String,
    target: String,
    /// Of an absolute URI.
    authority: Option<String>,
    minor: u8,
}

fn request_line(line: &[u8], wanted: Wanted) -> Result<Line, &'static str> {
    let mut parts = line.split(|byte| *byte == b' ');
    let (Some(method), Some(target), Some(version), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err("a broken request line");
    };
    let minor = match version {
        b"HTTP/1.1" => 1,
        b"HTTP/1.0" => 0,
        b"HTTP/2.0" => return Err("HTTP/2 in clear"),
        _ => return Err("not an HTTP/1.x request"),
    };
    if method.is_empty() || method.len() > METHOD_MAX || !method.iter().all(|byte| is_token(*byte)) {
        return Err("a broken method");
    }
    let line = |target: String, authority| Line {
        method: text(method),
        target,
        authority,
        minor,
    };
    match (method.eq_ignore_ascii_case(b"CONNECT"), wanted) {
        (true, Wanted::Request | Wanted::Scheme(_)) => return Err("CONNECT"),
        (false, Wanted::Connect) => return Err("not CONNECT"),
        (true, Wanted::Connect) => {
            let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b".-_:[]".contains(byte);
            if target.is_empty() || !target.iter().all(plain) {
                return Err("a broken authority");
            }
            return Ok(line(text(target), None));
        }
        (false, Wanted::Request | Wanted::Scheme(_)) => {}
    }
    if !target.iter().all(u8::is_ascii_graphic) {
        return Err("a broken request target");
    }
    let asterisk = target == b"*" && method == b"OPTIONS";
    if target.starts_with(b"/") || asterisk {
        return Ok(line(text(target), None));
    }
    let Wanted::Scheme(scheme) = wanted else {
        return Err("an absolute URI as request target");
    };
    let (authority, path) = absolute(&text(target), scheme)?;
    Ok(line(path, Some(authority)))
}

/// Authority and path of an absolute URI. Nothing may stand between them that some parsers take for a part of either.
fn absolute(target: &str, scheme: &str) -> Result<(String, String), &'static str> {
    let (found, rest) = target
        .split_once("://")
        .ok_or("neither a path nor an absolute URI as request target")?;
    if !found.eq_ignore_ascii_case(scheme) {
        return Err("an absolute URI of another scheme");
    }
    let end = rest.find('/').unwrap_or(rest.len());
    let (authority, path) = rest.split_at(end);
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b".-_:[]".contains(&byte);
    if authority.is_empty() || !authority.bytes().all(plain) {
        return Err("a broken absolute URI");
    }
    let path = if path.is_empty() { "/" } else { path };
    Ok((authority.to_owned(), path.to_owned()))
}

fn field(line: &[u8]) -> Result<(String, Vec<u8>), &'static str> {
    let colon = line
        .iter()
        .position(|byte| *byte == b':')
        .ok_or("a field without a colon")?;
    let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
    // Also catches a continued line (it begins with a blank) and a blank before the colon.
    if name.is_empty() || !name.iter().all(|byte| is_token(*byte)) {
        return Err("a broken field name");
    }
    let plain = |byte: &u8| matches!(byte, b'\t' | b' '..=b'~' | 0x80..);
    if !value.iter().all(plain) {
        return Err("a control character in a field");
    }
    Ok((text(name), value.to_vec()))
}

fn framing(fields: &[(String, Vec<u8>)], minor: u8) -> Result<Framing, &'static str> {
    let mut lengths = values(fields, "content-length");
    let mut encodings = values(fields, "transfer-encoding");
    match (lengths.next(), encodings.next()) {
        (None, None) => Ok(Framing::Nothing),
        (Some(_), Some(_)) => Err("both Content-Length and Transfer-Encoding"),
        (Some(length), None) => {
            if lengths.next().is_some() {
                return Err("two Content-Length fields");
            }
            if length.is_empty() || length.len() > 15 || !length.iter().all(u8::is_ascii_digit) {
                return Err("a broken Content-Length");
            }
            match text(length).parse() {
                Ok(0) => Ok(Framing::Nothing),
                Ok(length) => Ok(Framing::Length(length)),
                Err(_) => Err("a broken Content-Length"),
            }
        }
        (None, Some(encoding)) => {
            if minor == 0 || encodings.next().is_some() || !encoding.eq_ignore_ascii_case(b"chunked") {
                return Err("a Transfer-Encoding other than chunked");
            }
            Ok(Framing::Chunked)
        }
    }
}

fn host(fields: &[(String, Vec<u8>)]) -> Result<Host, &'static str> {
    let mut hosts = values(fields, "host");
    match (hosts.next(), hosts.next()) {
        (Some(host), None) => Host::parse(host),
        (None | Some(_), _) => Err("not exactly one Host field"),
    }
}

impl Host {
    /// Reads the value of a Host field, or an authority (RFC 9110 7.2).
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(host: &[u8]) -> Result<Self, &'static str> {
        let plain = |byte: &u8| {
            byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_' | b':' | b'[' | b']')
        };
        if host.is_empty() || !host.iter().all(plain) {
            return Err("a broken Host field");
        }
        let host = text(host);
        if let Some((inside, after)) = host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            let address: Ipv6Addr = inside
                .parse()
                .map_err(|_not_one| "a Host field that is not an address")?;
            let port = match after.strip_prefix(':') {
                Some(digits) => Some(port_of(digits)?),
                None if after.is_empty() => None,
                None => return Err("a broken Host field"),
            };
            return Ok(Self {
                name: None,
                address: Some(address.into()),
                port,
            });
        }
        let (name, port) = match host.split_once(':') {
            None => (host.as_str(), None),
            Some((name, digits)) => (name, Some(port_of(digits)?)),
        };
        if let Ok(address) = name.parse::<Ipv4Addr>() {
            return Ok(Self {
                name: None,
                address: Some(address.into()),
                port,
            });
        }
        match DomainName::parse(name) {
            Ok(name) => Ok(Self {
                name: Some(name),
                address: None,
                port,
            }),
            Err(_) => Err("a Host field that is not a name"),
        }
    }
}

fn port_of(digits: &str) -> Result<u16, &'static str> {
    let plain = !digits.is_empty() && digits.len() <= 5 && digits.bytes().all(|byte| byte.is_ascii_digit());
    let port = if plain { digits.parse().ok() } else { None };
    port.ok_or("a broken port in the Host field")
}

fn values<'a>(fields: &'a [(String, Vec<u8>)], name: &'a str) -> impl Iterator<Item = &'a [u8]> {
    fields
        .iter()
        .filter(move |(field, _)| field.eq_ignore_ascii_case(name))
        .map(|(_, value)| value.as_slice())
}

fn tokens(value: &[u8]) -> Vec<String> {
    value
        .split(|byte| *byte == b',')
        .map(|token| text(token.trim_ascii()).to_ascii_lowercase())
        .collect()
}

fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// Latin-1, so that no byte is lost; callers have checked what they need to be ASCII.
fn text(bytes: &[u8]) -> String {
    bytes.iter().copied().map(char::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole(request: &str) -> Head {
        match read(request.as_bytes()) {
            Reading::Complete(head) => head,
            Reading::Incomplete | Reading::Malformed(_) => {
                panic!("{request:?}: {:?}", read(request.as_bytes()))
            }
        }
    }

    #[test]
    fn a_head_is_found_however_it_is_cut() {
        let request = "POST /a?b HTTP/1.1\r\nHost: OK.test:80\r\nContent-Length: 3\r\n\r\nabc";
        let length = request.len() - 3;
        for end in 0..length {
            assert_eq!(
                read(&request.as_bytes()[..end]),
                Reading::Incomplete,
                "cut at {end}"
            );
        }
        let head = whole(request);
        assert_eq!((head.length, head.framing), (length, Framing::Length(3)));
        assert_eq!(head.host.name.as_ref().map(DomainName::as_str), Some("ok.test"));
        assert_eq!(head.host.port, Some(80));
    }

    #[test]
    fn a_method_that_is_too_long_is_none_however_it_is_cut() {
        let request = format!(
            "{} / HTTP/1.1\r\nHost: ok.test\r\n\r\n",
            "G".repeat(METHOD_MAX + 1)
        );
        for end in METHOD_MAX + 1..=request.len() {
            let reading = read(&request.as_bytes()[..end]);
            assert!(
                matches!(reading, Reading::Malformed(_)),
                "cut at {end}: {reading:?}"
            );
        }
        whole(&request[1..]);
    }

    #[test]
    fn an_address_as_host_is_an_address_and_not_a_name() {
        let head = whole("GET / HTTP/1.0\r\nHost: 203.0.113.10:8080\r\n\r\n");
        assert_eq!(head.host.name, None);
        assert_eq!(head.host.address, Some([203, 0, 113, 10].into()));
        for (host, port) in [("[2001:db8::10]", None), ("[2001:DB8:0::10]:8080", Some(8080))] {
            let head = whole(&format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n"));
            assert_eq!(head.host.name, None);
            assert_eq!(head.host.address, "2001:db8::10".parse().ok());
            assert_eq!(head.host.port, port);
        }
        for host in [
            "[2001:db8::10",
            "[]",
            "[x]",
            "[::1]8080",
            "[::1]:",
            "[::1]]",
            "a[::1]",
            "2001:db8::10",
            "[203.0.113.10]",
        ] {
            let request = format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n");
            let read = read(request.as_bytes());
            assert!(matches!(read, Reading::Malformed(_)), "{host}: {read:?}");
        }
    }

    #[test]
    fn connect_is_read_only_where_it_is_served() {
        let request = b"CONNECT sandbox:5432 HTTP/1.1\r\nHost: sandbox:5432\r\nX-Tunnel-Token: t\r\n\r\n";
        assert_eq!(read(request), Reading::Malformed("CONNECT"));
        let Reading::Complete(head) = read_connect(request) else {
            panic!("{:?}", read_connect(request))
        };
        assert_eq!((head.target(), head.length), ("sandbox:5432", request.len()));
        assert_eq!(head.values("x-tunnel-token").collect::<Vec<_>>(), [b"t"]);
        for request in [
            "GET / HTTP/1.1\r\nHost: a.test\r\n\r\n",
            "CONNECT /path HTTP/1.1\r\nHost: a.test\r\n\r\n",
        ] {
            assert!(
                matches!(read_connect(request.as_bytes()), Reading::Malformed(_)),
                "{request}"
            );
        }
    }

    #[test]
    fn an_upgrade_is_one_to_another_protocol_than_http() {
        let asks = |fields: &str| {
            whole(&format!("GET / HTTP/1.1\r\nHost: a.test\r\n{fields}\r\n")).asks_for_upgrade()
        };
        assert!(asks("Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n"));
        assert!(asks("Connection: upgrade\r\nUpgrade: my-protocol/1\r\n"));
        for fields in [
            "",
            "Upgrade: websocket\r\n",
            "Connection: upgrade\r\n",
            "Connection: upgrade, http2-settings\r\nUpgrade: h2c\r\n",
            "Connection: upgrade\r\nUpgrade: websocket, H2C\r\n",
            "Connection: upgrade\r\nUpgrade: HTTP/2.0\r\n",
        ] {
            assert!(!asks(fields), "{fields}");
        }
    }

    #[test]
    fn what_two_parsers_could_read_in_two_ways_is_malformed() {
        for (what, request) in [
            (
                "two hosts",
                "GET / HTTP/1.1\r\nHost: ok.test\r\nHost: evil.test\r\n\r\n",
            ),
            ("no host", "GET / HTTP/1.1\r\n\r\n"),
            ("empty host", "GET / HTTP/1.1\r\nHost:\r\n\r\n"),
            (
                "user information",
                "GET / HTTP/1.1\r\nHost: ok.test@evil.test\r\n\r\n",
            ),
            (
                "user information and port",
                "GET / HTTP/1.1\r\nHost: ok.test:443@evil.test\r\n\r\n",
            ),
            ("a fragment", "GET / HTTP/1.1\r\nHost: ok.test#evil\r\n\r\n"),
            (
                "a tab in the host",
                "GET / HTTP/1.1\r\nHost: ok.test\tevil\r\n\r\n",
            ),
            ("an empty port", "GET / HTTP/1.1\r\nHost: ok.test:\r\n\r\n"),
            ("a huge port", "GET / HTTP/1.1\r\nHost: ok.test:65536\r\n\r\n"),
            (
                "absolute URI",
                "GET http://evil.test/ HTTP/1.1\r\nHost: ok.test\r\n\r\n",
            ),
            (
                "CONNECT",
                "CONNECT ok.test:443 HTTP/1.1\r\nHost: ok.test:443\r\n\r\n",
            ),
            (
                "length and chunks",
                "POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
            ),
            (
                "two lengths",
                "POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n",
            ),
            (
                "a list of lengths",
                "POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 1, 1\r\n\r\n",
            ),
            (
                "a signed length",
                "POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: +1\r\n\r\n",
            ),
            (
                "other encodings",
                "POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
            ),
            (
                "chunks in 1.0",
                "POST / HTTP/1.0\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n",
            ),
            (
                "a blank before the colon",
                "GET / HTTP/1.1\r\nHost : ok.test\r\n\r\n",
            ),
            (
                "a continued line",
                "GET / HTTP/1.1\r\nHost: ok.test\r\n evil.test\r\n\r\n",
            ),
            ("a bare LF", "GET / HTTP/1.1\nHost: ok.test\n\n"),
            ("a bare CR", "GET / HTTP/1.1\r\nHost: ok.test\rX: y\r\n\r\n"),
            ("a NUL", "GET / HTTP/1.1\r\nHost: ok.test\r\nX: a\0b\r\n\r\n"),
            (
                "a hidden host",
                "GET / HTTP/1.1\r\nHost: ok.test\r\nConnection: Host\r\n\r\n",
            ),
            ("four words", "GET / / HTTP/1.1\r\nHost: ok.test\r\n\r\n"),
            ("HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
            ("junk", "\u{1}\u{2}junk"),
            (
                "SSH",
                "SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3 and some more words",
            ),
        ] {
            let reading = read(request.as_bytes());
            if what == "SSH" {
                assert!(!matches!(reading, Reading::Complete(_)));
            } else {
                assert!(matches!(reading, Reading::Malformed(_)), "{what}: {reading:?}");
            }
        }
        let many = format!(
            "GET / HTTP/1.1\r\nHost: ok.test\r\n{}\r\n",
            "X: y\r\n".repeat(101)
        );
        assert!(matches!(read(many.as_bytes()), Reading::Malformed(_)));
    }

    #[test]
    fn an_absolute_target_is_read_where_it_says_what_the_host_field_says() {
        let read = |line: &str| {
            let head = format!("{line} HTTP/1.1\r\nHost: ok.test:8080\r\n\r\n");
            assert!(!matches!(read(head.as_bytes()), Reading::Complete(_)), "{line}");
            read_for(head.as_bytes(), "http")
        };
        for (line, path) in [
            ("GET http://ok.test:8080/a?b", "/a?b"),
            ("GET HTTP://OK.test:8080", "/"),
        ] {
            let Reading::Complete(head) = read(line) else {
                panic!("{line}: {:?}", read(line))
            };
            assert_eq!(head.target(), path);
            assert_eq!(head.host.port, Some(8080));
        }
        for line in [
            "GET http://evil.test:8080/a",
            "GET http://ok.test/a",
            "GET https://ok.test:8080/a",
            "GET http://ok.test:8080@evil.test/a",
            "GET http://ok.test:8080?@evil.test/a",
            "GET http://ok.test:8080#/a",
            "GET http:///a",
            "GET http:ok.test:8080/a",
            "GET ok.test:8080",
            "GET ok.test/a?http://ok.test:8080/",
            "CONNECT ok.test:8080",
        ] {
            assert!(
                matches!(read(line), Reading::Malformed(_)),
                "{line}: {:?}",
                read(line)
            );
        }
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_can_panic_the_reader(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200)) {
            read(&bytes);
            read(&[b"GET / HTTP/1.1\r\n", &bytes[..]].concat());
        }
    }
}
