//! Credentials between the controller and a node: what may be injected where, and the leases on values.
//!
//! A feed carries [`Binding`]s, which hold no value. A node asks for a value when a request needs it, with
//! `POST /feed/credential` ([`CredentialRequest`], answered by a [`CredentialLease`] or 404), and for a
//! sandbox's certificate authority with `POST /feed/ca` ([`CaRequest`], answered by a [`CaLease`] or 404).
//! A rotation or revocation is a feed delta with another `version`, or without the binding: the node drops
//! its lease and asks anew. A value is kept in memory only, and for no longer than its lease.

use std::fmt;

use serde::{Deserialize, Serialize};
use zeroize::{Zeroize as _, ZeroizeOnDrop};

use crate::id::SandboxId;

/// Seconds for which a node may use a value after the controller gave or renewed it.
pub const LEASE_SECONDS: u64 = 60;

/// What a header's format must contain: the place of the value.
pub const VALUE_MARK: &str = "{value}";

/// What every placeholder contains, behind a prefix that differs and before 32 hexadecimal digits. It tells
/// placeholders of other sandboxes and of revoked secrets from ordinary text, as far as that matters.
pub const PLACEHOLDER_MARK: &str = "sgp0";

/// A text that is never printed, and wiped when dropped. `Serialize` writes the text itself: only the types of
/// this module that answer a node hold one.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Sensitive(String);

impl Sensitive {
    /// Wraps a text.
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// The text itself. Whoever calls this answers for where it goes.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Sensitive {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Sensitive(..)")
    }
}

impl Drop for Sensitive {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl ZeroizeOnDrop for Sensitive {}

/// How a value gets into a request.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Inject {
    /// `Authorization: Bearer <value>`.
    Bearer,
    /// `Authorization: Basic base64(<username>:<value>)`.
    Basic {
        /// Has no colon.
        username: String,
    },
    /// A header.
    Header {
        /// Its name, in lower case.
        header: String,
        /// Its value; contains [`VALUE_MARK`] once.
        format: String,
    },
    /// A parameter of the query, percent-encoded.
    Query {
        /// Its name.
        parameter: String,
    },
    /// Wherever the client put the placeholder.
    Placeholder {
        /// Where it is looked for.
        #[serde(rename = "in")]
        places: Vec<PlaceholderPlace>,
    },
}

/// Where a placeholder is replaced by the value.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PlaceholderPlace {
    /// The value of any header, inside Basic too.
    Header,
    /// The query.
    Query,
}

/// A secret of one sandbox that is bound to hosts. Holds no value. A secret may have several, for example one
/// with Bearer for an API's host and one with Basic for a Git host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Binding {
    /// The secret's name, by which its value is asked for.
    pub secret: String,
    /// Another one means that leases on the value are void.
    pub version: u64,
    /// Patterns as in a policy: `api.example.org`, `*.example.org`. Never empty, never `*`.
    pub hosts: Vec<String>,
    /// Never empty.
    pub ports: Vec<u16>,
    /// Upper case; empty means any.
    #[serde(default)]
    pub methods: Vec<String>,
    /// Patterns as in a policy's `http` list; empty means any.
    #[serde(default)]
    pub paths: Vec<String>,
    /// Never empty. Each is applied; where several write the same header (Bearer and Basic do), the one whose
    /// scheme the client used counts, else the first.
    pub inject: Vec<Inject>,
    /// Other carriers of credentials are taken out of requests to these hosts.
    #[serde(default = "yes")]
    pub strip_client_auth: bool,
    /// What stands in the sandbox in the value's place, oldest first.
    #[serde(default)]
    pub placeholders: Vec<String>,
}

fn yes() -> bool {
    true
}

/// `POST /feed/credential`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CredentialRequest {
    /// For which sandbox.
    pub sandbox_id: SandboxId,
    /// [`Binding::secret`].
    pub secret: String,
}

/// The answer to a [`CredentialRequest`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CredentialLease {
    /// The value.
    pub value: Sensitive,
    /// Which [`Binding::version`] it belongs to; may be newer than the feed the node has seen.
    pub version: u64,
    /// How long it may be used without asking again.
    pub lease_seconds: u64,
}

/// `POST /feed/ca`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CaRequest {
    /// For which sandbox.
    pub sandbox_id: SandboxId,
}

/// The answer to a [`CaRequest`]: what the sandbox trusts, for the node that speaks in the hosts' place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CaLease {
    /// The authority's certificate, PEM.
    pub certificate_pem: String,
    /// Its private key, PKCS #8 PEM.
    pub key_pem: Sensitive,
    /// [`FeedSandbox::ca_generation`](crate::feed::FeedSandbox::ca_generation) that it belongs to.
    pub generation: u32,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_printed_holds_no_value() {
        let lease = CredentialLease {
            value: Sensitive::new("canary-value".to_owned()),
            version: 3,
            lease_seconds: LEASE_SECONDS,
        };
        let authority = CaLease {
            certificate_pem: String::new(),
            key_pem: Sensitive::new("canary-key".to_owned()),
            generation: 1,
        };
        let printed = format!("{lease:?} {lease:#?} {authority:?} {authority:#?}");
        assert!(!printed.contains("canary"), "{printed}");
        assert_eq!(lease.value.expose(), "canary-value");
    }

    #[test]
    fn kinds_are_written_as_users_write_them() {
        for (inject, written) in [
            (Inject::Bearer, json!({"kind": "bearer"})),
            (
                Inject::Basic {
                    username: "x-access-token".to_owned(),
                },
                json!({"kind": "basic", "username": "x-access-token"}),
            ),
            (
                Inject::Header {
                    header: "x-api-key".to_owned(),
                    format: "{value}".to_owned(),
                },
                json!({"kind": "header", "header": "x-api-key", "format": "{value}"}),
            ),
            (
                Inject::Query {
                    parameter: "key".to_owned(),
                },
                json!({"kind": "query", "parameter": "key"}),
            ),
            (
                Inject::Placeholder {
                    places: vec![PlaceholderPlace::Header, PlaceholderPlace::Query],
                },
                json!({"kind": "placeholder", "in": ["header", "query"]}),
            ),
        ] {
            assert_eq!(serde_json::to_value(&inject).expect("JSON"), written);
            assert_eq!(
                serde_json::from_value::<Inject>(written).expect("an inject"),
                inject
            );
        }
    }
}
