use proptest::prelude::*;

use super::*;

fn name(text: &str) -> DomainName {
    DomainName::parse(text).unwrap()
}

#[test]
fn spellings_of_one_name_become_one_text() {
    let spellings = [
        ("ok.test", "ok.test"),
        ("OK.Test", "ok.test"),
        ("ok.test.", "ok.test"),
        ("ok。test", "ok.test"),
        ("ｏｋ.test", "ok.test"),
        ("o\u{ad}k.test", "ok.test"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("BÜCHER.example", "xn--bcher-kva.example"),
        ("XN--BCHER-KVA.example", "xn--bcher-kva.example"),
        ("r3---sn-a.example", "r3---sn-a.example"),
        ("_dmarc.ok.test", "_dmarc.ok.test"),
        ("localhost", "localhost"),
        ("7.ok.test", "7.ok.test"),
    ];
    for (text, canonical) in spellings {
        assert_eq!(
            DomainName::parse(text).as_ref().map(DomainName::as_str),
            Ok(canonical),
            "{text:?}"
        );
    }
}

#[test]
fn what_is_no_host_name_is_refused() {
    let refused = [
        ("", NameError::Empty),
        (".", NameError::Empty),
        ("ok.test..", NameError::EmptyLabel),
        ("..", NameError::EmptyLabel),
        (".ok.test", NameError::EmptyLabel),
        ("ok..test", NameError::EmptyLabel),
        (" ok.test", NameError::Character),
        ("ok.test ", NameError::Character),
        ("ok.test\0.evil.test", NameError::Character),
        ("ok.test%00.evil.test", NameError::Character),
        ("ok.test/x", NameError::Character),
        ("a@ok.test", NameError::Character),
        ("https://ok.test", NameError::Character),
        ("ok.test:443", NameError::Character),
        ("ok\n.test", NameError::Character),
        ("*.ok.test", NameError::Character),
        ("203.0.113.5", NameError::Address),
        ("203.0.113.5.", NameError::Address),
        ("２０３.0.113.5", NameError::Address),
        ("127.1", NameError::Address),
        ("2130706433", NameError::Address),
        ("0x7f.1", NameError::Address),
        ("0x7f000001", NameError::Address),
        ("ok.0x", NameError::Address),
        ("2001:db8::1", NameError::Address),
        ("[2001:db8::1]", NameError::Address),
        ("203.0.113.0/24", NameError::Address),
        ("xn--zz-.test", NameError::Idna),
        ("xn--ok.test", NameError::Idna),
        ("ok\u{2024}\u{fffd}.test", NameError::Idna),
    ];
    for (text, error) in refused {
        assert_eq!(DomainName::parse(text), Err(error), "{text:?}");
    }
}

#[test]
fn lengths_are_those_of_the_canonical_form() {
    let label = "a".repeat(63);
    let longest = format!("{label}.{label}.{label}.{}", "a".repeat(61));
    assert_eq!(name(&longest).as_str().len(), 253);
    assert_eq!(name(&format!("{longest}.")).as_str().len(), 253);
    assert_eq!(DomainName::parse(&format!("{longest}a")), Err(NameError::TooLong));
    assert_eq!(
        DomainName::parse(&format!("{label}a.test")),
        Err(NameError::LabelTooLong)
    );
    assert_eq!(DomainName::parse(&"a.".repeat(100_000)), Err(NameError::TooLong));
}

#[test]
fn a_wildcard_matches_below_a_label_boundary_only() {
    let pattern = DomainPattern::parse("*.Wild.test.").unwrap();
    assert_eq!(pattern.to_string(), "*.wild.test");
    for inside in ["a.wild.test", "a.b.wild.test", "A.WILD.TEST."] {
        assert!(pattern.matches(&name(inside)), "{inside}");
    }
    for outside in [
        "wild.test",
        "evil-wild.test",
        "xwild.test",
        "wild.test.evil.test",
        "test",
    ] {
        assert!(!pattern.matches(&name(outside)), "{outside}");
    }
}

#[test]
fn wildcards_elsewhere_and_over_public_suffixes_are_refused() {
    for text in [
        "**",
        "*.*",
        "*.*.test",
        "a.*.test",
        "a*.wild.test",
        "*a.wild.test",
        "wild.*",
        "*.wild.*",
    ] {
        assert_eq!(DomainPattern::parse(text), Err(NameError::Wildcard), "{text}");
    }
    for text in [
        "*.com",
        "*.co.uk",
        "*.COM.",
        "*.test",
        "*.xn--p1ai",
        "*.foo.ck",
        "*.kawasaki.jp",
    ] {
        assert_eq!(DomainPattern::parse(text), Err(NameError::PublicSuffix), "{text}");
    }
    for text in [
        ".*",
        "ok.test|evil.test",
        "(ok).test",
        "^ok.test$",
        "ok?.test",
        "[a-z].test",
        "*.203.0.113.5",
        "*.",
    ] {
        assert!(DomainPattern::parse(text).is_err(), "{text}");
    }
    for text in [
        "*",
        "*.example.com",
        "*.example.co.uk",
        "*.githubusercontent.com",
        "*.a.b.example.org",
    ] {
        assert_eq!(
            DomainPattern::parse(text)
                .map(|pattern| pattern.to_string())
                .as_deref(),
            Ok(text)
        );
    }
}

#[test]
fn a_star_alone_opens_public_names_and_covers_every_name() {
    let set = DomainSet::new(&[DomainPattern::Any].into());
    for public in [
        "ok.test",
        "a.b.example.org",
        "home.arpa.example.org",
        "in-addr.arpa",
    ] {
        assert!(set.opening(&name(public)).is_some(), "{public}");
    }
    let local = [
        "localhost",
        "a.localhost",
        "db",
        "metadata.google.internal",
        "svc.cluster.local",
        "x.home.arpa",
        "home.arpa",
    ];
    for local in local {
        assert!(set.opening(&name(local)).is_none(), "{local}");
        assert!(set.covering(&name(local)).is_some(), "{local}");
    }
    let listed = [
        DomainPattern::Any,
        DomainPattern::parse("svc.cluster.local").unwrap(),
    ];
    let listed = DomainSet::new(&listed.into());
    assert_eq!(listed.opening(&name("svc.cluster.local")), Some(1));
}

#[test]
fn a_name_travels_as_text_and_is_checked_on_arrival() {
    let wire = serde_json::to_string(&name("OK.test")).unwrap();
    assert_eq!(wire, "\"ok.test\"");
    assert_eq!(
        serde_json::from_str::<DomainName>("\"OK.test.\"").unwrap(),
        name("ok.test")
    );
    assert!(serde_json::from_str::<DomainName>("\"203.0.113.5\"").is_err());
}

fn any_pattern() -> impl Strategy<Value = String> {
    proptest::sample::select(vec![
        "*",
        "wild.test",
        "*.wild.test",
        "a.wild.test",
        "*.a.wild.test",
        "evil.test",
    ])
    .prop_map(str::to_owned)
}

proptest! {
    #[test]
    fn the_canonical_form_of_a_canonical_name_is_itself(text in "\\PC{0,40}") {
        if let Ok(name) = DomainName::parse(&text) {
            prop_assert_eq!(&DomainName::parse(name.as_str()).unwrap(), &name);
            prop_assert_eq!(&DomainName::parse(&format!("{name}.")).unwrap(), &name);
            prop_assert_eq!(&DomainName::parse(&name.as_str().to_ascii_uppercase()).unwrap(), &name);
            prop_assert!(name.as_str().len() <= 253);
            prop_assert!(name.as_str().parse::<IpAddr>().is_err());
        }
    }

    #[test]
    fn labels_of_unicode_are_canonical_too(labels in proptest::collection::vec("[a-zA-ZäöüßÄçéжЖ中文ıİ0-9_-]{1,12}", 1..5)) {
        if let Ok(name) = DomainName::parse(&labels.join(".")) {
            prop_assert!(name.as_str().bytes().all(|byte| byte.is_ascii() && !byte.is_ascii_uppercase()));
            prop_assert_eq!(DomainName::parse(name.as_str()).unwrap(), name);
        }
    }

    #[test]
    fn an_address_is_never_a_name(address in any::<IpAddr>()) {
        prop_assert_eq!(DomainName::parse(&address.to_string()), Err(NameError::Address));
    }

    #[test]
    fn a_set_finds_the_first_pattern_that_matches(
        patterns in proptest::collection::vec(any_pattern(), 0..6),
        name in proptest::sample::select(vec!["wild.test", "a.wild.test", "b.a.wild.test", "evil.test", "x.evil.test", "db"]),
    ) {
        let patterns: Vec<DomainPattern> = patterns.iter().map(|text| text.parse().unwrap()).collect();
        let name = DomainName::parse(name).unwrap();
        let first = patterns.iter().position(|pattern| pattern.matches(&name));
        prop_assert_eq!(DomainSet::new(&patterns.into()).covering(&name), first);
    }
}

#[test]
fn a_zone_is_what_one_owner_registered() {
    for (text, zone) in [
        ("a.b.example.org", "example.org"),
        ("example.org", "example.org"),
        ("org", "org"),
        ("a.b.example.co.uk", "example.co.uk"),
        ("co.uk", "co.uk"),
        ("one.github.io", "github.io"),
        ("x.y.z.s3.amazonaws.com", "amazonaws.com"),
        ("a.ok.test", "ok.test"),
        ("5.113.0.203.in-addr.arpa", "203.in-addr.arpa"),
        ("host", "host"),
    ] {
        assert_eq!(DomainName::parse(text).unwrap().zone(), zone, "{text}");
    }
}
