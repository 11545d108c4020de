//! Templates: the built-in ones, those of the organisation, and what is done in a sandbox made from one.

use std::time::Duration;

use sandgate_api::{
    agent::{Command, Exec},
    id::{OrgId, SandboxId},
    rest,
};

use super::{Service, ServiceError};
use crate::{
    agent::{Agent, AgentError, ExecEvent},
    store::SandboxRecord,
    template::{Furnishing, MAX_TEMPLATES, PREFIX, Template, built_in},
};

/// How long files and commands of a template may take together.
pub(super) const FURNISHING: Duration = Duration::from_secs(300);

/// How much of what a failed command wrote is told, in bytes.
const TOLD: usize = 1_000;

/// Which templates are wanted.
#[derive(Debug, Clone, Default)]
pub struct TemplateFilter {
    /// Of this category.
    pub category: Option<String>,
    /// With this text in their id, name, description or tags, in any case.
    pub search: Option<String>,
}

impl TemplateFilter {
    fn wants(&self, id: &str, template: &Template) -> bool {
        let of_category = |category: &String| template.category.eq_ignore_ascii_case(category);
        let has = |search: &String| {
            let search = search.to_lowercase();
            let texts = [id, &template.name, &template.description];
            let tags = template.tags.iter().map(String::as_str);
            texts
                .into_iter()
                .chain(tags)
                .any(|text| text.to_lowercase().contains(&search))
        };
        self.category.as_ref().is_none_or(of_category) && self.search.as_ref().is_none_or(has)
    }
}

