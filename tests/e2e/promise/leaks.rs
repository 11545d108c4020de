//! A server that gives the key back: in every form, place and piece.

use std::{
    io::{Read as _, Write as _},
    time::{SystemTime, UNIX_EPOCH},
};

use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE, URL_SAFE_NO_PAD},
};
use bytes::Bytes;
use flate2::{
    Compression,
    read::{MultiGzDecoder, ZlibDecoder},
    write::{DeflateEncoder, GzEncoder, ZlibEncoder},
};
use harness::{mirror::Script, search};
use serde_json::{Value, json};

use super::{
    Promise,
    clients::{CLIENTS, CURL, bytes_to, call, speak},
    fresh,
};

/// Answers that the generator makes; each is asked for in two ways.
const ROUNDS: usize = 160;
/// Answers of one command.
const BATCH: usize = 20;

/// A response as it stood on the wire.
#[derive(Debug)]
struct Response {
    head: String,
    /// Without chunks and compression.
    body: Vec<u8>,
    trailers: String,
}

impl Response {
    fn header(&self, name: &str) -> Option<&str> {
        let mut lines = self.head.lines().filter_map(|line| line.split_once(": "));
        lines
            .find(|(header, _)| header.eq_ignore_ascii_case(name))
            .map(|(_, value)| value)
    }

    #[track_caller]
    fn read(raw: &[u8]) -> Self {
        let shown = || String::from_utf8_lossy(raw).into_owned();
        let end = raw.windows(4).position(|four| four == b"\r\n\r\n");
        let end = end.unwrap_or_else(|| panic!("no head in {}", shown()));
        let head = String::from_utf8_lossy(&raw[..end]).into_owned();
        let mut response = Self {
            head,
            body: raw[end + 4..].to_vec(),
            trailers: String::new(),
        };
        if response.header("transfer-encoding") == Some("chunked") {
            let (body, trailers) =
                dechunk(&response.body).unwrap_or_else(|| panic!("bad chunks in {}", shown()));
            (response.body, response.trailers) = (body, trailers);
        } else if let Some(length) = response.header("content-length") {
            assert_eq!(length, response.body.len().to_string(), "{}", shown());
        }
        let mut decoded = Vec::new();
        match response.header("content-encoding") {
            None | Some("identity") => return response,
            Some("gzip") => MultiGzDecoder::new(&*response.body).read_to_end(&mut decoded),
            Some("deflate") => ZlibDecoder::new(&*response.body).read_to_end(&mut decoded),
            Some(other) => panic!("encoded as {other}: {}", shown()),
        }
        .unwrap_or_else(|error| panic!("{error} in {}", shown()));
        response.body = decoded;
        response
    }
}

fn dechunk(mut rest: &[u8]) -> Option<(Vec<u8>, String)> {
    let mut body = Vec::new();
    loop {
        let end = rest.windows(2).position(|two| two == b"\r\n")?;
        let size = usize::from_str_radix(std::str::from_utf8(&rest[..end]).ok()?.trim(), 16).ok()?;
        rest = &rest[end + 2..];
        if size == 0 {
            return Some((body, String::from_utf8_lossy(rest).into_owned()));
        }
        body.extend_from_slice(rest.get(..size)?);
        rest = rest.get(size..)?.strip_prefix(b"\r\n")?;
    }
}

fn gzip(text: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(text).expect("memory");
    encoder.finish().expect("memory")
}

fn get(host: &str, path: &str) -> Value {
    let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nTE: trailers\r\nConnection: close\r\n\r\n");
    bytes_to(host, request.as_bytes())
}

