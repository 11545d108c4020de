//! API keys: issued once, stored as a hash, checked on every request.
//!
//! A key is `sk_sandbox_<id>.<organisation>.<secret>`: three base64url segments, because published clients
//! take anything of that form for a token they may send without naming the organisation.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use jiff::{SignedDuration, Timestamp};
use sandgate_api::{
    id::{ApiKeyId, OrgId},
    rest::ApiKey,
};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

use super::{Service, ServiceError};
use crate::store::{KeyRecord, NewKey};

const PREFIX: &str = "sk_sandbox_";

/// Random bytes of a key.
const SECRET: usize = 32;

/// Longest credential that is looked at, in bytes.
const MAX_KEY: usize = 256;

/// Keys of one organisation that are not revoked.
const MAX_KEYS: u32 = 1_000;

/// How exactly the last use of a key is known.
const TOUCH_INTERVAL: SignedDuration = SignedDuration::from_secs(60);

/// The one answer to every credential that does not work, so that none of its parts can be guessed.
const REFUSED: &str = "the API key is unknown, revoked or expired";

/// What a key may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Everything.
    All,
    /// Look at sandboxes. Part of the two that follow.
    SandboxRead,
    /// Create, stop and delete sandboxes.
    SandboxCreate,
    /// Run commands, read and write files, open and close tunnels.
    SandboxExecute,
    /// Look at policies and the egress audit.
    NetworkRead,
    /// Change policies, look at the egress audit.
    NetworkWrite,
    /// Look at the names and bindings of secrets.
    SecretsRead,
    /// Store, change, bind and delete secrets.
    SecretsWrite,
    /// List, create and revoke keys, none of which can do more.
    Keys,
}

impl Scope {
    const EVERY: [Self; 9] = [
        Self::All,
        Self::SandboxRead,
        Self::SandboxCreate,
        Self::SandboxExecute,
        Self::NetworkRead,
        Self::NetworkWrite,
        Self::SecretsRead,
        Self::SecretsWrite,
        Self::Keys,
    ];

    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::All => "*",
            Self::SandboxRead => "sandbox:read",
            Self::SandboxCreate => "sandbox:create",
            Self::SandboxExecute => "sandbox:execute",
            Self::NetworkRead => "network:read",
            Self::NetworkWrite => "network:write",
            Self::SecretsRead => "secrets:read",
            Self::SecretsWrite => "secrets:write",
            Self::Keys => "api-keys:write",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        Self::EVERY.into_iter().find(|scope| scope.as_str() == text)
    }

    /// Whether who has this has also `wanted`.
    fn includes(self, wanted: Self) -> bool {
        self == wanted
            || match self {
                Self::All => true,
                Self::SandboxCreate | Self::SandboxExecute => wanted == Self::SandboxRead,
                Self::NetworkWrite => wanted == Self::NetworkRead,
                Self::SecretsWrite => wanted == Self::SecretsRead,
                Self::SandboxRead | Self::NetworkRead | Self::SecretsRead | Self::Keys => false,
            }
    }
}

/// Somebody who has shown a key that works.
#[derive(Debug, Clone)]
pub struct Caller {
    org_id: OrgId,
    scopes: Vec<Scope>,
}

impl Caller {
    /// The organisation the key belongs to, which is the only one it can act for.
    pub fn org_id(&self) -> &OrgId {
        &self.org_id
    }

    /// Refuses a caller whose key may not do this.
    ///
    /// # Errors
    /// [`ServiceError::Forbidden`].
    pub fn may(&self, wanted: Scope) -> Result<(), ServiceError> {
        if self.scopes.iter().any(|scope| scope.includes(wanted)) {
            return Ok(());
        }
        Err(ServiceError::Forbidden(format!(
            "the API key lacks the scope `{}`",
            wanted.as_str()
        )))
    }
}

/// A key to be made, unchecked.
#[derive(Debug, Clone)]
pub struct KeyRequest {
    /// What it is for.
    pub name: String,
    /// Days until it stops working.
    pub expires_in_days: Option<u64>,
    /// What it may do; everything its maker may when absent.
    pub scopes: Option<Vec<String>>,
}

/// A fresh key. The only place where the key itself stands.
#[derive(Clone)]
pub struct IssuedKey {
    /// The secret.
    pub key: String,
    /// The record.
    pub stored: NewKey,
}

