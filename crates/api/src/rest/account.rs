//! Registration, users, API keys and tokens.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::id::{ApiKeyId, InvitationId, OrgId, UserId};

/// What a user is in the organisation. Each may whatever those before it may.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Looks at everything but the contents of sandboxes and keys.
    Viewer,
    /// Uses sandboxes, and has keys.
    Member,
    /// Manages policies, secrets, keys and users.
    Admin,
    /// Also manages owners. There is always one.
    Owner,
}

impl Role {
    /// All of them.
    pub const EVERY: [Self; 4] = [Self::Viewer, Self::Member, Self::Admin, Self::Owner];

    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Viewer => "viewer",
            Self::Member => "member",
            Self::Admin => "admin",
            Self::Owner => "owner",
        }
    }
}

impl std::str::FromStr for Role {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::EVERY
            .into_iter()
            .find(|role| role.as_str() == text)
            .ok_or_else(|| "expected one of viewer, member, admin, owner".to_owned())
    }
}

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
    pub role: Role,
    /// Of the person.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_name: Option<String>,
    /// Of the person.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_name: Option<String>,
    /// When they were added.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created_at: Option<Timestamp>,
}

/// `GET /users`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserList {
    /// Oldest first.
    pub users: Vec<User>,
}

/// `POST /users`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserAdded {
    /// The user.
    pub user: User,
    /// The user's first key, to be handed over.
    pub api_key: FirstKey,
    /// The same key once more, as with a registration.
    pub key: String,
}

/// Lets one person register.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invitation {
    /// Its id.
    pub id: InvitationId,
    /// The role that whoever uses it gets.
    pub role: Role,
    /// Who may use it; absent: whoever has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub email: Option<String>,
    /// When it stops working.
    pub expires_at: Timestamp,
    /// When it was made.
    pub created_at: Timestamp,
}

/// `GET /invitations`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InvitationList {
    /// Those that can still be used, oldest first.
    pub invitations: Vec<Invitation>,
}

/// `POST /invitations`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InvitationCreated {
    /// The invitation.
    pub invitation: Invitation,
    /// What is given as `invitation` to `POST /register`. Shown once, stored only as a hash.
    pub token: String,
}

/// `POST /tokens`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenCreated {
    /// A JSON Web Token (RFC 7519).
    pub token: String,
    /// Always `Bearer`.
    pub token_type: String,
    /// When it stops working.
    pub expires_at: Timestamp,
    /// What it may do.
    pub scopes: Vec<String>,
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
    /// Whose it is.
    pub user_id: UserId,
    /// Absent when never used.
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