impl Service {
    /// The templates that an organisation can use: the built-in ones, then its own.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn templates(
        &self,
        org_id: &OrgId,
        filter: &TemplateFilter,
    ) -> Result<Vec<rest::Template>, ServiceError> {
        let own = self.shared.store.templates(org_id).await?;
        let all = built_in()
            .into_iter()
            .map(|(id, template)| (id.to_owned(), template))
            .chain(own);
        let wanted = all.filter(|(id, template)| filter.wants(id, template));
        Ok(wanted
            .map(|(id, template)| self.shown_template(id, template))
            .collect())
    }

    /// One of them, as it is shown.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`].
    pub async fn template(&self, org_id: &OrgId, id: &str) -> Result<rest::Template, ServiceError> {
        let found = self.find_template(org_id, id).await?;
        let found = found.ok_or_else(|| missing(id))?;
        Ok(self.shown_template(id.to_owned(), found))
    }

    /// One of them; none when there is none.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn find_template(&self, org_id: &OrgId, id: &str) -> Result<Option<Template>, ServiceError> {
        let mut built_in = built_in().into_iter();
        if let Some((_, template)) = built_in.find(|(known, _)| *known == id) {
            return Ok(Some(template));
        }
        Ok(self.shared.store.template(org_id, id).await?)
    }

    /// Stores a template of the organisation.
    ///
    /// # Errors
    /// When it has as many as it may.
    pub async fn create_template(
        &self,
        org_id: &OrgId,
        template: Template,
    ) -> Result<rest::Template, ServiceError> {
        let id = SandboxId::random()
            .as_str()
            .replacen(SandboxId::PREFIX, PREFIX, 1);
        let store = &self.shared.store;
        store
            .insert_template(org_id, &id, &template, super::now(), MAX_TEMPLATES)
            .await?;
        tracing::info!(target: "audit", org_id = %org_id, template_id = id, "template created");
        Ok(self.shown_template(id, template))
    }

    /// Replaces a template of the organisation. Sandboxes made from it stay as they are.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`]; a conflict for those that are built in.
    pub async fn replace_template(
        &self,
        org_id: &OrgId,
        id: &str,
        template: Template,
    ) -> Result<rest::Template, ServiceError> {
        own(id)?;
        let store = &self.shared.store;
        if !store
            .replace_template(org_id, id, &template, super::now())
            .await?
        {
            return Err(missing(id));
        }
        tracing::info!(target: "audit", org_id = %org_id, template_id = id, "template replaced");
        Ok(self.shown_template(id.to_owned(), template))
    }

    /// Deletes a template of the organisation. Sandboxes made from it stay as they are.
    ///
    /// # Errors
    /// [`ServiceError::NotFound`]; a conflict for those that are built in.
    pub async fn delete_template(&self, org_id: &OrgId, id: &str) -> Result<(), ServiceError> {
        own(id)?;
        if !self.shared.store.delete_template(org_id, id).await? {
            return Err(missing(id));
        }
        tracing::info!(target: "audit", org_id = %org_id, template_id = id, "template deleted");
        Ok(())
    }

    fn shown_template(&self, id: String, template: Template) -> rest::Template {
        let defaults = self.sandbox_defaults();
        let text = |own: Option<String>, usual: String| own.unwrap_or(usual);
        rest::Template {
            is_built_in: !id.starts_with(PREFIX),
            id,
            name: template.name,
            description: template.description,
            category: template.category,
            tags: template.tags,
            config: rest::TemplateConfig {
                cpus: text(
                    template.cpus.map(|cpus| cpus.to_string()),
                    defaults.cpus.to_string(),
                ),
                memory: text(
                    template.memory.map(|memory| memory.to_string()),
                    defaults.memory.to_string(),
                ),
                disk: text(
                    template.disk.map(|disk| disk.to_string()),
                    defaults.disk.to_string(),
                ),
                pids: template.pids.unwrap_or(defaults.pids),
                timeout_seconds: template.timeout_seconds.unwrap_or(defaults.timeout_seconds),
                idle_timeout_seconds: template.idle_timeout_seconds,
                env: template.env,
                setup_commands: template.setup_commands,
            },
            files: template
                .files
                .into_iter()
                .map(|file| rest::TemplateFile {
                    path: file.path,
                    content: file.content,
                })
                .collect(),
            network: template
                .network
                .and_then(|network| serde_json::to_value(network).ok()),
        }
    }

    /// Writes a template's files and runs its commands in a sandbox that nobody has yet.
    ///
    /// # Errors
    /// What went wrong, for whoever wants the sandbox.
    pub(super) async fn furnish(
        &self,
        record: &SandboxRecord,
        furnishing: &Furnishing,
    ) -> Result<(), String> {
        let agent = || async {
            let agent = self.dial_agent(&record.id).await;
            agent.map_err(|error| error.to_string())
        };
        for file in &furnishing.files {
            let content = file.content.clone().into_bytes().into();
            let written = agent().await?.write_file(&file.path, None, content).await;
            written.map_err(|error| format!("the template's file `{}`: {error}", file.path))?;
        }
        for (index, line) in furnishing.commands.iter().enumerate() {
            let exec = Exec {
                command: Command::Shell(line.clone()),
                env: std::collections::BTreeMap::new(),
                working_dir: None,
                timeout_ms: u64::try_from(FURNISHING.as_millis()).ok(),
                track: None,
            };
            let exec = self.with_secrets(record, exec).await;
            let exec = exec.map_err(|error| error.to_string())?;
            let ended = run(agent().await?, exec).await;
            let (exit_code, written) = ended.map_err(|error| format!("setup_commands[{index}]: {error}"))?;
            if exit_code != 0 {
                return Err(format!(
                    "setup_commands[{index}] ended with {exit_code}: {}",
                    written.trim()
                ));
            }
        }
        Ok(())
    }
}

/// Exit status, and the end of what it wrote.
async fn run(agent: Agent, exec: Exec) -> Result<(i32, String), AgentError> {
    let mut events = agent.exec(exec).await?;
    let mut written = Vec::new();
    while let Some(event) = events.next().await {
        match event? {
            ExecEvent::Stdout(bytes) | ExecEvent::Stderr(bytes) => {
                written.extend_from_slice(&bytes);
                let beyond = written.len().saturating_sub(TOLD);
                written.drain(..beyond);
            }
            ExecEvent::Exited { exit_code, .. } => {
                return Ok((exit_code, String::from_utf8_lossy(&written).into_owned()));
            }
        }
    }
    Err(AgentError::Closed)
}

fn missing(id: &str) -> ServiceError {
    let id: String = id.chars().take(80).collect();
    ServiceError::NotFound(format!("template {id}"))
}

/// Refuses to change what is built in.
fn own(id: &str) -> Result<(), ServiceError> {
    if built_in().iter().any(|(known, _)| *known == id) {
        return Err(ServiceError::Conflict(format!(
            "the template `{id}` is built in and cannot be changed"
        )));
    }
    Ok(())
}
