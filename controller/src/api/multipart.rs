//! `multipart/form-data` (RFC 7578), read as it comes: of a part's content no more is held than arrived at once.

use std::time::Duration;

use axum::body::Body;
use bytes::{Buf as _, Bytes, BytesMut};
use http::{HeaderMap, header};
use http_body_util::BodyExt as _;
use memchr::memmem::Finder;

use crate::service::ServiceError;

/// How long a body may stand still. The agent waits longer.
const STALL: Duration = Duration::from_secs(30);
/// Longest head of a part, and longest text before the first one, in bytes.
const MAX_HEAD: usize = 16 * 1024;
/// Longest boundary (RFC 2046, 5.1.1).
const MAX_BOUNDARY: usize = 70;

/// A body of several parts. After an error nothing more is read from it.
pub(super) struct Multipart<'a> {
    body: &'a mut Body,
    buffer: BytesMut,
    /// What stands before every part and behind the last one: a line break, two hyphens, the boundary.
    delimiter: Finder<'static>,
    place: Place,
}

/// What comes next in the body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Text of no part, until a delimiter.
    Outside,
    /// A part's content, until a delimiter.
    Content,
    /// What stands behind a delimiter.
    Behind,
    /// Nothing of interest.
    End,
}

/// What a part says of itself.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) name: String,
    pub(super) file_name: Option<String>,
}

impl<'a> Multipart<'a> {
    /// A body with its head.
    pub(super) fn new(headers: &HeaderMap, body: &'a mut Body) -> Result<Self, ServiceError> {
        let Some(boundary) = boundary(headers) else {
            return Err(invalid(
                "content-type",
                "expected multipart/form-data with a boundary",
            ));
        };
        let delimiter = format!("\r\n--{boundary}");
        Ok(Self {
            body,
            // The first delimiter may stand at the very beginning.
            buffer: BytesMut::from("\r\n"),
            delimiter: Finder::new(delimiter.as_bytes()).into_owned(),
            place: Place::Outside,
        })
    }

    /// The next part; none after the last. What is left of the present one is skipped.
    pub(super) async fn next(&mut self) -> Result<Option<Head>, ServiceError> {
        let head = self.advance().await;
        if !matches!(head, Ok(Some(_))) {
            self.place = Place::End;
        }
        head
    }

    /// The next bytes of the present part; none after the last.
    pub(super) async fn bytes(&mut self) -> Result<Option<Bytes>, ServiceError> {
        if self.place != Place::Content {
            return Ok(None);
        }
        let bytes = self.until_delimiter().await;
        if bytes.is_err() {
            self.place = Place::End;
        }
        bytes
    }

    /// The present part as a text of at most `most` bytes.
    pub(super) async fn text(&mut self, most: usize) -> Result<Option<String>, ServiceError> {
        let mut text = Vec::new();
        while let Some(bytes) = self.bytes().await? {
            if text.len() + bytes.len() > most {
                return Ok(None);
            }
            text.extend_from_slice(&bytes);
        }
        Ok(String::from_utf8(text).ok())
    }

    async fn advance(&mut self) -> Result<Option<Head>, ServiceError> {
        let mut skipped = 0;
        while matches!(self.place, Place::Outside | Place::Content) {
            let Some(bytes) = self.until_delimiter().await? else {
                break;
            };
            skipped += bytes.len();
            if self.place == Place::Outside && skipped > MAX_HEAD {
                return Err(invalid("", "the body does not begin with its boundary"));
            }
        }
        if self.place == Place::End {
            return Ok(None);
        }
        self.at_least(2).await?;
        if self.buffer.starts_with(b"--") {
            return Ok(None);
        }
        // Blanks are allowed behind a boundary.
        while matches!(self.buffer.first(), Some(b' ' | b'\t')) {
            self.buffer.advance(1);
            self.at_least(2).await?;
        }
        if !self.buffer.starts_with(b"\r\n") {
            return Err(invalid("", "something else follows the boundary"));
        }
        // The line break stays, so that a head without lines ends like any other.
        let blank = Finder::new(b"\r\n\r\n");
        let end = loop {
            if let Some(end) = blank.find(&self.buffer) {
                break end;
            }
            if self.buffer.len() > MAX_HEAD {
                return Err(invalid("", "the head of a part is too long"));
            }
            self.fill().await?;
        };
        if end > MAX_HEAD {
            return Err(invalid("", "the head of a part is too long"));
        }
        let lines = self.buffer.split_to(end);
        self.buffer.advance(4);
        let head = head(&lines).ok_or_else(|| invalid("", "a part has no name"))?;
        self.place = Place::Content;
        Ok(Some(head))
    }

