//! Registration.

use sandgate_api::{
    id::{OrgId, UserId},
    rest::{InvitationCreated, Organization, RegisterResponse, Role, User},
};

use super::{Service, ServiceError, invalid, keys, users};
use crate::{
    config::Registration as Mode,
    store::{NewAccount, PLAN, Store},
};

/// Longest e-mail address (RFC 5321, 4.5.3.1.3: a path has 256 octets with its brackets).
const MAX_EMAIL: usize = 254;

/// What somebody who registers says, unchecked.
#[derive(Debug, Clone)]
pub struct Registration {
    /// E-mail address.
    pub email: String,
    /// Name of the organisation, where one is made.
    pub organization_name: Option<String>,
    /// Of the person.
    pub first_name: Option<String>,
    /// Of the person.
    pub last_name: Option<String>,
    /// What they want to do.
    pub use_case: Option<String>,
    /// The token of an invitation.
    pub invitation: Option<String>,
}

impl Service {
    /// Makes an organisation with its first user and key, or adds a user to the one they were invited into.
    ///
    /// # Errors
    /// When registration is closed or the invitation does not work, a field is not acceptable, or the address is taken.
    pub async fn register(&self, registration: Registration) -> Result<RegisterResponse, ServiceError> {
        let refused = |message: &str| Err(ServiceError::Forbidden(message.to_owned()));
        match (self.shared.config.registration, &registration.invitation) {
            (Mode::Open, _) | (Mode::Invite, Some(_)) => {}
            (Mode::Invite, None) => {
                return refused("registration needs an invitation: `invitation` with its token");
            }
            (Mode::Closed, _) => return refused("registration is closed on this installation"),
        }
        let invitation = match &registration.invitation {
            None => None,
            Some(token) => Some(self.invited(token, &address(&registration.email)?).await?),
        };
        let (invitation, into) = match invitation {
            None => (None, None),
            Some(record) => (Some(record.invitation), record.org_id),
        };
        let account = check(registration, into.is_none())?;
        let org_id = into.clone().unwrap_or_else(OrgId::random);
        let user_id = UserId::random();
        let issued = keys::first(&org_id, &user_id)?;
        let (store, now) = (&self.shared.store, super::now());
        let used = invitation.as_ref().map(|invitation| &invitation.id);
        let (organization, role) = match (&into, &invitation) {
            (Some(_), Some(invitation)) => {
                let role = invitation.role;
                store
                    .add_user(&account, role, &issued.stored, used, users::MAX_USERS, now)
                    .await?;
                let organization = store.organization(&org_id).await?;
                let gone = || ServiceError::Internal("an organisation is gone".to_owned());
                (organization.ok_or_else(gone)?, role)
            }
            (_, _) => {
                let slug = slug(&account.organization);
                let slug = store.register(&account, &slug, &issued.stored, used, now).await?;
                let organization = Organization {
                    id: org_id.clone(),
                    name: account.organization,
                    slug,
                    plan: PLAN.to_owned(),
                };
                (organization, Role::Owner)
            }
        };
        tracing::info!(target: "audit", org_id = %org_id, user_id = %user_id, "registered");
        Ok(RegisterResponse {
            success: true,
            message: "Registered. Keep the API key: it is not shown again.".to_owned(),
            organization,
            user: User {
                id: user_id,
                email: account.email,
                role,
                first_name: account.first_name,
                last_name: account.last_name,
                created_at: Some(now),
            },
            api_key: users::first_key(&issued),
            key: issued.key,
        })
    }
}

/// Lets somebody make an organisation where registration needs an invitation. For the operator, who has the database.
///
/// # Errors
/// An address that is none; when the store fails.
pub async fn invite_from_outside(
    store: &Store,
    email: Option<&str>,
    days: u64,
) -> Result<InvitationCreated, ServiceError> {
    let email = email.map(address).transpose()?;
    let (stored, created) = users::make(None, email, Role::Owner, days)?;
    store.invite(&stored, users::MAX_INVITATIONS).await?;
    Ok(created)
}

