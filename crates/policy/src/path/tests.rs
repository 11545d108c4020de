use proptest::{collection::vec, prelude::*, sample::select};

use super::*;

#[track_caller]
fn normal(target: &str) -> String {
    NormalPath::parse(target).unwrap().0.as_str().to_owned()
}

#[track_caller]
fn refused(target: &str, error: PathError) {
    assert_eq!(NormalPath::parse(target), Err(error), "{target:?}");
}

fn matches(pattern: &str, target: &str) -> bool {
    let path = NormalPath::parse(target).unwrap().0;
    PathPattern::parse(pattern).unwrap().matches(&path)
}

#[test]
fn one_path_has_one_text() {
    for (target, path) in [
        ("/", "/"),
        ("/repos/a", "/repos/a"),
        ("/%72epos/%7Euser/%41", "/repos/~user/A"),
        ("/a%20b%3d%c3%a9", "/a%20b%3D%C3%A9"),
        ("/a/./b/../c", "/a/c"),
        ("/../../a", "/a"),
        ("/a/..", "/"),
        ("/a/b/.", "/a/b/"),
        ("/a/b/..", "/a/"),
        ("/a//b/", "/a//b/"),
        ("/a{b}|\"<>^`", "/a%7Bb%7D%7C%22%3C%3E%5E%60"),
        ("/a;v=1/b:c@d,e!$&'()*+=", "/a;v=1/b:c@d,e!$&'()*+="),
        ("/...", "/..."),
        ("/.well-known/..x/.y", "/.well-known/..x/.y"),
        ("/100%25", "/100%25"),
    ] {
        assert_eq!(normal(target), path, "{target}");
    }
}

#[test]
fn the_query_is_left_as_it_is() {
    let (path, query) = NormalPath::parse("/a/../b?c=%2f..%2F&d=a?b/../c").unwrap();
    assert_eq!((path.as_str(), query), ("/b", Some("c=%2f..%2F&d=a?b/../c")));
    assert_eq!(NormalPath::parse("/a?").unwrap().1, Some(""));
    refused("/a?b c", PathError::Character);
    refused("/a?b#c", PathError::Character);
    refused("/a?\u{e9}", PathError::Character);
}

#[test]
fn what_two_servers_could_read_differently_is_refused() {
    for target in ["", "*", "a", "http://api.test/", "?a=/"] {
        refused(target, PathError::NotAbsolute);
    }
    for target in [
        "/a%2fb",
        "/a%2Fb",
        "/a%5cb",
        "/a%5C..%5c",
        "/a\\b",
        "/..%2f",
        "/\\..\\b",
    ] {
        refused(target, PathError::HiddenSlash);
    }
    for target in [
        "/%2e%2e/a",
        "/a/%2E",
        "/a/.%2e/b",
        "/a/%2e./",
        "/a/..;/b",
        "/a/.;x=1/b",
        "/a/..%3b/b",
    ] {
        refused(target, PathError::HiddenDots);
    }
    for target in ["/%00", "/a%0d%0aHost:x", "/%1f", "/a%7F"] {
        refused(target, PathError::Control);
    }
    for target in ["/%", "/a%2", "/%zz", "/%+1", "/%%41"] {
        refused(target, PathError::Percent);
    }
    for target in [
        "/%252e%252e/a",
        "/%252F",
        "/a%2541",
        "/%25252e",
        "/%25%4125",
        "/%25%32%65",
    ] {
        refused(target, PathError::Twice);
    }
    for target in ["/a b", "/a\tb", "/\r\n", "/a#b", "/\u{e9}", "/a\0b", "/a\u{7f}"] {
        refused(target, PathError::Character);
    }
    for target in ["//evil.test/a", "//", "/.//a", "/a/..//b"] {
        refused(target, PathError::Host);
    }
    refused(&format!("/{}", "a".repeat(20_000)), PathError::TooLong);
    refused(&format!("/a?{}", "a".repeat(20_000)), PathError::TooLong);
}

#[test]
fn patterns_match_whole_segments() {
    for (pattern, inside, outside) in [
        ("/", &["/"][..], &["/a", "/a/"][..]),
        ("/a", &["/a", "/./a", "/%61"], &["/", "/a/", "/ab", "/b/a", "/A"]),
        (
            "/repos/*",
            &["/repos/x"],
            &["/repos", "/repos/", "/repos/x/", "/repos/x/y"],
        ),
        (
            "/repos/**",
            &["/repos", "/repos/", "/repos/x", "/repos/x/y/", "/repos//x"],
            &["/", "/reposx", "/x/repos", "/repos/../x"],
        ),
        ("/**", &["/", "/a", "/a/b/c/"], &[]),
        (
            "/a/**/c/*",
            &["/a/c/d", "/a/b/c/d", "/a/c/c/c", "/a/c/d/c/e"],
            &["/a/c", "/a/c/d/e", "/a/b/d", "/c/d"],
        ),
        ("/*/b/**", &["/a/b", "/a/b/c"], &["/b", "/a//b", "/a/c/b"]),
        ("/%7Bid%7d/{x}", &["/{id}/%7bx%7d"], &["/id/x"]),
    ] {
        for target in inside {
            assert!(matches(pattern, target), "{pattern} should match {target}");
        }
        for target in outside {
            assert!(!matches(pattern, target), "{pattern} should not match {target}");
        }
    }
}