pub(crate) fn bodies_headers_and_trailers_are_masked(promise: &Promise) {
    let key = promise.key("API_KEY");
    let text = format!("before {key} after");
    let half = "before ".len() + key.len() / 2;
    let halves = || {
        vec![
            Bytes::from(text[..half].to_owned()),
            Bytes::from(text[half..].to_owned()),
        ]
    };
    let bytes: Vec<Bytes> = text.bytes().map(|byte| Bytes::from(vec![byte])).collect();
    let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    let tag = pair("etag", "\"of-the-original\"");
    let scripts = [
        // A body of known length keeps it.
        Script {
            headers: vec![pair("content-length", &text.len().to_string())],
            pieces: halves(),
            ..Script::default()
        },
        Script {
            pieces: halves(),
            ..Script::default()
        },
        Script {
            pieces: bytes,
            ..Script::default()
        },
        Script {
            headers: vec![
                pair("content-encoding", "gzip"),
                tag.clone(),
                pair("digest", "sha-256=x"),
            ],
            pieces: gzip(text.as_bytes())
                .chunks(5)
                .map(Bytes::copy_from_slice)
                .collect(),
            ..Script::default()
        },
        Script {
            headers: vec![
                pair("content-length", &gzip(text.as_bytes()).len().to_string()),
                pair("content-encoding", "gzip"),
            ],
            pieces: vec![Bytes::from(gzip(text.as_bytes()))],
            ..Script::default()
        },
        Script {
            headers: vec![
                pair("x-given-back", &text),
                pair("set-cookie", &format!("key={key}")),
                tag,
            ],
            pieces: vec![Bytes::from_static(b"before  after")],
            trailers: vec![pair("x-after", &text)],
            ..Script::default()
        },
        Script {
            status: 302,
            headers: vec![pair("location", &format!("https://evil.test/?key={key}"))],
            pieces: vec![Bytes::from_static(b"before  after")],
            ..Script::default()
        },
        Script {
            status: 401,
            pieces: halves(),
            ..Script::default()
        },
        Script {
            status: 500,
            pieces: halves(),
            ..Script::default()
        },
    ];
    let mut attempts = Vec::new();
    for script in &scripts {
        for host in ["api.test", "old.test"] {
            let path = fresh("given");
            promise.mirror().script(&path, script.clone());
            attempts.push((get(host, &path), script, path));
        }
    }
    let wire: Vec<Value> = attempts.iter().map(|(attempt, ..)| attempt.clone()).collect();
    for ((attempt, script, path), raw) in attempts.iter().zip(speak(&promise.sandbox, &wire)) {
        let shown = String::from_utf8_lossy(&raw);
        promise.assert_no_key(&shown);
        let response = Response::read(&raw);
        let body = String::from_utf8_lossy(&response.body);
        promise.assert_no_key(&body);
        assert!(
            response.head.starts_with(&format!("HTTP/1.1 {}", script.status)),
            "{attempt}: {shown}"
        );
        assert!(
            body.starts_with("before ") && body.ends_with(" after"),
            "{attempt}: {shown}"
        );
        let plain = script.headers.iter().all(|(name, _)| name != "content-encoding");
        if plain && body.len() > 20 {
            assert_eq!(body.len(), text.len(), "{attempt}: {shown}");
        }
        if !plain {
            // What describes the encoded body is not true of this one.
            assert_eq!(response.header("etag"), None, "{shown}");
            assert_eq!(response.header("digest"), None, "{shown}");
        }
        assert!(
            shown.contains("[redacted:") || body.contains("[redacted:"),
            "{attempt}: {shown}"
        );
        let heard = promise.mirror().only(path);
        let accepted = heard.all("accept-encoding").concat();
        assert!(
            !accepted.contains('*') && !accepted.contains("compress"),
            "{heard:?}"
        );
    }
    let trailers = fresh("given");
    promise.mirror().script(&trailers, scripts[5].clone());
    let raw = speak(&promise.sandbox, &[get("api.test", &trailers)]).remove(0);
    let response = Response::read(&raw);
    assert!(
        response.trailers.contains("x-after: before [redacted:"),
        "{response:?}"
    );
    promise
        .sandbox
        .audited(&json!({ "host": "api.test", "credential": "API_KEY" }));
}

pub(crate) fn what_would_hide_the_key_is_not_asked_for(promise: &Promise) {
    let (sandbox, mirror) = (&promise.sandbox, promise.mirror());
    let path = fresh("asked");
    let answered = call(
        sandbox,
        CURL,
        &format!("https://api.test{path}"),
        &[
            "Accept-Encoding: gzip, compress, x-own, *",
            "Range: bytes=3-9",
            "If-Range: x",
        ],
    );
    assert_eq!(answered.status, 200, "{answered:?}");
    let heard = mirror.only(&path);
    let accepted = heard.all("accept-encoding").concat();
    for foreign in ["compress", "x-own", "*"] {
        assert!(!accepted.contains(foreign), "{heard:?}");
    }
    assert!(heard.all("range").is_empty(), "{heard:?}");
    // An encoding that nobody asked for and netd does not know.
    for encoding in ["x-own", "compress", "gzip, x-own"] {
        let path = fresh("asked");
        mirror.script(
            &path,
            Script {
                headers: vec![("content-encoding".to_owned(), encoding.to_owned())],
                pieces: vec![Bytes::from_static(b"opaque")],
                ..Script::default()
            },
        );
        let answered = call(sandbox, CURL, &format!("https://api.test{path}"), &[]);
        assert_eq!(answered.status, 502, "{encoding}: {answered:?}");
    }
    // Bytes that are not what they are called.
    let path = fresh("asked");
    mirror.script(
        &path,
        Script {
            headers: vec![("content-encoding".to_owned(), "gzip".to_owned())],
            pieces: vec![Bytes::from(format!("plain {}", promise.key("API_KEY")))],
            ..Script::default()
        },
    );
    let output = sandbox.sh(&format!("curl -sS -i --raw --max-time 30 https://api.test{path}"));
    promise.assert_no_key(&output.stdout);
    let path = fresh("asked");
    mirror.script(
        &path,
        Script {
            headers: vec![("alt-svc".to_owned(), "h3=\":443\"".to_owned())],
            pieces: vec![Bytes::from_static(b"elsewhere")],
            ..Script::default()
        },
    );
    let output = sandbox.sh_ok(&format!("curl -sS -i --max-time 30 https://api.test{path}"));
    assert!(!output.to_lowercase().contains("alt-svc"), "{output}");
    assert!(output.ends_with("elsewhere"), "{output}");
}