impl Service {
    /// Finds out who shows this key.
    ///
    /// # Errors
    /// [`ServiceError::Unauthorized`], the same for every reason.
    pub async fn authenticate(&self, key: &str) -> Result<Caller, ServiceError> {
        let now = super::now();
        let id = key_id(key).ok_or(ServiceError::Unauthorized(REFUSED))?;
        let record = self
            .shared
            .store
            .key(&id)
            .await?
            .ok_or(ServiceError::Unauthorized(REFUSED))?;
        if !bool::from(record.hash.as_slice().ct_eq(hash(key).as_slice())) {
            return Err(ServiceError::Unauthorized(REFUSED));
        }
        if record.expires_at.is_some_and(|expires_at| expires_at <= now) {
            return Err(ServiceError::Unauthorized(REFUSED));
        }
        if record
            .last_used_at
            .is_none_or(|used| now.duration_since(used) >= TOUCH_INTERVAL)
        {
            self.touch(id, now);
        }
        Ok(Caller {
            org_id: record.org_id,
            // A scope this version does not know opens nothing.
            scopes: record
                .scopes
                .iter()
                .filter_map(|scope| Scope::parse(scope))
                .collect(),
        })
    }

    fn touch(&self, id: ApiKeyId, now: Timestamp) {
        let store = self.shared.store.clone();
        self.shared.tasks.spawn("touch key", async move {
            if let Err(error) = store.touch_key(&id, now).await {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "the use of a key is not recorded"
                );
            }
        });
    }

    /// Makes a key that can do no more than its maker's.
    ///
    /// # Errors
    /// A field that is not acceptable; too many keys.
    pub async fn create_key(
        &self,
        caller: &Caller,
        request: KeyRequest,
    ) -> Result<(ApiKey, String), ServiceError> {
        let now = super::now();
        let (name, scopes, expires_at) = check(caller, request, now)?;
        let issued = issue(&caller.org_id, name, scopes, expires_at)?;
        self.shared
            .store
            .insert_key(&issued.stored, MAX_KEYS, now)
            .await?;
        tracing::info!(target: "audit", org_id = %caller.org_id, key_id = %issued.stored.id, "API key created");
        let stored = issued.stored;
        let shown = ApiKey {
            id: stored.id,
            name: stored.name,
            key_prefix: stored.prefix,
            scopes: stored.scopes,
            last_used_at: None,
            expires_at: stored.expires_at,
            created_at: now,
        };
        Ok((shown, issued.key))
    }

    /// The organisation's keys, without their secrets.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn keys(&self, org_id: &OrgId) -> Result<Vec<ApiKey>, ServiceError> {
        Ok(self
            .shared
            .store
            .keys(org_id)
            .await?
            .into_iter()
            .map(shown)
            .collect())
    }

    /// Revokes a key at once. Doing it again is no error.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`] when the organisation has no such key.
    pub async fn revoke_key(&self, org_id: &OrgId, id: &ApiKeyId) -> Result<(), ServiceError> {
        if !self.shared.store.revoke_key(org_id, id, super::now()).await? {
            return Err(ServiceError::NotFound(format!("API key {id}")));
        }
        tracing::info!(target: "audit", org_id = %org_id, key_id = %id, "API key revoked");
        Ok(())
    }
}

fn check(
    caller: &Caller,
    request: KeyRequest,
    now: Timestamp,
) -> Result<(String, Vec<String>, Option<Timestamp>), ServiceError> {
    let name = request.name.trim().to_owned();
    if name.is_empty() || name.chars().count() > 100 || name.chars().any(char::is_control) {
        return Err(invalid(
            "name",
            "expected 1 to 100 characters without control characters",
        ));
    }
    let expires_at = match request.expires_in_days {
        None => None,
        Some(days @ 1..=3_650) => {
            let hours = i64::try_from(days * 24).unwrap_or(i64::MAX);
            Some(
                now.saturating_add(SignedDuration::from_hours(hours))
                    .unwrap_or(Timestamp::MAX),
            )
        }
        Some(_) => {
            return Err(invalid(
                "expires_in_days",
                "expected a whole number of days between 1 and 3650",
            ));
        }
    };
    let scopes = match request.scopes {
        None => caller
            .scopes
            .iter()
            .map(|scope| scope.as_str().to_owned())
            .collect(),
        Some(scopes) if scopes.is_empty() => {
            return Err(invalid(
                "scopes",
                "expected at least one scope; leave the field out for those of this key",
            ));
        }
        Some(scopes) => {
            for (index, text) in scopes.iter().enumerate() {
                let field = format!("scopes[{index}]");
                let Some(scope) = Scope::parse(text) else {
                    let known: Vec<_> = Scope::EVERY.iter().map(|scope| scope.as_str()).collect();
                    return Err(invalid(&field, &format!("expected one of {}", known.join(", "))));
                };
                caller.may(scope)?;
            }
            scopes
        }
    };
    Ok((name, scopes, expires_at))
}

