//! Questions to name servers by HTTPS (RFC 8484, and what is like it). They would go past the resolver that the policy
//! governs, so they are refused wherever requests are read, whatever the rules say of the path.

use http::{
    HeaderMap, HeaderValue,
    header::{ACCEPT, CONTENT_TYPE},
};
use sandgate_policy::NormalPath;

use super::query;

/// What such requests and their answers are: RFC 8484 (6), RFC 9230 (4), and the JSON of large public resolvers.
const TYPES: [&str; 3] = [
    "application/dns-message",
    "application/oblivious-dns-message",
    "application/dns-json",
];
/// How the path of such a service ends (RFC 8484, 4.1.1).
const SERVICE: &str = "dns-query";
/// How it ends where large public resolvers answer in JSON, also to those who do not say that they want it, and the
/// parameter with the name that is asked for.
const JSON_SERVICE: (&str, &str) = ("resolve", "name");

/// Whether a request is one.
pub(super) fn is_question(path: &NormalPath, query: Option<&str>, headers: &HeaderMap) -> bool {
    let path = path.as_str().trim_end_matches('/');
    let last = path.rsplit('/').next().unwrap_or_default();
    // Without parameters of the segment (RFC 3986, 3.3).
    let last = last.split(';').next().unwrap_or_default();
    let values = headers
        .get_all(CONTENT_TYPE)
        .iter()
        .chain(headers.get_all(ACCEPT));
    let (service, parameter) = JSON_SERVICE;
    // `;` separates parameters too, where a server keeps to what HTML once recommended.
    let mut parameters = query.unwrap_or_default().split(['&', ';']);
    let by_json = last.eq_ignore_ascii_case(service)
        && parameters.any(|part| query::name(part).trim().eq_ignore_ascii_case(parameter));
    last.eq_ignore_ascii_case(SERVICE) || by_json || values.into_iter().any(names_type)
}

/// Whether one of the media types in a list is of DNS, with parameters or without.
fn names_type(value: &HeaderValue) -> bool {
    let named = |entry: &[u8]| {
        let name = entry.split(|byte| *byte == b';').next().unwrap_or_default();
        let name = name.trim_ascii();
        TYPES
            .iter()
            .any(|kind| name.eq_ignore_ascii_case(kind.as_bytes()))
    };
    value.as_bytes().split(|byte| *byte == b',').any(named)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asks(path: &str, headers: &[(&'static str, &'static str)]) -> bool {
        let (path, query) = NormalPath::parse(path).expect("a path");
        let headers = headers
            .iter()
            .map(|(name, value)| (name.parse().expect("a name"), HeaderValue::from_static(value)));
        is_question(&path, query, &headers.collect())
    }

    #[test]
    fn questions_are_known_by_their_type_or_their_path() {
        for path in [
            "/dns-query",
            "/dns-query/",
            "/dns-query?dns=AAAB",
            "/a/b/DNS-Query",
            "/%64ns-query",
            "/resolve?name=evil.test&type=TXT",
            "/resolve?name=evil.test",
            "/a/Resolve/?x=1&NAME=evil.test",
            "/%72esolve?cd=1&%6eame=evil.test",
            "/resolve?type=1;name=evil.test",
            "/resolve?name",
            "/resolve;v=1?name=evil.test",
            "/dns-query;v=1",
        ] {
            assert!(asks(path, &[]), "{path}");
        }
        for value in [
            "application/dns-message",
            "Application/DNS-Message; q=1",
            "text/html, application/dns-json;q=0.9",
            "*/* , application/oblivious-dns-message",
        ] {
            assert!(asks("/", &[("accept", value)]), "{value}");
            assert!(asks("/", &[("content-type", value)]), "{value}");
        }
        assert!(asks(
            "/",
            &[("accept", "text/html"), ("accept", "application/dns-message")]
        ));
    }

    #[test]
    fn what_is_only_similar_passes() {
        for path in [
            "/",
            "/dns-query/x",
            "/my-dns-query",
            "/docs/dns-query.html",
            "/?dns=AAAB",
            "/resolve",
            "/resolve?q=name",
            "/resolve?names=x&surname=y",
            "/resolve/x?name=y",
            "/resolver?name=y",
            "/?name=evil.test",
        ] {
            assert!(!asks(path, &[]), "{path}");
        }
        for value in [
            "application/json",
            "application/dns",
            "text/plain; about=application/dns-message",
            "",
        ] {
            assert!(
                !asks("/", &[("accept", value), ("content-type", value)]),
                "{value}"
            );
        }
        assert!(!asks("/", &[("x-type", "application/dns-message")]));
    }
}
