//! What sandboxes are made from: resources, environment, rules, files and commands that are run before anybody gets
//! one. Pure. The built-in ones promise what the default image has.

use std::collections::BTreeMap;

use sandgate_policy::Policy;
use serde::{Deserialize, Serialize};

use crate::spec::{Cpus, Size};

/// Most commands of a template.
pub const MAX_COMMANDS: usize = 32;

/// Longest command of a template, in bytes.
pub const MAX_COMMAND: usize = 16 * 1024;

/// Most files of a template.
pub const MAX_FILES: usize = 64;

/// Most bytes of a template's files together.
pub const MAX_FILE_BYTES: usize = 1024 * 1024;

/// Most templates of an organisation.
pub const MAX_TEMPLATES: u32 = 100;

/// What ids of own templates begin with.
pub const PREFIX: &str = "tpl-";

/// What a sandbox is made from. What is left out is as without a template.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Template {
    /// For people.
    pub name: String,
    /// For people.
    pub description: String,
    /// What lists are filtered by.
    pub category: String,
    /// For people who search.
    pub tags: Vec<String>,
    /// Processors.
    pub cpus: Option<Cpus>,
    /// Memory.
    pub memory: Option<Size>,
    /// Writable layer.
    pub disk: Option<Size>,
    /// Processes.
    pub pids: Option<u64>,
    /// Lifetime in seconds.
    pub timeout_seconds: Option<u64>,
    /// See [`crate::terms::Terms`].
    pub idle_timeout_seconds: Option<u64>,
    /// Environment of everything inside.
    pub env: BTreeMap<String, String>,
    /// Shell lines, run one after the other; all of them must succeed.
    pub setup_commands: Vec<String>,
    /// Written before that.
    pub files: Vec<TemplateFile>,
    /// The sandbox's own egress policy.
    pub network: Option<Policy>,
}

/// A file of a template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateFile {
    /// Absolute, inside the sandbox.
    pub path: String,
    /// Its text.
    pub content: String,
}

/// What is done in a sandbox before anybody gets it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Furnishing {
    /// Written first.
    pub files: Vec<TemplateFile>,
    /// Run after that.
    pub commands: Vec<String>,
}

impl Template {
    /// What is to be done in a sandbox made from it; none when there is nothing.
    pub fn furnishing(&self) -> Option<Furnishing> {
        let furnishing = Furnishing {
            files: self.files.clone(),
            commands: self.setup_commands.clone(),
        };
        (furnishing != Furnishing::default()).then_some(furnishing)
    }
}

/// Those that everybody has, with their ids.
pub fn built_in() -> [(&'static str, Template); 3] {
    let template = |name: &str, description: &str, category: &str, tags: &[&str]| Template {
        name: name.to_owned(),
        description: description.to_owned(),
        category: category.to_owned(),
        tags: tags.iter().map(|tag| (*tag).to_owned()).collect(),
        cpus: None,
        memory: None,
        disk: None,
        pids: None,
        timeout_seconds: None,
        idle_timeout_seconds: None,
        env: BTreeMap::new(),
        setup_commands: Vec::new(),
        files: Vec::new(),
        network: None,
    };
    let python = Template {
        env: BTreeMap::from([("PYTHONUNBUFFERED".to_owned(), "1".to_owned())]),
        ..template(
            "Python",
            "The default image for Python: python3 and pip, output unbuffered.",
            "language",
            &["python", "pip"],
        )
    };
    let node = Template {
        env: BTreeMap::from([("NO_UPDATE_NOTIFIER".to_owned(), "1".to_owned())]),
        ..template(
            "Node.js",
            "The default image for Node.js: node.",
            "language",
            &["node", "javascript"],
        )
    };
    let base = template(
        "Base",
        "The default image as it is: shell, Python, Node.js, Git, curl.",
        "general",
        &["shell"],
    );
    [("base", base), ("node-basic", node), ("python-basic", python)]
}