#[test]
fn patterns_that_nothing_could_match_are_refused() {
    for (pattern, error) in [
        ("", PathError::NotAbsolute.into()),
        ("repos/**", PathError::NotAbsolute.into()),
        ("/a?b=c", PathPatternError::Query),
        ("/v*", PathPatternError::Star),
        ("/***", PathPatternError::Star),
        ("/a/../b", PathPatternError::Dots),
        ("/a//b", PathPatternError::Empty),
        ("/a%2fb", PathError::HiddenSlash.into()),
        ("/%2e%2e/a", PathError::HiddenDots.into()),
        ("/a b", PathError::Character.into()),
    ] {
        assert_eq!(PathPattern::parse(pattern), Err(error), "{pattern}");
    }
    assert_eq!(
        PathPattern::parse(&"/a".repeat(65)),
        Err(PathPatternError::TooLong)
    );
    assert_eq!(
        PathPattern::parse(&format!("/{}", "a".repeat(2000))),
        Err(PathPatternError::TooLong)
    );
}

#[test]
fn a_pattern_made_to_be_slow_is_not() {
    let pattern = PathPattern::parse(&format!("{}/b", "/**/a".repeat(20))).unwrap();
    let path = NormalPath::parse(&"/a".repeat(8000)).unwrap().0;
    let began = std::time::Instant::now();
    assert!(!pattern.matches(&path));
    assert!(began.elapsed().as_secs() < 5);
}

/// Targets near the border between what is read and what is refused.
fn any_target() -> impl Strategy<Value = String> {
    let piece = select(vec![
        "/", "/", "a", "B", ".", "..", "%2e", "%2E", "%2f", "%5c", "\\", "%41", "%c3", "%", "%25", "25",
        "2e", ";", "%3b", "{", "~", "%7e", "?", "é", "%00", " ", "//", "*",
    ]);
    prop_oneof![
        vec(piece, 0..14).prop_map(|pieces| format!("/{}", pieces.concat())),
        "/\\PC{0,20}",
        "[ -~]{0,20}",
    ]
}

/// A server that is as liberal as any: decodes until nothing changes, takes backslashes for slashes, cuts parameters
/// off, drops empty segments, and then resolves dots.
fn liberal(path: &str) -> Vec<String> {
    let mut text = path.to_owned();
    loop {
        let mut decoded = Vec::new();
        let mut rest = text.as_bytes();
        while let [byte, after @ ..] = rest {
            match escaped(after).filter(|_| *byte == b'%') {
                Some((byte, after)) => {
                    decoded.push(byte);
                    rest = after;
                }
                None => {
                    decoded.push(*byte);
                    rest = after;
                }
            }
        }
        let decoded = String::from_utf8_lossy(&decoded).into_owned();
        if decoded == text {
            break;
        }
        text = decoded;
    }
    let mut segments: Vec<String> = Vec::new();
    for piece in text.split(['/', '\\']) {
        match piece.split(';').next().unwrap_or(piece) {
            "" | "." => {}
            ".." => {
                segments.pop();
            }
            segment => segments.push(segment.to_owned()),
        }
    }
    segments
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn normalising_twice_changes_nothing(target in any_target()) {
        if let Ok((path, query)) = NormalPath::parse(&target) {
            let again = NormalPath::parse(path.as_str());
            prop_assert_eq!(again, Ok((path.clone(), None)));
            let whole = query.map_or_else(|| path.to_string(), |query| format!("{path}?{query}"));
            prop_assert_eq!(NormalPath::parse(&whole), Ok((path, query)));
        }
    }

    #[test]
    fn what_is_forwarded_is_plain(target in any_target()) {
        if let Ok((path, _)) = NormalPath::parse(&target) {
            let text = path.as_str();
            prop_assert!(text.starts_with('/') && !text.starts_with("//"), "{}", text);
            prop_assert!(text.bytes().all(|byte| byte.is_ascii_graphic() && !b"\\#?\"<>^`{|}".contains(&byte)), "{}", text);
            prop_assert!(text[1..].split('/').all(|segment| segment != "." && segment != ".."), "{}", text);
            for (index, _) in text.match_indices('%') {
                let (byte, _) = escaped(&text.as_bytes()[index + 1..]).expect("two digits");
                let digits = &text[index + 1..index + 3];
                prop_assert_eq!(digits, digits.to_ascii_uppercase());
                prop_assert!(!unreserved(byte) && byte >= 0x20 && byte != 0x7F && !b"/\\".contains(&byte), "{}", text);
            }
        }
    }

    /// No server, however liberal, sees the request leave the folder that it was judged to be in.
    #[test]
    fn no_server_sees_a_path_outside_the_folder_that_matched(target in any_target()) {
        if let Ok((path, _)) = NormalPath::parse(&format!("/public{target}")) {
            let public = PathPattern::parse("/public/**").unwrap();
            if public.matches(&path) {
                let seen = liberal(path.as_str());
                prop_assert_eq!(seen.first().map(String::as_str), Some("public"), "{}", path);
            }
        }
    }

    #[test]
    fn a_pattern_comes_back_as_it_was(target in any_target()) {
        if let Ok(pattern) = PathPattern::parse(&target) {
            prop_assert_eq!(PathPattern::parse(&pattern.to_string()), Ok(pattern));
        }
    }

    /// The matcher against the definition, by trying every split.
    #[test]
    fn matching_is_what_the_definition_says(
        pattern in vec(select(vec!["a", "b", "*", "**"]), 1..7),
        path in vec(select(vec!["a", "b", "c"]), 1..8),
    ) {
        fn defined(pattern: &[&str], path: &[&str]) -> bool {
            match pattern {
                [] => path.is_empty(),
                ["**", rest @ ..] => (0..=path.len()).any(|taken| defined(rest, &path[taken..])),
                [piece, rest @ ..] => match path {
                    [first, after @ ..] => (*piece == "*" || piece == first) && defined(rest, after),
                    [] => false,
                },
            }
        }
        let (text, target) = (format!("/{}", pattern.join("/")), format!("/{}", path.join("/")));
        prop_assert_eq!(matches(&text, &target), defined(&pattern, &path), "{} {}", text, target);
    }
}
