//! Reads the server name out of a TLS ClientHello (RFC 8446 4.1.2, RFC 6066 3), whatever way it was cut
//! into segments and records. Owns: that one message. Never decrypts, never answers, and never guesses:
//! what does not parse strictly is malformed.

/// What the bytes received so far are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reading {
    /// A ClientHello so far; more bytes are needed.
    Incomplete,
    /// Not the beginning of TLS, or broken; the word says what, for the audit record.
    Malformed(&'static str),
    /// The whole message.
    Complete(ClientHello),
}

/// What a ClientHello says in clear.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientHello {
    /// The server name as sent, one entry, not yet checked for being a name.
    pub server_name: Option<String>,
    /// Whether another name may be hidden.
    pub hides: Hides,
    /// Bytes of the buffer that the records of this message take.
    pub length: usize,
}

/// What a ClientHello hides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Hides {
    /// Nothing.
    Nothing,
    /// A whole ClientHello with another name, or nothing: an outer encrypted ClientHello, and GREASE, which cannot be
    /// told from one (RFC 9849, 6.2).
    Perhaps,
    /// A name, in a form that no client sends for show: the draft before encrypted ClientHello, an inner ClientHello
    /// in clear, or something that is neither.
    Name,
}

/// The first byte of a TLS handshake record.
pub const HANDSHAKE_RECORD: u8 = 22;
const CLIENT_HELLO: u8 = 1;
const RECORD_HEADER: usize = 5;
const RECORD_LIMIT: usize = 1 << 14;
const SERVER_NAME: u16 = 0;
const HOST_NAME: u8 = 0;
const ENCRYPTED_CLIENT_HELLO: u16 = 0xfe0d;
/// Its kind in a ClientHello that is sent in clear.
const OUTER: u8 = 0;
/// The draft that came before encrypted ClientHello.
const ENCRYPTED_SERVER_NAME: u16 = 0xffce;

/// Reads the beginning of a connection. May be called again with more bytes any number of times.
pub fn read(received: &[u8]) -> Reading {
    let mut message = Vec::new();
    let mut at = 0;
    loop {
        let rest = &received[at..];
        if let Some(broken) = broken_record(rest) {
            return Reading::Malformed(broken);
        }
        if rest.len() < RECORD_HEADER {
            return Reading::Incomplete;
        }
        let length = usize::from(u16::from_be_bytes([rest[3], rest[4]]));
        let payload = &rest[RECORD_HEADER..];
        let whole = payload.len() >= length;
        message.extend_from_slice(&payload[..length.min(payload.len())]);
        if let Some(&kind) = message.first()
            && kind != CLIENT_HELLO
        {
            return Reading::Malformed("not a ClientHello");
        }
        if message.len() >= 4 {
            let wanted =
                4 + (usize::from(message[1]) << 16 | usize::from(message[2]) << 8 | usize::from(message[3]));
            if message.len() > wanted {
                return Reading::Malformed("something follows the ClientHello in its record");
            }
            if message.len() == wanted && whole {
                return match body(&message[4..]) {
                    Ok((server_name, hides)) => Reading::Complete(ClientHello {
                        server_name,
                        hides,
                        length: at + RECORD_HEADER + length,
                    }),
                    Err(broken) => Reading::Malformed(broken),
                };
            }
        }
        if !whole {
            return Reading::Incomplete;
        }
        at += RECORD_HEADER + length;
    }
}

/// What is wrong with the record header that `rest` begins with, as far as it is there.
fn broken_record(rest: &[u8]) -> Option<&'static str> {
    match rest {
        [kind, ..] if *kind != HANDSHAKE_RECORD => Some("not a TLS handshake record"),
        [_, major, ..] if *major != 3 => Some("not a TLS record version"),
        [_, _, minor, ..] if *minor > 4 => Some("not a TLS record version"),
        [_, _, _, high, low, ..] => match usize::from(u16::from_be_bytes([*high, *low])) {
            0 => Some("an empty handshake record"),
            length if length > RECORD_LIMIT => Some("a record over 16 KiB"),
            _ => None,
        },
        _ => None,
    }
}

