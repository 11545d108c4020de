//! Looking for a secret: written plainly or in any usual form, in texts, files and memory.
//!
//! A search that finds nothing is worth something only beside one that finds what is there: tests look for the
//! placeholder in the same places.

use std::{
    fs::File,
    io::{Read as _, Seek as _, SeekFrom, Write as _},
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use base64::{Engine as _, engine::general_purpose::STANDARD_NO_PAD};
use tempfile::NamedTempFile;

/// Mappings of a process larger than this are reserved, not used.
const MAPPING: u64 = 4 << 30;
const PIECE: usize = 1 << 20;

/// What stays the same of a text in base64 whatever surrounds it, for each of the three places where it may stand.
fn base64_cores(key: &str) -> [String; 3] {
    [0, 1, 2].map(|before| {
        let padded = [vec![0; before], key.as_bytes().to_vec()].concat();
        let encoded = STANDARD_NO_PAD.encode(&padded);
        // The first and the last characters depend on the neighbours too.
        let start = (before * 8).div_ceil(6);
        let end = padded.len() * 8 / 6;
        encoded[start..end].to_owned()
    })
}

fn hexadecimal(key: &str) -> String {
    key.bytes().map(|byte| format!("{byte:02x}")).collect()
}

fn percent(key: &str, upper: bool) -> String {
    let escape = |byte: u8| match (byte, upper) {
        (b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~', _) => {
            char::from(byte).to_string()
        }
        (_, true) => format!("%{byte:02X}"),
        (_, false) => format!("%{byte:02x}"),
    };
    key.bytes().map(escape).collect()
}

/// The usual forms of a key, as fixed texts.
pub fn forms(key: &str) -> Vec<String> {
    let mut forms = vec![
        key.to_owned(),
        hexadecimal(key),
        hexadecimal(key).to_uppercase(),
        percent(key, true),
        percent(key, false),
        serde_json::Value::from(key)
            .to_string()
            .trim_matches('"')
            .to_owned(),
    ];
    for core in base64_cores(key) {
        forms.push(core.replace('+', "-").replace('/', "_"));
        forms.push(core);
    }
    forms.sort();
    forms.dedup();
    forms
}

/// In which form a key stands in `text`, also mixed, folded into lines, or one inside the other.
pub fn sighting(text: &[u8], key: &str) -> Option<&'static str> {
    let key_bytes = key.as_bytes();
    let percent = unescape(text, b'%', 0);
    let json = unescape(text, b'\\', 1);
    let both = unescape(&percent, b'\\', 1);
    let plain = [
        (text, "plain"),
        (&percent, "percent"),
        (&json, "JSON"),
        (&both, "percent and JSON"),
    ];
    if let Some((_, form)) = plain.iter().find(|(view, _)| contains(view, key_bytes)) {
        return Some(form);
    }
    let (hex, cores) = (hexadecimal(key), base64_cores(key));
    plain.iter().find_map(|(view, _)| {
        let dense: Vec<u8> = view
            .iter()
            .copied()
            .filter(|byte| !byte.is_ascii_whitespace())
            .collect();
        if contains(&dense.to_ascii_lowercase(), hex.as_bytes()) {
            return Some("hexadecimal");
        }
        let standard: Vec<u8> = dense
            .iter()
            .map(|byte| match byte {
                b'-' => b'+',
                b'_' => b'/',
                other => *other,
            })
            .collect();
        let found = cores.iter().any(|core| contains(&standard, core.as_bytes()));
        found.then_some("base64")
    })
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

/// Undoes escapes: `%41` with `%`, and `\u0041`, `\"`, `\/`, `\\` with a backslash.
fn unescape(text: &[u8], mark: u8, form: u8) -> Vec<u8> {
    let number = |digits: Option<&[u8]>| {
        let digits = std::str::from_utf8(digits?).ok()?;
        u32::from_str_radix(digits, 16)
            .ok()
            .and_then(|number| u8::try_from(number).ok())
    };
    let (mut out, mut at) = (Vec::with_capacity(text.len()), 0);
    while at < text.len() {
        let rest = &text[at..];
        let decoded = match (rest[0] == mark, form) {
            (false, _) => None,
            (true, 0) => number(rest.get(1..3)).map(|byte| (byte, 3)),
            (true, _) => match rest.get(1) {
                Some(b'u') => number(rest.get(2..6)).map(|byte| (byte, 6)),
                Some(byte @ (b'"' | b'\\' | b'/')) => Some((*byte, 2)),
                _ => None,
            },
        };
        let (byte, length) = decoded.unwrap_or((rest[0], 1));
        out.push(byte);
        at += length;
    }
    out
}

/// Texts to look for in large places.
pub struct Search {
    patterns: NamedTempFile,
}

impl Search {
    /// A search for keys in all their usual forms.
    ///
    /// # Errors
    /// When the patterns cannot be kept.
    pub fn for_keys(keys: &[&str]) -> Result<Self> {
        let mut patterns = NamedTempFile::new()?;
        for form in keys.iter().flat_map(|key| forms(key)) {
            ensure!(
                form.len() > 8 && !form.contains('\n'),
                "not something to look for"
            );
            writeln!(patterns, "{form}")?;
        }
        patterns.flush()?;
        Ok(Self { patterns })
    }

    fn grep(&self) -> Command {
        let mut command = Command::new("grep");
        command
            .env("LC_ALL", "C")
            .args(["-z", "-a", "-o", "-F", "-f"])
            .arg(self.patterns.path());
        command
    }

    /// What stands in `texts`.
    ///
    /// # Errors
    /// When the search fails.
    pub fn in_bytes(&self, texts: impl IntoIterator<Item = Vec<u8>> + Send) -> Result<Vec<String>> {
        let mut child = self.grep().stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let mut input = child.stdin.take().context("a pipe")?;
        let output = std::thread::scope(|scope| {
            scope.spawn(move || texts.into_iter().try_for_each(|text| input.write_all(&text)));
            child.wait_with_output()
        })?;
        found(&output)
    }

    /// What stands in the files below a directory; links and special files are left out.
    ///
    /// # Errors
    /// When the search fails.
    pub fn in_files(&self, directory: &Path) -> Result<Vec<String>> {
        let output = self
            .grep()
            .args(["-r", "-s", "-H", "--devices=skip"])
            .arg(directory)
            .output()?;
        // Files that went away meanwhile make grep fail, not the search.
        Ok(lines(&output.stdout))
    }

    /// What stands in a process's memory.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn in_memory(&self, pid: u32) -> Result<Vec<String>> {
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).context("the process's mappings")?;
        let memory = File::open(format!("/proc/{pid}/mem")).context("the process's memory")?;
        let mappings: Vec<(u64, u64)> = maps.lines().filter_map(mapping).collect();
        ensure!(!mappings.is_empty(), "process {pid} has no memory");
        let pieces = mappings
            .into_iter()
            .flat_map(|(from, to)| read(&memory, from, to));
        self.in_bytes(pieces.collect::<Vec<_>>())
    }
}

