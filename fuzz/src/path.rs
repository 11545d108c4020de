//! Paths of requests: the canonical form is one, stays inside, and is what any server reads.

use sandgate_policy::NormalPath;

pub(crate) fn check(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let Ok((path, query)) = NormalPath::parse(text) else {
        return;
    };
    let form = path.as_str();
    let (again, none) = NormalPath::parse(form).expect("the canonical form is a path");
    assert_eq!((again.as_str(), none), (form, None), "of {text:?}");
    assert!(
        form.starts_with('/') && !form.starts_with("//"),
        "{form:?} names a host"
    );
    assert!(
        form.bytes()
            .all(|byte| byte.is_ascii_graphic() && !b"?#\\".contains(&byte)),
        "{form:?}"
    );
    assert_eq!(text.split_once('?').map(|(_, query)| query), query);
    // Decoded once, or twice by a careless server, it has no more segments and goes nowhere else.
    let segments = form.split('/').count();
    let mut decoded = form.as_bytes().to_vec();
    for _ in 0..2 {
        decoded = unescaped(&decoded);
        assert_eq!(
            decoded.split(|byte| *byte == b'/').count(),
            segments,
            "{form:?} hides a slash"
        );
        assert!(!decoded.contains(&b'\\') && !decoded.contains(&0), "{form:?}");
        for segment in decoded.split(|byte| *byte == b'/') {
            let bare = segment.split(|byte| *byte == b';').next().unwrap_or_default();
            assert!(bare != b"." && bare != b"..", "{form:?} hides dots");
        }
    }
}

fn unescaped(text: &[u8]) -> Vec<u8> {
    let digit = |byte: u8| {
        char::from(byte)
            .to_digit(16)
            .and_then(|digit| u8::try_from(digit).ok())
    };
    let (mut out, mut rest) = (Vec::new(), text);
    while let [byte, after @ ..] = rest {
        rest = after;
        match rest {
            [high, low, behind @ ..] if *byte == b'%' => match (digit(*high), digit(*low)) {
                (Some(high), Some(low)) => {
                    out.push(high << 4 | low);
                    rest = behind;
                }
                _ => out.push(*byte),
            },
            _ => out.push(*byte),
        }
    }
    out
}