/// Numbers that look random and are the same for the same seed (xorshift64*).
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let mixed = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33;
        usize::try_from(mixed).expect("31 bits") % end
    }

    fn text(&mut self, longest: usize) -> String {
        const LETTERS: &[u8] = b"abcdefghijklmnopqrstuvwxyz .,;{}\n";
        let length = self.below(longest + 1);
        (0..length)
            .map(|_| char::from(LETTERS[self.below(LETTERS.len())]))
            .collect()
    }

    /// The text in some form.
    fn encode(&mut self, text: &str) -> (String, &'static str) {
        let hex = |byte: u8| format!("{byte:02x}");
        match self.below(13) {
            0 => (text.to_owned(), "plain"),
            1 => (STANDARD.encode(text), "base64"),
            2 => (STANDARD_NO_PAD.encode(text), "base64 without padding"),
            3 => (URL_SAFE.encode(text), "base64url"),
            4 => (URL_SAFE_NO_PAD.encode(text), "base64url without padding"),
            5 => {
                let width = 4 * (1 + self.below(19));
                let lines: Vec<String> = STANDARD
                    .encode(text)
                    .as_bytes()
                    .chunks(width)
                    .map(|line| String::from_utf8_lossy(line).into_owned())
                    .collect();
                (lines.join("\r\n"), "base64 in lines")
            }
            6 => (text.bytes().map(hex).collect(), "hexadecimal"),
            7 => (
                text.bytes().map(|byte| hex(byte).to_uppercase()).collect(),
                "HEXADECIMAL",
            ),
            8 => (
                text.bytes().map(|byte| format!("%{byte:02X}")).collect(),
                "percent, all",
            ),
            9 => {
                let some = text
                    .bytes()
                    .map(|byte| match (byte.is_ascii_alphanumeric(), self.below(4)) {
                        (true, 1..) => char::from(byte).to_string(),
                        (_, 0) => format!("%{byte:02X}"),
                        (..) => format!("%{byte:02x}"),
                    });
                (some.collect(), "percent, mixed")
            }
            10 => (Value::from(text).to_string(), "JSON"),
            11 => {
                let some = text.chars().map(|char| match (char, self.below(4)) {
                    ('"' | '\\', 1..) => format!("\\{char}"),
                    ('/', 1) => "\\/".to_owned(),
                    (_, 0) => format!("\\u{:04x}", u32::from(char)),
                    _ => char.to_string(),
                });
                (format!("\"{}\"", some.collect::<String>()), "JSON, mixed")
            }
            _ => {
                let base64 = STANDARD.encode(text);
                let query = base64.replace('+', "%2B").replace('/', "%2f").replace('=', "%3D");
                (query, "base64 in a query")
            }
        }
    }

    fn pieces(&mut self, bytes: &[u8]) -> Vec<Bytes> {
        let longest = [1, 2, 7, 64, 4096][self.below(5)];
        let (mut pieces, mut rest) = (Vec::new(), bytes);
        while !rest.is_empty() {
            let (piece, next) = rest.split_at(rest.len().min(1 + self.below(longest)));
            pieces.push(Bytes::copy_from_slice(piece));
            rest = next;
        }
        pieces
    }

    fn compress(&mut self, bytes: &[u8]) -> (Vec<u8>, Option<&'static str>) {
        match self.below(6) {
            0 => {
                let mut encoder = ZlibEncoder::new(Vec::new(), Compression::new(1));
                encoder.write_all(bytes).expect("memory");
                (encoder.finish().expect("memory"), Some("deflate"))
            }
            1 => {
                // Some servers send it without the frame around it.
                let mut encoder = DeflateEncoder::new(Vec::new(), Compression::default());
                encoder.write_all(bytes).expect("memory");
                (encoder.finish().expect("memory"), Some("deflate"))
            }
            2 => {
                // Several members are one body.
                let (first, second) = bytes.split_at(self.below(bytes.len() + 1));
                ([gzip(first), gzip(second)].concat(), Some("gzip"))
            }
            3 => (gzip(bytes), Some("gzip")),
            _ => (bytes.to_vec(), None),
        }
    }
}

