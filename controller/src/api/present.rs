//! The request under way, as far as it is known: extractors and handlers say who asks and what it is about, and
//! [`super::request`], which sees every request, makes a record of it. No handler has to think of that.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sandgate_api::id::SandboxId;

use super::error::ApiError;
use crate::{limiter::Allowance, service::Caller};

/// Paths that are remembered of one request.
const MAX_PATHS: usize = 8;

tokio::task_local! {
    static PRESENT: Present;
}

/// What is known so far.
#[derive(Clone, Default)]
pub(super) struct Present(Arc<Mutex<Known>>);

#[derive(Clone, Default)]
pub(super) struct Known {
    /// Who asks.
    pub(super) caller: Option<Caller>,
    /// The sandbox that it is about.
    pub(super) sandbox: Option<SandboxId>,
    /// Paths inside it that it is about.
    pub(super) paths: Vec<String>,
    /// What the caller may still do.
    pub(super) allowance: Option<Allowance>,
}

impl Present {
    /// Does the work of this request.
    pub(super) async fn during<T>(&self, work: impl Future<Output = T>) -> T {
        PRESENT.scope(self.clone(), work).await
    }

    /// What is known by now.
    pub(super) fn known(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn learn(learn: impl FnOnce(&mut Known)) {
    // Outside of a request there is nothing to learn about.
    let _outside = PRESENT.try_with(|present| learn(&mut present.known()));
}

/// This is who asks.
pub(super) fn asks(caller: &Caller) {
    learn(|known| known.caller = Some(caller.clone()));
}

/// This sandbox is what it is about.
pub(super) fn concerns(id: &SandboxId) {
    learn(|known| known.sandbox = Some(id.clone()));
}

/// This path inside a sandbox is what it is about.
pub(super) fn touches(path: &str) {
    learn(|known| {
        if known.paths.len() < MAX_PATHS {
            known.paths.push(path.chars().take(256).collect());
        }
    });
}

/// So much may still be done; an error when this was too much.
pub(super) fn counts(allowance: Option<Allowance>) -> Result<(), ApiError> {
    let Some(allowance) = allowance else { return Ok(()) };
    learn(|known| known.allowance = Some(allowance));
    match allowance.retry_after {
        None => Ok(()),
        Some(_) => Err(super::limits::too_many()),
    }
}
