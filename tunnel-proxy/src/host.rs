//! Host names of tunnels: `{port}-{sandbox}.{domain}`. Pure.

use sandgate_api::id::SandboxId;

/// The sandbox and the port that an authority (a name, perhaps with a port) leads to; nothing when it is no
/// name of ours.
pub fn read(authority: &str, domain: &str) -> Option<(SandboxId, u16)> {
    let name = match authority.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        Some(_) => return None,
        None => authority,
    };
    let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
    let label = name.strip_suffix(domain)?.strip_suffix('.')?;
    let (port, sandbox) = label.split_once('-')?;
    // One spelling only: no sign, no zero in front.
    if port.starts_with('0') || !port.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    Some((sandbox.parse().ok()?, port.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_name_of_ours_is_read_however_it_is_spelled() {
        for authority in [
            "3000-sandbox-0a1b.localhost",
            "3000-sandbox-0a1b.localhost:8081",
            "3000-sandbox-0a1b.localhost.:8081",
            "3000-Sandbox-0A1B.LOCALHOST",
        ] {
            let (sandbox, port) = read(authority, "localhost").expect(authority);
            assert_eq!((sandbox.as_str(), port), ("sandbox-0a1b", 3000));
        }
        assert!(read("80-sandbox-0.tunnels.example.org", "tunnels.example.org").is_some());
    }

    #[test]
    fn what_is_not_ours_is_nobodys() {
        for authority in [
            "",
            "localhost",
            ".localhost",
            "3000-sandbox-0a1b",
            "3000-sandbox-0a1b.example.org",
            "3000-sandbox-0a1b.evil-localhost",
            "3000-sandbox-0a1blocalhost",
            "x.3000-sandbox-0a1b.localhost",
            "03000-sandbox-0a1b.localhost",
            "+3000-sandbox-0a1b.localhost",
            "65536-sandbox-0a1b.localhost",
            "0-sandbox-0a1b.localhost",
            "-sandbox-0a1b.localhost",
            "3000-org-0a1b.localhost",
            "3000-sandbox-.localhost",
            "3000-sandbox-0a1b.localhost:80:80",
            "3000-sandbox-0a1b.localhost:x",
            "127.0.0.1:8081",
            "[::1]:8081",
        ] {
            assert_eq!(read(authority, "localhost"), None, "{authority}");
        }
    }

    proptest! {
        #[test]
        fn no_text_can_panic_the_reader(text in "\\PC{0,80}") {
            read(&text, "localhost");
            read(&format!("{text}.localhost"), "localhost");
        }
    }
}
