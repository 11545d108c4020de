//! What sandboxes can be made from.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// What a sandbox made from a template gets when nothing else is asked for.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateConfig {
    /// For example `2` or `500m`.
    pub cpus: String,
    /// For example `2Gi`.
    pub memory: String,
    /// Size of the writable layer.
    pub disk: String,
    /// Most processes and threads at once.
    pub pids: u64,
    /// Lifetime in seconds.
    pub timeout_seconds: u64,
    /// It ends when nothing has happened in it for so long.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_timeout_seconds: Option<u64>,
    /// Environment of everything inside.
    pub env: BTreeMap<String, String>,
    /// Shell lines that are run before anybody gets the sandbox.
    pub setup_commands: Vec<String>,
}

/// A file of a template.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateFile {
    /// Absolute.
    pub path: String,
    /// Its text.
    pub content: String,
}

/// `GET /templates/:id` and each element of `GET /templates`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Template {
    /// Its id.
    pub id: String,
    /// For people.
    pub name: String,
    /// For people.
    pub description: String,
    /// For example `language`.
    pub category: String,
    /// For people who search.
    pub tags: Vec<String>,
    /// Everybody has it, and nobody can change it.
    #[serde(rename = "built_in")]
    pub is_built_in: bool,
    /// Resources, environment, commands.
    pub config: TemplateConfig,
    /// Written before the commands are run.
    pub files: Vec<TemplateFile>,
    /// The egress policy of its sandboxes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<serde_json::Value>,
}

/// `GET /templates`.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TemplateList {
    /// Those that are built in, then the organisation's own, oldest first.
    pub templates: Vec<Template>,
}
