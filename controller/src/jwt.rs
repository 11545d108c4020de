//! JSON Web Tokens (RFC 7519) in the one form that this program writes and reads: compact, signed with HMAC-SHA-256.
//!
//! There is no second algorithm, so a token cannot choose one: a header that names another (`none`, `RS256` …) or asks
//! for an extension (`crit`, RFC 7515, 4.1.11) is refused before the signature is looked at.

use aws_lc_rs::hmac;
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// Shortest secret, in bytes: as long as the digest (RFC 7518, 3.2).
pub const MIN_SECRET: usize = 32;

/// Longest token that is looked at, in bytes.
const MAX_TOKEN: usize = 8 * 1024;

/// How far the clock of whoever signed may be ahead, in seconds.
const LEEWAY: i64 = 60;

/// Whom tokens are for. One without an audience is for everybody who has the secret.
const AUDIENCE: &str = "sandgate";

/// What tokens are signed and verified with.
pub struct TokenKey(hmac::Key);

/// What a token says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims {
    /// Who: a user's or a key's id, or a name of somebody whom the issuer knows.
    pub sub: String,
    /// The organisation that it acts for.
    pub org_id: String,
    /// At most this role.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role: Option<String>,
    /// What it may do; everything that the role allows when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scopes: Option<Vec<String>>,
    /// When it stops working, in seconds since 1970.
    pub exp: i64,
}

/// The token does not work, for whatever reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the token does not work")]
pub struct Refused;

impl TokenKey {
    /// A key of at least [`MIN_SECRET`] bytes.
    pub fn new(secret: &[u8]) -> Self {
        Self(hmac::Key::new(hmac::HMAC_SHA256, secret))
    }

    /// Signs claims, as issued at `now` (seconds since 1970).
    pub fn sign(&self, claims: &Claims, now: i64) -> String {
        let mut payload = json!(claims);
        payload["iat"] = now.into();
        payload["iss"] = AUDIENCE.into();
        payload["aud"] = AUDIENCE.into();
        let header = URL_SAFE_NO_PAD.encode(json!({"alg": "HS256", "typ": "JWT"}).to_string());
        let signed = format!("{header}.{}", URL_SAFE_NO_PAD.encode(payload.to_string()));
        let signature = hmac::sign(&self.0, signed.as_bytes());
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
    }

    /// What a token says, if it was signed with this key and works at `now` (seconds since 1970).
    ///
    /// # Errors
    /// When it is malformed, signed otherwise, expired, not valid yet, or for somebody else.
    pub fn verify(&self, token: &str, now: i64) -> Result<Claims, Refused> {
        if token.len() > MAX_TOKEN {
            return Err(Refused);
        }
        let (signed, signature) = token.rsplit_once('.').ok_or(Refused)?;
        let (header, payload) = signed.split_once('.').ok_or(Refused)?;
        let header = object(header)?;
        if header.get("alg").and_then(Value::as_str) != Some("HS256") || header.contains_key("crit") {
            return Err(Refused);
        }
        let signature = URL_SAFE_NO_PAD.decode(signature).map_err(|_malformed| Refused)?;
        hmac::verify(&self.0, signed.as_bytes(), &signature).map_err(|_other| Refused)?;
        let mut claims = object(payload)?;
        // Seconds may have a fraction (RFC 7519, 2); what is neither is no time.
        let time = |value: &Value| match value.as_f64() {
            #[expect(clippy::cast_possible_truncation, reason = "saturates, and far enough")]
            Some(seconds) if seconds.is_finite() => Ok(seconds.floor() as i64),
            Some(_) | None => Err(Refused),
        };
        let exp = time(claims.get("exp").ok_or(Refused)?)?;
        if exp <= now {
            return Err(Refused);
        }
        for name in ["nbf", "iat"] {
            if let Some(value) = claims.get(name)
                && time(value)? > now.saturating_add(LEEWAY)
            {
                return Err(Refused);
            }
        }
        let is_for_us = match claims.get("aud") {
            None => true,
            Some(Value::String(audience)) => audience == AUDIENCE,
            Some(Value::Array(audiences)) => audiences.iter().any(|audience| audience == AUDIENCE),
            Some(_) => false,
        };
        if !is_for_us {
            return Err(Refused);
        }
        claims.insert("exp".to_owned(), exp.into());
        serde_json::from_value(Value::Object(claims)).map_err(|_malformed| Refused)
    }
}

