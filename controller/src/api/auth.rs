//! Who asks: the credential, and that the request does not name another organisation.

use axum::extract::{FromRequestParts, MatchedPath};
use http::{HeaderMap, header, request::Parts};
use sandgate_api::error::ErrorCode;

use super::{error::ApiError, present, query::Parameters, request};
use crate::service::{Caller, Service, ServiceError};

/// A caller whose key or token works.
pub(super) struct Authenticated(pub(super) Caller);

/// Routes that take the credential as `?token=`, where clients cannot send headers. Nothing logs a query.
const WITH_TOKEN: [&str; 4] = ["/events/stream", "/files/download", "/terminal", "/ws"];

impl FromRequestParts<Service> for Authenticated {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, service: &Service) -> Result<Self, ApiError> {
        let parameters = Parameters::of(parts)?;
        let credential = credential(&parts.headers).and_then(|credential| {
            let token = || parameters.text("token").filter(|_| takes_token(parts));
            let credential = credential.or_else(token);
            credential.ok_or_else(|| refused("an API key is needed: `Authorization: Bearer <key>`"))
        });
        let caller = match credential {
            Ok(credential) => service.authenticate(credential).await.map_err(ApiError::from),
            Err(error) => Err(error),
        };
        let caller = match caller {
            Ok(caller) => caller,
            Err(error) => {
                // Guesses count against where they come from.
                if error.code() == ErrorCode::Unauthorized {
                    present::counts(service.count_peer(&request::peer(&parts.extensions)))?;
                }
                return Err(error);
            }
        };
        present::asks(&caller);
        present::counts(service.count_caller(&caller))?;
        if let Some(named) = parts.headers.get("x-org-id") {
            same_organization(&caller, named.to_str().unwrap_or_default())?;
        }
        if let Some(named) = parameters.text("org_id") {
            same_organization(&caller, named)?;
        }
        Ok(Self(caller))
    }
}

fn takes_token(parts: &Parts) -> bool {
    let route = parts.extensions.get::<MatchedPath>();
    route.is_some_and(|route| WITH_TOKEN.iter().any(|end| route.as_str().ends_with(end)))
}

fn refused(message: &'static str) -> ApiError {
    ServiceError::Unauthorized(message).into()
}

/// Refuses a request that names an organisation other than the caller's: naming never selects one.
pub(super) fn same_organization(caller: &Caller, named: &str) -> Result<(), ApiError> {
    if named == caller.org_id().as_str() {
        return Ok(());
    }
    Err(ApiError::new(
        ErrorCode::Forbidden,
        "the API key belongs to another organization",
    ))
}

/// The same secret is accepted as `Authorization: ApiKey`, `Authorization: Bearer` and `x-api-key`.
fn credential(headers: &HeaderMap) -> Result<Option<&str>, ApiError> {
    if let Some(value) = headers.get(header::AUTHORIZATION) {
        let value = value
            .to_str()
            .map_err(|_not_text| refused("the Authorization header is no text"))?;
        let (scheme, key) = value.trim().split_once(' ').unwrap_or((value, ""));
        if !scheme.eq_ignore_ascii_case("bearer") && !scheme.eq_ignore_ascii_case("apikey") {
            return Err(refused(
                "expected `Authorization: Bearer <key>` or `Authorization: ApiKey <key>`",
            ));
        }
        return Ok(Some(key.trim()));
    }
    match headers.get("x-api-key") {
        Some(value) => match value.to_str() {
            Ok(key) => Ok(Some(key.trim())),
            Err(_not_text) => Err(refused("the x-api-key header is no text")),
        },
        None => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(headers: &[(&'static str, &str)]) -> Option<String> {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(*name, value.parse().expect("a header"));
        }
        credential(&map).ok().flatten().map(str::to_owned)
    }

    #[test]
    fn every_form_of_published_clients_is_understood() {
        for (name, value) in [
            ("authorization", "Bearer k.e.y"),
            ("authorization", "bearer k.e.y"),
            ("authorization", "ApiKey k.e.y"),
            ("authorization", "ApiKey  k.e.y "),
            ("x-api-key", "k.e.y"),
        ] {
            assert_eq!(key(&[(name, value)]).as_deref(), Some("k.e.y"), "{name}: {value}");
        }
        assert_eq!(key(&[]), None);
        assert_eq!(key(&[("authorization", "Basic a2V5")]), None);
        assert_eq!(
            key(&[("authorization", "Basic a2V5"), ("x-api-key", "k.e.y")]),
            None
        );
    }
}
