//! Ids in a request's path, and paths inside a sandbox.

use axum::extract::{FromRequestParts, Path};
use http::request::Parts;
use sandgate_api::{
    error::ErrorCode,
    id::{ApiKeyId, InvitationId, SandboxId, TunnelId, UserId},
};

use super::{error::ApiError, present, request};
use crate::service::ServiceError;

/// Longest path inside a sandbox, in bytes (`PATH_MAX` of Linux, without the NUL).
pub(super) const MAX_PATH: usize = 4095;

/// `{id}` of a sandbox's routes. What cannot be an id is a sandbox that does not exist.
pub(super) struct SandboxPath(pub(super) SandboxId);

/// `{id}` of a key's routes.
pub(super) struct KeyPath(pub(super) ApiKeyId);

/// `{id}` of a user's routes.
pub(super) struct UserPath(pub(super) UserId);

/// `{id}` of an invitation's routes.
pub(super) struct InvitationPath(pub(super) InvitationId);

/// `{id}` of a tunnel's routes. What cannot be an id is a tunnel that does not exist.
pub(super) struct TunnelPath(pub(super) TunnelId);

/// `{id}` and `{tunnel}` of the routes of a sandbox's tunnel.
pub(super) struct SandboxTunnelPath(pub(super) SandboxId, pub(super) TunnelId);

/// `{name}` of a secret's routes. What cannot be a name is a secret that does not exist.
pub(super) struct SecretPath(pub(super) String);

/// `{id}` of an audit record's routes. What cannot be an id is a record that does not exist.
pub(super) struct EventPath(pub(super) String);

/// `{id}` of a template's routes. What cannot be an id is a template that does not exist.
pub(super) struct TemplatePath(pub(super) String);

impl<S: Send + Sync> FromRequestParts<S> for TemplatePath {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        id(parts, state).await.map(Self)
    }
}

impl<S: Send + Sync> FromRequestParts<S> for EventPath {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        id(parts, state).await.map(Self)
    }
}

impl<S: Send + Sync> FromRequestParts<S> for SecretPath {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        id(parts, state).await.map(Self)
    }
}

impl<S: Send + Sync> FromRequestParts<S> for SandboxPath {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        sandbox(&id(parts, state).await?).map(Self)
    }
}

impl<S: Send + Sync> FromRequestParts<S> for TunnelPath {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        tunnel(&id(parts, state).await?).map(Self)
    }
}

impl<S: Send + Sync> FromRequestParts<S> for SandboxTunnelPath {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let Ok(Path((of, id))) = Path::<(String, String)>::from_request_parts(parts, state).await else {
            return Err(no_endpoint());
        };
        Ok(Self(sandbox(&of)?, tunnel(&id)?))
    }
}

/// What cannot be an id is a sandbox that does not exist.
pub(super) fn sandbox(id: &str) -> Result<SandboxId, ApiError> {
    let shown = id.chars().take(80).collect();
    let id = id
        .parse()
        .map_err(|_other| ServiceError::SandboxNotFound(shown))?;
    request::concerns(&id);
    Ok(id)
}

fn tunnel(id: &str) -> Result<TunnelId, ApiError> {
    id.parse()
        .map_err(|_other| ApiError::new(ErrorCode::NotFound, "there is no such tunnel"))
}

impl<S: Send + Sync> FromRequestParts<S> for KeyPath {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let id = id(parts, state).await?;
        id.parse()
            .map(Self)
            .map_err(|_other| ApiError::new(ErrorCode::NotFound, "there is no such API key"))
    }
}

impl<S: Send + Sync> FromRequestParts<S> for UserPath {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let id = id(parts, state).await?;
        id.parse()
            .map(Self)
            .map_err(|_other| ApiError::new(ErrorCode::NotFound, "there is no such user"))
    }
}

impl<S: Send + Sync> FromRequestParts<S> for InvitationPath {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let id = id(parts, state).await?;
        id.parse()
            .map(Self)
            .map_err(|_other| ApiError::new(ErrorCode::NotFound, "there is no such invitation"))
    }
}

async fn id<S: Send + Sync>(parts: &mut Parts, state: &S) -> Result<String, ApiError> {
    match Path::<String>::from_request_parts(parts, state).await {
        Ok(Path(id)) => Ok(id),
        Err(_malformed) => Err(no_endpoint()),
    }
}

fn no_endpoint() -> ApiError {
    ApiError::new(ErrorCode::NotFound, "there is no such endpoint")
}

/// Checks a path inside a sandbox: absolute, without `..`.
pub(super) fn inside(field: &str, path: &str) -> Result<(), ApiError> {
    let message = if path.is_empty() {
        "is required"
    } else if !path.starts_with('/') {
        "expected an absolute path, for example /workspace/main.py"
    } else if path.len() > MAX_PATH {
        "the path is too long"
    } else if path.contains('\0') {
        "the path contains a NUL character"
    } else if path.split('/').any(|part| part == "..") {
        "`..` is not possible in a path"
    } else {
        if !matches!(field, "working_dir" | "cwd") {
            present::touches(path);
        }
        return Ok(());
    };
    Err(ApiError::field(field, message))
}

/// The same of a path that a file is to have.
pub(super) fn file(field: &str, path: &str) -> Result<(), ApiError> {
    inside(field, path)?;
    if path.ends_with('/') {
        return Err(ApiError::field(field, "names a directory, not a file"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_inside_is_absolute_and_goes_only_down() {
        for path in [
            "/",
            "/workspace",
            "/workspace/a b/ü",
            "/workspace/..a",
            "/workspace/a..",
            "/a//b",
            "/a/./b",
        ] {
            assert!(inside("path", path).is_ok(), "{path:?}");
        }
        let long = format!("/{}", "x".repeat(MAX_PATH));
        for path in [
            "",
            "a",
            "./a",
            "../a",
            "/..",
            "/workspace/../etc",
            "/workspace/..",
            "/a\0b",
            &long,
        ] {
            assert!(inside("path", path).is_err(), "{path:?}");
        }
    }
}
