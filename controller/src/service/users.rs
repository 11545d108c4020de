//! Users of an organisation, and invitations.
//!
//! Nobody gives a role above their own, nor touches a user who stands above them, and there is always an owner.

use jiff::{SignedDuration, Timestamp};
use sandgate_api::{
    id::{InvitationId, OrgId, UserId},
    rest::{FirstKey, Invitation, InvitationCreated, Role, User, UserAdded},
};
use subtle::ConstantTimeEq as _;

use super::{
    Caller, Registration, Service, ServiceError, accounts,
    keys::{self, IssuedKey},
};
use crate::store::{InvitationRecord, NewInvitation};

/// Users of one organisation.
pub(super) const MAX_USERS: u32 = 1_000;

/// Invitations of one organisation, or of the operator, that were not used yet.
pub(super) const MAX_INVITATIONS: u32 = 100;

/// How the token of an invitation begins.
const PREFIX: &str = "sg_invite_";

/// The one answer to every invitation that does not work.
const UNKNOWN: &str = "the invitation is unknown, used, withdrawn, expired or for another e-mail address";

/// A user to be added, unchecked.
#[derive(Debug, Clone)]
pub struct UserRequest {
    /// E-mail address.
    pub email: String,
    /// What they are to be.
    pub role: Role,
    /// Of the person.
    pub first_name: Option<String>,
    /// Of the person.
    pub last_name: Option<String>,
}

/// An invitation to be made, unchecked.
#[derive(Debug, Clone)]
pub struct InvitationRequest {
    /// What whoever uses it is to be.
    pub role: Role,
    /// Who may use it.
    pub email: Option<String>,
    /// Days until it stops working.
    pub expires_in_days: u64,
}

