//! Schemas of what the REST API speaks and no type of ours says: the policy document, whose type lives in
//! `sandgate_policy` and reads itself field by field. Nothing here is ever constructed; the controller's tests
//! send every field and hold this against what is really read.

#![expect(dead_code, reason = "schemas, not values")]

use serde::Serialize;
use utoipa::{
    PartialSchema, ToSchema,
    openapi::{RefOr, Schema, schema::ObjectBuilder},
};

use crate::rest::EgressBinding;

/// What a sandbox may do on the network. Every tier that has one must allow a flow.
#[derive(Serialize, ToSchema)]
#[schema(example = json!({
    "mode": "allowlist",
    "allowed_domains": ["api.example.org", "*.example.net"],
    "denied_domains": ["tracker.example.net"],
    "allowed_cidrs": ["203.0.113.0/24"],
    "denied_cidrs": ["198.51.100.7"],
    "allowed_ports": [443],
    "rules": [{
        "name": "read only",
        "action": "allow",
        "domains": ["api.example.org"],
        "cidrs": [],
        "ports": ["443"],
        "protocol": "http",
        "tls": "auto",
        "http": [{"methods": ["GET"], "paths": ["/v1/**"], "upgrade": false}],
        "credential": "EXAMPLE_TOKEN"
    }],
    "enforcement": "enforce",
    "failure_mode": "fail_closed",
    "ech": "deny",
    "dns": {"types": ["A", "AAAA"]}
}))]
pub struct PolicyDocument {
    /// What happens to a flow that no rule and no list mentions.
    mode: PolicyMode,
    /// Names that may be reached: exact, or `*.` and a suffix.
    #[schema(required = false)]
    allowed_domains: Vec<String>,
    /// Names that may not be reached, whatever allows them.
    #[schema(required = false)]
    denied_domains: Vec<String>,
    /// Ranges of addresses that may be reached.
    #[schema(required = false)]
    allowed_cidrs: Vec<String>,
    /// Ranges of addresses that may not be reached, whatever allows them.
    #[schema(required = false)]
    denied_cidrs: Vec<String>,
    /// Ports that the lists and the mode open.
    #[schema(required = false, default = json!([443]))]
    allowed_ports: Vec<u16>,
    /// The first that matches decides.
    #[schema(required = false)]
    rules: Vec<PolicyRule>,
    /// Only `enforce` is supported by this version.
    #[schema(required = false, default = "enforce")]
    enforcement: PolicyEnforcement,
    /// What happens to flows that cannot be recorded, or whose credential cannot be had.
    #[schema(required = false, default = "fail_closed")]
    failure_mode: PolicyFailureMode,
    /// Only `deny` is supported by this version.
    #[schema(required = false, default = "deny")]
    ech: String,
    /// Only the default budget is supported by this version.
    #[schema(required = false)]
    dns: PolicyDns,
}

/// What happens to a flow that no rule and no list mentions.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum PolicyMode {
    AllowAll,
    DenyAll,
    Allowlist,
    Denylist,
}

/// Whether denials are carried out.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum PolicyEnforcement {
    Enforce,
}

/// What happens while a part that is not the wall itself is out of order.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum PolicyFailureMode {
    FailClosed,
    FailOpen,
}

/// One rule; needs `domains` or `cidrs`.
#[derive(Serialize, ToSchema)]
pub struct PolicyRule {
    /// Shown in the audit.
    #[schema(required = false)]
    name: String,
    /// What it does with a flow that it matches.
    action: PolicyAction,
    /// Names that it matches.
    #[schema(required = false)]
    domains: Vec<String>,
    /// Ranges of addresses that it matches.
    #[schema(required = false)]
    cidrs: Vec<String>,
    /// Ports, or ranges of them; none: every port for a deny rule, `allowed_ports` for an allow rule.
    #[schema(required = false)]
    ports: Vec<PolicyPort>,
    /// How it knows the name of a flow: `http`: by the SNI or Host that the flow shows; `tcp`: by the names that
    /// the sandbox asked for.
    #[schema(required = false, default = "http")]
    protocol: PolicyProtocol,
    /// What happens to TLS on a flow that it allows.
    #[schema(required = false, default = "auto")]
    tls: PolicyTls,
    /// The requests that it allows; none: all of them.
    #[schema(required = false)]
    http: Vec<PolicyRequests>,
    /// The name of the secret whose binding requests must use.
    #[schema(required = false)]
    credential: String,
}

/// A port, or a range such as `8000-8080`.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
enum PolicyPort {
    One(u16),
    Range(String),
}

/// What a rule does.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum PolicyAction {
    Allow,
    Deny,
}

/// How a rule knows the name of a flow.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum PolicyProtocol {
    Http,
    Tcp,
}

/// What happens to TLS.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum PolicyTls {
    Auto,
    Splice,
    Intercept,
}

/// Requests that a rule allows.
#[derive(Serialize, ToSchema)]
pub struct PolicyRequests {
    /// None: any.
    #[schema(required = false)]
    methods: Vec<String>,
    /// `*` stands for one segment, `**` at the end for any number; none: any path.
    #[schema(required = false)]
    paths: Vec<String>,
    /// Whether the connection may become another protocol, for example a WebSocket.
    #[schema(required = false)]
    upgrade: bool,
}

/// The budget of DNS questions.
#[derive(Serialize, ToSchema)]
pub struct PolicyDns {
    /// Types that are answered.
    #[schema(required = false)]
    types: Vec<String>,
    /// Different names.
    #[schema(required = false)]
    unique_names_per_minute: u32,
    /// Bytes of all names.
    #[schema(required = false)]
    query_bytes_per_minute: u32,
    /// Longest label.
    #[schema(required = false)]
    label_max: u32,
    /// Longest name.
    #[schema(required = false)]
    name_max: u32,
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