    /// Bytes before the next delimiter; none when it is there, and behind it is what comes next.
    async fn until_delimiter(&mut self) -> Result<Option<Bytes>, ServiceError> {
        let length = self.delimiter.needle().len();
        loop {
            match self.delimiter.find(&self.buffer) {
                Some(0) => {
                    self.buffer.advance(length);
                    self.place = Place::Behind;
                    return Ok(None);
                }
                Some(end) => return Ok(Some(self.buffer.split_to(end).freeze())),
                None => {}
            }
            // The last bytes may be the beginning of a delimiter.
            let certain = (self.buffer.len() + 1).saturating_sub(length);
            if certain > 0 {
                return Ok(Some(self.buffer.split_to(certain).freeze()));
            }
            self.fill().await?;
        }
    }

    async fn at_least(&mut self, length: usize) -> Result<(), ServiceError> {
        while self.buffer.len() < length {
            self.fill().await?;
        }
        Ok(())
    }

    async fn fill(&mut self) -> Result<(), ServiceError> {
        loop {
            match tokio::time::timeout(STALL, self.body.frame()).await {
                Ok(Some(Ok(frame))) => match frame.into_data() {
                    Ok(bytes) if !bytes.is_empty() => {
                        self.buffer.extend_from_slice(&bytes);
                        return Ok(());
                    }
                    Ok(_) | Err(_) => {}
                },
                Ok(None) => return Err(invalid("", "the body ends before its last boundary")),
                Ok(Some(Err(error))) => {
                    tracing::debug!(%error, "a body broke off");
                    return Err(invalid("", "the body broke off"));
                }
                Err(_elapsed) => return Err(invalid("", "the body stood still")),
            }
        }
    }
}

pub(super) fn invalid(field: &str, message: &str) -> ServiceError {
    ServiceError::Invalid {
        field: field.to_owned(),
        message: message.to_owned(),
    }
}

fn boundary(headers: &HeaderMap) -> Option<String> {
    let text = headers.get(header::CONTENT_TYPE)?.to_str().ok()?;
    let (kind, rest) = text.split_once(';')?;
    if !kind.trim().eq_ignore_ascii_case("multipart/form-data") {
        return None;
    }
    let boundary = parameter(rest, "boundary")?;
    let fits = (1..=MAX_BOUNDARY).contains(&boundary.len())
        && boundary.bytes().all(|byte| (0x20..0x7f).contains(&byte));
    fits.then_some(boundary)
}

/// Reads the lines of a part's head; none when it has no name.
fn head(lines: &[u8]) -> Option<Head> {
    let lines = std::str::from_utf8(lines).ok()?;
    let disposition = lines.split("\r\n").find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.trim()
            .eq_ignore_ascii_case("content-disposition")
            .then_some(value)
    })?;
    let (kind, rest) = disposition.split_once(';')?;
    if !kind.trim().eq_ignore_ascii_case("form-data") {
        return None;
    }
    Some(Head {
        name: parameter(rest, "name")?,
        file_name: parameter(rest, "filename"),
    })
}

/// A parameter of a header: a word, or a text in quotes in which a backslash stands before what is meant as it is.
fn parameter(text: &str, wanted: &str) -> Option<String> {
    let mut rest = text;
    loop {
        let (name, behind) = rest.split_once('=')?;
        let behind = behind.trim_start();
        let (value, after) = match behind.strip_prefix('"') {
            Some(quoted) => quoted_text(quoted)?,
            None => {
                let (word, after) = behind.split_once(';').unwrap_or((behind, ""));
                (word.trim().to_owned(), after)
            }
        };
        if name.trim_matches([' ', '\t', ';']).eq_ignore_ascii_case(wanted) {
            return Some(value);
        }
        rest = after;
    }
}

