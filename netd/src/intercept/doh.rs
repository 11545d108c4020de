//! Questions to name servers by HTTPS (RFC 8484, and what is like it). They would go past the resolver that the policy
//! governs, so they are refused wherever requests are read, whatever the rules say of the path.

use http::{
    HeaderMap, HeaderValue,
    header::{ACCEPT, CONTENT_TYPE},
};
use sandgate_policy::NormalPath;

/// What such requests and their answers are: RFC 8484 (6), RFC 9230 (4), and the JSON of large public resolvers.
const TYPES: [&str; 3] = [
    "application/dns-message",
    "application/oblivious-dns-message",
    "application/dns-json",
];
/// How the path of such a service ends (RFC 8484, 4.1.1).
const SERVICE: &str = "dns-query";

/// Whether a request is one.
pub(super) fn is_question(path: &NormalPath, headers: &HeaderMap) -> bool {
    let path = path.as_str().trim_end_matches('/');
    let last = path.rsplit('/').next().unwrap_or_default();
    let values = headers
        .get_all(CONTENT_TYPE)
        .iter()
        .chain(headers.get_all(ACCEPT));
    last.eq_ignore_ascii_case(SERVICE) || values.into_iter().any(names_type)
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
        let (path, _query) = NormalPath::parse(path).expect("a path");
        let headers = headers
            .iter()
            .map(|(name, value)| (name.parse().expect("a name"), HeaderValue::from_static(value)));
        is_question(&path, &headers.collect())
    }

    #[test]
    fn questions_are_known_by_their_type_or_their_path() {
        for path in [
            "/dns-query",
            "/dns-query/",
            "/dns-query?dns=AAAB",
            "/a/b/DNS-Query",
            "/%64ns-query",
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