fn object(part: &str) -> Result<Map<String, Value>, Refused> {
    let text = URL_SAFE_NO_PAD.decode(part).map_err(|_malformed| Refused)?;
    serde_json::from_slice(&text).map_err(|_malformed| Refused)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: i64 = 1_800_000_000;

    fn key() -> TokenKey {
        TokenKey::new(&[7; 32])
    }

    fn claims() -> Claims {
        Claims {
            sub: "somebody".to_owned(),
            org_id: "org-1".to_owned(),
            role: Some("viewer".to_owned()),
            scopes: None,
            exp: NOW + 60,
        }
    }

    /// As anybody could make one who has the secret.
    fn made(secret: &[u8], header: &Value, payload: &Value) -> String {
        let signed = format!(
            "{}.{}",
            URL_SAFE_NO_PAD.encode(header.to_string()),
            URL_SAFE_NO_PAD.encode(payload.to_string())
        );
        let signature = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, secret), signed.as_bytes());
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
    }

    #[test]
    fn a_token_says_what_was_signed_until_it_expires() {
        let token = key().sign(&claims(), NOW);
        assert_eq!(token.split('.').count(), 3);
        assert_eq!(key().verify(&token, NOW), Ok(claims()));
        assert_eq!(key().verify(&token, NOW + 59), Ok(claims()));
        assert_eq!(key().verify(&token, NOW + 60), Err(Refused));
        assert_eq!(TokenKey::new(&[8; 32]).verify(&token, NOW), Err(Refused));
    }

    #[test]
    fn the_example_of_rfc_7515_verifies() {
        // Appendix A.1: the signature, over the text as it stands there.
        let secret = URL_SAFE_NO_PAD
            .decode("AyM1SysPpbyDfgZld3umj1qzKObwVMkoqQ-EstJQLr_T-1qS0gZH75aKtMN3Yj0iPS4hcgUuTwjAzZr1Z9CAow")
            .expect("base64");
        let signed = "eyJ0eXAiOiJKV1QiLA0KICJhbGciOiJIUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dH\
                      A6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ";
        let signature = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &secret), signed.as_bytes());
        assert_eq!(
            URL_SAFE_NO_PAD.encode(signature),
            "dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk"
        );
    }

    #[test]
    fn the_algorithm_is_not_the_tokens_to_choose() {
        let payload = json!({"sub": "x", "org_id": "org-1", "exp": NOW + 60});
        assert!(
            key()
                .verify(&made(&[7; 32], &json!({"alg": "HS256"}), &payload), NOW)
                .is_ok()
        );
        for header in [
            json!({"alg": "none"}),
            json!({"alg": "None"}),
            json!({"alg": "RS256"}),
            json!({"alg": "HS512"}),
            json!({"alg": "hs256"}),
            json!({"alg": null}),
            json!({"alg": ["HS256"]}),
            json!({}),
            json!({"alg": "HS256", "crit": ["b64"], "b64": false}),
        ] {
            let token = made(&[7; 32], &header, &payload);
            assert_eq!(key().verify(&token, NOW), Err(Refused), "{header}");
            let unsigned = format!("{}.", token.rsplit_once('.').expect("dots").0);
            assert_eq!(key().verify(&unsigned, NOW), Err(Refused), "{header}");
        }
        let signed = made(&[7; 32], &json!({"alg": "HS256"}), &payload);
        let unsigned = format!("{}.", signed.rsplit_once('.').expect("dots").0);
        assert_eq!(key().verify(&unsigned, NOW), Err(Refused));
    }

    #[test]
    fn times_and_audience_are_looked_at() {
        let verified = |changes: Value| {
            let mut payload = json!({"sub": "x", "org_id": "org-1", "exp": NOW + 60});
            for (name, value) in changes.as_object().expect("an object") {
                payload[name] = value.clone();
            }
            key().verify(&made(&[7; 32], &json!({"alg": "HS256"}), &payload), NOW)
        };
        for right in [
            json!({}),
            json!({"nbf": NOW, "iat": NOW - 5}),
            json!({"nbf": NOW + 60}),
            json!({"exp": 1_800_000_000.5 + 1.0}),
            json!({"aud": "sandgate"}),
            json!({"aud": ["other", "sandgate"]}),
            json!({"iss": "anybody", "more": [1, 2]}),
        ] {
            assert!(verified(right.clone()).is_ok(), "{right}");
        }
        for wrong in [
            json!({"exp": NOW}),
            json!({"exp": null}),
            json!({"exp": "1900000000"}),
            json!({"nbf": NOW + 61}),
            json!({"nbf": "soon"}),
            json!({"iat": NOW + 61}),
            json!({"aud": "other"}),
            json!({"aud": []}),
            json!({"aud": null}),
            json!({"sub": 7}),
            json!({"org_id": null}),
            json!({"scopes": "*"}),
            json!({"role": 1}),
        ] {
            assert_eq!(verified(wrong.clone()), Err(Refused), "{wrong}");
        }
        let without = made(
            &[7; 32],
            &json!({"alg": "HS256"}),
            &json!({"sub": "x", "org_id": "org-1"}),
        );
        assert_eq!(key().verify(&without, NOW), Err(Refused), "a token has an end");
    }

    #[test]
    fn what_is_no_token_is_refused() {
        let token = key().sign(&claims(), NOW);
        let (signed, signature) = token.rsplit_once('.').expect("dots");
        for text in [
            String::new(),
            ".".to_owned(),
            "..".to_owned(),
            "a.b.c".to_owned(),
            signed.to_owned(),
            format!("{token}."),
            format!("{token}="),
            format!("{signed}.{}", &signature[1..]),
            format!(" {token}"),
            format!("{token}{}", "A".repeat(MAX_TOKEN)),
        ] {
            assert_eq!(key().verify(&text, NOW), Err(Refused), "{text:?}");
        }
    }
}
