//! Who did what by the API: every action is on record before it is answered.
//!
//! Many requests at once are recorded by one transaction: whoever comes first writes what all have noted. A record that
//! could not be written, because the database failed or its request was given up, is written with the next ones.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
};

use sandgate_api::{
    id::{OrgId, SandboxId},
    rest::{ActionList, ActionSummary},
};

use super::{Service, ServiceError};
use crate::store::{ActionFilter, NewAction};

/// Records that wait for a database that fails. More are lost, which is logged.
const MAX_WAITING: usize = 10_000;

/// Records that one transaction takes.
const BATCH: usize = 500;

/// What is noted and not written yet.
#[derive(Debug, Default)]
pub(super) struct Actions {
    waiting: Mutex<VecDeque<NewAction>>,
    /// Whoever holds it writes.
    turn: tokio::sync::Mutex<()>,
}

impl Actions {
    fn waiting(&self) -> MutexGuard<'_, VecDeque<NewAction>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Service {
    /// Notes an action, which somebody writes down soon.
    pub fn note_action(&self, action: NewAction) {
        let mut waiting = self.shared.actions.waiting();
        if waiting.len() >= MAX_WAITING {
            tracing::error!(target: "audit", action = action.action, org_id = %action.org_id, "an action is not on record");
            return;
        }
        waiting.push_back(action);
    }

    /// Writes down what was noted before this was called.
    pub async fn write_actions(&self) {
        let actions = &self.shared.actions;
        let _turn = actions.turn.lock().await;
        loop {
            let batch: Vec<NewAction> = actions.waiting().iter().take(BATCH).cloned().collect();
            if batch.is_empty() {
                return;
            }
            if let Err(error) = self.shared.store.insert_actions(&batch).await {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    waiting = batch.len(),
                    "actions cannot be recorded; the next request tries again"
                );
                return;
            }
            // Nobody else takes from the front while it is this one's turn.
            actions.waiting().drain(..batch.len());
        }
    }

    /// The same, where nobody waits for it.
    pub fn write_actions_soon(&self) {
        let service = self.clone();
        self.shared
            .tasks
            .spawn("actions", async move { service.write_actions().await });
    }

    /// The organisation's actions, newest first.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn actions(&self, org_id: &OrgId, filter: &ActionFilter) -> Result<ActionList, ServiceError> {
        let (events, total) = self.shared.store.actions(org_id, filter).await?;
        Ok(ActionList { events, total })
    }

    /// What was done to a sandbox, in numbers.
    ///
    /// # Errors
    /// [`ServiceError::SandboxNotFound`].
    pub async fn action_summary(
        &self,
        org_id: &OrgId,
        id: &SandboxId,
    ) -> Result<ActionSummary, ServiceError> {
        self.sandbox(org_id, id).await?;
        Ok(self.shared.store.action_summary(org_id, id).await?)
    }
}
