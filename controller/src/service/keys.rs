//! API keys: issued once, stored as a hash, checked on every request.
//!
//! A key is `sk_sandbox_<id>.<organisation>.<secret>`: three base64url segments, because published clients
//! take anything of that form for a token they may send without naming the organisation.
//!
//! A key belongs to a user. Members look after their own keys, admins and owners after those of users who do not
//! stand above them.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use jiff::{SignedDuration, Timestamp};
use sandgate_api::{
    id::{ApiKeyId, OrgId, UserId},
    rest::{ApiKey, Role},
};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

use super::{
    Caller, Service, ServiceError,
    access::{self, Scope},
    invalid,
};
use crate::store::{KeyRecord, NewKey, StoreError};

const PREFIX: &str = "sk_sandbox_";

/// Random bytes of a key.
const SECRET: usize = 32;

/// Longest key that is looked at, in bytes.
const MAX_KEY: usize = 256;

/// Keys of one organisation that are not revoked.
const MAX_KEYS: u32 = 1_000;

/// How often the uses of keys are written down.
const USES_INTERVAL: Duration = Duration::from_secs(30);

/// The one answer to every credential that does not work, so that none of its parts can be guessed.
pub(super) const REFUSED: &str = "the API key or token is unknown, revoked or expired";

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

/// When keys were used last, where the store does not know it yet: as many as were used since it was told.
#[derive(Debug, Default)]
pub(super) struct Uses(Mutex<HashMap<ApiKeyId, Timestamp>>);

impl Uses {
    fn note(&self, id: &ApiKeyId, now: Timestamp) {
        let mut uses = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match uses.get_mut(id) {
            Some(last) => *last = (*last).max(now),
            None => drop(uses.insert(id.clone(), now)),
        }
    }

    fn last(&self, id: &ApiKeyId) -> Option<Timestamp> {
        let uses = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        uses.get(id).copied()
    }

    fn take(&self) -> HashMap<ApiKeyId, Timestamp> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Service {
    /// Finds out who shows this credential, a key or a token.
    ///
    /// # Errors
    /// [`ServiceError::Unauthorized`], the same for every reason.
    pub async fn authenticate(&self, credential: &str) -> Result<Caller, ServiceError> {
        if !credential.starts_with(PREFIX) {
            return self.by_token(credential).await;
        }
        let id = key_id(credential).ok_or(ServiceError::Unauthorized(REFUSED))?;
        let record = self.working_key(&id).await?;
        if !bool::from(record.hash.as_slice().ct_eq(hash(credential).as_slice())) {
            return Err(ServiceError::Unauthorized(REFUSED));
        }
        self.shared.uses.note(&id, super::now());
        Ok(Caller {
            org_id: record.org_id,
            user_id: Some(record.user_id),
            key_id: Some(id),
            role: record.role,
            scopes: access::known(&record.scopes),
            by_token: false,
        })
    }

    /// A key that is neither revoked nor expired.
    pub(super) async fn working_key(&self, id: &ApiKeyId) -> Result<KeyRecord, ServiceError> {
        let record = self.shared.store.key(id).await?;
        record
            .filter(|record| {
                record
                    .expires_at
                    .is_none_or(|expires_at| expires_at > super::now())
            })
            .ok_or(ServiceError::Unauthorized(REFUSED))
    }

    /// Writes down when keys were used last, now and then, until the tasks drain.
    pub async fn record_uses(self) {
        let shutdown = self.shared.tasks.shutdown();
        loop {
            let ending = tokio::select! {
                () = shutdown.cancelled() => true,
                () = tokio::time::sleep(USES_INTERVAL) => false,
            };
            if let Err(error) = self.write_uses().await {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "the uses of some keys are not recorded"
                );
            }
            if ending {
                return;
            }
        }
    }

    async fn write_uses(&self) -> Result<(), StoreError> {
        let uses = self.shared.uses.take();
        if uses.is_empty() {
            return Ok(());
        }
        self.shared.store.touch_keys(&uses).await
    }

