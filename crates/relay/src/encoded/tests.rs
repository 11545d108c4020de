use std::io::Write as _;

use flate2::{
    Compression, GzBuilder,
    write::{DeflateEncoder, GzEncoder, ZlibEncoder},
};
use http::HeaderValue;
use proptest::{collection::vec, prelude::*};

use super::*;

fn gzip(body: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(body).unwrap();
    encoder.finish().unwrap()
}

fn zlib(body: &[u8]) -> Vec<u8> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(body).unwrap();
    encoder.finish().unwrap()
}

fn bare(body: &[u8]) -> Vec<u8> {
    let mut encoder = DeflateEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(body).unwrap();
    encoder.finish().unwrap()
}

fn decode(coding: Coding, encoded: &[u8], chunk: usize) -> Result<Vec<u8>, EncodedError> {
    let mut decoder = Decoder::new(coding);
    let mut out = Vec::new();
    for chunk in encoded.chunks(chunk) {
        decoder.feed(Bytes::copy_from_slice(chunk));
        while let Some(piece) = decoder.piece()? {
            assert!(!piece.is_empty() && (coding == Coding::Identity || piece.len() <= PIECE));
            out.extend_from_slice(&piece);
        }
    }
    decoder.finish()?;
    Ok(out)
}

proptest! {
    #[test]
    fn every_body_comes_out_as_it_was(
        parts in vec(prop_oneof![vec(any::<u8>(), 0..300), (any::<u8>(), 0..90_000usize).prop_map(|(byte, times)| vec![byte; times])], 0..4),
        chunk in 1..2000usize,
    ) {
        let body = parts.concat();
        prop_assert_eq!(decode(Coding::Gzip, &gzip(&body), chunk), Ok(body.clone()));
        prop_assert_eq!(decode(Coding::Deflate, &zlib(&body), chunk), Ok(body.clone()));
        prop_assert_eq!(decode(Coding::Deflate, &bare(&body), chunk), Ok(body.clone()));
        prop_assert_eq!(decode(Coding::Identity, &body, chunk), Ok(body.clone()));
        // Members one after another, with padding.
        let members: Vec<u8> = parts.iter().flat_map(|part| [gzip(part), vec![0; 3]].concat()).collect();
        prop_assert_eq!(decode(Coding::Gzip, &members, chunk), Ok(body));
    }

    #[test]
    fn no_input_makes_the_decoder_panic_or_run_forever(
        junk in vec(any::<u8>(), 0..400), at in any::<prop::sample::Index>(), bit in 0..8u8, chunk in 1..50usize,
    ) {
        for coding in [Coding::Gzip, Coding::Deflate] {
            let _outcome = decode(coding, &junk, chunk);
        }
        let body = b"a body of which one bit is turned, and the check sum tells";
        let mut encoded = gzip(body);
        let at = at.index(encoded.len());
        encoded[at] ^= 1 << bit;
        let decoded = decode(Coding::Gzip, &encoded, chunk);
        prop_assert!(decoded.is_err() || decoded.as_deref() == Ok(body), "{:?}", decoded);
    }
}

#[test]
fn a_body_that_is_cut_off_is_an_error_at_every_place() {
    let encoded = gzip(b"something that is long enough to be cut");
    for length in 1..encoded.len() {
        assert_eq!(
            decode(Coding::Gzip, &encoded[..length], 7),
            Err(EncodedError::Truncated),
            "{length}"
        );
    }
    assert_eq!(
        decode(Coding::Gzip, b"", 1),
        Ok(Vec::new()),
        "an answer without body"
    );
}

#[test]
fn what_stands_in_a_header_is_skipped() {
    let builder = GzBuilder::new()
        .filename("name")
        .comment("comment")
        .extra(vec![1, 2, 3]);
    let mut encoder = builder.write(Vec::new(), Compression::default());
    encoder.write_all(b"body").unwrap();
    let encoded = encoder.finish().unwrap();
    for chunk in 1..20 {
        assert_eq!(
            decode(Coding::Gzip, &encoded, chunk).as_deref(),
            Ok(b"body".as_slice())
        );
    }
    let mut endless = encoded[..4].to_vec();
    endless.extend_from_slice(&[b'x'; 2 * gzip::LONGEST_HEAD]);
    assert_eq!(decode(Coding::Gzip, &endless, 100), Err(EncodedError::Corrupt));
}

#[test]
fn a_flushed_beginning_is_given_out_before_the_rest_comes() {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(b"data: one\n\n").unwrap();
    encoder.flush().unwrap();
    let mut decoder = Decoder::new(Coding::Gzip);
    decoder.feed(encoder.get_ref().clone().into());
    assert_eq!(
        decoder.piece().unwrap().as_deref(),
        Some(b"data: one\n\n".as_slice())
    );
    assert_eq!(decoder.piece(), Ok(None));
    assert_eq!(decoder.finish(), Err(EncodedError::Truncated));
}

#[test]
fn a_small_body_that_grows_comes_out_in_small_pieces() {
    let encoded = gzip(&vec![0; 64 << 20]);
    assert!(encoded.len() < 80_000);
    let mut decoder = Decoder::new(Coding::Gzip);
    decoder.feed(encoded.into());
    let first = decoder.piece().unwrap().expect("a piece");
    assert!(first.len() <= PIECE);
}

#[test]
fn junk_behind_the_body_is_an_error() {
    let mut encoded = zlib(b"body");
    encoded.push(b'x');
    assert_eq!(decode(Coding::Deflate, &encoded, 100), Err(EncodedError::Corrupt));
    let mut encoded = gzip(b"body");
    encoded.push(b'x');
    assert_eq!(decode(Coding::Gzip, &encoded, 100), Err(EncodedError::Corrupt));
}

#[test]
fn codings_that_are_not_read_are_named() {
    let coding = |lines: &[&'static str]| {
        let mut headers = HeaderMap::new();
        for line in lines {
            headers.append(CONTENT_ENCODING, HeaderValue::from_static(line));
        }
        Coding::of(&headers)
    };
    assert_eq!(coding(&[]), Ok(Coding::Identity));
    assert_eq!(coding(&["identity", "GZip"]), Ok(Coding::Gzip));
    assert_eq!(coding(&["x-gzip"]), Ok(Coding::Gzip));
    assert_eq!(coding(&["deflate, identity"]), Ok(Coding::Deflate));
    for lines in [&["br"][..], &["gzip, br"], &["gzip", "gzip"], &["gzip,deflate"]] {
        assert!(
            matches!(coding(lines), Err(EncodedError::Unsupported(_))),
            "{lines:?}"
        );
    }
}