/// A text up to its closing quote, and what follows.
fn quoted_text(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut characters = text.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => match characters.next() {
                Some((_, escaped @ ('"' | '\\'))) => value.push(escaped),
                // Names of files have them on some systems.
                Some((_, other)) => value.extend(['\\', other]),
                None => return None,
            },
            other => value.push(other),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use futures_util::stream;
    use http::HeaderValue;
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn headers(content_type: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(header::CONTENT_TYPE, HeaderValue::from_static(content_type))])
    }

    /// Every part of a body that comes in pieces of this size.
    async fn parts(body: &[u8], piece: usize) -> Result<Vec<(Head, Vec<u8>)>, ServiceError> {
        let pieces: Vec<_> = body
            .chunks(piece)
            .map(|piece| Ok::<_, Infallible>(Bytes::copy_from_slice(piece)))
            .collect();
        let mut body = Body::from_stream(stream::iter(pieces));
        let headers = headers("multipart/form-data; boundary=xyz");
        let mut multipart = Multipart::new(&headers, &mut body)?;
        let mut parts = Vec::new();
        while let Some(head) = multipart.next().await? {
            let mut content = Vec::new();
            while let Some(bytes) = multipart.bytes().await? {
                content.extend_from_slice(&bytes);
            }
            parts.push((head, content));
        }
        Ok(parts)
    }

    fn file(name: &str, file_name: Option<&str>) -> Head {
        Head {
            name: name.to_owned(),
            file_name: file_name.map(str::to_owned),
        }
    }

    #[tokio::test]
    async fn parts_are_what_was_sent_in_whatever_pieces_they_come() {
        let body = b"preamble\r\n--xyz\r\nContent-Disposition: form-data; name=\"path\"\r\n\r\n/workspace\r\n--xyz \t\r\n\
            content-disposition:form-data;name=f;filename=\"a \\\"b\\\" c:\\d.txt\"\r\nContent-Type: text/plain\r\n\r\n\
            one\r\n--xy\r\n--x\r\r\n\r\n--xyz\r\nContent-Disposition: form-data; name=\"empty\"; filename=\"e\"\r\n\r\n\
            \r\n--xyz--\r\nepilogue";
        let expected = [
            (file("path", None), b"/workspace".to_vec()),
            (
                file("f", Some("a \"b\" c:\\d.txt")),
                b"one\r\n--xy\r\n--x\r\r\n".to_vec(),
            ),
            (file("empty", Some("e")), Vec::new()),
        ];
        for piece in [1, 2, 3, 7, 64, 10_000] {
            assert_eq!(parts(body, piece).await.expect("parts"), expected, "{piece}");
        }
        assert_eq!(parts(b"--xyz--", 3).await.expect("no parts"), []);
    }

    #[tokio::test]
    async fn what_is_no_form_is_refused() {
        let head = "Content-Disposition: form-data; name=\"f\"";
        for body in [
            String::new(),
            "no boundary at all".to_owned(),
            "x".repeat(10 * MAX_HEAD),
            "--xyz".to_owned(),
            "--xyzzy\r\n\r\n\r\n--xyz--".to_owned(),
            "--xyz\r\n\r\ncontent\r\n--xyz--".to_owned(),
            "--xyz\r\nContent-Disposition: attachment; name=\"f\"\r\n\r\n\r\n--xyz--".to_owned(),
            format!("--xyz\r\n{head}\r\n\r\ncontent"),
            format!("--xyz\r\n{head}\r\n\r\ncontent--xyz--"),
            format!(
                "--xyz\r\nA: {}\r\n{head}\r\n\r\n\r\n--xyz--",
                "a".repeat(MAX_HEAD)
            ),
        ] {
            let refused = parts(body.as_bytes(), 1_000).await;
            assert!(
                matches!(refused, Err(ServiceError::Invalid { .. })),
                "{body:.60}: {refused:?}"
            );
        }
        for content_type in [
            "application/json",
            "multipart/form-data",
            "multipart/form-data; boundary=",
            "multipart/mixed; boundary=xyz",
        ] {
            assert!(boundary(&headers(content_type)).is_none(), "{content_type}");
        }
        let quoted = headers("Multipart/Form-Data; charset=utf-8; boundary=\"a b\"");
        assert_eq!(boundary(&quoted).as_deref(), Some("a b"));
    }

    proptest! {
        #[test]
        fn any_content_survives(content in vec(prop_oneof![Just(b'\r'), Just(b'\n'), Just(b'-'), any::<u8>()], 0..300), piece in 1..50_usize) {
            prop_assume!(Finder::new(b"\r\n--xyz").find(&content).is_none());
            let mut body = b"--xyz\r\nContent-Disposition: form-data; name=\"f\"\r\n\r\n".to_vec();
            body.extend_from_slice(&content);
            body.extend_from_slice(b"\r\n--xyz--\r\n");
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
            let found = runtime.block_on(parts(&body, piece)).expect("parts");
            prop_assert_eq!(found, vec![(file("f", None), content)]);
        }
    }
}
