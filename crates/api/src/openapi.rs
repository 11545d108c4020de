//! Schemas of what the REST API speaks and no type of ours says: the policy document, whose type lives in
//! `sandgate_policy` and makes its schema itself. Nothing here is ever constructed.

use serde::Serialize;
use serde_json::{Value, json};
use utoipa::{
    PartialSchema, ToSchema,
    openapi::{RefOr, Schema, schema::ObjectBuilder},
};

use crate::rest::EgressBinding;

/// The policy document: the schema that `sandgate_policy` makes of the table its parser goes by.
#[derive(Serialize)]
pub struct PolicyDocument;

impl PolicyDocument {
    /// The schema with examples.
    pub fn json() -> Value {
        let mut schema = sandgate_policy::Policy::schema();
        schema["examples"] = json!([
            {
                "mode": "allowlist",
                "allowed_domains": ["api.example.org", "*.example.net"],
                "denied_domains": ["tracker.example.net"],
                "allowed_cidrs": ["203.0.113.0/24"],
                "denied_cidrs": ["198.51.100.7", "2001:db8::/32"],
                "allowed_ports": [443],
                "rules": [
                    {
                        "name": "read only",
                        "action": "allow",
                        "domains": ["api.example.org"],
                        "cidrs": [],
                        "ports": ["443"],
                        "protocol": "http",
                        "tls": "auto",
                        "http": [{"methods": ["GET"], "paths": ["/v1/**"], "upgrade": false}],
                        "credential": "EXAMPLE_TOKEN"
                    }
                ],
                "enforcement": "audit",
                "failure_mode": "fail_closed",
                "ech": "deny",
                "dns": {
                    "types": ["A", "AAAA"], "unique_names_per_minute": 60, "query_bytes_per_minute": 8192,
                    "label_max": 40, "name_max": 128
                },
                "quotas": {
                    "upload_bytes_per_host": 104_857_600, "new_hosts_per_hour": 100, "secret_uses_per_hour": 1000
                }
            },
            {
                "mode": "allow_all", "revision": 7, "updated_at": "2026-01-30T10:00:00Z", "applied": true, "effective": []
            }
        ]);
        schema
    }
}

/// Holds its place in a description until [`PolicyDocument::json`] takes it: the schema has words that utoipa does not
/// know.
impl PartialSchema for PolicyDocument {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new().into()
    }
}

impl ToSchema for PolicyDocument {
    fn name() -> std::borrow::Cow<'static, str> {
        "PolicyDocument".into()
    }
}

/// One binding, or several.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
pub enum EgressBindings {
    /// One.
    One(EgressBinding),
    /// Several.
    Several(Vec<EgressBinding>),
}

/// Why something was allowed or denied: the words of `sandgate_policy::Reason`, which stays the only list of them.
pub struct Reason;

impl PartialSchema for Reason {
    fn schema() -> RefOr<Schema> {
        let words = sandgate_policy::Reason::ALL.iter().map(|reason| reason.as_str());
        ObjectBuilder::new()
            .schema_type(utoipa::openapi::schema::Type::String)
            .enum_values(Some(words))
            .description(Some("Why something was allowed or denied."))
            .into()
    }
}

impl ToSchema for Reason {
    fn name() -> std::borrow::Cow<'static, str> {
        "Reason".into()
    }
}
