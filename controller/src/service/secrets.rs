//! Secrets: stored once, never shown, given to sandboxes.
//!
//! A bound secret is in a sandbox's environment as a placeholder; a plain one as itself, which is what was asked
//! for then. The environment is put together for each command anew, so that a rotation, a revocation and a later
//! injection count from the next command on, and no value is written to any file of a sandbox.

mod clash;

use std::time::Duration;

use sandgate_api::{
    agent::Exec,
    credential::Sensitive,
    feed::Revision,
    id::{OrgId, SandboxId, SecretId},
    rest::{EgressBinding, Secret, SecretsInjected},
};

use super::{Service, ServiceError};
use crate::{
    binding::{self, MOST_BINDINGS, Unacceptable},
    node::Enforcement,
    placeholder, presets,
    spec::check_environment,
    store::{
        Conflict, NewSecret, SandboxRecord, SecretChange, SecretChoice, SecretRecord, SecretUpdate,
        StoreError,
    },
};
pub(super) use clash::{clash, unbound, unbound_rule};

/// Secrets of one organisation: with its own variables a sandbox must stay below the limit of an environment.
const MAX_SECRETS: u32 = 200;

/// How long the answer to a change waits for the node.
const APPLY_TIMEOUT: Duration = Duration::from_secs(5);

/// How often a change is tried again when the secret changes under it.
const UPDATE_ATTEMPTS: u32 = 5;

/// The one scope of this version.
pub const SCOPE: &str = "sandbox";

/// Where a secret is to go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EgressRequest {
    /// Nothing was said: the preset of its name, or else a plain environment variable.
    Preset,
    /// `null`: a plain environment variable.
    Plain,
    /// These bindings.
    Bound(Vec<EgressBinding>),
}

/// A secret to be stored, unchecked.
#[derive(Debug, Clone)]
pub struct SecretRequest {
    /// The environment variable it becomes.
    pub name: String,
    /// The value.
    pub value: Sensitive,
    /// Where it is to go.
    pub egress: EgressRequest,
}

/// A change of a secret, unchecked.
#[derive(Debug, Clone)]
pub struct SecretChangeRequest {
    /// The new value.
    pub value: Option<Sensitive>,
    /// Where it is to go from now on; the same as before when absent.
    pub egress: Option<EgressRequest>,
}

impl From<Unacceptable> for ServiceError {
    fn from(error: Unacceptable) -> Self {
        Self::Invalid {
            field: error.field,
            message: error.message,
        }
    }
}

