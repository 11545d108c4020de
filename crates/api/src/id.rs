//! Identifiers: one newtype per kind, so that an organisation can never be passed for a sandbox.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// The text is not an identifier of the expected kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a {kind} id (expected `{prefix}` followed by lower-case letters and digits)")]
pub struct InvalidId {
    /// What was given, cut to 80 characters.
    pub text: String,
    /// The kind that was expected, for example `sandbox`.
    pub kind: &'static str,
    /// The prefix that was expected.
    pub prefix: &'static str,
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $kind:literal, $prefix:literal) => {
        $(#[$doc])*
        #[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(value_type = String))]
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The fixed beginning of every id of this kind.
            pub const PREFIX: &'static str = $prefix;

            /// A fresh random id: 64 random bits.
            pub fn random() -> Self {
                let random = uuid::Uuid::new_v4().simple().to_string();
                // The last 16 digits hold no version bits beyond the variant: 62 random bits.
                Self(format!("{}{}", $prefix, &random[16..]))
            }

            /// The id as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;

            fn from_str(text: &str) -> Result<Self, InvalidId> {
                let invalid = || InvalidId {
                    text: text.chars().take(80).collect(),
                    kind: $kind,
                    prefix: $prefix,
                };
                let rest = text.strip_prefix($prefix).ok_or_else(invalid)?;
                let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
                if rest.is_empty() || rest.len() > 40 || !rest.bytes().all(plain) {
                    return Err(invalid());
                }
                Ok(Self(text.to_owned()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidId;

            fn try_from(text: String) -> Result<Self, InvalidId> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str(&self.0)
            }
        }
    };
}

id!(
    /// A sandbox: `sandbox-` and 16 hexadecimal digits.
    SandboxId,
    "sandbox",
    "sandbox-"
);
id!(
    /// An organisation, the owner of sandboxes, keys and policies.
    OrgId,
    "organization",
    "org-"
);
id!(
    /// A person or robot of an organisation.
    UserId,
    "user",
    "user-"
);
id!(
    /// Lets one person register.
    InvitationId,
    "invitation",
    "invitation-"
);
id!(
    /// An API key's public part.
    ApiKeyId,
    "API key",
    "key-"
);
id!(
    /// A tunnel: a public URL of a sandbox's port.
    TunnelId,
    "tunnel",
    "tunnel-"
);
id!(
    /// A stored secret.
    SecretId,
    "secret",
    "secret-"
);

impl OrgId {
    /// Stands where an owner is expected, for a sandbox that has none yet. Random ids are longer, so it is
    /// nobody's.
    pub fn nobody() -> Self {
        Self("org-nobody".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_survives_the_way_through_text() {
        let id = SandboxId::random();
        assert_eq!(id.as_str().len(), "sandbox-".len() + 16);
        assert_eq!(id.as_str().parse::<SandboxId>(), Ok(id));
    }

    #[test]
    fn an_id_can_never_be_a_path_or_another_kind() {
        for text in [
            "",
            "sandbox-",
            "sandbox-../x",
            "sandbox-A",
            "org-0",
            "sandbox-a/b",
            "sandbox-a\0",
        ] {
            assert!(text.parse::<SandboxId>().is_err(), "{text:?} was accepted");
        }
    }
}
