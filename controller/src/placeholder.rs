//! What stands in a sandbox in a secret's place: random, and looking like the original where clients look.

use sandgate_api::credential::PLACEHOLDER_MARK;

/// Random bytes of a placeholder: 128 bits.
const RANDOM: usize = 16;

/// Beginnings that clients check, the longest first where one begins with another. They say which service a
/// key is for, and nothing else about it.
const PREFIXES: [&str; 22] = [
    "sk-ant-api03-",
    "sk-ant-oat01-",
    "sk-ant-",
    "sk-proj-",
    "sk-svcacct-",
    "sk-or-v1-",
    "sk-",
    "github_pat_",
    "ghp_",
    "gho_",
    "ghu_",
    "ghs_",
    "glpat-",
    "hf_",
    "AIza",
    "sk_live_",
    "sk_test_",
    "rk_live_",
    "rk_test_",
    "xoxb-",
    "xoxp-",
    "npm_",
];

/// What placeholders for this value begin with.
pub fn prefix_of(value: &str) -> &'static str {
    PREFIXES
        .into_iter()
        .find(|prefix| value.starts_with(prefix))
        .unwrap_or("")
}

/// A new placeholder: with `ghp_` it is as long as the original, 40 characters.
///
/// # Errors
/// When the system has no random numbers.
pub fn fresh(prefix: &str) -> Result<String, getrandom::Error> {
    let mut random = [0; RANDOM];
    getrandom::fill(&mut random)?;
    Ok(format!("{prefix}{PLACEHOLDER_MARK}{}", hex::encode(random)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_placeholder_looks_like_the_original_and_tells_nothing_of_it() {
        for (value, prefix) in [
            ("sk-ant-api03-canary", "sk-ant-api03-"),
            ("sk-ant-canary", "sk-ant-"),
            ("sk-proj-canary", "sk-proj-"),
            ("sk-canary", "sk-"),
            ("ghp_canary", "ghp_"),
            ("github_pat_canary", "github_pat_"),
            ("canary", ""),
            ("", ""),
        ] {
            assert_eq!(prefix_of(value), prefix, "{value}");
            let placeholder = fresh(prefix_of(value)).expect("a placeholder");
            assert!(
                placeholder.starts_with(prefix) && !placeholder.contains("canary"),
                "{placeholder}"
            );
            assert_ne!(placeholder, fresh(prefix).expect("another"));
        }
        assert_eq!(fresh("ghp_").expect("a placeholder").len(), 40);
    }

    #[test]
    fn a_longer_prefix_is_found_before_a_shorter_one() {
        for prefix in PREFIXES {
            assert_eq!(prefix_of(&format!("{prefix}x")), prefix);
        }
    }

    #[test]
    fn a_placeholder_passes_every_header_query_and_shell() {
        for prefix in PREFIXES {
            let placeholder = fresh(prefix).expect("a placeholder");
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
            assert!(placeholder.bytes().all(plain), "{placeholder}");
        }
    }
}