    /// Makes a key of the caller's that can do no more than the caller.
    ///
    /// # Errors
    /// A field that is not acceptable; too many keys.
    pub async fn create_key(
        &self,
        caller: &Caller,
        request: KeyRequest,
    ) -> Result<(ApiKey, String), ServiceError> {
        let now = super::now();
        let user_id = person(caller)?;
        let (name, scopes, expires_at) = check(caller, request, now)?;
        let issued = issue(&caller.org_id, user_id, name, scopes, expires_at)?;
        self.shared
            .store
            .insert_key(&issued.stored, MAX_KEYS, now)
            .await?;
        tracing::info!(target: "audit", org_id = %caller.org_id, key_id = %issued.stored.id, "API key created");
        Ok(fresh(issued, now))
    }

    /// The keys that the caller looks after, without their secrets.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn keys(&self, caller: &Caller) -> Result<Vec<ApiKey>, ServiceError> {
        let records = self.shared.store.keys(&caller.org_id).await?;
        Ok(records
            .into_iter()
            .filter(|record| caller.keeps_all_keys() || caller.user_id.as_ref() == Some(&record.user_id))
            .map(|mut record| {
                record.last_used_at = record.last_used_at.max(self.shared.uses.last(&record.id));
                shown(record)
            })
            .collect())
    }

    /// Puts another key in the place of one, with its name, scopes and length of life. The old one works on for
    /// `grace`, and not beyond its own end.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`] when the caller has no such key; [`ServiceError::Forbidden`] when it can do more
    /// than the caller.
    pub async fn rotate_key(
        &self,
        caller: &Caller,
        id: &ApiKeyId,
        grace: Duration,
    ) -> Result<(ApiKey, String), ServiceError> {
        let now = super::now();
        let absent = || ServiceError::NotFound(format!("API key {id}"));
        person(caller)?;
        let old = self.shared.store.key(id).await?.ok_or_else(absent)?;
        looks_after(caller, &old.org_id, &old.user_id, old.role, id)?;
        if old.expires_at.is_some_and(|expires_at| expires_at <= now) {
            return Err(ServiceError::Conflict(
                "the API key has expired: make another one".to_owned(),
            ));
        }
        for scope in access::known(&old.scopes) {
            caller.may(scope)?;
        }
        let expires_at = old
            .expires_at
            .map(|ends| later(now, ends.duration_since(old.created_at)));
        let issued = issue(&old.org_id, &old.user_id, old.name, old.scopes, expires_at)?;
        let ends = later(
            now,
            SignedDuration::try_from(grace).unwrap_or(SignedDuration::MAX),
        );
        let done = self
            .shared
            .store
            .rotate_key(id, ends, &issued.stored, MAX_KEYS, now)
            .await?;
        if !done {
            return Err(absent());
        }
        tracing::info!(
            target: "audit", org_id = %caller.org_id, key_id = %id, by = %issued.stored.id, "API key rotated"
        );
        Ok(fresh(issued, now))
    }

    /// Revokes a key at once. Doing it again is no error.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`] when the caller has no such key.
    pub async fn revoke_key(&self, caller: &Caller, id: &ApiKeyId) -> Result<(), ServiceError> {
        let absent = || ServiceError::NotFound(format!("API key {id}"));
        let store = &self.shared.store;
        let owner = store.key_owner(&caller.org_id, id).await?;
        let (user_id, role) = owner.ok_or_else(absent)?;
        looks_after(caller, &caller.org_id, &user_id, role, id)?;
        if !store.revoke_key(&caller.org_id, id, super::now()).await? {
            return Err(absent());
        }
        tracing::info!(target: "audit", org_id = %caller.org_id, key_id = %id, "API key revoked");
        Ok(())
    }
}

/// Refuses a caller who is not to touch this key. One of another user's does not exist for a member.
fn looks_after(
    caller: &Caller,
    org_id: &OrgId,
    user_id: &UserId,
    role: Role,
    id: &ApiKeyId,
) -> Result<(), ServiceError> {
    let own = caller.user_id.as_ref() == Some(user_id);
    if *org_id != caller.org_id || !(own || caller.keeps_all_keys()) {
        return Err(ServiceError::NotFound(format!("API key {id}")));
    }
    caller.reaches(role)
}

