//! Tokens: JSON Web Tokens that live shortly, made with an API key or by whoever has `JWT_SECRET`.
//!
//! A token is never more than who it names: one made with a key ends with the key and can do no more than it; one for
//! a user of ours has at most the user's role. Nobody else's has more than the role that it says.

use std::time::Duration;

use jiff::SignedDuration;
use sandgate_api::{
    id::{ApiKeyId, OrgId, UserId},
    rest::{Role, TokenCreated},
};

use super::{
    Caller, Service, ServiceError,
    access::{self, Scope},
    keys::{self, REFUSED},
};
use crate::jwt::Claims;

/// A token to be made, unchecked.
#[derive(Debug, Clone)]
pub struct TokenRequest {
    /// How long it works.
    pub lifetime: Duration,
    /// What it may do; everything that its maker may and a token can, when absent.
    pub scopes: Option<Vec<String>>,
}

impl Service {
    /// Makes a token that can do no more than the key it is made with.
    ///
    /// # Errors
    /// When it is not a key that asks, or a scope is not acceptable.
    pub fn make_token(&self, caller: &Caller, request: TokenRequest) -> Result<TokenCreated, ServiceError> {
        let key_id = caller
            .key_id
            .as_ref()
            .filter(|_| !caller.by_token)
            .ok_or_else(|| {
                ServiceError::Forbidden("a token makes no other token: use an API key".to_owned())
            })?;
        let wanted = match request.scopes {
            None => access::known(&caller.granted()),
            Some(scopes) => {
                caller.checked(&scopes)?;
                access::known(&scopes)
            }
        };
        let mut opened = caller.clone();
        opened.scopes = access::narrowed(&caller.scopes, &wanted);
        let scopes = opened.granted();
        let now = super::now();
        let lifetime = SignedDuration::try_from(request.lifetime).unwrap_or(SignedDuration::MAX);
        let expires_at = keys::later(now, lifetime);
        let claims = Claims {
            sub: key_id.to_string(),
            org_id: caller.org_id.to_string(),
            role: Some(caller.role.as_str().to_owned()),
            scopes: Some(scopes.clone()),
            exp: expires_at.as_second(),
        };
        Ok(TokenCreated {
            token: self.shared.tokens.sign(&claims, now.as_second()),
            token_type: "Bearer".to_owned(),
            expires_at,
            scopes,
        })
    }

    /// Finds out who shows this token.
    pub(super) async fn by_token(&self, token: &str) -> Result<Caller, ServiceError> {
        let refused = || ServiceError::Unauthorized(REFUSED);
        let claims = self
            .shared
            .tokens
            .verify(token, super::now().as_second())
            .map_err(|_refused| refused())?;
        let org_id: OrgId = claims.org_id.parse().map_err(|_other| refused())?;
        let said = match &claims.role {
            None => None,
            Some(role) => Some(role.parse::<Role>().map_err(|_other| refused())?),
        };
        let scopes = claims
            .scopes
            .map_or_else(|| vec![Scope::All], |scopes| access::known(&scopes));
        let (user_id, key_id, role, bound) = if let Ok(id) = claims.sub.parse::<ApiKeyId>() {
            let key = self.working_key(&id).await?;
            if key.org_id != org_id {
                return Err(refused());
            }
            (Some(key.user_id), Some(id), key.role, access::known(&key.scopes))
        } else if let Ok(id) = claims.sub.parse::<UserId>() {
            let user = self.shared.store.user(&org_id, &id).await?;
            let user = user.ok_or_else(refused)?;
            (Some(user.id), None, user.role, vec![Scope::All])
        } else {
            if self.shared.store.organization(&org_id).await?.is_none() {
                return Err(refused());
            }
            (None, None, said.ok_or_else(refused)?, vec![Scope::All])
        };
        Ok(Caller {
            org_id,
            user_id,
            key_id,
            role: said.map_or(role, |said| said.min(role)),
            scopes: access::narrowed(&bound, &scopes),
            by_token: true,
        })
    }
}
