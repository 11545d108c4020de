//! Who may do what: scopes of a credential, roles of users, and whoever has shown a credential that works.
//!
//! A caller may do what the credential's scopes say and the user's role allows, whichever is less.

use sandgate_api::{
    id::{ApiKeyId, OrgId, UserId},
    rest::{RegisterResponse, Role},
};

use super::ServiceError;

/// What a credential may do.
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
    /// Look at who did what by the API.
    AuditRead,
    /// List, create, rotate and revoke keys, none of which can do more.
    Keys,
    /// See who belongs to the organisation.
    UsersRead,
    /// Add, change, invite and remove users.
    UsersWrite,
}

impl Scope {
    pub(super) const EVERY: [Self; 12] = [
        Self::All,
        Self::SandboxRead,
        Self::SandboxCreate,
        Self::SandboxExecute,
        Self::NetworkRead,
        Self::NetworkWrite,
        Self::SecretsRead,
        Self::SecretsWrite,
        Self::AuditRead,
        Self::Keys,
        Self::UsersRead,
        Self::UsersWrite,
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
            Self::AuditRead => "audit:read",
            Self::Keys => "api-keys:write",
            Self::UsersRead => "users:read",
            Self::UsersWrite => "users:write",
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
                Self::UsersWrite => wanted == Self::UsersRead,
                Self::SandboxRead
                | Self::NetworkRead
                | Self::SecretsRead
                | Self::AuditRead
                | Self::Keys
                | Self::UsersRead => false,
            }
    }

    /// Whether a user of this role may ever have it.
    fn is_open_to(self, role: Role) -> bool {
        match role {
            Role::Owner | Role::Admin => true,
            // A member's keys are the member's own: see `keys`.
            Role::Member => match self {
                Self::SandboxRead
                | Self::SandboxCreate
                | Self::SandboxExecute
                | Self::NetworkRead
                | Self::SecretsRead
                | Self::AuditRead
                | Self::Keys
                | Self::UsersRead => true,
                Self::All | Self::NetworkWrite | Self::SecretsWrite | Self::UsersWrite => false,
            },
            Role::Viewer => match self {
                Self::SandboxRead
                | Self::NetworkRead
                | Self::SecretsRead
                | Self::AuditRead
                | Self::UsersRead => true,
                Self::All
                | Self::SandboxCreate
                | Self::SandboxExecute
                | Self::NetworkWrite
                | Self::SecretsWrite
                | Self::Keys
                | Self::UsersWrite => false,
            },
        }
    }
}

/// Somebody who has shown a credential that works.
#[derive(Debug, Clone)]
pub struct Caller {
    pub(super) org_id: OrgId,
    /// None for a token that names nobody of ours.
    pub(super) user_id: Option<UserId>,
    /// The key that was shown, or that the token was made with.
    pub(super) key_id: Option<ApiKeyId>,
    pub(super) role: Role,
    pub(super) scopes: Vec<Scope>,
    /// It came as a token, which lives shortly and makes nothing that lives longer.
    pub(super) by_token: bool,
}

impl Caller {
    /// Whoever has just registered.
    pub fn registered(registered: &RegisterResponse) -> Self {
        Self {
            org_id: registered.organization.id.clone(),
            user_id: Some(registered.user.id.clone()),
            key_id: None,
            role: registered.user.role,
            scopes: Vec::new(),
            by_token: false,
        }
    }

    /// The organisation the credential belongs to, which is the only one it can act for.
    pub fn org_id(&self) -> &OrgId {
        &self.org_id
    }

    /// Whose the credential is.
    pub fn user_id(&self) -> Option<&UserId> {
        self.user_id.as_ref()
    }

    /// The key behind it.
    pub fn key_id(&self) -> Option<&ApiKeyId> {
        self.key_id.as_ref()
    }

    /// The role that bounds it.
    pub fn role(&self) -> Role {
        self.role
    }

    /// Refuses a caller whose credential may not do this.
    ///
    /// # Errors
    /// [`ServiceError::Forbidden`].
    pub fn may(&self, wanted: Scope) -> Result<(), ServiceError> {
        if !self.scopes.iter().any(|scope| scope.includes(wanted)) {
            return Err(ServiceError::Forbidden(format!(
                "the API key lacks the scope `{}`",
                wanted.as_str()
            )));
        }
        if !wanted.is_open_to(self.role) {
            return Err(ServiceError::Forbidden(format!(
                "this needs the scope `{}`, which the role `{}` does not have",
                wanted.as_str(),
                self.role.as_str()
            )));
        }
        Ok(())
    }

    /// Refuses a caller whose role is below this one.
    pub(super) fn reaches(&self, role: Role) -> Result<(), ServiceError> {
        if self.role >= role {
            return Ok(());
        }
        Err(ServiceError::Forbidden(format!(
            "the role `{}` does not reach a user with the role `{}`",
            self.role.as_str(),
            role.as_str()
        )))
    }

    /// Whether this caller looks after the keys of everybody, and not of one user alone.
    pub(super) fn keeps_all_keys(&self) -> bool {
        self.role >= Role::Admin
    }

