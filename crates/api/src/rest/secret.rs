//! Secrets: what can be said about them. No type here holds a value.

use jiff::Timestamp;
use serde::{Deserialize, Serialize, Serializer};

use crate::{
    credential::Inject,
    id::{SandboxId, SecretId},
};

/// Where a secret may go, and how, as users write it.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EgressBinding {
    /// As in [`Binding::hosts`](crate::credential::Binding::hosts).
    pub hosts: Vec<String>,
    /// As in [`Binding::ports`](crate::credential::Binding::ports).
    pub ports: Vec<u16>,
    /// As in [`Binding::methods`](crate::credential::Binding::methods).
    pub methods: Vec<String>,
    /// As in [`Binding::paths`](crate::credential::Binding::paths).
    pub paths: Vec<String>,
    /// As in [`Binding::inject`](crate::credential::Binding::inject).
    pub inject: Vec<Inject>,
    /// As in [`Binding::strip_client_auth`](crate::credential::Binding::strip_client_auth).
    pub strip_client_auth: bool,
}

/// Element of `GET /secrets`; the answer to `POST /secrets` and `PUT /secrets/:name`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Secret {
    /// Its id.
    pub id: SecretId,
    /// The environment variable it becomes.
    pub name: String,
    /// Always `sandbox`.
    pub scope: String,
    /// `null` for a plain environment variable, an object for one binding, a list for several: as it can be
    /// sent back.
    #[serde(serialize_with = "as_sent")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<crate::openapi::EgressBindings>))]
    pub egress: Option<Vec<EgressBinding>>,
    /// When it was made.
    pub created_at: Timestamp,
    /// When its value or its binding changed last.
    pub updated_at: Timestamp,
    /// In the answer to a change: the node enforces it for every running sandbox.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub applied: Option<bool>,
}

fn as_sent<S: Serializer>(egress: &Option<Vec<EgressBinding>>, serializer: S) -> Result<S::Ok, S::Error> {
    match egress.as_deref() {
        None => serializer.serialize_none(),
        Some([one]) => one.serialize(serializer),
        Some(several) => several.serialize(serializer),
    }
}

/// `GET /secrets`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SecretList {
    /// By name.
    pub secrets: Vec<Secret>,
}

/// `POST /sandbox/:id/secrets/inject`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecretsInjected {
    /// The sandbox.
    pub sandbox_id: SandboxId,
    /// Their names, those that were there already included.
    pub injected: Vec<String>,
    /// The node enforces their bindings.
    pub applied: bool,
}
