//! Query strings, parameter by parameter, without a change to those that nobody asked about. Pure.

use std::fmt::Write as _;

/// The query without the parameters for which `gone` says yes, given the decoded name and the raw text.
pub(super) fn without(query: &str, gone: impl Fn(&str, &str) -> bool) -> Option<String> {
    let kept: Vec<&str> = query.split('&').filter(|part| !gone(&name(part), part)).collect();
    (!kept.is_empty()).then(|| kept.join("&"))
}

/// The name of a parameter, decoded.
pub(super) fn name(part: &str) -> String {
    decoded(part.split('=').next().unwrap_or_default())
}

/// The query with one more parameter at its end.
pub(super) fn with(query: Option<String>, name: &str, value: &str) -> String {
    let mut query = query
        .filter(|query| !query.is_empty())
        .map_or_else(String::new, |query| query + "&");
    query.push_str(&encoded(name));
    query.push('=');
    query.push_str(&encoded(value));
    query
}

/// Percent-encodes everything but unreserved characters (RFC 3986, 2.3).
pub(super) fn encoded(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            let _infallible = write!(out, "%{byte:02X}");
        }
    }
    out
}

/// Percent-decodes what can be; bytes that are no UTF-8 become replacement characters. Only for looking.
pub(super) fn decoded(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, after @ ..] = rest {
        rest = after;
        let digit = |byte: u8| {
            char::from(byte)
                .to_digit(16)
                .and_then(|digit| u8::try_from(digit).ok())
        };
        match (first, after) {
            (b'%', [high, low, beyond @ ..]) => match digit(*high).zip(digit(*low)) {
                Some((high, low)) => {
                    out.push(high << 4 | low);
                    rest = beyond;
                }
                None => out.push(b'%'),
            },
            (b'+', _) => out.push(b' '),
            (byte, _) => out.push(*byte),
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_come_and_go_one_by_one() {
        let query = "a=1&k%65y=old&b=%2F&flag";
        let rest = without(query, |name, _| name == "key");
        assert_eq!(rest.as_deref(), Some("a=1&b=%2F&flag"));
        assert_eq!(with(rest, "key", "s/1"), "a=1&b=%2F&flag&key=s%2F1");
        assert_eq!(without("key=1", |name, _| name == "key"), None);
        assert_eq!(with(None, "key", "1"), "key=1");
        assert_eq!(decoded("a%2fb%zz%4"), "a/b%zz%4");
    }
}
