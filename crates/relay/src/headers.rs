//! What a proxy takes out of the headers and queries that pass through it.
//!
//! Owns the lists of names. Never adds a credential: who injects does so after [`strip_hop_by_hop`] and
//! [`strip_client_auth`], so that nothing a client writes can remove what was injected.

use http::{
    HeaderMap, HeaderName, HeaderValue,
    header::{
        ACCEPT_ENCODING, ACCEPT_RANGES, ALT_SVC, AUTHORIZATION, CONNECTION, CONTENT_ENCODING, CONTENT_LENGTH,
        COOKIE, ETAG, HOST, IF_RANGE, PROXY_AUTHORIZATION, RANGE, SEC_WEBSOCKET_EXTENSIONS, TE,
        TRANSFER_ENCODING, UPGRADE,
    },
};

/// Fields that end at the next hop whether `Connection` names them or not (RFC 9110, 7.6.1, and older proxies).
const HOP_BY_HOP: [HeaderName; 7] = [
    CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    HeaderName::from_static("http2-settings"),
    TE,
    TRANSFER_ENCODING,
    UPGRADE,
];

/// Fields that carry a client's credential.
const CLIENT_AUTH: [HeaderName; 7] = [
    AUTHORIZATION,
    PROXY_AUTHORIZATION,
    COOKIE,
    HeaderName::from_static("x-api-key"),
    HeaderName::from_static("api-key"),
    HeaderName::from_static("x-goog-api-key"),
    HeaderName::from_static("private-token"),
];

/// Query parameters that carry a client's credential, in lower case.
const CLIENT_AUTH_PARAMETERS: [&str; 4] = ["key", "api_key", "access_token", "token"];

/// Statements about the bytes of a body that no longer hold once it was decoded (RFC 9110, RFC 9530, RFC 3230).
const BODY_FACTS: [HeaderName; 8] = [
    CONTENT_ENCODING,
    CONTENT_LENGTH,
    ETAG,
    ACCEPT_RANGES,
    HeaderName::from_static("digest"),
    HeaderName::from_static("content-digest"),
    HeaderName::from_static("repr-digest"),
    HeaderName::from_static("content-md5"),
];

/// The codings that [`crate::encoded`] reads.
const READABLE: [&str; 4] = ["gzip", "x-gzip", "deflate", "identity"];

/// Takes out what is meant for this hop only. `Host` and `Content-Length` stay even where `Connection` names them, and
/// `TE: trailers` stays because gRPC needs it on every hop.
pub fn strip_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = tokens(headers, &CONNECTION)
        .filter_map(|token| token.parse().ok())
        .filter(|name| *name != HOST && *name != CONTENT_LENGTH)
        .collect();
    let trailers = tokens(headers, &TE).any(|token| token.eq_ignore_ascii_case("trailers"));
    for name in HOP_BY_HOP.iter().chain(&named) {
        headers.remove(name);
    }
    if trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
}

/// Takes out every credential that a client may have put there: `Authorization`, `Proxy-Authorization`, `Cookie`,
/// `X-Api-Key`, `Api-Key`, `X-Goog-Api-Key`, `Private-Token`.
pub fn strip_client_auth(headers: &mut HeaderMap) {
    for name in &CLIENT_AUTH {
        headers.remove(name);
    }
}

/// The query (without its question mark) without `key`, `api_key`, `access_token` and `token`, however they are
/// spelled; the other parameters stay byte for byte.
pub fn strip_client_auth_query(query: &str) -> String {
    let mut kept = String::with_capacity(query.len());
    // Some servers take a semicolon for a separator too.
    for piece in query.split_inclusive(['&', ';']) {
        let pair = piece.trim_end_matches(['&', ';']);
        let name = pair.split_once('=').map_or(pair, |(name, _)| name);
        if !CLIENT_AUTH_PARAMETERS.contains(&plain(name).as_str()) {
            kept.push_str(piece);
        }
    }
    if !query.ends_with(['&', ';']) {
        kept.truncate(kept.trim_end_matches(['&', ';']).len());
    }
    kept
}

/// A parameter's name as servers see it, in lower case.
fn plain(name: &str) -> String {
    let mut decoded = Vec::with_capacity(name.len());
    let mut rest = name.as_bytes();
    while let [byte, after @ ..] = rest {
        rest = after;
        let escaped = match (byte, after) {
            (b'%', [high, low, after @ ..]) => hex_byte(*high, *low).map(|byte| (byte, after)),
            _ => None,
        };
        match escaped {
            Some((byte, after)) => {
                decoded.push(byte);
                rest = after;
            }
            None if *byte == b'+' => decoded.push(b' '),
            None => decoded.push(*byte),
        }
    }
    String::from_utf8_lossy(&decoded).trim().to_ascii_lowercase()
}

/// The byte that two hexadecimal digits stand for.
pub(crate) fn hex_byte(high: u8, low: u8) -> Option<u8> {
    let digit = |byte: u8| {
        char::from(byte)
            .to_digit(16)
            .and_then(|digit| u8::try_from(digit).ok())
    };
    Some(digit(high)? << 4 | digit(low)?)
}

/// Leaves only codings in `Accept-Encoding` that can be read here. A client that accepts none of them, or says nothing,
/// gets `identity`.
pub fn limit_accept_encoding(headers: &mut HeaderMap) {
    let readable = |offer: &&str| {
        let coding = offer.split(';').next().unwrap_or(offer).trim();
        READABLE.iter().any(|known| coding.eq_ignore_ascii_case(known))
    };
    let offers: Vec<&str> = tokens(headers, &ACCEPT_ENCODING).filter(readable).collect();
    let limited = HeaderValue::from_str(&offers.join(", "))
        .ok()
        .filter(|_| !offers.is_empty());
    headers.insert(
        ACCEPT_ENCODING,
        limited.unwrap_or(const { HeaderValue::from_static("identity") }),
    );
}

/// Makes a request one whose answer can be searched: codings that are readable here, no parts of bodies, no WebSocket
/// extensions (they compress).
pub fn prepare_redacted_request(headers: &mut HeaderMap) {
    limit_accept_encoding(headers);
    for name in [RANGE, IF_RANGE, SEC_WEBSOCKET_EXTENSIONS] {
        headers.remove(name);
    }
}

/// Takes out what no longer holds of an answer whose body is sent decoded: its coding, length, ETag and digests.
pub fn forget_body_facts(headers: &mut HeaderMap) {
    for name in &BODY_FACTS {
        headers.remove(name);
    }
}

/// Takes out the invitation to go on over another protocol, where nobody would look.
pub fn strip_alt_svc(headers: &mut HeaderMap) {
    headers.remove(ALT_SVC);
}

/// The entries of a comma-separated field, over all lines of it that are text.
fn tokens<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    let lines = headers.get_all(name).into_iter();
    let texts = lines.filter_map(|value| value.to_str().ok());
    texts
        .flat_map(|text| text.split(','))
        .map(str::trim)
        .filter(|token| !token.is_empty())
}

#[cfg(test)]
mod tests;