type Said = (Option<String>, Hides);

fn body(message: &[u8]) -> Result<Said, &'static str> {
    let mut reader = Reader(message);
    reader.take(2)?; // legacy_version: its meaning is in supported_versions, or nowhere.
    reader.take(32)?;
    if reader.vector8()?.len() > 32 {
        return Err("a session id over 32 bytes");
    }
    let ciphers = reader.vector16()?;
    if ciphers.is_empty() || ciphers.len() % 2 != 0 {
        return Err("a broken list of cipher suites");
    }
    if reader.vector8()?.is_empty() {
        return Err("no compression method");
    }
    if reader.0.is_empty() {
        return Ok((None, Hides::Nothing));
    }
    let mut extensions = Reader(reader.vector16()?);
    reader.end()?;

    let mut server_name = None;
    let mut hides = Hides::Nothing;
    while !extensions.0.is_empty() {
        let kind = extensions.u16()?;
        let content = extensions.vector16()?;
        match kind {
            SERVER_NAME if server_name.is_some() => return Err("two server name extensions"),
            SERVER_NAME => server_name = Some(host_name(content)?),
            ENCRYPTED_CLIENT_HELLO if outer(content).is_ok() => hides = hides.max(Hides::Perhaps),
            ENCRYPTED_CLIENT_HELLO | ENCRYPTED_SERVER_NAME => hides = Hides::Name,
            _ => {}
        }
    }
    Ok((server_name, hides))
}

/// Reads an outer encrypted ClientHello (RFC 9849, 5).
fn outer(extension: &[u8]) -> Result<(), &'static str> {
    let mut reader = Reader(extension);
    let kind = reader.take(1)?[0];
    // The cipher suite, and the identity of the configuration.
    reader.take(5)?;
    // Empty after a HelloRetryRequest.
    reader.vector16()?;
    let payload = reader.vector16()?;
    reader.end()?;
    if kind != OUTER || payload.is_empty() {
        return Err("not an outer encrypted ClientHello");
    }
    Ok(())
}