    /// Everything the caller may, as it is written.
    pub(super) fn granted(&self) -> Vec<String> {
        let everything = self.scopes.contains(&Scope::All);
        let granted: Vec<Scope> = if everything && self.may(Scope::All).is_ok() {
            vec![Scope::All]
        } else if everything {
            Scope::EVERY.to_vec()
        } else {
            self.scopes.clone()
        };
        granted
            .into_iter()
            .filter(|scope| self.may(*scope).is_ok())
            .map(|scope| scope.as_str().to_owned())
            .collect()
    }

    /// Checks scopes that somebody asks for a credential of theirs.
    pub(super) fn checked(&self, scopes: &[String]) -> Result<(), ServiceError> {
        if scopes.is_empty() {
            return Err(super::invalid(
                "scopes",
                "expected at least one scope; leave the field out for those of this key",
            ));
        }
        for (index, text) in scopes.iter().enumerate() {
            let field = format!("scopes[{index}]");
            let Some(scope) = Scope::parse(text) else {
                let known: Vec<_> = Scope::EVERY.iter().map(|scope| scope.as_str()).collect();
                return Err(super::invalid(
                    &field,
                    &format!("expected one of {}", known.join(", ")),
                ));
            };
            self.may(scope)?;
        }
        Ok(())
    }
}

/// Stored or signed scopes. One that this version does not know opens nothing.
pub(super) fn known(scopes: &[String]) -> Vec<Scope> {
    scopes.iter().filter_map(|scope| Scope::parse(scope)).collect()
}

/// What both lists open, but for what lasts: a token makes no keys and no users.
pub(super) fn narrowed(one: &[Scope], other: &[Scope]) -> Vec<Scope> {
    let opens = |scopes: &[Scope], wanted| scopes.iter().any(|scope| scope.includes(wanted));
    Scope::EVERY
        .into_iter()
        .filter(|scope| !matches!(scope, Scope::All | Scope::Keys | Scope::UsersWrite))
        .filter(|scope| opens(one, *scope) && opens(other, *scope))
        .collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::service) fn caller(role: Role, scopes: &[Scope]) -> Caller {
        Caller {
            org_id: OrgId::random(),
            user_id: Some(UserId::random()),
            key_id: Some(ApiKeyId::random()),
            role,
            scopes: scopes.to_vec(),
            by_token: false,
        }
    }

    fn texts(scopes: &[&str]) -> Vec<String> {
        scopes.iter().map(|scope| (*scope).to_owned()).collect()
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
        assert!(!Scope::UsersRead.includes(Scope::UsersWrite));
    }

    #[test]
    fn a_credential_may_what_its_scopes_say_and_its_role_allows() {
        for scope in Scope::EVERY {
            assert!(caller(Role::Owner, &[Scope::All]).may(scope).is_ok());
            assert!(caller(Role::Admin, &[Scope::All]).may(scope).is_ok());
            assert!(caller(Role::Owner, &[]).may(scope).is_err());
        }
        let member = caller(Role::Member, &[Scope::All]);
        assert!(member.may(Scope::SandboxExecute).is_ok());
        for beyond in [
            Scope::All,
            Scope::NetworkWrite,
            Scope::SecretsWrite,
            Scope::UsersWrite,
        ] {
            assert!(member.may(beyond).is_err(), "{beyond:?}");
        }
        let viewer = caller(Role::Viewer, &[Scope::All]);
        for scope in Scope::EVERY {
            let looks = scope.as_str().ends_with(":read");
            assert_eq!(viewer.may(scope).is_ok(), looks, "{scope:?}");
        }
    }

    #[test]
    fn what_is_granted_is_what_a_caller_may() {
        assert_eq!(caller(Role::Owner, &[Scope::All]).granted(), ["*"]);
        assert_eq!(
            caller(Role::Viewer, &[Scope::All]).granted(),
            [
                "sandbox:read",
                "network:read",
                "secrets:read",
                "audit:read",
                "users:read"
            ]
        );
        assert_eq!(
            caller(Role::Viewer, &[Scope::SandboxCreate, Scope::AuditRead]).granted(),
            ["audit:read"]
        );
        assert_eq!(
            caller(Role::Owner, &[Scope::SandboxCreate, Scope::Keys]).granted(),
            ["sandbox:create", "api-keys:write"]
        );
    }

    #[test]
    fn nobody_gives_more_than_they_have() {
        let caller = caller(Role::Owner, &[Scope::Keys, Scope::SandboxCreate]);
        assert!(
            caller
                .checked(&texts(&["sandbox:read", "sandbox:create"]))
                .is_ok()
        );
        for scope in ["*", "sandbox:execute", "network:write"] {
            assert!(
                matches!(caller.checked(&texts(&[scope])), Err(ServiceError::Forbidden(_))),
                "{scope}"
            );
        }
        let unknown = caller.checked(&texts(&["sandbox:create", "fly"]));
        assert!(matches!(unknown, Err(ServiceError::Invalid { field, .. }) if field == "scopes[1]"));
    }

    #[test]
    fn a_token_opens_what_both_open_and_nothing_that_lasts() {
        let both = narrowed(&[Scope::All], &[Scope::SandboxExecute, Scope::Keys]);
        assert_eq!(both, [Scope::SandboxRead, Scope::SandboxExecute]);
        assert!(narrowed(&[Scope::NetworkRead], &[Scope::SandboxRead]).is_empty());
        let most = narrowed(&[Scope::All], &[Scope::All]);
        assert!(!most.contains(&Scope::All) && !most.contains(&Scope::UsersWrite));
    }
}
