//! ClientHellos: cut into any segments and records they say the same; where rustls reads a name, it is the one that is
//! judged; nothing is read beyond the limit.

use netd::egress::{
    hello::{ClientHello, HANDSHAKE_RECORD, Reading, read},
    sniff::{SNIFF_BYTES, Spoken, sniff},
};
use rustls::server::Acceptor;

use crate::bytes::{Arriving, Sizes, run, says_the_same_of_every_beginning};

pub(crate) fn check(data: &[u8]) {
    let said = says_the_same_of_every_beginning(data, |bytes| match read(bytes) {
        Reading::Incomplete => None,
        said @ (Reading::Malformed(_) | Reading::Complete(_)) => Some(said),
    });
    if let Some(Reading::Complete(hello)) = &said {
        assert!(hello.length <= data.len());
        cut_into_other_records(&data[..hello.length], hello);
        ask_rustls(&data[..hello.length], hello);
    }
    sniffed(data, said);
}

/// The message without its records.
fn message(mut records: &[u8]) -> Vec<u8> {
    let mut message = Vec::new();
    while let [_, _, _, high, low, rest @ ..] = records {
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        message.extend_from_slice(&rest[..length]);
        records = &rest[length..];
    }
    message
}

fn cut_into_other_records(records: &[u8], hello: &ClientHello) {
    let message = message(records);
    for seed in [1, records.len() as u64] {
        let mut other = Vec::new();
        for piece in Sizes::new(seed).cut(&message) {
            let length = u16::try_from(piece.len()).expect("a small piece");
            other.extend([HANDSHAKE_RECORD, 3, 1]);
            other.extend(length.to_be_bytes());
            other.extend_from_slice(piece);
        }
        let expected = ClientHello {
            length: other.len(),
            ..hello.clone()
        };
        assert_eq!(read(&other), Reading::Complete(expected));
    }
}

/// A server that reads another name than the one that is judged would be a hole.
fn ask_rustls(mut records: &[u8], hello: &ClientHello) {
    let mut acceptor = Acceptor::default();
    while !records.is_empty() {
        if acceptor.read_tls(&mut records).is_err() {
            return;
        }
        match acceptor.accept() {
            Ok(None) => {}
            Ok(Some(accepted)) => {
                if let Some(name) = accepted.client_hello().server_name() {
                    let ours = hello.server_name.as_deref().unwrap_or_default();
                    assert!(
                        ours.eq_ignore_ascii_case(name),
                        "{ours:?} is judged, {name:?} served"
                    );
                }
                return;
            }
            Err(_) => return,
        }
    }
}

fn sniffed(data: &[u8], said: Option<Reading>) {
    if data.first() != Some(&HANDSHAKE_RECORD) {
        return;
    }
    let mut arriving = Arriving::new(data, Sizes::new(data.len() as u64));
    let beginning = run(sniff(&mut arriving)).expect("no failure");
    assert!(beginning.received.len() <= SNIFF_BYTES && data.starts_with(&beginning.received));
    match (beginning.protocol, said) {
        (Spoken::Tls(sniffed), Some(Reading::Complete(hello))) => assert_eq!(sniffed, hello),
        (Spoken::Unreadable(why), Some(Reading::Malformed(broken))) => assert_eq!(why, broken),
        (Spoken::Unreadable(_), None) => {}
        (sniffed, said) => panic!("{sniffed:?} of {said:?}"),
    }
}
