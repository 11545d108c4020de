//! After a start: what is in the store and what really runs are brought together, and nothing is forgotten.

use std::{collections::HashMap, sync::Arc, time::Duration};

use sandgate_api::{id::SandboxId, rest::SandboxStatus};

use super::{BackendState, Service};
use crate::{
    backend::{BackendError, LocalBackend},
    lifecycle::{Cause, State},
    store::StoreError,
};

/// The start could not be completed.
#[derive(Debug, thiserror::Error)]
pub enum ReconcileError {
    /// The backend does not know what exists.
    #[error("the backend cannot say what exists")]
    Backend(#[from] BackendError),
    /// The store does not know what should exist.
    #[error("the store cannot say what should exist")]
    Store(#[from] StoreError),
}

impl Service {
    /// Takes the backend into use: adopts what runs, takes away what nobody knows, marks as ended what is
    /// gone. Then sandboxes can be created.
    ///
    /// # Errors
    /// When backend or store cannot say what there is.
    pub async fn adopt(&self, backend: LocalBackend) -> Result<(), ReconcileError> {
        let backend = Arc::new(backend);
        let mut found: HashMap<SandboxId, bool> = backend
            .inventory()
            .await?
            .into_iter()
            .map(|found| (found.sandbox_id, found.running))
            .collect();
        for record in self.shared.store.live_sandboxes().await? {
            let running = found.remove(&record.id);
            let state = start_state(record.status, running);
            tracing::info!(sandbox_id = %record.id, status = record.status.as_str(), ?running, ?state, "after a restart");
            let paused = (record.paused && state == State::Running).then(|| record.id.clone());
            drop(self.keep(Arc::clone(&backend), record, state));
            if let Some(id) = paused {
                self.pause_again(&backend, &id).await;
            }
        }
        let pooled = self.shared.store.pooled().await?;
        self.adopt_pooled(&backend, pooled, |id| found.remove(id));
        for id in found.into_keys() {
            tracing::warn!(sandbox_id = %id, "a sandbox that nobody knows is taken away");
            let span = tracing::info_span!(parent: None, "sandbox", sandbox_id = %id);
            self.shared
                .tasks
                .spawn_within("stray sandbox", &span, destroy_stray(Arc::clone(&backend), id));
        }
        self.shared
            .tasks
            .spawn("warm pool", self.clone().fill_pool(Arc::clone(&backend)));
        self.shared
            .tasks
            .spawn("meters", self.clone().measure(Arc::clone(&backend)));
        self.shared.backend.send_replace(BackendState::Ready(backend));
        Ok(())
    }
}

/// Where a stored sandbox goes on. `running`: whether the backend has it, and whether its first process is
/// alive.
fn start_state(status: SandboxStatus, running: Option<bool>) -> State {
    match (status, running) {
        (SandboxStatus::Running, Some(true)) => State::Running,
        (SandboxStatus::Running, Some(false)) => State::ending(Cause::Died),
        (SandboxStatus::Running, None) => State::ending(Cause::Lost),
        (SandboxStatus::Creating, _) => State::ending(Cause::Interrupted),
        (SandboxStatus::Terminating | SandboxStatus::Terminated | SandboxStatus::Error, _) => {
            State::ending(Cause::Stopped)
        }
    }
}

async fn destroy_stray(backend: Arc<LocalBackend>, id: SandboxId) {
    let mut pause = Duration::from_millis(200);
    while let Err(error) = backend.destroy(&id).await {
        tracing::error!(sandbox_id = %id, %error, "a stray sandbox cannot be taken away");
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_secs(30));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_runs_is_adopted_and_everything_else_ends() {
        let table = [
            (SandboxStatus::Running, Some(true), State::Running),
            (SandboxStatus::Running, Some(false), State::ending(Cause::Died)),
            (SandboxStatus::Running, None, State::ending(Cause::Lost)),
            (
                SandboxStatus::Creating,
                Some(true),
                State::ending(Cause::Interrupted),
            ),
            (SandboxStatus::Creating, None, State::ending(Cause::Interrupted)),
            (
                SandboxStatus::Terminating,
                Some(true),
                State::ending(Cause::Stopped),
            ),
            (SandboxStatus::Terminating, None, State::ending(Cause::Stopped)),
        ];
        for (status, running, expected) in table {
            assert_eq!(start_state(status, running), expected, "{status:?} {running:?}");
        }
    }
}
