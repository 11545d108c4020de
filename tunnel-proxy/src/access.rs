//! Who may use a tunnel. Owns: where a token may stand, and comparing it. A token is known here only by its
//! digest, and never leaves: what carried it does not go on to the sandbox.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use http::{
    HeaderMap, HeaderName, HeaderValue,
    header::{AUTHORIZATION, PROXY_AUTHORIZATION},
};
use sandgate_api::tunnel;
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

/// A header for the token alone, for programs behind the tunnel that use `Authorization` themselves.
pub const TOKEN_HEADER: HeaderName = HeaderName::from_static("x-tunnel-token");

/// Longest text that is compared with a token.
const TOKEN_MAX: usize = 512;

/// Who may use a tunnel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Access {
    /// Anybody.
    Public,
    /// Whoever shows the token with this SHA-256 digest.
    Token([u8; 32]),
}

/// The digest is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the token's digest is not one of SHA-256")]
pub struct NoDigest;

/// What a request may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Go on.
    Allowed,
    /// It shows no token.
    Missing,
    /// It shows another.
    Wrong,
}

impl TryFrom<&tunnel::Access> for Access {
    type Error = NoDigest;

    fn try_from(access: &tunnel::Access) -> Result<Self, NoDigest> {
        match access {
            tunnel::Access::Public => Ok(Self::Public),
            tunnel::Access::Token { sha256 } => {
                let mut digest = [0; 32];
                hex::decode_to_slice(sha256, &mut digest).map_err(|_malformed| NoDigest)?;
                Ok(Self::Token(digest))
            }
        }
    }
}

impl Access {
    /// Judges a request by `Authorization: Bearer` and `X-Tunnel-Token`. Several are allowed: a program behind the
    /// tunnel may want a bearer of its own.
    pub fn judge(&self, headers: &HeaderMap) -> Verdict {
        let bearers = headers.get_all(AUTHORIZATION).iter().filter_map(bearer);
        let own = headers.get_all(TOKEN_HEADER).iter().map(HeaderValue::as_bytes);
        self.judge_shown(bearers.chain(own))
    }

    /// The same for `CONNECT`, where clients of proxies have further ways: `Proxy-Authorization` with the token as a
    /// bearer or as a password.
    pub fn judge_connect(&self, headers: &HeaderMap) -> Verdict {
        let all = || headers.get_all(PROXY_AUTHORIZATION).iter();
        let passwords: Vec<Vec<u8>> = all().filter_map(password).collect();
        let proxy = all()
            .filter_map(bearer)
            .chain(passwords.iter().map(Vec::as_slice));
        match (self.judge(headers), self.judge_shown(proxy)) {
            (Verdict::Allowed, _) | (_, Verdict::Allowed) => Verdict::Allowed,
            (Verdict::Wrong, _) | (_, Verdict::Wrong) => Verdict::Wrong,
            (Verdict::Missing, Verdict::Missing) => Verdict::Missing,
        }
    }

    fn judge_shown<'a>(&self, shown: impl Iterator<Item = &'a [u8]>) -> Verdict {
        if matches!(self, Self::Public) {
            return Verdict::Allowed;
        }
        let mut verdict = Verdict::Missing;
        for candidate in shown {
            if self.is_token(candidate) {
                return Verdict::Allowed;
            }
            verdict = Verdict::Wrong;
        }
        verdict
    }

    fn is_token(&self, shown: &[u8]) -> bool {
        shown.len() <= TOKEN_MAX && self.has_digest(&Sha256::digest(shown).into())
    }

    /// Takes the same time whatever the two have in common.
    fn has_digest(&self, shown: &[u8; 32]) -> bool {
        match self {
            Self::Public => false,
            Self::Token(digest) => bool::from(shown.ct_eq(digest)),
        }
    }
}

/// Takes out what carried a token: `X-Tunnel-Token` always, `Authorization` where it is one of `accesses`,
/// `Proxy-Authorization` because it is for proxies.
pub fn strip(accesses: &[Access], headers: &mut HeaderMap) {
    headers.remove(TOKEN_HEADER);
    headers.remove(PROXY_AUTHORIZATION);
    let is_ours = |value: &&HeaderValue| {
        bearer(value)
            .filter(|shown| shown.len() <= TOKEN_MAX)
            .is_some_and(|shown| {
                let digest = Sha256::digest(shown).into();
                accesses.iter().any(|access| access.has_digest(&digest))
            })
    };
    let all = headers.get_all(AUTHORIZATION).iter();
    let others: Vec<HeaderValue> = all.filter(|value| !is_ours(value)).cloned().collect();
    headers.remove(AUTHORIZATION);
    for value in others {
        headers.append(AUTHORIZATION, value);
    }
}

