//! A random generator of spellings and chunkings, and one reader per spelling that looks for the key afterwards.

use base64::{
    Engine as _,
    alphabet::{STANDARD, URL_SAFE},
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig, general_purpose},
};
use http::HeaderValue;
use proptest::{collection::vec, prelude::*, sample::select};

use super::*;

const KEY: &str = "sk-ant-api03-Zq+7/w==_x~Y%41";

fn needles(value: &[u8]) -> Arc<Needles> {
    Arc::new(Needles::new(vec![SecretNeedle::new("API_KEY", value)]))
}

/// What comes out for these chunks.
fn through(needles: &Arc<Needles>, chunks: &[&[u8]]) -> Vec<u8> {
    let mut redactor = Redactor::new(Arc::clone(needles));
    let mut out = Vec::new();
    for chunk in chunks {
        out.extend_from_slice(&redactor.push(Bytes::copy_from_slice(chunk)));
    }
    out.extend_from_slice(&redactor.finish());
    out
}

fn cut<'a>(text: &'a [u8], sizes: &[usize]) -> Vec<&'a [u8]> {
    let mut chunks = Vec::new();
    let mut rest = text;
    for size in sizes.iter().cycle() {
        if rest.is_empty() {
            break;
        }
        let (chunk, after) = rest.split_at((*size).min(rest.len()));
        chunks.push(chunk);
        rest = after;
    }
    chunks
}

/// A text that holds the key somewhere, the part of it that must be hidden, and where that is.
#[derive(Debug, Clone)]
struct Spelled {
    text: Vec<u8>,
    hidden: std::ops::Range<usize>,
}

fn spelled(before: &[u8], spelling: &[u8], after: &[u8]) -> Spelled {
    Spelled {
        text: [before, spelling, after].concat(),
        hidden: before.len()..before.len() + spelling.len(),
    }
}

/// Filler that neither holds pieces of a key nor ends in half an escape.
fn filler() -> impl Strategy<Value = Vec<u8>> {
    let blank = select(b" ,:;{}()<>\"\n!?".to_vec());
    prop_oneof![
        vec(blank, 1..20),
        Just(b"{\"headers\": {\"authorization\": \"".to_vec()),
        Just(b" \xff\x00\x80 ".to_vec()),
    ]
}

fn any_key() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        "[A-Za-z0-9]{4,60}".prop_map(String::into_bytes),
        "sk-[A-Za-z0-9_-]{1,90}".prop_map(String::into_bytes),
        "[!-~]{4,40}".prop_map(String::into_bytes),
        "[ -~]{4,40}".prop_map(String::into_bytes),
        "[a\u{e9}\u{4e2d}%\\\\]{4,12}".prop_map(String::into_bytes),
        "(aa|ab|%4|%41|41|\\\\u0041){2,12}".prop_map(String::into_bytes),
    ]
}

/// Writes each character in one of the ways that `ways` picks.
fn escaped(key: &[u8], ways: &[u8]) -> Vec<u8> {
    let text = std::str::from_utf8(key).unwrap();
    let mut out = Vec::new();
    for (character, way) in text.chars().zip(ways.iter().cycle()) {
        let mut buffer = [0; 4];
        let bytes = character.encode_utf8(&mut buffer).as_bytes().to_vec();
        let each = |spell: &dyn Fn(u8) -> String| bytes.iter().map(|byte| spell(*byte)).collect::<String>();
        let written = match way % 7 {
            0 => each(&|byte| format!("%{byte:02x}")),
            1 => each(&|byte| format!("%{byte:02X}")),
            2 => format!("\\u{:04x}", u32::from(character)),
            3 => format!("\\u{:04X}", u32::from(character)),
            4 => each(&|byte| format!("\\x{byte:02x}")),
            5 if "\"\\/".contains(character) => format!("\\{character}"),
            5 if character == ' ' => "+".to_owned(),
            _ => character.to_string(),
        };
        out.extend_from_slice(written.as_bytes());
    }
    out
}

fn fold(text: &[u8], width: usize, end: &str) -> Vec<u8> {
    text.chunks(width).collect::<Vec<_>>().join(end.as_bytes())
}

