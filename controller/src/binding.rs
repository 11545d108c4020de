//! What a secret and its bindings may look like. Pure.
//!
//! Everything that is refused names its field, as a path such as `egress.inject[0].header`. What netd could not
//! carry out is refused here and never accepted and ignored.

use sandgate_api::{
    credential::{Inject, VALUE_MARK},
    rest::EgressBinding,
};
use sandgate_policy::{DomainPattern, RequestPattern};

/// Longest value of a plain environment variable, in bytes.
pub const LONGEST_VALUE: usize = 32 * 1024;

/// Longest value that is injected, in bytes: it must fit into a header.
pub const LONGEST_BOUND_VALUE: usize = 8 * 1024;

/// Shortest value that is injected: a shorter one would occur in answers by chance, and be masked there.
pub const SHORTEST_BOUND_VALUE: usize = 8;

/// Longest name, in bytes.
pub const LONGEST_NAME: usize = 128;

/// Most bindings of one secret.
pub const MOST_BINDINGS: usize = 8;

const MOST_HOSTS: usize = 32;
const MOST_PORTS: usize = 16;
const MOST_METHODS: usize = 16;
const MOST_PATHS: usize = 64;
const MOST_INJECTS: usize = 8;
const LONGEST_TEXT: usize = 256;

/// Headers that are not a credential's place: they frame the message, route it, or end at the next hop.
const OWN_HEADERS: [&str; 17] = [
    "accept-encoding",
    "connection",
    "content-encoding",
    "content-length",
    "expect",
    "host",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "range",
    "sec-websocket-extensions",
    "sec-websocket-key",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// A field is not acceptable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {message}")]
pub struct Unacceptable {
    /// Which one, as a path.
    pub field: String,
    /// What would be right.
    pub message: String,
}

fn unacceptable<T>(field: impl Into<String>, message: impl Into<String>) -> Result<T, Unacceptable> {
    Err(Unacceptable {
        field: field.into(),
        message: message.into(),
    })
}

/// Checks a secret's name, which becomes that of an environment variable.
///
/// # Errors
/// Names the field `name`.
pub fn check_name(name: &str) -> Result<(), Unacceptable> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    if name.is_empty()
        || name.len() > LONGEST_NAME
        || name.as_bytes()[0].is_ascii_digit()
        || !name.bytes().all(plain)
    {
        return unacceptable(
            "name",
            format!(
                "expected a variable name: letters, digits and `_`, not beginning with a digit, at most {LONGEST_NAME}"
            ),
        );
    }
    Ok(())
}

/// Checks a value. The message says nothing of it.
///
/// # Errors
/// Names the field `value`.
pub fn check_value(value: &str, bound: bool) -> Result<(), Unacceptable> {
    if value.is_empty() {
        return unacceptable("value", "is empty");
    }
    if !bound {
        if value.len() > LONGEST_VALUE {
            return unacceptable("value", format!("is longer than {LONGEST_VALUE} bytes"));
        }
        if value.contains('\0') {
            return unacceptable("value", "contains a NUL character");
        }
        return Ok(());
    }
    if !(SHORTEST_BOUND_VALUE..=LONGEST_BOUND_VALUE).contains(&value.len()) {
        return unacceptable(
            "value",
            format!(
                "a value that is bound to hosts has {SHORTEST_BOUND_VALUE} to {LONGEST_BOUND_VALUE} bytes; \
                 for a plain environment variable send `\"egress\": null`"
            ),
        );
    }
    if !value.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
        return unacceptable(
            "value",
            "a value that is bound to hosts goes into a header or query: it may contain no line break, no \
             other control character and nothing beyond ASCII",
        );
    }
    if value.starts_with(' ') || value.ends_with(' ') {
        return unacceptable("value", "begins or ends with a space");
    }
    Ok(())
}

/// Checks one binding, which is the field `at` of a larger document.
///
/// # Errors
/// Names the field below `at`.
pub fn check(binding: &EgressBinding, at: &str) -> Result<(), Unacceptable> {
    let EgressBinding {
        hosts,
        ports,
        methods,
        paths,
        inject,
        strip_client_auth: _,
    } = binding;
    for (field, length, range) in [
        ("hosts", hosts.len(), 1..=MOST_HOSTS),
        ("ports", ports.len(), 1..=MOST_PORTS),
        ("methods", methods.len(), 0..=MOST_METHODS),
        ("paths", paths.len(), 0..=MOST_PATHS),
        ("inject", inject.len(), 1..=MOST_INJECTS),
    ] {
        if !range.contains(&length) {
            return unacceptable(
                format!("{at}.{field}"),
                format!("expected {} to {} elements", range.start(), range.end()),
            );
        }
    }
    for (index, host) in hosts.iter().enumerate() {
        check_host(host, &format!("{at}.hosts[{index}]"))?;
    }
    for (index, port) in ports.iter().enumerate() {
        if *port == 0 {
            return unacceptable(
                format!("{at}.ports[{index}]"),
                "expected a port between 1 and 65535",
            );
        }
    }
    // As the node reads them, so that it can never refuse what was accepted here.
    if let Err(error) = RequestPattern::new(methods, paths, true) {
        return unacceptable(format!("{at}.{}", error.field), error.message);
    }
    for (index, one) in inject.iter().enumerate() {
        check_inject(one, &format!("{at}.inject[{index}]"))?;
    }
    Ok(())
}