fn host_name(extension: &[u8]) -> Result<String, &'static str> {
    let mut outer = Reader(extension);
    let mut list = Reader(outer.vector16()?);
    outer.end()?;
    let kind = list.take(1)?[0];
    let name = list.vector16()?;
    if kind != HOST_NAME || !list.0.is_empty() {
        return Err("a server name list that is not one host name");
    }
    if name.is_empty() || !name.iter().all(u8::is_ascii_graphic) {
        return Err("a server name that is not text");
    }
    Ok(name.iter().copied().map(char::from).collect())
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8], &'static str> {
        let (taken, rest) = self
            .0
            .split_at_checked(length)
            .ok_or("a ClientHello shorter than it says")?;
        self.0 = rest;
        Ok(taken)
    }

    fn u16(&mut self) -> Result<u16, &'static str> {
        let bytes = self.take(2)?;
        Ok(u16::from_be_bytes([bytes[0], bytes[1]]))
    }

    fn vector8(&mut self) -> Result<&'a [u8], &'static str> {
        let length = usize::from(self.take(1)?[0]);
        self.take(length)
    }

    fn vector16(&mut self) -> Result<&'a [u8], &'static str> {
        let length = usize::from(self.u16()?);
        self.take(length)
    }

    fn end(&self) -> Result<(), &'static str> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err("a ClientHello longer than it says")
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    fn vector16(content: &[u8]) -> Vec<u8> {
        let length = u16::try_from(content.len()).expect("short");
        [&length.to_be_bytes()[..], content].concat()
    }

    fn extension(kind: u16, content: &[u8]) -> Vec<u8> {
        [&kind.to_be_bytes()[..], &vector16(content)].concat()
    }

    fn server_name(name: &str) -> Vec<u8> {
        extension(
            SERVER_NAME,
            &vector16(&[&[HOST_NAME][..], &vector16(name.as_bytes())].concat()),
        )
    }

    fn message(extensions: &[u8]) -> Vec<u8> {
        let mut body = vec![3, 3];
        body.extend([7; 32]);
        body.extend([0]);
        body.extend(vector16(&[0x13, 0x01, 0x13, 0x02]));
        body.extend([1, 0]);
        body.extend(vector16(extensions));
        let length = u32::try_from(body.len()).expect("short").to_be_bytes();
        [&[CLIENT_HELLO], &length[1..], &body[..]].concat()
    }

    fn records(message: &[u8], size: usize) -> Vec<u8> {
        message
            .chunks(size)
            .flat_map(|part| [&[HANDSHAKE_RECORD, 3, 1][..], &vector16(part)].concat())
            .collect()
    }

    /// A ClientHello for `name`, as other tests of this crate send it.
    pub(crate) fn client_hello(name: &str) -> Vec<u8> {
        records(&message(&server_name(name)), 16_384)
    }

    /// A ClientHello for `name` with key shares, GREASE and other extensions before it, of so many bytes in all.
    pub(crate) fn large_client_hello(name: &str, length: usize) -> Vec<u8> {
        let grease = [extension(0x0a0a, &[]), extension(0xfafa, &[0])].concat();
        let others = [grease, server_name(name)].concat();
        let empty = records(&message(&[&extension(51, &[])[..], &others].concat()), 16_384).len();
        let bytes = records(
            &message(&[extension(51, &vec![9; length - empty]), others].concat()),
            16_384,
        );
        assert_eq!(bytes.len(), length, "one record");
        bytes
    }

    fn name_of(reading: Reading) -> Option<String> {
        match reading {
            Reading::Complete(hello) => hello.server_name,
            Reading::Incomplete | Reading::Malformed(_) => panic!("{reading:?}"),
        }
    }

    proptest! {
        #[test]
        fn the_name_is_found_at_every_record_size_and_segmentation(
            size in 1usize..600,
            padding in 0usize..2000,
            name in "[a-z]{1,20}\\.test",
        ) {
            // A large key share before the name, as with post-quantum groups.
            let extensions = [extension(51, &vec![9; padding]), server_name(&name)].concat();
            let bytes = records(&message(&extensions), size);
            for end in 0..bytes.len() {
                prop_assert_eq!(read(&bytes[..end]), Reading::Incomplete, "cut at {}", end);
            }
            prop_assert_eq!(name_of(read(&bytes)), Some(name));
        }

        #[test]
        fn no_bytes_can_panic_the_reader(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            read(&bytes);
            read(&records(&[&[CLIENT_HELLO][..], &bytes].concat(), 50));
        }

        #[test]
        fn a_damaged_hello_never_yields_another_well_formed_name(at in 5usize..120, to in any::<u8>()) {
            let mut bytes = client_hello("ok.test");
            let at = at % bytes.len();
            bytes[at] = to;
            if let Reading::Complete(hello) = read(&bytes) {
                let changed_inside_name = hello.server_name.as_deref().is_some_and(|name| name.len() == 7);
                prop_assert!(hello.server_name.is_none() || changed_inside_name);
            }
        }
    }

    #[test]
    fn grease_hides_nothing_wherever_it_stands() {
        // RFC 8701: sixteen values, the same for extensions and cipher suites.
        for number in 0..16 {
            let grease = extension(0x0a0a + 0x1010 * number, &vec![0; usize::from(number)]);
            for extensions in [
                [grease.clone(), server_name("ok.test")].concat(),
                [server_name("ok.test"), grease].concat(),
            ] {
                let Reading::Complete(hello) = read(&records(&message(&extensions), 16_384)) else {
                    panic!("not read")
                };
                assert_eq!(
                    (hello.server_name.as_deref(), hello.hides),
                    (Some("ok.test"), Hides::Nothing)
                );
            }
        }
    }

    #[test]
    fn early_data_may_follow_in_records_of_its_own() {
        let hello = client_hello("ok.test");
        let bytes = [&hello[..], &[23, 3, 3, 0, 1, 0]].concat();
        let Reading::Complete(read) = read(&bytes) else {
            panic!("not read")
        };
        assert_eq!(
            (read.server_name.as_deref(), read.length),
            (Some("ok.test"), hello.len())
        );
    }

    #[test]
    fn a_hello_without_a_name_or_without_extensions_is_whole() {
        assert_eq!(name_of(read(&records(&message(&[]), 9999))), None);
        let mut bare = message(&[]);
        bare.truncate(bare.len() - 2);
        bare[3] -= 2;
        assert_eq!(name_of(read(&records(&bare, 9999))), None);
    }

    #[test]
    fn what_may_hide_a_name_is_told_from_what_hides_one() {
        // As browsers send it, GREASE or not.
        let outer = |kind: u8, payload: &[u8]| {
            [
                &[kind, 0, 1, 0, 1, 77][..],
                &vector16(&[5; 32]),
                &vector16(payload),
            ]
            .concat()
        };
        let hides = |kind: u16, content: &[u8]| {
            let bytes = records(
                &message(&[server_name("ok.test"), extension(kind, content)].concat()),
                9999,
            );
            let Reading::Complete(hello) = read(&bytes) else {
                panic!("not read")
            };
            hello.hides
        };
        assert_eq!(hides(51, &[0; 40]), Hides::Nothing);
        assert_eq!(
            hides(ENCRYPTED_CLIENT_HELLO, &outer(0, &[9; 144])),
            Hides::Perhaps
        );
        for (kind, content) in [
            (ENCRYPTED_SERVER_NAME, vec![0; 40]),
            (ENCRYPTED_CLIENT_HELLO, vec![1]),
            (ENCRYPTED_CLIENT_HELLO, outer(1, &[9; 144])),
            (ENCRYPTED_CLIENT_HELLO, outer(0, &[])),
            (ENCRYPTED_CLIENT_HELLO, [outer(0, &[9; 144]), vec![0]].concat()),
            (ENCRYPTED_CLIENT_HELLO, vec![]),
        ] {
            assert_eq!(hides(kind, &content), Hides::Name, "{content:?}");
        }
    }

    #[test]
    fn what_is_ambiguous_or_broken_is_malformed() {
        let two_names = [server_name("ok.test"), server_name("evil.test")].concat();
        let entry = |name: &str| [&[HOST_NAME][..], &vector16(name.as_bytes())].concat();
        let two_entries = extension(
            SERVER_NAME,
            &vector16(&[entry("ok.test"), entry("evil.test")].concat()),
        );
        let trailing = [
            message(&server_name("ok.test")),
            message(&server_name("evil.test")),
        ]
        .concat();
        let mut longer = message(&server_name("ok.test"));
        longer.push(0);
        longer[3] += 1;
        for (what, bytes) in [
            ("two extensions", records(&message(&two_names), 9999)),
            ("two names", records(&message(&two_entries), 9999)),
            ("a second message in the record", records(&trailing, 9999)),
            ("bytes after the extensions", records(&longer, 9999)),
            (
                "a NUL in the name",
                records(&message(&server_name("ok.test\0.evil.test")), 9999),
            ),
            ("an empty name", records(&message(&server_name("")), 9999)),
            ("an empty record", vec![HANDSHAKE_RECORD, 3, 1, 0, 0]),
            (
                "an alert between the records",
                [&records(&message(&[]), 20)[..25], &[21, 3, 3, 0, 2, 1, 0]].concat(),
            ),
            ("a server's message", vec![HANDSHAKE_RECORD, 3, 3, 0, 4, 2]),
            ("SSH", b"SSH-2.0-OpenSSH".to_vec()),
        ] {
            assert!(
                matches!(read(&bytes), Reading::Malformed(_)),
                "{what}: {:?}",
                read(&bytes)
            );
        }
    }
}