/// Base64 of the key inside something longer. Hidden are all characters that hold a bit of the key.
fn in_base64(key: &[u8], before: &[u8], after: &[u8], url: bool, padded: bool) -> Spelled {
    let alphabet = if url { URL_SAFE } else { STANDARD };
    let config = GeneralPurposeConfig::new().with_encode_padding(padded);
    let text = GeneralPurpose::new(&alphabet, config).encode([before, key, after].concat());
    let bits = before.len() * 8..(before.len() + key.len()) * 8;
    Spelled {
        text: text.into_bytes(),
        hidden: bits.start / 6..bits.end.div_ceil(6),
    }
}

/// The spelling, and whether every byte outside the hidden part must stay as it is.
fn any_spelling() -> impl Strategy<Value = (Vec<u8>, Spelled)> {
    let parts = (
        any_key(),
        vec(any::<u8>(), 1..8),
        vec(any::<u8>(), 0..7),
        vec(any::<u8>(), 0..7),
    );
    let choice = (0..7usize, any::<(bool, bool)>(), 20..80usize);
    (parts, choice, filler(), filler()).prop_map(|(parts, choice, before, after)| {
        let (key, ways, inner, tail) = parts;
        let (way, (one, two), width) = choice;
        let surrounded = |spelling: Vec<u8>| spelled(&before, &spelling, &after);
        let spelled = match way {
            0 => surrounded(key.clone()),
            1 => surrounded(escaped(&key, &ways)),
            2 if one => surrounded(hex::encode_upper(&key).into_bytes()),
            2 => surrounded(hex::encode(&key).into_bytes()),
            3 => surrounded(serde_json::to_string(std::str::from_utf8(&key).unwrap()).unwrap()[1..].into())
                .without_last(),
            4 => surrounded(fold(hex::encode(&key).as_bytes(), width, "\n")),
            5 => {
                let inner = in_base64(&key, &inner, &tail, one, two);
                let hidden = before.len() + inner.hidden.start..before.len() + inner.hidden.end;
                let text = [before.as_slice(), &inner.text, &after].concat();
                Spelled { text, hidden }
            }
            _ => {
                let whole = in_base64(&key, b"", b"", one, false).text;
                let end = if two { "\r\n" } else { "\\n" };
                surrounded(fold(&whole, width, end))
            }
        };
        (key, spelled)
    })
}

impl Spelled {
    /// JSON's closing quote is none of the key's.
    fn without_last(mut self) -> Self {
        self.hidden.end -= 1;
        self
    }
}

fn holds(text: &[u8], key: &[u8]) -> bool {
    text.windows(key.len()).any(|window| window == key)
}

/// Resolves every escape that can be resolved.
fn unescaped(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = text;
    while let [byte, after @ ..] = rest {
        let resolved = (1..=5).rev().find_map(|length| {
            let escape = rest.get(..=length)?;
            let digits = |from: usize| {
                let digits = std::str::from_utf8(&escape[from..]).ok()?;
                u32::from_str_radix(digits, 16).ok()
            };
            let character = match (escape[0], escape[1], length) {
                (b'\\', b'u', 5) => char::from_u32(digits(2)?)?.to_string().into_bytes(),
                (b'\\', b'x', 3) => vec![u8::try_from(digits(2)?).ok()?],
                (b'%', _, 2) => vec![u8::try_from(digits(1)?).ok()?],
                (b'\\', byte, 1) if b"\"\\/".contains(&byte) => vec![byte],
                _ => return None,
            };
            Some((character, length))
        });
        match resolved {
            Some((character, length)) => {
                out.extend_from_slice(&character);
                rest = &rest[length + 1..];
            }
            None => {
                out.push(*byte);
                rest = after;
            }
        }
    }
    out
}