fn check_host(host: &str, at: &str) -> Result<(), Unacceptable> {
    if host == "*" {
        return unacceptable(at, "a secret is bound to named hosts, not to all of them");
    }
    match DomainPattern::parse(host) {
        Ok(_pattern) => Ok(()),
        Err(error) => unacceptable(at, error.to_string()),
    }
}

fn check_inject(inject: &Inject, at: &str) -> Result<(), Unacceptable> {
    match inject {
        Inject::Bearer => Ok(()),
        Inject::Basic { username } => {
            if username.len() > LONGEST_TEXT
                || !username
                    .bytes()
                    .all(|byte| (b' '..=b'~').contains(&byte) && byte != b':')
            {
                return unacceptable(
                    format!("{at}.username"),
                    "expected printable ASCII without a colon, at most 256 characters",
                );
            }
            Ok(())
        }
        Inject::Header { header, format } => {
            check_header(header, &format!("{at}.header"))?;
            if format.len() > LONGEST_TEXT
                || format.matches(VALUE_MARK).count() != 1
                || !format.bytes().all(|byte| (b' '..=b'~').contains(&byte))
                || format.trim() != format
            {
                return unacceptable(
                    format!("{at}.format"),
                    format!(
                        "expected printable ASCII that contains `{VALUE_MARK}` once, for example \"Token {VALUE_MARK}\""
                    ),
                );
            }
            Ok(())
        }
        Inject::Query { parameter } => {
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'~');
            if parameter.is_empty() || parameter.len() > LONGEST_TEXT || !parameter.bytes().all(plain) {
                return unacceptable(
                    format!("{at}.parameter"),
                    "expected the name of a parameter: letters, digits, `-`, `_`, `.` and `~`",
                );
            }
            Ok(())
        }
        Inject::Placeholder { places } => {
            if places.is_empty() || places.len() > 2 {
                return unacceptable(format!("{at}.in"), "expected `header`, `query` or both");
            }
            Ok(())
        }
    }
}