/// Whose a key is going to be. What a token makes would outlive it.
fn person(caller: &Caller) -> Result<&UserId, ServiceError> {
    caller
        .user_id
        .as_ref()
        .filter(|_| !caller.by_token)
        .ok_or_else(|| ServiceError::Forbidden("a token makes no API keys: use an API key".to_owned()))
}

/// A time after another one, as far as times go.
pub(super) fn later(now: Timestamp, by: SignedDuration) -> Timestamp {
    now.saturating_add(by).unwrap_or(Timestamp::MAX)
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
            Some(later(now, SignedDuration::from_hours(hours)))
        }
        Some(_) => {
            return Err(invalid(
                "expires_in_days",
                "expected a whole number of days between 1 and 3650",
            ));
        }
    };
    let scopes = match request.scopes {
        None => caller.granted(),
        Some(scopes) => {
            caller.checked(&scopes)?;
            scopes
        }
    };
    Ok((name, scopes, expires_at))
}

/// Makes a key.
pub(super) fn issue(
    org_id: &OrgId,
    user_id: &UserId,
    name: String,
    scopes: Vec<String>,
    expires_at: Option<Timestamp>,
) -> Result<IssuedKey, ServiceError> {
    let id = ApiKeyId::random();
    let prefix = format!("{PREFIX}{}", id.as_str().trim_start_matches(ApiKeyId::PREFIX));
    let organization = org_id.as_str().trim_start_matches(OrgId::PREFIX);
    let key = format!("{prefix}.{organization}.{}", secret()?);
    let stored = NewKey {
        id,
        org_id: org_id.clone(),
        user_id: user_id.clone(),
        name,
        prefix,
        hash: hash(&key),
        scopes,
        expires_at,
    };
    Ok(IssuedKey { key, stored })
}

/// The first key of a user: it may whatever the user's role allows, also later.
pub(super) fn first(org_id: &OrgId, user_id: &UserId) -> Result<IssuedKey, ServiceError> {
    let scopes = vec![Scope::All.as_str().to_owned()];
    issue(org_id, user_id, "default".to_owned(), scopes, None)
}

/// 256 random bits, as text.
pub(super) fn secret() -> Result<String, ServiceError> {
    let mut secret = [0; SECRET];
    getrandom::fill(&mut secret).map_err(|error| ServiceError::Internal(error.to_string()))?;
    Ok(URL_SAFE_NO_PAD.encode(secret))
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

/// What is stored of a secret of 256 random bits.
pub(super) fn hash(key: &str) -> [u8; 32] {
    Sha256::digest(key).into()
}

fn fresh(issued: IssuedKey, now: Timestamp) -> (ApiKey, String) {
    let stored = issued.stored;
    let shown = ApiKey {
        id: stored.id,
        name: stored.name,
        key_prefix: stored.prefix,
        scopes: stored.scopes,
        user_id: stored.user_id,
        last_used_at: None,
        expires_at: stored.expires_at,
        created_at: now,
    };
    (shown, issued.key)
}

fn shown(record: KeyRecord) -> ApiKey {
    ApiKey {
        id: record.id,
        name: record.name,
        key_prefix: record.prefix,
        scopes: record.scopes,
        user_id: record.user_id,
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
        let issued = issue(&OrgId::random(), &UserId::random(), "x".to_owned(), vec![], None).expect("a key");
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
    fn the_last_use_is_the_latest() {
        let (uses, id) = (Uses::default(), ApiKeyId::random());
        let now = Timestamp::now();
        uses.note(&id, now);
        uses.note(&id, now - SignedDuration::from_secs(1));
        assert_eq!(
            (uses.last(&id), uses.last(&ApiKeyId::random())),
            (Some(now), None)
        );
        assert_eq!(uses.take(), HashMap::from([(id.clone(), now)]));
        assert_eq!(uses.last(&id), None);
    }
}