/// Reads `text` in every way that the key may have been written in, and looks for the key.
fn readable(text: &[u8], key: &[u8]) -> Option<&'static str> {
    if holds(text, key) {
        return Some("plain");
    }
    if holds(&unescaped(text), key) {
        return Some("escaped");
    }
    let unfolded: Vec<u8> = String::from_utf8_lossy(text)
        .replace("\\n", "")
        .bytes()
        .filter(|byte| !byte.is_ascii_whitespace())
        .collect();
    let config = GeneralPurposeConfig::new()
        .with_decode_padding_mode(DecodePaddingMode::Indifferent)
        .with_decode_allow_trailing_bits(true);
    let engine = GeneralPurpose::new(&STANDARD, config);
    for run in unfolded.split(|byte| !byte.is_ascii_alphanumeric() && !b"+/-_".contains(byte)) {
        for skipped in 0..run.len().min(4) {
            let digits = &run[skipped..];
            let even = &digits[..digits.len() - digits.len() % 2];
            if hex::decode(even).is_ok_and(|read| holds(&read, key)) {
                return Some("hexadecimal");
            }
            let standard: Vec<u8> = digits
                .iter()
                .map(|byte| match byte {
                    b'-' => b'+',
                    b'_' => b'/',
                    byte => *byte,
                })
                .collect();
            let whole = &standard[..standard.len() - usize::from(standard.len() % 4 == 1)];
            if engine.decode(whole).is_ok_and(|read| holds(&read, key)) {
                return Some("base64");
            }
        }
    }
    None
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn no_spelling_and_no_chunking_lets_the_key_through(
        (key, spelled) in any_spelling(),
        sizes in vec(1..40usize, 1..6),
    ) {
        let out = through(&needles(&key), &cut(&spelled.text, &sizes));
        prop_assert_eq!(out.len(), spelled.text.len());
        for index in spelled.hidden.clone() {
            let mask = b"[redacted:API_KEY]".get(index - spelled.hidden.start).unwrap_or(&b'*');
            prop_assert_eq!(
                out[index], *mask,
                "byte {} of {:?} became {:?}",
                index, String::from_utf8_lossy(&spelled.text), String::from_utf8_lossy(&out)
            );
        }
        prop_assert_eq!(&out[..spelled.hidden.start], &spelled.text[..spelled.hidden.start]);
        prop_assert_eq!(&out[spelled.hidden.end..], &spelled.text[spelled.hidden.end..]);
        prop_assert_eq!(readable(&out, &key), None, "{:?}", String::from_utf8_lossy(&out));
        // A key that itself looks like an escape reads in several ways, of which the reader of this test tries one.
        let plain = !key.iter().any(|byte| b" %\\".contains(byte));
        prop_assert!(!plain || readable(&spelled.text, &key).is_some(), "the reader of this test is blind");
    }

    #[test]
    fn chunking_changes_nothing(
        text in vec(prop_oneof![Just(KEY.as_bytes().to_vec()), vec(select(b"sk-a%\\u041Zq+7/w= \n".to_vec()), 0..9)], 0..12),
        sizes in vec(1..9usize, 1..5),
    ) {
        let text = text.concat();
        let needles = needles(KEY.as_bytes());
        let whole = needles.redact(&text).map_or_else(|| text.clone(), |(masked, _)| masked);
        prop_assert_eq!(through(&needles, &cut(&text, &sizes)), whole);
    }

    #[test]
    fn what_holds_no_secret_is_not_touched(text in vec(any::<u8>(), 0..600), sizes in vec(1..70usize, 1..5)) {
        let needles = needles(KEY.as_bytes());
        prop_assert_eq!(through(&needles, &cut(&text, &sizes)), text);
    }

    #[test]
    fn no_more_is_held_back_than_a_secret_is_long(
        text in vec(select(b"sk-ant \n\\u0073%".to_vec()), 0..900), sizes in vec(1..70usize, 1..5),
    ) {
        let needles = needles(KEY.as_bytes());
        let mut redactor = Redactor::new(Arc::clone(&needles));
        let mut held = 0;
        for chunk in cut(&text, &sizes) {
            held += chunk.len();
            held -= redactor.push(Bytes::copy_from_slice(chunk)).len();
            prop_assert!(held <= needles.longest(), "{} bytes are held back", held);
        }
        prop_assert_eq!(redactor.finish().len(), held);
    }
}