impl Service {
    /// The organisation's users.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn users(&self, org_id: &OrgId) -> Result<Vec<User>, ServiceError> {
        Ok(self.shared.store.users(org_id).await?)
    }

    /// One of them.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`].
    pub async fn user(&self, org_id: &OrgId, id: &UserId) -> Result<User, ServiceError> {
        let user = self.shared.store.user(org_id, id).await?;
        user.ok_or_else(|| absent(id))
    }

    /// Adds a user, with a first key to hand over.
    ///
    /// # Errors
    /// A field that is not acceptable; a role above the caller's; an address that is taken.
    pub async fn add_user(&self, caller: &Caller, request: UserRequest) -> Result<UserAdded, ServiceError> {
        caller.reaches(request.role)?;
        let account = accounts::check(
            Registration {
                email: request.email,
                organization_name: None,
                first_name: request.first_name,
                last_name: request.last_name,
                use_case: None,
                invitation: None,
            },
            false,
        )?;
        let user_id = UserId::random();
        let issued = keys::first(&caller.org_id, &user_id)?;
        let now = super::now();
        self.shared
            .store
            .add_user(&account, request.role, &issued.stored, None, MAX_USERS, now)
            .await?;
        tracing::info!(target: "audit", org_id = %caller.org_id, %user_id, role = request.role.as_str(), "user added");
        let user = self.user(&caller.org_id, &user_id).await?;
        Ok(UserAdded {
            user,
            api_key: first_key(&issued),
            key: issued.key,
        })
    }

    /// Gives a user another role, which counts from the next request on.
    ///
    /// # Errors
    /// When the caller may not; when no owner would be left.
    pub async fn change_role(&self, caller: &Caller, id: &UserId, role: Role) -> Result<User, ServiceError> {
        let present = self.user(&caller.org_id, id).await?;
        caller.reaches(present.role)?;
        caller.reaches(role)?;
        let store = &self.shared.store;
        if !store.change_role(&caller.org_id, id, present.role, role).await? {
            return Err(changed());
        }
        tracing::info!(target: "audit", org_id = %caller.org_id, user_id = %id, role = role.as_str(), "role changed");
        self.user(&caller.org_id, id).await
    }

    /// Removes a user, and with them their keys and tokens.
    ///
    /// # Errors
    /// When the caller may not; when no owner would be left.
    pub async fn remove_user(&self, caller: &Caller, id: &UserId) -> Result<(), ServiceError> {
        let present = self.user(&caller.org_id, id).await?;
        caller.reaches(present.role)?;
        if !self
            .shared
            .store
            .remove_user(&caller.org_id, id, present.role)
            .await?
        {
            return Err(changed());
        }
        tracing::info!(target: "audit", org_id = %caller.org_id, user_id = %id, "user removed");
        Ok(())
    }

    /// Invites somebody into the caller's organisation.
    ///
    /// # Errors
    /// A field that is not acceptable; a role above the caller's; too many invitations.
    pub async fn invite(
        &self,
        caller: &Caller,
        request: InvitationRequest,
    ) -> Result<InvitationCreated, ServiceError> {
        caller.reaches(request.role)?;
        let email = request.email.map(|email| accounts::address(&email)).transpose()?;
        let (stored, created) = make(
            Some(caller.org_id.clone()),
            email,
            request.role,
            request.expires_in_days,
        )?;
        self.shared.store.invite(&stored, MAX_INVITATIONS).await?;
        tracing::info!(target: "audit", org_id = %caller.org_id, invitation_id = %stored.id, "invited");
        Ok(created)
    }

    /// The organisation's open invitations.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn invitations(&self, org_id: &OrgId) -> Result<Vec<Invitation>, ServiceError> {
        Ok(self.shared.store.invitations(org_id, super::now()).await?)
    }

    /// Takes an invitation back.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`].
    pub async fn withdraw_invitation(&self, caller: &Caller, id: &InvitationId) -> Result<(), ServiceError> {
        let record = self.shared.store.invitation(id).await?;
        let record = record.filter(|record| record.org_id.as_ref() == Some(&caller.org_id));
        let absent = || ServiceError::NotFound(format!("invitation {id}"));
        caller.reaches(record.ok_or_else(absent)?.invitation.role)?;
        let gone = self.shared.store.withdraw_invitation(&caller.org_id, id).await?;
        gone.then_some(()).ok_or_else(absent)
    }

    /// The invitation that this is the token of, if it works for this address.
    pub(super) async fn invited(&self, token: &str, email: &str) -> Result<InvitationRecord, ServiceError> {
        let refused = || ServiceError::Forbidden(UNKNOWN.to_owned());
        let id = token
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.split_once('.'))
            .and_then(|(id, _secret)| format!("{}{id}", InvitationId::PREFIX).parse().ok())
            .ok_or_else(refused)?;
        let record = self.shared.store.invitation(&id).await?.ok_or_else(refused)?;
        let is_right = bool::from(record.hash.as_slice().ct_eq(keys::hash(token).as_slice()));
        let invitation = &record.invitation;
        let is_theirs = invitation.email.as_deref().is_none_or(|wanted| wanted == email);
        if !is_right || !is_theirs || invitation.expires_at <= super::now() {
            return Err(refused());
        }
        Ok(record)
    }
}

/// Makes an invitation: into an organisation, or, without one, to make another one.
pub(super) fn make(
    org_id: Option<OrgId>,
    email: Option<String>,
    role: Role,
    days: u64,
) -> Result<(NewInvitation, InvitationCreated), ServiceError> {
    let created_at: Timestamp = super::now();
    let hours = i64::try_from(days.saturating_mul(24)).unwrap_or(i64::MAX);
    let id = InvitationId::random();
    let public = id.as_str().trim_start_matches(InvitationId::PREFIX);
    let token = format!("{PREFIX}{public}.{}", keys::secret()?);
    let expires_at = keys::later(created_at, SignedDuration::from_hours(hours));
    let stored = NewInvitation {
        id: id.clone(),
        org_id,
        email: email.clone(),
        role,
        hash: keys::hash(&token),
        created_at,
        expires_at,
    };
    let invitation = Invitation {
        id,
        role,
        email,
        expires_at,
        created_at,
    };
    Ok((stored, InvitationCreated { invitation, token }))
}

pub(super) fn first_key(issued: &IssuedKey) -> FirstKey {
    FirstKey {
        key: issued.key.clone(),
        key_prefix: issued.stored.prefix.clone(),
        name: issued.stored.name.clone(),
    }
}

fn absent(id: &UserId) -> ServiceError {
    ServiceError::NotFound(format!("user {id}"))
}

fn changed() -> ServiceError {
    ServiceError::Conflict("somebody else changed this user meanwhile".to_owned())
}
