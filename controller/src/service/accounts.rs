//! Registration.

use sandgate_api::{
    id::OrgId,
    rest::{FirstKey, Organization, RegisterResponse, User},
};

use super::{Service, ServiceError, keys};
use crate::{config::Registration as Mode, store::NewAccount};

/// The plan of every organisation of an installation of one's own.
const PLAN: &str = "self-hosted";

/// Name of the key that comes with a registration.
const FIRST_KEY: &str = "default";

/// Longest e-mail address (RFC 5321, 4.5.3.1.3: a path has 256 octets with its brackets).
const MAX_EMAIL: usize = 254;

/// What somebody who registers says, unchecked.
#[derive(Debug, Clone)]
pub struct Registration {
    /// E-mail address.
    pub email: String,
    /// Name of the organisation.
    pub organization_name: String,
    /// Of the person.
    pub first_name: Option<String>,
    /// Of the person.
    pub last_name: Option<String>,
    /// What they want to do.
    pub use_case: Option<String>,
}

impl Service {
    /// Makes an organisation with its first user and key.
    ///
    /// # Errors
    /// When registration is closed, a field is not acceptable, or the address is taken.
    pub async fn register(&self, registration: Registration) -> Result<RegisterResponse, ServiceError> {
        match self.shared.config.registration {
            Mode::Open => {}
            Mode::Closed => {
                return Err(ServiceError::Forbidden(
                    "registration is closed on this installation".to_owned(),
                ));
            }
        }
        let account = check(registration)?;
        let org_id = OrgId::random();
        let issued = keys::issue(&org_id, FIRST_KEY.to_owned(), vec!["*".to_owned()], None)?;
        let stored = self
            .shared
            .store
            .register(
                &account,
                &slug(&account.organization),
                &issued.stored,
                super::now(),
            )
            .await?;
        tracing::info!(target: "audit", org_id = %org_id, user_id = %stored.user_id, "registered");
        Ok(RegisterResponse {
            success: true,
            message: "Registered. Keep the API key: it is not shown again.".to_owned(),
            organization: Organization {
                id: org_id,
                name: account.organization,
                slug: stored.slug,
                plan: PLAN.to_owned(),
            },
            user: User {
                id: stored.user_id,
                email: account.email,
                role: "owner".to_owned(),
            },
            api_key: FirstKey {
                key: issued.key.clone(),
                key_prefix: issued.stored.prefix,
                name: issued.stored.name,
            },
            key: issued.key,
        })
    }
}

fn check(registration: Registration) -> Result<NewAccount, ServiceError> {
    let email = registration.email.trim().to_lowercase();
    let well_formed = email.len() <= MAX_EMAIL
        && !email
            .chars()
            .any(|character| character.is_whitespace() || character.is_control())
        && matches!(email.split_once('@'), Some((local, domain))
            if !local.is_empty() && !domain.is_empty() && !domain.contains('@'));
    if !well_formed {
        return Err(invalid("email", "expected an e-mail address"));
    }
    let organization = name("organization_name", Some(registration.organization_name), 200)?
        .ok_or_else(|| invalid("organization_name", "expected a name of 1 to 200 characters"))?;
    Ok(NewAccount {
        email,
        organization,
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

fn invalid(field: &str, message: &str) -> ServiceError {
    ServiceError::Invalid {
        field: field.to_owned(),
        message: message.to_owned(),
    }
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
            organization_name: organization.to_owned(),
            first_name: None,
            last_name: None,
            use_case: None,
        }
    }

    fn refused_field(registration: Registration) -> Option<String> {
        match check(registration) {
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
