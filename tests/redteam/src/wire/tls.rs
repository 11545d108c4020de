//! The beginning of TLS (RFC 8446, 4.1.2): a ClientHello with every part free. Servers answer it; nothing more of the
//! handshake is needed to know that one was reached.

/// A ClientHello.
#[derive(Debug, Clone, Default)]
pub struct Hello {
    /// The server names of its extension, with their types; none: no such extension.
    pub names: Vec<(u8, Vec<u8>)>,
    /// A second extension of the same kind, with this name.
    pub second: Option<Vec<u8>>,
    /// Other extensions: their types and data.
    pub others: Vec<(u16, Vec<u8>)>,
    /// It offers no key, so that the server asks for another hello.
    pub keyless: bool,
}

/// Largest record.
const RECORD: usize = 16 * 1024;
/// X25519 among the groups.
const X25519: u16 = 0x001d;

impl Hello {
    /// For this server.
    pub fn to(name: &str) -> Self {
        Self {
            names: vec![(0, name.as_bytes().to_vec())],
            ..Self::default()
        }
    }

    /// The same with a further extension.
    #[must_use]
    pub fn with(mut self, kind: u16, data: &[u8]) -> Self {
        self.others.push((kind, data.to_vec()));
        self
    }

    /// The same larger by so many bytes.
    #[must_use]
    pub fn padded(self, by: usize) -> Self {
        self.with(21, &vec![0; by])
    }

    /// The handshake message.
    pub fn message(&self) -> Vec<u8> {
        let mut extensions = Vec::new();
        if !self.names.is_empty() {
            extensions.extend(extension(0, &server_names(&self.names)));
        }
        if let Some(name) = &self.second {
            extensions.extend(extension(0, &server_names(&[(0, name.clone())])));
        }
        // Versions 1.3 and 1.2, X25519 and P-256, the usual signatures, uncompressed points.
        extensions.extend(extension(43, &[4, 3, 4, 3, 3]));
        extensions.extend(extension(10, &[0, 4, 0, 0x1d, 0, 0x17]));
        extensions.extend(extension(13, &[0, 8, 4, 3, 8, 4, 4, 1, 5, 3]));
        extensions.extend(extension(11, &[1, 0]));
        extensions.extend(extension(45, &[1, 1]));
        let key = if self.keyless {
            Vec::new()
        } else {
            // Every string of 32 bytes is a public key; this is the base point.
            let mut key = [0; 32];
            key[0] = 9;
            [&X25519.to_be_bytes()[..], &counted(&key)].concat()
        };
        extensions.extend(extension(51, &counted(&key)));
        for (kind, data) in &self.others {
            extensions.extend(extension(*kind, data));
        }
        let mut body = vec![3, 3];
        body.extend([0x52; 32]);
        body.push(32);
        body.extend([0x54; 32]);
        body.extend(counted(&[0x13, 1, 0x13, 2, 0x13, 3, 0xc0, 0x2b, 0xc0, 0x2f]));
        body.extend([1, 0]);
        body.extend(counted(&extensions));
        let length = u32::try_from(body.len()).unwrap_or(0).to_be_bytes();
        [&[1, length[1], length[2], length[3]][..], &body].concat()
    }

    /// The message in records.
    pub fn bytes(&self) -> Vec<u8> {
        self.in_records_of(RECORD)
    }

    /// The message in records of so many bytes.
    pub fn in_records_of(&self, size: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        for part in self.message().chunks(size.clamp(1, RECORD)) {
            bytes.extend([22, 3, 1]);
            bytes.extend(counted(part));
        }
        bytes
    }
}

/// A list of server names (RFC 6066, 3).
fn server_names(names: &[(u8, Vec<u8>)]) -> Vec<u8> {
    let list: Vec<u8> = names
        .iter()
        .flat_map(|(kind, name)| [&[*kind][..], &counted(name)].concat())
        .collect();
    counted(&list)
}

fn extension(kind: u16, data: &[u8]) -> Vec<u8> {
    [&kind.to_be_bytes()[..], &counted(data)].concat()
}

/// With its length before it.
fn counted(data: &[u8]) -> Vec<u8> {
    let length = u16::try_from(data.len()).unwrap_or(u16::MAX);
    [&length.to_be_bytes()[..], data].concat()
}