impl Service {
    /// The organisation's secrets.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn secrets(&self, org_id: &OrgId) -> Result<Vec<Secret>, ServiceError> {
        let records = self.shared.store.secrets(org_id).await?;
        Ok(records.into_iter().map(|record| shown(record, None)).collect())
    }

    /// Stores a secret. Sandboxes that are created from now on get it.
    ///
    /// # Errors
    /// A name that is taken; a value or binding that cannot be used.
    pub async fn create_secret(
        &self,
        org_id: &OrgId,
        request: SecretRequest,
    ) -> Result<Secret, ServiceError> {
        binding::check_name(&request.name)?;
        let egress = resolved(request.egress, &request.name);
        check_egress(egress.as_deref())?;
        binding::check_value(request.value.expose(), egress.is_some())?;
        self.refuse_spliced(org_id, &request.name, egress.as_deref())
            .await?;
        let new = NewSecret {
            id: SecretId::random(),
            org_id: org_id.clone(),
            scope: SCOPE.to_owned(),
            egress,
            placeholder_prefix: placeholder::prefix_of(request.value.expose()).to_owned(),
            sealed: self.seal(org_id, &request.name, &request.value)?,
            name: request.name,
            created_at: super::now(),
        };
        let record = self.shared.store.insert_secret(&new, MAX_SECRETS).await?;
        tracing::info!(target: "audit", org_id = %org_id, secret = record.name, bound = record.egress.is_some(), "secret stored");
        Ok(shown(record, None))
    }

    /// Changes the value, or where it may go, or both; for running sandboxes too.
    ///
    /// # Errors
    /// No such secret; a value or binding that cannot be used.
    pub async fn update_secret(
        &self,
        org_id: &OrgId,
        name: &str,
        request: SecretChangeRequest,
    ) -> Result<Secret, ServiceError> {
        if request.value.is_none() && request.egress.is_none() {
            return Err(ServiceError::Invalid {
                field: "value".to_owned(),
                message: "is required".to_owned(),
            });
        }
        for _attempt in 0..UPDATE_ATTEMPTS {
            let present = self.shared.store.secret(org_id, name).await?;
            let present = present.ok_or_else(|| no_such_secret(name))?;
            let update = self.checked_update(&present, &request).await?;
            match self
                .shared
                .store
                .update_secret(&present, update, super::now())
                .await
            {
                Ok((record, change)) => {
                    tracing::info!(target: "audit", org_id = %org_id, secret = name, revision = change.revision, rotated = request.value.is_some(), "secret changed");
                    let applied = self.secrets_applied(&change).await;
                    return Ok(shown(record, Some(applied)));
                }
                // Changed or deleted meanwhile: look again.
                Err(StoreError::Conflict(Conflict::WrongState)) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(ServiceError::Conflict(
            "the secret is being changed by others all the time".to_owned(),
        ))
    }

    async fn checked_update(
        &self,
        present: &SecretRecord,
        request: &SecretChangeRequest,
    ) -> Result<SecretUpdate, ServiceError> {
        let egress = request
            .egress
            .clone()
            .map(|egress| resolved(egress, &present.name));
        if let Some(egress) = &egress {
            check_egress(egress.as_deref())?;
            self.refuse_spliced(&present.org_id, &present.name, egress.as_deref())
                .await?;
        }
        let bound = egress.as_ref().unwrap_or(&present.egress).is_some();
        let value = match &request.value {
            Some(value) => {
                binding::check_value(value.expose(), bound)?;
                let sealed = self.seal(&present.org_id, &present.name, value)?;
                Some((sealed, placeholder::prefix_of(value.expose()).to_owned()))
            }
            None => {
                // What was a plain variable need not be a value that can be injected.
                let value = self.unseal(present)?;
                binding::check_value(value.expose(), bound).map_err(|error| Unacceptable {
                    field: "egress".to_owned(),
                    message: format!("the stored value cannot be bound: {}", error.message),
                })?;
                None
            }
        };
        Ok(SecretUpdate { value, egress })
    }

    /// Deletes a secret; in running sandboxes its placeholders are worthless from then on.
    ///
    /// # Errors
    /// No such secret.
    pub async fn delete_secret(&self, org_id: &OrgId, name: &str) -> Result<(), ServiceError> {
        let deleted = self.shared.store.delete_secret(org_id, name).await?;
        let change = deleted.ok_or_else(|| no_such_secret(name))?;
        tracing::info!(target: "audit", org_id = %org_id, secret = name, revision = change.revision, "secret deleted");
        if !self.secrets_applied(&change).await {
            tracing::warn!(org_id = %org_id, secret = name, "the node has not acknowledged a revocation yet; its lease ends within a minute");
        }
        Ok(())
    }

    /// Gives a running sandbox secrets; later commands in it have them.
    ///
    /// # Errors
    /// No such secret or sandbox; a sandbox that does not run.
    pub async fn inject_secrets(
        &self,
        org_id: &OrgId,
        id: &SandboxId,
        choice: SecretChoice,
    ) -> Result<SecretsInjected, ServiceError> {
        let record = self.running(org_id, id).await?;
        if let Some(own) = self.shared.store.sandbox_policy(id).await? {
            let chosen = self.chosen(org_id, &choice).await?;
            if let Some(clash) = clash(&own.policy, &chosen) {
                return Err(ServiceError::Conflict(clash.message("this sandbox")));
            }
        }
        let injected = self.shared.store.inject_secrets(&record.id, &choice).await;
        let (injected, change) = injected.map_err(|error| unknown_name(error, &choice))?;
        tracing::info!(target: "audit", org_id = %org_id, sandbox_id = %id, secrets = injected.join(","), "secrets injected");
        Ok(SecretsInjected {
            sandbox_id: record.id,
            applied: self.secrets_applied(&change).await,
            injected,
        })
    }

    /// Adds a sandbox's secrets to the environment of a command. What the caller or the sandbox's creator set
    /// by themselves wins.
    pub(crate) async fn with_secrets(
        &self,
        record: &SandboxRecord,
        mut exec: Exec,
    ) -> Result<Exec, ServiceError> {
        for own in self.shared.store.sandbox_secrets(&record.id).await? {
            let name = &own.secret.name;
            if exec.env.contains_key(name) || record.spec.env.contains_key(name) {
                continue;
            }
            let value = match &own.secret.egress {
                Some(_bound) => own.placeholder.clone(),
                None => self.unseal(&own.secret)?.expose().to_owned(),
            };
            exec.env.insert(name.clone(), value);
        }
        check_environment(&exec.env).map_err(|error| ServiceError::Invalid {
            field: "env".to_owned(),
            message: format!("together with the sandbox's secrets: {error}"),
        })?;
        Ok(exec)
    }

    /// The bindings of the secrets that a sandbox has.
    pub(super) async fn bindings_of(
        &self,
        id: &SandboxId,
    ) -> Result<Vec<(String, EgressBinding)>, ServiceError> {
        let secrets = self.shared.store.sandbox_secrets(id).await?;
        Ok(named_bindings(secrets.into_iter().map(|own| own.secret)))
    }

    /// The bindings that a choice of secrets brings along.
    pub(super) async fn chosen(
        &self,
        org_id: &OrgId,
        choice: &SecretChoice,
    ) -> Result<Vec<(String, EgressBinding)>, ServiceError> {
        if *choice == SecretChoice::None {
            return Ok(Vec::new());
        }
        let secrets = self.shared.store.secrets(org_id).await?;
        let chosen = secrets.into_iter().filter(|secret| match choice {
            SecretChoice::All => true,
            SecretChoice::None => false,
            SecretChoice::Named(names) => names.contains(&secret.name),
        });
        Ok(named_bindings(chosen))
    }

    /// Refuses bindings to hosts whose TLS is left unread by the organisation's policy, or by that of a sandbox
    /// that has the secret.
    async fn refuse_spliced(
        &self,
        org_id: &OrgId,
        name: &str,
        egress: Option<&[EgressBinding]>,
    ) -> Result<(), ServiceError> {
        let Some(egress) = egress else { return Ok(()) };
        let named: Vec<_> = egress.iter().map(|one| (name.to_owned(), one.clone())).collect();
        let refused = |message| ServiceError::Invalid {
            field: "egress.hosts".to_owned(),
            message,
        };
        if let Some(stored) = self.shared.store.organization_policy(org_id).await?
            && let Some(clash) = clash(&stored.policy, &named)
        {
            return Err(refused(clash.message("the organization")));
        }
        for (id, policy) in self.shared.store.live_sandbox_policies(org_id).await? {
            // A sandbox that does not have the secret keeps its policy as it likes.
            let has = self.shared.store.sandbox_secrets(&id).await?;
            if has.iter().any(|own| own.secret.name == name)
                && let Some(clash) = clash(&policy, &named)
            {
                return Err(refused(clash.message(id.as_str())));
            }
        }
        Ok(())
    }

    async fn secrets_applied(&self, change: &SecretChange) -> bool {
        self.node_applied(change.revision, &change.concerns).await
    }

    async fn node_applied(&self, revision: Revision, concerns: &[SandboxId]) -> bool {
        if concerns.is_empty() {
            return true;
        }
        match self.shared.node.enforced(revision, concerns, APPLY_TIMEOUT).await {
            Enforcement::Applied => true,
            Enforcement::Refused(message) => {
                tracing::error!(message, "the node cannot enforce a binding that was accepted");
                false
            }
            Enforcement::Pending => false,
        }
    }

    fn seal(
        &self,
        org_id: &OrgId,
        name: &str,
        value: &Sensitive,
    ) -> Result<crate::vault::Sealed, ServiceError> {
        self.shared
            .vault
            .seal(org_id, name, value)
            .map_err(|error| ServiceError::Internal(error.to_string()))
    }

    fn unseal(&self, secret: &SecretRecord) -> Result<Sensitive, ServiceError> {
        self.shared
            .vault
            .unseal(&secret.org_id, &secret.name, &secret.sealed)
            .map_err(|error| ServiceError::Internal(format!("secret {}: {error}", secret.id)))
    }
}

fn named_bindings(secrets: impl Iterator<Item = SecretRecord>) -> Vec<(String, EgressBinding)> {
    let mut bindings = Vec::new();
    for secret in secrets {
        for binding in secret.egress.into_iter().flatten() {
            bindings.push((secret.name.clone(), binding));
        }
    }
    bindings
}

/// An unknown name is a field of whatever named it.
pub(super) fn unknown_name(error: StoreError, choice: &SecretChoice) -> ServiceError {
    match (error, choice) {
        (StoreError::Conflict(Conflict::NoSuchSecret { index }), SecretChoice::Named(names)) => {
            no_such_secret(names.get(index).map_or("", String::as_str))
        }
        (error, _) => error.into(),
    }
}

/// Repeats a name only where it is one: somebody may have put a value in its place.
fn no_such_secret(name: &str) -> ServiceError {
    match binding::check_name(name) {
        Ok(()) => ServiceError::NotFound(format!("secret `{name}`")),
        Err(_no_name) => ServiceError::NotFound("such secret".to_owned()),
    }
}

fn resolved(egress: EgressRequest, name: &str) -> Option<Vec<EgressBinding>> {
    match egress {
        EgressRequest::Preset => presets::bindings(name),
        EgressRequest::Plain => None,
        EgressRequest::Bound(bindings) => Some(bindings),
    }
}

fn check_egress(egress: Option<&[EgressBinding]>) -> Result<(), ServiceError> {
    let Some(bindings) = egress else { return Ok(()) };
    if bindings.is_empty() || bindings.len() > MOST_BINDINGS {
        return Err(ServiceError::Invalid {
            field: "egress".to_owned(),
            message: format!(
                "expected a binding, or a list of 1 to {MOST_BINDINGS}; `null` for a plain environment variable"
            ),
        });
    }
    for (index, one) in bindings.iter().enumerate() {
        let at = match bindings.len() {
            1 => "egress".to_owned(),
            _ => format!("egress[{index}]"),
        };
        binding::check(one, &at)?;
    }
    Ok(())
}

fn shown(record: SecretRecord, applied: Option<bool>) -> Secret {
    Secret {
        id: record.id,
        name: record.name,
        scope: record.scope,
        egress: record.egress,
        created_at: record.created_at,
        updated_at: record.updated_at,
        applied,
    }
}