/// What follows the word `Bearer` (RFC 6750 2.1).
fn bearer(value: &HeaderValue) -> Option<&[u8]> {
    after_scheme(value, b"bearer")
}

/// The password of `Basic` (RFC 7617).
fn password(value: &HeaderValue) -> Option<Vec<u8>> {
    let encoded = after_scheme(value, b"basic").filter(|encoded| encoded.len() <= 2 * TOKEN_MAX)?;
    let pair = STANDARD.decode(encoded).ok()?;
    let colon = pair.iter().position(|byte| *byte == b':')?;
    Some(pair[colon + 1..].to_vec())
}

fn after_scheme<'a>(value: &'a HeaderValue, scheme: &[u8]) -> Option<&'a [u8]> {
    let value = value.as_bytes();
    let (word, rest) = value.split_at_checked(scheme.len())?;
    let is_scheme = word.eq_ignore_ascii_case(scheme) && rest.first() == Some(&b' ');
    is_scheme.then(|| rest.trim_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKEN: &str = "t0ken";

    fn private() -> Access {
        Access::try_from(&tunnel::Access::Token {
            sha256: hex::encode(Sha256::digest(TOKEN)),
        })
        .expect("a digest")
    }

    fn headers(lines: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(*name, HeaderValue::from_str(value).expect("a value"));
        }
        headers
    }

    #[test]
    fn the_token_opens_in_either_place_and_nothing_else_does() {
        use Verdict::{Allowed, Missing, Wrong};
        for (lines, verdict) in [
            (vec![("authorization", "Bearer t0ken")], Allowed),
            (vec![("authorization", "bEARER  t0ken ")], Allowed),
            (vec![("x-tunnel-token", "t0ken")], Allowed),
            (
                vec![("authorization", "Bearer mine"), ("x-tunnel-token", "t0ken")],
                Allowed,
            ),
            (vec![], Missing),
            (vec![("authorization", "Basic dXNlcjp0MGtlbg==")], Missing),
            (vec![("proxy-authorization", "Bearer t0ken")], Missing),
            (vec![("cookie", "token=t0ken")], Missing),
            (vec![("authorization", "Bearert0ken")], Missing),
            (vec![("authorization", "Bearer ")], Wrong),
            (vec![("authorization", "Bearer t0ken2")], Wrong),
            (vec![("x-tunnel-token", "T0KEN")], Wrong),
            (vec![("x-tunnel-token", "")], Wrong),
        ] {
            assert_eq!(private().judge(&headers(&lines)), verdict, "{lines:?}");
            assert_eq!(Access::Public.judge(&headers(&lines)), Allowed);
        }
    }

    #[test]
    fn clients_of_proxies_have_their_ways() {
        use Verdict::{Allowed, Missing, Wrong};
        for (line, verdict) in [
            (("proxy-authorization", "Bearer t0ken"), Allowed),
            (("proxy-authorization", "Basic dXNlcjp0MGtlbg=="), Allowed),
            (("proxy-authorization", "Basic OnQwa2Vu"), Allowed),
            (("x-tunnel-token", "t0ken"), Allowed),
            (("proxy-authorization", "Basic dDBrZW46"), Wrong),
            (("proxy-authorization", "Basic ???"), Missing),
            (("host", "x"), Missing),
        ] {
            assert_eq!(private().judge_connect(&headers(&[line])), verdict, "{line:?}");
        }
    }

    #[test]
    fn the_token_goes_no_further_and_a_programs_own_authorization_does() {
        let mut mixed = headers(&[
            ("authorization", "Bearer mine"),
            ("authorization", "Bearer t0ken"),
            ("x-tunnel-token", "t0ken"),
            ("proxy-authorization", "Basic OnQwa2Vu"),
            ("accept", "*/*"),
        ]);
        strip(&[Access::Public, private()], &mut mixed);
        assert_eq!(
            mixed,
            headers(&[("authorization", "Bearer mine"), ("accept", "*/*")])
        );
        for own in ["Basic dXNlcjp0MGtlbg==", "Bearer other", "t0ken"] {
            let mut kept = headers(&[("authorization", own)]);
            strip(&[private()], &mut kept);
            assert_eq!(kept, headers(&[("authorization", own)]));
        }
    }

    #[test]
    fn what_is_no_digest_is_refused() {
        for sha256 in ["", "00", "zz", &"0".repeat(63), &"0".repeat(66)] {
            let access = tunnel::Access::Token {
                sha256: sha256.to_owned(),
            };
            assert_eq!(Access::try_from(&access), Err(NoDigest), "{sha256}");
        }
    }
}