fn found(output: &std::process::Output) -> Result<Vec<String>> {
    let code = output.status.code();
    ensure!(
        code == Some(0) || code == Some(1),
        "grep: {:?} {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(lines(&output.stdout))
}

fn lines(output: &[u8]) -> Vec<String> {
    let lines = output.split(|&byte| byte == 0).filter(|line| !line.is_empty());
    lines
        .map(|line| String::from_utf8_lossy(line).into_owned())
        .collect()
}

/// The borders of a readable mapping.
fn mapping(line: &str) -> Option<(u64, u64)> {
    let mut fields = line.split_whitespace();
    let (from, to) = fields.next()?.split_once('-')?;
    let readable = fields.next()?.starts_with('r');
    let (from, to) = (
        u64::from_str_radix(from, 16).ok()?,
        u64::from_str_radix(to, 16).ok()?,
    );
    let own = !line.ends_with("[vvar]") && !line.ends_with("[vsyscall]");
    (readable && own && to - from < MAPPING).then_some((from, to))
}

fn read(mut memory: &File, from: u64, to: u64) -> Option<Vec<u8>> {
    memory.seek(SeekFrom::Start(from)).ok()?;
    let (mut bytes, mut piece) = (Vec::new(), vec![0; PIECE]);
    let mut left = usize::try_from(to - from).ok()?;
    while left > 0 {
        let length = left.min(PIECE);
        match memory.read(&mut piece[..length]) {
            Ok(read) if read > 0 => {
                // Untouched memory is all zero; one of those bytes parts what is on either side.
                if piece[..read].iter().any(|&byte| byte != 0) {
                    bytes.extend_from_slice(&piece[..read]);
                } else {
                    bytes.push(0);
                }
                left -= read;
            }
            _ => break,
        }
    }
    bytes.push(0);
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use base64::engine::general_purpose::{STANDARD, URL_SAFE};

    use super::*;

    const KEY: &str = "sk-can+ary/\"q\\u0041\"~%?=0123456789";

    #[test]
    fn a_key_is_seen_in_every_form() {
        for before in ["", "a", "ab", "abc"] {
            let text = format!("{before}{KEY} after");
            let folded = STANDARD.encode(&text).into_bytes();
            let folded: Vec<u8> = folded.chunks(7).collect::<Vec<_>>().join(&b"\r\n"[..]);
            let all: String = text.bytes().map(|byte| format!("%{byte:02x}")).collect();
            let unicode: String = text.bytes().map(|byte| format!("\\u{byte:04X}")).collect();
            for encoded in [
                text.clone().into_bytes(),
                STANDARD.encode(&text).into_bytes(),
                URL_SAFE.encode(&text).into_bytes(),
                folded,
                hexadecimal(&text).to_uppercase().into_bytes(),
                percent(&text, false).into_bytes(),
                serde_json::Value::from(text.as_str()).to_string().into_bytes(),
                all.into_bytes(),
                unicode.into_bytes(),
            ] {
                assert!(
                    sighting(&encoded, KEY).is_some(),
                    "{}",
                    String::from_utf8_lossy(&encoded)
                );
            }
        }
        assert_eq!(sighting(b"nothing of the kind", KEY), None);
    }

    #[test]
    fn memory_and_files_are_searched() {
        let kept = std::hint::black_box(format!("{}-in-the-heap-of-this-test", "canary"));
        let search = Search::for_keys(&[&kept]).expect("a search");
        assert!(
            !search
                .in_memory(std::process::id())
                .expect("own memory")
                .is_empty()
        );
        let directory = tempfile::tempdir().expect("a directory");
        std::fs::write(
            directory.path().join("a"),
            format!("x\0{}\0", STANDARD.encode(&kept)),
        )
        .expect("a file");
        assert_eq!(search.in_files(directory.path()).expect("searched").len(), 1);
        let other = Search::for_keys(&["another text altogether"]).expect("a search");
        assert!(other.in_files(directory.path()).expect("searched").is_empty());
    }
}