/// An e-mail address, in lower case.
pub(super) fn address(email: &str) -> Result<String, ServiceError> {
    let email = email.trim().to_lowercase();
    let well_formed = email.len() <= MAX_EMAIL
        && !email
            .chars()
            .any(|character| character.is_whitespace() || character.is_control())
        && matches!(email.split_once('@'), Some((local, domain))
            if !local.is_empty() && !domain.is_empty() && !domain.contains('@'));
    if !well_formed {
        return Err(invalid("email", "expected an e-mail address"));
    }
    Ok(email)
}

/// Checks who registers or is added; the organisation has a name where one is made.
pub(super) fn check(registration: Registration, makes_one: bool) -> Result<NewAccount, ServiceError> {
    let email = address(&registration.email)?;
    let organization = name("organization_name", registration.organization_name, 200)?;
    if makes_one && organization.is_none() {
        return Err(invalid(
            "organization_name",
            "expected a name of 1 to 200 characters",
        ));
    }
    Ok(NewAccount {
        email,
        organization: organization.unwrap_or_default(),
        first_name: name("first_name", registration.first_name, 100)?,
        last_name: name("last_name", registration.last_name, 100)?,
        use_case: name("use_case", registration.use_case, 2_000)?,
    })
}

/// A text for people: trimmed, without control characters; none when empty.
fn name(field: &'static str, text: Option<String>, longest: usize) -> Result<Option<String>, ServiceError> {
    let Some(text) = text else { return Ok(None) };
    let text = text.trim();
    if text.chars().count() > longest || text.chars().any(char::is_control) {
        return Err(invalid(
            field,
            &format!("expected at most {longest} characters without control characters"),
        ));
    }
    Ok(Some(text.to_owned()).filter(|text| !text.is_empty()))
}

/// A name for URLs: lower-case letters, digits and single dashes.
fn slug(name: &str) -> String {
    let mut slug = String::new();
    for character in name.chars().flat_map(char::to_lowercase).take(60) {
        if character.is_ascii_alphanumeric() {
            slug.push(character);
        } else if !slug.is_empty() && !slug.ends_with('-') {
            slug.push('-');
        }
    }
    let slug = slug.trim_end_matches('-');
    if slug.is_empty() {
        "organization".to_owned()
    } else {
        slug.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registration(email: &str, organization: &str) -> Registration {
        Registration {
            email: email.to_owned(),
            organization_name: Some(organization.to_owned()),
            first_name: None,
            last_name: None,
            use_case: None,
            invitation: None,
        }
    }

    fn refused_field(registration: Registration) -> Option<String> {
        match check(registration, true) {
            Err(ServiceError::Invalid { field, .. }) => Some(field),
            Err(other) => panic!("{other}"),
            Ok(_) => None,
        }
    }

    #[test]
    fn an_address_has_two_parts_and_no_spaces() {
        for email in ["a@b", "A.B+c@example.org", " a@b "] {
            assert_eq!(refused_field(registration(email, "x")), None, "{email:?}");
        }
        for email in ["", "a", "@b", "a@", "a@b@c", "a b@c", "a@b\n", "a@b\u{0}c"] {
            let expected = (email != "a@b\n").then(|| "email".to_owned());
            assert_eq!(refused_field(registration(email, "x")), expected, "{email:?}");
        }
        assert_eq!(
            refused_field(registration(&format!("{}@b", "a".repeat(260)), "x")).as_deref(),
            Some("email")
        );
    }

    #[test]
    fn an_organization_has_a_name() {
        for name in ["", "   ", &"x".repeat(201), "a\u{7}b"] {
            assert_eq!(
                refused_field(registration("a@b", name)).as_deref(),
                Some("organization_name"),
                "{name:?}"
            );
        }
    }

    #[test]
    fn a_slug_fits_into_a_url() {
        for (name, expected) in [
            ("Acme", "acme"),
            ("Ac me, Inc.", "ac-me-inc"),
            ("--", "organization"),
            ("Ærø 2", "r-2"),
            ("日本", "organization"),
        ] {
            assert_eq!(slug(name), expected, "{name:?}");
        }
    }
}
