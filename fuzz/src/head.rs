//! Heads of HTTP requests: they are read like other parsers do.

use netd::egress::sniff::{Spoken, read as sniffed};
use sandgate_relay::http1::head::{Framing, Head, Reading, read, read_for};

use crate::bytes::says_the_same_of_every_beginning;

/// Fields of httparse: more than are taken.
const FIELDS: usize = 128;

pub(crate) fn check(data: &[u8]) {
    keeps_the_laws(data, read);
    let absolute = |bytes: &[u8]| read_for(bytes, "http");
    keeps_the_laws(data, absolute);
    if let Some(Spoken::Http(head)) = sniffed(data) {
        assert_eq!(absolute(data), Reading::Complete(head));
    }
}

fn keeps_the_laws(data: &[u8], reader: impl Fn(&[u8]) -> Reading) {
    let said = says_the_same_of_every_beginning(data, |bytes| match reader(bytes) {
        Reading::Incomplete => None,
        // What is wrong with it may have several names.
        Reading::Malformed(_) => Some(Reading::Malformed("")),
        said @ Reading::Complete(_) => Some(said),
    });
    let Some(Reading::Complete(head)) = said else {
        return;
    };
    same_to_httparse(data, &head, head.length);
}

/// What httparse, and with it hyper, makes of the bytes, if it takes them at all.
pub(crate) fn same_to_httparse(bytes: &[u8], head: &Head, length: usize) {
    let mut fields = [httparse::EMPTY_HEADER; FIELDS];
    let mut request = httparse::Request::new(&mut fields);
    match request.parse(bytes) {
        Ok(httparse::Status::Complete(end)) => assert_eq!(end, length, "the head ends elsewhere"),
        Ok(httparse::Status::Partial) => panic!("the head has not ended"),
        // Refused is not misread.
        Err(_) => return,
    }
    assert_eq!(request.method, Some(head.method()));
    let values: Vec<&[u8]> = request
        .headers
        .iter()
        .map(|field| field.value.trim_ascii())
        .collect();
    assert_eq!(values, head.field_values().collect::<Vec<_>>());
    let of = |name: &str| -> Vec<&[u8]> {
        let named = request
            .headers
            .iter()
            .filter(|field| field.name.eq_ignore_ascii_case(name));
        named.map(|field| field.value).collect()
    };
    let [host] = of("host")[..] else {
        panic!("not one Host field")
    };
    let target = request.path.expect("a target");
    let path = match target.split_once("://").filter(|_| !target.starts_with('/')) {
        None => target,
        Some((_, rest)) => {
            let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
            assert!(
                authority.as_bytes().eq_ignore_ascii_case(host.trim_ascii()),
                "{authority} is not the Host"
            );
            if path.is_empty() { "/" } else { path }
        }
    };
    assert_eq!(path, head.target());
    let framing = match (
        of("content-length").as_slice(),
        of("transfer-encoding").as_slice(),
    ) {
        ([], []) => Framing::Nothing,
        ([length], []) => match std::str::from_utf8(length).map(|text| text.trim().parse()) {
            Ok(Ok(0)) => Framing::Nothing,
            Ok(Ok(length)) => Framing::Length(length),
            other => panic!("{other:?}"),
        },
        ([], [encoding]) if encoding.trim_ascii().eq_ignore_ascii_case(b"chunked") => Framing::Chunked,
        other => panic!("{other:?}"),
    };
    assert_eq!(framing, head.framing);
}
