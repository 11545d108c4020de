//! Registration and API keys.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::id::{ApiKeyId, OrgId, UserId};

/// `POST /register`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegisterResponse {
    /// Always true.
    pub success: bool,
    /// For people.
    pub message: String,
    /// The new organisation.
    pub organization: Organization,
    /// Its first user.
    pub user: User,
    /// Its first key.
    pub api_key: FirstKey,
    /// The same key once more, for those who read it from the top level.
    pub key: String,
}

/// An organisation.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Organization {
    /// Its id.
    pub id: OrgId,
    /// As registered.
    pub name: String,
    /// Unique, for URLs.
    pub slug: String,
    /// Always `self-hosted`.
    pub plan: String,
}

/// A user.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    /// Its id.
    pub id: UserId,
    /// As registered.
    pub email: String,
    /// `owner` for the one who registered the organisation.
    pub role: String,
}

/// A key in the one answer that shows it.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FirstKey {
    /// The secret. Shown once, stored only as a hash.
    pub key: String,
    /// The part that may be shown.
    pub key_prefix: String,
    /// What it is for.
    pub name: String,
}

/// A key without its secret.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiKey {
    /// Its id.
    pub id: ApiKeyId,
    /// What it is for.
    pub name: String,
    /// The part that may be shown.
    pub key_prefix: String,
    /// What it may do; `*` is everything.
    pub scopes: Vec<String>,
    /// To the minute; absent when never used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_used_at: Option<Timestamp>,
    /// Absent when it does not expire.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Timestamp>,
    /// When it was made.
    pub created_at: Timestamp,
}

/// `GET /api-keys`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiKeyList {
    /// Those that are not revoked, oldest first.
    pub api_keys: Vec<ApiKey>,
}

/// `POST /api-keys`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiKeyCreated {
    /// The key's record.
    pub api_key: ApiKey,
    /// The secret. Shown once, stored only as a hash.
    pub key: String,
}
