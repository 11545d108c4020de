//! What changes in headers on their way through. Pure. Owns: that the program behind the tunnel can believe what they
//! say about the hop before, and that neither side speaks for Sandgate.

use std::net::IpAddr;

use http::{
    HeaderMap, HeaderName, HeaderValue,
    header::{CONNECTION, EXPECT, FORWARDED, HOST, SET_COOKIE, UPGRADE},
};
use sandgate_relay::headers::{strip_alt_svc, strip_hop_by_hop};

use crate::{
    access::{self, Access},
    answer::REQUEST_ID,
    config::Scheme,
};

/// What is said about the hop before.
#[derive(Debug)]
pub struct Hop<'a> {
    /// Who connected to us.
    pub peer: IpAddr,
    /// What clients speak to reach us.
    pub scheme: Scheme,
    /// The authority that the client asked for.
    pub host: &'a HeaderValue,
    /// In the access record.
    pub request_id: &'a str,
}

/// Names that only we may use. A program behind the tunnel would believe them.
const OURS: [&str; 2] = ["x-forwarded-", "x-sandgate-"];
const REAL_IP: HeaderName = HeaderName::from_static("x-real-ip");

/// Makes the fields of a request those for the sandbox, without the tokens of `accesses`.
pub fn to_sandbox(headers: &mut HeaderMap, accesses: &[Access], hop: &Hop<'_>) {
    strip_for_sandbox(headers, accesses);
    headers.insert(HOST, hop.host.clone());
    headers.insert("x-forwarded-host", hop.host.clone());
    headers.insert("x-forwarded-proto", HeaderValue::from_static(hop.scheme.as_str()));
    if let Ok(peer) = HeaderValue::from_str(&hop.peer.to_canonical().to_string()) {
        headers.insert("x-forwarded-for", peer);
    }
    if let Ok(id) = HeaderValue::from_str(hop.request_id) {
        headers.insert(REQUEST_ID, id);
    }
}

/// Makes the trailers of a request those for the sandbox: many programs take them for headers (RFC 9110 6.5.1).
pub fn trailers_to_sandbox(trailers: &mut HeaderMap, accesses: &[Access]) {
    strip_for_sandbox(trailers, accesses);
    for name in [HOST, REQUEST_ID] {
        trailers.remove(name);
    }
}

fn strip_for_sandbox(headers: &mut HeaderMap, accesses: &[Access]) {
    strip_hop_by_hop(headers);
    access::strip(accesses, headers);
    strip_ours(headers);
    // The client gets its 100 from us once the body is wanted.
    for name in [FORWARDED, REAL_IP, EXPECT] {
        headers.remove(name);
    }
}

/// Makes the fields of an answer, or its trailers, those for the client, who asked for `host`.
pub fn to_client(headers: &mut HeaderMap, host: &str) {
    strip_hop_by_hop(headers);
    // Another way to the same name would not pass here.
    strip_alt_svc(headers);
    strip_ours(headers);
    if headers
        .get_all(SET_COOKIE)
        .iter()
        .any(|cookie| is_wide(cookie, host))
    {
        let narrow: Vec<HeaderValue> = headers
            .get_all(SET_COOKIE)
            .iter()
            .filter(|cookie| !is_wide(cookie, host))
            .cloned()
            .collect();
        headers.remove(SET_COOKIE);
        for cookie in narrow {
            headers.append(SET_COOKIE, cookie);
        }
    }
}

/// Says again that the connection goes on as another protocol; what was said about the hop before is gone.
pub fn upgrade_to(headers: &mut HeaderMap, protocol: HeaderValue) {
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, protocol);
}

fn strip_ours(headers: &mut HeaderMap) {
    let names: Vec<HeaderName> = headers
        .keys()
        .filter(|name| {
            // Many servers take an underscore for a dash.
            let name = name.as_str().replace('_', "-");
            OURS.iter().any(|prefix| name.starts_with(prefix)) || name == REAL_IP.as_str()
        })
        .cloned()
        .collect();
    for name in names {
        headers.remove(name);
    }
}

/// Whether a cookie would go to other hosts too (RFC 6265 5.2.3).
fn is_wide(cookie: &HeaderValue, host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        Some(_) | None => host,
    };
    let name = name.strip_suffix('.').unwrap_or(name);
    let mut attributes = cookie.as_bytes().split(|byte| *byte == b';').skip(1);
    attributes.any(|attribute| {
        let mut parts = attribute.splitn(2, |byte| *byte == b'=');
        let (key, value) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        let value = value.trim_ascii();
        let value = value.strip_prefix(b".").unwrap_or(value);
        key.trim_ascii().eq_ignore_ascii_case(b"domain")
            && !value.is_empty()
            && !value.eq_ignore_ascii_case(name.as_bytes())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(lines: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(*name, HeaderValue::from_static(value));
        }
        headers
    }

    #[test]
    fn what_is_said_about_the_hop_before_is_ours_alone() {
        let mut sent = headers(&[
            ("host", "3000-sandbox-0.localhost:8081"),
            ("x-forwarded-for", "198.51.100.1"),
            ("x-forwarded-for", "198.51.100.2"),
            ("x-forwarded-proto", "https"),
            ("x-forwarded-port", "443"),
            ("x_forwarded_host", "evil.test"),
            ("x-sandgate-user", "root"),
            ("forwarded", "for=198.51.100.1"),
            ("x-real-ip", "198.51.100.1"),
            ("connection", "keep-alive, x-hop"),
            ("x-hop", "1"),
            ("te", "trailers, deflate"),
            ("expect", "100-continue"),
            ("accept", "*/*"),
        ]);
        let host = HeaderValue::from_static("3000-sandbox-0.localhost:8081");
        let hop = Hop {
            peer: "::ffff:127.0.0.1".parse().expect("an address"),
            scheme: Scheme::Http,
            host: &host,
            request_id: "id",
        };
        to_sandbox(&mut sent, &[Access::Public], &hop);
        assert_eq!(
            sent,
            headers(&[
                ("host", "3000-sandbox-0.localhost:8081"),
                ("accept", "*/*"),
                ("te", "trailers"),
                ("x-forwarded-host", "3000-sandbox-0.localhost:8081"),
                ("x-forwarded-proto", "http"),
                ("x-forwarded-for", "127.0.0.1"),
                ("x-request-id", "id"),
            ])
        );
    }

    #[test]
    fn a_program_speaks_neither_for_us_nor_for_other_hosts() {
        let mut answered = headers(&[
            ("x-sandgate-error", "UNAUTHORIZED"),
            ("alt-svc", "h3=\":443\""),
            ("connection", "close"),
            ("transfer-encoding", "chunked"),
            ("set-cookie", "a=1; Path=/; HttpOnly"),
            ("set-cookie", "b=2; Domain=.localhost"),
            ("set-cookie", "c=3; domain=3000-Sandbox-0.localhost"),
            ("set-cookie", "d=4; Domain=; Path=/"),
            (
                "set-cookie",
                "e=5; Domain=3000-sandbox-0.localhost; DOMAIN = localhost",
            ),
            ("content-type", "text/plain"),
        ]);
        to_client(&mut answered, "3000-sandbox-0.localhost:8081");
        assert_eq!(
            answered,
            headers(&[
                ("set-cookie", "a=1; Path=/; HttpOnly"),
                ("set-cookie", "c=3; domain=3000-Sandbox-0.localhost"),
                ("set-cookie", "d=4; Domain=; Path=/"),
                ("content-type", "text/plain"),
            ])
        );
    }
}