fn invalid(field: &str, message: &str) -> ServiceError {
    ServiceError::Invalid {
        field: field.to_owned(),
        message: message.to_owned(),
    }
}

/// Makes a key.
pub(super) fn issue(
    org_id: &OrgId,
    name: String,
    scopes: Vec<String>,
    expires_at: Option<Timestamp>,
) -> Result<IssuedKey, ServiceError> {
    let mut secret = [0; SECRET];
    getrandom::fill(&mut secret).map_err(|error| ServiceError::Internal(error.to_string()))?;
    let id = ApiKeyId::random();
    let prefix = format!("{PREFIX}{}", id.as_str().trim_start_matches(ApiKeyId::PREFIX));
    let organization = org_id.as_str().trim_start_matches(OrgId::PREFIX);
    let key = format!("{prefix}.{organization}.{}", URL_SAFE_NO_PAD.encode(secret));
    let stored = NewKey {
        id,
        org_id: org_id.clone(),
        name,
        prefix,
        hash: hash(&key),
        scopes,
        expires_at,
    };
    Ok(IssuedKey { key, stored })
}

/// The public part of what may be a key.
fn key_id(key: &str) -> Option<ApiKeyId> {
    if key.len() > MAX_KEY {
        return None;
    }
    let mut segments = key.strip_prefix(PREFIX)?.split('.');
    let id = segments.next()?;
    if segments.count() != 2 {
        return None;
    }
    format!("{}{id}", ApiKeyId::PREFIX).parse().ok()
}

fn hash(key: &str) -> [u8; 32] {
    Sha256::digest(key).into()
}

fn shown(record: KeyRecord) -> ApiKey {
    ApiKey {
        id: record.id,
        name: record.name,
        key_prefix: record.prefix,
        scopes: record.scopes,
        last_used_at: record.last_used_at,
        expires_at: record.expires_at,
        created_at: record.created_at,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_has_the_form_that_published_clients_send_without_an_organization() {
        let issued = issue(&OrgId::random(), "x".to_owned(), vec![], None).expect("a key");
        let segments: Vec<_> = issued.key.split('.').collect();
        assert_eq!(segments.len(), 3, "{}", issued.stored.prefix);
        for segment in segments {
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
            assert!(!segment.is_empty() && segment.bytes().all(plain), "{segment}");
        }
        assert!(issued.key.starts_with("sk_sandbox_"));
        assert_eq!(key_id(&issued.key), Some(issued.stored.id));
    }

    #[test]
    fn what_is_no_key_names_none() {
        for text in [
            "",
            "sk_sandbox_",
            "sk_sandbox_a",
            "sk_sandbox_a.b",
            "sk_sandbox_a.b.c.d",
            "sk_sandbox_A.b.c",
            "sk_sandbox_../x.b.c",
            "x_a.b.c",
        ] {
            assert_eq!(key_id(text), None, "{text:?}");
        }
        assert_eq!(key_id(&format!("sk_sandbox_a.b.{}", "c".repeat(300))), None);
    }

    #[test]
    fn a_scope_is_written_in_one_way() {
        for scope in Scope::EVERY {
            assert_eq!(Scope::parse(scope.as_str()), Some(scope));
            assert!(Scope::All.includes(scope) && scope.includes(scope));
        }
        assert_eq!(Scope::parse("sandbox:*"), None);
        assert!(!Scope::SandboxRead.includes(Scope::SandboxCreate));
        assert!(!Scope::SandboxExecute.includes(Scope::SandboxCreate));
        assert!(!Scope::NetworkRead.includes(Scope::NetworkWrite));
        assert!(!Scope::Keys.includes(Scope::All));
    }

    #[test]
    fn a_key_cannot_make_one_that_may_more() {
        let caller = Caller {
            org_id: OrgId::random(),
            scopes: vec![Scope::Keys, Scope::SandboxCreate],
        };
        let request = |scopes: &[&str]| KeyRequest {
            name: "x".to_owned(),
            expires_in_days: None,
            scopes: Some(scopes.iter().map(|scope| (*scope).to_owned()).collect()),
        };
        let now = Timestamp::now();
        assert!(check(&caller, request(&["sandbox:read", "sandbox:create"]), now).is_ok());
        for scope in ["*", "sandbox:execute", "network:write"] {
            assert!(
                matches!(
                    check(&caller, request(&[scope]), now),
                    Err(ServiceError::Forbidden(_))
                ),
                "{scope}"
            );
        }
        let unknown = check(&caller, request(&["sandbox:create", "fly"]), now);
        assert!(matches!(unknown, Err(ServiceError::Invalid { field, .. }) if field == "scopes[1]"));
    }
}