fn check_header(header: &str, at: &str) -> Result<(), Unacceptable> {
    let token =
        |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"!#$%&'*+-.^_`|~".contains(&byte);
    if header.is_empty() || header.len() > LONGEST_TEXT || !header.bytes().all(token) {
        return unacceptable(at, "expected the name of a header");
    }
    if OWN_HEADERS.contains(&header) {
        return unacceptable(at, format!("`{header}` cannot carry a credential"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use sandgate_api::credential::PlaceholderPlace;

    use super::*;

    fn binding() -> EgressBinding {
        EgressBinding {
            hosts: vec!["api.ok.test".to_owned(), "*.wild.test".to_owned()],
            ports: vec![443, 8443],
            methods: vec!["GET".to_owned()],
            paths: vec!["/v1/**".to_owned()],
            inject: vec![
                Inject::Bearer,
                Inject::Basic {
                    username: "x-access-token".to_owned(),
                },
                header("x-api-key", "Key {value}"),
                Inject::Query {
                    parameter: "api_key".to_owned(),
                },
                Inject::Placeholder {
                    places: vec![PlaceholderPlace::Header],
                },
            ],
            strip_client_auth: true,
        }
    }

    fn header(header: &str, format: &str) -> Inject {
        Inject::Header {
            header: header.to_owned(),
            format: format.to_owned(),
        }
    }

    #[test]
    fn everything_at_once_is_acceptable() {
        assert_eq!(check(&binding(), "egress"), Ok(()));
    }

    #[test]
    fn a_refusal_names_the_field() {
        type Change = fn(&mut EgressBinding);
        let cases: Vec<(Change, &str)> = vec![
            (|b| b.hosts.clear(), "egress.hosts"),
            (|b| b.hosts = vec!["a.test".to_owned(); 33], "egress.hosts"),
            (|b| b.hosts[1] = "*".to_owned(), "egress.hosts[1]"),
            (|b| b.hosts[0] = "*.com".to_owned(), "egress.hosts[0]"),
            (|b| b.hosts[0] = "203.0.113.7".to_owned(), "egress.hosts[0]"),
            (|b| b.hosts[0] = "a b.test".to_owned(), "egress.hosts[0]"),
            (|b| b.hosts[0] = "ok.test:443".to_owned(), "egress.hosts[0]"),
            (|b| b.hosts[0] = "https://ok.test".to_owned(), "egress.hosts[0]"),
            (|b| b.ports.clear(), "egress.ports"),
            (|b| b.ports[1] = 0, "egress.ports[1]"),
            (|b| b.methods[0] = "get".to_owned(), "egress.methods[0]"),
            (|b| b.methods[0] = String::new(), "egress.methods[0]"),
            (|b| b.methods[0] = "CONNECT".to_owned(), "egress.methods[0]"),
            (|b| b.paths[0] = "v1".to_owned(), "egress.paths[0]"),
            (|b| b.paths[0] = "/v1?x=1".to_owned(), "egress.paths[0]"),
            (|b| b.paths[0] = "/v1/../x".to_owned(), "egress.paths[0]"),
            (|b| b.inject.clear(), "egress.inject"),
            (
                |b| {
                    b.inject[1] = Inject::Basic {
                        username: "a:b".to_owned(),
                    }
                },
                "egress.inject[1].username",
            ),
            (
                |b| {
                    b.inject[1] = Inject::Basic {
                        username: "a\nb".to_owned(),
                    }
                },
                "egress.inject[1].username",
            ),
            (|b| b.inject[0] = header("", "{value}"), "egress.inject[0].header"),
            (
                |b| b.inject[0] = header("a b", "{value}"),
                "egress.inject[0].header",
            ),
            (
                |b| b.inject[0] = header("a:b", "{value}"),
                "egress.inject[0].header",
            ),
            (
                |b| b.inject[0] = header("host", "{value}"),
                "egress.inject[0].header",
            ),
            (
                |b| b.inject[0] = header("content-length", "{value}"),
                "egress.inject[0].header",
            ),
            (
                |b| b.inject[0] = header("x-a", "value"),
                "egress.inject[0].format",
            ),
            (
                |b| b.inject[0] = header("x-a", "{value}{value}"),
                "egress.inject[0].format",
            ),
            (
                |b| b.inject[0] = header("x-a", "{value}\r\nx-b: c"),
                "egress.inject[0].format",
            ),
            (
                |b| {
                    b.inject[3] = Inject::Query {
                        parameter: "a=b&c".to_owned(),
                    }
                },
                "egress.inject[3].parameter",
            ),
            (
                |b| b.inject[4] = Inject::Placeholder { places: vec![] },
                "egress.inject[4].in",
            ),
        ];
        for (index, (change, field)) in cases.into_iter().enumerate() {
            let mut changed = binding();
            change(&mut changed);
            let error = check(&changed, "egress").expect_err("refused");
            assert_eq!(error.field, field, "case {index}");
        }
    }

    #[test]
    fn a_value_that_is_injected_can_break_nothing() {
        for bad in [
            "",
            "short",
            "canary\r\nhost: evil",
            "canary-with\nbreak",
            "canary-with\0nul",
            "canary-\u{fc}-umlaut",
            " canary-space",
            "canary-space ",
            "canary\x7fdelete",
            "canary\ttab-tab",
        ] {
            let error = check_value(bad, true).expect_err("refused");
            assert_eq!(error.field, "value", "{bad:?}");
            assert!(!error.message.contains("canary"));
        }
        assert!(check_value(&"x".repeat(LONGEST_BOUND_VALUE), true).is_ok());
        assert!(check_value(&"x".repeat(LONGEST_BOUND_VALUE + 1), true).is_err());
    }

    #[test]
    fn a_plain_variable_may_hold_any_text() {
        for good in ["x", "two\nlines\r\n", "ü", " "] {
            assert_eq!(check_value(good, false), Ok(()), "{good:?}");
        }
        assert!(check_value("", false).is_err());
        assert!(check_value("a\0b", false).is_err());
        assert!(check_value(&"x".repeat(LONGEST_VALUE + 1), false).is_err());
    }

    #[test]
    fn a_name_is_a_variable() {
        for good in ["A", "_a9", "ANTHROPIC_API_KEY"] {
            assert_eq!(check_name(good), Ok(()));
        }
        for bad in [
            "",
            "9A",
            "A-B",
            "A B",
            "A=B",
            "Ä",
            "A\0",
            &"A".repeat(LONGEST_NAME + 1),
        ] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
    }
}
