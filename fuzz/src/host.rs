//! Names of hosts: the canonical form is one, and the same name in a policy, a question, a Host field and an SNI.

use std::net::IpAddr;

use netd::dns::message::{Received, read};
use sandgate_policy::{DomainName, DomainPattern};
use sandgate_relay::http1::head;

pub(crate) fn check(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    if let Ok(name) = DomainName::parse(text) {
        canonical(text, &name);
        in_a_question(&name);
        in_a_host_field(text, &name);
    }
    if let Ok(pattern) = DomainPattern::parse(text) {
        assert_eq!(DomainPattern::parse(&pattern.to_string()).as_ref(), Ok(&pattern));
        matches(&pattern);
    }
}

fn canonical(text: &str, name: &DomainName) {
    let form = name.as_str();
    assert_eq!(DomainName::parse(form).as_ref(), Ok(name), "{text:?}");
    assert!(!form.is_empty() && form.len() <= 253, "{form:?}");
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-_.".contains(&byte);
    assert!(form.bytes().all(plain), "{form:?}");
    assert!(
        form.split('.').all(|label| (1..=63).contains(&label.len())),
        "{form:?}"
    );
    for spelling in [
        form.to_ascii_uppercase(),
        format!("{form}."),
        text.to_ascii_uppercase(),
    ] {
        assert_eq!(DomainName::parse(&spelling).as_ref(), Ok(name), "{spelling:?}");
    }
    assert!(
        form.parse::<IpAddr>().is_err() && !is_old_address(form),
        "{form:?} is an address"
    );
    let zone = name.zone();
    let head = form.strip_suffix(zone).expect("a part of the name");
    assert!(head.is_empty() || head.ends_with('.'), "{form:?} is in {zone:?}");
}

/// What `inet_aton` takes for an address: up to four numbers, decimal, octal or hexadecimal.
fn is_old_address(text: &str) -> bool {
    let number = |part: &str| match part.strip_prefix("0x") {
        Some(digits) => digits.bytes().all(|byte| byte.is_ascii_hexdigit()),
        None => !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit()),
    };
    text.split('.').count() <= 4 && text.split('.').all(number)
}

fn in_a_question(name: &DomainName) {
    let mut packet = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.as_str().to_ascii_uppercase().split('.') {
        packet.push(u8::try_from(label.len()).expect("at most 63"));
        packet.extend_from_slice(label.as_bytes());
    }
    packet.extend([0, 0, 1, 0, 1]);
    match read(&packet) {
        Received::Question(question) => assert_eq!(question.name().as_ref(), Some(name)),
        other => panic!("{name} cannot be asked for: {other:?}"),
    }
}

fn in_a_host_field(text: &str, name: &DomainName) {
    let of = |text: &str| match head::read(format!("GET / HTTP/1.1\r\nHost: {text}\r\n\r\n").as_bytes()) {
        head::Reading::Complete(head) => Some(head.host),
        head::Reading::Malformed(_) => None,
        head::Reading::Incomplete => panic!("{text:?} makes it incomplete"),
    };
    let host = of(name.as_str()).expect("a canonical name may stand in a Host field");
    assert_eq!(host.name.as_ref(), Some(name));
    if let Some(host) = of(text) {
        assert_eq!(host.name.as_ref(), Some(name), "{text:?}");
    }
}

fn matches(pattern: &DomainPattern) {
    let name = |text: &str| DomainName::parse(text);
    match pattern {
        DomainPattern::Exact(exact) => {
            assert!(pattern.matches(exact));
            let longer = [format!("a.{exact}"), format!("a{exact}"), format!("{exact}.a")];
            let other = longer.iter().filter_map(|text| name(text).ok());
            other.for_each(|other| assert!(!pattern.matches(&other), "{pattern} has {other}"));
        }
        DomainPattern::Below(apex) => {
            assert!(!pattern.matches(apex));
            let inside = [format!("a.{apex}"), format!("b.a.{apex}")];
            let inside = inside.iter().filter_map(|text| name(text).ok());
            inside.for_each(|inside| assert!(pattern.matches(&inside), "{pattern} lacks {inside}"));
            let others = [format!("a{apex}"), format!("{apex}.a"), format!("a.{apex}.a")];
            for other in others.iter().filter_map(|text| name(text).ok()) {
                // The last label may be the same once more.
                let inside = other.as_str().ends_with(&format!(".{apex}"));
                assert_eq!(pattern.matches(&other), inside, "{pattern} and {other}");
            }
        }
        DomainPattern::Any => assert!(pattern.matches(&name("a.test").expect("a name"))),
    }
}