#[test]
fn what_cannot_be_a_beginning_goes_out_at_once() {
    let mut redactor = Redactor::new(needles(b"sk-secret-value"));
    // An event stream must not wait for its next event.
    let event = Bytes::from_static(b"data: hello\n\n");
    assert_eq!(redactor.push(event.clone()), event);
    assert_eq!(redactor.push(Bytes::from_static(b"data: sk-sec")), "data: ");
    assert_eq!(
        redactor.push(Bytes::from_static(b"ret-value\n\n")),
        "[redacted:API_K\n\n"
    );
    assert_eq!(redactor.hits().collect::<Vec<_>>(), [("API_KEY", 1)]);
    assert_eq!(redactor.push(Bytes::from_static(b"sk-sec")), "");
    assert_eq!(redactor.finish(), "sk-sec", "half a secret is none");
    // What comes after the end is another stream.
    assert_eq!(redactor.push(Bytes::from_static(b"ret-value;")), "ret-value;");
}

#[test]
fn basic_credentials_are_found_whatever_the_user_is_called() {
    let needles = needles(b"ghp_0123456789abcdef");
    for user in ["", "x", "xy", "xyz", "x-access-token"] {
        let sent = general_purpose::STANDARD.encode(format!("{user}:ghp_0123456789abcdef"));
        let (masked, names) = needles.redact(sent.as_bytes()).expect("found");
        assert_eq!(
            readable(&masked, b"0123456789"),
            None,
            "{}",
            String::from_utf8_lossy(&masked)
        );
        assert_eq!(names, ["API_KEY"]);
        assert_eq!(needles.find(sent.as_bytes()), Some("API_KEY"));
    }
    assert_eq!(needles.find(b"ghp_0123456789abcdeX"), None);
}

#[test]
fn several_secrets_are_masked_under_their_own_names() {
    let needles = Needles::new(vec![
        SecretNeedle::new("FIRST", "first-value-of-all"),
        SecretNeedle::new("SEC OND", "second-value"),
        SecretNeedle::new("EMPTY", ""),
        SecretNeedle::new("SHORT", "abc"),
    ]);
    let (masked, names) = needles
        .redact(b"<first-value-of-all> <second-value> <abc> <616263> <YWJj>")
        .expect("found");
    assert_eq!(
        String::from_utf8(masked).unwrap(),
        "<[redacted:FIRST]**> <[redacted:SE> <[re> <616263> <YWJj>"
    );
    assert_eq!(names, ["FIRST", "SEC OND", "SHORT"]);
    let nothing = Arc::new(Needles::new(Vec::new()));
    assert!(nothing.is_empty());
    assert_eq!(through(&nothing, &[b"any", b"thing"]), b"anything");
}

#[test]
fn values_of_headers_are_masked_and_stay_values() {
    let mut headers = HeaderMap::new();
    headers.append(
        "location",
        HeaderValue::from_static("https://evil.test/?k=secret%2Dvalue"),
    );
    headers.append("set-cookie", HeaderValue::from_static("a=1"));
    headers.append("set-cookie", HeaderValue::from_static("b=secret-value"));
    headers.append("x-raw", HeaderValue::from_bytes(b"\xff secret-value").unwrap());
    let found = redact_headers(&needles(b"secret-value"), &mut headers);
    assert_eq!(found, ["API_KEY"]);
    assert_eq!(headers["location"], "https://evil.test/?k=[redacted:API_");
    let cookies: Vec<_> = headers.get_all("set-cookie").into_iter().collect();
    assert_eq!(cookies, ["a=1", "b=[redacted:AP"]);
    assert_eq!(headers["x-raw"].as_bytes(), b"\xff [redacted:AP");
}

#[test]
fn nothing_shows_a_value_in_its_debug_text() {
    let needle = SecretNeedle::new("API_KEY", "value-that-nobody-sees");
    let mut redactor = Redactor::new(Arc::new(Needles::new(vec![needle.clone()])));
    assert_eq!(redactor.push(Bytes::from_static(b"value-that-nobody-se")), "");
    let shown = format!("{needle:?} {redactor:?}");
    assert!(shown.contains("API_KEY"));
    let leaked = needles(b"value-that").find(shown.as_bytes()).map(str::to_owned);
    assert_eq!(leaked, None, "{shown}");
}