/// An answer with the key somewhere in it.
fn draw(random: &mut Random, key: &str) -> (Script, String) {
    let mut script = Script::default();
    let (mut body, mut forms) = (random.text(200), Vec::new());
    for _ in 0..=random.below(3) {
        // What surrounds the key within the encoding moves it to another place in it.
        let around = format!("{}{key}{}", random.text(5), random.text(5));
        let (encoded, form) = random.encode(&around);
        forms.push(form);
        body.push_str(&encoded);
        body.push_str(&random.text(100));
    }
    let before = ["", "a", "ab"][random.below(3)];
    let (encoded, form) = random.encode(&format!("{before}{key}"));
    if !encoded.contains(['\r', '\n']) {
        forms.push(form);
        if random.below(2) == 0 {
            script.headers.push(("x-given-back".to_owned(), encoded));
        } else {
            script.trailers.push(("x-given-back".to_owned(), encoded));
        }
    }
    let (bytes, encoding) = random.compress(body.as_bytes());
    if let Some(encoding) = encoding {
        script
            .headers
            .push(("content-encoding".to_owned(), encoding.to_owned()));
    }
    if script.trailers.is_empty() && random.below(2) == 0 {
        script
            .headers
            .push(("content-length".to_owned(), bytes.len().to_string()));
    }
    script.pieces = random.pieces(&bytes);
    let description = format!(
        "{forms:?} {encoding:?} {:?} in {} pieces",
        script.headers,
        script.pieces.len()
    );
    (script, description)
}

#[expect(clippy::print_stdout, reason = "the seed is needed to see a failure again")]
pub(crate) fn however_it_is_written_and_cut_the_key_does_not_come_back(promise: &Promise) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    let seed = std::env::var("SANDGATE_TEST_SEED")
        .ok()
        .and_then(|seed| seed.parse::<u64>().ok());
    let seed: u64 = seed.unwrap_or_else(|| now.subsec_nanos().into());
    println!("SANDGATE_TEST_SEED={seed}");
    let mut random = Random(seed ^ 0x9e37_79b9_7f4a_7c15);
    let mut failures = Vec::new();
    for _ in 0..ROUNDS / BATCH {
        let drawn: Vec<_> = (0..BATCH)
            .map(|_| {
                let (name, host) = [
                    ("API_KEY", "api.test"),
                    ("API_KEY", "old.test"),
                    ("ODD_KEY", "odd.test"),
                ][random.below(3)];
                let (script, description) = draw(&mut random, promise.key(name));
                let path = fresh("random");
                promise.mirror().script(&path, script);
                (name, host, path, description)
            })
            .collect();
        let attempts: Vec<Value> = drawn.iter().map(|(_, host, path, _)| get(host, path)).collect();
        for ((name, host, path, description), raw) in drawn.iter().zip(speak(&promise.sandbox, &attempts)) {
            let response = Response::read(&raw);
            assert!(
                response.head.starts_with("HTTP/1.1 200"),
                "{host}{path} {description}: {response:?}"
            );
            let views = [raw.as_slice(), &response.body, response.trailers.as_bytes()];
            for form in views
                .iter()
                .filter_map(|view| search::sighting(view, promise.key(name)))
            {
                failures.push(format!("{host}{path}: {name}, {form}, of {description}"));
            }
            if !String::from_utf8_lossy(&response.body).contains("[red") {
                failures.push(format!("{host}{path}: no mask, of {description}: {response:?}"));
            }
        }
        // The same again with a client that decodes by itself.
        let (name, client) = CLIENTS[random.below(CLIENTS.len())];
        for (key, host, path, description) in drawn.iter().step_by(5) {
            let answered = call(&promise.sandbox, client, &format!("https://{host}{path}"), &[]);
            assert_eq!(
                answered.status, 200,
                "{name} of {host}{path} {description}: {answered:?}"
            );
            if let Some(form) = search::sighting(answered.body.as_bytes(), promise.key(key)) {
                failures.push(format!("{host}{path} by {name}: {key}, {form}, of {description}"));
            }
        }
    }
    assert!(failures.is_empty(), "seed {seed}: {failures:#?}");
}
